//! Caption templates: ways to say that a picture shows the concept.

use blocklora_spec::Kind;

use crate::rng::Rng;

const PICTURES: &[&str] =
    &["{}", "a photo of {}", "a picture of {}", "a good photo of {}", "a close-up of {}", "a drawing of {}"];
const SCENES: &[&str] = &["{}", "a view of {}", "a picture of {}", "a photo of {}"];
const STYLES: &[&str] = &["a picture in the style of {}", "a drawing in the style of {}", "a scene in the style of {}"];

/// The templates of `kind`.
pub fn of_kind(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Subject | Kind::Person => PICTURES,
        Kind::Scene => SCENES,
        Kind::Style => STYLES,
    }
}

/// Every prompt that [`prompt`] may give for a picture with `caption`.
pub fn prompts(kind: Kind, caption: Option<&str>, use_templates: bool) -> Vec<String> {
    let in_templates = of_kind(kind).iter().map(|template| template.replace("{}", caption.unwrap_or("{}")));
    match caption {
        Some(caption) if !use_templates || kind == Kind::Style => vec![caption.to_owned()],
        Some(caption) => std::iter::once(caption.to_owned()).chain(in_templates).collect(),
        None if use_templates => in_templates.collect(),
        None => vec!["{}".to_owned()],
    }
}

/// A prompt for a picture with `caption` (where `{}` stands for the concept). With a caption, half of the prompts are
/// the caption itself, of a style's all; without one, the concept alone is put into a template of its kind.
pub fn prompt(rng: &mut Rng, kind: Kind, caption: Option<&str>, use_templates: bool) -> String {
    let templates = of_kind(kind);
    let template = templates[rng.below(templates.len())];
    let plain = rng.uniform() < 0.5;
    match caption {
        Some(caption) if plain || !use_templates || kind == Kind::Style => caption.to_owned(),
        Some(caption) => template.replace("{}", caption),
        None if use_templates => template.to_owned(),
        None => "{}".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::rng::Stream;

    #[test]
    fn all_prompts_and_no_others_are_listed() {
        for kind in [Kind::Subject, Kind::Person, Kind::Scene, Kind::Style] {
            for caption in [None, Some("a {} at night")] {
                for use_templates in [false, true] {
                    let mut rng = Rng::new(1, Stream::Test, 0, 0);
                    let drawn: BTreeSet<String> =
                        (0..1000).map(|_| prompt(&mut rng, kind, caption, use_templates)).collect();
                    let listed = prompts(kind, caption, use_templates).into_iter().collect();
                    assert_eq!(drawn, listed, "{kind:?} {caption:?} {use_templates}");
                }
            }
        }
    }
}
