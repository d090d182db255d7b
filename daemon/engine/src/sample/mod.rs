//! Sampling: a sampler drives its own loop on a [`Denoiser`]; plain slices only, as plugins will see it.

mod ddim;
mod denoiser;
mod dpmpp_2m;
mod euler_a;
mod schedule;

pub use ddim::Ddim;
pub use denoiser::{Denoiser, Sampler};
pub use dpmpp_2m::DpmSolverPlusPlus2M;
pub use euler_a::EulerAncestral;
pub use schedule::{NoiseSchedule, TimestepSpacing};

use crate::error::{Error, Result};

/// The ids that [`by_id`] knows.
pub const SAMPLERS: [&str; 4] = ["ddim", "dpmpp-2m", "dpmpp-2m-karras", "euler-a"];

/// The sampler named `id`; an error that lists the known ones.
pub fn by_id(id: &str) -> Result<Box<dyn Sampler>> {
    match id {
        "ddim" => Ok(Box::new(Ddim::default())),
        "dpmpp-2m" => Ok(Box::new(DpmSolverPlusPlus2M { karras: false })),
        "dpmpp-2m-karras" => Ok(Box::new(DpmSolverPlusPlus2M { karras: true })),
        "euler-a" => Ok(Box::new(EulerAncestral)),
        _ => Err(Error::option("sampler", id, format!("choose one of {}", SAMPLERS.join(", ")))),
    }
}
