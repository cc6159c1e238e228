//! All peer connections, the sockets they share, and the forwarding between them.
//!
//! Knows nothing of rooms, participants or permissions: the actor says which source goes to
//! which connection. Nothing here waits; the actor calls [`Media::run`] when a packet has come
//! or [`Media::deadline`] has passed.

use super::connection::{
    Answered, Connection, ConnectionId, Demand, Happening, Lane, NegotiationError, Role, Source,
    Stuck,
};
use bytes::Bytes;
use livekit_protocol as proto;
use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};
use str0m::{
    Input,
    config::CryptoProvider,
    media::Mid,
    net::{Protocol, Receive, Transmit},
};
use tokio::{net::UdpSocket, sync::mpsc};

/// Datagrams read in one go before other work gets its turn.
const READ_BATCH: usize = 64;
/// Larger than any datagram that a client sends (SCTP and RTP keep below 1,500).
const MAX_DATAGRAM: usize = 2_048;
/// Closing DTLS together with a Leave makes clients log errors: they get this long to go first.
const CLOSE_DELAY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) enum MediaEvent {
    Connected,
    Lost,
    Found,
    Data(Lane, Vec<u8>),
    /// An RTP packet came in, with its RFC 6464 level (dBov, at most 0) if it has one.
    Packet {
        mid: Mid,
        level: Option<i8>,
    },
    /// The connection is of no use any more.
    Failed,
}

pub(super) struct Media {
    sockets: Sockets,
    crypto: Arc<CryptoProvider>,
    connections: HashMap<ConnectionId, Connection>,
    next_id: ConnectionId,
    /// Which connection a remote address was last seen to belong to. A hint only: a client may
    /// reuse its port for another connection.
    hints: HashMap<SocketAddr, ConnectionId>,
    routes: HashMap<Source, Route>,
    deadlines: Deadlines,
    /// Connections with something to do now.
    dirty: BTreeSet<ConnectionId>,
    closing: Vec<(Instant, ConnectionId)>,
    silenced: BTreeSet<ConnectionId>,
    failed: Vec<ConnectionId>,
}

struct Sockets {
    udp: UdpSocket,
    udp_address: SocketAddr,
    /// Whether clients are told of the UDP socket.
    offer_udp: bool,
    tcp_address: SocketAddr,
    tcp: HashMap<SocketAddr, mpsc::Sender<Bytes>>,
}

#[derive(Default)]
struct Route {
    subscribers: Vec<ConnectionId>,
    muted: bool,
    /// Nothing is forwarded, by a fault.
    stopped: bool,
}

impl Media {
    /// `tcp` is where ICE-TCP connections are accepted; they are handed in by
    /// [`Self::tcp_opened`].
    pub fn new(udp: UdpSocket, offer_udp: bool, tcp: SocketAddr) -> io::Result<Self> {
        let udp_address = udp.local_addr()?;
        Ok(Self {
            sockets: Sockets {
                udp,
                udp_address,
                offer_udp,
                tcp_address: tcp,
                tcp: HashMap::new(),
            },
            crypto: Arc::new(str0m::crypto::from_feature_flags()),
            connections: HashMap::new(),
            next_id: 1,
            hints: HashMap::new(),
            routes: HashMap::new(),
            deadlines: Deadlines::default(),
            dirty: BTreeSet::new(),
            closing: Vec::new(),
            silenced: BTreeSet::new(),
            failed: Vec::new(),
        })
    }

    pub fn open(&mut self, role: Role, now: Instant) -> ConnectionId {
        let id = self.next_id;
        self.next_id += 1;
        let sockets = &self.sockets;
        let udp = Some(sockets.udp_address).filter(|_| sockets.offer_udp);
        let tcp = sockets.tcp_address;
        let connection = Connection::new(role, udp, tcp, self.crypto.clone(), now);
        self.connections.insert(id, connection);
        self.dirty.insert(id);
        id
    }

    /// Stops the connection's media at once and closes it a little later.
    pub fn close(&mut self, id: ConnectionId, now: Instant) {
        self.routes.retain(|source, route| {
            route.subscribers.retain(|s| *s != id);
            source.connection != id
        });
        if self.connections.contains_key(&id) {
            self.closing.push((now + CLOSE_DELAY, id));
        }
    }

    /// Sends the source down to a connection; takes effect through [`Self::negotiate`]. False if
    /// it is sent already.
    pub fn subscribe(
        &mut self,
        id: ConnectionId,
        track: &str,
        stream: String,
        source: Source,
    ) -> bool {
        let connection = self.connections.get_mut(&id);
        let new = connection.is_some_and(|c| c.subscribe(track, stream, source));
        if new {
            self.routes.entry(source).or_default().subscribers.push(id);
        }
        new
    }

    /// False if the connection had not subscribed to the track.
    pub fn unsubscribe(&mut self, id: ConnectionId, track: &str, source: Source) -> bool {
        if let Some(route) = self.routes.get_mut(&source) {
            route.subscribers.retain(|s| *s != id);
        }
        let connection = self.connections.get_mut(&id);
        connection.is_some_and(|c| c.unsubscribe(track))
    }

    /// The source sends no track any more. Its subscribers are to be unsubscribed one by one.
    pub fn end_source(&mut self, source: Source) {
        self.routes.remove(&source);
    }

    /// Nothing of a muted source is forwarded.
    pub fn mute(&mut self, source: Source, muted: bool) {
        self.routes.entry(source).or_default().muted = muted;
    }

    /// Nothing of a stopped source is forwarded, not even that it is muted.
    pub fn stop(&mut self, source: Source, stopped: bool) {
        self.routes.entry(source).or_default().stopped = stopped;
    }

    /// Whether from now on every datagram from and to the connection is lost.
    pub fn silence(&mut self, id: ConnectionId, silent: bool) {
        if !silent {
            self.silenced.remove(&id);
        } else if self.connections.contains_key(&id) {
            self.silenced.insert(id);
        }
    }

    pub fn enable(&mut self, id: ConnectionId, track: &str, enabled: bool) {
        if let Some(c) = self.connections.get_mut(&id) {
            c.enable(track, enabled);
        }
    }

    pub fn is_connected(&self, id: ConnectionId) -> bool {
        self.connections
            .get(&id)
            .is_some_and(Connection::is_connected)
    }

    pub fn negotiate(&mut self, id: ConnectionId) -> Option<Demand> {
        self.guarded(id, Connection::negotiate).flatten()
    }

    /// See [`Connection::restart`].
    pub fn restart(&mut self, id: ConnectionId) -> Option<Demand> {
        self.guarded(id, Connection::restart).flatten()
    }

    /// None if the connection is gone or has just failed.
    pub fn accept_offer(
        &mut self,
        id: ConnectionId,
        offer: &proto::SessionDescription,
    ) -> Option<Result<Answered, NegotiationError>> {
        self.guarded(id, |c| c.accept_offer(offer))
    }

    /// None if the connection is gone or has just failed.
    pub fn accept_answer(
        &mut self,
        id: ConnectionId,
        answer: &proto::SessionDescription,
    ) -> Option<Result<Vec<String>, NegotiationError>> {
        self.guarded(id, |c| c.accept_answer(answer))
    }

    pub fn send_data(
        &mut self,
        id: ConnectionId,
        lane: Lane,
        message: Arc<[u8]>,
    ) -> Result<(), Stuck> {
        self.guarded(id, |c| c.send_data(lane, message))
            .unwrap_or(Ok(()))
    }

    /// Waits for a datagram; cancel safe.
    pub async fn readable(&self) -> io::Result<()> {
        self.sockets.udp.readable().await
    }

    /// When [`Self::run`] must be called again at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let closing = self.closing.iter().map(|c| c.0).min();
        self.deadlines.first().into_iter().chain(closing).min()
    }

    /// Reads what the UDP socket has, and says what happened.
    pub fn read(&mut self, events: &mut Vec<(ConnectionId, MediaEvent)>) {
        let mut buffer = [0; MAX_DATAGRAM];
        for _ in 0..READ_BATCH {
            // Errors other than "nothing there" are about earlier datagrams of ours.
            match self.sockets.udp.try_recv_from(&mut buffer) {
                Ok((n, from)) => {
                    self.receive(Protocol::Udp, from, &buffer[..n]);
                    // DTLS fails when too many packets wait for it.
                    self.run(Instant::now(), events);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => tracing::debug!("udp: {e}"),
            }
        }
    }

    pub fn tcp_opened(&mut self, peer: SocketAddr, sender: mpsc::Sender<Bytes>) {
        self.sockets.tcp.insert(peer, sender);
    }

    pub fn tcp_received(&mut self, peer: SocketAddr, packet: &[u8]) {
        self.receive(Protocol::Tcp, peer, packet);
    }

    pub fn tcp_closed(&mut self, peer: SocketAddr) {
        self.sockets.tcp.remove(&peer);
        self.hints.remove(&peer);
    }

    /// Does all that is due and says what happened, oldest first.
    pub fn run(&mut self, now: Instant, events: &mut Vec<(ConnectionId, MediaEvent)>) {
        self.finish_closing(now);
        self.dirty.extend(self.deadlines.take_due(now));
        let mut happenings = Vec::new();
        while let Some(id) = self.dirty.pop_first() {
            let Self {
                connections,
                sockets,
                silenced,
                ..
            } = self;
            let Some(connection) = connections.get_mut(&id) else {
                continue;
            };
            let silent = silenced.contains(&id);
            let mut transmit = |datagram| {
                if !silent {
                    sockets.send(datagram);
                }
            };
            let run = AssertUnwindSafe(|| connection.poll(now, &mut transmit, &mut happenings));
            match catch_unwind(run) {
                Ok(Ok(deadline)) => self.deadlines.set(id, deadline),
                Ok(Err(e)) => self.fail(id, &e),
                Err(_) => self.fail(id, &"panic"),
            }
            for happening in happenings.drain(..) {
                let event = match happening {
                    Happening::Connected => MediaEvent::Connected,
                    Happening::Lost => MediaEvent::Lost,
                    Happening::Found => MediaEvent::Found,
                    Happening::Data(lane, data) => MediaEvent::Data(lane, data),
                    Happening::Rtp(mid, packet) => {
                        let source = Source {
                            connection: id,
                            mid,
                        };
                        let level = packet.header.ext_vals.audio_level;
                        if let Some(route) = self.routes.get(&source).filter(|r| !r.stopped) {
                            for subscriber in &route.subscribers {
                                if let Some(c) = self.connections.get_mut(subscriber) {
                                    c.forward(source, &packet, route.muted);
                                    self.dirty.insert(*subscriber);
                                }
                            }
                        }
                        if packet.payload.is_empty() {
                            continue;
                        }
                        MediaEvent::Packet { mid, level }
                    }
                };
                events.push((id, event));
            }
        }
        events.extend(self.failed.drain(..).map(|id| (id, MediaEvent::Failed)));
    }

    fn receive(&mut self, protocol: Protocol, from: SocketAddr, packet: &[u8]) {
        let to = match protocol {
            Protocol::Udp => self.sockets.udp_address,
            _ => self.sockets.tcp_address,
        };
        // Whatever is no STUN, DTLS, RTP or RTCP does not parse.
        let Ok(received) = Receive::new(protocol, from, to, packet) else {
            return;
        };
        let input = Input::Receive(Instant::now(), received);
        let accepts =
            |id: &ConnectionId| self.connections.get(id).is_some_and(|c| c.accepts(&input));
        let hint = self.hints.get(&from).copied().filter(accepts);
        let Some(id) = hint.or_else(|| self.connections.keys().copied().find(accepts)) else {
            tracing::trace!("packet from {from} belongs to no connection");
            return;
        };
        if hint.is_none() {
            // Bounded, since it can be rebuilt at any time.
            if self.hints.len() > 16 * self.connections.len() {
                self.hints.clear();
            }
            self.hints.insert(from, id);
        }
        if self.silenced.contains(&id) {
            return;
        }
        if let Some(Err(e)) = self.guarded(id, |c| c.handle(input)) {
            self.fail(id, &e);
        }
    }

    /// Runs an operation that digests a client's input, so that a panic in it costs that
    /// client's connection and not the server.
    fn guarded<T>(
        &mut self,
        id: ConnectionId,
        operation: impl FnOnce(&mut Connection) -> T,
    ) -> Option<T> {
        let connection = self.connections.get_mut(&id)?;
        self.dirty.insert(id);
        match catch_unwind(AssertUnwindSafe(|| operation(connection))) {
            Ok(result) => Some(result),
            Err(_) => {
                self.fail(id, &"panic");
                None
            }
        }
    }

    fn fail(&mut self, id: ConnectionId, cause: &dyn std::fmt::Display) {
        tracing::warn!(connection = id, "peer connection failed: {cause}");
        self.forget(id);
        self.failed.push(id);
    }

    fn finish_closing(&mut self, now: Instant) {
        let due: Vec<_> = self.closing.extract_if(.., |c| c.0 <= now).collect();
        for (_, id) in due {
            if let Some(mut connection) = self.connections.remove(&id) {
                let sockets = &self.sockets;
                let silent = self.silenced.contains(&id);
                let mut transmit = |datagram| {
                    if !silent {
                        sockets.send(datagram);
                    }
                };
                let close = AssertUnwindSafe(|| connection.close(now, &mut transmit));
                if catch_unwind(close).is_err() {
                    tracing::warn!(connection = id, "closing panicked");
                }
            }
            self.forget(id);
        }
    }

    fn forget(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
        self.silenced.remove(&id);
        self.deadlines.clear(id);
        self.dirty.remove(&id);
        self.hints.retain(|_, hint| *hint != id);
        self.routes.retain(|source, route| {
            route.subscribers.retain(|s| *s != id);
            source.connection != id
        });
    }
}

impl Sockets {
    /// Losing a datagram is the network's right; ICE, DTLS and SCTP repeat theirs.
    fn send(&self, datagram: Transmit) {
        let to = datagram.destination;
        let lost = match datagram.proto {
            Protocol::Udp => {
                (self.udp.try_send_to(&datagram.contents, to).err()).map(|e| e.to_string())
            }
            _ => self.tcp.get(&to).and_then(|tcp| {
                let packet = Bytes::copy_from_slice(&datagram.contents);
                tcp.try_send(packet).err().map(|e| e.to_string())
            }),
        };
        if let Some(e) = lost {
            tracing::debug!("datagram to {to} lost: {e}");
        }
    }
}

/// When each connection must be run next.
#[derive(Default)]
struct Deadlines {
    order: BTreeSet<(Instant, ConnectionId)>,
    of: HashMap<ConnectionId, Instant>,
}

impl Deadlines {
    fn set(&mut self, id: ConnectionId, at: Instant) {
        self.clear(id);
        self.order.insert((at, id));
        self.of.insert(id, at);
    }

    fn clear(&mut self, id: ConnectionId) {
        if let Some(at) = self.of.remove(&id) {
            self.order.remove(&(at, id));
        }
    }

    fn first(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    fn take_due(&mut self, now: Instant) -> Vec<ConnectionId> {
        let mut due = Vec::new();
        while let Some((at, id)) = self.order.first().copied().filter(|(at, _)| *at <= now) {
            self.order.remove(&(at, id));
            self.of.remove(&id);
            due.push(id);
        }
        due
    }
}
