//! The base model's modules, by every name that files give them.

use std::collections::BTreeMap;

use super::{Module, Name};

/// The parts of a model, as diffusers calls their folders.
pub(super) const PARTS: [&str; 3] = ["unet", "text_encoder", "text_encoder_2"];

/// Where a name leads.
pub(super) enum Place<'a> {
    /// To a Linear that adapters may change.
    Layer(&'a Module),
    /// To another module.
    Other(&'a Module),
    /// To two of them.
    Ambiguous(&'a Module, &'a Module),
    /// To none.
    Nowhere,
}

pub(super) struct Index<'a> {
    dotted: BTreeMap<String, &'a Module>,
    /// By names with underscores for dots, which two modules may share.
    flat: BTreeMap<String, Vec<&'a Module>>,
}

impl<'a> Index<'a> {
    pub(super) fn new(modules: &'a [Module]) -> Self {
        let mut index = Self { dotted: BTreeMap::new(), flat: BTreeMap::new() };
        for module in modules {
            let Some((part, path)) = module.name.split_once('.') else { continue };
            let name = format!("{part}.{}", below(path, '.'));
            index.flat.entry(name.replace('.', "_")).or_default().push(module);
            index.dotted.insert(name, module);
        }
        index
    }

    pub(super) fn find(&self, name: &Name) -> Place<'a> {
        let found: Vec<&'a Module> = match name {
            Name::Flat(part, path) => {
                self.flat.get(&format!("{part}_{}", below(path, '_'))).cloned().unwrap_or_default()
            }
            Name::Dotted(path) => {
                let (parts, path): (&[&str], _) = match path.split_once('.') {
                    Some((part, path)) if PARTS.contains(&part) => (&[part], path),
                    _ => (&PARTS, path.as_str()),
                };
                let path = below(path, '.');
                parts.iter().filter_map(|part| self.dotted.get(&format!("{part}.{path}")).copied()).collect()
            }
        };
        match found[..] {
            [] => Place::Nowhere,
            [module] if module.adaptable => Place::Layer(module),
            [module] => Place::Other(module),
            [one, other, ..] => Place::Ambiguous(one, other),
        }
    }
}

/// A path without the module that transformers puts around CLIP's text encoder in some versions and not in others.
fn below(path: &str, separator: char) -> &str {
    path.strip_prefix("text_model").and_then(|rest| rest.strip_prefix(separator)).unwrap_or(path)
}
