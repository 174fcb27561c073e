//! Every operation of the backward pass against finite differences in f64, and its bits alone, among others, cut
//! anywhere and on any number of threads.
//!
//! The references are forward passes in plain loops. A loss `L = Σ dy ⊙ y` makes `dy` the gradient of the output; a
//! parameter's gradient is compared with central differences of L, element by element and along random directions,
//! which see every element at once.

mod attention;
mod elementwise;
mod linear;
mod linear_bits;
mod lookup;
mod loss;
mod optimizer;
mod reference;

use crate::backend::cpu::tests::Random;

/// Largest error of a sum of f32 products, relative to its typical size.
const TOLERANCE: f64 = 1e-4;

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Holds `gradient` against central differences of `loss` at `values`.
fn assert_gradient(
    what: &str,
    gradient: &[f32],
    values: &[f64],
    random: &mut Random,
    mut loss: impl FnMut(&[f64]) -> f64,
) {
    const STEP: f64 = 1e-4;
    assert_eq!(gradient.len(), values.len(), "{what}");
    if values.is_empty() {
        return;
    }
    assert!(gradient.iter().all(|g| g.is_finite()), "{what}: {gradient:?}");
    let mut difference = |direction: &dyn Fn(usize) -> f64| {
        let mut moved = |sign: f64| {
            let at: Vec<f64> =
                values.iter().enumerate().map(|(i, value)| value + sign * STEP * direction(i)).collect();
            loss(&at)
        };
        (moved(1.0) - moved(-1.0)) / (2.0 * STEP)
    };
    let size = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|n| n * n).sum::<f64>().sqrt();
    let typical = size(&mut gradient.iter().map(|&g| f64::from(g))) / (values.len() as f64).sqrt();
    let mut elements = vec![0, values.len() - 1];
    elements.extend((0..6).map(|_| random.below(values.len())));
    for element in elements {
        let wanted = difference(&|i| f64::from(u8::from(i == element)));
        let error = (f64::from(gradient[element]) - wanted).abs() / (typical + wanted.abs() + 1e-2);
        assert!(error < TOLERANCE, "{what}, element {element}: {} for {wanted}", gradient[element]);
    }
    for _ in 0..2 {
        let direction = to_f64(&random.values(values.len()));
        let wanted = difference(&|i| direction[i]);
        let products = || gradient.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d);
        let got: f64 = products().sum();
        let error = (got - wanted).abs() / (size(&mut products()) + 1e-2);
        assert!(error < TOLERANCE, "{what}, along a direction: {got} for {wanted}");
    }
}
