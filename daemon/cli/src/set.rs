//! The adapters that a command names, as a daemon needs them.

use std::path::{Path, PathBuf};

use anyhow::bail;
use blocklora_client::{Adapter, AdapterState, Entry};
use blocklora_engine::bake::baked_concepts;
use blocklora_engine::text::Prompt;
use serde_json::{Map, Value};

use crate::args::{Clash, SetArgs, WeightedFile};
use crate::daemon::{ChosenModel, Daemon, State};
use crate::settings;

/// An adapter, its weight, and how messages call it.
pub struct Member {
    adapter: Adapter,
    /// What is known of it.
    pub state: AdapterState,
    weight: f32,
    shown: PathBuf,
}

/// A set of adapters.
pub struct Members(pub Vec<Member>);

/// Where a private daemon keeps its state for `with`: adapters by name are those of the user's library.
pub fn state_for(with: &[WeightedFile]) -> State {
    if with.iter().any(WeightedFile::is_of_library) { State::User } else { State::Temporary }
}

/// Fails on a file that is not a valid adapter, before a daemon is started or a model loaded, which take much longer.
pub fn check_files(with: &[WeightedFile]) -> anyhow::Result<()> {
    for file in with.iter().filter(|with| !with.is_of_library()) {
        blocklora_spec::Adapter::open(&file.path)?;
    }
    Ok(())
}

impl Members {
    /// Makes the adapters known to the daemon, for the length of this connection, and checks that they fit `model` and
    /// each other.
    pub async fn new(daemon: &Daemon, model: &ChosenModel, with: &[WeightedFile]) -> anyhow::Result<Self> {
        let mut members: Vec<Member> = Vec::new();
        for with in with {
            let adapter = if with.is_of_library() {
                daemon.client.open_adapter(&with.path.to_string_lossy()).await?
            } else {
                daemon.client.borrow_adapter(&with.path).await?
            };
            let state = adapter.state().await?;
            check_base(&state, model, &with.path)?;
            if let Some(other) = members.iter().find(|m| m.state.name == state.name) {
                bail!(
                    "{} and {}: both concepts are called {:?}: leave one out, or train it again with another --name",
                    other.shown.display(),
                    with.path.display(),
                    state.name
                );
            }
            members.push(Member { adapter, state, weight: with.weight, shown: with.path.clone() });
        }
        Ok(Self(members))
    }

    /// As the daemon takes them.
    pub fn entries(&self) -> Vec<Entry> {
        self.0.iter().map(|m| Entry::new(&m.adapter).weight(f64::from(m.weight))).collect()
    }

    /// Fails, before anything costly, if `prompt` names a concept that is neither in the set nor built into the model.
    pub fn check_prompt(&self, prompt: &str, model: &ChosenModel) -> anyhow::Result<()> {
        // Where only the daemon can read the model's folder, only the daemon can tell.
        let Some(folder) = model.folder() else { return Ok(()) };
        let mut known: Vec<String> = baked_concepts(&folder)?.into_iter().map(|c| c.name).collect();
        for member in &self.0 {
            let name = &member.state.name;
            if known.contains(name) {
                bail!(
                    "{}: the concept {name:?} is already built into {}: leave it out",
                    member.shown.display(),
                    folder.display()
                );
            }
            known.push(name.clone());
        }
        for name in Prompt::parse(prompt).concepts() {
            if known.iter().any(|k| *k == name) {
                continue;
            }
            if known.is_empty() {
                bail!("the prompt names <{name}>, but no concept is given: add --with FILE");
            }
            let known: Vec<String> = known.iter().map(|k| format!("<{k}>")).collect();
            bail!("the prompt names <{name}>, but the given concepts are {}", known.join(", "));
        }
        Ok(())
    }
}

fn check_base(adapter: &AdapterState, model: &ChosenModel, path: &Path) -> anyhow::Result<()> {
    let (path, state) = (path.display(), &model.state);
    if adapter.architecture != state.architecture {
        bail!(
            "{path}: made for the model {}, but {} is {}: give the base model it was trained on with --base",
            adapter.architecture,
            state.path,
            state.architecture
        );
    }
    if adapter.base_digest != state.digest {
        bail!(
            "{path}: trained on other weights ({:.12}) than those in {} ({:.12}): give the base model it was trained on \
             with --base",
            adapter.base_digest,
            state.path,
            state.digest
        );
    }
    Ok(())
}

/// The id (none: the daemon's usual one) and the settings of the strategy that `args` choose.
pub fn strategy(args: &SetArgs) -> anyhow::Result<(Option<String>, Map<String, Value>)> {
    let mut config = Map::new();
    let id = match args.strategy.as_deref() {
        Some("blocklora-sum1") => {
            config.insert("normalise".into(), "sum1".into());
            Some("blocklora")
        }
        Some("average") => Some("weighted-average"),
        id => id,
    };
    // Only a strategy that refuses shared rows can be told not to.
    if args.on_clash == Clash::Mean && id.is_none_or(|id| id == "blocklora") {
        config.insert("clash".into(), "mean".into());
    }
    config.extend(settings::read(args.merge_config.as_deref(), &args.merge_settings)?);
    Ok((id.map(str::to_owned), config))
}
