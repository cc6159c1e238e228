//! What the API says, as version 1 of it has it; not how the daemon keeps it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    board::{Phase, RoomInfo, Since, TrackState},
    config::Config,
    daemon::Daemon,
    failure::{self, Cause},
    journal,
    ledger::{Counts, Settled, unix_ms},
    registry::{OpenStream, StreamState},
    stt::gate::Standing,
};

/// Unix milliseconds as RFC 3339.
pub(super) fn time(unix_ms: u64) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(unix_ms);
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// How the daemon is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Status {
    pub version: String,
    /// rooms.identity.
    pub identity: String,
    /// starting, running, draining or closing.
    pub state: String,
    /// Why it is not ready to transcribe, if it is not.
    pub not_ready: Option<String>,
    pub uptime_seconds: f64,
    /// Why LiveKit could not be asked for its rooms, the last time.
    pub livekit: Option<String>,
    pub gate: Gate,
    /// Why nobody is let in to open a stream, if so.
    pub trouble: Option<Trouble>,
    pub open: Open,
    pub streams: Totals,
    /// Rooms that it is in, or about to be.
    pub rooms: usize,
    pub participants: usize,
    /// Tracks by what is done with them: quiet, waiting, streaming, closing, retrying or parked.
    pub tracks: BTreeMap<String, usize>,
    /// Streams that an earlier run left open, since it was killed.
    pub orphaned: usize,
    /// Streams that were opened without being in the journal, since its disk failed.
    pub unjournaled: u64,
}

/// How many streams may be opened.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Gate {
    /// Streams that are open or being opened or closed.
    pub held: usize,
    /// Tracks that wait for a turn.
    pub waiting: usize,
    /// Streams that are over for us, and may still be counted by the provider.
    pub quarantined: usize,
    /// The limit that holds now; none if there is none.
    pub limit: Option<usize>,
    /// Most held at once.
    pub peak: usize,
}

impl From<Standing> for Gate {
    fn from(standing: Standing) -> Self {
        let Standing {
            held,
            waiting,
            quarantined,
            limit,
            peak,
        } = standing;
        Self {
            held,
            waiting,
            quarantined,
            limit,
            peak,
        }
    }
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Trouble {
    pub cause: String,
    pub message: String,
    /// What to do about it.
    pub fix: String,
    pub retry_in_seconds: f64,
    /// Whether nobody at all is let in; not so if there are only no more streams to be had.
    pub blocks_all: bool,
}

impl From<&failure::Trouble> for Trouble {
    fn from(trouble: &failure::Trouble) -> Self {
        let cause = trouble.failure.cause;
        let wait = trouble.until.saturating_duration_since(Instant::now());
        Self {
            cause: cause.name().to_owned(),
            message: format!("{}: {}", trouble.what(), trouble.failure),
            fix: cause.advice().to_owned(),
            retry_in_seconds: wait.as_secs_f64(),
            blocks_all: blocks_all(cause),
        }
    }
}

/// How many streams are open now, by whose count.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Open {
    /// Those on the daemon's books: open, being opened or being closed.
    pub registry: usize,
    /// Sockets to the provider that the kernel says the process holds; none if it does not tell.
    pub kernel: Option<usize>,
    /// None if the provider has no such count, as Deepgram has none.
    pub provider: Option<ProviderCount>,
    pub agree: bool,
    /// Who counts otherwise than the others.
    pub disagreement: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProviderCount {
    pub open: usize,
    /// How old the provider's answer is.
    pub age_seconds: f64,
}

impl Open {
    /// The kernel was asked between `before` and `after`. A stream that is being opened or closed
    /// may have a socket or not.
    pub fn new(before: &[OpenStream], kernel: Option<usize>, after: &[OpenStream]) -> Self {
        let is_open = |stream: &&OpenStream| stream.state == StreamState::Open;
        let stays = |stream: &&OpenStream| after.iter().any(|s| s.id == stream.id);
        let least = before.iter().filter(is_open).filter(stays).count();
        let new = |stream: &&OpenStream| before.iter().all(|s| s.id != stream.id);
        let most = before.len() + after.iter().filter(new).count();
        let registry = after.len();
        let disagreement = kernel
            .filter(|kernel| !(least..=most).contains(kernel))
            .map(|kernel| {
                format!("the kernel counts {kernel} sockets, the registry {registry} streams")
            });
        Self {
            registry,
            kernel,
            provider: None,
            agree: disagreement.is_none(),
            disagreement,
        }
    }
}

/// Streams that are over, since the start.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Totals {
    /// Those that the provider counted, or may have.
    pub opened: u64,
    pub acknowledged: u64,
    pub timed_out: u64,
    pub peer_gone: u64,
    /// Attempts that never became a stream; not part of `opened`.
    pub never_opened: u64,
}

impl From<Counts> for Totals {
    fn from(counts: Counts) -> Self {
        Self {
            opened: counts.opened,
            acknowledged: counts.acknowledged,
            timed_out: counts.timed_out,
            peer_gone: counts.peer_gone,
            never_opened: counts.never_opened,
        }
    }
}

/// Why the daemon is not ready, if so.
pub(super) fn not_ready(daemon: &Daemon) -> Option<String> {
    let board = daemon.registry().board();
    match board.phase() {
        Phase::Starting => return Some("LiveKit has not answered yet".to_owned()),
        Phase::Draining => return Some("it drains: nobody new is transcribed".to_owned()),
        Phase::Closing => return Some("it is closing".to_owned()),
        Phase::Running => {}
    }
    // Not in their words: probes are answered to everybody.
    if board.livekit().is_some() {
        return Some("LiveKit does not list its rooms".to_owned());
    }
    let trouble = daemon.gate().trouble().borrow().clone()?;
    let cause = trouble.failure.cause;
    blocks_all(cause).then(|| format!("{}: {}", trouble.what(), cause.meaning()))
}

/// Else as many streams as there are go on, and who waits comes in as they end.
fn blocks_all(cause: Cause) -> bool {
    cause != Cause::Concurrency
}

impl Status {
    pub fn new(daemon: &Daemon, config: &Config, open: Open) -> Self {
        let registry = daemon.registry();
        let board = registry.board();
        let rooms = board.rooms();
        let mut tracks: BTreeMap<String, usize> = TrackState::ALL
            .iter()
            .map(|state| (state.name().to_owned(), 0))
            .collect();
        let sessions = rooms.iter().flat_map(|room| room.sessions.values());
        let mut participants = 0;
        for session in sessions {
            participants += 1;
            for track in session.tracks.values() {
                *tracks.entry(track.state.name().to_owned()).or_default() += 1;
            }
        }
        let trouble = daemon.gate().trouble().borrow().clone();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            identity: config.rooms.identity.clone(),
            state: board.phase().name().to_owned(),
            not_ready: not_ready(daemon),
            uptime_seconds: daemon.started().elapsed().as_secs_f64(),
            livekit: board.livekit(),
            gate: daemon.gate().standing().into(),
            trouble: trouble.as_deref().map(Trouble::from),
            open,
            streams: registry.ledger().counts().into(),
            rooms: rooms.len(),
            participants,
            tracks,
            orphaned: registry.orphans().len(),
            unjournaled: registry.journal().map_or(0, journal::Journal::missed),
        }
    }
}

/// A room, and who in it is transcribed.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Room {
    pub room: String,
    /// Once it is joined.
    pub sid: Option<String>,
    /// joining, joined or closing.
    pub state: String,
    /// Since when it is in that state.
    pub since: String,
    pub age_seconds: f64,
    pub participants: Vec<Participant>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Participant {
    pub participant: String,
    pub sid: String,
    pub since: String,
    pub age_seconds: f64,
    pub tracks: Vec<Track>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Track {
    pub track: String,
    /// quiet, waiting (for a turn to open a stream), streaming, closing, retrying or parked.
    pub state: String,
    /// Since when it is in that state.
    pub since: String,
    pub age_seconds: f64,
    pub stream: Option<Stream>,
}

fn since(since: Since) -> (String, f64) {
    (time(since.at_ms), since.instant.elapsed().as_secs_f64())
}

impl Room {
    pub fn new(room: &RoomInfo, streams: &[OpenStream]) -> Self {
        let track = |info: &crate::board::TrackInfo| {
            let (since, age_seconds) = since(info.since);
            let stream = streams.iter().find(|stream| Some(stream.id) == info.stream);
            Track {
                track: info.sid.clone(),
                state: info.state.name().to_owned(),
                since,
                age_seconds,
                stream: stream.map(Stream::from),
            }
        };
        let participant = |info: &crate::board::SessionInfo| {
            let (since, age_seconds) = since(info.since);
            Participant {
                participant: info.identity.clone(),
                sid: info.sid.clone(),
                since,
                age_seconds,
                tracks: info.tracks.values().map(track).collect(),
            }
        };
        let (since, age_seconds) = since(room.since);
        Self {
            room: room.name.clone(),
            sid: room.sid.clone(),
            state: room.state.name().to_owned(),
            since,
            age_seconds,
            participants: room.sessions.values().map(participant).collect(),
        }
    }
}

/// A stream on the books.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Stream {
    pub id: u64,
    pub room: String,
    pub participant: String,
    pub track: String,
    pub provider: String,
    pub model: String,
    pub language: Option<String>,
    pub encoding: String,
    /// opening, open or closing.
    pub state: String,
    pub opened_at: String,
    pub age_seconds: f64,
    /// The provider's id of it, once it is known.
    pub request_id: Option<String>,
}

impl From<&OpenStream> for Stream {
    fn from(stream: &OpenStream) -> Self {
        Self::at(stream, unix_ms(SystemTime::now()))
    }
}

impl Stream {
    /// As it was at that Unix time, in milliseconds. The clock may have been set meanwhile.
    pub fn at(stream: &OpenStream, now_ms: u64) -> Self {
        let (key, service) = (&stream.key, &stream.service);
        Self {
            id: stream.id.0,
            room: key.room.clone(),
            participant: key.participant.clone(),
            track: key.track.clone(),
            provider: service.provider.clone(),
            model: service.model.clone(),
            language: service.language.clone(),
            encoding: service.encoding.clone(),
            state: stream.state.name().to_owned(),
            opened_at: time(stream.opened_at_ms),
            age_seconds: now_ms.saturating_sub(stream.opened_at_ms) as f64 / 1000.0,
            request_id: stream.request_id.clone(),
        }
    }
}

/// Streams that are open, and tracks that have none though they may.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Streams {
    pub open: Vec<Stream>,
    /// For a turn, or for another try.
    pub waiting: Vec<Idle>,
    /// Nobody spoke for long.
    pub parked: Vec<Idle>,
    /// How many are over for us, and may still be counted by the provider.
    pub quarantined: usize,
    /// Left open by an earlier run, since it was killed.
    pub orphaned: Vec<Orphan>,
}

/// A track without a stream.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Idle {
    pub room: String,
    pub participant: String,
    pub track: String,
    pub state: String,
    pub since: String,
    pub age_seconds: f64,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Orphan {
    #[serde(flatten)]
    pub stream: Stream,
    /// By then the provider has let go of it.
    pub free_by: String,
}

impl Streams {
    pub fn new(daemon: &Daemon) -> Self {
        let registry = daemon.registry();
        let rooms = registry.board().rooms();
        let idle = |states: &[TrackState]| {
            let mut found = Vec::new();
            for room in &rooms {
                for session in room.sessions.values() {
                    let tracks = session.tracks.values();
                    for track in tracks.filter(|track| states.contains(&track.state)) {
                        let (since, age_seconds) = since(track.since);
                        found.push(Idle {
                            room: room.name.clone(),
                            participant: session.identity.clone(),
                            track: track.sid.clone(),
                            state: track.state.name().to_owned(),
                            since,
                            age_seconds,
                        });
                    }
                }
            }
            found
        };
        let orphan = |orphan: &journal::Orphan| Orphan {
            stream: Stream::from(&orphan.stream),
            free_by: time(orphan.free_by_ms),
        };
        Self {
            open: registry.open().iter().map(Stream::from).collect(),
            waiting: idle(&[TrackState::Waiting, TrackState::Retrying]),
            parked: idle(&[TrackState::Parked]),
            quarantined: daemon.gate().standing().quarantined,
            orphaned: registry.orphans().iter().map(orphan).collect(),
        }
    }
}

/// How a stream ended: acknowledged by the provider, or why not.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Receipt {
    pub id: u64,
    pub room: String,
    pub participant: String,
    pub track: String,
    pub provider: String,
    pub model: String,
    pub language: Option<String>,
    pub encoding: String,
    /// acknowledged, timed_out, peer_gone or never_opened.
    pub outcome: String,
    /// The outcome in words.
    pub detail: String,
    /// Why it was closed.
    pub reason: String,
    pub failure: Option<Failure>,
    pub request_id: Option<String>,
    pub opened_at: String,
    pub settled_at: String,
    /// From permit to settlement.
    pub wall_seconds: f64,
    /// From the end of the handshake to settlement.
    pub connection_seconds: f64,
    /// From the order to close to settlement.
    pub close_seconds: f64,
    /// That were sent.
    pub audio_seconds: f64,
    pub audio_bytes: u64,
    /// That the provider says it processed.
    pub provider_seconds: Option<f64>,
}

/// What the provider or the network did to end or refuse a stream.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Failure {
    /// Of a closed set; see the README.
    pub cause: String,
    pub message: String,
    /// What to do about it.
    pub fix: String,
    /// Of the handshake's answer, if that was a refusal.
    pub status: Option<u16>,
    /// Of the websocket's close frame, if there was one.
    pub close_code: Option<u16>,
    /// The provider's.
    pub request_id: Option<String>,
    pub retry_after_ms: Option<u64>,
}

impl From<failure::Failure> for Failure {
    fn from(failure: failure::Failure) -> Self {
        Self {
            cause: failure.cause.name().to_owned(),
            message: failure.to_string(),
            fix: failure.cause.advice().to_owned(),
            status: failure.status,
            close_code: failure.close_code,
            request_id: failure.request_id,
            retry_after_ms: failure.retry_after_ms,
        }
    }
}

impl From<&Settled> for Receipt {
    fn from(settled: &Settled) -> Self {
        let (key, service, totals) = (&settled.key, &settled.service, &settled.totals);
        Self {
            id: settled.id.0,
            room: key.room.clone(),
            participant: key.participant.clone(),
            track: key.track.clone(),
            provider: service.provider.clone(),
            model: service.model.clone(),
            language: service.language.clone(),
            encoding: service.encoding.clone(),
            outcome: settled.outcome.name().to_owned(),
            detail: settled.outcome.to_string(),
            reason: settled.reason.to_string(),
            failure: settled.outcome.failure().map(Failure::from),
            request_id: totals.request_id.clone(),
            opened_at: time(settled.opened_at_ms),
            settled_at: time(settled.settled_at_ms),
            wall_seconds: settled.wall_seconds,
            connection_seconds: settled.connection_seconds,
            close_seconds: settled.close_seconds,
            audio_seconds: totals.audio_seconds,
            audio_bytes: totals.audio_bytes,
            provider_seconds: totals.provider_seconds,
        }
    }
}

/// What became of a request to close something.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Closed {
    /// Whether all of it is over; if not, it is under way.
    pub closed: bool,
    /// Of the streams that it ended.
    pub receipts: Vec<Receipt>,
    pub still_open: Vec<Stream>,
}

/// How far the daemon is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct State {
    /// starting, running, draining or closing.
    pub state: String,
}

/// Which rooms are to be closed for everybody.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForceClose {
    /// All rooms whose name fits: * is any text, ? any character.
    #[schema(example = "test-*", min_length = 1, max_length = 1024)]
    pub pattern: String,
    /// Only to say which rooms would be closed, and who is in them.
    #[serde(default)]
    pub dry_run: bool,
    /// By when everything is over; left out: 30000.
    #[schema(minimum = 1000, maximum = 3_600_000)]
    pub deadline_ms: Option<u64>,
}

/// Agents that are wanted in a room.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Dispatch {
    /// Left out: agent.name of the configuration.
    #[schema(max_length = 1024)]
    pub agent_name: Option<String>,
    /// Settings for the room: model, language, encoding, interim_results, punctuate, smart_format,
    /// diarize, keyterm, transcripts_to_room.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A dispatch that was made.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Dispatched {
    pub room: String,
    pub agent_name: String,
    /// LiveKit's id of it.
    pub dispatch: String,
    /// As it was given to LiveKit; empty if nothing is set.
    pub metadata: String,
}

/// What is logged, in the syntax of tracing-subscriber's EnvFilter.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogFilter {
    #[schema(example = "info,roomwarden::stt=debug", max_length = 4096)]
    pub filter: String,
}

/// Whether it is ready to transcribe.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Ready {
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
}

/// What was used.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Usage {
    /// None for everything that there is.
    pub since: Option<String>,
    /// Each with the values of what it is summed by, and the sums.
    #[schema(value_type = Vec<Object>)]
    pub rows: Vec<serde_json::Value>,
    #[schema(value_type = Object)]
    pub total: serde_json::Value,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{StreamId, StreamKey};

    #[test]
    fn counts_disagree_only_when_no_moment_explains_them() {
        let stream = |id, state| OpenStream {
            id: StreamId(id),
            key: StreamKey {
                room: "r".into(),
                participant: "p".into(),
                track: "t".into(),
            },
            service: Default::default(),
            state,
            opened_at_ms: 0,
            request_id: None,
        };
        let (open, opening) = (
            stream(1, StreamState::Open),
            stream(2, StreamState::Opening),
        );
        let both = [open.clone(), opening.clone()];
        let agree = |before: &[OpenStream], kernel, after: &[OpenStream]| {
            Open::new(before, kernel, after).agree
        };
        assert!(agree(&both, Some(1), &both) && agree(&both, Some(2), &both));
        assert!(!agree(&both, Some(0), &both) && !agree(&both, Some(3), &both));
        assert!(
            agree(&both, None, &both),
            "who does not tell does not disagree"
        );
        assert!(agree(&[], Some(1), &[opening]), "it has come meanwhile");
        assert!(agree(&[open], Some(0), &[]), "it has gone meanwhile");
        let said = Open::new(&[], Some(2), &[]).disagreement.expect("one");
        assert_eq!(said, "the kernel counts 2 sockets, the registry 0 streams");
    }
}
