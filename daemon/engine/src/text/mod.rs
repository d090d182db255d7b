//! Prompts: splitting them into tokens, putting concepts' own vectors in, and encoding them.

mod encode;
mod prompt;
mod tokenizer;

pub use encode::{Concept, TokenVectors, encode, encode_with};
pub use prompt::{ConceptSlots, Prompt, Slot, TokenisedPrompt};
pub use tokenizer::Tokenizer;
