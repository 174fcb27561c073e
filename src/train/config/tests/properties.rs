//! Whatever a file holds: no panic, and a line that exists. Whatever a job is: its resolved keys mean the same job.

use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;

use super::{EXAMPLE, HEAD, TASKS, keys, parse};
use crate::train::config::{Balance, BatchTasks, Format, OnOverlong, Sampling, Schedule};
use crate::train::config::{ConfigError, RunConfig, Word};

/// Reads bytes; a refusal names a line of them.
fn read(bytes: &[u8]) -> Result<(), TestCaseError> {
    match RunConfig::parse(Path::new("c.toml"), bytes) {
        Ok((config, _)) => config.jobs.iter().for_each(|job| drop(config.resolved(job))),
        Err(ConfigError::Line { line, problem, .. }) => {
            let lines = 1 + bytes.iter().filter(|&&byte| byte == b'\n').count();
            let ends_whole = bytes.len() > 1 && bytes.ends_with(b"\n");
            prop_assert!(
                (1..=lines - usize::from(ends_whole)).contains(&line),
                "line {line} of {lines}: {problem}"
            );
            prop_assert!(!problem.is_empty() && !problem.contains(char::is_control), "{problem:?}");
        }
        Err(error) => return Err(TestCaseError::fail(error.to_string())),
    }
    Ok(())
}

/// Pieces that make texts which get past the parser.
fn piece() -> impl Strategy<Value = String> {
    let mut words: Vec<&str> = vec![
        "[base]\n",
        "[run]\n",
        "[defaults]\n",
        "[[job]]\n",
        "[[job.task]]\n",
        "[[defaults.task]]\n",
        "[mixture]\n",
        "[job]\n",
        "= ",
        "\n",
        "\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        "-",
        "0",
        "1",
        "16",
        "0.5",
        "1e-3",
        "nan",
        "inf",
        "true",
        "false",
        "\"a\"",
        "\"base\"",
        "\"all-linear\"",
        "\"adapter:x\"",
        "\"temperature\"",
        "'",
        "\"\"\"",
        ".",
        "#",
        "\u{feff}",
        "é",
        "\t",
        "\r\n",
        "\u{1b}",
        "0x",
        "_",
        "1979-05-27",
        "name = \"a\"\n",
        "train = \"t\"\n",
        "valid = \"v\"\n",
        "model = \"m\"\n",
        "out = \"o\"\n",
    ];
    words.extend([
        "rank", "lr", "betas", "targets", "task", "epochs", "steps", "seed", "coba", "ratio", "sampling",
    ]);
    proptest::sample::select(words).prop_map(str::to_owned)
}

/// A valid job's lines: some keys, each with what it needs.
fn job_lines() -> impl Strategy<Value = String> {
    let number = |low: f64, high: f64| (low..high).prop_map(|number| format!("{number:?}"));
    fn word<W: Word>() -> impl Strategy<Value = String> {
        proptest::sample::select(W::ALL.iter().map(|value| format!("{:?}", value.word())).collect::<Vec<_>>())
    }
    let sampling = proptest::sample::select(Sampling::ALL).prop_map(|sampling| match sampling {
        Sampling::Temperature(_) => "\"temperature\"\ntemperature = 1.5".to_owned(),
        Sampling::EvenThenHard => "\"even-then-hard\"\neval_every = 7".to_owned(),
        other => format!("{:?}", other.word()),
    });
    let line = |key: &'static str, value: BoxedStrategy<String>| {
        prop::option::of(value)
            .prop_map(move |value| value.map_or(String::new(), |value| format!("{key} = {value}\n")))
    };
    let shape = (
        line("rank", (1..=4096usize).prop_map(|rank| rank.to_string()).boxed()),
        line("alpha", number(1e-3, 1e3).boxed()),
        line(
            "targets",
            prop_oneof![Just("\"all-linear\"".to_owned()), Just("[\"q_proj\"]".to_owned())].boxed(),
        ),
        line("dropout", number(0.0, 0.99).boxed()),
    );
    let learning = (
        line("lr", number(1e-9, 1.0).boxed()),
        line("betas", (0.0..1.0, 0.0..1.0).prop_map(|(a, b): (f64, f64)| format!("[{a:?}, {b:?}]")).boxed()),
        line("schedule", word::<Schedule>().boxed()),
        prop_oneof![
            Just(String::new()),
            any::<u32>().prop_map(|steps| format!("warmup_steps = {steps}\n")),
            (0.0..=1.0).prop_map(|ratio: f64| format!("warmup_ratio = {ratio:?}\n")),
        ],
        prop_oneof![
            Just(String::new()),
            (1..u64::from(u32::MAX)).prop_map(|steps| format!("steps = {steps}\n")),
            number(1e-3, 1e3).prop_map(|epochs| format!("epochs = {epochs}\n")),
        ],
    );
    let data = (
        line("sampling", sampling.boxed()),
        line("on_overlong", word::<OnOverlong>().boxed()),
        line("batch_tasks", word::<BatchTasks>().boxed()),
        line("balance", word::<Balance>().boxed()),
        line("format", word::<Format>().boxed()),
        line("seed", (0..=i64::MAX as u64).prop_map(|seed| seed.to_string()).boxed()),
    );
    (shape, learning, data).prop_map(|(a, b, c)| {
        [a.0, a.1, a.2, a.3, b.0, b.1, b.2, b.3, b.4, c.0, c.1, c.2, c.3, c.4, c.5].concat()
    })
}

/// TOML of a resolved job's value.
fn toml(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(toml).collect::<Vec<_>>().join(", ")),
        Value::Object(keys) => {
            let pairs = keys.iter().map(|(key, value)| format!("{key} = {}", toml(value)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        scalar => scalar.to_string(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read(&bytes)?;
    }

    #[test]
    fn any_text_of_toml_pieces_is_read_or_refused(
        pieces in prop::collection::vec(piece(), 0..40),
        behind in any::<bool>(),
    ) {
        let text = pieces.concat();
        read(if behind { format!("{EXAMPLE}{text}") } else { text }.as_bytes())?;
    }

    #[test]
    fn a_damaged_configuration_is_read_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..4usize, piece()), 1..6),
    ) {
        let mut text: Vec<u8> = EXAMPLE.bytes().collect();
        for (at, removed, inserted) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + removed).min(text.len());
            text.splice(at..end, inserted.into_bytes());
        }
        read(&text)?;
    }

    #[test]
    fn any_value_of_any_key_is_read_or_refused(
        key in proptest::sample::select(keys().iter().map(|key| key.0).collect::<Vec<_>>()),
        value in prop::collection::vec(piece(), 1..4),
    ) {
        read(format!("{HEAD}[[job]]\nname = \"a\"\n{key} = {}\n{TASKS}", value.concat()).as_bytes())?;
    }

    #[test]
    fn a_resolved_job_means_the_same_job(lines in job_lines()) {
        let (config, _) = parse(&format!("{HEAD}[[job]]\nname = \"a\"\n{lines}{TASKS}")).unwrap();
        let resolved = config.resolved(&config.jobs[0]);
        let keys = resolved.as_object().unwrap().iter();
        let lines: String = keys.map(|(key, value)| format!("{key} = {}\n", toml(value))).collect();
        let (again, _) = parse(&format!("{HEAD}[[job]]\n{lines}")).unwrap();
        prop_assert_eq!(&again.jobs, &config.jobs);
        prop_assert_eq!(again.resolved(&again.jobs[0]).to_string(), resolved.to_string());
    }
}
