//! What is merged into the live weights, and which rows another composition changes.

use std::ops::Range;
use std::sync::Arc;

use super::adapter::{Owned, Placed};
use super::strategy::{AdapterView, Coefficients, LayerInfo, LayerPlan, MergeStrategy, Plan, Term, Tile};
use crate::error::{Error, Result};

/// Adapters in canonical order and a checked plan for them. The default is the pristine model.
#[derive(Clone, Default)]
pub(super) struct Composition {
    adapters: Vec<Placed>,
    /// By layer, terms ordered by adapter; shorter than the model's layers only where nothing is merged.
    plan: Plan,
    /// Fills the dense layers.
    strategy: Option<Arc<dyn MergeStrategy>>,
}

impl std::fmt::Debug for Composition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Composition").field("adapters", &self.adapters).field("plan", &self.plan).finish()
    }
}

/// One summand of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RowTerm {
    /// Index of the adapter in the composition.
    pub adapter: u32,
    /// Index of the row among the adapter's own.
    pub local: u32,
    /// c_ip, not 0.
    pub coefficient: f32,
}

/// Some rows of one layer.
#[derive(Debug)]
pub(super) struct Marked {
    flags: Vec<bool>,
    count: usize,
    first: usize,
    last: usize,
}

impl Marked {
    fn none_of(rows: usize) -> Self {
        Self { flags: vec![false; rows], count: 0, first: rows, last: 0 }
    }
    /// Every one of `rows` rows.
    fn all_of(rows: usize) -> Self {
        Self { flags: vec![true; rows], count: rows, first: 0, last: rows.saturating_sub(1) }
    }
    fn mark(&mut self, row: u32) {
        let row = row as usize;
        self.count += usize::from(!self.flags[row]);
        self.flags[row] = true;
        self.first = self.first.min(row);
        self.last = self.last.max(row);
    }
    fn mark_all(&mut self, rows: &Owned<'_>) {
        match rows {
            Owned::Scattered(rows) => rows.iter().for_each(|&row| self.mark(row)),
            Owned::Block(rows) if rows.is_empty() => {}
            Owned::Block(rows) => {
                let (first, end) = (rows.start as usize, rows.end as usize);
                let flags = &mut self.flags[first..end];
                self.count += flags.iter().filter(|flag| !**flag).count();
                flags.fill(true);
                self.first = self.first.min(first);
                self.last = self.last.max(end - 1);
            }
        }
    }
    /// The lowest row.
    pub fn first(&self) -> usize {
        self.first
    }
    /// Marks all rows between the lowest and the highest, too.
    pub fn fill(&mut self) {
        self.flags[self.first..=self.last].fill(true);
        self.count = self.last + 1 - self.first;
    }
    /// Runs of neighbouring rows: the first of each, and how many.
    pub fn runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for row in self.rows().map(|row| row as usize) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == row => *count += 1,
                _ => runs.push((row, 1)),
            }
        }
        runs
    }
    fn rows(&self) -> impl Iterator<Item = u32> {
        (self.first..=self.last).filter(|&row| self.flags[row]).map(|row| row as u32)
    }
}

/// Some rows of one layer and the summands of each.
#[derive(Debug)]
pub(super) struct RowTerms {
    /// Output rows, ordered so that rows of equal adapters lie together.
    pub rows: Vec<u32>,
    /// Where each row's terms start, and where the last one's end.
    starts: Vec<u32>,
    terms: Vec<RowTerm>,
}

impl RowTerms {
    /// The summands of the `index`-th of `rows`, in canonical order.
    pub fn of(&self, index: usize) -> &[RowTerm] {
        &self.terms[self.starts[index] as usize..self.starts[index + 1] as usize]
    }
    /// The terms of all rows.
    pub fn all(&self) -> &[RowTerm] {
        &self.terms
    }
    /// Whether two rows take the same adapters.
    pub fn alike(&self, one: usize, other: usize) -> bool {
        self.of(one).iter().map(|term| term.adapter).eq(self.of(other).iter().map(|term| term.adapter))
    }

    /// Rows that take at most one adapter each, `found` by adapter and row.
    fn disjoint(marked: &Marked, owned: &[u32], found: Vec<(u32, RowTerm)>) -> Self {
        let mut rows = Vec::with_capacity(marked.count);
        if found.len() < marked.count {
            rows.extend(marked.rows().filter(|&row| owned[row as usize - marked.first] == 0));
        }
        let mut starts = vec![0; rows.len()];
        starts.extend(0..=found.len() as u32);
        rows.extend(found.iter().map(|(row, _)| row));
        Self { rows, starts, terms: found.into_iter().map(|(_, term)| term).collect() }
    }

    /// Rows that take any number of adapters, `owned` of each; `found` by adapter and row.
    fn overlapping(marked: &Marked, owned: &[u32], found: Vec<(u32, RowTerm)>) -> Self {
        // Where each row's terms go when rows ascend; a stable counting sort keeps the canonical order.
        let mut next: Vec<usize> = vec![0; owned.len() + 1];
        for (row, &count) in owned.iter().enumerate() {
            next[row + 1] = next[row] + count as usize;
        }
        let mut sorted = vec![RowTerm { adapter: 0, local: 0, coefficient: 0.0 }; found.len()];
        for (row, term) in found {
            let at = &mut next[row as usize - marked.first];
            sorted[*at] = term;
            *at += 1;
        }
        // `next` is now where each row's terms end.
        let of = |row: u32| {
            let row = row as usize - marked.first;
            &sorted[next[row] - owned[row] as usize..next[row]]
        };
        let mut rows: Vec<u32> = marked.rows().collect();
        rows.sort_by(|&one, &other| of(one).iter().map(|t| t.adapter).cmp(of(other).iter().map(|t| t.adapter)));
        let (mut starts, mut terms) = (vec![0], Vec::with_capacity(sorted.len()));
        for &row in &rows {
            terms.extend_from_slice(of(row));
            starts.push(terms.len() as u32);
        }
        Self { rows, starts, terms }
    }
}

impl Composition {
    /// `adapters` in canonical order with a strategy's plan, after checking all that a plan may get wrong.
    pub fn new(
        strategy: Arc<dyn MergeStrategy>,
        layers: &[LayerInfo],
        adapters: Vec<Placed>,
        mut plan: Plan,
    ) -> Result<Self> {
        let wrong =
            |layer: &str, reason: String| Error::faulty_method(strategy.id(), format!("its plan: {layer}{reason}"));
        if plan.len() != layers.len() {
            return Err(wrong("", format!("it has {} layers, the model has {}", plan.len(), layers.len())));
        }
        for (index, (layer_plan, layer)) in plan.iter_mut().zip(layers).enumerate() {
            let LayerPlan::Factored(terms) = layer_plan else { continue };
            let wrong = |reason| wrong(&format!("layer {:?}: ", layer.name), reason);
            terms.sort_by_key(|term| term.adapter);
            if let Some(term) = terms.iter().find(|term| term.adapter >= adapters.len()) {
                return Err(wrong(format!("there is no adapter {}", term.adapter)));
            }
            if let Some(pair) = terms.windows(2).find(|pair| pair[0].adapter == pair[1].adapter) {
                return Err(wrong(format!("it adds adapter {} twice", pair[0].adapter)));
            }
            for Term { adapter, coefficients } in terms.iter() {
                let placed = &adapters[*adapter];
                let name = placed.factors.name();
                let Some(found) = placed.layer(index) else {
                    return Err(wrong(format!("adapter {name:?} does not change this layer")));
                };
                let values = match coefficients {
                    Coefficients::Uniform(c) => std::slice::from_ref(c),
                    Coefficients::PerRow(values) => {
                        if values.len() != found.rows.len() {
                            let (got, rows) = (values.len(), found.rows.len());
                            return Err(wrong(format!("{got} coefficients for the {rows} rows of {name:?}")));
                        }
                        values
                    }
                };
                if let Some(c) = values.iter().find(|c| !c.is_finite()) {
                    return Err(wrong(format!("the coefficient of {name:?} is {c}; it must be finite")));
                }
            }
        }
        Ok(Self { adapters, plan, strategy: Some(strategy) })
    }

    /// The adapters, in canonical order.
    pub fn adapters(&self) -> &[Placed] {
        &self.adapters
    }

    fn terms(&self, layer: usize) -> &[Term] {
        match self.plan.get(layer) {
            Some(LayerPlan::Factored(terms)) => terms,
            _ => &[],
        }
    }

    fn numbers(&self, layer: usize) -> Option<&Arc<[f32]>> {
        match self.plan.get(layer) {
            Some(LayerPlan::Dense(numbers)) => Some(numbers),
            _ => None,
        }
    }

    /// The id of the strategy that planned it.
    pub(super) fn strategy_id(&self) -> &str {
        self.strategy.as_ref().map_or("none", |strategy| strategy.id())
    }

    /// Whether the strategy computes this layer's change itself.
    pub fn is_dense(&self, layer: usize) -> bool {
        self.numbers(layer).is_some()
    }

    /// Has the strategy write the change of some rows of a dense layer.
    pub fn fill(&self, index: usize, layer: &LayerInfo, first_row: usize, delta: &mut [f32]) -> Result<()> {
        let (Some(strategy), Some(numbers)) = (&self.strategy, self.numbers(index)) else { return Ok(()) };
        let adapters: Vec<&dyn AdapterView> = self.adapters.iter().map(|placed| placed as &dyn AdapterView).collect();
        let rows = delta.len() / layer.columns;
        strategy.fill(Tile { index, layer, adapters: &adapters, numbers, first_row, rows }, delta)
    }

    /// Whether a dense layer is the same in `other`: the strategy, its numbers, and the adapters with their weights.
    fn is_same_dense(&self, other: &Self, same: &[Option<usize>], layer: usize) -> bool {
        let fingerprint = |composition: &Self| composition.strategy.as_ref().map(|s| s.fingerprint().to_owned());
        self.numbers(layer) == other.numbers(layer)
            && fingerprint(self) == fingerprint(other)
            && self.adapters.len() == other.adapters.len()
            && self.adapters.iter().zip(same).all(|(mine, there)| {
                there.is_some_and(|there| other.adapters[there].weight.to_bits() == mine.weight.to_bits())
            })
    }

    /// For each adapter here the index of the same one (by digest and scale) in `other`.
    pub fn same_in(&self, other: &Self) -> Vec<Option<usize>> {
        let same = |mine: &Placed, theirs: &Placed| {
            mine.factors.digest() == theirs.factors.digest()
                && mine.factors.scale().to_bits() == theirs.factors.scale().to_bits()
        };
        self.adapters.iter().map(|mine| other.adapters.iter().position(|theirs| same(mine, theirs))).collect()
    }

    /// Which of `rows` rows of `layer` have other terms in `old` than here; `same` is `self.same_in(old)`.
    /// None if no row does.
    pub fn changed_rows(&self, old: &Self, same: &[Option<usize>], layer: usize, rows: usize) -> Option<Marked> {
        if self.is_dense(layer) || old.is_dense(layer) {
            return (!self.is_same_dense(old, same, layer)).then(|| Marked::all_of(rows));
        }
        let (new_terms, old_terms) = (self.terms(layer), old.terms(layer));
        let mut changed = Marked::none_of(rows);
        // Marks the rows whose coefficient differs from the one before; without one before, those that have one.
        let mut mark = |placed: &Placed, now: &Coefficients, before: Option<&Coefficients>| match (
            now,
            before.unwrap_or(&Coefficients::Uniform(0.0)),
        ) {
            (Coefficients::Uniform(now), Coefficients::Uniform(before)) => {
                if (now + 0.0).to_bits() != (before + 0.0).to_bits() {
                    changed.mark_all(&placed.owned(layer));
                }
            }
            (now, before) => {
                let owned = placed.owned(layer);
                let differs =
                    |&local: &usize| coefficient(now, local).to_bits() != coefficient(before, local).to_bits();
                (0..owned.len()).filter(differs).for_each(|local| changed.mark(owned.row(local)));
            }
        };
        let mut stays = vec![false; old_terms.len()];
        for term in new_terms {
            let before = same[term.adapter].and_then(|there| position(old_terms, there));
            if let Some(before) = before {
                stays[before] = true;
            }
            let before = before.map(|before| &old_terms[before].coefficients);
            mark(&self.adapters[term.adapter], &term.coefficients, before);
        }
        for (term, _) in old_terms.iter().zip(stays).filter(|(_, stays)| !stays) {
            mark(&old.adapters[term.adapter], &term.coefficients, None);
        }
        (changed.count > 0).then_some(changed)
    }

    /// Between which rows of `layer` the live weight may have other bits than the file; all others have the file's, if
    /// this is what is merged and the types are the same. None where any row may.
    pub fn merged_rows(&self, layer: usize) -> Option<Vec<Range<u32>>> {
        let spans = self.terms(layer).iter().map(|term| self.adapters[term.adapter].span(layer));
        (!self.is_dense(layer)).then(|| spans.collect())
    }

    /// The terms of those rows of `layer` that are marked, of which there must be one.
    pub fn row_terms(&self, layer: usize, marked: &Marked) -> RowTerms {
        let mut owned = vec![0; (marked.last + 1).saturating_sub(marked.first)];
        let mut found = Vec::with_capacity(marked.count);
        for Term { adapter, coefficients } in self.terms(layer) {
            let placed = &self.adapters[*adapter];
            let rows = placed.owned(layer);
            for local in rows.within(marked.first as u32..marked.last as u32 + 1) {
                let (row, c) = (rows.row(local), coefficient(coefficients, local));
                if marked.flags[row as usize] && c != 0.0 {
                    owned[row as usize - marked.first] += 1;
                    found.push((row, RowTerm { adapter: *adapter as u32, local: local as u32, coefficient: c }));
                }
            }
        }
        let is_disjoint = owned.iter().all(|&count: &u32| count <= 1);
        let arrange = if is_disjoint { RowTerms::disjoint } else { RowTerms::overlapping };
        arrange(marked, &owned, found)
    }
}

/// Which of `terms`, which are ordered by adapter, is that of `adapter`. Most often every adapter has one.
fn position(terms: &[Term], adapter: usize) -> Option<usize> {
    match terms.get(adapter) {
        Some(term) if term.adapter == adapter => Some(adapter),
        _ => terms.binary_search_by_key(&adapter, |term| term.adapter).ok(),
    }
}

/// The coefficient of an adapter's `local`-th row; minus zero is zero.
fn coefficient(coefficients: &Coefficients, local: usize) -> f32 {
    match coefficients {
        Coefficients::Uniform(c) => *c + 0.0,
        Coefficients::PerRow(values) => values[local] + 0.0,
    }
}
