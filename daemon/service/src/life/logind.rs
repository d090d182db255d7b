//! Sleeping: the device rests before the machine does, and goes on after.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::oneshot;
use zbus::{Connection, OwnedFd};

use crate::daemon::Daemon;
use crate::jobs::queue::Control;

#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
trait Login {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<OwnedFd>;

    #[zbus(signal)]
    fn prepare_for_sleep(&self, start: bool) -> zbus::Result<()>;
}

/// How long the machine waits for us at most: logind's own default is five seconds.
const PATIENCE: Duration = Duration::from_secs(4);

/// Follows logind on the machine's bus for as long as it is there.
pub async fn follow(daemon: Arc<Daemon>, system_bus: Connection) {
    if let Err(error) = watch(&daemon, &system_bus).await {
        tracing::info!("no word of the machine's sleep: {error}");
    }
}

async fn watch(daemon: &Daemon, system_bus: &Connection) -> zbus::Result<()> {
    let login = LoginProxy::new(system_bus).await?;
    let mut signals = login.receive_prepare_for_sleep().await?;
    let inhibit = || login.inhibit("sleep", "BlockLoRA", "The running step is finished first", "delay");
    let mut inhibitor = Some(inhibit().await?);
    let mut asleep = None;
    while let Some(signal) = signals.next().await {
        if signal.args()?.start {
            let (reply, at_rest) = oneshot::channel();
            let (awake, until) = std::sync::mpsc::channel();
            daemon.queue.control(Control::Suspend { reply, until });
            if tokio::time::timeout(PATIENCE, at_rest).await.is_err() {
                tracing::warn!("the machine sleeps before the running step has ended");
            }
            asleep = Some(awake);
            inhibitor = None;
        } else {
            asleep = None;
            inhibitor = Some(inhibit().await?);
        }
    }
    drop((asleep, inhibitor));
    Ok(())
}
