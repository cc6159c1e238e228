//! An allocation on a TURN server (RFC 8656), sans-IO: the protocol is `turn-client-proto`'s, here
//! is what a peer connection makes of it.
//!
//! Whole messages go in and out. Over a stream their framing is not this module's: the crate's own
//! does not know the padding of channel data.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use turn_client_proto::{
    api::{SendError, Transmit, TurnConfig, TurnEvent, TurnPollRet, TurnRecvRet},
    impl_client,
    prelude::*,
    tcp::TurnClientTcp,
    types::{
        AddressFamily, Instant as TurnInstant, TransportType, TurnCredentials,
        channel::ChannelData,
        stun::{
            attribute::ErrorCode,
            message::{Message, MessageClass, MessageHeader, TransactionId},
        },
    },
    udp::TurnClientUdp,
};

use super::servers::{Server, Transport};

/// An allocation after that is of no use for a join.
const ALLOCATE_LIMIT: Duration = Duration::from_secs(10);
/// Addresses that a relay is opened for; a remote side has a handful of candidates.
const MAX_PEERS: usize = 32;
/// A server that forbids an address does so again.
const MAX_ASKED: u32 = 3;
/// The client may want to be called "now" again and again while it waits.
const MIN_WAIT: Duration = Duration::from_millis(5);
/// Server unreachable (W3C webrtc, 4.8.2).
pub(super) const UNREACHABLE: u16 = 701;

impl_client!(Client, (Udp, TurnClientUdp), (Tcp, TurnClientTcp));

pub(super) struct Relay {
    server: Server,
    client: Client,
    local: SocketAddr,
    remote: SocketAddr,
    /// Zero of the client's time.
    epoch: Instant,
    /// Addresses of IPv6 are asked for too.
    both: bool,
    /// At most one of each family.
    relayed: Vec<SocketAddr>,
    give_up_at: Instant,
    /// Requests for an allocation that were sent.
    asked: Vec<TransactionId>,
    /// What the server said last when it did not allocate.
    refusal: Option<(u16, String)>,
    /// Addresses that permission was asked for, and how often.
    peers: Vec<(IpAddr, u32)>,
    /// The peer that a channel was asked for last.
    channel: Option<SocketAddr>,
    over: bool,
    deadline: Option<Instant>,
}

#[derive(Debug)]
pub(super) enum RelayEvent {
    Allocated(SocketAddr),
    /// There is no allocation, or none any more. Nothing follows.
    Failed {
        relayed: Vec<SocketAddr>,
        code: u16,
        text: String,
    },
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Of the TURN protocol, or a peer's and delivered.
    Taken,
    Senseless,
}

impl Relay {
    /// Allocates through the socket or connection between `local` and `remote`.
    pub(super) fn new(now: Instant, server: Server, local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            client: client(&server, local, remote, true),
            server,
            local,
            remote,
            epoch: now,
            both: true,
            relayed: Vec::new(),
            give_up_at: now + ALLOCATE_LIMIT,
            asked: Vec::new(),
            refusal: None,
            peers: Vec::new(),
            channel: None,
            over: false,
            deadline: Some(now),
        }
    }

    pub(super) fn server(&self) -> &Server {
        &self.server
    }

    pub(super) fn local(&self) -> SocketAddr {
        self.local
    }

    pub(super) fn remote(&self) -> SocketAddr {
        self.remote
    }

    pub(super) fn relayed(&self) -> &[SocketAddr] {
        &self.relayed
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes a message of the server; what a peer sent is handed to `deliver(peer, relayed, bytes)`,
    /// with the address of ours that it sent it to.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        bytes: &[u8],
        deliver: impl FnOnce(SocketAddr, SocketAddr, &[u8]),
    ) -> Incoming {
        if self.relayed.is_empty() {
            self.note_refusal(now, bytes);
        }
        // What the client can't read of a stream, it keeps, and waits for the rest of it for ever.
        if matches!(self.client, Client::Tcp(_)) && !is_one_message(bytes) {
            return Incoming::Senseless;
        }
        let transmit = Transmit::new(bytes, self.client.transport(), self.remote, self.local);
        let now = self.time(now);
        let incoming = match self.client.recv(transmit, now) {
            TurnRecvRet::PeerData(data) => {
                let alike = |own: &&SocketAddr| own.is_ipv4() == data.peer.is_ipv4();
                if let Some(own) = self.relayed.iter().find(alike) {
                    deliver(data.peer, *own, data.data());
                }
                return Incoming::Taken;
            }
            TurnRecvRet::Handled | TurnRecvRet::PeerIcmp { .. } => Incoming::Taken,
            TurnRecvRet::Ignored(_) => Incoming::Senseless,
        };
        // What follows from it is due.
        self.deadline = Some(now.to_std(self.epoch));
        incoming
    }

    /// Wraps a datagram for a peer in `out`. False while there is no way to it; the first one asks
    /// for it.
    pub(super) fn wrap(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> bool {
        let time = self.time(now);
        match self.client.send_to(TransportType::Udp, peer, bytes, time) {
            Ok(Some(transmit)) => {
                out.resize(transmit.data.len(), 0);
                transmit.write_into(out);
                // More than connectivity checks goes this way.
                let bindable = match self.channel {
                    None => true,
                    // The client gives the same numbers to channels of the other family.
                    Some(known) => known != peer && known.is_ipv4() == peer.is_ipv4(),
                };
                if bindable && bytes.first().is_some_and(|first| *first > 3) {
                    self.channel = Some(peer);
                    self.bind_channel(now, peer);
                }
                true
            }
            Err(SendError::NoPermission) => {
                self.ask_for(now, peer.ip());
                false
            }
            Ok(None) | Err(_) => false,
        }
    }

    /// Gives the allocation back; the client is to be polled until it is over.
    pub(super) fn release(&mut self, now: Instant) {
        let time = self.time(now);
        if self.client.delete(time).is_err() {
            self.over = true;
        }
        self.deadline = Some(now);
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Sends what is due and says what happened; call again until nothing did.
    pub(super) fn poll(&mut self, now: Instant, mut send: impl FnMut(&[u8])) -> Option<RelayEvent> {
        if self.over || self.deadline.is_none_or(|at| now < at) {
            return None;
        }
        let time = self.time(now);
        while let Some(event) = self.client.poll_event() {
            match event {
                TurnEvent::AllocationCreated(_, relayed) => {
                    self.relayed.push(relayed);
                    self.refusal = None;
                    return Some(RelayEvent::Allocated(relayed));
                }
                // The client closes when there is none of the other family either.
                TurnEvent::AllocationCreateFailed(family) => {
                    log::debug!("{:?}: no allocation of {family}", self.server);
                }
                TurnEvent::PermissionCreated(_, ip) => self.peers.retain(|(known, _)| *known != ip),
                TurnEvent::PermissionCreateFailed(_, ip) => {
                    log::debug!("{:?}: no permission for {ip}", self.server);
                }
                // Without a channel, only longer messages.
                TurnEvent::ChannelCreateFailed(_, peer) => {
                    log::debug!("{:?}: no channel for {peer}", self.server);
                }
                _ => {}
            }
        }
        if self.relayed.is_empty() && now >= self.give_up_at {
            return self.fail(now);
        }
        let wait = self.client.poll(time);
        while let Some(transmit) = self.client.poll_transmit(time) {
            if self.relayed.is_empty() {
                self.note_request(&transmit.data);
            }
            send(&transmit.data);
        }
        let at = match wait {
            TurnPollRet::WaitUntil(at) => at.to_std(self.epoch),
            TurnPollRet::Closed => return self.fail(now),
            TurnPollRet::AllocateTcpSocket { .. } | TurnPollRet::TcpClose { .. } => now,
        };
        let at = at.max(now + MIN_WAIT);
        self.deadline = Some(match self.relayed.is_empty() {
            true => at.min(self.give_up_at),
            false => at,
        });
        None
    }

    fn fail(&mut self, now: Instant) -> Option<RelayEvent> {
        // A server that has no IPv6 is to give what it has, but not all read that standard.
        let refused = |(code, _): &(u16, String)| *code != ErrorCode::UNAUTHORIZED;
        if self.both && self.relayed.is_empty() && self.refusal.as_ref().is_some_and(refused) {
            self.both = false;
            self.client = client(&self.server, self.local, self.remote, false);
            self.asked.clear();
            self.give_up_at = now + ALLOCATE_LIMIT;
            self.deadline = Some(now);
            return None;
        }
        self.over = true;
        self.deadline = None;
        let relayed = std::mem::take(&mut self.relayed);
        let (code, text) = match (self.refusal.take(), relayed.is_empty()) {
            (Some(refusal), _) => refusal,
            (None, true) => (UNREACHABLE, "the TURN server does not answer".to_owned()),
            (None, false) => (UNREACHABLE, "the TURN allocation was lost".to_owned()),
        };
        Some(RelayEvent::Failed {
            relayed,
            code,
            text,
        })
    }

    fn ask_for(&mut self, now: Instant, ip: IpAddr) {
        let at = match self.peers.iter().position(|(known, _)| *known == ip) {
            Some(at) => at,
            None if self.peers.len() >= MAX_PEERS => return,
            None => {
                self.peers.push((ip, 0));
                self.peers.len() - 1
            }
        };
        let time = self.time(now);
        if self.peers[at].1 >= MAX_ASKED {
            return;
        }
        // An error if it is under way.
        if self
            .client
            .create_permission(TransportType::Udp, ip, time)
            .is_ok()
        {
            self.peers[at].1 += 1;
            self.deadline = Some(now);
        }
    }

    /// A channel (RFC 8656, 12) costs 4 bytes a datagram instead of 36.
    fn bind_channel(&mut self, now: Instant, peer: SocketAddr) {
        let time = self.time(now);
        match self.client.bind_channel(TransportType::Udp, peer, time) {
            Ok(()) => self.deadline = Some(now),
            Err(err) => log::debug!("{:?}: no channel for {peer}: {err}", self.server),
        }
    }

    /// The client does not say why an allocation failed, and waits for an answer that is signed.
    /// To wrong credentials there is none.
    fn note_refusal(&mut self, now: Instant, bytes: &[u8]) {
        let Ok(message) = Message::from_bytes(bytes) else {
            return;
        };
        let id = message.transaction_id();
        let Some(nth) = self.asked.iter().position(|asked| *asked == id) else {
            return;
        };
        if message.has_class(MessageClass::Error)
            && let Ok(error) = message.attribute::<ErrorCode>()
        {
            let code = error.code();
            let usual =
                (nth == 0 && code == ErrorCode::UNAUTHORIZED) || code == ErrorCode::STALE_NONCE;
            self.refusal = Some((code, error.reason().to_owned()));
            if !usual {
                self.give_up_at = now;
            }
        }
    }

    fn note_request(&mut self, bytes: &[u8]) {
        if let Ok(message) = Message::from_bytes(bytes) {
            let id = message.transaction_id();
            if !self.asked.contains(&id) {
                self.asked.push(id);
            }
        }
    }

    fn time(&self, now: Instant) -> TurnInstant {
        let nanos = now.saturating_duration_since(self.epoch).as_nanos();
        TurnInstant::from_nanos(i64::try_from(nanos).unwrap_or(i64::MAX))
    }
}

fn client(server: &Server, local: SocketAddr, remote: SocketAddr, both: bool) -> Client {
    let credentials = TurnCredentials::new(&server.username, &server.password);
    let mut config = TurnConfig::new(credentials);
    if both {
        config.add_address_family(AddressFamily::IPV6);
    }
    match server.target.transport {
        Transport::Udp => Client::Udp(TurnClientUdp::allocate(local, remote, config)),
        Transport::Tcp | Transport::Tls => {
            Client::Tcp(TurnClientTcp::allocate(local, remote, config))
        }
    }
}

fn is_one_message(bytes: &[u8]) -> bool {
    let len = match MessageHeader::from_bytes(bytes) {
        Ok(header) => MessageHeader::LENGTH + usize::from(header.data_length()),
        Err(_) => match ChannelData::parse(bytes) {
            Ok(channel) => 4 + channel.data().len(),
            Err(_) => return false,
        },
    };
    len == bytes.len()
}

#[cfg(test)]
mod tests {
    use turn_client_proto::types::{
        attribute::AdditionalAddressFamily,
        stun::{message::MessageWriteVec, prelude::*},
    };
    use turn_server_proto::{
        api::{SocketAllocateError, TurnServerApi, TurnServerPollRet},
        server::TurnServer,
    };

    use super::{super::servers::Target, *};

    const LIMIT: Duration = Duration::from_secs(60);

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A relay and the server of other authors, in a time of their own.
    struct World {
        relay: Relay,
        server: TurnServer,
        start: Instant,
        now: Instant,
        events: Vec<RelayEvent>,
        allocations: usize,
        /// What the server sent to peers.
        sent: Vec<Vec<u8>>,
        /// The server does not hear.
        deaf: bool,
        /// The server has addresses of IPv6.
        v6: bool,
        /// The server refuses whoever asks for them.
        strict: bool,
        requests: usize,
    }

    impl World {
        fn new(password: &str) -> Self {
            Self::over(password, Transport::Udp)
        }

        fn over(password: &str, transport: Transport) -> Self {
            let (local, remote) = (addr("10.0.0.1:1000"), addr("10.0.0.2:3478"));
            let server = Server {
                url: "turn:10.0.0.2".to_owned(),
                target: Target {
                    relay: true,
                    transport,
                    host: "10.0.0.2".to_owned(),
                    port: 3478,
                },
                username: "user".to_owned(),
                password: password.to_owned(),
            };
            let start = Instant::now();
            let mut turn = TurnServer::new(TransportType::Udp, remote, "realm".to_owned());
            turn.add_user("user".to_owned(), "right".to_owned());
            // The shortest there is.
            turn.set_nonce_expiry_duration(Duration::from_secs(30));
            Self {
                relay: Relay::new(start, server, local, remote),
                server: turn,
                start,
                now: start,
                events: Vec::new(),
                allocations: 0,
                sent: Vec::new(),
                deaf: false,
                v6: false,
                strict: false,
                requests: 0,
            }
        }

        fn allocated() -> Self {
            Self::allocated_over(Transport::Udp)
        }

        fn allocated_over(transport: Transport) -> Self {
            let mut world = Self::over("right", transport);
            world.until(LIMIT, |world| !world.relay.relayed().is_empty());
            world
        }

        fn settle(&mut self) {
            let mut requests = Vec::new();
            while let Some(event) = self
                .relay
                .poll(self.now, |bytes| requests.push(bytes.to_vec()))
            {
                self.events.push(event);
            }
            self.requests += requests.len();
            let time = self.relay.time(self.now);
            let (local, remote) = (self.relay.local(), self.relay.remote());
            let mut answers = Vec::new();
            for request in requests {
                if self.deaf {
                    continue;
                }
                let message = Message::from_bytes(&request).unwrap();
                if self.strict && message.has_attribute(AdditionalAddressFamily::TYPE) {
                    let mut refusal = Message::builder_error(&message, MessageWriteVec::new());
                    let code = ErrorCode::builder(440).build().unwrap();
                    refusal.add_attribute(&code).unwrap();
                    let refusal = refusal.finish();
                    answers.push(Transmit::new(refusal, TransportType::Udp, remote, local));
                    continue;
                }
                let transmit = Transmit::new(request, TransportType::Udp, local, remote);
                if let Some(answer) = self.server.recv(transmit, time) {
                    answers.push(answer.build());
                }
            }
            loop {
                match self.server.poll(time) {
                    TurnServerPollRet::AllocateSocket {
                        transport,
                        listen_addr,
                        client_addr,
                        allocation_transport,
                        family,
                    } => {
                        let given = match family {
                            AddressFamily::IPV4 => Ok(addr("10.0.0.2:5000")),
                            AddressFamily::IPV6 if self.v6 => Ok(addr("[fd00::2]:5000")),
                            AddressFamily::IPV6 => {
                                Err(SocketAllocateError::AddressFamilyNotSupported)
                            }
                        };
                        self.allocations += usize::from(given.is_ok());
                        self.server.allocated_socket(
                            transport,
                            listen_addr,
                            client_addr,
                            allocation_transport,
                            family,
                            given,
                            time,
                        );
                    }
                    TurnServerPollRet::SocketClose { .. } => self.allocations -= 1,
                    _ => break,
                }
            }
            while let Some(answer) = self.server.poll_transmit(time) {
                answers.push(answer);
            }
            for answer in answers {
                if answer.to == local {
                    self.relay.receive(self.now, &answer.data, |_, _, _| {});
                } else {
                    self.sent.push(answer.data);
                }
            }
        }

        fn advance(&mut self) {
            let next = self.relay.deadline().unwrap_or(self.now);
            self.now = next.max(self.now + Duration::from_millis(1));
        }

        fn until(&mut self, limit: Duration, done: impl Fn(&World) -> bool) {
            let end = self.now + limit;
            loop {
                self.settle();
                if done(self) {
                    return;
                }
                assert!(self.now < end, "not in {limit:?}");
                self.advance();
            }
        }

        fn pass(&mut self, time: Duration) {
            let end = self.now + time;
            self.settle();
            while self.relay.deadline().is_some_and(|at| at < end) {
                self.advance();
                self.settle();
            }
            self.now = end;
        }

        fn send(&mut self, peer: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
            let mut out = Vec::new();
            let wrapped = self.relay.wrap(self.now, peer, bytes, &mut out);
            wrapped.then_some(out)
        }

        /// Who is heard, and where, when a peer sends something to an address of ours.
        fn hear(&mut self, peer: SocketAddr, own: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
            let transmit = Transmit::new(vec![0x80; 50], TransportType::Udp, peer, own);
            let time = self.relay.time(self.now);
            let wrapped = self.server.recv(transmit, time).unwrap().build().data;
            let mut heard = None;
            self.relay
                .receive(self.now, &wrapped, |source, own, bytes| {
                    assert_eq!(bytes, [0x80; 50]);
                    heard = Some((source, own));
                });
            heard
        }
    }

    #[test]
    fn an_allocation_with_permission_and_channel_is_kept_and_given_back() {
        let mut world = World::allocated();
        assert_eq!(world.allocations, 1);
        let peer = addr("10.0.0.3:4000");
        assert_eq!(world.send(peer, &[0; 20]), None);
        world.pass(Duration::from_secs(1));
        let indication = world.send(peer, &[0x80; 100]).unwrap();
        world.pass(Duration::from_secs(1));
        let channel = world.send(peer, &[0x80; 100]).unwrap();
        assert!(indication.len() > 130);
        assert_eq!(channel.len(), 104);

        // Nonces go stale all the time.
        world.pass(Duration::from_secs(2 * 3600));
        assert!(world.events.len() == 1, "{:?}", world.events);
        assert_eq!(world.allocations, 1);
        assert_eq!(world.send(peer, &[0x80; 100]).unwrap().len(), 104);
        // About one a minute at most: refreshes, permissions, channels, with their nonces.
        assert!(world.requests < 150, "{} requests", world.requests);

        world.relay.release(world.now);
        world.until(LIMIT, |world| world.relay.is_over());
        assert_eq!(world.allocations, 0);
    }

    #[test]
    fn a_server_with_both_families_gives_an_address_of_each() {
        let mut world = World::new("right");
        world.v6 = true;
        world.until(LIMIT, |world| world.relay.relayed().len() == 2);
        assert_eq!(world.allocations, 2);
        // Only what is of one family gets a channel.
        let peers = ["10.0.0.3:4000", "[fd00::3]:4000"].map(addr);
        for (peer, wrapped) in peers.into_iter().zip([104, 148]) {
            assert_eq!(world.send(peer, &[0; 20]), None);
            world.pass(Duration::from_secs(1));
            world.send(peer, &[0x80; 100]).unwrap();
            world.pass(Duration::from_secs(1));
            assert_eq!(world.send(peer, &[0x80; 100]).unwrap().len(), wrapped);
        }
        for peer in peers {
            let mut own = world.relay.relayed().iter();
            let own = *own.find(|own| own.is_ipv4() == peer.is_ipv4()).unwrap();
            assert_eq!(world.hear(peer, own), Some((peer, own)));
        }
        world.pass(Duration::from_secs(2 * 3600));
        assert_eq!((world.events.len(), world.allocations), (2, 2));
        world.relay.release(world.now);
        world.until(LIMIT, |world| world.relay.is_over());
        assert_eq!(world.allocations, 0);
    }

    #[test]
    fn a_server_that_refuses_the_other_family_gives_what_it_has() {
        let mut world = World::new("right");
        world.strict = true;
        world.until(LIMIT, |world| !world.relay.relayed().is_empty());
        assert_eq!(world.relay.relayed(), [addr("10.0.0.2:5000")]);
        assert!(world.now < world.start + Duration::from_secs(3));
    }

    #[test]
    fn wrong_credentials_are_told_with_the_code_of_the_server() {
        let mut world = World::new("wrong");
        world.until(LIMIT, |world| world.relay.is_over());
        assert!(matches!(
            &world.events[..],
            [RelayEvent::Failed { code: 401, .. }]
        ));
        assert!(world.now < world.start + Duration::from_secs(3));
    }

    #[test]
    fn a_server_that_does_not_answer_is_given_up_after_10_s() {
        let mut world = World::new("right");
        world.deaf = true;
        world.until(LIMIT, |world| world.relay.is_over());
        assert!(matches!(
            &world.events[..],
            [RelayEvent::Failed {
                code: UNREACHABLE,
                ..
            }]
        ));
        let took = world.now - world.start;
        assert!(took < Duration::from_secs(11), "{took:?}");
        assert_eq!(world.relay.deadline(), None);
    }

    #[test]
    fn an_allocation_that_can_t_be_refreshed_is_lost() {
        let mut world = World::allocated();
        let relayed = world.relay.relayed().to_vec();
        world.deaf = true;
        world.until(Duration::from_secs(3600), |world| world.relay.is_over());
        assert!(matches!(
            &world.events[..],
            [_, RelayEvent::Failed { relayed: gone, code: UNREACHABLE, .. }] if *gone == relayed
        ));
    }

    #[test]
    fn damaged_answers_never_panic_and_change_nothing_for_ever() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let mut world = World::allocated_over(transport);
            let peer = addr("10.0.0.3:4000");
            world.send(peer, &[0; 20]);
            world.pass(Duration::from_secs(1));
            let mut sample = world.send(peer, &[0x80; 100]).unwrap();
            world.pass(Duration::from_secs(1));
            let mut state = 1u64;
            for round in 0..20_000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) as usize % sample.len();
                let before = sample[at];
                sample[at] = (state >> 24) as u8;
                let end = if round % 3 == 0 { at } else { sample.len() };
                world.relay.receive(world.now, &sample[..end], |_, _, _| {});
                if round % 2 == 0 {
                    sample[at] = before;
                }
            }
            world.pass(Duration::from_secs(5));
            assert!(!world.relay.is_over());
            // What comes from the peer still gets through.
            let own = world.relay.relayed()[0];
            assert_eq!(world.hear(peer, own), Some((peer, own)), "{transport:?}");
        }
    }
}
