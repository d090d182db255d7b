//! Pictures of a drawing in progress.

use std::os::fd::OwnedFd;

use futures_util::stream::{self, BoxStream};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::error::{Error, Result};

/// Frames of a drawing; newest wins, and the stream ends with the job.
pub type Previews = BoxStream<'static, Result<Preview>>;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// Which picture of the job, from 0.
    pub picture: u32,
    /// Steps done of this picture.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// A PNG file.
    pub png: Vec<u8>,
}

/// "BLPV" in the first four bytes.
const MAGIC: u32 = 0x5650_4C42;
const VERSION: u32 = 1;
const FORMAT_PNG: u32 = 1;
const HEADER_BYTES: usize = 32;
/// More than a picture of 256 by 256 pixels can need.
const PACKET_BYTES_MAX: usize = 1 << 20;

impl Preview {
    /// Reads one packet.
    fn parse(packet: &[u8]) -> Result<Self> {
        let (header, png) =
            packet.split_at_checked(HEADER_BYTES).ok_or_else(|| Error::protocol("a preview is cut off"))?;
        let mut fields = [0u32; HEADER_BYTES / 4];
        for (field, bytes) in fields.iter_mut().zip(header.chunks_exact(4)) {
            *field = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let [magic, version, picture, step, steps, width, height, format] = fields;
        if (magic, version, format) != (MAGIC, VERSION, FORMAT_PNG) {
            return Err(Error::protocol(format!("a preview of kind {magic:#x} {version} {format} is not known")));
        }
        Ok(Self { picture, step, steps, width, height, png: png.to_vec() })
    }
}

/// The frames that arrive on `fd`.
pub(crate) fn from_fd(fd: OwnedFd) -> Result<Previews> {
    // A stream's methods do what is wanted on a SOCK_SEQPACKET socket as well: one read takes one packet.
    let socket = std::os::unix::net::UnixStream::from(fd);
    socket.set_nonblocking(true).map_err(Error::protocol)?;
    let socket = UnixStream::from_std(socket).map_err(Error::protocol)?;
    Ok(Box::pin(stream::unfold(socket, |mut socket| async move {
        let mut packet = vec![0; PACKET_BYTES_MAX];
        match socket.read(&mut packet).await {
            Ok(0) | Err(_) => None,
            Ok(bytes) => Some((Preview::parse(&packet[..bytes]), socket)),
        }
    })))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use futures_util::StreamExt;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    use super::*;

    #[tokio::test]
    async fn packets_become_frames_until_the_other_side_closes() {
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let frame = Preview { picture: 1, step: 2, steps: 20, width: 32, height: 64, png: b"png".to_vec() };
        let fields = [MAGIC, VERSION, frame.picture, frame.step, frame.steps, frame.width, frame.height, FORMAT_PNG];
        let mut packet: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        packet.extend(&frame.png);
        send(&there, &packet, SendFlags::empty()).unwrap();
        send(&there, b"short", SendFlags::empty()).unwrap();
        send(&there, &[0; 40], SendFlags::empty()).unwrap();
        drop(there);
        let mut frames = from_fd(here).unwrap();
        assert_eq!(frames.next().await.unwrap().unwrap(), frame);
        assert!(frames.next().await.unwrap().is_err());
        assert!(frames.next().await.unwrap().is_err());
        assert!(frames.next().await.is_none());
    }
}
