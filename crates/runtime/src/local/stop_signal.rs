//! The names that pods and images give a stop signal by.

use nix::sys::signal::Signal;

const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;
/// Other names of signals.
const ALIASES: [(&str, &str); 3] = [("CLD", "CHLD"), ("IOT", "ABRT"), ("POLL", "IO")];

/// SIGTERM for what is empty or no signal.
pub fn number(name: &str) -> i32 {
    parse(name).unwrap_or(Signal::SIGTERM as i32)
}

/// The signal's name as the API knows it: `SIGQUIT`, `SIGRTMIN+3`, `SIGRTMAX-1`.
pub fn name(name: &str) -> String {
    let upper = name.trim().to_ascii_uppercase();
    if ALIASES.iter().any(|(alias, _)| upper.strip_prefix("SIG") == Some(alias)) {
        return upper;
    }
    let number = number(name);
    match (number, Signal::try_from(number)) {
        (_, Ok(signal)) => signal.as_str().to_owned(),
        (SIGRTMIN, _) => "SIGRTMIN".to_owned(),
        (SIGRTMAX, _) => "SIGRTMAX".to_owned(),
        (..50, _) => format!("SIGRTMIN+{}", number - SIGRTMIN),
        _ => format!("SIGRTMAX-{}", SIGRTMAX - number),
    }
}

/// `None` when no signal has this name.
pub fn parse(name: &str) -> Option<i32> {
    let upper = name.trim().to_ascii_uppercase();
    // What lies between is the C library's own.
    let in_range = |n: i32| (matches!(n, 1..32 | SIGRTMIN..=SIGRTMAX)).then_some(n);
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
    let alias = ALIASES.iter().find(|(alias, _)| *alias == bare);
    let bare = alias.map_or(bare, |(_, name)| name);
    format!("SIG{bare}").parse::<Signal>().ok().map(|s| s as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, want: i32, shown: &str) {
        assert_eq!((number(name), super::name(name).as_str()), (want, shown), "{name:?}");
    }

    #[test]
    fn names_and_numbers_are_understood() {
        check("", 15, "SIGTERM");
        check("SIGQUIT", 3, "SIGQUIT");
        check("quit", 3, "SIGQUIT");
        check("3", 3, "SIGQUIT");
        check("SIGRTMIN+3", 37, "SIGRTMIN+3");
        check("SIGRTMIN", 34, "SIGRTMIN");
        check("33", 15, "SIGTERM");
        check("RTMAX-1", 63, "SIGRTMAX-1");
        check("SIGRTMAX", 64, "SIGRTMAX");
        check("SIGRTMAX-14", 50, "SIGRTMAX-14");
        check("SIGPOLL", 29, "SIGPOLL");
        check("IOT", 6, "SIGABRT");
        check("SIGNONSENSE", 15, "SIGTERM");
        check("99", 15, "SIGTERM");
        check("-1", 15, "SIGTERM");
    }
}
