//! Showing pictures to the model, for those who look at what enters its layers meanwhile.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::image::{Filter, Picture};
use crate::model::Model;
use crate::nn::{Forward, Recorder};
use crate::rng::{Rng, Stream};
use crate::text::{self, Concept};

/// Noise levels at which pictures are shown to the UNet.
const TIMESTEPS: [usize; 3] = [200, 500, 800];

/// Has the UNet see `pictures` at three noise levels under their captions, which may name `concepts`; `recorder` gets
/// what enters every adaptable Linear, of the text encoder, too. What is merged decides what that is.
pub(crate) fn show(
    model: &Model,
    concepts: &[Concept],
    pictures: &[(Picture, String)],
    recorder: &dyn Recorder,
) -> Result<()> {
    let with = Forward { adapters: &[], recorder: Some(recorder) };
    let (channels, height, width) = model.latent_shape();
    let factor = model.vae().downscale();
    let timesteps = TIMESTEPS.map(|t| t as f32);
    // One by one: of a large model, more would not fit.
    for (k, (picture, caption)) in pictures.iter().enumerate() {
        let picture = picture.resized(width * factor, height * factor, Filter::Bicubic)?;
        let pixels = Tensor::from_vec(picture.to_chw(), (1, 3, height * factor, width * factor), model.device())?;
        let z = (model.vae().encode(&pixels)?.0 * model.vae().scaling_factor())?;
        let mut noised = Vec::new();
        for t in TIMESTEPS {
            let alphas = &model.schedule().alphas_cumprod;
            let alpha = f64::from(*alphas.get(t).ok_or_else(|| {
                Error::option("timestep", t, format!("the model's schedule has {} steps", alphas.len()))
            })?);
            let noise = Rng::new(k as u64, Stream::Noise, t as u32, 0).normals(channels * height * width);
            let noise = Tensor::from_vec(noise, z.shape(), model.device())?;
            noised.push(((&z * alpha.sqrt())? + (noise * (1.0 - alpha).sqrt())?)?);
        }
        let context = text::encode(model, &[caption.as_str(); TIMESTEPS.len()], concepts, &with)?;
        model.unet().forward(&Tensor::cat(&noised, 0)?, &timesteps, &context, &with)?;
    }
    Ok(())
}
