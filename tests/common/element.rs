//! The 16-bit type that a test of kernels is about: bf16, unless it says otherwise.
#![allow(dead_code, reason = "each test uses some of it")]

use std::cell::Cell;

use bytemuck::Pod;
use loramux::backend::cuda::{Element, Half};

thread_local!(static ELEMENT: Cell<Element> = const { Cell::new(Element::Bf16) });

/// The type in hand.
pub fn element() -> Element {
    ELEMENT.get()
}

/// Runs `test` once for each type.
pub fn in_both_types(mut test: impl FnMut()) {
    for element in [Element::Bf16, Element::F16] {
        ELEMENT.set(element);
        test();
    }
    ELEMENT.set(Element::Bf16);
}

/// The nearest value of the type in hand.
pub fn round(value: f32) -> Half {
    element().round(value)
}

/// The value in the type in hand.
pub fn f(value: Half) -> f64 {
    f64::from(element().to_f32(value))
}

/// No number in either type.
pub const NAN: Half = Half(0x7fff);

/// How far rounding moves a value, relative to it: half a unit in the last of 8 or 11 places.
pub fn half_ulp() -> f64 {
    match element() {
        Element::Bf16 => 2f64.powi(-8),
        Element::F16 => 2f64.powi(-11),
    }
}

/// How far rounding moves a value that is too small to have all its places.
pub fn half_of_smallest() -> f64 {
    match element() {
        Element::Bf16 => 2f64.powi(-134),
        Element::F16 => 2f64.powi(-25),
    }
}

/// What outputs are made of.
pub trait Value: Pod {
    const NAN: Self;
    fn to_f32(self) -> f32;
}

impl Value for f32 {
    const NAN: Self = Self::NAN;
    fn to_f32(self) -> f32 {
        self
    }
}

impl Value for Half {
    const NAN: Self = NAN;
    fn to_f32(self) -> f32 {
        element().to_f32(self)
    }
}

pub fn bits(values: &[Half]) -> Vec<u16> {
    values.iter().map(|value| value.0).collect()
}
