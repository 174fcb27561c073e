//! Reads rope settings in both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`
//! (transformers 4). Where a value may stand in two places and both are set, they have to agree.

use super::MAX_POSITIONS;
use super::fields::Fields;
use crate::model::family::Traits;
use crate::model::{ModelError, RopeConfig, RopeScaling};

/// Every rope type this crate computes, for messages.
const TYPES: &str = "default, linear, llama3, yarn, longrope";

/// Bounds on every scale. Real values lie between 0.1 and 1e8; within these, all f32 arithmetic stays finite.
const SMALLEST: f64 = 1e-6;
const LARGEST: f64 = 1e12;

/// Fields that any rope object may hold. `finetuned` is a note that some long-context checkpoints carry.
const COMMON_FIELDS: &[&str] = &[
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
];

/// Fields of each type beside the common ones.
fn own_fields(rope_type: &str) -> &'static [&'static str] {
    match rope_type {
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor"],
        "yarn" => {
            &["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]
        }
        "longrope" => &["factor", "attention_factor", "short_factor", "long_factor"],
        _ => &[],
    }
}

/// The rope settings of a whole config.json.
pub(super) fn read(
    fields: &Fields,
    traits: &Traits,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<RopeConfig, ModelError> {
    let theta = theta(fields)?.unwrap_or(10_000.0);
    let partial_rotary_factor = partial_rotary_factor(fields, traits)?;
    let mut config = RopeConfig { theta, partial_rotary_factor, scaling: RopeScaling::Default };
    let rotary_dim = config.rotary_dim(head_dim);
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let field = if partial_rotary_factor < 1.0 { "partial_rotary_factor" } else { "head_dim" };
        let found = format!("{rotary_dim} rotating channels of {head_dim}");
        return Err(fields.wrong_as(field, found, "an even number above 0"));
    }
    let Some(rope) = rope_object(fields)? else { return Ok(config) };
    let rope_type = rope_type(&rope, traits)?;
    if let Some(name) =
        rope.set_names().find(|name| !COMMON_FIELDS.contains(name) && !own_fields(rope_type).contains(name))
    {
        return Err(rope.unsupported(name, format!("rope type {rope_type} has no such field")));
    }
    let scale = SMALLEST..=LARGEST;
    let stretch = 1.0..=LARGEST;
    let attention_factor = match rope_type {
        "yarn" | "longrope" => rope.number("attention_factor", scale.clone())?,
        _ => None,
    };
    let original_positions = original_positions(fields, &rope, traits, max_position_embeddings)?;
    // Where the factor is left out, it is how far the context was stretched.
    let ratio = max_position_embeddings as f64 / original_positions as f64;
    config.scaling = match rope_type {
        "linear" => RopeScaling::Linear { factor: rope.required_number("factor", stretch)? },
        "llama3" => {
            let low_freq_factor = rope.required_number("low_freq_factor", scale.clone())?;
            let high_freq_factor = rope.required_number("high_freq_factor", scale)?;
            if high_freq_factor <= low_freq_factor {
                let wanted = format!("more than low_freq_factor ({low_freq_factor:?})");
                return Err(rope.wrong("high_freq_factor", &wanted));
            }
            RopeScaling::Llama3 {
                factor: rope.required_number("factor", stretch)?,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            }
        }
        "yarn" => {
            let factor = rope.number("factor", stretch)?.unwrap_or(ratio);
            // Zero stands for "unset" in these four.
            let optional =
                |name| Ok::<_, ModelError>(rope.number(name, 0.0..=LARGEST)?.filter(|n| *n != 0.0));
            let beta_fast = optional("beta_fast")?.unwrap_or(32.0);
            let beta_slow = optional("beta_slow")?.unwrap_or(1.0);
            if beta_fast < beta_slow {
                return Err(rope.wrong("beta_fast", &format!("at least beta_slow ({beta_slow:?})")));
            }
            let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
            let inferred = match (optional("mscale")?, optional("mscale_all_dim")?) {
                (Some(scale), Some(scale_all)) => magnitude(scale) / magnitude(scale_all),
                _ => magnitude(1.0),
            };
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate: rope.boolean("truncate")?.unwrap_or(true),
                original_positions,
                attention_factor: attention_factor.unwrap_or(inferred),
            }
        }
        "longrope" => {
            let factor = rope.number("factor", scale.clone())?.unwrap_or(ratio);
            let inferred = if factor <= 1.0 {
                1.0
            } else {
                (1.0 + factor.ln() / (original_positions as f64).ln()).sqrt()
            };
            RopeScaling::LongRope {
                short: rope.required_numbers("short_factor", rotary_dim / 2, scale.clone())?,
                long: rope.required_numbers("long_factor", rotary_dim / 2, scale)?,
                original_positions,
                attention_factor: attention_factor.unwrap_or(inferred),
            }
        }
        _ => RopeScaling::Default,
    };
    Ok(config)
}

/// `rope_parameters` or `rope_scaling`; an empty object says nothing.
fn rope_object<'a>(fields: &Fields<'a>) -> Result<Option<Fields<'a>>, ModelError> {
    let set =
        |name| Ok::<_, ModelError>(fields.object(name)?.filter(|rope| rope.set_names().next().is_some()));
    match (set("rope_parameters")?, set("rope_scaling")?) {
        (Some(_), Some(_)) if fields.get("rope_parameters") != fields.get("rope_scaling") => {
            Err(fields.unsupported("rope_scaling", "rope_parameters is set too and says something else"))
        }
        (parameters, scaling) => Ok(parameters.or(scaling)),
    }
}

fn theta(fields: &Fields) -> Result<Option<f64>, ModelError> {
    // A base of 1 would make all wavelengths equal.
    let range = 1.0 + SMALLEST..=LARGEST;
    let inner = match rope_object(fields)? {
        Some(rope) => rope.number("rope_theta", range.clone())?,
        None => None,
    };
    agreeing(fields, "rope_theta", fields.number("rope_theta", range)?, inner)
}

fn partial_rotary_factor(fields: &Fields, traits: &Traits) -> Result<f64, ModelError> {
    let name = "partial_rotary_factor";
    let range = SMALLEST..=1.0;
    let outer = fields.number(name, range.clone())?;
    let rope = rope_object(fields)?;
    let inner = match &rope {
        Some(rope) => rope.number(name, range)?,
        None => None,
    };
    let factor = agreeing(fields, name, outer, inner)?.unwrap_or(1.0);
    if factor < 1.0 && !traits.partial_rotary {
        let holder = if outer.is_some() { *fields } else { rope.unwrap_or(*fields) };
        return Err(holder.unsupported(name, format!("{} rotates whole heads", traits.model_type)));
    }
    Ok(factor)
}

fn rope_type<'a>(rope: &Fields<'a>, traits: &Traits) -> Result<&'a str, ModelError> {
    let (new, old) = (rope.text("rope_type")?, rope.text("type")?);
    let name = if new.is_some() { "rope_type" } else { "type" };
    let current = |spelled: &'a str| {
        let alias = traits.rope_aliases.iter().find(|(alias, _)| *alias == spelled);
        alias.map_or(spelled, |(_, today)| today)
    };
    let rope_type = match (new.map(current), old.map(current)) {
        (Some(new), Some(old)) if new != old => {
            return Err(rope.unsupported("type", format!("rope_type is set too and says \"{new}\"")));
        }
        (new, old) => new.or(old).unwrap_or("default"),
    };
    if traits.rope_types.contains(&rope_type) {
        return Ok(rope_type);
    }
    let computed = traits.rope_types.join(", ");
    let reason = if computed == TYPES {
        format!("supported rope types are {computed}")
    } else {
        format!("{} allows the rope types {computed}", traits.model_type)
    };
    Err(rope.unsupported(name, reason))
}

/// The context before stretching: beside the rope object or inside it. A family with a default looks beside it only.
fn original_positions(
    fields: &Fields,
    rope: &Fields,
    traits: &Traits,
    max_position_embeddings: usize,
) -> Result<usize, ModelError> {
    let name = "original_max_position_embeddings";
    // `longrope` divides by the logarithm.
    let range = 2..=MAX_POSITIONS;
    let (outer, inner) = (fields.integer(name, range.clone())?, rope.integer(name, range)?);
    if let (None, Some(inner), Some(default)) = (outer, inner, traits.default_original_positions)
        && inner != default
    {
        let family = traits.model_type;
        let reason =
            format!("{family} reads it beside the rope settings only, and there its default is {default}");
        return Err(rope.unsupported(name, reason));
    }
    let stated = agreeing(fields, name, outer, inner)?;
    Ok(stated.or(traits.default_original_positions).unwrap_or(max_position_embeddings))
}

/// One value from two places that have to agree.
fn agreeing<T: PartialEq + std::fmt::Debug>(
    fields: &Fields,
    name: &str,
    outer: Option<T>,
    inner: Option<T>,
) -> Result<Option<T>, ModelError> {
    match (outer, inner) {
        (Some(outer), Some(inner)) if outer != inner => {
            Err(fields.unsupported(name, format!("the rope settings say {inner:?}")))
        }
        (outer, inner) => Ok(inner.or(outer)),
    }
}
