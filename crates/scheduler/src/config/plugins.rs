//! Which plugins a profile has: the sets of the file, each applied to what the sets before it made of the default.

use serde::Deserialize;

use super::{Checked, refuse};
use crate::plugins::{DEFAULT_BINDER, DEFAULT_PREEMPTION, PLUGINS, PRIORITY_SORT, SCHEDULING_GATES};
use crate::profile::Profile;
use crate::reserve;

/// Plugins of upstream's default profile that are not part of this scheduler: they may be switched off.
const ABSENT: &[&str] = &["DynamicResources", "GangScheduling", "NodeDeclaredFeatures"];

/// Sets by extension point. A plugin here is one thing, so that it is switched by `multiPoint`, or by the point that
/// decides: filter, score, postFilter, preEnqueue, reserve.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Plugins {
    multi_point: Set,
    filter: Set,
    score: Set,
    post_filter: Set,
    pre_enqueue: Set,
    reserve: Set,
    queue_sort: Set,
    pre_filter: Set,
    pre_score: Set,
    permit: Set,
    pre_bind: Set,
    bind: Set,
    post_bind: Set,
    placement_generate: Set,
    placement_score: Set,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Set {
    enabled: Vec<Named>,
    disabled: Vec<Named>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Named {
    name: String,
    weight: Option<i64>,
}

impl Plugins {
    pub(super) fn apply(self, path: &str, profile: &mut Profile) -> Checked<()> {
        self.leave_the_rest(path)?;
        let points = [
            (Point { name: "multiPoint", filters: true, scores: true }, &self.multi_point),
            (Point { name: "filter", filters: true, scores: false }, &self.filter),
            (Point { name: "score", filters: false, scores: true }, &self.score),
        ];
        for (point, set) in points {
            let path = format!("{path}.{}", point.name);
            for (n, named) in set.disabled.iter().enumerate() {
                point.switch_off(&format!("{path}.disabled[{n}].name"), &named.name, profile)?;
            }
            for (n, named) in set.enabled.iter().enumerate() {
                point.switch_on(&format!("{path}.enabled[{n}]"), named, profile)?;
            }
        }
        let Profile { preemption, gates, .. } = profile;
        self.post_filter.switch_only(&format!("{path}.postFilter"), DEFAULT_PREEMPTION, preemption)?;
        self.pre_enqueue.switch_only(&format!("{path}.preEnqueue"), SCHEDULING_GATES, gates)?;
        self.reserve.switch_reserving(&format!("{path}.reserve"), profile)
    }

    /// The points at which nothing can be switched say so, unless they are told what is so anyway.
    fn leave_the_rest(&self, path: &str) -> Checked<()> {
        let fixed = [
            ("queueSort", &self.queue_sort, PRIORITY_SORT),
            ("bind", &self.bind, DEFAULT_BINDER),
            ("preFilter", &self.pre_filter, ""),
            ("preScore", &self.pre_score, ""),
            ("permit", &self.permit, ""),
            ("preBind", &self.pre_bind, ""),
            ("postBind", &self.post_bind, ""),
            ("placementGenerate", &self.placement_generate, ""),
            ("placementScore", &self.placement_score, ""),
        ];
        for (point, set, only) in fixed {
            let changes = set
                .disabled
                .iter()
                .any(|named| !(named.name == only || named.name == "*") || only.is_empty())
                || set.enabled.iter().any(|named| named.name != only);
            let replaced = set.disabled.is_empty() || !set.enabled.is_empty();
            if changes || !replaced {
                let why =
                    "plugins are switched by multiPoint, filter, score, postFilter, preEnqueue and reserve";
                return refuse(&format!("{path}.{point}"), why);
            }
        }
        Ok(())
    }
}

/// A point at which any plugin can be switched, and what is switched there.
struct Point {
    name: &'static str,
    filters: bool,
    scores: bool,
}

impl Point {
    fn is_all(&self) -> bool {
        self.filters && self.scores
    }

    fn switch_off(&self, path: &str, name: &str, profile: &mut Profile) -> Checked<()> {
        if name == "*" {
            if self.filters {
                profile.filters.clear();
                profile.without.extend(reserve::NAMES.iter().map(|name| (*name).to_owned()));
            }
            if self.scores {
                profile.scores.clear();
            }
            if self.is_all() {
                profile.preemption = false;
                profile.gates = false;
            }
            return Ok(());
        }
        if ABSENT.contains(&name) {
            return Ok(());
        }
        known(path, name)?;
        match name {
            PRIORITY_SORT | DEFAULT_BINDER => {
                return refuse(path, format!("{name} cannot be switched off"));
            }
            DEFAULT_PREEMPTION if self.is_all() => profile.preemption = false,
            SCHEDULING_GATES if self.is_all() => profile.gates = false,
            _ => {}
        }
        if self.filters {
            profile.filters.retain(|row| PLUGINS[*row].name != name);
            if reserve::NAMES.contains(&name) {
                profile.without.insert(name.to_owned());
            }
        }
        if self.scores {
            profile.scores.retain(|(row, _)| PLUGINS[*row].name != name);
        }
        Ok(())
    }

    fn switch_on(&self, path: &str, named: &Named, profile: &mut Profile) -> Checked<()> {
        let name = named.name.as_str();
        known(&format!("{path}.name"), name)?;
        if named.weight.is_some_and(|weight| !(0..=10_000).contains(&weight)) {
            return refuse(&format!("{path}.weight"), "must be from 0 to 10000");
        }
        match name {
            DEFAULT_PREEMPTION if self.is_all() => profile.preemption = true,
            SCHEDULING_GATES if self.is_all() => profile.gates = true,
            _ => {}
        }
        if self.filters {
            profile.without.remove(name);
        }
        let Some(row) = PLUGINS.iter().position(|plugin| plugin.name == name) else { return Ok(()) };
        if self.filters && PLUGINS[row].filter.is_some() {
            profile.filters.retain(|other| *other != row);
            profile.filters.push(row);
            // Cheap ones first, as in the table.
            profile.filters.sort_unstable();
        }
        if self.scores && PLUGINS[row].score.is_some() {
            let weight = named.weight.filter(|weight| *weight > 0).unwrap_or(PLUGINS[row].weight);
            profile.scores.retain(|(other, _)| *other != row);
            profile.scores.push((row, weight));
        }
        Ok(())
    }
}

impl Set {
    fn lists(&self) -> [(&'static str, &[Named], bool); 2] {
        [("disabled", &self.disabled, false), ("enabled", &self.enabled, true)]
    }

    /// Switches the one plugin that this point has.
    fn switch_only(&self, path: &str, name: &str, on: &mut bool) -> Checked<()> {
        for (list, given, to) in self.lists() {
            for (n, named) in given.iter().enumerate() {
                if named.name == name || (!to && named.name == "*") {
                    *on = to;
                } else if !ABSENT.contains(&named.name.as_str()) || to {
                    return refuse(&format!("{path}.{list}[{n}].name"), format!("only {name} is known here"));
                }
            }
        }
        Ok(())
    }

    fn switch_reserving(&self, path: &str, profile: &mut Profile) -> Checked<()> {
        for (list, given, to) in self.lists() {
            for (n, named) in given.iter().enumerate() {
                if named.name == "*" && !to {
                    profile.without.extend(reserve::NAMES.iter().map(|name| (*name).to_owned()));
                } else if !reserve::NAMES.contains(&named.name.as_str()) {
                    let why = format!("{:?} reserves nothing", named.name);
                    return refuse(&format!("{path}.{list}[{n}].name"), why);
                } else if to {
                    profile.without.remove(&named.name);
                } else {
                    profile.without.insert(named.name.clone());
                }
            }
        }
        Ok(())
    }
}

/// Whether the name is of a plugin that can be switched; says so otherwise.
pub(super) fn known(path: &str, name: &str) -> Checked<()> {
    let beside = [SCHEDULING_GATES, PRIORITY_SORT, DEFAULT_BINDER, DEFAULT_PREEMPTION];
    let mut names = PLUGINS.iter().map(|plugin| plugin.name).chain(beside);
    if names.any(|known| known == name) || reserve::NAMES.contains(&name) {
        return Ok(());
    }
    refuse(path, format!("there is no plugin {name:?}"))
}
