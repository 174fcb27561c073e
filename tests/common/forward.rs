//! Golden models on any backend, without an engine.

use loramux::adapter::peft::{Limits, read_adapter};
use loramux::backend::{Backend, BackendError, PAGE, Rows, SequenceRows};
use loramux::model::{Base, Transformer, WorkspaceSize};

use super::Case;

/// Tokens that a sequence has pages for.
pub const LONGEST: usize = 512;

/// A base with all adapters of a case resident: adapter `i` of [`Case::adapters`] in slot `i` (the base has none).
pub fn load<B: Backend>(case: &Case, backend: &mut B) -> Transformer<B> {
    let base = Base::open(&case.model()).unwrap();
    let mut transformer = Transformer::new(backend, &base.config, &base.checkpoint, LONGEST).unwrap();
    for (slot, name) in case.adapters().iter().enumerate().skip(1) {
        let sites = &base.checkpoint.sites().table;
        let limits = Limits { max_rank: 512 };
        let adapter = read_adapter(&case.adapter_folder(name), sites, &base.checkpoint, limits).unwrap();
        transformer.load_adapter(backend, slot, &adapter, &base.checkpoint).unwrap();
    }
    transformer
}

/// The gates of a row that uses the adapter in a slot of [`load`].
pub fn entries(slot: usize) -> Vec<(u32, f32)> {
    if slot == 0 { vec![] } else { vec![(slot as u32, 1.0)] }
}

/// A prompt and the gates of its rows.
pub type Prompt<'a> = (&'a [(u32, f32)], &'a [u32]);

/// Logits `[tokens, vocabulary]` of some prompts that run in one step.
pub fn logits<B: Backend>(
    backend: &mut B,
    transformer: &Transformer<B>,
    batch: &[Prompt<'_>],
) -> Vec<Vec<f32>> {
    let pages_each = LONGEST / PAGE;
    let mut rows = Rows::default();
    for (index, (entries, prompt)) in batch.iter().enumerate() {
        let pages: Vec<u32> = (0..pages_each).map(|page| (index * pages_each + page) as u32).collect();
        let variant = transformer.config().rope.variant_for(prompt.len());
        rows.push_sequence(prompt, 0, variant, &pages, entries);
    }
    bring(backend, batch);
    let size = WorkspaceSize { rows: rows.len(), sequences: batch.len(), logit_rows: rows.len() };
    let pages = pages_each * batch.len();
    let mut workspace = transformer.workspace(backend, size, |_| Ok::<_, BackendError>(pages)).unwrap();
    let picked: Vec<u32> = (0..rows.len() as u32).collect();
    backend.scope(|backend| {
        backend.begin_step(&rows).unwrap();
        transformer.forward(backend, &rows, &mut workspace).unwrap();
        transformer.logits(backend, &rows, &picked, &mut workspace).unwrap();
        let all = backend.read(workspace.logits(), rows.len()).unwrap();
        let vocabulary = transformer.config().vocab_size;
        let range = |s: &SequenceRows| s.rows.start * vocabulary..s.rows.end * vocabulary;
        rows.sequences.iter().map(|sequence| all[range(sequence)].to_vec()).collect()
    })
}

/// Waits for the experts of a batch.
pub fn bring<B: Backend>(backend: &mut B, batch: &[Prompt<'_>]) {
    let mut experts: Vec<u32> = batch.iter().flat_map(|(entries, _)| entries.iter().map(|e| e.0)).collect();
    experts.sort_unstable();
    experts.dedup();
    while !backend.bring_experts(&experts, &[]).unwrap() {
        std::thread::yield_now();
    }
}
