//! docs/training.md says what is: every key with its default, and examples that parse.

use std::collections::BTreeSet;
use std::fs;

use super::super::keys::{BASE, DEFAULTS, JOB, JOB_TASK, RUN};
use super::*;

fn documentation(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// Rows of the tables below a heading, as cells.
fn rows<'t>(text: &'t str, heading: &str) -> Vec<Vec<&'t str>> {
    let (_, section) =
        text.split_once(&format!("\n### {heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n#").next().unwrap_or_default();
    let cells = |row: &'t str| row.trim_matches('|').split(" | ").map(str::trim).collect();
    section.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

#[test]
fn every_key_is_documented_where_it_may_stand() {
    let text = documentation("docs/training.md");
    let sections = [
        ("`[base]`", BASE),
        ("`[run]`", RUN),
        ("`[defaults]` and `[[job]]`", JOB),
        ("`[[job.task]]`", JOB_TASK),
    ];
    for (heading, kind) in sections {
        let documented: Vec<&str> = rows(&text, heading).iter().map(|row| code(row[0]).unwrap()).collect();
        let known = BTreeSet::from_iter(kind.keys.iter().copied());
        assert_eq!(BTreeSet::from_iter(documented.iter().copied()), known, "{heading}");
        assert_eq!(documented.len(), known.len(), "{heading}: a key twice");
    }
    let beyond: Vec<_> = JOB.keys.iter().filter(|key| !DEFAULTS.keys.contains(key)).collect();
    assert_eq!(beyond, [&"name"], "all but the name may stand in [defaults]");
}

#[test]
fn defaults_are_as_documented() {
    let text = documentation("docs/training.md");
    let (config, job) = job("train = \"t.jsonl\"");
    let run = json!({
        "device": config.device, "seed": config.seed, "max_tokens_per_step": config.max_tokens_per_step,
        "max_concurrent_jobs": config.max_concurrent_jobs, "recompute": config.recompute.word(),
        "tensorboard": config.tensorboard,
    });
    let mut compared = 0;
    for (heading, values) in
        [("`[base]`", &run), ("`[run]`", &run), ("`[defaults]` and `[[job]]`", &config.resolved(&job))]
    {
        for row in rows(&text, heading) {
            let key = code(row[0]).unwrap();
            let (Some(default), Some(value)) = (code(row[2]), values.get(key)) else {
                // What has no default of its own: given, absent, or taken from [run].
                assert!(["required", "–"].contains(&row[2]), "{heading} {key}: {}", row[2]);
                continue;
            };
            let documented: Value = serde_json::from_str(default).unwrap();
            let same = match (documented.as_f64(), value.as_f64()) {
                (Some(documented), Some(value)) => documented == value,
                _ => documented == *value,
            };
            assert!(same, "{heading} {key}: {documented} is documented, {value} is the default");
            compared += 1;
        }
    }
    // The name is required, the seed is the run's, tasks have no default.
    assert_eq!(
        compared,
        run.as_object().unwrap().len() + config.resolved(&job).as_object().unwrap().len() - 3
    );
}

#[test]
fn words_are_documented() {
    fn check<W: Word>(text: &str) {
        for word in W::ALL {
            assert!(text.contains(&format!("`{}`", word.word())), "{}", word.word());
        }
    }
    let text = documentation("docs/training.md");
    check::<Recompute>(&text);
    check::<Schedule>(&text);
    check::<OnOverlong>(&text);
    check::<Sampling>(&text);
    check::<BatchTasks>(&text);
    check::<Balance>(&text);
    check::<Format>(&text);
}

#[test]
fn examples_parse() {
    for file in ["docs/training.md", "README.md"] {
        let text = documentation(file);
        let examples: Vec<&str> =
            text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert!(!examples.is_empty(), "{file} has an example");
        for example in examples {
            let (config, notes) = parse(example).unwrap_or_else(|error| panic!("{file}: {error}\n{example}"));
            assert!(!config.jobs.is_empty() && notes.is_empty(), "{file}: {notes:?}");
        }
    }
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/train.toml");
    RunConfig::read(&shipped).unwrap();
}
