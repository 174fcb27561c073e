//! What configurations mean, what is refused and where, and that nothing panics.

mod documentation;
mod properties;
mod refusals;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;

/// What every configuration here starts with; jobs follow from line 6.
const HEAD: &str = "[base]\nmodel = \"base\"\n[run]\nout = \"runs\"\nmax_tokens_per_step = 4096\n";

fn parse(text: &str) -> Result<(RunConfig, Vec<String>), ConfigError> {
    RunConfig::parse(Path::new("here/CONFIG.toml"), text.as_bytes())
}

/// The only job of a configuration with these lines for it.
fn job(lines: &str) -> (RunConfig, JobConfig) {
    let text = format!("{HEAD}[[job]]\nname = \"a\"\n{lines}\n");
    let (config, _) = parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let job = config.jobs[0].clone();
    (config, job)
}

fn resolved(lines: &str) -> Value {
    let (config, job) = job(lines);
    config.resolved(&job)
}

/// `[base]`, `[run]` and `[defaults]` as the documentation shows them.
const EXAMPLE: &str = r#"
[base]
model  = "examples/base"        # Hugging Face folder
device = "auto"

[run]
out  = "runs/first"             # <out>/<job>/… is written
seed = 0
max_tokens_per_step   = 4096    # rows of all jobs' micro-batches in one forward
max_concurrent_jobs   = 16
recompute = "none"

[defaults]                      # inherited by every job; any key below may stand here
rank = 8
alpha = 16
targets = "all-linear"          # or ["q_proj", "v_proj"]
lr = 1e-3
weight_decay = 0.01
betas = [0.9, 0.999]
eps = 1e-8
schedule = "cosine"             # constant | linear | cosine
warmup_steps = 10               # or warmup_ratio
max_grad_norm = 1.0             # 0 = off
batch_size = 16                 # samples per optimizer step
epochs = 3                      # or steps
shuffle = true
max_length = 1024

[[job]]
name  = "headline-sentiment"
train = "examples/tasks/headline-sentiment/train.jsonl"
valid = "examples/tasks/headline-sentiment/valid.jsonl"
init_from = "base"              # or "adapter:<folder>": continue from these weights

[[job]]                         # several tasks, one adapter
name = "all-in-one"
sampling = "annealed"
  [[job.task]]
  name = "headline-sentiment"
  train = "one.jsonl"
  valid = "two.jsonl"
  [[job.task]]
  name = "general"
  train = "three.jsonl"
  ratio = 0.1
"#;

#[test]
fn the_documented_example_means_what_it_says() {
    let (config, notes) = parse(EXAMPLE).unwrap();
    assert_eq!(notes, [""; 0]);
    let folder = Path::new("here");
    let task = |name: &str, train: &str, valid: Option<&str>, ratio| TaskConfig {
        name: name.to_owned(),
        train: Some(folder.join(train)),
        valid: valid.map(|valid| folder.join(valid)),
        test: None,
        ratio,
        format: None,
    };
    let one = JobConfig {
        name: "headline-sentiment".to_owned(),
        adapter: AdapterConfig::Fresh {
            rank: 8,
            alpha: 16.0,
            targets: Targets::AllLinear,
            use_rslora: false,
            use_dora: false,
            dropout: 0.0,
        },
        optimizer: OptimizerConfig {
            lr: 1e-3,
            lr_b_ratio: 1.0,
            weight_decay: 0.01,
            betas: [0.9, 0.999],
            eps: 1e-8,
            schedule: Schedule::Cosine,
            warmup: Warmup::Steps(10),
            max_grad_norm: 1.0,
        },
        batch_size: 16,
        length: Length::Epochs(3.0),
        shuffle: true,
        seed: 0,
        max_length: 1024,
        on_overlong: OnOverlong::Truncate,
        packing: false,
        sampling: Sampling::Proportional,
        batch_tasks: BatchTasks::Mixed,
        balance: Balance::Token,
        coba: false,
        pcgrad: false,
        eval_every: 0,
        eval_max_tokens: 64,
        early_stop: None,
        save_every: 0,
        max_bad_steps: 10,
        tasks: vec![task(
            "headline-sentiment",
            "examples/tasks/headline-sentiment/train.jsonl",
            Some("examples/tasks/headline-sentiment/valid.jsonl"),
            None,
        )],
    };
    let two = JobConfig {
        name: "all-in-one".to_owned(),
        sampling: Sampling::Annealed,
        tasks: vec![
            task("headline-sentiment", "one.jsonl", Some("two.jsonl"), None),
            task("general", "three.jsonl", None, Some(0.1)),
        ],
        ..one.clone()
    };
    let wanted = RunConfig {
        folder: folder.to_owned(),
        model: folder.join("examples/base"),
        device: "auto".to_owned(),
        out: folder.join("runs/first"),
        seed: 0,
        max_tokens_per_step: 4096,
        max_concurrent_jobs: 16,
        recompute: Recompute::None,
        tensorboard: false,
        jobs: vec![one, two],
    };
    assert_eq!(config, wanted);
}

#[test]
fn absent_keys_have_the_values_that_the_example_shows() {
    let (start, end) = (EXAMPLE.find("[defaults]").unwrap(), EXAMPLE.find("[[job]]").unwrap());
    let without = format!("{}{}", &EXAMPLE[..start], &EXAMPLE[end..]);
    let mut without_settings = without.clone();
    for line in ["device = ", "seed = ", "max_tokens_per_step ", "max_concurrent_jobs ", "recompute "] {
        let start = without_settings.find(line).unwrap();
        let end = start + without_settings[start..].find('\n').unwrap();
        without_settings.replace_range(start..end, "");
    }
    assert_eq!(parse(&without).unwrap(), parse(EXAMPLE).unwrap());
    assert_eq!(parse(&without_settings).unwrap(), parse(EXAMPLE).unwrap());
}

/// Every key of jobs with a value that is not its default, what it resolves to, and what it needs beside it.
fn keys() -> Vec<(&'static str, &'static str, Value, &'static str)> {
    vec![
        ("rank", "3", json!(3), ""),
        ("alpha", "7", json!(7.0), ""),
        ("targets", "[\"q_proj\", \"mlp.up_proj\"]", json!(["q_proj", "mlp.up_proj"]), ""),
        ("use_rslora", "true", json!(true), ""),
        ("use_dora", "true", json!(true), ""),
        ("dropout", "0.1", json!(0.1), ""),
        ("lr", "2e-4", json!(2e-4), ""),
        ("lr_b_ratio", "16", json!(16.0), ""),
        ("weight_decay", "0", json!(0.0), ""),
        ("betas", "[0.8, 0.95]", json!([0.8, 0.95]), ""),
        ("eps", "1e-6", json!(1e-6), ""),
        ("schedule", "\"linear\"", json!("linear"), ""),
        ("warmup_steps", "0", json!(0), ""),
        ("warmup_ratio", "0.05", json!(0.05), ""),
        ("max_grad_norm", "0", json!(0.0), ""),
        ("batch_size", "0x20", json!(32), ""),
        ("epochs", "0.5", json!(0.5), ""),
        ("steps", "1_000", json!(1000), ""),
        ("shuffle", "false", json!(false), ""),
        ("seed", "9223372036854775807", json!(i64::MAX), ""),
        ("max_length", "4096", json!(4096), ""),
        ("on_overlong", "\"drop\"", json!("drop"), ""),
        ("packing", "true", json!(true), ""),
        ("sampling", "\"round-robin\"", json!("round-robin"), ""),
        ("temperature", "2.5", json!(2.5), "sampling = \"temperature\""),
        ("batch_tasks", "\"one\"", json!("one"), ""),
        ("balance", "\"task\"", json!("task"), ""),
        ("coba", "true", json!(true), "eval_every = 1"),
        ("pcgrad", "true", json!(true), ""),
        ("eval_every", "50", json!(50), ""),
        ("eval_max_tokens", "0", json!(0), ""),
        ("early_stop", "3", json!(3), "eval_every = 1"),
        ("save_every", "20", json!(20), ""),
        ("max_bad_steps", "1", json!(1), ""),
        ("init_from", "\"adapter:there\"", json!("adapter:there"), ""),
    ]
}

const TASKS: &str = "[[job.task]]\nname = \"one\"\ntrain = \"1\"\nvalid = \"2\"\n[[job.task]]\nname = \"two\"\n\
                     train = \"3\"\nvalid = \"4\"\ntest = \"5\"\nratio = 0.25\nformat = \"text\"\n";

#[test]
fn every_key_sets_what_it_names_in_a_job_and_in_the_defaults() {
    let plain = resolved(TASKS);
    for (key, value, wanted, beside) in keys() {
        let lines = format!("{key} = {value}\n{beside}\n");
        let given = resolved(&format!("{lines}{TASKS}"));
        assert_eq!(given[key], wanted, "{key}");
        assert_ne!(plain[key], wanted, "{key}: not its default");
        let inherited = format!("{HEAD}[defaults]\n{lines}[[job]]\nname = \"a\"\n{TASKS}");
        let (config, _) = parse(&inherited).unwrap_or_else(|error| panic!("{key}: {error}"));
        assert_eq!(config.resolved(&config.jobs[0]), given, "{key}");
        // A job's own keys come first.
        let (config, _) =
            parse(&inherited.replace("name = \"a\"", &format!("name = \"a\"\n{}", opposite(key)))).unwrap();
        assert_ne!(config.resolved(&config.jobs[0])[key], wanted, "{key}");
    }
    let known: Vec<&str> = keys().iter().map(|key| key.0).collect();
    let data = ["name", "task", "format", "train", "valid", "test"];
    for key in keys::JOB_KEYS {
        assert!(known.contains(key) != data.contains(key), "{key}");
    }
}

/// A line that takes back what the defaults say of a key.
fn opposite(key: &str) -> String {
    match key {
        "targets" => "targets = \"all-linear\"".to_owned(),
        "betas" => "betas = [0.9, 0.999]".to_owned(),
        "schedule" => "schedule = \"constant\"".to_owned(),
        "on_overlong" => "on_overlong = \"error\"".to_owned(),
        "sampling" | "temperature" => "sampling = \"uniform\"".to_owned(),
        "batch_tasks" => "batch_tasks = \"mixed\"".to_owned(),
        "balance" => "balance = \"sample\"".to_owned(),
        "init_from" => "init_from = \"base\"".to_owned(),
        "use_rslora" | "use_dora" | "packing" | "coba" | "pcgrad" => format!("{key} = false"),
        "shuffle" => "shuffle = true".to_owned(),
        "warmup_ratio" => "warmup_steps = 3".to_owned(),
        "warmup_steps" => "warmup_ratio = 0.5".to_owned(),
        "epochs" => "steps = 3".to_owned(),
        "steps" => "epochs = 7".to_owned(),
        "dropout" => "dropout = 0".to_owned(),
        "early_stop" => "early_stop = 0".to_owned(),
        key => format!("{key} = 2"),
    }
}

#[test]
fn a_resolved_job_has_every_key_in_the_order_of_the_documentation() {
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let value = resolved(TASKS);
    assert_eq!(
        keys(&value),
        "name init_from rank alpha targets use_rslora use_dora dropout lr lr_b_ratio weight_decay betas eps schedule \
         warmup_steps max_grad_norm batch_size epochs shuffle seed max_length on_overlong packing sampling batch_tasks \
         balance coba pcgrad eval_every eval_max_tokens early_stop save_every max_bad_steps task"
    );
    assert_eq!(
        value["task"],
        json!([
            {"name": "one", "train": "1", "valid": "2"},
            {"name": "two", "train": "3", "valid": "4", "test": "5", "ratio": 0.25, "format": "text"},
        ])
    );
    let continued = resolved(&format!("init_from = \"adapter:there\"\n{TASKS}"));
    assert!(keys(&continued).starts_with("name init_from dropout lr "), "{continued}");
}

#[test]
fn data_and_formats_are_inherited_as_whole_lists() {
    let files = |text: &str| {
        let (config, _) = parse(&format!("{HEAD}{text}")).unwrap_or_else(|error| panic!("{error}\n{text}"));
        config.jobs.iter().map(|job| config.resolved(job)["task"].clone()).collect::<Vec<_>>()
    };
    // A sweep: many jobs on the same data.
    assert_eq!(
        files(
            "[defaults]\ntrain = \"t\"\nvalid = \"v\"\nformat = \"alpaca\"\n[[job]]\nname = \"a\"\n[[job]]\nname = \"b\"\n\
             valid = \"w\"\n[[job]]\nname = \"c\"\n[[job.task]]\nname = \"x\"\ntrain = \"y\"\n"
        ),
        [
            json!([{"name": "a", "train": "t", "valid": "v", "format": "alpaca"}]),
            json!([{"name": "b", "train": "t", "valid": "w", "format": "alpaca"}]),
            json!([{"name": "x", "train": "y", "format": "alpaca"}]),
        ]
    );
    assert_eq!(
        files(
            "[[defaults.task]]\nname = \"x\"\ntrain = \"t\"\nformat = \"text\"\n[[defaults.task]]\nname = \"guard\"\n\
             test = \"g\"\n[[job]]\nname = \"a\"\nformat = \"tokens\"\n[[job]]\nname = \"b\"\ntrain = \"u\"\n"
        ),
        [
            json!([{"name": "x", "train": "t", "format": "text"}, {"name": "guard", "test": "g", "format": "tokens"}]),
            json!([{"name": "b", "train": "u"}]),
        ]
    );
}

#[test]
fn paths_are_relative_to_the_folder_of_the_file() {
    let text = "[base]\nmodel = \"/models/m\"\n[run]\nout = \"../runs\"\n[[job]]\nname = \"a\"\ntrain = \"/data/t\"\n\
                valid = \"v\"\ninit_from = \"adapter:old/one\"\n";
    let path = |text: &str| PathBuf::from(text);
    for (file, folder) in [("a/b.toml", "a"), ("b.toml", ""), ("/a/b.toml", "/a")] {
        let (config, _) = RunConfig::parse(Path::new(file), text.as_bytes()).unwrap();
        let job = &config.jobs[0];
        assert_eq!((&config.model, &config.out), (&path("/models/m"), &path(folder).join("../runs")));
        assert_eq!(job.tasks[0].train, Some(path("/data/t")));
        assert_eq!(job.tasks[0].valid, Some(path(folder).join("v")));
        let AdapterConfig::From { folder: start, .. } = &job.adapter else { panic!("{job:?}") };
        assert_eq!(*start, path(folder).join("old/one"));
        // Wherever the file is reached from, the same.
        let resolved = config.resolved(job);
        assert_eq!(resolved["init_from"], "adapter:old/one");
        assert_eq!(resolved["task"], json!([{"name": "a", "train": "/data/t", "valid": "v"}]));
    }
}

#[test]
fn a_length_that_is_asked_for_fits_in_a_step() {
    let text = format!("{HEAD}[[job]]\nname = \"a\"\ntrain = \"t\"\n").replace("= 4096", "= 300");
    assert_eq!(parse(&text).unwrap().0.jobs[0].max_length, 1024, "whatever fits a step");
    let text = text + "max_length = 300\n";
    assert_eq!(parse(&text).unwrap().0.jobs[0].max_length, 300);
    let error = parse(&text.replace("max_length = 300", "max_length = 301")).unwrap_err().to_string();
    assert!(error.starts_with("here/CONFIG.toml:9: `max_length` is 301; wanted at most 300"), "{error}");
}

#[test]
fn uncommon_settings_are_noted_once_and_allowed() {
    let text = format!(
        "{HEAD}[defaults]\nlr = 0.5\nsteps = 5\nwarmup_steps = 5\npacking = true\n[[job]]\nname = \"a\"\ntrain = \"t\"\n\
         valid = \"./t\"\nbatch_size = 1\n[[job]]\nname = \"b\"\nweight_decay = 0\nepochs = 100\nformat = \"tokens\"\n\
         train = \"t\"\nvalid = \"v\"\ntest = \"v\"\n"
    );
    let (_, notes) = parse(&text).unwrap();
    let wanted = [
        ("7: ", "`lr` is 0.5; usual for fine-tuning are 0.00002 to 0.001"),
        ("15: ", "`batch_size` is 1; usual for fine-tuning are 16 to 64"),
        ("9: ", "the learning rate rises for 5 steps, and job `a` has 5"),
        ("12: ", "task `a` of job `a` has the same file for `train` and `valid`"),
        ("19: ", "`epochs` is 100; usual for fine-tuning are 3 to 10"),
        ("18: ", "`weight_decay` is 0; usual for fine-tuning are 0.01 to 0.1"),
        ("10: ", "`packing` joins documents of the format \"text\", and job `b` has none"),
        ("17: ", "task `b` of job `b` has the same file for `valid` and `test`"),
    ];
    assert_eq!(notes.len(), wanted.len(), "{notes:#?}");
    for (note, (line, text)) in notes.iter().zip(wanted) {
        assert!(note.starts_with(&format!("here/CONFIG.toml:{line}{text}")), "{note}");
    }
}
