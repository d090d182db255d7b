//! A Stable Diffusion model in memory: a diffusers folder, checked, with every Linear that adapters may change listed.

pub mod config;
mod defaults;
mod folder;
mod save;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

pub use config::Prediction;
use config::{SchedulerConfig, TextEncoderConfig, UNetConfig, VaeConfig};
pub use defaults::Defaults;
pub use folder::{Component, ModelIndex};

use crate::error::{Error, Result};
use crate::merge::strategy::LayerInfo;
use crate::nn::loader::{AdaptableLayer, Loader};
use crate::nn::{ClipTextEncoder, LayerId, UNet, Vae};
use crate::sample::NoiseSchedule;
use crate::text::Tokenizer;
use crate::weights::{WeightFile, WeightView, hex};

/// A loaded model.
#[derive(Debug)]
pub struct Model {
    dir: PathBuf,
    device: Device,
    precision: DType,
    tokenizer: Tokenizer,
    text_encoder: ClipTextEncoder,
    unet: UNet,
    vae: Vae,
    scheduler: SchedulerConfig,
    layers: Vec<AdaptableLayer>,
    infos: Vec<LayerInfo>,
    /// In the order of [`Component::ALL`].
    files: [Arc<WeightFile>; 3],
    digest: OnceLock<String>,
}

impl Model {
    /// Loads the diffusers folder `dir` with its weights stored in `precision` (f32, f16 or bf16) on `device`.
    ///
    /// Every field of the configs and every tensor of the weight files is either used or known not to matter; an
    /// error names the first that is neither, or that is missing or of another shape than the config says.
    pub fn load(dir: &Path, device: &Device, precision: DType) -> Result<Self> {
        if !matches!(precision, DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::option("precision", format!("{precision:?}"), "must be f32, f16 or bf16"));
        }
        crate::ops::keep_freed_pages();
        #[cfg(feature = "cuda")]
        crate::cuda::follow(device, precision);
        let index = ModelIndex::open(dir)?;
        if let Some(class) = index.components.get("tokenizer").filter(|class| !class.starts_with("CLIPTokenizer")) {
            return Err(Error::Unsupported {
                path: dir.join("model_index.json"),
                field: "tokenizer".into(),
                value: class.clone(),
                supported: "only CLIPTokenizer".into(),
            });
        }
        let text_config = TextEncoderConfig::open(&folder::config_file(dir, Component::TextEncoder))?;
        let unet_config = UNetConfig::open(&folder::config_file(dir, Component::UNet))?;
        let vae_config = VaeConfig::open(&folder::config_file(dir, Component::Vae))?;
        check_fit(&unet_config, &text_config, &vae_config)?;
        let scheduler = SchedulerConfig::open(&dir.join("scheduler").join("scheduler_config.json"))?;
        let tokenizer = Tokenizer::open(&dir.join("tokenizer"), &text_config)?;

        let layers = RefCell::default();
        let [text_file, unet_file, vae_file] = [
            folder::open_weights(dir, Component::TextEncoder)?,
            folder::open_weights(dir, Component::UNet)?,
            folder::open_weights(dir, Component::Vae)?,
        ];
        let loader = Loader::new(unet_file.clone(), "unet", device, precision, &layers);
        let unet = UNet::load(&loader.root(), &unet_config)?;
        loader.finish(&[])?;
        let loader = Loader::new(text_file.clone(), "text_encoder", device, precision, &layers);
        let text_encoder = ClipTextEncoder::load(&loader.root(), &text_config)?;
        loader.finish(&["text_model.embeddings.position_ids"])?;
        let loader = Loader::new(vae_file.clone(), "vae", device, precision, &layers);
        let vae = Vae::load(&loader.root(), &vae_config)?;
        loader.finish(&[])?;

        let layers: Vec<AdaptableLayer> = layers.into_inner();
        let infos = layers.iter().map(|layer| layer.info.clone()).collect();
        Ok(Self {
            dir: dir.to_owned(),
            device: device.clone(),
            precision,
            tokenizer,
            text_encoder,
            unet,
            vae,
            scheduler,
            layers,
            infos,
            files: [text_file, unet_file, vae_file],
            digest: OnceLock::new(),
        })
    }

    /// The folder that it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// The device that holds it.
    pub fn device(&self) -> &Device {
        &self.device
    }
    /// The type in which its weights are held; activations are always f32.
    pub fn precision(&self) -> DType {
        self.precision
    }
    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
    /// The prompt encoder.
    pub fn text_encoder(&self) -> &ClipTextEncoder {
        &self.text_encoder
    }
    /// The denoising network.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }
    /// The autoencoder.
    pub fn vae(&self) -> &Vae {
        &self.vae
    }
    /// The noise schedule of its training.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.scheduler.schedule
    }
    /// What the UNet predicts.
    pub fn prediction(&self) -> Prediction {
        self.scheduler.prediction
    }
    /// Number of the UNet's cross-attentions; layer-wise tokens have one vector for each.
    pub fn cross_attention_layers(&self) -> usize {
        self.unet.cross_attentions()
    }
    /// Channels, height and width of the latents that it was trained with.
    pub fn latent_shape(&self) -> (usize, usize, usize) {
        let config = self.unet.config();
        let downscale = self.vae.downscale();
        let of_picture = |(h, w)| (h / downscale, w / downscale);
        let (height, width) = config.sample_size.or(self.vae.config().sample_size.map(of_picture)).unwrap_or((64, 64));
        (config.in_channels, height, width)
    }

    /// Every Linear that adapters may change, those of the UNet in forward order, then those of the text encoder; a
    /// [`LayerId`] is an index into this list.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.infos
    }
    /// The layer called `name`, such as `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    pub fn layer(&self, name: &str) -> Option<LayerId> {
        self.infos.iter().position(|info| info.name == name).map(LayerId)
    }
    /// The weight of a layer as the model file has it.
    pub fn pristine(&self, layer: LayerId) -> &WeightView {
        &self.layers[layer.0].pristine
    }
    /// The weight of a layer as the forward pass reads it, [m, n] in the model's precision. The tensor shares its
    /// storage with the Linear: writing into it changes the model.
    pub fn live(&self, layer: LayerId) -> &Tensor {
        &self.layers[layer.0].live
    }

    /// The shape that adapters depend on, in words: models with the same string have the same adaptable layers.
    pub fn architecture(&self) -> String {
        let (unet, text) = (self.unet.config(), self.text_encoder.config());
        let join = |values: &[usize]| values.iter().map(usize::to_string).collect::<Vec<_>>().join("-");
        format!(
            "stable-diffusion/unet-{}x{}-attn{}-ctx{}{}/clip-{}x{}",
            join(&unet.block_out_channels),
            join(&unet.layers_per_block),
            self.cross_attention_layers(),
            unet.cross_attention_dim,
            if unet.use_linear_projection { "-linear" } else { "" },
            text.hidden_size,
            text.num_hidden_layers,
        )
    }

    /// The mapped weight file of `component`.
    pub fn weight_file(&self, component: Component) -> &Arc<WeightFile> {
        match component {
            Component::TextEncoder => &self.files[0],
            Component::UNet => &self.files[1],
            Component::Vae => &self.files[2],
        }
    }

    /// SHA-256, in hex, over the names and SHA-256 digests of the weight files. Computed on first use: it reads them.
    pub fn digest(&self) -> &str {
        self.digest.get_or_init(|| {
            let mut hash = Sha256::new();
            for (component, file) in Component::ALL.into_iter().zip(&self.files) {
                hash.update(format!("{} {}\n", component.folder(), file.digest()));
            }
            hex(&hash.finalize())
        })
    }
}

/// Fails unless the components can work together.
fn check_fit(unet: &UNetConfig, text: &TextEncoderConfig, vae: &VaeConfig) -> Result<()> {
    let fail = |reason: String| Err(Error::invalid_file(&unet.path, reason));
    if unet.cross_attention_dim != text.hidden_size {
        return fail(format!(
            "cross_attention_dim: {}, but the text encoder's hidden_size is {}",
            unet.cross_attention_dim, text.hidden_size
        ));
    }
    if unet.in_channels != vae.latent_channels {
        return Err(Error::Unsupported {
            path: unet.path.clone(),
            field: "in_channels".into(),
            value: unet.in_channels.to_string(),
            supported: format!("only the VAE's latent_channels, {}; inpainting models are not", vae.latent_channels),
        });
    }
    if unet.out_channels != unet.in_channels {
        return fail(format!("out_channels: {}, but in_channels is {}", unet.out_channels, unet.in_channels));
    }
    Ok(())
}
