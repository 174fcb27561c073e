//! Which class an answer names.

use std::collections::BTreeMap;

/// What is counted where an answer names no class; in parentheses where a class has that name.
const OTHER: &str = "other";

/// Names of the class that is counted as positive, where a data set has one of them.
const POSITIVE: [&str; 4] = ["positive", "yes", "true", "1"];

/// The classes of a data set, as answers are read.
///
/// Case does not count, nor does how much white space there is. An answer names the class that is found in it first as
/// whole words: of several at one place the longest, so that `not sure` is not `not`. White space, punctuation and the
/// ends bound words; a class that itself starts or ends with punctuation needs no bound there.
#[derive(Clone, Debug)]
pub struct Labels {
    /// As the data set writes them and as they are searched, in order of the first; of classes that are searched alike
    /// the first alone.
    classes: Vec<(String, String)>,
    other: String,
}

impl Labels {
    /// The classes of a data set by name.
    pub fn new(classes: &BTreeMap<String, usize>) -> Self {
        let mut labels = Vec::<(String, String)>::new();
        for class in classes.keys() {
            let searched = normal(class);
            if !searched.is_empty() && labels.iter().all(|(_, other)| *other != searched) {
                labels.push((class.clone(), searched));
            }
        }
        let mut other = OTHER.to_owned();
        while classes.contains_key(&other) {
            other = format!("({other})");
        }
        Self { classes: labels, other }
    }

    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Position of the class that an answer names.
    pub fn find(&self, answer: &str) -> Option<usize> {
        let answer = normal(answer);
        let places = self.classes.iter().enumerate().filter_map(|(index, (_, class))| {
            let place = answer.match_indices(class.as_str()).map(|(at, _)| at).find(|&at| {
                is_bound(&answer[..at], class, |text| text.chars().next_back(), |class| class.chars().next())
                    && is_bound(
                        &answer[at + class.len()..],
                        class,
                        |text| text.chars().next(),
                        |class| class.chars().next_back(),
                    )
            })?;
            Some((place, std::cmp::Reverse(class.len()), index))
        });
        places.min().map(|(_, _, index)| index)
    }

    /// The name of the class at a position, or of none.
    pub fn name(&self, class: Option<usize>) -> &str {
        class.map_or(&self.other, |index| &self.classes[index].0)
    }

    /// The class that shares are given of: one named positive, yes, true or 1, else of two the second in alphabetical
    /// order, else none.
    pub fn positive(&self) -> Option<usize> {
        let named = POSITIVE.iter().find_map(|name| self.classes.iter().position(|(_, class)| class == name));
        named.or_else(|| (self.len() == 2).then_some(1))
    }
}

/// Whether a class stands apart from the text beside it.
fn is_bound(
    beside: &str,
    class: &str,
    nearest: impl Fn(&str) -> Option<char>,
    edge: impl Fn(&str) -> Option<char>,
) -> bool {
    let is_word = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
    !(is_word(nearest(beside)) && is_word(edge(class)))
}

/// In lower case, with single spaces between words.
fn normal(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(classes: &[&str]) -> Labels {
        Labels::new(&classes.iter().map(|class| ((*class).to_owned(), 1)).collect())
    }

    fn named(classes: &[&str], answer: &str) -> String {
        let labels = labels(classes);
        labels.name(labels.find(answer)).to_owned()
    }

    #[test]
    fn the_first_class_that_is_named_counts_and_spelling_does_not() {
        let sentiments = ["negative", "neutral", "positive"];
        for (answer, class) in [
            ("negative", "negative"),
            ("  Positive.", "positive"),
            ("The answer is NEUTRAL, not positive", "neutral"),
            ("positively", "other"),
            ("nonnegative", "other"),
            ("", "other"),
        ] {
            assert_eq!(named(&sentiments, answer), class, "{answer:?}");
        }
        assert_eq!(named(&["not", "not sure"], "Not  sure"), "not sure", "the longest at one place");
        assert_eq!(named(&["sure", "not sure"], "surely not sure"), "not sure");
        assert_eq!(named(&["Yes", "No"], "no, yes"), "No");
        assert_eq!(named(&["52", "5"], "5252 52"), "52");
        assert_eq!(named(&["+", "-"], "a+b"), "+", "no words");
        assert_eq!(named(&["größe", "höhe"], "Die GRÖSSE? Größe!"), "größe");
    }

    #[test]
    fn classes_spelled_alike_are_one_and_none_has_a_name_of_its_own() {
        let alike = labels(&["Yes", "YES", "no"]);
        assert_eq!((alike.len(), alike.name(alike.find("yes"))), (2, "YES"));
        assert_eq!(named(&["other", "a"], "b"), "(other)");
        assert_eq!(named(&["other", "a"], "Other"), "other");
        assert!(labels(&["", " "]).is_empty());
    }

    #[test]
    fn shares_are_given_of_the_positive_class() {
        let positive = |classes: &[&str]| {
            let labels = labels(classes);
            labels.positive().map(|class| labels.name(Some(class)).to_owned())
        };
        assert_eq!(positive(&["negative", "neutral", "Positive"]).as_deref(), Some("Positive"));
        assert_eq!(positive(&["0", "1"]).as_deref(), Some("1"));
        assert_eq!(positive(&["bearish", "bullish"]).as_deref(), Some("bullish"));
        assert_eq!(positive(&["card", "loan", "transfer"]), None);
    }
}
