//! `loramux run-batch`: a file of OpenAI requests in, a file of answers out, in the same order.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};

use super::serving::ModelArgs;
use super::{Failure, Outcome, Verbosity};
use crate::engine::Stream;
use crate::openai::batch::output::{Existing, OrderedWriter, check, open};
use crate::openai::batch::{
    BatchLine, Ids, InvalidLine, Lines, answer_line, failure_line, invalid_line, scan,
};
use crate::openai::request::{ParsedRequest, parse};
use crate::openai::response::{Labels, body};
use crate::openai::{ApiError, Served, answer};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// File of requests: one JSON object a line, OpenAI batch format
    #[arg(short, long, value_name = "FILE")]
    input_file: PathBuf,
    /// File for the answers
    #[arg(short, long, value_name = "FILE")]
    output_file: PathBuf,
    /// Replace the output if it exists
    #[arg(long, conflicts_with = "resume")]
    force: bool,
    /// Keep the answers of an earlier run and append the rest
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(args: &Args, verbosity: Verbosity) -> Result<Outcome, Failure> {
    let batch = scan(&args.input_file).map_err(Failure::usage)?;
    let existing = match (args.force, args.resume) {
        (true, _) => Existing::Overwrite,
        (_, true) => Existing::Continue,
        _ => Existing::Refuse,
    };
    // Everything that can be refused is, before an output is touched; and what needs no model, before one is loaded.
    check(&args.input_file, &args.output_file, existing).map_err(Failure::usage)?;
    let (engine, failed) = args.model.start(verbosity)?;
    let (writer, progress) = open(&args.input_file, &args.output_file, existing).map_err(Failure::usage)?;
    let mut served = Served::new(&engine, &args.model.served_model_name);
    for adapter in &failed {
        served.mark_failed(&adapter.name, adapter.reason.clone());
    }
    let started = Instant::now();
    let bar = progress_bar(batch.lines as u64, progress.done as u64, verbosity);
    let mut run = Run {
        served: &served,
        writer,
        ids: Ids::new(format!("{}:{:?}", std::process::id(), SystemTime::now())),
        waiting: VecDeque::new(),
        failed: progress.failed,
        bar,
    };
    // Enough lines in flight to keep every step full while finished ones wait for their turn to be written.
    let window = 4 * engine.options().max_num_seqs;
    let lines = Lines::open(&args.input_file).map_err(Failure::failed)?;
    for (index, line) in lines.enumerate().skip(progress.done) {
        run.take(index, line.map_err(Failure::failed)?);
        while run.waiting.len() >= window {
            run.finish_oldest()?;
        }
    }
    while !run.waiting.is_empty() {
        run.finish_oldest()?;
    }
    run.bar.finish_and_clear();
    let failures = run.failed;
    run.writer.finish(batch.lines).map_err(Failure::failed)?;
    if verbosity.talks() {
        let (stats, seconds) = (engine.stats(), started.elapsed().as_secs_f64());
        eprintln!(
            "{} lines, {failures} failed; {} rows in {} steps, {} tokens generated in {seconds:.1} s ({:.0} tokens/s)",
            batch.lines,
            stats.rows(),
            stats.steps(),
            stats.generated(),
            stats.generated() as f64 / seconds,
        );
    }
    Ok(if failures > 0 || !failed.is_empty() { Outcome::Partly } else { Outcome::Done })
}

/// A run in progress.
struct Run<'a> {
    served: &'a Served<'a>,
    writer: OrderedWriter<File>,
    ids: Ids,
    /// Lines whose answers are not written, in order.
    waiting: VecDeque<Waiting>,
    /// Lines without a successful answer.
    failed: usize,
    bar: ProgressBar,
}

/// A line whose answer is not written.
struct Waiting {
    index: usize,
    answer: Answer,
}

enum Answer {
    /// Being computed.
    Running { custom_id: String, request: Box<ParsedRequest>, streams: Vec<Stream> },
    /// Known already: a line that failed before it ran.
    Failed(String),
}

impl Run<'_> {
    /// Starts the request of a line.
    fn take(&mut self, index: usize, line: Result<BatchLine, InvalidLine>) {
        let unique = self.ids.unique(index);
        let answer = match line {
            Err(invalid) => Answer::Failed(invalid_line(&unique, &invalid)),
            Ok(BatchLine { custom_id, endpoint, body }) => {
                let started = parse(endpoint, &body, &self.served.context(false)).and_then(|request| {
                    let streams = self.served.submit(&request)?;
                    Ok((request, streams))
                });
                match started {
                    Ok((request, streams)) => {
                        Answer::Running { custom_id, request: Box::new(request), streams }
                    }
                    Err(error) => Answer::Failed(failure_line(&unique, &custom_id, &error)),
                }
            }
        };
        self.waiting.push_back(Waiting { index, answer });
    }

    /// Waits for the oldest line's answer and writes it.
    fn finish_oldest(&mut self) -> Result<(), Failure> {
        let Some(Waiting { index, answer }) = self.waiting.pop_front() else { return Ok(()) };
        let line = match answer {
            Answer::Failed(line) => {
                self.failed += 1;
                line
            }
            Answer::Running { custom_id, request, streams } => {
                let unique = self.ids.unique(index);
                match self.complete(&unique, &request, streams) {
                    Ok(body) => answer_line(&unique, &custom_id, &body),
                    Err(error) => {
                        self.failed += 1;
                        failure_line(&unique, &custom_id, &error)
                    }
                }
            }
        };
        self.bar.inc(1);
        self.writer.put(index, line).map_err(Failure::failed)
    }

    fn complete(
        &self,
        unique: &str,
        request: &ParsedRequest,
        streams: Vec<Stream>,
    ) -> Result<serde_json::Value, ApiError> {
        let completions =
            streams.into_iter().map(Stream::wait).collect::<Result<Vec<_>, _>>().map_err(answer)?;
        let tokenizer = &self.served.engine.base().tokenizer;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let labels = Labels { id: unique, created, decode_token: &|token| tokenizer.decode_token(token) };
        Ok(body(request, &completions, labels))
    }
}

/// A bar on standard error; hidden where that is no terminal.
fn progress_bar(lines: u64, done: u64, verbosity: Verbosity) -> ProgressBar {
    if !verbosity.talks() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} lines {per_sec} eta {eta}");
    let bar = ProgressBar::new(lines).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_position(done);
    bar
}
