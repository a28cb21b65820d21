//! The names images give their stop signal by.

use nix::sys::signal::Signal;

const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;

/// SIGTERM for what is empty or no signal.
pub fn number(name: &str) -> i32 {
    parse(name).unwrap_or(Signal::SIGTERM as i32)
}

fn parse(name: &str) -> Option<i32> {
    let upper = name.trim().to_ascii_uppercase();
    let in_range = |n: i32| (1..=SIGRTMAX).contains(&n).then_some(n);
    if let Ok(number) = upper.parse::<i32>() {
        return in_range(number);
    }
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        return in_range(SIGRTMIN + if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse().ok()? });
    }
    if let Some(rest) = bare.strip_prefix("RTMAX") {
        return in_range(SIGRTMAX - if rest.is_empty() { 0 } else { rest.strip_prefix('-')?.parse().ok()? });
    }
    format!("SIG{bare}").parse::<Signal>().ok().map(|s| s as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, want: i32) {
        assert_eq!(number(name), want, "{name:?}");
    }

    #[test]
    fn names_and_numbers_are_understood() {
        check("", 15);
        check("SIGQUIT", 3);
        check("quit", 3);
        check("3", 3);
        check("SIGRTMIN+3", 37);
        check("RTMAX-1", 63);
        check("SIGNONSENSE", 15);
        check("99", 15);
        check("-1", 15);
    }
}
