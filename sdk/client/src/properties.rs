//! All properties of an object in one call.

use zbus::Connection;
use zbus::names::InterfaceName;

use crate::client::BUS_NAME;
use crate::error::{Error, Result};
use crate::proxies::Dict;

/// The properties of `interface` at `path`, by name.
pub(crate) async fn all(connection: &Connection, path: &str, interface: &str) -> Result<Dict> {
    let proxy = zbus::fdo::PropertiesProxy::builder(connection).destination(BUS_NAME).path(path).build().await?;
    let interface = InterfaceName::try_from(interface).map_err(Error::protocol)?;
    Ok(proxy.get_all(interface).await?)
}
