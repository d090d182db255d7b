//! Training: steps on the pristine model, in between the jobs that cannot wait, checkpoints that outlive the process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blocklora_engine::Error as EngineError;
use blocklora_engine::train::{Concept, Dataset, Progress, Stage, TrainRequest, train};
use blocklora_spec::Adapter;
use sha2::{Digest, Sha256};

use super::{Outcome, Restore, Worker, survives, usec_since};
use crate::dbus::library::show;
use crate::dbus::value::{dict, own};
use crate::error::{Error, Result};
use crate::jobs::work::{Set, Train};
use crate::jobs::{Job, ResultFile, Stop};
use crate::objects::object_path;

impl Worker {
    /// Trains, registers the adapter and gives its file.
    pub(super) fn train(&mut self, job: &Arc<Job>, work: &Train) -> Outcome {
        let start = Instant::now();
        let output = work.folder.join("adapter.safetensors");
        let result = self.train_to(job, work, &output).and_then(|(trained, resumed_at)| {
            job.set_stage("writing");
            let bytes = std::fs::read(&output).map_err(|e| Error::io(output.display(), &e))?;
            let entry = self.daemon.catalogue.import_bytes(bytes, &work.name)?;
            let path = self.daemon.catalogue.adapter_path(&entry.digest);
            let fd = File::open(&path).map_err(|e| Error::io(path.display(), &e))?;
            let adapter = show(&self.daemon, entry.clone());
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
        });
        if !survives(job) {
            self.daemon.forget_training(job, work);
        }
        result
    }

    /// Trains until the file is there; the number of trained values, and the step that it continued from.
    fn train_to(&mut self, job: &Arc<Job>, work: &Train, output: &Path) -> Result<(u64, u32)> {
        if output.is_file() {
            // The last daemon ended between writing and registering it.
            let adapter = Adapter::open(output)?;
            let count = |l: &blocklora_spec::LayerFactors| (l.rank * (l.columns + l.rows.len())) as u64;
            let words: u64 = adapter.tokens().iter().map(|t| t.values.len() as u64).sum();
            let trained = adapter.layers().iter().map(count).sum::<u64>() + words;
            return Ok((trained, u32::try_from(adapter.manifest().training.steps).unwrap_or(u32::MAX)));
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
        let kept = self.kept_checkpoint(work, &dataset)?;
        let checkpoint = request.checkpoint_path();
        if kept.is_file() && !checkpoint.is_file() {
            std::fs::rename(&kept, &checkpoint).map_err(|e| Error::io(kept.display(), &e))?;
        }
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
        if job.stop_requested() == Some(Stop::Checkpoint) && checkpoint.is_file() {
            std::fs::rename(&checkpoint, &kept).map_err(|e| Error::io(kept.display(), &e))?;
        }
        match (report, failure) {
            // The engine could not write: that is what went wrong, not that it was asked to stop.
            (Err(error @ EngineError::Io { .. }), _) => Err(error.into()),
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(error.into()),
            (Ok(report), None) => Ok((report.parameters as u64, resumed_at.unwrap_or(0))),
        }
    }

    /// Where a training that was cancelled with a checkpoint keeps it: by everything that decides its result.
    fn kept_checkpoint(&self, work: &Train, dataset: &Dataset) -> Result<PathBuf> {
        let plain = Train { folder: PathBuf::new(), lease: None, ..work.clone() };
        let text = serde_json::to_string(&plain).map_err(|e| Error::failed(e.to_string()))?;
        let mut hash = Sha256::new();
        hash.update(dataset.digest());
        hash.update(text);
        let key: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let folder = self.daemon.catalogue.folder().join("checkpoints");
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(folder.display(), &e))?;
        Ok(folder.join(format!("{key}.checkpoint")))
    }
}
