//! A stub-sized model that is real in every part: what tests/golden/pipeline holds, with adapters trained on it here.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use zbus::{OwnedObjectPath, OwnedVariant};

use super::{Bus, Client, Daemon, Dict, ROOT, dict, training};

/// Its id.
pub const STUB: &str = "stub";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline").canonicalize().unwrap()
}

/// A daemon whose default model it is; `more` is further configuration.
pub fn daemon(more: &str) -> Daemon {
    daemon_in(more, &[])
}

/// As [`daemon`], with more environment.
pub fn daemon_in(more: &str, env: &[(&str, &str)]) -> Daemon {
    daemon_on(None, more, env)
}

/// As [`daemon_in`], also on `bus`.
pub fn daemon_on(bus: Option<&Bus>, more: &str, env: &[(&str, &str)]) -> Daemon {
    Daemon::start_in(bus, &format!("{}{more}", models()), &[], env)
}

/// As [`daemon`], with another configured precision.
pub fn daemon_with_precision(name: &str) -> Daemon {
    daemon_on(None, &format!("precision = {name:?}\n"), &[])
}

/// The section of the configuration, which may go on.
fn models() -> String {
    let folder = folder().display().to_string();
    format!("[models]\ndefault = {STUB:?}\nfolders = {{ {STUB} = {folder:?} }}\n")
}

/// Queues a training of `steps` steps that changes the model strongly; the job's path.
pub async fn train(client: &Client, name: &str, steps: u32) -> String {
    // Its Linears have eight rows.
    let partition = dict([("capacity", 4u32.into())]);
    train_with(client, "blocklora", name, steps, dict([("partition", zbus::Variant::from(partition))])).await
}

/// As [`train`], by another trainer, which owns all rows.
pub async fn train_by(client: &Client, trainer: &str, name: &str, steps: u32) -> String {
    train_with(client, trainer, name, steps, Dict::new()).await
}

async fn train_with(client: &Client, trainer: &str, name: &str, steps: u32, mut options: Dict) -> String {
    let rates = dict([("unet", 0.3f64.into()), ("tokens", 0.3f64.into()), ("text_encoder", 0.0f64.into())]);
    let (mut config, files) = training(steps);
    // The stub reads prompts of ten tokens: the templates are longer.
    config.extend(dict([
        ("checkpoint_every", 1000u32.into()),
        ("learning_rate", zbus::Variant::from(rates)),
        ("templates", false.into()),
    ]));
    let fds: Vec<zbus::Fd> = files.iter().map(|file| zbus::Fd::from(file.as_fd())).collect();
    options.extend(dict([("name", name.to_owned().into()), ("class_word", "dog".into())]));
    let body = (trainer, config, fds, options);
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "Train", &body).await.unwrap();
    job.as_str().to_owned()
}

/// Trains a small adapter into the library; its path.
pub async fn adapter(client: &Client, name: &str) -> String {
    let job = train(client, name, 3).await;
    let details = client.wait(&job).await.unwrap();
    OwnedObjectPath::try_from(details["adapter"].try_clone().unwrap()).unwrap().as_str().to_owned()
}

/// What a picture of 16 x 16 asks for.
pub fn picture(prompt: &str, seed: u64, steps: u32) -> Dict {
    let mut params = dict([("prompt", prompt.to_owned().into()), ("seed", seed.into())]);
    params.insert("steps".to_owned(), OwnedVariant::from(steps));
    params
}
