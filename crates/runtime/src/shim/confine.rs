//! The last steps of every process that comes into a container: what it may do is taken away, and the program found.

use std::ffi::CString;
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exec::find_program;
use crate::filter::{self, Filter};

/// The filter's name in the container's directory.
pub const FILTER: &str = "filter.bpf";

/// `process.json`: how processes of a container are to be.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessRecord {
    /// As the OCI runtime specification has it.
    pub process: Process,
    /// The node's id of the first user in the container's own user namespace, if it has one.
    pub first_id: Option<u32>,
    /// There is a [`FILTER`], to be loaded with these flags.
    pub filter: Option<u32>,
    /// Instead, a profile that asks somebody else; libcontainer knows how.
    pub asking: Option<LinuxSeccomp>,
}

/// libcontainer 0.7 takes the mask of a masked comparison for the value, and the other way round.
fn swap_masks(profile: &mut Value) {
    let rules = profile["syscalls"].as_array_mut().into_iter().flatten();
    for arg in rules.filter_map(|rule| rule.get_mut("args")?.as_array_mut()).flatten() {
        if arg["op"] == "SCMP_CMP_MASKED_EQ" {
            let mask = arg["value"].take();
            arg["value"] = arg.get("valueTwo").cloned().unwrap_or_else(|| 0.into());
            arg["valueTwo"] = mask;
        }
    }
}

impl ProcessRecord {
    /// Takes what libcontainer is not to do out of a bundle's configuration, and writes it down in `dir`.
    pub fn take(
        config: &mut Value,
        first_id: Option<u32>,
        dir: &Path,
        filters: &Path,
    ) -> Result<Self, String> {
        let process = Process::deserialize(&config["process"]).map_err(|e| e.to_string())?;
        let mut record = Self { process, first_id, filter: None, asking: None };
        if let Some(profile) = config["linux"].get_mut("seccomp") {
            let _ = std::fs::remove_file(dir.join(FILTER));
            record.filter = filter::place(profile, filters, &dir.join(FILTER))?;
            if record.filter.is_none() {
                swap_masks(profile);
                let profile = &*profile;
                record.asking =
                    Some(LinuxSeccomp::deserialize(profile).map_err(|e| format!("seccomp: {e}"))?);
            }
        }
        crate::files::write_json(&dir.join("process.json"), &record)
            .map_err(|e| format!("write process.json: {e}"))?;
        if record.filter.is_some()
            && let Some(linux) = config["linux"].as_object_mut()
        {
            linux.remove("seccomp");
        }
        if let Some(process) = config["process"].as_object_mut() {
            process.remove("capabilities");
        }
        Ok(record)
    }

    /// The filter, as long as `dir` can be seen.
    pub fn filter(&self, dir: &Path) -> Result<Option<Filter>, String> {
        let read = self.filter.map(|flags| Filter::read(&dir.join(FILTER), flags)).transpose();
        read.map_err(|e| format!("seccomp: {e}"))
    }

    pub fn no_new_privs(&self) -> bool {
        self.process.no_new_privileges() == Some(true)
    }

    /// Of a process with all capabilities of its user namespace, whatever its user: leaves it what it is to have, and
    /// finds the program `name`.
    pub fn enter(&self, name: &str, filter: Option<&Filter>) -> Result<CString, String> {
        let load = || filter.map_or(Ok(()), Filter::load).map_err(|e| format!("seccomp: {e}"));
        // Without no_new_privs only an administrator may set a filter, so it comes before capabilities go.
        if !self.no_new_privs() {
            load()?;
        }
        if let Some(capabilities) = self.process.capabilities() {
            let syscall = libcontainer::syscall::syscall::create_syscall();
            libcontainer::capabilities::drop_privileges(capabilities, &*syscall)
                .map_err(|e| format!("capabilities: {e}"))?;
        }
        let env = self.process.env().iter().flatten();
        let path = env.filter_map(|e| e.strip_prefix("PATH=")).next().unwrap_or_default();
        let program = find_program(name, path)?;
        if self.no_new_privs() {
            load()?;
        }
        Ok(program)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn libcontainer_gets_what_it_is_to_do_and_the_rest_is_ours() {
        let tmp = tempfile::tempdir().unwrap();
        let mut config = json!({
            "process": {"cwd": "/", "user": {"uid": 7, "gid": 8}, "capabilities": {"bounding": ["CAP_KILL"]}},
            "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}, "maskedPaths": ["/x"]},
        });
        let record =
            ProcessRecord::take(&mut config, Some(9), tmp.path(), &tmp.path().join("filters")).unwrap();
        assert_eq!((record.first_id, record.process.user().uid()), (Some(9), 7));
        assert!(record.process.capabilities().is_some() && record.asking.is_none());
        assert!(record.filter(tmp.path()).unwrap().is_some());
        let left =
            json!({"process": {"cwd": "/", "user": {"uid": 7, "gid": 8}}, "linux": {"maskedPaths": ["/x"]}});
        assert_eq!(config, left);
        let written = std::fs::read(tmp.path().join("process.json")).unwrap();
        let read: ProcessRecord = serde_json::from_slice(&written).unwrap();
        assert_eq!(read.filter, record.filter);

        // Who asks somebody else needs libcontainer, which has its own idea of masks.
        config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"},
            {"names": ["clone"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 0, "value": 6, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"},
                      {"index": 1, "value": 5, "op": "SCMP_CMP_MASKED_EQ"},
                      {"index": 2, "value": 3, "op": "SCMP_CMP_EQ"}]}]});
        let record = ProcessRecord::take(&mut config, None, tmp.path(), &tmp.path().join("filters")).unwrap();
        assert!(record.asking.is_some() && record.filter(tmp.path()).unwrap().is_none());
        let args = &config["linux"]["seccomp"]["syscalls"][1]["args"];
        let values = |n: usize| (args[n]["value"].as_u64(), args[n]["valueTwo"].as_u64());
        assert_eq!(
            [values(0), values(1), values(2)],
            [(Some(2), Some(6)), (Some(0), Some(5)), (Some(3), None)]
        );
    }
}
