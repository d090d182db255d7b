//! What is merged into the live weights, and which rows another composition changes.

use super::adapter::Placed;
use super::strategy::{Coefficients, LayerInfo, Plan, Term};
use crate::error::{Error, Result};

/// Adapters in canonical order and a checked plan for them. The default is the pristine model.
#[derive(Clone, Debug, Default)]
pub(super) struct Composition {
    adapters: Vec<Placed>,
    /// By layer, ordered by adapter; shorter than the model's layers only where nothing is merged.
    plan: Plan,
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

/// Some rows of one layer and the summands of each.
#[derive(Debug, Default)]
pub(super) struct RowTerms {
    /// Output rows, ordered so that rows of equal adapters lie together.
    pub rows: Vec<u32>,
    starts: Vec<u32>,
    terms: Vec<RowTerm>,
    order: Vec<u32>,
}

impl RowTerms {
    /// The summands of the `index`-th of `rows`, in canonical order.
    pub fn of(&self, index: usize) -> &[RowTerm] {
        let at = self.order[index] as usize;
        &self.terms[self.starts[at] as usize..self.starts[at + 1] as usize]
    }
    /// Whether two rows take the same adapters.
    pub fn alike(&self, one: usize, other: usize) -> bool {
        self.of(one).iter().map(|term| term.adapter).eq(self.of(other).iter().map(|term| term.adapter))
    }
}

impl Composition {
    /// `adapters` in canonical order with a strategy's plan, after checking all that a plan may get wrong.
    pub fn new(strategy: &str, layers: &[LayerInfo], adapters: Vec<Placed>, mut plan: Plan) -> Result<Self> {
        let wrong =
            |layer: &str, reason: String| Error::option("plan of strategy", strategy, format!("{layer}{reason}"));
        if plan.len() != layers.len() {
            return Err(wrong("", format!("it has {} layers, the model has {}", plan.len(), layers.len())));
        }
        for (index, (terms, layer)) in plan.iter_mut().zip(layers).enumerate() {
            let wrong = |reason| wrong(&format!("layer {:?}: ", layer.name), reason);
            terms.sort_by_key(|term| term.adapter);
            if let Some(pair) = terms.windows(2).find(|pair| pair[0].adapter == pair[1].adapter) {
                return Err(wrong(format!("it adds adapter {} twice", pair[0].adapter)));
            }
            for Term { adapter, coefficients } in terms.iter() {
                let placed = adapters.get(*adapter).ok_or_else(|| wrong(format!("there is no adapter {adapter}")))?;
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
        Ok(Self { adapters, plan })
    }

    /// The adapters, in canonical order.
    pub fn adapters(&self) -> &[Placed] {
        &self.adapters
    }

    fn terms(&self, layer: usize) -> &[Term] {
        self.plan.get(layer).map_or(&[], Vec::as_slice)
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
    pub fn changed_rows(&self, old: &Self, same: &[Option<usize>], layer: usize, rows: usize) -> Option<Vec<bool>> {
        let (new_terms, old_terms) = (self.terms(layer), old.terms(layer));
        let mut changed = vec![false; rows];
        let mut any = false;
        let mut mark = |placed: &Placed, differs: &dyn Fn(usize) -> bool| {
            for (local, &row) in placed.layer(layer).map_or(&[][..], |found| &found.rows).iter().enumerate() {
                if differs(local) {
                    changed[row as usize] = true;
                    any = true;
                }
            }
        };
        for term in new_terms {
            let before = same[term.adapter].and_then(|there| old_terms.iter().find(|t| t.adapter == there));
            match before.map(|before| &before.coefficients) {
                Some(before) if *before == term.coefficients => {}
                Some(before) => mark(&self.adapters[term.adapter], &|local| {
                    coefficient(before, local).to_bits() != coefficient(&term.coefficients, local).to_bits()
                }),
                None => mark(&self.adapters[term.adapter], &|local| coefficient(&term.coefficients, local) != 0.0),
            }
        }
        for term in old_terms {
            let stays = new_terms.iter().any(|new| same[new.adapter] == Some(term.adapter));
            if !stays {
                mark(&old.adapters[term.adapter], &|local| coefficient(&term.coefficients, local) != 0.0);
            }
        }
        any.then_some(changed)
    }

    /// The terms of those rows of `layer` that are marked.
    pub fn row_terms(&self, layer: usize, marked: &[bool]) -> RowTerms {
        // Counting sort: the position of each marked row, then how many terms each has, then the terms in place.
        let mut rows = Vec::new();
        let mut position = vec![u32::MAX; marked.len()];
        for (row, _) in marked.iter().enumerate().filter(|(_, marked)| **marked) {
            position[row] = rows.len() as u32;
            rows.push(row as u32);
        }
        let mut starts = vec![0; rows.len() + 1];
        self.for_each_term(layer, &position, |at, _| starts[at + 1] += 1);
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let total = starts[rows.len()] as usize;
        let mut next = starts.clone();
        let mut terms = vec![RowTerm { adapter: 0, local: 0, coefficient: 0.0 }; total];
        self.for_each_term(layer, &position, |at, term| {
            terms[next[at] as usize] = term;
            next[at] += 1;
        });
        let of = |at: u32| &terms[starts[at as usize] as usize..starts[at as usize + 1] as usize];
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_by(|&one, &other| of(one).iter().map(|t| t.adapter).cmp(of(other).iter().map(|t| t.adapter)));
        let rows = order.iter().map(|&at| rows[at as usize]).collect();
        RowTerms { rows, starts, terms, order }
    }

    fn for_each_term(&self, layer: usize, position: &[u32], mut each: impl FnMut(usize, RowTerm)) {
        for term in self.terms(layer) {
            let rows = self.adapters[term.adapter].layer(layer).map_or(&[][..], |found| &found.rows);
            for (local, &row) in rows.iter().enumerate() {
                let (at, c) = (position[row as usize], coefficient(&term.coefficients, local));
                if at != u32::MAX && c != 0.0 {
                    each(at as usize, RowTerm { adapter: term.adapter as u32, local: local as u32, coefficient: c });
                }
            }
        }
    }
}

/// The coefficient of an adapter's `local`-th row; minus zero is zero.
fn coefficient(coefficients: &Coefficients, local: usize) -> f32 {
    match coefficients {
        Coefficients::Uniform(c) => *c + 0.0,
        Coefficients::PerRow(values) => values[local] + 0.0,
    }
}
