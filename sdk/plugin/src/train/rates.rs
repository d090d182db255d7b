//! Learning-rate schedules.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a learning rate runs over the steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RateSchedule {
    /// From the rate to zero in a straight line (ED-LoRA).
    #[default]
    Linear,
    /// Always the rate.
    Constant,
    /// From the rate to zero along half a cosine.
    Cosine,
}

impl RateSchedule {
    /// The learning rate at `step` (from 0) of `steps`, which starts at `rate`.
    pub fn rate(self, rate: f32, step: usize, steps: usize) -> f32 {
        let part = step as f32 / steps as f32;
        match self {
            Self::Constant => rate,
            Self::Linear => rate * (1.0 - part),
            Self::Cosine => rate * 0.5 * (1.0 + (std::f32::consts::PI * part).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_at_the_rate() {
        for schedule in [RateSchedule::Linear, RateSchedule::Constant, RateSchedule::Cosine] {
            assert_eq!(schedule.rate(0.25, 0, 8), 0.25);
        }
        assert_eq!(RateSchedule::Linear.rate(0.25, 6, 8), 0.0625);
        assert_eq!(RateSchedule::Constant.rate(0.25, 7, 8), 0.25);
        assert!((RateSchedule::Cosine.rate(0.25, 4, 8) - 0.125).abs() < 1e-8);
    }
}
