//! Resource quantities: fixed-point numbers with a suffix, such as `500m`, `1.5Gi` or `2e3`.
//!
//! Kept exactly to a billionth and bounded by ±(2⁶³−1), rounding away from zero, as upstream does.

use std::cmp::Ordering;
use std::fmt;

/// Billionths in one.
const NANO: i128 = 1_000_000_000;
const MAX: i128 = i64::MAX as i128 * NANO;

/// A number and the family of suffixes that it was written with. Compares by value alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    /// In billionths.
    nano: i128,
    format: Format,
}

/// Which suffixes a quantity is written with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// n, u, m, none, k, M, G, T, P, E.
    #[default]
    DecimalSi,
    /// Ki, Mi, Gi, Ti, Pi, Ei.
    BinarySi,
    /// e3, e6 and so on.
    DecimalExponent,
}

/// Why a text is not a quantity, in upstream's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Form,
    #[error("unable to parse numeric part of quantity")]
    Number,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    pub const ZERO: Quantity = Quantity { nano: 0, format: Format::DecimalSi };

    pub const fn new(value: i64, format: Format) -> Quantity {
        Quantity { nano: value as i128 * NANO, format }
    }

    pub const fn from_milli(milli: i64, format: Format) -> Quantity {
        Quantity { nano: milli as i128 * (NANO / 1000), format }
    }

    /// Billionths, written with n, u, m and so on.
    pub const fn from_nano(nano: i64) -> Quantity {
        Quantity { nano: nano as i128, format: Format::DecimalSi }
    }

    /// Bytes, written with Ki, Mi and so on.
    pub const fn bytes(value: i64) -> Quantity {
        Quantity::new(value, Format::BinarySi)
    }

    pub fn parse(text: &str) -> Result<Quantity, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
            None => return Err(QuantityError::Form),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        if number.is_empty() || !is_suffix_shaped(suffix) {
            return Err(QuantityError::Form);
        }
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
            return Err(QuantityError::Number);
        }
        let (binary, exponent, format) = parse_suffix(suffix).ok_or(QuantityError::Suffix)?;
        let nano = magnitude(whole, fraction, exponent, binary);
        Ok(Quantity { nano: if negative { -nano } else { nano }, format })
    }

    /// In whole units, rounded away from zero.
    pub fn value(self) -> i64 {
        self.scaled(NANO)
    }

    /// In thousandths, rounded away from zero.
    pub fn milli_value(self) -> i64 {
        self.scaled(NANO / 1000)
    }

    fn scaled(self, unit: i128) -> i64 {
        let away = (self.nano.abs() + unit - 1) / unit * self.nano.signum();
        i64::try_from(away).unwrap_or(if away < 0 { i64::MIN } else { i64::MAX })
    }

    pub fn as_f64(self) -> f64 {
        self.nano as f64 / NANO as f64
    }

    pub fn format(self) -> Format {
        self.format
    }

    pub fn is_zero(self) -> bool {
        self.nano == 0
    }

    pub fn is_negative(self) -> bool {
        self.nano < 0
    }

    /// Takes the suffixes of `other` when there is nothing here to have had any.
    fn with(self, nano: i128, other: Quantity) -> Quantity {
        let format = if self.is_zero() { other.format } else { self.format };
        Quantity { nano: nano.clamp(-MAX, MAX), format }
    }
}

impl std::ops::Add for Quantity {
    type Output = Quantity;
    fn add(self, other: Quantity) -> Quantity {
        self.with(self.nano + other.nano, other)
    }
}

impl std::ops::Sub for Quantity {
    type Output = Quantity;
    fn sub(self, other: Quantity) -> Quantity {
        self.with(self.nano - other.nano, other)
    }
}

impl std::ops::Neg for Quantity {
    type Output = Quantity;
    fn neg(self) -> Quantity {
        Quantity { nano: -self.nano, ..self }
    }
}

impl std::ops::AddAssign for Quantity {
    fn add_assign(&mut self, other: Quantity) {
        *self = *self + other;
    }
}

impl std::ops::SubAssign for Quantity {
    fn sub_assign(&mut self, other: Quantity) {
        *self = *self - other;
    }
}

impl std::iter::Sum for Quantity {
    fn sum<I: Iterator<Item = Quantity>>(iter: I) -> Quantity {
        iter.fold(Quantity::ZERO, |a, b| a + b)
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Quantity) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

impl std::str::FromStr for Quantity {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Quantity, QuantityError> {
        Quantity::parse(text)
    }
}

impl TryFrom<&k8s_openapi::apimachinery::pkg::api::resource::Quantity> for Quantity {
    type Error = QuantityError;
    fn try_from(
        typed: &k8s_openapi::apimachinery::pkg::api::resource::Quantity,
    ) -> Result<Quantity, QuantityError> {
        Quantity::parse(&typed.0)
    }
}

impl From<Quantity> for k8s_openapi::apimachinery::pkg::api::resource::Quantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.to_string())
    }
}

/// The canonical form: no fraction, the largest suffix that allows it.
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        // Small or fractional numbers gain nothing from powers of 1024 and are shown in decimal.
        let binary =
            self.format == Format::BinarySi && self.nano % NANO == 0 && self.nano.abs() >= 1024 * NANO;
        if binary {
            let (number, power) = strip_factor(self.nano / NANO, 1024, 6);
            return write!(f, "{number}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power]);
        }
        let (number, power) = strip_factor(self.nano, 1000, 9);
        let exponent = power as i32 * 3 - 9;
        match (self.format, exponent) {
            (Format::DecimalExponent, 0) => write!(f, "{number}"),
            (Format::DecimalExponent, e) => write!(f, "{number}e{e}"),
            _ => write!(f, "{number}{}", ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][power]),
        }
    }
}

fn strip_factor(mut number: i128, factor: i128, most: usize) -> (i128, usize) {
    let mut power = 0;
    while power < most && number % factor == 0 {
        number /= factor;
        power += 1;
    }
    (number, power)
}

fn is_suffix_shaped(suffix: &str) -> bool {
    let rest = suffix.trim_start_matches(|c| "eEinumkKMGTP".contains(c));
    let digits = rest.strip_prefix(['+', '-']).unwrap_or(rest);
    digits.bytes().all(|b| b.is_ascii_digit())
}

/// Powers of two and of ten, and the family.
fn parse_suffix(suffix: &str) -> Option<(u32, i64, Format)> {
    let decimal = |exponent| Some((0, exponent, Format::DecimalSi));
    let binary = |power| Some((power, 0, Format::BinarySi));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent: i64 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            Some((0, exponent, Format::DecimalExponent))
        }
    }
}

/// `whole.fraction × 10^exponent × 2^binary` in billionths, rounded up and capped.
fn magnitude(whole: &str, fraction: &str, exponent: i64, binary: u32) -> i128 {
    let digits = || whole.bytes().chain(fraction.bytes()).skip_while(|b| *b == b'0');
    let count = digits().count();
    if count == 0 {
        return 0;
    }
    // 28 digits hold every representable value; the rest can only matter as something more than nothing.
    let kept = count.min(28);
    let mut number = digits().take(kept).fold(0i128, |n, b| n * 10 + i128::from(b - b'0'));
    let mut inexact = digits().skip(kept).any(|b| b != b'0');
    let dropped = (count - kept) as i64;
    let mut power = exponent.saturating_sub(fraction.len() as i64).saturating_add(dropped).saturating_add(9);
    let factor = 1i128 << binary;
    while number.checked_mul(factor).is_none() {
        inexact |= number % 10 != 0;
        number /= 10;
        power = power.saturating_add(1);
    }
    number *= factor;
    while power > 0 && number <= MAX {
        number = number.saturating_mul(10);
        power -= 1;
    }
    while power < 0 && number > 0 {
        inexact |= number % 10 != 0;
        number /= 10;
        power += 1;
    }
    (number + i128::from(inexact)).min(MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(text: &str, want: &str) {
        assert_eq!(Quantity::parse(text).map(|q| q.to_string()), Ok(want.to_owned()), "{text}");
    }

    #[test]
    fn canonical_form() {
        for (text, want) in [
            ("0", "0"),
            ("0.0m", "0"),
            ("1", "1"),
            ("+1", "1"),
            ("-1", "-1"),
            (".5", "500m"),
            ("1.", "1"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.1m", "100u"),
            ("0.1n", "1n"),
            ("-0.1n", "-1n"),
            ("1000", "1k"),
            ("1024", "1024"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("0.5Ki", "512"),
            ("1023Ki", "1023Ki"),
            ("0.5Mi", "512Ki"),
            ("1.0001Ki", "1024102400u"),
            ("1e3", "1e3"),
            ("12E2", "1200"),
            ("1e-3", "1e-3"),
            ("100e18", "9223372036854775807"),
            ("1e100", "9223372036854775807"),
            ("1e-100", "1e-9"),
            ("9223372036854775807", "9223372036854775807"),
            ("16Ei", "9223372036854775807"),
            ("0.0000000000000000000000000001Ei", "1n"),
            ("100E", "9223372036854775807"),
        ] {
            check(text, want);
        }
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (text, want) in [
            ("", QuantityError::Form),
            ("one", QuantityError::Form),
            ("1 ", QuantityError::Form),
            ("-", QuantityError::Form),
            ("1.2.3", QuantityError::Number),
            (".", QuantityError::Number),
            ("1mm", QuantityError::Suffix),
            ("1e", QuantityError::Suffix),
            ("1K", QuantityError::Suffix),
            ("1i", QuantityError::Suffix),
            ("1e99999999999999999999", QuantityError::Suffix),
        ] {
            assert_eq!(Quantity::parse(text), Err(want), "{text}");
        }
    }

    #[test]
    fn values_round_away_from_zero() {
        let q = |t: &str| Quantity::parse(t).expect("a quantity");
        assert_eq!((q("1m").value(), q("-1m").value(), q("1001m").value()), (1, -1, 2));
        assert_eq!((q("1n").milli_value(), q("1.5").milli_value()), (1, 1500));
        assert_eq!(q("9E").milli_value(), i64::MAX);
        assert_eq!((q("1Gi") + q("1Mi")).to_string(), "1025Mi");
        assert_eq!((Quantity::ZERO + q("2Gi")).to_string(), "2Gi");
        assert!(q("1k") < q("1Ki") && q("1000m") == q("1"));
    }

    proptest! {
        #[test]
        fn the_canonical_form_says_the_same(text in r"[+-]?[0-9]{1,30}(\.[0-9]{0,30})?(n|u|m||k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|e-?[0-9]{1,3})") {
            let first = Quantity::parse(&text).unwrap();
            let again = Quantity::parse(&first.to_string()).unwrap();
            prop_assert_eq!(first, again);
            prop_assert_eq!(first.to_string(), again.to_string());
        }

        #[test]
        fn sums_are_exact(a in -1_000_000_000i64..1_000_000_000, b in -1_000_000_000i64..1_000_000_000) {
            let (x, y) = (Quantity::from_milli(a, Format::DecimalSi), Quantity::from_milli(b, Format::BinarySi));
            prop_assert_eq!((x + y).milli_value(), a + b);
            prop_assert_eq!((x - y).milli_value(), a - b);
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = Quantity::parse(&text);
        }
    }
}
