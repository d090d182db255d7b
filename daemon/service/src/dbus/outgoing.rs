//! Messages on their way to one client. What waits is weighed: one that does not read costs so much and no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use zbus::{Connection, Message};

use super::MESSAGE_BYTES_MAX;
use super::peer::Place;

/// Weight that may wait before no more calls are read.
const WEIGHT_MAX: usize = 2 * MESSAGE_BYTES_MAX;
/// What a descriptor weighs, in bytes: those that wait for one client must not be all that the daemon may have.
const FD_WEIGHT: usize = WEIGHT_MAX / 256;
/// Messages that may wait, however light.
const COUNT_MAX: usize = 16_384;

/// How many bytes a message counts as.
pub fn weight(message: &Message) -> usize {
    message.data().len() + FD_WEIGHT * message.data().fds().len()
}

/// A message, and what it holds until it has left.
struct Item {
    message: Message,
    /// Of the call that it answers.
    place: Option<Place>,
    is_signal: bool,
    since: Instant,
}

/// What is waiting, of one kind.
#[derive(Default)]
struct Load {
    weight: AtomicUsize,
    count: AtomicUsize,
}

impl Load {
    fn add(&self, weight: usize) {
        self.weight.fetch_add(weight, Ordering::AcqRel);
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    fn take(&self, weight: usize) {
        self.weight.fetch_sub(weight, Ordering::AcqRel);
        self.count.fetch_sub(1, Ordering::AcqRel);
    }

    fn is_full(&self) -> bool {
        self.weight.load(Ordering::Acquire) > WEIGHT_MAX || self.count.load(Ordering::Acquire) >= COUNT_MAX
    }
}

/// The messages that wait to be sent to one client.
pub struct Outgoing {
    sender: mpsc::UnboundedSender<Item>,
    loads: Arc<Loads>,
}

#[derive(Default)]
struct Loads {
    replies: Load,
    signals: Load,
    /// Something has left.
    left: Notify,
}

impl Loads {
    fn of(&self, is_signal: bool) -> &Load {
        if is_signal { &self.signals } else { &self.replies }
    }
}

impl Outgoing {
    /// Sends what comes, in order. `give_up` is called when a message has waited for `patience` and did not leave.
    pub fn new(connection: Connection, patience: Duration, give_up: impl FnOnce() + Send + 'static) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Item>();
        let loads = Arc::new(Loads::default());
        let sent = loads.clone();
        tokio::spawn(async move {
            while let Some(Item { message, place, is_signal, since }) = receiver.recv().await {
                // All that waited before it counts, too.
                let left = patience.saturating_sub(since.elapsed());
                match tokio::time::timeout(left, connection.send(&message)).await {
                    Ok(Ok(())) => {}
                    // A body that cannot be sent is one message's fault; a broken connection is noticed by its reader.
                    Ok(Err(error)) => tracing::debug!("cannot send: {error}"),
                    Err(_) => {
                        give_up();
                        break;
                    }
                }
                drop(place);
                sent.of(is_signal).take(weight(&message));
                sent.left.notify_waiters();
            }
        });
        Self { sender, loads }
    }

    /// Adds a signal; false if too many wait already.
    pub fn signal(&self, message: &Message) -> bool {
        if self.loads.signals.is_full() {
            return false;
        }
        self.add(Item { message: message.clone(), place: None, is_signal: true, since: Instant::now() });
        true
    }

    /// Adds the reply to a call, whose place is free once it has left.
    pub fn reply(&self, message: Message, place: Option<Place>) {
        self.add(Item { message, place, is_signal: false, since: Instant::now() });
    }

    fn add(&self, item: Item) {
        self.loads.of(item.is_signal).add(weight(&item.message));
        // It fails only when the connection has ended.
        let _ = self.sender.send(item);
    }

    /// Waits until so little waits that calls may be answered.
    pub async fn room(&self) {
        until(&self.loads.left, || !self.loads.replies.is_full()).await;
    }
}

/// Waits until `holds`, which is looked at again whenever `changed` is told.
pub async fn until(changed: &Notify, holds: impl Fn() -> bool) {
    loop {
        let told = changed.notified();
        tokio::pin!(told);
        // From here on nothing is missed.
        told.as_mut().enable();
        if holds() {
            return;
        }
        told.await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::AtomicBool;

    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;
    use zbus::Guid;
    use zbus::connection::Builder;

    use super::super::stream::ClientStream;
    use super::*;

    /// A client whose end reads what the test reads, and whether it was given up.
    async fn client(patience: Duration) -> (Outgoing, UnixStream, Arc<AtomicBool>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let builder = Builder::authenticated_socket(ClientStream(ours), Guid::generate()).p2p();
        let gone = Arc::new(AtomicBool::new(false));
        let noted = gone.clone();
        let give_up = move || noted.store(true, Ordering::Release);
        (Outgoing::new(builder.build().await.unwrap(), patience, give_up), theirs, gone)
    }

    fn message(bytes: usize) -> Message {
        Message::signal("/a", "b.C", "D").build(&"x".repeat(bytes)).unwrap()
    }

    #[tokio::test]
    async fn what_waits_is_bounded_by_its_bytes() {
        let (outgoing, mut client, gone) = client(Duration::from_secs(60)).await;
        let large = message(1 << 20);
        let fits = (0..100).take_while(|_| outgoing.signal(&large)).count();
        // The one that is being sent counts, and so does the one that makes it too much.
        assert!((32..=34).contains(&fits), "{fits}");
        // Signals do not keep calls from being answered, unread replies do.
        outgoing.room().await;
        (0..33).for_each(|_| outgoing.reply(large.clone(), None));
        assert!(tokio::time::timeout(Duration::from_millis(100), outgoing.room()).await.is_err());
        let reader = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 20];
            while client.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        tokio::time::timeout(Duration::from_secs(60), outgoing.room()).await.unwrap();
        assert!(!gone.load(Ordering::Acquire));
        reader.abort();
    }

    #[tokio::test]
    async fn files_that_wait_are_bounded_too() {
        let (outgoing, _client, _) = client(Duration::from_secs(60)).await;
        let file = crate::memfd::sealed("file", b"x").unwrap();
        let fds: Vec<zbus::Fd> = (0..16).map(|_| zbus::Fd::from(&file)).collect();
        let light = Message::signal("/a", "b.C", "D").build(&fds).unwrap();
        // The socket itself takes some of them.
        (0..1000).for_each(|_| outgoing.reply(light.clone(), None));
        assert!(tokio::time::timeout(Duration::from_millis(300), outgoing.room()).await.is_err());
    }

    #[tokio::test]
    async fn who_reads_a_little_now_and_then_is_given_up_too() {
        let (outgoing, mut client, gone) = client(Duration::from_millis(600)).await;
        // Each leaves in time, the last of them would not.
        (0..200).for_each(|_| outgoing.reply(message(64 << 10), None));
        let mut buffer = vec![0; 64 << 10];
        for _ in 0..100 {
            client.read_exact(&mut buffer).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            if gone.load(Ordering::Acquire) {
                return;
            }
        }
        panic!("five seconds of patience");
    }
}
