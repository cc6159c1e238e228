//! The sockets: one on TCP, one on a path, and what one connection may cost.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::JoinSet,
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;

use super::access::Peer;
use crate::config::{Config, OFF};

/// Connections at once, on each socket; more are closed at once.
const MAX_CONNECTIONS: usize = 64;
/// For the next request and its head, also of a connection that is kept.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// Of a request's head.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// A client that takes nothing for so long is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// When the system gives no more connections.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Sockets that are listened on, before anything else is started.
#[derive(Default)]
pub(crate) struct Bound {
    pub(super) tcp: Option<TcpListener>,
    pub(super) unix: Option<(UnixListener, SocketFile)>,
}

impl Bound {
    /// # Errors
    /// An address that is taken, or not to be had, and what to do. The usual path of the Unix socket
    /// may be unusable; one that is configured may not.
    pub async fn bind(config: &Config) -> Result<Self, String> {
        let mut bound = Self::default();
        if let Some(address) = config.control.address() {
            let tcp = TcpListener::bind(address).await.map_err(|error| {
                let fix = match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        "something listens there already: set control.listen to another port, or \
                         to 127.0.0.1:0 for any that is free, or to off"
                    }
                    _ => "set control.listen to an address of this machine, or to off",
                };
                format!("control.listen is {address}: {error}; {fix}")
            })?;
            if let Ok(address) = tcp.local_addr() {
                tracing::info!(%address, "the control API listens");
            }
            bound.tcp = Some(tcp);
        }
        if let Some(path) = config.control_socket() {
            match SocketFile::bind(&path) {
                Ok(unix) => bound.unix = Some(unix),
                Err(error) if config.control.socket.is_some() => {
                    let path = path.display();
                    return Err(format!(
                        "control.socket is {path}: {error}; set another path, or {OFF}"
                    ));
                }
                Err(error) => tracing::warn!(
                    path = %path.display(), %error,
                    "the control API has no Unix socket: set control.socket to another path"
                ),
            }
        }
        Ok(bound)
    }
}

/// The file of a Unix socket; removed when this is dropped, unless another one is there by then.
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl SocketFile {
    /// One that a killed process left is replaced; one that somebody answers on is not.
    fn bind(path: &Path) -> io::Result<(UnixListener, Self)> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(io::Error::other("there is something else than a socket"));
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                let said = "another process answers there";
                return Err(io::Error::new(io::ErrorKind::AddrInUse, said));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut own = path.as_os_str().to_owned();
        own.push(format!(".{}", std::process::id()));
        let own = PathBuf::from(own);
        let _ = fs::remove_file(&own);
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SockAddr::unix(&own)?)?;
        let bound = || {
            // Nobody can connect before it listens, and so not before it is ours alone.
            fs::set_permissions(&own, fs::Permissions::from_mode(0o600))?;
            socket.listen(BACKLOG)?;
            let found = fs::symlink_metadata(&own)?;
            fs::rename(&own, path)?;
            Ok((found.dev(), found.ino()))
        };
        let file = bound().inspect_err(|_: &io::Error| drop(fs::remove_file(&own)))?;
        let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))?;
        let path = path.to_owned();
        Ok((listener, Self { path, file }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub(super) trait Listener: Send + 'static {
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, Peer)>> + Send;
}

impl Listener for TcpListener {
    type Io = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, Peer)> {
        let (tcp, peer) = TcpListener::accept(self).await?;
        let loopback = self.local_addr().is_ok_and(|of| is_loopback(&of));
        let ip = peer.ip();
        Ok((tcp, Peer::Tcp { ip, loopback }))
    }
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().is_loopback()
}

impl Listener for UnixListener {
    type Io = UnixStream;

    async fn accept(&mut self) -> io::Result<(UnixStream, Peer)> {
        let (unix, _) = UnixListener::accept(self).await?;
        Ok((unix, Peer::Local))
    }
}

/// Serves until it is `ended`, and then what is under way.
pub(super) async fn serve(mut listener: impl Listener, router: Router, ended: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = ended.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((io, peer)) if connections.len() < MAX_CONNECTIONS => {
                failing = false;
                let router = router.clone().layer(Extension(peer));
                connections.spawn(connection(io, router, ended.clone()));
            }
            Ok((too_many, _)) => drop(too_many),
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the control API takes no connections for now");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    ended: CancellationToken,
) {
    let io = TokioIo::new(Impatient::new(io));
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = ended.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the control API ended");
    }
}

/// A connection whose other end must take what is written within [`WRITE_LIMIT`].
struct Impatient<T> {
    io: T,
    /// While it takes nothing.
    until: Option<Pin<Box<Sleep>>>,
}

impl<T: AsyncWrite + Unpin> Impatient<T> {
    fn new(io: T) -> Self {
        Self { io, until: None }
    }

    fn within<R>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut T>, &mut Context<'_>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if let Poll::Ready(written) = write(Pin::new(&mut self.io), cx) {
            self.until = None;
            return Poll::Ready(written);
        }
        let limit = || Box::pin(tokio::time::sleep_until(Instant::now() + WRITE_LIMIT));
        match self.until.get_or_insert_with(limit).as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Impatient<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Impatient<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.within(cx, |io, cx| io.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.within(cx, |io, cx| io.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.within(cx, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.within(cx, AsyncWrite::poll_shutdown)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let (ours, theirs) = duplex(4);
        let mut ours = Impatient::new(ours);
        let begun = Instant::now();
        let written = ours.write_all(b"more than it holds").await;
        assert_eq!(written.expect_err("late").kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), WRITE_LIMIT.as_secs());
        drop(theirs);
    }

    #[tokio::test]
    async fn a_socket_that_was_left_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a.sock");
        let left = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert_eq!(
            SocketFile::bind(&path).err().map(|e| e.kind()),
            Some(io::ErrorKind::AddrInUse)
        );
        drop(left);
        let (_listener, file) = SocketFile::bind(&path).expect("replaced");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // Another one has taken its place.
        fs::remove_file(&path).expect("removed");
        let other = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        drop(file);
        assert!(path.exists());
        drop(other);
        let (_listener, file) = SocketFile::bind(&path).expect("replaced");
        drop(file);
        assert!(!path.exists());
        fs::write(&path, "").expect("a file");
        assert!(SocketFile::bind(&path).is_err());
        let names = fs::read_dir(dir.path()).expect("read").count();
        assert_eq!(names, 1, "nothing is left but that file");
    }
}
