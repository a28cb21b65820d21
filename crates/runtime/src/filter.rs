//! A seccomp profile as the program that the kernel runs.
//!
//! Compiling one takes longer than everything else about starting a process, and most containers have the same: it is
//! done once and kept, by what the profile says. libcontainer would do it for each container.

use std::fs;
use std::io;
use std::path::Path;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Part of every name: another way to compile makes other files.
const VERSION: &str = "1";
/// Programs that are kept; all are made anew when there come more.
const KEPT_MAX: usize = 128;
/// Bytes of a program, eight an instruction, that the kernel takes.
const BYTES_MAX: usize = 4096 * 8;
const EPERM: i32 = 1;

/// Flags of `seccomp(2)`.
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// The part of the OCI runtime specification's `linux.seccomp` that is about a program.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<i32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Vec<String>,
    action: String,
    errno_ret: Option<i32>,
    #[serde(default)]
    args: Vec<Argument>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// Puts the program of a profile at `target`; returns the flags to load it with. `None` when the profile asks somebody
/// else (`SCMP_ACT_NOTIFY`), which takes more than a program.
pub fn place(profile: &Value, cache: &Path, target: &Path) -> Result<Option<u32>, String> {
    let say = |e: &dyn std::fmt::Display| format!("seccomp: {e}");
    let parsed = Profile::deserialize(profile).map_err(|e| say(&e))?;
    let rules = parsed.syscalls.iter().map(|rule| &rule.action);
    if rules.chain([&parsed.default_action]).any(|action| action == "SCMP_ACT_NOTIFY") {
        return Ok(None);
    }
    let mut hash = Sha256::new_with_prefix(format!("{VERSION} {} ", std::env::consts::ARCH));
    hash.update(profile.to_string());
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let kept = cache.join(&name);
    match fs::hard_link(&kept, target) {
        Ok(()) => return Ok(Some(flags(&parsed))),
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(say(&e)),
        Err(_) => {}
    }
    if fs::read_dir(cache).is_ok_and(|all| all.count() > KEPT_MAX) {
        fs::remove_dir_all(cache).map_err(|e| say(&e))?;
    }
    fs::create_dir_all(cache).map_err(|e| say(&e))?;
    // Others may be at the same; each makes it whole under a name of its own, and none takes another's away.
    let fresh = cache.join(format!("{name}.{}", std::process::id()));
    let made = fs::File::create(&fresh).map_err(|e| say(&e)).and_then(|file| {
        let compiled = compile(&parsed, 2).map_err(|e| say(&e))?;
        compiled.export_bpf(&file).map_err(|e| say(&e))
    });
    let done = made.and_then(|()| fs::hard_link(&fresh, target).map_err(|e| say(&e)));
    if done.is_ok() {
        let _ = fs::hard_link(&fresh, &kept);
    }
    let _ = fs::remove_file(&fresh);
    done.map(|()| Some(flags(&parsed)))
}

/// A program that was placed.
#[derive(Clone)]
pub struct Filter {
    code: Vec<u8>,
    flags: u32,
}

impl Filter {
    pub fn read(file: &Path, flags: u32) -> io::Result<Filter> {
        let code = fs::read(file)?;
        match code.len() {
            1..=BYTES_MAX if code.len().is_multiple_of(8) => Ok(Filter { code, flags }),
            _ => Err(io::Error::other(format!("{} is no program", file.display()))),
        }
    }

    /// Has the kernel filter the calls of this process, and of what it becomes.
    pub fn load(&self) -> io::Result<()> {
        crate::sys::load_filter(&self.code, self.flags)
    }
}

/// As runc has them: without any, programs are not slowed down against speculation.
fn flags(profile: &Profile) -> u32 {
    let flag = |name: &String| match name.as_str() {
        "SECCOMP_FILTER_FLAG_LOG" => FLAG_LOG,
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
        // Of other threads, of which there are none, and of those who are asked.
        _ => 0,
    };
    match profile.flags.is_empty() {
        true => FLAG_SPEC_ALLOW,
        false => profile.flags.iter().map(flag).fold(0, |all, flag| all | flag),
    }
}

/// `level` 2 has calls looked up in a tree instead of a list: the kernel, which runs the program for every number when
/// it is loaded, is quicker by far.
fn compile(profile: &Profile, level: u32) -> Result<ScmpFilterContext, SeccompError> {
    let action = |name: &str, errno: Option<i32>| ScmpAction::from_str(name, Some(errno.unwrap_or(EPERM)));
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let mut filter = ScmpFilterContext::new(default)?;
    filter.set_ctl_optimize(level)?;
    for name in &profile.architectures {
        filter.add_arch(name.parse::<ScmpArch>()?)?;
    }
    for rule in &profile.syscalls {
        let then = action(&rule.action, rule.errno_ret)?;
        if then == default {
            continue;
        }
        let compare = |argument: &Argument| -> Result<ScmpArgCompare, SeccompError> {
            let (mut op, mut value) = (argument.op.parse()?, argument.value);
            if matches!(op, ScmpCompareOp::MaskedEqual(_)) {
                // The mask is the first value, what it leaves has to be the second.
                (op, value) = (ScmpCompareOp::MaskedEqual(argument.value), argument.value_two);
            }
            Ok(ScmpArgCompare::new(argument.index, op, value))
        };
        let compared = rule.args.iter().map(compare).collect::<Result<Vec<_>, _>>()?;
        let indices: std::collections::BTreeSet<u32> = rule.args.iter().map(|a| a.index).collect();
        for name in &rule.names {
            // Kernels that do not know a call do not make it either.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            if indices.len() == compared.len() {
                filter.add_rule_conditional(then, call, &compared)?;
                continue;
            }
            // An argument is compared once in a rule: then any of the comparisons will do, as with runc.
            for one in &compared {
                filter.add_rule_conditional(then, call, std::slice::from_ref(one))?;
            }
        }
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One call as a filter sees it.
    #[derive(Debug, Clone, Copy)]
    struct Call {
        number: i32,
        arch: u32,
        args: [u64; 6],
    }

    const X86_64: u32 = 0xc000_003e;
    const X86: u32 = 0x4000_0003;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    /// Runs a classic BPF program as the kernel would.
    fn run(code: &[u8], call: Call) -> u32 {
        let mut data = [0u32; 16];
        (data[0], data[1]) = (call.number as u32, call.arch);
        for (n, arg) in call.args.iter().enumerate() {
            (data[4 + 2 * n], data[5 + 2 * n]) = (*arg as u32, (arg >> 32) as u32);
        }
        let (mut a, mut pc) = (0u32, 0usize);
        loop {
            let i = &code[pc * 8..pc * 8 + 8];
            let (op, jt, jf) = (u16::from_le_bytes([i[0], i[1]]), i[2] as usize, i[3] as usize);
            let k = u32::from_le_bytes([i[4], i[5], i[6], i[7]]);
            pc += 1;
            let jump = match op {
                0x05 => {
                    pc += k as usize;
                    continue;
                }
                0x06 => return k,
                0x20 => {
                    a = data[k as usize / 4];
                    continue;
                }
                0x54 => {
                    a &= k;
                    continue;
                }
                0x15 => a == k,
                0x25 => a > k,
                0x35 => a >= k,
                other => panic!("opcode {other:#x}"),
            };
            pc += if jump { jt } else { jf };
        }
    }

    fn code(profile: &Value, level: u32) -> Vec<u8> {
        let parsed = Profile::deserialize(profile).unwrap();
        let file = rustix::fs::memfd_create("filter", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        compile(&parsed, level).unwrap().export_bpf(&file).unwrap();
        let (mut file, mut code) = (fs::File::from(file), Vec::new());
        io::Seek::rewind(&mut file).unwrap();
        io::Read::read_to_end(&mut file, &mut code).unwrap();
        code
    }

    fn number(name: &str) -> i32 {
        ScmpSyscall::from_name(name).unwrap().into()
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_default_profile_keeps_what_it_says() {
        let code = code(&crate::seccomp::default_profile(&["CAP_CHOWN".to_owned()]), 2);
        #[track_caller]
        fn check(code: &[u8], name: &str, first: u64, want: u32) {
            let call = Call { number: number(name), arch: X86_64, args: [first, 0, 0, 0, 0, 0] };
            assert_eq!(run(code, call), want, "{name}({first:#x})");
        }
        check(&code, "read", 0, ALLOW);
        check(&code, "mount", 0, ERRNO | 1);
        check(&code, "unshare", 0, ERRNO | 1);
        check(&code, "keyctl", 0, ERRNO | 1);
        check(&code, "clone3", 0, ERRNO | 38);
        // A fork, a thread; a new user namespace, a new mount namespace among other flags.
        check(&code, "clone", 0x0120_0011, ALLOW);
        check(&code, "clone", 0x003d_0f00, ALLOW);
        check(&code, "clone", 0x1000_0000, ERRNO | 1);
        check(&code, "clone", 0x0122_0011, ERRNO | 1);
        check(&code, "socket", 2, ALLOW);
        check(&code, "socket", 40, ERRNO | 1);
        check(&code, "personality", 0x8, ALLOW);
        check(&code, "personality", 0x4_0000, ERRNO | 1);
        let foreign = Call { number: 0, arch: 0x1234, args: [0; 6] };
        assert_eq!(run(&code, foreign), 0);
    }

    /// A tree is only a quicker list.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn programs_of_both_kinds_say_the_same() {
        let capabilities = ["CAP_SYS_ADMIN", "CAP_BPF", "CAP_SYSLOG"].map(str::to_owned);
        for capabilities in [&capabilities[..0], &capabilities[..2], &capabilities[..]] {
            let profile = crate::seccomp::default_profile(capabilities);
            let (list, tree) = (code(&profile, 1), code(&profile, 2));
            for (arch, numbers) in [(X86_64, -1..600), (X86_64, 0x4000_0000..0x4000_0258), (X86, -1..600)] {
                for number in numbers {
                    for first in [0, 8, 40, 0x2_0000, 0x1000_0000, 0x7e02_0000, 0xffff_ffff, u64::MAX] {
                        let call = Call { number, arch, args: [first, first, 0, 0, 0, 0] };
                        assert_eq!(run(&tree, call), run(&list, call), "{call:x?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_profile_is_compiled_once() {
        let tmp = tempfile::tempdir().unwrap();
        let (cache, at) = (tmp.path().join("filters"), |n: usize| tmp.path().join(n.to_string()));
        let profile = crate::seccomp::default_profile(&[]);
        assert_eq!(place(&profile, &cache, &at(0)), Ok(Some(FLAG_SPEC_ALLOW)));
        let kept: Vec<_> = fs::read_dir(&cache).unwrap().flatten().map(|e| e.path()).collect();
        assert_eq!(kept.len(), 1);
        // Whatever is there is taken: it was compiled by no one else.
        fs::write(&kept[0], "12345678").unwrap();
        assert_eq!(place(&profile, &cache, &at(1)), Ok(Some(FLAG_SPEC_ALLOW)));
        assert_eq!(fs::read_to_string(at(1)).unwrap(), "12345678");
        let other =
            serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG"]});
        assert_eq!(place(&other, &cache, &at(2)), Ok(Some(FLAG_LOG)));
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
        let asks = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]});
        assert_eq!(place(&asks, &cache, &at(3)), Ok(None));
        let wrong = serde_json::json!({"defaultAction": "SCMP_ACT_MAYBE"});
        assert!(place(&wrong, &cache, &at(4)).unwrap_err().starts_with("seccomp: "));
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
    }
}
