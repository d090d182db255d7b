//! The plot of `inspect`: row map, norms, cosines and sign conflicts, as SVG.

use std::fmt::Write as _;

use blocklora_engine::merge::conflicts::{Conflicts, Pair};

use crate::inspect::Report;

const MARGIN: f64 = 16.0;
const LINE: f64 = 16.0;
const MAP_WIDTH: f64 = 640.0;
const CELL: f64 = 34.0;

/// An SVG being written.
struct Svg {
    body: String,
    width: f64,
    y: f64,
}

impl Svg {
    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        self.width = self.width.max(x + MARGIN);
        // Writing to a String cannot fail.
        let _ = writeln!(self.body, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text));
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.width = self.width.max(x + width + MARGIN);
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.2}" y="{y:.2}" width="{width:.2}" height="{height:.2}" fill="{fill}"/>"#
        );
    }

    fn heading(&mut self, text: &str) {
        self.y += 1.5 * LINE;
        let _ = writeln!(
            self.body,
            r#"<text x="{MARGIN}" y="{:.1}" font-weight="bold" font-size="14">{}</text>"#,
            self.y,
            escape(text)
        );
        self.y += 0.6 * LINE;
    }
}

/// The whole plot.
pub fn svg(reports: &[Report], overall: &Conflicts) -> String {
    let longest = reports.iter().map(|r| r.manifest.name.chars().count()).max().unwrap_or(0);
    let labels = MARGIN + 7.5 * longest as f64 + 8.0;
    let mut svg = Svg { body: String::new(), width: 0.0, y: MARGIN };
    row_map(&mut svg, reports, labels);
    norms(&mut svg, reports, labels);
    if reports.len() > 1 {
        matrix(&mut svg, reports, labels, "Cosine between changes", |i, j| {
            if i == j { Some(1.0) } else { find(&overall.pairs, i, j).map(|p| p.cosine) }
        });
        matrix(&mut svg, reports, labels, "Share of weights pulled in opposite directions", |i, j| {
            if i == j { Some(0.0) } else { find(&overall.pairs, i, j).map(|p| p.sign_conflicts) }
        });
    }
    let (width, height) = (svg.width, svg.y + MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{}</svg>\n",
        svg.body
    )
}

/// One strip per width and concept, from row 0 to row m, owned rows in the concept's colour.
fn row_map(svg: &mut Svg, reports: &[Report], labels: f64) {
    let mut widths: Vec<usize> = reports.iter().flat_map(|r| r.rows.keys().copied()).collect();
    widths.sort_unstable();
    widths.dedup();
    for outputs in widths {
        svg.heading(&format!("Owned rows of layers with {outputs} outputs"));
        for (i, report) in reports.iter().enumerate() {
            svg.text(labels - 8.0, svg.y + 12.0, "end", &report.manifest.name);
            svg.rect(labels, svg.y + 2.0, MAP_WIDTH, LINE - 4.0, "#eeeeee");
            let scale = MAP_WIDTH / outputs as f64;
            for &(first, last) in report.rows.get(&outputs).into_iter().flatten() {
                let (x, width) = (f64::from(first) * scale, f64::from(last - first + 1) * scale);
                svg.rect(labels + x, svg.y + 2.0, width, LINE - 4.0, &colour(i, reports.len()));
            }
            svg.y += LINE;
        }
    }
}

/// A bar per concept: the norm of its change.
fn norms(svg: &mut Svg, reports: &[Report], labels: f64) {
    let largest = reports.iter().map(|r| r.norm).fold(f64::MIN_POSITIVE, f64::max);
    svg.heading("Norm of the change");
    for (i, report) in reports.iter().enumerate() {
        let width = (MAP_WIDTH - 60.0) * report.norm / largest;
        svg.text(labels - 8.0, svg.y + 12.0, "end", &report.manifest.name);
        svg.rect(labels, svg.y + 2.0, width, LINE - 4.0, &colour(i, reports.len()));
        svg.text(labels + width + 6.0, svg.y + 12.0, "start", &format!("{:.3}", report.norm));
        svg.y += LINE;
    }
}

/// A heat map: white is 0, blue positive, red negative, full at 1.
fn matrix(svg: &mut Svg, reports: &[Report], labels: f64, title: &str, value: impl Fn(usize, usize) -> Option<f64>) {
    svg.heading(title);
    for (i, report) in reports.iter().enumerate() {
        svg.text(labels - 8.0, svg.y + 0.65 * CELL, "end", &report.manifest.name);
        for j in 0..reports.len() {
            let value = value(i, j).unwrap_or(0.0);
            let x = labels + CELL * j as f64;
            svg.rect(x, svg.y, CELL - 1.0, CELL - 1.0, &heat(value));
            svg.text(x + 0.5 * CELL, svg.y + 0.62 * CELL, "middle", &format!("{value:.2}"));
        }
        svg.y += CELL;
    }
}

fn find(pairs: &[Pair], i: usize, j: usize) -> Option<&Pair> {
    pairs.iter().find(|p| (p.one, p.other) == (i.min(j), i.max(j)))
}

fn colour(index: usize, count: usize) -> String {
    format!("hsl({:.0},65%,50%)", 360.0 * index as f64 / count.max(1) as f64)
}

fn heat(value: f64) -> String {
    let hue = if value < 0.0 { 0 } else { 215 };
    format!("hsl({hue},80%,{:.0}%)", 100.0 - 45.0 * value.abs().min(1.0))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
