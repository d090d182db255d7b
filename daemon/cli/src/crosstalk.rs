//! `score --cross-talk`: medians of what each concept's rows answer to another concept's input.

use blocklora_engine::image::Picture;
use blocklora_engine::merge::AdapterFactors;
use blocklora_engine::score;
use serde::Serialize;

use crate::concepts::{Concepts, Entry};
use crate::session::Session;
use crate::table::Table;

/// Medians over concepts and layers of one part of the model.
#[derive(Clone, Debug, Serialize)]
pub struct CrossTalk {
    /// The part.
    part: &'static str,
    /// ||dW_i X_i|| / ||W X_i||: what a concept's own rows change.
    own: f64,
    /// ||dW_j X_i|| / ||dW_i X_i||, the root of its mean square over the other concepts j.
    another: f64,
    /// The root of the sum of squares over all other concepts, by ||dW_i X_i||: with disjoint rows, what all the others
    /// change together.
    all_others: f64,
}

/// A name, and whether a layer of that name belongs to it.
type Part = (&'static str, fn(&str) -> bool);

/// The parts of the model, and the layers in them.
const PARTS: [Part; 5] = [
    ("unet, self-attention", |name| name.starts_with("unet.") && name.contains(".attn1.")),
    ("unet, cross-attention", |name| name.starts_with("unet.") && name.contains(".attn2.")),
    ("unet, feed-forward", |name| name.starts_with("unet.") && name.contains(".ff.")),
    ("unet, projections", |name| name.starts_with("unet.") && name.contains(".proj_")),
    ("text encoder", |name| name.starts_with("text_encoder.")),
];

/// Shows every concept's own pictures to the model, with what `merge` merges for that concept.
pub fn measure(
    session: &mut Session,
    concepts: &Concepts,
    entries: &[&Entry],
    mut merge: impl FnMut(&mut Session, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<CrossTalk>> {
    let mut of_concepts = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        merge(session, i)?;
        let mut pictures = Vec::new();
        for (path, caption) in concepts.pictures(entry) {
            pictures.push((Picture::load(&path)?, entry.prompt(caption.as_deref().unwrap_or("{c}"))));
        }
        let factors: Vec<&AdapterFactors> = session.factors().collect();
        of_concepts.push(score::answers(&session.model, &factors, &session.concepts, &pictures)?);
    }
    let others = entries.len().saturating_sub(1).max(1) as f64;
    let of_part = |&(part, belongs): &(&'static str, fn(&str) -> bool)| {
        let (mut own, mut all_others) = (Vec::new(), Vec::new());
        for (i, answers) in of_concepts.iter().enumerate() {
            let layers = answers.iter().zip(session.model.layers());
            for (answer, _) in layers.filter(|(a, layer)| belongs(&layer.name) && a.deltas[i] > 0.0) {
                let mine = answer.deltas[i];
                own.push((mine / answer.output).sqrt());
                all_others.push(all_others_by_own(&answer.deltas, i));
            }
        }
        let (own, all_others) = (median(own)?, median(all_others)?);
        Some(CrossTalk { part, own, another: all_others / others.sqrt(), all_others })
    };
    Ok(PARTS.iter().filter_map(of_part).collect())
}

/// The root of the sum of what all but the i-th answer, by what the i-th does; `deltas` are sums of squares.
pub fn all_others_by_own(deltas: &[f64], i: usize) -> f64 {
    ((deltas.iter().sum::<f64>() - deltas[i]) / deltas[i]).sqrt()
}

/// None of nothing.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The table that people read.
pub fn table(rows: &[(String, Vec<CrossTalk>)]) -> Table {
    let mut table = Table::new(["adapters", "part", "own / output", "another / own", "all others / own"]);
    for (set, parts) in rows {
        for p in parts {
            let numbers = [p.own, p.another, p.all_others].map(|v| format!("{v:.3}"));
            table.row([vec![set.clone(), p.part.to_owned()], numbers.to_vec()].concat());
        }
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use blocklora_engine::model::Model;
    use blocklora_engine::{DType, Device};

    use super::*;

    #[test]
    fn every_layer_belongs_to_one_part() {
        let starter = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../starter/model"));
        let model = Model::load(starter, &Device::Cpu, DType::F32).unwrap();
        for layer in model.layers() {
            let parts: Vec<_> = PARTS.iter().filter(|(_, belongs)| belongs(&layer.name)).collect();
            assert_eq!(parts.len(), 1, "{}: {parts:?}", layer.name);
        }
    }
}
