//! The socket of one client, as zbus reads and writes it. What a header claims costs nothing here: a message is handed on
//! when it is whole, one that claims too much ends the connection, and so does one that does not arrive.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    Shutdown, recvmsg, sendmsg, shutdown,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::export::async_trait::async_trait;
use zbus::wire::serialized::{Context, Data};
use zbus::{Message, OwnedVariant};

use super::MESSAGE_BYTES_MAX;

/// How long a message may take to arrive, from its first byte on.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// Bytes of a line of the greeting: far more than any has that means something.
const LINE_MAX: usize = 1024;
/// File descriptors of one message: the kernel passes no more at once.
const FDS_MAX: usize = 253;
/// The part of a header that says how long the message is.
const PRIMARY: usize = 16;

/// A connected client.
#[derive(Debug)]
pub struct ClientStream(pub UnixStream);

impl Socket for ClientStream {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let stream = Arc::new(self.0);
        let reader = Reader {
            stream: stream.clone(),
            chunk: vec![0; CHUNK],
            buffer: Vec::new(),
            fds: VecDeque::new(),
            started: None,
            patience: ARRIVAL_PATIENCE,
        };
        Split::new(reader, Writer(stream))
    }
}

/// Where messages come from.
#[derive(Debug)]
pub struct Reader {
    stream: Arc<UnixStream>,
    chunk: Vec<u8>,
    /// What has arrived and was not handed on yet.
    buffer: Vec<u8>,
    /// Likewise.
    fds: VecDeque<OwnedFd>,
    /// When the message that is not whole yet began.
    started: Option<Instant>,
    patience: Duration,
}

impl Reader {
    /// Reads what there is.
    async fn fill(&mut self) -> io::Result<()> {
        let Self { stream, chunk, .. } = self;
        let reading = stream.async_io(Interest::READABLE, || receive(stream, chunk));
        let (read, fds) = if self.buffer.is_empty() {
            reading.await?
        } else {
            let since = *self.started.get_or_insert_with(Instant::now);
            let late = || io::Error::new(io::ErrorKind::TimedOut, "a message has begun and does not arrive");
            tokio::time::timeout_at(since + self.patience, reading).await.map_err(|_| late())??
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&self.chunk[..read]);
        self.fds.extend(fds);
        // Those of a message that has begun, and those that came with the next one's beginning.
        if self.fds.len() > 2 * FDS_MAX {
            return Err(invalid("more file descriptors than a message can have"));
        }
        Ok(())
    }

    /// The descriptors of `bytes`, a whole message that was just taken out of the buffer: as many as its header says.
    fn take_fds(&mut self, bytes: &[u8]) -> Vec<OwnedFd> {
        if self.fds.is_empty() {
            return Vec::new();
        }
        let count = unix_fds(bytes).min(self.fds.len());
        let fds = self.fds.drain(..count).collect();
        if self.buffer.is_empty() {
            // They come with their message's bytes: nobody's are left.
            self.fds.clear();
        }
        fds
    }
}

#[async_trait]
impl ReadHalf for Reader {
    async fn receive_message(
        &mut self,
        seq: u64,
        already_received_bytes: &mut Vec<u8>,
        already_received_fds: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        // What the handshake took and did not need; it was given whole lines, so that there is nothing as a rule.
        self.buffer.splice(..0, already_received_bytes.drain(..));
        self.fds.extend(already_received_fds.drain(..));
        let length = loop {
            match message_length(&self.buffer)? {
                Some(length) if self.buffer.len() >= length => break length,
                _ => self.fill().await?,
            }
        };
        self.started = None;
        let rest = self.buffer.split_off(length);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let fds = self.take_fds(&bytes);
        Whole { bytes, read: 0, fds }.receive_message(seq, &mut Vec::new(), &mut Vec::new()).await
    }

    /// For the handshake only: one line, whole. zbus takes lines of any length, and looks at the byte before a line's end
    /// where there is none. What is behind the greeting stays here, and so do file descriptors.
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let most = LINE_MAX.min(buffer.len());
        let length = loop {
            match self.buffer.iter().take(most).position(|byte| *byte == b'\n') {
                Some(end) => break end + 1,
                None if self.buffer.len() >= most => return Err(invalid("a line of the greeting does not end")),
                None => self.fill().await?,
            }
        };
        if !self.buffer[..length].ends_with(b"\r\n") {
            return Err(invalid("a line of the greeting does not end in CR LF"));
        }
        self.started = None;
        buffer[..length].copy_from_slice(&self.buffer[..length]);
        self.buffer.drain(..length);
        Ok((length, Vec::new()))
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

/// A message that has arrived, for zbus to read as from a socket: only so does it take one.
#[derive(Debug)]
struct Whole {
    bytes: Vec<u8>,
    read: usize,
    fds: Vec<OwnedFd>,
}

#[async_trait]
impl ReadHalf for Whole {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let left = &self.bytes[self.read..];
        let read = left.len().min(buffer.len());
        buffer[..read].copy_from_slice(&left[..read]);
        self.read += read;
        Ok((read, std::mem::take(&mut self.fds)))
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

/// Where messages go.
#[derive(Debug)]
pub struct Writer(Arc<UnixStream>);

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.async_io(Interest::WRITABLE, || send(&self.0, buffer, fds)).await
    }

    async fn close(&mut self) -> io::Result<()> {
        match shutdown(&*self.0, Shutdown::Both) {
            // The other end was faster.
            Err(rustix::io::Errno::NOTCONN) => Ok(()),
            result => Ok(result?),
        }
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds))
}

fn send(stream: &UnixStream, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(invalid("more file descriptors than a message can have"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(buffer)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// The length of the message that `bytes` begin with, once its header says it. Fails on one that is too long.
fn message_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(primary) = bytes.first_chunk::<PRIMARY>() else { return Ok(None) };
    let [order, .., f0, f1, f2, f3] = *primary;
    let [_, _, _, _, b0, b1, b2, b3, ..] = *primary;
    let number = |bytes: [u8; 4]| match order {
        b'l' => Ok(u64::from(u32::from_le_bytes(bytes))),
        b'B' => Ok(u64::from(u32::from_be_bytes(bytes))),
        _ => Err(invalid("what arrives is not D-Bus")),
    };
    let (body, fields) = (number([b0, b1, b2, b3])?, number([f0, f1, f2, f3])?);
    let length = (PRIMARY as u64 + fields).next_multiple_of(8) + body;
    if length > MESSAGE_BYTES_MAX as u64 {
        return Err(invalid(format!("a message of {length} bytes, at most {MESSAGE_BYTES_MAX} are allowed")));
    }
    Ok(Some(length as usize))
}

/// How many descriptors the header of a whole message says that it has.
fn unix_fds(bytes: &[u8]) -> usize {
    const UNIX_FDS: u8 = 9;
    let order = if bytes.first() == Some(&b'B') { zbus::wire::BE } else { zbus::wire::LE };
    let data = Data::new(bytes, Context::new(order, 0));
    type Header = (u8, u8, u8, u8, u32, u32, Vec<(u8, OwnedVariant)>);
    // One that cannot be read is refused by zbus.
    let Ok((header, _)) = data.deserialize::<Header>() else { return 0 };
    let count = header.6.into_iter().find(|(code, _)| *code == UNIX_FDS);
    count.and_then(|(_, value)| u32::try_from(value).ok()).unwrap_or(0) as usize
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use super::*;

    fn message(fds: &[&OwnedFd]) -> Message {
        let fds: Vec<zbus::Fd> = fds.iter().map(|fd| zbus::Fd::from(fd.as_fd())).collect();
        Message::method_call("/a", "B").build(&(fds, "text")).unwrap()
    }

    fn reader() -> (Reader, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ClientStream(ours).split().take().0, theirs)
    }

    async fn next(reader: &mut Reader) -> zbus::Result<Message> {
        reader.receive_message(1, &mut Vec::new(), &mut Vec::new()).await
    }

    /// What kind of error ends the connection.
    async fn end(reader: &mut Reader) -> io::ErrorKind {
        match next(reader).await.unwrap_err() {
            zbus::Error::InputOutput(error) => error.kind(),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn a_claim_allocates_nothing() {
        let header = |order: u8, body: u32, fields: u32| {
            let bytes = |n: u32| if order == b'l' { n.to_le_bytes() } else { n.to_be_bytes() };
            [&[order, 1, 0, 1][..], &bytes(body), &bytes(1), &bytes(fields)].concat()
        };
        for order in [b'l', b'B'] {
            for (body, fields) in [(120 << 20, 16), (16, 120 << 20), (u32::MAX, u32::MAX), (16 << 20, 0)] {
                assert!(message_length(&header(order, body, fields)).is_err(), "{body} {fields}");
            }
            assert_eq!(message_length(&header(order, 3, 9)).unwrap(), Some(16 + 16 + 3));
        }
        assert_eq!(message_length(&header(b'l', 3, 9)[..15]).unwrap(), None);
        assert!(message_length(&[b'x'; 16]).is_err());
        let (mut reader, client) = reader();
        reader.patience = Duration::from_millis(200);
        let begun = [header(b'l', 15 << 20, 16), vec![0; 16]].concat();
        assert_eq!(client.try_write(&begun).unwrap(), begun.len());
        // It may be so large, and does not come.
        assert_eq!(end(&mut reader).await, io::ErrorKind::TimedOut);
        assert!(reader.buffer.capacity() < 1 << 16, "{}", reader.buffer.capacity());
    }

    #[tokio::test]
    async fn a_greeting_comes_line_by_line() {
        let (mut reader, client) = reader();
        let sent = message(&[]);
        let greeting = [&b"\0AUTH EXTERNAL 30\r\nBEGIN\r\n"[..], sent.data().bytes()].concat();
        assert_eq!(client.try_write(&greeting).unwrap(), greeting.len());
        for expected in [&b"\0AUTH EXTERNAL 30\r\n"[..], b"BEGIN\r\n"] {
            let mut line = [0; 1024];
            let (length, fds) = reader.recvmsg(&mut line).await.unwrap();
            assert_eq!((&line[..length], fds.len()), (expected, 0));
        }
        // What came along with it is the first message.
        assert_eq!(next(&mut reader).await.unwrap().data().bytes(), sent.data().bytes());
    }

    #[tokio::test]
    async fn a_greeting_that_is_none_is_refused_before_it_costs_anything() {
        let long = vec![b'x'; LINE_MAX + 1];
        for wrong in [&b"\n"[..], b"\0AUTH EXTERNAL 30\r\n\n", b"\0AUTH\n", &long] {
            let (mut reader, client) = reader();
            client.try_write(wrong).unwrap();
            let refused = loop {
                if let Err(error) = reader.recvmsg(&mut [0; 1024]).await {
                    break error;
                }
            };
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{refused}");
        }
        // Files, and no message that they could be of.
        let (mut reader, client) = reader();
        let file = crate::memfd::sealed("file", b"it").unwrap();
        let fds = vec![file.as_fd(); FDS_MAX];
        for count in [FDS_MAX, FDS_MAX, 1] {
            send(&client, b"x", &fds[..count]).unwrap();
        }
        let refused = reader.recvmsg(&mut [0; 1024]).await.unwrap_err();
        assert!(refused.to_string().contains("file descriptors"), "{refused}");
    }

    #[tokio::test]
    async fn who_says_nothing_is_not_hurried() {
        let (mut reader, client) = reader();
        reader.patience = Duration::from_millis(50);
        assert!(tokio::time::timeout(Duration::from_millis(300), next(&mut reader)).await.is_err());
        let sent = message(&[]);
        assert_eq!(client.try_write(sent.data().bytes()).unwrap(), sent.data().len());
        assert_eq!(next(&mut reader).await.unwrap().data().bytes(), sent.data().bytes());
        drop(client);
        assert_eq!(end(&mut reader).await, io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn messages_get_their_own_files_however_they_are_cut() {
        let files: Vec<OwnedFd> = (0u8..3).map(|n| crate::memfd::sealed("file", &[n]).unwrap()).collect();
        let (none, one, two) = (message(&[]), message(&[&files[0]]), message(&[&files[1], &files[2]]));
        let read = |fd: &dyn AsFd| crate::memfd::read_client_file(fd.as_fd(), 9, "it").unwrap()[0];
        let check = async |reader: &mut Reader| {
            for (sent, files) in [(&none, &[][..]), (&one, &[0][..]), (&two, &[1, 2])] {
                let got = next(reader).await.unwrap();
                assert_eq!(got.data().bytes(), sent.data().bytes());
                assert_eq!(got.data().fds().iter().map(|fd| read(fd)).collect::<Vec<u8>>(), files);
            }
        };
        // All at once.
        let (mut reader, client) = reader();
        let bytes = [none.data().bytes(), one.data().bytes(), two.data().bytes()].concat();
        let all: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).collect();
        assert_eq!(send(&client, &bytes, &all).unwrap(), bytes.len());
        check(&mut reader).await;
        // Byte by byte, the files with the first byte of their message.
        let sender = tokio::spawn({
            let (none, one, two) = (none.clone(), one.clone(), two.clone());
            async move {
                for message in [none, one, two] {
                    let fds: Vec<OwnedFd> =
                        message.data().fds().iter().map(|fd| fd.as_fd().try_clone_to_owned().unwrap()).collect();
                    for (at, byte) in message.data().bytes().iter().enumerate() {
                        let fds: Vec<BorrowedFd> = fds.iter().filter(|_| at == 0).map(|fd| AsFd::as_fd(fd)).collect();
                        client.writable().await.unwrap();
                        assert_eq!(send(&client, &[*byte], &fds).unwrap(), 1);
                        tokio::task::yield_now().await;
                    }
                }
                client
            }
        });
        check(&mut reader).await;
        // Files that nobody says anything of are closed.
        let client = sender.await.unwrap();
        send(&client, none.data().bytes(), &all).unwrap();
        next(&mut reader).await.unwrap();
        assert!(reader.fds.is_empty());
    }
}
