//! The lookup of token embeddings, and what adapters add to it.

use bytemuck::Zeroable;

use super::super::params::{EmbedParams, RANK_CHUNK, ROW_TILE, RankChunk};
use super::super::{CudaError, DeviceSlice, Half, Stream};
use super::{ElementwiseKernels, Matrix, RowCount, StepRows, access, check_rows, column_grid};

/// A frozen embedding table and its experts.
#[derive(Clone, Copy)]
pub struct EmbeddingTable<'a> {
    /// `[vocabulary, width]`
    pub weight: DeviceSlice<'a, Half>,
    pub vocabulary: usize,
    pub width: usize,
    pub experts: Option<LookupExperts<'a>>,
}

/// The low-rank part of a lookup: arenas, and the step's chunk list and gates.
#[derive(Clone, Copy)]
pub struct LookupExperts<'a> {
    /// `[chunk][vocabulary][16]`: A transposed chunk by chunk, so that the ranks of a token are one access.
    pub a: DeviceSlice<'a, Half>,
    /// `[chunk][width][16]`
    pub b: DeviceSlice<'a, Half>,
    /// What `chunk_lists` leaves for the table's site group of one site.
    pub chunks: DeviceSlice<'a, RankChunk>,
    /// `[tiles · cells + 1]`
    pub starts: DeviceSlice<'a, u32>,
    /// Cells of a row tile: the group's K slices.
    pub cells: usize,
    /// `[entries][128]`: the work list's.
    pub gates: DeviceSlice<'a, f32>,
}

impl ElementwiseKernels {
    /// `y[row] = table[token[row]] + Σ gate · scale · B · A[:, token[row]]` in fp32, rounded once.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the table is smaller than the step's vocabulary, or buffers than they have to be.
    pub fn embed(
        &self,
        stream: &Stream,
        table: &EmbeddingTable<'_>,
        steps: &StepRows,
        count: RowCount<'_>,
        y: Matrix<'_>,
    ) -> Result<(), CudaError> {
        self.embed_from(0, stream, table, steps, count, y)
    }

    /// [`embed`](Self::embed) of the step's rows from `first` on, into y from its own first row on. Experts are looked up
    /// by tiles of the whole step: a table that has some starts at row 0.
    pub fn embed_from(
        &self,
        first: usize,
        stream: &Stream,
        table: &EmbeddingTable<'_>,
        steps: &StepRows,
        count: RowCount<'_>,
        y: Matrix<'_>,
    ) -> Result<(), CudaError> {
        let EmbeddingTable { weight, vocabulary, width, experts } = *table;
        check_rows("y", y, count.bound, width)?;
        count.check(Some(steps))?;
        if first + count.bound > steps.limits().rows || first > 0 && experts.is_some() {
            return Err(CudaError::Shape(format!(
                "a lookup of {} rows from row {first} on of {}, with experts: {}",
                count.bound,
                steps.limits().rows,
                experts.is_some()
            )));
        }
        if weight.len() != vocabulary * width || vocabulary < steps.limits().vocabulary {
            return Err(CudaError::Shape(format!(
                "an embedding table of {} elements for {vocabulary} tokens of {width}, with steps of {} tokens",
                weight.len(),
                steps.limits().vocabulary
            )));
        }
        let mut params = EmbedParams {
            table: weight.address(),
            tokens: steps.tokens().slice(first..).address(),
            y: y.data.address(),
            rows: count.count.address(),
            vocabulary: vocabulary as u32,
            width: width as u32,
            y_stride: y.stride as u32,
            access: access(&[width, y.stride], &[weight.address(), y.data.address()]),
            ..Zeroable::zeroed()
        };
        if let Some(experts) = experts {
            experts.check(table, count.bound)?;
            params.chunks = experts.chunks.address();
            params.starts = experts.starts.address();
            params.gates = experts.gates.address();
            params.a = experts.a.address();
            params.b = experts.b.address();
            params.cells = experts.cells as u32;
        }
        let Some(launch) = column_grid(count, width) else { return Ok(()) };
        // SAFETY: the step's tokens are below its vocabulary, and every extent has been checked above; the list names
        // chunks of the arenas and rows of the gates, as whoever built it promises.
        unsafe { stream.launch(&self.embed, &launch, &params) }
    }
}

impl LookupExperts<'_> {
    fn check(&self, table: &EmbeddingTable<'_>, rows: usize) -> Result<(), CudaError> {
        let (a_chunk, b_chunk) = (table.vocabulary * RANK_CHUNK, table.width * RANK_CHUNK);
        let whole = self.a.len().is_multiple_of(a_chunk) && self.b.len().is_multiple_of(b_chunk);
        if !whole || self.a.len() / a_chunk != self.b.len() / b_chunk {
            return Err(CudaError::Shape(format!(
                "arenas of {} and {} elements for a lookup: wanted as many chunks of {a_chunk} as of {b_chunk}",
                self.a.len(),
                self.b.len()
            )));
        }
        let aligned = [self.a.address(), self.b.address()].iter().all(|address| address.is_multiple_of(16));
        let starts = rows.div_ceil(ROW_TILE) * self.cells + 1;
        if !aligned || self.starts.len() < starts || !self.gates.len().is_multiple_of(ROW_TILE) {
            return Err(CudaError::Shape(format!(
                "a lookup of {rows} rows with {} starts and {} gates: wanted {starts} starts, gates in multiples of \
                 {ROW_TILE}, and arenas on 16-byte boundaries",
                self.starts.len(),
                self.gates.len()
            )));
        }
        Ok(())
    }
}
