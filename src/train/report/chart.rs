//! Curves over steps, as SVG that stands in the page.
//!
//! `plotters` draws with the light theme's colours written out. The page's style then picks each colour up by its
//! value (`[stroke="#0072B2"]`) and names its counterpart in the dark theme, so a drawing needs no script, no second
//! copy and no rewriting to follow the theme. Its text has the page's font, for the same reason.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use serde::Serialize;

use super::ReportError;
use super::numbers::tick;
use super::statistics::Point;

/// Curves that one chart can hold and a reader tell apart.
pub const MOST_LINES: usize = SERIES.len();

/// Colours of curves in the light and in the dark theme.
///
/// Any two differ by at least 15 in CAM02-UCS, also as seen with each kind of colour blindness, and by 3:1 from the
/// page.
const SERIES: [(Colour, Colour); 6] = [
    (Colour(0x00, 0x72, 0xb2), Colour(0x4c, 0xa6, 0xe8)),
    (Colour(0xde, 0x6e, 0x00), Colour(0xff, 0xa6, 0x57)),
    (Colour(0x5c, 0x11, 0x50), Colour(0xf6, 0xc8, 0xf9)),
    (Colour(0x3c, 0xa3, 0x6a), Colour(0x8c, 0xe8, 0xc0)),
    (Colour(0xb5, 0x0c, 0x14), Colour(0xf2, 0x3d, 0x53)),
    (Colour(0x8f, 0x7b, 0x90), Colour(0xb0, 0x8d, 0x96)),
];
/// Lines behind the curves, and text beside them.
const GRID: (Colour, Colour) = (Colour(0xe4, 0xe7, 0xec), Colour(0x2c, 0x32, 0x3b));
const LABEL: (Colour, Colour) = (Colour(0x5b, 0x65, 0x73), Colour(0x9a, 0xa5, 0xb4));

/// `plotters` puts everything at whole coordinates: drawn so many times larger, nothing visible is rounded.
const SCALE: u32 = 10;
const FONT_SIZE: u32 = 12;
/// The SVG backend divides a font's size by this.
const FONT_FACTOR: f64 = 1.24;

#[derive(Clone, Copy)]
struct Colour(u8, u8, u8);

impl Colour {
    fn hex(self) -> String {
        format!("#{:02X}{:02X}{:02X}", self.0, self.1, self.2)
    }

    fn rgb(self) -> RGBColor {
        RGBColor(self.0, self.1, self.2)
    }
}

/// A colour of the drawings: what the page's style calls it, and what it is in each theme.
#[derive(Serialize)]
pub struct PaletteEntry {
    name: String,
    light: String,
    dark: String,
}

/// All colours that a drawing may have.
pub fn palette() -> Vec<PaletteEntry> {
    let series = SERIES.iter().enumerate().map(|(index, pair)| (format!("series-{index}"), *pair));
    let others = [("grid".to_owned(), GRID), ("label".to_owned(), LABEL)];
    (series.chain(others))
        .map(|(name, (light, dark))| PaletteEntry { name, light: light.hex(), dark: dark.hex() })
        .collect()
}

/// A curve.
pub struct Line {
    /// Index of its colour, below [`MOST_LINES`].
    pub colour: usize,
    /// By step.
    pub points: Vec<Point>,
    /// The same before it was smoothed: drawn behind, faintly.
    pub faint: Vec<Point>,
    /// Whether each point is marked: there are few.
    pub marked: bool,
}

/// What the values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// From 0.
    FromZero,
    /// Powers of ten, evenly.
    Logarithmic,
    /// Shares, 0 to 1.
    Share,
}

/// How much room a chart has, in pixels of a wide window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// A row of its own.
    Wide,
    /// Two in a row.
    Half,
    /// Three in a row.
    Third,
}

impl Size {
    fn pixels(self) -> (u32, u32) {
        match self {
            Self::Wide => (1040, 280),
            Self::Half => (510, 240),
            Self::Third => (334, 180),
        }
    }
}

/// Where the axes begin and end. For a logarithmic scale the values are powers of ten.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    steps: (f64, f64),
    values: (f64, f64),
}

impl Bounds {
    /// Room for all lines. Single faint points far out do not count: they would flatten everything else.
    pub fn around<'a>(lines: impl IntoIterator<Item = &'a Line> + Clone, scale: Scale) -> Self {
        let mut bounds = Self::NOTHING;
        for line in lines {
            let mut faint: Vec<f64> = line.faint.iter().map(|&(_, value)| scaled(value, scale)).collect();
            faint.sort_by(f64::total_cmp);
            let out = faint.len() / 50;
            bounds.include_values(&faint[out..faint.len() - out]);
            for &(step, value) in &line.points {
                bounds.steps = (bounds.steps.0.min(step), bounds.steps.1.max(step));
                bounds.include_values(&[scaled(value, scale)]);
            }
        }
        bounds.steps = widened(bounds.steps, 0.0);
        bounds.values = match scale {
            Scale::Share => (0.0, 1.0),
            Scale::FromZero => (0.0, widened((0.0, bounds.values.1), 0.05).1),
            Scale::Linear | Scale::Logarithmic => widened(bounds.values, 0.05),
        };
        bounds
    }

    const NOTHING: Self =
        Self { steps: (f64::INFINITY, f64::NEG_INFINITY), values: (f64::INFINITY, f64::NEG_INFINITY) };

    fn include_values(&mut self, values: &[f64]) {
        for value in values {
            self.values = (self.values.0.min(*value), self.values.1.max(*value));
        }
    }
}

/// A range with a margin on both sides, as a share of it; nothing and single points become something to draw.
fn widened((low, high): (f64, f64), margin: f64) -> (f64, f64) {
    if low > high {
        return (0.0, 1.0);
    }
    if low == high {
        let reach = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
        return (low - reach, high + reach);
    }
    let margin = margin * (high - low);
    (low - margin, high + margin)
}

/// Where a value stands on its axis. What has no logarithm stands at the lower end.
fn scaled(value: f64, scale: Scale) -> f64 {
    match scale {
        Scale::Logarithmic => value.max(1e-12).log10(),
        _ => value,
    }
}

/// What stands inside an `<svg>`: markup without any text but numbers.
#[derive(Serialize)]
pub struct Drawing {
    /// Its coordinates, as the `viewBox` of the `<svg>`.
    view_box: String,
    content: String,
}

/// Draws lines over steps.
pub fn draw(lines: &[Line], scale: Scale, size: Size, bounds: Bounds) -> Result<Drawing, ReportError> {
    let (width, height) = size.pixels();
    let (width, height) = (width * SCALE, height * SCALE);
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    draw_on(&area, lines, scale, size, bounds).map_err(|error| ReportError::Drawing(error.to_string()))?;
    drop(area);
    // The page writes the outer element itself: with a size from its style, and without a namespace.
    let content = svg.split_once('>').and_then(|(_, rest)| rest.rsplit_once("</svg>"));
    let content = content.map(|(content, _)| content.to_owned()).unwrap_or_default();
    Ok(Drawing { view_box: format!("0 0 {width} {height}"), content })
}

type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_on<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    lines: &[Line],
    scale: Scale,
    size: Size,
    bounds: Bounds,
) -> Result<(), DrawError<'a>> {
    let (low, high) = bounds.values;
    let (marks_of_steps, marks_of_values) = match size {
        Size::Wide => (10, 5),
        Size::Half => (5, 5),
        Size::Third => (3, 4),
    };
    let value_ticks = match scale {
        Scale::Logarithmic => powers(low, high, marks_of_values),
        Scale::Share => vec![0.0, 0.25, 0.5, 0.75, 1.0],
        _ => ticks(low, high, marks_of_values),
    };
    let value_label = |value: &f64| match scale {
        Scale::Logarithmic => tick(10f64.powf(*value)),
        Scale::Share => format!("{:.0} %", 100.0 * value),
        _ => tick(*value),
    };
    let (first, last) = bounds.steps;
    let step_ticks =
        ticks(first, last, marks_of_steps).into_iter().filter(|step| step.fract() == 0.0).collect();
    let steps = Axis { range: first..last, ticks: step_ticks };
    let values = Axis { range: low..high, ticks: value_ticks };

    let mut chart = ChartBuilder::on(area)
        .margin_top(10 * SCALE)
        .margin_right(16 * SCALE)
        .x_label_area_size(24 * SCALE)
        .y_label_area_size(52 * SCALE)
        .build_cartesian_2d(steps, values)?;
    let font = ("sans-serif", f64::from(FONT_SIZE * SCALE) * FONT_FACTOR).into_font().color(&LABEL.0.rgb());
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID.0.rgb().stroke_width(SCALE))
        .light_line_style(TRANSPARENT)
        .axis_style(GRID.0.rgb().stroke_width(SCALE))
        .set_all_tick_mark_size(4 * SCALE)
        .label_style(font)
        .x_label_formatter(&|step| tick(*step))
        .y_label_formatter(&value_label)
        .draw()?;

    let place = |&(step, value): &Point| (step, scaled(value, scale).clamp(low, high));
    for line in lines {
        let colour = SERIES[line.colour].0.rgb();
        let faint = line.faint.iter().map(place);
        chart.draw_series(LineSeries::new(faint, colour.mix(0.3).stroke_width(SCALE)))?;
    }
    for line in lines {
        let colour = SERIES[line.colour].0.rgb();
        let points = line.points.iter().map(place);
        chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2 * SCALE)))?;
        if line.marked || line.points.len() == 1 {
            let marks = points.map(|point| Circle::new(point, 3 * SCALE, colour.filled()));
            chart.draw_series(marks)?;
        }
    }
    area.present()
}

/// An axis with marks of our choice.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        start + (share * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Round numbers between two, about so many: multiples of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64, about: usize) -> Vec<f64> {
    let rough = (high - low) / about as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|multiple| multiple as f64 * step).collect()
}

/// As [`ticks`] between two powers of ten: whole powers, with 2 and 5 times them where there is room.
fn powers(low: f64, high: f64, about: usize) -> Vec<f64> {
    let (first, last) = (low.floor() as i32, high.ceil() as i32);
    let marks = |factors: &[f64], stride: usize| -> Vec<f64> {
        (first..=last)
            .step_by(stride)
            .flat_map(|power| factors.iter().map(move |factor| f64::from(power) + factor.log10()))
            .filter(|mark| (low..=high).contains(mark))
            .collect()
    };
    let candidates = [marks(&[1.0, 2.0, 5.0], 1), marks(&[1.0, 3.0], 1), marks(&[1.0], 1)];
    let fitting = candidates.into_iter().find(|marks| marks.len() <= about + 1);
    fitting.unwrap_or_else(|| marks(&[1.0], ((last - first) as usize).div_ceil(about)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: Vec<Point>) -> Line {
        Line { colour: 0, points, faint: Vec::new(), marked: false }
    }

    fn near(found: &[f64], wanted: &[f64]) {
        let equal = found.len() == wanted.len()
            && found.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-9);
        assert!(equal, "{found:?} is not {wanted:?}");
    }

    #[test]
    fn axes_are_marked_at_round_numbers() {
        near(&ticks(0.0, 1.0, 5), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        near(&ticks(-0.07, 1.3, 5), &[0.0, 0.5, 1.0]);
        near(&ticks(1.0, 96.0, 5), &[20.0, 40.0, 60.0, 80.0]);
        near(&powers(-2.1, 0.1, 5), &[-2.0, 3f64.log10() - 2.0, -1.0, 3f64.log10() - 1.0, 0.0]);
        near(&powers(-9.0, 3.0, 4), &[-9.0, -6.0, -3.0, 0.0, 3.0]);
        near(&powers(0.1, 0.9, 5), &[2f64.log10(), 5f64.log10()]);
    }

    #[test]
    fn a_single_outlier_does_not_flatten_a_curve() {
        let mut noisy = line((0..200).map(|i| (f64::from(i), 2.0)).collect());
        noisy.faint = noisy.points.iter().map(|&(step, value)| (step, value + 0.1)).collect();
        noisy.faint[100].1 = 1e6;
        let (low, high) = Bounds::around([&noisy], Scale::Linear).values;
        assert!(low > 1.9 && high < 2.2, "{low} to {high}");
    }

    #[test]
    fn nothing_a_point_and_a_flat_line_can_be_drawn() {
        for points in [vec![], vec![(1.0, 0.0)], vec![(1.0, 2.0), (2.0, 2.0)], vec![(0.0, -1.0), (5.0, 0.0)]]
        {
            for scale in [Scale::Linear, Scale::FromZero, Scale::Logarithmic, Scale::Share] {
                let lines = [line(points.clone())];
                let bounds = Bounds::around(&lines, scale);
                let drawing = draw(&lines, scale, Size::Third, bounds).unwrap();
                assert_eq!(drawing.view_box, "0 0 3340 1800");
                assert!(drawing.content.contains("<text"), "{}", drawing.content);
                assert!(!["NaN", "://", "svg"].iter().any(|text| drawing.content.contains(text)));
            }
        }
    }

    #[test]
    fn a_drawing_has_no_colour_that_the_style_does_not_know() {
        let lines: Vec<Line> =
            (0..MOST_LINES).map(|colour| Line { colour, ..line(vec![(0.0, 1.0), (9.0, 2.0)]) }).collect();
        let bounds = Bounds::around(&lines, Scale::Linear);
        let svg = draw(&lines, Scale::Linear, Size::Wide, bounds).unwrap().content;
        let known: Vec<String> = palette().into_iter().map(|entry| entry.light).collect();
        let used: Vec<&str> = svg.match_indices("\"#").map(|(at, _)| &svg[at + 1..at + 8]).collect();
        assert!(used.len() > MOST_LINES);
        for colour in used {
            assert!(known.iter().any(|known| known == colour), "{colour}");
        }
    }
}
