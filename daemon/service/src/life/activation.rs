//! The socket: handed over by systemd, or made here.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat};

use crate::error::{Error, Kind, Result};

/// A listening socket. One that was made here is removed when it is dropped.
pub struct Socket {
    /// The socket.
    pub listener: UnixListener,
    made: Option<PathBuf>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The socket that systemd handed over, if it did.
pub fn handed_over() -> Result<Option<Socket>> {
    let mut handed = listenfd::ListenFd::from_env();
    if handed.len() == 0 {
        return Ok(None);
    }
    if handed.len() > 1 {
        return Err(Error::option(format!("systemd hands over {} sockets; one is expected", handed.len())));
    }
    let listener = handed.take_unix_listener(0).map_err(|e| Error::io("the socket handed over by systemd", &e))?;
    Ok(listener.map(|listener| Socket { listener, made: None }))
}

/// The connection that whoever started this process gave it as standard input.
pub fn standard_input() -> Result<UnixStream> {
    let fail = |e: std::io::Error| Error::io("standard input", &e);
    let fd = std::io::stdin().as_fd().try_clone_to_owned().map_err(fail)?;
    let kind = FileType::from_raw_mode(fstat(&fd).map_err(|e| fail(e.into()))?.st_mode);
    if kind != FileType::Socket {
        return Err(Error::option("standard input is not a socket: --private is for programs that start a daemon"));
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(true).map_err(fail)?;
    Ok(stream)
}

/// Makes the socket `path`. One that a daemon left behind is replaced; one that somebody listens on is not.
pub fn make(path: &Path, shared: bool) -> Result<Socket> {
    let io = |e: std::io::Error| Error::io(path.display(), &e);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let message =
                format!("{}: something that is not a socket is there; remove it, or set daemon.socket", path.display());
            return Err(Error::new(Kind::Failed, message));
        }
        if UnixStream::connect(path).is_ok() {
            let message =
                format!("{}: somebody listens on this socket already; stop it, or set daemon.socket", path.display());
            return Err(Error::new(Kind::DeviceBusy, message));
        }
        std::fs::remove_file(path).map_err(io)?;
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    let mode = if shared { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io)?;
    Ok(Socket { listener, made: Some(path.to_owned()) })
}
