//! Which curves a page shows, and how: smoothed or not, together or apart.

use serde::Serialize;

use super::ReportError;
use super::chart::{Bounds, Drawing, Line, MOST_LINES, Scale, Size, draw};
use super::numbers::{number, percent};
use super::records::{Evaluation, JobRecord, Step};
use super::statistics::{Point, smooth, thin, window};

/// Points of a curve that are drawn: more than a wide chart has pixels for.
const MOST_POINTS: usize = 800;
/// Evaluations up to which each is marked.
const MOST_MARKS: usize = 40;
/// A curve that spans so many times its least value is drawn on a logarithmic axis.
const LOGARITHMIC_FROM: f64 = 10.0;

/// Values over steps, under a name.
pub struct Curve<'a> {
    /// Empty where the title says it all.
    pub name: &'a str,
    /// Its place among all that the page shows, so that it has one colour everywhere.
    pub place: usize,
    pub points: Vec<Point>,
}

/// What the values of curves are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of training steps: noisy.
    Noisy(Scale),
    /// As they are.
    Exact(Scale),
    /// Of evaluations: few.
    Evaluated(Scale),
}

/// One chart, or where there are too many curves for one, a small chart for each.
#[derive(Serialize)]
pub struct Panel {
    pub title: String,
    pub note: String,
    pub size: Size,
    pub charts: Vec<Chart>,
}

#[derive(Serialize)]
pub struct Chart {
    /// In a panel of several.
    name: Option<String>,
    legend: Vec<Entry>,
    drawing: Drawing,
}

/// A curve's name beside its colour.
#[derive(Serialize)]
struct Entry {
    name: String,
    colour: usize,
    /// Its last value.
    last: String,
}

/// A chart to be drawn.
pub struct Plan<'a> {
    pub title: String,
    pub curves: Vec<Curve<'a>>,
    pub kind: Kind,
}

/// Draws what has points, two charts in a row; the first of an odd number has a row of its own.
pub fn panels(plans: Vec<Plan<'_>>) -> Result<Vec<Panel>, ReportError> {
    let mut plans = plans;
    for plan in &mut plans {
        plan.curves.retain(|curve| !curve.points.is_empty());
    }
    plans.retain(|plan| !plan.curves.is_empty());
    let halves = plans.iter().filter(|plan| plan.curves.len() <= MOST_LINES).count();
    let mut wide = halves % 2 == 1;
    let mut panels = Vec::new();
    for plan in plans {
        panels.push(if plan.curves.len() > MOST_LINES {
            apart(plan)?
        } else {
            let size = if std::mem::take(&mut wide) { Size::Wide } else { Size::Half };
            together(plan, size)?
        });
    }
    Ok(panels)
}

fn together(mut plan: Plan<'_>, size: Size) -> Result<Panel, ReportError> {
    if plan.curves.iter().any(|curve| curve.place >= MOST_LINES) {
        plan.curves.iter_mut().enumerate().for_each(|(place, curve)| curve.place = place);
    }
    let drawn = Drawn::new(&plan);
    let named = plan.curves.iter().zip(&drawn.lines).filter(|(curve, _)| !curve.name.is_empty());
    let legend = named.map(|(curve, line)| drawn.entry(curve, line)).collect();
    let drawing = draw(&drawn.lines, drawn.scale, size, drawn.bounds)?;
    let charts = vec![Chart { name: None, legend, drawing }];
    Ok(Panel { title: plan.title, note: drawn.note(), size, charts })
}

/// A small chart for each curve, all with the same axes.
fn apart(mut plan: Plan<'_>) -> Result<Panel, ReportError> {
    plan.curves.iter_mut().for_each(|curve| curve.place = 0);
    let drawn = Drawn::new(&plan);
    let mut charts = Vec::new();
    for (curve, line) in plan.curves.iter().zip(&drawn.lines) {
        let drawing = draw(std::slice::from_ref(line), drawn.scale, Size::Third, drawn.bounds)?;
        let entry = drawn.entry(curve, line);
        charts.push(Chart {
            name: Some(format!("{} {}", entry.name, entry.last)),
            legend: Vec::new(),
            drawing,
        });
    }
    Ok(Panel { title: plan.title, note: drawn.note(), size: Size::Wide, charts })
}

/// A plan's lines, ready to be drawn.
struct Drawn {
    lines: Vec<Line>,
    scale: Scale,
    bounds: Bounds,
    /// Steps over which the noisiest is smoothed.
    window: usize,
}

impl Drawn {
    fn new(plan: &Plan<'_>) -> Self {
        let most = plan.curves.iter().map(|curve| curve.points.len()).max().unwrap_or(0);
        let (Kind::Noisy(scale) | Kind::Exact(scale) | Kind::Evaluated(scale)) = plan.kind;
        let window = if let Kind::Noisy(_) = plan.kind { window(most) } else { 1 };
        let lines: Vec<Line> = plan.curves.iter().map(|curve| line(curve, plan.kind, window)).collect();
        let scale = resolve(scale, &lines);
        Self { bounds: Bounds::around(&lines, scale), lines, scale, window }
    }

    fn entry(&self, curve: &Curve<'_>, line: &Line) -> Entry {
        let last = line.points.last().map(|&(_, value)| value);
        let last = if self.scale == Scale::Share { percent(last) } else { number(last) };
        Entry { name: curve.name.to_owned(), colour: curve.place, last }
    }

    fn note(&self) -> String {
        let mut notes = Vec::new();
        if self.window > 1 {
            notes.push(format!("Faint: each step. Line: mean of the {} steps around.", self.window));
        }
        if self.scale == Scale::Logarithmic {
            notes.push("Logarithmic axis.".to_owned());
        }
        notes.join(" ")
    }
}

fn line(curve: &Curve<'_>, kind: Kind, window: usize) -> Line {
    let faint = if window > 1 { thin(&curve.points, MOST_POINTS) } else { Vec::new() };
    let marked = matches!(kind, Kind::Evaluated(_)) && curve.points.len() <= MOST_MARKS;
    let points = thin(&smooth(&curve.points, window), MOST_POINTS);
    Line { colour: curve.place, points, faint, marked }
}

/// A logarithmic axis in the place of a linear one where the values call for it.
fn resolve(scale: Scale, lines: &[Line]) -> Scale {
    if scale != Scale::Linear {
        return scale;
    }
    let values = || lines.iter().flat_map(|line| &line.points).map(|&(_, value)| value);
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    if low > 0.0 && high >= LOGARITHMIC_FROM * low { Scale::Logarithmic } else { Scale::Linear }
}

/// A value of each step, where it has one.
pub fn of_steps(record: &JobRecord, value: impl Fn(&Step) -> Option<f64>) -> Vec<Point> {
    record.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
}

/// A value of each evaluation of a task on its validation data, where it has one.
pub fn of_evaluations(
    record: &JobRecord,
    task: &str,
    value: impl Fn(&Evaluation) -> Option<f64>,
) -> Vec<Point> {
    let of_task = |evaluation: &&Evaluation| evaluation.task == task && evaluation.split == "valid";
    let mut evaluations: Vec<&Evaluation> = record.evaluations.iter().filter(of_task).collect();
    // A job that chose its best weights evaluates them again in the end, whatever step it is at by then.
    let best = record.manifest.as_ref().and_then(|manifest| manifest.best_step);
    if evaluations.len() > 1
        && evaluations.last().is_some_and(|last| best.is_some_and(|best| best != last.step))
    {
        evaluations.pop();
    }
    evaluations
        .into_iter()
        .filter_map(|evaluation| Some((evaluation.step as f64, value(evaluation)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::report::records::Manifest;

    fn plan(curves: usize) -> Plan<'static> {
        let curve = |place| Curve { name: "curve", place, points: vec![(0.0, 1.0), (1.0, 2.0)] };
        Plan {
            title: "curves".into(),
            curves: (0..curves).map(curve).collect(),
            kind: Kind::Exact(Scale::Linear),
        }
    }

    #[test]
    fn charts_stand_two_in_a_row_and_leave_no_gap() {
        let sizes = |plans: Vec<Plan<'static>>| -> Vec<Size> {
            panels(plans).unwrap().iter().map(|panel| panel.size).collect()
        };
        assert_eq!(sizes(vec![plan(1), plan(2)]), [Size::Half, Size::Half]);
        assert_eq!(sizes(vec![plan(1), plan(0), plan(2), plan(3)]), [Size::Wide, Size::Half, Size::Half]);
        assert_eq!(sizes(vec![plan(0)]), []);
    }

    #[test]
    fn more_curves_than_colours_stand_apart() {
        assert_eq!(panels(vec![plan(MOST_LINES)]).unwrap()[0].charts.len(), 1);
        assert_eq!(panels(vec![plan(MOST_LINES + 1)]).unwrap()[0].charts.len(), MOST_LINES + 1);
    }

    #[test]
    fn the_scale_is_logarithmic_where_values_differ_much() {
        let line = |values: &[f64]| {
            let points = values.iter().map(|&value| (value, value)).collect();
            [Line { colour: 0, points, faint: Vec::new(), marked: false }]
        };
        assert_eq!(resolve(Scale::Linear, &line(&[0.1, 1.0])), Scale::Logarithmic);
        assert_eq!(resolve(Scale::Linear, &line(&[0.2, 1.0])), Scale::Linear);
        assert_eq!(resolve(Scale::Linear, &line(&[0.0, 1.0])), Scale::Linear);
        assert_eq!(resolve(Scale::FromZero, &line(&[0.1, 1.0])), Scale::FromZero);
    }

    #[test]
    fn the_last_evaluation_of_chosen_weights_is_no_point_of_the_curve() {
        let evaluation = |step, loss| Evaluation {
            step,
            task: "t".into(),
            split: "valid".into(),
            loss: Some(loss),
            ..Evaluation::default()
        };
        let mut record = JobRecord {
            evaluations: [(0, 3.0), (10, 1.0), (20, 2.0), (20, 1.0)].map(|(s, l)| evaluation(s, l)).into(),
            manifest: Some(Manifest { best_step: Some(10), ..Manifest::default() }),
            ..JobRecord::default()
        };
        let points = |record: &JobRecord| of_evaluations(record, "t", |evaluation| evaluation.loss);
        assert_eq!(points(&record), [(0.0, 3.0), (10.0, 1.0), (20.0, 2.0)]);
        // Its last step may have no evaluation of its own.
        record.evaluations.remove(2);
        assert_eq!(points(&record), [(0.0, 3.0), (10.0, 1.0)]);
        record.manifest = None;
        assert_eq!(points(&record), [(0.0, 3.0), (10.0, 1.0), (20.0, 1.0)]);
    }
}
