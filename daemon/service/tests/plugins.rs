//! The plugin host on the real plugins, each from its library.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blocklora_engine::merge::strategy::{AdapterView, Coefficients, Factors, LayerInfo, LayerPlan};
use blocklora_engine::sample::{Denoiser, NoiseSchedule, TimestepSpacing};
use blocklora_engine::{Error, Result};
use blocklora_sdk::manifest::PluginKind;
use blocklora_service::plugins::{BY_HAND, Isolation, PluginError, State};
use serde_json::{Value, json};
use support::{host, plugins};

const KINDS: [PluginKind; 3] = [PluginKind::Merge, PluginKind::Train, PluginKind::Sample];

#[test]
fn every_plugin_of_the_tree_is_listed_and_tells_its_settings() {
    let (entries, broken) = plugins().list();
    assert!(broken.is_empty(), "{broken:?}");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins");
    let folders = tree.read_dir().unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(entries.len(), folders);
    for entry in entries {
        let manifest = &entry.found.manifest;
        assert_eq!(entry.state, State::Ready, "{}", manifest.full_name());
        let info = plugins().info(manifest.kind, &manifest.id).unwrap();
        assert_eq!(info.schema["type"], "object", "{}", manifest.full_name());
        let properties = info.schema["properties"].as_object().into_iter().flatten();
        for (key, property) in properties {
            let reference = property.get("description").is_some() || property.get("$ref").is_some();
            assert!(reference, "{}: {key} has no description", manifest.full_name());
            assert!(info.defaults.get(key).is_some(), "{}: {key} has no default", manifest.full_name());
        }
        // What the plugin writes down, it takes back.
        match manifest.kind {
            PluginKind::Merge => drop(plugins().strategy(&manifest.id, &info.defaults).unwrap()),
            PluginKind::Train => drop(plugins().trainer(&manifest.id, &info.defaults).unwrap()),
            PluginKind::Sample => drop(plugins().sampler(&manifest.id, &info.defaults).unwrap()),
        }
    }
}

#[test]
fn wrong_settings_and_names_are_one_line_with_the_cure() {
    let refused = |kind, id: &str, settings: Value| match kind {
        PluginKind::Merge => plugins().strategy(id, &settings).map(drop),
        PluginKind::Train => plugins().trainer(id, &settings).map(drop),
        PluginKind::Sample => plugins().sampler(id, &settings).map(drop),
    };
    for (kind, id, settings, expected) in [
        (PluginKind::Merge, "blocklora", json!({"clash": "ignore"}), "clash = \"ignore\": must be one of refuse, mean"),
        (PluginKind::Merge, "blocklora", json!({"clsh": 1}), "unknown key clsh: the keys are clash, normalise"),
        (PluginKind::Sample, "ddim", json!({"eta": 1.5}), "eta = 1.5: must be 1.0 or less"),
        (PluginKind::Sample, "ddim", json!({"eta": "high"}), "eta = \"high\": must be of the type number"),
        (PluginKind::Train, "blocklora", json!({"rank": 0}), "rank = 0: must be 1 or more"),
        (PluginKind::Train, "blocklora", json!({"erasure": {"lambda": 2}}), "erasure.lambda = 2: must be 0.99 or less"),
        (PluginKind::Sample, "magic", json!(null), "there is no sampler \"magic\": choose one of"),
    ] {
        let error = refused(kind, id, settings).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains('\n'));
    }
    for kind in KINDS {
        assert!(matches!(refused(kind, "magic", json!(null)), Err(PluginError::Unknown { .. })));
    }
}

/// Data of one value: eps is exact.
struct Constant {
    schedule: NoiseSchedule,
    first_timestep: f32,
    steps: usize,
    cancel_after: usize,
    fail_after: usize,
}

fn constant() -> Constant {
    let schedule = NoiseSchedule { steps_offset: 1, ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap() };
    Constant { schedule, first_timestep: 0.0, steps: 0, cancel_after: usize::MAX, fail_after: usize::MAX }
}

impl Denoiser for Constant {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        [1, 1, 2, 2]
    }
    fn seed(&self) -> u64 {
        7
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        if self.steps >= self.fail_after {
            return Err(Error::option("model", "gone", "the test says so"));
        }
        if self.steps == 0 {
            self.first_timestep = timestep;
        }
        let (alpha, sigma) = self.schedule.alpha_sigma_at(timestep);
        eps.iter_mut().zip(latents).for_each(|(eps, z)| *eps = (z - alpha * 0.5) / sigma);
        Ok(())
    }
    fn noise(&mut self, _step: usize, out: &mut [f32]) {
        out.fill(0.25);
    }
    fn step_done(&mut self, _step: usize, _steps: usize, _latents: &[f32]) -> Result<()> {
        self.steps += 1;
        if self.steps > self.cancel_after { Err(Error::Cancelled) } else { Ok(()) }
    }
}

#[test]
fn samplers_run_cancel_and_pass_the_engines_errors_on() {
    let sampler = plugins().sampler("ddim", &Value::Null).unwrap();
    let sample = |denoiser: &mut Constant| sampler.sample(denoiser, &mut [0.3, -1.0, 2.0, 0.0], 20);
    let mut latents = [0.3, -1.0, 2.0, 0.0];
    sampler.sample(&mut constant(), &mut latents, 20).unwrap();
    assert!(latents.iter().all(|z| (z - 0.5).abs() < 1e-3), "{latents:?}");
    let mut cancelled = Constant { cancel_after: 3, ..constant() };
    assert!(matches!(sample(&mut cancelled), Err(Error::Cancelled)));
    assert_eq!(cancelled.steps, 4);
    let error = sample(&mut Constant { fail_after: 2, ..constant() }).unwrap_err();
    assert!(matches!(&error, Error::InvalidOption { name, .. } if name == "model"), "{error}");
    let error = sampler.sample(&mut constant(), &mut [0.0; 4], 2000).unwrap_err().to_string();
    assert_eq!(error, "ddim: steps = 2000: must be 1 to 1000 for this model's noise schedule and sampler");
}

struct View {
    name: &'static str,
    rows: Vec<u32>,
}

impl AdapterView for View {
    fn name(&self) -> &str {
        self.name
    }
    fn digest(&self) -> &str {
        self.name
    }
    fn weight(&self) -> f32 {
        1.0
    }
    fn factors(&self, layer: usize) -> Option<Factors<'_>> {
        let (a, b) = (&[1.0, 2.0][..], &[1.0, 2.0][..self.rows.len()]);
        (layer == 0).then_some(Factors { a, b, rows: &self.rows, rank: 1, scale: 1.0 })
    }
}

#[test]
fn a_strategy_plans_and_two_with_other_settings_keep_their_own() {
    let layers = ["unet.a.to_q", "unet.b.to_q"].map(|name| LayerInfo { name: name.into(), rows: 4, columns: 2 });
    let (one, other) = (View { name: "one", rows: vec![0, 1] }, View { name: "other", rows: vec![1, 2] });
    let adapters: [&dyn AdapterView; 2] = [&one, &other];
    let refuse = plugins().strategy("blocklora", &Value::Null).unwrap();
    let mean = plugins().strategy("blocklora", &json!({"clash": "mean"})).unwrap();
    let error = refuse.plan(&layers, &adapters).unwrap_err().to_string();
    assert!(["blocklora", "one", "other", "row 1", "unet.a.to_q"].iter().all(|word| error.contains(word)), "{error}");
    let plan = mean.plan(&layers, &adapters).unwrap();
    let LayerPlan::Factored(terms) = &plan[0] else { panic!("{plan:?}") };
    assert_eq!(terms[0].coefficients, Coefficients::PerRow(Arc::from([1.0, 0.5])));
    assert_eq!(terms[1].coefficients, Coefficients::PerRow(Arc::from([0.5, 1.0])));
    assert_eq!(plan[1], LayerPlan::Factored(vec![]));
    assert_ne!(refuse.fingerprint(), mean.fingerprint());
}

#[test]
fn a_deleted_plugin_is_gone_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let installed = folder.path().join("installed");
    std::fs::create_dir(&installed).unwrap();
    let (entries, _) = plugins().list();
    for entry in &entries {
        for file in [&entry.found.path, &entry.found.library] {
            std::fs::copy(file, installed.join(file.file_name().unwrap())).unwrap();
        }
    }
    let host = host(&folder, |options| options.folders = vec![installed.clone()]);
    host.sampler("ddim", &Value::Null).unwrap();
    std::fs::remove_file(installed.join("libsample_ddim.so")).unwrap();
    let error = host.sampler("ddim", &Value::Null).map(drop).unwrap_err().to_string();
    assert!(error.contains("libsample_ddim.so") && error.contains("install"), "{error}");
    std::fs::remove_file(installed.join("sample-ddim.toml")).unwrap();
    assert!(matches!(host.sampler("ddim", &Value::Null), Err(PluginError::Unknown { .. })));
    assert_eq!(host.list().0.len(), entries.len() - 1);
    host.strategy("blocklora", &Value::Null).unwrap();
}

/// The plugin sample-ddim in a folder of its own: that, the manifest, the library.
fn install_ddim(folder: &tempfile::TempDir) -> (PathBuf, PathBuf, PathBuf) {
    let found = plugins().list().0.into_iter().find(|e| e.found.manifest.full_name() == "sample-ddim").unwrap().found;
    let installed = folder.path().join("installed");
    std::fs::create_dir(&installed).unwrap();
    let (manifest, library) = (installed.join("sample-ddim.toml"), installed.join("libsample_ddim.so"));
    std::fs::copy(&found.path, &manifest).unwrap();
    std::fs::copy(&found.library, &library).unwrap();
    (installed, manifest, library)
}

#[test]
fn a_quarantine_holds_until_it_is_lifted_or_the_file_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (installed, _, library) = install_ddim(&folder);
    let host = host(&folder, |options| options.folders = vec![installed.clone()]);
    host.set_quarantine(PluginKind::Sample, "ddim", Some("crashed (segmentation fault) when it was loaded")).unwrap();
    let again = support::host(&folder, |options| options.folders = vec![installed.clone()]);
    for host in [&host, &again] {
        let error = host.sampler("ddim", &Value::Null).map(drop).unwrap_err().to_string();
        assert!(error.contains("segmentation fault") && error.contains("--lift"), "{error}");
        assert!(matches!(&host.list().0[0].state, State::Quarantined(reason) if reason.contains("segmentation")));
    }
    // Another build: the same library with a byte behind its end.
    let bytes = [std::fs::read(&library).unwrap(), vec![0]].concat();
    std::fs::remove_file(&library).unwrap();
    std::fs::write(&library, bytes).unwrap();
    again.sampler("ddim", &Value::Null).unwrap();
    again.set_quarantine(PluginKind::Sample, "ddim", Some(BY_HAND)).unwrap();
    let error = again.sampler("ddim", &Value::Null).map(drop).unwrap_err().to_string();
    assert!(error.contains("is disabled: enable it with `blocklora plugin quarantine sample-ddim --lift`"), "{error}");
    again.set_quarantine(PluginKind::Sample, "ddim", None).unwrap();
    again.sampler("ddim", &Value::Null).unwrap();
}

/// The worker of the plugin whose manifest lies at `manifest`: its process, and its process group.
fn worker_of(manifest: &Path) -> (rustix::process::Pid, i32) {
    let is_worker = |process: &Path| {
        let arguments = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let manifest = manifest.as_os_str().as_encoded_bytes();
        arguments.split(|byte| *byte == 0).any(|argument| argument == manifest)
    };
    let processes = Path::new("/proc").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let process = processes.into_iter().find(|process| is_worker(process)).unwrap();
    let stat = std::fs::read_to_string(process.join("stat")).unwrap();
    // Behind the program's name: state, parent, process group.
    let group = stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap().parse().unwrap();
    let id = process.file_name().unwrap().to_str().unwrap().parse().unwrap();
    (rustix::process::Pid::from_raw(id).unwrap(), group)
}

/// What was loaded is a copy, so that `cp` over a library that works is no crash.
#[test]
fn a_library_that_is_written_over_in_use_works_on() {
    let folder = tempfile::tempdir().unwrap();
    let (installed, _, library) = install_ddim(&folder);
    let host = host(&folder, |options| options.folders = vec![installed.clone()]);
    let sampler = host.sampler("ddim", &Value::Null).unwrap();
    let bytes = std::fs::read(&library).unwrap();
    std::fs::write(&library, vec![0; bytes.len()]).unwrap();
    sampler.sample(&mut constant(), &mut [0.5; 4], 3).unwrap();
    let error = host.sampler("ddim", &Value::Null).map(drop).unwrap_err().to_string();
    assert!(error.contains("sample-ddim"), "{error}");
    std::fs::write(&library, bytes).unwrap();
    host.sampler("ddim", &Value::Null).unwrap().sample(&mut constant(), &mut [0.5; 4], 3).unwrap();
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (installed, _, library) = install_ddim(&folder);
    std::fs::remove_file(&library).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &library, rustix::fs::Mode::RUSR).unwrap();
    let host = host(&folder, |options| options.folders = vec![installed.clone()]);
    let State::Missing(reason) = host.list().0.remove(0).state else { panic!("it is listed as a library") };
    assert!(reason.contains("no plain file"), "{reason}");
    assert!(host.sampler("ddim", &Value::Null).is_err());
}

/// diffusers' DDIM leads from a multiple of a stride, its DPM-Solver starts at the last timestep.
#[test]
fn on_a_model_that_names_no_spacing_each_sampler_has_its_own() {
    let first = |id: &str, spacing| {
        let mut data = constant();
        data.schedule.spacing = spacing;
        plugins().sampler(id, &Value::Null).unwrap().sample(&mut data, &mut [0.5; 4], 20).unwrap();
        data.first_timestep
    };
    assert_eq!((first("ddim", None), first("dpmpp-2m", None)), (951.0, 999.0));
    let said = Some(TimestepSpacing::Leading);
    assert_eq!((first("ddim", said), first("dpmpp-2m", said)), (951.0, 941.0));
}

/// A service that is stopped and a terminal's Ctrl-C end workers, too: that says nothing about the plugin.
#[test]
fn who_ends_a_worker_from_outside_does_not_quarantine_its_plugin() {
    let folder = tempfile::tempdir().unwrap();
    let (installed, manifest, _) = install_ddim(&folder);
    let host = host(&folder, |options| {
        options.folders = vec![installed.clone()];
        options.isolation = Isolation::Worker;
    });
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::KILL] {
        let sampler = host.sampler("ddim", &Value::Null).unwrap();
        sampler.sample(&mut constant(), &mut [0.5; 4], 3).unwrap();
        let (worker, group) = worker_of(&manifest);
        assert_eq!(worker.as_raw_nonzero().get(), group, "signals to this process group reach the worker");
        rustix::process::kill_process(worker, signal).unwrap();
        let error = sampler.sample(&mut constant(), &mut [0.5; 4], 3).unwrap_err().to_string();
        assert!(error.contains("was killed") && error.contains("start the job again"), "{error}");
        let entry = host.list().0.remove(0);
        assert_eq!((entry.state, entry.crashes), (State::Ready, 0));
    }
    host.sampler("ddim", &Value::Null).unwrap().sample(&mut constant(), &mut [0.5; 4], 3).unwrap();
}

#[test]
fn the_manifest_says_what_the_library_was_built_for() {
    let folder = tempfile::tempdir().unwrap();
    let (installed, manifest, library) = install_ddim(&folder);
    // Both texts, that of the file and that in the library.
    for file in [manifest, library] {
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.windows(11).position(|window| window == b"abi = \"1.1\"").unwrap();
        bytes[at + 9] = b'0';
        std::fs::write(file, bytes).unwrap();
    }
    let host = host(&folder, |options| options.folders = vec![installed]);
    let error = host.sampler("ddim", &Value::Null).map(drop).unwrap_err().to_string();
    assert!(error.contains("built for ABI 1.1") && error.contains("abi = \"1.0\""), "{error}");
}

#[test]
fn a_worker_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let apart = host(&folder, |options| options.isolation = Isolation::Worker);
    let start = [0.3, -1.0, 2.0, 0.0];
    let sample = |host: &blocklora_service::plugins::Plugins| {
        let mut latents = start;
        let sampler = host.sampler("ddim", &json!({"eta": 0.5})).unwrap();
        sampler.sample(&mut constant(), &mut latents, 7).unwrap();
        // An instance is used more than once.
        sampler.sample(&mut constant(), &mut latents, 7).unwrap();
        latents.map(f32::to_bits)
    };
    assert_eq!(sample(&apart), sample(plugins()));
    let sampler = apart.sampler("ddim", &Value::Null).unwrap();
    let cancelled = sampler.sample(&mut Constant { cancel_after: 3, ..constant() }, &mut start.clone(), 20);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    let error = sampler.sample(&mut Constant { fail_after: 2, ..constant() }, &mut start.clone(), 20).unwrap_err();
    assert!(matches!(&error, Error::InvalidOption { name, .. } if name == "model"), "{error}");
    let error = apart.sampler("ddim", &json!({"eta": 7})).map(drop).unwrap_err().to_string();
    assert!(error.contains("eta = 7: must be"), "{error}");

    let layers = ["unet.a.to_q", "unet.b.to_q"].map(|name| LayerInfo { name: name.into(), rows: 4, columns: 2 });
    let (one, other) = (View { name: "one", rows: vec![0, 1] }, View { name: "other", rows: vec![1, 2] });
    let adapters: [&dyn AdapterView; 2] = [&one, &other];
    let plan = |host: &blocklora_service::plugins::Plugins| {
        let strategy = host.strategy("blocklora", &json!({"clash": "mean"})).unwrap();
        (strategy.plan(&layers, &adapters).unwrap(), strategy.fingerprint().to_owned())
    };
    assert_eq!(plan(&apart), plan(plugins()));
}
