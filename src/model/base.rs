//! A base: the frozen model of a Hugging Face folder, with its tokenizer and chat template.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::chat_template::{ChatOptions, ChatTemplate, ChatTemplateError};
use super::tokenizer::{Tokenizer, TokenizerError};
use super::{Checkpoint, ModelConfig, ModelError, ModelSites, Weights};
use crate::adapter::peft::BaseWeights;
use crate::tensor::Tensor;

/// An opened base. Its weights are mapped read-only.
pub struct Base {
    pub folder: PathBuf,
    /// Name of the folder: what requests call this model.
    pub name: String,
    pub config: ModelConfig,
    pub checkpoint: Checkpoint,
    pub tokenizer: Arc<Tokenizer>,
    chat_template: Option<ChatTemplate>,
}

/// Why a base could not be opened or a conversation not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
    #[error(
        "{0}: the tokenizer has {1} tokens, the model's vocabulary {2}: these files are of different models"
    )]
    Vocabulary(PathBuf, usize, usize),
    #[error("the model has no chat template: send `prompt` to /v1/completions instead")]
    NoChatTemplate,
}

impl Base {
    /// Opens a Hugging Face folder: config.json, safetensors, tokenizer.json and, where there is one, a chat template.
    ///
    /// # Errors
    /// Naming the file and what is wrong with it.
    pub fn open(folder: &Path) -> Result<Self, BaseError> {
        let config = ModelConfig::read(folder)?;
        let checkpoint = Checkpoint::open(folder, &config)?;
        let tokenizer = Arc::new(Tokenizer::read(folder)?);
        if tokenizer.vocab_size() > config.vocab_size {
            let (tokens, rows) = (tokenizer.vocab_size(), config.vocab_size);
            return Err(BaseError::Vocabulary(folder.to_owned(), tokens, rows));
        }
        let chat_template = ChatTemplate::from_tokenizer(&tokenizer)?;
        let full = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let name =
            full.file_name().map_or_else(|| "base".to_owned(), |name| name.to_string_lossy().into_owned());
        Ok(Self { folder: folder.to_owned(), name, config, checkpoint, tokenizer, chat_template })
    }

    /// The model's own chat template, where it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The text of a conversation `[{role, content, …}]`, by the model's own chat template.
    ///
    /// # Errors
    /// When the model has no template, or the template refuses the conversation.
    pub fn render_chat(&self, messages: &Value, options: &ChatOptions) -> Result<String, BaseError> {
        let template = self.chat_template.as_ref().ok_or(BaseError::NoChatTemplate)?;
        Ok(template.render(messages, options)?)
    }
}

impl Weights for Checkpoint {
    fn sites(&self) -> &ModelSites {
        self.sites()
    }

    fn site_weight(&self, site: usize) -> Result<Tensor, ModelError> {
        self.site_weight(site)
    }

    fn site_bias(&self, site: usize) -> Result<Option<Tensor>, ModelError> {
        self.site_bias(site)
    }

    fn norm(&self, name: &str, width: usize) -> Result<Tensor, ModelError> {
        self.tensor(name, &[width])
    }
}

impl BaseWeights for Checkpoint {
    fn weight(&self, site: usize) -> Tensor {
        self.site_weight(site).expect("every site was resolved when the checkpoint was opened")
    }
}
