//! The pages of a real run.

#[path = "../../src/train/report/tests/markup.rs"]
mod markup;

use markup::{check_markup, text_of};

use super::tasks::add_tasks;
use super::*;

/// Well-formed, and in need of nothing but itself.
fn check(page: &str) {
    check_markup(page);
    for reference in ["http:", "https:", "//", " src=", "url(", "@import", "<script", "<link", "<iframe"] {
        assert!(!page.contains(reference), "{reference}");
    }
    let page = page.replace("&#x2f;", "/");
    let links = page.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    links.for_each(|link| assert!(link.ends_with("/report.html") && !link.contains(':'), "{link}"));
}

#[test]
fn the_pages_of_a_run_show_every_job_and_need_nothing_else() {
    let mut run = TrainingRun::new(&golden_model());
    let name = add_job(&mut run, 1, "");
    add_tasks(
        &mut run,
        "all-in-one",
        &[("big", 9, ""), ("small", 5, "")],
        1,
        "steps = 8\nbatch_size = 4\neval_every = 2\npcgrad = true",
    );
    run.data("<b>&.jsonl", &token_lines(4, 500, 2));
    run.job("failed", "train = \"<b>&.jsonl\"\nlr = 1e30\nmax_grad_norm = 0\nmax_bad_steps = 1\nsteps = 9");
    let ran = run.train(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let out = run.folder.path().join("out");
    let page = |folder: &Path| std::fs::read_to_string(folder.join("report.html")).unwrap();
    let whole = page(&out);
    check(&whole);
    assert!(ran.stderr.contains(&format!("report: {}", out.join("report.html").display())), "{}", ran.stderr);
    for (job, outcome) in [(name.as_str(), "finished"), ("all-in-one", "finished"), ("failed", "failed")] {
        let page = page(&run.out(job));
        check(&page);
        let text = text_of(&page);
        assert!(text.contains(job) && text.contains(outcome), "{text}");
        assert!(page.matches("<svg").count() >= 2, "{job}");
        assert!(whole.contains(&format!("href=\"{job}&#x2f;report.html\"")), "{job}");
    }
    let text = text_of(&whole);
    for wanted in
        ["Training loss by job", "Validation loss: big", "Validation loss: guard-0", "Change and forgetting"]
    {
        assert!(text.contains(wanted), "{wanted} is not in:\n{text}");
    }
    let text = text_of(&page(&run.out("all-in-one")));
    for wanted in
        ["Affinity of tasks", "Forgetting", "Samples drawn", "Learning rate", "Validation loss by task"]
    {
        assert!(text.contains(wanted), "{wanted} is not in:\n{text}");
    }
}

#[test]
fn a_job_whose_files_are_damaged_is_listed_with_what_is_wrong() {
    let mut run = TrainingRun::new(&golden_model());
    let (good, bad) = (add_job(&mut run, 0, ""), add_job(&mut run, 1, ""));
    run.finish(&[]);
    let path = run.out(&bad).join("metrics.jsonl");
    let lines = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, lines.replacen("\"loss\":", "\"loss\";", 1)).unwrap();
    let ran = run.train(&["--resume"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let page = std::fs::read_to_string(run.folder.path().join("out/report.html")).unwrap();
    check_markup(&page);
    let text = text_of(&page);
    let problem = format!("{bad}: {}:1: not valid JSON: ", path.display());
    assert!(text.contains(&problem) && text.contains("1 finished, 1 not readable"), "{text}");
    assert!(
        page.contains(&format!("href=\"{good}&#x2f;report.html\"")) && text.contains("Training loss by job"),
        "{text}"
    );
}
