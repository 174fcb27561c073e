//! Formats, errors, counts and what is dropped.

use std::fs;

use serde_json::{Value, json};

use super::*;

fn refused(lines: &[Value]) -> String {
    read(lines, &OPTIONS).expect_err("the file is refused")
}

fn decoded(sample: &Sample) -> String {
    BASE.tokenizer.decode(&sample.tokens, false)
}

#[test]
fn formats_are_recognised_from_their_keys() {
    let asked = "<|user|>\nHow many?<|end|>\n<|assistant|>\n3<|end|>";
    for (line, text, learned, answer) in [
        (
            json!({"messages": chat(&[("user", "How many?"), ("assistant", "3")])}),
            asked,
            "3<|end|>",
            Some("3"),
        ),
        (json!({"prompt": "How many?", "completion": " 3"}), "How many? 3<|end|>", " 3<|end|>", Some("3")),
        (json!({"instruction": "How many?", "output": "3"}), asked, "3<|end|>", Some("3")),
        (json!({"instruction": "How many?", "input": "", "output": "3"}), asked, "3<|end|>", Some("3")),
        (
            json!({"instruction": "How many?", "input": "a b", "output": "2"}),
            "<|user|>\nHow many?\n\na b<|end|>\n<|assistant|>\n2<|end|>",
            "2<|end|>",
            Some("2"),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "3"}]}),
            asked,
            "3<|end|>",
            Some("3"),
        ),
        (json!({"text": "a b c"}), "a b c<|end|>", " b c<|end|>", None),
        (json!({"text": "a b", "label": "two"}), "a b two<|end|>", " two<|end|>", Some("two")),
        (json!({"text": "a b\n", "label": "two"}), "a b\ntwo<|end|>", "two<|end|>", Some("two")),
    ] {
        let mut line = line;
        line["task"] = "t".into();
        line["group"] = "g".into();
        line["id"] = 7.into();
        let sample = sample(line.clone());
        assert_eq!(decoded(&sample), text, "{line}");
        assert_eq!(learned_text(&BASE.tokenizer, &sample), learned, "{line}");
        assert_eq!(sample.question.as_ref().map(|question| question.answer.as_str()), answer, "{line}");
        assert_eq!((sample.task.as_deref(), sample.group.as_deref()), (Some("t"), Some("g")), "{line}");
    }
    let sharegpt: Vec<Value> = ["system", "user", "assistant", "tool"]
        .iter()
        .map(|from| json!({"from": from, "value": "a"}))
        .chain([json!({"from": "gpt", "value": "b"})])
        .collect();
    let sample = sample(json!({"conversations": sharegpt}));
    assert_eq!(learned_text(&BASE.tokenizer, &sample), "a<|end|>b<|end|>");
    assert!(decoded(&sample).starts_with("<|system|>\na<|end|>\n<|user|>\na<|end|>"));
}

#[test]
fn tokens_are_taken_as_they_are_and_labels_shifted() {
    let sample = sample(json!({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 9, 8]}));
    assert_eq!(sample.tokens, [5, 6, 7, 8]);
    assert_eq!(sample.targets, [Target { row: 1, token: 9 }, Target { row: 2, token: 8 }]);
    assert_eq!(sample.question, None);
}

#[test]
fn a_format_can_be_named() {
    let named = |format| DataOptions { format: Some(format), ..OPTIONS };
    let line = json!({"text": "a", "label": "b"});
    assert!(read(std::slice::from_ref(&line), &named(Format::Labelled)).is_ok());
    assert_eq!(
        read(&[line], &named(Format::Text)).unwrap_err(),
        "data.jsonl:1: found keys `text`, `label`, wanted `text` and no others but `task`, `group`, `id`"
    );
}

#[test]
fn a_byte_order_mark_line_ends_and_blank_lines_are_accepted() {
    let plain = "{\"text\": \"a b\"}\n{\"text\": \"c d\"}\n";
    let other = "\u{feff}\r\n{\"text\": \"a b\"}\r\n\n \t\r\n  {\"text\": \"c d\"} ";
    let encoder = Encoder::of(&BASE).unwrap();
    let [plain, other] = [plain, other].map(|text| read_with(&encoder, text.as_bytes(), &OPTIONS).unwrap().0);
    assert_eq!(plain.samples[1].line, 2);
    assert_eq!(other.samples[1].line, 5);
    assert_eq!(plain.samples[1].tokens, other.samples[1].tokens);
    assert_eq!(plain.counts, other.counts);
}

#[test]
fn errors_name_file_and_line_what_was_found_and_what_was_wanted() {
    let good = || json!({"prompt": "a", "completion": "b"});
    assert_eq!(
        refused(&[good(), json!({"prompt": "a", "completion": "b", "weight": 1})]),
        "data.jsonl:2: found keys `prompt`, `completion`, `weight`, wanted `prompt`, `completion` and no others but \
         `task`, `group`, `id`"
    );
    assert_eq!(
        refused(&[good(), json!({"text": "a"})]),
        "data.jsonl:2: found keys `text`, wanted `prompt`, `completion` and no others but `task`, `group`, `id`"
    );
    assert_eq!(
        refused(&[json!({"question": "a", "answer": "b"}), good()]),
        "data.jsonl:1: found keys `question`, `answer`, wanted those of one format: `messages`; or `prompt`, \
         `completion`; or `instruction`, `output`; or `conversations`; or `text`; or `input_ids`, `labels`; or `text`, \
         `label`"
    );
    let message = |message: Value| json!({"messages": [message]});
    for (line, wanted) in [
        (json!({}), "found no keys, wanted those of one format"),
        (json!([1]), "found [1], wanted a JSON object"),
        (json!({"prompt": 3, "completion": "b"}), "found 3 for `prompt`, wanted a string"),
        (json!({"prompt": "a", "completion": null}), "found null for `completion`, wanted a string"),
        (json!({"text": ["a"]}), "found [\"a\"] for `text`, wanted a string"),
        (json!({"text": "a", "task": 3}), "found 3 for `task`, wanted a string that is not empty"),
        (json!({"text": "a", "group": ""}), "found \"\" for `group`, wanted a string that is not empty"),
        (json!({"text": "a", "label": " "}), "found \" \" for `label`, wanted a word"),
        (json!({"text": "a", "label": 1}), "found 1 for `label`, wanted a string"),
        (json!({"instruction": "a", "input": 1, "output": "b"}), "found 1 for `input`, wanted a string"),
        (json!({"messages": []}), "found [] for `messages`, wanted a list of at least one message"),
        (json!({"messages": "hi"}), "found \"hi\" for `messages`, wanted a list"),
        (json!({"messages": [], "tools": 1}), "for `messages`"),
        (json!({"messages": ["hi"]}), "found \"hi\" for `messages[0]`, wanted an object with"),
        (
            message(json!({"content": "a"})),
            "found null for `messages[0].role`, wanted one of system, developer, user",
        ),
        (message(json!({"role": "assistent", "content": "a"})), "found \"assistent\" for `messages[0].role`"),
        (message(json!({"role": "user"})), "found null for `messages[0].content`, wanted a string or a list"),
        (message(json!({"role": "user", "content": 3})), "found 3 for `messages[0].content`"),
        (
            message(json!({"role": "user", "content": [{"type": "image"}]})),
            "messages[0].content[0].type is \"image\"",
        ),
        (message(json!({"role": "user", "content": "a", "train": 1})), "found key `train` in `messages[0]`"),
        (message(json!({"role": "user", "content": "a", "weight": 1})), "found 1 for `messages[0].weight`"),
        (message(json!({"role": "assistant", "content": "a", "weight": 2})), "wanted 0 or 1"),
        (
            json!({"conversations": [{"from": "bot", "value": "a"}]}),
            "found \"bot\" for `conversations[0].from`",
        ),
        (
            json!({"conversations": [{"from": "gpt"}]}),
            "found null for `conversations[0].value`, wanted a string",
        ),
        (
            json!({"conversations": [{"from": "gpt", "value": "a", "x": 1}]}),
            "wanted an object with `from` and `value`",
        ),
        (json!({"input_ids": [1, 2], "labels": [1]}), "found 2 `input_ids` and 1 `labels`, wanted as many"),
        (json!({"input_ids": [], "labels": []}), "found [] for `input_ids`, wanted a list of token ids"),
        (
            json!({"input_ids": [1, 1024], "labels": [1, 1]}),
            "found 1024 for `input_ids[1]`, wanted a token id below 1024",
        ),
        (json!({"input_ids": [1.0], "labels": [1]}), "found 1.0 for `input_ids[0]`"),
        (
            json!({"input_ids": [1], "labels": [-1]}),
            "found -1 for `labels[0]`, wanted -100 or a token id below 1024",
        ),
    ] {
        let error = refused(&[line]);
        assert!(
            error.starts_with("data.jsonl:1: ") && error.contains(wanted),
            "{error:?} does not say {wanted:?}"
        );
    }
    let encoder = Encoder::of(&BASE).unwrap();
    let good = good().to_string();
    for (line, wanted) in [
        (
            &b"{\"prompt\": \"a\", \"completion\": NaN}"[..],
            "not valid JSON: in `completion`: expected value, at column",
        ),
        (b"{\"prompt\": \"a\", \"prompt\": \"a\", \"completion\": \"b\"}", "key `prompt` occurs twice"),
        (b"{\"prompt\": \"a\"", "not valid JSON: EOF while parsing an object, at column 14"),
        (b"{\"prompt\": \"\xff\", \"completion\": \"b\"}", "not valid UTF-8 at byte 13"),
    ] {
        let bytes = [good.as_bytes(), b"\n\n", line, b"\n{bad too\n"].concat();
        let error = read_with(&encoder, &bytes, &OPTIONS).unwrap_err();
        assert!(error.starts_with("data.jsonl:3: ") && error.contains(wanted), "{error}");
    }
}

#[test]
fn a_file_without_samples_is_refused() {
    let encoder = Encoder::of(&BASE).unwrap();
    for bytes in [&b""[..], b"\xef\xbb\xbf", b"\n \r\n"] {
        assert_eq!(read_with(&encoder, bytes, &OPTIONS).unwrap_err(), "data.jsonl: found no samples");
    }
    assert_eq!(
        refused(&[
            json!({"messages": chat(&[("user", "a")])}),
            json!({"messages": chat(&[("assistant", "a")])})
        ]),
        "data.jsonl: found no sample that can be used: 2 samples with no token to learn dropped (lines 1, 2)"
    );
    let missing = read_dataset(Path::new("no/such.jsonl"), &BASE, &OPTIONS).unwrap_err().to_string();
    assert!(missing.starts_with("no/such.jsonl: cannot open: "), "{missing}");
    let directory = read_dataset(&folder("examples"), &BASE, &OPTIONS).unwrap_err().to_string();
    assert!(directory.ends_with("not a regular file"), "{directory}");
}

#[test]
fn overlong_samples_are_cut_dropped_or_refused() {
    let ids = |length: usize| json!({"input_ids": vec![5; length], "labels": vec![7; length]});
    // Its only target is the fifth token.
    let late = json!({"input_ids": [5, 5, 5, 5, 5], "labels": [-100, -100, -100, -100, 7]});
    let lines = [ids(4), ids(5), late, ids(6)];
    let with = |on_overlong| read(&lines, &DataOptions { max_length: 4, on_overlong, ..OPTIONS });

    let (cut, warnings) = with(OnOverlong::Truncate).unwrap();
    assert_eq!(cut.samples.iter().map(|sample| sample.line).collect::<Vec<_>>(), [1, 2, 4]);
    for sample in &cut.samples {
        assert_eq!(sample.tokens, [5; 4]);
        assert_eq!(sample.targets, [0, 1, 2].map(|row| Target { row, token: 7 }));
    }
    let counts = Counts {
        read: 4,
        kept: 3,
        truncated: 2,
        dropped_without_target: 1,
        duplicates: 2,
        tokens: 12,
        targets: 9,
        ..Counts::default()
    };
    assert_eq!(cut.counts, counts);
    assert_eq!(
        warnings,
        [
            "data.jsonl:3: 1 sample with no token to learn dropped (line 3)",
            "data.jsonl:2: 2 samples of more than max_length = 4 tokens lost what is over (lines 2, 4)"
        ]
    );

    let (dropped, warnings) = with(OnOverlong::Drop).unwrap();
    let counts = Counts { read: 4, kept: 1, dropped_too_long: 3, tokens: 4, targets: 3, ..Counts::default() };
    assert_eq!(dropped.counts, counts);
    let wanted = "data.jsonl:2: 3 samples of more than max_length = 4 tokens dropped (lines 2, 3, 4)";
    assert_eq!(warnings, [wanted]);

    let wanted = "data.jsonl:2: found 5 tokens, wanted at most max_length = 4";
    assert_eq!(with(OnOverlong::Error).unwrap_err(), wanted);
}

#[test]
fn only_the_first_few_lines_are_listed() {
    let lines: Vec<Value> = (0..9).map(|_| json!({"input_ids": [5], "labels": [5]})).collect();
    let (_, warnings) =
        read(&[&lines[..], &[json!({"input_ids": [5, 6], "labels": [5, 6]})]].concat(), &OPTIONS).unwrap();
    assert_eq!(warnings, ["data.jsonl:1: 9 samples with no token to learn dropped (lines 1, 2, 3, 4, 5, …)"]);
}

#[test]
fn packing_joins_documents_and_cuts_sequences() {
    let lines = ["a b c", "d", "e f g h i j k l m n o p"].map(|text| json!({"text": text}));
    let options = DataOptions { packing: true, max_length: 8, ..OPTIONS };
    let (dataset, _) = read(&lines, &options).unwrap();
    let all: Vec<u32> = dataset.samples.iter().flat_map(|sample| sample.tokens.clone()).collect();
    assert_eq!(BASE.tokenizer.decode(&all, false), "a b c<|end|>d<|end|>e f g h i j k l m n o p<|end|>");
    let (last, full) = dataset.samples.split_last().unwrap();
    assert!(full.iter().all(|sample| sample.tokens.len() == 8) && last.tokens.len() <= 8);
    for sample in &dataset.samples {
        assert_eq!(sample.targets.len(), sample.tokens.len() - 1);
    }
    assert_eq!(dataset.samples.iter().map(|sample| sample.line).collect::<Vec<_>>()[..2], [1, 3]);
    assert_eq!((dataset.counts.read, dataset.counts.kept), (3, dataset.samples.len()));

    // Documents of different tasks stay apart.
    let lines = ["t", "u", "t"].map(|task| json!({"text": "a b", "task": task}));
    let (dataset, _) = read(&lines, &options).unwrap();
    let found: Vec<_> =
        dataset.samples.iter().map(|sample| (sample.task.as_deref(), decoded(sample))).collect();
    let (once, twice) = ("a b<|end|>".to_owned(), "a b<|end|>a b<|end|>".to_owned());
    assert_eq!(found, [(Some("t"), twice), (Some("u"), once)]);

    let line = json!({"prompt": "a", "completion": "b"});
    let (_, warnings) = read(&[line], &options).unwrap();
    assert!(warnings[0].contains("packing joins samples of the format text alone"), "{warnings:?}");
}

#[test]
fn duplicates_and_leakage_are_counted() {
    let lines = |answers: &[&str]| {
        answers.iter().map(|a| json!({"prompt": "q", "completion": a})).collect::<Vec<_>>()
    };
    let (train, _) = read(&lines(&["a", "b", "a", "a", "c"]), &OPTIONS).unwrap();
    assert_eq!(train.counts.duplicates, 2);
    let (valid, _) = read(&lines(&["d", "a", "e", "c", "a"]), &OPTIONS).unwrap();
    assert_eq!(leakage(&train, &valid), Leakage { samples: 3, lines: vec![2, 4, 5] });
    // The same tokens with other labels are another sample.
    let tokens =
        |labels: [i64; 3]| read(&[json!({"input_ids": [5, 6, 7], "labels": labels})], &OPTIONS).unwrap().0;
    assert_eq!(leakage(&tokens([5, 6, 7]), &tokens([5, -100, 7])), Leakage::default());
}

#[test]
fn few_answers_are_classes() {
    let labelled = |labels: &[String]| {
        let lines: Vec<Value> = labels.iter().map(|label| json!({"text": "a", "label": label})).collect();
        read(&lines, &OPTIONS).unwrap()
    };
    let names = |count: usize| (0..count).map(|class| format!("c{class}")).collect::<Vec<_>>();
    let (dataset, warnings) = labelled(&[names(20), names(3)].concat());
    assert_eq!((dataset.classes.len(), dataset.classes["c2"], dataset.classes["c3"]), (20, 2, 1));
    assert_eq!(warnings, [] as [String; 0]);
    assert!(labelled(&[names(21), names(3)].concat()).0.classes.is_empty(), "too many");
    assert!(labelled(&names(3)).0.classes.is_empty(), "none occurs twice");

    let (dataset, warnings) = labelled(&["yes".to_owned(), "yes".to_owned()]);
    assert_eq!(dataset.classes["yes"], 2);
    assert_eq!(
        warnings,
        ["data.jsonl:1: all 2 samples have the answer \"yes\": there is nothing to tell apart"]
    );

    let (text, _) = read(&[json!({"text": "a b"}), json!({"text": "a b"})], &OPTIONS).unwrap();
    assert!(text.classes.is_empty());
}

#[test]
fn the_examples_have_their_classes_and_hashes() {
    let path = folder("examples/tasks/headline-sentiment/train.jsonl");
    let (dataset, _) = read_dataset(&path, &BASE, &OPTIONS).unwrap();
    let classes: Vec<&str> = dataset.classes.keys().map(String::as_str).collect();
    assert_eq!(classes, ["negative", "neutral", "positive"]);
    assert_eq!(dataset.classes.values().sum::<usize>(), 2000);
    assert_eq!(dataset.hash, crate::format::sha256_file(&path).unwrap());
    assert_eq!(dataset.path, path);
    assert_eq!(
        dataset.counts.tokens,
        dataset.samples.iter().map(|sample| sample.tokens.len()).sum::<usize>()
    );
    let other = fs::read(folder("examples/tasks/general/train.jsonl")).unwrap();
    let (other, _) = read_with(&Encoder::of(&BASE).unwrap(), &other, &OPTIONS).unwrap();
    assert!(other.classes.is_empty());
}
