//! The methods by PEFT's names.

use std::fmt;
use std::str::FromStr;

/// How adapters become one; the formulas stand in the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Linear,
    Cat,
    Svd,
    Ties,
    TiesSvd,
    DareLinear,
    DareLinearSvd,
    DareTies,
    DareTiesSvd,
    MagnitudePrune,
    MagnitudePruneSvd,
}

/// Which elements of a tensor are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thinning {
    /// All.
    None,
    /// The largest.
    Magnitude,
    /// Some by chance, scaled up.
    Random,
}

impl Method {
    pub const ALL: [Method; 11] = [
        Method::Linear,
        Method::Cat,
        Method::Svd,
        Method::Ties,
        Method::TiesSvd,
        Method::DareLinear,
        Method::DareLinearSvd,
        Method::DareTies,
        Method::DareTiesSvd,
        Method::MagnitudePrune,
        Method::MagnitudePruneSvd,
    ];

    /// PEFT's `combination_type`.
    pub fn name(self) -> &'static str {
        match self {
            Method::Linear => "linear",
            Method::Cat => "cat",
            Method::Svd => "svd",
            Method::Ties => "ties",
            Method::TiesSvd => "ties_svd",
            Method::DareLinear => "dare_linear",
            Method::DareLinearSvd => "dare_linear_svd",
            Method::DareTies => "dare_ties",
            Method::DareTiesSvd => "dare_ties_svd",
            Method::MagnitudePrune => "magnitude_prune",
            Method::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    /// Whether the changes of whole weights are merged and decomposed again.
    pub fn decomposes(self) -> bool {
        self.name().ends_with("svd")
    }

    /// Whether elements are dropped, so that there is a density.
    pub fn drops(self) -> bool {
        self.thinning() != Thinning::None
    }

    pub(super) fn thinning(self) -> Thinning {
        match self {
            Method::Linear | Method::Cat | Method::Svd => Thinning::None,
            Method::Ties | Method::TiesSvd | Method::MagnitudePrune | Method::MagnitudePruneSvd => {
                Thinning::Magnitude
            }
            Method::DareLinear | Method::DareLinearSvd | Method::DareTies | Method::DareTiesSvd => {
                Thinning::Random
            }
        }
    }

    pub(super) fn elects_sign(self) -> bool {
        matches!(self, Method::Ties | Method::TiesSvd | Method::DareTies | Method::DareTiesSvd)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no method's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted {}, or dare for dare_linear", Method::ALL.map(Method::name).join(", "))]
pub struct UnknownMethod;

impl FromStr for Method {
    type Err = UnknownMethod;

    fn from_str(name: &str) -> Result<Self, UnknownMethod> {
        let named = Method::ALL.into_iter().find(|method| method.name() == name);
        named.or_else(|| (name == "dare").then_some(Method::DareLinear)).ok_or(UnknownMethod)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_found_by_its_name() {
        for method in Method::ALL {
            assert_eq!(method.name().parse(), Ok(method));
        }
        assert_eq!("dare".parse(), Ok(Method::DareLinear));
        for bad in ["", "Linear", "dare-linear", "svd_ties"] {
            assert_eq!(bad.parse::<Method>(), Err(UnknownMethod), "{bad:?}");
        }
        assert!(UnknownMethod.to_string().starts_with("wanted linear, cat, svd, ties, "));
    }
}
