//! Rules of roles: what one allows, and whether a set of them covers another.
//!
//! Upstream: pkg/registry/rbac/validation and the RBAC authorizer.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::rbac::v1 as rbac;

use crate::Attributes;

/// A PolicyRule, with absent lists as empty ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    pub verbs: Vec<String>,
    pub groups: Vec<String>,
    pub resources: Vec<String>,
    pub names: Vec<String>,
    pub paths: Vec<String>,
}

impl From<&rbac::PolicyRule> for Rule {
    fn from(rule: &rbac::PolicyRule) -> Rule {
        Rule {
            verbs: rule.verbs.clone(),
            groups: rule.api_groups.clone().unwrap_or_default(),
            resources: rule.resources.clone().unwrap_or_default(),
            names: rule.resource_names.clone().unwrap_or_default(),
            paths: rule.non_resource_urls.clone().unwrap_or_default(),
        }
    }
}

fn lists(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == "*" || item == wanted)
}

/// `*`, `pods`, `pods/log` and `*/scale` may stand for a resource and its subresource.
fn names_resource(list: &[String], resource: &str, subresource: &str) -> bool {
    list.iter().any(|item| {
        item == "*"
            || match item.split_once('/') {
                None => subresource.is_empty() && item == resource,
                Some((of, sub)) => {
                    !subresource.is_empty() && sub == subresource && (of == "*" || of == resource)
                }
            }
    })
}

/// A path, or a prefix that ends in `*`.
fn names_path(list: &[String], path: &str) -> bool {
    list.iter().any(|item| match item.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix),
        None => item == path,
    })
}

impl Rule {
    pub fn allows(&self, attributes: &Attributes<'_>) -> bool {
        match *attributes {
            Attributes::Resource { verb, group, resource, subresource, name, .. } => {
                lists(&self.verbs, verb)
                    && lists(&self.groups, group)
                    && names_resource(&self.resources, resource, subresource)
                    && (self.names.is_empty() || self.names.iter().any(|n| n == name))
            }
            Attributes::Path { verb, path } => lists(&self.verbs, verb) && names_path(&self.paths, path),
        }
    }

    /// The rule as rules of one verb, group, resource and name (or path) each.
    fn atoms(&self) -> impl Iterator<Item = Rule> {
        let no_name = [String::new()];
        let mut atoms = Vec::new();
        for verb in &self.verbs {
            for (group, resource) in
                self.groups.iter().flat_map(|group| self.resources.iter().map(move |r| (group, r)))
            {
                let names = if self.names.is_empty() { &no_name[..] } else { &self.names[..] };
                for name in names {
                    atoms.push(Rule {
                        verbs: vec![verb.clone()],
                        groups: vec![group.clone()],
                        resources: vec![resource.clone()],
                        names: if name.is_empty() { Vec::new() } else { vec![name.clone()] },
                        paths: Vec::new(),
                    });
                }
            }
            for path in &self.paths {
                atoms.push(Rule { verbs: vec![verb.clone()], paths: vec![path.clone()], ..Rule::default() });
            }
        }
        atoms.into_iter()
    }

    /// Whether whoever has this rule has all that the atom allows.
    fn covers(&self, atom: &Rule) -> bool {
        if !lists(&self.verbs, &atom.verbs[0]) {
            return false;
        }
        if let Some(path) = atom.paths.first() {
            return self.paths.iter().any(|own| match own.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => own == path,
            });
        }
        let (resource, subresource) = atom.resources[0].split_once('/').unwrap_or((&atom.resources[0], ""));
        lists(&self.groups, &atom.groups[0])
            && (self.resources.contains(&atom.resources[0])
                || names_resource(&self.resources, resource, subresource))
            && (self.names.is_empty() || atom.names.first().is_some_and(|name| self.names.contains(name)))
    }
}

impl fmt::Display for Rule {
    /// As upstream prints rules in messages: `{APIGroups:["apps"], Resources:["deployments"], Verbs:["get"]}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("NonResourceURLs", &self.paths),
            ("APIGroups", &self.groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.names),
            ("Verbs", &self.verbs),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(name, list)| {
                let quoted: Vec<String> = list.iter().map(|item| format!("{item:?}")).collect();
                format!("{name}:[{}]", quoted.join(" "))
            })
            .collect();
        write!(f, "{{{}}}", parts.join(", "))
    }
}

/// What of `wanted` is not covered by `held`, in the fewest rules that say it; empty when all is.
pub fn uncovered(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    let missing =
        wanted.iter().flat_map(Rule::atoms).filter(|atom| !held.iter().any(|rule| rule.covers(atom)));
    // Atoms that differ in their verb alone read better as one rule.
    let mut together: BTreeMap<Rule, Vec<String>> = BTreeMap::new();
    for mut atom in missing {
        let verbs = std::mem::take(&mut atom.verbs);
        let known = together.entry(atom).or_default();
        known.extend(verbs.into_iter().filter(|verb| !known.contains(verb)).collect::<Vec<_>>());
    }
    together.into_iter().map(|(rule, verbs)| Rule { verbs, ..rule }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `verbs|groups|resources|names` or `verbs|paths`, lists joined by commas.
    fn rule(text: &str) -> Rule {
        let parts: Vec<Vec<String>> = text
            .split('|')
            .map(|part| match part {
                "-" => vec![String::new()],
                "" => Vec::new(),
                _ => part.split(',').map(str::to_owned).collect(),
            })
            .collect();
        match &parts[..] {
            [verbs, paths] => Rule { verbs: verbs.clone(), paths: paths.clone(), ..Rule::default() },
            [verbs, groups, resources, names] => Rule {
                verbs: verbs.clone(),
                groups: groups.clone(),
                resources: resources.clone(),
                names: names.clone(),
                paths: Vec::new(),
            },
            _ => panic!("{text}"),
        }
    }

    #[track_caller]
    fn check_resource(text: &str, verb: &str, group: &str, resource: &str, name: &str, want: bool) {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes =
            Attributes::Resource { verb, group, version: "v1", resource, subresource, namespace: "ns", name };
        assert_eq!(rule(text).allows(&attributes), want);
    }

    #[test]
    fn rules_allow_what_they_name() {
        check_resource("get,list|-|pods|", "get", "", "pods", "a", true);
        check_resource("get,list|-|pods|", "watch", "", "pods", "a", false);
        check_resource("get|-|pods|", "get", "", "pods/log", "a", false);
        check_resource("get|-|pods/log|", "get", "", "pods/log", "a", true);
        check_resource("get|-|pods/log|", "get", "", "pods", "a", false);
        check_resource("*|*|*|", "delete", "apps", "deployments/scale", "a", true);
        check_resource("get|*|*/scale|", "get", "apps", "deployments/scale", "a", true);
        check_resource("get|*|*/scale|", "get", "apps", "deployments", "a", false);
        check_resource("get|apps|deployments|web", "get", "apps", "deployments", "web", true);
        check_resource("get|apps|deployments|web", "get", "apps", "deployments", "api", false);
        check_resource("list|apps|deployments|web", "list", "apps", "deployments", "", false);
        check_resource("get|-|pods|", "get", "metrics.k8s.io", "pods", "a", false);
    }

    #[test]
    fn paths_match_whole_or_by_prefix() {
        let open = rule("get|/healthz,/apis/*");
        for (path, want) in
            [("/healthz", true), ("/healthz/ping", false), ("/apis/apps", true), ("/apis", false)]
        {
            assert_eq!(open.allows(&Attributes::Path { verb: "get", path }), want, "{path}");
        }
        assert!(!open.allows(&Attributes::Path { verb: "post", path: "/healthz" }));
    }

    #[track_caller]
    fn check_uncovered(held: &[&str], wanted: &[&str], want: &[&str]) {
        let rules = |texts: &[&str]| texts.iter().map(|text| rule(text)).collect::<Vec<_>>();
        let missing: Vec<String> =
            uncovered(&rules(held), &rules(wanted)).iter().map(Rule::to_string).collect();
        assert_eq!(missing, want);
    }

    #[test]
    fn covering_looks_at_every_part() {
        check_uncovered(&["*|*|*|"], &["get|apps|deployments|web", "create|-|pods|"], &[]);
        check_uncovered(
            &["get|-|pods|"],
            &["get,list,watch|-|pods|"],
            &[r#"{APIGroups:[""], Resources:["pods"], Verbs:["list" "watch"]}"#],
        );
        check_uncovered(
            &["get|-|secrets|a"],
            &["get|-|secrets|"],
            &[r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#],
        );
        check_uncovered(&["get|-|secrets|"], &["get|-|secrets|a,b"], &[]);
        check_uncovered(
            &["get|/healthz"],
            &["get|/healthz,/metrics"],
            &[r#"{NonResourceURLs:["/metrics"], Verbs:["get"]}"#],
        );
        check_uncovered(&["*|*|*|", "*|*"], &["*|*"], &[]);
        check_uncovered(
            &["get|-|pods|"],
            &["get|-|*|"],
            &[r#"{APIGroups:[""], Resources:["*"], Verbs:["get"]}"#],
        );
    }
}
