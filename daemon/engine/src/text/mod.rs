//! Prompts: splitting them into tokens, putting concepts' own vectors in, and encoding them.

mod encode;
mod prompt;
mod tokenizer;

pub use blocklora_spec::TokenVectors;
pub use encode::{Concept, encode, encode_with};
pub use prompt::{ConceptSlots, Prompt, Slot, TokenisedPrompt};
pub use tokenizer::Tokenizer;
