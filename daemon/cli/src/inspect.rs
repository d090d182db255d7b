//! `blocklora inspect`: what is in adapter files, and whether they get in each other's way.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use blocklora_engine::merge::AdapterFactors;
use blocklora_engine::merge::conflicts::{Conflicts, conflicts};
use blocklora_service::plugins::words::shown;
use blocklora_spec::{Adapter, Delta, Manifest, Scheme};
use serde::Serialize;

use crate::output::{self, OutputFile};
use crate::table::Table;
use crate::{failure, plot};

/// Show what is in adapter files, and whether they get in each other's way
///
/// Prints each file's manifest, the rows it owns and how much it changes; for several files also the cosine between
/// their changes and the share of weights that they pull in opposite directions. Both are exactly 0 for concepts in
/// different slots of one partition.
#[derive(clap::Args)]
pub struct Args {
    /// Adapter files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Also print the norm of the change of every layer
    #[arg(long)]
    layers: bool,
    /// Draw row map, norms, cosines and sign conflicts into this SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `inspect` says about one file.
#[derive(Serialize)]
pub struct Report {
    /// The file.
    pub file: PathBuf,
    /// SHA-256 of the file.
    pub digest: String,
    /// Its manifest.
    pub manifest: Manifest,
    /// Numbers in its factors and tokens.
    pub parameters: usize,
    /// Ranges of owned rows by the number of outputs m of a layer.
    pub rows: BTreeMap<usize, Vec<(u32, u32)>>,
    /// The Frobenius norm of its whole change.
    pub norm: f64,
    /// The same, by layer.
    pub norms: BTreeMap<String, f64>,
    /// Mean norm of each token's vectors.
    pub token_norms: BTreeMap<String, f64>,
}

#[derive(Serialize)]
struct Json<'a> {
    adapters: &'a [Report],
    /// All layers together.
    overall: &'a Conflicts,
    /// Each layer.
    layers: &'a [Conflicts],
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let plot = args.plot.as_deref().map(|path| plot_file(path, &args.files)).transpose()?;
    let adapters = args.files.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
    let factors = adapters.iter().map(AdapterFactors::from_adapter).collect::<Result<Vec<AdapterFactors>, _>>()?;
    let compared = conflicts(&factors.iter().collect::<Vec<_>>())?;
    let norms = |index: usize| {
        let changed = compared.layers.iter().filter(move |l| l.norms[index] > 0.0);
        changed.map(move |l| (l.layer.clone(), l.norms[index])).collect()
    };
    let reports: Vec<Report> = adapters.iter().enumerate().map(|(i, a)| report(a, norms(i))).collect();
    if let Some(file) = plot {
        file.write(plot::svg(&reports, &compared.overall).as_bytes())?;
    }
    if args.json {
        return output::print_json(&Json { adapters: &reports, overall: &compared.overall, layers: &compared.layers });
    }
    let text = describe(&reports, &compared.overall, args.layers).context("cannot format the report")?;
    output::print(&text)?;
    Ok(())
}

/// The plot to be. One of `files` behind --plot is an adapter that would be lost.
fn plot_file(path: &Path, files: &[PathBuf]) -> anyhow::Result<OutputFile> {
    if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg")) {
        return failure::usage(format!(
            "--plot {}: give the name of an SVG file, with .svg at its end",
            path.display()
        ));
    }
    files.iter().try_for_each(|file| output::not_the_same(file, path))?;
    OutputFile::create(path)
}

fn report(adapter: &Adapter, norms: BTreeMap<String, f64>) -> Report {
    let numbers = |l: &blocklora_spec::LayerFactors| l.rank * (l.columns + l.rows.len());
    let mut rows = BTreeMap::new();
    for layer in adapter.layers() {
        rows.entry(layer.outputs).or_insert_with(|| ranges(&layer.rows));
    }
    let mean_norm = |t: &blocklora_spec::TokenVectors| {
        let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        t.values.chunks(t.width.max(1)).map(norm).sum::<f64>() / t.layers.max(1) as f64
    };
    Report {
        file: adapter.path().to_path_buf(),
        digest: adapter.digest().to_owned(),
        manifest: adapter.manifest().clone(),
        parameters: adapter.layers().iter().map(numbers).sum::<usize>()
            + adapter.tokens().iter().map(|t| t.values.len()).sum::<usize>(),
        rows,
        norm: norms.values().map(|n| n * n).sum::<f64>().sqrt(),
        norms,
        token_norms: adapter.tokens().iter().map(|t| (t.name.clone(), mean_norm(t))).collect(),
    }
}

/// Ascending `rows` as inclusive ranges.
fn ranges(rows: &[u32]) -> Vec<(u32, u32)> {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &row in rows {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == row => *last = row,
            _ => ranges.push((row, row)),
        }
    }
    ranges
}

fn describe(reports: &[Report], overall: &Conflicts, layers: bool) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    for report in reports {
        describe_one(&mut text, report)?;
        if layers {
            let mut table = Table::new(["  layer", "norm"]);
            report.norms.iter().for_each(|(name, norm)| table.row([format!("  {name}"), format!("{norm:.5}")]));
            writeln!(text, "\n{table}")?;
        }
        writeln!(text)?;
    }
    if reports.len() > 1 {
        writeln!(text, "Rows ({} cells from row 0 to m; # owns all, + some, . none)", ROW_CELLS)?;
        writeln!(text, "{}", row_map(reports))?;
        writeln!(text, "Pairs")?;
        writeln!(text, "{}", pair_table(reports, overall))?;
        let shared = overall.pairs.iter().filter(|p| p.shared_rows > 0).count();
        writeln!(
            text,
            "{}",
            match shared {
                0 => "No two of these concepts own the same row: merging them is exact.".to_owned(),
                1 => "1 pair of concepts owns the same rows: retrain one of them in another slot, or merge with \
                      --on-clash mean."
                    .to_owned(),
                n => format!(
                    "{n} pairs of concepts own the same rows: retrain them in slots of their own, or merge with \
                     --on-clash mean."
                ),
            }
        )?;
    }
    Ok(text)
}

fn describe_one(text: &mut String, report: &Report) -> std::fmt::Result {
    let m = &report.manifest;
    let kind = format!("{:?}", m.kind).to_lowercase();
    writeln!(text, "{}  ({kind}, \"{}\")  {}", m.name, shown(&m.class_word), report.file.display())?;
    writeln!(text, "  digest      {}", report.digest)?;
    writeln!(text, "  base        {} {}", shown(&m.base.architecture), short(&m.base.digest))?;
    write!(text, "  trained by  {} {}, {} steps", m.algorithm.id, shown(&m.algorithm.version), m.training.steps)?;
    write!(text, ", seed {}", m.training.seed)?;
    if m.erasure_lambda > 0.0 {
        write!(text, ", output erasure {}", m.erasure_lambda)?;
    }
    writeln!(text)?;
    let formula = match m.delta {
        Delta::Alpha => "alpha B A",
        Delta::AlphaOverRank => "alpha / rank B A",
    };
    writeln!(
        text,
        "  factors     {} layers, rank {}, {formula}, alpha {}, {} numbers",
        report.norms.len(),
        m.rank,
        m.alpha,
        report.parameters
    )?;
    match &m.partition {
        None => writeln!(text, "  rows        all")?,
        Some(p) => {
            let scheme = format!("{:?}", p.scheme).to_lowercase();
            let seed = if p.scheme == Scheme::Permuted { format!(", seed {}", p.seed) } else { String::new() };
            write!(text, "  rows        slot {} of {} ({scheme}{seed})", p.slot, p.capacity)?;
            for (outputs, ranges) in &report.rows {
                write!(text, "; {} of {outputs}", ranges.iter().map(|(a, b)| b - a + 1).sum::<u32>())?;
                if let [(first, last)] = ranges[..] {
                    write!(text, ": {first}-{last}")?;
                }
            }
            writeln!(text)?;
        }
    }
    for token in &m.tokens {
        let norm = report.token_norms.get(&token.name).copied().unwrap_or_default();
        writeln!(text, "  token       {}: {} vectors, mean norm {norm:.3}", token.name, token.vectors)?;
    }
    let part = |prefix: &str| {
        let of_part = report.norms.iter().filter(|(name, _)| name.starts_with(prefix));
        of_part.map(|(_, n)| n * n).sum::<f64>().sqrt()
    };
    writeln!(
        text,
        "  norm        {:.4} (unet {:.4}, text encoder {:.4})",
        report.norm,
        part("unet."),
        part("text_encoder")
    )?;
    if let Some(licence) = &m.licence {
        writeln!(text, "  licence     {}", shown(licence))?;
    }
    if let Some(created) = &m.created {
        writeln!(text, "  created     {created}")?;
    }
    Ok(())
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

const ROW_CELLS: usize = 48;

fn row_map(reports: &[Report]) -> Table {
    let mut table = Table::new(["concept".to_owned(), "m".to_owned(), format!("{:<ROW_CELLS$}", "rows")]);
    for report in reports {
        for (&outputs, ranges) in &report.rows {
            let cell = |c: usize| {
                // Rows [start, end) of this cell, at least one.
                let start = c * outputs / ROW_CELLS;
                let end = ((c + 1) * outputs / ROW_CELLS).max(start + 1);
                let overlap = |&(a, b): &(u32, u32)| end.min(b as usize + 1).saturating_sub(start.max(a as usize));
                match ranges.iter().map(overlap).sum::<usize>() {
                    0 => '.',
                    n if n == end - start => '#',
                    _ => '+',
                }
            };
            let cells: String = (0..ROW_CELLS).map(cell).collect();
            table.row([report.manifest.name.clone(), outputs.to_string(), cells]);
        }
    }
    table
}

fn pair_table(reports: &[Report], overall: &Conflicts) -> Table {
    let mut table = Table::new(["concepts", "cosine", "sign conflicts", "shared rows", "note"]);
    for pair in &overall.pairs {
        let [a, b] = [pair.one, pair.other].map(|i| &reports[i].manifest);
        let note = if a.base.digest != b.base.digest { "different base models" } else { "" };
        table.row([
            format!("{} {}", a.name, b.name),
            format!("{:.4}", pair.cosine),
            format!("{:.2} %", 100.0 * pair.sign_conflicts),
            pair.shared_rows.to_string(),
            note.to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn rows_become_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), [(0, 2), (5, 5), (7, 8)]);
        assert!(ranges(&[]).is_empty());
    }
}
