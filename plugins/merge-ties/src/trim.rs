//! The k-th largest magnitude of a task vector that is too large to keep.

use blocklora_sdk::merge::{Factors, Layer};

/// Halves of a float's bits.
const HALVES: usize = 1 << 16;

/// The `k`-th largest magnitude in the deltas of `parts`, exactly; infinity for k = 0, which nothing reaches.
///
/// Floats without their sign are ordered as their bits are. So the numbers are counted by the upper half of their bits,
/// which tells the upper half of the answer's, and those that have it by the lower half.
pub fn kth_largest(parts: &[(Factors<'_>, &Layer)], k: usize) -> f32 {
    if k == 0 {
        return f32::INFINITY;
    }
    let mut counts = vec![0; HALVES];
    for_each_magnitude(parts, |bits| counts[(bits >> 16) as usize] += 1);
    let (upper, above) = bucket_of(&counts, k);
    counts.fill(0);
    for_each_magnitude(parts, |bits| {
        if bits >> 16 == upper {
            counts[(bits & 0xffff) as usize] += 1;
        }
    });
    let (lower, _) = bucket_of(&counts, k - above);
    f32::from_bits(upper << 16 | lower)
}

/// The bucket that holds the `k`-th largest number, and how many numbers lie in buckets above it.
fn bucket_of(counts: &[usize], k: usize) -> (u32, usize) {
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if above + count >= k {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, 0) // there are fewer than k numbers: all stay
}

/// Calls `f` with the bits of the magnitude of every number. Rows that an adapter does not own are zeros.
fn for_each_magnitude(parts: &[(Factors<'_>, &Layer)], mut f: impl FnMut(u32)) {
    for (factors, layer) in parts {
        let mut delta = vec![0.0; layer.columns];
        for &row in factors.rows {
            delta.fill(0.0);
            factors.add_delta(1.0, row as usize..row as usize + 1, &mut delta);
            delta.iter().for_each(|x| f(x.abs().to_bits()));
        }
        (0..(layer.rows - factors.rows.len()) * layer.columns).for_each(|_| f(0));
    }
}
