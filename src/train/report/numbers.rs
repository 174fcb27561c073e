//! Numbers as people read them.

/// What stands where there is no number.
const NONE: &str = "–";

/// Four significant digits; very small and very large ones with a power of ten.
pub fn number(value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| value.is_finite()) else { return NONE.to_owned() };
    let magnitude = value.abs();
    if magnitude == 0.0 {
        return "0".to_owned();
    }
    if !(1e-4..1e6).contains(&magnitude) {
        return signed_text(&format!("{value:.2e}"));
    }
    let decimals = (3 - magnitude.log10().floor() as i32).clamp(0, 7) as usize;
    match decimals {
        0 => signed_text(&group(&format!("{value:.0}"))),
        _ => signed_text(&format!("{value:.decimals$}")),
    }
}

/// The shortest text of a number, for the marks of an axis.
pub fn tick(value: f64) -> String {
    // What is left of a computed multiple of a step is noise in the last digits.
    let rounded = (value * 1e9).round() / 1e9;
    if rounded.abs() >= 1e4 {
        return group(&format!("{rounded:.0}"));
    }
    match value.abs() {
        magnitude if magnitude > 0.0 && magnitude < 1e-3 => {
            let text = format!("{value:.1e}");
            text.replace(".0e", "e").replace('-', "−")
        }
        _ => signed_text(&rounded.to_string()),
    }
}

/// A count with its thousands set apart.
pub fn count(value: u64) -> String {
    group(&value.to_string())
}

/// A share of 1 as a percentage.
pub fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| format!("{:.1} %", 100.0 * value))
}

/// A difference between two shares, in percentage points.
pub fn points(value: Option<f64>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| with_sign(100.0 * value, 1))
}

/// A change relative to what was, as a percentage.
pub fn relative(value: Option<f64>) -> String {
    match value {
        None => NONE.to_owned(),
        Some(value) if value.is_infinite() => "∞".to_owned(),
        Some(value) => format!("{} %", with_sign(100.0 * value, 1)),
    }
}

fn with_sign(value: f64, decimals: usize) -> String {
    let text = format!("{value:+.decimals$}");
    // Neither +0.0 nor −0.0 is a change.
    match text.trim_start_matches(['+', '-']) {
        digits if digits.chars().all(|character| matches!(character, '0' | '.')) => format!("±{digits}"),
        _ => signed_text(&text),
    }
}

/// With the minus sign that is as wide as a plus.
fn signed_text(text: &str) -> String {
    text.replace('-', "−")
}

/// Sets thousands apart by a narrow space that does not break.
fn group(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let mut text = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && digits.len() > 4 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_significant_digits() {
        for (value, text) in [
            (0.0, "0"),
            (2.34567, "2.346"),
            (-0.0123456, "−0.01235"),
            (123.456, "123.5"),
            (9999.7, "10\u{202f}000"),
            (54321.0, "54\u{202f}321"),
            (0.00002, "2.00e−5"),
            (3.2e9, "3.20e9"),
        ] {
            assert_eq!(number(Some(value)), text);
        }
        assert_eq!(number(None), "–");
        assert_eq!(number(Some(f64::NAN)), "–");
    }

    #[test]
    fn marks_of_an_axis_are_short() {
        for (value, text) in [
            (0.1 + 0.2, "0.3"),
            (5.0, "5"),
            (-0.5, "−0.5"),
            (2e-5, "2e−5"),
            (2.5e-4, "2.5e−4"),
            (20000.0, "20\u{202f}000"),
        ] {
            assert_eq!(tick(value), text);
        }
    }

    #[test]
    fn changes_have_a_sign_unless_they_are_none() {
        assert_eq!(points(Some(0.123)), "+12.3");
        assert_eq!(points(Some(-0.05)), "−5.0");
        assert_eq!(points(Some(-0.0001)), "±0.0");
        assert_eq!(relative(Some(0.5)), "+50.0 %");
        assert_eq!(relative(Some(f64::INFINITY)), "∞");
        assert_eq!(percent(Some(1.0)), "100.0 %");
        assert_eq!(percent(None), "–");
    }

    #[test]
    fn thousands_are_apart_from_five_digits_on() {
        assert_eq!(count(1234), "1234");
        assert_eq!(count(12345), "12\u{202f}345");
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
    }
}
