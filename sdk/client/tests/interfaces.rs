//! The proxies against the committed interface files: every method, property and signal has its place.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

/// The members of the elements `kind` in an interface file.
fn members(xml: &str, kind: &str) -> BTreeSet<String> {
    // Comments may show elements, too.
    let mut plain = String::new();
    for part in xml.split("<!--") {
        plain += part.split_once("-->").map_or(part, |(_, rest)| rest);
    }
    let start = format!("<{kind} name=\"");
    plain.split(&start).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
}

/// `some_name` as `SomeName`.
fn pascal(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').map(capital).collect()
}

/// The members of one proxy in the source: (methods, properties, signals).
fn proxied(source: &str, interface: &str) -> [BTreeSet<String>; 3] {
    let body = source.split(&format!("interface = \"{interface}\"")).nth(1).unwrap();
    let body = body.split("\n}\n").next().unwrap();
    let mut sets: [BTreeSet<String>; 3] = Default::default();
    let mut attribute = "";
    for line in body.lines().map(str::trim) {
        if line.starts_with("#[zbus(") {
            attribute = line;
        } else if let Some(name) = line.strip_prefix("fn ").and_then(|rest| rest.split('(').next()) {
            let named = attribute.split("name = \"").nth(1).map(|rest| rest.split('"').next().unwrap().to_owned());
            let kind = match attribute {
                a if a.contains("property") => 1,
                a if a.contains("signal)") => 2,
                _ => 0,
            };
            sets[kind].insert(named.unwrap_or_else(|| pascal(name)));
            attribute = "";
        }
    }
    sets
}

#[test]
fn every_member_of_every_interface_has_its_proxy() {
    let crate_ = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(crate_.join("src/proxies.rs")).unwrap();
    for name in ["Manager", "Model", "Adapter", "Composition", "Job", "Plugin"] {
        let interface = format!("org.blocklora.Daemon1.{name}");
        let xml = std::fs::read_to_string(crate_.join("interfaces").join(format!("{interface}.xml"))).unwrap();
        let [methods, properties, signals] = proxied(&source, &interface);
        assert_eq!(methods, members(&xml, "method"), "{name}");
        assert_eq!(properties, members(&xml, "property"), "{name}");
        assert_eq!(signals, members(&xml, "signal"), "{name}");
    }
}
