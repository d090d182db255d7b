//! What the plugin takes while it works.

use blocklora_sdk::Code;
use blocklora_sdk::manifest::PluginKind;
use blocklora_sdk::merge::{Layer, LayerPlan, Tile};
use blocklora_sdk::rng::{Rng, Stream};
use blocklora_sdk::testing::{Gaussian, Problem, Quadratic, TestJob};

use crate::subject::{Subject, Verdict, wrong};

/// What allocators keep, and what the test itself moves.
const SLACK_MIB: u64 = 16;

/// Peak resident memory while it works on something of the size of Stable Diffusion 1.5, against the manifest.
pub fn declared(subject: &Subject) -> Verdict {
    let declared = subject.manifest.memory_mib;
    let taken = match subject.manifest.kind {
        PluginKind::Merge => merge(subject)?,
        PluginKind::Sample => sample(subject)?,
        PluginKind::Train => train(subject)?,
    };
    match taken {
        Some(taken) if taken > declared + SLACK_MIB => {
            wrong(format!("it took {taken} MiB, but declares memory_mib = {declared}: free more, or declare more"))
        }
        Some(_) => Ok(()),
        None => super::skip("the system does not tell the peak of resident memory"),
    }
}

/// A field of /proc/self/status in MiB.
pub fn status_mib(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()?.div_ceil(1024))
}

/// By how many MiB resident memory grows at its peak while `work` runs.
fn peak(work: impl FnOnce() -> Verdict) -> Result<Option<u64>, String> {
    let before = status_mib("VmRSS:");
    // Makes the peak start from here.
    let is_reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    work()?;
    let (Some(before), Some(peak), true) = (before, status_mib("VmHWM:"), is_reset) else { return Ok(None) };
    Ok(Some(peak.saturating_sub(before)))
}

fn merge(subject: &Subject) -> Result<Option<u64>, String> {
    const TILE: usize = 64;
    let layer = |name: &str, rows, columns| Layer { name: name.into(), rows, columns };
    let layers = vec![layer("unet.x.attn1.to_q", 1280, 1280), layer("unet.x.ff.net.0.proj", 5120, 640)];
    let mut problem = Problem::new(layers);
    for index in 0..3 {
        let factors = |layer: usize| {
            let Layer { rows, columns, .. } = problem.layers[layer];
            let block = index * rows / 3..(index + 1) * rows / 3;
            let mut rng = Rng::new(subject.seed, Stream::Test, index as u32, layer as u16);
            let (a, b) = (rng.normals(4 * columns), rng.normals(4 * block.len()));
            Some((a, b, block.map(|row| row as u32).collect(), 4))
        };
        let factors = (0..2).map(factors).collect();
        problem.add(&format!("concept{index}"), &format!("{index:064x}"), 1.0, 0.5, factors);
    }
    let (strategy, adapters) = (subject.strategy()?, problem.adapters());
    let mut delta = vec![0.0; TILE * 1280];
    peak(|| {
        let plan = strategy.plan(&TestJob::new(0), &problem.layers, &adapters).map_err(|e| e.message)?;
        for (index, (layer, plan)) in problem.layers.iter().zip(&plan).enumerate() {
            let LayerPlan::Dense(numbers) = plan else { continue };
            for start in (0..layer.rows).step_by(TILE) {
                let rows = start..layer.rows.min(start + TILE);
                let delta = &mut delta[..rows.len() * layer.columns];
                delta.fill(0.0);
                let tile = Tile { index, layer, adapters: &adapters, numbers, rows };
                strategy.fill(&tile, delta).map_err(|e| e.message)?;
            }
        }
        Ok(())
    })
}

fn sample(subject: &Subject) -> Result<Option<u64>, String> {
    const SHAPE: [usize; 4] = [4, 4, 128, 128];
    let n = SHAPE.iter().product();
    let mut denoiser = Gaussian::new(vec![0.5; n], vec![0.75; n]).map_err(|e| e.message)?;
    denoiser.shape = SHAPE;
    let (sampler, mut z) = (subject.sampler()?, subject.rng(0).normals(n));
    // The denoiser remembers the latents of every step.
    denoiser.latents.reserve(4);
    let taken = peak(|| match sampler.sample(&mut denoiser, &mut z, 4) {
        Err(e) if e.code != Code::InvalidConfig => wrong(e.message),
        _ => Ok(()),
    })?;
    Ok(taken.map(|taken| taken.saturating_sub(4 * ((n as u64 * 4) >> 20))))
}

fn train(subject: &Subject) -> Result<Option<u64>, String> {
    let trainer = super::train::trainer(subject, 60)?;
    let mut host = Quadratic::new();
    host.stop_at = Some(50);
    peak(|| match trainer.train(&mut host) {
        Err(e) if !e.is_cancelled() => wrong(e.message),
        _ => Ok(()),
    })
}
