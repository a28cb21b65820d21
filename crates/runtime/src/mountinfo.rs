//! The kernel's table of mounts, `/proc/<pid>/mountinfo`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Where the mount is that a line of the table tells of.
pub fn mount_point(line: &str) -> Option<PathBuf> {
    line.split(' ').nth(4).map(|point| PathBuf::from(OsString::from_vec(unescape(point))))
}

/// The kernel prints space, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, want: Option<&str>) {
        assert_eq!(mount_point(line), want.map(PathBuf::from), "{line:?}");
    }

    #[test]
    fn points_of_mounts_are_read_as_the_kernel_prints_them() {
        check("22 1 0:1 / / rw - ext4 a rw", Some("/"));
        check("23 22 0:2 / /a\\040b\\134 rw shared:1 - tmpfs t rw", Some("/a b\\"));
        check("23 22 0:2 / /a\\9\\", Some("/a\\9\\"));
        check("23 22 0:2", None);
    }
}
