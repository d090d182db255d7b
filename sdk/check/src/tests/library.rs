//! Does it load, and does it say the same everywhere.

use blocklora_sdk::manifest::PluginKind;

use crate::subject::{Subject, Verdict, parse_manifest, wrong};

/// The library is open by now.
pub fn loads(subject: &Subject) -> Verdict {
    let (library, kind) = (&subject.library, subject.manifest.kind);
    if !library.has(kind) {
        return wrong(format!("the manifest says kind = \"{kind}\", but the library is none: correct one of them"));
    }
    for other in [PluginKind::Merge, PluginKind::Train, PluginKind::Sample] {
        if other != kind && library.has(other) {
            return wrong(format!("the library is \"{other}\", too; a library is of one kind"));
        }
    }
    Ok(())
}

/// Name, version, ABI version; and the text that the library was built with.
pub fn manifest_agrees(subject: &Subject) -> Verdict {
    let (library, manifest) = (&subject.library, &subject.manifest);
    let built_with = parse_manifest(library.manifest())
        .map_err(|e| format!("the manifest that the library was built with is wrong: {e}"))?;
    let (major, minor) = library.abi();
    let pairs = [
        ("kind and id", manifest.full_name(), library.name().to_owned()),
        ("version", manifest.version.clone(), library.version().to_owned()),
        ("abi", manifest.abi.clone(), format!("{major}.{minor}")),
    ];
    for (what, beside, inside) in pairs {
        if beside != inside {
            return wrong(format!("{what}: the manifest says {beside:?}, the library {inside:?}: correct one of them"));
        }
    }
    if *manifest != built_with {
        return wrong("the manifest beside the library differs from the one that it was built with: build it again");
    }
    Ok(())
}
