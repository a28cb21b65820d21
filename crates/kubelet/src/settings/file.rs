//! `kubelet.yaml` as it is written: each field is taken out by its name, and what is left over is nobody's.

use std::time::Duration;

use minke_api::time::parse_go_duration;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

const VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const KIND: &str = "KubeletConfiguration";

/// Upstream's fields that change nothing here: what they set is set in another way, or is not there.
const WITHOUT_MEANING: [&str; 89] = [
    "address",
    "authentication",
    "authorization",
    "cgroupDriver",
    "cgroupRoot",
    "cgroupsPerQOS",
    "configMapAndSecretChangeDetectionStrategy",
    "containerLogMaxWorkers",
    "containerRuntimeEndpoint",
    "contentType",
    "cpuCFSQuota",
    "cpuCFSQuotaPeriod",
    "cpuManagerPolicy",
    "cpuManagerPolicyOptions",
    "cpuManagerReconcilePeriod",
    "enableContentionProfiling",
    "enableControllerAttachDetach",
    "enableDebugFlagsHandler",
    "enableDebuggingHandlers",
    "enableProfilingHandler",
    "enableServer",
    "enableSystemLogHandler",
    "enableSystemLogQuery",
    "eventBurst",
    "eventRecordQPS",
    "failCgroupV1",
    "failSwapOn",
    "featureGates",
    "fileCheckFrequency",
    "hairpinMode",
    "healthzBindAddress",
    "healthzPort",
    "httpCheckFrequency",
    "imagePullCredentialsVerificationPolicy",
    "imageServiceEndpoint",
    "iptablesDropBit",
    "iptablesMasqueradeBit",
    "kernelMemcgNotification",
    "kubeAPIBurst",
    "kubeAPIQPS",
    "kubeReservedCgroup",
    "kubeletCgroups",
    "localStorageCapacityIsolation",
    "logging",
    "makeIPTablesUtilChains",
    "maxOpenFiles",
    "memoryManagerPolicy",
    "memoryReservationPolicy",
    "memorySwap",
    "memoryThrottlingFactor",
    "oomScoreAdj",
    "podCIDR",
    "podHousekeepingPeriod",
    "podLogsDir",
    "port",
    "preloadedImagesVerificationAllowlist",
    "protectKernelDefaults",
    "providerID",
    "qosReserved",
    "readOnlyPort",
    "registerNode",
    "reservedMemory",
    "reservedSystemCPUs",
    "rotateCertificates",
    "runOnce",
    "runtimeRequestTimeout",
    "serverTLSBootstrap",
    "showHiddenMetricsForVersion",
    "shutdownGracePeriod",
    "shutdownGracePeriodByPodPriority",
    "shutdownGracePeriodCriticalPods",
    "singleProcessOOMKill",
    "staticPodURL",
    "staticPodURLHeader",
    "streamingConnectionIdleTimeout",
    "syncFrequency",
    "systemCgroups",
    "systemReservedCgroup",
    "tlsCertFile",
    "tlsCipherSuites",
    "tlsMinVersion",
    "tlsPrivateKeyFile",
    "topologyManagerPolicy",
    "topologyManagerPolicyOptions",
    "topologyManagerScope",
    "tracing",
    "userNamespaces",
    "volumePluginDir",
    "volumeStatsAggPeriod",
];

/// The fields that are still there, and what was wrong with those that were taken.
pub struct File {
    fields: Map<String, Value>,
    errors: Vec<String>,
}

impl File {
    pub fn parse(text: &[u8]) -> Result<File, String> {
        let decoded = minke_api::codec::yaml::decode(text).map_err(|error| error.to_string())?;
        let Value::Object(mut fields) = decoded.value else { return Err("it is no object".to_owned()) };
        let mut said = |name: &str| match fields.remove(name) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        if (said("apiVersion"), said("kind")) != (VERSION.to_owned(), KIND.to_owned()) {
            return Err(format!("it is no {KIND} of {VERSION}"));
        }
        let twice = decoded.duplicates.iter();
        let errors = twice.map(|key| format!("strict decoding error: key {key:?} already set in map"));
        Ok(File { fields, errors: errors.collect() })
    }

    /// What the field says; `None` also when it says nothing or nonsense.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Option<T> {
        let value = self.fields.remove(name).filter(|value| !value.is_null())?;
        serde_json::from_value(value).map_err(|error| self.errors.push(format!("{name}: {error}"))).ok()
    }

    /// A number that must be within `least..=most`.
    pub fn number(&mut self, name: &str, least: i64, most: i64) -> Option<i64> {
        let number: i64 = self.take(name)?;
        let fits = (least..=most).contains(&number);
        self.check(fits, || format!("{name} {number} must be between {least} and {most}, inclusive"));
        Some(number).filter(|_| fits)
    }

    /// A duration as Go writes it; as upstream, `0s` is the default.
    pub fn duration(&mut self, name: &str) -> Option<Duration> {
        let text: String = self.take(name)?;
        let parsed = parse_go_duration(&text).map_err(|why| self.errors.push(format!("{name}: {why}")));
        parsed.ok().filter(|duration| !duration.is_zero())
    }

    pub fn check(&mut self, right: bool, why: impl FnOnce() -> String) {
        if !right {
            self.errors.push(format!("invalid configuration: {}", why()));
        }
    }

    pub fn refuse(&mut self, why: impl Into<String>) {
        self.errors.push(why.into());
    }

    /// The names of the fields that changed nothing, or everything that is wrong with the file.
    pub fn finish(mut self) -> Result<Vec<String>, String> {
        let mut idle = vec![];
        for (name, _) in self.fields {
            match WITHOUT_MEANING.contains(&name.as_str()) {
                true => idle.push(name),
                false => self.errors.push(format!("strict decoding error: unknown field {name:?}")),
            }
        }
        match self.errors.len() {
            0 => Ok(idle),
            1 => Err(self.errors.remove(0)),
            _ => Err(format!("[{}]", self.errors.join(", "))),
        }
    }
}
