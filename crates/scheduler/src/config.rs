//! The scheduler's configuration file: upstream's KubeSchedulerConfiguration v1.
//!
//! What has an effect here is read and checked; what has a meaning only for a scheduler that is a process of its
//! own (leader election, connections, parallelism) is accepted; everything else is refused by its path.

mod plugins;

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{NodeAffinity, TopologySpreadConstraint};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::plugins::{Plugins, known};
use crate::plugins::{Curve, DEFAULT_PREEMPTION};
use crate::profile::{Args, Profile, SpreadArgs, Strategy};

/// Longest file that is read, in bytes.
pub const FILE_MAX: usize = 1 << 20;
/// Most profiles that a file may have.
const PROFILES_MAX: usize = 64;

/// What the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub(crate) profiles: Vec<Profile>,
    pub(crate) backoff_initial: Duration,
    pub(crate) backoff_max: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            profiles: vec![Profile::default()],
            backoff_initial: Duration::from_secs(1),
            backoff_max: Duration::from_secs(10),
        }
    }
}

/// Why a file was refused, with the path of what is wrong in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

type Checked<T> = Result<T, ConfigError>;

fn refuse<T>(path: &str, why: impl std::fmt::Display) -> Checked<T> {
    Err(ConfigError(format!("{path}: {why}")))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    #[serde(default)]
    profiles: Vec<FileProfile>,
    percentage_of_nodes_to_score: Option<i64>,
    pod_initial_backoff_seconds: Option<i64>,
    pod_max_backoff_seconds: Option<i64>,
    #[serde(default)]
    extenders: Vec<Value>,
    #[serde(rename = "parallelism")]
    _parallelism: Option<i64>,
    #[serde(rename = "leaderElection")]
    _leader_election: Option<Value>,
    #[serde(rename = "clientConnection")]
    _client_connection: Option<Value>,
    #[serde(rename = "enableProfiling")]
    _enable_profiling: Option<bool>,
    #[serde(rename = "enableContentionProfiling")]
    _enable_contention_profiling: Option<bool>,
    #[serde(rename = "delayCacheUntilActive")]
    _delay_cache_until_active: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileProfile {
    scheduler_name: Option<String>,
    percentage_of_nodes_to_score: Option<i64>,
    #[serde(default)]
    plugins: Plugins,
    #[serde(default)]
    plugin_config: Vec<PluginConfig>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PluginConfig {
    name: String,
    #[serde(default)]
    args: Value,
}

impl Settings {
    /// Reads a configuration file, YAML or JSON.
    pub fn parse(text: &[u8]) -> Result<Settings, ConfigError> {
        if text.len() > FILE_MAX {
            return Err(ConfigError(format!("the file is longer than {FILE_MAX} bytes")));
        }
        let decoded = minke_api::codec::yaml::decode(text).map_err(|error| ConfigError(error.to_string()))?;
        if let Some(twice) = decoded.duplicates.first() {
            return refuse(twice, "given twice");
        }
        // The kind first, so that a file of another kind is not refused for its fields.
        let said =
            |name: &str| decoded.value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (version, kind) = (said("apiVersion"), said("kind"));
        if (&*version, &*kind) != ("kubescheduler.config.k8s.io/v1", "KubeSchedulerConfiguration") {
            let want = "kubescheduler.config.k8s.io/v1, KubeSchedulerConfiguration";
            return Err(ConfigError(format!("want {want}; the file says {version:?}, {kind:?}")));
        }
        let file: File = read("configuration", decoded.value)?;
        debug_assert!(file.api_version == version && file.kind == kind);
        if !file.extenders.is_empty() {
            return refuse("extenders", "extenders are not supported");
        }
        let share = percentage("percentageOfNodesToScore", file.percentage_of_nodes_to_score)?;
        let initial = file.pod_initial_backoff_seconds.unwrap_or(1);
        let max = file.pod_max_backoff_seconds.unwrap_or(10);
        if !(1..=86400).contains(&initial) {
            return refuse("podInitialBackoffSeconds", "must be from 1 to 86400");
        }
        if !(initial..=86400).contains(&max) {
            return refuse("podMaxBackoffSeconds", "must be from podInitialBackoffSeconds to 86400");
        }
        let mut settings = Settings {
            profiles: Vec::new(),
            backoff_initial: Duration::from_secs(initial as u64),
            backoff_max: Duration::from_secs(max as u64),
        };
        if file.profiles.len() > PROFILES_MAX {
            return refuse("profiles", format!("at most {PROFILES_MAX}"));
        }
        for (n, given) in file.profiles.into_iter().enumerate() {
            let path = format!("profiles[{n}]");
            let mut profile = given.resolve(&path)?;
            profile.percentage = profile.percentage.or(share);
            if settings.profiles.iter().any(|other| other.name == profile.name) {
                return refuse(
                    &format!("{path}.schedulerName"),
                    format!("{:?} is given twice", profile.name),
                );
            }
            settings.profiles.push(profile);
        }
        if settings.profiles.is_empty() {
            settings.profiles.push(Profile { percentage: share, ..Profile::default() });
        }
        Ok(settings)
    }
}

/// A value as its type, or the path and what is wrong there.
fn read<T: DeserializeOwned>(path: &str, value: Value) -> Checked<T> {
    serde_json::from_value(value).or_else(|error| refuse(path, error))
}

fn percentage(path: &str, given: Option<i64>) -> Checked<Option<u32>> {
    match given {
        None | Some(0) => Ok(None),
        Some(share @ 1..=100) => Ok(Some(share as u32)),
        Some(_) => refuse(path, "must be from 0 to 100"),
    }
}

impl FileProfile {
    fn resolve(self, path: &str) -> Checked<Profile> {
        let mut profile = Profile::default();
        if let Some(name) = self.scheduler_name {
            if name.is_empty() {
                return refuse(&format!("{path}.schedulerName"), "must not be empty");
            }
            profile.name = name;
        }
        let share = format!("{path}.percentageOfNodesToScore");
        profile.percentage = percentage(&share, self.percentage_of_nodes_to_score)?;
        self.plugins.apply(&format!("{path}.plugins"), &mut profile)?;
        let mut seen = BTreeSet::new();
        for (n, config) in self.plugin_config.into_iter().enumerate() {
            let path = format!("{path}.pluginConfig[{n}]");
            if !seen.insert(config.name.clone()) {
                return refuse(&format!("{path}.name"), format!("{:?} is given twice", config.name));
            }
            config.apply(&path, &mut profile.args)?;
        }
        Ok(profile)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FitArgsFile {
    #[serde(default)]
    ignored_resources: BTreeSet<String>,
    #[serde(default)]
    ignored_resource_groups: BTreeSet<String>,
    scoring_strategy: Option<StrategyFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StrategyFile {
    #[serde(rename = "type")]
    type_: Option<String>,
    #[serde(default)]
    resources: Vec<ResourceFile>,
    requested_to_capacity_ratio: Option<RatioFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ResourceFile {
    name: String,
    weight: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RatioFile {
    #[serde(default)]
    shape: Vec<PointFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PointFile {
    #[serde(default)]
    utilization: i64,
    #[serde(default)]
    score: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct BalancedFile {
    #[serde(default)]
    resources: Vec<ResourceFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SpreadFile {
    #[serde(default)]
    default_constraints: Vec<TopologySpreadConstraint>,
    defaulting_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct InterPodFile {
    hard_pod_affinity_weight: Option<i64>,
    #[serde(default)]
    ignore_preferred_terms_of_existing_pods: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NodeAffinityFile {
    added_affinity: Option<NodeAffinity>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PreemptionFile {
    min_candidate_nodes_percentage: Option<i64>,
    min_candidate_nodes_absolute: Option<i64>,
}

impl PluginConfig {
    fn apply(self, path: &str, args: &mut Args) -> Checked<()> {
        let mut given = if self.args.is_null() { serde_json::json!({}) } else { self.args };
        let path = format!("{path}.args");
        let want = format!("{}Args", self.name);
        if let Some(fields) = given.as_object_mut() {
            let kind = fields.remove("kind");
            fields.remove("apiVersion");
            if kind.is_some_and(|kind| kind != want.as_str()) {
                return refuse(&format!("{path}.kind"), format!("must be {want}"));
            }
        }
        let path = path.as_str();
        match self.name.as_str() {
            "NodeResourcesFit" => fit(path, read(path, given)?, args),
            "NodeResourcesBalancedAllocation" => {
                let file: BalancedFile = read(path, given)?;
                if !file.resources.is_empty() {
                    if file.resources.iter().any(|resource| resource.weight.unwrap_or(1) != 1) {
                        return refuse(&format!("{path}.resources"), "every weight must be 1");
                    }
                    args.balanced = file.resources.into_iter().map(|resource| resource.name).collect();
                }
                Ok(())
            }
            "PodTopologySpread" => spread(path, read(path, given)?, args),
            "InterPodAffinity" => {
                let file: InterPodFile = read(path, given)?;
                let weight = file.hard_pod_affinity_weight.unwrap_or(1);
                if !(0..=100).contains(&weight) {
                    return refuse(&format!("{path}.hardPodAffinityWeight"), "must be from 0 to 100");
                }
                args.hard_pod_affinity_weight = weight;
                args.ignore_preferred_of_existing = file.ignore_preferred_terms_of_existing_pods;
                Ok(())
            }
            "NodeAffinity" => {
                let file: NodeAffinityFile = read(path, given)?;
                let required = file.added_affinity.as_ref().and_then(|affinity| {
                    affinity.required_during_scheduling_ignored_during_execution.as_ref()
                });
                if required.is_some_and(|required| required.node_selector_terms.is_empty()) {
                    let path = format!(
                        "{path}.addedAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
                    );
                    return refuse(&path, "must have at least one node selector term");
                }
                args.added_affinity = file.added_affinity;
                Ok(())
            }
            DEFAULT_PREEMPTION => {
                let file: PreemptionFile = read(path, given)?;
                let share = file.min_candidate_nodes_percentage.unwrap_or(10);
                let least = file.min_candidate_nodes_absolute.unwrap_or(100);
                if !(0..=100).contains(&share) {
                    return refuse(&format!("{path}.minCandidateNodesPercentage"), "must be from 0 to 100");
                }
                if least < 0 || (share == 0 && least == 0) {
                    let why = "must not be negative, nor 0 when the percentage is 0";
                    return refuse(&format!("{path}.minCandidateNodesAbsolute"), why);
                }
                args.candidates_percentage = share as usize;
                args.candidates_min = least as usize;
                Ok(())
            }
            name => {
                known(path, name)?;
                match given.as_object().is_some_and(serde_json::Map::is_empty) {
                    true => Ok(()),
                    false => refuse(path, format!("{name} takes no arguments here")),
                }
            }
        }
    }
}

fn fit(path: &str, file: FitArgsFile, args: &mut Args) -> Checked<()> {
    args.fit.ignored = file.ignored_resources;
    args.fit.ignored_groups = file.ignored_resource_groups;
    if let Some(group) = args.fit.ignored_groups.iter().find(|group| group.contains('/')) {
        return refuse(&format!("{path}.ignoredResourceGroups"), format!("{group:?} must not contain '/'"));
    }
    let Some(strategy) = file.scoring_strategy else { return Ok(()) };
    let path = format!("{path}.scoringStrategy");
    if !strategy.resources.is_empty() {
        let mut resources = Vec::new();
        for (n, resource) in strategy.resources.into_iter().enumerate() {
            let weight = resource.weight.filter(|weight| *weight != 0).unwrap_or(1);
            if !(1..=100).contains(&weight) {
                return refuse(&format!("{path}.resources[{n}].weight"), "must be from 1 to 100");
            }
            resources.push((resource.name, weight));
        }
        args.fit.resources = resources;
    }
    let type_ = strategy.type_.unwrap_or_else(|| "LeastAllocated".to_owned());
    args.fit.strategy = match type_.as_str() {
        "LeastAllocated" => Strategy::LeastAllocated,
        "MostAllocated" => Strategy::MostAllocated,
        "RequestedToCapacityRatio" => {
            let shape = strategy.requested_to_capacity_ratio.map(|ratio| ratio.shape).unwrap_or_default();
            Strategy::RequestedToCapacityRatio(curve(
                &format!("{path}.requestedToCapacityRatio.shape"),
                &shape,
            )?)
        }
        _ => {
            let known = "LeastAllocated, MostAllocated, RequestedToCapacityRatio";
            return refuse(&format!("{path}.type"), format!("{type_:?} is none of {known}"));
        }
    };
    Ok(())
}

fn curve(path: &str, shape: &[PointFile]) -> Checked<Curve> {
    if shape.is_empty() {
        return refuse(path, "at least one point must be given");
    }
    for (n, point) in shape.iter().enumerate() {
        if !(0..=100).contains(&point.utilization) {
            return refuse(&format!("{path}[{n}].utilization"), "must be from 0 to 100");
        }
        if n > 0 && point.utilization <= shape[n - 1].utilization {
            return refuse(
                &format!("{path}[{n}].utilization"),
                "must be greater than that of the point before",
            );
        }
        if !(0..=10).contains(&point.score) {
            return refuse(&format!("{path}[{n}].score"), "must be from 0 to 10");
        }
    }
    Ok(Curve(shape.iter().map(|point| (point.utilization, point.score * 10)).collect()))
}

fn spread(path: &str, file: SpreadFile, args: &mut Args) -> Checked<()> {
    let constraints = file.default_constraints;
    match file.defaulting_type.as_deref().unwrap_or("System") {
        "System" if constraints.is_empty() => {
            args.spread = SpreadArgs::system();
            return Ok(());
        }
        "System" => {
            return refuse(
                &format!("{path}.defaultConstraints"),
                "must be empty when defaultingType is System",
            );
        }
        "List" => {}
        other => {
            return refuse(
                &format!("{path}.defaultingType"),
                format!("{other:?} is neither System nor List"),
            );
        }
    }
    for (n, constraint) in constraints.iter().enumerate() {
        let path = format!("{path}.defaultConstraints[{n}]");
        if constraint.max_skew <= 0 {
            return refuse(&format!("{path}.maxSkew"), "must be greater than 0");
        }
        if constraint.topology_key.is_empty() {
            return refuse(&format!("{path}.topologyKey"), "must not be empty");
        }
        if !["DoNotSchedule", "ScheduleAnyway"].contains(&constraint.when_unsatisfiable.as_str()) {
            return refuse(&format!("{path}.whenUnsatisfiable"), "must be DoNotSchedule or ScheduleAnyway");
        }
        if constraint.label_selector.is_some() {
            return refuse(
                &format!("{path}.labelSelector"),
                "selectors are those of each pod's own workload",
            );
        }
        let same = |other: &TopologySpreadConstraint| {
            (&other.topology_key, &other.when_unsatisfiable)
                == (&constraint.topology_key, &constraint.when_unsatisfiable)
        };
        if constraints[..n].iter().any(same) {
            return refuse(&path, "the same topologyKey and whenUnsatisfiable are given twice");
        }
    }
    args.spread = SpreadArgs { constraints, system: false };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::PLUGINS;

    const HEAD: &str = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n";

    fn parse(rest: &str) -> Result<Settings, String> {
        Settings::parse(format!("{HEAD}{rest}").as_bytes()).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn check_refused(rest: &str, want: &str) {
        let error = parse(rest).expect_err("it is refused");
        assert!(error.contains(want), "{error}");
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Settings::default());
        assert_eq!(
            parse("leaderElection: {leaderElect: false}\nparallelism: 4\n").unwrap(),
            Settings::default()
        );
    }

    #[test]
    fn profiles_switch_plugins_and_weigh_them() {
        let settings = parse(
            "percentageOfNodesToScore: 40\npodInitialBackoffSeconds: 2\nprofiles:\n\
             - schedulerName: packed\n  percentageOfNodesToScore: 70\n  plugins:\n    score:\n      disabled: [{name: '*'}]\n      \
             enabled: [{name: NodeResourcesFit, weight: 7}, {name: ImageLocality}]\n    filter: {disabled: [{name: NodePorts}]}\n    \
             postFilter: {disabled: [{name: DefaultPreemption}]}\n  pluginConfig:\n  - name: NodeResourcesFit\n    args:\n      \
             apiVersion: kubescheduler.config.k8s.io/v1\n      kind: NodeResourcesFitArgs\n      scoringStrategy:\n        type: \
             RequestedToCapacityRatio\n        resources: [{name: cpu, weight: 3}, {name: example.com/gpu}]\n        \
             requestedToCapacityRatio: {shape: [{utilization: 0, score: 0}, {utilization: 100, score: 10}]}\n\
             - schedulerName: default-scheduler\n",
        )
        .unwrap();
        let packed = &settings.profiles[0];
        assert_eq!((packed.name.as_str(), packed.percentage, packed.preemption), ("packed", Some(70), false));
        let scores: Vec<_> =
            packed.scores.iter().map(|(row, weight)| (PLUGINS[*row].name, *weight)).collect();
        assert_eq!(scores, [("NodeResourcesFit", 7), ("ImageLocality", 1)]);
        assert!(!packed.considers("NodePorts") && packed.considers("NodeName"));
        assert_eq!(
            packed.args.fit.strategy,
            Strategy::RequestedToCapacityRatio(Curve(vec![(0, 0), (100, 100)]))
        );
        assert_eq!(packed.args.fit.resources, [("cpu".to_owned(), 3), ("example.com/gpu".to_owned(), 1)]);
        assert_eq!(settings.profiles[1].percentage, Some(40));
        assert_eq!(settings.profiles[1].filters, Profile::default().filters);
        assert_eq!(settings.backoff_initial.as_secs(), 2);
    }

    #[test]
    fn arguments_are_taken() {
        let settings = parse(
            "profiles:\n- pluginConfig:\n  - name: InterPodAffinity\n    args: {hardPodAffinityWeight: 5}\n  - name: PodTopologySpread\n    \
             args: {defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]}\n  \
             - name: NodeAffinity\n    args: {addedAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: \
             [{matchExpressions: [{key: pool, operator: Exists}]}]}}}\n  - name: DefaultPreemption\n    args: {minCandidateNodesAbsolute: 5}\n",
        )
        .unwrap();
        let args = &settings.profiles[0].args;
        assert_eq!((args.hard_pod_affinity_weight, args.candidates_min), (5, 5));
        assert!(!args.spread.system && args.spread.constraints[0].topology_key == "zone");
        assert!(args.added_affinity.is_some());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let other = Settings::parse(b"apiVersion: v1\nkind: Pod\nspec: {}\n").unwrap_err().to_string();
        assert!(other.contains("the file says \"v1\", \"Pod\""), "{other}");
        assert!(Settings::parse(b"{").is_err());
        check_refused("profile: []\n", "unknown field `profile`");
        check_refused("percentageOfNodesToScore: 101\n", "percentageOfNodesToScore: must be from 0 to 100");
        check_refused("podMaxBackoffSeconds: 0\n", "podMaxBackoffSeconds: must be");
        check_refused("extenders: [{urlPrefix: x}]\n", "extenders: extenders are not supported");
        check_refused(
            "profiles: [{}, {}]\n",
            "profiles[1].schedulerName: \"default-scheduler\" is given twice",
        );
        check_refused(
            "profiles: [{plugins: {score: {enabled: [{name: Nope}]}}}]\n",
            "profiles[0].plugins.score.enabled[0].name: there is no plugin \"Nope\"",
        );
        check_refused(
            "profiles: [{plugins: {multiPoint: {disabled: [{name: PrioritySort}]}}}]\n",
            "PrioritySort cannot be switched off",
        );
        check_refused(
            "profiles: [{plugins: {preScore: {disabled: [{name: '*'}]}}}]\n",
            "profiles[0].plugins.preScore: plugins are switched by",
        );
        let config = |name: &str, args: &str| {
            format!("profiles: [{{pluginConfig: [{{name: {name}, args: {args}}}]}}]\n")
        };
        let at = "profiles[0].pluginConfig[0].args";
        check_refused(&config("NodeResourcesFit", "{x: 1}"), &format!("{at}: unknown field `x`"));
        check_refused(
            &config("NodeResourcesFit", "{scoringStrategy: {type: Best}}"),
            &format!("{at}.scoringStrategy.type: \"Best\" is none of"),
        );
        check_refused(
            &config(
                "NodeResourcesFit",
                "{scoringStrategy: {type: RequestedToCapacityRatio, requestedToCapacityRatio: {shape: [{utilization: 5, score: 1}, {utilization: 5, score: 2}]}}}",
            ),
            "shape[1].utilization: must be greater",
        );
        check_refused(&config("InterPodAffinity", "{hardPodAffinityWeight: 101}"), "must be from 0 to 100");
        check_refused(
            &config(
                "PodTopologySpread",
                "{defaultConstraints: [{maxSkew: 1, topologyKey: a, whenUnsatisfiable: DoNotSchedule}]}",
            ),
            "must be empty when defaultingType is System",
        );
        check_refused(&config("NodePorts", "{a: 1}"), "NodePorts takes no arguments here");
        check_refused(&config("NodeAffinity", "{kind: Other}"), "kind: must be NodeAffinityArgs");
    }
}
