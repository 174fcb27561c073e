//! `loramux plan` says how much memory a training run or an engine takes, and whether there is as much.

mod common;

use std::path::{Path, PathBuf};

use common::program::{Ran, command, finish, loramux};
use serde_json::Value;

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name).display().to_string()
}

/// A configuration in a folder of its own.
fn write(folder: &Path, jobs: &str) -> PathBuf {
    let path = folder.join("CONFIG.toml");
    let text = format!(
        "[base]\nmodel = {:?}\n[run]\nout = \"runs\"\nmax_tokens_per_step = 1024\n{jobs}",
        example("base")
    );
    std::fs::write(&path, text).unwrap();
    path
}

const JOBS: &str = "[defaults]\nlr = 1e-3\n[[job]]\nname = \"one\"\ntrain = \"t\"\nvalid = \"v\"\n[[job]]\nname = \"two\"\n\
                    rank = 64\nlr = 0.5\ntrain = \"u\"\n";

fn plan<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Ran {
    let mut command = command(&["plan"]);
    command.args(arguments);
    finish(command)
}

fn report(arguments: &[&str]) -> Value {
    let ran = plan(&[arguments, &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Bytes of the items of a kind.
fn bytes_of(report: &Value, kind: &str) -> u64 {
    let items = report["items"].as_array().unwrap().iter().filter(|item| item["kind"] == kind);
    items.map(|item| item["bytes"].as_u64().unwrap()).sum()
}

#[test]
fn a_run_is_estimated_without_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), JOBS);
    let ran = plan(&[&path]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for part in [
        "weights, BF16",
        "`one`: weights, gradients, moments",
        "`two`",
        "activations of 1024 rows",
        "total",
        "fits",
    ] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }
    assert!(
        ran.stderr.starts_with("note: ") && ran.stderr.contains("CONFIG.toml:15: `lr` is 0.5"),
        "{}",
        ran.stderr
    );
    let found = report(&[path.to_str().unwrap()]);
    let kinds = ["base", "adapters", "step", "evaluation"];
    assert_eq!(
        kinds.iter().map(|kind| bytes_of(&found, kind)).sum::<u64>(),
        found["total"].as_u64().unwrap()
    );
    assert!(kinds.iter().all(|kind| bytes_of(&found, kind) > 0), "{found}");
    assert_eq!(found["fits"], true);
    // Without validation data nothing is evaluated.
    let path = write(folder.path(), &JOBS.replace("valid = \"v\"\n", ""));
    assert_eq!(bytes_of(&report(&[path.to_str().unwrap()]), "evaluation"), 0);
}

#[test]
fn an_engine_is_estimated_with_the_adapters_that_it_serves() {
    let (base, adapter) = (example("base"), format!("general={}", example("adapters/general")));
    let alone = report(&["--model", &base]);
    let both =
        report(&["--model", &base, "--lora-modules", &adapter, &adapter.replace("general=", "other=")]);
    assert_eq!(bytes_of(&alone, "adapters"), 0);
    let file = std::fs::metadata(example("adapters/general/adapter_model.safetensors")).unwrap().len();
    let each = bytes_of(&both, "adapters") / 2;
    assert!(each > file / 2 && each < 3 * file, "{each} of {file}");
    let small =
        report(&["--model", &base, "--kv-cache-memory-bytes", "1000000", "--max-num-batched-tokens", "16"]);
    assert!(small["total"].as_u64() < alone["total"].as_u64());
    // The configuration of a run comes first, whatever the environment says of a model.
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(&["plan"]);
    command.arg(write(folder.path(), JOBS)).env("LORAMUX_MODEL", "nowhere");
    assert_eq!(finish(command).code, Some(0));
}

#[test]
fn what_cannot_be_planned_is_a_usage_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |jobs: &str| write(folder.path(), jobs).display().to_string();
    let missing = folder.path().join("x.toml").display().to_string();
    for (arguments, part) in [
        (vec![], "CONFIG.toml"),
        (vec![missing], "x.toml: cannot open"),
        (vec![path("[[job]]\nname = \"a\"\n")], "CONFIG.toml:6: job `a` has no data"),
        (vec!["--model".to_owned(), example("tasks")], "config.json"),
        (
            vec!["--model".to_owned(), example("base"), "--lora-modules".to_owned(), "a=nowhere".to_owned()],
            "nowhere: no such adapter folder",
        ),
        (
            vec!["--model".to_owned(), example("base"), "--max-num-seqs".to_owned(), "0".to_owned()],
            "max-num-seqs",
        ),
    ] {
        let ran = plan(&arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let twice = format!("a={0} a={0}", example("adapters/general"));
    let ran = plan(&["--model", &example("base"), "--lora-modules", &twice]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("adapter name \"a\" is given twice"), "{}", ran.stderr);
    let target = path("[[job]]\nname = \"a\"\ntrain = \"t\"\ntargets = [\"q_poj\"]\n");
    std::fs::write(folder.path().join("t"), "{\"text\": \"a b\"}\n").unwrap();
    for ran in [plan(&[&target]), loramux(&["train", "--dry-run", &target])] {
        assert_eq!(ran.code, Some(2));
        assert!(ran.stderr.contains("job `a`: `q_poj` matches no module"), "{}", ran.stderr);
    }
    assert!(loramux(&["plan", "--help"]).stdout.contains("CONFIG.toml"));
}

#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_fails_after_it_was_shown() {
    let folder = tempfile::tempdir().unwrap();
    // Sixteen million rows are some hundred GiB, whatever the base.
    let jobs: String = JOBS.replace("[defaults]", "recompute = \"none\"\n[defaults]");
    let path = write(folder.path(), &jobs);
    let text = std::fs::read_to_string(&path).unwrap().replace("= 1024", "= 16777216");
    std::fs::write(&path, text).unwrap();
    let ran = plan(&[&path]);
    assert_eq!(ran.code, Some(1), "{}", ran.stdout);
    assert!(ran.stdout.contains("total") && ran.stdout.contains("does not fit"), "{}", ran.stdout);
    assert!(ran.stderr.contains("error: does not fit"), "{}", ran.stderr);
}
