//! The interfaces that every object has: Introspectable, Peer, Properties, and ObjectManager at the root.

use std::collections::HashMap;

use zbus::{ObjectPath, OwnedVariant, Variant};

use super::call::{Answer, Call, Refusal};
use super::interfaces::{self, Method, interface};
use super::value::{Dict, dict, strings};
use super::{bus_api, manager};
use crate::objects::{Object, ROOT, object_path};

/// What a path has that only leads to objects.
pub const NODE_INTERFACES: [&str; 2] = ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer"];

/// Answers a call of a standard interface; `object` is what is at `path`, if anything is.
pub async fn answer(
    call: &Call,
    object: Option<&Object>,
    path: &str,
    interface: &str,
    member: &str,
    method: &Method,
) -> Answer {
    match (interface.rsplit('.').next().unwrap_or_default(), member) {
        ("Introspectable", _) => call.reply(method, &introspect(call, object, path)),
        ("Peer", "Ping") => call.reply(method, &()),
        ("Peer", _) => match machine_id() {
            Some(id) => call.reply(method, &id),
            None => Err(Refusal::bus("FileNotFound", "/etc/machine-id cannot be read")),
        },
        ("Properties", "Get") => {
            let (interface, name): (String, String) = call.args()?;
            let mut all = properties(call, object, path, &interface).await?;
            let value = all.remove(&name).ok_or_else(|| unknown_property(&interface, &name))?;
            call.reply(method, &value)
        }
        ("Properties", "GetAll") => {
            let name: String = call.args()?;
            call.reply(method, &properties(call, object, path, &name).await?)
        }
        ("Properties", _) => {
            let (name, property, value): (String, String, OwnedVariant) = call.args()?;
            set(call, object, &name, &property, &value).await?;
            call.reply(method, &())
        }
        ("ObjectManager", _) => {
            let objects = call.daemon.objects().into_iter().filter(|(path, _)| path != ROOT);
            let objects: Vec<(String, Object)> = objects.collect();
            let of_others = |object: &Object| object.reader().is_some_and(|uid| uid != call.caller.uid);
            let all = !objects.iter().any(|(_, object)| of_others(object)) || call.reads_all().await;
            let entry = |(path, object): (String, Object)| {
                let texts = all || !of_others(&object);
                let own = object.properties(&call.daemon);
                let own = if texts { own } else { object.without_texts(&own) };
                (object_path(&path), HashMap::from([(object.interface(), own)]))
            };
            let all: HashMap<ObjectPath, HashMap<&str, Dict>> = objects.into_iter().map(entry).collect();
            call.reply(method, &all)
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("{path} has no method {member}"))),
    }
}

fn unknown_property(interface: &str, name: &str) -> Refusal {
    Refusal::bus("UnknownProperty", format!("{interface} has no property {name:?}"))
}

async fn properties(call: &Call, object: Option<&Object>, path: &str, name: &str) -> Result<Dict, Refusal> {
    if path == bus_api::PATH && name == "org.freedesktop.DBus" {
        return Ok(dict([("Features", strings(&[])), ("Interfaces", strings(&[]))]));
    }
    match object {
        // "" means every interface of the object.
        Some(object) if name.is_empty() || name == object.interface() => {
            let all = object.properties(&call.daemon);
            match object.reader() {
                Some(uid) if !call.reads(uid).await => Ok(object.without_texts(&all)),
                _ => Ok(all),
            }
        }
        Some(object) if object.interfaces().contains(&name) => Ok(Dict::new()),
        _ => Err(Refusal::bus("UnknownInterface", format!("{path} has no interface {name:?}"))),
    }
}

async fn set(
    call: &Call,
    object: Option<&Object>,
    name: &str,
    property: &str,
    value: &OwnedVariant,
) -> Result<(), Refusal> {
    let declared = interface(name).filter(|_| object.is_some_and(|o| o.interface() == name));
    let Some(declared) = declared.and_then(|i| i.properties.get(property)) else {
        return Err(unknown_property(name, property));
    };
    if !declared.writable {
        return Err(Refusal::bus("PropertyReadOnly", format!("{property} cannot be set")));
    }
    let value: &Variant = value;
    let signature = value.value_signature().to_string();
    if signature != declared.signature {
        let message = format!("{property} is of type {:?}, not {signature:?}", declared.signature);
        return Err(Refusal::bus("InvalidArgs", message));
    }
    manager::set_property(call, property, value).await
}

fn introspect(call: &Call, object: Option<&Object>, path: &str) -> String {
    let mut xml = "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n"
        .to_owned();
    let bus = ["org.freedesktop.DBus", NODE_INTERFACES[0], NODE_INTERFACES[1], "org.freedesktop.DBus.Properties"];
    let own = match object {
        Some(object) => object.interfaces(),
        None if path == bus_api::PATH => &bus[..],
        None => &NODE_INTERFACES[..],
    };
    for interface in own.iter().filter_map(|name| interfaces::interface(name)) {
        xml.push_str(&interface.xml);
    }
    let mut children = call.daemon.children(path);
    if call.caller.is_on_socket() {
        let extra = match path {
            "/org" => Some("freedesktop"),
            "/org/freedesktop" => Some("DBus"),
            _ => None,
        };
        children.extend(extra.map(str::to_owned));
    }
    for child in children {
        xml.push_str(&format!("  <node name=\"{child}\"/>\n"));
    }
    xml + "</node>\n"
}

fn machine_id() -> Option<String> {
    let paths = ["/etc/machine-id", "/var/lib/dbus/machine-id"];
    let id = paths.iter().find_map(|path| std::fs::read_to_string(path).ok())?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}
