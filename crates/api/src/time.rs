//! Times as the API writes them: RFC 3339, in seconds or microseconds, in UTC.

use std::time::Duration;

use jiff::Timestamp;

const LAYOUT: &str = "2006-01-02T15:04:05Z07:00";

/// The first and last seconds of the years 0 and 9999.
const FIRST: i64 = -62_167_219_200;
const LAST: i64 = 253_402_300_799;

/// `2026-01-02T03:04:05Z`, cut to the second.
pub fn format_seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-01-02T03:04:05.000006Z`.
pub fn format_micros(time: Timestamp) -> String {
    let micros = time.subsec_nanosecond().rem_euclid(1_000_000_000) / 1000;
    format!("{}.{micros:06}Z", time.strftime("%Y-%m-%dT%H:%M:%S"))
}

/// Longest duration that Go can say, in seconds: 292 years.
const GO_LONGEST: f64 = i64::MAX as f64 / 1e9;

/// Reads a duration as Go does: `15.123s`, `1m30s`, `250ms`, `0`. The error is in Go's words; a negative one is
/// invalid too. Source: Go's time.ParseDuration.
pub fn parse_go_duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("invalid duration {text:?}");
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() && text != "0" {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        sum += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                "" => return Err(format!("missing unit in duration {text:?}")),
                other => return Err(format!("unknown unit {other:?} in duration {text:?}")),
            };
        rest = &rest[unit..];
    }
    if text.is_empty() || sum > GO_LONGEST {
        return Err(invalid());
    }
    Duration::try_from_secs_f64(sum).map_err(|_| invalid())
}

/// Parses RFC 3339; the error is in upstream's words.
pub fn parse(text: &str) -> Result<Timestamp, String> {
    if let Some((rest, element)) = first_mismatch(text) {
        return Err(format!("parsing time {text:?} as {LAYOUT:?}: cannot parse {rest:?} as {element:?}"));
    }
    let time: Timestamp =
        text.parse().map_err(|_| format!("parsing time {text:?}: {} out of range", out_of_range(text)))?;
    // A zone can move the first and the last hours to years that four digits cannot write.
    if (FIRST..=LAST).contains(&time.as_second()) {
        Ok(time)
    } else {
        Err(format!("parsing time {text:?}: year out of range"))
    }
}

/// The canonical spelling to the second; `None` when `text` already has it.
pub(crate) fn canonical_seconds(text: &str) -> Result<Option<String>, String> {
    let canonical = format_seconds(parse(text)?);
    Ok((canonical != text).then_some(canonical))
}

/// The canonical spelling to the microsecond; `None` when `text` already has it.
pub(crate) fn canonical_micros(text: &str) -> Result<Option<String>, String> {
    let canonical = format_micros(parse(text)?);
    Ok((canonical != text).then_some(canonical))
}

/// Where `text` leaves the form: what is left of it and the part of the layout that was due.
fn first_mismatch(text: &str) -> Option<(&str, &'static str)> {
    let mut rest = text;
    let parts = [
        ("2006", 4),
        ("-", 0),
        ("01", 2),
        ("-", 0),
        ("02", 2),
        ("T", 0),
        ("15", 2),
        (":", 0),
        ("04", 2),
        (":", 0),
        ("05", 2),
    ];
    for (element, digits) in parts {
        let fits = match digits {
            0 => rest.starts_with(element),
            n => rest.len() >= n && rest.as_bytes()[..n].iter().all(u8::is_ascii_digit),
        };
        if !fits {
            return Some((rest, element));
        }
        rest = &rest[if digits == 0 { 1 } else { digits }..];
    }
    let fraction = rest.strip_prefix('.').map(|r| r.trim_start_matches(|c: char| c.is_ascii_digit()));
    match fraction {
        Some(after) if after.len() + 1 < rest.len() => rest = after,
        _ => {}
    }
    let bytes = rest.as_bytes();
    let digits = |r: std::ops::Range<usize>| bytes[r].iter().all(u8::is_ascii_digit);
    let offset = bytes.len() == 6
        && (bytes[0] == b'+' || bytes[0] == b'-')
        && bytes[3] == b':'
        && digits(1..3)
        && digits(4..6);
    (rest != "Z" && !offset).then_some((rest, "Z07:00"))
}

fn out_of_range(text: &str) -> &'static str {
    let number = |r: std::ops::Range<usize>| text.get(r).and_then(|t| t.parse::<u32>().ok()).unwrap_or(0);
    match () {
        () if !(1..=12).contains(&number(5..7)) => "month",
        () if number(11..13) > 23 => "hour",
        () if number(14..16) > 59 => "minute",
        () if number(17..19) > 59 => "second",
        () => "day",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<&str, &str>) {
        let got = parse(text).map(format_seconds);
        assert_eq!(got.as_deref().map_err(String::as_str), want);
    }

    #[test]
    fn durations_are_read_as_go_prints_them() {
        for (text, ms) in
            [("15.123s", 15_123), ("1m0.5s", 60_500), ("1h0m0s", 3_600_000), ("250ms", 250), ("0", 0)]
        {
            assert_eq!(parse_go_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for (text, why) in [
            ("", "invalid duration \"\""),
            ("5", "missing unit in duration \"5\""),
            ("s", "invalid duration \"s\""),
            ("1y", "unknown unit \"y\" in duration \"1y\""),
            ("1.2.3s", "invalid duration \"1.2.3s\""),
            ("-1s", "invalid duration \"-1s\""),
            ("3000000h", "invalid duration \"3000000h\""),
        ] {
            assert_eq!(parse_go_duration(text), Err(why.to_owned()), "{text}");
        }
    }

    #[test]
    fn times_are_read_in_any_zone_and_written_in_utc() {
        check("2026-01-02T03:04:05Z", Ok("2026-01-02T03:04:05Z"));
        check("2026-01-02T03:04:05.999+02:00", Ok("2026-01-02T01:04:05Z"));
        assert_eq!(
            canonical_micros("2026-01-02T03:04:05.1Z"),
            Ok(Some("2026-01-02T03:04:05.100000Z".into()))
        );
        assert_eq!(canonical_micros("2026-01-02T03:04:05.123456Z"), Ok(None));
    }

    #[test]
    fn mistakes_are_told_in_upstreams_words() {
        check(
            "foo",
            Err(r#"parsing time "foo" as "2006-01-02T15:04:05Z07:00": cannot parse "foo" as "2006""#),
        );
        check(
            "2026-01-02",
            Err(r#"parsing time "2026-01-02" as "2006-01-02T15:04:05Z07:00": cannot parse "" as "T""#),
        );
        check("2026-13-02T03:04:05Z", Err(r#"parsing time "2026-13-02T03:04:05Z": month out of range"#));
        check(
            "0000-01-01T00:00:00+01:00",
            Err(r#"parsing time "0000-01-01T00:00:00+01:00": year out of range"#),
        );
        check("2026-02-30T03:04:05Z", Err(r#"parsing time "2026-02-30T03:04:05Z": day out of range"#));
    }
}
