//! `loramux demo`: the guided first run. An adapter for every bundled task is trained, all side by side; then every test
//! question goes through the bare base and through its task's fresh adapter, in one batch.
//!
//! All requests go to one engine at once, question by question around the tasks, so that the steps hold rows of the
//! base and of all adapters side by side. Answers are greedy; one counts as right when it is the expected text but for
//! white space at its ends.

mod examples;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{Align, Table, print, shorten};
use super::serving::EngineArgs;
use super::train::train;
use super::{Failure, Outcome, Verbosity};
use crate::engine::request::Request;
use crate::engine::{Engine, Stream};
use crate::model::{Base, ChatOptions};
use crate::train::config::{Length, RunConfig};
use crate::train::folder::Existing;
use crate::train::run::Run;
use examples::{Sample, Task};

/// Most tokens of an answer.
const MAX_TOKENS: usize = 24;
/// Columns of a question and of an answer in the table.
const QUESTION_WIDTH: usize = 40;
const ANSWER_WIDTH: usize = 28;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder with `base`, `adapters` and `tasks` [default: `examples` in the current folder or one above it, or above
    /// this program]
    #[arg(long, env = "LORAMUX_EXAMPLES", value_name = "DIR")]
    examples: Option<PathBuf>,
    /// Questions per task; 0 asks all
    #[arg(long, env = "LORAMUX_LIMIT", default_value_t = 0, value_name = "N")]
    limit: usize,
    /// Serve the bundled adapters, train none
    #[arg(long)]
    bundled: bool,
    /// Optimizer steps of each adapter
    #[arg(long, env = "LORAMUX_STEPS", default_value_t = 200, value_name = "N", conflicts_with = "bundled",
          value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Folder for the trained adapters and the report, replaced each time [default: `loramux-demo` in the system's
    /// temporary folder]
    #[arg(long, env = "LORAMUX_OUTPUT", value_name = "DIR", conflicts_with = "bundled")]
    output: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(crate) fn run(args: &Args, verbosity: Verbosity) -> Result<Outcome, Failure> {
    let options = args.engine.options()?;
    let folder = examples::find(args.examples.as_deref())?;
    let mut tasks = examples::read_tasks(&folder, args.limit)?;
    if !args.bundled {
        let trained = train_adapters(args, &folder, &tasks, verbosity)?;
        for task in &mut tasks {
            task.adapter = trained.join(&task.name);
        }
    }
    let base = Base::open(&folder.join(examples::BASE)).map_err(Failure::usage)?;
    let engine = Engine::start(Arc::new(base), options).map_err(Failure::usage)?;
    for task in &tasks {
        engine.load_adapter(&task.name, &task.adapter).map_err(Failure::usage)?;
    }
    let served = serve(&engine, &tasks, verbosity)?;
    print(&report(&engine, &tasks, &served))?;
    Ok(Outcome::Done)
}

/// Trains an adapter for each task as the examples' own configuration says; returns the folder of the results.
fn train_adapters(
    args: &Args,
    folder: &Path,
    tasks: &[Task],
    verbosity: Verbosity,
) -> Result<PathBuf, Failure> {
    let (mut config, _) = RunConfig::read(&folder.join(examples::TRAINING)).map_err(Failure::usage)?;
    config.out = args.output.clone().unwrap_or_else(|| std::env::temp_dir().join("loramux-demo"));
    config.jobs.retain(|job| tasks.iter().any(|task| task.name == job.name));
    if let Some(task) = tasks.iter().find(|task| config.jobs.iter().all(|job| job.name != task.name)) {
        let problem =
            format!("{}: no job for the task `{}`", folder.join(examples::TRAINING).display(), task.name);
        return Err(Failure::Usage(problem));
    }
    for job in &mut config.jobs {
        job.length = Length::Steps(args.steps);
        // The demo asks the test questions itself, of base and adapters side by side.
        job.eval_max_tokens = 0;
    }
    let out = config.out.clone();
    let run = Run::open(config).map_err(Failure::usage)?;
    let results = train(run, args.engine.threads(), Existing::Replace, verbosity)?;
    match results.into_iter().find_map(|result| result.failure.map(|failure| (result.name, failure))) {
        Some((name, failure)) => Err(Failure::Failed(format!("job {name}: {failure}"))),
        None => Ok(out),
    }
}

/// What came back.
struct Served {
    /// By task, then by sample.
    answers: Vec<Vec<Answers>>,
    /// Tokens that had to be computed: every token of a sequence but its last.
    tokens: u64,
    time: Duration,
}

/// The answers to one question.
struct Answers {
    base: String,
    adapter: String,
}

/// Asks every question twice, all at once, and waits for the answers.
fn serve(engine: &Engine, tasks: &[Task], verbosity: Verbosity) -> Result<Served, Failure> {
    let mut questions = Vec::new();
    let longest = tasks.iter().map(|task| task.samples.len()).max().unwrap_or(0);
    for index in 0..longest {
        for (number, task) in tasks.iter().enumerate() {
            if let Some(sample) = task.samples.get(index) {
                questions.push((number, sample, encode(engine.base(), sample)?));
            }
        }
    }
    let bar = progress_bar(2 * questions.len() as u64, verbosity);
    let started = Instant::now();
    let mut waiting = Vec::with_capacity(questions.len());
    for (number, sample, prompt) in questions {
        let ask = |adapters| submit(engine, sample, prompt.clone(), adapters);
        waiting.push((number, sample, ask(vec![])?, ask(vec![(tasks[number].name.clone(), 1.0)])?));
    }
    let mut answers: Vec<Vec<Answers>> = tasks.iter().map(|_| Vec::new()).collect();
    let mut tokens = 0;
    for (number, sample, base, adapter) in waiting {
        let mut answer = |stream: Stream| {
            let completion = stream.wait().map_err(|error| sample.failure(&error))?;
            bar.inc(1);
            let choice = completion.choices.into_iter().next();
            let choice = choice.ok_or_else(|| sample.failure(&"no answer came back"))?;
            let sequence = completion.prompt_token_ids.len() + choice.token_ids.len();
            tokens += sequence.saturating_sub(1) as u64;
            Ok::<_, Failure>(choice.text)
        };
        let both = Answers { base: answer(base)?, adapter: answer(adapter)? };
        answers[number].push(both);
    }
    bar.finish_and_clear();
    Ok(Served { answers, tokens, time: started.elapsed() })
}

/// The question as the model reads it. The template writes the special tokens, so encoding adds none.
fn encode(base: &Base, sample: &Sample) -> Result<Vec<u32>, Failure> {
    let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
    let text = base.render_chat(&sample.question, &options).map_err(|error| sample.failure(&error))?;
    base.tokenizer.encode(&text, false).map_err(|error| sample.failure(&error))
}

fn submit(
    engine: &Engine,
    sample: &Sample,
    prompt: Vec<u32>,
    adapters: Vec<(String, f32)>,
) -> Result<Stream, Failure> {
    let mut request = Request::new(prompt);
    request.adapters = adapters;
    request.sampling.temperature = 0.0;
    request.stop.max_tokens = Some(MAX_TOKENS);
    engine.submit(request).map_err(|error| sample.failure(&error))
}

fn report(engine: &Engine, tasks: &[Task], served: &Served) -> String {
    let mut examples = Table::new(&[Align::Left; 4]);
    examples.row(["task", "its first question", "base", "adapter"]);
    let mut accuracy = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Right]);
    accuracy.row(["task", "questions", "base %", "adapter %"]);
    for (task, answers) in tasks.iter().zip(&served.answers) {
        let (sample, first) = (&task.samples[0], &answers[0]);
        examples.row([
            task.name.clone(),
            shorten(sample.asked.trim(), QUESTION_WIDTH),
            shorten(first.base.trim(), ANSWER_WIDTH),
            shorten(first.adapter.trim(), ANSWER_WIDTH),
        ]);
        let percent = |answer: fn(&Answers) -> &str| {
            let right = |(sample, answers): &(&Sample, &Answers)| answer(answers).trim() == sample.expected;
            let count = task.samples.iter().zip(answers).filter(right).count();
            format!("{:.1}", 100.0 * count as f64 / answers.len() as f64)
        };
        accuracy.row([
            task.name.clone(),
            answers.len().to_string(),
            percent(|answers| &answers.base),
            percent(|answers| &answers.adapter),
        ]);
    }
    let (stats, seconds) = (engine.stats(), served.time.as_secs_f64());
    let requests = 2 * served.answers.iter().map(Vec::len).sum::<usize>();
    format!(
        "One base and {} adapters, {requests} requests in one batch.\n\n{examples}\n{accuracy}\n\
         {} rows computed for {} tokens in {} steps; {} tokens generated in {seconds:.1} s ({:.0} tokens/s)\n",
        tasks.len(),
        stats.rows(),
        served.tokens,
        stats.steps(),
        stats.generated(),
        stats.generated() as f64 / seconds,
    )
}

/// A bar on standard error; hidden where that is no terminal.
fn progress_bar(requests: u64, verbosity: Verbosity) -> ProgressBar {
    if !verbosity.talks() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} answers {per_sec} eta {eta}");
    ProgressBar::new(requests).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
