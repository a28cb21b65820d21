//! What can be set of the controllers: flags of upstream's kube-controller-manager, by their names and defaults.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use minke_api::time::parse_go_duration;
use minke_controllers::{Authority, AutoscalerSettings, Config};
use tokio::sync::watch;

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Controllers")]
pub struct ControllerArgs {
    /// How often autoscalers look at their metrics
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = period)]
    horizontal_pod_autoscaler_sync_period: Duration,
    /// How far a metric may be from its target, as a part of it, before autoscalers act
    #[arg(long, value_name = "PART", default_value_t = 0.1, value_parser = part)]
    horizontal_pod_autoscaler_tolerance: f64,
    /// How long autoscalers look back before they scale down
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    horizontal_pod_autoscaler_downscale_stabilization: Duration,
    /// How long after the start of a pod its CPU may not count
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    horizontal_pod_autoscaler_cpu_initialization_period: Duration,
    /// How long after the start of a pod changes of its readiness count as its start
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    horizontal_pod_autoscaler_initial_readiness_delay: Duration,
    /// How long a node may be silent before it is unhealthy
    #[arg(long, value_name = "DURATION", default_value = "50s", value_parser = period)]
    node_monitor_grace_period: Duration,
    /// How long a starting node may be silent before it is unhealthy
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = period)]
    node_startup_grace_period: Duration,
    /// How many finished pods may be there before the oldest are deleted; 0 keeps all
    #[arg(long, value_name = "COUNT", default_value_t = 12_500)]
    terminated_pod_gc_threshold: usize,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_go_duration(text).map_err(|why| format!("{why}: use one such as 1m30s"))
}

/// A time that passes again and again: not none.
fn period(text: &str) -> Result<Duration, String> {
    let period = duration(text)?;
    if period < Duration::from_secs(1) { Err("at least 1s".to_owned()) } else { Ok(period) }
}

fn part(text: &str) -> Result<f64, String> {
    let part: f64 = text.parse().map_err(|_| "use a number such as 0.1".to_owned())?;
    if (0.0..=f64::MAX).contains(&part) { Ok(part) } else { Err("not negative".to_owned()) }
}

impl ControllerArgs {
    pub fn config(
        &self,
        root_ca: String,
        authority: Arc<Authority>,
        clock_set: watch::Receiver<()>,
    ) -> Config {
        Config {
            root_ca,
            authority: Some(authority),
            clock_set,
            node_monitor_grace: self.node_monitor_grace_period,
            node_startup_grace: self.node_startup_grace_period,
            terminated_pods_max: self.terminated_pod_gc_threshold,
            autoscalers: AutoscalerSettings {
                period: self.horizontal_pod_autoscaler_sync_period,
                tolerance: self.horizontal_pod_autoscaler_tolerance,
                downscale_stabilization: self.horizontal_pod_autoscaler_downscale_stabilization,
                cpu_initialization: self.horizontal_pod_autoscaler_cpu_initialization_period,
                initial_readiness: self.horizontal_pod_autoscaler_initial_readiness_delay,
            },
            ..Config::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        controllers: ControllerArgs,
    }

    #[test]
    fn flags_that_are_not_given_are_the_defaults_of_the_controllers() {
        let flags = Flags::try_parse_from(["x"]).unwrap().controllers;
        let (want, autoscalers) = (Config::default(), AutoscalerSettings::default());
        assert_eq!(flags.node_monitor_grace_period, want.node_monitor_grace);
        assert_eq!(flags.node_startup_grace_period, want.node_startup_grace);
        assert_eq!(flags.terminated_pod_gc_threshold, want.terminated_pods_max);
        assert_eq!(flags.horizontal_pod_autoscaler_sync_period, autoscalers.period);
        assert_eq!(flags.horizontal_pod_autoscaler_tolerance, autoscalers.tolerance);
        assert_eq!(
            flags.horizontal_pod_autoscaler_downscale_stabilization,
            autoscalers.downscale_stabilization
        );
        assert_eq!(flags.horizontal_pod_autoscaler_cpu_initialization_period, autoscalers.cpu_initialization);
        assert_eq!(flags.horizontal_pod_autoscaler_initial_readiness_delay, autoscalers.initial_readiness);
    }

    #[test]
    fn nonsense_is_refused() {
        for flag in [
            "--horizontal-pod-autoscaler-sync-period=0s",
            "--horizontal-pod-autoscaler-sync-period=often",
            "--horizontal-pod-autoscaler-tolerance=-1",
            "--node-monitor-grace-period=",
            "--terminated-pod-gc-threshold=-1",
        ] {
            assert!(Flags::try_parse_from(["x", flag]).is_err(), "{flag}");
        }
    }
}
