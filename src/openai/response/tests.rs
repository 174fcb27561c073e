//! Bodies field by field, as vLLM writes them.

use super::*;
use crate::openai::request::ParsedRequest;

fn request(endpoint: Endpoint) -> ParsedRequest {
    ParsedRequest {
        endpoint,
        model: "sql".to_owned(),
        requests: Vec::new(),
        echo: None,
        echo_only: false,
        logprobs: None,
        prompt_logprobs: None,
        return_token_ids: false,
        return_tokens_as_token_ids: false,
        stream: None,
    }
}

fn completions() -> ParsedRequest {
    request(Endpoint::Completions)
}

fn choice(index: usize, token_ids: &[u32], text: &str, finish_reason: FinishReason) -> Choice {
    Choice { index, token_ids: token_ids.to_vec(), text: text.to_owned(), logprobs: None, finish_reason }
}

fn completion(prompt: &[u32], choices: Vec<Choice>) -> Completion {
    Completion { prompt_token_ids: prompt.to_vec(), prompt_logprobs: None, choices }
}

/// Probabilities are powers of two, so that their logarithms stay readable: the logprob of `halvings` is −halvings.
fn known(token: u32, halvings: f32, rank: usize, top: &[(u32, f32)]) -> TokenLogprobs {
    let top = top.iter().map(|&(token, halvings)| (token, -halvings)).collect();
    TokenLogprobs { token, logprob: -halvings, rank, top }
}

/// Tokens below 100 are two-character words, 100 and 101 share a text.
fn build(request: &ParsedRequest, completions: &[Completion]) -> Value {
    let decode = |token: u32| if token < 100 { format!("é{token}") } else { "same".to_owned() };
    body(request, completions, Labels { id: "7f", created: 1_700_000_000, decode_token: &decode })
}

/// A prompt of three tokens and two generated ones, all with log-probabilities.
fn scored() -> Completion {
    let mut choice = choice(0, &[7, 8], "é7é8", FinishReason::Length);
    choice.logprobs = Some(vec![
        known(7, 3.0, 4, &[(1, 1.0), (2, 2.0)]),
        known(8, f32::INFINITY, 9, &[(100, 0.5), (101, 1.5)]),
    ]);
    let mut completion = completion(&[4, 5, 6], vec![choice]);
    completion.prompt_logprobs =
        Some(vec![None, Some(known(5, 1.0, 1, &[(5, 1.0), (9, 2.0)])), Some(known(6, 4.0, 8, &[(9, 0.5)]))]);
    completion
}

#[test]
fn a_completion_has_every_field_of_the_protocol() {
    let finished = completion(&[1, 2, 3], vec![choice(0, &[4, 5], " done", FinishReason::EndToken)]);
    let expected = json!({
        "id": "cmpl-7f",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "sql",
        "choices": [{
            "index": 0, "text": " done", "logprobs": null, "finish_reason": "stop", "stop_reason": null,
            "prompt_logprobs": null,
        }],
        "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": null},
    });
    assert_eq!(build(&completions(), &[finished]), expected);
}

#[test]
fn a_chat_completion_has_every_field_of_the_protocol() {
    let finished = completion(&[1, 2, 3], vec![choice(0, &[4], "Hello", FinishReason::Length)]);
    let expected = json!({
        "id": "chatcmpl-7f",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "sql",
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": null,
            "finish_reason": "length", "stop_reason": null,
        }],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": null},
        "prompt_logprobs": null,
    });
    assert_eq!(build(&request(Endpoint::ChatCompletions), &[finished]), expected);
}

#[test]
fn finish_reasons_tell_what_stopped_a_choice() {
    for (reason, finish, stop) in [
        (FinishReason::EndToken, "stop", json!(null)),
        (FinishReason::StopToken(42), "stop", json!(42)),
        (FinishReason::StopString("\n".to_owned()), "stop", json!("\n")),
        (FinishReason::Length, "length", json!(null)),
        (FinishReason::Aborted, "abort", json!(null)),
    ] {
        for endpoint in Endpoint::ALL {
            let finished = completion(&[1], vec![choice(0, &[2], "x", reason.clone())]);
            let body = build(&request(endpoint), &[finished]);
            assert_eq!(body["choices"][0]["finish_reason"], finish);
            assert_eq!(body["choices"][0]["stop_reason"], stop);
        }
    }
}

#[test]
fn choices_of_several_prompts_are_numbered_through_and_prompts_counted_once() {
    let two = |text: &str| {
        vec![choice(0, &[1], text, FinishReason::Length), choice(1, &[1, 2], text, FinishReason::Length)]
    };
    let body = build(&completions(), &[completion(&[1, 2], two("a")), completion(&[3], two("b"))]);
    let choices: Vec<_> =
        body["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(json!(choices), json!([[0, "a"], [1, "a"], [2, "b"], [3, "b"]]));
    assert_eq!(body["usage"]["prompt_tokens"], 3);
    assert_eq!(body["usage"]["completion_tokens"], 6);
    assert_eq!(body["usage"]["total_tokens"], 9);
}

#[test]
fn token_ids_are_returned_when_asked_for() {
    let finished = [completion(&[1, 2, 3], vec![choice(0, &[4, 5], "x", FinishReason::EndToken)])];
    for endpoint in Endpoint::ALL {
        let mut asked = request(endpoint);
        asked.return_token_ids = true;
        let body = build(&asked, &finished);
        assert_eq!(body["choices"][0]["token_ids"], json!([4, 5]));
        assert_eq!(body["choices"][0]["prompt_token_ids"], json!([1, 2, 3]));
        let chat = endpoint == Endpoint::ChatCompletions;
        assert_eq!(body.get("prompt_token_ids"), chat.then_some(&json!([1, 2, 3])));
        assert!(build(&request(endpoint), &finished)["choices"][0].get("token_ids").is_none());
    }
}

#[test]
fn completion_logprobs_are_parallel_lists_with_the_own_token_first() {
    let mut asked = completions();
    asked.logprobs = Some(2);
    let expected = json!({
        "text_offset": [0, 2],
        "token_logprobs": [-3.0, -9999.0],
        "tokens": ["é7", "é8"],
        // Two tokens with the text "same" leave the likelier one.
        "top_logprobs": [{"é7": -3.0, "é1": -1.0, "é2": -2.0}, {"é8": -9999.0, "same": -0.5}],
    });
    let logprobs = build(&asked, &[scored()])["choices"][0]["logprobs"].clone();
    assert_eq!(logprobs, expected);
    let order: Vec<&String> = logprobs["top_logprobs"][0].as_object().unwrap().keys().collect();
    assert_eq!(order, ["é7", "é1", "é2"]);

    asked.logprobs = Some(0);
    let alone = &build(&asked, &[scored()])["choices"][0]["logprobs"]["top_logprobs"];
    assert_eq!(*alone, json!([{"é7": -3.0}, {"é8": -9999.0}]));
}

#[test]
fn tokens_can_be_spelled_as_ids() {
    let mut asked = completions();
    asked.logprobs = Some(2);
    asked.return_tokens_as_token_ids = true;
    let logprobs = &build(&asked, &[scored()])["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["token_id:7", "token_id:8"]));
    assert_eq!(logprobs["text_offset"], json!([0, 2]));
    let top = json!({"token_id:8": -9999.0, "token_id:100": -0.5, "token_id:101": -1.5});
    assert_eq!(logprobs["top_logprobs"][1], top);

    asked.endpoint = Endpoint::ChatCompletions;
    let content = &build(&asked, &[scored()])["choices"][0]["logprobs"]["content"];
    assert_eq!(content[0]["token"], "token_id:7");
    assert_eq!(content[0]["bytes"], json!("é7".as_bytes()));
    assert_eq!(content[0]["top_logprobs"][1]["token"], "token_id:2");
}

#[test]
fn chat_logprobs_are_a_list_of_objects_with_bytes() {
    let mut asked = request(Endpoint::ChatCompletions);
    asked.logprobs = Some(1);
    let expected = json!({"content": [
        {
            "token": "é7", "logprob": -3.0, "bytes": [195, 169, 55],
            "top_logprobs": [{"token": "é1", "logprob": -1.0, "bytes": [195, 169, 49]}],
        },
        {
            "token": "é8", "logprob": -9999.0, "bytes": [195, 169, 56],
            "top_logprobs": [{"token": "same", "logprob": -0.5, "bytes": [115, 97, 109, 101]}],
        },
    ]});
    assert_eq!(build(&asked, &[scored()])["choices"][0]["logprobs"], expected);
}

#[test]
fn prompt_logprobs_are_maps_by_id_with_the_prompts_own_token_first() {
    let expected = json!([
        null,
        {
            "5": {"logprob": -1.0, "rank": 1, "decoded_token": "é5"},
            "9": {"logprob": -2.0, "rank": 2, "decoded_token": "é9"},
        },
        {
            "6": {"logprob": -4.0, "rank": 8, "decoded_token": "é6"},
            "9": {"logprob": -0.5, "rank": 1, "decoded_token": "é9"},
        },
    ]);
    let mut asked = completions();
    asked.prompt_logprobs = Some(2);
    let found = build(&asked, &[scored()])["choices"][0]["prompt_logprobs"].clone();
    assert_eq!(found, expected);
    assert_eq!(found[2].as_object().unwrap().keys().next().unwrap(), "6");

    asked.endpoint = Endpoint::ChatCompletions;
    let chat = build(&asked, &[scored()]);
    assert_eq!(chat["prompt_logprobs"], expected);
    assert!(chat["choices"][0].get("prompt_logprobs").is_none());

    asked.prompt_logprobs = Some(0);
    assert_eq!(build(&asked, &[scored()])["prompt_logprobs"][2].as_object().unwrap().len(), 1);
}

#[test]
fn echo_puts_the_prompt_before_text_and_logprobs() {
    let mut asked = completions();
    asked.echo = Some(vec!["é4é5é6".to_owned()]);
    asked.logprobs = Some(1);
    let body = build(&asked, &[scored()]);
    let expected = json!({
        "text_offset": [0, 2, 4, 6, 8],
        "token_logprobs": [null, -1.0, -4.0, -3.0, -9999.0],
        "tokens": ["é4", "é5", "é6", "é7", "é8"],
        "top_logprobs": [
            null, {"é5": -1.0}, {"é6": -4.0, "é9": -0.5}, {"é7": -3.0, "é1": -1.0}, {"é8": -9999.0, "same": -0.5},
        ],
    });
    assert_eq!(body["choices"][0]["text"], "é4é5é6é7é8");
    assert_eq!(body["choices"][0]["logprobs"], expected);
    assert_eq!(body["choices"][0]["prompt_logprobs"], json!(null), "they were not asked for");

    asked.endpoint = Endpoint::ChatCompletions;
    asked.echo = Some(vec!["So: ".to_owned()]);
    let chat = build(&asked, &[scored()]);
    assert_eq!(chat["choices"][0]["message"]["content"], "So: é7é8");
    assert_eq!(chat["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 2);
}

#[test]
fn echo_without_generation_shows_the_prompt_alone() {
    let mut asked = completions();
    asked.echo = Some(vec!["é4é5é6".to_owned()]);
    asked.echo_only = true;
    asked.logprobs = Some(0);
    asked.return_token_ids = true;
    let body = build(&asked, &[scored()]);
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "é4é5é6");
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -1.0, -4.0]));
    assert_eq!(choice["token_ids"], json!([]));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &json!(null)));
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

#[test]
fn missing_and_undefined_logprobs_leave_valid_json() {
    let mut asked = completions();
    asked.logprobs = Some(1);
    asked.prompt_logprobs = Some(1);
    let mut finished = completion(&[1], vec![choice(0, &[2, 3], "x", FinishReason::Length)]);
    finished.choices[0].logprobs = Some(vec![known(2, f32::NAN, 1, &[(2, f32::NAN)])]);
    let body = build(&asked, &[finished]);
    assert_eq!(body["choices"][0]["logprobs"]["token_logprobs"], json!([-9999.0, null]));
    assert_eq!(body["choices"][0]["prompt_logprobs"], json!(null));
    assert_eq!(build(&asked, &[])["choices"], json!([]));
}
