//! The orthogonal matrix that all concepts share.

use blocklora_sdk::rng::{Rng, Stream};

/// A random orthogonal n x n matrix, of which rows are computed when they are asked for: the product of Householder
/// reflections of Gaussian vectors, distributed uniformly up to the signs of rows (Stewart, "The efficient generation of
/// random orthogonal matrices", SIAM Journal on Numerical Analysis 17, 1980). Seed and n determine every bit.
pub struct Basis {
    seed: u64,
    n: usize,
    /// Unit vectors; number j spans the coordinates j..n.
    reflections: Vec<Vec<f64>>,
}

impl Basis {
    /// The matrix of this width and seed.
    pub fn new(seed: u64, n: usize) -> Self {
        Self { seed, n, reflections: Vec::new() }
    }

    /// Row `i`, below n: e_i H_i H_(i-1) ... H_0, since later reflections leave e_i as it is.
    pub fn row(&mut self, i: usize) -> Vec<f32> {
        while self.reflections.len() <= i {
            self.reflections.push(reflection(self.seed, self.n, self.reflections.len()));
        }
        let mut row = vec![0.0; self.n];
        row[i] = 1.0;
        for (j, u) in self.reflections[..=i].iter().enumerate().rev() {
            let tail = &mut row[j..];
            let twice: f64 = 2.0 * tail.iter().zip(u).map(|(x, u)| x * u).sum::<f64>();
            tail.iter_mut().zip(u).for_each(|(x, u)| *x -= twice * u);
        }
        row.into_iter().map(|x| x as f32).collect()
    }
}

/// The unit vector of reflection `j`: x + sign(x_0) |x| e_0 of a Gaussian x, normalised.
fn reflection(seed: u64, n: usize, j: usize) -> Vec<f64> {
    let gaussian = Rng::new(seed, Stream::Init, n as u32, j as u16).normals(n - j);
    let mut u: Vec<f64> = gaussian.into_iter().map(f64::from).collect();
    let norm = |u: &[f64]| u.iter().map(|x| x * x).sum::<f64>().sqrt();
    u[0] += norm(&u).copysign(u[0]);
    let length = norm(&u);
    u.iter_mut().for_each(|x| *x /= length);
    u
}
