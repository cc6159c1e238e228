//! One participant: who it is, what it may do, what it publishes, and the way to its websocket.

use super::{
    auth::JoinRequest,
    connection::{ConnectionId, Source},
    speakers::{self, Meter},
    witness::{Recorder, Spell, unix_ms},
};
use bytes::Bytes;
use livekit_protocol::{
    self as proto, TrackSource, participant_info::Kind, participant_info::State,
    signal_response::Message,
};
use livekit_token::{Claims, VideoGrants};
use prost::Message as _;
use rand::{Rng, distr::Alphanumeric};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Signalling messages that may wait for a client to read them.
const MAX_WAITING: usize = 1_024;
/// ... and their size.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// Identifies one stay of a participant within the process.
pub(super) type Key = u64;

pub(super) struct Participant {
    pub key: Key,
    pub room: String,
    pub info: proto::ParticipantInfo,
    /// As in the token; the permissions in `info` are what counts.
    pub claims: Claims,
    pub auto_subscribe: bool,
    /// Tracks that the client has unsubscribed from itself.
    pub declined: BTreeSet<String>,
    pub publisher: Option<ConnectionId>,
    pub subscriber: Option<ConnectionId>,
    pub tracks: Vec<Track>,
    /// Has had a track in this stay.
    pub has_published: bool,
    /// Announced by AddTrack, not yet seen in an offer.
    pub pending: Vec<PendingTrack>,
    /// Who may subscribe, if the participant has restricted it.
    pub subscription_permission: Option<proto::SubscriptionPermission>,
    pub signal: Signal,
    /// How the client has asked for its next resumption to fail, and when.
    pub failing_resume: Option<(FailingResume, Instant)>,
    /// The newest reliable data packet received, for a client that resumes.
    pub last_sequence: u32,
    pub meter: Meter,
    /// The level last told to others; None when not speaking.
    pub speaking: Option<f32>,
    pub joined: Instant,
    /// Since when media has had no path.
    pub media_lost: Option<Instant>,
    pub token_sent: Instant,
}

pub(super) struct Track {
    pub info: proto::TrackInfo,
    pub source: Source,
    /// The client's own name for it.
    pub cid: String,
    pub packets: u64,
    /// The newest spell of speech, and when its last packet came.
    pub spell: Option<(Spell, Instant)>,
}

pub(super) struct PendingTrack {
    pub cid: String,
    pub info: proto::TrackInfo,
}

/// The participant's end of the websocket, which can be lost and replaced.
pub(super) struct Signal {
    /// Tells a replaced websocket's events from those of its successor.
    pub generation: u64,
    pub outbox: Outbox,
    /// Cuts the websocket without a word.
    pub cut: CancellationToken,
    /// From then on nothing comes through the websocket, and nothing ends it but `cut`.
    pub vanished: CancellationToken,
    pub lost: Option<Instant>,
}

/// When the new websocket of a resumption is lost.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FailingResume {
    /// At once.
    Unanswered,
    /// After the messages that a resumption brings.
    Answered,
}

/// Messages for a websocket task; dropping it closes the websocket once they are sent.
pub(super) struct Outbox {
    sender: mpsc::Sender<Bytes>,
    waiting: Arc<AtomicUsize>,
}

/// The websocket task's end of an [`Outbox`].
pub(super) struct Inbox {
    receiver: mpsc::Receiver<Bytes>,
    waiting: Arc<AtomicUsize>,
}

/// The client does not read its websocket.
#[derive(Debug)]
pub(super) struct Unread;

pub(super) fn outbox() -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let waiting = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox {
        sender,
        waiting: waiting.clone(),
    };
    (outbox, Inbox { receiver, waiting })
}

impl Track {
    /// A packet of speech has come; `whose` are room and participant.
    pub fn speech(&mut self, recorder: &Recorder, whose: (&str, &str), now: Instant) {
        let at = recorder.now();
        if let Some((spell, last)) = &mut self.spell {
            let goes_on = now.saturating_duration_since(*last) < speakers::WINDOW;
            *last = now;
            if goes_on {
                spell.packets += 1;
                spell.until = at;
                return;
            }
            recorder.packets(whose.0, whose.1, &self.info.sid, self.packets, Some(spell));
        }
        let spell = Spell {
            from: at,
            until: at,
            packets: 1,
        };
        recorder.spell_begun(whose.0, whose.1, &self.info.sid, spell);
        self.spell = Some((spell, now));
    }
}

impl Signal {
    /// Closes the websocket once what waits for it has been sent.
    pub fn hang_up(&mut self) {
        self.outbox = outbox().0;
    }
}

impl Outbox {
    pub fn send(&self, frame: Bytes) -> Result<(), Unread> {
        let size = frame.len();
        if self.waiting.load(Ordering::Relaxed) + size > MAX_WAITING_BYTES {
            return Err(Unread);
        }
        self.waiting.fetch_add(size, Ordering::Relaxed);
        match self.sender.try_send(frame) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(Unread),
            // A closed websocket is noticed and handled elsewhere.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }

    /// The websocket task has ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl Inbox {
    /// The next message; None when the server wants the websocket closed. Cancel safe.
    pub async fn recv(&mut self) -> Option<Bytes> {
        let frame = self.receiver.recv().await?;
        self.waiting.fetch_sub(frame.len(), Ordering::Relaxed);
        Some(frame)
    }
}

/// A signalling message as it goes over the wire.
pub(super) fn frame(message: Message) -> Bytes {
    let message = Some(message);
    proto::SignalResponse { message }.encode_to_vec().into()
}

/// A random id in LiveKit's form, such as `PA_` and 12 characters.
pub(super) fn new_sid(prefix: &str) -> String {
    let random = rand::rng().sample_iter(Alphanumeric).take(12);
    prefix.chars().chain(random.map(char::from)).collect()
}

impl Participant {
    pub fn new(key: Key, join: &JoinRequest, signal: Signal, now: Instant) -> Self {
        let claims = join.claims.clone();
        let joined_at_ms = unix_ms() as i64;
        let info = proto::ParticipantInfo {
            sid: new_sid("PA_"),
            identity: claims.sub.clone(),
            name: claims.name.clone(),
            state: State::Joined as i32,
            metadata: claims.metadata.clone(),
            attributes: claims.attributes.clone(),
            joined_at: joined_at_ms / 1_000,
            joined_at_ms,
            version: 1,
            permission: Some(permission(&claims.video)),
            kind: kind(&claims) as i32,
            client_protocol: join.client_protocol,
            capabilities: join.capabilities.clone(),
            ..proto::ParticipantInfo::default()
        };
        Self {
            key,
            room: join.room.clone(),
            info,
            claims,
            auto_subscribe: join.auto_subscribe,
            declined: BTreeSet::new(),
            publisher: None,
            subscriber: None,
            tracks: Vec::new(),
            has_published: false,
            pending: Vec::new(),
            subscription_permission: None,
            signal,
            failing_resume: None,
            last_sequence: 0,
            meter: Meter::default(),
            speaking: None,
            joined: now,
            media_lost: None,
            token_sent: now,
        }
    }

    pub fn permission(&self) -> proto::ParticipantPermission {
        self.info.permission.clone().unwrap_or_default()
    }

    pub fn hidden(&self) -> bool {
        self.info.permission.as_ref().is_some_and(|p| p.hidden)
    }

    /// Agents and recorders depend on others: they neither hold a room open nor count towards
    /// its limit.
    pub fn is_dependent(&self) -> bool {
        is_dependent(&self.claims)
    }

    pub fn kind(&self) -> Kind {
        self.info.kind()
    }

    /// Whether it may publish from this source; a list of sources in the token restricts it.
    pub fn can_publish(&self, source: i32) -> bool {
        let permission = self.permission();
        let sources = &permission.can_publish_sources;
        permission.can_publish && (sources.is_empty() || sources.contains(&source))
    }

    /// Whether `subscriber` may have this participant's track.
    pub fn lets(&self, subscriber: &proto::ParticipantInfo, track: &str) -> bool {
        let Some(restriction) = &self.subscription_permission else {
            return true;
        };
        restriction.all_participants
            || restriction.track_permissions.iter().any(|p| {
                let meant = (!p.participant_sid.is_empty() && p.participant_sid == subscriber.sid)
                    || (!p.participant_identity.is_empty()
                        && p.participant_identity == subscriber.identity);
                meant && (p.all_tracks || p.track_sids.iter().any(|t| t == track))
            })
    }

    /// Whether it gets the track without asking for it.
    pub fn wants(&self, track: &str) -> bool {
        self.auto_subscribe && !self.declined.contains(track)
    }

    /// Brings `info` up to date with the tracks; call it before telling others.
    pub fn refresh(&mut self) {
        self.info.version += 1;
        self.info.tracks = self.tracks.iter().map(|t| t.info.clone()).collect();
        self.info.is_publisher = !self.tracks.is_empty();
    }

    pub fn is_active(&self) -> bool {
        self.info.state == State::Active as i32
    }
}

pub(super) fn is_dependent(claims: &Claims) -> bool {
    matches!(kind(claims), Kind::Agent | Kind::Egress)
        || claims.video.agent
        || claims.video.recorder
}

fn kind(claims: &Claims) -> Kind {
    Kind::from_str_name(&claims.kind.to_ascii_uppercase()).unwrap_or(Kind::Standard)
}

fn permission(grants: &VideoGrants) -> proto::ParticipantPermission {
    let sources = grants.can_publish_sources.iter();
    #[allow(deprecated)]
    proto::ParticipantPermission {
        can_subscribe: grants.can_subscribe(),
        can_publish: grants.can_publish(),
        can_publish_data: grants.can_publish_data(),
        can_publish_sources: sources
            .filter_map(|s| TrackSource::from_str_name(&s.to_ascii_uppercase()))
            .map(|s| s as i32)
            .collect(),
        hidden: grants.hidden,
        recorder: grants.recorder,
        agent: grants.agent,
        can_update_metadata: grants.can_update_own_metadata(),
        ..proto::ParticipantPermission::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_is_bounded_in_number_and_size() {
        let (outbox, _inbox) = outbox();
        let small = Bytes::from_static(b"x");
        let taken = (0..10_000).take_while(|_| outbox.send(small.clone()).is_ok());
        assert_eq!(taken.count(), MAX_WAITING);

        let (outbox, _inbox) = super::outbox();
        let big = Bytes::from(vec![0; 1 << 20]);
        let taken = (0..10_000).take_while(|_| outbox.send(big.clone()).is_ok());
        assert_eq!(taken.count(), MAX_WAITING_BYTES >> 20);
    }

    #[tokio::test]
    async fn reading_makes_room_and_dropping_closes() {
        let (outbox, mut inbox) = outbox();
        let big = Bytes::from(vec![0; MAX_WAITING_BYTES]);
        assert!(outbox.send(big.clone()).is_ok());
        assert!(outbox.send(big.clone()).is_err());
        assert!(inbox.recv().await.is_some());
        assert!(outbox.send(big).is_ok());
        drop(outbox);
        assert!(inbox.recv().await.is_some());
        assert!(inbox.recv().await.is_none());
    }

    #[test]
    fn sids_have_their_prefix_and_differ() {
        let (a, b) = (new_sid("PA_"), new_sid("PA_"));
        assert!(a.starts_with("PA_") && a.len() == 15 && a != b);
    }
}
