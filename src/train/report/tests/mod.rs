//! Pages of whole runs, made from files as a run leaves them.

mod fixture;
mod markup;

use std::path::Path;

use fixture::{Job, write_run};
use markup::{check_markup, text_of};

use super::{REPORT_FILE, write_job_report, write_run_report};

fn page(folder: &Path) -> String {
    std::fs::read_to_string(folder.join(REPORT_FILE)).unwrap()
}

/// The pages of a run: its own and those of its jobs.
fn pages(run: &Path, jobs: &[&str]) -> Vec<String> {
    for job in jobs {
        write_job_report(&run.join(job)).unwrap();
    }
    write_run_report(run).unwrap();
    let jobs = jobs.iter().map(|job| page(&run.join(job)));
    std::iter::once(page(run)).chain(jobs).collect()
}

/// Whether a page has all of these texts, in this order.
fn assert_says(page: &str, wanted: &[&str]) {
    let text = text_of(page);
    let mut rest = text.as_str();
    for wanted in wanted {
        let Some(at) = rest.find(wanted) else { panic!("`{wanted}` does not follow in:\n{text}") };
        rest = &rest[at + wanted.len()..];
    }
}

#[test]
fn a_jobs_page_shows_everything_that_its_files_hold() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::multi("all-in-one")]);
    let pages = pages(run.path(), &["all-in-one"]);
    let page = &pages[1];
    check_markup(page);
    let sections = [
        "training job",
        "all-in-one",
        "stopped early",
        "1 step was skipped",
        "Leakage: 3 of 200 valid samples of headline-sentiment",
        "Unseen data, before and after",
        "Loss",
        "Accuracy over training",
        "Forgetting",
        "Confusion",
        "Groups",
        "Affinity of tasks",
        "Optimizer",
        "Skipped steps",
        "Samples drawn",
        "Data",
        "class balance",
        "Configuration",
        "Provenance",
    ];
    assert_says(page, &sections);
    // Before and after on test data, with the interval of 162 in 200.
    assert_says(
        page,
        &["headline-sentiment", "test", "200 samples", "31.0 %", "→ 81.0 %", "75.0 % to 85.8 %"],
    );
    assert_says(page, &["Training loss of each batch", "Training loss by task", "Validation loss by task"]);
    // The task that is not trained lost 18 points.
    assert_says(page, &["Forgetting", "general", "exact match, test", "60.0 %", "42.0 %", "−18.0"]);
    // Expected `negative`: 50 of 64 right.
    assert_says(page, &["Confusion", "negative", "64 samples", "50", "9", "5"]);
    assert_says(page, &["Groups", "group-a", "120", "60.0 % → 48.0 %", "35.0 % → 84.0 %"]);
    assert_says(page, &["Affinity of tasks", "topic", "−0.06"]);
    assert_says(page, &["Skipped steps", "77", "model.layers.0.self_attn.q_proj.lora_A"]);
    // 16 samples a step, the skipped one among them.
    assert_says(page, &["Samples drawn", "headline-sentiment", "62.5 %", "2400", "1800", "1.33", "600"]);
    assert_says(
        page,
        &["Data", "headline-sentiment", "train", "1850", "1800", "class balance", "neutral", "50.0 %"],
    );
    assert_says(page, &["Configuration", "betas", "0.9, 0.999", "task[0].name", "headline-sentiment"]);
    assert_says(page, &["Provenance", "runs/earlier", "abababab", "adapter_model.safetensors", "34343434"]);
}

#[test]
fn every_chart_has_its_curves_in_it() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::multi("all-in-one"), Job::single("headlines")]);
    // Curves are the only thick lines, and those behind the smoothed ones the only faint ones.
    let curves = |chart: &str| {
        (chart.matches("stroke-width=\"20\" points").count(), chart.matches("opacity=\"0.3\"").count())
    };
    let charts: Vec<Vec<(usize, usize)>> = pages(run.path(), &["all-in-one", "headlines"])
        .iter()
        .map(|page| page.split("<svg").skip(1).map(curves).collect())
        .collect();
    let run = vec![(2, 2), (2, 0), (2, 0), (2, 0)];
    let multi = vec![(1, 1), (2, 2), (3, 0), (3, 0), (1, 0), (1, 0), (1, 1)];
    let single = vec![(1, 1), (3, 0), (3, 0), (1, 0), (1, 0), (1, 1)];
    assert_eq!(charts, [run, multi, single]);
}

#[test]
fn a_runs_page_compares_its_jobs() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::multi("all-in-one"), Job::single("headlines")]);
    std::fs::create_dir(run.path().join("notes")).unwrap();
    let pages = pages(run.path(), &["all-in-one", "headlines"]);
    check_markup(&pages[0]);
    check_markup(&pages[2]);
    let page = &pages[0];
    assert_says(page, &["training run", "Jobs", "2", "1 finished, 1 stopped early", "examples/base"]);
    assert!(page.contains("href=\"all-in-one&#x2f;report.html\">all-in-one</a>"), "the job's page is linked");
    assert_says(
        page,
        &["Training loss by job", "Unseen data, side by side", "headline-sentiment", "general"],
    );
    assert_says(page, &["all-in-one", "81.0 %", "before: 31.0 %", "headlines", "87.0 %", "before: 31.0 %"]);
    assert_says(
        page,
        &["Change and forgetting", "all-in-one", "+50.0", "−18.0", "headlines", "+56.0", "−25.0"],
    );
    // (0.81 − 0.87) / 0.87
    assert_says(page, &["Interference", "headline-sentiment", "81.0 %", "87.0 %", "−6.9 %", "may be chance"]);
    assert_says(page, &["Validation loss: headline-sentiment", "Validation loss: general"]);
    assert!(!text_of(page).contains("notes"), "a folder without a job's files is none");
}

#[test]
fn sections_without_data_are_left_out() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::single("headlines")]);
    let pages = pages(run.path(), &["headlines"]);
    let job = text_of(&pages[1]);
    for section in
        ["Groups", "Affinity", "Skipped", "skipped", "Leakage", "Lineage", "Training loss of each batch"]
    {
        assert!(!job.contains(section), "{section}");
    }
    let run = text_of(&pages[0]);
    assert!(run.contains("Change and forgetting") && !run.contains("Interference"));
}

#[test]
fn nothing_from_a_file_becomes_markup() {
    let hostile = "<script>alert('&')</script>\"";
    let run = tempfile::tempdir().unwrap();
    let renamed = |job: Job| job.replacing("headline-sentiment", hostile).replacing("neutral", hostile);
    let jobs = [renamed(Job::multi("all-in-one")), renamed(Job::single("headlines"))];
    write_run(
        run.path(),
        &jobs.map(|job| job.replacing("headlines", "<img src=x>").replacing("all-in-one", "<img>")),
    );
    for page in pages(run.path(), &["all-in-one", "headlines"]) {
        check_markup(&page);
        assert!(!page.contains("<script") && !page.contains("<img"), "markup from a file");
        assert!(!page.contains("alert('"), "a quote from a file");
        assert!(text_of(&page).contains(hostile), "the name is shown as it is");
        assert!(text_of(&page).contains("<img"));
    }
}

#[test]
fn a_page_loads_and_links_nothing_from_elsewhere() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::multi("all-in-one"), Job::single("headlines")]);
    for page in pages(run.path(), &["all-in-one", "headlines"]) {
        for reference in ["://", "url(", "@import", "src=", "<link", "<script", "javascript", "xlink"] {
            assert!(!page.contains(reference), "{reference}");
        }
        assert!(page.contains("default-src 'none'"));
    }
}

#[test]
fn the_same_files_give_the_same_bytes() {
    let run = tempfile::tempdir().unwrap();
    let jobs = [Job::multi("all-in-one"), Job::single("headlines")];
    write_run(run.path(), &jobs);
    let first = pages(run.path(), &["all-in-one", "headlines"]);
    let elsewhere = tempfile::tempdir().unwrap();
    write_run(elsewhere.path(), &jobs);
    assert_eq!(first, pages(elsewhere.path(), &["all-in-one", "headlines"]));
    // And again over what is there.
    assert_eq!(first, pages(run.path(), &["all-in-one", "headlines"]));
}

#[test]
fn a_job_that_still_runs_has_a_page() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::multi("all-in-one")]);
    let folder = run.path().join("all-in-one");
    std::fs::remove_file(folder.join("manifest.json")).unwrap();
    let metrics = std::fs::read(folder.join("metrics.jsonl")).unwrap();
    for length in (0..metrics.len()).step_by(metrics.len() / 23) {
        std::fs::write(folder.join("metrics.jsonl"), &metrics[..length]).unwrap();
        for page in pages(run.path(), &["all-in-one"]) {
            check_markup(&page);
            assert!(text_of(&page).contains("all-in-one"), "cut at {length}");
        }
    }
}

#[test]
fn nothing_yet_is_a_short_page() {
    let run = tempfile::tempdir().unwrap();
    write_run_report(run.path()).unwrap();
    assert_says(&page(run.path()), &["training run", "There are no jobs yet."]);
    let job = run.path().join("a");
    std::fs::create_dir(&job).unwrap();
    std::fs::write(job.join("metrics.jsonl"), "").unwrap();
    for page in pages(run.path(), &["a"]) {
        check_markup(&page);
    }
    assert_says(&page(&job), &["training job", "a", "not finished", "There are no metrics yet."]);
    assert!(page(&job).len() < 14_000, "{}", page(&job).len());
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_line() {
    let run = tempfile::tempdir().unwrap();
    write_run(run.path(), &[Job::single("headlines"), Job::single("others")]);
    let folder = run.path().join("headlines");
    let good = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let third = good.lines().nth(2).unwrap();
    std::fs::write(folder.join("metrics.jsonl"), good.replace(third, "{\"job\": 7}")).unwrap();
    let error = write_job_report(&folder).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl:3: no string `job`"), "{error}");
    assert!(!folder.join(REPORT_FILE).exists());
    // The run's page has the other jobs, and says why this one is missing.
    write_run_report(run.path()).unwrap();
    let page = page(run.path());
    check_markup(&page);
    let problem = format!("headlines: {error}");
    assert_says(
        &page,
        &["Outcomes", "1 not readable", &problem, "headlines", "not readable", "others", "finished"],
    );
    std::fs::write(folder.join("metrics.jsonl"), good).unwrap();
    std::fs::write(folder.join("manifest.json"), "{\"steps\": \"many\"}").unwrap();
    let error = write_job_report(&folder).unwrap_err().to_string();
    assert!(error.contains("manifest.json") && error.contains("many"), "{error}");
}

#[test]
fn many_jobs_and_tasks_still_make_a_page() {
    let run = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..9).map(|job| format!("sweep-{job}")).collect();
    let jobs: Vec<Job> = names.iter().map(|name| Job::single(name)).collect();
    write_run(run.path(), &jobs);
    write_run_report(run.path()).unwrap();
    let page = page(run.path());
    check_markup(&page);
    assert_says(&page, &["Training loss by job", "sweep-0", "sweep-8", "the 6 best of 9 jobs"]);
    assert!(page.len() < 600_000, "{}", page.len());
}
