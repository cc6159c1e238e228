//! `roomwarden force-close`, and the same over the control API: ends rooms for everybody, whoever is
//! in them, and proves it. Our own participants go first, so that their streams are closed on the usual
//! path while others still are being removed; then everybody else, then the room; then the server is
//! asked until it has the room no more. What is gone already is as good as done, so that it may be run
//! again at any time.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{self, Write},
    time::{Duration, Instant},
};

use clap::Args;
use futures_util::{StreamExt, future::BoxFuture, stream};
use livekit_protocol::{ParticipantInfo, participant_info::State};
use serde::Serialize;
use utoipa::ToSchema;
use wildmatch::WildMatch;

use crate::{
    cli::{ConfigArgs, EXIT_ABANDONED, EXIT_OK},
    config::LogFormat,
    dispatch::{api, unreachable},
    domain::backoff,
    room::api::{ApiError, DAEMON_ATTRIBUTE, ListedRoom, RoomApi},
    usage::{self, Failed},
};

/// Rooms at a time, and requests at a time for one.
const ROOMS_AT_ONCE: usize = 16;
const REQUESTS_AT_ONCE: usize = 8;
/// How often the server is asked whether the room is gone.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(2);
/// Of the time that is left: one such part to list who is there, to remove ours, and to remove the
/// others, which may fail for one who is stuck; and to delete the room, which is what counts.
const PART_FOR_PEOPLE: u32 = 4;
const PART_FOR_ROOM: u32 = 2;
/// A room that is made anew, as by a client that comes back by itself, is closed again so often.
const MOST_TIMES: usize = 3;

#[derive(Args)]
pub(crate) struct ForceCloseArgs {
    /// Names of rooms
    #[arg(required_unless_present = "pattern", value_name = "ROOM")]
    rooms: Vec<String>,
    /// All rooms whose name fits: * is any text, ? any character
    #[arg(long, value_name = "PATTERN")]
    pattern: Vec<String>,
    /// Only say which rooms would be closed, and who is in them
    #[arg(long)]
    dry_run: bool,
    /// By when everything is over, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

/// What is to be closed.
pub(crate) struct Order {
    pub rooms: BTreeSet<String>,
    pub patterns: Vec<String>,
    pub dry_run: bool,
    pub deadline: Duration,
}

/// What the daemon of this process had in a room.
pub(crate) struct Ours {
    pub identity: String,
    /// Of the room, once it was joined.
    pub sid: Option<String>,
    /// Or what is still open.
    pub left: Result<(), String>,
}

/// Leaves a room by the close path, with the daemon of this process, and waits for that until a
/// moment; nothing if it is not there.
pub(crate) type Leave<'a> =
    dyn Fn(String, Instant) -> BoxFuture<'a, Option<Ours>> + Send + Sync + 'a;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The server does not have it any more.
    Closed,
    /// There was no such room.
    NotThere,
    WouldClose,
    /// It was closed, and somebody makes it anew each time.
    MadeAnew,
    NotClosed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepKind {
    /// By the daemon itself, if it is asked and is in the room.
    Leave,
    RemoveOurs,
    Remove,
    Delete,
    Verify,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepResult {
    Done,
    /// Somebody else has done it.
    AlreadyGone,
    Failed(String),
}

/// One step, and when it was over.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Step {
    step: StepKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    participant: Option<String>,
    /// Of the room.
    sid: String,
    result: StepResult,
    /// Since the start of the whole.
    at_ms: u64,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RoomReceipt {
    room: String,
    outcome: Outcome,
    /// Who was in it, ours among them.
    participants: Vec<String>,
    ours: Vec<String>,
    steps: Vec<Step>,
}

/// What became of each room.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ForceClosed)]
pub(crate) struct Receipt {
    /// 0 if none of the rooms is left, 4 if one is.
    pub exit_code: u8,
    dry_run: bool,
    seconds: f64,
    rooms: Vec<RoomReceipt>,
}

/// The exit code: 0 only if the server has none of the rooms any more.
pub(crate) async fn force_close(args: ForceCloseArgs, format: Option<LogFormat>) -> u8 {
    usage::done(run(args, format).await)
}

async fn run(args: ForceCloseArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let config = usage::load(&args.config, format)?;
    let api = api(&config)?;
    let order = Order {
        rooms: args.rooms.into_iter().collect(),
        patterns: args.pattern,
        dry_run: args.dry_run,
        deadline: Duration::from_secs(args.deadline),
    };
    let receipt = close_rooms(&api, order, None).await.map_err(unreachable)?;
    let exit_code = receipt.exit_code;
    let mut out = io::stdout().lock();
    if args.json {
        let json = serde_json::to_string(&receipt).map_err(usage::failed)?;
        writeln!(out, "{json}")?;
        return Ok(exit_code);
    }
    if receipt.rooms.is_empty() {
        writeln!(out, "no room fits")?;
    }
    for room in &receipt.rooms {
        writeln!(out, "{}", room.line())?;
    }
    Ok(exit_code)
}

/// Closes rooms by a deadline; `leave` is of the daemon of this process, if it is one. Cancelled
/// half-way it leaves what is done by then.
///
/// # Errors
/// The server does not list the rooms among which those of the patterns are.
pub(crate) async fn close_rooms<'a>(
    api: &'a RoomApi,
    order: Order,
    leave: Option<&'a Leave<'a>>,
) -> Result<Receipt, ApiError> {
    let begun = Instant::now();
    let closer = Closer {
        api,
        begun,
        until: begun + order.deadline,
        dry_run: order.dry_run,
        leave,
    };
    let mut names = order.rooms;
    let patterns: Vec<_> = order
        .patterns
        .iter()
        .map(|pattern| WildMatch::new(pattern))
        .collect();
    if !patterns.is_empty() {
        let listed = closer.persist(closer.until, || api.list_rooms(&[])).await?;
        let fits = |name: &String| patterns.iter().any(|pattern| pattern.matches(name));
        names.extend(listed.into_iter().map(|room| room.name).filter(fits));
    }
    let rooms = stream::iter(names).map(|name| closer.close(name));
    let mut rooms: Vec<_> = rooms.buffer_unordered(ROOMS_AT_ONCE).collect().await;
    rooms.sort_by(|a, b| a.room.cmp(&b.room));
    let open = |room: &RoomReceipt| matches!(room.outcome, Outcome::MadeAnew | Outcome::NotClosed);
    Ok(Receipt {
        exit_code: match rooms.iter().any(open) {
            true => EXIT_ABANDONED,
            false => EXIT_OK,
        },
        dry_run: order.dry_run,
        seconds: begun.elapsed().as_secs_f64(),
        rooms,
    })
}

impl RoomReceipt {
    fn there(&mut self, identity: &str, ours: bool) {
        let all = [&mut self.participants, &mut self.ours];
        for list in all.into_iter().take(if ours { 2 } else { 1 }) {
            if !list.iter().any(|known| known == identity) {
                list.push(identity.to_owned());
            }
        }
    }

    fn line(&self) -> String {
        let people = self.participants.len() - self.ours.len();
        let ours = self.ours.len();
        let who = format!("{ours} of ours, {people} others");
        let mut line = match self.outcome {
            Outcome::Closed => format!("closed, and gone from the server's list ({who})"),
            Outcome::NotThere => "there is no such room".to_owned(),
            Outcome::WouldClose => format!("would be closed ({who})"),
            Outcome::MadeAnew => format!(
                "NOT CLOSED: closed, and made anew each time; keep away who comes back by itself, or \
                 take it out of rooms.join ({who})"
            ),
            Outcome::NotClosed => format!("NOT CLOSED ({who})"),
        };
        for step in &self.steps {
            if let StepResult::Failed(said) = &step.result {
                let whom = step.participant.as_deref().unwrap_or(&step.sid);
                // Writing to a text does not fail.
                let _ = write!(line, "; {:?} {whom}: {said}", step.step);
            }
        }
        let line = line.replace(char::is_control, "\u{fffd}");
        format!(
            "{}: {line}",
            self.room.replace(char::is_control, "\u{fffd}")
        )
    }
}

struct Closer<'a> {
    api: &'a RoomApi,
    begun: Instant,
    until: Instant,
    dry_run: bool,
    leave: Option<&'a Leave<'a>>,
}

impl Closer<'_> {
    async fn close(&self, room: String) -> RoomReceipt {
        let mut receipt = RoomReceipt {
            room,
            outcome: Outcome::NotThere,
            participants: Vec::new(),
            ours: Vec::new(),
            steps: Vec::new(),
        };
        for _ in 0..MOST_TIMES {
            self.leave(&mut receipt).await;
            let listed = match self.listed(&receipt.room).await {
                Ok(Some(listed)) => listed,
                // Closed just now, or never there.
                Ok(None) => return receipt,
                Err(error) => {
                    let said = Err(error);
                    self.note(&mut receipt, StepKind::Verify, None, "", said);
                    receipt.outcome = Outcome::NotClosed;
                    return receipt;
                }
            };
            receipt.outcome = self.close_once(&listed, &mut receipt).await;
            if receipt.outcome != Outcome::Closed {
                return receipt;
            }
        }
        if !matches!(self.listed(&receipt.room).await, Ok(None)) {
            receipt.outcome = Outcome::MadeAnew;
        }
        receipt
    }

    /// Before the server is asked for anything, which may not answer.
    async fn leave(&self, receipt: &mut RoomReceipt) {
        let Some(leave) = self.leave.filter(|_| !self.dry_run) else {
            return;
        };
        let by = self.part(PART_FOR_PEOPLE);
        let Some(ours) = leave(receipt.room.clone(), by).await else {
            return;
        };
        receipt.there(&ours.identity, true);
        let result = match ours.left {
            Ok(()) => StepResult::Done,
            Err(said) => StepResult::Failed(said),
        };
        let sid = ours.sid.unwrap_or_default();
        self.add(receipt, StepKind::Leave, Some(ours.identity), &sid, result);
    }

    async fn close_once(&self, room: &ListedRoom, receipt: &mut RoomReceipt) -> Outcome {
        let ListedRoom { name, sid } = room;
        let by = self.part(PART_FOR_PEOPLE);
        let listed = self.persist(by, || self.api.list_participants(name)).await;
        // Without a list the room can be deleted all the same.
        let there = match listed {
            Ok(participants) => participants,
            Err(error) => {
                self.note(receipt, StepKind::Remove, None, sid, Err(error));
                Vec::new()
            }
        };
        let there = there
            .into_iter()
            .filter(|p| p.state() != State::Disconnected);
        let ours = |p: &ParticipantInfo| p.attributes.contains_key(DAEMON_ATTRIBUTE);
        let (ours, others): (Vec<_>, Vec<_>) = there.partition(ours);
        for (participants, are_ours) in [(&ours, true), (&others, false)] {
            for p in participants {
                receipt.there(&p.identity, are_ours);
            }
        }
        if self.dry_run {
            return Outcome::WouldClose;
        }
        for (step, participants) in [(StepKind::RemoveOurs, ours), (StepKind::Remove, others)] {
            let by = self.part(PART_FOR_PEOPLE);
            let removals = stream::iter(participants).map(|p| async move {
                let identity = p.identity.as_str();
                let removed = self
                    .persist(by, || self.api.remove_participant(name, identity))
                    .await;
                (p.identity, removed)
            });
            let mut removals = removals.buffer_unordered(REQUESTS_AT_ONCE);
            while let Some((identity, removed)) = removals.next().await {
                self.note(receipt, step, Some(identity), sid, removed);
            }
        }
        let by = self.part(PART_FOR_ROOM);
        let deleted = self.persist(by, || self.api.delete_room(name)).await;
        self.note(receipt, StepKind::Delete, None, sid, deleted);
        loop {
            match self.listed(name).await {
                Ok(listed) if listed.as_ref().is_none_or(|room| room.sid != *sid) => {
                    self.note(receipt, StepKind::Verify, None, sid, Ok(true));
                    return Outcome::Closed;
                }
                Ok(_) if Instant::now() >= self.until => {
                    let said = "the server still has it at the deadline".to_owned();
                    let result = StepResult::Failed(said);
                    self.add(receipt, StepKind::Verify, None, sid, result);
                    return Outcome::NotClosed;
                }
                Ok(_) => tokio::time::sleep(LOOK_EVERY).await,
                Err(error) => {
                    self.note(receipt, StepKind::Verify, None, sid, Err(error));
                    return Outcome::NotClosed;
                }
            }
        }
    }

    async fn listed(&self, room: &str) -> Result<Option<ListedRoom>, ApiError> {
        let names = [room.to_owned()];
        let listed = self.persist(self.until, || self.api.list_rooms(&names));
        let listed = listed.await?;
        Ok(listed.into_iter().find(|listed| listed.name == room))
    }

    /// By when a step is given up: it may not use up the time of those that follow it.
    fn part(&self, part: u32) -> Instant {
        let now = Instant::now();
        now + self.until.saturating_duration_since(now) / part
    }

    /// Asks until there is an answer, or it is too late. A refusal is an answer.
    async fn persist<T, F: Future<Output = Result<T, ApiError>>>(
        &self,
        by: Instant,
        ask: impl Fn() -> F,
    ) -> Result<T, ApiError> {
        let mut failures = 0;
        loop {
            let error = match tokio::time::timeout_at(by.into(), ask()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error @ (ApiError::Credentials { .. } | ApiError::Argument { .. }))) => {
                    return Err(error);
                }
                Ok(Err(error)) => error,
                Err(_) => return Err(self.api.too_late()),
            };
            let pause = backoff(failures, RETRY_FIRST, RETRY_MOST, fastrand::f64());
            failures += 1;
            if Instant::now() + pause >= by {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn note(
        &self,
        receipt: &mut RoomReceipt,
        step: StepKind,
        participant: Option<String>,
        sid: &str,
        result: Result<bool, ApiError>,
    ) {
        let result = match result {
            Ok(true) => StepResult::Done,
            Ok(false) => StepResult::AlreadyGone,
            Err(error) => StepResult::Failed(error.to_string()),
        };
        self.add(receipt, step, participant, sid, result);
    }

    fn add(
        &self,
        receipt: &mut RoomReceipt,
        step: StepKind,
        participant: Option<String>,
        sid: &str,
        result: StepResult,
    ) {
        receipt.steps.push(Step {
            step,
            participant,
            sid: sid.to_owned(),
            result,
            at_ms: self.begun.elapsed().as_millis() as u64,
        });
    }
}
