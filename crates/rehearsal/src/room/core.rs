//! The actor: one task owns all rooms, participants and connections, so there are no locks and
//! everything happens in one order. Websocket, HTTP and TCP tasks talk to it by [`Handle`]; it
//! never waits for any of them.
//!
//! Rooms and stays are in `rooms`, clients' requests in `requests`, tracks and subscriptions in
//! `tracks`, the RoomService in `api`, agent workers in `agents`.

use super::{
    Config,
    agents::Agents,
    auth::{JoinRequest, Keys, Refusal},
    connection::{ConnectionId, Lane},
    faults::{Departure, Faults},
    media::{Media, MediaEvent},
    participant::{Inbox, Key, Participant, frame},
    rooms::Room,
    speakers,
    webhooks::Webhooks,
    witness::Recorder,
};
use bytes::Bytes;
use livekit_protocol::{self as proto, DisconnectReason, signal_request, signal_response::Message};
use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Commands that may wait for the actor; whoever sends more waits itself.
const MAX_COMMANDS: usize = 1_024;
/// Granularity of time-outs.
const TICK: Duration = Duration::from_millis(100);

pub(super) enum Command {
    Join {
        request: Box<JoinRequest>,
        reply: oneshot::Sender<Result<Session, Refusal>>,
    },
    Signal {
        participant: Key,
        generation: u64,
        request: Box<signal_request::Message>,
    },
    SignalClosed {
        participant: Key,
        generation: u64,
    },
    TcpOpened {
        peer: SocketAddr,
        sender: mpsc::Sender<Bytes>,
    },
    TcpReceived {
        peer: SocketAddr,
        packet: Bytes,
    },
    TcpClosed {
        peer: SocketAddr,
    },
    Call(Box<dyn FnOnce(&mut Core) + Send>),
    /// Sends everyone away; no one can join after it.
    Shutdown,
}

/// What a websocket task needs to serve a participant.
pub(super) struct Session {
    pub participant: Key,
    pub generation: u64,
    pub inbox: Inbox,
    pub identity: String,
    /// Closes the websocket without a word.
    pub cut: CancellationToken,
    /// Nothing is read from the websocket or written to it any more.
    pub vanished: CancellationToken,
}

/// Sends commands to the actor.
#[derive(Clone)]
pub(super) struct Handle {
    commands: mpsc::Sender<Command>,
}

/// The actor has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stopped;

/// What the actor is made of.
pub(super) struct Parts {
    pub config: Config,
    pub keys: Keys,
    pub media: Media,
    pub recorder: Arc<Recorder>,
    pub webhooks: Webhooks,
    pub faults: watch::Sender<Faults>,
    pub killed: CancellationToken,
}

pub(super) struct Core {
    pub(super) config: Config,
    pub(super) keys: Keys,
    pub(super) media: Media,
    pub(super) recorder: Arc<Recorder>,
    pub(super) webhooks: Webhooks,
    pub(super) faults: watch::Sender<Faults>,
    pub(super) held_departures: Vec<Departure>,
    /// Cancelled when the server is to go without a word.
    pub(super) killed: CancellationToken,
    pub(super) agents: Agents,
    pub(super) rooms: BTreeMap<String, Room>,
    pub(super) participants: HashMap<Key, Participant>,
    /// Whose connection it is.
    pub(super) owners: HashMap<ConnectionId, Key>,
    /// To be removed as soon as the current event is done with.
    pub(super) doomed: Vec<(Key, DisconnectReason)>,
    pub(super) next_key: Key,
    pub(super) stopping: bool,
    speakers_read: Instant,
}

impl Handle {
    pub fn new() -> (Self, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        (Self { commands }, receiver)
    }

    /// Waits while the actor is busy; the command is not sent if this is cancelled.
    pub async fn send(&self, command: Command) -> Result<(), Stopped> {
        self.commands.send(command).await.map_err(|_| Stopped)
    }

    /// Runs `call` in the actor. It may run even if this is cancelled.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Core) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (reply, result) = oneshot::channel();
        let call = Box::new(|core: &mut Core| drop(reply.send(call(core))));
        self.send(Command::Call(call)).await?;
        result.await.map_err(|_| Stopped)
    }

    pub async fn join(&self, request: JoinRequest) -> Result<Result<Session, Refusal>, Stopped> {
        let (reply, result) = oneshot::channel();
        let request = Box::new(request);
        self.send(Command::Join { request, reply }).await?;
        result.await.map_err(|_| Stopped)
    }
}

impl Core {
    pub fn new(parts: Parts) -> Self {
        let Parts {
            config,
            keys,
            media,
            recorder,
            webhooks,
            faults,
            killed,
        } = parts;
        Self {
            config,
            keys,
            media,
            recorder,
            webhooks,
            faults,
            held_departures: Vec::new(),
            killed,
            agents: Agents::default(),
            rooms: BTreeMap::new(),
            participants: HashMap::new(),
            owners: HashMap::new(),
            doomed: Vec::new(),
            next_key: 1,
            stopping: false,
            speakers_read: Instant::now(),
        }
    }

    /// Runs until cancelled or nobody is left to send commands.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>, cancel: CancellationToken) {
        let mut events = Vec::new();
        let mut tick = Instant::now() + TICK;
        loop {
            let deadline = self.media.deadline().map_or(tick, |d| d.min(tick));
            tokio::select! {
                () = cancel.cancelled() => break,
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                readable = self.media.readable() => match readable {
                    Ok(()) => self.media.read(&mut events),
                    Err(e) => tracing::warn!("udp: {e}"),
                },
                () = tokio::time::sleep_until(deadline.into()) => {}
            }
            let now = Instant::now();
            if now >= tick {
                tick = now + TICK;
                self.tick(now);
            }
            // Handling an event can make more of them.
            loop {
                self.media.run(now, &mut events);
                if events.is_empty() && self.doomed.is_empty() {
                    break;
                }
                for (connection, event) in events.drain(..) {
                    self.media_event(connection, event, now);
                }
                while let Some((key, reason)) = self.doomed.pop() {
                    self.remove(key, reason);
                }
            }
        }
    }

    /// Sends a message to one participant.
    pub(super) fn send(&mut self, key: Key, message: Message) {
        self.send_frame(key, frame(message));
    }

    /// Sends a message to everyone in a room, except perhaps one.
    pub(super) fn broadcast(&mut self, room: &str, except: Option<Key>, message: Message) {
        let frame = frame(message);
        for key in self.members(room) {
            if Some(key) != except {
                self.send_frame(key, frame.clone());
            }
        }
    }

    fn send_frame(&mut self, key: Key, frame: Bytes) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        if p.signal.outbox.send(frame).is_err() {
            tracing::warn!(
                identity = p.info.identity,
                "does not read its websocket: dropped"
            );
            self.doomed.push((key, DisconnectReason::SignalClose));
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Join { request, reply } => {
                let result = self.join(*request);
                // A client that is gone already is noticed by its closed outbox.
                let _ = reply.send(result);
            }
            Command::Signal {
                participant,
                generation,
                request,
            } => {
                if self.is_current(participant, generation) {
                    self.request(participant, *request);
                }
            }
            Command::SignalClosed {
                participant,
                generation,
            } => {
                if self.is_current(participant, generation) {
                    self.signal_lost(participant);
                }
            }
            Command::TcpOpened { peer, sender } => self.media.tcp_opened(peer, sender),
            Command::TcpReceived { peer, packet } => self.media.tcp_received(peer, &packet),
            Command::TcpClosed { peer } => self.media.tcp_closed(peer),
            Command::Call(call) => call(self),
            Command::Shutdown => {
                self.stopping = true;
                let rooms: Vec<_> = self.rooms.keys().cloned().collect();
                for room in rooms {
                    self.end_room(&room, DisconnectReason::ServerShutdown);
                }
                self.close_workers();
                self.webhooks.close();
            }
        }
    }

    fn media_event(&mut self, connection: ConnectionId, event: MediaEvent, now: Instant) {
        let Some(&key) = self.owners.get(&connection) else {
            return;
        };
        let Some(participant) = self.participants.get_mut(&key) else {
            return;
        };
        // With two connections the subscriber's is primary: the publisher's may never come up.
        let primary = participant.subscriber == Some(connection);
        match event {
            MediaEvent::Connected if primary => {
                participant.media_lost = None;
                self.activate(key);
            }
            MediaEvent::Found => participant.media_lost = None,
            MediaEvent::Lost => {
                tracing::debug!(identity = participant.info.identity, "media lost");
                participant.media_lost.get_or_insert(now);
            }
            MediaEvent::Connected => {}
            MediaEvent::Data(lane, data) => self.data(key, lane, &data),
            MediaEvent::Packet { mid, level } => {
                let mut tracks = participant.tracks.iter_mut();
                let track =
                    tracks.find(|t| t.source.connection == connection && t.source.mid == mid);
                if let Some(track) = track {
                    track.packets += 1;
                    if let Some(level) = level.filter(|_| !track.info.muted) {
                        participant.meter.note(level);
                        let room = self.rooms.get(&participant.room);
                        if let Some(room) = room.filter(|_| speakers::is_speech(level)) {
                            let who = (room.info.sid.as_str(), participant.info.sid.as_str());
                            track.speech(&self.recorder, who, now);
                        }
                    }
                }
            }
            MediaEvent::Failed => {
                self.owners.remove(&connection);
                self.reconnect_fully(key);
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        self.expire_participants(now);
        self.expire_rooms(now);
        self.expire_jobs(now);
        self.tell_late_departures(now);
        if now.duration_since(self.speakers_read) >= speakers::WINDOW {
            self.speakers_read = now;
            self.read_meters();
            self.record_packets();
        }
    }

    fn read_meters(&mut self) {
        let rooms: Vec<_> = self.rooms.keys().cloned().collect();
        for room in rooms {
            let mut changed = Vec::new();
            for key in self.members(&room) {
                let Some(p) = self.participants.get_mut(&key) else {
                    continue;
                };
                let level = p.meter.read();
                if level != p.speaking {
                    p.speaking = level;
                    changed.push(proto::SpeakerInfo {
                        sid: p.info.sid.clone(),
                        level: level.unwrap_or_default(),
                        active: level.is_some(),
                    });
                }
            }
            if !changed.is_empty() {
                let speakers = changed;
                let message = Message::SpeakersChanged(proto::SpeakersChanged { speakers });
                self.broadcast(&room, None, message);
            }
        }
    }

    fn record_packets(&self) {
        for p in self.participants.values() {
            let Some(room) = self.rooms.get(&p.room) else {
                continue;
            };
            record_packets(&self.recorder, &room.info.sid, p);
        }
    }

    fn is_current(&self, key: Key, generation: u64) -> bool {
        let participant = self.participants.get(&key);
        participant.is_some_and(|p| p.signal.generation == generation)
    }
}

/// Brings the record of a participant's packets up to date.
pub(super) fn record_packets(recorder: &Recorder, room: &str, p: &Participant) {
    for t in p.tracks.iter().filter(|t| t.packets > 0) {
        let spell = t.spell.as_ref().map(|(spell, _)| spell);
        recorder.packets(room, &p.info.sid, &t.info.sid, t.packets, spell);
    }
}

/// Which data channel a packet of this kind takes.
pub(super) fn lane(kind: proto::data_packet::Kind) -> Lane {
    match kind {
        proto::data_packet::Kind::Reliable => Lane::Reliable,
        proto::data_packet::Kind::Lossy => Lane::Lossy,
    }
}
