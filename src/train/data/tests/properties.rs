//! Whatever the bytes, a file is read or refused, and what is read is sound.

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;

use super::*;

/// A valid file of each format.
fn valid_files() -> Vec<String> {
    let messages =
        |answer: &str| json!({"messages": chat(&[("user", "a é"), ("assistant", answer)]), "task": "t"});
    let files = [
        vec![messages("b"), messages("c"), messages("b")],
        vec![
            json!({"prompt": "a ", "completion": "b"}),
            json!({"prompt": "a", "completion": "", "group": "g"}),
        ],
        vec![
            json!({"instruction": "a", "output": "b"}),
            json!({"instruction": "a", "input": "c", "output": "b"}),
        ],
        vec![json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})],
        vec![json!({"text": "a b c d e f g"}), json!({"text": "🙂", "task": "u"})],
        vec![json!({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]})],
        vec![json!({"text": "a", "label": "yes"}), json!({"text": "b", "label": "no"})],
    ];
    files.iter().map(|lines| lines.iter().map(|line| format!("{line}\n")).collect()).collect()
}

fn options() -> impl Strategy<Value = DataOptions> {
    let on_overlong =
        prop_oneof![Just(OnOverlong::Truncate), Just(OnOverlong::Drop), Just(OnOverlong::Error)];
    (0usize..24, on_overlong, any::<bool>()).prop_map(|(max_length, on_overlong, packing)| DataOptions {
        format: None,
        max_length,
        on_overlong,
        packing,
    })
}

#[derive(Clone, Debug)]
enum Edit {
    Set(u8),
    Insert(u8),
    Delete,
    /// Copies what follows, up to 40 bytes, to another place.
    Copy(Index),
}

fn edits() -> impl Strategy<Value = Vec<(Index, Edit)>> {
    let byte =
        prop_oneof![any::<u8>(), prop::sample::select(&b"{}[]\":,\\ \n\r0123456789-.eEntf\xef\xbb\xbf"[..])];
    let edit = prop_oneof![
        byte.clone().prop_map(Edit::Set),
        byte.prop_map(Edit::Insert),
        Just(Edit::Delete),
        any::<Index>().prop_map(Edit::Copy)
    ];
    prop::collection::vec((any::<Index>(), edit), 0..6)
}

fn apply(bytes: &mut Vec<u8>, edits: &[(Index, Edit)]) {
    for (at, edit) in edits {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        match edit {
            Edit::Set(byte) => bytes[at] = *byte,
            Edit::Insert(byte) => bytes.insert(at, *byte),
            Edit::Delete => drop(bytes.remove(at)),
            Edit::Copy(to) => {
                let piece: Vec<u8> = bytes[at..].iter().take(40).copied().collect();
                let to = to.index(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
    }
}

/// Reads the bytes and checks what every data set promises.
fn check(bytes: &[u8], options: &DataOptions) -> Result<(), TestCaseError> {
    let (dataset, _) = match read_with(&Encoder::of(&BASE).unwrap(), bytes, options) {
        Ok(read) => read,
        Err(error) => {
            prop_assert!(error.starts_with("data.jsonl:"), "{error}");
            return Ok(());
        }
    };
    let Dataset { samples, counts, classes, .. } = &dataset;
    prop_assert!(!samples.is_empty());
    prop_assert_eq!(counts.kept, samples.len());
    prop_assert_eq!(counts.tokens, samples.iter().map(|sample| sample.tokens.len()).sum::<usize>());
    prop_assert_eq!(counts.targets, samples.iter().map(|sample| sample.targets.len()).sum::<usize>());
    let different: HashSet<_> = samples.iter().map(Sample::content).collect();
    prop_assert_eq!(counts.duplicates, samples.len() - different.len());
    prop_assert!(classes.is_empty() || classes.values().sum::<usize>() == samples.len());
    prop_assert!(samples.windows(2).all(|pair| pair[0].line <= pair[1].line));
    for sample in samples {
        prop_assert!(sample.tokens.len() <= options.max_length && !sample.targets.is_empty());
        prop_assert!(sample.tokens.iter().all(|token| *token < 1024));
        prop_assert!(sample.targets.windows(2).all(|pair| pair[0].row < pair[1].row));
        let last = sample.targets[sample.targets.len() - 1];
        prop_assert!((last.row as usize) + 1 < sample.tokens.len());
    }
    Ok(())
}

#[test]
fn the_valid_files_are_valid() {
    for file in valid_files() {
        read_with(&Encoder::of(&BASE).unwrap(), file.as_bytes(), &OPTIONS).unwrap();
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), options in options()) {
        check(&bytes, &options)?;
    }

    #[test]
    fn a_changed_file_is_read_or_refused(
        file in prop::sample::select(valid_files()),
        edits in edits(),
        options in options(),
    ) {
        let mut bytes = file.into_bytes();
        apply(&mut bytes, &edits);
        check(&bytes, &options)?;
    }

    #[test]
    fn any_text_is_learned_where_the_assistant_says_it(
        turns in prop::collection::vec(("\\PC{0,12}", "[ \n]{0,2}\\PC{0,12}[ \n]{0,2}"), 1..4),
    ) {
        let plain = |text: &str| !text.contains("<|");
        prop_assume!(turns.iter().all(|(question, answer)| plain(question) && plain(answer)));
        let messages: Vec<_> = turns
            .iter()
            .flat_map(|(question, answer)| [("user", question.as_str()), ("assistant", answer.as_str())])
            .collect();
        let sample = sample(json!({"messages": chat(&messages)}));
        let wanted: String = turns.iter().map(|(_, answer)| format!("{answer}<|end|>")).collect();
        prop_assert_eq!(learned_text(&BASE.tokenizer, &sample), wanted);
        let question = sample.question.unwrap();
        prop_assert!(sample.tokens.starts_with(&question.tokens));
        prop_assert_eq!(question.answer, turns[turns.len() - 1].1.trim());
    }
}
