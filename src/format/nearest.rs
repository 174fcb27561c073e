//! What a misspelt name most likely meant.

/// The known name that a typo most likely meant: at most a third of its letters differ.
pub(crate) fn nearest<'n>(unknown: &str, known: &[&'n str]) -> Option<&'n str> {
    if unknown.len() > 64 {
        return None;
    }
    let distances = known.iter().map(|name| (edit_distance(unknown, name), *name));
    distances.min().filter(|(distance, name)| distance * 3 <= name.len()).map(|(_, name)| name)
}

/// Fewest insertions, deletions, substitutions and swaps of neighbours (optimal string alignment), in bytes.
fn edit_distance(from: &str, to: &str) -> usize {
    let (from, to) = (from.as_bytes(), to.as_bytes());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=to.len()).collect();
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let substituted = last[j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut least = substituted.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[to.len()]
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
            ("tpo_p", Some("top_p")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(typo, &known), expected, "{typo}");
        }
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", ""), 3);
        assert_eq!(edit_distance("trian", "train"), 1);
        assert_eq!(edit_distance("ca", "abc"), 3);
    }
}
