//! The interfaces as their committed description has them. It is the daemon's own table of methods and types: every
//! call and every reply is checked against it, and introspection answers with it.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use crate::error::{Error, Result};

/// The files, in the order in which introspection lists them.
const FILES: [&str; 6] = [
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Manager.xml"),
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Model.xml"),
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Adapter.xml"),
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Composition.xml"),
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Job.xml"),
    include_str!("../../../../sdk/client/interfaces/org.blocklora.Daemon1.Plugin.xml"),
];

/// The interfaces that every object has, and those of the bus itself.
const STANDARD: &str = include_str!("standard.xml");

/// One interface.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// By name.
    pub methods: BTreeMap<String, Method>,
    /// By name.
    pub properties: BTreeMap<String, Property>,
    /// By name: the signature of the arguments.
    pub signals: BTreeMap<String, String>,
    /// Its element, without comments.
    pub xml: String,
}

/// One method.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Method {
    /// Signature of what it takes.
    pub takes: String,
    /// Signature of what it gives.
    pub gives: String,
}

/// One property.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Property {
    /// Its type.
    pub signature: String,
    /// Whether it can be set.
    pub writable: bool,
}

/// All interfaces by name.
pub static INTERFACES: LazyLock<BTreeMap<String, Interface>> = LazyLock::new(|| {
    let all = FILES.iter().chain([&STANDARD]).flat_map(|xml| parse(xml));
    all.map(|interface| (interface.name.clone(), interface)).collect()
});

/// The interface `name`.
pub fn interface(name: &str) -> Option<&'static Interface> {
    INTERFACES.get(name)
}

/// The value of `attribute` in an element's text.
fn attribute<'a>(element: &'a str, attribute: &str) -> Option<&'a str> {
    let start = element.find(&format!(" {attribute}=\""))? + attribute.len() + 3;
    element[start..].split('"').next()
}

/// Reads the interfaces of one description. The files are our own and a test reads them with every attribute, so that
/// this need not be a whole XML parser: elements, attributes in double quotes, comments.
fn parse(xml: &str) -> Vec<Interface> {
    let mut text = String::new();
    let mut rest = xml;
    while let Some(start) = rest.find("<!--") {
        text.push_str(rest[..start].trim_end_matches([' ', '\n']));
        text.push('\n');
        rest = rest[start..].find("-->").map_or("", |end| rest[start + end + 3..].trim_start_matches('\n'));
    }
    text.push_str(rest);
    let mut list: Vec<Interface> = Vec::new();
    let mut member = String::new();
    for line in text.lines() {
        let element = line.trim();
        let name = || attribute(element, "name").unwrap_or_default().to_owned();
        if element.starts_with("<interface") {
            list.push(Interface { name: name(), ..Interface::default() });
        }
        let Some(current) = list.last_mut() else { continue };
        if element.starts_with("</node") {
            continue;
        }
        if !element.is_empty() {
            current.xml.push_str(line);
            current.xml.push('\n');
        }
        if element.starts_with("<method") {
            member = name();
            current.methods.insert(member.clone(), Method::default());
        } else if element.starts_with("<signal") {
            member = name();
            current.signals.insert(member.clone(), String::new());
        } else if element.starts_with("<arg") {
            let signature = attribute(element, "type").unwrap_or_default();
            match (current.methods.get_mut(&member), current.signals.get_mut(&member)) {
                (Some(method), _) if attribute(element, "direction") == Some("out") => method.gives.push_str(signature),
                (Some(method), _) => method.takes.push_str(signature),
                (None, Some(arguments)) => arguments.push_str(signature),
                (None, None) => {}
            }
        } else if element.starts_with("<property") {
            let signature = attribute(element, "type").unwrap_or_default().to_owned();
            let writable = attribute(element, "access") == Some("readwrite");
            current.properties.insert(name(), Property { signature, writable });
        }
    }
    list
}

/// Where an interface has `member`; with `name` only that interface is asked.
pub fn find_method(
    interfaces: &[&'static str],
    name: Option<&str>,
    member: &str,
) -> Option<(&'static Interface, &'static Method)> {
    let asked = interfaces.iter().filter(|i| name.is_none_or(|name| name == **i));
    asked.filter_map(|name| interface(name)).find_map(|i| Some((i, i.methods.get(member)?)))
}

/// Fails unless a reply has the declared signature: a daemon that breaks its own contract says so at once.
pub fn check_reply(member: &str, declared: &str, actual: &str) -> Result<()> {
    // A single structure as the whole body is written without its parentheses.
    if declared == actual || format!("({declared})") == actual {
        return Ok(());
    }
    Err(Error::failed(format!("{member}: the reply is {actual:?}, declared as {declared:?}; this is a bug")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_description_is_read_whole() {
        let manager = interface("org.blocklora.Daemon1.Manager").unwrap();
        assert_eq!(manager.methods["Generate"], Method { takes: "oa{sv}a{sv}".into(), gives: "o".into() });
        assert_eq!(manager.methods["LeaseSlot"], Method { takes: "a{sv}a{sv}".into(), gives: "su".into() });
        assert_eq!(manager.properties["IdleUnloadUSec"], Property { signature: "t".into(), writable: true });
        let job = interface("org.blocklora.Daemon1.Job").unwrap();
        assert_eq!(job.signals["Finished"], "sa{sv}");
        assert_eq!(job.methods["Wait"], Method { takes: String::new(), gives: "sa{sv}".into() });
        let composition = interface("org.blocklora.Daemon1.Composition").unwrap();
        assert_eq!(composition.methods["Close"], Method::default());
        for file in FILES {
            let count = |tag: &str| file.matches(tag).count();
            let of: Vec<Interface> = parse(file);
            assert_eq!(of.len(), 1);
            assert_eq!(of[0].methods.len(), count("<method "));
            assert_eq!(of[0].properties.len(), count("<property "));
            assert!(!of[0].xml.contains("<!--") && of[0].xml.trim_end().ends_with("</interface>"), "{}", of[0].xml);
        }
    }
}
