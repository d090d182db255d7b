//! Pictures of a drawing in progress, over a SOCK_SEQPACKET pair: newest wins.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair, sockopt};

use crate::error::{Error, Result};

/// "BLPV", little-endian.
pub const MAGIC: u32 = 0x5650_4C42;

/// Which frame it is.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Picture, from 0.
    pub index: u32,
    /// Steps done.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
}

struct Sink {
    socket: OwnedFd,
    interval: Duration,
    max_side: u32,
    last: Option<Instant>,
    /// The newest frame that did not fit yet.
    pending: Option<Vec<u8>>,
}

/// Who watches a job.
#[derive(Default)]
pub struct Previews {
    sinks: Mutex<Vec<Sink>>,
}

/// Watchers of one job.
const SINKS_MAX: usize = 16;

impl Previews {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Sink>> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new watcher: the end that the client gets.
    pub fn open(&self, interval: Duration, max_side: u32) -> Result<OwnedFd> {
        let fail = |e: rustix::io::Errno| Error::io("previews", &e.into());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(fail)?;
        // The client's end blocks, as programs expect.
        rustix::io::ioctl_fionbio(&theirs, false).map_err(fail)?;
        let mut sinks = self.lock();
        if sinks.len() >= SINKS_MAX {
            return Err(Error::option(format!("{SINKS_MAX} watch this job's previews already")));
        }
        sinks.push(Sink { socket: ours, interval, max_side, last: None, pending: None });
        Ok(theirs)
    }

    /// How many watch: those who have gone no longer do.
    pub fn watchers(&self) -> usize {
        self.flush();
        self.lock().len()
    }

    /// The largest side that a watcher waits for now, if one does: nobody decodes what nobody looks at.
    pub fn due(&self) -> Option<u32> {
        let due = |sink: &&Sink| sink.last.is_none_or(|last| last.elapsed() >= sink.interval);
        self.lock().iter().filter(due).map(|sink| sink.max_side).max()
    }

    /// Shows `png` to those who wait for it.
    pub fn show(&self, frame: Frame, width: u32, height: u32, png: &[u8]) {
        let words = [MAGIC, 1, frame.index, frame.step, frame.steps, width, height, 1];
        let mut packet: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        packet.extend_from_slice(png);
        for sink in self.lock().iter_mut() {
            if sink.last.is_none_or(|last| last.elapsed() >= sink.interval) {
                sink.last = Some(Instant::now());
                sink.pending = Some(packet.clone());
            }
        }
        self.flush();
    }

    /// Sends what did not fit before.
    pub fn flush(&self) {
        self.lock().retain_mut(|sink| match sink.send() {
            Ok(()) => true,
            // The watcher has gone.
            Err(_) => false,
        });
    }

    /// The job has ended: watchers read the end of the stream.
    pub fn close(&self) {
        self.lock().clear();
    }
}

impl Sink {
    fn send(&mut self) -> rustix::io::Result<()> {
        // A socket is writable while at most a quarter of its buffer is taken, and the kernel doubles the size that it
        // is given: with the frame's own size a second frame fits only once the first has been read.
        let mut poll_fd = [PollFd::new(&self.socket, PollFlags::OUT)];
        poll(&mut poll_fd, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let events = poll_fd[0].revents();
        if events.intersects(PollFlags::HUP | PollFlags::ERR) {
            return Err(rustix::io::Errno::PIPE);
        }
        let Some(packet) = self.pending.take() else { return Ok(()) };
        if !events.contains(PollFlags::OUT) {
            self.pending = Some(packet);
            return Ok(());
        }
        sockopt::set_socket_send_buffer_size(&self.socket, packet.len())?;
        match send(&self.socket, &packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => self.pending = Some(packet),
            Err(rustix::io::Errno::MSGSIZE) => {}
            result => drop(result?),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::net::{RecvFlags, recv};

    use super::*;

    #[test]
    fn the_newest_frame_wins() {
        let previews = Previews::default();
        let client = previews.open(Duration::ZERO, 256).unwrap();
        for step in 0..100u32 {
            previews.show(Frame { index: 0, step, steps: 100 }, 8, 8, &[step as u8; 5000]);
        }
        let mut seen = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        // One frame is on its way; what comes after it is the last one.
        while let Ok((n, _)) = recv(&client, &mut buffer[..], RecvFlags::DONTWAIT) {
            seen.push(u32::from_le_bytes(buffer[12..16].try_into().unwrap()));
            assert_eq!(n, 32 + 5000);
            previews.flush();
        }
        assert_eq!(seen.first(), Some(&0));
        assert_eq!(seen.last(), Some(&99));
        assert!(seen.len() <= 4, "{seen:?}");
        previews.close();
        assert_eq!(recv(&client, &mut buffer[..], RecvFlags::empty()).unwrap().0, 0);
    }

    #[test]
    fn a_watcher_who_goes_is_forgotten() {
        let previews = Previews::default();
        drop(previews.open(Duration::ZERO, 256).unwrap());
        previews.show(Frame { index: 0, step: 1, steps: 2 }, 8, 8, &[0; 100]);
        assert_eq!(previews.due(), None);
    }
}
