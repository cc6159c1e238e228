//! The sockets and connections of one peer connection, and what is learnt through them: local
//! addresses, server-reflexive ones, relays.
//!
//! Knows nothing of offers and media. What it finds are candidates ([`News`]); what it is asked for
//! are [`NetworkRequest`]s of the session.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::{Future, poll_fn},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::ClientConfig;
use str0m::{
    Candidate, CandidateKind,
    net::{Protocol, TcpType, Transmit},
};
use tokio::time::timeout;

use super::{
    faults::{Fault, Faults},
    interfaces,
    link::{LinkEvent, system_tls},
    links::{Called, Gone, Links, Role},
    reflexive::{Answer, Queries},
    relay::{Incoming, Relay, RelayEvent, UNREACHABLE},
    servers::{self, Server, Transport},
    session::NetworkRequest,
    sockets::{Datagram, Inbox, Sockets},
};
use crate::{
    peer_connection::IceCandidateError,
    peer_connection_factory::{IceTransportsType, RtcConfiguration},
};

/// A name server that is slower spoils the join anyway.
const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// Datagrams that are read in a row before anything else gets its turn.
pub(super) const BATCH: usize = 64;
/// For the farewell to leave and relays to be given back.
const LINGER: Duration = Duration::from_millis(300);

/// What was found, for the session.
#[derive(Debug)]
pub(super) enum News {
    Candidate(Candidate),
    /// Its socket, connection or allocation is gone, or it is not to be used any more.
    Withdrawn(Candidate),
    Error(IceCandidateError),
    Gathered,
}

/// A datagram for the session, whichever way it came.
pub(super) struct Received<'a> {
    pub protocol: Protocol,
    pub source: SocketAddr,
    /// Our address as the stack knows it.
    pub local: SocketAddr,
    /// When it came to this machine.
    pub arrived: Instant,
    pub bytes: &'a [u8],
}

impl Received<'_> {
    /// RTP, not RTCP or anything else (RFC 7983, RFC 5761).
    pub(super) fn is_rtp(&self) -> bool {
        matches!(self.bytes, [128..=191, kind, ..] if !(64..=95).contains(&(kind & 0x7f)))
    }
}

/// What is ready; see the methods named.
pub(super) enum Ready {
    /// [`Network::receive`]
    Socket(usize),
    /// [`Network::on_link`]
    Link(usize, LinkEvent),
    /// [`Network::on_lookup`]
    Lookup(Server, io::Result<Vec<SocketAddr>>),
}

struct Lookup {
    server: Server,
    result: Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>,
}

pub(super) struct Network {
    policy: IceTransportsType,
    servers: Vec<Server>,
    refused: Vec<(String, &'static str)>,
    /// None: what the system trusts.
    tls: Option<Arc<ClientConfig>>,
    /// Gathering was asked for.
    started: bool,
    /// Gathering was asked for and its end not told yet.
    gathering: bool,
    /// Connections to relays are wanted: datagrams did not help.
    streams: bool,

    sockets: Sockets,
    /// Where the next search for a readable socket starts, so that none starves.
    next: usize,
    links: Links,
    relays: Vec<Relay>,
    relay_candidates: Vec<Candidate>,
    queries: Queries,
    lookups: Vec<Lookup>,
    /// URLs and addresses of the servers that say how a socket looks, as far as they are known.
    found: Vec<(String, SocketAddr)>,

    news: VecDeque<News>,
    faults: Faults,
    /// Where datagrams are wrapped for a relay.
    wrapped: Vec<u8>,
}

impl Network {
    pub(super) fn new(config: &RtcConfiguration, tls: Option<Arc<ClientConfig>>) -> Self {
        let mut network = Self {
            policy: IceTransportsType::All,
            servers: Vec::new(),
            refused: Vec::new(),
            tls,
            started: false,
            gathering: false,
            streams: false,
            sockets: Sockets::default(),
            next: 0,
            links: Links::default(),
            relays: Vec::new(),
            relay_candidates: Vec::new(),
            queries: Queries::default(),
            lookups: Vec::new(),
            found: Vec::new(),
            news: VecDeque::new(),
            faults: Faults::default(),
            wrapped: Vec::new(),
        };
        network.configure(config);
        network
    }

    pub(super) async fn handle(&mut self, now: Instant, request: NetworkRequest) {
        match request {
            NetworkRequest::Gather => self.gather(now).await,
            NetworkRequest::Restart => {
                let gone = self.links.age();
                self.withdraw(gone);
                self.gather(now).await;
            }
            NetworkRequest::Towards(ip) => self.reach(now, ip).await,
            NetworkRequest::Tcp(to) => self.connect(to),
            NetworkRequest::Streams => {
                self.streams = true;
                self.look_up();
            }
            NetworkRequest::Configure(config) => {
                self.configure(&config);
                if self.started {
                    self.gather(now).await;
                }
            }
        }
    }

    /// Takes the oldest news.
    pub(super) fn news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// When to poll again at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let relays = self.relays.iter().filter_map(Relay::deadline);
        relays.chain(self.queries.deadline()).min()
    }

    /// Does what is due.
    pub(super) fn poll(&mut self, now: Instant) {
        while let Some(unanswered) = self.queries.poll(now, |base, to, bytes| {
            self.sockets.send(&mut self.faults, base, to, bytes);
        }) {
            self.report(
                Some(unanswered.base),
                &unanswered.url,
                UNREACHABLE,
                "the STUN server does not answer",
            );
        }
        for index in 0..self.relays.len() {
            self.poll_relay(now, index);
        }
        self.relays.retain(|relay| !relay.is_over());
        if self.gathering && self.is_settled() {
            self.gathering = false;
            self.news.push_back(News::Gathered);
        }
    }

    /// Sends at once, queues (on a stream), or drops, as networks may.
    pub(super) fn send(&mut self, now: Instant, transmit: &Transmit) {
        let Transmit {
            proto,
            source,
            destination,
            contents,
        } = transmit;
        match proto {
            Protocol::Udp => {
                let faults = &mut self.faults;
                if !self.sockets.send(faults, *source, *destination, contents) {
                    self.send_relayed(now, *source, *destination, contents);
                }
            }
            _ => {
                self.links
                    .send(&mut self.faults, *source, *destination, contents);
            }
        }
    }

    /// Waits until something is ready; for ever if there is nothing to wait for. Cancel safe. To
    /// be called again only when that was dealt with.
    pub(super) async fn ready(&mut self) -> Ready {
        poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// Takes the datagrams that wait at a socket, about [`BATCH`] at most, and hands them on. Returns
    /// how many there were.
    pub(super) async fn receive(
        &mut self,
        now: Instant,
        index: usize,
        mut deliver: impl FnMut(Received),
    ) -> usize {
        thread_local! {
            static INBOX: RefCell<Inbox> = RefCell::new(Inbox::new());
        }
        let (mut read, mut media) = (0, 0);
        INBOX.with_borrow_mut(|inbox| {
            // An error that stays is not read for ever either.
            for _ in 0..BATCH {
                self.sockets.receive(index, inbox);
                for datagram in inbox.datagrams() {
                    read += 1;
                    self.sort(now, datagram, |received| {
                        media += u32::from(received.is_rtp());
                        deliver(received);
                    });
                }
                if read >= BATCH || !inbox.more {
                    break;
                }
            }
        });
        self.sockets.note_media(now, index, media).await;
        read
    }

    /// Whether there are sockets to be read at the next beat.
    pub(super) fn is_polling(&self) -> bool {
        (0..self.sockets.len()).any(|index| self.sockets.is_polled(index))
    }

    /// The same for all sockets that are polled.
    pub(super) async fn receive_polled(
        &mut self,
        now: Instant,
        mut deliver: impl FnMut(Received),
    ) -> usize {
        let mut read = 0;
        for index in 0..self.sockets.len() {
            if self.sockets.is_polled(index) {
                read += self.receive(now, index, &mut deliver).await;
            }
        }
        read
    }

    /// Hands a datagram on, unless it is a server's: then what a peer sent through it.
    pub(super) fn sort(
        &mut self,
        now: Instant,
        datagram: Datagram,
        deliver: impl FnOnce(Received),
    ) {
        let Datagram {
            source,
            local,
            arrived,
            bytes,
        } = datagram;
        if !(self.relays.is_empty() && self.queries.is_empty()) {
            match self.queries.receive(source, local, bytes) {
                Answer::Foreign => {}
                Answer::Senseless => return self.faults.note(Fault::Stun, source),
                Answer::Mapped { base, mapped } => return self.add_mapped(base, mapped),
            }
            let through = |relay: &&mut Relay| relay.remote() == source && relay.local() == local;
            if let Some(relay) = self.relays.iter_mut().find(through) {
                return from_relay(relay, &mut self.faults, (now, arrived), bytes, deliver);
            }
        }
        deliver(Received {
            protocol: Protocol::Udp,
            source,
            local,
            arrived,
            bytes,
        });
    }

    /// Deals with what a link said, and hands on what came through it.
    pub(super) fn on_link(
        &mut self,
        now: Instant,
        index: usize,
        event: LinkEvent,
        mut deliver: impl FnMut(Received),
    ) {
        match event {
            LinkEvent::Opened { local, remote } => self.on_link_open(now, index, local, remote),
            LinkEvent::Closed(err) => self.on_link_closed(index, &err),
            LinkEvent::Received => {
                let (link, role) = self.links.get_mut(index);
                let Some((local, remote)) = link.addresses() else {
                    return;
                };
                let to_peer = matches!(role, Role::Peer(_));
                let through = |relay: &&mut Relay| {
                    !to_peer && relay.local() == local && relay.remote() == remote
                };
                let mut relay = self.relays.iter_mut().find(through);
                let broken = loop {
                    match (link.next(), &mut relay) {
                        (Ok(Some(bytes)), Some(relay)) => {
                            from_relay(relay, &mut self.faults, (now, now), bytes, &mut deliver);
                        }
                        (Ok(Some(bytes)), None) if to_peer && !bytes.is_empty() => {
                            deliver(Received {
                                protocol: Protocol::Tcp,
                                source: remote,
                                local,
                                arrived: now,
                                bytes,
                            });
                        }
                        // Empty, or of a server that has nothing to say any more.
                        (Ok(Some(_)), None) => {}
                        (Ok(None), _) => return,
                        (Err(broken), _) => break broken,
                    }
                };
                self.faults.note(Fault::Frame, broken.0);
                let err = io::Error::new(io::ErrorKind::InvalidData, broken.0);
                self.on_link_closed(index, &err);
            }
        }
    }

    /// The addresses of a server are known, or can't be.
    pub(super) async fn on_lookup(
        &mut self,
        now: Instant,
        server: Server,
        result: io::Result<Vec<SocketAddr>>,
    ) {
        let addresses = match result {
            Ok(addresses) if !addresses.is_empty() => addresses,
            Ok(_) => return self.report(None, &server.url, UNREACHABLE, "no address"),
            Err(err) => return self.report(None, &server.url, UNREACHABLE, &err.to_string()),
        };
        match server.target.transport {
            Transport::Udp => self.ask_server(now, server, &addresses).await,
            Transport::Tcp | Transport::Tls => self.open_relay(server, addresses),
        }
    }

    /// Gives everything back. Takes no longer than [`LINGER`], and no time at all if there is
    /// neither a stream nor a relay. Not cancel safe: what is left is then dropped.
    pub(super) async fn close(&mut self) {
        self.sockets.watch().await;
        self.queries = Queries::default();
        self.lookups.clear();
        let now = Instant::now();
        self.relays.iter_mut().for_each(|relay| relay.release(now));
        let end = now + LINGER;
        loop {
            let now = Instant::now();
            self.poll(now);
            self.news.clear();
            if (self.relays.is_empty() && self.links.is_idle()) || now >= end {
                return;
            }
            let until = self.deadline().unwrap_or(end).min(end);
            match timeout(until.saturating_duration_since(now), self.ready()).await {
                Err(_) => {}
                Ok(Ready::Socket(index)) => {
                    self.receive(now, index, |_| {}).await;
                }
                Ok(Ready::Link(index, event)) => self.on_link(now, index, event, |_| {}),
                Ok(Ready::Lookup(..)) => {}
            }
        }
    }

    fn configure(&mut self, config: &RtcConfiguration) {
        (self.servers, self.refused) = servers::servers(&config.ice_servers);
        // Asked anew, maybe with other credentials.
        self.lookups.clear();
        self.found.clear();
        self.policy = config.ice_transport_type;
        // What must not be used any more.
        let policy = self.policy;
        let gone = self
            .sockets
            .retain_candidates(|candidate| allows(policy, candidate));
        self.news.extend(gone.into_iter().map(News::Withdrawn));
        if policy != IceTransportsType::All {
            let to_peer = |role: &Role| matches!(role, Role::Peer(_));
            let gone = self.links.hang_up(to_peer);
            self.withdraw(gone);
        }
    }

    /// At the start, and again later: what has changed since is noticed.
    async fn gather(&mut self, now: Instant) {
        self.started = true;
        self.gathering = true;
        for (url, reason) in std::mem::take(&mut self.refused) {
            self.report(None, &url, UNREACHABLE, reason);
        }
        self.drop_lost_sockets();
        if self.policy != IceTransportsType::Relay {
            for ip in interfaces::local_addresses() {
                self.open(now, ip, None).await;
            }
        }
        self.look_up();
    }

    /// An address may be gone with its network, or a socket lost.
    fn drop_lost_sockets(&mut self) {
        for socket in self.sockets.take_lost() {
            log::debug!("the socket at {} is of no use any more", socket.local);
            self.queries.forget(socket.local);
            self.news
                .extend(socket.candidates.into_iter().map(News::Withdrawn));
            // Their servers are asked anew, through another socket.
            let relays: Vec<_> = self
                .relays
                .extract_if(.., |relay| relay.local() == socket.local)
                .collect();
            for relayed in relays.iter().flat_map(Relay::relayed) {
                self.withdraw_relayed(*relayed);
            }
        }
    }

    /// A socket on the interface through which `remote` is reached.
    async fn reach(&mut self, now: Instant, remote: IpAddr) {
        if self.policy == IceTransportsType::Relay {
            return;
        }
        match interfaces::towards(remote) {
            Ok(ip) => {
                self.open(now, ip, Some(remote)).await;
            }
            Err(err) => {
                let remote = SocketAddr::new(remote, 0);
                let text = format!("no local address for a candidate: {err}");
                self.report(Some(remote), "", UNREACHABLE, &text);
            }
        }
    }

    /// Opens a socket unless there is one. Returns its address.
    async fn open(&mut self, now: Instant, ip: IpAddr, to: Option<IpAddr>) -> Option<SocketAddr> {
        if let Some(local) = self.sockets.at(ip) {
            return Some(local);
        }
        let local = match self.sockets.open(ip).await {
            Ok(local) => local,
            Err(err) => {
                let to = to.map(|to| SocketAddr::new(to, 0));
                let text = format!("no local address for a candidate: {err}");
                self.report(to, "", UNREACHABLE, &text);
                return None;
            }
        };
        match Candidate::host(local, Protocol::Udp) {
            Ok(candidate) => self.add_candidate(local, candidate),
            Err(err) => log::debug!("{local} is no candidate: {err}"),
        }
        // Servers that were found before are asked from this one too.
        for (url, server) in self.found.clone() {
            self.ask_from(now, local, server, &url);
        }
        Some(local)
    }

    fn add_candidate(&mut self, base: SocketAddr, candidate: Candidate) {
        if !allows(self.policy, &candidate) {
            return;
        }
        if self.sockets.add_candidate(base, &candidate) {
            self.news.push_back(News::Candidate(candidate));
        }
    }

    fn add_mapped(&mut self, base: SocketAddr, mapped: SocketAddr) {
        match Candidate::server_reflexive(mapped, base, Protocol::Udp) {
            Ok(candidate) => self.add_candidate(base, candidate),
            Err(err) => self.faults.note(Fault::Stun, err),
        }
    }

    /// Starts with the servers that are due and not yet in use.
    fn look_up(&mut self) {
        let streams = self.streams || self.policy == IceTransportsType::Relay;
        for server in &self.servers {
            let target = &server.target;
            let due = target.transport == Transport::Udp || streams;
            let useful = target.relay || self.policy != IceTransportsType::Relay;
            let in_use = self
                .lookups
                .iter()
                .any(|lookup| lookup.server.url == server.url)
                || self.links.leads_to(&server.url);
            if !due || !useful || in_use {
                continue;
            }
            let (host, port) = (target.host.clone(), target.port);
            let result = async move {
                let found = tokio::net::lookup_host((host.as_str(), port));
                let found = timeout(LOOKUP_LIMIT, found).await;
                let found = found.unwrap_or_else(|_| {
                    Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "no address in time",
                    ))
                });
                Ok(found?.collect())
            };
            self.lookups.push(Lookup {
                server: server.clone(),
                result: Box::pin(result),
            });
        }
    }

    /// A server that is asked by datagrams: for our address from each socket, and for a relay. By
    /// an address of each family, as the way to one may be none.
    async fn ask_server(&mut self, now: Instant, server: Server, addresses: &[SocketAddr]) {
        let routed = |remote: &SocketAddr| Some((*remote, interfaces::towards(remote.ip()).ok()?));
        let (v4, v6): (Vec<_>, Vec<_>) = addresses
            .iter()
            .filter_map(routed)
            .partition(|(remote, _)| remote.is_ipv4());
        if v4.is_empty() && v6.is_empty() {
            return self.report(None, &server.url, UNREACHABLE, "no route to the server");
        }
        self.found.retain(|(url, _)| *url != server.url);
        for (remote, ip) in v4.first().into_iter().chain(v6.first()) {
            self.ask_server_at(now, &server, *remote, *ip).await;
        }
    }

    async fn ask_server_at(
        &mut self,
        now: Instant,
        server: &Server,
        remote: SocketAddr,
        ip: IpAddr,
    ) {
        let Some(local) = self.open(now, ip, Some(remote.ip())).await else {
            return;
        };
        self.found.push((server.url.clone(), remote));
        for local in self.sockets.locals().collect::<Vec<_>>() {
            self.ask_from(now, local, remote, &server.url);
        }
        // A socket has one allocation on a server. Other credentials don't replace it: what runs
        // over it goes on as long as the server lets it.
        let known = self.relays.iter().any(|relay| {
            let same = relay.remote() == remote || relay.server().url == server.url;
            same && relay.local() == local
        });
        if server.target.relay && !known {
            let relay = Relay::new(now, server.clone(), local, remote);
            self.relays.push(relay);
        }
    }

    /// Asks a server how a socket looks, if it may have something to say about it.
    fn ask_from(&mut self, now: Instant, local: SocketAddr, server: SocketAddr, url: &str) {
        // Through loopback nothing is learnt about the world, and the other way round.
        let same = local.is_ipv4() == server.is_ipv4()
            && local.ip().is_loopback() == server.ip().is_loopback();
        if same && self.policy != IceTransportsType::Relay {
            self.queries.ask(now, local, server, url);
        }
    }

    fn open_relay(&mut self, server: Server, addresses: Vec<SocketAddr>) {
        let tls = match server.target.transport {
            Transport::Tls => match self.tls.clone().map_or_else(system_tls, Ok) {
                Ok(config) => Some(config),
                Err(err) => return self.report(None, &server.url, UNREACHABLE, &err),
            },
            Transport::Tcp | Transport::Udp => None,
        };
        let url = server.url.clone();
        if !self.links.call(server, addresses, tls) {
            self.report(None, &url, UNREACHABLE, "too many connections");
        }
    }

    /// Connects to a passive candidate.
    fn connect(&mut self, to: SocketAddr) {
        if self.policy == IceTransportsType::All && !self.links.dial(to) {
            log::debug!("too many connections: none to {to}");
        }
    }

    fn on_link_open(&mut self, now: Instant, index: usize, local: SocketAddr, remote: SocketAddr) {
        match self.links.get_mut(index).1 {
            Role::Relay(called) => {
                called.local = Some(local);
                let relay = Relay::new(now, called.server.clone(), local, remote);
                self.relays.push(relay);
            }
            Role::Peer(dialled) => {
                log::debug!("connected to {remote} by TCP");
                let candidate = Candidate::builder()
                    .tcp()
                    .host(local)
                    .tcptype(TcpType::Active)
                    .build();
                match candidate {
                    Ok(candidate) => {
                        dialled.candidate = Some(candidate.clone());
                        self.news.push_back(News::Candidate(candidate));
                    }
                    Err(err) => log::debug!("{local} is no candidate: {err}"),
                }
            }
        }
    }

    fn on_link_closed(&mut self, index: usize, err: &io::Error) {
        match self.links.remove(index) {
            Role::Peer(dialled) => {
                log::debug!("connection to {}: {err}", dialled.to);
                self.news.extend(dialled.candidate.map(News::Withdrawn));
            }
            Role::Relay(Called { server, local, .. }) => {
                self.withdraw(local.map(Gone::Called));
                self.report(None, &server.url, UNREACHABLE, &err.to_string());
                self.use_new_credentials(&server);
            }
        }
    }

    fn withdraw(&mut self, gone: impl IntoIterator<Item = Gone>) {
        for gone in gone {
            match gone {
                Gone::Candidate(candidate) => self.news.push_back(News::Withdrawn(candidate)),
                Gone::Called(local) => {
                    let over_it = |relay: &mut Relay| {
                        relay.local() == local && relay.server().target.transport != Transport::Udp
                    };
                    let lost: Vec<_> = self.relays.extract_if(.., over_it).collect();
                    for relayed in lost.iter().flat_map(Relay::relayed) {
                        self.withdraw_relayed(*relayed);
                    }
                }
            }
        }
    }

    /// An allocation is over: others are due, if some have come meanwhile.
    fn use_new_credentials(&mut self, server: &Server) {
        let mut servers = self.servers.iter();
        let current = servers.find(|current| current.url == server.url);
        if current.is_some_and(|current| current != server) {
            self.look_up();
        }
    }

    fn poll_relay(&mut self, now: Instant, index: usize) {
        loop {
            let relay = &mut self.relays[index];
            let (local, remote) = (relay.local(), relay.remote());
            let stream = relay.server().target.transport != Transport::Udp;
            let (sockets, links, faults) = (&self.sockets, &mut self.links, &mut self.faults);
            let event = relay.poll(now, |bytes| {
                if stream {
                    links.send(faults, local, remote, bytes);
                } else {
                    sockets.send(faults, local, remote, bytes);
                }
            });
            match event {
                None => return,
                Some(RelayEvent::Allocated(relayed)) => {
                    match Candidate::relayed(relayed, local, Protocol::Udp) {
                        Ok(candidate) => {
                            self.relay_candidates.push(candidate.clone());
                            self.news.push_back(News::Candidate(candidate));
                        }
                        Err(err) => self.faults.note(Fault::Turn, err),
                    }
                }
                Some(RelayEvent::Failed {
                    relayed,
                    code,
                    text,
                }) => {
                    let server = self.relays[index].server().clone();
                    for relayed in relayed {
                        self.withdraw_relayed(relayed);
                    }
                    self.report(Some(local), &server.url, code, &text);
                    if stream {
                        self.links.remove_from(local);
                    }
                    self.use_new_credentials(&server);
                    return;
                }
            }
        }
    }

    fn send_relayed(&mut self, now: Instant, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let from_it = |relay: &&mut Relay| relay.relayed().contains(&from);
        let Some(relay) = self.relays.iter_mut().find(from_it) else {
            return;
        };
        if !relay.wrap(now, to, bytes, &mut self.wrapped) {
            return;
        }
        let (local, remote) = (relay.local(), relay.remote());
        if relay.server().target.transport == Transport::Udp {
            self.sockets
                .send(&mut self.faults, local, remote, &self.wrapped);
        } else {
            self.links
                .send(&mut self.faults, local, remote, &self.wrapped);
        }
    }

    fn withdraw_relayed(&mut self, relayed: SocketAddr) {
        let gone = |candidate: &mut Candidate| candidate.addr() == relayed;
        let gone: Vec<_> = self.relay_candidates.extract_if(.., gone).collect();
        self.news.extend(gone.into_iter().map(News::Withdrawn));
    }

    fn report(&mut self, local: Option<SocketAddr>, url: &str, code: u16, text: &str) {
        log::debug!("{url}: {code} {text}");
        self.news.push_back(News::Error(IceCandidateError {
            address: local.map(|at| at.ip().to_string()).unwrap_or_default(),
            port: local.map_or(0, |at| at.port().into()),
            url: url.to_owned(),
            error_code: code.into(),
            error_text: text.to_owned(),
        }));
    }

    /// Nothing is under way that could bring a candidate.
    fn is_settled(&self) -> bool {
        self.lookups.is_empty()
            && self.queries.is_empty()
            && self.relays.iter().all(|relay| !relay.relayed().is_empty())
            && !self.links.is_calling()
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Ready> {
        let (sockets, count) = (self.sockets.len(), self.sockets.len() + self.links.len());
        for index in (self.next..count).chain(0..self.next.min(count)) {
            let ready = if index < sockets {
                let ready = self.sockets.is_ready(index, cx);
                ready.then_some(Ready::Socket(index))
            } else {
                let index = index - sockets;
                match self.links.poll(index, cx) {
                    Poll::Ready(event) => Some(Ready::Link(index, event)),
                    Poll::Pending => None,
                }
            };
            if let Some(ready) = ready {
                self.next = index + 1;
                return Poll::Ready(ready);
            }
        }
        for index in 0..self.lookups.len() {
            if let Poll::Ready(result) = self.lookups[index].result.as_mut().poll(cx) {
                let lookup = self.lookups.swap_remove(index);
                return Poll::Ready(Ready::Lookup(lookup.server, result));
            }
        }
        Poll::Pending
    }
}

fn allows(policy: IceTransportsType, candidate: &Candidate) -> bool {
    match policy {
        IceTransportsType::All => true,
        IceTransportsType::NoHost => candidate.kind() != CandidateKind::Host,
        IceTransportsType::Relay => candidate.kind() == CandidateKind::Relayed,
    }
}

fn from_relay(
    relay: &mut Relay,
    faults: &mut Faults,
    (now, arrived): (Instant, Instant),
    bytes: &[u8],
    deliver: impl FnOnce(Received),
) {
    let incoming = relay.receive(now, bytes, |source, local, bytes| {
        deliver(Received {
            protocol: Protocol::Udp,
            source,
            local,
            arrived,
            bytes,
        });
    });
    if incoming == Incoming::Senseless {
        faults.note(Fault::Turn, relay.remote());
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket as StdUdpSocket};

    use super::*;

    fn network() -> Network {
        Network::new(&RtcConfiguration::default(), None)
    }

    #[tokio::test]
    async fn an_address_is_opened_once() {
        let (mut network, now) = (network(), Instant::now());
        let loopback: IpAddr = Ipv4Addr::LOCALHOST.into();
        for _ in 0..2 {
            network.reach(now, loopback).await;
        }
        assert_eq!(network.sockets.len(), 1);
        assert!(network.sockets.at(loopback).is_some());
        assert_eq!(network.news.len(), 1);
    }

    #[tokio::test]
    async fn datagrams_come_with_both_addresses_and_no_socket_starves() {
        let (mut network, now) = (network(), Instant::now());
        let first = Ipv4Addr::LOCALHOST.into();
        let first = network.open(now, first, None).await.unwrap();
        let second = Ipv4Addr::new(127, 0, 0, 2).into();
        let second = network.open(now, second, None).await.unwrap();
        let sender = StdUdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..=BATCH {
            sender.send_to(b"one", first).unwrap();
            sender.send_to(b"two", second).unwrap();
        }
        let (mut seen, mut batches) = (0, Vec::new());
        while seen < 2 * (BATCH + 1) {
            let Ready::Socket(index) = network.ready().await else {
                panic!("there are only sockets");
            };
            let deliver = |received: Received| {
                let expected = if received.local == first {
                    b"one"
                } else {
                    b"two"
                };
                assert_eq!(received.source, sender.local_addr().unwrap());
                assert_eq!(received.bytes, expected);
            };
            let read = network.receive(now, index, deliver).await;
            seen += read;
            batches.extend((read > 0).then_some((index, read)));
        }
        assert_eq!(batches[0].1, BATCH);
        assert_ne!(batches[0].0, batches[1].0);
    }

    #[tokio::test]
    async fn an_address_that_is_gone_takes_its_candidates_along() {
        let (mut network, now) = (network(), Instant::now());
        let loopback = Ipv4Addr::LOCALHOST.into();
        let local = network.open(now, loopback, None).await.unwrap();
        network.add_mapped(local, "203.0.113.5:4321".parse().unwrap());
        assert_eq!(network.news.len(), 2);
        network.news.clear();
        network.handle(now, NetworkRequest::Gather).await;
        let kept = |network: &Network| {
            let mut locals = network.sockets.locals();
            locals.any(|known| known.port() == local.port())
        };
        assert!(kept(&network));

        network.sockets.lose(local);
        network.news.clear();
        network.handle(now, NetworkRequest::Restart).await;
        assert!(!kept(&network));
        let withdrawn = |news: &&News| matches!(news, News::Withdrawn(_));
        assert_eq!(network.news.iter().filter(withdrawn).count(), 2);
        network.reach(now, loopback).await;
        assert!(matches!(network.news.back(), Some(News::Candidate(_))));
    }

    #[tokio::test]
    async fn a_lost_socket_is_replaced() {
        let (mut network, now) = (network(), Instant::now());
        network.handle(now, NetworkRequest::Gather).await;
        let before: Vec<_> = network.sockets.locals().collect();
        assert!(!before.is_empty());
        network.sockets.lose_handles();
        network.news.clear();
        network.handle(now, NetworkRequest::Restart).await;
        assert_eq!(network.sockets.len(), before.len());
        let withdrawn = |news: &&News| matches!(news, News::Withdrawn(_));
        assert_eq!(network.news.iter().filter(withdrawn).count(), before.len());
        for local in before {
            assert!(network.sockets.locals().all(|after| after != local));
        }
    }

    /// A server of the configuration is being asked.
    fn asks(network: &Network) -> bool {
        !network.lookups.is_empty()
    }

    fn with_server(url: &str, policy: IceTransportsType) -> RtcConfiguration {
        let server = crate::peer_connection_factory::IceServer {
            urls: vec![url.to_owned()],
            username: String::new(),
            password: String::new(),
        };
        RtcConfiguration {
            ice_servers: vec![server],
            ice_transport_type: policy,
            ..RtcConfiguration::default()
        }
    }

    /// A server of ours on that address, which the caller plays.
    fn played(ip: &str) -> (StdUdpSocket, SocketAddr) {
        let socket = StdUdpSocket::bind((ip, 0)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let addr = socket.local_addr().unwrap();
        (socket, addr)
    }

    #[tokio::test]
    async fn a_socket_that_is_opened_later_is_told_how_it_looks_too() {
        let config = with_server("stun:127.0.0.1", IceTransportsType::All);
        let (mut network, now) = (Network::new(&config, None), Instant::now());
        let (server, addr) = played("127.0.0.1");
        let stun = network.servers[0].clone();
        network.on_lookup(now, stun, Ok(vec![addr])).await;
        network.poll(now);
        let later = Ipv4Addr::new(127, 0, 0, 2).into();
        let later = network.open(now, later, None).await.unwrap();
        network.poll(now);
        let mut buffer = [0; 64];
        let (_, first) = server.recv_from(&mut buffer).unwrap();
        assert_ne!(first, later);
        assert_eq!(server.recv_from(&mut buffer).unwrap().1, later);
    }

    #[tokio::test]
    async fn a_server_with_addresses_of_both_families_is_asked_at_both() {
        let config = with_server("turn:localhost", IceTransportsType::All);
        let (mut network, now) = (Network::new(&config, None), Instant::now());
        let ends = [played("::1"), played("127.0.0.1")];
        let server = network.servers[0].clone();
        for _ in 0..2 {
            let addresses = ends.iter().map(|(_, addr)| *addr).collect();
            network.on_lookup(now, server.clone(), Ok(addresses)).await;
        }
        network.poll(now);
        let mut buffer = [0; 256];
        for (end, addr) in &ends {
            // How the socket looks, and a relay.
            for _ in 0..2 {
                let (_, source) = end.recv_from(&mut buffer).unwrap();
                assert_eq!(source.ip(), addr.ip());
            }
        }
        assert_eq!(network.relays.len(), 2);
    }

    /// The passwords of the relays, when what is being looked up has led to one.
    async fn passwords(network: &mut Network, now: Instant, addr: SocketAddr) -> Vec<String> {
        for lookup in std::mem::take(&mut network.lookups) {
            network.on_lookup(now, lookup.server, Ok(vec![addr])).await;
        }
        while network.links.is_calling() {
            if let Ready::Link(index, event) = network.ready().await {
                network.on_link(now, index, event, |_| {});
            }
        }
        let servers = network.relays.iter().map(Relay::server);
        servers.map(|server| server.password.clone()).collect()
    }

    #[tokio::test]
    async fn other_credentials_are_used_when_the_allocation_is_over() {
        for url in ["turn:127.0.0.1", "turn:127.0.0.1?transport=tcp"] {
            let config = |password: &str| {
                let mut config = with_server(url, IceTransportsType::Relay);
                config.ice_servers[0].password = password.to_owned();
                config
            };
            // Never answers.
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let addr = listener.local_addr().unwrap();
            let (mut network, mut now) = (Network::new(&config("old"), None), Instant::now());
            network.handle(now, NetworkRequest::Gather).await;
            assert_eq!(passwords(&mut network, now, addr).await, ["old"]);
            for _ in 0..2 {
                let request = NetworkRequest::Configure(config("new"));
                network.handle(now, request).await;
                assert_eq!(passwords(&mut network, now, addr).await, ["old"], "{url}");
            }
            for after in [&["new"][..], &[]] {
                while !network.relays.is_empty() {
                    now += Duration::from_secs(1);
                    network.poll(now);
                }
                assert_eq!(passwords(&mut network, now, addr).await, after, "{url}");
            }
        }
    }

    #[tokio::test]
    async fn a_restart_calls_servers_anew_and_a_connection_that_ends_has_new_credentials_used() {
        let config = |password: &str| {
            let mut config = with_server("turn:127.0.0.1?transport=tcp", IceTransportsType::Relay);
            config.ice_servers[0].password = password.to_owned();
            config
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (mut network, now) = (Network::new(&config("old"), None), Instant::now());
        network.handle(now, NetworkRequest::Gather).await;
        assert_eq!(passwords(&mut network, now, addr).await, ["old"]);
        // The one before may be in use still, the one before that is not.
        for _ in 0..3 {
            network.handle(now, NetworkRequest::Restart).await;
            assert_eq!(passwords(&mut network, now, addr).await, ["old", "old"]);
            assert_eq!(network.links.len(), 2);
        }

        network
            .handle(now, NetworkRequest::Configure(config("new")))
            .await;
        assert_eq!(passwords(&mut network, now, addr).await, ["old", "old"]);
        let lost = io::Error::from(io::ErrorKind::ConnectionReset);
        network.on_link_closed(1, &lost);
        assert_eq!(passwords(&mut network, now, addr).await, ["old", "new"]);
    }

    #[tokio::test]
    async fn servers_are_asked_when_their_time_has_come() {
        use IceTransportsType::{All, NoHost, Relay};
        let now = Instant::now();
        for (url, policy, at_once, with_streams) in [
            ("stun:127.0.0.1", All, true, true),
            ("stun:127.0.0.1", NoHost, true, true),
            ("stun:127.0.0.1", Relay, false, false),
            ("turn:127.0.0.1", All, true, true),
            ("turn:127.0.0.1", Relay, true, true),
            ("turn:127.0.0.1?transport=tcp", All, false, true),
            ("turns:127.0.0.1", NoHost, false, true),
            ("turns:127.0.0.1", Relay, true, true),
        ] {
            let config = with_server(url, policy);
            let mut early = Network::new(&config, None);
            assert!(!asks(&early));
            early.handle(now, NetworkRequest::Gather).await;
            // As the SDK does: what the server says of servers comes after the search began.
            let mut late = network();
            late.handle(now, NetworkRequest::Gather).await;
            late.handle(now, NetworkRequest::Configure(config)).await;
            for mut network in [early, late] {
                assert_eq!(asks(&network), at_once, "{url} {policy:?}");
                network.handle(now, NetworkRequest::Streams).await;
                assert_eq!(asks(&network), with_streams, "{url} {policy:?}");
                assert!(network.lookups.len() <= 1);
            }
        }
    }
}
