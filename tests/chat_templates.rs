//! Chat templates render as they do in transformers.
//!
//! `chat_templates/cases.json` holds what transformers' renderer makes of the templates beside it, written by
//! `make_cases.py` there.

use std::fs;
use std::path::Path;

use loramux::model::chat_template::{ChatOptions, ChatTemplate, ChatTemplateError};
use loramux::model::tokenizer::SpecialTokens;
use serde_json::{Value, json};

fn cases() -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates");
    serde_json::from_slice(&fs::read(folder.join("cases.json")).unwrap()).unwrap()
}

fn template(source: &str, cases: &Value) -> Result<ChatTemplate, ChatTemplateError> {
    let tokens: SpecialTokens = cases["tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (name.clone(), text.as_str().unwrap()))
        .collect();
    ChatTemplate::new(source, &tokens)
}

/// Says how an outcome differs from the recorded one.
fn difference(found: Result<String, ChatTemplateError>, case: &Value) -> Option<String> {
    match (found, case["text"].as_str(), case["error"].as_str()) {
        (Ok(found), Some(wanted), _) if found == wanted => None,
        (Err(ChatTemplateError::Raised { message, .. }), _, Some(wanted))
            if wanted.starts_with("TemplateError") =>
        {
            (wanted != format!("TemplateError: {message}"))
                .then(|| format!("raised {message}, wanted {wanted}"))
        }
        (Err(_), _, Some(wanted)) if !wanted.starts_with("TemplateError") => None,
        (found, text, error) => Some(format!("found {found:?}\nwanted {:?}", text.or(error))),
    }
}

#[test]
fn templates_render_chats_as_transformers_does() {
    let cases = cases();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates");
    let mut different = Vec::new();
    for case in cases["cases"].as_array().unwrap() {
        let source = fs::read_to_string(folder.join(case["template"].as_str().unwrap())).unwrap();
        let template = template(&source, &cases).unwrap();
        let options = &cases["options"][case["options"].as_u64().unwrap() as usize];
        let mut variables = cases["date"].as_object().unwrap().clone();
        variables.extend(options["variables"].as_object().cloned().unwrap_or_default());
        let options = ChatOptions {
            add_generation_prompt: options["add_generation_prompt"].as_bool().unwrap_or(false),
            tools: options.get("tools").cloned(),
            documents: None,
            variables,
        };
        let found = template.render(&cases["chats"][case["chat"].as_str().unwrap()], &options);
        if let Some(difference) = difference(found, case) {
            different
                .push(format!("{} {} {}: {difference}", case["template"], case["chat"], case["options"]));
        }
    }
    assert!(different.is_empty(), "{} differ:\n{}", different.len(), different.join("\n\n"));
}

#[test]
fn expressions_evaluate_as_in_transformers() {
    let cases = cases();
    let options =
        ChatOptions { variables: cases["bag"].as_object().unwrap().clone(), ..ChatOptions::default() };
    let mut different = Vec::new();
    for case in cases["expressions"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let found = template(source, &cases)
            .and_then(|template| template.render(&json!([{ "role": "user", "content": "Hi" }]), &options));
        if let Some(difference) = difference(found, case) {
            different.push(format!("{source}\n{difference}"));
        }
    }
    assert!(different.is_empty(), "{} differ:\n{}", different.len(), different.join("\n\n"));
}
