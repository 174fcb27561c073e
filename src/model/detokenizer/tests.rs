//! Streamed text is the text decoded at once.

use proptest::prelude::*;

use super::*;
use crate::model::tokenizer::tests::{byte_level, sentencepiece, sentencepiece_decoders, strip_decoder};

/// What pushing `ids` one by one returns, part by part; the last part is the flush.
fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt, skip);
    let mut parts: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    parts.push(detokenizer.finish());
    parts
}

#[test]
fn a_character_split_over_tokens_comes_whole() {
    let tokenizer = Arc::new(byte_level());
    let bytes: Vec<u32> = "a🙂b"
        .bytes()
        .map(|byte| {
            (0..tokenizer.vocab_size() as u32).find(|&id| tokenizer.token_bytes(id) == Some(&[byte])).unwrap()
        })
        .collect();
    assert_eq!(stream(&tokenizer, &[], &bytes, true), ["a", "", "", "", "🙂", "b", ""]);
    // Cut off inside the character.
    assert_eq!(stream(&tokenizer, &[], &bytes[..4], true), ["a", "", "", "", "\u{fffd}"]);
    // Begun in the prompt, completed after it.
    assert_eq!(stream(&tokenizer, &bytes[..3], &bytes[3..], true), ["", "🙂", "b", ""]);
    // Begun in the prompt, never completed: the prompt's text has shown it.
    assert_eq!(stream(&tokenizer, &bytes[..3], &bytes[5..], true), ["b", ""]);
    assert_eq!(stream(&tokenizer, &bytes[..3], &[], true), [""]);
}

#[test]
fn the_first_word_keeps_its_space_after_a_prompt() {
    let tokenizer = Arc::new(sentencepiece(strip_decoder()));
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let (hello, word, newline) = (id("▁Hello"), id("▁w"), id("<0x0A>"));
    let begin = id("<s>");
    assert_eq!(stream(&tokenizer, &[begin], &[hello, word], true), ["Hello", " w", ""]);
    assert_eq!(stream(&tokenizer, &[begin], &[hello], false), [" Hello", ""], "<s> is text here");
    assert_eq!(stream(&tokenizer, &[begin, hello], &[hello, word], true), [" Hello", " w", ""]);
    assert_eq!(stream(&tokenizer, &[begin, hello, begin], &[hello], true), [" Hello", ""]);
    // A byte token that is a whole character does not wait, so that a stop string can end the text.
    assert_eq!(stream(&tokenizer, &[hello], &[newline, newline], true), ["\n", "\n", ""]);
}

#[test]
fn a_byte_that_the_prompt_shows_ends_the_stripping_of_the_start() {
    let tokenizer = Arc::new(sentencepiece(strip_decoder()));
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let (unfinished, hello) = (id("<0xF0>"), id("▁Hello"));
    assert_eq!(tokenizer.decode(&[unfinished, hello], true), "\u{fffd} Hello");
    assert_eq!(stream(&tokenizer, &[unfinished], &[hello], true), [" Hello", ""]);
}

#[test]
fn special_tokens_are_left_out_or_shown() {
    let tokenizer = Arc::new(byte_level());
    let end = tokenizer.token_to_id(tokenizer.eos_token().unwrap()).unwrap();
    assert_eq!(stream(&tokenizer, &[], &[end], true).concat(), "");
    assert_eq!(stream(&tokenizer, &[], &[end], false).concat(), tokenizer.eos_token().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn byte_level_streams_are_the_decoded_text(
        prompt in prop::collection::vec(0u32..520, 0..12), ids in prop::collection::vec(0u32..520, 0..40), skip: bool,
    ) {
        let tokenizer = BYTE_LEVEL.with(Arc::clone);
        let parts = stream(&tokenizer, &[], &ids, skip);
        prop_assert_eq!(parts.concat(), tokenizer.decode(&ids, skip));
        check_context(&tokenizer, &prompt, &ids, skip)?;
    }

    #[test]
    fn sentencepiece_streams_are_the_decoded_text(
        which in 0usize..6,
        prompt in prop::collection::vec(0u32..276, 0..12), ids in prop::collection::vec(0u32..276, 0..40), skip: bool,
    ) {
        let tokenizer = Arc::new(sentencepiece(sentencepiece_decoders().swap_remove(which)));
        let parts = stream(&tokenizer, &[], &ids, skip);
        prop_assert_eq!(parts.concat(), tokenizer.decode(&ids, skip));
        check_context(&tokenizer, &prompt, &ids, skip)?;
    }

    /// Text that the tokenizer itself encoded comes back from any split into prompt and output.
    #[test]
    fn encoded_text_streams_back(text in "[Helord .éw日🙂\n]{0,30}", cut in 0.0..1.0f64) {
        let tokenizer = Arc::new(sentencepiece(strip_decoder()));
        let ids = tokenizer.encode(&text, true).unwrap();
        let (prompt, output) = ids.split_at((cut * ids.len() as f64) as usize);
        let streamed = stream(&tokenizer, prompt, output, true).concat();
        let shown = tokenizer.decode(prompt, true);
        prop_assert_eq!(shown.trim_end_matches('\u{fffd}').to_owned() + &streamed, text);
    }
}

thread_local! {
    static BYTE_LEVEL: Arc<Tokenizer> = Arc::new(byte_level());
}

/// Prompt and output, streamed, are the text of all tokens; where the prompt ends inside a character, either the output
/// holds that character or the prompt's text shows what there was of it.
fn check_context(
    tokenizer: &Arc<Tokenizer>,
    prompt: &[u32],
    ids: &[u32],
    skip: bool,
) -> Result<(), TestCaseError> {
    let whole = tokenizer.decode(&[prompt, ids].concat(), skip);
    let streamed = stream(tokenizer, prompt, ids, skip).concat();
    let shown = tokenizer.decode(prompt, skip);
    let mut expected = vec![shown.clone() + &streamed];
    let mut rest = shown.as_str();
    for _ in 0..3 {
        if let Some(shorter) = rest.strip_suffix('\u{fffd}') {
            rest = shorter;
            expected.push(rest.to_owned() + &streamed);
        }
    }
    prop_assert!(expected.contains(&whole), "{whole:?} is none of {expected:?}");
    Ok(())
}
