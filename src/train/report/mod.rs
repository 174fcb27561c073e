//! `report.html`: what a job, or a whole run, did, in one page made from its files alone.
//!
//! A page is `records` (`metrics.jsonl` and `manifest.json`, read back) turned into tables and curves and put into a
//! template. It needs nothing else: styles and drawings stand in it, it runs no script and loads nothing, and its
//! security policy says so. The same files give the same bytes.
//!
//! Whatever comes from files is escaped by the template engine, which is told to for every value; the drawings are
//! the one exception, and nothing in them comes from a file but numbers.

mod chart;
mod curves;
mod data;
mod heat_map;
mod interference;
mod job;
mod numbers;
mod outcomes;
mod records;
mod run;
mod statistics;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;

use crate::format::{FormatError, write_text};
use records::JobRecord;

/// Name of a page in the folder that it is about.
pub const REPORT_FILE: &str = "report.html";

/// Why a page could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{}: cannot list the folder: {source}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("{}:{line}: {problem}", path.display())]
    Metrics { path: PathBuf, line: usize, problem: String },
    #[error("{}: {problem}", path.display())]
    Manifest { path: PathBuf, problem: String },
    #[error("cannot draw a chart: {0}")]
    Drawing(String),
    #[error("cannot fill in the page: {0}")]
    Page(#[from] minijinja::Error),
}

/// Writes `report.html` into a job's folder, from the `metrics.jsonl` and `manifest.json` in it.
///
/// A job that still runs has no manifest yet, and perhaps half a line at the end of its metrics: the page shows what
/// is there. A folder with neither file gives a page that says so.
///
/// # Errors
/// When a file cannot be read, is not what it should be (with its line), or the page cannot be written.
pub fn write_job_report(folder: &Path) -> Result<(), ReportError> {
    let page = job::page(&JobRecord::read(folder)?)?;
    Ok(write_text(&folder.join(REPORT_FILE), &page)?)
}

/// Writes `report.html` into a run's folder, from the files of every job folder in it; it links to their pages. A job
/// whose files are not what they should be is listed with what is wrong.
///
/// # Errors
/// When the folder cannot be listed or the page not be written.
pub fn write_run_report(folder: &Path) -> Result<(), ReportError> {
    let page = run::page(&JobRecord::read_all(folder)?)?;
    Ok(write_text(&folder.join(REPORT_FILE), &page)?)
}

/// Fills in a template, with everything escaped that is not marked as markup.
fn render(template: &str, page: &impl Serialize) -> Result<String, ReportError> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_filter("count", numbers::count);
    environment.add_filter("number", numbers::number);
    environment.add_filter("percent", numbers::percent);
    environment.add_filter("points", numbers::points);
    environment.add_filter("relative", numbers::relative);
    environment.add_global("palette", Serde(chart::palette()));
    environment.add_template("layout.html", include_str!("templates/layout.html"))?;
    environment.add_template("macros.html", include_str!("templates/macros.html"))?;
    environment.add_template("style.css", include_str!("templates/style.css"))?;
    environment.add_template("job.html", include_str!("templates/job.html"))?;
    environment.add_template("run.html", include_str!("templates/run.html"))?;
    Ok(environment.get_template(template)?.render(Serde(page))?)
}
