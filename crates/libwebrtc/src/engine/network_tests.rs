//! Peer connections over real sockets on the loopback interface, with what stands between peers in
//! the field: TCP, NAT, relays, bad lines. Which way there is, is decided by the candidates that the
//! tests pass on.
#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use str0m::net::Protocol;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt;
use turn_server_proto::{
    api::{SocketAllocateError, Transmit, TurnServerApi, TurnServerPollRet},
    server::TurnServer,
    types::{
        AddressFamily, Instant as TurnInstant, TransportType,
        stun::{
            attribute::{Username, XorMappedAddress},
            message::{Message, MessageWriteVec},
            prelude::*,
        },
    },
};

use super::{
    Peer,
    framing::{Framing, Inbound},
    link::trusting,
    network::Network,
};
use crate::{
    audio_source::{AudioSourceOptions, native::NativeAudioSource},
    audio_track::RtcAudioTrack,
    data_channel::{DataChannel, DataChannelInit},
    encoded_audio::EncodedAudioStream,
    ice_candidate::IceCandidate,
    media_stream_track::MediaStreamTrack,
    peer_connection::{
        AnswerOptions, IceCandidateError, OfferOptions, PeerConnection, PeerConnectionState,
        TrackEvent,
    },
    peer_connection_factory::{IceServer, IceTransportsType, RtcConfiguration},
    session_description::SessionDescription,
    stats::RtcStats,
};

/// Generous: a test that gets here has failed.
const LIMIT: Duration = Duration::from_secs(60);
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct End {
    pc: PeerConnection,
    peer: Arc<Peer>,
    candidates: UnboundedReceiver<IceCandidate>,
    errors: UnboundedReceiver<IceCandidateError>,
    states: UnboundedReceiver<PeerConnectionState>,
    channels: UnboundedReceiver<DataChannel>,
    tracks: UnboundedReceiver<TrackEvent>,
}

impl End {
    fn new() -> Self {
        Self::with(RtcConfiguration::default(), None)
    }

    fn with(config: RtcConfiguration, tls: Option<Arc<ClientConfig>>) -> Self {
        let peer = Peer::start_on(Network::new(&config, tls), &config).unwrap();
        let pc = PeerConnection::new(peer.clone());
        let (candidate, candidates) = mpsc::unbounded_channel();
        let (error, errors) = mpsc::unbounded_channel();
        let (state, states) = mpsc::unbounded_channel();
        let (channel, channels) = mpsc::unbounded_channel();
        let (track, tracks) = mpsc::unbounded_channel();
        pc.on_ice_candidate(Some(Box::new(move |new| _ = candidate.send(new))));
        pc.on_ice_candidate_error(Some(Box::new(move |new| _ = error.send(new))));
        pc.on_connection_state_change(Some(Box::new(move |new| _ = state.send(new))));
        pc.on_data_channel(Some(Box::new(move |new| _ = channel.send(new))));
        pc.on_track(Some(Box::new(move |new| _ = track.send(new))));
        Self {
            pc,
            peer,
            candidates,
            errors,
            states,
            channels,
            tracks,
        }
    }

    async fn reaches(&mut self, state: PeerConnectionState) {
        while next(&mut self.states).await != state {}
    }

    async fn add(&self, line: &str) {
        let candidate = IceCandidate::parse("", 0, line).unwrap();
        self.pc.add_ice_candidate(candidate).await.unwrap();
    }

    /// The next own candidate with this in its line.
    async fn candidate(&mut self, with: &str) -> IceCandidate {
        loop {
            let candidate = next(&mut self.candidates).await;
            if candidate.candidate().contains(with) {
                return candidate;
            }
        }
    }

    fn whole_path(&self) -> Option<(Protocol, SocketAddr, SocketAddr)> {
        self.peer.session().path()
    }

    /// Protocol and remote address of what is sent.
    fn path(&self) -> (Protocol, SocketAddr) {
        let (protocol, _, remote) = self.whole_path().unwrap();
        (protocol, remote)
    }
}

async fn next<T>(queue: &mut UnboundedReceiver<T>) -> T {
    timeout(LIMIT, queue.recv())
        .await
        .expect("in time")
        .expect("not ended")
}

/// Without the candidates in the texts.
async fn negotiate(a: &End, b: &End, options: OfferOptions) {
    let bare = |description: &SessionDescription| {
        let lines = description.as_str().lines();
        let kept: Vec<&str> = lines
            .filter(|line| !line.starts_with("a=candidate"))
            .collect();
        SessionDescription::new(&(kept.join("\r\n") + "\r\n"), description.sdp_type())
    };
    let offer = a.pc.create_offer(options).await.unwrap();
    a.pc.set_local_description(offer.clone()).await.unwrap();
    b.pc.set_remote_description(bare(&offer)).await.unwrap();
    let answer = b.pc.create_answer(AnswerOptions::default()).await.unwrap();
    b.pc.set_local_description(answer.clone()).await.unwrap();
    a.pc.set_remote_description(bare(&answer)).await.unwrap();
}

/// Both say something on a data channel that `a` opened and `b` got.
async fn talk(mine: &DataChannel, b: &mut End) {
    let theirs = next(&mut b.channels).await;
    for (from, to) in [(mine, &theirs), (&theirs, mine)] {
        let (heard, mut messages) = mpsc::unbounded_channel();
        to.on_message(Some(Box::new(move |message| {
            _ = heard.send(message.data.to_vec());
        })));
        // Longer than a datagram.
        let message = vec![7; 20_000];
        timeout(LIMIT, async {
            while from.send(&message, true).is_err() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(next(&mut messages).await, message);
    }
}

fn channel(end: &End) -> DataChannel {
    end.pc
        .create_data_channel("talk", DataChannelInit::default())
        .unwrap()
}

fn host(addr: SocketAddr) -> String {
    format!(
        "candidate:1 1 udp 2130706431 {} {} typ host",
        addr.ip(),
        addr.port()
    )
}

fn passive(addr: SocketAddr) -> String {
    format!(
        "candidate:2 1 tcp 1518280447 {} {} typ host tcptype passive",
        addr.ip(),
        addr.port()
    )
}

/// An address where nobody answers; keeps the socket.
async fn black_hole(ip: IpAddr) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((ip, 0)).await.unwrap();
    let addr = socket.local_addr().unwrap();
    (socket, addr)
}

/// Makes `end` open a socket on this loopback address, and says which.
async fn local_on(end: &mut End, ip: IpAddr) -> SocketAddr {
    let (_, nobody) = black_hole(ip).await;
    end.add(&host(nobody)).await;
    let line = end.candidate(&format!(" {ip} ")).await.candidate();
    let mut words = line.split(' ').skip(4);
    let ip: IpAddr = words.next().unwrap().parse().unwrap();
    SocketAddr::new(ip, words.next().unwrap().parse().unwrap())
}

/// A passive end for ICE over TCP before the UDP address of a peer. Whatever it does ends when it
/// is dropped.
struct PassiveEnd {
    addr: SocketAddr,
    accepted: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl PassiveEnd {
    async fn before(peer: SocketAddr) -> Self {
        let listener = TcpListener::bind((peer.ip(), 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let count = accepted.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let socket = UdpSocket::bind((peer.ip(), 0)).await.unwrap();
                socket.connect(peer).await.unwrap();
                connections.spawn(bridge(stream, socket));
            }
        });
        Self {
            addr,
            accepted,
            _tasks: tasks,
        }
    }
}

async fn bridge(stream: impl AsyncRead + AsyncWrite, socket: UdpSocket) {
    let (mut read, mut write) = tokio::io::split(stream);
    let inward = async {
        let mut inbound = Inbound::new(Framing::Datagrams);
        let mut user = None;
        loop {
            match read.read(inbound.space()).await {
                Ok(0) | Err(_) => return,
                Ok(len) => inbound.fill(len),
            }
            while let Some(message) = inbound.next().unwrap() {
                // As servers do: a connection belongs to the credentials that came first.
                if let Some(name) = stun_user(message)
                    && *user.get_or_insert_with(|| name.clone()) != name
                {
                    continue;
                }
                let _ = socket.send(message).await;
            }
        }
    };
    let outward = async {
        let (mut buffer, mut framed) = (vec![0; 4096], Vec::new());
        loop {
            // An ICMP answer at most.
            let Ok(len) = socket.recv(&mut buffer).await else {
                continue;
            };
            framed.clear();
            Framing::Datagrams.append(&buffer[..len], &mut framed);
            if write.write_all(&framed).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = inward => {}, () = outward => {} }
}

fn stun_user(message: &[u8]) -> Option<String> {
    let message = Message::from_bytes(message).ok()?;
    let name = message.attribute::<Username>().ok()?;
    Some(name.username().to_owned())
}

#[tokio::test]
async fn a_peer_with_tcp_only_is_connected_to_at_once_and_its_end_is_noticed() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine = channel(&a);
    negotiate(&a, &b, OfferOptions::default()).await;
    let passive_end = PassiveEnd::before(local_on(&mut b, LOCALHOST).await).await;
    a.add(&passive(passive_end.addr)).await;
    a.add(&passive(passive_end.addr)).await;
    a.reaches(PeerConnectionState::Connected).await;
    assert_eq!(a.path(), (Protocol::Tcp, passive_end.addr));
    talk(&mine, &mut b).await;
    assert_eq!(passive_end.accepted.load(Ordering::Relaxed), 1);
    // Of no use to the remote side: nobody listens there.
    while let Ok(candidate) = a.candidates.try_recv() {
        assert!(!candidate.candidate().contains(" tcp "), "{candidate}");
    }

    drop(passive_end);
    a.reaches(PeerConnectionState::Disconnected).await;
}

#[tokio::test]
async fn tcp_is_taken_when_datagrams_get_lost() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine = channel(&a);
    negotiate(&a, &b, OfferOptions::default()).await;
    let passive_end = PassiveEnd::before(local_on(&mut b, LOCALHOST).await).await;
    let (_hole, nobody) = black_hole(LOCALHOST).await;
    a.add(&passive(passive_end.addr)).await;
    a.add(&host(nobody)).await;
    a.reaches(PeerConnectionState::Connected).await;
    assert_eq!(a.path(), (Protocol::Tcp, passive_end.addr));
    talk(&mine, &mut b).await;
}

#[tokio::test]
async fn no_connection_is_made_where_datagrams_pass() {
    let (mut a, mut b) = (End::new(), End::new());
    negotiate_with_channel(&a, &b).await;
    let at_b = local_on(&mut b, LOCALHOST).await;
    let passive_end = PassiveEnd::before(at_b).await;
    a.add(&passive(passive_end.addr)).await;
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    sleep(super::session::HEAD_START + Duration::from_millis(500)).await;
    assert_eq!(a.path(), (Protocol::Udp, at_b));
    assert_eq!(passive_end.accepted.load(Ordering::Relaxed), 0);
}

async fn negotiate_with_channel(a: &End, b: &End) -> DataChannel {
    let mine = channel(a);
    negotiate(a, b, OfferOptions::default()).await;
    mine
}

#[tokio::test]
async fn a_restart_of_ice_over_tcp_uses_a_connection_of_its_own() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    let passive_end = PassiveEnd::before(local_on(&mut b, LOCALHOST).await).await;
    a.add(&passive(passive_end.addr)).await;
    a.reaches(PeerConnectionState::Connected).await;
    let before = a.whole_path();
    let restart = OfferOptions {
        ice_restart: true,
        ..OfferOptions::default()
    };
    negotiate(&a, &b, restart).await;
    a.add(&passive(passive_end.addr)).await;
    timeout(LIMIT, async {
        while a.whole_path() == before || a.pc.connection_state() != PeerConnectionState::Connected
        {
            // Something has to be sent.
            let _ = mine.send(b"ping", true);
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("another connection in use");
    assert_eq!(passive_end.accepted.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_stream_of_noise_ends_its_connection_only() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    let at_b = local_on(&mut b, LOCALHOST).await;
    let listener = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
    a.add(&passive(listener.local_addr().unwrap())).await;
    let (mut stream, _) = timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let _ = stream.write_all(&[0xff; 100_000]).await;
    // Closed by us.
    let mut buffer = [0; 1024];
    timeout(LIMIT, async {
        while stream.read(&mut buffer).await.is_ok_and(|len| len > 0) {}
    })
    .await
    .expect("hung up");
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    talk(&mine, &mut b).await;
}

#[tokio::test]
async fn ipv6_alone_is_enough() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    let ip = Ipv6Addr::LOCALHOST.into();
    let at_b = local_on(&mut b, ip).await;
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    assert_eq!(a.path(), (Protocol::Udp, at_b));
    talk(&mine, &mut b).await;
}

fn servers(urls: &[&str], password: &str) -> RtcConfiguration {
    RtcConfiguration {
        ice_servers: vec![IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: "user".to_owned(),
            password: password.to_owned(),
        }],
        ..RtcConfiguration::default()
    }
}

#[tokio::test]
async fn a_stun_server_says_how_a_socket_looks() {
    let server = UdpSocket::bind((LOCALHOST, 0)).await.unwrap();
    let url = format!("stun:{}", server.local_addr().unwrap());
    let seen: SocketAddr = "203.0.113.5:4321".parse().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = [0; 1024];
        let mut asked = 0;
        loop {
            let (len, source) = server.recv_from(&mut buffer).await.unwrap();
            asked += 1;
            // The first is lost.
            if asked == 1 {
                continue;
            }
            let request = Message::from_bytes(&buffer[..len]).unwrap();
            let mut answer = Message::builder_success(&request, MessageWriteVec::new());
            let mapped = XorMappedAddress::new(seen, request.transaction_id());
            answer.add_attribute(&mapped).unwrap();
            server.send_to(&answer.finish(), source).await.unwrap();
        }
    });
    let mut config = servers(&[&url, "stuns:unusable"], "");
    config.ice_transport_type = IceTransportsType::NoHost;
    let (mut a, b) = (End::with(config, None), End::new());
    negotiate_with_channel(&a, &b).await;
    let line = next(&mut a.candidates).await.candidate();
    assert!(line.contains(" 203.0.113.5 4321 typ srflx"), "{line}");
    assert_eq!(next(&mut a.errors).await.url, "stuns:unusable");
}

/// A TURN server of other authors behind sockets of ours: UDP, TCP, TLS.
struct TurnEnd {
    udp: SocketAddr,
    tcp: SocketAddr,
    tls: SocketAddr,
    trust: Arc<ClientConfig>,
    /// Allocations that there are.
    allocations: Arc<AtomicUsize>,
    relayed: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

enum TurnInput {
    Opened(SocketAddr, UnboundedSender<Vec<u8>>),
    Client(SocketAddr, Vec<u8>),
    Peer {
        relay: SocketAddr,
        peer: SocketAddr,
        bytes: Vec<u8>,
    },
}

const PASSWORD: &str = "right";

impl TurnEnd {
    async fn new() -> Self {
        Self::with_families(&[AddressFamily::IPV4]).await
    }

    /// That it has addresses of.
    async fn with_families(families: &'static [AddressFamily]) -> Self {
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = CertificateDer::from(certified.cert.der().to_vec());
        let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));

        let udp_socket = Arc::new(UdpSocket::bind((LOCALHOST, 0)).await.unwrap());
        let tcp_listener = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
        let tls_listener = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
        let (udp, tcp, tls) = (
            udp_socket.local_addr().unwrap(),
            tcp_listener.local_addr().unwrap(),
            tls_listener.local_addr().unwrap(),
        );
        let (input, inputs) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let (socket, to) = (udp_socket.clone(), input.clone());
        tasks.spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                if let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                    let _ = to.send(TurnInput::Client(from, buffer[..len].to_vec()));
                }
            }
        });
        let to = input.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, from)) = tcp_listener.accept().await {
                connections.spawn(turn_stream(stream, from, to.clone()));
            }
        });
        let to = input.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, from)) = tls_listener.accept().await {
                let (acceptor, to) = (acceptor.clone(), to.clone());
                connections.spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        turn_stream(stream, from, to).await;
                    }
                });
            }
        });
        let allocations = Arc::new(AtomicUsize::new(0));
        let relayed = Arc::new(AtomicU64::new(0));
        let server = TurnLoop {
            udp_socket,
            listen: udp,
            families,
            input,
            allocations: allocations.clone(),
            relayed: relayed.clone(),
        };
        tasks.spawn(server.run(inputs));
        Self {
            udp,
            tcp,
            tls,
            trust: trusting(roots).unwrap(),
            allocations,
            relayed,
            _tasks: tasks,
        }
    }

    async fn has_allocations(&self, count: usize) {
        timeout(LIMIT, async {
            while self.allocations.load(Ordering::Relaxed) != count {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("not {count} allocations"));
    }
}

async fn turn_stream(
    stream: impl AsyncRead + AsyncWrite,
    from: SocketAddr,
    to: UnboundedSender<TurnInput>,
) {
    let (mut read, mut write) = tokio::io::split(stream);
    let (answer, mut answers) = mpsc::unbounded_channel();
    let _ = to.send(TurnInput::Opened(from, answer));
    let inward = async {
        let mut inbound = Inbound::new(Framing::Turn);
        loop {
            match read.read(inbound.space()).await {
                Ok(0) | Err(_) => return,
                Ok(len) => inbound.fill(len),
            }
            while let Some(message) = inbound.next().unwrap() {
                let _ = to.send(TurnInput::Client(from, message.to_vec()));
            }
        }
    };
    let outward = async {
        while let Some(message) = answers.recv().await {
            let mut framed = Vec::new();
            Framing::Turn.append(&message, &mut framed);
            if write.write_all(&framed).await.is_err() || write.flush().await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = inward => {}, () = outward => {} }
}

struct TurnLoop {
    udp_socket: Arc<UdpSocket>,
    listen: SocketAddr,
    families: &'static [AddressFamily],
    input: UnboundedSender<TurnInput>,
    allocations: Arc<AtomicUsize>,
    relayed: Arc<AtomicU64>,
}

impl TurnLoop {
    async fn run(self, mut inputs: UnboundedReceiver<TurnInput>) {
        let epoch = Instant::now();
        let time = || TurnInstant::from_nanos(epoch.elapsed().as_nanos() as i64);
        let mut server = TurnServer::new(TransportType::Udp, self.listen, "test".to_owned());
        server.add_user("user".to_owned(), PASSWORD.to_owned());
        let mut streams = HashMap::new();
        let mut relays: HashMap<SocketAddr, (Arc<UdpSocket>, JoinSet<()>)> = HashMap::new();
        loop {
            let input = timeout(Duration::from_millis(20), inputs.recv()).await;
            let transmit = match input {
                Err(_) => None,
                Ok(None) => return,
                Ok(Some(TurnInput::Opened(from, answers))) => {
                    streams.insert(from, answers);
                    None
                }
                Ok(Some(TurnInput::Client(from, bytes))) => {
                    let transmit = Transmit::new(bytes, TransportType::Udp, from, self.listen);
                    server.recv(transmit, time()).map(|out| out.build())
                }
                Ok(Some(TurnInput::Peer { relay, peer, bytes })) => {
                    self.relayed.fetch_add(1, Ordering::Relaxed);
                    let transmit = Transmit::new(bytes, TransportType::Udp, peer, relay);
                    server.recv(transmit, time()).map(|out| out.build())
                }
            };
            let mut transmits: Vec<_> = transmit.into_iter().collect();
            loop {
                match server.poll(time()) {
                    TurnServerPollRet::AllocateSocket {
                        transport,
                        listen_addr,
                        client_addr,
                        allocation_transport,
                        family,
                    } => {
                        let given = if self.families.contains(&family) {
                            let ip = match family {
                                AddressFamily::IPV4 => LOCALHOST,
                                AddressFamily::IPV6 => Ipv6Addr::LOCALHOST.into(),
                            };
                            let socket = Arc::new(UdpSocket::bind((ip, 0)).await.unwrap());
                            let relay = socket.local_addr().unwrap();
                            let mut tasks = JoinSet::new();
                            let (reader, to) = (socket.clone(), self.input.clone());
                            tasks.spawn(async move {
                                let mut buffer = vec![0; 4096];
                                loop {
                                    if let Ok((len, peer)) = reader.recv_from(&mut buffer).await {
                                        let bytes = buffer[..len].to_vec();
                                        let _ = to.send(TurnInput::Peer { relay, peer, bytes });
                                    }
                                }
                            });
                            relays.insert(relay, (socket, tasks));
                            Ok(relay)
                        } else {
                            Err(SocketAllocateError::AddressFamilyNotSupported)
                        };
                        server.allocated_socket(
                            transport,
                            listen_addr,
                            client_addr,
                            allocation_transport,
                            family,
                            given,
                            time(),
                        );
                    }
                    TurnServerPollRet::SocketClose { listen_addr, .. } => {
                        relays.remove(&listen_addr);
                    }
                    _ => break,
                }
            }
            while let Some(transmit) = server.poll_transmit(time()) {
                transmits.push(transmit);
            }
            for transmit in transmits {
                if transmit.from != self.listen {
                    if let Some((socket, _)) = relays.get(&transmit.from) {
                        let _ = socket.send_to(&transmit.data, transmit.to).await;
                    }
                } else if let Some(stream) = streams.get(&transmit.to) {
                    let _ = stream.send(transmit.data);
                } else {
                    let _ = self.udp_socket.send_to(&transmit.data, transmit.to).await;
                }
            }
            self.allocations.store(relays.len(), Ordering::Relaxed);
        }
    }
}

async fn through_a_relay(url: impl Fn(&TurnEnd) -> String) {
    let turn = TurnEnd::new().await;
    let config = |password| RtcConfiguration {
        ice_transport_type: IceTransportsType::Relay,
        ..servers(&[&url(&turn)], password)
    };
    let trust = Some(turn.trust.clone());
    let (mut a, mut b) = (End::with(config(PASSWORD), trust), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    let at_b = local_on(&mut b, LOCALHOST).await;
    let line = next(&mut a.candidates).await.candidate();
    assert!(line.contains(" typ relay "), "{line}");
    assert!(!line.contains("192."), "{line}");
    b.add(&line).await;
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    talk(&mine, &mut b).await;
    let relayed = turn.relayed.load(Ordering::Relaxed);
    assert!(relayed > 20, "{relayed} datagrams through the relay");
    // As at every resumption: other credentials, here even wrong ones.
    a.pc.set_configuration(config("other")).unwrap();
    talk(&channel(&a), &mut b).await;
    assert!(a.errors.try_recv().is_err());
    turn.has_allocations(1).await;
    assert!(a.candidates.try_recv().is_err(), "one candidate only");
    a.pc.close();
    turn.has_allocations(0).await;
}

#[tokio::test]
async fn a_relay_reached_by_udp() {
    through_a_relay(|turn| format!("turn:{}", turn.udp)).await;
}

#[tokio::test]
async fn a_relay_reached_by_tcp() {
    through_a_relay(|turn| format!("turn:{}?transport=tcp", turn.tcp)).await;
}

#[tokio::test]
async fn a_relay_reached_by_tls() {
    through_a_relay(|turn| format!("turns:localhost:{}", turn.tls.port())).await;
}

#[tokio::test]
async fn a_relay_leads_to_a_peer_of_the_other_family() {
    let turn = TurnEnd::with_families(&[AddressFamily::IPV4, AddressFamily::IPV6]).await;
    let mut config = servers(&[&format!("turn:{}", turn.udp)], PASSWORD);
    config.ice_transport_type = IceTransportsType::Relay;
    let (mut a, mut b) = (End::with(config, None), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    let at_b = local_on(&mut b, Ipv6Addr::LOCALHOST.into()).await;
    let relayed = a.candidate(" ::1 ").await.candidate();
    assert!(relayed.contains(" typ relay "), "{relayed}");
    b.add(&relayed).await;
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    talk(&mine, &mut b).await;
    turn.has_allocations(2).await;
    a.pc.close();
    turn.has_allocations(0).await;
}

/// By hand, against a server of the world: `TURN_URLS` (separated by commas), user `user`, password
/// `right`, peers on loopback allowed. With nonces that go stale within 3 s, that is tried too.
#[tokio::test]
#[ignore = "needs a TURN server"]
async fn relays_of_a_foreign_server() {
    let urls = std::env::var("TURN_URLS").expect("TURN_URLS");
    for url in urls.split(',') {
        for password in ["wrong", PASSWORD] {
            let mut config = servers(&[url], password);
            config.ice_transport_type = IceTransportsType::Relay;
            let (mut a, mut b) = (End::with(config, None), End::new());
            let mine = negotiate_with_channel(&a, &b).await;
            if password != PASSWORD {
                let error = next(&mut a.errors).await;
                println!("{url}: {} {}", error.error_code, error.error_text);
                assert_eq!((error.error_code, error.url.as_str()), (401, url));
                continue;
            }
            let at_b = local_on(&mut b, LOCALHOST).await;
            let start = Instant::now();
            let line = next(&mut a.candidates).await.candidate();
            println!("{url}: {line} after {:?}", start.elapsed());
            sleep(Duration::from_secs(3)).await;
            let start = Instant::now();
            a.add(&host(at_b)).await;
            a.reaches(PeerConnectionState::Connected).await;
            println!("{url}: connected after {:?}", start.elapsed());
            talk(&mine, &mut b).await;
            sleep(Duration::from_secs(3)).await;
            a.pc.close();
            assert!(
                timeout(LIMIT, async {
                    while a.candidates.recv().await.is_some() {}
                })
                .await
                .is_ok()
            );
        }
    }
}

#[tokio::test]
async fn servers_that_give_no_relay_are_reported() {
    let turn = TurnEnd::new().await;
    let closed = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
    let refusing = closed.local_addr().unwrap();
    drop(closed);
    let urls = [
        format!("turn:{}", turn.udp),
        format!("turn:{}?transport=tcp", turn.tcp),
        format!("turn:{refusing}?transport=tcp"),
        // Not the name in the certificate.
        format!("turns:{}", turn.tls),
        "turn:name.invalid".to_owned(),
    ];
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let mut config = servers(&urls, "wrong");
    config.ice_transport_type = IceTransportsType::Relay;
    let (mut a, b) = (End::with(config, Some(turn.trust.clone())), End::new());
    negotiate_with_channel(&a, &b).await;
    let mut codes = HashMap::new();
    while codes.len() < urls.len() {
        let error = next(&mut a.errors).await;
        assert!(!error.error_text.is_empty());
        codes.insert(error.url, error.error_code);
    }
    let codes: Vec<i32> = urls.iter().map(|url| codes[*url]).collect();
    assert_eq!(codes, [401, 401, 701, 701, 701]);
    assert!(a.candidates.try_recv().is_err());
    assert_eq!(turn.allocations.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_configuration_that_comes_after_the_search_began_is_used() {
    let turn = TurnEnd::new().await;
    let (mut a, mut b) = (End::new(), End::new());
    let mine = negotiate_with_channel(&a, &b).await;
    a.candidate(" typ host").await;
    let mut config = servers(&[&format!("turn:{}", turn.udp)], PASSWORD);
    config.ice_transport_type = IceTransportsType::Relay;
    a.pc.set_configuration(config).unwrap();
    let at_b = local_on(&mut b, LOCALHOST).await;
    a.candidate(" typ relay ").await;
    a.add(&host(at_b)).await;
    a.reaches(PeerConnectionState::Connected).await;
    talk(&mine, &mut b).await;
    // Not sent from an own address.
    let (_, source, _) = a.whole_path().unwrap();
    assert!(turn.relayed.load(Ordering::Relaxed) > 20, "{source}");
}

/// A line between two peers that loses, delays, reorders and repeats datagrams.
struct Line {
    to_a: SocketAddr,
    to_b: SocketAddr,
    control: Arc<Control>,
    _tasks: JoinSet<()>,
}

/// What a line does to datagrams.
#[derive(Clone, Copy, Default)]
struct Bad {
    /// Of a thousand.
    loss: u64,
    repeats: u64,
    /// Milliseconds, at most.
    jitter: u64,
}

#[derive(Default)]
struct Control {
    bad: Mutex<Bad>,
    account: Mutex<Account>,
}

/// Of the RTP packets to B, by their numbers.
#[derive(Clone, Default)]
struct Account {
    dropped: Vec<u16>,
    /// As they were sent on, each time.
    passed: Vec<u16>,
}

impl Account {
    /// In the order in which they came through first.
    fn arrivals(&self) -> Vec<u16> {
        let mut known = HashSet::new();
        let passed = self.passed.iter().copied();
        passed.filter(|number| known.insert(*number)).collect()
    }
}

/// Those that a later one had overtaken.
fn late(arrivals: &[u16]) -> usize {
    let mut highest = arrivals[0];
    let is_late = |number: &&u16| {
        let late = (number.wrapping_sub(highest) as i16) < 0;
        highest = if late { highest } else { **number };
        late
    };
    arrivals.iter().filter(is_late).count()
}

/// A linear congruence, good enough for dice.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

impl Line {
    async fn new() -> Self {
        let at_a = Arc::new(UdpSocket::bind((LOCALHOST, 0)).await.unwrap());
        let at_b = Arc::new(UdpSocket::bind((LOCALHOST, 0)).await.unwrap());
        let control = Arc::new(Control::default());
        let peers: Arc<Mutex<[Option<SocketAddr>; 2]>> = Arc::default();
        let mut tasks = JoinSet::new();
        for side in 0..2 {
            let (from, to) = match side {
                0 => (at_a.clone(), at_b.clone()),
                _ => (at_b.clone(), at_a.clone()),
            };
            let (control, peers) = (control.clone(), peers.clone());
            tasks.spawn(async move {
                // Sound has its own, so that the same of it is lost in each run.
                let mut dice = [Dice(1), Dice(2)];
                let mut delayed = JoinSet::new();
                let mut buffer = vec![0; 4096];
                loop {
                    let Ok((len, source)) = from.recv_from(&mut buffer).await else {
                        continue;
                    };
                    while delayed.try_join_next().is_some() {}
                    if source.ip() != LOCALHOST {
                        continue;
                    }
                    peers.lock()[side] = Some(source);
                    let Some(destination) = peers.lock()[1 - side] else {
                        continue;
                    };
                    let packet = buffer[..len].to_vec();
                    let number = rtp_number(&packet).filter(|_| side == 0);
                    let dice = &mut dice[usize::from(number.is_some())];
                    let bad = *control.bad.lock();
                    if dice.below(1000) < bad.loss {
                        control.account.lock().dropped.extend(number);
                        continue;
                    }
                    let copies = 1 + usize::from(dice.below(1000) < bad.repeats);
                    for _ in 0..copies {
                        let wait = Duration::from_millis(dice.below(bad.jitter + 1));
                        let (to, packet, control) = (to.clone(), packet.clone(), control.clone());
                        let pass = async move {
                            control.account.lock().passed.extend(number);
                            let _ = to.send_to(&packet, destination).await;
                        };
                        if bad.jitter == 0 {
                            pass.await;
                            continue;
                        }
                        delayed.spawn(async move {
                            sleep(wait).await;
                            pass.await;
                        });
                    }
                }
            });
        }
        Self {
            to_a: at_b.local_addr().unwrap(),
            to_b: at_a.local_addr().unwrap(),
            control,
            _tasks: tasks,
        }
    }

    fn account(&self) -> Account {
        self.control.account.lock().clone()
    }

    /// Waits until so many RTP packets to B got through or were lost.
    async fn has_seen(&self, count: usize) {
        timeout(LIMIT, async {
            let seen = || {
                let account = self.account();
                account.arrivals().len() + account.dropped.len()
            };
            while seen() < count {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("not {count} packets"));
    }
}

/// Its number, if it is RTP (RFC 7983, RFC 5761).
fn rtp_number(packet: &[u8]) -> Option<u16> {
    let rtp = packet.len() >= 12 && packet[0] >> 6 == 2 && !(64..96).contains(&(packet[1] & 0x7f));
    rtp.then(|| u16::from_be_bytes([packet[2], packet[3]]))
}

/// Packets received and lost, as the report for one source has them.
async fn counts(end: &End) -> (u64, i64) {
    let report = end.pc.get_stats().await.unwrap();
    let inbound: Vec<_> = report
        .iter()
        .filter_map(|stats| match stats {
            RtcStats::InboundRtp(inbound) => Some(&inbound.received),
            _ => None,
        })
        .collect();
    let [received] = inbound[..] else {
        panic!("not one source: {report:#?}");
    };
    (received.packets_received, received.packets_lost)
}

/// Sends 50 packets a second over a line that is good, bad for `seconds`, and good again: the
/// connection stays, exactly what got through is heard, and what is counted as lost is what was.
/// Returns the line's account.
async fn over_a_bad_line(bad: Bad, seconds: usize) -> Account {
    const PACKET: Duration = Duration::from_millis(20);
    const GOOD: usize = 50;
    let (mut a, mut b) = (End::new(), End::new());
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 0);
    let track = RtcAudioTrack::new("sound".to_owned(), Some(source.clone()));
    a.pc.add_track(track.into(), &["stream"]).unwrap();
    let mine = negotiate_with_channel(&a, &b).await;
    let line = Line::new().await;
    a.add(&host(line.to_b)).await;
    b.add(&host(line.to_a)).await;
    a.reaches(PeerConnectionState::Connected).await;
    b.reaches(PeerConnectionState::Connected).await;
    let MediaStreamTrack::Audio(heard) = next(&mut b.tracks).await.track else {
        panic!("not audio");
    };
    let mut stream = EncodedAudioStream::new(&heard, 4096);

    let mut ticks = tokio::time::interval(PACKET);
    let mut sent = 0;
    for (bad, count) in [
        (Bad::default(), GOOD),
        (bad, seconds * 50),
        (Bad::default(), GOOD),
    ] {
        *line.control.bad.lock() = bad;
        for _ in 0..count {
            ticks.tick().await;
            source
                .capture_encoded(&[0xf8, sent as u8], PACKET, None)
                .unwrap();
            sent += 1;
        }
        line.has_seen(sent).await;
    }
    // Messages are repeated until they arrive.
    talk(&mine, &mut b).await;

    let account = line.account();
    let arrivals = account.arrivals();
    assert_eq!(arrivals.len() + account.dropped.len(), sent);
    let (mut numbers, mut missing) = (Vec::new(), 0);
    while numbers.len() < arrivals.len() {
        let frame = timeout(LIMIT, stream.next()).await;
        let frame = frame.expect("what got through").expect("not ended");
        numbers.push(frame.sequence as u16);
        missing += frame.missing as usize;
    }
    assert_eq!(numbers, arrivals);
    // Each was missed that is lost or came late.
    assert_eq!(missing, account.dropped.len() + late(&arrivals));
    let (received, lost) = counts(&b).await;
    assert_eq!(
        (received, lost),
        (arrivals.len() as u64, account.dropped.len() as i64)
    );
    assert_eq!(stream.dropped(), 0);
    // Long after the last repeat.
    let more = timeout(Duration::from_millis(500), stream.next()).await;
    assert!(more.is_err(), "heard twice: {more:?}");
    for end in [&mut a, &mut b] {
        assert_eq!(end.pc.connection_state(), PeerConnectionState::Connected);
        assert!(end.states.try_recv().is_err(), "another state on the way");
    }
    println!(
        "{sent} sent, {} lost, {} late, {} repeated; counted {received} received, {lost} lost, \
         {missing} missing",
        account.dropped.len(),
        late(&arrivals),
        account.passed.len() - arrivals.len(),
    );
    account
}

#[tokio::test]
async fn one_datagram_in_a_hundred_is_lost() {
    let bad = Bad {
        loss: 10,
        ..Bad::default()
    };
    let account = over_a_bad_line(bad, 6).await;
    assert!((1..10).contains(&account.dropped.len()));
}

#[tokio::test]
async fn one_datagram_in_twenty_is_lost_and_the_rest_jitters() {
    let bad = Bad {
        loss: 50,
        jitter: 40,
        ..Bad::default()
    };
    let account = over_a_bad_line(bad, 6).await;
    assert!((5..30).contains(&account.dropped.len()));
    assert!(late(&account.arrivals()) > 0);
}

#[tokio::test]
async fn one_datagram_in_five_is_lost() {
    let bad = Bad {
        loss: 200,
        ..Bad::default()
    };
    let account = over_a_bad_line(bad, 10).await;
    assert!((75..125).contains(&account.dropped.len()));
}

#[tokio::test]
async fn datagrams_are_reordered_and_repeated() {
    let bad = Bad {
        jitter: 100,
        repeats: 100,
        ..Bad::default()
    };
    let account = over_a_bad_line(bad, 6).await;
    let arrivals = account.arrivals();
    assert!(account.dropped.is_empty());
    assert!(late(&arrivals) > 50);
    assert!(account.passed.len() > arrivals.len() + 10);
}

#[tokio::test]
async fn nothing_passes_for_five_seconds() {
    let bad = Bad {
        loss: 1000,
        ..Bad::default()
    };
    let account = over_a_bad_line(bad, 5).await;
    assert_eq!(account.dropped.len(), 250);
}
