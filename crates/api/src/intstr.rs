//! Values that are a number or a text: ports by number or name, amounts or percentages.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A text that should have been a percentage, in upstream's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PercentError {
    #[error("invalid value for IntOrString: invalid type: string is not a percentage")]
    NotPercent,
    #[error("invalid value for IntOrString: invalid value {0:?}: {1}")]
    NotNumber(String, std::num::ParseIntError),
}

/// The number itself, or that percentage of `total`, rounded up or down to a whole.
pub fn scaled(value: &IntOrString, total: i32, round_up: bool) -> Result<i32, PercentError> {
    let text = match value {
        IntOrString::Int(n) => return Ok(*n),
        IntOrString::String(text) => text,
    };
    let digits = text.strip_suffix('%').ok_or(PercentError::NotPercent)?;
    let percent: i32 = digits.parse().map_err(|e| PercentError::NotNumber(digits.to_owned(), e))?;
    let product = i64::from(percent) * i64::from(total);
    let down = product.div_euclid(100);
    let whole = if round_up { -(-product).div_euclid(100) } else { down };
    Ok(i32::try_from(whole).unwrap_or(if whole < 0 { i32::MIN } else { i32::MAX }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_asked() {
        let percent = |p: &str, up| scaled(&IntOrString::String(p.into()), 5, up);
        assert_eq!(percent("25%", true), Ok(2));
        assert_eq!(percent("25%", false), Ok(1));
        assert_eq!(percent("100%", true), Ok(5));
        assert_eq!(scaled(&IntOrString::Int(3), 5, true), Ok(3));
        assert_eq!(percent("25", true), Err(PercentError::NotPercent));
        assert!(matches!(percent("x%", true), Err(PercentError::NotNumber(..))));
    }
}
