//! Row lists: what one step computes.
//!
//! A step's rows are the tokens of many sequences, one sequence after another without padding, sorted so that
//! sequences with the same experts are neighbours.

use std::ops::Range;

/// The sparse gate matrix `[rows × experts]` in compressed rows, and its runs of rows with the same experts.
///
/// Gates may differ within a run; the list of experts does not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gates {
    runs: Vec<GateRun>,
    experts: Vec<u32>,
    values: Vec<f32>,
    rows: usize,
}

/// Neighbouring rows that use the same experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateRun {
    pub rows: Range<usize>,
    /// Where the run's expert slots lie in [`Gates::experts_of`].
    experts: Range<usize>,
    /// Where the gates of the run's first row start.
    values: usize,
}

impl Gates {
    pub fn clear(&mut self) {
        self.runs.clear();
        self.experts.clear();
        self.values.clear();
        self.rows = 0;
    }

    /// Appends `rows` rows that all use the same `(slot, gate)` pairs.
    pub fn push_rows(&mut self, rows: usize, entries: &[(u32, f32)]) {
        if rows == 0 {
            return;
        }
        let extends = self.runs.last().is_some_and(|run| {
            let last = &self.experts[run.experts.clone()];
            last.len() == entries.len() && last.iter().zip(entries).all(|(a, (b, _))| a == b)
        });
        if extends {
            self.runs.last_mut().expect("just looked at it").rows.end += rows;
        } else {
            let start = self.experts.len();
            self.experts.extend(entries.iter().map(|&(slot, _)| slot));
            self.runs.push(GateRun {
                rows: self.rows..self.rows + rows,
                experts: start..self.experts.len(),
                values: self.values.len(),
            });
        }
        for _ in 0..rows {
            self.values.extend(entries.iter().map(|&(_, gate)| gate));
        }
        self.rows += rows;
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn runs(&self) -> &[GateRun] {
        &self.runs
    }

    /// Expert slots that every row of the run uses.
    pub fn experts_of(&self, run: &GateRun) -> &[u32] {
        &self.experts[run.experts.clone()]
    }

    /// Gates of a row of the run, one per expert of the run.
    pub fn gates_of(&self, run: &GateRun, row: usize) -> &[f32] {
        let width = run.experts.len();
        let start = run.values + (row - run.rows.start) * width;
        &self.values[start..start + width]
    }

    /// All gates: row after row, one per expert of the row's run.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Where in [`values`](Self::values) the gates of the run's first row start; those of its other rows follow.
    pub fn first_value(&self, run: &GateRun) -> usize {
        run.values
    }

    /// The gates of some of these rows (`picked` ascending), into `to`.
    pub fn pick(&self, picked: &[u32], to: &mut Gates) {
        to.clear();
        let mut runs = self.runs.iter();
        let mut run = runs.next();
        for &row in picked {
            let row = row as usize;
            while run.is_some_and(|r| r.rows.end <= row) {
                run = runs.next();
            }
            let run = run.expect("picked rows lie in the matrix");
            to.push_row(self.experts_of(run), self.gates_of(run, row));
        }
    }

    fn push_row(&mut self, experts: &[u32], gates: &[f32]) {
        let extends = self.runs.last().is_some_and(|run| &self.experts[run.experts.clone()] == experts);
        if extends {
            self.runs.last_mut().expect("just looked at it").rows.end += 1;
        } else {
            let start = self.experts.len();
            self.experts.extend_from_slice(experts);
            self.runs.push(GateRun {
                rows: self.rows..self.rows + 1,
                experts: start..self.experts.len(),
                values: self.values.len(),
            });
        }
        self.values.extend_from_slice(gates);
        self.rows += 1;
    }
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug)]
pub struct SequenceRows {
    /// Its rows in the step.
    pub rows: Range<usize>,
    /// Position of its first row: how many of its tokens the cache holds already.
    pub start: usize,
    /// Which rotary table its positions use.
    pub rotary_variant: usize,
    /// Where its pages lie in [`Rows::pages`], in order of position.
    pub pages: Range<usize>,
}

/// Everything a backend needs to know about the rows of one step.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Token id per row.
    pub tokens: Vec<u32>,
    pub sequences: Vec<SequenceRows>,
    /// Page numbers of all sequences.
    pub pages: Vec<u32>,
    pub gates: Gates,
}

impl Rows {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
        self.pages.clear();
        self.gates.clear();
    }

    /// Appends a sequence's next `tokens`, whose first stands at position `start`.
    pub fn push_sequence(
        &mut self,
        tokens: &[u32],
        start: usize,
        rotary_variant: usize,
        pages: &[u32],
        entries: &[(u32, f32)],
    ) {
        let first = self.tokens.len();
        let first_page = self.pages.len();
        self.tokens.extend_from_slice(tokens);
        self.pages.extend_from_slice(pages);
        self.sequences.push(SequenceRows {
            rows: first..self.tokens.len(),
            start,
            rotary_variant,
            pages: first_page..self.pages.len(),
        });
        self.gates.push_rows(tokens.len(), entries);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_with_the_same_experts_form_one_run() {
        let mut gates = Gates::default();
        gates.push_rows(2, &[(3, 1.0)]);
        gates.push_rows(1, &[(3, 0.5)]);
        gates.push_rows(2, &[]);
        gates.push_rows(1, &[(1, 0.25), (2, 0.75)]);
        let runs: Vec<_> =
            gates.runs().iter().map(|r| (r.rows.clone(), gates.experts_of(r).to_vec())).collect();
        assert_eq!(runs, [(0..3, vec![3]), (3..5, vec![]), (5..6, vec![1, 2])]);
        assert_eq!(gates.gates_of(&gates.runs()[0], 2), [0.5]);
        assert_eq!(gates.gates_of(&gates.runs()[2], 5), [0.25, 0.75]);
    }

    #[test]
    fn picked_rows_keep_their_gates() {
        let mut gates = Gates::default();
        gates.push_rows(2, &[(0, 1.0)]);
        gates.push_rows(2, &[(1, 0.5), (2, 0.5)]);
        gates.push_rows(1, &[(0, 1.0)]);
        let mut picked = Gates::default();
        gates.pick(&[1, 3, 4], &mut picked);
        assert_eq!(picked.rows(), 3);
        let experts: Vec<_> = picked.runs().iter().map(|run| picked.experts_of(run).to_vec()).collect();
        assert_eq!(experts, [vec![0], vec![1, 2], vec![0]]);
        assert_eq!(picked.gates_of(&picked.runs()[1], 1), [0.5, 0.5]);
    }
}
