//! What a product computes and where its outputs go, with every shape checked before it becomes an address.

use bytemuck::Zeroable;

use super::super::elementwise::{RowCount, access};
use super::super::params::{self, GEMM_RANK_EXT_COLUMNS, GemmParams, GemmSite, ROW_TILE};
use super::super::{CudaError, DeviceBuffer, DeviceSlice, Half, Matrix};
use super::{Scratch, SiteGroup, Step, k_slices};

/// What becomes of the sums of a product.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// `y = sum + bias`
    Store,
    /// `y = residual + sum + bias`, both with the stride of y; the residual may be y.
    AddResidual(DeviceSlice<'a, Half>),
    /// `y = silu(sum₀ + bias₀) ⊙ (sum₁ + bias₁)` for a group of two sites with equal outputs (Shazeer 2020).
    SwiGlu,
}

/// Rows that a product writes.
#[derive(Clone, Copy)]
pub enum Outputs<'a> {
    /// Sums are rounded once.
    Bf16(Matrix<'a>),
    /// Sums as they are, for [`Epilogue::Store`]: logits.
    Fp32(Matrix<'a, f32>),
}

impl<'a> From<Matrix<'a>> for Outputs<'a> {
    fn from(rows: Matrix<'a>) -> Self {
        Self::Bf16(rows)
    }
}

impl<'a> From<Matrix<'a, f32>> for Outputs<'a> {
    fn from(rows: Matrix<'a, f32>) -> Self {
        Self::Fp32(rows)
    }
}

/// A linear layer without experts: what an adapter puts in the place of a whole layer.
#[derive(Clone, Copy)]
pub struct FrozenLayer<'a> {
    /// `[out_features, in_features]`, the latter a multiple of 8.
    pub weight: DeviceSlice<'a, Half>,
    /// `[out_features]`
    pub bias: Option<DeviceSlice<'a, f32>>,
    pub in_features: usize,
    pub out_features: usize,
}

/// Tiles of `columns` columns that cover outputs: no tile straddles sites, unless it pairs them.
pub(super) fn column_tiles(widths: &[usize], columns: usize, paired: bool) -> usize {
    if paired {
        return widths[0].div_ceil(columns / 2);
    }
    widths.iter().map(|width| width.div_ceil(columns)).sum()
}

/// A product whose extents fit.
pub(super) struct Product {
    pub(super) params: GemmParams,
    pub(super) row_bound: usize,
    pub(super) overlap: bool,
    widths: Vec<usize>,
}

impl Product {
    /// Tiles of `columns` columns over the outputs.
    pub(super) fn column_tiles(&self, columns: usize) -> usize {
        let paired = self.params.epilogue == params::Epilogue::Swiglu as u32;
        column_tiles(&self.widths, columns, paired)
    }

    /// Tiles of `gemm_rank_ext`.
    pub(super) fn tiles(&self) -> usize {
        self.column_tiles(GEMM_RANK_EXT_COLUMNS) * self.row_bound.div_ceil(ROW_TILE)
    }

    /// A group's, with V and the lists of a step.
    pub(super) fn of_group(
        group: &SiteGroup,
        x: Matrix<'_>,
        y: Outputs<'_>,
        epilogue: Epilogue<'_>,
        step: &Step<'_>,
    ) -> Result<Self, CudaError> {
        check_step(group, x, step)?;
        let mut product = Self {
            params: GemmParams {
                v: step.scratch.v().address(),
                chunks: group.list().address(),
                starts: group.starts().address(),
                rows: step.work.rows_address(),
                tile_entries: step.work.tile_entries_address(),
                entry_slots: step.work.entry_slots_address(),
                gates: step.work.gates_address(),
                changes_columns: group.sites().iter().any(|site| site.chunks.changes_columns()).into(),
                ..Zeroable::zeroed()
            },
            row_bound: step.row_bound,
            overlap: step.overlap,
            widths: group.widths(),
        };
        for (to, site) in product.params.site.iter_mut().zip(group.sites()) {
            *to = GemmSite {
                weight: site.weight.address(),
                bias: site.bias.as_ref().map_or(0, DeviceBuffer::address),
                b: site.chunks.b(),
                slots: site.chunks.slots().address(),
                ..Zeroable::zeroed()
            };
        }
        product.complete(group.in_features(), group.slices(), x, y, epilogue, step.scratch)?;
        Ok(product)
    }

    /// A frozen layer's: that of a group of it alone, without adapters.
    pub(super) fn of_layer(
        layer: FrozenLayer<'_>,
        x: Matrix<'_>,
        y: Outputs<'_>,
        rows: RowCount<'_>,
        scratch: &Scratch,
    ) -> Result<Self, CudaError> {
        let FrozenLayer { weight, bias, in_features, out_features } = layer;
        check_layer(in_features, out_features, weight.len(), bias.map(|bias| bias.len()))?;
        let whole = in_features.is_multiple_of(8) && weight.address().is_multiple_of(16);
        if !whole || rows.count.len() != 1 {
            return Err(CudaError::Shape(format!(
                "a frozen layer from {in_features} at {:#x} with {} row counts: wanted multiples of 8 and of 16, and one",
                weight.address(),
                rows.count.len()
            )));
        }
        check_inputs(x, rows.bound, in_features)?;
        let slices = k_slices(in_features, [out_features]);
        scratch.check_product(&[out_features], slices)?;
        let mut product = Self {
            params: GemmParams { rows: rows.count.address(), ..Zeroable::zeroed() },
            row_bound: rows.bound,
            overlap: rows.overlap,
            widths: vec![out_features],
        };
        product.params.site[0] = GemmSite {
            weight: weight.address(),
            bias: bias.map_or(0, |bias| bias.address()),
            ..Zeroable::zeroed()
        };
        product.complete(in_features, slices, x, y, Epilogue::Store, scratch)?;
        Ok(product)
    }

    /// Fills in what depends on shapes.
    fn complete(
        &mut self,
        in_features: usize,
        slices: usize,
        x: Matrix<'_>,
        y: Outputs<'_>,
        epilogue: Epilogue<'_>,
        scratch: &Scratch,
    ) -> Result<(), CudaError> {
        let Self { params: to, row_bound: rows, widths, .. } = self;
        let width = match epilogue {
            Epilogue::SwiGlu if widths.len() != 2 || widths[0] != widths[1] => {
                return Err(CudaError::Shape(format!(
                    "SwiGLU of outputs {widths:?}, wanted two of equal width"
                )));
            }
            Epilogue::SwiGlu => widths[0],
            Epilogue::Store | Epilogue::AddResidual(_) => widths.iter().sum(),
        };
        (to.y, to.y_stride) = match y {
            Outputs::Bf16(y) => {
                check_rows("y", y, *rows, width)?;
                (y.data.address(), y.stride as u32)
            }
            Outputs::Fp32(y) => {
                check_rows("y", y, *rows, width)?;
                (y.data.address(), y.stride as u32)
            }
        };
        let stride = to.y_stride as usize;
        to.epilogue = match (epilogue, y) {
            (Epilogue::Store, Outputs::Bf16(_)) => params::Epilogue::Store,
            (Epilogue::Store, Outputs::Fp32(_)) => params::Epilogue::StoreFp32,
            (_, Outputs::Fp32(_)) => {
                return Err(CudaError::Shape("fp32 outputs with an epilogue other than to store".to_owned()));
            }
            (Epilogue::AddResidual(residual), Outputs::Bf16(_)) => {
                check_rows("the residual", Matrix { data: residual, stride }, *rows, width)?;
                to.residual = residual.address();
                params::Epilogue::AddResidual
            }
            (Epilogue::SwiGlu, Outputs::Bf16(_)) => params::Epilogue::Swiglu,
        } as u32;
        to.x = x.data.address();
        to.x_stride = x.stride as u32;
        to.partials = scratch.partials();
        to.arrived = scratch.arrived();
        to.in_features = in_features as u32;
        to.slices = slices as u32;
        to.sites = widths.len() as u32;
        let mut column = 0;
        for (site, width) in to.site.iter_mut().zip(widths.iter()) {
            site.out_features = *width as u32;
            site.y_column = column;
            column += *width as u32;
        }
        let biases = to.site.map(|site| site.bias);
        let addresses = [&biases[..], &[to.y, to.residual]].concat();
        to.access = access(&[&widths[..], &[stride]].concat(), &addresses);
        to.row_tiles = rows.div_ceil(ROW_TILE) as u32;
        self.params.column_tiles = self.column_tiles(GEMM_RANK_EXT_COLUMNS) as u32;
        Ok(())
    }
}

/// That a weight and a bias are as long as a layer's widths say.
pub(super) fn check_layer(
    in_features: usize,
    out_features: usize,
    weight: usize,
    bias: Option<usize>,
) -> Result<(), CudaError> {
    if in_features * out_features == 0 {
        return Err(CudaError::Shape(format!("a layer from {in_features} to {out_features}")));
    }
    let length = |operation, from, into| {
        if from == into { Ok(()) } else { Err(CudaError::Length { operation, from, into }) }
    };
    length("weight of a site", weight, in_features * out_features)?;
    bias.map_or(Ok(()), |bias| length("bias of a site", bias, out_features))
}

/// That a step fits a group, its inputs and its memory.
pub(super) fn check_step(group: &SiteGroup, x: Matrix<'_>, step: &Step<'_>) -> Result<(), CudaError> {
    if step.row_bound > step.work.max_rows() || step.work.max_rows() > group.max_rows() {
        return Err(CudaError::Shape(format!(
            "a step of {} rows, with a work list for {} and a group for {}",
            step.row_bound,
            step.work.max_rows(),
            group.max_rows()
        )));
    }
    if group.is_lookup() {
        return Err(CudaError::Shape("a product of an embedding table, which is looked up".to_owned()));
    }
    step.scratch.check_group(group)?;
    check_inputs(x, step.row_bound, group.in_features())
}

/// That x has `rows` rows of `width` that 16-byte accesses can take.
fn check_inputs(x: Matrix<'_>, rows: usize, width: usize) -> Result<(), CudaError> {
    check_rows("x", x, rows, width)?;
    if !x.stride.is_multiple_of(8) || !x.data.address().is_multiple_of(16) {
        return Err(CudaError::Shape(format!(
            "x at {:#x}, {} elements a row: wanted multiples of 16 and of 8",
            x.data.address(),
            x.stride
        )));
    }
    Ok(())
}

/// That a matrix has `rows` rows of `width`.
fn check_rows<T: bytemuck::Pod>(
    name: &str,
    matrix: Matrix<'_, T>,
    rows: usize,
    width: usize,
) -> Result<(), CudaError> {
    let wanted = if rows == 0 { 0 } else { (rows - 1) * matrix.stride + width };
    if matrix.stride < width || matrix.data.len() < wanted {
        return Err(CudaError::Shape(format!(
            "{name} of {} elements, {} a row, for {rows} rows of {width}",
            matrix.data.len(),
            matrix.stride
        )));
    }
    Ok(())
}
