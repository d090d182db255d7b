//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! A number is a pure function of (seed, stream, step, index), so that checkpointing, resuming and another device
//! replay the same numbers without any state to save.

/// What a stream of numbers is for; streams never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Stream {
    /// Initial latents of image `step`.
    Latents = 1,
    /// Noise that ancestral samplers add at `step`.
    Sampler = 2,
    /// Start values of an adapter's factors and tokens.
    Init = 3,
    /// Which pictures, captions, crops and templates make up training step `step`.
    Data = 4,
    /// Noise of training step `step`.
    Noise = 5,
    /// Timesteps of training step `step`.
    Timestep = 6,
    /// Erasure masks r(lambda) of training step `step`.
    Erasure = 7,
    /// The VAE posterior of training step `step`.
    Posterior = 8,
    /// Row permutations of a partition.
    Partition = 9,
    /// Random choices of merge strategies.
    Merge = 10,
    /// Pictures drawn for a trainer: the seed of picture `step`.
    Prior = 11,
    /// Made-up words of training step `step`, which an adapter learns to ignore.
    Silence = 12,
    /// Anything a test needs.
    Test = 1000,
}

/// A sequence of random numbers keyed by (seed, stream, step, lane).
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
    spare: Option<f32>,
}

impl Rng {
    /// The numbers of `stream` at `step`; `lane` tells layers, pictures or the like apart.
    pub fn new(seed: u64, stream: Stream, step: u32, lane: u16) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, 0, step, (stream as u32) << 16 | lane as u32],
            block: [0; 4],
            used: 4,
            spare: None,
        }
    }

    /// 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            let low = (self.counter[0] as u64 | (self.counter[1] as u64) << 32).wrapping_add(1);
            self.counter[0] = low as u32;
            self.counter[1] = (low >> 32) as u32;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Uniform in 0..n, without bias worth speaking of (n far below 2^32).
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next_u32() as u64 * n as u64) >> 32) as usize
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f32 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let u = (self.next_u32() as f64 + 1.0) / 4_294_967_296.0;
        let v = self.next_u32() as f64 / 4_294_967_296.0;
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        self.spare = Some((radius * angle.sin()) as f32);
        (radius * angle.cos()) as f32
    }

    /// Fills `out` with standard normals.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        out.fill_with(|| self.normal());
    }

    /// `n` standard normals.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Shuffles `items` (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

fn philox4x32_10(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = 0xD251_1F53_u64 * c[0] as u64;
        let p1 = 0xCD9E_8D57_u64 * c[2] as u64;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the Random123 distribution's kat_vectors.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    }

    #[test]
    fn normals_have_unit_variance() {
        let z = Rng::new(7, Stream::Test, 0, 0).normals(100_000);
        let mean = z.iter().sum::<f32>() / z.len() as f32;
        let variance = z.iter().map(|x| x * x).sum::<f32>() / z.len() as f32;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }

    #[test]
    fn streams_differ() {
        let first = |stream, step, lane| Rng::new(1, stream, step, lane).next_u32();
        assert_ne!(first(Stream::Noise, 0, 0), first(Stream::Erasure, 0, 0));
        assert_ne!(first(Stream::Noise, 0, 0), first(Stream::Noise, 1, 0));
        assert_ne!(first(Stream::Noise, 0, 0), first(Stream::Noise, 0, 1));
    }
}
