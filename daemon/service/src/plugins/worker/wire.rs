//! How a worker and its host talk: heads as JSON over a socket, numbers through memory that both share.
//!
//! Each side writes its numbers into its own half of the memory before it sends the head, and nobody sends before the
//! other has read: at any time one side speaks. Reading checks every length; the memory is read like a file, so that
//! the other side cannot change or cut off what was read.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Where the worker's half begins.
const HALF: u64 = 1 << 40;
/// Bytes of a head.
const HEAD_BYTES_MAX: usize = 64 << 20;
/// Bytes of all numbers of a message.
const NUMBERS_BYTES_MAX: u64 = 8 << 30;

/// Some numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// Floats.
    F32(Vec<f32>),
    /// Row indices.
    U32(Vec<u32>),
    /// Bytes.
    U8(Vec<u8>),
}

/// A message's numbers, taken in the order in which they were put.
#[derive(Debug, Default)]
pub struct Payload(pub std::collections::VecDeque<Numbers>);

impl Payload {
    pub fn put(&mut self, values: &[f32]) {
        self.0.push_back(Numbers::F32(values.to_vec()));
    }
    pub fn put_rows(&mut self, rows: &[u32]) {
        self.0.push_back(Numbers::U32(rows.to_vec()));
    }
    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.0.push_back(Numbers::U8(bytes.to_vec()));
    }
    pub fn take(&mut self) -> Result<Vec<f32>> {
        match self.0.pop_front() {
            Some(Numbers::F32(values)) => Ok(values),
            _ => Err(invalid("floats are missing")),
        }
    }
    pub fn take_rows(&mut self) -> Result<Vec<u32>> {
        match self.0.pop_front() {
            Some(Numbers::U32(rows)) => Ok(rows),
            _ => Err(invalid("rows are missing")),
        }
    }
    pub fn take_bytes(&mut self) -> Result<Vec<u8>> {
        match self.0.pop_front() {
            Some(Numbers::U8(bytes)) => Ok(bytes),
            _ => Err(invalid("bytes are missing")),
        }
    }
    /// Floats that must be exactly as many as `out` has.
    pub fn take_into(&mut self, out: &mut [f32]) -> Result<()> {
        let values = self.take()?;
        if values.len() != out.len() {
            return Err(invalid(&format!("{} numbers instead of {}", values.len(), out.len())));
        }
        out.copy_from_slice(&values);
        Ok(())
    }
}

pub fn invalid(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidData, reason.to_owned())
}

/// Four bytes of each value, at the speed of memory.
fn bytes_of<T>(values: &[T], bytes: impl Fn(&T) -> [u8; 4]) -> Vec<u8> {
    let mut out = vec![0; 4 * values.len()];
    out.chunks_exact_mut(4).zip(values).for_each(|(out, value)| out.copy_from_slice(&bytes(value)));
    out
}

#[derive(Serialize, Deserialize)]
struct Message<T> {
    head: T,
    /// Type (0 f32, 1 u32, 2 bytes) and count of each part of the payload.
    parts: Vec<(u8, u64)>,
}

/// One end.
pub struct Wire {
    socket: UnixStream,
    memory: File,
    mine: u64,
    theirs: u64,
    /// Numbers sent so far, in bytes.
    pub sent_bytes: u64,
}

impl Wire {
    /// The host's end.
    pub fn host(socket: UnixStream, memory: File) -> Self {
        Self { socket, memory, mine: 0, theirs: HALF, sent_bytes: 0 }
    }

    /// The worker's end.
    pub fn worker(socket: UnixStream, memory: File) -> Self {
        Self { socket, memory, mine: HALF, theirs: 0, sent_bytes: 0 }
    }

    /// Sends a message.
    pub fn send<T: Serialize>(&mut self, head: &T, payload: &Payload) -> Result<()> {
        let (mut parts, mut at) = (Vec::with_capacity(payload.0.len()), self.mine);
        for numbers in &payload.0 {
            let (kind, count, bytes) = match numbers {
                Numbers::F32(v) => (0, v.len(), bytes_of(v, |x| x.to_le_bytes())),
                Numbers::U32(v) => (1, v.len(), bytes_of(v, |x| x.to_le_bytes())),
                Numbers::U8(v) => (2, v.len(), v.clone()),
            };
            self.memory.write_all_at(&bytes, at)?;
            at += bytes.len() as u64;
            parts.push((kind, count as u64));
        }
        self.sent_bytes += at - self.mine;
        let text = serde_json::to_vec(&Message { head, parts })?;
        self.socket.write_all(&(text.len() as u64).to_le_bytes())?;
        self.socket.write_all(&text)
    }

    /// Waits for a message. `idle` is called now and then while there is none; its error ends the waiting.
    pub fn receive<T: DeserializeOwned>(&mut self, idle: &mut dyn FnMut() -> Result<()>) -> Result<(T, Payload)> {
        let mut length = [0; 8];
        self.read(&mut length, idle)?;
        let length = u64::from_le_bytes(length) as usize;
        if length > HEAD_BYTES_MAX {
            return Err(invalid("a message is too long"));
        }
        let mut text = vec![0; length];
        self.read(&mut text, idle)?;
        let Message { head, parts } = serde_json::from_slice::<Message<T>>(&text)?;
        let total = parts.iter().map(|&(kind, count)| count.saturating_mul(if kind == 2 { 1 } else { 4 }));
        let total = total.fold(0u64, u64::saturating_add);
        if total > NUMBERS_BYTES_MAX || total > self.memory.metadata()?.len().saturating_sub(self.theirs) {
            return Err(invalid("a message claims more numbers than there are"));
        }
        let (mut payload, mut at) = (Payload::default(), self.theirs);
        for (kind, count) in parts {
            let mut bytes = vec![0; count as usize * if kind == 2 { 1 } else { 4 }];
            self.memory.read_exact_at(&mut bytes, at)?;
            at += bytes.len() as u64;
            let words = bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            payload.0.push_back(match kind {
                0 => Numbers::F32(words.map(f32::from_le_bytes).collect()),
                1 => Numbers::U32(words.map(u32::from_le_bytes).collect()),
                2 => Numbers::U8(bytes),
                _ => return Err(invalid("numbers of an unknown type")),
            });
        }
        Ok((head, payload))
    }

    fn read(&mut self, out: &mut [u8], idle: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            match self.socket.read(&mut out[done..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => idle()?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pair() -> (Wire, Wire) {
        let (one, other) = UnixStream::pair().unwrap();
        let memory = tempfile::tempfile().unwrap();
        (Wire::host(one, memory.try_clone().unwrap()), Wire::worker(other, memory))
    }

    #[test]
    fn messages_arrive_whole() {
        let (mut host, mut worker) = pair();
        let mut payload = Payload::default();
        payload.put(&[1.0, f32::NAN, -0.0]);
        payload.put_rows(&[7, u32::MAX]);
        payload.put_bytes(b"x");
        payload.put(&[]);
        host.send(&("head", 3), &payload).unwrap();
        let (head, mut read) = worker.receive::<(String, u32)>(&mut || Ok(())).unwrap();
        assert_eq!(head, ("head".to_owned(), 3));
        let floats: Vec<u32> = read.take().unwrap().iter().map(|x| x.to_bits()).collect();
        assert_eq!(floats, [1.0f32, f32::NAN, -0.0].map(f32::to_bits));
        assert_eq!(read.take_rows().unwrap(), [7, u32::MAX]);
        assert_eq!(read.take_bytes().unwrap(), b"x");
        assert!(read.take_into(&mut [0.0]).is_err() && read.take().is_err());
        worker.send(&1, &Payload::default()).unwrap();
        assert_eq!(host.receive::<u32>(&mut || Ok(())).unwrap().0, 1);
    }

    #[test]
    fn a_message_that_lies_is_refused() {
        for text in [
            &b"{\"head\":1,\"parts\":[[0,4611686018427387904]]}"[..],
            b"{\"head\":1,\"parts\":[[9,0]]}",
            b"{\"head\":\"x\",\"parts\":[]}",
            b"nonsense",
        ] {
            let (mut host, worker) = pair();
            let mut socket = worker.socket.try_clone().unwrap();
            socket.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
            socket.write_all(text).unwrap();
            assert!(host.receive::<u32>(&mut || Ok(())).is_err());
        }
        let (mut host, worker) = pair();
        (&worker.socket).write_all(&u64::MAX.to_le_bytes()).unwrap();
        assert!(host.receive::<u32>(&mut || Ok(())).is_err());
        let (mut host, worker) = pair();
        drop(worker);
        assert_eq!(host.receive::<u32>(&mut || Ok(())).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
