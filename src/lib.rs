//! loramux runs one frozen base model and many LoRA adapters in one batch.
//!
//! A row (one token) that enters a linear layer with the frozen weight `W` leaves it as
//!
//! ```text
//! y = W x + bias + Σ_e g_e · s_e · B_e (A_e x)          e over the adapters this row uses
//! ```
//!
//! with each adapter's scale `s_e` and the row's gate `g_e` for it. No gate is the base alone, one gate of 1 a plain
//! adapter, several gates a weighted mix; rows of all kinds share every step of an [`engine::Engine`]:
//!
//! ```
//! use std::{path::Path, sync::Arc};
//!
//! use loramux::engine::{Engine, EngineOptions, request::Request};
//! use loramux::model::{Base, ChatOptions};
//! use serde_json::json;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = Arc::new(Base::open(Path::new("examples/base"))?);
//! let engine = Engine::start(Arc::clone(&base), EngineOptions::default())?;
//! engine.load_adapter("sentiment", Path::new("examples/adapters/headline-sentiment"))?;
//!
//! let messages = json!([{"role": "user", "content": "Headline: Vertex Tools sales remains in line this month"}]);
//! let options = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
//! let mut request = Request::new(base.tokenizer.encode(&base.render_chat(&messages, &options)?, false)?);
//! request.sampling.temperature = 0.0;
//! request.adapters = vec![("sentiment".to_owned(), 1.0)];
//!
//! let answer = engine.submit(request)?.wait()?;
//! assert_eq!(answer.choices[0].text.trim(), "neutral");
//! # Ok(())
//! # }
//! ```
//!
//! | module | |
//! |---|---|
//! | [`model`] | a Hugging Face folder: configuration, weights, tokenizer, chat template, and the forward pass |
//! | [`adapter`] | LoRA adapters: the sites they change, PEFT folders in and out |
//! | [`mixture`] | which rows use which adapters, with which gates |
//! | [`backend`] | the operations that a model is made of, forwards and backwards, on the CPU and in CUDA |
//! | [`train`] | many adapters trained in one batch: configuration, data, steps, evaluation, checkpoints, reports |
//! | [`engine`] | requests in, tokens out: ragged batches, paged KV cache, sampling |
//! | [`openai`] | the OpenAI protocol: bodies and batch files |
//! | [`format`](mod@format) | checked files: safetensors, strict JSON, atomic writes |
//! | [`cli`] | the command line |

pub mod adapter;
pub mod backend;
pub mod cli;
pub mod engine;
pub mod format;
pub mod mixture;
pub mod model;
pub mod openai;
pub mod tensor;
mod terminal;
pub mod train;
