//! The scores themselves, on features of length 1.

use crate::error::{Error, Result};
use crate::text::Prompt;

/// A CLIP feature of length 1.
pub type Feature = Vec<f32>;

/// What the paper puts before a prompt when it scores a picture.
pub const PAPER_PREFIX: &str = "A photo depicts ";

/// The cosine of two features of length 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Image alignment: the mean of max(cosine, 0) over all pairs of a reference and a generated picture.
pub fn image_alignment(references: &[Feature], generated: &[Feature]) -> Result<f32> {
    let pairs = references.iter().flat_map(|r| generated.iter().map(move |g| cosine(r, g).max(0.0)));
    mean(pairs, "image alignment")
}

/// Text alignment (CLIPScore): the mean of 2.5 max(cosine, 0) over pictures, each with its own prompt's feature.
pub fn text_alignment(prompts: &[Feature], generated: &[Feature]) -> Result<f32> {
    if prompts.len() != generated.len() {
        let counts = format!("{} prompts for {} pictures", prompts.len(), generated.len());
        return Err(Error::option("text alignment", counts, "every picture needs its prompt"));
    }
    mean(prompts.iter().zip(generated).map(|(p, g)| 2.5 * cosine(p, g).max(0.0)), "text alignment")
}

/// The text that a picture made from `prompt` is scored against: `prefix`, then the prompt with every concept `<name>`
/// replaced by the word that `class_word` gives for it. A name without one is an error.
pub fn prior_text<'a>(prompt: &str, prefix: &str, class_word: impl Fn(&str) -> Option<&'a str>) -> Result<String> {
    let parsed = Prompt::parse(prompt);
    if let Some(name) = parsed.concepts().find(|name| class_word(name).is_none()) {
        let reason = format!("no class word is known for <{}>", crate::error::shortened(name));
        return Err(Error::prompt(prompt, reason));
    }
    Ok(prefix.to_owned() + &parsed.with_words(|name| class_word(name).unwrap_or(name)))
}

/// Tells identities apart: a picture belongs to the class whose mean feature is nearest by cosine.
#[derive(Clone, Debug)]
pub struct IdentityClassifier {
    names: Vec<String>,
    means: Vec<Feature>,
}

impl IdentityClassifier {
    /// Takes classes with the features of real pictures of each. Fails if there is no class, or a class without any.
    pub fn new<S: Into<String>>(classes: impl IntoIterator<Item = (S, Vec<Feature>)>) -> Result<Self> {
        let (mut names, mut means) = (Vec::new(), Vec::new());
        for (name, features) in classes {
            let name = name.into();
            let first = features.first().ok_or_else(|| Error::option("identity class", &name, "has no pictures"))?;
            let sum = |i: usize| features.iter().map(|f| f[i]).sum::<f32>();
            let sums: Feature = (0..first.len()).map(sum).collect();
            let length = cosine(&sums, &sums).sqrt().max(f32::MIN_POSITIVE);
            means.push(sums.iter().map(|v| v / length).collect());
            names.push(name);
        }
        if names.is_empty() {
            return Err(Error::option("identity classes", "none", "there must be at least one"));
        }
        Ok(Self { names, means })
    }

    /// The names of its classes, in their order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The cosine of `feature` with every class mean.
    pub fn cosines(&self, feature: &[f32]) -> Vec<f32> {
        self.means.iter().map(|mean| cosine(mean, feature)).collect()
    }

    /// The index of the nearest class.
    pub fn nearest(&self, feature: &[f32]) -> usize {
        let cosines = self.cosines(feature);
        (1..cosines.len()).fold(0, |best, i| if cosines[i] > cosines[best] { i } else { best })
    }

    /// The share of `features` of the class `class` that are nearest to it.
    pub fn accuracy(&self, class: usize, features: &[Feature]) -> Result<f32> {
        mean(features.iter().map(|f| (self.nearest(f) == class) as u8 as f32), "identity accuracy")
    }
}

fn mean(values: impl Iterator<Item = f32>, what: &str) -> Result<f32> {
    let (sum, count) = values.fold((0.0_f64, 0_usize), |(sum, count), v| (sum + v as f64, count + 1));
    if count == 0 {
        return Err(Error::option(what, "none", "needs at least one picture of each kind"));
    }
    Ok((sum / count as f64) as f32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn unit(degrees: f32) -> Feature {
        vec![degrees.to_radians().cos(), degrees.to_radians().sin()]
    }

    #[test]
    fn image_alignment_is_the_mean_over_all_pairs_with_negative_cosines_as_zero() {
        let alignment = image_alignment(&[unit(0.0), unit(90.0)], &[unit(0.0), unit(60.0), unit(180.0)]).unwrap();
        let expected = (1.0 + 0.5 + 0.0 + 0.0 + 60_f32.to_radians().sin() + 0.0) / 6.0;
        assert!((alignment - expected).abs() < 1e-6, "{alignment}");
        assert!(image_alignment(&[], &[unit(0.0)]).is_err());
    }

    #[test]
    fn text_alignment_compares_each_picture_with_its_own_prompt() {
        let alignment = text_alignment(&[unit(0.0), unit(90.0)], &[unit(60.0), unit(270.0)]).unwrap();
        assert!((alignment - 2.5 * 0.5 / 2.0).abs() < 1e-6, "{alignment}");
        assert!(text_alignment(&[unit(0.0)], &[]).is_err());
        assert!(text_alignment(&[], &[]).is_err());
    }

    #[test]
    fn a_concept_is_scored_as_its_class_word() {
        let word = |name: &str| [("milo", "cat"), ("zuko", "dog")].into_iter().find(|w| w.0 == name).map(|w| w.1);
        let text = prior_text("<milo> and <zuko> at sea", PAPER_PREFIX, word).unwrap();
        assert_eq!(text, "A photo depicts cat and dog at sea");
        assert_eq!(prior_text("a plain prompt", "", word).unwrap(), "a plain prompt");
        let message = prior_text("<nobody> at sea", "", word).unwrap_err().to_string();
        assert!(message.contains("<nobody>"), "{message}");
    }

    #[test]
    fn the_nearest_class_mean_wins() {
        let classes = [("a", vec![unit(0.0), unit(20.0)]), ("b", vec![unit(90.0)])];
        let classifier = IdentityClassifier::new(classes).unwrap();
        assert_eq!([40.0, 60.0].map(|d| classifier.nearest(&unit(d))), [0, 1]);
        assert_eq!(classifier.accuracy(0, &[unit(10.0), unit(80.0)]).unwrap(), 0.5);
        assert!((classifier.cosines(&unit(10.0))[0] - 1.0).abs() < 1e-6);
        assert!(classifier.accuracy(0, &[]).is_err());
        assert!(IdentityClassifier::new([("a", vec![])]).is_err());
        assert!(IdentityClassifier::new(Vec::<(String, Vec<Feature>)>::new()).is_err());
    }
}
