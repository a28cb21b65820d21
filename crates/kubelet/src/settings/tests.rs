use super::*;

fn parse(text: &str) -> Result<Settings, String> {
    let text = format!("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}");
    Settings::parse(text.as_bytes(), Path::new("/d"))
}

/// The file sets just what `set` does to the defaults.
#[track_caller]
fn check(text: &str, set: impl FnOnce(&mut Settings)) {
    let mut want = Settings::new(Path::new("/d"));
    set(&mut want);
    assert_eq!(parse(text), Ok(want), "{text}");
}

#[track_caller]
fn refused(text: &str, want: &str) {
    assert_eq!(parse(text).map(|_| ()), Err(want.to_owned()), "{text}");
}

fn statements(pairs: &[(&str, &str)]) -> Statements {
    pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn each_field_sets_one_thing() {
    check("", |_| {});
    check("podPidsLimit: 99\n", |s| s.pod_pids = Some(99));
    check("podPidsLimit: -1\n", |_| {});
    check("maxPods: 40\npodsPerCore: 10\n", |s| (s.pods_max, s.pods_per_core) = (Some(40), 10));
    check("maxPods: 0\n", |_| {});
    check("allowedUnsafeSysctls: [kernel.msg*, net/a]\n", |s| {
        s.unsafe_sysctls = vec!["kernel.msg*".into(), "net/a".into()];
    });
    check("containerLogMaxSize: 1Mi\ncontainerLogMaxFiles: 3\ncontainerLogMonitorInterval: 1m3s\n", |s| {
        (s.log_size_max, s.log_files_max) = (1 << 20, 3);
        s.log_look_every = Duration::from_secs(63);
    });
    check("staticPodPath: /m\n", |s| s.manifests = "/m".into());
    check("staticPodPath: pods\n", |s| s.manifests = "/d/pods".into());
    check("crashLoopBackOff: {maxContainerRestartPeriod: 30s}\n", |s| {
        s.restart_wait_max = Some(SignedDuration::from_secs(30));
    });
    check("serializeImagePulls: true\n", |s| s.pulls_max = Some(1));
    check("serializeImagePulls: false\nmaxParallelImagePulls: 2\n", |s| s.pulls_max = Some(2));
    check("registryPullQPS: 2\n", |s| s.pull_rate = Some(PullRate { per_second: 2, burst: 10 }));
    check("registryBurst: 3\n", |s| s.pull_rate = Some(PullRate { per_second: 5, burst: 3 }));
    check("registryPullQPS: 0\nregistryBurst: 3\n", |_| {});
    check("imageGCHighThresholdPercent: 70\nimageGCLowThresholdPercent: 60\n", |s| {
        (s.images.high_percent, s.images.low_percent) = (70, 60);
    });
    check("imageMinimumGCAge: 1m\nimageMaximumGCAge: 2h\n", |s| {
        s.images.age_min = Duration::from_secs(60);
        s.images.age_max = Some(Duration::from_secs(7200));
    });
    check("clusterDNS: [10.0.0.10]\nclusterDomain: here\nresolvConf: /r\nseccompDefault: false\n", |s| {
        s.dns_servers = Some(vec!["10.0.0.10".parse().expect("an address")]);
        s.dns_domain = Some("here".into());
        (s.resolv_conf, s.seccomp_default) = ("/r".into(), Some(false));
    });
    check("nodeStatusUpdateFrequency: 5s\nnodeLeaseDurationSeconds: 20\nnodeStatusMaxImages: -1\n", |s| {
        (s.status_every, s.report_every) = (Duration::from_secs(5), Duration::from_secs(5));
        (s.lease_seconds, s.images_told) = (20, None);
    });
    check("registerWithTaints: [{key: a, value: b, effect: NoSchedule}]\n", |s| {
        let (key, effect) = ("a".to_owned(), "NoSchedule".to_owned());
        s.taints = vec![core::Taint { key, value: Some("b".to_owned()), effect, ..Default::default() }];
    });
    // Zero is the default, as in the files that kubeadm writes.
    check("imageMinimumGCAge: 0s\nevictionPressureTransitionPeriod: 0s\n", |_| {});
}

#[test]
fn what_is_set_aside_is_summed_up() {
    let text = "kubeReserved: {cpu: 100m, memory: 1Gi}\nsystemReserved: {cpu: \"1\", pid: \"500\"}\n";
    let settings = parse(text).expect("settings");
    let reserved = ["cpu", "memory", "ephemeral-storage", "pid"].map(|name| settings.reserved(name));
    assert_eq!(reserved, [1100, 1 << 30, 0, 500]);
    assert!(settings.hold_pods);
    check("enforceNodeAllocatable: [none]\n", |s| {
        s.hold_pods = false;
        s.eviction = Limits::default();
    });
    check("enforceNodeAllocatable: [pods]\n", |_| {});
}

#[test]
fn evictions_are_set_as_upstream_sets_them() {
    let limits = |text: &str| parse(text).expect("settings").eviction;
    let hard = limits("evictionHard: {memory.available: 5%}\n");
    assert_eq!(hard.hard, statements(&[("memory.available", "5%")]));
    assert_eq!(hard.thresholds.len(), 2, "the node's memory, and the pods'");
    let merged = limits("evictionHard: {memory.available: 5%}\nmergeDefaultEvictionSettings: true\n");
    assert_eq!((merged.hard.len(), merged.hard["memory.available"].as_str()), (4, "5%"));
    let soft = limits(
        "evictionSoft: {nodefs.available: 3Gi}\nevictionSoftGracePeriod: {nodefs.available: 1m30s}\n\
         evictionMaxPodGracePeriod: 60\nevictionMinimumReclaim: {nodefs.available: 500Mi}\n\
         evictionPressureTransitionPeriod: 30s\n",
    );
    assert_eq!((soft.pod_grace_max, soft.transition), (60, Duration::from_secs(30)));
    let soft: Vec<_> = soft.thresholds.iter().filter(|threshold| !threshold.is_hard()).collect();
    assert_eq!((soft.len(), soft[0].grace), (1, Duration::from_secs(90)));
}

#[test]
fn nonsense_is_refused_by_name() {
    refused("evictionHard: {x: 5%}\n", "unsupported eviction signal x");
    refused("maxpods: 3\n", "strict decoding error: unknown field \"maxpods\"");
    refused("maxPods: 3\nmaxPods: 4\n", "strict decoding error: key \"maxPods\" already set in map");
    refused("maxPods: many\n", "maxPods: invalid type: string \"many\", expected i64");
    refused(
        "crashLoopBackOff: {max: 1s}\n",
        "crashLoopBackOff: unknown field `max`, expected `maxContainerRestartPeriod`",
    );
    refused("imageMinimumGCAge: 1\n", "imageMinimumGCAge: invalid type: integer `1`, expected a string");
    refused("imageMinimumGCAge: \"1\"\n", "imageMinimumGCAge: missing unit in duration \"1\"");
    refused("kubeReserved: {gpu: \"1\"}\n", "kubeReserved: cannot reserve \"gpu\" resource");
    refused(
        "systemReserved: {cpu: \"-1\"}\n",
        "systemReserved: resource quantity for \"cpu\" cannot be negative: -1",
    );
    for (text, why) in [
        ("containerLogMaxFiles: 1\n", "containerLogMaxFiles must be greater than 1"),
        (
            "containerLogMonitorInterval: 1s\n",
            "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s",
        ),
        (
            "crashLoopBackOff: {maxContainerRestartPeriod: 6m}\n",
            "CrashLoopBackOff.MaxContainerRestartPeriod (got: 6m) must be set between 1s and 300s",
        ),
        ("maxParallelImagePulls: 0\n", "maxParallelImagePulls 0 must be a positive number"),
        (
            "serializeImagePulls: true\nmaxParallelImagePulls: 2\n",
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is \
             set to false",
        ),
        (
            "imageGCHighThresholdPercent: 101\n",
            "imageGCHighThresholdPercent 101 must be between 0 and 100, inclusive",
        ),
        (
            "imageGCHighThresholdPercent: 80\n",
            "imageGCLowThresholdPercent (--image-gc-low-threshold) 80 must be less than imageGCHighThresholdPercent \
             (--image-gc-high-threshold) 80",
        ),
        ("imageMaximumGCAge: 1m\n", "imageMaximumGCAge {1m0s} must be greater than imageMinimumGCAge {2m0s}"),
        (
            "enforceNodeAllocatable: [pods, none]\n",
            "enforceNodeAllocatable (--enforce-node-allocatable) may not contain additional enforcements when \"none\" \
             is specified",
        ),
        (
            "enforceNodeAllocatable: [pods, pods]\n",
            "duplicated enforcements \"pods\" in enforceNodeAllocatable (--enforce-node-allocatable)",
        ),
        (
            "enforceNodeAllocatable: [system-reserved]\n",
            "option \"system-reserved\" specified for enforceNodeAllocatable (--enforce-node-allocatable). Valid options \
             here are \"pods\" and \"none\"",
        ),
        ("registerWithTaints: [{key: a, effect: Some}]\n", "invalid taint: a:Some"),
        (
            "nodeStatusMaxImages: -2\n",
            "nodeStatusMaxImages (--node-status-max-images) -2 must be -1 or greater",
        ),
        ("nodeLeaseDurationSeconds: -1\n", "nodeLeaseDurationSeconds must be greater than 0"),
        (
            "allowedUnsafeSysctls: [\"*\"]\n",
            "allowedUnsafeSysctls: sysctl \"*\" is no name, nor the beginning of one and a *",
        ),
    ] {
        refused(text, &format!("invalid configuration: {why}"));
    }
    refused(
        "maxPods: -1\nfoo: 1\n",
        "[invalid configuration: maxPods -1 must be between 0 and 2147483647, inclusive, strict decoding error: \
         unknown field \"foo\"]",
    );
    assert!(Settings::parse(b"kind: Pod\n", Path::new("/d")).is_err());
    assert_eq!(Settings::read(Path::new("/nosuch")), Ok(Settings::new(Path::new("/nosuch"))));
}

#[test]
fn what_changes_nothing_here_is_told() {
    check("featureGates: {}\ncgroupDriver: systemd\nlogging: {verbosity: 2}\n", |s| {
        s.idle = ["cgroupDriver", "featureGates", "logging"].map(str::to_owned).to_vec();
    });
}

#[test]
fn sysctls_are_allowed_by_name_or_beginning() {
    let settings = parse("allowedUnsafeSysctls: [kernel.msg*, net/a]\n").expect("settings");
    let allowed = |name: &str| settings.allows_sysctl(name);
    assert!(allowed("kernel.msgmax") && allowed("net.a") && !allowed("net.ab") && !allowed("kernel.sem"));
}

/// What `docs/kubelet.md` says of a field is said of one that is in force.
#[test]
fn every_field_of_the_documentation_is_read() {
    let text = include_str!("../../../../docs/kubelet.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let fields: Vec<&str> =
        rows.flat_map(|cell| cell.split(", ")).map(|name| name.trim_matches('`')).collect();
    assert!(fields.len() > 30, "{fields:?}");
    for field in fields {
        check(&format!("{field}: null\n"), |_| {});
    }
}
