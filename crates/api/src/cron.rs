//! Schedules as CronJobs write them: five fields, or a word such as `@hourly`, and when they are due.
//!
//! Times are reckoned in a time zone of the database that is part of the program. Clocks that are set forward or
//! back: an hour that is skipped is not caught up, one that comes twice counts twice. Upstream: robfig/cron v3, whose
//! words for what is wrong are kept.

use jiff::civil::Date;
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Timestamp};

use crate::time::parse_go_duration;

/// A schedule is looked ahead for this many years; one that is not due by then never is (31 February, say).
const YEARS_MAX: i16 = 5;
const MINUTE: i64 = 60;

/// When something is due again and again, to the minute (`@every` to the second).
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    rule: Rule,
    /// Of a prefix `TZ=`, which old CronJobs may have.
    zone: Option<TimeZone>,
}

#[derive(Debug, Clone, PartialEq)]
enum Rule {
    Every(SignedDuration),
    Fields(Fields),
}

/// Bit n of each set says whether n fits.
#[derive(Debug, Clone, Default, PartialEq)]
struct Fields {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Day or weekday is `*`: then both must fit, otherwise one of the two is enough.
    any_day: bool,
}

/// One of the five fields: least and greatest number, and the names of the numbers from the least on.
struct Bounds(i64, i64, &'static [&'static str]);

#[rustfmt::skip]
const BOUNDS: [Bounds; 5] = [
    Bounds(0, 59, &[]),
    Bounds(0, 23, &[]),
    Bounds(1, 31, &[]),
    Bounds(1, 12, &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]),
    Bounds(0, 6, &["sun", "mon", "tue", "wed", "thu", "fri", "sat"]),
];

const WORDS: [(&str, &str); 7] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];

/// The time zone of that name, spelled as in the IANA database (`Europe/Berlin`).
pub fn zone(name: &str) -> Result<TimeZone, String> {
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    // The database is not particular about upper and lower case, but upstream's is.
    let found = TimeZoneDatabase::bundled().get(name).ok();
    found.filter(|zone| zone.iana_name() == Some(name)).ok_or_else(|| format!("unknown time zone {name}"))
}

impl Schedule {
    /// The error says what is wrong, for the user.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        if text.is_empty() {
            return Err("empty spec string".to_owned());
        }
        let (text, zone) = match text.strip_prefix("TZ=").or_else(|| text.strip_prefix("CRON_TZ=")) {
            None => (text, None),
            Some(rest) => {
                let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                let zone = zone(name).map_err(|why| format!("provided bad location {name}: {why}"))?;
                (rest.trim(), Some(zone))
            }
        };
        let rule = match text.strip_prefix("@every ") {
            Some(period) => Rule::Every(parse_period(text, period)?),
            None if text.starts_with('@') => {
                let known = WORDS.iter().find(|(word, _)| *word == text);
                let (_, fields) = known.ok_or_else(|| format!("unrecognized descriptor: {text}"))?;
                Rule::Fields(parse_fields(fields)?)
            }
            None => Rule::Fields(parse_fields(text)?),
        };
        Ok(Schedule { rule, zone })
    }

    /// The first time later than `after` at which it is due; `None` if there is none in the next five years.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match &self.rule {
            Rule::Every(period) => Timestamp::from_second(after.as_second()).ok()?.checked_add(*period).ok(),
            Rule::Fields(fields) => fields.next(after, self.zone.as_ref().unwrap_or(zone)),
        }
    }
}

impl Fields {
    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let mut at = Timestamp::from_second((after.as_second().div_euclid(MINUTE) + 1) * MINUTE).ok()?;
        let last_year = at.to_zoned(zone.clone()).year().saturating_add(YEARS_MAX);
        // Each round goes on to the next month, day, hour or minute that may fit.
        loop {
            let local = at.to_zoned(zone.clone());
            if local.year() > last_year {
                return None;
            }
            let minute = i64::from(local.minute());
            at = if !has(self.months, local.month()) {
                midnight(local.date().last_of_month().tomorrow().ok()?, zone)?
            } else if !self.fits_day(local.date()) {
                midnight(local.date().tomorrow().ok()?, zone)?
            } else if !has(self.hours, local.hour()) {
                later(at, 60 - minute)?
            } else {
                match (minute..60).find(|minute| self.minutes & 1 << minute != 0) {
                    Some(fits) if fits == minute => return Some(at),
                    Some(fits) => later(at, fits - minute)?,
                    None => later(at, 60 - minute)?,
                }
            };
        }
    }

    fn fits_day(&self, date: Date) -> bool {
        let day = has(self.days, date.day());
        let weekday = has(self.weekdays, date.weekday().to_sunday_zero_offset());
        if self.any_day { day && weekday } else { day || weekday }
    }
}

fn has(set: u64, number: i8) -> bool {
    set & 1 << number != 0
}

fn later(at: Timestamp, minutes: i64) -> Option<Timestamp> {
    Timestamp::from_second(at.as_second() + minutes * MINUTE).ok()
}

/// When that day begins, even where it does not begin at midnight.
fn midnight(date: Date, zone: &TimeZone) -> Option<Timestamp> {
    date.to_zoned(zone.clone()).ok().map(|zoned| zoned.timestamp())
}

fn parse_fields(text: &str) -> Result<Fields, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() != BOUNDS.len() {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", words.len(), words.join(" ")));
    }
    let mut sets = [(0, false); BOUNDS.len()];
    for ((word, bounds), (set, any)) in words.iter().zip(&BOUNDS).zip(&mut sets) {
        for part in word.split(',').filter(|part| !part.is_empty()) {
            let (numbers, all) = parse_part(part, bounds)?;
            *set |= numbers;
            *any |= all;
        }
    }
    let [(minutes, _), (hours, _), (days, any_day), (months, _), (weekdays, any_weekday)] = sets;
    Ok(Fields { minutes, hours, days, months, weekdays, any_day: any_day || any_weekday })
}

/// The numbers of one part of a list (`5`, `1-5`, `*/10`, `mon-fri`), and whether it is simply all of them.
fn parse_part(part: &str, Bounds(least, most, names): &Bounds) -> Result<(u64, bool), String> {
    let named = |text: &str| match names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
        Some(at) => Ok(least + at as i64),
        None => parse_number(text),
    };
    let pieces: Vec<&str> = part.split('/').collect();
    let ends: Vec<&str> = pieces[0].split('-').collect();
    let all = matches!(ends[0], "*" | "?");
    let (from, mut to) = match ends[..] {
        _ if all => (*least, *most),
        [one] => (named(one)?, named(one)?),
        [from, to] => (named(from)?, named(to)?),
        _ => return Err(format!("too many hyphens: {part}")),
    };
    let step = match pieces[..] {
        [_] => 1,
        [_, step] => {
            // A single number with a step goes on to the greatest.
            to = if ends.len() == 1 { *most } else { to };
            parse_number(step)?
        }
        _ => return Err(format!("too many slashes: {part}")),
    };
    if from < *least {
        return Err(format!("beginning of range ({from}) below minimum ({least}): {part}"));
    }
    if to > *most {
        return Err(format!("end of range ({to}) above maximum ({most}): {part}"));
    }
    if from > to {
        return Err(format!("beginning of range ({from}) beyond end of range ({to}): {part}"));
    }
    if step == 0 {
        return Err(format!("step of range should be a positive number: {part}"));
    }
    let step_by = usize::try_from(step).unwrap_or(usize::MAX);
    let numbers = (from..=to).step_by(step_by).fold(0, |set, number| set | 1 << number);
    Ok((numbers, all && step == 1))
}

fn parse_number(text: &str) -> Result<i64, String> {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    match text.parse::<i64>() {
        Ok(number) if number < 0 => Err(format!("negative number ({number}) not allowed: {text}")),
        Ok(number) => Ok(number),
        Err(error) => {
            let why = match error.kind() {
                PosOverflow | NegOverflow => "value out of range",
                _ => "invalid syntax",
            };
            Err(format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: {why}"))
        }
    }
}

/// A duration such as `1h30m`, in whole seconds and at least one.
fn parse_period(whole: &str, text: &str) -> Result<SignedDuration, String> {
    let period =
        parse_go_duration(text).map_err(|why| format!("failed to parse duration {whole}: time: {why}"))?;
    Ok(SignedDuration::from_secs(i64::try_from(period.as_secs()).unwrap_or(i64::MAX).max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(schedule: &str, zone_name: &str, after: &str, want: &[&str]) {
        let schedule = Schedule::parse(schedule).unwrap();
        let zone = zone(zone_name).unwrap();
        let mut at: Timestamp = after.parse().unwrap();
        for want in want {
            at = schedule.next(at, &zone).expect("due some time");
            assert_eq!(at.to_string(), *want);
        }
    }

    #[test]
    fn schedules_are_due() {
        check("* * * * *", "UTC", "2024-05-01T10:00:00Z", &["2024-05-01T10:01:00Z", "2024-05-01T10:02:00Z"]);
        check("* * * * *", "UTC", "2024-05-01T09:59:59.5Z", &["2024-05-01T10:00:00Z"]);
        check(
            "*/20 * * * *",
            "UTC",
            "2024-05-01T10:05:00Z",
            &["2024-05-01T10:20:00Z", "2024-05-01T10:40:00Z"],
        );
        check(
            "50/5 * * * *",
            "UTC",
            "2024-05-01T10:05:00Z",
            &["2024-05-01T10:50:00Z", "2024-05-01T10:55:00Z"],
        );
        check("30 4 * * *", "UTC", "2024-05-01T10:05:00Z", &["2024-05-02T04:30:00Z"]);
        check("0 0 29 2 *", "UTC", "2024-05-01T10:05:00Z", &["2028-02-29T00:00:00Z"]);
        check("0 12 * jan-feb mon,Wed", "UTC", "2024-05-01T00:00:00Z", &["2025-01-01T12:00:00Z"]);
        // Day and weekday: either, if both are given.
        check(
            "0 0 13 * 5",
            "UTC",
            "2024-05-01T00:00:00Z",
            &["2024-05-03T00:00:00Z", "2024-05-10T00:00:00Z", "2024-05-13T00:00:00Z"],
        );
        check(
            "0 0 */2 * 5",
            "UTC",
            "2024-05-01T00:00:00Z",
            &["2024-05-03T00:00:00Z", "2024-05-05T00:00:00Z"],
        );
        check("@hourly", "UTC", "2024-12-31T23:00:00Z", &["2025-01-01T00:00:00Z"]);
        check("@yearly", "UTC", "2024-05-01T00:00:00Z", &["2025-01-01T00:00:00Z"]);
        check("@weekly", "UTC", "2024-05-01T00:00:00Z", &["2024-05-05T00:00:00Z"]);
        check(
            "@every 1h30m10s",
            "UTC",
            "2024-05-01T00:00:00.7Z",
            &["2024-05-01T01:30:10Z", "2024-05-01T03:00:20Z"],
        );
        check("@every 1ms", "UTC", "2024-05-01T00:00:00Z", &["2024-05-01T00:00:01Z"]);
        assert_eq!(Schedule::parse("0 0 31 2 *").unwrap().next(Timestamp::UNIX_EPOCH, &TimeZone::UTC), None);
        assert_eq!(Schedule::parse(", * * * *").unwrap().next(Timestamp::UNIX_EPOCH, &TimeZone::UTC), None);
    }

    #[test]
    fn schedules_follow_the_clocks_of_their_zone() {
        check("0 9 * * *", "Asia/Kolkata", "2024-05-01T00:00:00Z", &["2024-05-01T03:30:00Z"]);
        check("TZ=Asia/Kolkata 0 9 * * *", "UTC", "2024-05-01T00:00:00Z", &["2024-05-01T03:30:00Z"]);
        check("0 6 * * *", "America/New_York", "2024-03-09T20:00:00Z", &["2024-03-10T10:00:00Z"]);
        // There is no half past two on the day when summer time begins.
        check("30 2 * * *", "America/New_York", "2024-03-09T20:00:00Z", &["2024-03-11T06:30:00Z"]);
        // And half past one comes twice when it ends.
        check(
            "30 1 * * *",
            "America/New_York",
            "2024-11-02T20:00:00Z",
            &["2024-11-03T05:30:00Z", "2024-11-03T06:30:00Z", "2024-11-04T06:30:00Z"],
        );
        // A day that begins at one.
        check("0 * 4 11 *", "America/Sao_Paulo", "2018-11-03T20:00:00Z", &["2018-11-04T03:00:00Z"]);
    }

    #[test]
    fn zones_are_known_by_name() {
        assert!(zone("Europe/Berlin").is_ok());
        assert!(zone("Etc/UTC").is_ok());
        for bad in ["europe/berlin", "Mars/Olympus", "", "Local", "../etc/passwd"] {
            assert_eq!(zone(bad), Err(format!("unknown time zone {bad}")));
        }
    }

    #[test]
    fn bad_schedules_are_told_why() {
        #[rustfmt::skip]
        let cases = [
            ("", "empty spec string"),
            ("* * * *", "expected exactly 5 fields, found 4: [* * * *]"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("* * 0 * *", "beginning of range (0) below minimum (1): 0"),
            ("*/0 * * * *", "step of range should be a positive number: */0"),
            ("5-1 * * * *", "beginning of range (5) beyond end of range (1): 5-1"),
            ("1-2-3 * * * *", "too many hyphens: 1-2-3"),
            ("1/2/3 * * * *", "too many slashes: 1/2/3"),
            ("x * * * *", "failed to parse int from x: strconv.Atoi: parsing \"x\": invalid syntax"),
            ("*/-1 * * * *", "negative number (-1) not allowed: -1"),
            ("@often", "unrecognized descriptor: @often"),
            ("@every", "unrecognized descriptor: @every"),
            ("@every x", "failed to parse duration @every x: time: invalid duration \"x\""),
            ("@every 5", "failed to parse duration @every 5: time: missing unit in duration \"5\""),
            ("@every 5d", "failed to parse duration @every 5d: time: unknown unit \"d\" in duration \"5d\""),
            ("TZ=Nowhere * * * * *", "provided bad location Nowhere: unknown time zone Nowhere"),
        ];
        for (text, why) in cases {
            assert_eq!(Schedule::parse(text), Err(why.to_owned()), "{text}");
        }
    }
}
