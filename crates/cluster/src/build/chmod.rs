//! `--chmod`: a mode in octal digits, or what is to be changed of one, as chmod(1) takes it.

/// What becomes of the modes of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chmod {
    Octal(u32),
    /// `u=rwX,go=rX`
    Changes(Vec<Change>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The bits of user, group and others that it is about, of `0o7777`.
    who: u32,
    operator: char,
    /// `rwx` for all three, and the special bits.
    bits: u32,
    /// `X`: execution for directories, and for what somebody can execute already.
    sometimes: bool,
}

impl Chmod {
    pub fn parse(text: &str) -> Result<Chmod, String> {
        let wrong = || {
            format!(
                "invalid chmod parameter: {text:?}. it should be octal string and between 0 and 07777, or symbolic: u=rwX,go=rX"
            )
        };
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
            return mode.map(Chmod::Octal).ok_or_else(wrong);
        }
        let changes = text.split(',').map(changes).collect::<Option<Vec<_>>>().ok_or_else(wrong)?;
        Ok(Chmod::Changes(changes.concat()))
    }

    pub fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        let changes = match self {
            Chmod::Octal(mode) => return *mode,
            Chmod::Changes(changes) => changes,
        };
        changes.iter().fold(mode, |mode, change| {
            let runs = change.sometimes && (is_dir || mode & 0o111 != 0);
            let bits = (change.bits | if runs { 0o111 } else { 0 }) & change.who;
            match change.operator {
                '+' => mode | bits,
                '-' => mode & !bits,
                // Of the special bits only those that are named.
                _ => (mode & !(change.who & (0o777 | change.bits))) | bits,
            }
        })
    }
}

/// `ugo+rw-x`
fn changes(text: &str) -> Option<Vec<Change>> {
    let at = text.find(['+', '-', '='])?;
    let (who, mut rest) = text.split_at(at);
    let mut whom = 0;
    for c in who.chars() {
        whom |= match c {
            'u' => 0o4700,
            'g' => 0o2070,
            'o' => 0o1007,
            'a' => 0o7777,
            _ => return None,
        };
    }
    let whom = if who.is_empty() { 0o7777 } else { whom };
    let mut all = Vec::new();
    while let Some(operator) = rest.chars().next() {
        rest = &rest[1..];
        let end = rest.find(['+', '-', '=']).unwrap_or(rest.len());
        let (mut bits, mut sometimes) = (0, false);
        for c in rest[..end].chars() {
            match c {
                'r' => bits |= 0o444,
                'w' => bits |= 0o222,
                'x' => bits |= 0o111,
                's' => bits |= 0o6000,
                't' => bits |= 0o1000,
                'X' => sometimes = true,
                _ => return None,
            }
        }
        // The sticky bit is nobody's in particular.
        let who = whom | (bits & 0o1000);
        all.push(Change { who, operator, bits, sometimes });
        rest = &rest[end..];
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, mode: u32, is_dir: bool, want: u32) {
        let got = Chmod::parse(text).expect("it is good").apply(mode, is_dir);
        assert_eq!(got, want, "{text}: {got:o} instead of {want:o}");
    }

    #[test]
    fn modes_are_set_and_changed() {
        check("0755", 0o644, false, 0o755);
        check("0", 0o644, false, 0);
        check("u=rwX,go=rX", 0o600, false, 0o644);
        check("u=rwX,go=rX", 0o600, true, 0o755);
        check("u=rwX,go=rX", 0o711, false, 0o755);
        check("a+x", 0o644, false, 0o755);
        check("+x", 0o644, false, 0o755);
        check("go-rwx", 0o755, false, 0o700);
        check("u+s,+t", 0o755, false, 0o5755);
        check("u=r", 0o4755, false, 0o4455);
        check("g=", 0o777, false, 0o707);
        check("u+w-x", 0o500, false, 0o600);
        for wrong in ["", "8", "10000", "077777", "rwx", "x+r", "u=q", "u"] {
            assert!(Chmod::parse(wrong).is_err(), "{wrong}");
        }
    }
}
