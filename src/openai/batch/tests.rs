//! Lines in, lines out, and what survives a crash.

use std::fs;
use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tempfile::TempDir;

use super::output::{Existing, OrderedWriter, Progress, open};
use super::*;

fn request(custom_id: &str) -> String {
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"n": 1}}).to_string()
}

/// A folder with the requests a, b and c in `in.jsonl`.
fn folder() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    fs::write(&input, ["a", "b", "c"].map(request).join("\n")).unwrap();
    (folder, input, output)
}

fn answer(index: usize, custom_id: &str) -> String {
    answer_line(&Ids::new("test").unique(index), custom_id, &json!({"text": custom_id}))
}

fn failure(index: usize, custom_id: &str) -> String {
    failure_line(&Ids::new("test").unique(index), custom_id, &ApiError::bad_request("n", "bad n"))
}

#[test]
fn a_line_names_its_endpoint_and_body() {
    let line = parse_line(1, &request("x")).unwrap();
    assert_eq!(line.custom_id, "x");
    assert_eq!((line.endpoint, line.body), (Endpoint::Completions, json!({"n": 1})));
    let chat = request("x").replace("/v1/completions", "/v1/chat/completions");
    assert_eq!(parse_line(1, &chat).unwrap().endpoint, Endpoint::ChatCompletions);
}

#[test]
fn malformed_lines_are_named_by_number_key_and_value() {
    let change = |key: &str, value: Value| {
        let mut line: Value = serde_json::from_str(&request("x")).unwrap();
        match value {
            Value::Null => line.as_object_mut().unwrap().remove(key),
            value => line.as_object_mut().unwrap().insert(key.to_owned(), value),
        };
        line.to_string()
    };
    for (line, custom_id, part) in [
        (
            "{\"custom_id\"".to_owned(),
            None,
            "not valid JSON: in `custom_id`: EOF while parsing an object, at column 12",
        ),
        ("[1]".to_owned(), None, "must be a JSON object, got [1]"),
        ("{\"custom_id\": \"a\", \"custom_id\": \"b\"}".to_owned(), None, "key `custom_id` occurs twice"),
        (change("custom_id", json!(null)), None, "`custom_id` is missing"),
        (change("custom_id", json!(5)), None, "`custom_id` must be a string that is not empty, got 5"),
        (change("custom_id", json!("")), None, "got \"\""),
        (change("method", json!(null)), Some("x"), "`method` is missing"),
        (change("method", json!("GET")), Some("x"), "`method` must be \"POST\", got \"GET\""),
        (change("url", json!(null)), Some("x"), "`url` is missing"),
        (
            change("url", json!("/v1/embeddings")),
            Some("x"),
            "`url` must be \"/v1/completions\" or \"/v1/chat/completions\", got \"/v1/embeddings\"",
        ),
        (change("body", json!(null)), Some("x"), "`body` is missing"),
        (change("body", json!("hi")), Some("x"), "`body` must be a JSON object, got \"hi\""),
        (change("boddy", json!({})), Some("x"), "unknown key `boddy`"),
    ] {
        let error = parse_line(7, &line).unwrap_err();
        assert_eq!((error.number, error.custom_id.as_deref()), (7, custom_id), "{error}");
        assert_eq!(error.to_string(), format!("line 7: {}", error.reason));
        assert!(error.reason.contains(part), "{error}");
    }
}

#[test]
fn byte_order_mark_line_ends_and_blank_lines_are_accepted() {
    let text = format!("\u{FEFF}{}\r\n\r\n   \n{}\n\n{}", request("a"), request("b"), request("c"));
    let lines: Vec<_> = Lines::new(Cursor::new(text), Path::new("in")).map(|line| line.unwrap()).collect();
    let ids: Vec<_> = lines.iter().map(|line| line.as_ref().unwrap().custom_id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
}

#[test]
fn a_bad_line_does_not_hide_the_next_one() {
    let mut text = b"{nonsense}\n\n\xff\xfe\n".to_vec();
    text.extend(format!("{}\n{}", "x".repeat(500), request("a")).bytes());
    let mut lines = Lines::new(Cursor::new(text), Path::new("in"));
    lines.max_bytes = 200;
    let found: Vec<_> = lines.map(|line| line.unwrap().map(|line| line.custom_id)).collect();
    let messages: Vec<_> = found[..3].iter().map(|line| line.as_ref().unwrap_err().to_string()).collect();
    assert!(messages[0].starts_with("line 1: not valid JSON"), "{messages:?}");
    assert_eq!(messages[1], "line 3: not valid UTF-8 at byte 1");
    assert_eq!(messages[2], "line 4: longer than 200 bytes");
    assert_eq!(found[3], Ok("a".to_owned()));
    assert_eq!(found.len(), 4);
}

#[test]
fn scanning_counts_lines_and_refuses_equal_ids() {
    let (_folder, input, _) = folder();
    assert_eq!(scan(&input).unwrap(), Scan { lines: 3, invalid: 0 });
    let with_url = request("b").replace("completions", "embeddings");
    fs::write(&input, format!("{}\n\nnonsense\n{with_url}\n", request("a"))).unwrap();
    assert_eq!(scan(&input).unwrap(), Scan { lines: 3, invalid: 2 });
    fs::write(&input, format!("{}\n\n{}\n{with_url}\n", request("a"), request("b"))).unwrap();
    let error = scan(&input).unwrap_err();
    assert!(matches!(error, BatchError::DuplicateId { first: 3, second: 4, .. }));
    assert!(error.to_string().ends_with("in.jsonl: lines 3 and 4 both have the custom_id \"b\""), "{error}");
    let error = scan(&input.with_file_name("absent.jsonl")).unwrap_err();
    assert!(error.to_string().contains("absent.jsonl"), "{error}");
}

#[test]
fn output_lines_have_the_openai_form() {
    let ids = Ids::new("test");
    let unique = ids.unique(5);
    assert_eq!(unique.len(), 32);
    assert_ne!(unique, ids.unique(6));
    assert_ne!(unique, Ids::new("other").unique(5));
    let read = |line: String| serde_json::from_str::<Value>(&line).unwrap();
    let expected = json!({
        "id": format!("batch_req_{unique}"), "custom_id": "x",
        "response": {"status_code": 200, "request_id": format!("req_{unique}"), "body": {"text": "a\nb"}},
        "error": null,
    });
    let line = answer_line(&unique, "x", &json!({"text": "a\nb"}));
    assert!(!line.contains('\n'));
    assert_eq!(read(line), expected);

    let failed = read(failure_line(&unique, "x", &ApiError::unknown_model("m", None)));
    assert_eq!(failed["response"]["status_code"], 404);
    assert_eq!(failed["response"]["body"]["error"]["message"], "The model `m` does not exist.");
    assert_eq!(failed["error"], json!(null));

    let invalid = parse_line(7, "{}").unwrap_err();
    let expected = json!({
        "id": format!("batch_req_{unique}"), "custom_id": null, "response": null,
        "error": {"code": "invalid_line", "message": "line 7: `custom_id` is missing"},
    });
    assert_eq!(read(invalid_line(&unique, &invalid)), expected);
}

#[test]
fn an_output_that_exists_is_kept_unless_told_otherwise() {
    let (_folder, input, output) = folder();
    let (writer, progress) = open(&input, &output, Existing::Refuse).unwrap();
    assert_eq!(progress, Progress::default());
    drop(writer);
    fs::write(&output, "old and longer than what follows\n".repeat(20)).unwrap();
    let error = open(&input, &output, Existing::Refuse).unwrap_err();
    assert!(matches!(error, BatchError::OutputExists { .. }), "{error}");
    let (mut writer, _) = open(&input, &output, Existing::Overwrite).unwrap();
    writer.put(0, "new".to_owned()).unwrap();
    assert_eq!(fs::read_to_string(&output).unwrap(), "new\n");
}

#[test]
fn an_output_is_written_by_one_run_at_a_time() {
    let (_folder, input, output) = folder();
    let (mut first, _) = open(&input, &output, Existing::Refuse).unwrap();
    first.put(0, answer(0, "a")).unwrap();
    for existing in [Existing::Overwrite, Existing::Continue] {
        let error = open(&input, &output, existing).unwrap_err();
        assert!(matches!(error, BatchError::OutputBusy { .. }), "{error}");
    }
    drop(first);
    assert_eq!(open(&input, &output, Existing::Continue).unwrap().1.done, 1);
}

#[test]
fn the_input_is_never_the_output() {
    let (folder, input, output) = folder();
    let before = fs::read(&input).unwrap();
    let hard = folder.path().join("hard.jsonl");
    fs::hard_link(&input, &hard).unwrap();
    let mut same = vec![input.clone(), hard, folder.path().join("./in.jsonl")];
    #[cfg(unix)]
    {
        let soft = folder.path().join("soft.jsonl");
        std::os::unix::fs::symlink(&input, &soft).unwrap();
        same.push(soft);
    }
    for path in same {
        for existing in [Existing::Refuse, Existing::Overwrite, Existing::Continue] {
            let error = open(&input, &path, existing).unwrap_err();
            assert!(matches!(error, BatchError::OutputIsInput { .. }), "{error}");
        }
    }
    assert_eq!(fs::read(&input).unwrap(), before);
    assert!(open(&input, &output, Existing::Refuse).is_ok());
}

#[test]
fn lines_are_written_in_input_order_as_soon_as_possible() {
    let mut writer = OrderedWriter::new(Vec::new(), Path::new("out"), 2);
    writer.put(4, "four".to_owned()).unwrap();
    assert_eq!((writer.written(), writer.waiting()), (2, 1));
    writer.put(2, "two".to_owned()).unwrap();
    assert_eq!((writer.written(), writer.waiting()), (3, 1));
    for index in [0, 2, 4] {
        assert!(matches!(writer.put(index, String::new()), Err(BatchError::AnsweredTwice { .. })), "{index}");
    }
    writer.put(3, "three".to_owned()).unwrap();
    assert_eq!((writer.written(), writer.waiting()), (5, 0));
    assert_eq!(writer.finish(5).unwrap(), b"two\nthree\nfour\n");

    let mut short = OrderedWriter::new(Vec::new(), Path::new("out"), 0);
    short.put(1, "one".to_owned()).unwrap();
    assert!(matches!(short.finish(2), Err(BatchError::Unanswered { index: 0 })));
}

/// A disk with room for some bytes.
#[derive(Clone)]
struct SmallDisk(Arc<Mutex<Vec<u8>>>, usize);

impl Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = self.0.lock().unwrap();
        let room = (self.1 - written.len()).min(bytes.len());
        if room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        written.extend(&bytes[..room]);
        Ok(room)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn nothing_is_written_after_a_torn_line() {
    let disk = SmallDisk(Arc::default(), 8);
    let mut writer = OrderedWriter::new(disk.clone(), Path::new("out.jsonl"), 0);
    writer.put(0, "first".to_owned()).unwrap();
    let error = writer.put(1, "second".to_owned()).unwrap_err().to_string();
    assert!(error.starts_with("out.jsonl: "), "{error}");
    // Room for the next line is free again, but a torn one lies before it.
    disk.0.lock().unwrap().drain(..6);
    assert!(writer.put(2, "x".to_owned()).is_err());
    assert_eq!(*disk.0.lock().unwrap(), b"se");
    assert!(writer.finish(2).is_err());
}

#[test]
fn a_run_is_resumed_wherever_it_was_torn() {
    let (_folder, input, output) = folder();
    let lines = [answer(0, "a"), failure(1, "b"), answer(2, "c")];
    let whole = lines.join("\n") + "\n";
    let ends: Vec<usize> =
        whole.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1).collect();
    for cut in 0..=whole.len() {
        fs::write(&output, &whole[..cut]).unwrap();
        let (mut writer, progress) = open(&input, &output, Existing::Continue).unwrap();
        let done = ends.iter().filter(|end| **end <= cut).count();
        assert_eq!(progress, Progress { done, failed: usize::from(done >= 2) }, "cut at {cut}");
        for index in (done..3).rev() {
            writer.put(index, lines[index].clone()).unwrap();
        }
        writer.finish(3).unwrap();
        assert_eq!(fs::read_to_string(&output).unwrap(), whole, "cut at {cut}");
    }
}

#[test]
fn bytes_that_a_power_cut_lost_are_cut_off() {
    let (_folder, input, output) = folder();
    for tail in [vec![0; 100], [b"{\"id\":\"batch_req_12".as_slice(), &[0; 50], b"\n"].concat()] {
        let first = answer(0, "a") + "\n";
        fs::write(&output, [first.as_bytes(), &tail].concat()).unwrap();
        let (writer, progress) = open(&input, &output, Existing::Continue).unwrap();
        drop(writer);
        assert_eq!(progress.done, 1);
        assert_eq!(fs::read_to_string(&output).unwrap(), first);
    }
}

#[test]
fn resuming_without_an_output_starts_from_the_beginning() {
    let (_folder, input, output) = folder();
    assert_eq!(open(&input, &output, Existing::Continue).unwrap().1, Progress::default());
    assert!(output.exists());
}

#[test]
fn an_output_of_something_else_is_not_touched_by_resuming() {
    let (_folder, input, output) = folder();
    for (text, line, part) in [
        ("my notes".to_owned(), 1, "is not an answer of a batch run"),
        ("my notes\n".to_owned(), 1, "is not an answer"),
        (format!("{}\nmy notes\n{}\n", answer(0, "a"), answer(1, "b")), 2, "is not an answer"),
        (format!("{}\n\n{}\n", answer(0, "a"), answer(1, "b")), 2, "is not an answer"),
        (answer(0, "b") + "\n", 1, "answers the custom_id \"b\", but the input has \"a\" there"),
        (format!("{}\n{}\n", answer(0, "a"), answer(2, "c")), 2, "\"c\", but the input has \"b\""),
        (["a", "b", "c", "d"].map(|id| answer(0, id) + "\n").concat(), 4, "has no line in the input"),
        (fs::read_to_string(&input).unwrap(), 1, "is not an answer"),
    ] {
        fs::write(&output, &text).unwrap();
        let error = open(&input, &output, Existing::Continue).unwrap_err();
        assert!(matches!(error, BatchError::CannotResume { line: found, .. } if found == line), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(fs::read_to_string(&output).unwrap(), text);
    }
}

#[test]
fn answers_to_invalid_lines_count_as_failed_when_resuming() {
    let (_folder, input, output) = folder();
    fs::write(&input, format!("nonsense\n{}\n", request("a"))).unwrap();
    let invalid = parse_line(1, "nonsense").unwrap_err();
    fs::write(&output, format!("{}\n{}\n", invalid_line("00", &invalid), answer(1, "a"))).unwrap();
    let (_, progress) = open(&input, &output, Existing::Continue).unwrap();
    assert_eq!(progress, Progress { done: 2, failed: 1 });
}

proptest! {
    #[test]
    fn any_bytes_are_lines_or_invalid_lines(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let blank = |line: &[u8]| std::str::from_utf8(line).is_ok_and(|text| text.trim().is_empty());
        let newlines = bytes.split(|&byte| byte == b'\n').filter(|line| !blank(line)).count();
        let found = Lines::new(Cursor::new(bytes), Path::new("in")).count();
        // A byte order mark alone on the first line is blank, too.
        prop_assert!(found == newlines || found + 1 == newlines);
    }

    #[test]
    fn any_line_is_read_or_refused(line in r#"(\{|\[|\}|\]|"|:|,|custom_id|method|POST|url|body| |[0-9])*"#) {
        if let Err(error) = parse_line(3, &line) {
            prop_assert!(error.to_string().starts_with("line 3: "));
        }
    }

    #[test]
    fn any_order_of_answers_writes_the_same_file(order in Just((0..40).collect::<Vec<usize>>()).prop_shuffle()) {
        let mut writer = OrderedWriter::new(Vec::new(), Path::new("out"), 0);
        for index in order {
            writer.put(index, index.to_string()).unwrap();
        }
        let expected: String = (0..40).map(|index| format!("{index}\n")).collect();
        prop_assert_eq!(writer.finish(40).unwrap(), expected.into_bytes());
    }
}
