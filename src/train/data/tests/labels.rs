//! Exactly what the assistant says is learned, and a sample begins as generation does.

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::model::chat_template::ChatTemplate;
use crate::model::tokenizer::SpecialTokens;
use crate::model::tokenizer::tests::{sentencepiece, strip_decoder};
use crate::model::{ChatOptions, ModelConfig};

/// A tokenizer with a chat template that need not be its own.
struct Chat {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_tokens: Vec<u32>,
}

impl Chat {
    /// A template of `tests/chat_templates` with the tokenizer of a golden model.
    fn template(name: &str) -> Self {
        let source = fs::read_to_string(folder("tests/chat_templates").join(name)).unwrap();
        let tokens = SpecialTokens::from_iter([("bos_token", "<s>"), ("eos_token", "</s>")]);
        let template = ChatTemplate::new(&source, &tokens).unwrap();
        Self {
            tokenizer: Tokenizer::read(folder("tests/golden/llama/model")).unwrap(),
            template,
            end_tokens: vec![],
        }
    }

    fn encoder(&self) -> Encoder<'_> {
        Encoder::new(&self.tokenizer, Some(&self.template), &self.end_tokens, 512).unwrap()
    }

    fn read(&self, messages: &Value) -> Result<(Dataset, Vec<String>), String> {
        let options = DataOptions { max_length: 10_000, ..OPTIONS };
        read_with(&self.encoder(), json!({"messages": messages}).to_string().as_bytes(), &options)
    }

    /// What is learned of each sample of a conversation.
    fn learned(&self, messages: &Value) -> Result<Vec<String>, String> {
        let (dataset, _) = self.read(messages)?;
        Ok(dataset.samples.iter().map(|sample| learned_text(&self.tokenizer, sample)).collect())
    }

    /// The prompt that generation sees.
    fn prompt(&self, messages: &[Value]) -> Vec<u32> {
        let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
        let text = self.template.render(&messages.to_vec().into(), &options).unwrap();
        self.tokenizer.encode(&text, false).unwrap()
    }
}

fn two_answers() -> Value {
    chat(&[("user", "a"), ("assistant", "b \n"), ("user", "c\n\n"), ("assistant", "dé 🙂")])
}

#[test]
fn the_examples_learn_answers_and_their_end_markers() {
    let mut files = 0;
    for task in fs::read_dir(folder("examples/tasks")).unwrap() {
        for split in ["train", "valid", "test"] {
            let path = task.as_ref().unwrap().path().join(format!("{split}.jsonl"));
            let (dataset, warnings) = read_dataset(&path, &BASE, &OPTIONS).unwrap();
            assert_eq!(warnings, []);
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(dataset.samples.len(), text.lines().count());
            for (sample, line) in dataset.samples.iter().zip(text.lines()) {
                let line: Value = serde_json::from_str(line).unwrap();
                let [question, answer] =
                    [0, 1].map(|turn| line["messages"][turn]["content"].as_str().unwrap());
                assert_eq!(learned_text(&BASE.tokenizer, sample), format!("{answer}<|end|>"));
                let asked = sample.question.as_ref().unwrap();
                assert_eq!(asked.answer, answer);
                assert!(sample.tokens.starts_with(&asked.tokens));
                // The only tokens are the prompt's and the learned ones.
                assert_eq!(sample.tokens.len(), asked.tokens.len() + sample.targets.len());
                let prompt = format!("<|user|>\n{question}<|end|>\n<|assistant|>\n");
                assert_eq!(asked.tokens, BASE.tokenizer.encode(&prompt, false).unwrap());
            }
            files += 1;
        }
    }
    assert_eq!(files, 21);
}

#[test]
fn golden_models_learn_all_answers_and_their_end_markers() {
    let mut models = 0;
    for model in fs::read_dir(folder("tests/golden")).unwrap() {
        let folder = model.unwrap().path().join("model");
        if !folder.is_dir() {
            continue;
        }
        let tokenizer = Tokenizer::read(&folder).unwrap();
        let template = ChatTemplate::from_tokenizer(&tokenizer).unwrap().unwrap();
        let end_tokens = ModelConfig::read(&folder).unwrap().end_tokens;
        let chat = Chat { tokenizer, template, end_tokens };
        let (dataset, warnings) = chat.read(&two_answers()).unwrap();
        let [sample] = dataset.samples.as_slice() else { panic!("{folder:?}: several samples") };
        // The template trims; its `<|eot_id|>` is not what these models' configurations end at.
        assert_eq!(learned_text(&chat.tokenizer, sample), "b<|eot_id|>dé 🙂<|eot_id|>", "{folder:?}");
        assert!(
            warnings[0].contains("ends with no token at which generation stops (line 1)"),
            "{warnings:?}"
        );
        let asked = sample.question.as_ref().unwrap();
        assert_eq!(asked.tokens, chat.prompt(&two_answers().as_array().unwrap()[..3]), "{folder:?}");
        assert_eq!(asked.answer, "dé 🙂");
        assert!(sample.tokens.starts_with(&asked.tokens), "{folder:?}");
        models += 1;
    }
    assert_eq!(models, 11);
}

#[test]
fn every_template_learns_what_it_writes_behind_the_generation_prompt() {
    let thought = "<think>\n\n</think>\n\n";
    for (name, wanted) in [
        ("chatml-tools.jinja", vec!["b \n<|im_end|>dé 🙂<|im_end|>".to_owned()]),
        ("header-tools.jinja", vec!["b<|eot_id|>dé 🙂<|eot_id|>".to_owned()]),
        ("inst-tools.jinja", vec![" b</s> dé 🙂</s>".to_owned()]),
        ("parts.jinja", vec!["b<end_of_turn>dé 🙂<end_of_turn>".to_owned()]),
        ("sys-inst.jinja", vec![" b </s> dé 🙂 </s>".to_owned()]),
        // Nothing but the last turn shows a thought, and nothing but the last turn ends the text: without an end token
        // among the model's own, an earlier turn's end cannot be told from the next turn.
        (
            "chatml-thinking.jinja",
            vec![format!("{thought}b \n<|im_end|>"), format!("{thought}dé 🙂<|im_end|>")],
        ),
        ("turns.jinja", vec!["b \n<|end|>\n</s>".to_owned(), "dé 🙂<|end|>\n</s>".to_owned()]),
    ] {
        let chat = Chat::template(name);
        let messages = two_answers();
        assert_eq!(chat.learned(&messages).unwrap(), wanted, "{name}");
        let (dataset, warnings) = chat.read(&messages).unwrap();
        let split =
            "data.jsonl:1: the chat template shows earlier answers differently: 1 sample became one for each";
        assert_eq!(warnings[0].starts_with(split), wanted.len() > 1, "{name}: {warnings:?}");
        let last = dataset.samples.last().unwrap();
        let asked = last.question.as_ref().unwrap();
        assert_eq!(asked.tokens, chat.prompt(&messages.as_array().unwrap()[..3]), "{name}");
        assert!(last.tokens.starts_with(&asked.tokens), "{name}");
    }
}

/// A template that ends the whole text too, as Phi-3's does: its turns end with an end token of the model.
#[test]
fn an_answer_ends_with_the_first_token_that_ends_generation() {
    let mut chat = Chat::template("turns.jinja");
    chat.tokenizer = Tokenizer::read(folder("examples/base")).unwrap();
    chat.end_tokens = vec![chat.tokenizer.token_to_id("<|end|>").unwrap()];
    let (dataset, warnings) = chat.read(&two_answers()).unwrap();
    assert_eq!(warnings, [] as [String; 0]);
    assert_eq!(chat.learned(&two_answers()).unwrap(), ["b \n<|end|>dé 🙂<|end|>"]);
    assert_eq!(dataset.samples[0].tokens.last(), chat.end_tokens.first(), "nothing behind the last answer");
}

#[test]
fn a_template_that_changes_the_question_is_refused_with_its_line() {
    for (name, messages) in [
        // Numbers the messages of all; moves the system message to the last turn; writes behind the last turn.
        ("schema-types.jinja", chat(&[("user", "a"), ("assistant", "b")])),
        ("inst-tools.jinja", chat(&[("system", "s"), ("user", "a"), ("assistant", "b")])),
        ("generation.jinja", chat(&[("user", "a"), ("assistant", "b")])),
    ] {
        let error = Chat::template(name).read(&messages).unwrap_err();
        assert!(
            error.starts_with("data.jsonl:1: the chat template writes what comes before messages["),
            "{error}"
        );
    }
    let error = Chat::template("sys-inst.jinja").read(&chat(&[("user", "a"), ("user", "b")])).unwrap_err();
    assert!(error.starts_with("data.jsonl:1: Roles must alternate. (chat template, line 1)"), "{error}");
}

#[test]
fn tool_calls_are_learned_and_their_results_are_not() {
    let call =
        json!({"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "abcdef123"},
        {"role": "assistant", "content": "b"},
    ]);
    let chat = Chat::template("chatml-tools.jinja");
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call><|im_end|>";
    assert_eq!(chat.learned(&messages).unwrap(), [format!("{call}b<|im_end|>")]);
    // A call is no answer to compare with.
    let only_call = messages.as_array().unwrap()[..2].to_vec().into();
    let (dataset, _) = chat.read(&only_call).unwrap();
    assert_eq!(dataset.samples[0].question, None);
    // The tools reach the template.
    let line =
        json!({"messages": only_call, "tools": [{"type": "function", "function": {"name": "offered"}}]});
    let options = DataOptions { max_length: 10_000, ..OPTIONS };
    let (dataset, _) = read_with(&chat.encoder(), line.to_string().as_bytes(), &options).unwrap();
    assert!(chat.tokenizer.decode(&dataset.samples[0].tokens, false).contains("offered"));
}

#[test]
fn answers_without_weight_or_question_are_context() {
    let learned = |messages: Value| learned_text(&BASE.tokenizer, &sample(json!({"messages": messages})));
    let mut messages = two_answers();
    messages[1]["weight"] = 0.into();
    messages[3]["weight"] = 1.into();
    assert_eq!(learned(messages.clone()), "dé 🙂<|end|>");
    messages[1]["weight"] = 1.into();
    messages[3]["weight"] = 0.into();
    assert_eq!(learned(messages), "b \n<|end|>");
    assert_eq!(learned(chat(&[("assistant", "hi"), ("user", "a"), ("assistant", "b")])), "b<|end|>");
    // What is said behind the last answer changes nothing.
    let [more, less] = [5, 4].map(|turns| {
        let mut messages = two_answers().as_array().unwrap().clone();
        messages.push(json!({"role": "user", "content": "ok"}));
        messages.truncate(turns);
        sample(json!({"messages": messages}))
    });
    assert_eq!(more, less);
}

#[test]
fn content_in_parts_is_read() {
    let parts = json!([{"type": "text", "text": " b"}, {"type": "text", "text": "c "}]);
    let line =
        json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]});
    let sample = sample(line);
    assert_eq!(learned_text(&BASE.tokenizer, &sample), " b\nc <|end|>");
    assert_eq!(sample.question.unwrap().answer, "b\nc");
}

#[test]
fn a_base_without_a_chat_template_has_the_plain_layout() {
    let tokenizer = Tokenizer::read(folder("tests/golden/llama/model")).unwrap();
    let end = tokenizer.token_to_id("<|end_of_text|>").unwrap();
    let encoder = Encoder::new(&tokenizer, None, std::slice::from_ref(&end), 512).unwrap();
    let line = json!({"instruction": "Add.", "input": "1 2", "output": "3"}).to_string();
    let (dataset, warnings) = read_with(&encoder, line.as_bytes(), &OPTIONS).unwrap();
    let sample = &dataset.samples[0];
    assert_eq!(
        tokenizer.decode(&sample.tokens, false),
        "<|begin_of_text|>### User:\nAdd.\n\n1 2\n\n### Assistant:\n3<|end_of_text|>"
    );
    assert_eq!(learned_text(&tokenizer, sample), "3<|end_of_text|>");
    // What a completion request with this prompt would see.
    let prompt = "### User:\nAdd.\n\n1 2\n\n### Assistant:\n";
    assert_eq!(sample.question.as_ref().unwrap().tokens, tokenizer.encode(prompt, true).unwrap());
    assert!(warnings[0].contains("the base has no chat template"), "{warnings:?}");

    let tools = json!({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}).to_string();
    let error = read_with(&encoder, tools.as_bytes(), &OPTIONS).unwrap_err();
    assert!(error.starts_with("data.jsonl:1: tools need a chat template, the base has none"), "{error}");
}

#[test]
fn a_completion_follows_the_prompt_that_generation_sees() {
    for (prompt, completion) in [
        ("Ticket: my card", " card"),
        ("Ticket: ", "card"),
        ("Ticket:\n\n", "card"),
        ("Ticket:\n", "\ncard "),
        ("car", "ds"),
        ("", "card"),
        ("Ticket:", ""),
        ("é 🙂", "🙂é"),
    ] {
        let sample = sample(json!({"prompt": prompt, "completion": completion}));
        let tokens = BASE.tokenizer.encode(prompt, true).unwrap();
        assert!(sample.tokens.starts_with(&tokens), "{prompt:?}");
        assert_eq!(BASE.tokenizer.decode(&sample.tokens, false), format!("{prompt}{completion}<|end|>"));
        // Nothing comes before the first token of an empty prompt, so that one cannot be learned.
        let learned = learned_text(&BASE.tokenizer, &sample);
        match sample.question {
            Some(question) => {
                assert_eq!(learned, format!("{completion}<|end|>"));
                assert_eq!(question.tokens, tokens);
                assert_eq!(question.answer, completion.trim());
            }
            None => assert!(prompt.is_empty() && learned.len() < completion.len() + 7, "{learned}"),
        }
    }
}

/// SentencePiece writes a space before the first word of a text: an answer by itself would get one too.
#[test]
fn an_answer_gets_no_space_that_its_text_does_not_have() {
    let tokenizer = sentencepiece(strip_decoder());
    let encoder = Encoder::new(&tokenizer, None, &[2], 512).unwrap();
    for (prompt, completion, learned) in [
        ("Hello", " world", " world</s>"),
        // The word's one token stands for both.
        ("Hell", "o", "Hello</s>"),
        ("é", "é", "é</s>"),
    ] {
        let line = json!({"prompt": prompt, "completion": completion}).to_string();
        let (dataset, _) = read_with(&encoder, line.as_bytes(), &OPTIONS).unwrap();
        let sample = &dataset.samples[0];
        assert_eq!(tokenizer.decode(&sample.tokens, true), format!("{prompt}{completion}"));
        let targets: Vec<u32> = sample.targets.iter().map(|target| target.token).collect();
        let text: Vec<u8> =
            targets.iter().flat_map(|token| tokenizer.token_bytes(*token).unwrap().to_vec()).collect();
        assert_eq!(String::from_utf8(text).unwrap().trim_start(), learned.trim_start(), "{prompt}");
    }
}

/// Phi-3's header tokens swallow the spaces behind them, also those that an answer begins with.
#[test]
fn a_header_that_swallows_an_answers_spaces_is_not_learned() {
    let mut json: Value =
        serde_json::from_slice(&fs::read(folder("examples/base/tokenizer.json")).unwrap()).unwrap();
    json["added_tokens"][4]["rstrip"] = true.into();
    let model = tempfile::tempdir().unwrap();
    fs::write(model.path().join("tokenizer.json"), json.to_string()).unwrap();
    let template = fs::read_to_string(folder("examples/base/chat_template.jinja")).unwrap();
    let chat = Chat {
        tokenizer: Tokenizer::read(model.path()).unwrap(),
        template: ChatTemplate::new(&template, &SpecialTokens::default()).unwrap(),
        end_tokens: vec![2],
    };
    let messages = super::chat(&[("user", "a"), ("assistant", "  b"), ("user", "c"), ("assistant", " d")]);
    assert_eq!(chat.learned(&messages).unwrap(), ["b<|end|>d<|end|>"]);
}

#[test]
fn a_completion_ends_with_one_token_that_ends_generation() {
    let tokenizer = Tokenizer::read(folder("tests/golden/llama/model")).unwrap();
    // `<|end_of_text|>` is 1 and the tokenizer's own, `<|eot_id|>` is 2.
    for (end_tokens, text, end) in [
        (&[1, 2][..], "a b", 1),
        (&[2], "a b", 2),
        (&[], "a b", 1),
        (&[1, 2], "a b<|eot_id|>", 2),
        (&[], "a b<|end_of_text|>", 1),
    ] {
        let encoder = Encoder::new(&tokenizer, None, end_tokens, 512).unwrap();
        for line in [json!({"text": text}), json!({"prompt": "c", "completion": text})] {
            let (dataset, _) = read_with(&encoder, line.to_string().as_bytes(), &OPTIONS).unwrap();
            let tokens = &dataset.samples[0].tokens;
            let ends: Vec<usize> =
                (1..tokens.len()).filter(|&index| [1, 2].contains(&tokens[index])).collect();
            assert_eq!(
                (ends, tokens[tokens.len() - 1]),
                (vec![tokens.len() - 1], end),
                "{line} {end_tokens:?}"
            );
        }
    }
}

#[test]
fn ranges_of_tokens_cover_the_text() {
    let text = "  a  b\n\n\n é🙂   <|end|> \t x ";
    for folder in [folder("examples/base"), folder("tests/golden/qwen2/model")] {
        let tokenizer = Tokenizer::read(folder).unwrap();
        let (tokens, ranges) = tokenizer.encode_with_ranges(text, true).unwrap();
        assert_eq!(tokens, tokenizer.encode(text, true).unwrap());
        let mut end = 0;
        for range in &ranges {
            assert!(range.start <= end && range.end >= range.start, "{ranges:?}");
            end = end.max(range.end);
        }
        assert_eq!(end, text.len());
    }
}

#[test]
fn reasoning_is_no_part_of_an_answer() {
    for text in
        ["yes", " yes\n", "<think>no?</think>\n\nyes", "no?</think>yes ", "<think>a</think>b</think> yes"]
    {
        assert_eq!(final_answer(text), "yes", "{text:?}");
    }
    assert_eq!(final_answer("<think> yes"), "<think> yes", "reasoning that did not end");
}
