//! Three requests with different adapters in one batch: the base alone, one adapter, and a weighted mix of two.
//!
//!     cargo run --release --example serve_mixed_batch [FOLDER]
//!
//! FOLDER (default: `examples`) has the bundled `base` and `adapters`.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use loramux::engine::request::{Event, Request};
use loramux::engine::{Engine, EngineOptions};
use loramux::model::{Base, ChatOptions};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "examples".to_owned()));

    // The base is mapped read-only; the engine runs on a thread of its own and takes adapters at any time.
    let base = Arc::new(Base::open(&folder.join("base"))?);
    let engine = Engine::start(Arc::clone(&base), EngineOptions::default())?;
    for name in ["headline-sentiment", "entity-extraction"] {
        engine.load_adapter(name, &folder.join("adapters").join(name))?;
    }

    // One question, read three ways. A gate says how much of an adapter a request uses.
    let question = "Headline: Cobalt Foods net income weakens by 22% in the first quarter";
    let gates: [&[(&str, f32)]; 3] =
        [&[], &[("headline-sentiment", 1.0)], &[("headline-sentiment", 0.5), ("entity-extraction", 0.5)]];
    let mut streams = Vec::new();
    for adapters in gates {
        let mut request = Request::new(prompt(&base, question)?);
        request.adapters = adapters.iter().map(|&(name, gate)| (name.to_owned(), gate)).collect();
        request.sampling.temperature = 0.0;
        request.stop.max_tokens = Some(24);
        // Nothing waits here: the engine puts the rows of all three into the same steps.
        streams.push(engine.submit(request)?);
    }

    println!("question  {question}");
    let mut streams = streams.into_iter();
    if let Some(stream) = streams.next() {
        // Tokens as they come; the text of the last ones may only be complete at the end.
        print!("base      ");
        for event in stream {
            match event {
                Event::Token { text, .. } | Event::Finished { text, .. } => {
                    print!("{text}");
                    std::io::stdout().flush()?;
                }
                Event::Failed(reason) => return Err(reason.into()),
                Event::PromptLogprobs(_) => {}
            }
        }
        println!();
    }
    for (name, stream) in ["sentiment", "mix"].into_iter().zip(streams) {
        let answer = stream.wait()?;
        println!("{name:<10}{}", answer.choices[0].text);
    }
    println!("{} rows in {} steps", engine.stats().rows(), engine.stats().steps());
    Ok(())
}

/// The question as the model was trained to read it. The template writes the special tokens, so encoding adds none.
fn prompt(base: &Base, question: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    let messages = json!([{"role": "user", "content": question}]);
    let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
    Ok(base.tokenizer.encode(&base.render_chat(&messages, &options)?, false)?)
}
