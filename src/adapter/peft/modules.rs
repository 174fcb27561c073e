//! Which modules a PEFT configuration means: names, regular expressions, layers.
//!
//! PEFT matches module paths with Python's `re`. Its expressions may look around, so `fancy-regex` runs them, with
//! its bound on backtracking; an expression that exceeds the bound is refused and cannot stall a server.

use std::path::{Path, PathBuf};

use fancy_regex::{Regex, RegexBuilder};

use super::AdapterError;

/// Largest compiled size of one expression, in bytes.
const REGEX_SIZE_LIMIT: usize = 1 << 20;
/// Most steps that matching one module path may take back.
const BACKTRACK_LIMIT: usize = 100_000;

/// A regular expression from a configuration, with its origin for messages.
#[derive(Debug)]
pub(super) struct Expression {
    regex: Regex,
    path: PathBuf,
    field: &'static str,
}

impl Expression {
    /// Compiles `pattern`, which was derived from `source` in `field`.
    ///
    /// # Errors
    /// When it is not a regular expression or too large a one.
    pub fn new(pattern: &str, source: &str, path: &Path, field: &'static str) -> Result<Self, AdapterError> {
        let build = |pattern: &str| {
            RegexBuilder::new(pattern)
                .delegate_size_limit(REGEX_SIZE_LIMIT)
                .backtrack_limit(BACKTRACK_LIMIT)
                .build()
                .map_err(|error| {
                    refuse(path, field, format!("`{source}` is not a usable expression: {error}"))
                })
        };
        // By itself first: `a)(b` would only become valid inside the parentheses put around it.
        build(source)?;
        let regex = build(pattern)?;
        Ok(Self { regex, path: path.to_owned(), field })
    }

    /// As Python's `re.fullmatch(source, …)`.
    pub fn full_match(source: &str, path: &Path, field: &'static str) -> Result<Self, AdapterError> {
        Self::new(&format!(r"\A(?:{source})\z"), source, path, field)
    }

    /// As PEFT's `get_pattern_key`: the whole module path or a part of it that starts after a dot.
    pub fn path_suffix(source: &str, path: &Path, field: &'static str) -> Result<Self, AdapterError> {
        Self::new(&format!(r"\A(?:.*\.)?(?:{source})\z"), source, path, field)
    }

    /// # Errors
    /// When matching takes too many steps.
    pub fn matches(&self, module: &str) -> Result<bool, AdapterError> {
        self.regex.is_match(module).map_err(|error| self.unusable(module, &error))
    }

    /// As PEFT finds a layer's index by one entry of `layers_pattern`: the number after what the entry matches, which
    /// starts at a component. Like there, the alternatives of an entry are not bound: `h|layers` captures no index
    /// where `h` matches.
    pub fn layer_index(source: &str, path: &Path, field: &'static str) -> Result<Self, AdapterError> {
        Self::new(&format!(r"\A(?:(?:^|.*?\.){source}\.(?P<idx>\d+)\.)"), source, path, field)
    }

    /// As PEFT finds a layer's index without `layers_pattern`: the first component that is a number.
    pub fn any_layer_index(path: &Path, field: &'static str) -> Result<Self, AdapterError> {
        Self::new(r"\A.*?\.[^.]*\.(?P<idx>\d+)\.", "", path, field)
    }

    /// Whether it matches the start of `module`, and the index that it captures there.
    fn captured_index(&self, module: &str) -> Result<Option<Option<usize>>, AdapterError> {
        let captures = self.regex.captures(module).map_err(|error| self.unusable(module, &error))?;
        Ok(captures.map(|captures| captures.name("idx")?.as_str().parse().ok()))
    }

    fn unusable(&self, module: &str, error: &fancy_regex::Error) -> AdapterError {
        refuse(&self.path, self.field, format!("matching `{module}` failed: {error}"))
    }
}

fn refuse(path: &Path, field: &str, problem: String) -> AdapterError {
    AdapterError::Field { path: path.to_owned(), field: field.to_owned(), problem }
}

/// How much of a module path a selection names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match {
    None,
    /// By its last components or by an expression.
    Partly,
    /// By the whole path in a list, which PEFT exempts from `layers_to_transform`.
    Whole,
}

/// `target_modules` or `exclude_modules`.
#[derive(Debug)]
pub(super) enum Selection {
    /// `"all-linear"`: every linear layer except the output head.
    AllLinear,
    /// Paths or their last components.
    Names(Vec<String>),
    /// A string: an expression for the whole path.
    Expression(Expression),
}

impl Selection {
    /// # Errors
    /// When an expression takes too many steps.
    pub fn matches(&self, module: &str, is_block_linear: bool) -> Result<Match, AdapterError> {
        let partly = match self {
            Self::AllLinear => is_block_linear,
            Self::Names(names) if names.iter().any(|name| name == module) => return Ok(Match::Whole),
            Self::Names(names) => names.iter().any(|name| is_path_suffix(name, module)),
            Self::Expression(expression) => expression.matches(module)?,
        };
        Ok(if partly { Match::Partly } else { Match::None })
    }
}

/// Whether `name` is `module` or its last components.
pub(in crate::adapter) fn is_path_suffix(name: &str, module: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// `layers_to_transform` with `layers_pattern`.
#[derive(Debug)]
pub(super) struct Layers {
    pub indices: Vec<usize>,
    /// Each captures the layer's index; the first that matches counts, also where it captures none.
    pub expressions: Vec<Expression>,
}

impl Layers {
    /// Whether `module` lies in one of the layers.
    ///
    /// # Errors
    /// When an expression takes too many steps.
    pub fn contain(&self, module: &str) -> Result<bool, AdapterError> {
        for expression in &self.expressions {
            if let Some(index) = expression.captured_index(module)? {
                return Ok(index.is_some_and(|index| self.indices.contains(&index)));
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "model.layers.3.self_attn.q_proj";

    fn suffix(source: &str) -> bool {
        Expression::path_suffix(source, Path::new("c"), "rank_pattern").unwrap().matches(MODULE).unwrap()
    }

    #[test]
    fn a_pattern_key_matches_from_a_dot_to_the_end() {
        assert!(suffix("q_proj") && suffix("self_attn.q_proj") && suffix(MODULE) && suffix(r"layers\.\d+.*"));
        assert!(suffix("^model.layers.3.self_attn.q_proj"));
        assert!(!suffix("proj") && !suffix("q_pro") && !suffix("layers.3"));
        assert!(suffix("k_proj|q_proj"), "alternatives are bound by the key");
    }

    #[test]
    fn names_match_whole_components_only() {
        let names = Selection::Names(vec!["q_proj".into(), "model.layers.3.mlp.up_proj".into()]);
        assert_eq!(names.matches(MODULE, true).unwrap(), Match::Partly);
        assert_eq!(names.matches("model.layers.3.mlp.up_proj", true).unwrap(), Match::Whole);
        assert_eq!(names.matches("model.layers.3.self_attn.kq_proj", true).unwrap(), Match::None);
    }

    #[test]
    fn an_expression_must_match_the_whole_path_and_may_look_around() {
        let matches = |source: &str| {
            Expression::full_match(source, Path::new("c"), "target_modules").unwrap().matches(MODULE).unwrap()
        };
        assert!(matches(r".*\.(q|v)_proj") && matches(r"(?!.*vision).*q_proj"));
        assert!(!matches("q_proj") && !matches(r"model\.layers") && !matches(r"(?!.*self_attn).*q_proj"));
    }

    #[test]
    fn an_expression_that_would_stall_is_refused() {
        let hostile = Expression::full_match(r"(?:(\w+)(?!-))+!", Path::new("c"), "target_modules");
        let error = hostile.and_then(|expression| expression.matches(&"a".repeat(200))).unwrap_err();
        assert!(error.to_string().contains("field `target_modules`"), "{error}");
        let huge = Expression::full_match(r"(?:\w{500}){500}", Path::new("c"), "target_modules").unwrap_err();
        assert!(huge.to_string().contains("not a usable expression"), "{huge}");
        assert!(Expression::full_match("(", Path::new("c"), "target_modules").is_err());
    }

    #[test]
    fn layers_are_found_by_the_number_before_the_last_components() {
        let expression = Expression::any_layer_index(Path::new("c"), "layers_pattern").unwrap();
        let layers = Layers { indices: vec![1, 3], expressions: vec![expression] };
        assert!(layers.contain(MODULE).unwrap());
        assert!(!layers.contain("model.layers.13.self_attn.q_proj").unwrap());
        assert!(!layers.contain("lm_head").unwrap());
    }

    #[test]
    fn a_layers_pattern_matches_as_peft_builds_its_expression() {
        let contain = |sources: &[&str]| {
            let expression =
                |source: &&str| Expression::layer_index(source, Path::new("c"), "layers_pattern");
            let expressions = sources.iter().map(|source| expression(source).unwrap()).collect();
            Layers { indices: vec![3], expressions }.contain(MODULE).unwrap()
        };
        assert!(contain(&["layers"]) && contain(&["model.layers"]) && contain(&["(h|layers)"]));
        assert!(contain(&["blocks", "layers"]));
        assert!(!contain(&["ayers"]) && !contain(&["blocks"]));
        assert!(contain(&["h|(?:model.)?layers"]), "the unbound alternative starts at the path's start");
        assert!(!contain(&["model|layers"]), "it matches and captures no index");
        assert!(!contain(&["model|h", "layers"]), "the first match counts");
    }
}
