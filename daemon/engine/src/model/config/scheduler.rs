//! `scheduler/scheduler_config.json`: the noise schedule of training, whichever sampler it names.

use std::path::Path;

use super::Fields;
use crate::error::Result;
use crate::sample::{NoiseSchedule, TimestepSpacing};

/// What the UNet predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise eps.
    Epsilon,
    /// v = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) z_0 (Salimans and Ho, arXiv 2202.00512).
    VPrediction,
}

/// The training schedule and target.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// The schedule.
    pub schedule: NoiseSchedule,
    /// The UNet's target.
    pub prediction: Prediction,
}

impl SchedulerConfig {
    /// Reads `scheduler/scheduler_config.json`. Which sampler it names does not matter, as any can be chosen; what
    /// the model was trained with does.
    pub fn open(path: &Path) -> Result<Self> {
        let mut fields = Fields::open(path)?;
        let class: String = fields.or("_class_name", String::new())?;
        let timesteps = fields.size_or("num_train_timesteps", 1000)?;
        if timesteps > 100_000 {
            return Err(fields.invalid("num_train_timesteps", format!("{timesteps} is above 100000")));
        }
        let start = fields.number_or("beta_start", 1e-4)?;
        let end = fields.number_or("beta_end", 0.02)?;
        let trained: Option<Vec<f64>> = fields.take("trained_betas")?;
        let schedule: String = fields.or("beta_schedule", "linear".into())?;
        let made = match (trained, schedule.as_str()) {
            (Some(betas), _) if betas.len() != timesteps => {
                let reason = format!("{} values for {timesteps} timesteps", betas.len());
                return Err(fields.invalid("trained_betas", reason));
            }
            (Some(betas), _) => NoiseSchedule::from_betas(&betas),
            (None, "linear") => NoiseSchedule::linear(start, end, timesteps),
            (None, "scaled_linear") => NoiseSchedule::scaled_linear(start, end, timesteps),
            (None, other) => {
                return Err(fields.unsupported("beta_schedule", other, "linear and scaled_linear are"));
            }
        };
        let schedule =
            made.map_err(|error| fields.invalid("beta_start, beta_end, trained_betas", error.to_string()))?;
        let prediction = match fields.or("prediction_type", "epsilon".to_owned())?.as_str() {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::VPrediction,
            other => return Err(fields.unsupported("prediction_type", other, "epsilon and v_prediction are")),
        };
        fields.only("rescale_betas_zero_snr", false)?;
        fields.only("thresholding", false)?;
        let spacing = match fields.take::<String>("timestep_spacing")?.as_deref() {
            // As diffusers has it where a folder's scheduler is exchanged: what the folder does not say is not its
            // scheduler's own, but that of the one in its place.
            None => None,
            Some("leading") => Some(TimestepSpacing::Leading),
            Some("linspace") => Some(TimestepSpacing::Linspace),
            Some("trailing") => Some(TimestepSpacing::Trailing),
            Some(other) => {
                return Err(fields.unsupported("timestep_spacing", other, "leading, linspace and trailing are"));
            }
        };
        // These two clip the predicted picture to -1..1 unless told otherwise; no latent model is trained for that.
        let clips_by_default = matches!(class.as_str(), "DDIMScheduler" | "DDPMScheduler");
        if fields.or("clip_sample", clips_by_default)? {
            return Err(fields.unsupported("clip_sample", true, "only false"));
        }
        // Of the schedulers with this setting only one has the default true.
        let set_alpha_to_one = fields.or("set_alpha_to_one", class == "DDIMScheduler")?;
        let steps_offset: usize = fields.or("steps_offset", 0)?;
        if steps_offset >= timesteps {
            return Err(fields.invalid("steps_offset", format!("{steps_offset} is not below {timesteps}")));
        }
        Ok(Self { schedule: NoiseSchedule { steps_offset, set_alpha_to_one, spacing, ..schedule }, prediction })
    }
}
