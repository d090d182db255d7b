//! A concept's words for other tools: a file beside its LoRA where they have one vector each, else a notice.

use std::path::{Path, PathBuf};

use crate::output;

/// What the name of a file of words alone ends in.
pub const ENDING: &str = ".embedding.safetensors";

/// What other tools can have of a concept's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// There are none.
    None,
    /// All: they have one vector each.
    Plain,
    /// Nothing: they have a vector for each layer.
    LayerWise,
}

impl Words {
    /// The words whose numbers of vectors these are.
    pub fn of(vectors: impl IntoIterator<Item = usize>) -> Self {
        let each = |words, count| match (words, count) {
            (Self::None | Self::Plain, 1) => Self::Plain,
            _ => Self::LayerWise,
        };
        vectors.into_iter().fold(Self::None, each)
    }

    /// Where a file of them belongs that is written along with `output`; none if there can be no such file.
    pub fn file(self, output: &Path) -> Option<PathBuf> {
        (self == Self::Plain).then(|| output::beside(output, ENDING))
    }

    /// Says on stderr that the words of the concept `name` stay behind, if they do.
    pub fn note_what_is_left(self, name: &str) {
        if self == Self::LayerWise {
            eprintln!(
                "blocklora: the words of <{name}> have a vector for each layer, which other tools cannot read: train \
                 with tokens = \"plain\" for a file of words, too"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_words_keeps_the_whole_name() {
        let file = |output: &str| Words::Plain.file(Path::new(output));
        let expected = |path: &str| Some(PathBuf::from(path));
        assert_eq!(file("out/milo.safetensors"), expected("out/milo.embedding.safetensors"));
        assert_eq!(file("milo-1.0"), expected("milo-1.0.embedding.safetensors"));
        assert_eq!(file("milo-1.5"), expected("milo-1.5.embedding.safetensors"));
        assert_eq!(file("milo-1.5.safetensors"), expected("milo-1.5.embedding.safetensors"));
        assert_eq!(file("peft/"), expected("peft.embedding.safetensors"));
    }

    #[test]
    fn only_plain_words_have_a_file() {
        assert_eq!(Words::of([]), Words::None);
        assert_eq!(Words::of([1, 1]), Words::Plain);
        assert_eq!([Words::of([10, 10]), Words::of([1, 10]), Words::of([10, 1])], [Words::LayerWise; 3]);
        assert_eq!([Words::None, Words::LayerWise].map(|words| words.file(Path::new("milo"))), [None, None]);
    }
}
