//! Prompts that name concepts: "`<milo>` and `<zuko>` on the beach".

use super::Tokenizer;
use crate::error::{Error, Result, shortened};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Concept(String),
}

/// A prompt, split at the concepts that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    pieces: Vec<Piece>,
}

/// A concept that a prompt may name, and how many tokens its name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConceptSlots<'a> {
    /// Its name, without the angle brackets.
    pub name: &'a str,
    /// Its number of tokens.
    pub tokens: usize,
}

/// A place in a tokenised prompt where a concept's vector stands instead of a token's embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Position in the prompt, 0 being the begin token.
    pub position: usize,
    /// Which vector: an index over the tokens of all concepts, in the order in which the concepts were given.
    pub vector: usize,
}

/// A prompt ready to be embedded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenisedPrompt {
    /// Ids, [`Tokenizer::length`] of them: begin, words, end, padding. At a slot stands the padding id.
    pub ids: Vec<u32>,
    /// Where the concepts' vectors go, by position.
    pub slots: Vec<Slot>,
    /// Position of the end token.
    pub end: usize,
}

impl Prompt {
    /// Splits `text` at every `<name>`. A name has no `<`, `>` or `|` in it and no space at its ends, so that
    /// "a < b", "<3" and CLIP's `<|endoftext|>` stay text.
    pub fn parse(text: &str) -> Self {
        let mut pieces = Vec::new();
        let (mut plain, mut rest) = (String::new(), text);
        while let Some(open) = rest.find('<') {
            let after = &rest[open + 1..];
            let name =
                after.find(['<', '>', '|']).filter(|&end| after[end..].starts_with('>')).map(|end| &after[..end]);
            match name.filter(|name| !name.is_empty() && name.trim() == *name) {
                Some(name) => {
                    plain.push_str(&rest[..open]);
                    pieces.push(Piece::Text(std::mem::take(&mut plain)));
                    pieces.push(Piece::Concept(name.to_owned()));
                    rest = &after[name.len() + 1..];
                }
                None => {
                    plain.push_str(&rest[..=open]);
                    rest = after;
                }
            }
        }
        plain.push_str(rest);
        pieces.push(Piece::Text(plain));
        pieces.retain(|piece| *piece != Piece::Text(String::new()));
        Self { text: text.to_owned(), pieces }
    }

    /// The names of the concepts in it, in order, repeats included.
    pub fn concepts(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Concept(name) => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// The prompt with every concept's name replaced by what `word` gives for it, such as its class word.
    pub fn with_words<'a>(&'a self, word: impl Fn(&'a str) -> &'a str) -> String {
        let text = |piece: &'a Piece| match piece {
            Piece::Text(text) => text.as_str(),
            Piece::Concept(name) => word(name),
        };
        self.pieces.iter().map(text).collect()
    }

    /// Tokenises it, with a slot for each token of each concept that it names. Fails on a concept that is not among
    /// `concepts`, and on a prompt that is too long.
    pub fn tokenise(&self, tokenizer: &Tokenizer, concepts: &[ConceptSlots]) -> Result<TokenisedPrompt> {
        let fail = |reason: String| Err(Error::prompt(&self.text, reason));
        let mut ids = vec![tokenizer.begin()];
        let mut slots = Vec::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => ids.extend(tokenizer.ids(text)?),
                Piece::Concept(name) => {
                    let Some(index) = concepts.iter().position(|concept| concept.name == name) else {
                        let known: Vec<_> = concepts.iter().map(|concept| format!("<{}>", concept.name)).collect();
                        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                        let name = shortened(name);
                        return fail(format!("no concept <{name}> is loaded (loaded: {known})"));
                    };
                    let first: usize = concepts[..index].iter().map(|concept| concept.tokens).sum();
                    for vector in first..first + concepts[index].tokens {
                        slots.push(Slot { position: ids.len(), vector });
                        ids.push(tokenizer.pad());
                    }
                }
            }
        }
        let end = ids.len();
        ids.push(tokenizer.end());
        if ids.len() > tokenizer.length() {
            return fail(format!(
                "{} tokens are too long: this model reads {}; shorten it",
                ids.len() - 2,
                tokenizer.length() - 2
            ));
        }
        ids.resize(tokenizer.length(), tokenizer.pad());
        Ok(TokenisedPrompt { ids, slots, end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, concepts: &[&str], words: &str) {
        let prompt = Prompt::parse(text);
        assert_eq!(prompt.concepts().collect::<Vec<_>>(), concepts, "{text:?}");
        assert_eq!(prompt.with_words(|_| "dog"), words, "{text:?}");
    }

    #[test]
    fn prompts_split_at_names() {
        check("", &[], "");
        check("a dog", &[], "a dog");
        check("<milo>", &["milo"], "dog");
        check("<milo> and <zuko> on the beach", &["milo", "zuko"], "dog and dog on the beach");
        check("<a><a>'s hat", &["a", "a"], "dogdog's hat");
        check("a<<b>>c", &["b"], "a<dog>c");
        check("i <3 you > me", &[], "i <3 you > me");
        check("1 < 2 and 3 > 2", &[], "1 < 2 and 3 > 2");
        check("<|endoftext|> <>", &[], "<|endoftext|> <>");
        check("<ünïcode> <", &["ünïcode"], "dog <");
    }
}
