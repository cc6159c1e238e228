//! One room: a task that owns `livekit::Room`, turns its events into sessions and closes them all
//! before it leaves.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use livekit::{
    DisconnectReason,
    data_stream::api::SendTextOptions,
    e2ee::EncryptionType,
    id::ParticipantSid,
    participant,
    prelude::*,
    webrtc::encoded_audio::{self, EncodedAudioStream},
};
use livekit_protocol::{
    ParticipantInfo, TrackInfo, TrackType, encryption, participant_info::State,
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{Id, JoinError, JoinSet},
    time::MissedTickBehavior,
};
use tokio_util::task::TaskTracker;

use super::{
    api::{ApiError, RoomApi},
    claims::{Audience, Ticket},
    departure::{self, Left},
    reconcile::{Listed, Listing, Out, Reconciler},
    selection::Selection,
};
use crate::{
    board::RoomCard,
    close::{CloseOrder, order},
    domain::{CloseReason, Transcript},
    failure::{Cause, Trouble},
    requests::{Answer, Exceptions, Refused, Request, Scope},
    session::{self, Command, Context, Packet, Packets, Track},
    store::Finished,
};

/// Packets of a track that wait for the session: 5 s of audio.
const MAX_WAITING_PACKETS: usize = 250;
/// Tracks that come and go faster than a session looks.
const MAX_COMMANDS: usize = 64;
/// Transcripts that wait for the room's data channel.
const MAX_TRANSCRIPTS: usize = 1024;
/// Leaving gets a moment of its own when sessions have used up the deadline.
const LEAVE_AT_LEAST: Duration = Duration::from_millis(300);
/// A session that panics so often within that time is given up until fewer of its panics are that
/// recent.
const MAX_PANICS: usize = 5;
const PANICS_WITHIN: Duration = Duration::from_secs(60);

/// After a failure to tell the room something.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// Between two lists of a room at the least, however much it is said to have news: an update that the
/// network holds up must not look like one that is lost.
const LIST_PAUSE: Duration = Duration::from_millis(500);
/// How often subscriptions and sessions are compared with what they should be.
const REVIEW_EVERY: Duration = Duration::from_secs(1);
/// Reviews that a subscription may take before it is asked for anew, doubled each time it helps
/// nothing, so often.
const REVIEWS_TO_SUBSCRIBE: u32 = 5;
const MAX_DOUBLINGS: u32 = 3;
/// Reviews in a row that do not find a participant whom the room was joined for.
const REVIEWS_TO_MISS: u32 = 3;

/// What a room needs from the daemon.
pub struct RoomContext {
    pub api: Arc<RoomApi>,
    pub url: String,
    /// Of this daemon.
    pub identity: String,
    pub hidden: bool,
    /// Owns joins and leaves, which must never be cancelled half-way.
    pub owned: TaskTracker,
    /// As it is configured now.
    pub terms: watch::Receiver<Arc<Terms>>,
}

/// How a room is entered, and what holds for it alone.
pub struct Entry {
    /// As whom.
    pub identity: String,
    /// By a job's; else a token is minted.
    pub ticket: Option<Ticket>,
    pub house: watch::Receiver<House>,
    /// Somebody hints that there is news: the room is compared with the server's list at once.
    pub look: Arc<Notify>,
    pub missing: mpsc::Sender<Missing>,
}

/// Somebody whom a room was joined for and who is not there.
#[derive(Debug)]
pub struct Missing {
    pub room: String,
    pub identity: String,
}

/// What holds for one room alone, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct House {
    /// Of those whom the terms select.
    pub audience: Audience,
    pub transcripts: ToRoom,
}

/// What may change while a room is open; the next review follows it.
pub struct Terms {
    pub selection: Selection,
    /// How often a room is compared with the server's list of it, if ever.
    pub reconcile_every: Option<Duration>,
}

impl RoomContext {
    fn terms(&self) -> Arc<Terms> {
        self.terms.borrow().clone()
    }
}

/// In which forms transcripts go to the room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToRoom {
    /// Text streams.
    pub text: bool,
    /// `Transcription` packets, for clients older than text streams.
    pub packets: bool,
}

/// The end of a room's supervisor.
#[derive(Debug)]
pub struct Ended {
    pub how: RoomEnd,
    /// When that was known; after it everything was closed.
    pub at: Instant,
    /// The room's SID, if it was joined.
    pub sid: Option<String>,
    /// Participants, by SID, for whose sake the room was joined anew; not to be done twice.
    pub tried: HashSet<String>,
}

/// How a room ended, and so whether it may be joined again.
#[derive(Debug)]
pub enum RoomEnd {
    /// We were ordered out, or the room is over.
    Closed,
    /// The server put us out of a room that may live on: not to be joined again.
    PutOut(String),
    /// The connection failed or was lost; worth another try.
    Failed(String),
    /// It is to be joined anew at once: the SDK has lost track of who is there, or the server removed
    /// us for a job that the room outlives.
    Stale,
}

impl fmt::Display for RoomEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::PutOut(why) => write!(f, "put out ({why})"),
            Self::Failed(why) => write!(f, "connection failed ({why})"),
            Self::Stale => f.write_str("joined anew"),
        }
    }
}

/// What is asked of a room while it runs, and what is kept in mind of that beyond.
pub struct Asked {
    pub requests: mpsc::Receiver<Request>,
    pub exceptions: Exceptions,
}

/// Joins `room` and stays until it ends or `orders` say so. Returns when every session of it is
/// closed and the room is left. `tried` is from an earlier [`Ended`] of the room.
pub async fn supervise(
    room_context: Arc<RoomContext>,
    context: Context,
    mut entry: Entry,
    tried: HashSet<String>,
    asked: Asked,
    mut orders: watch::Receiver<Option<CloseOrder>>,
) -> Ended {
    let name = context.room.clone();
    let card = context.registry.board().room(&name, &entry.identity);
    let (room, events) = match join(&room_context, &name, &mut entry, &mut orders).await {
        Joined::Yes(room, events) => (room, events),
        Joined::Ordered => return Ended::unjoined(RoomEnd::Closed, tried),
        Joined::Failed(said) => return Ended::unjoined(RoomEnd::Failed(said), tried),
    };
    departure::attach(&room);
    tracing::info!(room = name, "joined");
    card.joined(room.maybe_sid().map(|sid| sid.to_string()));
    let supervisor = Supervisor::new(room_context, context, entry, room, card, tried, asked);
    supervisor.run(events, orders).await
}

impl Ended {
    fn unjoined(how: RoomEnd, tried: HashSet<String>) -> Self {
        let (at, sid) = (Instant::now(), None);
        Self {
            how,
            at,
            sid,
            tried,
        }
    }
}

enum Joined {
    Yes(Arc<Room>, mpsc::UnboundedReceiver<RoomEvent>),
    Ordered,
    Failed(String),
}

/// Joins in a task of its own: a `Room::connect` that is dropped half-way leaks its connection, so
/// one that nobody waits for any more is completed and then closed.
async fn join(
    context: &RoomContext,
    name: &str,
    entry: &mut Entry,
    orders: &mut watch::Receiver<Option<CloseOrder>>,
) -> Joined {
    let (url, token) = match entry.ticket.take() {
        Some(Ticket { url, token }) => (url.unwrap_or_else(|| context.url.clone()), token),
        None => {
            let (us, daemon) = (&entry.identity, &context.identity);
            match context.api.join_token(name, us, daemon, context.hidden) {
                Ok(token) => (context.url.clone(), token),
                Err(error) => return Joined::Failed(error.to_string()),
            }
        }
    };
    let (sender, mut joined) = oneshot::channel();
    context.owned.spawn(async move {
        let mut options = RoomOptions::default();
        // Subscribed one by one: audio of people only.
        options.auto_subscribe = false;
        // The next poll tries again.
        options.join_retries = 0;
        if let Err(Ok((room, _))) = sender.send(Room::connect(&url, &token, options).await) {
            let _ = room.close().await;
        }
    });
    tokio::select! {
        result = &mut joined => match result {
            Ok(Ok((room, events))) => Joined::Yes(Arc::new(room), events),
            Ok(Err(error)) => Joined::Failed(error.to_string()),
            Err(_) => Joined::Failed("the join ended without a result".into()),
        },
        _ = orders.wait_for(Option::is_some) => {
            // It may have been completed in this very moment.
            joined.close();
            if let Ok(Ok((room, _))) = joined.try_recv() {
                context.owned.spawn(async move { room.close().await });
            }
            Joined::Ordered
        }
    }
}

struct Supervisor {
    room_context: Arc<RoomContext>,
    context: Arc<Context>,
    entry: Entry,
    room: Arc<Room>,
    card: RoomCard,
    asked: Asked,
    sessions: JoinSet<()>,
    running: HashMap<Id, Running>,
    /// When sessions of participants panicked, by SID.
    panics: HashMap<ParticipantSid, VecDeque<Instant>>,
    publisher: JoinSet<()>,
    /// Tells the room how transcription is; ends with this.
    _telling: JoinSet<()>,
    /// The request for the server's list of the room: one at a time.
    lists: JoinSet<Result<Listing, ApiError>>,
    list_failing: bool,
    reconciler: Reconciler,
    /// Participants who have left by the server's list, though not by the SDK's.
    absent: HashSet<ParticipantSid>,
    tried: HashSet<String>,
    subscribing: HashMap<TrackSid, Subscribing>,
    /// Reviews without those for whom the room was joined, by identity.
    missing: HashMap<String, u32>,
}

/// A subscription that has not come about yet.
#[derive(Default)]
struct Subscribing {
    reviews: u32,
    asked_anew: u32,
}

struct Running {
    participant: ParticipantSid,
    identity: String,
    begun: Instant,
    tracks: HashSet<TrackSid>,
    commands: mpsc::Sender<Command>,
    orders: watch::Sender<Option<CloseOrder>>,
}

impl Supervisor {
    fn new(
        room_context: Arc<RoomContext>,
        mut context: Context,
        entry: Entry,
        room: Arc<Room>,
        card: RoomCard,
        tried: HashSet<String>,
        asked: Asked,
    ) -> Self {
        let mut publisher = JoinSet::new();
        let (to_room, transcripts) = mpsc::channel(MAX_TRANSCRIPTS);
        context.to_room = Some(to_room);
        publisher.spawn(publish(room.clone(), entry.house.clone(), transcripts));
        let mut telling = JoinSet::new();
        telling.spawn(tell(room.clone(), context.stt().gate.trouble()));
        let mut new = Self {
            room_context,
            context: Arc::new(context),
            entry,
            room,
            card,
            asked,
            sessions: JoinSet::new(),
            running: HashMap::new(),
            panics: HashMap::new(),
            publisher,
            _telling: telling,
            lists: JoinSet::new(),
            list_failing: false,
            reconciler: Reconciler::default(),
            absent: HashSet::new(),
            tried,
            subscribing: HashMap::new(),
            missing: HashMap::new(),
        };
        new.ask_for_list();
        new
    }

    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<RoomEvent>,
        mut orders: watch::Receiver<Option<CloseOrder>>,
    ) -> Ended {
        let mut review = tokio::time::interval(REVIEW_EVERY);
        review.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (first, how) = loop {
            tokio::select! {
                biased;
                new = orders.wait_for(Option::is_some) => {
                    let new = new.ok().and_then(|new| new.clone());
                    let new = new.unwrap_or_else(|| self.context.within_grace(CloseReason::OwnerLost));
                    break (new, RoomEnd::Closed);
                }
                Some(ended) = self.sessions.join_next_with_id(), if !self.sessions.is_empty() => {
                    if let Some(participant) = self.session_ended(ended) {
                        self.restart(participant);
                    }
                }
                event = events.recv() => match event {
                    Some(RoomEvent::Disconnected { reason }) => {
                        let said = CloseReason::RoomEnded(snake_case(reason));
                        break (self.context.within_grace(said), RoomEnd::of(reason));
                    }
                    Some(event) => self.on_event(event),
                    None => {
                        let lost = "events ended".to_owned();
                        let said = CloseReason::RoomEnded(lost.clone());
                        break (self.context.within_grace(said), RoomEnd::Failed(lost));
                    }
                },
                Some(list) = self.lists.join_next(), if !self.lists.is_empty() => {
                    self.ask_for_list();
                    if let Some((said, how)) = self.reconcile(list) {
                        break (self.context.within_grace(CloseReason::RoomEnded(said.to_owned())), how);
                    }
                }
                Some(request) = self.asked.requests.recv() => self.on_request(request),
                _ = review.tick() => self.review_all(),
                Ok(()) = self.entry.house.changed() => self.review_all(),
            }
        };
        let at = Instant::now();
        self.card.closing(first.reason.to_string());
        tracing::info!(room = self.context.room, reason = %first.reason, "closing");
        let sid = self.room.maybe_sid().map(|sid| sid.to_string());
        let tried = std::mem::take(&mut self.tried);
        self.close(first, orders).await;
        Ended {
            how,
            at,
            sid,
            tried,
        }
    }

    fn on_event(&mut self, event: RoomEvent) {
        match event {
            RoomEvent::Connected {
                participants_with_tracks,
            } => {
                for (participant, publications) in participants_with_tracks {
                    for publication in publications {
                        self.published(&participant, &publication);
                    }
                }
            }
            RoomEvent::TrackPublished {
                publication,
                participant,
            } => {
                self.published(&participant, &publication);
            }
            RoomEvent::TrackSubscribed {
                track: RemoteTrack::Audio(track),
                publication,
                participant,
                // The participant may have changed while the subscription was under way.
            } if self.fits(&participant) && self.wants(&publication) => {
                self.subscribed(&participant, publication, track);
            }
            RoomEvent::TrackUnsubscribed {
                track, participant, ..
            } => {
                self.end_track(&participant, track.sid(), CloseReason::TrackEnded);
            }
            RoomEvent::TrackUnpublished {
                publication,
                participant,
            } => {
                self.end_track(&participant, publication.sid(), CloseReason::TrackEnded);
            }
            RoomEvent::ParticipantAttributesChanged {
                participant: Participant::Remote(participant),
                ..
            } => self.review(&participant),
            RoomEvent::ParticipantDisconnected(participant) => {
                self.panics.remove(&participant.sid());
                self.absent.remove(&participant.sid());
                let why = match participant.disconnect_reason() {
                    // The SDK's, for everybody when the connection had to be made anew, and for who
                    // was displaced by another of the same identity.
                    participant::DisconnectReason::UnknownReason => "no reason given".into(),
                    reason => {
                        self.asked.exceptions.forget(participant.sid().as_str());
                        snake_case(reason)
                    }
                };
                self.close_session(&participant.sid(), CloseReason::ParticipantLeft(why));
            }
            RoomEvent::TrackSubscriptionFailed {
                participant,
                error,
                track_sid,
            } => {
                let (room, participant) = (&self.context.room, participant.identity());
                tracing::error!(room, %participant, track = %track_sid, %error, "cannot subscribe");
            }
            RoomEvent::Reconnecting => tracing::warn!(room = self.context.room, "reconnecting"),
            RoomEvent::Reconnected => {
                tracing::info!(room = self.context.room, "reconnected");
                self.subscribe_again();
            }
            _ => {}
        }
    }

    fn fits(&self, participant: &RemoteParticipant) -> bool {
        let attributes = participant.attributes();
        let identity = participant.identity();
        let selection = &self.room_context.terms().selection;
        !self.absent.contains(&participant.sid())
            && !self.asked.exceptions.keep_out(participant.sid().as_str())
            && self
                .entry
                .house
                .borrow()
                .audience
                .includes(identity.as_str())
            && selection.participant(participant.kind(), identity.as_str(), &attributes)
    }

    fn wants(&self, publication: &RemoteTrackPublication) -> bool {
        publication.kind() == TrackKind::Audio
            && self.room_context.terms().selection.source(publication.source())
            && !self.asked.exceptions.is_closed(publication.sid().as_str())
            // Without the key it is noise, and noise is billed like speech.
            && publication.encryption_type() == EncryptionType::None
    }

    /// Subscribes to what people say; not to video, and not to what is not to be transcribed.
    fn published(&self, participant: &RemoteParticipant, publication: &RemoteTrackPublication) {
        if !self.fits(participant) {
            return;
        }
        if self.wants(publication) {
            return publication.set_subscribed(true);
        }
        let terms = self.room_context.terms();
        let selected = terms.selection.source(publication.source());
        let encrypted = publication.encryption_type() != EncryptionType::None;
        if publication.kind() == TrackKind::Audio && selected && encrypted {
            let (room, participant) = (&self.context.room, participant.identity());
            tracing::error!(room, %participant, track = %publication.sid(),
                "the track is end-to-end encrypted and cannot be transcribed");
        }
    }

    fn on_request(&mut self, request: Request) {
        let (answer, result): (Answer, _) = match request {
            Request::Close(scope, answer) => (answer, self.close_requested(&scope)),
            Request::Reopen(scope, answer) => (answer, self.reopen(&scope)),
            Request::Drain(answer) => {
                let present = self.room.remote_participants().into_values();
                let present = present.map(|participant| participant.sid().to_string());
                self.asked.exceptions.drain(present);
                (answer, Ok(()))
            }
            // The daemon's own.
            Request::Undrain(answer) => (answer, Ok(())),
        };
        // Who asked may have left.
        let _ = answer.send(result);
    }

    fn present(&self, scope: &Scope) -> Result<Vec<RemoteParticipant>, Refused> {
        let wanted = scope.identity().ok_or(Refused::NoSuchParticipant)?;
        let there = self.room.remote_participants().into_values();
        let there: Vec<_> = there
            .filter(|participant| participant.identity().as_str() == wanted)
            .collect();
        match there.is_empty() {
            true => Err(Refused::NoSuchParticipant),
            false => Ok(there),
        }
    }

    /// Closes somebody's session, or a track of it, on the path that everything takes. They stay
    /// closed: a new SID is another participant, or another track.
    fn close_requested(&mut self, scope: &Scope) -> Result<(), Refused> {
        let participants = self.present(scope)?;
        let Some(wanted) = scope.track() else {
            for participant in participants {
                let sid = participant.sid();
                self.asked.exceptions.close(sid.as_str(), sid.as_str())?;
                self.close_session(&sid, CloseReason::Requested);
                self.review(&participant);
            }
            return Ok(());
        };
        for participant in participants {
            let mut publications = participant.track_publications().into_values();
            if let Some(publication) = publications.find(|p| p.sid().as_str() == wanted) {
                let of = participant.sid();
                self.asked.exceptions.close(of.as_str(), wanted)?;
                self.end_track(&participant, publication.sid(), CloseReason::Requested);
                publication.set_subscribed(false);
                return Ok(());
            }
        }
        Err(Refused::NoSuchTrack)
    }

    fn reopen(&mut self, scope: &Scope) -> Result<(), Refused> {
        for participant in self.present(scope)? {
            self.asked.exceptions.forget(participant.sid().as_str());
            self.review(&participant);
        }
        Ok(())
    }

    /// Brings subscriptions and sessions in line with who is to be transcribed, and with what the
    /// SDK has.
    fn review(&mut self, participant: &RemoteParticipant) {
        let publications = participant.track_publications().into_values();
        if !self.fits(participant) {
            // The order first: the end of a subscription is a weaker reason.
            self.close_session(&participant.sid(), CloseReason::Deselected);
            for publication in publications.filter(RemoteTrackPublication::is_desired) {
                publication.set_subscribed(false);
            }
            return;
        }
        for publication in publications {
            if !self.wants(&publication) {
                if publication.is_desired() {
                    self.end_track(participant, publication.sid(), CloseReason::Deselected);
                    publication.set_subscribed(false);
                }
                continue;
            }
            match publication.track() {
                Some(RemoteTrack::Audio(track)) => self.subscribed(participant, publication, track),
                _ if publication.is_desired() => {}
                _ => publication.set_subscribed(true),
            }
        }
    }

    /// Events tell of most of it; of a kind that changes, a session that was given up for a while
    /// or a subscription that was lost, none does.
    fn review_all(&mut self) {
        if self.room.connection_state() != ConnectionState::Connected {
            return;
        }
        // It was turned off, and is on again.
        if self.lists.is_empty() {
            self.ask_for_list();
        }
        let mut waiting = HashMap::new();
        for participant in self.room.remote_participants().into_values() {
            self.review(&participant);
            if !self.fits(&participant) {
                continue;
            }
            for publication in participant.track_publications().into_values() {
                let here = publication.is_subscribed() || !publication.is_allowed();
                if here || !self.wants(&publication) {
                    continue;
                }
                let sid = publication.sid();
                let mut subscribing = self.subscribing.remove(&sid).unwrap_or_default();
                subscribing.reviews += 1;
                let doublings = subscribing.asked_anew.min(MAX_DOUBLINGS);
                if subscribing.reviews > REVIEWS_TO_SUBSCRIBE << doublings {
                    let (room, participant) = (&self.context.room, participant.identity());
                    tracing::warn!(room, %participant, track = %sid,
                        "the subscription does not come about: asking anew");
                    // And again with the next review: the SDK overlooks a track that goes and
                    // comes back between two negotiations.
                    publication.set_subscribed(false);
                    subscribing = Subscribing {
                        reviews: 0,
                        asked_anew: subscribing.asked_anew + 1,
                    };
                }
                waiting.insert(sid, subscribing);
            }
        }
        self.subscribing = waiting;
        self.review_audience();
    }

    /// Says who of those for whom the room was joined is not there, until nobody is told any more.
    fn review_audience(&mut self) {
        let house = self.entry.house.borrow_and_update().clone();
        let Audience::Only(audience) = house.audience else {
            return self.missing.clear();
        };
        let there = self.room.remote_participants().into_values();
        let there: HashSet<String> = there.map(|p| p.identity().to_string()).collect();
        self.missing
            .retain(|identity, _| audience.contains(identity) && !there.contains(identity));
        for identity in audience
            .into_iter()
            .filter(|identity| !there.contains(identity))
        {
            let reviews = self.missing.entry(identity.clone()).or_default();
            *reviews += 1;
            if *reviews >= REVIEWS_TO_MISS {
                // Else the next review says it.
                let room = self.context.room.clone();
                let missing = Missing { room, identity };
                let _ = self.entry.missing.try_send(missing);
            }
        }
    }

    /// After a full reconnect the SDK tells of publications before it has a session that requests
    /// could go to: those made then are lost.
    fn subscribe_again(&self) {
        for participant in self.room.remote_participants().into_values() {
            if !self.fits(&participant) {
                continue;
            }
            for publication in participant.track_publications().into_values() {
                if self.wants(&publication) && !publication.is_subscribed() {
                    publication.set_subscribed(true);
                }
            }
        }
    }

    fn subscribed(
        &mut self,
        participant: &RemoteParticipant,
        publication: RemoteTrackPublication,
        track: RemoteAudioTrack,
    ) {
        let sid = track.sid();
        let packets = Box::new(move || packets(&track));
        let muted = Box::new(move || publication.is_muted());
        let (speaker, terms) = (participant.clone(), self.room_context.terms.clone());
        let priority = Box::new(move || {
            let attributes = speaker.attributes();
            terms.borrow().selection.priority(&attributes)
        });
        let command = Command::Add(Track {
            sid: sid.to_string(),
            packets,
            muted,
            priority,
        });
        let Some(running) = self.session(&participant.sid()) else {
            return self.start_session(participant, sid, command);
        };
        // Found by a review before its event was read.
        if running.tracks.contains(&sid) {
            return;
        }
        if running.commands.try_send(command).is_ok() {
            running.tracks.insert(sid);
        } else {
            let (room, participant) = (&self.context.room, participant.identity());
            tracing::error!(room, %participant, "the session takes no more tracks");
        }
    }

    fn end_track(&mut self, participant: &RemoteParticipant, track: TrackSid, reason: CloseReason) {
        // The SDK tells of the tracks of somebody who leaves first, and of the departure after them.
        let reason = match participant.disconnect_reason() {
            participant::DisconnectReason::UnknownReason => reason,
            left => CloseReason::ParticipantLeft(snake_case(left)),
        };
        let new = self.context.within_grace(reason);
        if let Some(running) = self.session(&participant.sid()) {
            running.tracks.remove(&track);
            // A session that is full or closed ends the track by itself, with its packets.
            let _ = running
                .commands
                .try_send(Command::Remove(track.to_string(), new));
        }
    }

    fn close_session(&mut self, participant: &ParticipantSid, reason: CloseReason) {
        let new = self.context.within_grace(reason);
        if let Some(running) = self.session(participant) {
            order(&running.orders, &new);
        }
    }

    /// The session of a participant, if one is open: after a full reconnect the SDK brings everyone
    /// back under their old SIDs while their old sessions are still closing.
    fn session(&mut self, participant: &ParticipantSid) -> Option<&mut Running> {
        let open = |running: &&mut Running| {
            running.participant == *participant
                && running.orders.borrow().is_none()
                && !running.commands.is_closed()
        };
        self.running.values_mut().find(open)
    }

    fn start_session(&mut self, participant: &RemoteParticipant, track: TrackSid, first: Command) {
        if self.panics_too_often(&participant.sid()) {
            return;
        }
        let (commands, received) = mpsc::channel(MAX_COMMANDS);
        let (orders, ordered) = watch::channel(None);
        let identity = participant.identity().to_string();
        // Cannot fail: the channel is new.
        let _ = commands.try_send(first);
        let card = self.card.session(&identity, participant.sid().as_str());
        let life = session::run(
            self.context.clone(),
            identity.clone(),
            card,
            received,
            ordered,
        );
        let id = self.sessions.spawn(life).id();
        let running = Running {
            participant: participant.sid(),
            identity,
            begun: Instant::now(),
            tracks: [track].into(),
            commands,
            orders,
        };
        self.running.insert(id, running);
    }

    /// The participant who is left without a session by a defect, if any.
    fn session_ended(&mut self, ended: Result<(Id, ()), JoinError>) -> Option<ParticipantSid> {
        let (id, panicked) = match ended {
            Ok((id, ())) => (id, false),
            // Its streams close by themselves.
            Err(error) => {
                tracing::error!(room = self.context.room, %error, "a session failed by a defect");
                (error.id(), true)
            }
        };
        let running = self.running.remove(&id)?;
        if let Some(store) = self.context.registry.ledger().store() {
            let reason = match &*running.orders.borrow() {
                Some(order) => order.reason.to_string(),
                None if panicked => "a defect".to_owned(),
                None => CloseReason::TrackEnded.to_string(),
            };
            let sid = self.room.maybe_sid().map(|sid| sid.to_string());
            let finished = Finished::room(&self.context.room, sid, running.begun, reason);
            store.finished(finished.of(running.identity));
        }
        let wanted = panicked && running.orders.borrow().is_none();
        wanted.then_some(running.participant)
    }

    /// Starts a session anew after a panic, from what the SDK has of its participant now.
    fn restart(&mut self, participant: ParticipantSid) {
        let panics = self.panics.entry(participant.clone()).or_default();
        panics.push_back(Instant::now());
        if panics.len() > MAX_PANICS {
            panics.pop_front();
        }
        if self.panics_too_often(&participant) {
            return tracing::error!(room = self.context.room, %participant,
                "sessions keep failing by a defect; the next try is made in {PANICS_WITHIN:?}");
        }
        let participants = self.room.remote_participants();
        match participants.values().find(|p| p.sid() == participant) {
            Some(participant) => self.review(participant),
            None => drop(self.panics.remove(&participant)),
        }
    }

    fn panics_too_often(&self, participant: &ParticipantSid) -> bool {
        let panics = self.panics.get(participant);
        panics.is_some_and(|panics| {
            let recent = panics.iter().filter(|at| at.elapsed() < PANICS_WITHIN);
            recent.count() >= MAX_PANICS
        })
    }

    /// After the usual pause; never more than one at a time.
    fn ask_for_list(&mut self) {
        let Some(every) = self.room_context.terms().reconcile_every else {
            return;
        };
        // Rooms that were joined together do not ask together.
        let pause = every.mul_f64(0.75 + 0.5 * fastrand::f64());
        let (context, room) = (self.room_context.clone(), self.room.clone());
        let (name, look) = (self.context.room.clone(), self.entry.look.clone());
        self.lists.spawn(async move {
            let sooner = async {
                tokio::time::sleep(LIST_PAUSE).await;
                look.notified().await;
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = sooner => {}
            }
            list(&context, &name, &room).await
        });
    }

    /// Makes up for events that were lost. The result says why the room is to be closed, if it is.
    fn reconcile(
        &mut self,
        listed: Result<Result<Listing, ApiError>, JoinError>,
    ) -> Option<(&'static str, RoomEnd)> {
        let name = self.context.room.clone();
        let answer = match listed {
            Ok(answer) => answer,
            Err(error) => {
                tracing::error!(room = name, %error, "listing participants failed by a defect");
                return None;
            }
        };
        let listing = match answer {
            Ok(listing) => listing,
            Err(error) => {
                if !std::mem::replace(&mut self.list_failing, true) {
                    tracing::warn!(room = name, %error, "cannot list participants; will try again");
                }
                return None;
            }
        };
        self.list_failing = false;
        let known = self.room.remote_participants();
        let known: HashMap<String, RemoteParticipant> = known
            .into_values()
            .map(|participant| (participant.sid().to_string(), participant))
            .collect();
        let knows = |participant: &str, track: &str| {
            known.get(participant).is_some_and(|participant| {
                let mut tracks = participant.track_publications().into_keys();
                tracks.any(|sid| sid.as_str() == track)
            })
        };
        let open = self
            .running
            .values()
            .filter(|running| running.orders.borrow().is_none());
        let open = open.map(|running| running.participant.as_str());
        let connected = self.room.connection_state() == ConnectionState::Connected;
        let hidden = self.room_context.hidden;
        let missed = self
            .reconciler
            .compare(&listing, open, knows, connected, hidden);

        match missed.out {
            Some(Out::RoomGone) => return Some(("found gone by polling", RoomEnd::Closed)),
            Some(Out::NotInRoom) => {
                let why = "the server says we are not in the room".to_owned();
                return Some(("found to be out of it by polling", RoomEnd::Failed(why)));
            }
            None => {}
        }
        for sid in &missed.departed {
            tracing::warn!(
                room = name,
                participant = sid,
                "found by polling: the participant has left, and no event said so"
            );
            if let Ok(sid) = ParticipantSid::try_from(sid.clone()) {
                let why = "found by polling".to_owned();
                self.close_session(&sid, CloseReason::ParticipantLeft(why));
                self.absent.insert(sid);
            }
        }
        let listed = |sid: &str| listing.participants.iter().any(|p| p.sid == sid);
        self.absent.retain(|sid| !listed(sid.as_str()));
        self.tried.retain(|sid| listed(sid));
        let mut unknown = missed.unknown.into_iter();
        if unknown.any(|sid| self.tried.insert(sid)) {
            tracing::warn!(
                room = name,
                "found by polling: somebody speaks of whom no event said so; joining anew"
            );
            return Some(("found incomplete by polling", RoomEnd::Stale));
        }
        None
    }

    /// The close path of a room: all sessions at once (each releases its streams and delivers what
    /// still comes), then the transcripts, then the room itself. Nothing is skipped; each step is
    /// bounded by the order's deadline.
    async fn close(mut self, first: CloseOrder, orders: watch::Receiver<Option<CloseOrder>>) {
        let mut closing = Closing {
            current: first,
            orders: Some(orders),
        };
        #[allow(
            clippy::disallowed_methods,
            reason = "they ask for lists and own nothing"
        )]
        self.lists.abort_all();
        while !self.sessions.is_empty() {
            for running in self.running.values() {
                order(&running.orders, &closing.current);
            }
            let ended = self.sessions.join_next_with_id();
            match closing.step(LEAVE_AT_LEAST, ended).await {
                Step::Done(Some(ended)) => drop(self.session_ended(ended)),
                Step::Done(None) => break,
                Step::Ordered => {}
                // Streams keep the deadline; a session that outlives them hangs, and its streams
                // are closed by the registry. Not awaited: a blocked thread never ends.
                Step::Late => {
                    tracing::error!(room = self.context.room, "sessions hang: abandoned");
                    #[allow(
                        clippy::disallowed_methods,
                        reason = "sessions that hang past the deadline: their streams are closed by the registry"
                    )]
                    self.sessions.abort_all();
                    break;
                }
            }
        }
        // With the last sender gone the publisher ends when it has sent what is there.
        let Self {
            context,
            room,
            mut publisher,
            ..
        } = self;
        let name = context.room.clone();
        drop(context);
        while !publisher.is_empty() {
            if let Step::Late = closing.step(Duration::ZERO, publisher.join_next()).await {
                tracing::error!(
                    room = name,
                    "transcripts for the room were not all sent in time"
                );
                #[allow(
                    clippy::disallowed_methods,
                    reason = "the deadline has passed; streams are closed by now"
                )]
                publisher.abort_all();
                break;
            }
        }
        loop {
            let until = closing.deadline(LEAVE_AT_LEAST);
            match closing
                .step(LEAVE_AT_LEAST, departure::leave(&room, until))
                .await
            {
                // Hurried: ask again with less time. Leaving goes on by itself meanwhile.
                Step::Ordered => {}
                Step::Done(Left::Closed | Left::AlreadyClosed) => {
                    return tracing::info!(room = name, "left");
                }
                Step::Done(Left::Failed) => {
                    return tracing::error!(room = name, "leaving failed by a defect in the SDK");
                }
                Step::Done(Left::StillClosing) | Step::Late => {
                    return tracing::error!(room = name, "leaving takes too long: given up on");
                }
            }
        }
    }
}

/// The order that a room is being closed by, and ears for a stronger one.
struct Closing {
    current: CloseOrder,
    orders: Option<watch::Receiver<Option<CloseOrder>>>,
}

enum Step<T> {
    Done(T),
    /// A stronger order came.
    Ordered,
    Late,
}

impl Closing {
    /// The deadline, but at least so much from now.
    fn deadline(&self, at_least: Duration) -> Instant {
        self.current.deadline.max(Instant::now() + at_least)
    }

    /// Waits for one step, within the deadline. `work` must be cancel safe.
    async fn step<T>(&mut self, at_least: Duration, work: impl Future<Output = T>) -> Step<T> {
        let until = self.deadline(at_least);
        let new = tokio::select! {
            biased;
            done = work => return Step::Done(done),
            new = next_order(&mut self.orders) => new,
            () = tokio::time::sleep_until(until.into()) => return Step::Late,
        };
        self.current.merge(&new);
        Step::Ordered
    }
}

/// The next order; never, when there is nobody to give one. Cancel safe.
async fn next_order(orders: &mut Option<watch::Receiver<Option<CloseOrder>>>) -> CloseOrder {
    while let Some(receiver) = orders {
        match receiver.changed().await {
            Ok(()) => {
                if let Some(new) = receiver.borrow_and_update().clone() {
                    return new;
                }
            }
            Err(_) => *orders = None,
        }
    }
    std::future::pending().await
}

impl RoomEnd {
    fn of(reason: DisconnectReason) -> Self {
        match reason {
            DisconnectReason::ParticipantRemoved
            | DisconnectReason::DuplicateIdentity
            | DisconnectReason::UserRejected => Self::PutOut(snake_case(reason)),
            DisconnectReason::ClientInitiated
            | DisconnectReason::RoomDeleted
            | DisconnectReason::RoomClosed => Self::Closed,
            reason => Self::Failed(snake_case(reason)),
        }
    }
}

/// The server's list of the room, as far as it matters here. Cancel safe.
async fn list(context: &RoomContext, name: &str, room: &Room) -> Result<Listing, ApiError> {
    let participants = context.api.list_participants(name).await?;
    let us = room.local_participant().sid();
    let lists_us = participants.iter().any(|info| info.sid == us.as_str());
    let has_room = match lists_us {
        true => true,
        false => {
            let rooms = context.api.list_rooms(&[name.to_owned()]).await?;
            let sid = room.maybe_sid();
            let this = |sid: &RoomSid| rooms.iter().any(|room| room.sid == sid.as_str());
            sid.as_ref().map_or(!rooms.is_empty(), this)
        }
    };
    let there = participants.iter();
    let terms = context.terms();
    Ok(Listing {
        participants: there.filter_map(|p| listed(&terms.selection, p)).collect(),
        lists_us,
        has_room,
    })
}

fn listed(selection: &Selection, info: &ParticipantInfo) -> Option<Listed> {
    (info.state() != State::Disconnected).then(|| Listed {
        sid: info.sid.clone(),
        speaking: speaking(selection, info),
    })
}

/// The tracks of a participant that an SDK in good order would let us hear.
fn speaking(selection: &Selection, info: &ParticipantInfo) -> Vec<String> {
    let hidden = info.permission.as_ref().is_some_and(|p| p.hidden);
    let fits = selection.participant(info.kind().into(), &info.identity, &info.attributes);
    if hidden || info.state() != State::Active || !fits {
        return Vec::new();
    }
    let heard = |track: &&TrackInfo| {
        track.r#type() == TrackType::Audio
            && !track.muted
            && track.encryption() == encryption::Type::None
            && selection.source(track.source().into())
    };
    let heard = info.tracks.iter().filter(heard);
    heard.map(|track| track.sid.clone()).collect()
}

/// What a packet holds mostly.
const PACKET: Duration = Duration::from_millis(20);

/// How long all peer connections may take to read what has come, and timers to be exact.
const READING: Duration = Duration::from_millis(4);

/// Has packets be read as often as pages of this length can do with: if they end with every second
/// packet, nothing is gained by reading each.
pub fn read_for_pages(page: Duration) {
    let two = 2 * PACKET;
    let whole = page.as_nanos().is_multiple_of(two.as_nanos());
    encoded_audio::read_every(if whole { two } else { PACKET });
}

/// A moment at which packets have just been read. So they have at every beat after it.
pub fn just_read() -> Instant {
    encoded_audio::beats().0 + READING
}

/// The encoded packets of a track, from now on.
fn packets(track: &RemoteAudioTrack) -> Packets {
    let stream = EncodedAudioStream::new(&track.rtc_track(), MAX_WAITING_PACKETS);
    Box::pin(stream.map(|frame| Packet {
        payload: frame.payload,
        timestamp: frame.rtp_timestamp,
        sequence: frame.sequence,
        level: frame.audio_level,
        received_at: frame.received_at,
    }))
}

/// Attributes of the daemon's participant while nobody can be transcribed, for front ends to show.
const STATE: &str = "roomwarden.transcription";
const CAUSE: &str = "roomwarden.cause";
const MESSAGE: &str = "roomwarden.message";

/// Tells the room why nobody is transcribed, and that it is over. Never returns.
async fn tell(room: Arc<Room>, mut trouble: watch::Receiver<Option<Arc<Trouble>>>) {
    // What is told by now: nothing, as after a join.
    let mut told: [String; 3] = Default::default();
    loop {
        let new = trouble.borrow_and_update().clone();
        let now = new.map_or_else(Default::default, |trouble| {
            let cause = trouble.failure.cause;
            let state = match cause {
                Cause::Concurrency => "limited",
                _ => "paused",
            };
            let message = format!("{}: {}", trouble.what(), cause.meaning());
            [state.to_owned(), cause.name().to_owned(), message]
        });
        if now != told {
            // What is empty is deleted.
            let names = [STATE, CAUSE, MESSAGE].map(str::to_owned);
            let attributes = names.into_iter().zip(now.clone()).collect();
            match room.local_participant().set_attributes(attributes).await {
                Ok(()) => told = now,
                Err(error) => {
                    let room = room.name();
                    tracing::warn!(room, %error, "cannot tell the room how transcription is");
                    tokio::time::sleep(TELL_AGAIN).await;
                    continue;
                }
            }
        }
        if trouble.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Sends transcripts to the room as LiveKit's front ends expect them: a text stream for each, of
/// the topic `lk.transcription`, in the name of who spoke; and a packet.
async fn publish(
    room: Arc<Room>,
    house: watch::Receiver<House>,
    mut transcripts: mpsc::Receiver<Transcript>,
) {
    let us = room.local_participant();
    let mut sent_any = false;
    while let Some(transcript) = transcripts.recv().await {
        let forms = house.borrow().transcripts;
        if !forms.text && !forms.packets {
            continue;
        }
        if forms.packets {
            let sent = us.publish_transcription(packet(&transcript)).await;
            if let Err(error) = sent {
                tracing::debug!(room = transcript.room, %error, "transcript not sent as a packet");
            }
        }
        if forms.text {
            let options = text_options(&transcript);
            let sent = us.send_text(&transcript.text, options).await;
            if let Err(error) = sent {
                tracing::debug!(room = transcript.room, %error, "transcript not sent to the room");
            }
        }
        sent_any = true;
    }
    if sent_any {
        arrived(&us).await;
    }
}

/// Waits until the server has acknowledged what was sent: leaving overtakes what is still under way.
/// The SDK tells of no acknowledgement, but a channel that takes nothing more before it is empty takes
/// one more packet, which is for nobody, when it has had them all.
async fn arrived(us: &LocalParticipant) {
    let _ = us.set_data_channel_buffered_amount_low_threshold(0, DataPacketKind::Reliable);
    let last = DataPacket {
        reliable: true,
        destination_identities: vec![us.identity()],
        ..Default::default()
    };
    // A connection that is over has nothing under way.
    let _ = us.publish_data(last).await;
}

fn packet(transcript: &Transcript) -> Transcription {
    let milliseconds = |seconds: f64| (seconds * 1000.0).round() as u64;
    let segment = TranscriptionSegment {
        id: transcript.segment.clone(),
        text: transcript.text.clone(),
        start_time: milliseconds(transcript.start),
        end_time: milliseconds(transcript.start + transcript.duration),
        r#final: transcript.is_final,
        // The provider is not asked for it.
        language: String::new(),
    };
    Transcription {
        participant_identity: transcript.participant.clone(),
        track_id: transcript.track.clone(),
        segments: vec![segment],
    }
}

fn text_options(transcript: &Transcript) -> SendTextOptions {
    let attributes = [
        ("lk.segment_id", transcript.segment.clone()),
        ("lk.transcribed_track_id", transcript.track.clone()),
        ("lk.transcription_final", transcript.is_final.to_string()),
    ];
    let mut options = SendTextOptions::new_with_topic("lk.transcription");
    options.attributes = attributes
        .map(|(name, value)| (name.to_owned(), value))
        .into();
    // Agents may speak for others.
    options.sender_identity = Some(transcript.participant.clone().into());
    options
}

/// `ParticipantRemoved` as `participant_removed`, as LiveKit's protocol spells reasons.
fn snake_case(name: impl std::fmt::Debug) -> String {
    let mut out = String::new();
    for c in format!("{name:?}").chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use livekit_protocol::{ParticipantPermission, TrackSource as Source};

    use super::*;
    use crate::config::{AudioSource, ParticipantsConfig};

    #[test]
    fn only_who_could_be_heard_now_is_missed() {
        let selection = Selection::new(&ParticipantsConfig {
            include: vec!["*".into()],
            exclude: vec!["bot".into()],
            sources: vec![AudioSource::Microphone],
            priority_attribute: None,
            attributes: Default::default(),
        });
        let track = TrackInfo {
            sid: "TR_1".into(),
            r#type: TrackType::Audio.into(),
            source: Source::Microphone.into(),
            ..Default::default()
        };
        let alice = ParticipantInfo {
            identity: "alice".into(),
            state: State::Active.into(),
            tracks: vec![track.clone()],
            ..Default::default()
        };
        assert_eq!(speaking(&selection, &alice), ["TR_1"]);
        let with = |change: fn(&mut ParticipantInfo)| {
            let mut changed = alice.clone();
            change(&mut changed);
            changed
        };
        for silent in [
            with(|p| p.set_state(State::Joined)),
            with(|p| p.identity = "bot".into()),
            with(|p| {
                p.permission = Some(ParticipantPermission {
                    hidden: true,
                    ..Default::default()
                });
            }),
            with(|p| p.tracks[0].muted = true),
            with(|p| p.tracks[0].set_source(Source::ScreenShareAudio)),
            with(|p| p.tracks[0].set_type(TrackType::Video)),
            with(|p| p.tracks[0].set_encryption(encryption::Type::Gcm)),
        ] {
            let listed = listed(&selection, &silent).expect("there");
            assert_eq!(listed.speaking, [""; 0], "{silent:?}");
        }
        let gone = with(|p| p.set_state(State::Disconnected));
        assert!(listed(&selection, &gone).is_none());
    }

    #[tokio::test]
    async fn a_step_that_hangs_ends_with_the_deadline_or_a_stronger_order() {
        let at = |milliseconds| CloseOrder {
            reason: CloseReason::TrackEnded,
            deadline: Instant::now() + Duration::from_millis(milliseconds),
        };
        let (orders, ordered) = watch::channel(None);
        let mut closing = Closing {
            current: at(60_000),
            orders: Some(ordered),
        };
        let hangs = std::future::pending::<()>;
        order(&orders, &at(20));
        let step = closing.step(Duration::ZERO, hangs()).await;
        assert!(matches!(step, Step::Ordered));
        let step = closing.step(Duration::ZERO, hangs()).await;
        assert!(matches!(step, Step::Late));
        let step = closing.step(Duration::ZERO, async {}).await;
        assert!(matches!(step, Step::Done(())), "done is done, even late");
    }

    #[test]
    fn reasons_are_spelled_as_in_the_protocol() {
        assert_eq!(
            snake_case(DisconnectReason::ParticipantRemoved),
            "participant_removed"
        );
    }

    #[test]
    fn a_transcript_says_whose_track_it_is_and_whether_it_is_final() {
        let options = text_options(&Transcript {
            room: "r".into(),
            participant: "alice".into(),
            track: "TR_1".into(),
            segment: "SG_1".into(),
            is_final: true,
            text: "hello".into(),
            start: 0.0,
            duration: 1.0,
            confidence: 1.0,
        });
        assert_eq!(options.topic, "lk.transcription");
        assert_eq!(options.attributes["lk.transcription_final"], "true");
        assert_eq!(options.attributes["lk.transcribed_track_id"], "TR_1");
        assert_eq!(options.attributes["lk.segment_id"], "SG_1");
    }
}
