//! `loramux run-batch` and its files: what is refused before anything is written, and how a run is continued.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::Case;
use common::program::{Ran, command, finish, line, read_lines, write_lines};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Files {
    case: Case,
    folder: TempDir,
}

impl Files {
    fn new() -> Self {
        Self { case: Case::open("llama"), folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs over these files with further arguments.
    fn run(&self, input: &Path, output: &Path, arguments: &[&str]) -> Ran {
        let mut command = command(&["run-batch", "--threads", "2"]);
        command.arg("-i").arg(input).arg("-o").arg(output).arg("--model").arg(self.case.model());
        command.args(arguments);
        finish(command)
    }

    fn adapter(&self, name: &str) -> String {
        format!("{name}={}", self.case.adapter_folder(name).display())
    }

    fn lines(&self, count: usize) -> Vec<Value> {
        let prompts = self.case.prompts();
        let body = |index: usize| {
            let model = if index.is_multiple_of(2) { "model" } else { "all-r8" };
            json!({"model": model, "prompt": prompts[index % prompts.len()], "max_tokens": 4, "seed": index})
        };
        (0..count).map(|index| line(&format!("request {index}"), body(index))).collect()
    }
}

/// Answers without what differs from run to run.
fn comparable(answers: Vec<Value>) -> Vec<Value> {
    let strip = |mut answer: Value| {
        answer["id"] = Value::Null;
        answer["response"]["request_id"] = Value::Null;
        answer["response"]["body"]["id"] = Value::Null;
        answer["response"]["body"]["created"] = Value::Null;
        answer
    };
    answers.into_iter().map(strip).collect()
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_is_written() {
    let files = Files::new();
    let (good, twice, output) =
        (files.path("good.jsonl"), files.path("twice.jsonl"), files.path("out.jsonl"));
    write_lines(&good, &files.lines(2));
    let mut lines = files.lines(3);
    lines[2]["custom_id"] = lines[0]["custom_id"].clone();
    write_lines(&twice, &lines);
    let all_r8 = files.adapter("all-r8");

    let ran = files.run(&twice, &output, &[]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("lines 1 and 3 both have the custom_id \"request 0\""), "{}", ran.stderr);
    let ran = files.run(&files.path("absent.jsonl"), &output, &[]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("absent.jsonl"), "{}", ran.stderr);

    let before = fs::read(&good).unwrap();
    for arguments in [&[][..], &["--force"], &["--resume"]] {
        let ran = files.run(&good, &good, arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}");
        assert!(ran.stderr.contains("the output is the same file as the input"), "{}", ran.stderr);
    }
    assert_eq!(fs::read(&good).unwrap(), before);

    for (arguments, reason) in [
        (&["--max-num-seqs", "0"][..], "max-num-seqs"),
        (&["--max-num-seqs", "many"], "many"),
        (&["--max-model-len", "100000"], "max-model-len"),
        (&["--device", "cuda:0"], "cuda"),
        (&["--device", "abacus"], "abacus"),
        (&["--dtype", "float16"], "`dtype` is float16; wanted auto: the CPU computes in float32"),
        (&["--dtype", "float32"], "`dtype` is float32; wanted auto: the CPU computes in float32"),
        (&["--dtype", "int8"], "int8"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--force", "--resume"], "--resume"),
        (&["-q", "-v"], "--verbose"),
        (&["--lora-modules", "all-r8"], "NAME=PATH"),
        (&["--lora-modules", "all-r8="], "no path"),
        (&["--lora-modules", &all_r8, &all_r8], "given twice"),
    ] {
        let ran = files.run(&good, &output, arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(reason), "{arguments:?}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
    assert!(!output.exists());
}

#[test]
fn an_adapter_name_that_could_mean_something_else_is_refused() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    write_lines(&input, &files.lines(1));
    let folder = files.case.adapter_folder("all-r8").display().to_string();
    for name in ["a/b", "a\\b", "..", "x..y", "a,b", "a\"b", "a'b", "a\nb", "", "a\t", "\ta", "model", "auto"]
    {
        let module = format!("{name}={folder}");
        let ran = files.run(&input, &output, &["--lora-modules", &module]);
        assert_eq!(ran.code, Some(2), "{name:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(&format!("adapter name {name:?}")), "{name:?}: {}", ran.stderr);
        assert!(!output.exists(), "{name:?}");
    }
    let module = format!("other={folder}");
    let ran = files.run(&input, &output, &["--served-model-name", "other", "--lora-modules", &module]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("it is the base model's name"), "{}", ran.stderr);
}

#[test]
fn a_model_that_cannot_be_opened_is_named_and_nothing_is_written() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    write_lines(&input, &files.lines(1));
    let broken = files.path("broken");
    common::program::copy_folder(&files.case.model(), &broken);
    let weights = fs::read(broken.join("model.safetensors")).unwrap();
    fs::write(broken.join("model.safetensors"), &weights[..weights.len() - 1]).unwrap();
    for (model, reason) in [(broken.as_path(), "model.safetensors"), (Path::new("nowhere"), "nowhere")] {
        let mut command = command(&["run-batch"]);
        command.arg("-i").arg(&input).arg("-o").arg(&output).arg("--model").arg(model);
        let ran = finish(command);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(reason), "{}", ran.stderr);
        assert!(!output.exists());
    }
}

#[test]
fn an_output_that_exists_is_kept_unless_told_otherwise() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    write_lines(&input, &files.lines(1));
    fs::write(&output, "something of value\n").unwrap();
    let ran = files.run(&input, &output, &[]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("the output exists") && ran.stderr.contains("--force"), "{}", ran.stderr);
    let ran = files.run(&input, &output, &["--resume"]);
    assert_eq!(ran.code, Some(2), "not an answer of a run");
    assert!(ran.stderr.contains("line 1 is not an answer"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(&output).unwrap(), "something of value\n");
    assert_eq!(files.run(&input, &output, &["--force"]).code, Some(0));
    assert_eq!(read_lines(&output).len(), 1);
}

#[test]
fn a_run_that_was_cut_off_anywhere_is_continued_to_the_same_file() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    let mut lines: Vec<String> = files.lines(6).iter().map(Value::to_string).collect();
    lines.insert(2, "{\"custom_id\": \"no request\"}".to_owned());
    lines.insert(4, String::new());
    write_lines(&input, &lines);
    let adapter = files.adapter("all-r8");
    let arguments = ["--lora-modules", adapter.as_str()];
    assert_eq!(files.run(&input, &output, &arguments).code, Some(3));
    let whole = fs::read(&output).unwrap();
    let wanted = comparable(read_lines(&output));
    assert_eq!(wanted.len(), 7);

    let first_line = whole.iter().position(|&byte| byte == b'\n').unwrap();
    // Nothing, a torn first line, between lines, within some line, before the last line end, everything.
    let cuts = [
        0,
        10,
        first_line,
        first_line + 1,
        first_line + 2,
        whole.len() * 3 / 5,
        whole.len() - 1,
        whole.len(),
    ];
    for cut in cuts {
        fs::write(&output, &whole[..cut]).unwrap();
        let ran = files.run(&input, &output, &["--resume", arguments[0], arguments[1]]);
        assert_eq!(ran.code, Some(3), "cut at {cut}: a failed line of the first run counts: {}", ran.stderr);
        let kept = whole[..cut].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        assert_eq!(fs::read(&output).unwrap()[..kept], whole[..kept], "cut at {cut}: whole lines stay");
        assert_eq!(comparable(read_lines(&output)), wanted, "cut at {cut}");
    }

    // Another input's answers are not continued.
    let mut others = files.lines(6);
    others[0]["custom_id"] = json!("another");
    write_lines(&input, &others);
    fs::write(&output, &whole).unwrap();
    let ran = files.run(&input, &output, &["--resume"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("request 0") && ran.stderr.contains("another"), "{}", ran.stderr);
    assert_eq!(fs::read(&output).unwrap(), whole);
}

#[test]
fn flags_have_twins_in_the_environment_and_paths_may_have_spaces() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    let mut lines = files.lines(2);
    lines[0]["body"]["model"] = json!("the-base");
    lines[1]["body"]["model"] = json!("b");
    write_lines(&input, &lines);
    let spaced = files.path("my adapters of today");
    common::program::copy_folder(&files.case.adapter_folder("small-qv"), &spaced);
    let all_r8 = files.case.adapter_folder("all-r8");
    let mut command = command(&["run-batch", "-q"]);
    command.arg("-i").arg(&input).arg("-o").arg(&output);
    command.env("LORAMUX_MODEL", files.case.model());
    command.env("LORAMUX_SERVED_MODEL_NAME", "the-base alias");
    command.env("LORAMUX_LORA_MODULES", format!("a={} b={}", spaced.display(), all_r8.display()));
    command.env("LORAMUX_THREADS", "1");
    let ran = finish(command);
    assert_eq!((ran.code, ran.stderr.as_str(), ran.stdout.as_str()), (Some(0), "", ""), "quiet means silent");
    assert_eq!(read_lines(&output)[1]["response"]["body"]["model"], "b");
}

#[test]
fn an_empty_batch_is_done_and_blank_lines_are_none() {
    let files = Files::new();
    let (input, output) = (files.path("in.jsonl"), files.path("out.jsonl"));
    fs::write(&input, "\n  \r\n").unwrap();
    let ran = files.run(&input, &output, &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(fs::read(&output).unwrap(), b"");
}
