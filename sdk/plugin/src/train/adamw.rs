//! AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019), algorithm 2, as PyTorch does it.

/// Hyper-parameters; the learning rate comes with each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Keeps the division finite.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamW {
    /// Moves `theta` against `gradient`; `m` and `v` are its moments, `step` counts from 1.
    pub fn update(&self, step: usize, rate: f32, theta: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let correction1 = 1.0 - (self.beta1 as f64).powi(step as i32);
        let correction2 = 1.0 - (self.beta2 as f64).powi(step as i32);
        let step_size = (rate as f64 / correction1) as f32;
        let root = correction2.sqrt() as f32;
        for (((theta, g), m), v) in theta.iter_mut().zip(gradient).zip(m).zip(v) {
            *theta -= rate * self.weight_decay * *theta;
            *m = self.beta1 * *m + (1.0 - self.beta1) * g;
            *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
            *theta -= step_size * *m / (v.sqrt() / root + self.eps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values from torch.optim.AdamW(lr=0.1) on f(x) = x^2 from x = 1, three steps (tests/parity/make_adamw_golden.py).
    #[test]
    fn equals_pytorch() {
        let (mut x, mut m, mut v) = ([1.0f32], [0.0], [0.0]);
        for (step, expected) in (1..).zip([0.899_000_05f32, 0.798_519_1, 0.698_911_25]) {
            let g = [2.0 * x[0]];
            AdamW::default().update(step, 0.1, &mut x, &g, &mut m, &mut v);
            assert!((x[0] - expected).abs() < 1e-6, "step {step}: {} {expected}", x[0]);
        }
    }
}
