//! The gateway: Deepgram's `/v1/listen` for other programs' agents, served by the daemon. It owns the
//! stream to the provider, and ties it to the client's connection and, if the client names them, to a
//! participant's or a room's life. So a client that crashes, leaks or is killed leaves nothing open:
//! registry, gate, ledger and close path are those of the daemon's own streams. Messages pass as they
//! are, both ways.
//!
//! Source: Deepgram's API reference of `/v1/listen`; RFC 6455 for the rest.

mod handshake;
mod presence;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Bytes, Message, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    handshake::answer,
    presence::{Presence, Tie},
};
use crate::{
    audio::{Page, samples},
    close::CloseOrder,
    daemon::Daemon,
    domain::{CloseReason, Outcome},
    ledger::Settled,
    refusals::Refusals,
    room::api::RoomApi,
    stt::{machine::Report, stream::StreamHandle},
};

/// Clients at once; more are closed at once.
const MAX_CLIENTS: usize = 4096;
/// For a request and its head.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
const MAX_HEAD: usize = 32 << 10;
/// Of a client. A second of the widest audio is less.
const MAX_MESSAGE: usize = 4 << 20;
/// As for the stream behind it: what comes is small.
const READ_BUFFER: usize = 8 << 10;
/// A client that takes nothing for so long is gone, and one that answers nothing.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
const PING_EVERY: Duration = Duration::from_secs(10);
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// For the client's part of the close handshake.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// When the system gives no more connections.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest reason that fits into a close frame (RFC 6455, section 5.5).
const MAX_REASON: usize = 123;

/// The running gateway. When this is dropped nobody new is taken; who has a stream is served until that
/// is settled.
pub(crate) struct Gateway {
    tasks: JoinSet<()>,
    ended: CancellationToken,
}

/// What all clients have in common.
struct Shared {
    daemon: Arc<Daemon>,
    presence: Presence,
    /// Clients with a stream.
    relays: TaskTracker,
    refusals: Mutex<Refusals>,
}

/// # Errors
/// An address that is taken, or not to be had, and what to do.
pub(crate) async fn bind(address: Option<SocketAddr>) -> Result<Option<TcpListener>, String> {
    let Some(address) = address else {
        return Ok(None);
    };
    let tcp = TcpListener::bind(address).await.map_err(|error| {
        let fix = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "something listens there already: set gateway.listen to another port, or to off"
            }
            _ => "set gateway.listen to an address of this machine, or to off",
        };
        format!("gateway.listen is {address}: {error}; {fix}")
    })?;
    if let Ok(address) = tcp.local_addr() {
        tracing::info!(%address, "the gateway listens");
    }
    Ok(Some(tcp))
}

impl Gateway {
    /// Serves from now on.
    pub fn start(listener: Option<TcpListener>, daemon: Arc<Daemon>) -> Self {
        let (mut tasks, ended) = (JoinSet::new(), CancellationToken::new());
        if let Some(listener) = listener {
            let api = Arc::new(RoomApi::new(&daemon.config().livekit));
            let shared = Arc::new(Shared {
                presence: Presence::new(api),
                daemon,
                relays: TaskTracker::new(),
                refusals: Mutex::default(),
            });
            tasks.spawn(serve(listener, shared, ended.clone()));
        }
        Self { tasks, ended }
    }

    /// Ends it, once the streams are closed: no new clients, and what is left to say to those that are
    /// there.
    pub async fn end(mut self, until: Instant) {
        self.ended.cancel();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // What is left ends with this.
        let _ = tokio::time::timeout_at(until.into(), ended).await;
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, ended: CancellationToken) {
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
            Ok((tcp, peer)) if connections.len() + shared.relays.len() < MAX_CLIENTS => {
                failing = false;
                connections.spawn(connection(tcp, peer, shared.clone()));
            }
            Ok((too_many, _)) => drop(too_many),
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "the gateway takes no clients for now");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    shared.relays.close();
    shared.relays.wait().await;
}

async fn connection(tcp: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    // Messages must not wait for each other.
    let _ = tcp.set_nodelay(true);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(shared, peer, request).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(tcp), service)
        .with_upgrades();
    if let Err(error) = serving.await {
        tracing::debug!(%error, "a connection to the gateway ended");
    }
}

/// A client whose handshake is answered.
struct Relay {
    stream: StreamHandle,
    tie: Option<Tie>,
    /// Bytes of linear16 that make up a second; None for other encodings.
    bytes_a_second: Option<u64>,
    grace: Duration,
    closing: bool,
}

/// Whether the client can still be told something.
#[derive(PartialEq)]
enum Client {
    There,
    Gone,
}

impl Relay {
    /// Passes messages on, both ways, until the stream is settled.
    async fn run(mut self, upgraded: Upgraded) {
        let limits = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let io = TokioIo::new(upgraded);
        let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(limits)).await;
        let mut beat = interval(SIGN_OF_LIFE);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut pinged) = (Instant::now(), Instant::now());
        let (mut client, mut waits) = (Client::There, false);
        loop {
            let takes_more = self.stream.takes_more();
            tokio::select! {
                report = self.stream.report() => match report {
                    Some(Report::Message(text)) if client == Client::There => {
                        let sent = timeout(WRITE_LIMIT, socket.send(Message::text(text))).await;
                        if !matches!(sent, Ok(Ok(()))) {
                            client = self.gone("takes nothing any more");
                        }
                    }
                    Some(_) => {}
                    None => break,
                },
                message = socket.next(), if client == Client::There && !waits => {
                    heard = Instant::now();
                    match message {
                        Some(Ok(message)) => {
                            waits = self.message(message);
                        }
                        Some(Err(error)) => {
                            tracing::debug!(id = %self.stream.id(), %error, "the client's connection");
                            client = self.gone("is gone");
                        }
                        None => client = self.gone("is gone"),
                    }
                }
                // What it sends meanwhile waits in the kernel, and then with it.
                () = takes_more, if waits => waits = false,
                why = left(&mut self.tie) => {
                    self.tie = None;
                    self.close(CloseReason::ParticipantLeft(why));
                }
                _ = beat.tick(), if client == Client::There => {
                    self.stream.alive();
                    if heard.elapsed() >= SILENCE_LIMIT && !waits {
                        client = self.gone("answers nothing any more");
                    } else if pinged.elapsed() >= PING_EVERY {
                        pinged = Instant::now();
                        let ping = Message::Ping(Bytes::new());
                        if timeout(WRITE_LIMIT, socket.send(ping)).await.is_err() {
                            client = self.gone("takes nothing any more");
                        }
                    }
                }
            }
        }
        let settled = self.stream.settled().await;
        if client == Client::There {
            let _ = timeout(GOODBYE_LIMIT, goodbye(socket, settled.as_deref())).await;
        }
    }

    /// The client has gone before it was told that there is a stream.
    async fn forsaken(mut self, error: &hyper::Error) {
        tracing::debug!(id = %self.stream.id(), %error, "the client went during the handshake");
        self.gone("is gone");
        self.stream.settled().await;
    }

    /// True if the client has to wait before it is read again.
    fn message(&mut self, message: Message) -> bool {
        match message {
            // Older clients of Deepgram end a stream by nothing.
            Message::Binary(bytes) if bytes.is_empty() => self.finish(),
            Message::Binary(bytes) => {
                let samples = self.bytes_a_second.map_or(0, |a_second| {
                    samples(Duration::from_secs(1)) * bytes.len() as u64 / a_second
                });
                let bytes = bytes.into();
                self.stream.audio(Page { bytes, samples });
                return true;
            }
            Message::Text(text) if is_close_stream(&text) => self.finish(),
            Message::Text(text) => {
                self.stream.text(text.as_str().to_owned());
                return true;
            }
            Message::Close(_) => self.close(CloseReason::ClientDone("has closed".into())),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
        false
    }

    fn finish(&mut self) {
        self.close(CloseReason::ClientDone("asked for it".into()));
    }

    fn gone(&mut self, how: &str) -> Client {
        self.close(CloseReason::ClientDone(how.to_owned()));
        Client::Gone
    }

    fn close(&mut self, reason: CloseReason) {
        if !std::mem::replace(&mut self.closing, true) {
            let deadline = Instant::now() + self.grace;
            self.stream.close(&CloseOrder { reason, deadline });
        }
    }
}

/// Why whoever the stream was for has left. Cancel safe.
async fn left(tie: &mut Option<Tie>) -> String {
    match tie {
        Some(tie) => tie.left().await,
        None => std::future::pending().await,
    }
}

fn is_close_stream(text: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Envelope<'a> {
        #[serde(rename = "type", borrow)]
        kind: std::borrow::Cow<'a, str>,
    }
    // A hint that it is worth a look.
    text.contains("CloseStream")
        && serde_json::from_str::<Envelope<'_>>(text).is_ok_and(|e| e.kind == "CloseStream")
}

/// The end, as the provider told it.
async fn goodbye(mut socket: WebSocketStream<TokioIo<Upgraded>>, settled: Option<&Settled>) {
    let (code, reason) = match settled.map(|settled| (&settled.outcome, &settled.reason)) {
        Some((Outcome::Acknowledged, CloseReason::ClientDone(_))) => (1000, String::new()),
        Some((Outcome::Acknowledged, why)) => (1001, why.to_string()),
        Some((outcome, _)) => match outcome.failure() {
            Some(failure) => (failure.close_code.unwrap_or(1011), failure.said),
            None => (1011, "the provider did not answer".to_owned()),
        },
        None => (1011, "a defect in roomwarden".to_owned()),
    };
    let code = match CloseCode::from(code) {
        code if code.is_allowed() => code,
        _ => CloseCode::Error,
    };
    let reason = Utf8Bytes::from(&reason[..reason.floor_char_boundary(MAX_REASON)]);
    if socket
        .close(Some(CloseFrame { code, reason }))
        .await
        .is_ok()
    {
        while let Some(Ok(_)) = socket.next().await {}
    }
}
