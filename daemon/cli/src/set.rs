//! The adapters that a command names, as a daemon needs them.

use std::path::{Path, PathBuf};

use anyhow::bail;
use blocklora_client::{Adapter, AdapterState, Entry, ErrorKind};
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

/// Where a private daemon keeps its state for `with` and `prompt`: adapters by name are those of the user's library, as
/// are concepts of the prompt that none of `concepts`, those of the files in `with`, is.
pub fn state_for(with: &[WeightedFile], concepts: &[String], prompt: &str) -> State {
    let is_given = |name: &str| concepts.iter().any(|concept| concept == name);
    let by_name = with.iter().any(WeightedFile::is_of_library);
    if by_name || !Prompt::parse(prompt).concepts().all(is_given) { State::User } else { State::Temporary }
}

/// The concepts of the files in `with`. Fails on one that is not a valid adapter, before a daemon is started or a model
/// loaded, which take much longer.
pub fn check_files(with: &[WeightedFile]) -> anyhow::Result<Vec<String>> {
    let files = with.iter().filter(|with| !with.is_of_library());
    files.map(|file| Ok(blocklora_spec::Adapter::open(&file.path)?.manifest().name.clone())).collect()
}

impl Members {
    /// Makes the adapters known to the daemon, for the length of this connection, and checks that they fit `model` and
    /// each other.
    pub async fn new(daemon: &Daemon, model: &ChosenModel, with: &[WeightedFile]) -> anyhow::Result<Self> {
        let mut members: Vec<Member> = Vec::new();
        for with in with {
            let member = Member::new(daemon, model, with).await?;
            if let Some(other) = members.iter().find(|m| m.state.name == member.state.name) {
                bail!(
                    "{} and {}: both concepts are called {:?}: leave one out, or train it again with another --name",
                    other.shown.display(),
                    with.path.display(),
                    member.state.name
                );
            }
            members.push(member);
        }
        Ok(Self(members))
    }

    /// Adds the concepts that `prompt` names and that are neither in the set nor built into the model: those of the
    /// library that are called so. Fails on one that is nowhere.
    pub async fn add_named(&mut self, daemon: &Daemon, model: &ChosenModel, prompt: &str) -> anyhow::Result<()> {
        // Where only the daemon can read the model's folder, only the daemon can tell what is built in.
        let Some(folder) = model.folder() else { return Ok(()) };
        let built_in = baked_concepts(&folder)?;
        for name in Prompt::parse(prompt).concepts() {
            if built_in.iter().any(|c| c.name == name) || self.0.iter().any(|m| m.state.name == name) {
                continue;
            }
            let named = WeightedFile { path: name.into(), weight: 1.0 };
            let member = match daemon.client.open_adapter(name).await {
                Ok(adapter) => Member::of(adapter, model, &named).await?,
                Err(error) if error.kind() == Some(ErrorKind::AdapterNotFound) => {
                    let given = self.0.iter().map(|m| &m.state.name).chain(built_in.iter().map(|c| &c.name));
                    let given: Vec<String> = given.map(|name| format!("<{name}>")).collect();
                    let given =
                        if given.is_empty() { String::new() } else { format!(" (given: {})", given.join(", ")) };
                    bail!(
                        "the prompt names <{name}>, which is neither given{given} nor a concept of the library: add \
                         --with FILE; {error}"
                    );
                }
                Err(error) => return Err(error.into()),
            };
            self.0.push(member);
        }
        Ok(())
    }

    /// As the daemon takes them.
    pub fn entries(&self) -> Vec<Entry> {
        self.0.iter().map(|m| Entry::new(&m.adapter).weight(f64::from(m.weight))).collect()
    }

    /// Fails, before anything costly, on a concept that is already built into the model.
    pub fn check_model(&self, model: &ChosenModel) -> anyhow::Result<()> {
        let Some(folder) = model.folder() else { return Ok(()) };
        let built_in = baked_concepts(&folder)?;
        match self.0.iter().find(|member| built_in.iter().any(|c| c.name == member.state.name)) {
            Some(Member { state, shown, .. }) => bail!(
                "{}: the concept {:?} is already built into {}: leave it out",
                shown.display(),
                state.name,
                folder.display()
            ),
            None => Ok(()),
        }
    }
}

impl Member {
    async fn new(daemon: &Daemon, model: &ChosenModel, with: &WeightedFile) -> anyhow::Result<Self> {
        let adapter = if with.is_of_library() {
            daemon.client.open_adapter(&with.path.to_string_lossy()).await?
        } else {
            daemon.client.borrow_adapter(&with.path).await?
        };
        Self::of(adapter, model, with).await
    }

    async fn of(adapter: Adapter, model: &ChosenModel, with: &WeightedFile) -> anyhow::Result<Self> {
        let state = adapter.state().await?;
        check_base(&state, model, &with.path)?;
        Ok(Self { adapter, state, weight: with.weight, shown: with.path.clone() })
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
