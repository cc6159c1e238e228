//! Any bytes on any of the room server's sockets: an error to the sender at most, never a panic, and
//! a server that serves the others as before. The bytes are the same in every run.

mod room_support;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::{SinkExt as _, StreamExt as _};
use livekit_protocol::{
    self as proto, JobType, signal_request::Message as Request,
    signal_response::Message as Response, worker_message::Message as WorkerRequest,
};
use prost::Message as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rehearsal::room::{Config, Server};
use room_support::{
    Client, LIMIT, connect, may_administer, may_join, start, token,
    worker::{self, Worker, registration},
};
use std::{
    net::SocketAddr,
    sync::{
        Once,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, tungstenite::Message};

/// Of the tasks of all servers in this process: one fails all tests of this file.
static PANICS: AtomicUsize = AtomicUsize::new(0);
static COUNT_PANICS: Once = Once::new();

/// A server with somebody in it who must not notice anything.
struct Victim {
    server: Server,
    ann: Client,
    worker: Worker,
}

impl Victim {
    async fn new() -> Self {
        COUNT_PANICS.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                // The runtime's threads have this name, and run all tasks; the tests' own have not.
                if std::thread::current().name() == Some("tokio-rt-worker") {
                    PANICS.fetch_add(1, Ordering::Relaxed);
                }
                usual(info);
            }));
        });
        let server = start(Config::default());
        Self {
            ann: Client::join(&server, "ann", may_join("lobby")).await,
            worker: Worker::register(&server, JobType::JtRoom, "").await,
            server,
        }
    }

    fn address(&self) -> SocketAddr {
        let url = self.server.http_url();
        url["http://".len()..].parse().expect("an address")
    }

    /// Who is in is served, and so is who comes.
    async fn goes_on(mut self) {
        self.ann.send(Request::Ping(1)).await;
        self.ann
            .until(|m| matches!(m, Response::Pong(_)).then_some(()))
            .await;
        let bob = Client::join(&self.server, "bob", may_join("next")).await;
        // It was asked about rooms that came of the noise before.
        while self.worker.asked().await.room.expect("a room").name != "next" {}
        drop(bob);
        self.server.shutdown().await;
        assert_eq!(PANICS.load(Ordering::Relaxed), 0, "a panic, see above");
    }
}

fn noise(random: &mut StdRng, longest: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..=longest)];
    random.fill(bytes.as_mut_slice());
    bytes
}

/// What comes of a good message: some bytes flipped, cut off, or put in.
fn damaged(random: &mut StdRng, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.random()),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.random_range(0..8);
                }
            }
        }
    }
    bytes
}

/// Noise that looks like STUN, DTLS, RTP or RTCP at first sight (RFC 7983).
fn datagram(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = noise(random, 1_500);
    let starts: [&[u8]; 6] = [
        &[0, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42],
        &[1, 1, 0xff, 0xff, 0x21, 0x12, 0xa4, 0x42],
        &[22, 0xfe, 0xfd, 0, 0],
        &[0x80, 111],
        &[0x90, 0x80],
        &[0x80, 200],
    ];
    let start = starts[random.random_range(0..starts.len())];
    let common = start.len().min(bytes.len());
    bytes[..common].copy_from_slice(&start[..common]);
    bytes
}

/// Writes what the server takes, then reads until it hangs up or has nothing to say.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let mut stream = TcpStream::connect(address).await.expect("connects");
    // The server may hang up before all is written.
    if stream.write_all(bytes).await.is_ok() {
        let _ = stream.shutdown().await;
        let read = timeout(LIMIT, stream.read_to_end(&mut answer)).await;
        // A reset is an end too.
        let _ = read.expect("the server hangs up");
    }
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams() {
    let victim = Victim::new().await;
    let mut random = StdRng::seed_from_u64(1);
    // Where the media is, as clients are told.
    let sdp = media_line(&victim).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    for _ in 0..2_000 {
        let bytes = match random.random_bool(0.5) {
            true => datagram(&mut random),
            false => noise(&mut random, 3_000),
        };
        // What is too much for the receiver is lost, as it may be.
        let _ = socket.send_to(&bytes, sdp).await;
    }
    for _ in 0..200 {
        let mut framed = Vec::new();
        for _ in 0..random.random_range(1..20) {
            let packet = datagram(&mut random);
            // Sometimes more is announced than comes.
            let length = match random.random_bool(0.1) {
                true => 0x30ff,
                false => packet.len() as u16,
            };
            framed.extend(length.to_be_bytes());
            framed.extend(packet);
        }
        exchange(victim.address(), &framed).await;
    }
    victim.goes_on().await;
}

/// The server's UDP address, from the answer to an offer.
async fn media_line(victim: &Victim) -> SocketAddr {
    let mut client = Client::join(&victim.server, "probe", may_join("probe")).await;
    let r#type = "offer".to_owned();
    client
        .send(Request::Offer(proto::SessionDescription {
            r#type,
            sdp: OFFER.replace('\n', "\r\n"),
            ..Default::default()
        }))
        .await;
    let sdp = client
        .until(|m| match m {
            Response::Answer(answer) => Some(answer.sdp),
            _ => None,
        })
        .await;
    let candidates = sdp.lines().filter_map(|l| l.strip_prefix("a=candidate:"));
    let mut udp = candidates.filter(|c| c.contains(" udp ") || c.contains(" UDP "));
    let fields: Vec<_> = udp.next().expect("a candidate").split(' ').collect();
    format!("{}:{}", fields[4], fields[5])
        .parse()
        .expect("an address")
}

const OFFER: &str = "v=0
o=- 1 1 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0
a=msid-semantic: WMS *
m=application 9 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 0.0.0.0
a=ice-ufrag:abcd
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF
a=setup:actpass
a=mid:0
a=sctp-port:5000
a=max-message-size:65535
";

#[tokio::test(flavor = "multi_thread")]
async fn http() {
    let victim = Victim::new().await;
    let mut random = StdRng::seed_from_u64(2);
    let admin = token(&victim.server, "admin", may_administer("lobby"));
    let joiner = token(&victim.server, "eve", may_join("lobby"));
    for round in 0..300 {
        // Not even HTTP.
        let bytes = noise(&mut random, 500);
        exchange(victim.address(), &bytes).await;

        let body = match round % 3 {
            0 => noise(&mut random, 300),
            1 => damaged(&mut random, br#"{"room": "lobby", "identity": "eve"}"#),
            _ => {
                let request = proto::CreateRoomRequest {
                    name: "damaged".into(),
                    metadata: "m".repeat(100),
                    ..Default::default()
                };
                damaged(&mut random, &request.encode_to_vec())
            }
        };
        let json = random.random_bool(0.5);
        let content_type = if json {
            "application/json"
        } else {
            "application/protobuf"
        };
        let method = ["CreateRoom", "SendData", "UpdateSubscriptions", "Nonsense"];
        let method = method[random.random_range(0..method.len())];
        let requests = [
            format!("POST /twirp/livekit.RoomService/{method}"),
            "PUT /faults".to_owned(),
            "POST /faults".to_owned(),
            format!("GET /rtc?access_token={}", in_query(&body)),
            format!(
                "GET /rtc/v1?access_token={joiner}&join_request={}",
                in_query(&body)
            ),
            format!(
                "GET /rtc/v1/validate?access_token={joiner}&join_request={}",
                in_query(&body)
            ),
            "GET /agent".to_owned(),
        ];
        for request in requests {
            let upgrade = match request.starts_with("GET") {
                true => {
                    "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                     sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                }
                false => "connection: close\r\n",
            };
            let head = format!(
                "{request} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n{upgrade}\
                 content-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
                if request.contains("access_token") {
                    &joiner
                } else {
                    &admin
                },
                body.len(),
            );
            let mut stream = TcpStream::connect(victim.address())
                .await
                .expect("connects");
            let bytes = [head.as_bytes(), &body].concat();
            stream.write_all(&bytes).await.expect("written");
            let mut answer = [0; 9];
            let answered = timeout(LIMIT, stream.read_exact(&mut answer)).await;
            answered.expect("in time").expect("an answer");
            assert_eq!(&answer, b"HTTP/1.1 ", "{request}");
        }
        let request = damaged(&mut random, b"GET /witness HTTP/1.1\r\nhost: x\r\n\r\n");
        exchange(victim.address(), &request).await;
    }
    victim.server.set_faults(Default::default()).await;
    victim.goes_on().await;
}

fn in_query(bytes: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(bytes);
    text.replace('+', "%2B").replace('=', "%3D")
}

/// Sends and reads on for as long as the server likes; it must hang up, or still take a ping.
async fn pester(mut socket: WebSocketStream<MaybeTlsStream<TcpStream>>, frames: Vec<Message>) {
    let pestering = async {
        for frame in frames {
            if socket.send(frame).await.is_err() {
                return;
            }
        }
        if socket.send(Message::Ping("end".into())).await.is_err() {
            return;
        }
        while let Some(Ok(frame)) = socket.next().await {
            if matches!(frame, Message::Pong(_)) {
                return;
            }
        }
    };
    timeout(LIMIT, pestering).await.expect("an end");
}

fn frame(random: &mut StdRng, good: &[Vec<u8>]) -> Message {
    match random.random_range(0..4) {
        0 => Message::binary(noise(random, 200)),
        1 => Message::text(String::from_utf8_lossy(&noise(random, 50)).into_owned()),
        _ => {
            let good = &good[random.random_range(0..good.len())];
            Message::binary(damaged(random, good))
        }
    }
}

fn requests() -> Vec<Vec<u8>> {
    let description = |r#type: &str, sdp: &str| proto::SessionDescription {
        r#type: r#type.into(),
        sdp: sdp.replace('\n', "\r\n"),
        ..Default::default()
    };
    let requests = [
        Request::Offer(description("offer", OFFER)),
        Request::Answer(description("answer", OFFER)),
        Request::AddTrack(proto::AddTrackRequest {
            cid: "cid".into(),
            name: "microphone".into(),
            ..Default::default()
        }),
        Request::Mute(proto::MuteTrackRequest {
            sid: "TR_x".into(),
            muted: true,
        }),
        Request::Subscription(proto::UpdateSubscription {
            track_sids: vec!["TR_x".into()],
            subscribe: true,
            ..Default::default()
        }),
        Request::UpdateMetadata(proto::UpdateParticipantMetadata {
            metadata: "m".into(),
            request_id: 1,
            ..Default::default()
        }),
        Request::Trickle(proto::TrickleRequest {
            candidate_init: "{}".into(),
            ..Default::default()
        }),
        Request::PingReq(proto::Ping {
            timestamp: 1,
            rtt: 1,
        }),
    ];
    let encode = |request| {
        let message = Some(request);
        proto::SignalRequest { message }.encode_to_vec()
    };
    requests.map(encode).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn signalling() {
    let victim = Victim::new().await;
    let mut random = StdRng::seed_from_u64(3);
    let good = requests();
    for round in 0..400 {
        let joiner = token(
            &victim.server,
            &format!("eve-{}", round % 7),
            may_join("lobby"),
        );
        let path = match round % 2 {
            0 => format!("/rtc?access_token={joiner}"),
            _ => {
                let request = proto::JoinRequest {
                    client_info: Some(Default::default()),
                    ..Default::default()
                };
                let wrapped = proto::WrappedJoinRequest {
                    join_request: request.encode_to_vec(),
                    ..Default::default()
                };
                let wrapped = in_query(&wrapped.encode_to_vec());
                format!("/rtc/v1?access_token={joiner}&join_request={wrapped}")
            }
        };
        let socket = connect(&victim.server, &path).await.expect("websocket");
        let frames = (0..6).map(|_| frame(&mut random, &good)).collect();
        pester(socket, frames).await;
    }
    victim.goes_on().await;
}

/// Damage that still is SDP, line by line.
#[tokio::test(flavor = "multi_thread")]
async fn offers() {
    let victim = Victim::new().await;
    let mut random = StdRng::seed_from_u64(4);
    for _ in 0..300 {
        let mut lines: Vec<_> = OFFER.lines().map(|l| l.as_bytes().to_vec()).collect();
        for _ in 0..random.random_range(1..4) {
            let (at, other) = (
                random.random_range(0..lines.len()),
                random.random_range(0..lines.len()),
            );
            match random.random_range(0..4) {
                0 => drop(lines.remove(at)),
                1 => lines.insert(at, lines[other].clone()),
                2 => lines.swap(at, other),
                _ => lines[at] = damaged(&mut random, &lines[at]),
            }
            if lines.is_empty() {
                break;
            }
        }
        let sdp = String::from_utf8_lossy(&lines.join(&b"\r\n"[..])).into_owned();
        let mut client = Client::join(&victim.server, "eve", may_join("lobby")).await;
        let r#type = "offer".into();
        client
            .send(Request::Offer(proto::SessionDescription {
                r#type,
                sdp,
                ..Default::default()
            }))
            .await;
        // Taken or sent away.
        client
            .until(|m| matches!(m, Response::Answer(_) | Response::Leave(_)).then_some(()))
            .await;
    }
    victim.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers() {
    let victim = Victim::new().await;
    let mut random = StdRng::seed_from_u64(5);
    let requests = [
        WorkerRequest::Register(registration(JobType::JtPublisher, "eve")),
        WorkerRequest::Availability(proto::AvailabilityResponse {
            job_id: "AJ_x".into(),
            available: true,
            ..Default::default()
        }),
        WorkerRequest::UpdateWorker(proto::UpdateWorkerStatus {
            load: f32::NAN,
            ..Default::default()
        }),
        WorkerRequest::UpdateJob(proto::UpdateJobStatus {
            job_id: "AJ_x".into(),
            status: 77,
            ..Default::default()
        }),
        WorkerRequest::Ping(proto::WorkerPing { timestamp: -1 }),
    ];
    let good = requests.map(|request| {
        let message = Some(request);
        proto::WorkerMessage { message }.encode_to_vec()
    });
    for round in 0..300 {
        let grants = livekit_token::VideoGrants {
            agent: true,
            ..Default::default()
        };
        let socket = worker::open(&victim.server, grants)
            .await
            .expect("websocket");
        // Half of them are registered before they go wrong.
        let first = (round % 2 == 0).then(|| Message::binary(good[0].clone()));
        let frames = (0..4).map(|_| frame(&mut random, &good));
        pester(socket, first.into_iter().chain(frames).collect()).await;
    }
    // Those that are left would be asked, too.
    let gone = |w: &rehearsal::room::Witness| w.live_workers().count() == 1;
    let alone = victim.server.wait_for(gone, LIMIT).await;
    alone.expect("the noisy ones are gone");
    victim.goes_on().await;
}

/// Connections that say nothing, or half of something, are given up, and hold up nobody meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn silence() {
    let victim = Victim::new().await;
    let mut streams = Vec::new();
    for half in [
        &b""[..],
        b"G",
        b"GET /rtc HTTP/1.1\r\nhost",
        &[0],
        &[0, 20, 0, 1],
    ] {
        for _ in 0..50 {
            let mut stream = TcpStream::connect(victim.address())
                .await
                .expect("connects");
            stream.write_all(half).await.expect("written");
            streams.push((half, stream));
        }
    }
    let begun = tokio::time::Instant::now();
    for (half, stream) in &mut streams {
        // ICE-TCP connections may be silent for as long as they like.
        if half.first() == Some(&0) {
            continue;
        }
        let mut rest = Vec::new();
        let end = timeout(LIMIT, stream.read_to_end(&mut rest)).await;
        let _ = end.expect("given up");
    }
    assert!(begun.elapsed() < Duration::from_secs(25));
    victim.goes_on().await;
}
