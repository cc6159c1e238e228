//! The way round the SDK's close leak (livekit/rust-sdks#1378); delete it once that is fixed.
//!
//! A remote participant, its publications and their handlers hold each other in `livekit` 0.10.
//! The SDK breaks these cycles when a participant leaves, but not when the room is closed, so each
//! room closed with participants in it keeps about 90 KB for ever. Nothing outside the SDK reaches
//! the cycles, except the server's word that a participant left. This module says it in the
//! server's place: it wraps the SDK's websocket client and, just before the end of a room, hands
//! the SDK a `ParticipantUpdate` (`livekit_rtc.proto`) by which all remote participants depart.
//!
//! What it must not know: sessions, streams, the daemon. It knows a `Room` and the frames of its
//! signalling connection, and it changes neither unless the room is being left.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use livekit::participant::{ParticipantKind, ParticipantKindDetail};
use livekit::prelude::{ConnectionState, RemoteParticipant, RemoteTrackPublication};
use livekit::{Room, RoomEvent};
use livekit_net::{Header, TransportError, WsClient, WsConnectResult, WsConnection};
use livekit_protocol as proto;
use prost::Message as _;
use proto::leave_request::Action;
use proto::participant_info::{Kind, KindDetail, State};
use proto::signal_response::Message;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::signalling;

/// The longest that a room's end waits for the SDK to take the departures in. It takes a few
/// milliseconds, except while the SDK is reconnecting, when its back-off (0.3 s) comes first.
const DEPARTURE_LIMIT: Duration = Duration::from_secs(2);

/// The longest that a room's end waits for subscriptions under way. The SDK completes one within
/// microseconds of its media section, and tells nothing about those that have none yet.
const SUBSCRIPTION_LIMIT: Duration = Duration::from_millis(5);

/// The longest that the server may take to close the connection after we have. A socket that ends
/// before with something unread is reset, and a Leave that the network has lost is not sent again.
const GOODBYE_LIMIT: Duration = Duration::from_millis(100);

/// Frames that wait to be handed to the SDK: two updates and a Leave when the server ends the
/// room, a mark and two updates when we do.
const QUEUE_LIMIT: usize = 6;

/// How [`leave`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The SDK has closed the room; nothing of it is running any more.
    Closed,
    /// The room had ended before, by the server or by an earlier close. If the SDK's own close
    /// is still under way, the room's event stream ends when it is over.
    AlreadyClosed,
    /// The deadline came first. The close goes on in a task of its own.
    StillClosing,
    /// The SDK panicked while closing, or the runtime is being shut down.
    Failed,
}

/// Puts the wrapper in the place of the SDK's websocket client, for the whole process. To be
/// called before the first `Room::connect`; later calls do nothing.
pub fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        if livekit_net::has_ws_client() {
            warn!("another websocket client is registered: closed rooms will leak memory");
        } else if let Some(native) = livekit_net::ws_client() {
            let inner = Arc::new(signalling::Client { native });
            livekit_net::set_ws_client(Arc::new(Client { inner }));
        } else {
            warn!("livekit-net has no websocket client to wrap: closed rooms will leak memory");
        }
    });
}

/// Tells the wrapper whose connection it is carrying, so that the participants of `room` depart
/// before a Leave of the server (room deleted, own participant removed, server shut down) ends
/// it. To be called once, right after `Room::connect`. Holds the room weakly.
///
/// The application then sees a `ParticipantDisconnected` for each remote participant, with the
/// Leave's reason, before `Disconnected`. Someone whose arrival the SDK is still working on when
/// the Leave comes (a millisecond) does not depart, nor does anyone if the server answers an
/// attempt to resume with that Leave: such a room still leaks.
pub fn attach(room: &Arc<Room>) {
    if let Some(link) = link_of(room) {
        *locked(&link.room) = Arc::downgrade(room);
    }
}

/// Leaves `room`: lets all remote participants depart, as the SDK sees it, and closes the room.
///
/// Until the close, the application sees `ActiveSpeakersChanged` with nobody, then a
/// `ParticipantDisconnected` (client initiated) for each remote participant, and nothing of the
/// server any more. While a room is being left, a new connection with its very token is refused.
///
/// Returns when the room is closed, or at `deadline`. Without the wrapper (see [`install`]) this
/// is `Room::close` and a warning, once.
///
/// # Cancel safety
/// The work is done in a task of its own, so dropping this future stops nothing, least of all
/// `Room::close`, which can't be resumed once cancelled. Calling it again is harmless.
pub async fn leave(room: &Arc<Room>, deadline: Instant) -> Left {
    #[allow(
        clippy::disallowed_methods,
        reason = "owned by nobody, so that dropping who waits stops nothing"
    )]
    let closing = tokio::spawn(depart_and_close(Arc::clone(room), deadline));
    match tokio::time::timeout_at(deadline.into(), closing).await {
        Ok(Ok(left)) => left,
        Ok(Err(_panic)) => Left::Failed,
        Err(_elapsed) => Left::StillClosing,
    }
}

async fn depart_and_close(room: Arc<Room>, deadline: Instant) -> Left {
    // A disconnected room takes nothing in any more, and its token may be another room's by now.
    let link = match room.connection_state() {
        ConnectionState::Disconnected => None,
        _ => link_of(&room).filter(|link| link.belongs_to(&room)),
    };
    if let Some(link) = &link {
        let now = Instant::now();
        let limit = (deadline.saturating_duration_since(now) / 2).min(DEPARTURE_LIMIT);
        let departed = tokio::time::timeout(limit, depart(&room, link)).await;
        if departed.is_err() {
            let left_behind = room.remote_participants().len();
            warn!(
                room = %room.name(),
                left_behind,
                "the SDK did not let all participants go: this room will leak memory"
            );
        }
    }
    let closed = room.close().await;
    if let Some(link) = &link {
        link.settle();
        locked(&REGISTRY).remove(link);
    }
    match closed {
        Ok(()) => Left::Closed,
        Err(_) => Left::AlreadyClosed, // the one error it has
    }
}

/// Ends when the SDK has let all remote participants go, whether by our word or because it was
/// reconnecting, in which case it drops them itself once its attempt has failed.
async fn depart(room: &Room, link: &Link) {
    // Before anything that has to be seen happening.
    let mut events = room.subscribe();
    link.leaving.cancel();

    // The SDK handles messages in order: once the mark is through, it knows of everyone that the
    // server told it of, and nobody can come after. While reconnecting, it may lose the mark.
    if room.connection_state() == ConnectionState::Connected && link.hand_in(vec![mark()]) {
        while let Some(event) = events.recv().await {
            if is_mark(&event) || matches!(event, RoomEvent::Reconnecting) {
                break;
            }
        }
    }

    let participants = room.remote_participants();
    let all_subscribed = async {
        while participants
            .values()
            .any(|p| subscribing(p).next().is_some())
        {
            if events.recv().await.is_none() {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(SUBSCRIPTION_LIMIT, all_subscribed).await;
    let mut awaited: HashSet<_> = participants.values().map(RemoteParticipant::sid).collect();
    let reason = proto::DisconnectReason::ClientInitiated;
    link.hand_in(link.farewell(participants.into_values(), reason));
    while !awaited.is_empty() {
        match events.recv().await {
            Some(RoomEvent::ParticipantDisconnected(participant)) => {
                awaited.remove(&participant.sid());
            }
            Some(_) => {}
            None => return,
        }
    }
}

/// The link of the connection that `room` was joined over. Warns, once, if the SDK makes its
/// connections without the wrapper.
fn link_of(room: &Room) -> Option<Arc<Link>> {
    static WARNING: Once = Once::new();
    let token = TokenId::of(&room.token());
    let (link, in_use) = {
        let registry = locked(&REGISTRY);
        (registry.find(token), registry.in_use)
    };
    if !in_use {
        WARNING.call_once(|| {
            warn!(
                "the SDK does not use the wrapped websocket client (two versions of livekit-net, \
                 or a join before it was installed): closed rooms will leak memory"
            );
        });
    }
    link
}

/// The wrapper of the SDK's websocket client.
struct Client {
    inner: Arc<dyn WsClient>,
}

#[async_trait::async_trait]
impl WsClient for Client {
    async fn connect(
        &self,
        url: String,
        headers: Vec<Header>,
        timeout_ms: u64,
    ) -> Result<WsConnectResult, TransportError> {
        let Some(token) = bearer(&headers).map(TokenId::of) else {
            return self.inner.connect(url, headers, timeout_ms).await;
        };
        // A link in use means a further connection of a room: resume or full reconnect.
        let known = locked(&REGISTRY).find(token);
        let link = known.filter(|link| link.is_in_use()).unwrap_or_default();
        let connected = tokio::select! {
            biased;
            () = link.leaving.cancelled() => return Err(TransportError::Closed),
            connected = self.inner.connect(url, headers, timeout_ms) => connected?,
        };
        let connection = Arc::new(Connection {
            inner: connected.connection,
            gate: Mutex::default(),
            handed_in: Notify::new(),
            link: Arc::clone(&link),
        });
        *locked(&link.connection) = Arc::downgrade(&connection);
        locked(&REGISTRY).insert(token, link);
        Ok(WsConnectResult { connection })
    }
}

/// The wrapper of one signalling websocket. Frames pass unchanged and undecoded, but for a look
/// at their first bytes.
struct Connection {
    inner: Arc<dyn WsConnection>,
    gate: Mutex<Gate>,
    handed_in: Notify,
    link: Arc<Link>,
}

#[async_trait::async_trait]
impl WsConnection for Connection {
    async fn send(&self, frame: Vec<u8>) -> Result<(), TransportError> {
        self.inner.send(frame).await
    }

    /// Cancel safe, as far as the inner `recv` is.
    async fn recv(&self) -> Result<Option<Vec<u8>>, TransportError> {
        loop {
            let opening = {
                let mut gate = locked(&self.gate);
                if let Some(frame) = gate.queue.pop_front() {
                    return Ok(Some(frame));
                }
                gate.phase == Phase::Opening
            };
            let received = tokio::select! {
                biased;
                () = self.handed_in.notified() => continue,
                // The SDK would ignore what is handed in now: its attempt to connect has to fail.
                () = self.link.leaving.cancelled(), if opening => Ok(None),
                received = self.inner.recv() => received,
            };
            match received {
                Ok(Some(frame)) => {
                    if let Some(frame) = self.pass(frame) {
                        return Ok(Some(frame));
                    }
                }
                end => match locked(&self.gate).end() {
                    Some(frame) => return Ok(Some(frame)),
                    None => return end,
                },
            }
        }
    }

    async fn close(&self) {
        // The SDK has stopped reading before it closes.
        locked(&self.gate).phase = Phase::Ended;
        self.inner.close().await;
        // A socket that is given up with something unread is reset, and then the server may lose
        // what it has not read yet itself: our Leave. So read on until it has closed, too.
        let rest = async { while let Ok(Some(_)) = self.inner.recv().await {} };
        let _ = tokio::time::timeout(GOODBYE_LIMIT, rest).await;
    }
}

impl Connection {
    /// What the SDK gets for a frame of the server: nothing while leaving, and participants who
    /// depart ahead of a final Leave.
    fn pass(&self, frame: Vec<u8>) -> Option<Vec<u8>> {
        if locked(&self.gate).phase >= Phase::Leaving {
            return None;
        }
        match FrameKind::of(&frame) {
            FrameKind::Other => Some(frame),
            FrameKind::Opening => {
                let mut gate = locked(&self.gate);
                gate.phase = gate.phase.max(Phase::Open);
                Some(frame)
            }
            FrameKind::RefreshToken => {
                if let Some(token) = refreshed_token(&frame) {
                    locked(&REGISTRY).insert(TokenId::of(&token), Arc::clone(&self.link));
                }
                Some(frame)
            }
            FrameKind::Leave => {
                let Some(reason) = final_leave(&frame) else {
                    return Some(frame);
                };
                let room = locked(&self.link.room).upgrade();
                let participants = room.map(|room| room.remote_participants());
                let updates = self
                    .link
                    .farewell(participants.unwrap_or_default().into_values(), reason);
                let mut gate = locked(&self.gate);
                gate.hand_in(updates);
                gate.hand_in([frame]);
                gate.queue.pop_front()
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.settle();
        if !self.link.is_in_use() {
            locked(&REGISTRY).remove(&self.link);
        }
    }
}

/// What the SDK may still receive over one connection.
#[derive(Default)]
struct Gate {
    phase: Phase,
    /// Frames of our own making, ahead of anything that the server sends.
    queue: VecDeque<Vec<u8>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// The server has not answered yet; until then the SDK ignores everything else.
    #[default]
    Opening,
    Open,
    /// The server is no longer heard: it would bring participants back.
    Leaving,
    /// The SDK has been told of the connection's end and asks for nothing more.
    Ended,
}

impl Gate {
    /// Closes the gate and queues `frames` behind it.
    fn hand_in(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) {
        self.phase = Phase::Leaving;
        let free = QUEUE_LIMIT - self.queue.len();
        self.queue.extend(frames.into_iter().take(free));
    }

    /// The connection has ended; what was handed in comes before the SDK learns of it.
    fn end(&mut self) -> Option<Vec<u8>> {
        let frame = self.queue.pop_front();
        if frame.is_none() {
            self.phase = Phase::Ended;
        }
        frame
    }
}

/// One room's signalling, over all the connections that carry it one after the other.
#[derive(Default)]
struct Link {
    room: Mutex<Weak<Room>>,
    connection: Mutex<Weak<Connection>>,
    leaving: CancellationToken,
    /// What the registry has it under.
    tokens: Mutex<VecDeque<TokenId>>,
    /// Publications that were being subscribed to when their participants departed.
    unsettled: Mutex<Vec<RemoteTrackPublication>>,
}

impl Link {
    /// Whether its room or a connection exists. Unlike [`Link::is_in_use`] it upgrades nothing,
    /// so it can't become the last owner of a room while the registry is locked.
    fn is_held(&self) -> bool {
        locked(&self.room).strong_count() > 0 || locked(&self.connection).strong_count() > 0
    }

    /// Whether an attached room that is not over uses it.
    fn is_in_use(&self) -> bool {
        let room = locked(&self.room).upgrade();
        room.is_some_and(|room| room.connection_state() != ConnectionState::Disconnected)
    }

    fn belongs_to(&self, room: &Room) -> bool {
        let attached = locked(&self.room).upgrade();
        attached.is_none_or(|attached| std::ptr::eq(Arc::as_ptr(&attached), room))
    }

    /// Hands frames to the SDK and nothing of the server any more. False if it has no connection
    /// that it listens to.
    fn hand_in(&self, frames: Vec<Vec<u8>>) -> bool {
        let Some(connection) = locked(&self.connection).upgrade() else {
            return false;
        };
        let mut gate = locked(&connection.gate);
        if matches!(gate.phase, Phase::Opening | Phase::Ended) {
            return false;
        }
        gate.hand_in(frames);
        drop(gate);
        connection.handed_in.notify_one();
        true
    }

    /// The frames that make the SDK see all of `participants` leave.
    fn farewell(
        &self,
        participants: impl Iterator<Item = RemoteParticipant>,
        reason: proto::DisconnectReason,
    ) -> Vec<Vec<u8>> {
        let mut unsettled = Vec::new();
        let infos = participants
            .map(|participant| {
                unsettled.extend(subscribing(&participant));
                info(&participant)
            })
            .collect();
        let frames = updates(infos, !unsettled.is_empty(), reason);
        locked(&self.unsettled).extend(unsettled);
        frames
    }

    /// Ends the subscriptions that came about after the departure: such a track and its
    /// publication hold each other, and nothing else knows of them any more.
    fn settle(&self) {
        let unsettled = std::mem::take(&mut *locked(&self.unsettled));
        // The SDK may spawn a task to tell the server.
        if tokio::runtime::Handle::try_current().is_ok() {
            for publication in unsettled
                .iter()
                .filter(|publication| publication.is_subscribed())
            {
                publication.set_subscribed(false);
            }
        }
    }
}

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);

/// The links by the token that their room uses: the one thing that a `Room` and its websocket
/// both show.
#[derive(Default)]
struct Registry {
    links: HashMap<TokenId, Arc<Link>>,
    /// Whether the SDK ever made a connection through the wrapper.
    in_use: bool,
}

impl Registry {
    /// A refreshed token reaches the wrapper a little before the room; its predecessor is found
    /// as well.
    const TOKENS_PER_LINK: usize = 2;

    fn find(&self, token: TokenId) -> Option<Arc<Link>> {
        self.links.get(&token).cloned()
    }

    fn insert(&mut self, token: TokenId, link: Arc<Link>) {
        // Rooms that were dropped without being left stay until the map would grow: looked for
        // only then, they cost next to nothing on average.
        if self.links.len() == self.links.capacity() {
            self.links.retain(|_, link| link.is_held());
        }
        let outdated = {
            let mut tokens = locked(&link.tokens);
            if !tokens.contains(&token) {
                tokens.push_back(token);
            }
            (tokens.len() > Self::TOKENS_PER_LINK).then(|| tokens.pop_front())
        };
        if let Some(outdated) = outdated.flatten() {
            self.remove_token(outdated, &link);
        }
        self.links.insert(token, link);
        self.in_use = true;
    }

    fn remove(&mut self, link: &Arc<Link>) {
        let tokens = std::mem::take(&mut *locked(&link.tokens));
        for token in tokens {
            self.remove_token(token, link);
        }
    }

    /// Unless the token is another link's by now.
    fn remove_token(&mut self, token: TokenId, link: &Arc<Link>) {
        if self
            .links
            .get(&token)
            .is_some_and(|known| Arc::ptr_eq(known, link))
        {
            self.links.remove(&token);
        }
    }
}

/// Stands for an access token without keeping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct TokenId(u64);

impl TokenId {
    fn of(token: &str) -> Self {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self(KEY.hash_one(token))
    }
}

/// The kinds of frame that matter here.
#[derive(Debug, PartialEq, Eq)]
enum FrameKind {
    /// The answer that opens a connection: JoinResponse or ReconnectResponse.
    Opening,
    Leave,
    RefreshToken,
    Other,
}

impl FrameKind {
    /// By the key (field number, wire type) of the one field that an encoded `SignalResponse` has.
    fn of(frame: &[u8]) -> Self {
        match frame {
            [0x0a, ..] | [0x9a, 0x01, ..] => Self::Opening, // fields 1 and 19
            [0x42, ..] => Self::Leave,                      // field 8
            [0x82, 0x01, ..] => Self::RefreshToken,         // field 16
            _ => Self::Other,
        }
    }
}

fn decode(frame: &[u8]) -> Option<Message> {
    proto::SignalResponse::decode(frame).ok()?.message
}

/// The reason of a Leave after which the SDK closes the room; none if it is to reconnect.
fn final_leave(frame: &[u8]) -> Option<proto::DisconnectReason> {
    match decode(frame)? {
        Message::Leave(leave) if leave.action() == Action::Disconnect => Some(leave.reason()),
        _ => None,
    }
}

fn refreshed_token(frame: &[u8]) -> Option<String> {
    match decode(frame)? {
        Message::RefreshToken(token) => Some(token),
        _ => None,
    }
}

fn bearer(headers: &[Header]) -> Option<&str> {
    let authorization = headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("authorization"))?;
    authorization.value.strip_prefix("Bearer ")
}

/// The publications that are wanted but not there yet.
fn subscribing(participant: &RemoteParticipant) -> impl Iterator<Item = RemoteTrackPublication> {
    let publications = participant.track_publications().into_values();
    publications.filter(|publication| publication.is_desired() && !publication.is_subscribed())
}

/// `subscribing`: a subscription that is under way would publish its track anew just after the
/// departure, beyond reach. So the tracks are taken away first: it finds none any more, or what it
/// publishes goes with the participant.
fn updates(
    mut infos: Vec<proto::ParticipantInfo>,
    subscribing: bool,
    reason: proto::DisconnectReason,
) -> Vec<Vec<u8>> {
    if infos.is_empty() {
        return Vec::new();
    }
    let mut frames = Vec::with_capacity(2);
    if subscribing {
        frames.push(update(infos.clone()));
    }
    for info in &mut infos {
        info.set_state(State::Disconnected);
        info.set_disconnect_reason(reason);
    }
    frames.push(update(infos));
    frames
}

fn update(participants: Vec<proto::ParticipantInfo>) -> Vec<u8> {
    encode(Message::Update(proto::ParticipantUpdate { participants }))
}

/// A message with an event of its own that changes next to nothing: nobody's voice has changed.
fn mark() -> Vec<u8> {
    encode(Message::SpeakersChanged(proto::SpeakersChanged::default()))
}

/// Or a message of the server that looks the same, if the SDK was still working on one.
fn is_mark(event: &RoomEvent) -> bool {
    matches!(event, RoomEvent::ActiveSpeakersChanged { speakers } if speakers.is_empty())
}

fn encode(message: Message) -> Vec<u8> {
    let response = proto::SignalResponse {
        message: Some(message),
    };
    response.encode_to_vec()
}

/// The participant as the SDK knows it, without tracks. Whatever was left out here, the
/// application would be told to have changed.
fn info(participant: &RemoteParticipant) -> proto::ParticipantInfo {
    let kind_details = participant.kind_details();
    let capabilities = participant.capabilities();
    proto::ParticipantInfo {
        sid: participant.sid().into(),
        identity: participant.identity().into(),
        name: participant.name(),
        state: State::Active.into(),
        metadata: participant.metadata(),
        attributes: participant.attributes(),
        joined_at_ms: participant.joined_at(),
        permission: participant.permission(),
        kind: kind(participant.kind()).into(),
        kind_details: kind_details
            .into_iter()
            .map(|detail| kind_detail(detail).into())
            .collect(),
        client_protocol: participant.client_protocol(),
        capabilities: capabilities.into_iter().map(Into::into).collect(),
        ..Default::default()
    }
}

fn kind(kind: ParticipantKind) -> Kind {
    match kind {
        ParticipantKind::Standard => Kind::Standard,
        ParticipantKind::Ingress => Kind::Ingress,
        ParticipantKind::Egress => Kind::Egress,
        ParticipantKind::Sip => Kind::Sip,
        ParticipantKind::Agent => Kind::Agent,
        ParticipantKind::Connector => Kind::Connector,
        ParticipantKind::Bridge => Kind::Bridge,
    }
}

fn kind_detail(detail: ParticipantKindDetail) -> KindDetail {
    match detail {
        ParticipantKindDetail::CloudAgent => KindDetail::CloudAgent,
        ParticipantKindDetail::Forwarded => KindDetail::Forwarded,
        ParticipantKindDetail::ConnectorWhatsapp => KindDetail::ConnectorWhatsapp,
        ParticipantKindDetail::ConnectorTwilio => KindDetail::ConnectorTwilio,
        ParticipantKindDetail::BridgeRtsp => KindDetail::BridgeRtsp,
        ParticipantKindDetail::Simulation => KindDetail::Simulation,
    }
}

/// A panic elsewhere leaves this module's state whole: it is never half changed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const GENEROUS: Duration = Duration::from_secs(30);

    #[test]
    fn frames_are_told_apart_by_their_first_bytes() {
        let kinds = [
            (Message::Join(Default::default()), FrameKind::Opening),
            (Message::Reconnect(Default::default()), FrameKind::Opening),
            (Message::Leave(Default::default()), FrameKind::Leave),
            (
                Message::RefreshToken("token".into()),
                FrameKind::RefreshToken,
            ),
            (Message::Answer(Default::default()), FrameKind::Other),
            (Message::Update(Default::default()), FrameKind::Other),
            (Message::RoomMoved(Default::default()), FrameKind::Other),
            (Message::PongResp(Default::default()), FrameKind::Other),
        ];
        for (message, kind) in kinds {
            assert_eq!(FrameKind::of(&encode(message.clone())), kind, "{message:?}");
        }
        for frame in [&[][..], &[0x82], &[0x9a], &[0xff; 3]] {
            assert_eq!(FrameKind::of(frame), FrameKind::Other);
        }
    }

    #[test]
    fn only_a_leave_that_ends_the_room_is_final() {
        let removed = proto::DisconnectReason::ParticipantRemoved;
        assert_eq!(final_leave(&leave_frame(Action::Disconnect)), Some(removed));
        assert_eq!(final_leave(&leave_frame(Action::Resume)), None);
        assert_eq!(final_leave(&leave_frame(Action::Reconnect)), None);
        assert_eq!(final_leave(&[0x42, 0xff]), None);
        assert_eq!(final_leave(&mark()), None);
    }

    #[test]
    fn everybody_departs_for_the_same_reason_and_as_they_were() {
        let reason = proto::DisconnectReason::RoomDeleted;
        let frames = updates(vec![known("PA_1"), known("PA_2")], false, reason);
        let [departures] = &frames[..] else {
            panic!("one update expected, got {}", frames.len());
        };
        let departed = participants_of(departures);
        assert_eq!(departed.len(), 2);
        for (departed, sid) in departed.into_iter().zip(["PA_1", "PA_2"]) {
            assert_eq!(departed.state(), State::Disconnected);
            assert_eq!(departed.disconnect_reason(), reason);
            let unchanged = proto::ParticipantInfo {
                state: State::Active.into(),
                disconnect_reason: 0,
                ..departed
            };
            assert_eq!(unchanged, known(sid));
        }
    }

    #[test]
    fn tracks_go_first_while_a_subscription_is_under_way() {
        let reason = proto::DisconnectReason::ClientInitiated;
        let frames = updates(vec![known("PA_1")], true, reason);
        let [without_tracks, departures] = &frames[..] else {
            panic!("two updates expected, got {}", frames.len());
        };
        assert_eq!(participants_of(without_tracks), [known("PA_1")]);
        assert_eq!(participants_of(departures)[0].state(), State::Disconnected);
    }

    #[test]
    fn nobody_departs_from_an_empty_room() {
        assert!(updates(Vec::new(), true, proto::DisconnectReason::RoomDeleted).is_empty());
    }

    #[tokio::test]
    async fn frames_pass_unchanged_uncopied_and_in_order() {
        let (server, connection) = connect(Link::default());
        let frames = [
            encode(Message::Join(Default::default())),
            update(vec![known("PA_1")]),
            leave_frame(Action::Resume),
            leave_frame(Action::Reconnect),
            vec![0x42, 0xff],
            vec![0x82, 0x01, 0xff],
        ];
        for frame in frames {
            let expected = (frame.clone(), frame.as_ptr());
            server.frames.send(frame).unwrap();
            let passed = received(&connection).await.unwrap();
            assert_eq!((passed.clone(), passed.as_ptr()), expected);
        }
        drop(server);
        assert_eq!(received(&connection).await, None);
    }

    #[tokio::test]
    async fn what_is_handed_in_wakes_the_reader_and_silences_the_server() {
        let (server, connection) = opened().await;
        let reader = tokio::spawn({
            let connection = Arc::clone(&connection);
            async move { received(&connection).await }
        });
        server.awaited_by_the_reader().await;
        let goodbye = update(vec![known("PA_1")]);
        assert!(connection.link.hand_in(vec![mark(), goodbye.clone()]));
        assert_eq!(reader.await.unwrap(), Some(mark()));

        server.frames.send(update(vec![known("PA_2")])).unwrap();
        server.frames.send(leave_frame(Action::Disconnect)).unwrap();
        drop(server);
        assert_eq!(received(&connection).await, Some(goodbye));
        assert_eq!(received(&connection).await, None);
        let nobody_reads = !connection.link.hand_in(vec![mark()]);
        assert!(nobody_reads);
    }

    #[test]
    fn what_was_handed_in_comes_before_the_end() {
        let mut gate = Gate::default();
        gate.hand_in([mark()]);
        assert_eq!(gate.end(), Some(mark()));
        assert_eq!(gate.phase, Phase::Leaving);
        assert_eq!(gate.end(), None);
        assert_eq!(gate.phase, Phase::Ended);
    }

    #[tokio::test]
    async fn a_final_leave_is_the_last_frame() {
        let (server, connection) = opened().await;
        let leave = leave_frame(Action::Disconnect);
        server.frames.send(leave.clone()).unwrap();
        server.frames.send(update(vec![known("PA_1")])).unwrap();
        drop(server);
        assert_eq!(received(&connection).await, Some(leave));
        assert_eq!(received(&connection).await, None);
    }

    #[tokio::test]
    async fn a_connection_that_is_still_opening_ends_when_its_room_is_left() {
        let (server, connection) = connect(Link::default());
        assert!(!connection.link.hand_in(vec![mark()]), "not heard yet");
        connection.link.leaving.cancel();
        assert_eq!(received(&connection).await, None);
        drop(server);
    }

    #[tokio::test]
    async fn an_open_connection_outlives_the_decision_to_leave() {
        let (server, connection) = opened().await;
        connection.link.leaving.cancel();
        let frame = update(vec![known("PA_1")]);
        server.frames.send(frame.clone()).unwrap();
        assert_eq!(received(&connection).await, Some(frame));
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut gate = Gate::default();
        gate.hand_in(std::iter::repeat_with(mark).take(QUEUE_LIMIT + 1));
        gate.hand_in([mark()]);
        assert_eq!(gate.queue.len(), QUEUE_LIMIT);
    }

    #[test]
    fn a_link_is_found_by_its_last_two_tokens() {
        let mut registry = Registry::default();
        let (_server, connection) = connect(Link::default());
        let link = &connection.link;
        for token in ["first", "second", "third"] {
            registry.insert(TokenId::of(token), Arc::clone(link));
        }
        assert!(registry.find(TokenId::of("first")).is_none());
        for token in ["second", "third"] {
            let found = registry.find(TokenId::of(token)).unwrap();
            assert!(Arc::ptr_eq(&found, link));
        }
        registry.remove(link);
        assert!(registry.links.is_empty());
    }

    #[test]
    fn a_token_used_again_belongs_to_the_later_link() {
        let mut registry = Registry::default();
        let [earlier, later] = [(); 2].map(|()| Arc::new(Link::default()));
        let token = TokenId::of("token");
        registry.insert(token, Arc::clone(&earlier));
        registry.insert(token, Arc::clone(&later));
        registry.remove(&earlier);
        assert!(Arc::ptr_eq(&registry.find(token).unwrap(), &later));
    }

    #[test]
    fn links_without_room_and_connection_do_not_pile_up() {
        let mut registry = Registry::default();
        let (_server, connection) = connect(Link::default());
        let token = TokenId::of("in use");
        registry.insert(token, Arc::clone(&connection.link));
        for number in 0..1000 {
            registry.insert(TokenId(number), Arc::default());
        }
        assert!(registry.links.len() < 10);
        assert!(registry.find(token).is_some());
    }

    #[test]
    fn the_token_is_taken_from_the_authorization_header() {
        let header = |name: &str, value: &str| Header {
            name: name.into(),
            value: value.into(),
        };
        let headers = [
            header("X", "Bearer no"),
            header("authorization", "Bearer yes"),
        ];
        assert_eq!(bearer(&headers), Some("yes"));
        assert_eq!(bearer(&headers[..1]), None);
        assert_eq!(bearer(&[header("Authorization", "Basic no")]), None);
    }

    /// The server's end of a connection.
    struct Server {
        frames: mpsc::UnboundedSender<Vec<u8>>,
        reads: Arc<Notify>,
    }

    impl Server {
        /// Waits until the connection has nothing of its own to hand out.
        async fn awaited_by_the_reader(&self) {
            tokio::time::timeout(GENEROUS, self.reads.notified())
                .await
                .expect("the connection should read on");
        }
    }

    struct Socket {
        frames: tokio::sync::Mutex<mpsc::UnboundedReceiver<Vec<u8>>>,
        reads: Arc<Notify>,
    }

    #[async_trait::async_trait]
    impl WsConnection for Socket {
        async fn send(&self, _frame: Vec<u8>) -> Result<(), TransportError> {
            Ok(())
        }

        async fn recv(&self) -> Result<Option<Vec<u8>>, TransportError> {
            let mut frames = self.frames.lock().await;
            if frames.is_empty() && !frames.is_closed() {
                self.reads.notify_one();
            }
            Ok(frames.recv().await)
        }

        async fn close(&self) {}
    }

    fn connect(link: Link) -> (Server, Arc<Connection>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let reads = Arc::new(Notify::new());
        let socket = Socket {
            frames: receiver.into(),
            reads: Arc::clone(&reads),
        };
        let connection = Arc::new(Connection {
            inner: Arc::new(socket),
            gate: Mutex::default(),
            handed_in: Notify::new(),
            link: Arc::new(link),
        });
        *locked(&connection.link.connection) = Arc::downgrade(&connection);
        let server = Server {
            frames: sender,
            reads,
        };
        (server, connection)
    }

    async fn opened() -> (Server, Arc<Connection>) {
        let (server, connection) = connect(Link::default());
        let join = encode(Message::Join(Default::default()));
        server.frames.send(join.clone()).unwrap();
        assert_eq!(received(&connection).await, Some(join));
        (server, connection)
    }

    async fn received(connection: &Connection) -> Option<Vec<u8>> {
        tokio::time::timeout(GENEROUS, connection.recv())
            .await
            .expect("a frame or the end should come")
            .expect("the socket does not fail")
    }

    fn known(sid: &str) -> proto::ParticipantInfo {
        proto::ParticipantInfo {
            sid: sid.into(),
            identity: format!("identity of {sid}"),
            name: "name".into(),
            state: State::Active.into(),
            metadata: "metadata".into(),
            attributes: HashMap::from([("key".into(), "value".into())]),
            kind: Kind::Agent.into(),
            ..Default::default()
        }
    }

    fn participants_of(frame: &[u8]) -> Vec<proto::ParticipantInfo> {
        match decode(frame) {
            Some(Message::Update(update)) => update.participants,
            other => panic!("an update expected, got {other:?}"),
        }
    }

    fn leave_frame(action: Action) -> Vec<u8> {
        encode(Message::Leave(proto::LeaveRequest {
            action: action.into(),
            reason: proto::DisconnectReason::ParticipantRemoved.into(),
            ..Default::default()
        }))
    }
}
