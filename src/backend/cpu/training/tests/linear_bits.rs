//! What must not change a bit of a linear layer's gradients.

use super::bits;
use super::linear::{Kind, random_problem};
use super::reference::{GROUP, Problem, Results};
use crate::backend::cpu::tests::{Random, backends};
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::training::PairValues;
use crate::backend::{Backend, Write};

fn gradient_bits(all: &[PairValues]) -> Vec<Vec<u32>> {
    all.iter().flat_map(|values| [bits(&values.a), bits(&values.b), bits(&values.magnitude)]).collect()
}

fn assert_same(what: &str, one: &Results, other: &Results) {
    assert_eq!(bits(&one.y), bits(&other.y), "{what}: outputs");
    assert_eq!(bits(&one.dx), bits(&other.dx), "{what}: input");
    assert_eq!(bits(&one.gates), bits(&other.gates), "{what}: gates");
    for (slot, (one, other)) in one.gradients.iter().zip(&other.gradients).enumerate() {
        assert_eq!(gradient_bits(one), gradient_bits(other), "{what}: slot {slot}");
    }
}

const KINDS: [Kind; 6] =
    [Kind::Trained, Kind::TrainedDora, Kind::Loaded, Kind::LoadedDora, Kind::Replaced, Kind::Trained];

fn problems(random: &mut Random) -> Vec<Problem> {
    (0..8).map(|case| random_problem(random, &KINDS, 1 + case % 3, [0.0, 0.2][case % 2], 40)).collect()
}

#[test]
fn a_batch_cut_at_any_row_has_the_same_bits() {
    let mut random = Random(31);
    for (case, problem) in problems(&mut random).iter().enumerate() {
        for mut cpu in backends() {
            let whole = problem.run(&mut cpu, &[], true);
            for cut in 1..problem.rows() {
                let cut_results = problem.run(&mut cpu, &[cut], true);
                assert_same(&format!("case {case} cut at {cut}"), &cut_results, &whole);
            }
            let all: Vec<usize> = (1..problem.rows()).collect();
            assert_same(&format!("case {case} row by row"), &problem.run(&mut cpu, &all, true), &whole);
        }
    }
}

#[test]
fn a_slot_has_the_same_bits_alone() {
    let mut random = Random(32);
    for (case, problem) in problems(&mut random).iter().enumerate() {
        for mut cpu in backends() {
            let together = problem.run(&mut cpu, &[], false);
            for slot in 0..KINDS.len() {
                let uses = |row: &usize| problem.entries[*row].iter().any(|entry| entry.0 as usize == slot);
                let rows: Vec<usize> = (0..problem.rows()).filter(uses).collect();
                let alone = problem.pick(&rows).run(&mut cpu, &[], false);
                for (index, &row) in rows.iter().enumerate() {
                    let row_of =
                        |all: &[f32], row: usize, width: usize| bits(&all[row * width..(row + 1) * width]);
                    let width = problem.width();
                    assert_eq!(row_of(&alone.y, index, width), row_of(&together.y, row, width));
                    let k = problem.k;
                    assert_eq!(
                        row_of(&alone.dx, index, k),
                        row_of(&together.dx, row, k),
                        "case {case} row {row}"
                    );
                }
                let (alone, together) = (&alone.gradients[slot], &together.gradients[slot]);
                assert_eq!(gradient_bits(alone), gradient_bits(together), "case {case} slot {slot}");
            }
        }
    }
}

/// Large enough that threads are woken.
fn large(random: &mut Random) -> Problem {
    let mut problem = random_problem(random, &KINDS, 2, 0.2, 300);
    while problem.k < 70 || problem.width() < 60 {
        problem = random_problem(random, &KINDS, 2, 0.2, 300);
    }
    problem
}

#[test]
fn threads_change_no_bits() {
    let mut random = Random(33);
    let problem = large(&mut random);
    for isa in Isa::available() {
        let results =
            [1, 2, 3].map(|threads| problem.run(&mut Cpu::with_isa(isa, Some(threads)).unwrap(), &[], true));
        assert_same("two threads", &results[0], &results[1]);
        assert_same("three threads", &results[0], &results[2]);
    }
}

#[test]
fn outputs_are_those_of_inference() {
    let mut random = Random(34);
    for _ in 0..8 {
        let problem = random_problem(&mut random, &KINDS, 2, 0.0, 40);
        for mut cpu in backends() {
            let kept = problem.run(&mut cpu, &[], false).y;
            let (groups, ..) = problem.set_up(&mut cpu);
            let mut x = cpu.buffer(problem.rows(), problem.k).unwrap();
            let mut y = cpu.buffer(problem.rows(), problem.width()).unwrap();
            x.write(&problem.x);
            cpu.linear(&groups[GROUP], &x, &problem.gates(), Write::Replace, &mut y).unwrap();
            let inferred = cpu.read(&y, problem.rows()).unwrap();
            let largest = inferred.iter().fold(0f32, |most, value| most.max(value.abs()));
            for (kept, inferred) in kept.iter().zip(inferred) {
                assert!((kept - inferred).abs() <= 2e-6 * largest, "{kept} is not {inferred}");
            }
        }
    }
}
