//! A new plugin crate, made from the SDK's templates.

use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

use blocklora_sdk::manifest::PluginKind;

/// What the templates are called.
const ID: &str = "my-method";

/// The files of a template, by their place in the crate.
macro_rules! template {
    ($kind:literal $(, $more:literal)*) => {
        &[
            ("Cargo.toml", include_str!(concat!("../../template/", $kind, "/Cargo.toml"))),
            (concat!($kind, "-my-method.toml"),
             include_str!(concat!("../../template/", $kind, "/", $kind, "-my-method.toml"))),
            ("src/lib.rs", include_str!(concat!("../../template/", $kind, "/src/lib.rs"))),
            $(($more, include_str!(concat!("../../template/", $kind, "/", $more))),)*
        ]
    };
}

/// The SDK in the source tree that this was built from.
const SDK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../plugin");

/// Writes the crate `<kind>-<id>` into `parent`, which passes its tests as it is, and returns its folder. `sdk` is the
/// folder of the SDK to build with; without it the one of the source tree that this was built from, if that is there.
/// Fails where the folder exists.
pub fn new_plugin(id: &str, kind: PluginKind, parent: &Path, sdk: Option<&Path>) -> Result<PathBuf> {
    let is_id = id.len() <= 64
        && id.starts_with(|c: char| c.is_ascii_lowercase())
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !id.ends_with('-');
    if !is_id {
        let message = format!("{id:?}: a plugin's id is 1 to 64 lower-case letters, digits and '-', a letter first");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let files: &[(&str, &str)] = match kind {
        PluginKind::Merge => template!("merge", "tests/laws.rs"),
        PluginKind::Sample => template!("sample"),
        PluginKind::Train => template!("train"),
    };
    let folder = parent.join(format!("{kind}-{id}"));
    if folder.exists() {
        let message = format!("{} exists: choose another id or folder", folder.display());
        return Err(Error::new(ErrorKind::AlreadyExists, message));
    }
    // Behind the id, so that no id gives a name that Rust or the SDK has already.
    let type_name = id.split('-').map(capitalised).collect::<String>() + "Method";
    let dependency = format!("{{ path = {:?} }}", sdk_folder(sdk)?.display().to_string());
    for (name, text) in files {
        let name = name.replace(ID, id);
        let text = text
            .replace("{ path = \"../../plugin\" }", &dependency)
            .replace(ID, id)
            .replace(&ID.replace('-', "_"), &id.replace('-', "_"))
            .replace("MyMethod", &type_name);
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(&folder))?;
        std::fs::write(path, text)?;
    }
    Ok(folder)
}

/// The folder of the SDK, after a look whether it is one.
fn sdk_folder(given: Option<&Path>) -> Result<PathBuf> {
    let folder = given.unwrap_or(Path::new(SDK));
    let cure = "give sdk/plugin of a source tree of BlockLoRA with --sdk";
    let failed = |reason: String| Error::new(ErrorKind::NotFound, format!("{}: {reason}: {cure}", folder.display()));
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml"));
    let manifest = manifest.map_err(|e| failed(format!("no SDK is there ({e})")))?;
    if !manifest.lines().any(|line| line.trim() == "name = \"blocklora-sdk\"") {
        return Err(failed("its Cargo.toml is that of something else".to_owned()));
    }
    folder.canonicalize()
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect()
}
