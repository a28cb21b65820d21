//! Pods that are alike share what was found out about each node.
//!
//! Whether a node by itself suits a pod, and what by itself speaks for it, is the same for all pods that say the
//! same ([`PodInfo::alike`]) until the node changes: so it is worked out once for each change of a node, however many
//! pods are looked at. What depends on other nodes as well (spreading, affinity to pods) is never kept.
//!
//! Example: of 5,000 nodes the first of a thousand alike pods looks at five hundred; the second, which goes round
//! from where the first ended, at the next five hundred; the eleventh only at the ten that got a pod since.

use std::collections::HashMap;
use std::sync::Arc;

use crate::decide::normalize_scores;
use crate::picture::Picture;
use crate::plugins::{Normalize, Objection, PLUGINS, Prepared, Scoring};

/// Groups that are kept; the one that was not asked for longest goes first. One takes some 40 bytes for each node.
const GROUPS_MAX: usize = 32;

/// What is known for each sort of pods.
#[derive(Debug, Default)]
pub struct Groups {
    by_text: HashMap<Arc<str>, Group>,
    asked: u64,
}

impl Groups {
    /// What is known for the pod, to be handed back by [`Groups::put`].
    pub fn take(&mut self, prepared: &Prepared, picture: &Picture) -> Group {
        self.asked += 1;
        let known = self.by_text.remove(&prepared.info.alike);
        let known = known.filter(|group| group.images_at == picture.images_changed());
        let mut group = known.unwrap_or_else(|| Group::new(prepared, picture));
        group.asked = self.asked;
        group.fit_to(picture);
        group
    }

    pub fn put(&mut self, text: &Arc<str>, group: Group) {
        if self.by_text.len() >= GROUPS_MAX
            && let Some(oldest) =
                self.by_text.iter().min_by_key(|(_, group)| group.asked).map(|(text, _)| text.clone())
        {
            self.by_text.remove(&oldest);
        }
        self.by_text.insert(text.clone(), group);
    }
}

/// What is known of the nodes for pods that are alike.
#[derive(Debug)]
pub struct Group {
    /// By slot: how the node was when it was looked at, as [`Picture::changed`] says; 0 for never.
    looked_at: Vec<u64>,
    /// By slot: what stands against the node, as a place in `objections`; 0 for nothing.
    verdicts: Vec<u16>,
    /// With the rows of the plugins that objected; the first is never used.
    objections: Vec<(usize, Arc<Objection>)>,
    scoring: Scoring,
    /// By slot: the weighted sum of the scores that are used as they are.
    sums: Vec<i64>,
    /// Scores that mean something only beside those of other nodes, by slot.
    raw: Vec<Raw>,
    images_at: u64,
    asked: u64,
}

#[derive(Debug)]
struct Raw {
    row: usize,
    weight: i64,
    normalize: Normalize,
    scores: Vec<i64>,
}

impl Group {
    fn new(prepared: &Prepared, picture: &Picture) -> Group {
        let scoring = Scoring::alone(prepared, picture);
        let raw = scoring.scores.iter().filter_map(|(row, weight)| match PLUGINS[*row].score? {
            (_, Normalize::As) => None,
            (_, normalize) => Some(Raw { row: *row, weight: *weight, normalize, scores: Vec::new() }),
        });
        Group {
            looked_at: Vec::new(),
            verdicts: Vec::new(),
            objections: vec![(0, Arc::new(Objection::new("", false)))],
            raw: raw.collect(),
            scoring,
            sums: Vec::new(),
            images_at: picture.images_changed(),
            asked: 0,
        }
    }

    fn fit_to(&mut self, picture: &Picture) {
        let slots = picture.slots();
        if self.looked_at.len() < slots {
            self.looked_at.resize(slots, 0);
            self.verdicts.resize(slots, 0);
            self.sums.resize(slots, 0);
            for raw in &mut self.raw {
                raw.scores.resize(slots, 0);
            }
        }
    }

    /// What stands against the node by itself, with the row of the plugin.
    pub fn objection(
        &mut self,
        prepared: &Prepared,
        picture: &Picture,
        slot: u32,
    ) -> Option<&(usize, Arc<Objection>)> {
        let (at, changed) = (slot as usize, picture.changed(slot));
        if self.looked_at[at] != changed {
            self.look(prepared, picture, slot);
            self.looked_at[at] = changed;
        }
        match self.verdicts[at] {
            0 => None,
            verdict => Some(&self.objections[verdict as usize]),
        }
    }

    fn look(&mut self, prepared: &Prepared, picture: &Picture, slot: u32) {
        let (at, node) = (slot as usize, picture.node(slot));
        if let Some((row, objection)) = prepared.objection(&prepared.alone, picture, node) {
            let same = |(other, known): &(usize, Arc<Objection>)| *other == row && **known == objection;
            let place = self.objections.iter().skip(1).position(same).map(|place| place + 1);
            let place = place.unwrap_or_else(|| {
                // A great many different objections are not worth keeping apart from each other for long.
                if self.objections.len() > usize::from(u16::MAX / 2) {
                    self.objections.truncate(1);
                    self.looked_at.fill(0);
                }
                self.objections.push((row, Arc::new(objection)));
                self.objections.len() - 1
            });
            self.verdicts[at] = place as u16;
            return;
        }
        self.verdicts[at] = 0;
        let mut sum = 0;
        for (row, weight) in &self.scoring.scores {
            let Some((score, normalize)) = PLUGINS[*row].score else { continue };
            let score = score(prepared, &self.scoring, picture, node, 0);
            if normalize == Normalize::As {
                sum += score * weight;
            } else if let Some(raw) = self.raw.iter_mut().find(|raw| raw.row == *row) {
                raw.scores[at] = score;
            }
        }
        self.sums[at] = sum;
    }

    /// What speaks for each of the nodes by itself. They have been looked at, and are feasible.
    pub fn totals(&self, feasible: &[u32]) -> Vec<i64> {
        let mut totals: Vec<i64> = feasible.iter().map(|slot| self.sums[*slot as usize]).collect();
        let mut scores = Vec::with_capacity(feasible.len());
        for raw in &self.raw {
            scores.clear();
            scores.extend(feasible.iter().map(|slot| raw.scores[*slot as usize]));
            normalize_scores(&mut scores, raw.normalize);
            for (total, score) in totals.iter_mut().zip(&scores) {
                *total += score * raw.weight;
            }
        }
        totals
    }
}
