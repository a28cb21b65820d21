//! Tells on the node that the machine ran out of memory and the kernel killed a process for it. What a container is
//! killed for at its own limit is told of with the container. Upstream: pkg/kubelet/oom.

use minke_runtime::KernelLog;

use crate::events::Recorder;

/// What the event says, when the line of the kernel's log is about such a kill.
fn told(line: &str) -> Option<String> {
    // oom-kill:constraint=…,cpuset=…,mems_allowed=0,global_oom,task_memcg=/…,task=name,pid=1,uid=0
    let facts = line.strip_prefix("oom-kill:")?;
    let (place, victim) = facts.split_once(",task_memcg=")?;
    if !place.ends_with(",global_oom") {
        return None;
    }
    // The names of cgroups and processes may have commas in them.
    let (rest, pid) = victim.rsplit_once(",pid=")?;
    let (_, name) = rest.rsplit_once(",task=")?;
    let pid: u32 = pid.split(',').next()?.parse().ok()?;
    Some(format!("System OOM encountered, victim process: {name}, pid: {pid}"))
}

/// Follows the kernel's log for as long as it can be read.
pub async fn follow(events: &Recorder) {
    let log = match KernelLog::open() {
        Ok(log) => log,
        Err(error) => {
            return tracing::info!(%error, "No events of a machine out of memory: its log can't be read");
        }
    };
    loop {
        match log.next().await {
            Ok(line) => {
                if let Some(message) = told(&line) {
                    events.node(false, "SystemOOM", message);
                }
            }
            Err(error) => return tracing::warn!(%error, "The kernel's log can't be read any more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, want: Option<&str>) {
        assert_eq!(told(line).as_deref(), want, "{line}");
    }

    #[test]
    fn only_the_machine_s_own_shortage_is_told() {
        let head = "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0";
        let stress = Some("System OOM encountered, victim process: stress, pid: 4711");
        check(&format!("{head},global_oom,task_memcg=/user.slice,task=stress,pid=4711,uid=0"), stress);
        check(&format!("{head},global_oom,task_memcg=/,task=stress,pid=4711,uid=0"), stress);
        let odd = Some("System OOM encountered, victim process: a,b=c,pid=9, pid: 12");
        check(&format!("{head},global_oom,task_memcg=/x,y,task=a,b=c,pid=9,pid=12,uid=0"), odd);
        check(&format!("{head},oom_memcg=/pods/c,task_memcg=/pods/c,task=stress,pid=4711,uid=0"), None);
        check("Out of memory: Killed process 4711 (stress) total-vm:1kB", None);
        check(&format!("{head},global_oom,task_memcg=/,task=stress,pid=x,uid=0"), None);
        check("oom-kill:", None);
        check("eth0: link is up", None);
    }
}
