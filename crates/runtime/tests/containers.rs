//! Real containers, made from busybox: run, log, exec, attach, stop, adopt, and leave nothing.
//!
//! Without the usual harness, because the test binary must be able to become the shim. Needs root and a
//! static busybox; says so and passes when they are not there. `cargo test --test containers -- NAME` runs
//! the tests whose name contains NAME.

#![allow(clippy::disallowed_methods, reason = "real processes in real time")]

mod support;

use std::time::{Duration, Instant};

use minke_runtime::*;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Lists the tests, with their names.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), (|| Box::pin($name())) as TestFn)),*]
    };
}

const TESTS: &[(&str, TestFn)] = tests![
    output_becomes_a_log_and_the_code_is_known,
    what_cannot_start_says_why,
    containers_of_a_pod_share_names_and_network,
    exec_runs_beside_it,
    exec_with_a_terminal,
    attach_sees_output_and_gives_input,
    attach_to_a_terminal,
    stopping_asks_first_and_then_insists,
    limits_hold,
    restrictions_hold,
    limits_cannot_be_lifted_from_inside,
    images_are_volumes,
    an_old_sandbox_leaves_the_new_one_alone,
    users_and_groups_are_resolved,
    mounts_are_there,
    a_new_agent_adopts_what_runs,
    a_killed_agent_leaves_all_as_it_is,
    a_dead_shim_takes_its_containers_along,
    a_container_joins_the_processes_of_another,
    one_process_namespace_for_all,
    the_nodes_own_namespaces,
    many_at_once,
    unfinished_creations_are_cleared,
];

fn main() {
    shim::entry();
    if std::env::args().nth(1).as_deref() == Some(AGENT) {
        return agent();
    }
    run_all(TESTS);
}

async fn output_becomes_a_log_and_the_code_is_known() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let mut events = node.runtime.subscribe();
    node.start("c1", "echo out; echo err >&2; printf part; exit 7").await;
    let status = node.wait_exit("c1").await;
    assert_eq!((status.exit_code, status.reason.as_str()), (Some(7), "Error"));
    assert!(status.started_at.unwrap() <= status.finished_at.unwrap());
    let log = node.log("c1");
    let mut lines: Vec<&str> = log.lines().map(|l| l.split_once(' ').unwrap().1).collect();
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out", "stdout P part"]);
    let first: jiff::Timestamp = log.split(' ').next().unwrap().parse().unwrap();
    assert!(first <= status.finished_at.unwrap());
    assert!(
        matches!(events.recv().await.unwrap(), Event::ContainerStarted { container_id, .. } if container_id == "c1")
    );
    assert!(
        matches!(events.recv().await.unwrap(), Event::ContainerExited { status } if status.exit_code == Some(7))
    );
    node.start("c2", "kill -9 $$").await;
    node.start("c3", "true").await;
    // Process 1 of a namespace is safe from its own signals, so c2 goes on and ends by itself.
    assert_eq!(node.wait_exit("c2").await.exit_code, Some(0));
    assert_eq!(node.wait_exit("c3").await.reason, "Completed");
    let wrong = node.runtime.start_container("c3").await;
    assert!(matches!(wrong, Err(Error::Invalid(_))), "{wrong:?}");
    node.close().await;
}

async fn what_cannot_start_says_why() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let cases = [
        ("nope", "exec: \"nope\": executable file not found in $PATH"),
        ("/nope", "exec: \"/nope\": stat /nope: no such file or directory"),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/bin/garbage", "exec: \"/bin/garbage\": exec format error"),
    ];
    for (at, (program, want)) in cases.into_iter().enumerate() {
        let id = format!("bad{at}");
        let spec = ContainerSpec { command: vec![program.into()], ..node.spec(&id, "") };
        node.runtime.create_container("pod", spec).await.unwrap();
        let error = node.runtime.start_container(&id).await.unwrap_err();
        assert!(matches!(&error, Error::Start(text) if text.ends_with(want)), "{error:?}");
        let status = node.wait_exit(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (Some(128), "StartError"));
        assert!(status.message.ends_with(want));
        node.runtime.remove_container(&id).await.unwrap();
    }
    let spec = ContainerSpec { image: "not/there:1".into(), ..node.spec("x", "true") };
    assert!(node.runtime.create_container("pod", spec).await.unwrap_err().is_not_found());
    let spec = ContainerSpec { id: "../x".into(), ..node.spec("x", "true") };
    assert!(matches!(node.runtime.create_container("pod", spec).await, Err(Error::Invalid(_))));
    let spec = ContainerSpec {
        user: User { user: Some("ghost".into()), ..User::default() },
        ..node.spec("u", "true")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    let error = node.runtime.start_container("u").await.unwrap_err().to_string();
    assert!(error.contains("unable to find user ghost"), "{error}");
    node.close().await;
}

async fn containers_of_a_pod_share_names_and_network() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start(
        "a",
        "hostname; echo shared > /dev/shm/note; readlink /proc/self/ns/net; echo pid $$; sleep 100",
    )
    .await;
    node.wait_log("a", "pid").await;
    node.start(
        "b",
        "hostname; cat /dev/shm/note; readlink /proc/self/ns/net; ip addr show lo | grep -c UP; ls /",
    )
    .await;
    node.wait_exit("b").await;
    let (a, b) = (node.text("a"), node.text("b"));
    let (a, b): (Vec<&str>, Vec<&str>) = (a.lines().collect(), b.lines().collect());
    assert_eq!((a[0], b[0], b[1], a[2], b[3]), ("web-0", "web-0", "shared", "pid 1", "1"));
    let netns = std::fs::read_link(node.runtime.sandbox_netns("pod").unwrap()).unwrap();
    assert_eq!(netns.to_str().unwrap(), a[1]);
    assert_eq!(a[1], b[2]);
    assert_ne!(std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap(), a[1]);
    node.close().await;
}

async fn exec_runs_beside_it() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let spec = ContainerSpec {
        env: vec![("GREETING".into(), "hello".into())],
        cwd: "/made".into(),
        ..node.spec("c", "sleep 100")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    let run = |script: &str| {
        let argv = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()];
        node.runtime.exec_sync("c", argv, Duration::from_secs(20))
    };
    let out = run("echo $GREETING; pwd; echo oops >&2; cat /proc/1/comm; exit 3").await.unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "hello\n/made\nsleep\n");
    assert_eq!((String::from_utf8_lossy(&out.stderr).as_ref(), out.exit_code), ("oops\n", 3));
    assert_eq!(run("kill -TERM $$").await.unwrap().exit_code, 143);
    // Under the container's own filter, capabilities and cgroup.
    let out = run("grep -E 'Seccomp:|CapEff|NoNewPrivs' /proc/self/status; unshare -m true; echo $?")
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("Seccomp:\t2"), "{text}");
    assert!(text.contains("CapEff:\t00000000a80425fb"), "{text}");
    assert!(text.ends_with("\n1\n"), "unshare was allowed: {text}");
    let out = run("cat /proc/self/cgroup").await.unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains(&format!("{}/pod/c", node.cgroup_root)));

    let missing = node.runtime.exec_sync("c", vec!["nope".into()], Duration::ZERO).await.unwrap_err();
    let want =
        "exec failed: unable to start container process: exec: \"nope\": executable file not found in $PATH";
    assert!(matches!(&missing, Error::Start(text) if text == want), "{missing:?}");
    let late =
        node.runtime.exec_sync("c", vec!["sleep".into(), "50".into()], Duration::from_millis(300)).await;
    assert!(matches!(&late, Err(Error::Timeout(text)) if text == "command timed out after 0.3s"), "{late:?}");
    // The process it gave up on is gone.
    let gone = async {
        while !node
            .runtime
            .exec_sync("c", vec!["pidof".into(), "-o".into(), "1".into(), "sleep".into()], Duration::ZERO)
            .await
            .is_ok_and(|o| o.exit_code == 1)
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the timed out process is killed");

    // Input: what is written comes back, and closing ends it.
    let spec = ExecSpec { argv: vec!["cat".into()], stdin: true, stdout: true, ..Default::default() };
    let mut session = node.runtime.exec("c", spec).await.unwrap();
    let big = "x".repeat(300_000);
    let mut stdin = session.stdin.take().unwrap();
    let mut stdout = session.stdout.take().unwrap();
    let (_, got) = tokio::join!(
        async {
            stdin.write_all(big.as_bytes()).await.unwrap();
            drop(stdin);
        },
        async {
            let mut got = String::new();
            stdout.read_to_string(&mut got).await.unwrap();
            got
        }
    );
    assert_eq!(got, big);
    assert_eq!(session.exit.await.unwrap().unwrap(), 0);
    node.runtime.stop_container("c", Duration::ZERO).await.unwrap();
    assert!(matches!(run("true").await, Err(Error::Invalid(_))));
    node.close().await;
}

async fn exec_with_a_terminal() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "sleep 100").await;
    let spec =
        ExecSpec { argv: vec!["sh".into()], tty: true, stdin: true, stdout: true, ..Default::default() };
    let mut session = node.runtime.exec("c", spec).await.unwrap();
    session.resize.send(TerminalSize { width: 97, height: 31 }).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    let mut stdout = session.stdout.take().unwrap();
    // The size takes effect some time after it was sent.
    stdin
        .write_all(b"while ! stty size | grep '31 97'; do :; done; tty; echo $TERM; exit 4\n")
        .await
        .unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("31 97\r\n/dev/pts/"), "{text}");
    assert!(text.contains("xterm\r\n"), "{text}");
    assert_eq!(session.exit.await.unwrap().unwrap(), 4);
    node.close().await;
}

async fn attach_sees_output_and_gives_input() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let script = "while read line; do echo got $line; echo e $line >&2; done; echo over";
    let spec = ContainerSpec { stdin: true, stdin_once: true, ..node.spec("c", script) };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    let all = AttachSpec { stdin: true, stdout: true, stderr: true };
    let mut session = node.runtime.attach("c", all).await.unwrap();
    let watcher = node.runtime.attach("c", AttachSpec { stdout: true, ..Default::default() }).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo\n").await.unwrap();
    drop(stdin);
    let (mut out, mut err, mut seen) = (String::new(), String::new(), String::new());
    session.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
    session.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
    watcher.stdout.unwrap().read_to_string(&mut seen).await.unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("got one\ngot two\nover\n", "e one\ne two\n"));
    assert_eq!(seen, out);
    assert_eq!(session.exit.await.unwrap().unwrap(), 0);
    assert_eq!(node.log("c").lines().count(), 5);
    node.close().await;
}

async fn attach_to_a_terminal() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let spec = ContainerSpec {
        tty: true,
        stdin: true,
        ..node.spec("c", "stty -echo; tty; read x; echo read $x; read y; stty size; exit 2")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_log("c", "/dev/pts").await;
    let mut session =
        node.runtime.attach("c", AttachSpec { stdin: true, stdout: true, stderr: true }).await.unwrap();
    assert!(session.stderr.is_none());
    session.resize.send(TerminalSize { width: 80, height: 25 }).await.unwrap();
    let (mut stdin, mut stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
    stdin.write_all(b"this\n").await.unwrap();
    let mut head = [0u8; 11];
    stdout.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"read this\r\n");
    // Sizes go by another way than input; resend until it shows.
    stdin.write_all(b"\n").await.unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    assert!(text.trim_end().ends_with("25 80"), "{text:?}");
    assert_eq!(session.exit.await.unwrap().unwrap(), 2);
    node.close().await;
}

async fn stopping_asks_first_and_then_insists() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("polite", "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done").await;
    node.wait_log("polite", "ready").await;
    node.runtime.stop_container("polite", Duration::from_secs(20)).await.unwrap();
    let status = node.wait_exit("polite").await;
    assert_eq!((status.exit_code, status.reason.as_str()), (Some(5), "Error"));
    assert_eq!(node.text("polite"), "ready\nbye\n");
    node.start("deaf", "trap '' TERM; echo ready; sleep 100 & wait; sleep 100").await;
    node.wait_log("deaf", "ready").await;
    let begun = Instant::now();
    node.runtime.stop_container("deaf", Duration::from_millis(300)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(node.wait_exit("deaf").await.exit_code, Some(137));
    node.start("deaf2", "trap '' TERM; echo ready; sleep 100").await;
    node.wait_log("deaf2", "ready").await;
    let (long, short) = tokio::join!(
        node.runtime.stop_container("deaf2", Duration::from_secs(60)),
        node.runtime.stop_container("deaf2", Duration::from_millis(200)),
    );
    long.and(short).expect("the shorter grace counts");
    // The image's own signal: see support::IMAGE for the other one, which stops by SIGUSR1. A container's own counts more.
    for (id, own, shown, code) in [("image", "", "SIGUSR1", 9), ("own", "SIGUSR2", "SIGUSR2", 8)] {
        let spec = ContainerSpec {
            image: USR1_IMAGE.into(),
            stop_signal: own.into(),
            ..node
                .spec(id, "trap 'exit 9' USR1; trap 'exit 8' USR2; echo ready; while :; do sleep 0.05; done")
        };
        node.runtime.create_container("pod", spec).await.unwrap();
        node.runtime.start_container(id).await.unwrap();
        node.wait_log(id, "ready").await;
        assert_eq!(node.runtime.container_status(id).await.unwrap().stop_signal, shown);
        node.runtime.stop_container(id, Duration::from_secs(20)).await.unwrap();
        assert_eq!(node.wait_exit(id).await.exit_code, Some(code));
    }
    node.close().await;
}

async fn limits_hold() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let resources = Resources {
        cpu_shares: Some(512),
        cpu_quota_us: Some(50_000),
        cpu_period_us: Some(100_000),
        memory_limit: Some(32 << 20),
        pids_limit: Some(20),
        ..Default::default()
    };
    // A string that doubles until there is no more room for it.
    let hog = "x=0123456789abcdef; while :; do x=$x$x; done";
    let spec = ContainerSpec { resources: resources.clone(), ..node.spec("hog", hog) };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("hog").await.unwrap();
    let status = node.wait_exit("hog").await;
    assert_eq!((status.exit_code, status.reason.as_str(), status.oom_killed), (Some(137), "OOMKilled", true));
    let spec = ContainerSpec { resources, ..node.spec("idle", "sleep 100") };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("idle").await.unwrap();
    let stats = node.runtime.container_stats("idle").await.unwrap();
    assert!(stats.cpu_ns > 0 && stats.memory_working_set > 0 && stats.pids == 1, "{stats:?}");
    assert!(node.runtime.sandbox_stats("pod").await.unwrap().memory_usage >= stats.memory_rss);
    let bomb = "for i in $(seq 40); do sleep 5 & done; echo started";
    let out =
        node.runtime.exec_sync("idle", vec!["sh".into(), "-c".into(), bomb.into()], Duration::from_secs(20));
    let out = out.await.unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("can't fork"), "{out:?}");
    let wider = Resources { memory_limit: Some(64 << 20), ..Default::default() };
    node.runtime.update_container("idle", wider.clone()).await.unwrap();
    assert_eq!(node.runtime.container_status("idle").await.unwrap().resources, wider);
    node.close().await;
}

async fn restrictions_hold() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let script = "echo x > /proc/sys/kernel/hostname; echo x > /etc/new; \
                  mknod /tmp/disk b 254 0; head -c1 /tmp/disk; grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status; \
                  echo x > /dev/null; ls /sys/firmware | wc -l; cat /proc/self/oom_score_adj";
    let spec = ContainerSpec {
        readonly_rootfs: true,
        no_new_privs: true,
        oom_score_adj: Some(500),
        mounts: vec![Mount {
            host_path: node.scratch("tmp"),
            container_path: "/tmp".into(),
            ..Default::default()
        }],
        ..node.spec("c", script)
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_exit("c").await;
    let text = node.text("c");
    for want in ["NoNewPrivs:\t1", "Seccomp:\t2", "Read-only file system", "CapEff:\t00000000a80425fb", "500"]
    {
        assert!(text.contains(want), "{want}: {text}");
    }
    assert!(
        text.contains("can't open '/tmp/disk': Operation not permitted")
            || text.contains("/tmp/disk: Operation not permitted"),
        "{text}"
    );
    assert!(text.lines().any(|l| l == "0"), "/sys/firmware is not masked: {text}");

    let spec = ContainerSpec {
        capabilities: Capabilities { add: vec!["NET_ADMIN".into()], drop: vec!["ALL".into()] },
        seccomp: Seccomp::Unconfined,
        ..node.spec("few", "grep -E 'Seccomp:|CapEff' /proc/self/status")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("few").await.unwrap();
    node.wait_exit("few").await;
    assert_eq!(node.text("few"), "CapEff:\t0000000000001000\nSeccomp:\t0\n");

    let spec = ContainerSpec {
        privileged: true,
        ..node
            .spec("all", "grep CapEff /proc/self/status; ls /dev/kmsg; mount -t tmpfs x /mnt && echo mounted")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("all").await.unwrap();
    node.wait_exit("all").await;
    let text = node.text("all");
    assert!(text.contains("mounted") && text.contains("/dev/kmsg\n"), "{text}");
    node.close().await;
}

/// Root in a container sees its own cgroup and can change nothing about it.
async fn limits_cannot_be_lifted_from_inside() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x 2>/dev/null && [ $d != /sys/fs/cgroup ] && echo made $d; \
                  for f in memory.limit_in_bytes memory.max pids.max cpu.max cpu.cfs_quota_us cgroup.procs; do \
                  [ -e $d/$f ] && echo 4096 2>/dev/null > $d/$f && echo wrote $d/$f; done; done; \
                  cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; echo over";
    let resources = Resources { memory_limit: Some(32 << 20), ..Default::default() };
    let spec = ContainerSpec { resources, ..node.spec("c", script) };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_exit("c").await;
    let text: String =
        node.text("c").lines().filter(|l| !l.contains("Read-only")).map(|l| format!("{l}\n")).collect();
    assert_eq!(text, format!("{}\nover\n", 32 << 20));
    node.close().await;
}

/// Images as volumes: read-only, no execution, and no way out through their links.
async fn images_are_volumes() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let image = |at: &str, part: &str| Mount {
        image: Some(IMAGE.into()),
        image_sub_path: part.into(),
        container_path: at.into(),
        ..Default::default()
    };
    let spec = ContainerSpec {
        mounts: vec![image("/v", ""), image("/part", "etc"), image("/file", "etc/passwd")],
        ..node.spec(
            "c",
            "ls /v/bin/busybox; ls /part/passwd; cmp /file /v/etc/passwd && echo same; echo x > /v/new; \
             /v/bin/busybox true || echo refused",
        )
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_exit("c").await;
    let text = node.text("c");
    for want in ["/v/bin/busybox\n", "/part/passwd\n", "same\n", "Read-only file system", "refused\n"] {
        assert!(text.contains(want), "{want}: {text}");
    }
    let spec = ContainerSpec { mounts: vec![image("/v", "../../etc")], ..node.spec("out", "ls /v") };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("out").await.unwrap();
    node.wait_exit("out").await;
    // With the image as its root, `..` ends there.
    assert_eq!(node.text("out"), "group\npasswd\n");
    let spec = ContainerSpec { mounts: vec![image("/v", "nosuch")], ..node.spec("none", "true") };
    node.runtime.create_container("pod", spec).await.unwrap();
    let error = node.runtime.start_container("none").await.unwrap_err().to_string();
    assert!(error.contains("image volume subpath \"nosuch\""), "{error}");
    node.close().await;
}

/// A pod whose sandbox was replaced goes on when the old one is removed.
async fn an_old_sandbox_leaves_the_new_one_alone() {
    let node = Node::new().await;
    node.sandbox("old").await;
    let spec =
        SandboxSpec { cgroup_parent: node.sandbox_spec("old").cgroup_parent, ..node.sandbox_spec("new") };
    node.runtime.stop_sandbox("old").await.unwrap();
    node.runtime.run_sandbox(spec).await.unwrap();
    node.runtime.create_container("new", node.spec("c", "sleep 100")).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.runtime.remove_sandbox("old").await.unwrap();
    assert_eq!(node.runtime.container_status("c").await.unwrap().state, ContainerState::Running);
    let half = Resources { cpu_shares: Some(512), ..Default::default() };
    node.runtime.update_sandbox("new", half.clone()).await.unwrap();
    assert_eq!(node.runtime.list().await.unwrap()[0].spec.resources, half);
    node.close().await;
}

async fn users_and_groups_are_resolved() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let user = User { user: Some("web".into()), supplementary_groups: vec![4000], ..Default::default() };
    let spec = ContainerSpec {
        user,
        ..node.spec("c", "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status; sleep 100")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_log("c", "CapEff").await;
    assert_eq!(node.text("c"), "101\n102\n102 300 4000\n/srv\nCapEff:\t0000000000000000\n");
    let status = node.runtime.container_status("c").await.unwrap();
    assert_eq!((status.uid, status.gid, status.supplementary_groups), (101, 102, vec![102, 300, 4000]));
    let out = node.runtime.exec_sync("c", vec!["id".into(), "-G".into()], Duration::ZERO).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "102 300 4000\n");
    node.close().await;
}

async fn mounts_are_there() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let (data, file) = (node.scratch("data"), node.scratch("conf").join("hosts"));
    std::fs::write(data.join("in"), "from the node").unwrap();
    std::fs::write(&file, "1.2.3.4 somewhere\n").unwrap();
    let mount = |host: &std::path::Path, at: &str, readonly| Mount {
        host_path: host.to_owned(),
        container_path: at.into(),
        readonly,
        ..Default::default()
    };
    let spec = ContainerSpec {
        mounts: vec![mount(&data, "/data", false), mount(&data, "/ro/deep", true), mount(&file, "/etc/hosts", false)],
        ..node.spec("c", "cat /data/in /etc/hosts; echo back > /data/out; echo x > /ro/deep/out2; ls -d /sys/fs/cgroup/*; ls /dev")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_exit("c").await;
    let text = node.text("c");
    assert!(text.starts_with("from the node1.2.3.4 somewhere\n"), "{text}");
    assert!(text.contains("Read-only file system") && text.contains("/sys/fs/cgroup/"), "{text}");
    for device in ["null", "zero", "urandom", "tty", "ptmx", "pts", "shm", "stdin", "mqueue"] {
        assert!(text.lines().any(|l| l == device), "{device}: {text}");
    }
    assert_eq!(std::fs::read_to_string(data.join("out")).unwrap(), "back\n");
    // One that reaches the node's mount namespace is made there, and taken away again.
    let both = Mount { propagation: Propagation::Bidirectional, ..mount(&data, "/data", false) };
    let spec = ContainerSpec {
        privileged: true,
        mounts: vec![both],
        ..node.spec("shared", "cat /data/in; echo; sleep 100")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("shared").await.unwrap();
    node.wait_log("shared", "from the node").await;
    node.close().await;
}

async fn a_new_agent_adopts_what_runs() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("stays", "echo first; sleep 100").await;
    node.start("ends", "read x < /wait/fifo; exit 6").await;
    node.wait_log("stays", "first").await;
    let before = node.runtime.list().await.unwrap();
    let spec =
        ContainerSpec { labels: [("a".to_owned(), "b".to_owned())].into(), ..node.spec("made", "true") };
    node.runtime.create_container("pod", spec).await.unwrap();
    let node = node.restart().await;
    // It ended while nobody looked.
    std::fs::write(node.scratch("wait").join("fifo"), "go\n").unwrap();
    let status = node.wait_exit("ends").await;
    assert_eq!(status.exit_code, Some(6));
    let node = node.restart().await;
    let after = node.runtime.list().await.unwrap();
    let find =
        |list: &[SandboxStatus], id: &str| list[0].containers.iter().find(|c| c.id == id).unwrap().clone();
    assert_eq!(after[0].state, SandboxState::Ready);
    assert_eq!(find(&after, "stays"), find(&before, "stays"));
    assert_eq!(
        (find(&after, "ends").exit_code, find(&after, "ends").state),
        (Some(6), ContainerState::Exited)
    );
    assert_eq!(find(&after, "made").labels["a"], "b");
    let out =
        node.runtime.exec_sync("stays", vec!["echo".into(), "hi".into()], Duration::ZERO).await.unwrap();
    assert_eq!(out.stdout, b"hi\n");
    node.runtime.start_container("made").await.unwrap();
    assert_eq!(node.wait_exit("made").await.exit_code, Some(0));
    // A log moved away by a rotation: the next line goes into a new one.
    std::fs::rename(node.log_path("stays"), node.log_path("stays").with_extension("1")).unwrap();
    node.runtime.reopen_log("stays").await.unwrap();
    assert!(node.log_path("stays").exists());
    node.close().await;
}

const AGENT: &str = "--as-an-agent-to-be-killed";

/// A process that opens the data directory it is given, starts five pods, and waits for its end.
fn agent() {
    let mut args = std::env::args().skip(2);
    let (root, cgroup_root) = (args.next().unwrap(), args.next().unwrap());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let node = Node::borrowed(root.into(), cgroup_root).await;
        for n in 0..5 {
            let pod = format!("pod{n}");
            node.runtime.run_sandbox(node.sandbox_spec(&pod)).await.unwrap();
            let id = format!("c{n}");
            let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done";
            node.runtime.create_container(&pod, node.spec(&id, script)).await.unwrap();
            node.runtime.start_container(&id).await.unwrap();
        }
        println!("up");
        std::future::pending::<()>().await;
    });
}

async fn a_killed_agent_leaves_all_as_it_is() {
    use std::io::BufRead;
    let node = Node::new().await;
    let mut agent = std::process::Command::new("/proc/self/exe")
        .args([AGENT, node.root().to_str().unwrap(), &node.cgroup_root])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    agent.kill().unwrap();
    agent.wait().unwrap();
    let node = node.restart().await;
    let pods = node.runtime.list().await.unwrap();
    assert_eq!(pods.len(), 5);
    for pod in &pods {
        let c = &pod.containers[0];
        assert_eq!((pod.state, c.state), (SandboxState::Ready, ContainerState::Running));
        assert!(std::path::Path::new(&format!("/proc/{}/exe", c.pid.unwrap())).exists());
    }
    // They have gone on writing, and nothing is missing between before and after.
    let seen = node.text("c0").lines().count();
    node.wait_log("c0", &format!("F {}", seen + 20)).await;
    let text = node.text("c0");
    assert!(text.lines().enumerate().all(|(at, line)| line == (at + 1).to_string()), "{text}");
    let out = node.runtime.exec_sync("c4", vec!["echo".into(), "hi".into()], Duration::ZERO).await.unwrap();
    assert_eq!(out.stdout, b"hi\n");
    node.runtime.stop_container("c1", Duration::ZERO).await.unwrap();
    assert_eq!(node.wait_exit("c1").await.exit_code, Some(137));
    node.close().await;
}

async fn a_dead_shim_takes_its_containers_along() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "sleep 100").await;
    let pid = node.runtime.container_status("c").await.unwrap().pid.unwrap();
    let shim = node.runtime.list().await.unwrap()[0].pid.unwrap();
    let mut events = node.runtime.subscribe();
    kill(shim);
    let status = node.wait_exit("c").await;
    assert_eq!((status.exit_code, status.reason.as_str()), (Some(137), "ContainerStatusUnknown"));
    loop {
        if let Event::SandboxExited { sandbox_id } = events.recv().await.unwrap() {
            assert_eq!(sandbox_id, "pod");
            break;
        }
    }
    assert_eq!(node.runtime.list().await.unwrap()[0].state, SandboxState::NotReady);
    assert!(!std::path::Path::new(&format!("/proc/{pid}/exe")).exists(), "the container lives on");
    let node = node.restart().await;
    assert_eq!(node.runtime.container_status("c").await.unwrap(), status);
    node.close().await;
}

/// A container that is added to look at another sees its processes.
async fn a_container_joins_the_processes_of_another() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("target", "exec sleep 1234").await;
    let spec =
        ContainerSpec { pid_target: Some("target".into()), ..node.spec("debug", "cat /proc/1/cmdline") };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("debug").await.unwrap();
    node.wait_exit("debug").await;
    assert_eq!(node.text("debug").trim_end_matches(['\n', '\0']), "sleep\u{0}1234");
    node.close().await;
}

async fn one_process_namespace_for_all() {
    let node = Node::new().await;
    let spec = SandboxSpec { share_pid: true, ..node.sandbox_spec("pod") };
    node.runtime.run_sandbox(spec).await.unwrap();
    node.start("a", "sleep 1000").await;
    node.start("b", "ps -o args; (sleep 2000 &) ; sleep 0.1; exit 0").await;
    assert_eq!(node.wait_exit("b").await.exit_code, Some(0));
    let text = node.text("b");
    assert!(text.contains("sleep 1000") && text.contains("minke-pause"), "{text}");
    node.start("c", "ps -o args").await;
    node.wait_exit("c").await;
    assert!(!node.text("c").contains("sleep 2000"), "what a container left runs on: {}", node.text("c"));
    node.close().await;
}

async fn the_nodes_own_namespaces() {
    let node = Node::new().await;
    let spec = SandboxSpec { host_network: true, host_pid: true, host_ipc: true, ..node.sandbox_spec("pod") };
    node.runtime.run_sandbox(spec).await.unwrap();
    let names = ["net", "uts", "ipc", "pid"];
    let script = names.map(|n| format!("readlink /proc/self/ns/{n}")).join("; ");
    // What it leaves behind in the node's process namespace goes with it.
    node.start("c", &format!("{script}; sleep 3000 & echo $!")).await;
    node.wait_exit("c").await;
    let text = node.text("c");
    let lines: Vec<&str> = text.lines().collect();
    for (name, got) in names.iter().zip(&lines) {
        assert_eq!(std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_str().unwrap(), *got);
    }
    let netns = node.runtime.sandbox_netns("pod").unwrap();
    assert_eq!(std::fs::read_link(netns).unwrap(), std::fs::read_link("/proc/self/ns/net").unwrap());
    let left = format!("/proc/{}/exe", lines[4]);
    assert!(std::fs::read_link(left).is_err(), "process {} is left", lines[4]);
    node.close().await;
}

async fn many_at_once() {
    let node = Node::new().await;
    let pods: Vec<String> = (0..20).map(|n| format!("pod{n}")).collect();
    let begun = Instant::now();
    let shared = &node;
    let all = pods.iter().map(async |pod| {
        let node = shared;
        node.runtime.run_sandbox(node.sandbox_spec(pod)).await.unwrap();
        for n in 0..2 {
            let id = format!("{pod}-c{n}");
            node.runtime.create_container(pod, node.spec(&id, "echo $HOSTNAME; exit 4")).await.unwrap();
            node.runtime.start_container(&id).await.unwrap();
            assert_eq!(node.wait_exit(&id).await.exit_code, Some(4));
            assert_eq!(node.text(&id), "web-0\n");
        }
    });
    futures_util::future::join_all(all).await;
    println!("    20 pods with 2 containers each: {:?}", begun.elapsed());
    node.close().await;
}

async fn unfinished_creations_are_cleared() {
    let node = Node::new().await;
    let root = node.root();
    // As a crash in the middle of each would leave them.
    std::fs::create_dir_all(root.join("shims/half")).unwrap();
    std::fs::create_dir_all(root.join("containers/half/upper")).unwrap();
    std::fs::create_dir_all(root.join("snapshots/.tmp-0123")).unwrap();
    std::fs::write(root.join("images/blobs/sha256/.tmp-0123"), "x").unwrap();
    let node = node.restart().await;
    for gone in ["shims/half", "containers/half", "snapshots/.tmp-0123", "images/blobs/sha256/.tmp-0123"] {
        assert!(!root.join(gone).exists(), "{gone}");
    }
    // A sandbox that cannot come up leaves nothing and can be tried again.
    let bad = SandboxSpec {
        sysctls: [("no.such.thing".to_owned(), "1".to_owned())].into(),
        ..node.sandbox_spec("pod")
    };
    let error = node.runtime.run_sandbox(bad).await.unwrap_err().to_string();
    assert!(error.contains("set sysctl no.such.thing=1"), "{error}");
    node.sandbox("pod").await;
    assert!(matches!(node.runtime.run_sandbox(node.sandbox_spec("pod")).await, Err(Error::AlreadyExists(_))));
    node.close().await;
}
