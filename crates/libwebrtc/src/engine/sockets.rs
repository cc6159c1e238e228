//! The UDP sockets of one peer connection, each bound to one local address.
//!
//! A socket on which little comes is watched: the kernel wakes the driver for each datagram. One on
//! which media flows is polled: the driver reads it at every beat ([`super::runtime::next_beat`]), the
//! same moments for all peer connections, so that the process wakes up once for all of them.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket},
    task::Context,
    time::{Duration, Instant, SystemTime},
};

use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::SockRef;
use str0m::Candidate;
use tokio::{io::Interest, net::UdpSocket};

use super::faults::{Fault, Faults};

/// More local addresses than this are not tried.
const MAX_SOCKETS: usize = 8;
/// Media flows when so many packets have come with no longer pauses than this.
const FLOWING: u32 = 25;
const PAUSE: Duration = Duration::from_millis(50);
/// It has stopped when nothing came for so long.
const STOPPED: Duration = Duration::from_millis(250);

/// Datagrams that one call of the kernel reads at most.
const AT_ONCE: usize = 8;
/// What the kernel may give as one: several of one sender, joined.
const MAX_JOINED: usize = 1 << 16;
/// One that says that it came longer ago than this has another clock than ours.
const MAX_WAITED: Duration = Duration::from_secs(1);

pub(super) struct Socket {
    pub local: SocketAddr,
    handle: Handle,
    /// How the kernel was asked to tell of datagrams.
    told: UdpSocketState,
    /// Packets of media since the last pause.
    flow: u32,
    last: Option<Instant>,
    /// Those that stand on it.
    pub candidates: Vec<Candidate>,
}

/// In bytes, of which each packet takes several hundred more than its own.
const RECEIVE_BUFFER: usize = 1 << 20;

enum Handle {
    Watched(UdpSocket),
    Polled(StdUdpSocket),
    /// The runtime did not take it, or did not give it back.
    Lost,
}

impl Handle {
    fn turned(self) -> io::Result<Self> {
        Ok(match self {
            Self::Watched(socket) => Self::Polled(socket.into_std()?),
            Self::Polled(socket) => Self::Watched(UdpSocket::from_std(socket)?),
            Self::Lost => Self::Lost,
        })
    }

    fn try_send_to(&self, bytes: &[u8], to: SocketAddr) -> io::Result<usize> {
        match self {
            Self::Watched(socket) => socket.try_send_to(bytes, to),
            Self::Polled(socket) => socket.send_to(bytes, to),
            Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Returns how many of the buffers are used.
    fn try_receive(
        &self,
        told: &UdpSocketState,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        match self {
            Self::Watched(socket) => socket.try_io(Interest::READABLE, || {
                told.recv(socket.into(), buffers, meta)
            }),
            Self::Polled(socket) => told.recv(socket.into(), buffers, meta),
            Self::Lost => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// A datagram, as a socket has it.
pub(super) struct Datagram<'a> {
    pub source: SocketAddr,
    pub local: SocketAddr,
    /// When it came, not when it was read, if the kernel tells that.
    pub arrived: Instant,
    pub bytes: &'a [u8],
}

/// Where datagrams are read into. Large, but only what is used takes memory.
pub(super) struct Inbox {
    buffers: Vec<u8>,
    meta: [RecvMeta; AT_ONCE],
    used: usize,
    local: SocketAddr,
    read_at: (Instant, SystemTime),
    /// There may be more where they come from.
    pub more: bool,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            buffers: vec![0; AT_ONCE * MAX_JOINED],
            meta: [RecvMeta::default(); AT_ONCE],
            used: 0,
            local: SocketAddr::from(([0; 4], 0)),
            read_at: (Instant::now(), SystemTime::now()),
            more: false,
        }
    }

    /// What was read last.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        let buffers = self.buffers.chunks_exact(MAX_JOINED);
        let used = self.meta.iter().zip(buffers).take(self.used);
        used.flat_map(move |(meta, buffer)| {
            let arrived = self.arrived(meta);
            let joined = buffer[..meta.len].chunks(meta.stride.max(1));
            joined.map(move |bytes| Datagram {
                source: meta.addr,
                local: self.local,
                arrived,
                bytes,
            })
        })
    }

    fn arrived(&self, meta: &RecvMeta) -> Instant {
        let (instant, time) = self.read_at;
        let waited = meta.timestamp.and_then(|since_epoch| {
            let arrived = SystemTime::UNIX_EPOCH + since_epoch;
            let waited = time.duration_since(arrived).ok()?;
            (waited < MAX_WAITED).then_some(waited)
        });
        instant - waited.unwrap_or_default()
    }
}

impl Socket {
    fn is_polled(&self) -> bool {
        matches!(self.handle, Handle::Polled(_))
    }

    async fn turn(&mut self) {
        let handle = std::mem::replace(&mut self.handle, Handle::Lost);
        match handle.turned() {
            Ok(handle) => self.handle = handle,
            Err(err) => log::warn!("the socket at {} is lost: {err}", self.local),
        }
        if let Handle::Watched(socket) = &self.handle {
            writable(socket).await;
        }
    }
}

/// At once true, but not known before: the first datagrams would be lost.
async fn writable(socket: &UdpSocket) {
    if let Err(err) = socket.writable().await {
        log::debug!("a socket is not writable: {err}");
    }
}

#[derive(Default)]
pub(super) struct Sockets(Vec<Socket>);

impl Sockets {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn locals(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().map(|socket| socket.local)
    }

    /// The address of the socket that is bound to this one, if there is one.
    pub(super) fn at(&self, ip: IpAddr) -> Option<SocketAddr> {
        self.locals().find(|local| local.ip() == ip)
    }

    /// Binds one more. Returns its address.
    pub(super) async fn open(&mut self, ip: IpAddr) -> io::Result<SocketAddr> {
        if self.0.len() >= MAX_SOCKETS {
            return Err(io::Error::other("too many local addresses"));
        }
        let socket = StdUdpSocket::bind((ip, 0))?;
        socket.set_nonblocking(true)?;
        // The kernel gives what it allows; its default of some 280 packets is little between two beats.
        if let Err(err) = SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER) {
            log::debug!("the receive buffer stays as it is: {err}");
        }
        let local = socket.local_addr()?;
        // It forbids fragments, too: what is sent is within the 1200 bytes that every path takes, but for
        // Opus of more than 400 kbit/s.
        let told = UdpSocketState::new((&socket).into())?;
        let socket = UdpSocket::from_std(socket)?;
        writable(&socket).await;
        self.0.push(Socket {
            local,
            handle: Handle::Watched(socket),
            told,
            flow: 0,
            last: None,
            candidates: Vec::new(),
        });
        Ok(local)
    }

    /// Takes out those that are lost, or whose address this machine has no more.
    pub(super) fn take_lost(&mut self) -> Vec<Socket> {
        let lost = |socket: &mut Socket| {
            matches!(socket.handle, Handle::Lost)
                || StdUdpSocket::bind((socket.local.ip(), 0))
                    .is_err_and(|err| err.kind() == io::ErrorKind::AddrNotAvailable)
        };
        self.0.extract_if(.., lost).collect()
    }

    /// Notes a candidate that stands on the socket at `base`. False if that is known, or there is no
    /// such socket.
    pub(super) fn add_candidate(&mut self, base: SocketAddr, candidate: &Candidate) -> bool {
        let socket = self.0.iter_mut().find(|socket| socket.local == base);
        let Some(Socket { candidates, .. }) = socket else {
            return false;
        };
        let new = !candidates.contains(candidate);
        if new {
            candidates.push(candidate.clone());
        }
        new
    }

    /// Takes out the candidates that are not to be kept.
    pub(super) fn retain_candidates(
        &mut self,
        keep: impl Fn(&Candidate) -> bool,
    ) -> Vec<Candidate> {
        let candidates = self.0.iter_mut().map(|socket| &mut socket.candidates);
        candidates
            .flat_map(|list| list.extract_if(.., |candidate| !keep(candidate)))
            .collect()
    }

    /// Sends at once or not at all, as UDP may. False if there is no such socket.
    pub(super) fn send(
        &self,
        faults: &mut Faults,
        local: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
    ) -> bool {
        let Some(Socket { handle, .. }) = self.0.iter().find(|socket| socket.local == local) else {
            return false;
        };
        if let Err(err) = handle.try_send_to(bytes, to) {
            let detail = format_args!("{} bytes to {to}: {err}", bytes.len());
            faults.note(Fault::Unsent, detail);
        }
        true
    }

    /// True if the socket may be readable; else it wakes the task when it is, if it is watched. An
    /// error shows, and is handled, when it is read.
    pub(super) fn is_ready(&self, index: usize, cx: &mut Context<'_>) -> bool {
        match &self.0[index].handle {
            Handle::Watched(socket) => socket.poll_recv_ready(cx).is_ready(),
            Handle::Polled(_) | Handle::Lost => false,
        }
    }

    /// Reads datagrams that wait.
    pub(super) fn receive(&self, index: usize, inbox: &mut Inbox) {
        (inbox.used, inbox.more) = (0, false);
        let Some(Socket {
            local,
            handle,
            told,
            ..
        }) = self.0.get(index)
        else {
            return;
        };
        inbox.local = *local;
        let mut buffers = inbox.buffers.chunks_exact_mut(MAX_JOINED);
        let mut buffers: [_; AT_ONCE] =
            std::array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
        match handle.try_receive(told, &mut buffers, &mut inbox.meta) {
            Ok(used) => {
                inbox.used = used;
                // Elsewhere one call may read one. One that is watched has to say that it is empty,
                // or it is not watched.
                let all = cfg!(target_os = "linux") && matches!(handle, Handle::Polled(_));
                inbox.more = used == AT_ONCE || !all;
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            // An ICMP answer to something sent earlier; the next datagram may be fine.
            Err(err) => {
                log::debug!("receiving on {local}: {err}");
                inbox.more = true;
            }
        }
        inbox.read_at = (Instant::now(), SystemTime::now());
    }

    pub(super) fn is_polled(&self, index: usize) -> bool {
        self.0.get(index).is_some_and(Socket::is_polled)
    }

    /// So many packets of media were read at that socket: decides how it is read from now on.
    pub(super) async fn note_media(&mut self, now: Instant, index: usize, count: u32) {
        let Some(socket) = self.0.get_mut(index) else {
            return;
        };
        let since = |last: Instant| now.saturating_duration_since(last);
        let pause = socket.last.map_or(Duration::MAX, since);
        if count > 0 {
            socket.last = Some(now);
            let before = if pause > PAUSE { 0 } else { socket.flow };
            socket.flow = before.saturating_add(count);
        }
        if match socket.is_polled() {
            true => count == 0 && pause > STOPPED,
            false => socket.flow >= FLOWING,
        } {
            socket.flow = 0;
            socket.turn().await;
        }
    }

    /// Has the kernel wake the task for every socket again.
    pub(super) async fn watch(&mut self) {
        for socket in self.0.iter_mut().filter(|socket| socket.is_polled()) {
            socket.flow = 0;
            socket.turn().await;
        }
    }

    /// As if the machine had lost the address.
    #[cfg(test)]
    pub(super) fn lose(&mut self, local: SocketAddr) {
        let socket = self.0.iter_mut().find(|socket| socket.local == local);
        // Of a documentation range (RFC 5737).
        let other = std::net::Ipv4Addr::new(198, 51, 100, 7);
        socket.unwrap().local.set_ip(other.into());
    }

    /// As if the runtime had not given them back.
    #[cfg(test)]
    pub(super) fn lose_handles(&mut self) {
        for socket in &mut self.0 {
            socket.handle = Handle::Lost;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn sockets_are_few() {
        let mut sockets = Sockets::default();
        for last in 1..20 {
            let ip = Ipv4Addr::new(127, 0, 0, last).into();
            let opened = sockets.open(ip).await;
            assert_eq!(opened.is_ok(), usize::from(last) <= MAX_SOCKETS);
            assert_eq!(sockets.at(ip), opened.ok());
        }
        assert_eq!(sockets.len(), MAX_SOCKETS);
    }

    #[tokio::test]
    async fn what_has_no_socket_is_not_sent() {
        let mut sockets = Sockets::default();
        let local = sockets.open(Ipv4Addr::LOCALHOST.into()).await.unwrap();
        let other = SocketAddr::new(local.ip(), 1);
        let mut faults = Faults::default();
        assert!(sockets.send(&mut faults, local, local, b"x"));
        assert!(!sockets.send(&mut faults, other, local, b"x"));
        assert_eq!(faults.count(Fault::Unsent), 0);
        // Too long for a datagram.
        assert!(sockets.send(&mut faults, local, local, &[0; 70_000]));
        assert_eq!(faults.count(Fault::Unsent), 1);
    }

    /// Elsewhere the kernel does not say.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_datagram_arrives_when_it_comes_not_when_it_is_read() {
        const LATER: Duration = Duration::from_millis(200);
        let mut sockets = Sockets::default();
        let local = sockets.open(Ipv4Addr::LOCALHOST.into()).await.unwrap();
        let peer = StdUdpSocket::bind("127.0.0.1:0").unwrap();
        let begun = Instant::now();
        for n in 0..2 * AT_ONCE {
            peer.send_to(&[n as u8], local).unwrap();
        }
        let sent = Instant::now();
        tokio::time::sleep(LATER).await;
        let mut inbox = Inbox::new();
        for half in 0..2 {
            sockets.receive(0, &mut inbox);
            assert!(inbox.more);
            for (n, datagram) in inbox.datagrams().enumerate() {
                assert_eq!(datagram.bytes, [(half * AT_ONCE + n) as u8]);
                // With room for two clocks that are not looked at in the same instant.
                assert!(datagram.arrived + LATER / 4 > begun);
                assert!(datagram.arrived < sent + LATER / 4);
            }
            assert_eq!(inbox.datagrams().count(), AT_ONCE);
        }
    }

    #[tokio::test]
    async fn a_socket_is_polled_while_media_flows_and_works_either_way() {
        let mut sockets = Sockets::default();
        let local = sockets.open(Ipv4Addr::LOCALHOST.into()).await.unwrap();
        let peer = StdUdpSocket::bind("127.0.0.1:0").unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let to = peer.local_addr().unwrap();
        let mut now = Instant::now();
        let mut faults = Faults::default();
        let (mut buffer, mut inbox) = ([0; 16], Inbox::new());
        for polled in [false, true, false] {
            assert_eq!(sockets.is_polled(0), polled);
            assert!(sockets.send(&mut faults, local, to, b"there"));
            assert_eq!(peer.recv(&mut buffer).unwrap(), 5);
            peer.send_to(b"back", local).unwrap();
            let ready = std::future::poll_fn(|cx| match sockets.is_ready(0, cx) {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            });
            // Only of a watched one the task is told.
            if !polled {
                let told = tokio::time::timeout(Duration::from_secs(30), ready);
                told.await.unwrap();
            }
            sockets.receive(0, &mut inbox);
            let read: Vec<_> = inbox.datagrams().collect();
            let [ref datagram] = read[..] else {
                panic!("{} datagrams", read.len());
            };
            assert_eq!((datagram.source, datagram.local), (to, local));
            assert_eq!(datagram.bytes, b"back");
            assert_eq!(inbox.more, !polled || cfg!(not(target_os = "linux")));
            sockets.receive(0, &mut inbox);
            assert_eq!((inbox.datagrams().count(), inbox.more), (0, false));
            // Slower than a voice.
            for _ in 0..2 * FLOWING {
                now += 2 * PAUSE;
                sockets.note_media(now, 0, 1).await;
                assert_eq!(sockets.is_polled(0), polled);
            }
            if polled {
                now += STOPPED;
                sockets.note_media(now, 0, 0).await;
                assert!(sockets.is_polled(0));
                now += Duration::from_millis(1);
                sockets.note_media(now, 0, 0).await;
            } else {
                for _ in 0..FLOWING {
                    now += Duration::from_millis(20);
                    sockets.note_media(now, 0, 1).await;
                }
            }
        }
        assert_eq!(faults.count(Fault::Unsent), 0);
    }
}
