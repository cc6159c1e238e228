//! One TCP or TLS connection that carries messages.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::framing::{Broken, Framing, Inbound};

/// For TCP and TLS together; a join has about 15 s for everything.
const OPEN_LIMIT: Duration = Duration::from_secs(8);
/// Before the next address of a server is tried as well (RFC 8305, 5).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// Bytes that wait for the network. Sound that is older than this would be is of no use, and the
/// data channels repeat what gets lost.
const MAX_QUEUE: usize = 64 << 10;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

struct Opened {
    local: SocketAddr,
    remote: SocketAddr,
    stream: Box<dyn Stream>,
}

type Opening = Pin<Box<dyn Future<Output = io::Result<Opened>> + Send>>;

enum State {
    Opening(Opening),
    Open(Opened),
    Closed,
}

/// What a link has to say.
#[derive(Debug)]
pub(super) enum LinkEvent {
    Opened {
        local: SocketAddr,
        remote: SocketAddr,
    },
    /// Bytes came: take the messages.
    Received,
    /// The end. Nothing follows.
    Closed(io::Error),
}

pub(super) struct Link {
    state: State,
    framing: Framing,
    inbound: Inbound,
    /// What is not written yet.
    outbound: Vec<u8>,
    flushed: bool,
}

impl Link {
    /// Starts to connect to the first of the addresses that answers; with `tls`, for that
    /// host name or address.
    pub(super) fn open(
        remotes: Vec<SocketAddr>,
        framing: Framing,
        tls: Option<(Arc<ClientConfig>, String)>,
    ) -> Self {
        let opening = async move {
            timeout(OPEN_LIMIT, connect_to_any(remotes, tls))
                .await
                .unwrap_or_else(|_| {
                    Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "no connection in time",
                    ))
                })
        };
        Self {
            state: State::Opening(Box::pin(opening)),
            framing,
            inbound: Inbound::new(framing),
            outbound: Vec::new(),
            flushed: true,
        }
    }

    /// Own and remote address, while it is open.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        match &self.state {
            State::Open(opened) => Some((opened.local, opened.remote)),
            State::Opening(_) | State::Closed => None,
        }
    }

    /// Queues a whole message, or nothing: false if it is too long, the queue is full, or the link
    /// not open. It goes when the link is polled.
    pub(super) fn send(&mut self, message: &[u8]) -> bool {
        if self.addresses().is_none() || self.outbound.len() + message.len() > MAX_QUEUE {
            return false;
        }
        self.framing.append(message, &mut self.outbound)
    }

    /// All that was sent has left.
    pub(super) fn is_idle(&self) -> bool {
        self.addresses().is_none() || (self.outbound.is_empty() && self.flushed)
    }

    /// Takes the next message that came.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, Broken> {
        self.inbound.next()
    }

    pub(super) fn close(&mut self) {
        self.state = State::Closed;
        self.outbound = Vec::new();
    }

    /// Opens, writes and reads as far as that goes now. All messages have to be taken before.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<LinkEvent> {
        let result = match &mut self.state {
            State::Opening(opening) => match ready!(opening.as_mut().poll(cx)) {
                Ok(opened) => {
                    let (local, remote) = (opened.local, opened.remote);
                    self.state = State::Open(opened);
                    return Poll::Ready(LinkEvent::Opened { local, remote });
                }
                Err(err) => Err(err),
            },
            State::Open(_) => match self.poll_write(cx) {
                Poll::Ready(Err(err)) => Err(err),
                // Whether more can be written or not.
                Poll::Ready(Ok(())) | Poll::Pending => ready!(self.poll_read(cx)),
            },
            State::Closed => return Poll::Pending,
        };
        Poll::Ready(match result {
            Ok(()) => LinkEvent::Received,
            Err(err) => {
                self.close();
                LinkEvent::Closed(err)
            }
        })
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let State::Open(opened) = &mut self.state else {
            return Poll::Ready(Ok(()));
        };
        let mut stream = Pin::new(&mut opened.stream);
        let mut written = 0;
        let result = loop {
            let rest = &self.outbound[written..];
            if rest.is_empty() {
                break Poll::Ready(Ok(()));
            }
            match stream.as_mut().poll_write(cx, rest) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(len)) => written += len,
                Poll::Ready(Err(err)) => break Poll::Ready(Err(err)),
                Poll::Pending => break Poll::Pending,
            }
            self.flushed = false;
        };
        // At once, even if more waits: it makes room in the queue.
        self.outbound.drain(..written);
        ready!(result)?;
        if !self.flushed {
            ready!(stream.as_mut().poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let State::Open(opened) = &mut self.state else {
            return Poll::Pending;
        };
        let mut buffer = ReadBuf::new(self.inbound.space());
        ready!(Pin::new(&mut opened.stream).poll_read(cx, &mut buffer))?;
        let len = buffer.filled().len();
        if len == 0 {
            let end = io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the remote side");
            return Poll::Ready(Err(end));
        }
        self.inbound.fill(len);
        Poll::Ready(Ok(()))
    }
}

/// The attempts overlap: an address that swallows everything, of a family without a way for one,
/// must not use up the time for the others.
async fn connect_to_any(
    remotes: Vec<SocketAddr>,
    tls: Option<(Arc<ClientConfig>, String)>,
) -> io::Result<Opened> {
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::new(io::ErrorKind::InvalidInput, "no address");
    let mut remotes = remotes.into_iter();
    loop {
        let wait = match remotes.next() {
            Some(remote) => {
                attempts.spawn(connect(remote, tls.clone()));
                NEXT_ADDRESS
            }
            None => OPEN_LIMIT,
        };
        match timeout(wait, attempts.join_next()).await {
            Ok(Some(done)) => match done.map_err(io::Error::from).flatten() {
                Ok(opened) => return Ok(opened),
                Err(err) => failure = err,
            },
            // All have failed.
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
}

async fn connect(
    remote: SocketAddr,
    tls: Option<(Arc<ClientConfig>, String)>,
) -> io::Result<Opened> {
    let stream = TcpStream::connect(remote).await?;
    // Every message is wanted at once.
    stream.set_nodelay(true)?;
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    let stream: Box<dyn Stream> = match tls {
        None => Box::new(stream),
        Some((config, host)) => {
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            Box::new(TlsConnector::from(config).connect(name, stream).await?)
        }
    };
    Ok(Opened {
        local,
        remote,
        stream,
    })
}

/// TLS as a client that trusts what the system trusts. Read at the first call.
pub(super) fn system_tls() -> Result<Arc<ClientConfig>, String> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, String>> = OnceLock::new();
    CONFIG
        .get_or_init(|| {
            let loaded = rustls_native_certs::load_native_certs();
            for err in &loaded.errors {
                log::debug!("root certificates: {err}");
            }
            let mut roots = RootCertStore::empty();
            let (usable, _) = roots.add_parsable_certificates(loaded.certs);
            if usable == 0 {
                return Err("the system has no root certificates".to_owned());
            }
            trusting(roots)
        })
        .clone()
}

pub(super) fn trusting(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    // Named, as a process may hold several providers and no default.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|err| err.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let remote = listener.local_addr().unwrap();
        let mut link = Link::open(vec![remote], Framing::Datagrams, None);
        assert!(!link.send(b"too early"));
        let opened = poll_fn(|cx| link.poll(cx)).await;
        assert!(matches!(opened, LinkEvent::Opened { .. }), "{opened:?}");
        let (stream, _) = listener.accept().await.unwrap();
        (link, stream)
    }

    #[tokio::test]
    async fn messages_go_whole_and_once_each_way() {
        let (mut link, mut stream) = pair().await;
        for number in 0..200u8 {
            assert!(link.send(&[number; 300]));
            assert!(!link.is_idle());
            stream.write_all(&[0, 2, number, 7]).await.unwrap();
            // Until what the other side wrote is here; what was sent leaves by the way.
            let event = poll_fn(|cx| link.poll(cx)).await;
            assert!(matches!(event, LinkEvent::Received), "{event:?}");
            assert_eq!(link.next().unwrap(), Some(&[number, 7][..]));
            assert_eq!(link.next().unwrap(), None);
            let mut framed = [0; 302];
            stream.read_exact(&mut framed).await.unwrap();
            assert_eq!(
                (&framed[..2], &framed[2..]),
                (&[1, 44][..], &[number; 300][..])
            );
            assert!(link.is_idle());
        }
        drop(stream);
        let event = poll_fn(|cx| link.poll(cx)).await;
        assert!(matches!(event, LinkEvent::Closed(_)), "{event:?}");
        assert!(!link.send(b"too late"));
    }

    #[tokio::test]
    async fn a_remote_side_that_does_not_read_costs_no_more_than_the_queue() {
        let (mut link, _stream) = pair().await;
        let (mut taken, mut refused) = (0u64, 0);
        while refused < 100 {
            match link.send(&[0; 1200]) {
                true => taken += 1,
                false => refused += 1,
            }
            poll_fn(|cx| {
                let event = link.poll(cx);
                assert!(event.is_pending(), "{event:?}");
                Poll::Ready(())
            })
            .await;
            assert!(link.outbound.capacity() <= 2 * MAX_QUEUE);
        }
        assert!(taken > 50);
        assert!(!link.is_idle());
    }

    #[tokio::test]
    async fn what_has_left_makes_room_for_more() {
        const TAKEN: usize = 4 << 10;
        let (near, _far) = tokio::io::duplex(TAKEN);
        let addr = "127.0.0.1:9".parse().unwrap();
        let mut link = Link::open(Vec::new(), Framing::Datagrams, None);
        link.state = State::Open(Opened {
            local: addr,
            remote: addr,
            stream: Box::new(near),
        });
        while link.send(&[0; 1200]) {}
        let before = link.outbound.len();
        poll_fn(|cx| {
            assert!(link.poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        assert_eq!(link.outbound.len(), before - TAKEN);
        assert!(link.send(&[0; 1200]));
    }

    #[tokio::test]
    async fn an_address_that_swallows_everything_does_not_stand_before_the_next() {
        let full = tokio::net::TcpSocket::new_v4().unwrap();
        full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let full = full.listen(1).unwrap();
        let hole = full.local_addr().unwrap();
        // With nobody to accept them, further ones are not even refused.
        let mut waiting = Vec::new();
        while let Ok(stream) = timeout(Duration::from_secs(1), TcpStream::connect(hole)).await {
            waiting.push(stream.unwrap());
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let mut link = Link::open(vec![hole, hole, good], Framing::Turn, None);
        let event = poll_fn(|cx| link.poll(cx)).await;
        assert!(matches!(event, LinkEvent::Opened { .. }), "{event:?}");
        assert_eq!(link.addresses().unwrap().1, good);
    }

    #[tokio::test]
    async fn nobody_there_is_an_end_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let remote = listener.local_addr().unwrap();
        drop(listener);
        let mut link = Link::open(vec![remote], Framing::Turn, None);
        let event = poll_fn(|cx| link.poll(cx)).await;
        assert!(matches!(event, LinkEvent::Closed(_)), "{event:?}");
        assert!(link.is_idle());
    }
}
