//! A client that is no library: it sends what it likes, and reads when it likes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::{Daemon, PATIENCE};

/// A connection on which anything can be sent, past its greeting.
pub fn raw_connection(daemon: &Daemon) -> UnixStream {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let uid: String = rustix::process::getuid().as_raw().to_string().bytes().map(|b| format!("{b:02x}")).collect();
    stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).unwrap();
    let mut line = [0; 256];
    let n = stream.read(&mut line).unwrap();
    assert!(line[..n].starts_with(b"OK "));
    stream.write_all(b"NEGOTIATE_UNIX_FD\r\n").unwrap();
    let n = stream.read(&mut line).unwrap();
    assert!(line[..n].starts_with(b"AGREE_UNIX_FD"));
    stream.write_all(b"BEGIN\r\n").unwrap();
    stream
}
