//! Finding plugins by their manifests. Nothing is loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blocklora_sdk::ABI_VERSION;
use blocklora_sdk::manifest::{Manifest, PluginKind};

/// Folders to search, separated by colons: before all others.
pub const PATH_VARIABLE: &str = "BLOCKLORA_PLUGIN_PATH";

/// The plugins of the source tree that this was built from.
const SOURCE_TREE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins");

/// Bytes of a manifest.
const MANIFEST_BYTES_MAX: u64 = 64 << 10;

/// A manifest and where its library should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The manifest's file.
    pub path: PathBuf,
    /// What it says.
    pub manifest: Manifest,
    /// The library.
    pub library: PathBuf,
}

/// Something that looks like a manifest and is none, or that means nothing in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The file.
    pub path: PathBuf,
    /// Why, and the cure.
    pub reason: String,
}

/// What is in the folders: for every (kind, id) the first one found.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// The plugins by kind and id.
    pub found: BTreeMap<(PluginKind, String), Found>,
    /// Files that are no manifests, and aliases that are somebody else's.
    pub broken: Vec<Broken>,
}

/// The folders to search, in order: `$BLOCKLORA_PLUGIN_PATH`, the user's, and those that this release is installed in.
pub fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Some(path) = std::env::var_os(PATH_VARIABLE) {
        folders.extend(std::env::split_paths(&path).filter(|p| !p.as_os_str().is_empty()));
    }
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let data = data.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")));
    folders.extend(data.map(|data| data.join("blocklora/plugins").join(ABI_VERSION.0.to_string())));
    folders.extend(our_folders());
    folders
}

/// Where a release installs its plugins: beside the executable, in the system's folders; and the source tree that this
/// was built from.
fn our_folders() -> Vec<PathBuf> {
    let major = ABI_VERSION.0.to_string();
    let executable = std::env::current_exe().unwrap_or_default();
    let beside = executable.parent().unwrap_or(Path::new(""));
    let mut folders = vec![beside.join("plugins")];
    // <prefix>/bin/blocklora and <prefix>/lib/blocklora/plugins/1
    folders.extend(beside.parent().map(|prefix| prefix.join("lib/blocklora/plugins").join(&major)));
    folders.push(PathBuf::from("/usr/lib/blocklora/plugins").join(&major));
    folders.extend(source_tree());
    folders
}

/// Whether the manifest at `path` lies where a release installs its plugins.
pub fn is_ours(path: &Path) -> bool {
    path.parent().is_some_and(|folder| our_folders().iter().any(|ours| ours == folder))
}

/// The plugins' folders of the source tree that this was built from, if it is still there.
fn source_tree() -> Vec<PathBuf> {
    let Ok(entries) = Path::new(SOURCE_TREE).read_dir() else { return Vec::new() };
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// Reads every manifest in `folders`. Folders that are not there hold none.
pub fn search(folders: &[PathBuf]) -> Catalogue {
    let mut catalogue = Catalogue::default();
    for folder in folders {
        let Ok(entries) = folder.read_dir() else { continue };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|p| is_manifest(p)).collect();
        files.sort();
        for path in files {
            match read(&path) {
                Ok(found) => {
                    let key = (found.manifest.kind, found.manifest.id.clone());
                    catalogue.found.entry(key).or_insert(found);
                }
                Err(reason) => catalogue.broken.push(Broken { path, reason }),
            }
        }
    }
    catalogue.broken.extend(clashes(&catalogue.found));
    catalogue
}

/// Aliases that are other plugins' ids, or aliases of those before them: they never count.
fn clashes(found: &BTreeMap<(PluginKind, String), Found>) -> Vec<Broken> {
    let mut owners: BTreeMap<(PluginKind, &str), String> = BTreeMap::new();
    owners.extend(found.keys().map(|(kind, id)| ((*kind, id.as_str()), format!("the id of {kind}-{id}"))));
    let mut clashes = Vec::new();
    for ((kind, id), Found { path, manifest, .. }) in found {
        for alias in manifest.aliases.keys() {
            if let Some(owner) = owners.get(&(*kind, alias)) {
                let reason = format!("its alias {alias:?} is {owner}, which counts: choose another");
                clashes.push(Broken { path: path.clone(), reason });
            } else {
                owners.insert((*kind, alias), format!("an alias of {kind}-{id}"));
            }
        }
    }
    clashes
}

/// The plugin of this kind and id, as [`search`] finds it, without a look at the others.
pub fn find(folders: &[PathBuf], kind: PluginKind, id: &str) -> Option<Found> {
    // Nothing that leads out of the folders; what is no id is none of them.
    if !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return None;
    }
    let name = format!("{kind}-{id}.toml");
    let files = folders.iter().map(|folder| folder.join(&name)).filter(|path| is_manifest(path));
    files.into_iter().find_map(|path| read(&path).ok())
}

/// `<kind>-<id>.toml`.
fn is_manifest(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kinds = ["merge-", "train-", "sample-"];
    name.ends_with(".toml") && kinds.iter().any(|kind| name.starts_with(kind)) && path.is_file()
}

/// Reads one manifest.
pub fn read(path: &Path) -> Result<Found, String> {
    let bytes = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if bytes > MANIFEST_BYTES_MAX {
        return Err(format!("{bytes} bytes are too many for a manifest"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let manifest = parse(&text)?;
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if stem != manifest.full_name() {
        return Err(format!("it describes {}: name the file {0}.toml", manifest.full_name()));
    }
    let library = library_of(path, &manifest.library);
    Ok(Found { path: path.to_owned(), manifest, library })
}

/// Reads a manifest's text.
pub fn parse(text: &str) -> Result<Manifest, String> {
    // A newer one may have keys that this release does not know.
    let abi = toml::from_str::<Abi>(text).ok().and_then(|Abi { abi }| blocklora_sdk::manifest::abi_version(&abi));
    if let Some((major, minor)) = abi.filter(|abi| *abi > ABI_VERSION) {
        let (ours, our_minor) = ABI_VERSION;
        return Err(format!(
            "it was built for ABI {major}.{minor}, and this release has {ours}.{our_minor}: install a newer BlockLoRA, or \
             the plugin built for {ours}.{our_minor}"
        ));
    }
    let manifest: Manifest =
        toml::from_str(text).map_err(|e| format!("not a plugin's manifest: {}", e.message().replace('\n', " ")))?;
    manifest.check()?;
    Ok(manifest)
}

/// The one key that every version of the manifest has.
#[derive(serde::Deserialize)]
struct Abi {
    abi: String,
}

/// Beside the manifest; for a manifest in the source tree beside the executable, where cargo puts it.
fn library_of(manifest: &Path, name: &str) -> PathBuf {
    let beside = manifest.with_file_name(name);
    if beside.exists() || !manifest.starts_with(SOURCE_TREE) {
        return beside;
    }
    let executable = std::env::current_exe().unwrap_or_default();
    let folders = executable.ancestors().skip(1).take(2).flat_map(|folder| [folder.to_owned(), folder.join("deps")]);
    // Cargo does not always put both places up to date.
    let modified = |path: &PathBuf| path.metadata().and_then(|meta| meta.modified()).ok();
    folders.map(|folder| folder.join(name)).filter(|path| path.exists()).max_by_key(modified).unwrap_or(beside)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ours_are_those_of_the_tree_and_of_an_installation() {
        let tree = source_tree().pop().unwrap();
        assert!(is_ours(&tree.join("x.toml")) && is_ours(Path::new("/usr/lib/blocklora/plugins/1/x.toml")));
        assert!(!is_ours(&tempfile::tempdir().unwrap().path().join("x.toml")));
    }

    const MANIFEST: &str = "id = \"x\"\nkind = \"merge\"\nversion = \"1\"\nabi = \"1.0\"\nlibrary = \"libx.so\"\n\
                            summary = \"s\"\nlicence = \"MIT\"\nmemory_mib = 1\n";

    fn search_one(name: &str, text: &str) -> Catalogue {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        search(&[folder.path().to_owned()])
    }

    #[test]
    fn a_manifest_is_found_by_its_name() {
        let found = search_one("merge-x.toml", MANIFEST).found;
        let found = found.get(&(PluginKind::Merge, "x".to_owned())).unwrap();
        assert_eq!(found.library, found.path.with_file_name("libx.so"));
        assert!(search_one("Cargo.toml", MANIFEST).found.is_empty());
        assert!(search_one("merge-x.txt", MANIFEST).found.is_empty());
    }

    #[test]
    fn the_first_folder_wins() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (folder, summary) in folders.iter().zip(["first", "second"]) {
            let text = MANIFEST.replace("summary = \"s\"", &format!("summary = \"{summary}\""));
            std::fs::write(folder.path().join("merge-x.toml"), text).unwrap();
        }
        let found = search(&folders.each_ref().map(|f| f.path().to_owned())).found;
        assert_eq!(found.values().map(|f| f.manifest.summary.as_str()).collect::<Vec<_>>(), ["first"]);
    }

    #[test]
    fn aliases_that_never_count_are_told() {
        let folder = tempfile::tempdir().unwrap();
        for (id, aliases) in [("x", "y = {}\nz = {}\n"), ("y", "w = {}\nz = {}\n"), ("v", "")] {
            let text = MANIFEST.replace("id = \"x\"", &format!("id = {id:?}"));
            let text = if aliases.is_empty() { text } else { format!("{text}[aliases]\n{aliases}") };
            std::fs::write(folder.path().join(format!("merge-{id}.toml")), text).unwrap();
        }
        let broken = search(&[folder.path().to_owned()]).broken;
        let told: Vec<(&str, &str)> =
            broken.iter().map(|b| (b.path.file_stem().unwrap().to_str().unwrap(), b.reason.as_str())).collect();
        let expected = [
            ("merge-x", "its alias \"y\" is the id of merge-y, which counts: choose another"),
            ("merge-y", "its alias \"z\" is an alias of merge-x, which counts: choose another"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn one_is_found_as_among_all() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (folder, text) in folders.iter().zip(["not a manifest", MANIFEST, MANIFEST]) {
            std::fs::write(folder.path().join("merge-x.toml"), text).unwrap();
        }
        let folders = folders.each_ref().map(|f| f.path().to_owned());
        let found = find(&folders, PluginKind::Merge, "x");
        assert_eq!(found.as_ref(), search(&folders).found.values().next());
        assert_eq!(found.unwrap().path, folders[1].join("merge-x.toml"));
        for (kind, id) in [(PluginKind::Sample, "x"), (PluginKind::Merge, "y"), (PluginKind::Merge, "../x")] {
            assert_eq!(find(&folders, kind, id), None);
        }
    }

    #[test]
    fn wrong_manifests_say_what_is_wrong() {
        for (change, expected) in [
            (("kind = \"merge\"", "kind = \"other\""), "unknown variant"),
            (("id = \"x\"", "id = \"X\""), "id = \"X\": must be"),
            (("libx.so", "../libx.so"), "library"),
            (("abi = \"1.0\"", "abi = \"one\""), "major.minor"),
            (("memory_mib = 1", "memory_mib = 0"), "memory_mib"),
            (("memory_mib = 1", "memory_mib = 1\nextra = 1"), "extra"),
            (("abi = \"1.0\"", "abi = \"1.99\"\nextra = 1"), "built for ABI 1.99, and this release has 1."),
            (("id = \"x\"", "id = \"y\""), "merge-y.toml"),
        ] {
            let broken = search_one("merge-x.toml", &MANIFEST.replace(change.0, change.1)).broken;
            assert!(broken.len() == 1 && broken[0].reason.contains(expected), "{expected}: {broken:?}");
            assert!(!broken[0].reason.contains('\n'));
        }
    }
}
