//! What a misspelt name most likely meant.

/// The known name that a typo most likely meant: at most a third of its letters differ.
pub(crate) fn nearest<'n>(unknown: &str, known: &[&'n str]) -> Option<&'n str> {
    if unknown.len() > 64 {
        return None;
    }
    let distances = known.iter().map(|name| (edit_distance(unknown, name), *name));
    distances.min().filter(|(distance, name)| distance * 3 <= name.len()).map(|(_, name)| name)
}

/// Levenshtein distance in bytes: fewest insertions, deletions and substitutions.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_name() {
        let known = ["temperature", "top_p", "top_k", "max_tokens", "n"];
        for (typo, expected) in [
            ("temprature", Some("temperature")),
            ("Temperature", Some("temperature")),
            ("maxtokens", Some("max_tokens")),
            ("topp", Some("top_p")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(typo, &known), expected, "{typo}");
        }
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }
}
