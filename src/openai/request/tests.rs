//! One entry per rule: which bodies are accepted, what they mean, and how the others are refused.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Serves `base` and the adapters `sql` and `poem`.
struct FakeModels;

impl Models for FakeModels {
    fn is_base(&self, name: &str) -> bool {
        name == "base"
    }

    fn is_adapter(&self, name: &str) -> bool {
        ["sql", "poem"].contains(&name)
    }
}

/// One token per byte, 1 as the begin token; chats become `role:content;` and then `>`.
struct FakeText;

impl Text for FakeText {
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        if text.contains("untokenizable") {
            return Err("no tokens for this".to_owned());
        }
        Ok(add_special_tokens.then_some(1).into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn decode(&self, tokens: &[u32], _: bool) -> Result<String, String> {
        Ok(tokens.iter().map(|token| format!("<{token}>")).collect())
    }

    fn render_chat(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String, String> {
        let mut text = variables.get("head").and_then(Value::as_str).unwrap_or_default().to_owned();
        for message in messages {
            let role = message["role"].as_str().ok_or("no role")?;
            if role == "clown" {
                return Err("the chat template refused: unknown role clown".to_owned());
            }
            text += &format!("{role}:{};", message["content"].as_str().unwrap_or("-"));
            if let Some(calls) = message.get("tool_calls") {
                text += &calls[0]["function"]["arguments"]["city"].to_string();
            }
        }
        Ok(if add_generation_prompt { text + ">" } else { text })
    }
}

/// 200 tokens of context; byte 255 is outside the vocabulary.
fn parse_with(endpoint: Endpoint, body: &Value, can_stream: bool) -> Result<ParsedRequest, ApiError> {
    let mut limits = Limits::new(200, 255);
    limits.max_prompts = 3;
    limits.max_stop_length = 10;
    parse(endpoint, body, &Context { limits: &limits, models: &FakeModels, text: &FakeText, can_stream })
}

/// A completions body with these fields changed.
fn completion(changes: Value) -> Result<ParsedRequest, ApiError> {
    let mut body = json!({"model": "base", "prompt": "hi"});
    body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    parse_with(Endpoint::Completions, &body, false)
}

/// A chat body with these fields changed.
fn chat(changes: Value) -> Result<ParsedRequest, ApiError> {
    let mut body = json!({"model": "base", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    parse_with(Endpoint::ChatCompletions, &body, false)
}

fn only(parsed: Result<ParsedRequest, ApiError>) -> Request {
    let mut requests = parsed.unwrap().requests;
    assert_eq!(requests.len(), 1);
    requests.remove(0)
}

/// The prompt of a chat as text.
fn prompt_of(changes: Value) -> String {
    only(chat(changes)).prompt.iter().map(|&token| token as u8 as char).collect()
}

/// Checks a refusal: its param, and that its message contains `part`.
#[track_caller]
fn refused(parsed: Result<ParsedRequest, ApiError>, param: &str, part: &str) {
    let error = parsed.expect_err(part);
    assert_eq!((error.status, error.kind), (400, "BadRequestError"), "{}", error.message);
    assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
    assert!(error.message.contains(part), "{}", error.message);
}

#[test]
fn defaults_are_those_of_vllm() {
    let parsed = completion(json!({})).unwrap();
    let expected = Request {
        sampling: SamplingParams::default(),
        stop: StopParams { max_tokens: Some(16), ..StopParams::default() },
        ..Request::new(vec![1, 104, 105])
    };
    assert_eq!(parsed.requests, [expected]);
    assert_eq!((parsed.model.as_str(), parsed.echo, parsed.stream), ("base", None, None));
    assert!(!parsed.return_token_ids && !parsed.return_tokens_as_token_ids && !parsed.echo_only);

    let request = only(chat(json!({})));
    assert_eq!(request.prompt.len(), "user:hi;>".len(), "a chat template writes its own special tokens");
    assert_eq!(request.stop.max_tokens, Some(200 - 9), "a chat may use the rest of the context");
}

#[test]
fn every_field_arrives() {
    let request = only(completion(json!({
        "model": "sql", "max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 40, "min_p": 0.125,
        "presence_penalty": -1.5, "frequency_penalty": 2, "repetition_penalty": 1.25, "seed": -1, "n": 3,
        "stop": ["a", "bc"], "stop_token_ids": [5, 6.0], "ignore_eos": true, "min_tokens": 2,
        "logit_bias": {"7": -100, "9": 0.5}, "logprobs": 4, "prompt_logprobs": 2, "skip_special_tokens": false,
    })));
    let expected = Request {
        prompt: vec![1, 104, 105],
        adapters: vec![("sql".to_owned(), 1.0)],
        n: 3,
        sampling: SamplingParams {
            temperature: 0.5,
            top_p: 0.25,
            top_k: Some(40),
            min_p: 0.125,
            presence_penalty: -1.5,
            frequency_penalty: 2.0,
            repetition_penalty: 1.25,
            logit_bias: vec![(7, -100.0), (9, 0.5)],
            seed: Some(u64::MAX),
        },
        stop: StopParams {
            max_tokens: Some(7),
            min_tokens: 2,
            stop: vec!["a".to_owned(), "bc".to_owned()],
            stop_token_ids: vec![5, 6],
            ignore_eos: true,
        },
        logprobs: Some(4),
        prompt_logprobs: Some(2),
        skip_special_tokens: false,
    };
    assert_eq!(request, expected);
    for disabled in [-1, 0] {
        assert_eq!(only(completion(json!({"top_k": disabled}))).sampling.top_k, None);
    }
    assert_eq!(only(completion(json!({"stop": "end"}))).stop.stop, ["end"]);
    let parsed = completion(json!({"return_token_ids": true, "return_tokens_as_token_ids": true})).unwrap();
    assert!(parsed.return_token_ids && parsed.return_tokens_as_token_ids);
}

#[test]
fn numbers_out_of_range_are_refused_by_name_and_value() {
    let cases = [
        ("temperature", json!(-0.1), "from 0 to 2, got -0.1"),
        ("temperature", json!(2.01), "from 0 to 2, got 2.01"),
        ("temperature", json!(2.000_000_01), "got 2.00000001"),
        ("temperature", json!(1e300), "got 1e+300"),
        ("temperature", json!("hot"), "must be a number from 0 to 2, got \"hot\""),
        ("temperature", json!(true), "got true"),
        ("top_p", json!(0), "above 0 and at most 1, got 0"),
        ("top_p", json!(1e-60), "above 0"),
        ("top_p", json!(1.5), "got 1.5"),
        ("min_p", json!(-0.5), "from 0 to 1, got -0.5"),
        ("min_p", json!(1.1), "got 1.1"),
        ("top_k", json!(-2), "at least -1, got -2"),
        ("top_k", json!(2.5), "an integer of at least -1, got 2.5"),
        ("presence_penalty", json!(2.5), "from -2 to 2, got 2.5"),
        ("frequency_penalty", json!(-3), "from -2 to 2, got -3"),
        ("repetition_penalty", json!(0), "above 0, got 0"),
        ("repetition_penalty", json!(-1), "got -1"),
        ("max_tokens", json!(0), "an integer of at least 1, got 0"),
        ("max_tokens", json!(-5), "got -5"),
        ("max_tokens", json!(1.5), "got 1.5"),
        ("max_tokens", json!("7"), "got \"7\""),
        ("max_tokens", json!(false), "got false"),
        ("min_tokens", json!(-1), "at least 0, got -1"),
        ("n", json!(0), "from 1 to 128, got 0"),
        ("n", json!(129), "from 1 to 128, got 129"),
        ("n", json!([1]), "got [1]"),
        ("prompt_logprobs", json!(-1), "from 0 to 20, got -1"),
        ("prompt_logprobs", json!(21), "got 21"),
        ("seed", json!(1.5), "a 64-bit integer, got 1.5"),
        ("seed", json!(u64::MAX), "got 18446744073709551615"),
        ("seed", json!("1"), "got \"1\""),
        ("ignore_eos", json!(1), "true or false, got 1"),
        ("skip_special_tokens", json!("yes"), "true or false, got \"yes\""),
        ("return_token_ids", json!(0), "got 0"),
        ("return_tokens_as_token_ids", json!({}), "got {}"),
        ("echo", json!(1), "true or false, got 1"),
        ("add_special_tokens", json!("no"), "true or false"),
        ("model", json!(3), "must be a string, got 3"),
        ("logit_bias", json!([1]), "an object, got [1]"),
        ("logit_bias", json!({"x": 1}), "\"x\", which is none of the 255 token ids"),
        ("logit_bias", json!({"255": 1}), "\"255\""),
        ("logit_bias", json!({"+7": 1}), "\"+7\""),
        ("logit_bias", json!({"7": 101}), "token 7 must be a number from -100 to 100, got 101"),
        ("logit_bias", json!({"7": null}), "got null"),
        ("stop", json!(""), "an empty string"),
        ("stop", json!(["a", ""]), "an empty string"),
        ("stop", json!(vec!["x"; 17]), "17 strings, at most 16"),
        ("stop", json!("12345678901"), "11 characters, at most 10"),
        ("stop", json!(5), "a string or a list of strings, got 5"),
        ("stop", json!(["a", 5]), "got 5"),
        ("stop_token_ids", json!(5), "a list, got 5"),
        ("stop_token_ids", json!([5, 255]), "`stop_token_ids[1]` is 255, which is none of the 255"),
        ("stop_token_ids", json!([-1]), "is -1"),
        ("stop_token_ids", json!(["5"]), "must be a token id, got \"5\""),
    ];
    for (field, value, part) in cases {
        refused(completion(json!({field: value})), field, part);
        refused(chat(json!({field: value})), field, part);
    }
}

#[test]
fn unknown_fields_are_refused_with_the_nearest_known_name() {
    refused(completion(json!({"temprature": 0})), "temprature", "did you mean `temperature`?");
    refused(completion(json!({"max_token": 1})), "max_token", "did you mean `max_tokens`?");
    refused(chat(json!({"max_completion_token": 1})), "max_completion_token", "`max_completion_tokens`?");
    refused(completion(json!({"colour": 1})), "colour", "unknown field `colour` for /v1/completions");
    refused(completion(json!({"colour": null})), "colour", "unknown field");
    // The other endpoint's fields are no fields here.
    refused(completion(json!({"messages": []})), "messages", "for /v1/completions");
    refused(completion(json!({"top_logprobs": 1})), "top_logprobs", "for /v1/completions");
    refused(chat(json!({"prompt": "x"})), "prompt", "for /v1/chat/completions");
}

#[test]
fn unsupported_fields_are_accepted_only_where_they_ask_for_nothing() {
    let neutral = json!({
        "best_of": 1, "suffix": null, "response_format": {"type": "text"}, "tools": null, "tool_choice": "none",
        "stream": false, "stream_options": null, "user": "me", "metadata": {"run": "1"}, "use_beam_search": false,
        "length_penalty": 1.0, "detokenize": true, "truncate_prompt_tokens": null, "logit_bias": null, "stop": [],
    });
    assert_eq!(completion(neutral.clone()), completion(json!({})));
    assert_eq!(chat(neutral), chat(json!({})));
    for (field, value, part) in [
        ("best_of", json!(2), "`best_of` other than 1 is not supported, got 2"),
        ("suffix", json!("end"), "got \"end\""),
        (
            "response_format",
            json!({"type": "json_object"}),
            "`response_format` other than {\"type\":\"text\"}",
        ),
        ("tools", json!([{"type": "function"}]), "`tools`"),
        ("tool_choice", json!("required"), "got \"required\""),
        ("guided_json", json!({}), "`guided_json` is not supported, got {}"),
        ("bad_words", json!(["x"]), "`bad_words`"),
        ("include_stop_str_in_output", json!(true), "got true"),
        ("truncate_prompt_tokens", json!(5), "got 5"),
        ("chat_template", json!("{{ x }}"), "`chat_template` is not supported"),
    ] {
        refused(completion(json!({field: value})), field, part);
        refused(chat(json!({field: value})), field, part);
    }
}

#[test]
fn streaming_is_for_http() {
    refused(completion(json!({"stream": true})), "stream", "batch file cannot be streamed");
    refused(completion(json!({"stream_options": {}})), "stream_options", "needs `stream` to be true");
    let stream = |options: Value| {
        let body = json!({"model": "base", "prompt": "hi", "stream": true, "stream_options": options});
        parse_with(Endpoint::Completions, &body, true)
    };
    assert_eq!(stream(json!(null)).unwrap().stream, Some(StreamOptions::default()));
    let options = stream(json!({"include_usage": true, "continuous_usage_stats": null})).unwrap().stream;
    assert_eq!(options, Some(StreamOptions { include_usage: true, continuous_usage_stats: false }));
    refused(stream(json!({"include_usage": 1})), "stream_options", "include_usage` must be true or false");
    refused(stream(json!({"usage": true})), "stream_options", "unknown field `usage`");
    let body = json!({"model": "base", "prompt": "hi", "stream": true, "prompt_logprobs": 1});
    refused(parse_with(Endpoint::Completions, &body, true), "prompt_logprobs", "cannot be streamed");
}

#[test]
fn the_model_picks_the_adapter() {
    assert_eq!(only(completion(json!({"model": "base"}))).adapters, []);
    assert_eq!(only(completion(json!({"model": "poem"}))).adapters, [("poem".to_owned(), 1.0)]);
    for missing in [completion(json!({"model": "nope"})), chat(json!({"model": "nope"}))] {
        let error = missing.unwrap_err();
        assert_eq!((error.status, error.kind, error.param.as_deref()), (404, "NotFoundError", Some("model")));
        assert_eq!(error.message, "The model `nope` does not exist.");
        let expected = json!({"error": {
            "message": "The model `nope` does not exist.", "type": "NotFoundError", "param": "model", "code": 404,
        }});
        assert_eq!(error.body(), expected);
    }
    refused(completion(json!({"model": null})), "model", "`model` is missing");
    refused(completion(json!({"model": "auto"})), "model", "no router is loaded");
}

#[test]
fn weighted_adapters_replace_the_models_own() {
    let gates = |weights: Value| only(completion(json!({"model": "sql", "adapters": weights}))).adapters;
    assert_eq!(gates(json!(null)), [("sql".to_owned(), 1.0)]);
    assert_eq!(gates(json!({})), []);
    assert_eq!(gates(json!({"sql": 0, "poem": -0.5})), [("poem".to_owned(), -0.5)]);
    assert_eq!(gates(json!({"poem": 0.5, "sql": 2})), [("poem".to_owned(), 0.5), ("sql".to_owned(), 2.0)]);
    for (weights, part) in [
        (json!({"nope": 1}), "the adapter `nope` does not exist"),
        (json!({"base": 1}), "the adapter `base` does not exist"),
        (json!({"sql": 1e300}), "give `sql` a finite number as its weight, got 1e+300"),
        (json!({"sql": null}), "got null"),
        (json!({"sql": true}), "got true"),
        (json!(["sql"]), "an object, got [\"sql\"]"),
    ] {
        refused(completion(json!({"adapters": weights})), "adapters", part);
    }
}

#[test]
fn prompts_come_as_text_or_tokens_one_or_many() {
    let prompts = |prompt: Value| -> Vec<Vec<u32>> {
        completion(json!({"prompt": prompt})).unwrap().requests.into_iter().map(|r| r.prompt).collect()
    };
    assert_eq!(prompts(json!("a")), [[1, 97]]);
    assert_eq!(prompts(json!(["a", "b"])), [[1, 97], [1, 98]]);
    assert_eq!(prompts(json!([7, 8.0])), [[7, 8]]);
    assert_eq!(prompts(json!([[7], [8, 0]])), [vec![7], vec![8, 0]]);
    let plain = completion(json!({"prompt": "a", "add_special_tokens": false}));
    assert_eq!(only(plain).prompt, [97]);
    for (prompt, part) in [
        (json!(null), "`prompt` is missing"),
        (json!(""), "`prompt` is empty"),
        (json!([]), "`prompt` is empty"),
        (json!([""]), "`prompt` is empty"),
        (json!([[]]), "`prompt[0]` is empty"),
        (json!([[1], []]), "`prompt[1]` is empty"),
        (json!(5), "text, token ids, or a list of either, got 5"),
        (json!({"text": "a"}), "got {\"text\":\"a\"}"),
        (json!(["a", 5]), "`prompt[1]` must be text like the prompts before it, got 5"),
        (json!([[5], "a"]), "`prompt[1]` must be token ids like"),
        (json!([5, "a"]), "`prompt[1]` must be a token id, got \"a\""),
        (json!([true]), "`prompt[0]` must be a token id, got true"),
        (json!([5, 255]), "`prompt[1]` is 255, which is none of the 255 token ids"),
        (json!([[5], [-1]]), "`prompt[1][0]` is -1"),
        (json!([4294967296u64]), "is 4294967296"),
        (json!(["a", "b", "c", "d"]), "4 prompts, at most 3"),
        (json!("untokenizable"), "no tokens for this"),
    ] {
        refused(completion(json!({"prompt": prompt})), "prompt", part);
    }
}

#[test]
fn tokens_that_the_base_does_not_know_are_refused_after_tokenizing() {
    let limits = Limits::new(200, 105);
    let context = Context { limits: &limits, models: &FakeModels, text: &FakeText, can_stream: false };
    let body = json!({"model": "base", "prompt": "hi"});
    refused(parse(Endpoint::Completions, &body, &context), "prompt", "has the token 105");
}

#[test]
fn prompt_and_completion_fit_the_context() {
    let with = |tokens: usize, max_tokens: Value| {
        completion(json!({"prompt": vec![7; tokens], "max_tokens": max_tokens}))
    };
    assert_eq!(only(with(199, json!(null))).stop.max_tokens, Some(1), "the default shrinks to what is left");
    assert_eq!(only(with(150, json!(50))).stop.max_tokens, Some(50));
    refused(with(200, json!(null)), "prompt", "context length is 200 tokens. However, your request has 200");
    refused(with(5000, json!(1)), "prompt", "5000 tokens in the prompt");
    refused(
        with(150, json!(51)),
        "max_tokens",
        "length is 200 tokens. However, you requested 201 tokens (150",
    );
    refused(with(1, json!(i64::MAX)), "max_tokens", "9223372036854775807 for the completion");
    let long = json!([{"role": "user", "content": "x".repeat(300)}]);
    refused(chat(json!({"messages": long})), "messages", "has 307 tokens in the messages");
    refused(chat(json!({"max_completion_tokens": 192})), "max_completion_tokens", "requested 201 tokens (9");
    refused(completion(json!({"min_tokens": 17})), "min_tokens", "at most `max_tokens`, which is 16, got 17");
    refused(chat(json!({"min_tokens": 5, "max_tokens": 4})), "min_tokens", "which is 4, got 5");
}

#[test]
fn a_chat_limits_its_answer_under_either_name() {
    for changes in [
        json!({"max_tokens": 5}),
        json!({"max_completion_tokens": 5}),
        json!({"max_completion_tokens": 5, "max_tokens": 5}),
    ] {
        assert_eq!(only(chat(changes)).stop.max_tokens, Some(5));
    }
    let both = json!({"max_completion_tokens": 5, "max_tokens": 6});
    refused(chat(both), "max_completion_tokens", "is 5 and `max_tokens` is 6");
    refused(chat(json!({"max_completion_tokens": 0})), "max_completion_tokens", "at least 1, got 0");
}

#[test]
fn echo_makes_the_engine_report_the_prompt() {
    let parsed = completion(json!({"prompt": ["ab", "c"], "echo": true, "logprobs": 2})).unwrap();
    assert_eq!(parsed.echo, Some(vec!["ab".to_owned(), "c".to_owned()]));
    assert_eq!(parsed.requests[1].prompt_logprobs, Some(2));
    assert_eq!((parsed.logprobs, parsed.prompt_logprobs), (Some(2), None));
    let tokens = completion(json!({"prompt": [7, 8], "echo": true})).unwrap();
    assert_eq!(tokens.echo, Some(vec!["<7><8>".to_owned()]));
    assert_eq!(tokens.requests[0].prompt_logprobs, None);
    let scored = completion(json!({"echo": true, "max_tokens": 0, "logprobs": 0})).unwrap();
    assert!(scored.echo_only);
    assert_eq!(scored.requests[0].stop.max_tokens, Some(1));
    refused(chat(json!({"echo": true, "max_tokens": 0})), "max_tokens", "at least 1, got 0");
}

#[test]
fn logprobs_are_a_number_for_completions_and_a_flag_for_chats() {
    assert_eq!(only(completion(json!({"logprobs": 0}))).logprobs, Some(0));
    refused(completion(json!({"logprobs": true})), "logprobs", "an integer from 0 to 20, got true");
    refused(completion(json!({"logprobs": 21})), "logprobs", "got 21");
    assert_eq!(only(chat(json!({"logprobs": true}))).logprobs, Some(0));
    assert_eq!(only(chat(json!({"logprobs": true, "top_logprobs": 3}))).logprobs, Some(3));
    assert_eq!(only(chat(json!({"logprobs": false, "top_logprobs": 0}))).logprobs, None);
    refused(chat(json!({"logprobs": 1})), "logprobs", "true or false, got 1");
    refused(chat(json!({"top_logprobs": 3})), "top_logprobs", "is 3, which needs `logprobs` to be true");
    refused(chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs", "got 21");
}

#[test]
fn messages_become_a_prompt() {
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let messages = json!([
        {"role": "system", "content": "be brief", "name": "setup"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}},
        ]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]);
    let expected = "system:be brief;user:one\ntwo;assistant:-;\"Bern\"tool:rain;>";
    assert_eq!(prompt_of(json!({"messages": messages})), expected);
    assert_eq!(prompt_of(json!({"add_generation_prompt": false})), "user:hi;");
    assert_eq!(prompt_of(json!({"chat_template_kwargs": {"head": "!"}})), "!user:hi;>");
    assert_eq!(only(chat(json!({"add_special_tokens": true}))).prompt[0], 1);
    let reserved = json!({"chat_template_kwargs": {"messages": []}});
    refused(chat(reserved), "chat_template_kwargs", "may not set `messages`");
}

#[test]
fn a_final_message_is_continued_where_it_ends() {
    let continued = |content: &str| {
        let messages = json!([{"role": "user", "content": ";"}, {"role": "assistant", "content": content}]);
        json!({"messages": messages, "continue_final_message": true, "echo": true})
    };
    // The template's own text contains the message, too.
    assert_eq!(prompt_of(continued(";")), "user:;;assistant:;");
    assert_eq!(prompt_of(continued("The answer ")), "user:;;assistant:The answer ");
    assert_eq!(chat(continued("The answer ")).unwrap().echo, Some(vec!["The answer ".to_owned()]));
    assert_eq!(chat(json!({"echo": true})).unwrap().echo, Some(vec![String::new()]));
    refused(chat(continued(" ")), "continue_final_message", "no text to continue");
    let both = json!({"continue_final_message": true, "add_generation_prompt": true});
    refused(chat(both), "continue_final_message", "needs `add_generation_prompt` to be false");
}

#[test]
fn malformed_messages_are_refused_with_their_place() {
    let call = |function: Value| json!([{"role": "assistant", "tool_calls": [{"function": function}]}]);
    for (messages, part) in [
        (json!(null), "`messages` is missing"),
        (json!([]), "`messages` is empty"),
        (json!("hi"), "must be a list, got \"hi\""),
        (json!(["hi"]), "`messages[0]` must be an object, got \"hi\""),
        (json!([{"content": "hi"}]), "`messages[0]` has no `role`"),
        (json!([{"role": 1, "content": "hi"}]), "`messages[0].role` must be a role's name, got 1"),
        (json!([{"role": "", "content": "hi"}]), "got \"\""),
        (json!([{"role": "user"}]), "`messages[0]` has no `content`"),
        (json!([{"role": "user", "content": null}]), "has no `content`"),
        (json!([{"role": "assistant", "content": null, "tool_calls": []}]), "has no `content`"),
        (json!([{"role": "user", "content": 5}]), "a string or a list of text parts, got 5"),
        (json!([{"role": "user", "content": []}]), "got []"),
        (json!([{"role": "user", "content": "hi", "contnt": "x"}]), "unknown field `contnt`"),
        (json!([{"role": "user", "content": "hi", "name": 5}]), "`messages[0].name` must be a string, got 5"),
        (
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "`messages[0].content[0]` is of type `image_url`, which is not supported",
        ),
        (json!([{"role": "user", "content": ["hi"]}]), "must be a part with a `type`, got \"hi\""),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "text` must be a string, got nothing"),
        (json!([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]), "unknown field `x`"),
        (json!([{"role": "user", "content": "a", "tool_calls": [{}]}]), "belongs to the role `assistant`"),
        (call(json!(null)), "`messages[0].tool_calls[0].function` must be an object"),
        (call(json!({"arguments": "{}"})), "function.name` must be a string"),
        (call(json!({"name": "f", "arguments": "[1]"})), "arguments` must be a JSON object"),
        (call(json!({"name": "f", "arguments": "{"})), "arguments` must be a JSON object"),
        (json!([{"role": "clown", "content": "hi"}]), "unknown role clown"),
    ] {
        refused(chat(json!({"messages": messages})), "messages", part);
    }
}

#[test]
fn a_body_is_an_object() {
    for body in [json!(null), json!([]), json!("x"), json!(5)] {
        let error = parse_with(Endpoint::Completions, &body, false).unwrap_err();
        assert_eq!((error.status, error.param), (400, None));
        assert!(error.message.contains(&body.to_string()), "{}", error.message);
    }
}

/// JSON of any shape, with the numbers and strings that bodies tend to hold.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(vec!["base", "sql", "user", "assistant", "text", "hi"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 6, |inner| {
        let keys =
            prop::sample::select(vec!["role", "content", "type", "text", "tool_calls", "function", "7"]);
        let keys = prop_oneof![keys.prop_map(str::to_owned), ".{0,6}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((keys, inner), 0..5)
                .prop_map(|entries| Value::Object(Map::from_iter(entries))),
        ]
    })
}

proptest! {
    #[test]
    fn no_body_panics_and_what_is_accepted_is_sound(
        changes in prop::collection::vec(
            (prop::sample::select(vec![
                "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
                "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed", "n", "stop", "stop_token_ids",
                "min_tokens", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "stream",
                "stream_options", "adapters", "chat_template_kwargs", "continue_final_message", "tools", "suffix",
            ]), any_json()),
            0..4,
        ),
        endpoint in prop::sample::select(Endpoint::ALL.to_vec()),
        can_stream in any::<bool>(),
    ) {
        let mut body = match endpoint {
            Endpoint::Completions => json!({"model": "sql", "prompt": "hi"}),
            Endpoint::ChatCompletions => json!({"model": "sql", "messages": [{"role": "user", "content": "hi"}]}),
        };
        for (name, value) in changes {
            body[name] = value;
        }
        match parse_with(endpoint, &body, can_stream) {
            Ok(parsed) => for request in parsed.requests {
                let length = request.prompt.len() + request.stop.max_tokens.unwrap();
                prop_assert!(!request.prompt.is_empty() && length <= 200 && request.n >= 1);
                prop_assert!(request.prompt.iter().all(|&token| token < 255));
            },
            Err(error) => prop_assert!((400..500).contains(&error.status) && error.message.len() < 1000),
        }
    }

    #[test]
    fn no_value_panics_as_a_body(body in any_json()) {
        for endpoint in Endpoint::ALL {
            prop_assert!(parse_with(endpoint, &body, false).is_err());
        }
    }
}
