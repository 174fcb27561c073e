//! What a run says while it goes on, and the table at its end.
//!
//! On a terminal every running job has a line that follows its steps. Elsewhere (a file, a pipe) a job says a whole
//! line at every tenth of its steps and whenever something happens, so that a log stays readable.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::terminal::{Align, Table, clean, shorten};

/// Columns of a job's name on its line.
const NAME_COLUMNS: usize = 24;
/// A job says so many plain lines about its steps.
const PLAIN_LINES: u64 = 10;

/// What to say of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepProgress {
    /// From 1.
    pub step: u64,
    /// In nats.
    pub loss: f64,
    /// Rows computed.
    pub tokens: u64,
}

/// Follows the jobs of a run on standard error.
pub struct Progress {
    output: Output,
    jobs: HashMap<String, Running>,
}

enum Output {
    Silent,
    /// Lines that follow their jobs.
    Bars(MultiProgress),
    /// Lines that stay.
    Plain(Box<dyn Write + Send>),
}

/// A job that has begun and not ended.
struct Running {
    total_steps: u64,
    started: Instant,
    /// Where this process began.
    from_step: u64,
    step: u64,
    loss: Option<f64>,
    /// Since it began.
    tokens: u64,
    bar: Option<ProgressBar>,
}

impl Running {
    /// In tokens a second.
    fn speed(&self) -> f64 {
        self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// How long the other steps take if they go as those until now.
    fn remaining(&self) -> Duration {
        let done = (self.step - self.from_step).max(1) as f64;
        let left = self.total_steps.saturating_sub(self.step) as f64;
        self.started.elapsed().mul_f64(left / done)
    }

    fn loss(&self) -> String {
        self.loss.map_or_else(String::new, |loss| format!("loss {loss:.4}"))
    }
}

impl Progress {
    /// Says nothing unless it is `enabled`.
    pub fn new(enabled: bool) -> Self {
        let output = match (enabled, io::stderr().is_terminal()) {
            (false, _) => Output::Silent,
            (true, true) => Output::Bars(MultiProgress::new()),
            (true, false) => Output::Plain(Box::new(io::stderr())),
        };
        Self { output, jobs: HashMap::new() }
    }

    /// A job begins, or goes on after `from_step` of its `total_steps`.
    pub fn start(&mut self, job: &str, total_steps: u64, from_step: u64) {
        let bar = match &self.output {
            Output::Bars(bars) => {
                let template = "{prefix} {bar:24} {pos:>6}/{len} {msg} eta {eta}";
                let style = ProgressStyle::with_template(template);
                let bar = ProgressBar::new(total_steps)
                    .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                    .with_prefix(format!("{:NAME_COLUMNS$}", shorten(&clean(job), NAME_COLUMNS)));
                let bar = bars.add(bar);
                bar.set_position(from_step);
                bar.reset_eta();
                Some(bar)
            }
            _ => None,
        };
        let running = Running {
            total_steps,
            started: Instant::now(),
            from_step,
            step: from_step,
            loss: None,
            tokens: 0,
            bar,
        };
        self.jobs.insert(job.to_owned(), running);
        if from_step > 0 {
            self.note(job, &format!("goes on after step {from_step} of {total_steps}"));
        }
    }

    /// A job has done a step.
    pub fn step(&mut self, job: &str, progress: &StepProgress) {
        let Some(running) = self.jobs.get_mut(job) else { return };
        let tenth = |step: u64| step * PLAIN_LINES / running.total_steps.max(1);
        let says = tenth(progress.step) > tenth(running.step);
        running.step = progress.step;
        running.loss = Some(progress.loss);
        running.tokens += progress.tokens;
        if let Some(bar) = &running.bar {
            bar.set_position(progress.step);
            bar.set_message(format!("{} {:.0} tokens/s", running.loss(), running.speed()));
        } else if says {
            let text = format!(
                "step {}/{} {} {:.0} tokens/s eta {}",
                running.step,
                running.total_steps,
                running.loss(),
                running.speed(),
                FormattedDuration(running.remaining())
            );
            self.note(job, &text);
        }
    }

    /// A job was evaluated; `eval` is what its metrics say of it.
    pub fn evaluated(&mut self, job: &str, step: u64, eval: &Value) {
        let text = |key: &str| eval.get(key).and_then(Value::as_str).unwrap_or_default();
        let mut said = format!("step {step} {} {}", text("task"), text("split"));
        if let Some(loss) = eval.get("loss").and_then(Value::as_f64) {
            said += &format!(" loss {loss:.4}");
        }
        if let Some(share) = eval.get("exact_match").and_then(Value::as_f64) {
            said += &format!(" exact match {:.1} %", 100.0 * share);
        }
        self.note(job, &said);
    }

    /// Something about a job that stays to be read.
    pub fn note(&mut self, job: &str, text: &str) {
        let line = clean(&format!("{job}: {text}"));
        // What cannot be shown does not stop a run.
        let _ = match &mut self.output {
            Output::Silent => Ok(()),
            Output::Bars(bars) => bars.println(line),
            Output::Plain(output) => writeln!(output, "{line}"),
        };
    }

    /// A job has ended: its line goes, what became of it stays.
    pub fn finish(&mut self, job: &str, outcome: &str) {
        let Some(running) = self.jobs.remove(job) else {
            return self.note(job, outcome);
        };
        if let Some(bar) = &running.bar {
            bar.finish_and_clear();
        }
        let text = format!("{outcome} after {} steps {}", running.step, running.loss());
        self.note(job, text.trim_end());
    }
}

/// What the table at the end says of a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobSummary {
    pub name: String,
    pub outcome: String,
    pub steps: u64,
    /// Of the first and the last step, in nats.
    pub loss: Option<(f64, f64)>,
    /// On validation data, in nats.
    pub valid_loss: Option<f64>,
    /// Exact match of each task.
    pub scores: Vec<TaskScore>,
    /// Rows computed by this process.
    pub tokens: u64,
    pub seconds: f64,
}

/// The share of right answers to a task's questions, 0 to 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskScore {
    pub task: String,
    pub before: Option<f64>,
    pub after: Option<f64>,
}

/// The table at the end of a run: a line for each job, one more for each further task.
pub fn summary(jobs: &[JobSummary]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[Left, Left, Right, Right, Right, Left, Right, Right, Right, Right]);
    table.row([
        "job",
        "outcome",
        "steps",
        "loss",
        "valid",
        "task",
        "exact match",
        "tokens",
        "tokens/s",
        "time",
    ]);
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.4}"));
    let share =
        |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |share| format!("{:.1}", 100.0 * share));
    for job in jobs {
        let loss = job.loss.map_or_else(String::new, |(first, last)| format!("{first:.4} → {last:.4}"));
        let speed =
            if job.seconds > 0.0 { format!("{:.0}", job.tokens as f64 / job.seconds) } else { String::new() };
        let score = |score: &TaskScore| {
            (score.task.clone(), format!("{} → {} %", share(score.before), share(score.after)))
        };
        let mut scores = job.scores.iter().map(score);
        let (task, scored) = scores.next().unwrap_or_default();
        table.row([
            job.name.clone(),
            job.outcome.clone(),
            job.steps.to_string(),
            loss,
            number(job.valid_loss),
            task,
            scored,
            job.tokens.to_string(),
            speed,
            duration(job.seconds),
        ]);
        for (task, scored) in scores {
            let none = String::new;
            table.row([none(), none(), none(), none(), none(), task, scored, none(), none(), none()]);
        }
    }
    table.to_string()
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("{seconds:.1} s"),
        ..3600.0 => format!("{:.0} m {:02.0} s", (seconds / 60.0).floor(), (seconds % 60.0).floor()),
        _ => format!("{:.0} h {:02.0} m", (seconds / 3600.0).floor(), (seconds % 3600.0 / 60.0).floor()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;

    /// What was written, to be looked at.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn plain() -> (Progress, Log) {
        let log = Log::default();
        (Progress { output: Output::Plain(Box::new(log.clone())), jobs: HashMap::new() }, log)
    }

    fn at(step: u64) -> StepProgress {
        StepProgress { step, loss: 1.0 / step as f64, tokens: 100 }
    }

    #[test]
    fn a_log_has_a_line_for_every_tenth_of_a_job() {
        let (mut progress, log) = plain();
        progress.start("a", 240, 0);
        (1..=240).for_each(|step| progress.step("a", &at(step)));
        let lines = log.lines();
        assert_eq!(lines.len(), 10, "{lines:?}");
        assert!(lines[0].starts_with("a: step 24/240 loss 0.0417 "), "{}", lines[0]);
        assert!(lines[0].contains(" tokens/s eta ") && !lines[0].contains(" 0 tokens/s"), "{}", lines[0]);
        assert!(
            lines[9].starts_with("a: step 240/240 ") && lines[9].ends_with("eta 00:00:00"),
            "{}",
            lines[9]
        );
    }

    #[test]
    fn a_job_of_few_steps_says_each_once() {
        let (mut progress, log) = plain();
        progress.start("a", 3, 0);
        (1..=3).for_each(|step| progress.step("a", &at(step)));
        assert_eq!(log.lines().len(), 3);
    }

    #[test]
    fn a_resumed_job_goes_on_where_it_was() {
        let (mut progress, log) = plain();
        progress.start("a", 100, 95);
        (96..=100).for_each(|step| progress.step("a", &at(step)));
        let lines = log.lines();
        assert_eq!(lines[0], "a: goes on after step 95 of 100");
        assert_eq!(lines.len(), 2, "{lines:?}");
    }

    #[test]
    fn evaluations_notes_and_ends_stay_to_be_read() {
        let (mut progress, log) = plain();
        progress.start("a", 100, 0);
        progress.step("a", &at(4));
        let eval = json!({"task": "t", "split": "valid", "loss": 1.25, "exact_match": 0.5});
        progress.evaluated("a", 4, &eval);
        progress.note("a", "beware of \u{1b}[2J");
        progress.finish("a", "stopped early");
        progress.finish("unknown", "failed");
        // It has ended: nothing more is said of its steps.
        progress.step("a", &at(50));
        assert_eq!(
            log.lines(),
            [
                "a: step 4 t valid loss 1.2500 exact match 50.0 %",
                "a: beware of \\u{1b}[2J",
                "a: stopped early after 4 steps loss 0.2500",
                "unknown: failed",
            ]
        );
    }

    #[test]
    fn lines_of_a_terminal_come_and_go_with_their_jobs() {
        let terminal = indicatif::InMemoryTerm::new(10, 100);
        let target = indicatif::ProgressDrawTarget::term_like_with_hz(Box::new(terminal.clone()), 255);
        let bars = MultiProgress::with_draw_target(target);
        let mut progress = Progress { output: Output::Bars(bars), jobs: HashMap::new() };
        progress.start("first", 10, 0);
        progress.start("a-name-that-is-longer-than-its-column", 10, 3);
        progress.step("first", &at(4));
        progress.jobs.values().filter_map(|running| running.bar.as_ref()).for_each(ProgressBar::tick);
        let shown = terminal.contents();
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        assert_eq!(lines[0], "a-name-that-is-longer-than-its-column: goes on after step 3 of 10");
        assert!(lines[1].starts_with("first  ") && lines[1].contains("4/10 loss 0.2500"), "{shown}");
        assert!(lines[2].starts_with("a-name-that-is-longer-t… ") && lines[2].contains("3/10"), "{shown}");
        progress.finish("first", "finished");
        let shown = terminal.contents();
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        assert_eq!(lines[1], "first: finished after 4 steps loss 0.2500");
    }

    #[test]
    fn the_last_table_has_every_job_and_task() {
        let score = |task: &str, before, after| TaskScore { task: task.into(), before, after };
        let jobs = [
            JobSummary {
                name: "all-in-one".into(),
                outcome: "finished".into(),
                steps: 240,
                loss: Some((2.9, 0.1234)),
                valid_loss: Some(0.5),
                scores: vec![score("sentiment", Some(0.31), Some(0.81)), score("topic", None, Some(0.5))],
                tokens: 120_000,
                seconds: 60.0,
            },
            JobSummary { name: "b".into(), outcome: "failed".into(), ..JobSummary::default() },
        ];
        let wanted = "\
job         outcome   steps             loss   valid  task         exact match  tokens  tokens/s      time
all-in-one  finished    240  2.9000 → 0.1234  0.5000  sentiment  31.0 → 81.0 %  120000      2000  1 m 00 s
                                                      topic         – → 50.0 %
b           failed        0                                                          0               0.0 s
";
        assert_eq!(summary(&jobs), wanted);
    }

    #[test]
    fn durations_have_two_units() {
        assert_eq!(duration(9.06), "9.1 s");
        assert_eq!(duration(3599.9), "59 m 59 s");
        assert_eq!(duration(7384.0), "2 h 03 m");
    }
}
