//! Whose file it is, told by the names of its tensors.

use std::fmt;

use super::{Role, parse, refused};
use crate::format::Format;

/// A file that is no adapter, but known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// One that [`import`](super::import()) reads.
    Importable(Format),
    /// One of a method that has no counterpart here.
    Method(&'static str),
    /// The weights of a model.
    Model,
}

impl Foreign {
    /// What to do with it.
    pub(crate) fn cure(self) -> &'static str {
        match self {
            Self::Importable(_) => "`blocklora import` makes an adapter of it",
            Self::Method(_) => "its change cannot be written as one",
            Self::Model => "a model's folder is given with --base",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Importable(format) => format.fmt(f),
            Self::Method(name) => write!(f, "a file of {name}"),
            Self::Model => f.write_str("a model's weights"),
        }
    }
}

/// What a file with tensors of these names is, if that is known.
pub(crate) fn recognise<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<Foreign> {
    // One key of DoRA makes a file of it, however many look like LoRA's.
    if let Some(method) = names.clone().filter_map(refused::method).find(|method| method.changes_the_rest) {
        return Some(Foreign::Method(method.name));
    }
    let factors = names.clone().filter_map(parse).find(|key| key.role != Role::Alpha);
    if let Some(key) = factors {
        return Some(Foreign::Importable(key.format));
    }
    if let Some(method) = names.clone().find_map(refused::method) {
        return Some(Foreign::Method(method.name));
    }
    let model = |name: &str| {
        let part = ["model.diffusion_model.", "down_blocks.", "text_model.", "encoder.", "decoder."];
        part.iter().any(|part| name.starts_with(part))
    };
    if names.clone().any(model) {
        return Some(Foreign::Model);
    }
    let is_word = |name: &str| ["emb_params", "clip_l", "clip_g"].contains(&name) || name.starts_with("bundle_emb.");
    let mut rest = names.clone();
    let alone = rest.next().filter(|name| !name.contains('.') && rest.next().is_none());
    (alone.is_some() || names.clone().any(is_word)).then_some(Foreign::Importable(Format::TextualInversion))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_keys() {
        let of = |names: &[&str]| recognise(names.iter().copied()).map(|what| what.to_string());
        let is = |text: &str| Some(text.to_owned());
        assert_eq!(of(&["lora_unet_x.alpha", "lora_unet_x.lora_up.weight"]), is("a kohya LoRA"));
        assert_eq!(of(&["unet.x.to_q.lora.up.weight"]), is("a diffusers LoRA"));
        assert_eq!(of(&["base_model.model.x.lora_A.weight"]), is("a PEFT LoRA"));
        assert_eq!(of(&["<milo>"]), is("a textual inversion"));
        assert_eq!(of(&["clip_g", "clip_l"]), is("a textual inversion"));
        assert_eq!(of(&["lora_unet_x.alpha", "lora_unet_x.hada_w1_a"]), is("a file of LoHa"));
        assert_eq!(of(&["lora_unet_x.lora_up.weight", "lora_unet_x.dora_scale"]), is("a file of DoRA"));
        assert_eq!(of(&["down_blocks.0.resnets.0.conv1.weight"]), is("a model's weights"));
        assert_eq!(of(&["a", "b"]), None);
        assert_eq!(of(&[]), None);
        // The tensors of our own files, without the metadata that makes them ours.
        assert_eq!(of(&["tokens.milo", "unet.block.to_q.lora_A"]), None);
    }
}
