//! Rooms and stays: creation, joining, resuming, leaving, and every way either can end.

use super::{
    auth::{JoinRequest, Refusal},
    connection::Role,
    core::{Core, Session, record_packets},
    participant::{FailingResume, Key, Participant, Signal, frame, new_sid, outbox},
    webhooks::Event,
    witness::{ParticipantRecord, unix_ms},
};
use axum::http::StatusCode;
use livekit_protocol::{
    self as proto, DisconnectReason, JobType, leave_request::Action, participant_info::State,
    signal_response::Message,
};
use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// What the server claims to be: the protocol version decides how clients behave. From 18 on,
/// clients with a single connection expect data channels that are negotiated out of band.
const PROTOCOL: i32 = 16;
const AGENT_PROTOCOL: i32 = 1;
const SERVER_VERSION: &str = "1.9.0";

/// A resumption that is to fail must come within this. LiveKit's limit.
const FAILING_RESUME_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct Room {
    pub info: proto::Room,
    /// By identity.
    pub members: BTreeMap<String, Key>,
    pub empty_timeout: Duration,
    pub departure_timeout: Duration,
    /// In the order in which they were created.
    pub dispatches: Vec<proto::AgentDispatch>,
    /// The jobs of agents that are to join or have joined, by the agents' identities.
    pub agents: HashMap<String, String>,
    created: Instant,
    /// Someone who holds the room open has been in it.
    used: bool,
    /// When someone left last.
    left: Option<Instant>,
}

impl Core {
    /// Admits a participant, or refuses it with LiveKit's status and message.
    pub(super) fn join(&mut self, join: JoinRequest) -> Result<Session, Refusal> {
        if self.stopping {
            let unavailable = StatusCode::SERVICE_UNAVAILABLE;
            return Err(Refusal::new(unavailable, "server is shutting down"));
        }
        let now = Instant::now();
        let present = self.rooms.get(&join.room);
        let present = present.and_then(|r| r.members.get(&join.claims.sub).copied());
        if join.reconnect {
            let known = present.filter(|key| {
                let stay = self.participants.get(key);
                stay.is_some_and(|p| p.info.sid == join.participant_sid)
            });
            return match known {
                Some(key) if self.has_vanished(key) => {
                    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
                    Err(Refusal::new(unavailable, "the participant has vanished"))
                }
                Some(key) => Ok(self.resume(key)),
                None => Ok(self.mismatch()),
            };
        }
        if let Some(key) = present {
            self.remove(key, DisconnectReason::DuplicateIdentity);
        }
        self.create_room(create_request(&join), now);
        let full = self.rooms.get(&join.room).is_some_and(|room| {
            let limit = room.info.max_participants as usize;
            limit > 0 && !join.is_dependent() && self.independent_members(room) >= limit
        });
        if full {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return Err(Refusal::new(
                status,
                "room has exceeded its max participants",
            ));
        }
        Ok(self.admit(join, now))
    }

    /// The websocket is gone; the client may come back on another one.
    pub(super) fn signal_lost(&mut self, key: Key) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        p.signal.lost.get_or_insert_with(Instant::now);
        let alive = [p.publisher, p.subscriber];
        let alive = alive.into_iter().flatten();
        if !alive.into_iter().any(|id| self.media.is_connected(id)) {
            self.remove(key, DisconnectReason::SignalClose);
        }
    }

    /// The participant's media can flow for the first time.
    pub(super) fn activate(&mut self, key: Key) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        if p.is_active() {
            return;
        }
        p.info.state = State::Active as i32;
        let (room, info) = (p.room.clone(), p.info.clone());
        if let Some(room) = self.room_info(&room) {
            self.recorder.active(&room.sid, &info.sid);
            self.notify(&room, &Event::ParticipantJoined(&info));
        }
        self.announce(key, true);
    }

    /// Tells the room of a change in a participant, and itself if `also_self`.
    pub(super) fn announce(&mut self, key: Key, also_self: bool) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        p.refresh();
        let (hidden, room) = (p.hidden(), p.room.clone());
        let participants = vec![p.info.clone()];
        let untold = hidden || self.is_untold(&participants[0].identity);
        let update = Message::Update(proto::ParticipantUpdate { participants });
        match (untold, also_self) {
            (false, true) => self.broadcast(&room, None, update),
            (false, false) => self.broadcast(&room, Some(key), update),
            (true, true) => self.send(key, update),
            (true, false) => {}
        }
        self.tell_overtaken_departures(&room);
    }

    /// Ends a stay and tells the client and the room why.
    pub(super) fn remove(&mut self, key: Key, reason: DisconnectReason) {
        let leave = proto::LeaveRequest {
            reason: reason as i32,
            action: Action::Disconnect as i32,
            ..proto::LeaveRequest::default()
        };
        self.remove_with(key, reason, Some(leave));
    }

    /// Ends a stay that has come into disorder; the client is to join anew.
    pub(super) fn reconnect_fully(&mut self, key: Key) {
        let reason = DisconnectReason::StateMismatch;
        self.remove_with(key, reason, Some(start_over()));
    }

    /// Ends a stay. Without `leave` the client is told nothing: it left itself, or is to find out.
    pub(super) fn remove_with(
        &mut self,
        key: Key,
        reason: DisconnectReason,
        leave: Option<proto::LeaveRequest>,
    ) {
        let Some(mut p) = self.participants.remove(&key) else {
            return;
        };
        tracing::debug!(
            room = p.room,
            identity = p.info.identity,
            reason = reason.as_str_name(),
            "left"
        );
        if let Some(leave) = leave {
            // If the client does not read, it learns from the closed websocket.
            let _ = p.signal.outbox.send(frame(Message::Leave(leave)));
        }
        if p.signal.vanished.is_cancelled() {
            p.signal.cut.cancel();
        }
        let now = Instant::now();
        let mut connections: Vec<_> = [p.publisher, p.subscriber].into_iter().flatten().collect();
        connections.dedup();
        for id in connections {
            self.owners.remove(&id);
            self.media.close(id, now);
        }
        let was_active = p.is_active();
        p.refresh();
        p.info.state = State::Disconnected as i32;
        p.info.disconnect_reason = reason as i32;
        if let Some(room) = self.rooms.get_mut(&p.room) {
            room.members.remove(&p.info.identity);
            room.left = Some(now);
            record_packets(&self.recorder, &room.info.sid, &p);
            self.recorder.left(&room.info.sid, &p.info.sid, reason);
        }
        self.agent_left(&p.room, &p.info.identity);
        for track in &p.tracks {
            self.drop_subscribers(&p.room, track);
        }
        if let Some(room) = self.room_info(&p.room) {
            let hidden = p.hidden();
            self.departed(room, p.info, hidden, was_active, &p.tracks);
        }
    }

    /// Makes the room that `request` wants, if there is none of that name.
    pub(super) fn create_room(&mut self, request: proto::CreateRoomRequest, now: Instant) {
        let name = request.name.clone();
        if self.rooms.contains_key(&name) {
            return;
        }
        let room = Room::new(&request, &self.config, now);
        self.recorder.room_created(&room.info.sid, &name);
        self.rooms.insert(name.clone(), room);
        self.start_dispatches(&name, request.agents);
        if let Some(room) = self.room_info(&name) {
            self.notify(&room, &Event::RoomStarted);
        }
    }

    /// Sends everyone away and ends the room. False if there is none of that name.
    pub(super) fn end_room(&mut self, name: &str, reason: DisconnectReason) -> bool {
        for key in self.members(name) {
            self.remove(key, reason);
        }
        let info = self.room_info(name);
        let Some((room, info)) = self.rooms.remove(name).zip(info) else {
            return false;
        };
        self.recorder.room_ended(&room.info.sid, reason);
        self.notify(&info, &Event::RoomFinished);
        self.tell_overtaken_departures(name);
        true
    }

    pub(super) fn expire_rooms(&mut self, now: Instant) {
        let expired = |room: &Room| {
            let since = match room.left.filter(|_| room.used) {
                Some(left) => (left, room.departure_timeout),
                None => (room.created, room.empty_timeout),
            };
            self.independent_members(room) == 0 && now.duration_since(since.0) >= since.1
        };
        let rooms = self.rooms.iter().filter(|(_, room)| expired(room));
        let names: Vec<_> = rooms.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.end_room(&name, DisconnectReason::RoomClosed);
        }
    }

    pub(super) fn expire_participants(&mut self, now: Instant) {
        let passed = |since: Option<Instant>, limit: Duration| {
            since.is_some_and(|s| now.duration_since(s) >= limit)
        };
        let (mut ended, mut unnoticed, mut refresh) = (Vec::new(), Vec::new(), Vec::new());
        for p in self.participants.values() {
            if passed(p.media_lost, self.config.media_timeout) {
                ended.push((p.key, DisconnectReason::ConnectionTimeout));
            } else if passed(p.signal.lost, self.config.signal_timeout) {
                ended.push((p.key, DisconnectReason::SignalClose));
            } else if !p.is_active() && passed(Some(p.joined), self.config.join_timeout) {
                ended.push((p.key, DisconnectReason::JoinFailure));
            } else if p.signal.lost.is_none() && p.signal.outbox.is_closed() {
                unnoticed.push(p.key);
            } else if passed(Some(p.token_sent), self.config.token_refresh) {
                refresh.push(p.key);
            }
        }
        for (key, reason) in ended {
            self.remove(key, reason);
        }
        for key in unnoticed {
            self.signal_lost(key);
        }
        for key in refresh {
            self.refresh_token(key, now);
        }
    }

    pub(super) fn members(&self, room: &str) -> Vec<Key> {
        let room = self.rooms.get(room);
        room.map_or_else(Vec::new, |r| r.members.values().copied().collect())
    }

    /// The room as others see it now.
    pub(super) fn room_info(&self, name: &str) -> Option<proto::Room> {
        let room = self.rooms.get(name)?;
        let members = room.members.values();
        let publishers = members
            .filter_map(|key| self.participants.get(key))
            .filter(|p| !p.tracks.is_empty());
        Some(proto::Room {
            num_participants: self.independent_members(room) as u32,
            num_publishers: publishers.count() as u32,
            ..room.info.clone()
        })
    }

    pub(super) fn announce_room(&mut self, name: &str) {
        if let Some(room) = self.room_info(name) {
            let update = proto::RoomUpdate { room: Some(room) };
            self.broadcast(name, None, Message::RoomUpdate(update));
        }
    }

    fn admit(&mut self, join: JoinRequest, now: Instant) -> Session {
        let key = self.next_key;
        self.next_key += 1;
        let (signal, session) = self.open_signal(key, key, &join.claims.sub);
        let mut p = Participant::new(key, &join, signal, now);
        let role = if join.single {
            Role::Single
        } else {
            Role::Subscriber
        };
        let primary = self.media.open(role, now);
        self.owners.insert(primary, key);
        p.subscriber = Some(primary);
        p.publisher = Some(primary).filter(|_| join.single);
        let others = self.visible_members(&join.room, None);
        let (info, hidden, identity) = (p.info.clone(), p.hidden(), p.info.identity.clone());
        let record = ParticipantRecord {
            sid: info.sid.clone(),
            identity: identity.clone(),
            kind: p.kind().as_str_name(),
            hidden,
            single_peer_connection: join.single,
            ..ParticipantRecord::default()
        };
        let (fast_publish, dependent) = (p.permission().can_publish, p.is_dependent());
        self.participants.insert(key, p);
        if let Some(room) = self.rooms.get_mut(&join.room) {
            room.members.insert(identity, key);
            room.used |= !dependent;
            self.recorder.joined(&room.info.sid, record);
        }
        self.launch_for(key, JobType::JtParticipant);
        let response = proto::JoinResponse {
            room: self.room_info(&join.room),
            participant: Some(info),
            other_participants: others,
            server_version: SERVER_VERSION.into(),
            subscriber_primary: !join.single,
            ping_timeout: 15,
            ping_interval: 5,
            server_info: Some(server_info()),
            enabled_publish_codecs: codecs(),
            fast_publish,
            ..proto::JoinResponse::default()
        };
        self.send(key, Message::Join(response));
        self.refresh_token(key, now);
        self.announce(key, false);
        if !hidden {
            self.announce_room(&join.room);
        }
        for track in join.add_tracks {
            self.add_track(key, track);
        }
        self.subscribe_to_all(key);
        if let Some(offer) = join.offer {
            self.offer(key, &offer);
        }
        self.negotiate(key);
        self.apply_faults(key);
        session
    }

    /// The two ends of a way to a participant's websocket.
    fn open_signal(&self, key: Key, generation: u64, identity: &str) -> (Signal, Session) {
        let (outbox, inbox) = outbox();
        let (cut, vanished) = (self.killed.child_token(), CancellationToken::new());
        let session = Session {
            participant: key,
            generation,
            inbox,
            identity: identity.to_owned(),
            cut: cut.clone(),
            vanished: vanished.clone(),
        };
        let signal = Signal {
            generation,
            outbox,
            cut,
            vanished,
            lost: None,
        };
        (signal, session)
    }

    /// Goes on with a stay on a new websocket.
    fn resume(&mut self, key: Key) -> Session {
        let generation = self.next_key;
        self.next_key += 1;
        let identity = self.participants.get(&key).map(|p| p.info.identity.clone());
        let (signal, session) = self.open_signal(key, generation, &identity.unwrap_or_default());
        let Some(p) = self.participants.get_mut(&key) else {
            return session;
        };
        // Dropping the old outbox closes the old websocket; its end is no news any more.
        p.signal = signal;
        let asked = p.failing_resume.take();
        let asked = asked.filter(|(_, at)| at.elapsed() < FAILING_RESUME_LIMIT);
        let failing = asked.map(|(how, _)| how);
        if failing == Some(FailingResume::Unanswered) {
            p.signal.hang_up();
        }
        let (name, last_message_seq) = (p.room.clone(), p.last_sequence);
        let (sid, subscriber) = (p.info.sid.clone(), p.subscriber);
        let response = proto::ReconnectResponse {
            server_info: Some(server_info()),
            last_message_seq,
            ..proto::ReconnectResponse::default()
        };
        self.send(key, Message::Reconnect(response));
        let participants = self.visible_members(&name, Some(key));
        self.send(
            key,
            Message::Update(proto::ParticipantUpdate { participants }),
        );
        if let Some(room) = self.room_info(&name) {
            self.recorder.resumed(&room.sid, &sid);
            let update = proto::RoomUpdate { room: Some(room) };
            self.send(key, Message::RoomUpdate(update));
        }
        self.refresh_token(key, Instant::now());
        if let Some(demand) = subscriber.and_then(|id| self.media.restart(id)) {
            self.demand(key, demand);
        }
        if failing == Some(FailingResume::Answered)
            && let Some(p) = self.participants.get_mut(&key)
        {
            p.signal.hang_up();
        }
        self.apply_faults(key);
        session
    }

    fn has_vanished(&self, key: Key) -> bool {
        let p = self.participants.get(&key);
        p.is_some_and(|p| p.signal.vanished.is_cancelled())
    }

    /// Answers a client that wants to go on with a stay that has ended: it must join anew.
    fn mismatch(&self) -> Session {
        let (signal, session) = self.open_signal(0, 0, "");
        let _ = signal.outbox.send(frame(Message::Leave(start_over())));
        session
    }

    /// Gives the client a token for the rest of its stay, on the terms that hold now.
    pub(super) fn refresh_token(&mut self, key: Key, now: Instant) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        p.token_sent = now;
        if let Some(token) = self.keys.refresh(&p.claims, &p.info) {
            self.send(key, Message::RefreshToken(token));
        }
    }

    /// Everyone in the room that may be seen, and `me` even if not.
    fn visible_members(&self, room: &str, me: Option<Key>) -> Vec<proto::ParticipantInfo> {
        let members = self.members(room).into_iter();
        members
            .filter_map(|key| self.participants.get(&key))
            .filter(|p| {
                let unseen = self.faults.borrow().unseen.includes(&p.info.identity);
                !(p.hidden() || unseen) || Some(p.key) == me
            })
            .map(|p| p.info.clone())
            .collect()
    }

    fn independent_members(&self, room: &Room) -> usize {
        let members = room.members.values();
        members
            .filter_map(|key| self.participants.get(key))
            .filter(|p| !p.is_dependent())
            .count()
    }
}

impl Room {
    fn new(request: &proto::CreateRoomRequest, config: &super::Config, now: Instant) -> Self {
        let timeout = |seconds: u32, default: Duration| match seconds {
            0 => default,
            s => Duration::from_secs(s.into()),
        };
        let empty_timeout = timeout(request.empty_timeout, config.empty_timeout);
        let departure_timeout = timeout(request.departure_timeout, config.departure_timeout);
        // LiveKit counts whole seconds; shorter defaults are shown as 1.
        let seconds = |d: Duration| d.as_secs_f64().ceil() as u32;
        let created = unix_ms() as i64;
        Self {
            info: proto::Room {
                sid: new_sid("RM_"),
                name: request.name.clone(),
                empty_timeout: seconds(empty_timeout),
                departure_timeout: seconds(departure_timeout),
                max_participants: request.max_participants,
                creation_time: created / 1_000,
                creation_time_ms: created,
                enabled_codecs: codecs(),
                metadata: request.metadata.clone(),
                ..proto::Room::default()
            },
            members: BTreeMap::new(),
            empty_timeout,
            departure_timeout,
            dispatches: Vec::new(),
            agents: HashMap::new(),
            created: now,
            used: false,
            left: None,
        }
    }
}

fn create_request(join: &JoinRequest) -> proto::CreateRoomRequest {
    let config = join.claims.room_config.clone().unwrap_or_default();
    proto::CreateRoomRequest {
        name: join.room.clone(),
        empty_timeout: config.empty_timeout,
        departure_timeout: config.departure_timeout,
        max_participants: config.max_participants,
        metadata: config.metadata,
        agents: config.agents,
        ..proto::CreateRoomRequest::default()
    }
}

fn start_over() -> proto::LeaveRequest {
    proto::LeaveRequest {
        // For clients older than `action`.
        can_reconnect: true,
        reason: DisconnectReason::StateMismatch as i32,
        action: Action::Reconnect as i32,
        ..proto::LeaveRequest::default()
    }
}

pub(super) fn server_info() -> proto::ServerInfo {
    proto::ServerInfo {
        version: SERVER_VERSION.into(),
        protocol: PROTOCOL,
        agent_protocol: AGENT_PROTOCOL,
        node_id: "ND_rehearsal".into(),
        ..proto::ServerInfo::default()
    }
}

fn codecs() -> Vec<proto::Codec> {
    let mime = "audio/opus".into();
    let fmtp_line = String::new();
    vec![proto::Codec { mime, fmtp_line }]
}
