//! How good answers are.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{Answer, Labels};
use crate::train::data::Sample;

/// The result of an evaluation. Shares are 0 to 1; what does not apply is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean negative log-probability of a target, in nats, and its exponential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Share of questions whose answer is the expected text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
    /// Share of questions whose answer names the expected class (see [`Labels`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_accuracy: Option<f64>,
    /// Mean over classes of `2 TP / (2 TP + FP + FN)`, those left out that are neither expected nor given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    /// Mean over questions of [`word_f1`], where answers are free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub word_f1: Option<f64>,
    pub samples: usize,
    /// Requests that failed. They count as wrong answers, and not in the loss.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed: usize,
    /// How often each class was given where each was expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confusion: Option<BTreeMap<String, BTreeMap<String, usize>>>,
    /// By the samples' group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<BTreeMap<String, GroupScores>>,
}

/// The result for one group of samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupScores {
    pub samples: usize,
    pub exact_match: f64,
    /// Share of answers that name the positive class, where there is one (see [`Labels::positive`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positive: Option<f64>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// One answered question.
struct Answered<'a> {
    expected: &'a str,
    given: &'a str,
    group: Option<&'a str>,
}

impl Answered<'_> {
    fn is_exact(&self) -> bool {
        self.expected == self.given
    }
}

/// Scores the answers to samples, one entry a sample, `None` where nothing was asked. `classes` are the answers that are
/// classes; without any, answers are free text.
///
/// # Panics
/// When there are not as many answers as samples.
pub fn score(samples: &[Sample], answers: &[Option<Answer>], classes: &BTreeMap<String, usize>) -> Scores {
    assert_eq!(samples.len(), answers.len(), "an answer a sample");
    let mut scores = Scores { samples: samples.len(), ..Scores::default() };
    let mut answered = Vec::new();
    for (sample, answer) in samples.iter().zip(answers) {
        let (Some(question), Some(answer)) = (&sample.question, answer) else { continue };
        scores.failed += usize::from(answer.is_err());
        let given = answer.as_deref().unwrap_or_default();
        answered.push(Answered { expected: &question.answer, given, group: sample.group.as_deref() });
    }
    if answered.is_empty() {
        return scores;
    }
    scores.exact_match = Some(share(&answered, Answered::is_exact));
    let labels = Labels::new(classes);
    if labels.is_empty() {
        let sum: f64 = answered.iter().map(|answer| word_f1(answer.expected, answer.given)).sum();
        scores.word_f1 = Some(sum / answered.len() as f64);
    } else {
        let pairs: Vec<_> =
            answered.iter().map(|answer| (labels.find(answer.expected), labels.find(answer.given))).collect();
        scores.label_accuracy =
            Some(share(&pairs, |(expected, given)| expected.is_some() && expected == given));
        scores.f1 = Some(macro_f1(&pairs, labels.len()));
        let mut confusion = BTreeMap::<String, BTreeMap<String, usize>>::new();
        for (expected, given) in pairs {
            let row = confusion.entry(labels.name(expected).to_owned()).or_default();
            *row.entry(labels.name(given).to_owned()).or_default() += 1;
        }
        scores.confusion = Some(confusion);
    }
    scores.groups = by_group(&answered, &labels);
    scores
}

/// Share of items that something is true of.
fn share<T>(items: &[T], is_true: impl Fn(&T) -> bool) -> f64 {
    items.iter().filter(|item| is_true(item)).count() as f64 / items.len() as f64
}

/// Of expected and given classes. An answer that names none is a miss of its class and no class by itself.
fn macro_f1(pairs: &[(Option<usize>, Option<usize>)], classes: usize) -> f64 {
    let f1 = |class: usize| {
        let class = Some(class);
        let count = |is: fn(bool, bool) -> bool| {
            pairs.iter().filter(|(expected, given)| is(*expected == class, *given == class)).count()
        };
        let hits = 2 * count(|expected, given| expected && given);
        let misses = count(|expected, given| expected != given);
        (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
    };
    let of_classes: Vec<f64> = (0..classes).filter_map(f1).collect();
    of_classes.iter().sum::<f64>() / of_classes.len().max(1) as f64
}

fn by_group(answered: &[Answered<'_>], labels: &Labels) -> Option<BTreeMap<String, GroupScores>> {
    let mut groups = BTreeMap::<String, Vec<&Answered<'_>>>::new();
    for answer in answered {
        if let Some(group) = answer.group {
            groups.entry(group.to_owned()).or_default().push(answer);
        }
    }
    let score = |members: Vec<&Answered<'_>>| GroupScores {
        samples: members.len(),
        exact_match: share(&members, |answer| answer.is_exact()),
        positive: (labels.positive())
            .map(|positive| share(&members, |answer| labels.find(answer.given) == Some(positive))),
    };
    let groups: BTreeMap<_, _> = groups.into_iter().map(|(group, members)| (group, score(members))).collect();
    (!groups.is_empty()).then_some(groups)
}

/// Harmonic mean of precision and recall over words, as SQuAD counts them (Rajpurkar et al. 2016): in lower case, without
/// ASCII punctuation and English articles. Where either has no word, 1 if both have none, else 0.
pub fn word_f1(expected: &str, given: &str) -> f64 {
    let (expected, given) = (words(expected), words(given));
    if expected.is_empty() || given.is_empty() {
        return f64::from(u8::from(expected.is_empty() && given.is_empty()));
    }
    let mut left = HashMap::<&str, usize>::new();
    expected.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut common = 0;
    for word in &given {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    2.0 * f64::from(common) / (expected.len() + given.len()) as f64
}

fn words(text: &str) -> Vec<String> {
    let text: String =
        text.to_lowercase().chars().filter(|character| !character.is_ascii_punctuation()).collect();
    let words = text.split_whitespace().filter(|word| !["a", "an", "the"].contains(word));
    words.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Question;

    fn sample(expected: &str, group: Option<&str>) -> Sample {
        let question = Question { tokens: vec![1], answer: expected.to_owned() };
        Sample { question: Some(question), group: group.map(str::to_owned), ..Sample::default() }
    }

    fn classes(names: &[&str]) -> BTreeMap<String, usize> {
        names.iter().map(|name| ((*name).to_owned(), 1)).collect()
    }

    fn answers(given: &[&str]) -> Vec<Option<Answer>> {
        given.iter().map(|answer| Some(Ok((*answer).to_owned()))).collect()
    }

    fn near(found: Option<f64>, wanted: f64) -> bool {
        found.is_some_and(|found| (found - wanted).abs() < 1e-12)
    }

    #[test]
    fn answers_that_are_classes_are_scored_by_class() {
        let expected = ["yes", "yes", "yes", "no", "no", "maybe"];
        let samples: Vec<Sample> = expected.iter().map(|answer| sample(answer, None)).collect();
        let given = answers(&["yes", "Yes!", "no", "no", "what", "no"]);
        let scores = score(&samples, &given, &classes(&["yes", "no", "maybe", "never"]));
        assert_eq!(scores.samples, 6);
        assert!(near(scores.exact_match, 2.0 / 6.0) && near(scores.label_accuracy, 3.0 / 6.0));
        // yes: 2 hits, 1 missed: 4/5. no: 1 hit, 1 missed, 2 too many: 2/5. maybe: 0. never: neither expected nor given.
        assert!(near(scores.f1, (0.8 + 0.4 + 0.0) / 3.0), "{:?}", scores.f1);
        assert_eq!(scores.word_f1, None);
        let confusion = serde_json::to_value(scores.confusion.unwrap()).unwrap();
        let wanted = serde_json::json!({
            "maybe": {"no": 1}, "no": {"no": 1, "other": 1}, "yes": {"no": 1, "yes": 2},
        });
        assert_eq!(confusion, wanted);
    }

    #[test]
    fn free_text_is_scored_by_words() {
        let samples = [sample("the red house", None), sample("52", None)];
        let scores = score(&samples, &answers(&["A red, big house.", "51"]), &BTreeMap::new());
        // Two of two words, and two of three: 2·2/(2+3).
        assert!(near(scores.word_f1, 0.8 / 2.0) && near(scores.exact_match, 0.0));
        assert_eq!((scores.label_accuracy, scores.f1, scores.confusion), (None, None, None));
        for (expected, given, wanted) in [
            ("a b b", "b b b", 0.8),
            ("The", "!", 1.0),
            ("x", "", 0.0),
            ("", "x", 0.0),
            ("Über uns", "über", 2.0 / 3.0),
        ] {
            // "a" is an article.
            assert!(
                near(Some(word_f1(expected, given)), wanted),
                "{expected:?} {given:?}: {}",
                word_f1(expected, given)
            );
        }
    }

    #[test]
    fn groups_have_shares_of_their_own() {
        let samples = [
            sample("good", Some("x")),
            sample("bad", Some("x")),
            sample("good", Some("y")),
            sample("good", None),
        ];
        let scores = score(&samples, &answers(&["good", "good", "bad", "good"]), &classes(&["good", "bad"]));
        let groups = scores.groups.unwrap();
        let wanted =
            |samples, exact_match, positive| GroupScores { samples, exact_match, positive: Some(positive) };
        assert_eq!(groups["x"], wanted(2, 0.5, 1.0));
        assert_eq!(groups["y"], wanted(1, 0.0, 0.0));
        assert_eq!(groups.len(), 2);
    }

    #[test]
    fn a_failed_request_is_a_wrong_answer_and_a_sample_without_a_question_is_none() {
        let samples = [sample("yes", None), sample("no", None), Sample::default()];
        let given = [Some(Ok("yes".to_owned())), Some(Err("no room".to_owned())), None];
        let scores = score(&samples, &given, &classes(&["yes", "no"]));
        assert!(near(scores.exact_match, 0.5) && near(scores.label_accuracy, 0.5));
        assert_eq!((scores.samples, scores.failed), (3, 1));

        let nothing = score(&samples[2..], &given[2..], &BTreeMap::new());
        assert_eq!(serde_json::to_string(&nothing).unwrap(), r#"{"samples":1}"#);
    }
}
