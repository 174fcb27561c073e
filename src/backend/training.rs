//! The operations of a backward pass, and what is trained by them.
//!
//! The base gets no gradients. A row's gradient travels back through the frozen layers as the row came: it is computed
//! from that row's (for attention, that sequence's) own values in an order that depends on nothing else. Gradients of
//! parameters are sums over rows, added one row after another, ascending, to what is there already. So an adapter's
//! gradient has the same bits however the rows of its batch are cut into steps, and whatever rows stand beside them.
//!
//! With `y = c ⊙ (W x) + bias + g · s · B (A x)` at a site and the gradient `dy` of its output:
//! `dx = Wᵀ (c ⊙ dy) + Aᵀ du`, `du = g · s · Bᵀ dy`, `dA = Σ du xᵀ`, `dB = Σ dy vᵀ` with `v = g · s · A x` as the
//! forward pass kept it, `dg = s · (A x) · (Bᵀ dy)`. DoRA (Liu et al. 2024, section 4.3) takes the norm in
//! `c = m / ‖W + s B A‖` for a constant; its low-rank part is scaled by `c` too, and `dm = Σ dy ⊙ (W x + s B A x) / ‖…‖`.

use std::ops::Range;

use super::{AttentionShape, Backend, BackendError, Gates, HeadNorms, Rows, SitePlace, Write};

/// The parameters of one pair, or as many numbers that belong to them: gradients, moments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairValues {
    /// `[rank, in]`; for a lookup `[rank, vocabulary]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
    /// DoRA's `[out]`, empty without.
    pub magnitude: Vec<f32>,
}

/// A low-rank pair that is trained at one place.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub place: SitePlace,
    pub rank: usize,
    /// `alpha / r`, or `alpha / √r` with rsLoRA.
    pub scale: f32,
    pub weights: PairValues,
}

/// Which numbers of an adapter in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Weights,
    Gradients,
    /// AdamW's running means of gradients, and of their squares.
    FirstMoments,
    SecondMoments,
}

/// One step of AdamW (Loshchilov & Hutter 2019), in the order of operations of `torch.optim.AdamW`:
/// `p ← p · (1 − lr · λ)`, `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    /// Learning rate of B: `lr`, or a multiple of it with LoRA+ (Hayou et al. 2024).
    pub lr_b: f64,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    /// `t`, from 1.
    pub step: u64,
    /// What every gradient is multiplied with first: clipping.
    pub gradient_scale: f32,
}

/// The rows of a training step as operations on sites see them.
pub struct Learning<'a, B: Training> {
    /// Of the rows that the operation is about.
    pub gates: &'a Gates,
    /// One number per row, the same in whatever step the row is computed: dropout is drawn from it.
    pub row_keys: &'a [u64],
    /// The adapters in training, by slot. Rows that use another slot, or none, train nothing there.
    pub trainees: &'a mut [Option<B::Trainee>],
    /// One number per entry of `gates`, in their order, to which gates' gradients are added.
    pub gate_gradients: Option<&'a mut [f32]>,
}

/// A backend that can train.
///
/// Operations are about the rows of the step that [`Backend::begin_step`] named; sequences start at position 0.
pub trait Training: Backend {
    /// An adapter in training: f32 weights, gradients and moments of all its pairs.
    type Trainee: Send;
    /// What the forward pass keeps of one group for the backward pass: `V` of every row.
    type Ranks: Default + Send;

    /// Takes an adapter into training and makes it the content of `slot`, which is empty. Gradients and moments are 0.
    /// `dropout` is the probability with which an element of a pair's input is dropped (the others grow by
    /// `1 / (1 − dropout)`), drawn for each row, place and element by Philox 4x32-10 keyed with the row's key.
    fn trainee(
        &mut self,
        groups: &mut [Self::Group],
        table: &mut Self::Table,
        slot: usize,
        pairs: &[Pair],
        dropout: f32,
    ) -> Result<Self::Trainee, BackendError>;
    /// One part of an adapter in training, pair by pair.
    fn read_part(&mut self, trainee: &Self::Trainee, part: Part) -> Result<Vec<PairValues>, BackendError>;
    /// Replaces one part; new weights become the content of `slot` as well.
    fn write_part(
        &mut self,
        groups: &mut [Self::Group],
        table: &mut Self::Table,
        slot: usize,
        trainee: &mut Self::Trainee,
        part: Part,
        values: &[PairValues],
    ) -> Result<(), BackendError>;
    /// `Σ g²` over all gradients of each pair, in f64: not finite when one of them is not.
    fn squared_gradients(&mut self, trainee: &Self::Trainee) -> Result<Vec<f64>, BackendError>;
    /// One optimizer step; the gradients are 0 afterwards and the new weights the content of `slot`.
    fn adamw(
        &mut self,
        groups: &mut [Self::Group],
        table: &mut Self::Table,
        slot: usize,
        trainee: &mut Self::Trainee,
        step: &AdamW,
    ) -> Result<(), BackendError>;
    fn clear_gradients(&mut self, trainee: &mut Self::Trainee) -> Result<(), BackendError>;

    /// `y = x` for the first `rows` rows.
    fn copy(&mut self, x: &Self::Buffer, rows: usize, y: &mut Self::Buffer) -> Result<(), BackendError>;

    /// [`Backend::linear`] for rows in training, but for dropout and for rounding; keeps `V` in `ranks`.
    /// `number` is the group's: places of its sites are `SitePlace::Group(number, …)`.
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    fn linear_kept(
        &mut self,
        group: &Self::Group,
        number: usize,
        x: &Self::Buffer,
        learning: &Learning<'_, Self>,
        write: Write,
        y: &mut Self::Buffer,
        ranks: &mut Self::Ranks,
    ) -> Result<(), BackendError>;

    /// The gradient of a group's input (`None` where nobody needs it), and those of its pairs.
    ///
    /// `x` and `ranks` are as in the forward pass; `dy` `[rows, Σ out]` is the gradient of all outputs side by side.
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    fn linear_backward(
        &mut self,
        group: &Self::Group,
        number: usize,
        x: &Self::Buffer,
        ranks: &Self::Ranks,
        dy: &Self::Buffer,
        learning: &mut Learning<'_, Self>,
        dx: Option<&mut Self::Buffer>,
    ) -> Result<(), BackendError>;

    /// `y = silu(gate) ⊙ up` of rows `gate | up`: the same bits as [`Backend::linear_swiglu`].
    fn swiglu(
        &mut self,
        gate_up: &Self::Buffer,
        rows: usize,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `d_gate_up` from `dy`: `d_up = dy ⊙ silu(gate)`, `d_gate = dy ⊙ up ⊙ σ(gate) (1 + gate (1 − σ(gate)))`.
    fn swiglu_backward(
        &mut self,
        gate_up: &Self::Buffer,
        dy: &Self::Buffer,
        rows: usize,
        d_gate_up: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// The gradient of [`Backend::rms_norm`]'s input: with `ρ = 1 / √(mean(x²) + ε)` and `u = w ⊙ dy`,
    /// `dx (+)= ρ u − x ρ³ mean(u ⊙ x)`.
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    fn rms_norm_backward(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Vector,
        epsilon: f32,
        dy: &Self::Buffer,
        write: Write,
        dx: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `dq | dk | dv` from the gradient of [`Backend::attention`]'s output. `qkv` is as attention read it (rotated),
    /// `y` what it computed: `dv_j = Σ_i p_ij dy_i`, `ds_ij = p_ij (dy_i · v_j − dy_i · y_i)`, `dq_i = Σ_j ds_ij k_j / √d`,
    /// `dk_j = Σ_i ds_ij q_i / √d` (Dao 2023, section 3).
    #[expect(clippy::too_many_arguments, reason = "one launch, and each argument is its own thing")]
    fn attention_backward(
        &mut self,
        qkv: &Self::Buffer,
        shape: AttentionShape,
        window: Option<usize>,
        rows: &Rows,
        y: &Self::Buffer,
        dy: &Self::Buffer,
        d_qkv: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Turns `dq | dk` back through the rotation and, where there are `norms`, through the heads' normalisation, whose
    /// inputs are `qkv` (unused without norms); `dv` stays.
    fn rope_backward(
        &mut self,
        qkv: &Self::Buffer,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self>>,
        tables: &Self::Rotary,
        rows: &Rows,
        d_qkv: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// The gradients of pairs at the table from that of [`Backend::embed`]'s output.
    fn embed_backward(
        &mut self,
        table: &Self::Table,
        rows: &Rows,
        dy: &Self::Buffer,
        learning: &mut Learning<'_, Self>,
    ) -> Result<(), BackendError>;

    /// `y[picked[i]] = x[i]`, and 0 in all other rows of `span`, which holds the picked ones. The operations after this
    /// are about all rows of the step again.
    fn scatter_rows(
        &mut self,
        x: &Self::Buffer,
        picked: &[u32],
        span: Range<usize>,
        y: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Cross-entropy of the first `targets.len()` rows of `logits`: appends `−log softmax(logits[i])[targets[i]]` to
    /// `losses` and, where there are `weights`, leaves in `logits` their gradient
    /// `weights[i] · (softmax(logits[i]) − onehot(targets[i]))`.
    fn cross_entropy(
        &mut self,
        logits: &mut Self::Buffer,
        targets: &[u32],
        weights: Option<&[f32]>,
        losses: &mut Vec<f32>,
    ) -> Result<(), BackendError>;
}
