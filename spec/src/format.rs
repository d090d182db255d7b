//! The formats of other tools that adapters are exported to and imported from.

use std::fmt;

use serde::Serialize;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// kohya's sd-scripts.
    Kohya,
    /// diffusers, in either of its own two forms.
    Diffusers,
    /// PEFT, also inside diffusers' files.
    Peft,
    /// Words alone.
    TextualInversion,
}

impl Format {
    const ALL: [Self; 4] = [Self::Kohya, Self::Diffusers, Self::Peft, Self::TextualInversion];

    /// Its id, as in `algorithm.id` and in the daemon's interface.
    pub fn id(self) -> &'static str {
        match self {
            Self::Kohya => "kohya",
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::TextualInversion => "textual-inversion",
        }
    }

    /// The one with this id.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.id() == id)
    }

    /// What people call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Peft => "PEFT",
            Self::TextualInversion => "textual inversion",
            _ => self.id(),
        }
    }
}

/// What a file of it is.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TextualInversion => write!(f, "a {}", self.title()),
            _ => write!(f, "a {} LoRA", self.title()),
        }
    }
}
