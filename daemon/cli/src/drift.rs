//! `score --drift`: whether a class word alone has moved toward a concept (the paper's figure 3).

use std::sync::Arc;

use anyhow::Context;
use blocklora_engine::image::Picture;
use blocklora_engine::merge::strategy::MergeStrategy;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::concepts::Entry;
use crate::draw::{self, Job, Settings};
use crate::judge::{Judge, Scores};
use crate::session::Session;
use crate::table::Table;

/// Pictures of a class word, without any adapter and with one concept's adapter merged, against that concept's own
/// pictures. The prompts and seeds are the same in both, so the difference is taken picture by picture.
#[derive(Clone, Debug, Serialize)]
pub struct Drift {
    /// The concept; `all` in the last row.
    concept: String,
    /// The word.
    class: String,
    /// Scores of the base model's pictures.
    before: Scores,
    /// Scores with the adapter merged.
    after: Scores,
    /// Mean of the differences in image alignment.
    drift: f32,
    /// Standard error of that mean, over pictures.
    standard_error: Option<f32>,
}

impl Drift {
    fn new(concept: &str, class: &str, before: &[Scores], after: &[Scores]) -> anyhow::Result<Self> {
        let moved =
            |(b, a): (&Scores, &Scores)| Scores { image_alignment: a.image_alignment - b.image_alignment, ..*a };
        let moved: Vec<Scores> = before.iter().zip(after).map(moved).collect();
        let mean = |scores: &[Scores]| Scores::mean(scores).context("there are no pictures to compare");
        Ok(Self {
            concept: concept.to_owned(),
            class: class.to_owned(),
            before: mean(before)?,
            after: mean(after)?,
            drift: mean(&moved)?.image_alignment,
            standard_error: Scores::standard_error(&moved).map(|e| e.image_alignment),
        })
    }
}

/// Draws `jobs`, prompts with class words only, of every entry; a row for each concept and one for all of them.
pub fn measure(
    session: &mut Session,
    entries: &[&Entry],
    jobs: &[Vec<Job>],
    (settings, weight): (&Settings, f32),
    (strategy, judge): (&Arc<dyn MergeStrategy>, &Judge),
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Drift>> {
    let (mut rows, mut all_before, mut all_after) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (entry, jobs)) in entries.iter().zip(jobs).enumerate() {
        let mut scored = |set: &[(usize, f32)]| -> anyhow::Result<Vec<Scores>> {
            session.merge(set, strategy)?;
            let drawn: Vec<Picture> = draw::draw(session, jobs, settings, settings.batch(), bar)?;
            let prompts: Vec<&str> = jobs.iter().map(|j| j.prompt.as_str()).collect();
            judge.score_each(entry, &prompts, &drawn)
        };
        let (before, after) = (scored(&[])?, scored(&[(i, weight)])?);
        rows.push(Drift::new(&entry.name, &entry.class, &before, &after)?);
        all_before.extend(before);
        all_after.extend(after);
    }
    rows.push(Drift::new("all", "", &all_before, &all_after)?);
    Ok(rows)
}

/// The table that people read.
pub fn table(sets: &[(String, Vec<Drift>)]) -> Table {
    let mut table =
        Table::new(["adapters", "concept", "class word", "before", "after", "drift", "identity before", "after"]);
    for (set, rows) in sets {
        for row in rows {
            let error = row.standard_error.map(|e| format!(" ± {e:.4}")).unwrap_or_default();
            table.row([
                set.clone(),
                row.concept.clone(),
                row.class.clone(),
                format!("{:.4}", row.before.image_alignment),
                format!("{:.4}", row.after.image_alignment),
                format!("{:+.4}{error}", row.drift),
                format!("{:.0} %", 100.0 * row.before.identity),
                format!("{:.0} %", 100.0 * row.after.identity),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_the_mean_of_differences() {
        let scores = |image_alignment| Scores { image_alignment, text_alignment: 1.0, identity: 0.0 };
        let drift = Drift::new("a", "cat", &[scores(0.1), scores(0.5)], &[scores(0.3), scores(0.9)]);
        let drift = drift.unwrap_or_else(|e| panic!("{e}"));
        assert!((drift.drift - 0.3).abs() < 1e-6 && (drift.standard_error.unwrap_or_default() - 0.1).abs() < 1e-6);
        assert!(Drift::new("a", "cat", &[], &[]).is_err());
    }
}
