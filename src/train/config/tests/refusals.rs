//! What is refused: each with the line, what was found and what was wanted.

use super::{HEAD, parse};
use crate::train::config::RunConfig;

/// Refusals of a job's lines: those from line 8 on. `name` is in line 7.
const JOBS: &[(&str, usize, &[&str])] = &[
    // Types and ranges.
    ("rank = 0", 8, &["`rank` is 0", "an integer from 1 to 4096"]),
    ("rank = -1", 8, &["`rank` is -1"]),
    ("rank = 8.0", 8, &["`rank` is 8.0", "an integer"]),
    ("rank = \"8\"", 8, &["`rank` is \"8\""]),
    ("rank = 99999999999999999999", 8, &["`rank` is 99999999999999999999"]),
    ("alpha = 0", 8, &["`alpha` is 0", "a number above 0"]),
    ("alpha = nan", 8, &["`alpha` is nan"]),
    ("targets = []", 8, &["`targets` is an empty list", "\"all-linear\" or a list of module names"]),
    ("targets = \"q_proj\"", 8, &["`targets` is \"q_proj\"", "[\"q_proj\", \"v_proj\"]"]),
    ("targets = [\"q_proj\", 3]", 8, &["`targets` is [\"q_proj\", 3]"]),
    ("use_dora = 1", 8, &["`use_dora` is 1", "true or false"]),
    ("dropout = 1", 8, &["`dropout` is 1", "from 0, below 1"]),
    ("dropout = 0.99999999999", 8, &["`dropout` is 0.99999999999"]),
    ("dropout = -0.1", 8, &["`dropout` is -0.1"]),
    ("lr = 0", 8, &["`lr` is 0", "a number above 0"]),
    ("lr = inf", 8, &["`lr` is inf"]),
    ("lr = 1e999", 8, &["`lr` is 1e999"]),
    ("lr = \"1e-3\"", 8, &["`lr` is \"1e-3\""]),
    ("lr_b_ratio = 0", 8, &["`lr_b_ratio` is 0"]),
    ("weight_decay = -1e-9", 8, &["`weight_decay` is -1e-9", "of at least 0"]),
    ("betas = [0.9, 1]", 8, &["`betas` is [0.9, 1]", "two numbers from 0, below 1"]),
    ("betas = [0.9]", 8, &["`betas` is [0.9]"]),
    ("betas = 0.9", 8, &["`betas` is 0.9"]),
    ("eps = 0.0", 8, &["`eps` is 0.0"]),
    ("schedule = \"cosin\"", 8, &["`schedule` is \"cosin\"", "one of \"constant\", \"linear\", \"cosine\""]),
    ("warmup_steps = -1", 8, &["`warmup_steps` is -1", "an integer of at least 0"]),
    ("warmup_ratio = 1.5", 8, &["`warmup_ratio` is 1.5", "from 0 to 1"]),
    ("max_grad_norm = -1", 8, &["`max_grad_norm` is -1"]),
    ("batch_size = 0", 8, &["`batch_size` is 0", "from 1 to"]),
    ("epochs = 0", 8, &["`epochs` is 0"]),
    ("steps = 0", 8, &["`steps` is 0", "at least 1"]),
    ("shuffle = \"yes\"", 8, &["`shuffle` is \"yes\""]),
    ("seed = -1", 8, &["`seed` is -1"]),
    ("max_length = 1", 8, &["`max_length` is 1", "from 2 to"]),
    ("max_length = 4097", 8, &["`max_length` is 4097", "at most 4096", "`max_tokens_per_step`"]),
    ("on_overlong = \"cut\"", 8, &["\"truncate\", \"drop\", \"error\""]),
    ("sampling = \"round_robin\"", 8, &["\"round-robin\""]),
    ("batch_tasks = true", 8, &["`batch_tasks` is true", "\"mixed\", \"one\""]),
    ("balance = \"tokens\"", 8, &["\"token\", \"sample\", \"task\""]),
    ("early_stop = 1.5", 8, &["`early_stop` is 1.5"]),
    ("max_bad_steps = 0", 8, &["`max_bad_steps` is 0"]),
    ("init_from = \"old\"", 8, &["`init_from` is \"old\"", "\"base\" or \"adapter:<folder>\""]),
    ("init_from = \"adapter:\"", 8, &["`init_from` is \"adapter:\""]),
    ("format = \"prompt/completion\"", 8, &["\"prompt-completion\""]),
    ("train = \"\"", 8, &["`train` is \"\"", "a string that is not empty"]),
    ("train = [\"a\"]", 8, &["`train` is [\"a\"]"]),
    ("valid = 1979-05-27", 8, &["`valid` is the time 1979-05-27"]),
    // Names.
    ("batchsize = 1", 8, &["unknown key `batchsize` in [[job]]", "did you mean `batch_size`?"]),
    ("r = 8", 8, &["unknown key `r` in [[job]]", "it is called `rank` here"]),
    ("lora_alpha = 8", 8, &["it is called `alpha` here"]),
    ("device = \"cpu\"", 8, &["unknown key `device` in [[job]]", "it belongs in [base]"]),
    ("ratio = 0.5", 8, &["it belongs in [[job.task]]"]),
    ("out = \"x\"", 8, &["it belongs in [run]"]),
    ("colour = 1", 8, &["unknown key `colour` in [[job]]", "known are name, task, rank, alpha"]),
    ("\"a\\n\\u001b\" = 1", 8, &["unknown key `a\\n\\u{1b}` in"]),
    ("[job.tasks]\nname = 1", 8, &["unknown key `tasks` in [[job]]", "did you mean `task`?"]),
    // One way of saying a thing.
    ("epochs = 3\nsteps = 100", 9, &["both `epochs` (line 8) and `steps` (line 9)", "wanted one"]),
    (
        "warmup_ratio = 0\n\nwarmup_steps = 0",
        10,
        &["both `warmup_steps` (line 10) and `warmup_ratio` (line 8)"],
    ),
    ("lr = 1\nlr = 2", 9, &["not valid TOML", "duplicate key"]),
    // Where an adapter starts.
    (
        "init_from = \"adapter:x\"\ntrain = \"t\"\nrank = 4",
        10,
        &["job `a` has both `rank` and `init_from` (line 8)", "\"x\""],
    ),
    ("init_from = \"adapter:x\"\ntrain = \"t\"\nuse_dora = false", 10, &["both `use_dora` and `init_from`"]),
    (
        "init_from = \"adapter:runs/a\"\ntrain = \"t\"",
        8,
        &["job `a` starts from \"runs/a\", which job `a` of this run writes"],
    ),
    // Data.
    ("", 6, &["job `a` has no data", "`train` or [[job.task]]"]),
    ("valid = \"v\"", 6, &["job `a` has no data"]),
    ("task = []", 6, &["job `a` has no data"]),
    (
        "train = \"t\"\n[[job.task]]\nname = \"x\"\ntrain = \"u\"",
        8,
        &["both `train` and a list of tasks (line 9)"],
    ),
    ("valid = \"t\"\n[[job.task]]\nname = \"x\"\ntrain = \"u\"", 8, &["both `valid` and a list of tasks"]),
    ("task = 3", 8, &["`task` is 3", "tables with the header [[job.task]]"]),
    ("task = [3]", 8, &["[[job.task]] is 3", "a table"]),
    ("[job.task]\nname = \"x\"", 8, &["`task` is a table", "[[job.task]]"]),
    ("[[job.task]]\ntrain = \"t\"", 8, &["[[job.task]] has no `name`"]),
    ("[[job.task]]\nname = \" x\"\ntrain = \"t\"", 9, &["`name` is \" x\""]),
    ("[[job.task]]\nname = \"x\\n\"\ntrain = \"t\"", 9, &["`name` is \"x\\n\""]),
    ("[[job.task]]\nname = \"x\"\ntrian = \"t\"", 10, &["unknown key `trian` in [[job.task]]", "`train`"]),
    (
        "[[job.task]]\nname = \"x\"\ntrain = \"t\"\nlr = 1",
        11,
        &["`lr` in [[job.task]]", "[defaults] or [[job]]"],
    ),
    (
        "[[job.task]]\nname = \"x\"\ntrain = \"t\"\n[[job.task]]\nname = \"x\"\ntest = \"t\"",
        12,
        &["two tasks `x`, the first in line 9"],
    ),
    (
        "[[job.task]]\nname = \"x\"\ntrain = \"t\"\n[[job.task]]\nname = \"y\"",
        11,
        &["no data for its task `y`"],
    ),
    (
        "[[job.task]]\nname = \"x\"\nvalid = \"t\"\n[[job.task]]\nname = \"y\"\ntest = \"u\"",
        6,
        &["only evaluated", "`train` in at least one"],
    ),
    ("[[job.task]]\nname = \"x\"\ntrain = \"t\"\nratio = 1", 11, &["`ratio` is 1", "above 0, below 1"]),
    ("[[job.task]]\nname = \"x\"\ntrain = \"t\"\nratio = 0.5", 11, &["a `ratio` for every task"]),
    (
        "[[job.task]]\nname = \"x\"\ntrain = \"t\"\n[[job.task]]\nname = \"y\"\nvalid = \"u\"\nratio = 0.5",
        14,
        &["a `ratio` for its task `y`, which is never drawn"],
    ),
    (
        "[[job.task]]\nname = \"x\"\ntrain = \"t\"\n[[job.task]]\nname = \"y\"\ntrain = \"u\"\nratio = 0.5\n[[job.task]]\n\
         name = \"z\"\ntrain = \"v\"\nratio = 0.5",
        18,
        &["ratios that sum to 1", "less than 1"],
    ),
    // Methods and what they need.
    (
        "train = \"t\"\nvalid = \"v\"\ncoba = true\neval_every = 1",
        10,
        &["`coba` is about several tasks, and `a` is the only one"],
    ),
    ("train = \"t\"\npcgrad = true", 9, &["`pcgrad` is about several tasks"]),
    ("sampling = \"temperature\"\ntrain = \"t\"", 8, &["`sampling` = \"temperature\" and no `temperature`"]),
    ("train = \"t\"\ntemperature = 2", 9, &["`temperature`", "`sampling` = \"temperature\" only"]),
    ("temperature = 2\nsampling = \"uniform\"\ntrain = \"t\"", 8, &["`sampling` = \"temperature\" only"]),
    (
        "train = \"t\"\nearly_stop = 2\neval_every = 1",
        9,
        &["`early_stop` goes by validation losses; wanted `valid` for task `a`"],
    ),
    (
        "train = \"t\"\nvalid = \"v\"\nearly_stop = 2",
        10,
        &["`early_stop` goes by validation losses; wanted `eval_every`"],
    ),
];

/// Two tasks of which the second has no validation data.
const TWO: &str =
    "[[job.task]]\nname = \"x\"\ntrain = \"t\"\nvalid = \"v\"\n[[job.task]]\nname = \"y\"\ntrain = \"u\"\n";

const WITH_TWO: &[(&str, usize, &[&str])] = &[
    ("coba = true\neval_every = 1", 8, &["`coba` goes by validation losses; wanted `valid` for task `y`"]),
    (
        "sampling = \"even-then-hard\"\neval_every = 1",
        8,
        &["`sampling` = \"even-then-hard\" goes by", "task `y`"],
    ),
    ("pcgrad = true\nbatch_tasks = \"one\"", 8, &["`pcgrad` compares the tasks of a batch"]),
];

/// Whole files.
const FILES: &[(&str, usize, &[&str])] = &[
    ("", 1, &["no [base]", "`model`"]),
    ("\n\n[base]\nmodel = \"m\"\n", 1, &["no [run]", "`out`"]),
    ("[base]\n\n[run]\nout = \"o\"\n[[job]]\n", 1, &["[base] has no `model`"]),
    ("[base]\nmodel = \"m\"\n[run]\nseed = 1\n", 3, &["[run] has no `out`"]),
    ("[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n", 1, &["no job", "[[job]]"]),
    ("job = []\n[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n", 1, &["no job"]),
    ("[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[job]\nname = \"a\"\n", 5, &["`job` is a table", "[[job]]"]),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[[jobs]]\nname = \"a\"\n",
        5,
        &["unknown key `jobs` in the file", "`job`"],
    ),
    ("lr = 1\n[base]\nmodel = \"m\"\n", 1, &["unknown key `lr` in the file", "[defaults] or [[job]]"]),
    ("base = 3\n", 1, &["[base] is 3", "a table"]),
    ("[base]\nmodel = \"m\"\nlr = 1\n", 3, &["unknown key `lr` in [base]", "[defaults] or [[job]]"]),
    (
        "[base]\nmodel = \"m\"\ndevice = \"gpu\"\n[run]\nout = \"o\"\n",
        3,
        &["`device` is \"gpu\"", "\"cuda:N\""],
    ),
    ("[base]\nmodel = \"m\"\ndevice = \"cuda:\"\n[run]\nout = \"o\"\n", 3, &["`device` is \"cuda:\""]),
    ("[base]\nmodel = \"m\"\n[run]\nout = \"o\"\noutput_dir = \"x\"\n", 5, &["it is called `out` here"]),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\nr = 3\n",
        5,
        &["it is called `rank` here; it belongs in [defaults] or [[job]]"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\nmax_tokens_per_step = 1\n",
        5,
        &["`max_tokens_per_step` is 1", "from 2"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\nmax_concurrent_jobs = 0\n",
        5,
        &["`max_concurrent_jobs` is 0"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\nrecompute = \"all\"\n",
        5,
        &["\"none\", \"mlp\", \"block\""],
    ),
    ("[base]\nmodel = \"m\"\n[run]\nout = \"o\"\ntensorboard = \"yes\"\n", 5, &["`tensorboard` is \"yes\""]),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[mixture]\nkind = \"topk\"\n",
        5,
        &["[mixture]", "trained routers come later"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"m\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\n",
        4,
        &["`out` is \"m\"", "the base's folder (line 2)"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"x/../m/./y\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\n",
        4,
        &["the base's folder"],
    ),
    (
        "[base]\nmodel = \"o/a/m\"\n[run]\nout = \"o\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\n",
        6,
        &["job `a` would write into", "holds the base"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[defaults]\nname = \"a\"\n",
        6,
        &["unknown key `name` in [defaults]", "[[job]]"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[defaults]\nlr = 0\n[[job]]\nname = \"a\"\ntrain = \"t\"\nlr = 1\n",
        6,
        &["`lr` is 0"],
    ),
    (
        "[base]\nmodel = \"m\"\n[run]\nout = \"o\"\n[[defaults.task]]\nname = \"x\"\ntrain = \"t\"\n[[job]]\nname = \"a\"\n\
         valid = \"v\"\n",
        10,
        &["job `a` has `valid` and takes its tasks from [defaults]"],
    ),
    ("[base\nmodel = 1", 1, &["not valid TOML"]),
    ("[base]\nmodel = \"m\n", 2, &["not valid TOML"]),
    ("[base]\nmodel = [\n", 2, &["not valid TOML"]),
    ("[base]\nmodel = [\n\n", 2, &["not valid TOML"]),
    ("[base]\nmodel = \"\"\"\n", 2, &["not valid TOML"]),
    ("[base]\nmodel = \"m\"\n[base]\n", 3, &["not valid TOML", "duplicate key"]),
];

/// Names of jobs; the name stands in line 7.
const NAMES: &[(&str, &[&str])] = &[
    ("\"\"", &["`name` is \"\""]),
    ("3", &["`name` is 3"]),
    ("\"a/b\"", &["`name` is \"a/b\"", "a slash"]),
    ("\"..\"", &["`..`"]),
    ("\".\"", &["`name` is \".\""]),
    ("\"a \"", &["space"]),
    ("\"a,b\"", &["comma"]),
    ("\"a\\u0000\"", &["control character"]),
    ("\"auto\"", &["reserved"]),
    ("\"base\"", &["the base model's name"]),
    ("\"Report.html\"", &["a file of the run"]),
];

fn check(text: &str, line: usize, parts: &[&str]) {
    let error = parse(text).err().unwrap_or_else(|| panic!("not refused:\n{text}")).to_string();
    assert!(
        error.starts_with(&format!("here/CONFIG.toml:{line}: ")),
        "{error}; wanted line {line} of\n{text}"
    );
    for part in parts {
        assert!(error.contains(part), "{error}; wanted {part:?}");
    }
    assert!(!error.contains(char::is_control), "{error:?}");
}

#[test]
fn a_job_is_refused_by_line_with_what_was_found_and_wanted() {
    for (lines, line, parts) in JOBS {
        check(&format!("{HEAD}[[job]]\nname = \"a\"\n{lines}\n"), *line, parts);
    }
    for (lines, line, parts) in WITH_TWO {
        check(&format!("{HEAD}[[job]]\nname = \"a\"\n{lines}\n{TWO}"), *line, parts);
        // Where the setting stands is what is named, also when it is inherited.
        let inherited = format!("{HEAD}[defaults]\n\n{lines}\n[[job]]\nname = \"a\"\n{TWO}");
        check(&inherited, *line, parts);
    }
    for (name, parts) in NAMES {
        check(&format!("{HEAD}[[job]]\nname = {name}\ntrain = \"t\"\n"), 7, parts);
    }
    check(&format!("{HEAD}[[job]]\ntrain = \"t\"\n"), 6, &["[[job]] has no `name`"]);
}

#[test]
fn a_file_is_refused_by_line_with_what_was_found_and_wanted() {
    for (text, line, parts) in FILES {
        check(text, *line, parts);
        check(&text.replace('\n', "\r\n"), *line, parts);
    }
}

#[test]
fn two_jobs_never_write_the_same_folder() {
    let jobs = |one: &str, two: &str| {
        format!("{HEAD}[[job]]\nname = \"{one}\"\ntrain = \"t\"\n[[job]]\nname = \"{two}\"\ntrain = \"t\"\n")
    };
    check(&jobs("a", "a"), 10, &["job name `a` is given twice, first in line 7"]);
    check(&jobs("a", "A"), 10, &["jobs `A` and `a` (line 7) may write the same folder"]);
    assert!(parse(&jobs("a", "b")).is_ok());
    let chained = jobs("a", "b") + "init_from = \"adapter:./runs/a\"\n";
    check(&chained, 12, &["job `b` starts from \"./runs/a\", which job `a` of this run writes"]);
}

#[cfg(unix)]
#[test]
fn a_link_to_the_base_is_the_base() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("models/m")).unwrap();
    std::os::unix::fs::symlink("models/m", folder.path().join("link")).unwrap();
    let text =
        "[base]\nmodel = \"models/m\"\n[run]\nout = \"link/runs\"\n[[job]]\nname = \"a\"\ntrain = \"t\"\n";
    let path = folder.path().join("CONFIG.toml");
    let error = RunConfig::parse(&path, text.as_bytes()).unwrap_err().to_string();
    assert!(error.contains(":4: `out` is \"link/runs\", in the base's folder"), "{error}");
    assert!(RunConfig::parse(&path, text.replace("link/runs", "runs").as_bytes()).is_ok());
    // The base's name is the folder's, whatever the link is called.
    let named = text.replace("link/runs", "runs").replace("models/m", "link").replace("\"a\"", "\"m\"");
    let error = RunConfig::parse(&path, named.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("the base model's name"), "{error}");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("CONFIG.toml");
    let error = RunConfig::read(&path).unwrap_err().to_string();
    assert!(error.contains("CONFIG.toml: cannot open"), "{error}");
    let error = RunConfig::read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    std::fs::write(&path, b"[base]\nmodel = \"\xff\"\n").unwrap();
    let error = RunConfig::read(&path).unwrap_err().to_string();
    assert!(error.ends_with("CONFIG.toml:2: not UTF-8"), "{error}");
    std::fs::write(&path, b"[base]\n\xff").unwrap();
    let error = RunConfig::read(&path).unwrap_err().to_string();
    assert!(error.ends_with("CONFIG.toml:2: not UTF-8"), "{error}");
    std::fs::write(&path, vec![b'#'; (4 << 20) + 1]).unwrap();
    let error = RunConfig::read(&path).unwrap_err().to_string();
    assert!(error.ends_with("CONFIG.toml:1: larger than 4 MiB"), "{error}");
    std::fs::write(&path, format!("\u{feff}{HEAD}[[job]]\nname = \"a\"\ntrain = \"t\"\n")).unwrap();
    assert_eq!(RunConfig::read(&path).unwrap().0.model, folder.path().join("base"));
}
