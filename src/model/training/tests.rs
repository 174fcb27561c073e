//! How far down the backward pass goes.

use std::path::Path;

use super::Depth;
use crate::adapter::{Fresh, fresh_adapter, named_sites};
use crate::backend::Rows;
use crate::backend::cpu::Cpu;
use crate::model::{Base, Transformer};

#[test]
fn the_backward_pass_ends_at_the_lowest_site_that_the_rows_of_the_step_train() {
    let base = Base::open(Path::new("tests/golden/llama/model")).unwrap();
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
    let table = &base.checkpoint.sites().table;
    let fresh = Fresh { rank: 2, alpha: 2.0, use_rslora: false, use_dora: false, seed: 0 };
    let mut trainees = Vec::new();
    let mut start = |names: &[String]| {
        let sites = named_sites(table, names).unwrap();
        let adapter = fresh_adapter(table, &sites, &fresh, &base.checkpoint).unwrap();
        let slot = trainees.len();
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
