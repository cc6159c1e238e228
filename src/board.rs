//! What goes on now, and what happened last, for those who watch: the tree of rooms, sessions and
//! tracks, and the feed of events. Those who live in the tree hold a card of it each, which is taken
//! down when it is dropped, so that what panics or is aborted does not stay. It decides nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::watch;

use crate::{
    domain::StreamId,
    failure::{Cause, Trouble},
    ledger::{Settled, unix_ms},
    registry::{OpenStream, StreamState},
};

/// Events that can be read again.
const MAX_EVENTS: usize = 1024;
/// Streams that failed, of which is told why.
const MAX_FAILED: usize = 256;
/// Upper bounds of how long closes took, in seconds.
pub const CLOSE_BUCKETS: [f64; 9] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Cheap to clone; all clones are one board.
#[derive(Clone, Default)]
pub struct Board(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// Counts changes.
    changed: watch::Sender<u64>,
    /// Names the events of this board apart from those of an earlier process.
    run: u64,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            run: unix_ms(SystemTime::now()),
        }
    }
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Why LiveKit could not be asked for its rooms, the last time.
    livekit: Option<String>,
    rooms: BTreeMap<u64, RoomInfo>,
    last_card: u64,
    events: VecDeque<Arc<Event>>,
    last_event: u64,
    failed: VecDeque<Arc<Settled>>,
    totals: Totals,
}

/// How far the daemon is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// LiveKit has not listed its rooms yet.
    #[default]
    Starting,
    Running,
    /// It takes no new rooms and participants, and ends with the last room.
    Draining,
    Closing,
}

impl Phase {
    pub const ALL: [Self; 4] = [Self::Starting, Self::Running, Self::Draining, Self::Closing];

    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Closing => "closing",
        }
    }
}

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Since {
    pub at_ms: u64,
    pub instant: Instant,
}

impl Since {
    pub fn now() -> Self {
        Self {
            at_ms: unix_ms(SystemTime::now()),
            instant: Instant::now(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct RoomInfo {
    /// The number of its card, which no other one has.
    pub card: u64,
    pub name: String,
    /// Ours, in the room.
    pub identity: String,
    /// Once it is joined.
    pub sid: Option<String>,
    pub state: RoomState,
    pub since: Since,
    pub sessions: BTreeMap<u64, SessionInfo>,
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoomState {
    Joining,
    Joined,
    Closing,
}

impl RoomState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Joined => "joined",
            Self::Closing => "closing",
        }
    }
}

#[derive(Debug, Clone)]
pub struct SessionInfo {
    pub card: u64,
    pub identity: String,
    pub sid: String,
    pub since: Since,
    pub tracks: BTreeMap<u64, TrackInfo>,
}

#[derive(Debug, Clone)]
pub struct TrackInfo {
    pub card: u64,
    pub sid: String,
    pub state: TrackState,
    pub since: Since,
    /// The stream that it feeds, if it has one.
    pub stream: Option<StreamId>,
}

/// What the transcriber of a track does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrackState {
    /// Nothing was said that is to be transcribed: there is no stream.
    Quiet,
    /// For its turn to open a stream.
    Waiting,
    /// It has a stream, which is open or being opened.
    Streaming,
    Closing,
    /// Its stream failed, and there is a pause before the next one.
    Retrying,
    /// Its stream was closed since nobody spoke for long; the next word opens another.
    Parked,
}

impl TrackState {
    pub const ALL: [Self; 6] = [
        Self::Quiet,
        Self::Waiting,
        Self::Streaming,
        Self::Closing,
        Self::Retrying,
        Self::Parked,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Waiting => "waiting",
            Self::Streaming => "streaming",
            Self::Closing => "closing",
            Self::Retrying => "retrying",
            Self::Parked => "parked",
        }
    }
}

/// Something that happened.
#[derive(Debug)]
pub struct Event {
    /// From 1, without gaps.
    pub number: u64,
    /// Unix time, in milliseconds.
    pub at_ms: u64,
    pub what: What,
}

#[derive(Debug)]
pub enum What {
    RoomJoined {
        room: String,
        sid: Option<String>,
    },
    /// Or given up on before it was joined.
    RoomLeft {
        room: String,
        sid: Option<String>,
        reason: Option<String>,
    },
    SessionBegun {
        room: String,
        participant: String,
        sid: String,
    },
    SessionEnded {
        room: String,
        participant: String,
        sid: String,
    },
    Stream(OpenStream),
    Settled(Arc<Settled>),
    TroubleBegun(Arc<Trouble>),
    TroubleOver(Cause),
    DrainBegun,
    DrainEnded,
    Closing,
}

/// Events that somebody has not read yet.
#[derive(Debug, Default)]
pub struct Unread {
    /// So many before the first of them are not kept any more.
    pub missed: u64,
    pub events: Vec<Arc<Event>>,
}

/// Sums over all streams that are over.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    pub audio_seconds: f64,
    pub connection_seconds: f64,
    pub failures: BTreeMap<&'static str, u64>,
    /// By [`CLOSE_BUCKETS`], each for itself, and beyond.
    pub closes: [u64; CLOSE_BUCKETS.len() + 1],
    pub close_seconds: f64,
}

impl Board {
    pub fn phase(&self) -> Phase {
        self.state().phase
    }

    /// Tells how far the daemon is. What it tells first stays told: it does not run again once it
    /// closes.
    pub fn enter(&self, phase: Phase) {
        let mut state = self.state();
        let before = state.phase;
        if before == phase || before == Phase::Closing {
            return;
        }
        state.phase = phase;
        match (before, phase) {
            (_, Phase::Draining) => state.tell(What::DrainBegun),
            (_, Phase::Closing) => state.tell(What::Closing),
            (Phase::Draining, _) => state.tell(What::DrainEnded),
            _ => {}
        }
        self.changed_in(state);
    }

    /// Why LiveKit does not answer as it should, if so.
    pub fn livekit(&self) -> Option<String> {
        self.state().livekit.clone()
    }

    pub fn livekit_failed(&self, said: Option<String>) {
        self.state().livekit = said;
    }

    /// The tree as it is, a room each.
    pub fn rooms(&self) -> Vec<RoomInfo> {
        self.state().rooms.values().cloned().collect()
    }

    /// Streams that failed, and how, oldest first.
    pub fn failed(&self) -> Vec<Arc<Settled>> {
        self.state().failed.iter().cloned().collect()
    }

    pub fn totals(&self) -> Totals {
        self.state().totals.clone()
    }

    /// Notices every change from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    pub fn run(&self) -> u64 {
        self.0.run
    }

    /// The number of the last event; 0 if there was none.
    pub fn last_event(&self) -> u64 {
        self.state().last_event
    }

    /// What happened after the event of that number, so many at most.
    pub fn after(&self, number: u64, most: usize) -> Unread {
        let state = self.state();
        let first = state.events.front().map_or(0, |event| event.number);
        let wanted = number + 1;
        let skip = wanted.saturating_sub(first) as usize;
        Unread {
            missed: first.saturating_sub(wanted),
            events: state.events.iter().skip(skip).take(most).cloned().collect(),
        }
    }

    pub fn tell(&self, what: What) {
        let mut state = self.state();
        state.tell(what);
        self.changed_in(state);
    }

    /// A stream is over.
    pub fn settled(&self, settled: &Arc<Settled>) {
        let mut state = self.state();
        let totals = &mut state.totals;
        totals.audio_seconds += settled.totals.audio_seconds;
        totals.connection_seconds += settled.connection_seconds;
        if settled.outcome.opened() {
            let seconds = settled.close_seconds;
            let bucket = CLOSE_BUCKETS.iter().position(|bound| seconds <= *bound);
            totals.closes[bucket.unwrap_or(CLOSE_BUCKETS.len())] += 1;
            totals.close_seconds += seconds;
        }
        if let Some(failure) = settled.outcome.failure() {
            *totals.failures.entry(failure.cause.name()).or_default() += 1;
            if state.failed.len() == MAX_FAILED {
                state.failed.pop_front();
            }
            state.failed.push_back(settled.clone());
        }
        state.tell(What::Settled(settled.clone()));
        self.changed_in(state);
    }

    /// Puts up the card of a room that is to be joined, under that identity.
    pub fn room(&self, name: &str, identity: &str) -> RoomCard {
        let mut state = self.state();
        let key = state.next_card();
        let room = RoomInfo {
            card: key,
            name: name.to_owned(),
            identity: identity.to_owned(),
            sid: None,
            state: RoomState::Joining,
            since: Since::now(),
            sessions: BTreeMap::new(),
            reason: None,
        };
        state.rooms.insert(key, room);
        self.changed_in(state);
        RoomCard {
            board: self.clone(),
            key,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything that could panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed_in(&self, state: MutexGuard<'_, State>) {
        drop(state);
        self.0.changed.send_modify(|changes| *changes += 1);
    }
}

impl State {
    fn next_card(&mut self) -> u64 {
        self.last_card += 1;
        self.last_card
    }

    fn tell(&mut self, what: What) {
        self.last_event += 1;
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Arc::new(Event {
            number: self.last_event,
            at_ms: unix_ms(SystemTime::now()),
            what,
        }));
    }

    fn session(&mut self, (room, session): (u64, u64)) -> Option<&mut SessionInfo> {
        self.rooms.get_mut(&room)?.sessions.get_mut(&session)
    }
}

/// A room's, held by its supervisor.
pub struct RoomCard {
    board: Board,
    key: u64,
}

impl RoomCard {
    pub fn joined(&self, sid: Option<String>) {
        let mut state = self.board.state();
        if let Some(room) = state.rooms.get_mut(&self.key) {
            room.state = RoomState::Joined;
            room.since = Since::now();
            room.sid.clone_from(&sid);
            let room = room.name.clone();
            state.tell(What::RoomJoined { room, sid });
        }
        self.board.changed_in(state);
    }

    pub fn closing(&self, reason: String) {
        let mut state = self.board.state();
        if let Some(room) = state.rooms.get_mut(&self.key) {
            room.state = RoomState::Closing;
            room.since = Since::now();
            room.reason = Some(reason);
        }
        self.board.changed_in(state);
    }

    /// Puts up the card of a participant's session.
    pub fn session(&self, identity: &str, sid: &str) -> SessionCard {
        let mut state = self.board.state();
        let key = state.next_card();
        if let Some(room) = state.rooms.get_mut(&self.key) {
            let session = SessionInfo {
                card: key,
                identity: identity.to_owned(),
                sid: sid.to_owned(),
                since: Since::now(),
                tracks: BTreeMap::new(),
            };
            room.sessions.insert(key, session);
            let room = room.name.clone();
            let (participant, sid) = (identity.to_owned(), sid.to_owned());
            state.tell(What::SessionBegun {
                room,
                participant,
                sid,
            });
        }
        self.board.changed_in(state);
        SessionCard {
            board: self.board.clone(),
            key: (self.key, key),
        }
    }
}

impl Drop for RoomCard {
    fn drop(&mut self) {
        let mut state = self.board.state();
        if let Some(room) = state.rooms.remove(&self.key) {
            let RoomInfo {
                name: room,
                sid,
                reason,
                ..
            } = room;
            state.tell(What::RoomLeft { room, sid, reason });
        }
        self.board.changed_in(state);
    }
}

/// A session's.
pub struct SessionCard {
    board: Board,
    key: (u64, u64),
}

impl SessionCard {
    /// Puts up the card of a track of it.
    pub fn track(&self, sid: &str) -> TrackCard {
        let mut state = self.board.state();
        let key = state.next_card();
        if let Some(session) = state.session(self.key) {
            let track = TrackInfo {
                card: key,
                sid: sid.to_owned(),
                state: TrackState::Quiet,
                since: Since::now(),
                stream: None,
            };
            session.tracks.insert(key, track);
        }
        self.board.changed_in(state);
        TrackCard {
            board: self.board.clone(),
            session: self.key,
            key,
            told: (TrackState::Quiet, None),
        }
    }
}

impl Drop for SessionCard {
    fn drop(&mut self) {
        let mut state = self.board.state();
        if let Some(room) = state.rooms.get_mut(&self.key.0)
            && let Some(session) = room.sessions.remove(&self.key.1)
        {
            let (room, participant, sid) = (room.name.clone(), session.identity, session.sid);
            state.tell(What::SessionEnded {
                room,
                participant,
                sid,
            });
        }
        self.board.changed_in(state);
    }
}

/// A track's, held by its transcriber.
pub struct TrackCard {
    board: Board,
    session: (u64, u64),
    key: u64,
    told: (TrackState, Option<StreamId>),
}

impl TrackCard {
    /// Costs nothing if it is nothing new.
    pub fn tell(&mut self, now: TrackState, stream: Option<StreamId>) {
        if self.told == (now, stream) {
            return;
        }
        self.told = (now, stream);
        let mut state = self.board.state();
        let session = state.session(self.session);
        if let Some(track) = session.and_then(|session| session.tracks.get_mut(&self.key)) {
            if track.state != now {
                track.since = Since::now();
            }
            (track.state, track.stream) = (now, stream);
        }
        self.board.changed_in(state);
    }
}

impl Drop for TrackCard {
    fn drop(&mut self) {
        let mut state = self.board.state();
        if let Some(session) = state.session(self.session) {
            session.tracks.remove(&self.key);
        }
        self.board.changed_in(state);
    }
}

impl What {
    /// For machines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RoomJoined { .. } => "room_joined",
            Self::RoomLeft { .. } => "room_left",
            Self::SessionBegun { .. } => "session_begun",
            Self::SessionEnded { .. } => "session_ended",
            Self::Stream(stream) => match stream.state {
                StreamState::Opening => "stream_opening",
                StreamState::Open => "stream_open",
                StreamState::Closing => "stream_closing",
            },
            Self::Settled(_) => "stream_settled",
            Self::TroubleBegun(_) => "trouble_begun",
            Self::TroubleOver(_) => "trouble_over",
            Self::DrainBegun => "drain_begun",
            Self::DrainEnded => "drain_ended",
            Self::Closing => "closing",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_that_are_dropped_are_off_the_board_in_whatever_order() {
        let board = Board::default();
        let room = board.room("r", "us");
        let session = room.session("alice", "PA_1");
        let mut track = session.track("TR_1");
        track.tell(TrackState::Streaming, Some(StreamId(7)));
        let [seen] = &board.rooms()[..] else {
            panic!("one room")
        };
        let tracks = seen.sessions.values().flat_map(|s| s.tracks.values());
        let tracks: Vec<_> = tracks.map(|track| (track.state, track.stream)).collect();
        assert_eq!(tracks, [(TrackState::Streaming, Some(StreamId(7)))]);
        drop(room);
        drop(session);
        track.tell(TrackState::Closing, None);
        drop(track);
        assert_eq!(board.rooms().len(), 0);
        let unread = board.after(0, MAX_EVENTS);
        let names: Vec<_> = unread.events.iter().map(|e| e.what.name()).collect();
        assert_eq!(names, ["session_begun", "room_left"]);
    }

    #[test]
    fn who_reads_too_late_is_told_how_much_is_missed() {
        let board = Board::default();
        let unread = board.after(0, 10);
        assert_eq!((unread.missed, unread.events.len()), (0, 0));
        for _ in 0..MAX_EVENTS + 5 {
            board.tell(What::DrainBegun);
        }
        let unread = board.after(0, 10);
        assert_eq!((unread.missed, unread.events.len()), (5, 10));
        assert_eq!(unread.events[0].number, 6);
        let unread = board.after(board.last_event(), 10);
        assert_eq!((unread.missed, unread.events.len()), (0, 0));
        let unread = board.after(board.last_event() - 2, 10);
        assert_eq!((unread.missed, unread.events.len()), (0, 2));
    }

    #[test]
    fn a_daemon_that_closes_does_not_run_again() {
        let board = Board::default();
        for phase in [Phase::Running, Phase::Draining, Phase::Running] {
            board.enter(phase);
            assert_eq!(board.phase(), phase);
        }
        board.enter(Phase::Closing);
        board.enter(Phase::Running);
        assert_eq!(board.phase(), Phase::Closing);
        let events = board.after(0, 10).events;
        let names: Vec<_> = events.iter().map(|event| event.what.name()).collect();
        assert_eq!(names, ["drain_begun", "drain_ended", "closing"]);
    }
}
