//! `loramux run-batch` answers every line as transformers + PEFT compute it, in input order, whatever its neighbours
//! are.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use common::program::{Ran, command, finish, line, read_lines, write_lines};
use common::{Case, VOCABULARY, ids};
use loramux::adapter::Adapter;
use loramux::adapter::peft::{Limits, WriteOptions, read_adapter, write_adapter};
use loramux::model::Base;
use loramux::tensor::Tensor;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A batch over the golden llama model with some of its adapters.
struct Batch {
    case: Case,
    folder: TempDir,
    adapters: Vec<(String, PathBuf)>,
}

impl Batch {
    fn new(adapters: &[&str]) -> Self {
        let case = Case::open("llama");
        let adapters = adapters.iter().map(|name| ((*name).to_owned(), case.adapter_folder(name))).collect();
        Self { case, folder: tempfile::tempdir().unwrap(), adapters }
    }

    fn input(&self) -> PathBuf {
        self.folder.path().join("in.jsonl")
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out.jsonl")
    }

    /// Runs the batch with further arguments.
    fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = command(&["run-batch", "--threads", "2"]);
        command.arg("-i").arg(self.input()).arg("-o").arg(self.output());
        command.arg("--model").arg(self.case.model());
        for (name, folder) in &self.adapters {
            command.arg("--lora-modules").arg(format!("{name}={}", folder.display()));
        }
        command.args(arguments);
        let ran = finish(command);
        assert_eq!(ran.stdout, "", "standard output is for data");
        ran
    }

    /// Answers of a run in which every line succeeds.
    fn answer(&self, lines: &[Value]) -> Vec<Value> {
        write_lines(&self.input(), lines);
        let ran = self.run(&["--force"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let answers = read_lines(&self.output());
        assert_eq!(answers.len(), lines.len());
        for (line, answer) in lines.iter().zip(&answers) {
            assert_eq!(answer["custom_id"], line["custom_id"]);
            assert_eq!(answer["error"], Value::Null);
            assert_eq!(answer["response"]["status_code"], 200, "{answer}");
        }
        answers.into_iter().map(|mut answer| answer["response"]["body"].take()).collect()
    }
}

/// A greedy completion with its tokens; `more` adds or replaces fields.
fn greedy(model: &str, prompt: &[u32], more: Value) -> Value {
    let mut body = json!({
        "model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": true,
    });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn number(text: &str, before: &str) -> usize {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| word.trim_matches([',', ';']) == before).unwrap();
    words[at - 1].parse().unwrap()
}

fn log_softmax(logits: &[f32], token: usize) -> f64 {
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    f64::from(logits[token]) - sum.ln()
}

#[test]
fn a_mixed_batch_of_all_adapters_gives_what_peft_gives() {
    let batch = Batch::new(&[
        "small-qv",
        "all-r8",
        "rslora-r16",
        "odd-r3-mlp",
        "pattern",
        "last-layer",
        "dora-r8",
        "head",
        "saved-head",
    ]);
    let (names, prompts) = (batch.case.adapters(), batch.case.prompts());
    let mut lines = Vec::new();
    // Prompt by prompt, so that neighbouring lines use different adapters.
    for (index, prompt) in prompts.iter().enumerate() {
        for name in &names {
            let model = if name == "base" { "model" } else { name };
            lines
                .push(line(&format!("{name}/{index}"), greedy(model, prompt, json!({"prompt_logprobs": 1}))));
        }
    }
    let mut answers = batch.answer(&lines).into_iter();
    let mut scored = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        for name in &names {
            let body = answers.next().unwrap();
            let what = format!("{name} prompt {index}");
            let choice = &body["choices"][0];
            assert_eq!(body["object"], "text_completion");
            assert_eq!(body["model"], if name == "base" { "model" } else { name }, "{what}");
            assert_eq!(ids(&choice["token_ids"]), batch.case.greedy(name, index), "{what}");
            assert_eq!(ids(&choice["prompt_token_ids"]), *prompt, "{what}");
            assert_eq!(body["usage"]["prompt_tokens"], prompt.len(), "{what}");
            assert_eq!(body["usage"]["completion_tokens"], batch.case.greedy(name, index).len(), "{what}");

            let positions = choice["prompt_logprobs"].as_array().unwrap();
            assert_eq!(positions.len(), prompt.len(), "{what}");
            assert!(positions[0].is_null(), "{what}: nothing predicts the first token");
            let Some(logits) = batch.case.logits(name, index) else { continue };
            scored += 1;
            let rows: Vec<&[f32]> = logits.chunks(VOCABULARY).collect();
            // The reference keeps the last rows, and each is about the token after it.
            let first = prompt.len() - rows.len();
            for (position, entries) in positions.iter().enumerate().skip(first + 1) {
                let row = rows[position - 1 - first];
                check_position(row, prompt[position] as usize, entries, &format!("{what} at {position}"));
            }
        }
    }
    assert!(scored >= names.len(), "the reference keeps the logits of at least one prompt of each adapter");
}

/// Entries of one prompt position: the prompt's own token and the most likely one, against the reference's logits.
fn check_position(logits: &[f32], token: usize, entries: &Value, what: &str) {
    let entries = entries.as_object().unwrap();
    let own = &entries[&token.to_string()];
    let rank = own["rank"].as_u64().unwrap();
    let margin = 4e-4;
    let above = |by: f32| logits.iter().filter(|&&logit| logit > logits[token] + by).count() as u64;
    assert!((above(margin) + 1..=above(-margin)).contains(&rank), "{what}: rank {rank}");
    assert!(own["decoded_token"].is_string(), "{what}");
    assert_eq!(entries.len(), if rank == 1 { 1 } else { 2 }, "{what}");
    for (id, entry) in entries {
        let (found, wanted) = (entry["logprob"].as_f64().unwrap(), log_softmax(logits, id.parse().unwrap()));
        assert!((found - wanted).abs() < 4e-4, "{what}: token {id} has {found}, wanted {wanted}");
        assert!(entry["rank"] == 1 || *id == token.to_string(), "{what}");
    }
}

#[test]
fn text_and_chats_are_tokenized_as_transformers_does() {
    let batch = Batch::new(&["all-r8"]);
    let (text, chat) = (&batch.case.forward["text_prompt"], &batch.case.forward["chat"]);
    let index = text["index"].as_u64().unwrap() as usize;
    let answers = batch.answer(&[
        line("text", greedy("all-r8", &[], json!({"prompt": text["text"]}))),
        line("texts", greedy("model", &[], json!({"prompt": [text["text"], text["text"]]}))),
        line(
            "chat",
            json!({"model": "model", "messages": chat["messages"], "max_completion_tokens": 4,
                   "temperature": 0, "return_token_ids": true}),
        ),
    ]);
    assert_eq!(ids(&answers[0]["choices"][0]["prompt_token_ids"]), batch.case.prompts()[index]);
    assert_eq!(ids(&answers[0]["choices"][0]["token_ids"]), batch.case.greedy("all-r8", index));
    for (number, choice) in answers[1]["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], number);
        assert_eq!(ids(&choice["token_ids"]), batch.case.greedy("base", index));
    }
    let (body, choice) = (&answers[2], &answers[2]["choices"][0]);
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(ids(&body["prompt_token_ids"]), ids(&chat["input_ids"]));
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 4);
}

#[test]
fn a_stop_string_or_token_ends_the_answer_before_it() {
    let batch = Batch::new(&["small-qv"]);
    let prompt = &batch.case.prompts()[1];
    let whole = batch.answer(&[line("whole", greedy("small-qv", prompt, json!({"logprobs": 0})))]);
    let tokens = batch.case.greedy("small-qv", 1);
    let texts = whole[0]["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    let texts: Vec<&str> = texts.iter().map(|text| text.as_str().unwrap()).collect();
    // A stop string over two tokens that has not appeared before.
    let at = (1..11).find(|&at| {
        let stop = texts[at..at + 2].concat();
        stop.is_ascii() && stop.len() > 1 && texts.concat().find(&stop) == Some(texts[..at].concat().len())
    });
    let at = at.expect("two tokens that make a stop string");
    let stop = texts[at..at + 2].concat();
    let answers = batch.answer(&[
        line("string", greedy("small-qv", prompt, json!({"stop": [stop, "never to be seen"]}))),
        line("token", greedy("small-qv", prompt, json!({"stop_token_ids": [tokens[2]]}))),
        line("length", greedy("small-qv", prompt, json!({"max_tokens": 3}))),
        line("least", greedy("small-qv", prompt, json!({"stop_token_ids": [tokens[2]], "min_tokens": 5}))),
    ]);
    let choice = |index: usize| &answers[index]["choices"][0];
    assert_eq!(choice(0)["text"], texts[..at].concat());
    assert_eq!((&choice(0)["finish_reason"], &choice(0)["stop_reason"]), (&json!("stop"), &json!(stop)));
    let first = tokens.iter().position(|token| *token == tokens[2]).unwrap();
    assert_eq!(ids(&choice(1)["token_ids"]), tokens[..=first]);
    assert_eq!((&choice(1)["finish_reason"], &choice(1)["stop_reason"]), (&json!("stop"), &json!(tokens[2])));
    assert_eq!(ids(&choice(2)["token_ids"]), tokens[..3]);
    assert_eq!((&choice(2)["finish_reason"], &choice(2)["stop_reason"]), (&json!("length"), &Value::Null));
    assert!(ids(&choice(3)["token_ids"]).len() >= 5);
}

#[test]
fn sampling_repeats_with_its_seed_and_choices_differ() {
    let batch = Batch::new(&["all-r8"]);
    let prompt = &batch.case.prompts()[2];
    let drawn =
        |seed: i64, n: usize| greedy("all-r8", prompt, json!({"temperature": 1.5, "seed": seed, "n": n}));
    let lines = [line("a", drawn(7, 3)), line("b", drawn(7, 3)), line("c", drawn(-8, 3))];
    let answers = batch.answer(&lines);
    let tokens = |body: &Value| -> Vec<Vec<u32>> {
        body["choices"].as_array().unwrap().iter().map(|choice| ids(&choice["token_ids"])).collect()
    };
    let first = tokens(&answers[0]);
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2]);
    assert_eq!(tokens(&answers[1]), first, "the same seed");
    assert_ne!(tokens(&answers[2]), first, "another seed");
    assert_eq!(
        answers[0]["usage"]["prompt_tokens"],
        prompt.len(),
        "a prompt counts once, however many choices"
    );
    let again = batch.answer(&lines);
    assert_eq!(tokens(&again[0]), first, "another run");
}

#[test]
fn logprobs_and_echo_have_the_shape_that_clients_parse() {
    let batch = Batch::new(&["all-r8"]);
    let (prompt, scored) = (&batch.case.prompts()[1], &batch.case.prompts()[3]);
    let answers = batch.answer(&[
        line("completion", greedy("all-r8", scored, json!({"logprobs": 2}))),
        line("echo", greedy("all-r8", prompt, json!({"logprobs": 1, "echo": true, "max_tokens": 2}))),
        line("prompt only", greedy("all-r8", prompt, json!({"logprobs": 0, "echo": true, "max_tokens": 0}))),
        line(
            "ids",
            greedy(
                "all-r8",
                prompt,
                json!({"logprobs": 1, "return_tokens_as_token_ids": true, "max_tokens": 1}),
            ),
        ),
        line(
            "chat",
            json!({"model": "all-r8", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3,
                   "temperature": 0, "logprobs": true, "top_logprobs": 2}),
        ),
    ]);
    let logits = batch.case.logits("all-r8", 3).unwrap();
    let last = &logits[logits.len() - VOCABULARY..];
    let first = batch.case.greedy("all-r8", 3)[0];

    let logprobs = &answers[0]["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), 12, "{list}");
    }
    let found = logprobs["token_logprobs"][0].as_f64().unwrap();
    assert!((found - log_softmax(last, first as usize)).abs() < 4e-4);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 2);
    assert_eq!(logprobs["text_offset"][0], 0);

    let echoed = &answers[1]["choices"][0];
    assert_eq!(echoed["logprobs"]["tokens"].as_array().unwrap().len(), prompt.len() + 2);
    assert!(echoed["logprobs"]["token_logprobs"][0].is_null());
    let text = batch.case.forward["text_prompt"]["text"].as_str().unwrap();
    assert!(echoed["text"].as_str().unwrap().contains(text), "{}", echoed["text"]);
    let only = &answers[2]["choices"][0];
    assert_eq!(only["logprobs"]["tokens"].as_array().unwrap().len(), prompt.len());
    assert_eq!(answers[2]["usage"]["completion_tokens"], 0);
    let first = batch.case.greedy("all-r8", 1)[0];
    assert_eq!(answers[3]["choices"][0]["logprobs"]["tokens"], json!([format!("token_id:{first}")]));

    let content = answers[4]["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"], "greedy takes the most likely");
        assert_eq!(entry["top_logprobs"][0]["logprob"], entry["logprob"]);
        assert!(entry["bytes"].is_array() && entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

/// One adapter that does what two do with these gates: `[A₁; A₂]` and `[g₁ s₁ B₁ | g₂ s₂ B₂]`.
fn concatenate(first: &Adapter, second: &Adapter, gates: [f32; 2]) -> Adapter {
    let mut sum = first.clone();
    for (pair, other) in sum.sites.iter_mut().zip(&second.sites) {
        assert_eq!(pair.site, other.site);
        let (inner, outer) = (pair.a.shape()[1], pair.b.shape()[0]);
        let ranks = [pair.rank, other.rank];
        let rank = ranks[0] + ranks[1];
        let a = [pair.a.to_f32(), other.a.to_f32()].concat();
        let (left, right) = (pair.b.to_f32(), other.b.to_f32());
        let mut b = Vec::new();
        for row in 0..outer {
            b.extend(left[row * ranks[0]..][..ranks[0]].iter().map(|b| b * gates[0] * pair.scale));
            b.extend(right[row * ranks[1]..][..ranks[1]].iter().map(|b| b * gates[1] * other.scale));
        }
        pair.a = Tensor::from_f32(vec![rank, inner], &a);
        pair.b = Tensor::from_f32(vec![outer, rank], &b);
        (pair.rank, pair.scale) = (rank, 1.0);
    }
    sum
}

#[test]
fn weighted_adapters_add_up() {
    let mut batch = Batch::new(&["all-r8", "rslora-r16"]);
    let base = Base::open(&batch.case.model()).unwrap();
    let sites = &base.checkpoint.sites().table;
    let read = |name: &str| {
        let folder = batch.case.adapter_folder(name);
        read_adapter(&folder, sites, &base.checkpoint, Limits { max_rank: 64 }).unwrap()
    };
    let sum = concatenate(&read("all-r8"), &read("rslora-r16"), [0.5, -0.25]);
    let folder = batch.folder.path().join("the sum of two");
    write_adapter(&folder, &sum, sites, WriteOptions::default()).unwrap();
    batch.adapters.push(("sum".to_owned(), folder));

    let prompt = &batch.case.prompts()[3];
    let ask = |model: &str, adapters: Value| {
        greedy(model, prompt, json!({"prompt_logprobs": 0, "adapters": adapters}))
    };
    let answers = batch.answer(&[
        line("sum", ask("sum", Value::Null)),
        line("weighted", ask("model", json!({"all-r8": 0.5, "rslora-r16": -0.25}))),
        line("one", ask("model", json!({"all-r8": 1}))),
        line("none", ask("all-r8", json!({}))),
        line("zero", ask("model", json!({"all-r8": 0.0}))),
    ]);
    let logprobs = |body: &Value| -> Vec<f64> {
        let positions = body["choices"][0]["prompt_logprobs"].as_array().unwrap();
        let own = |(entries, token): (&Value, &u32)| entries[token.to_string()]["logprob"].as_f64().unwrap();
        positions.iter().zip(prompt).skip(1).map(own).collect()
    };
    let (sum, weighted) = (logprobs(&answers[0]), logprobs(&answers[1]));
    let worst = sum.iter().zip(&weighted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-4, "off by {worst}");
    let tokens = |index: usize| ids(&answers[index]["choices"][0]["token_ids"]);
    assert_eq!(tokens(2), batch.case.greedy("all-r8", 3));
    assert_eq!(tokens(3), batch.case.greedy("base", 3));
    assert_eq!(tokens(4), batch.case.greedy("base", 3));
    assert_ne!(logprobs(&answers[2]), weighted);
}

#[test]
fn promise_2_no_padding_rows_are_the_tokens_given() {
    let batch = Batch::new(&["all-r8", "small-qv"]);
    let mut lines = Vec::new();
    for (index, prompt) in batch.case.prompts().iter().enumerate() {
        for (name, n, tokens) in [("model", 1, 12), ("all-r8", 2, 7), ("small-qv", 1, 1)] {
            let more = json!({"n": n, "max_tokens": tokens, "ignore_eos": true});
            lines.push(line(&format!("{name}/{index}"), greedy(name, prompt, more)));
        }
    }
    write_lines(&batch.input(), &lines);
    let ran = batch.run(&[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let mut wanted = 0;
    for answer in read_lines(&batch.output()) {
        for choice in answer["response"]["body"]["choices"].as_array().unwrap() {
            // The last token of a sequence is never a row: nothing follows it.
            wanted += ids(&choice["prompt_token_ids"]).len() + ids(&choice["token_ids"]).len() - 1;
        }
    }
    assert_eq!(number(&ran.stderr, "rows"), wanted, "{}", ran.stderr);
}

#[test]
fn promise_3_a_request_gives_the_same_bits_alone_and_among_others() {
    let batch = Batch::new(&["all-r8", "dora-r8", "small-qv"]);
    let prompts = batch.case.prompts();
    let ask = |id: &str, name: &str, prompt: usize| {
        let more = json!({"prompt_logprobs": 2, "logprobs": 2, "temperature": 0.9, "seed": 11});
        line(id, greedy(name, &prompts[prompt], more))
    };
    let lines: Vec<Value> = (0..prompts.len())
        .flat_map(|prompt| ["model", "all-r8", "dora-r8", "small-qv"].map(|name| (name, prompt)))
        .map(|(name, prompt)| ask(&format!("{name}/{prompt}"), name, prompt))
        .collect();
    let together = batch.answer(&lines);
    for index in [2, 7, 17] {
        let alone = batch.answer(&lines[index..=index]);
        assert_eq!(alone[0]["choices"], together[index]["choices"], "{}", lines[index]["custom_id"]);
    }
}

#[test]
fn promise_5_a_bad_line_fails_by_itself() {
    let batch = Batch::new(&["all-r8"]);
    let prompt = &batch.case.prompts()[1];
    let good = |id: &str| line(id, greedy("all-r8", prompt, json!({}))).to_string();
    let bad = |id: &str, more: Value| line(id, greedy("all-r8", prompt, more)).to_string();
    // (line, status, param, part of the message); status 0 for a line that is no request
    let cases: Vec<(String, u64, &str, &str)> = vec![
        ("{\"custom_id\": \"torn\", ".to_owned(), 0, "", "line 2: not valid JSON"),
        (json!({"custom_id": "method", "method": "GET"}).to_string(), 0, "", "`method` must be \"POST\""),
        (json!(["not", "a", "request"]).to_string(), 0, "", "must be a JSON object"),
        (
            json!({"custom_id": "url", "method": "POST", "url": "/v1/embeddings", "body": {}}).to_string(),
            0,
            "",
            "`url` must be",
        ),
        (bad("typo", json!({"temprature": 1})), 400, "temprature", "did you mean `temperature`?"),
        (bad("model", json!({"model": "nobody"})), 404, "model", "The model `nobody` does not exist."),
        (bad("auto", json!({"model": "auto"})), 400, "model", "no router"),
        (bad("hot", json!({"temperature": 2.5})), 400, "temperature", "2.5"),
        (bad("cold", json!({"temperature": -1})), 400, "temperature", "-1"),
        (bad("top_p", json!({"top_p": 0})), 400, "top_p", "top_p"),
        (bad("min_p", json!({"min_p": 1.5})), 400, "min_p", "1.5"),
        (bad("presence", json!({"presence_penalty": 3})), 400, "presence_penalty", "3"),
        (bad("repetition", json!({"repetition_penalty": 0})), 400, "repetition_penalty", "0"),
        (bad("n", json!({"n": 0})), 400, "n", "0"),
        (bad("short", json!({"max_tokens": 0})), 400, "max_tokens", "0"),
        (bad("long", json!({"max_tokens": 100_000})), 400, "max_tokens", "100016 tokens"),
        (bad("empty", json!({"prompt": []})), 400, "prompt", "prompt"),
        (bad("outside", json!({"prompt": [5, 512]})), 400, "prompt", "512"),
        (bad("overlong", json!({"prompt": vec![7; 5000]})), 400, "prompt", "5000 tokens"),
        (bad("stop", json!({"stop": ""})), 400, "stop", "empty"),
        (bad("type", json!({"max_tokens": "12"})), 400, "max_tokens", "\"12\""),
        (bad("adapters", json!({"adapters": {"nobody": 1}})), 400, "adapters", "`nobody` does not exist"),
        (bad("stream", json!({"stream": true})), 400, "stream", "batch file"),
    ];
    let mut lines = vec![good("good 0")];
    for (index, (line, ..)) in cases.iter().enumerate() {
        lines.extend([line.clone(), good(&format!("good {}", index + 1))]);
    }
    write_lines(&batch.input(), &lines);
    let ran = batch.run(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert_eq!(number(&ran.stderr, "failed"), cases.len(), "{}", ran.stderr);
    let answers = read_lines(&batch.output());
    assert_eq!(answers.len(), lines.len());
    for (index, answer) in answers.iter().enumerate() {
        let body = &answer["response"]["body"];
        if index % 2 == 0 {
            assert_eq!(answer["custom_id"], format!("good {}", index / 2));
            assert_eq!(ids(&body["choices"][0]["token_ids"]), batch.case.greedy("all-r8", 1));
            continue;
        }
        let (line, status, param, message) = &cases[index / 2];
        if *status == 0 {
            assert!(answer["response"].is_null(), "{answer}");
            let found = answer["error"]["message"].as_str().unwrap();
            assert!(found.contains(message) && found.starts_with(&format!("line {}", index + 1)), "{found}");
            continue;
        }
        assert_eq!(answer["response"]["status_code"], *status, "{line}: {answer}");
        assert!(answer["error"].is_null());
        assert_eq!(body["error"]["param"], *param, "{line}: {answer}");
        assert_eq!(body["error"]["code"], *status);
        let found = body["error"]["message"].as_str().unwrap();
        assert!(found.contains(message), "{line}: {found}");
    }
}

#[test]
fn promise_5_a_bad_adapter_fails_by_itself() {
    let mut batch = Batch::new(&["all-r8"]);
    let folder = batch.folder.path().join("bad");
    common::program::copy_folder(&batch.case.adapter_folder("small-qv"), &folder);
    let config = folder.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut fields: BTreeMap<String, Value> = serde_json::from_str(&text).unwrap();
    fields.insert("r".to_owned(), json!(-4));
    std::fs::write(&config, serde_json::to_string(&fields).unwrap()).unwrap();
    batch.adapters.push(("bad".to_owned(), folder));
    batch.adapters.push(("absent".to_owned(), batch.folder.path().join("nowhere")));

    let prompt = &batch.case.prompts()[1];
    let ask = |name: &str| line(name, greedy(name, prompt, json!({})));
    write_lines(&batch.input(), &[ask("all-r8"), ask("bad"), ask("absent")]);
    let ran = batch.run(&[]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    assert!(ran.stderr.contains("adapter_config.json: field `r`: -4"), "{}", ran.stderr);
    assert!(ran.stderr.contains("nowhere: no such adapter folder"), "{}", ran.stderr);
    let answers = read_lines(&batch.output());
    let body = |index: usize| &answers[index]["response"]["body"];
    assert_eq!(ids(&body(0)["choices"][0]["token_ids"]), batch.case.greedy("all-r8", 1));
    assert_eq!(answers[1]["response"]["status_code"], 404);
    assert!(body(1)["error"]["message"].as_str().unwrap().contains("field `r`"), "{}", body(1));
    assert_eq!(answers[2]["response"]["status_code"], 404);

    // Also when nobody asks for it: whoever named it expects it to be there.
    write_lines(&batch.input(), &[ask("all-r8")]);
    assert_eq!(batch.run(&["--force"]).code, Some(3));
}
