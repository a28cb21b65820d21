//! Which device nodes a container may open: v1's `devices.*` files, or v2's eBPF program.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::api::Device;
use crate::cgroup::Cgroups;
use crate::sys;

/// One allowed device; `None` is any number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `b` or `c`.
    pub kind: char,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Some of `rwm`.
    pub access: String,
}

/// The field's default: making any node, and using the harmless ones.
pub fn default_rules() -> Vec<Rule> {
    let rule = |kind, major, minor, access: &str| Rule { kind, major, minor, access: access.into() };
    let mut rules = vec![rule('c', None, None, "m"), rule('b', None, None, "m")];
    // null, zero, full, random, urandom, tty, console, ptmx, the pseudo terminals.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)] {
        rules.push(rule('c', Some(major), Some(minor), "rwm"));
    }
    rules.push(rule('c', Some(136), None, "rwm"));
    rules
}

/// The rule for a device of the node.
pub fn rule_for(device: &Device) -> io::Result<Rule> {
    let meta = fs::metadata(&device.host_path)?;
    let kind = match meta.file_type() {
        t if t.is_block_device() => 'b',
        t if t.is_char_device() => 'c',
        _ => return Err(io::Error::other(format!("{} is not a device", device.host_path.display()))),
    };
    let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
    Ok(Rule {
        kind,
        major: Some(rustix::fs::major(meta.rdev())),
        minor: Some(rustix::fs::minor(meta.rdev())),
        access: access.to_owned(),
    })
}

/// The device nodes below a directory, without terminals and what is mounted there.
pub fn host_nodes(dir: &Path, found: &mut Vec<PathBuf>) {
    const OWN: [&str; 7] = ["pts", "ptmx", "shm", "mqueue", "fd", "hugepages", "console"];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if OWN.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if kind.is_dir() {
            host_nodes(&entry.path(), found);
        } else if kind.is_block_device() || kind.is_char_device() {
            found.push(entry.path());
        }
    }
}

/// Takes from others the right to write to the directories of device nodes, in the container that they are in:
/// libcontainer makes them with all rights. What is mounted there is not ours.
pub fn close_dirs<'a>(devices: impl Iterator<Item = &'a Path>) {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let Ok(dev) = rustix::fs::open("/dev", flags, Mode::empty()) else { return };
    let below = devices.filter_map(|path| path.strip_prefix("/dev").ok());
    let dirs: BTreeSet<&Path> = below.flat_map(|path| path.ancestors().skip(1)).collect();
    for dir in dirs.into_iter().filter(|dir| !dir.as_os_str().is_empty()) {
        if let Ok(dir) = rustix::fs::openat2(&dev, dir, flags, Mode::empty(), inside) {
            let _ = rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o755));
        }
    }
}

/// Allows what `rules` say and nothing else.
pub fn restrict(cgroups: &Cgroups, path: &str, rules: &[Rule]) -> io::Result<()> {
    if let Some(dir) = cgroups.v1_devices_dir(path) {
        fs::write(dir.join("devices.deny"), "a")?;
        for rule in rules {
            fs::write(dir.join("devices.allow"), v1_line(rule))?;
        }
        return Ok(());
    }
    match cgroups.v2_dir(path) {
        Some(dir) => attach(&dir, rules),
        None => Ok(()),
    }
}

fn v1_line(rule: &Rule) -> String {
    let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
    format!("{} {}:{} {}", rule.kind, number(rule.major), number(rule.minor), rule.access)
}

/// Loads the program and attaches it to a v2 cgroup.
pub(crate) fn attach(dir: &Path, rules: &[Rule]) -> io::Result<()> {
    let cgroup = fs::File::open(dir)?;
    sys::attach_device_program(&cgroup, &program(rules))
}

// Opcodes of <linux/bpf.h>: class | operation | source.
const LDX_W: u8 = 0x61;
const MOV32_REG: u8 = 0xbc;
const MOV64_IMM: u8 = 0xb7;
const AND32_IMM: u8 = 0x54;
const RSH32_IMM: u8 = 0x74;
const JNE_IMM: u8 = 0x55;
const JNE_REG: u8 = 0x5d;
const EXIT: u8 = 0x95;

/// One eBPF instruction in the kernel's layout.
fn instruction(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    u64::from(code)
        | u64::from(src << 4 | dst) << 8
        | u64::from(off as u16) << 16
        | u64::from(imm as u32) << 32
}

/// The program: r2 = type, r3 = access asked for, r4 = major, r5 = minor; one block of tests per rule, each
/// jumping to the next block when it does not hold, and returning 1 when all do.
fn program(rules: &[Rule]) -> Vec<u64> {
    // struct bpf_cgroup_dev_ctx { access_type: type | access << 16, major, minor }
    let mut code = vec![
        instruction(LDX_W, 2, 1, 0, 0),
        instruction(AND32_IMM, 2, 0, 0, 0xffff),
        instruction(LDX_W, 3, 1, 0, 0),
        instruction(RSH32_IMM, 3, 0, 0, 16),
        instruction(LDX_W, 4, 1, 4, 0),
        instruction(LDX_W, 5, 1, 8, 0),
    ];
    for rule in rules {
        let bits = |c| match c {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            _ => 0,
        };
        let access: i32 = rule.access.chars().map(bits).sum();
        // (opcode, register, source register, value); the jump distance is known once all are there.
        let mut tests = vec![(JNE_IMM, 2, 0, if rule.kind == 'b' { 1 } else { 2 })];
        let mut block = Vec::new();
        if access != 7 {
            tests.push((JNE_REG, 1, 3, 0));
        }
        tests.extend(rule.major.map(|n| (JNE_IMM, 4, 0, n as i32)));
        tests.extend(rule.minor.map(|n| (JNE_IMM, 5, 0, n as i32)));
        let extra = if access != 7 { 2 } else { 0 };
        let length = tests.len() + extra + 2;
        for (op, reg, src, imm) in tests {
            if op == JNE_REG {
                // r1 = asked & allowed; anything asked beyond that does not match.
                block.push(instruction(MOV32_REG, 1, 3, 0, 0));
                block.push(instruction(AND32_IMM, 1, 0, 0, access));
            }
            let skip = length - block.len() - 1;
            block.push(instruction(op, reg, src, skip as i16, imm));
        }
        block.push(instruction(MOV64_IMM, 0, 0, 0, 1));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        code.extend(block);
    }
    code.push(instruction(MOV64_IMM, 0, 0, 0, 0));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(code: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> u64 {
        let context = [kind | access << 16, major, minor];
        let (mut r, mut pc) = ([0u64; 11], 0usize);
        loop {
            let i = code[pc];
            let (op, dst, src) = (i as u8, (i >> 8 & 15) as usize, (i >> 12 & 15) as usize);
            let (off, imm) = ((i >> 16) as i16, (i >> 32) as i32);
            pc += 1;
            match op {
                LDX_W => r[dst] = context[off as usize / 4].into(),
                MOV32_REG => r[dst] = r[src] as u32 as u64,
                MOV64_IMM => r[dst] = imm as u64,
                AND32_IMM => r[dst] = (r[dst] as u32 & imm as u32).into(),
                RSH32_IMM => r[dst] = (r[dst] as u32 >> imm).into(),
                JNE_IMM if r[dst] != imm as u64 => pc += off as usize,
                JNE_REG if r[dst] != r[src] => pc += off as usize,
                JNE_IMM | JNE_REG => {}
                EXIT => return r[0],
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    #[track_caller]
    fn check(kind: char, access: u32, major: u32, minor: u32, want: bool) {
        let kind = if kind == 'b' { 1 } else { 2 };
        assert_eq!(run(&program(&default_rules()), kind, access, major, minor), u64::from(want));
    }

    #[test]
    fn the_default_rules_allow_null_and_not_the_disk() {
        check('c', 2 | 4, 1, 3, true);
        check('c', 2, 136, 77, true);
        check('b', 1, 8, 0, true);
        check('b', 2, 8, 0, false);
        check('b', 1 | 2, 8, 0, false);
        check('c', 2, 1, 1, false);
        check('c', 7, 5, 2, true);
    }

    /// The kernel's own verdict on the program, wherever a v2 hierarchy is mounted.
    #[test]
    fn the_kernel_takes_the_program() {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let v2 = mounts.lines().find(|l| l.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4));
        let (Some(v2), true) = (v2, rustix::process::geteuid().is_root()) else {
            eprintln!("skipped: needs root and a cgroup2 mount");
            return;
        };
        let dir = Path::new(v2).join(format!("minke-test-device-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let attached = attach(&dir, &default_rules());
        fs::write(dir.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        let opened = |path: &str| fs::File::open(path).map(drop).map_err(|e| e.kind());
        let (null, kmsg) = (opened("/dev/null"), opened("/dev/kmsg"));
        fs::write(Path::new(v2).join("cgroup.procs"), std::process::id().to_string()).unwrap();
        fs::remove_dir(&dir).unwrap();
        attached.unwrap();
        assert_eq!((null, kmsg), (Ok(()), Err(io::ErrorKind::PermissionDenied)));
    }

    #[test]
    fn v1_lines_read_as_the_kernel_wants_them() {
        let lines: Vec<_> = default_rules().iter().map(v1_line).collect();
        assert_eq!(lines[0], "c *:* m");
        assert_eq!(lines[2], "c 1:3 rwm");
        assert_eq!(lines.last().unwrap(), "c 136:* rwm");
    }
}
