//! How far down the backward pass goes.

use std::path::Path;

use super::tape::Buffers;
use super::{Depth, LearningBatch, Recompute, RowTarget, TapeSize};
use crate::adapter::{Adapter, Fresh, fresh_adapter, named_sites};
use crate::backend::cpu::{Buffer, Cpu};
use crate::backend::{Backend, Rows};
use crate::model::{Base, Transformer};

fn base() -> Base {
    Base::open(Path::new("tests/golden/llama/model")).unwrap()
}

fn adapter(base: &Base, names: &[String]) -> Adapter {
    let table = &base.checkpoint.sites().table;
    let fresh = Fresh { rank: 2, alpha: 2.0, use_rslora: false, use_dora: false, seed: 0 };
    fresh_adapter(table, &named_sites(table, names).unwrap(), &fresh, &base.checkpoint).unwrap()
}

#[test]
fn the_backward_pass_ends_at_the_lowest_site_that_the_rows_of_the_step_train() {
    let base = base();
    let mut backend = Cpu::new(Some(1)).unwrap();
    let mut transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, 64).unwrap();
    let last = base.config.num_layers - 1;
    let named: [(&[String], usize); 5] = [
        (&["lm_head".to_owned()], transformer.lm_head),
        (&[format!("{last}.mlp.down_proj"), "lm_head".to_owned()], transformer.blocks[last].mlp_out),
        (&["up_proj".to_owned()], transformer.blocks[0].mlp_in),
        (
            &[format!("{last}.mlp.gate_proj"), "1.self_attn.o_proj".to_owned()],
            transformer.blocks[1].attention_out,
        ),
        (&["v_proj".to_owned()], transformer.blocks[0].attention_in),
    ];
    let mut trainees = Vec::new();
    let mut start = |names: &[String]| {
        let (slot, adapter) = (trainees.len(), adapter(&base, names));
        trainees.push(Some(transformer.trainee(&mut backend, slot, &adapter, 0.0).unwrap()));
    };
    named.iter().for_each(|(names, _)| start(names));
    start(&["q_proj".to_owned(), "embed_tokens".to_owned()]);

    let lowest = |slots: &[Option<u32>]| {
        let mut rows = Rows::default();
        slots.iter().for_each(|&slot| transformer.push_sample(&mut rows, &[7, 8], slot));
        transformer.lowest(&rows, &trainees)
    };
    for (slot, (_, group)) in named.iter().enumerate() {
        assert_eq!(lowest(&[Some(slot as u32)]), Depth::of_group(*group), "{:?}", named[slot].0);
    }
    assert_eq!(lowest(&[Some(5)]), Depth(0));
    assert_eq!(lowest(&[Some(0), Some(2), Some(1)]), Depth::of_group(named[2].1));
    assert_eq!(lowest(&[None, Some(0), Some(6)]), Depth::of_group(named[0].1));
    assert_eq!(lowest(&[None, Some(6)]), Depth::ABOVE_ALL);
}

#[test]
fn nothing_is_computed_below_the_lowest_site() {
    let base = base();
    let last = base.config.num_layers - 1;
    type Below = fn(&Buffers<Buffer>) -> &Buffer;
    // A site, the gradient of its group's input, and the one before that.
    let cases: [(&str, Below, Option<Below>); 4] = [
        ("lm_head", |buffers| &buffers.d_normed, None),
        ("mlp.down_proj", |buffers| &buffers.d_gated, Some(|buffers| &buffers.picked.d_stream)),
        ("mlp.up_proj", |buffers| &buffers.picked.d_context, Some(|buffers| &buffers.d_gate_up)),
        ("self_attn.o_proj", |buffers| &buffers.picked.d_context, Some(|buffers| &buffers.d_gate_up)),
    ];
    for (name, below, above) in cases {
        let mut backend = Cpu::new(Some(1)).unwrap();
        let mut transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, 64).unwrap();
        let size = TapeSize { rows: 3, sequences: 1, logit_rows: 3 };
        let mut tape = transformer.tape(&mut backend, size, Recompute::None).unwrap();
        let name = if name == "lm_head" { name.to_owned() } else { format!("{last}.{name}") };
        let adapter = adapter(&base, std::slice::from_ref(&name));
        let mut trainees = [Some(transformer.trainee(&mut backend, 0, &adapter, 0.0).unwrap())];
        let mut rows = Rows::default();
        transformer.push_sample(&mut rows, &[7, 8, 9], Some(0));
        let target = |row| RowTarget { row, token: 3, weight: 1.0 };
        let batch = LearningBatch { rows: &rows, row_keys: &[0; 3], targets: &[0, 1, 2].map(target) };
        transformer.learn(&mut backend, &batch, &mut tape, &mut trainees, &mut Vec::new()).unwrap();
        let mut is_empty = |buffer| backend.read(buffer, 3).unwrap().iter().all(|&value| value == 0.0);
        assert!(is_empty(below(&tape.buffers)), "{name}");
        assert!(above.is_none_or(|above| !is_empty(above(&tape.buffers))), "{name}");
    }
}
