//! LiveKit's agent dispatch as a source of rooms: a worker that is registered at the server's
//! `/agent`, is asked whether it takes a job, and says how each job ended. What it takes and what
//! becomes of it is the daemon's affair; the protocol is in `desk`, the connection here.

mod desk;
mod load;
pub mod rescue;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt};
use livekit_api::access_token::{AccessToken, VideoGrants};
use livekit_protocol::{
    JobType, ParticipantPermission, RegisterWorkerRequest, ServerMessage, WorkerMessage,
    WorkerPing, server_message::Message as Answer, worker_message::Message as Request,
};
use prost::Message as _;
use secrecy::ExposeSecret;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{MissedTickBehavior, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        http::{HeaderValue, header::AUTHORIZATION},
        protocol::WebSocketConfig,
    },
};
use url::Url;

use crate::{
    config::{Config, JobKind, LiveKitConfig},
    domain::backoff,
    ledger::unix_ms,
    room::api::DAEMON_ATTRIBUTE,
};
use desk::Desk;
pub use desk::{Command, Event};
use load::Meter;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The server's own limit for a registration.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// The server pings as often, and answers ours.
const PING_EVERY: Duration = Duration::from_secs(10);
const SILENT_AT_MOST: Duration = Duration::from_secs(35);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What the end of the websocket may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// A token is used at once.
const VALID: Duration = Duration::from_secs(300);
/// Metadata of a room or a participant may have half a megabyte.
const MAX_MESSAGE: usize = 4 << 20;
/// Events that the daemon has not taken yet.
const MAX_EVENTS: usize = 256;

/// The worker's connection, to be run by the daemon.
pub struct Worker {
    livekit: LiveKitConfig,
    registration: RegisterWorkerRequest,
    desk: Desk,
    events: mpsc::Sender<Event>,
    commands: mpsc::UnboundedReceiver<Command>,
}

/// The daemon's side of it.
pub struct Line {
    pub events: mpsc::Receiver<Event>,
    commands: mpsc::UnboundedSender<Command>,
}

impl Line {
    /// A worker that is over needs to hear nothing.
    pub fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}

/// Why a connection ended.
enum Ended {
    /// We were told to end.
    Told,
    /// The server asks for another connection.
    GoAway,
    Lost(String),
}

impl Worker {
    /// None if the daemon is to be none.
    pub fn new(config: &Config) -> Option<(Self, Line)> {
        let agent = &config.agent;
        if !agent.enabled {
            return None;
        }
        let slots = usize::try_from(agent.slots).unwrap_or(usize::MAX);
        let threshold = agent.load_percent as f32 / 100.0;
        let daemon = (DAEMON_ATTRIBUTE.to_owned(), config.rooms.identity.clone());
        let desk = Desk::new(
            Some(slots).filter(|slots| *slots > 0),
            Some(threshold).filter(|threshold| *threshold < 1.0),
            HashMap::from([daemon]),
        );
        let job_type = match agent.job_type {
            JobKind::Room => JobType::JtRoom,
            JobKind::Publisher => JobType::JtPublisher,
            JobKind::Participant => JobType::JtParticipant,
        };
        let registration = RegisterWorkerRequest {
            r#type: job_type.into(),
            agent_name: agent.name.clone().unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ping_interval: PING_EVERY.as_secs() as u32,
            allowed_permissions: Some(permissions(config.rooms.hidden)),
            instance_id: format!("{}-{:016x}", config.rooms.identity, fastrand::u64(..)),
            ..RegisterWorkerRequest::default()
        };
        let (events, told) = mpsc::channel(MAX_EVENTS);
        let (commands, heard) = mpsc::unbounded_channel();
        let worker = Self {
            livekit: config.livekit.clone(),
            registration,
            desk,
            events,
            commands: heard,
        };
        let events = told;
        Some((worker, Line { events, commands }))
    }

    /// Until it is told to end, or nobody is there who could tell.
    pub async fn run(mut self) {
        let mut failures = 0;
        let mut meter = Meter::start();
        loop {
            let connecting = connect(self.livekit.clone());
            tokio::pin!(connecting);
            let connected = loop {
                tokio::select! {
                    connected = &mut connecting => break connected,
                    told = self.commands.recv() => if self.heed(told) {
                        return;
                    },
                }
            };
            let ended = match connected {
                Ok(socket) => self.serve(socket, &mut meter, &mut failures).await,
                Err(said) => Ended::Lost(said),
            };
            self.desk.dropped();
            let pause = match ended {
                Ended::Told => return,
                Ended::GoAway => tokio::time::sleep(RETRY_FIRST),
                Ended::Lost(said) => {
                    let pause = backoff(failures, RETRY_FIRST, RETRY_MOST, fastrand::f64());
                    tracing::warn!(
                        ?pause,
                        jobs = self.desk.job_count(),
                        "not registered as an agent worker: {said}; jobs that run go on"
                    );
                    failures += 1;
                    tokio::time::sleep(pause)
                }
            };
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    told = self.commands.recv() => if self.heed(told) {
                        return;
                    },
                }
            }
        }
    }

    /// Does what the daemon says; true if that is the end.
    fn heed(&mut self, told: Option<Command>) -> bool {
        let now = Instant::now();
        match told {
            Some(Command::Answer { job, identity }) => self.desk.answer(&job, identity, now),
            Some(Command::Over { job, result }) => self.desk.over(&job, result, now),
            Some(Command::Jobless(jobless)) => self.desk.jobless(jobless, now),
            Some(Command::Drain(draining)) => self.desk.drain(draining, now),
            Some(Command::End) | None => return true,
        }
        false
    }

    async fn serve(&mut self, mut socket: Socket, meter: &mut Meter, failures: &mut u32) -> Ended {
        let register = Request::Register(self.registration.clone());
        if let Err(said) = send(&mut socket, register).await {
            return Ended::Lost(said);
        }
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let begun = Instant::now();
        let (mut heard, mut pinged, mut registered) = (begun, begun, false);
        loop {
            tokio::select! {
                frame = socket.next() => {
                    heard = Instant::now();
                    let message = match frame {
                        Some(Ok(Message::Binary(bytes))) => ServerMessage::decode(bytes),
                        // The library answers pings.
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                        Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                            return Ended::Lost("the server does not speak protobuf".to_owned());
                        }
                        Some(Ok(Message::Close(_))) | None => {
                            return Ended::Lost("the server ended the connection".to_owned());
                        }
                        Some(Err(error)) => return Ended::Lost(error.to_string()),
                    };
                    match message.map(|message| message.message) {
                        // Of a newer protocol.
                        Ok(None) => {}
                        Ok(Some(Answer::Register(response))) => {
                            registered = true;
                            *failures = 0;
                            self.desk.registered(&response, heard);
                        }
                        Ok(Some(Answer::Availability(request))) => self.desk.asked(request, heard),
                        Ok(Some(Answer::Assignment(job))) => self.desk.assigned(job, heard),
                        Ok(Some(Answer::Termination(end))) => self.desk.terminated(end.job_id),
                        Ok(Some(Answer::Pong(_))) => {}
                        Ok(Some(Answer::GoAway(_))) => {
                            tracing::info!("the server asks agent workers to register anew");
                            farewell(socket).await;
                            return Ended::GoAway;
                        }
                        Err(error) => return Ended::Lost(format!("not its protocol: {error}")),
                    }
                }
                told = self.commands.recv() => if self.heed(told) {
                    for request in self.desk.take_out() {
                        if send(&mut socket, request).await.is_err() {
                            return Ended::Told;
                        }
                    }
                    farewell(socket).await;
                    return Ended::Told;
                },
                _ = tick.tick() => {
                    let now = Instant::now();
                    if !registered && now - begun > REGISTER_TIMEOUT {
                        let limit = format!("no answer to the registration in {REGISTER_TIMEOUT:?}");
                        return Ended::Lost(limit);
                    }
                    if now - heard > SILENT_AT_MOST {
                        return Ended::Lost(format!("silent for {SILENT_AT_MOST:?}"));
                    }
                    if registered && now - pinged >= PING_EVERY {
                        pinged = now;
                        let timestamp = unix_ms(std::time::SystemTime::now()) as i64;
                        let ping = Request::Ping(WorkerPing { timestamp });
                        if let Err(said) = send(&mut socket, ping).await {
                            return Ended::Lost(said);
                        }
                    }
                    self.desk.loaded(meter.load(), now);
                }
            }
            for event in self.desk.take_events() {
                // The daemon closes: it drains us next.
                let _ = self.events.send(event).await;
            }
            for request in self.desk.take_out() {
                if let Err(said) = send(&mut socket, request).await {
                    return Ended::Lost(said);
                }
            }
        }
    }
}

/// What our participant may do in the rooms that jobs are about.
fn permissions(hidden: bool) -> ParticipantPermission {
    ParticipantPermission {
        can_subscribe: true,
        // See `RoomApi::join_token`.
        can_publish: true,
        can_publish_data: true,
        can_update_metadata: true,
        hidden,
        ..ParticipantPermission::default()
    }
}

async fn connect(livekit: LiveKitConfig) -> Result<Socket, String> {
    let secret = livekit.api_secret.expose_secret();
    let grants = VideoGrants {
        agent: true,
        ..VideoGrants::default()
    };
    let token = AccessToken::with_api_key(&livekit.api_key, secret)
        .with_ttl(VALID)
        .with_grants(grants)
        .to_jwt()
        .map_err(|error| format!("no token can be made: {error}"))?;
    let url = address(&livekit.url);
    let mut request = (url.as_str().into_client_request()).map_err(|error| error.to_string())?;
    let mut bearer = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| "the token fits in no header".to_owned())?;
    bearer.set_sensitive(true);
    request.headers_mut().insert(AUTHORIZATION, bearer);
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let connecting = connect_async_with_config(request, Some(config), true);
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok((socket, _))) => Ok(socket),
        Ok(Err(tungstenite::Error::Http(answer))) => Err(match answer.status().as_u16() {
            401 | 403 => {
                "LiveKit refuses the API key or secret: check LIVEKIT_API_KEY and LIVEKIT_API_SECRET"
                    .to_owned()
            }
            404 => format!("{url} is not there: livekit.url is no LiveKit server with agents"),
            status => format!("{url} answers with status {status}"),
        }),
        Ok(Err(error)) => Err(format!("{url}: {error}")),
        Err(_) => Err(format!("{url}: no connection within {CONNECT_TIMEOUT:?}")),
    }
}

/// Where workers register: `/agent` below the server's address.
fn address(livekit: &Url) -> Url {
    let mut url = livekit.clone();
    let scheme = match url.scheme() {
        "ws" | "http" => "ws",
        _ => "wss",
    };
    // Cannot fail between web schemes.
    let _ = url.set_scheme(scheme);
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().push("agent");
    }
    url
}

async fn send(socket: &mut Socket, request: Request) -> Result<(), String> {
    let message = Some(request);
    let bytes = WorkerMessage { message }.encode_to_vec();
    match timeout(WRITE_TIMEOUT, socket.send(Message::binary(bytes))).await {
        Ok(sent) => sent.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it takes nothing for {WRITE_TIMEOUT:?}")),
    }
}

/// A close frame, and what the server has to say to it, within bounds.
async fn farewell(mut socket: Socket) {
    let close = async {
        if socket.close(None).await.is_ok() {
            while let Some(Ok(_)) = socket.next().await {}
        }
    };
    // Nothing is lost with it: every status has been sent.
    let _ = timeout(FAREWELL, close).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_register_below_the_servers_address() {
        for (livekit, expected) in [
            ("wss://x.livekit.cloud", "wss://x.livekit.cloud/agent"),
            ("http://127.0.0.1:7880/", "ws://127.0.0.1:7880/agent"),
            ("https://host/livekit/", "wss://host/livekit/agent"),
        ] {
            let url = Url::parse(livekit).expect("URL");
            assert_eq!(address(&url).as_str(), expected);
        }
    }
}
