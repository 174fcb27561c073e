//! Encoding, decoding and reading of tokenizer folders.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A folder under the repository's root.
fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

const FAMILIES: [&str; 6] = ["llama", "llama-tied", "mistral", "phi3", "qwen2", "qwen3"];

fn golden(family: &str) -> (Tokenizer, Value) {
    let case = folder("tests/golden").join(family);
    let forward = serde_json::from_slice(&fs::read(case.join("forward.json")).unwrap()).unwrap();
    (Tokenizer::read(case.join("model")).unwrap(), forward)
}

/// A small byte-level tokenizer.
pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::read(folder("examples/base")).unwrap()
}

/// Writes a folder with these files.
fn folder_with(files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

/// A tokenizer in Llama 2's style: 3 control tokens, 256 byte tokens, pieces with `▁`.
pub(crate) fn sentencepiece_json(decoder: Value) -> Value {
    let mut vocab = serde_json::Map::new();
    let control = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces =
        ["▁", "H", "e", "l", "o", "w", "r", "d", ".", "é", "▁▁", "▁w", "ll", "He", "Hell", "Hello", "▁Hello"];
    for (id, token) in control.into_iter().chain(bytes).chain(pieces.map(str::to_owned)).enumerate() {
        vocab.insert(token, json!(id));
    }
    let merges = ["▁ ▁", "▁ w", "l l", "H e", "He ll", "Hell o", "▁ Hello"];
    let added = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": merges}
    })
}

/// Llama 2's decoder.
pub(crate) fn strip_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

/// The same vocabulary with every supported kind of decoder, and with none.
pub(crate) fn sentencepiece_decoders() -> Vec<Value> {
    let metaspace =
        |scheme| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    vec![
        strip_decoder(),
        json!({"type": "Sequence", "decoders": [metaspace("always"), {"type": "ByteFallback"}, {"type": "Fuse"}]}),
        json!({"type": "Sequence", "decoders": [metaspace("first"), {"type": "ByteFallback"}]}),
        metaspace("never"),
        json!({"type": "WordPiece", "prefix": "▁", "cleanup": true}),
        Value::Null,
    ]
}

pub(crate) fn sentencepiece(decoder: Value) -> Tokenizer {
    let folder = folder_with(&[("tokenizer.json", sentencepiece_json(decoder))]);
    Tokenizer::read(folder.path()).unwrap()
}

fn refusal(files: &[(&str, Value)]) -> String {
    let folder = folder_with(files);
    Tokenizer::read(folder.path()).err().expect("the folder is refused").to_string()
}

#[test]
fn is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
}

#[test]
fn golden_prompts_encode_and_decode() {
    for family in FAMILIES {
        let (tokenizer, forward) = golden(family);
        let text = forward["text_prompt"]["text"].as_str().unwrap();
        let index = forward["text_prompt"]["index"].as_u64().unwrap() as usize;
        let ids: Vec<u32> = serde_json::from_value(forward["prompts"][index].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{family}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids[1..], "{family}");
        assert_eq!(tokenizer.decode(&ids, true), text, "{family}");
        assert_eq!(tokenizer.decode(&ids, false), format!("<|begin_of_text|>{text}"), "{family}");
        assert_eq!(tokenizer.vocab_size(), 512, "{family}");
        assert_eq!(tokenizer.bos_token(), Some("<|begin_of_text|>"), "{family}");
        assert_eq!(tokenizer.eos_token(), Some("<|end_of_text|>"), "{family}");
        assert!(tokenizer.is_special(0) && !tokenizer.is_special(5) && !tokenizer.is_special(512));
        assert_eq!(tokenizer.chat_templates().len(), 1, "{family}");
    }
}

#[test]
fn golden_chats_encode() {
    for family in FAMILIES {
        let (tokenizer, forward) = golden(family);
        let ids: Vec<u32> = serde_json::from_value(forward["chat"]["input_ids"].clone()).unwrap();
        assert_eq!(
            tokenizer.encode(forward["chat"]["text"].as_str().unwrap(), false).unwrap(),
            ids,
            "{family}"
        );
    }
}

#[test]
fn prompts_are_neither_cut_nor_filled_up() {
    let tokenizer = sentencepiece(strip_decoder());
    let ids = tokenizer.encode("Hello world", true).unwrap();
    let texts: Vec<String> = ids.iter().map(|&id| tokenizer.decode_token(id)).collect();
    assert_eq!(texts, ["<s>", " Hello", " w", "o", "r", "l", "d"]);
}

#[test]
fn decoding_agrees_with_the_tokenizers_crate() {
    for decoder in sentencepiece_decoders() {
        let tokenizer = sentencepiece(decoder.clone());
        for text in
            ["Hello world", " Hello", "  w", "", "é", "日本 Hello", "Hello.Hello", "\n\n", "<s> Hello</s>w"]
        {
            let ids = tokenizer.encode(text, false).unwrap();
            for skip in [true, false] {
                let wanted = tokenizer.inner.decode(&ids, skip).unwrap();
                assert_eq!(tokenizer.decode(&ids, skip), wanted, "{text:?} with {decoder}");
            }
        }
    }
}

#[test]
fn broken_byte_tokens_keep_their_valid_neighbours() {
    let tokenizer = sentencepiece(strip_decoder());
    let byte = |byte: u32| byte + 3;
    let hello = tokenizer.token_to_id("Hello").unwrap();
    assert_eq!(
        tokenizer.decode(&[hello, byte(0xe4), byte(0xbd), byte(0xa0), byte(0xe5), byte(0xa5)], true),
        "Hello你\u{fffd}\u{fffd}"
    );
    assert_eq!(tokenizer.decode(&[byte(0xff), hello], true), "\u{fffd}Hello");
}

#[test]
fn token_bytes_join_to_the_text() {
    let tokenizer = byte_level();
    let text = "Größe: 12% 🙂 x";
    let ids = tokenizer.encode(text, false).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).copied().collect();
    assert_eq!(bytes, text.as_bytes());
    assert_eq!(tokenizer.token_bytes(1 << 20), None);
    assert_eq!(tokenizer.decode_token(1 << 20), "");
}

#[test]
fn ids_without_a_token_are_skipped() {
    let tokenizer = byte_level();
    let mut ids = tokenizer.encode("ab", false).unwrap();
    ids.insert(1, u32::MAX);
    assert_eq!(tokenizer.decode(&ids, true), "ab");
}

#[test]
fn special_tokens_come_as_strings_or_objects_and_from_the_map() {
    let plain = sentencepiece_json(strip_decoder());
    let folder = folder_with(&[
        ("tokenizer.json", plain.clone()),
        (
            "tokenizer_config.json",
            json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>",
            "pad_token": null, "add_bos_token": true, "image_token": "<img>"}),
        ),
        (
            "special_tokens_map.json",
            json!({"eos_token": {"content": "<unk>"}, "additional_special_tokens": ["ll"]}),
        ),
    ]);
    let tokenizer = Tokenizer::read(folder.path()).unwrap();
    assert_eq!(tokenizer.bos_token(), Some("<s>"));
    assert_eq!(tokenizer.eos_token(), Some("<unk>"), "the map overrides");
    assert_eq!(tokenizer.pad_token(), None);
    assert_eq!(tokenizer.special_tokens().get("image_token"), Some("<img>"));
    assert_eq!(tokenizer.token_to_id("<img>"), None, "a token the vocabulary lacks gets no id");
    let double = tokenizer.token_to_id("ll").unwrap();
    assert!(tokenizer.is_special(double));
    assert!(tokenizer.encode("Hello", false).unwrap().contains(&double), "and is matched in text");

    let decoder =
        json!({"1": {"content": "<s>", "special": false}, "2": {"content": "</s>", "special": true}});
    let folder = folder_with(&[
        ("tokenizer.json", plain),
        ("tokenizer_config.json", json!({"eos_token": "</s>", "added_tokens_decoder": decoder})),
        ("special_tokens_map.json", json!({"eos_token": "<unk>"})),
    ]);
    let tokenizer = Tokenizer::read(folder.path()).unwrap();
    assert_eq!(tokenizer.eos_token(), Some("</s>"), "with added_tokens_decoder the map is not read");
    assert!(!tokenizer.is_special(1) && tokenizer.is_special(2), "added_tokens_decoder sets what is special");
}

#[test]
fn chat_templates_are_found_and_files_win() {
    let plain = sentencepiece_json(strip_decoder());
    let config = json!({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]});
    let folder = folder_with(&[("tokenizer.json", plain), ("tokenizer_config.json", config)]);
    let names = |folder: &Path| -> Vec<(String, String)> {
        let tokenizer = Tokenizer::read(folder).unwrap();
        tokenizer.chat_templates().iter().map(|found| (found.name.clone(), found.source.clone())).collect()
    };
    let pair = |name: &str, source: &str| (name.to_owned(), source.to_owned());
    assert_eq!(names(folder.path()), [pair("default", "d"), pair("tool_use", "t")]);
    fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(names(folder.path()), [pair("default", "file")]);
    fs::create_dir(folder.path().join("chat_templates")).unwrap();
    fs::write(folder.path().join("chat_templates/rag.jinja"), "rag").unwrap();
    assert_eq!(names(folder.path()), [pair("default", "file"), pair("rag", "rag")]);
}

#[test]
fn folders_that_cannot_be_used_are_refused() {
    let plain = || sentencepiece_json(strip_decoder());
    let with = |config: Value| refusal(&[("tokenizer.json", plain()), ("tokenizer_config.json", config)]);
    let changed = |pointer: &str, value: Value| {
        let mut json = plain();
        *json.pointer_mut(pointer).unwrap() = value;
        refusal(&[("tokenizer.json", json)])
    };
    let cases = [
        (refusal(&[]), "no tokenizer.json"),
        (refusal(&[("tokenizer.model", json!("x"))]), "save_pretrained"),
        (refusal(&[("tokenizer.json", json!("{\"a\": "))]), "not valid JSON"),
        (refusal(&[("tokenizer.json", json!({}))]), "tokenizer.json"),
        (changed("/model/dropout", json!(0.1)), "model.dropout is 0.1"),
        (
            changed(
                "/decoder",
                json!({"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": true}),
            ),
            "CTC",
        ),
        (changed("/decoder/decoders/3/stop", json!(1)), "decoder Strip"),
        (changed("/added_tokens/0/id", json!(7)), "added token \"<unk>\" is declared with id 7 but has id 0"),
        (changed("/model/vocab/r", json!(4_000_000_000u32)), "token \"r\" has id 4000000000"),
        (with(json!([1])), "the file is a list"),
        (with(json!({"bos_token": 3})), "bos_token is 3"),
        (with(json!({"eos_token": {"contents": "x"}})), "eos_token.content is null"),
        (with(json!({"chat_template": 3})), "chat_template is 3"),
        (with(json!({"chat_template": [{"name": "x"}]})), "chat_template[0]"),
        (with(json!({"added_tokens_decoder": {"x": {"content": "y"}}})), "added_tokens_decoder.x"),
        (with(json!({"added_tokens_decoder": {"7": {"content": "<s>"}}})), "gives \"<s>\" the id 7"),
        (
            with(json!({"added_tokens_decoder": {"9000": {"content": "<new>"}}})),
            "gives \"<new>\" the id 9000",
        ),
    ];
    for (found, wanted) in cases {
        assert!(found.contains(wanted), "{found:?} does not say {wanted:?}");
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any ids, invalid UTF-8 included.
        #[test]
        fn byte_level_decoding_is_the_crates(ids in prop::collection::vec(0u32..520, 0..40), skip: bool) {
            let tokenizer = byte_level();
            prop_assert_eq!(tokenizer.decode(&ids, skip), tokenizer.inner.decode(&ids, skip).unwrap());
        }

        /// Any ids but byte tokens of more than one byte's character, where the crate drops valid neighbours.
        #[test]
        fn sentencepiece_decoding_is_the_crates(
            which in 0usize..6, skip: bool,
            ids in prop::collection::vec(prop_oneof![0u32..3, 3u32..131, 259u32..280], 0..40),
        ) {
            let tokenizer = sentencepiece(sentencepiece_decoders().swap_remove(which));
            prop_assert_eq!(tokenizer.decode(&ids, skip), tokenizer.inner.decode(&ids, skip).unwrap());
        }

        /// Changing any part of a tokenizer.json gives a tokenizer or an error.
        #[test]
        fn damaged_definitions_never_panic(from in 0.0..1.0f64, length in 0usize..12, insert in "[\\[\\]{}\",:0-9a-z▁-]{0,6}") {
            let mut json = sentencepiece_json(strip_decoder());
            json["model"]["vocab"] = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "H": 4, "e": 5, "He": 6});
            json["model"]["merges"] = json!(["H e"]);
            let mut text: Vec<char> = json.to_string().chars().collect();
            let start = (from * text.len() as f64) as usize;
            let end = (start + length).min(text.len());
            text.splice(start..end, insert.chars());
            let folder = folder_with(&[("tokenizer.json", Value::String(text.into_iter().collect()))]);
            if let Ok(tokenizer) = Tokenizer::read(folder.path()) {
                let _ = tokenizer.encode("He Hé", true).map(|ids| tokenizer.decode(&ids, false));
            }
        }

        #[test]
        fn text_survives_byte_level_encoding(text in any::<String>()) {
            let tokenizer = byte_level();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }
}
