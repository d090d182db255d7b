//! Training: steps on the pristine model, in between the jobs that cannot wait, checkpoints that outlive the process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blocklora_engine::Error as EngineError;
use blocklora_engine::train::{Concept, Dataset, Progress, Stage, TrainRequest, train};
use blocklora_spec::Adapter;

use super::{Outcome, Restore, Worker, usec_since};
use crate::daemon::ADAPTER;
use crate::dbus::library::show;
use crate::dbus::value::{dict, own};
use crate::error::{Error, Result};
use crate::jobs::work::{Set, Train};
use crate::jobs::{Job, ResultFile};
use crate::objects::object_path;

impl Worker {
    /// Trains, registers the adapter and gives its file.
    pub(super) fn train(&mut self, job: &Arc<Job>, work: &Train) -> Outcome {
        let start = Instant::now();
        let output = work.folder.join(ADAPTER);
        self.train_to(job, work, &output).and_then(|(trained, resumed_at)| {
            job.set_stage("writing");
            let bytes = std::fs::read(&output).map_err(|e| Error::io(output.display(), &e))?;
            let entry = self.daemon.catalogue.import_bytes(bytes, &work.name)?;
            let path = self.daemon.catalogue.adapter_path(&entry.digest);
            let fd = File::open(&path).map_err(|e| Error::io(path.display(), &e))?;
            let adapter = show(&self.daemon, entry.clone(), Some(job.owner.uid));
            let mut details = dict([
                ("adapter", own(zbus::Variant::from(object_path(&adapter)))),
                ("digest", own(entry.digest.clone())),
                ("name", own(entry.name.clone())),
                ("parameters", own(trained)),
                ("steps", own(job.status(|s| s.step.1))),
                ("resumed_at", own(resumed_at)),
                ("usec", own(usec_since(start))),
            ]);
            if let Some(partition) = &work.partition {
                details.insert("slot".to_owned(), own(partition.slot));
            }
            let info = dict([
                ("media_type", own("application/vnd.safetensors")),
                ("name", own(format!("{}.safetensors", entry.name))),
                ("digest", own(entry.digest.clone())),
                ("size", own(entry.size)),
            ]);
            Ok((details, vec![ResultFile { fd: fd.into(), size: 0, format: "", info }]))
        })
    }

    /// Trains until the file is there; the number of trained values, and the step that it continued from.
    fn train_to(&mut self, job: &Arc<Job>, work: &Train, output: &Path) -> Result<(u64, u32)> {
        if output.is_file() {
            // The last daemon ended between writing and registering it.
            let adapter = Adapter::open(output)?;
            let count = |l: &blocklora_spec::LayerFactors| (l.rank * (l.columns + l.rows.len())) as u64;
            let words: u64 = adapter.tokens().iter().map(|t| t.values.len() as u64).sum();
            let trained = adapter.layers().iter().map(count).sum::<u64>() + words;
            let steps = u32::try_from(adapter.manifest().training.steps).unwrap_or(u32::MAX);
            job.set_step(steps, steps, None);
            return Ok((trained, steps));
        }
        let concept = Concept { name: work.name.clone(), class_word: work.class_word.clone(), kind: work.kind };
        let trainer = self.daemon.methods.trainer(&work.trainer, &work.config, work.partition)?;
        // Only some trainers ask for pictures; they say so themselves if there is no sampler.
        let sampler = &self.daemon.config().plugins.sampler;
        let sampler = self.daemon.methods.sampler(sampler, &serde_json::Map::new()).ok();
        job.set_stage("loading-data");
        let files: Vec<(PathBuf, Option<String>)> =
            work.pictures.iter().map(|(name, caption)| (work.folder.join(name), caption.clone())).collect();
        let dataset = Dataset::from_files(&files)?;
        let request = TrainRequest {
            concept,
            seed: work.seed,
            output: output.to_owned(),
            resume: true,
            storage: work.storage,
            licence: work.licence.clone(),
            created: work.created.clone(),
            sampler,
        };
        self.daemon.take_checkpoint(work, dataset.digest())?;
        let pristine = Set::default();
        let (model, _) = self.residents.model(&work.model, &pristine)?;
        self.residents.take_out(&work.model)?;
        job.set_stage("training");
        let restore = Restore { model: &work.model, set: &pristine };
        let (mut failure, mut resumed_at) = (None, None);
        let mut progress = |p: Progress| {
            if p.stage == Stage::Training {
                resumed_at.get_or_insert(p.step.saturating_sub(1) as u32);
            }
            job.set_stage(p.stage.name());
            job.set_step(p.step as u32, p.steps as u32, p.loss);
            self.pause(job, &restore).map_err(|error| {
                failure = Some(error);
                EngineError::Cancelled
            })
        };
        let report = train(&model, &dataset, trainer.as_ref(), &request, &mut progress);
        let checkpoint = request.checkpoint_path();
        if let Err(EngineError::InvalidFile { path, .. }) = &report
            && resumed_at.is_none()
            && *path == checkpoint
        {
            // One that nothing can go on from is not kept: the same training begins anew.
            std::fs::remove_file(&checkpoint).map_err(|e| Error::io(checkpoint.display(), &e))?;
        }
        match (report, failure) {
            // The engine could not write: that is what went wrong, not that it was asked to stop.
            (Err(error @ EngineError::Io { .. }), _) => Err(error.into()),
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(error.into()),
            (Ok(report), None) => Ok((report.parameters as u64, resumed_at.unwrap_or(0))),
        }
    }
}
