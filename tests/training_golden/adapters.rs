//! Adapters into training and out of it.

use loramux::adapter::peft::{Limits, WriteOptions, read_adapter, write_adapter};
use loramux::adapter::{Adapter, Fresh, SavedBias, SavedModule, all_linear, fresh_adapter, named_sites};
use loramux::backend::cpu::Isa;
use loramux::backend::training::AdamW;

use crate::case::{Case, Sample, cases};
use crate::common::repository;
use crate::trainer::{StepRows, Trainer, WHOLE};

fn case(family: &str) -> Case {
    Case::open(&repository().join("tests/golden").join(family), family)
}

fn trainer(case: &Case) -> Trainer {
    Trainer::new(&case.base, 256, 8, WHOLE, Isa::available()[0])
}

/// A batch of some samples that all use one slot.
fn batch<'a>(slot: usize, samples: &[&'a Sample]) -> Vec<(usize, u64, f32, &'a Sample)> {
    samples.iter().map(|&sample| (slot, 0, 0.01, sample)).collect()
}

fn assess(trainer: &mut Trainer, step: &StepRows) -> Vec<f32> {
    let mut losses = Vec::new();
    let Trainer { backend, transformer, tape, .. } = trainer;
    transformer.assess(backend, &step.batch(), tape, &mut losses).unwrap();
    losses
}

fn fresh(case: &Case, sites: &[usize], use_dora: bool) -> Adapter {
    let table = &case.base.checkpoint.sites().table;
    let fresh = Fresh { rank: 4, alpha: 8.0, use_rslora: false, use_dora, seed: 3 };
    fresh_adapter(table, sites, &fresh, &case.base.checkpoint).unwrap()
}

#[test]
fn a_fresh_adapter_changes_nothing_until_it_is_trained() {
    cases(|case| {
        let table = &case.base.checkpoint.sites().table;
        let sample = &case.jobs[0].steps[0].samples[0];
        let names = ["embed_tokens", "q_proj", "lm_head"].map(str::to_owned);
        let named = named_sites(table, &names).unwrap_or_else(|_| named_sites(table, &names[2..]).unwrap());
        let adapters = [(fresh(case, &named, false), true), (fresh(case, &all_linear(table), true), false)];
        for (adapter, is_exact) in &adapters {
            let mut trainer = trainer(case);
            trainer.start(adapter, 0.0);
            let adapted = StepRows::new(&trainer.transformer, &batch(0, &[sample]));
            let mut plain = StepRows::new(&trainer.transformer, &[]);
            trainer.transformer.push_sample(&mut plain.rows, &sample.tokens, None);
            plain.keys.clone_from(&adapted.keys);
            plain.targets.clone_from(&adapted.targets);
            let (before, base) = (assess(&mut trainer, &adapted), assess(&mut trainer, &plain));
            // DoRA's norms are computed anew, so that its scales are 1 but for rounding.
            let most = if *is_exact { 0.0 } else { 1e-5 };
            let close = |one: &[f32]| one.iter().zip(&base).all(|(a, b)| (a - b).abs() <= most);
            assert!(before.len() == base.len() && close(&before), "{}", case.family);

            trainer.learn(&batch(0, &[sample]));
            let step = AdamW {
                lr: 1e-2,
                lr_b: 1e-2,
                weight_decay: 0.0,
                betas: [0.9, 0.999],
                eps: 1e-8,
                step: 1,
                gradient_scale: 1.0,
            };
            trainer.update(0, &step);
            let after = assess(&mut trainer, &adapted);
            let sum = |losses: &[f32]| losses.iter().sum::<f32>();
            assert!(sum(&after) < sum(&before), "{}: the loss of what was learned falls", case.family);
            assert_eq!(assess(&mut trainer, &plain), base, "{}: the base stays", case.family);
        }
    });
}

#[test]
fn a_trained_adapter_is_what_a_folder_of_it_gives() {
    cases(|case| {
        for job in &case.jobs {
            let label = format!("{} {}", case.family, job.name);
            let mut trainer = trainer(case);
            trainer.start(&job.initial, 0.0);
            for (index, step) in job.steps.iter().take(2).enumerate() {
                trainer.learn(&batch(0, &step.samples.iter().collect::<Vec<_>>()));
                trainer.update(0, &AdamW { step: index as u64 + 1, ..job.optimizer });
            }
            let samples: Vec<&Sample> = job.steps[2].samples.iter().collect();
            let step = StepRows::new(&trainer.transformer, &batch(0, &samples));
            let losses = assess(&mut trainer, &step);

            let Trainer { backend, transformer, trainees, .. } = &mut trainer;
            let trained =
                transformer.trained_adapter(backend, trainees[0].as_ref().unwrap(), &job.initial).unwrap();
            assert_ne!(trained.hash, job.initial.hash, "{label}");
            let (folder, sites) = (tempfile::tempdir().unwrap(), &case.base.checkpoint.sites().table);
            write_adapter(folder.path(), &trained, sites, WriteOptions::default()).unwrap();
            let limits = Limits { max_rank: 64 };
            let read = read_adapter(folder.path(), sites, &case.base.checkpoint, limits).unwrap();
            assert_eq!(read.hash, trained.hash, "{label}");

            trainer.trainees[0] = None;
            let Trainer { backend, transformer, .. } = &mut trainer;
            transformer.unload_adapter(backend, 0).unwrap();
            transformer.load_adapter(backend, 0, &read, &case.base.checkpoint).unwrap();
            let served = assess(&mut trainer, &step);
            // Of DoRA's scales serving computes the norms in another order.
            let most = if job.initial.sites[0].magnitude.is_some() { 1e-5 } else { 0.0 };
            let off = losses.iter().zip(&served).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= most && losses.len() == served.len(), "{label}: losses are off by {off}");
        }
    });
}

#[test]
fn losses_are_the_same_with_and_without_gradients() {
    cases(|case| {
        let job = &case.jobs[1];
        let samples: Vec<&Sample> = job.steps[0].samples.iter().collect();
        let mut trainer = trainer(case);
        trainer.start(&job.initial, 0.5);
        let step = StepRows::new(&trainer.transformer, &batch(0, &samples));
        let assessed = assess(&mut trainer, &step);
        assert_eq!(trainer.grad_norm(0), 0.0, "nothing is learned");
        let dropped = trainer.learn(&batch(0, &samples)).concat();
        assert_ne!(assessed, dropped, "{}: dropout is for learning", case.family);

        let mut trainer = self::trainer(case);
        trainer.start(&job.initial, 0.0);
        assert_eq!(trainer.learn(&batch(0, &samples)).concat(), assessed, "{}", case.family);
    });
}

#[test]
fn what_cannot_be_trained_is_refused_by_name() {
    let case = case("qwen2");
    let table = &case.base.checkpoint.sites().table;
    let query = table.find("model.layers.0.self_attn.q_proj").unwrap();
    let head = case.base.checkpoint.sites().lm_head;
    let plain = fresh(&case, &[query], false);
    let mut trainer = trainer(&case);
    let mut refuse = |adapter: Adapter, wanted: &str| {
        let Trainer { backend, transformer, .. } = &mut trainer;
        let refused = transformer.trainee(backend, 0, &adapter, 0.0).err().expect(wanted).to_string();
        assert_eq!(refused, format!("the adapter cannot be trained: {wanted}"));
    };
    let weight = case.base.checkpoint.site_weight(head).unwrap();
    refuse(
        Adapter { saved_modules: vec![SavedModule { site: head, weight }], ..plain.clone() },
        "it replaces whole modules (`modules_to_save`), which are not trained",
    );
    let bias = vec![0.0; table.get(query).out_features];
    refuse(
        Adapter { saved_biases: vec![SavedBias { site: query, bias: bias.clone() }], ..plain.clone() },
        "it replaces biases of the base (`bias`), which are not trained",
    );
    let mut biased = plain.clone();
    biased.sites[0].bias = Some(bias);
    refuse(
        biased,
        "`model.layers.0.self_attn.q_proj` has a bias of its own (`lora_bias`), which is not trained",
    );
    let mut embedding = fresh(&case, &[case.base.checkpoint.sites().embed_tokens], false);
    embedding.sites[0].magnitude = Some(vec![1.0; case.base.config.hidden_size]);
    refuse(embedding, "`model.embed_tokens` has a DoRA magnitude, which is not trained");
    refuse(Adapter::default(), "it adapts nothing");
}
