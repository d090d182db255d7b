//! Symmetric positive definite systems, in f64.

/// L of M = L L^T, [n, n], row-major, lower triangle; M's upper triangle is not looked at. `None` where M is not
/// positive definite.
pub fn cholesky(mut m: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for i in 0..n {
        let (above, row) = m.split_at_mut(i * n);
        for j in 0..i {
            let other = &above[j * n..][..=j];
            row[j] = (row[j] - dot(&row[..j], &other[..j])) / other[j];
        }
        let square = row[i] - dot(&row[..i], &row[..i]);
        // Also what is not a number.
        if !(square > 0.0 && square.is_finite()) {
            return None;
        }
        row[i] = square.sqrt();
    }
    Some(m)
}

/// Makes b [n] the x of L L^T x = b.
pub fn solve(l: &[f64], b: &mut [f64]) {
    let n = b.len();
    for i in 0..n {
        b[i] = (b[i] - dot(&l[i * n..][..i], &b[..i])) / l[i * n + i];
    }
    for i in (0..n).rev() {
        b[i] /= l[i * n + i];
        let (x, row) = (b[i], &l[i * n..][..i]);
        b[..i].iter_mut().zip(row).for_each(|(b, l)| *b -= l * x);
    }
}

/// In eight sums, which the compiler keeps in vectors.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f64 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for k in 0..8 {
            sums[k] += x[k] * y[k];
        }
    }
    rest + sums.iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::rng::{Rng, Stream};

    #[test]
    fn a_system_is_solved() {
        for n in [1, 2, 7, 8, 9, 37] {
            let mut rng = Rng::new(n as u64, Stream::Init, 0, 0);
            let root: Vec<f64> = (0..n * n).map(|_| f64::from(rng.normal())).collect();
            let product = |i: usize, j: usize| (0..n).map(|k| root[i * n + k] * root[j * n + k]).sum::<f64>();
            let m: Vec<f64> = (0..n * n).map(|e| product(e / n, e % n) + f64::from(u8::from(e / n == e % n))).collect();
            let x: Vec<f64> = (0..n).map(|_| f64::from(rng.normal())).collect();
            let mut b: Vec<f64> = (0..n).map(|i| (0..n).map(|j| m[i * n + j] * x[j]).sum()).collect();
            solve(&cholesky(m, n).unwrap(), &mut b);
            for (found, wanted) in b.iter().zip(&x) {
                assert!((found - wanted).abs() < 1e-9, "{n}: {found} for {wanted}");
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_is_refused() {
        assert_eq!(cholesky(vec![1.0, 0.0, 2.0, 1.0], 2), None);
        assert_eq!(cholesky(vec![f64::NAN], 1), None);
        assert_eq!(cholesky(vec![0.0], 1), None);
    }
}
