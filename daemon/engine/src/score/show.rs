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
/// Elements of a latent channel that are shown at a time, if one picture has no more.
const LATENTS_TOGETHER: usize = 1024;

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
    // Small pictures together, large ones, of which several would not fit, one by one.
    let together = (LATENTS_TOGETHER / (height * width).max(1)).clamp(1, 16);
    for (chunk, pictures) in pictures.chunks(together).enumerate() {
        let (mut noised, mut timesteps, mut captions) = (Vec::new(), Vec::new(), Vec::new());
        for (k, (picture, caption)) in pictures.iter().enumerate() {
            let picture = picture.resized(width * factor, height * factor, Filter::Bicubic)?;
            let pixels = Tensor::from_vec(picture.to_chw(), (1, 3, height * factor, width * factor), model.device())?;
            let z = (model.vae().encode(&pixels)?.0 * model.vae().scaling_factor())?;
            for t in TIMESTEPS {
                let alphas = &model.schedule().alphas_cumprod;
                let alpha = f64::from(*alphas.get(t).ok_or_else(|| {
                    Error::option("timestep", t, format!("the model's schedule has {} steps", alphas.len()))
                })?);
                let seed = chunk * together + k;
                let noise = Rng::new(seed as u64, Stream::Noise, t as u32, 0).normals(channels * height * width);
                let noise = Tensor::from_vec(noise, z.shape(), model.device())?;
                noised.push(((&z * alpha.sqrt())? + (noise * (1.0 - alpha).sqrt())?)?);
                timesteps.push(t as f32);
                captions.push(caption.as_str());
            }
        }
        let context = text::encode(model, &captions, concepts, &with)?;
        model.unet().forward(&Tensor::cat(&noised, 0)?, &timesteps, &context, &with)?;
    }
    Ok(())
}
