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

/// A prompt for a picture with `caption` (where `{}` stands for the concept). With a caption, half of the prompts are
/// the caption itself; without one, the concept alone is put into a template of its kind.
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
