//! Writing a model with a set merged in: on the device until the folder is there, then beside it as an archive.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use blocklora_engine::Device;
use blocklora_engine::bake::bake;
use blocklora_engine::merge::strategy::LayerInfo;
use blocklora_engine::merge::{MergeReport, Merger, Target};
use blocklora_engine::model::Model;
use blocklora_engine::nn::LayerId;

use super::{Worker, aside, usec_since};
use crate::config::Precision;
use crate::dbus::value::{dict, own};
use crate::error::{Error, Result};
use crate::jobs::Job;
use crate::jobs::work::Set;
use crate::tar;

impl Worker {
    /// Bakes, and goes on beside the device with writing the archive to `out`.
    pub(super) fn bake(&mut self, job: &Arc<Job>, id: &str, set: &Set, out: File) -> Result<()> {
        let start = Instant::now();
        let (model, concepts) = self.residents.model(id, set)?;
        job.set_stage("merging");
        let folder = self.daemon.catalogue.folder().join("tmp");
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(folder.display(), &e))?;
        let folder =
            tempfile::Builder::new().prefix("bake-").tempdir_in(&folder).map_err(|e| Error::io("state", &e))?;
        let target = folder.path().join("model");
        let report = if self.residents.precision(id) == Some(Precision::F32) {
            let report = self.residents.apply(id, set)?;
            job.set_stage("writing");
            bake(&model, &concepts, &target)?;
            report
        } else {
            // Merged in f32 and rounded once, to the type in which the base model stores each weight.
            let exact = Model::load(model.dir(), &Device::Cpu, Precision::F32.dtype())?;
            let report = self.merge_into(&exact, set)?;
            job.set_stage("writing");
            bake(&exact, &concepts, &target)?;
            report
        };
        if job.stop_requested().is_some() {
            return Err(job.stop_error());
        }
        aside::spawn(&self.daemon, job, move |job| {
            let (bytes, files) = tar::write(&target, &out, &|| job.stop_requested().is_none())?;
            drop(folder);
            let details = dict([
                ("bytes", own(bytes)),
                ("files", own(files)),
                ("rows_rewritten", own(report.rows_rewritten)),
                ("usec", own(usec_since(start))),
            ]);
            Ok((details, Vec::new()))
        })
    }

    fn merge_into(&self, model: &Model, set: &Set) -> Result<MergeReport> {
        let target = |(i, info): (usize, &LayerInfo)| Target {
            info: info.clone(),
            live: model.live(LayerId(i)).clone(),
            pristine: model.pristine(LayerId(i)).clone(),
        };
        let mut merger = Merger::new(model.layers().iter().enumerate().map(target).collect())?;
        let factors = crate::dbus::sets::load_factors(&self.daemon, set)?;
        let adapters: Vec<_> = factors.into_iter().zip(set.entries.iter().map(|entry| entry.weight)).collect();
        let strategy = self.daemon.methods.strategy(&set.strategy, &set.strategy_config)?;
        Ok(merger.apply(&adapters, &strategy)?)
    }
}
