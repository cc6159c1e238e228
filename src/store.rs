//! The durable ledger: every stream from permit to receipt, in an SQLite database, for usage, export
//! and audit.
//!
//! A thread of its own writes what is over, many in one transaction. Nobody waits for it: a stream
//! that is over is in the journal first, and leaves that only when the database has it. So the pair
//! is whole whatever instruction a crash hits, and a database that can't be written costs nothing but
//! a longer journal.

mod price;
mod read;
mod row;
mod schema;

use std::{
    collections::{HashSet, VecDeque},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

pub use self::{
    price::{Prices, parse as parse_price, parse_amount},
    read::{Dimension, Interval, Reader, Receipt, UsageRow},
    row::receipt,
};
use crate::{
    config::{Config, ReportEvent},
    journal::{Journal, Over, file_name},
    ledger::{Settled, unix_ms},
};

/// Of a room or a session, the last ones are reported one by one.
const MAX_RECEIPTS: usize = 1000;
/// Beginnings are measured by two clocks.
const CLOCKS_DIFFER_MS: u64 = 20;
/// Rows in one transaction.
const BATCH: usize = 1000;
/// Rows that wait for a database that can't be written; the journal has them as well.
const MAX_WAITING: usize = 100_000;
/// After a failure: how often it is tried again. Also how often an idle thread looks up.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often what is too old is deleted, and how much at once, so that receipts need not wait.
const RETAIN_EVERY: Duration = Duration::from_secs(3600);
const DELETE_AT_ONCE: usize = 5000;
/// By so much the wall clock may differ from the other between two deletions. If it does by more it
/// was set, and what is old by it may not be.
const CLOCK_SLACK: Duration = Duration::from_secs(60);

#[derive(Debug, Error)]
pub enum StoreError {
    #[error(
        "the ledger {path} was written by a newer roomwarden (version {version} of its schema, this \
         one knows {known}): run that one, or set another ledger.file"
    )]
    Newer {
        path: PathBuf,
        version: u32,
        known: u32,
    },
    #[error("{path} is a database, but no ledger of roomwarden: set another ledger.file")]
    Foreign { path: PathBuf },
    #[error("there is no ledger at {path} yet (ledger.file); `roomwarden run` makes it")]
    Missing { path: PathBuf },
    #[error(
        "the ledger {path} is of an older roomwarden (version {version} of its schema): \
         `roomwarden run` brings it up to date"
    )]
    Older { path: PathBuf, version: u32 },
    #[error("the sums have more than {most} rows")]
    TooManyRows { most: u32 },
    #[error("the ledger {path} is damaged: {said}")]
    Damaged { path: PathBuf, said: String },
    #[error("the ledger {path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("the ledger {path}: {error}")]
    Sqlite {
        path: PathBuf,
        error: rusqlite::Error,
    },
}

impl StoreError {
    /// Of what SQLite says of this file.
    fn of(path: &Path) -> impl Fn(rusqlite::Error) -> Self + Copy {
        move |error| {
            let path = path.to_owned();
            match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged {
                    path,
                    said: error.to_string(),
                },
                _ => Self::Sqlite { path, error },
            }
        }
    }

    /// The same connection may do with another try.
    fn is_passing(&self) -> bool {
        let code = match self {
            Self::Sqlite { error, .. } => error.sqlite_error_code(),
            _ => None,
        };
        use ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull};
        matches!(code, Some(DiskFull | DatabaseBusy | DatabaseLocked))
    }

    /// No other try would end better.
    fn is_final(&self) -> bool {
        matches!(self, Self::Newer { .. } | Self::Foreign { .. })
    }
}

/// How the ledger is kept.
#[derive(Debug, Clone)]
pub struct Settings {
    pub path: PathBuf,
    /// The identity of the daemon, whose receipts these are.
    pub daemon: String,
    pub prices: Prices,
    /// After so long a receipt is deleted; none for never.
    pub retention: Option<Duration>,
    /// Whether there are usage reports.
    pub reports: bool,
    /// Of what.
    pub events: Vec<ReportEvent>,
}

impl Settings {
    pub fn new(config: &Config, path: PathBuf) -> Self {
        let days = config.ledger.retention_days;
        Self {
            path,
            daemon: config.rooms.identity.clone(),
            prices: Prices::new(&config.ledger),
            reports: config.usage_reports.url.is_some(),
            events: config.usage_reports.events.clone(),
            retention: (days > 0).then(|| Duration::from_secs(days * 24 * 3600)),
        }
    }
}

impl Settings {
    fn reports(&self, event: ReportEvent) -> bool {
        self.reports && self.events.contains(&event)
    }
}

/// Cheap to clone. Its thread ends with the last clone, once what is queued is written.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

struct Shared {
    messages: Sender<Message>,
    /// What was queued so far.
    queued: AtomicU64,
    progress: watch::Receiver<Progress>,
    /// For [`Store::changed`].
    changes: tokio::sync::Mutex<watch::Receiver<Progress>>,
    /// Of this run, for [`Store::settle`].
    run: u64,
}

enum Message {
    Over(Over),
    Finished(Finished),
    /// Asks for the next report after these.
    NextDue(Taken, oneshot::Sender<Option<Due>>),
    Delivered(Mark),
}

/// A room, or somebody's session in it, of which everything is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    pub room: String,
    pub room_sid: Option<String>,
    /// The identity, of a session.
    pub participant: Option<String>,
    /// Unix time, in milliseconds.
    pub begun_at_ms: u64,
    pub ended_at_ms: u64,
    pub reason: String,
}

impl Finished {
    /// A room, which has just come to its end.
    pub fn room(name: &str, sid: Option<String>, begun: Instant, reason: String) -> Self {
        let now = unix_ms(SystemTime::now());
        Self {
            room: name.to_owned(),
            room_sid: sid,
            participant: None,
            begun_at_ms: now.saturating_sub(begun.elapsed().as_millis() as u64),
            ended_at_ms: now,
            reason,
        }
    }

    /// The session of somebody in it.
    pub fn of(self, identity: String) -> Self {
        let participant = Some(identity);
        Self {
            participant,
            ..self
        }
    }

    fn event(&self) -> ReportEvent {
        match self.participant {
            Some(_) => ReportEvent::SessionFinished,
            None => ReportEvent::RoomFinished,
        }
    }
}

/// Names what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Stream(i64),
    Finished(i64),
}

/// What was taken already, whether or not that could be written down.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    stream: i64,
    finished: i64,
}

impl Taken {
    pub fn take(&mut self, mark: Mark) {
        match mark {
            Mark::Stream(seq) => self.stream = seq,
            Mark::Finished(seq) => self.finished = seq,
        }
    }
}

/// What is to be reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    pub mark: Mark,
    pub event: &'static str,
    /// Names the report.
    pub id: String,
    pub at_ms: u64,
    /// All that is known of it.
    pub content: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    /// Of those that were queued, so many are in the database, or given up.
    done: u64,
    failing: bool,
}

impl Store {
    /// Opens or makes the database; blocks on the disk. One that can't be used now is complained of
    /// and tried again, while the journal keeps what it is to have. What the journal has from
    /// earlier runs is for [`Store::carry_over`].
    ///
    /// # Errors
    /// It is of a newer version, or somebody else's.
    pub fn open(settings: Settings, journal: Option<Journal>) -> Result<Self, StoreError> {
        let opened = Database::open(&settings.path, false).and_then(|database| {
            let last = database.last_run(&settings.daemon);
            let last = last.map_err(StoreError::of(&settings.path))?;
            Ok((database, last))
        });
        let mut run = unix_ms(SystemTime::now());
        let opened = match opened {
            Ok((database, last)) => {
                run = run.max(last + 1);
                if let Some(journal) = &journal {
                    journal.follow(last);
                }
                Ok(database)
            }
            Err(error) if error.is_final() => return Err(error),
            Err(error) => Err(error),
        };
        if let Some(journal) = &journal {
            run = journal.run();
            journal.keep_for_store();
        }
        let (messages, queue) = mpsc::channel();
        let (progress, watched) = watch::channel(Progress::default());
        let mut writer = Writer {
            settings,
            database: None,
            run,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            delivered: Vec::new(),
            journal,
            progress,
            failing: false,
            suspect: false,
            given_up: 0,
            retained: Clocks::now(),
        };
        match opened {
            Ok(database) => writer.database = Some(database),
            Err(error) => writer.failed(&error),
        }
        let path = writer.settings.path.clone();
        let thread = thread::Builder::new().name("ledger".into());
        let started = thread.spawn(move || writer.run(&queue));
        started.map_err(|error| StoreError::Io { path, error })?;
        Ok(Self(Arc::new(Shared {
            messages,
            queued: AtomicU64::new(0),
            changes: tokio::sync::Mutex::new(watched.clone()),
            progress: watched,
            run,
        })))
    }

    /// A stream is over. Never blocks and never fails: the journal has it until the database does.
    pub fn settle(&self, settled: &Arc<Settled>) {
        self.enter(Over::Settled(self.0.run, settled.clone()));
    }

    /// What the journal has of earlier runs, in order. What the database has already stays as it is.
    pub fn carry_over(&self, over: impl IntoIterator<Item = Over>) {
        for over in over {
            self.enter(over);
        }
    }

    /// Everything of a room or a session is closed, after the streams that were settled before. Never
    /// blocks; forgotten if nothing is reported.
    pub fn finished(&self, finished: Finished) {
        self.0.queued.fetch_add(1, Ordering::Relaxed);
        let _ = self.0.messages.send(Message::Finished(finished));
    }

    /// What is to be reported next; none if there is nothing, or if the database can't be read. In the
    /// order in which it happened. Cancel safe.
    pub async fn next_due(&self, taken: Taken) -> Option<Due> {
        let (reply, answer) = oneshot::channel();
        self.0.messages.send(Message::NextDue(taken, reply)).ok()?;
        answer.await.ok()?
    }

    /// This need not be sent again.
    pub fn delivered(&self, mark: Mark) {
        self.0.queued.fetch_add(1, Ordering::Relaxed);
        let _ = self.0.messages.send(Message::Delivered(mark));
    }

    /// Waits until more is in the database than at the last time. Cancel safe.
    pub async fn changed(&self) {
        let mut changes = self.0.changes.lock().await;
        if changes.changed().await.is_err() {
            // Its thread is gone: nothing will change.
            std::future::pending().await
        }
    }

    fn enter(&self, over: Over) {
        self.0.queued.fetch_add(1, Ordering::Relaxed);
        // The thread ends after this, unless by a panic.
        let _ = self.0.messages.send(Message::Over(over));
    }

    /// Waits until everything so far is in the database, and would survive a power loss; false if
    /// it can't be written. Cancel safe; whoever calls it sets the limit.
    pub async fn flushed(&self) -> bool {
        let last = self.0.queued.load(Ordering::Relaxed);
        let mut progress = self.0.progress.clone();
        let known = progress.wait_for(|p| p.done >= last || p.failing).await;
        known.is_ok_and(|p| p.done >= last)
    }
}

/// Both clocks at one moment.
#[derive(Clone, Copy)]
struct Clocks {
    wall: SystemTime,
    steady: Instant,
}

impl Clocks {
    fn now() -> Self {
        Self {
            wall: SystemTime::now(),
            steady: Instant::now(),
        }
    }

    /// Whether the wall clock has gone on since then as the other has.
    fn agree_since(self, then: Self) -> bool {
        let steady = self.steady.saturating_duration_since(then.steady);
        let expected = then.wall + steady;
        let apart = self
            .wall
            .duration_since(expected)
            .unwrap_or_else(|early| early.duration());
        apart <= CLOCK_SLACK
    }
}

/// What the thread has.
struct Writer {
    settings: Settings,
    database: Option<Database>,
    run: u64,
    waiting: VecDeque<Over>,
    finished: Vec<Finished>,
    /// What was reported.
    delivered: Vec<Mark>,
    journal: Option<Journal>,
    progress: watch::Sender<Progress>,
    failing: bool,
    /// Damage has shown.
    suspect: bool,
    given_up: u64,
    /// When what is too old was last looked for.
    retained: Clocks,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Message>) {
        let mut open = true;
        // While it fails: not with each receipt.
        let mut again = Instant::now();
        while open {
            match queue.recv_timeout(LOOK_AGAIN) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            for message in queue.try_iter() {
                self.take(message);
            }
            self.bound();
            if !self.failing || again <= Instant::now() || !open {
                self.write_all();
                again = Instant::now() + LOOK_AGAIN;
            }
            self.retain(Clocks::now());
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Over(over) => self.waiting.push_back(over),
            Message::Finished(finished) if self.settings.reports(finished.event()) => {
                self.finished.push(finished);
            }
            Message::Finished(_) => self.progress.send_modify(|p| p.done += 1),
            Message::Delivered(mark) => self.delivered.push(mark),
            Message::NextDue(taken, reply) => {
                let daemon = &self.settings.daemon;
                let due = self.database.as_ref().map(|db| db.next_due(daemon, taken));
                let due = due.unwrap_or(Ok(None)).unwrap_or_else(|error| {
                    self.failed(&StoreError::of(&self.settings.path)(error));
                    None
                });
                // Who asked may have gone.
                let _ = reply.send(due);
            }
        }
    }

    /// What is too much for memory is given up, oldest first; the journal may still have it.
    fn bound(&mut self) {
        while self.waiting.len() > MAX_WAITING {
            self.waiting.pop_front();
            self.given_up += 1;
            self.progress.send_modify(|p| p.done += 1);
        }
        let too_many = self.finished.len().saturating_sub(MAX_WAITING);
        self.finished.drain(..too_many);
        self.progress.send_modify(|p| p.done += too_many as u64);
    }

    fn write_all(&mut self) {
        let there_is = |writer: &Self| {
            let Self {
                waiting,
                finished,
                delivered,
                ..
            } = writer;
            !waiting.is_empty() || !finished.is_empty() || !delivered.is_empty()
        };
        while there_is(self) || self.failing {
            match self.write() {
                Ok(()) if self.failing => {
                    (self.failing, self.suspect) = (false, false);
                    self.progress.send_modify(|p| p.failing = false);
                    let given_up = self.given_up;
                    tracing::info!(given_up, "the ledger can be written again");
                }
                Ok(()) => {}
                Err(error) => return self.failed(&error),
            }
        }
    }

    fn failed(&mut self, error: &StoreError) {
        if !error.is_passing() {
            // What is open may be what is wrong.
            self.database = None;
        }
        self.suspect |= matches!(error, StoreError::Damaged { .. });
        if !std::mem::replace(&mut self.failing, true) {
            let kept = match self.journal {
                Some(_) => "the journal keeps receipts until it can",
                None => "there is no journal, so that receipts are in memory only until it can",
            };
            tracing::error!("the ledger can't be written: {error}; {kept}");
        }
        self.progress.send_modify(|p| p.failing = true);
    }

    fn write(&mut self) -> Result<(), StoreError> {
        let path = &self.settings.path;
        if let Some(database) = &self.database
            && !database.is_there(path)
        {
            tracing::error!(
                ledger = %path.display(),
                "somebody removed or replaced the ledger's file: a new one is begun"
            );
            self.database = None;
        }
        let database = match &mut self.database {
            Some(database) => database,
            none => none.insert(Database::open(path, self.suspect)?),
        };
        let batch = self.waiting.len().min(BATCH);
        let entries = self.waiting.iter().take(batch);
        // Not before the streams that are in it.
        let finished = match batch == self.waiting.len() {
            true => std::mem::take(&mut self.finished),
            false => Vec::new(),
        };
        let marks = Marks {
            run: self.run,
            finished: &finished,
            delivered: &self.delivered,
        };
        if let Err(error) = database.write(entries, &marks, &self.settings) {
            self.finished.splice(..0, finished);
            return Err(StoreError::of(path)(error));
        }
        let marked = std::mem::take(&mut self.delivered).len() + finished.len();
        let names: HashSet<_> = self
            .waiting
            .drain(..batch)
            .map(|over| over.name())
            .collect();
        if let Some(journal) = &self.journal {
            journal.stored(&names);
        }
        self.progress
            .send_modify(|p| p.done += (batch + marked) as u64);
        Ok(())
    }

    /// Deletes what is too old, every now and then.
    fn retain(&mut self, now: Clocks) {
        let (Some(retention), Some(database)) = (self.settings.retention, &self.database) else {
            return;
        };
        if now.steady.saturating_duration_since(self.retained.steady) < RETAIN_EVERY {
            return;
        }
        if !now.agree_since(self.retained) {
            tracing::warn!("the clock was set: old receipts are looked for later");
            self.retained = now;
            return;
        }
        let before = unix_ms(now.wall).saturating_sub(retention.as_millis() as u64);
        match database.delete(before, self.settings.reports) {
            Ok(deleted) => {
                // Else the journal's old lines would bring them back with the next start.
                if let Some(journal) = self.journal.as_ref().filter(|_| deleted > 0) {
                    journal.compact();
                }
                // The rest with the next look.
                if deleted < DELETE_AT_ONCE {
                    self.retained = now;
                }
            }
            Err(error) => self.failed(&StoreError::of(&self.settings.path)(error)),
        }
    }
}

/// What is written beside the streams.
struct Marks<'a> {
    run: u64,
    finished: &'a [Finished],
    delivered: &'a [Mark],
}

/// An open database, to write to.
struct Database {
    connection: Connection,
    /// Device and inode.
    file: Option<(u64, u64)>,
}

impl Database {
    fn open(path: &Path, suspect: bool) -> Result<Self, StoreError> {
        let connection = schema::open(path, suspect)?;
        let file = schema::file_of(path);
        Ok(Self { connection, file })
    }

    /// Whether what is written can be found again.
    fn is_there(&self, path: &Path) -> bool {
        self.file == schema::file_of(path)
    }

    /// The last run of a daemon that it knows of; 0 if it knows none.
    fn last_run(&self, daemon: &str) -> rusqlite::Result<u64> {
        let sql = "SELECT coalesce(max(run), 0) FROM streams WHERE daemon = ?1";
        self.connection.query_row(sql, [daemon], |row| row.get(0))
    }

    /// All of them, or none.
    fn write<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Over>,
        marks: &Marks<'_>,
        settings: &Settings,
    ) -> rusqlite::Result<()> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction.prepare(row::INSERT)?;
            for over in entries {
                row::insert(&mut insert, over, settings)?;
            }
            let mut insert = transaction.prepare(row::INSERT_FINISHED)?;
            for finished in marks.finished {
                row::insert_finished(&mut insert, marks.run, finished, settings)?;
            }
            let mut stream = transaction.prepare("UPDATE streams SET due = 0 WHERE seq = ?1")?;
            let mut finished = transaction.prepare("DELETE FROM finished WHERE seq = ?1")?;
            for mark in marks.delivered {
                match mark {
                    Mark::Stream(seq) => stream.execute([seq])?,
                    Mark::Finished(seq) => finished.execute([seq])?,
                };
            }
        }
        transaction.commit()
    }

    fn next_due(&self, daemon: &str, taken: Taken) -> rusqlite::Result<Option<Due>> {
        let finished = self.next_finished(daemon, taken.finished)?;
        let until = finished.as_ref().map_or(i64::MAX, |(_, last)| *last);
        let sql = format!(
            "SELECT {}, seq, settled_at_ms FROM streams
            WHERE due = 1 AND daemon = ?1 AND seq > ?2 AND seq <= ?3 ORDER BY seq LIMIT 1",
            read::columns()
        );
        let values = params![daemon, taken.stream, until];
        let stream = self.connection.query_row(&sql, values, |row| {
            let stream = read::object(row)?;
            Ok(Due {
                mark: Mark::Stream(row.get("seq")?),
                event: ReportEvent::StreamSettled.name(),
                id: row.get("receipt")?,
                at_ms: row.get("settled_at_ms")?,
                content: Map::from_iter([("stream".to_owned(), stream.into())]),
            })
        });
        Ok(stream.optional()?.or(finished.map(|(due, _)| due)))
    }

    /// With the number of its last stream.
    fn next_finished(&self, daemon: &str, after: i64) -> rusqlite::Result<Option<(Due, i64)>> {
        let sql = "SELECT * FROM finished WHERE daemon = ?1 AND seq > ?2 ORDER BY seq LIMIT 1";
        let finished = self
            .connection
            .query_row(sql, params![daemon, after], |row| {
                let (seq, run, last): (i64, i64, i64) =
                    (row.get("seq")?, row.get("run")?, row.get("last")?);
                let finished = Finished {
                    room: row.get("room")?,
                    room_sid: row.get("room_sid")?,
                    participant: row.get("participant")?,
                    begun_at_ms: row.get("begun_at_ms")?,
                    ended_at_ms: row.get("ended_at_ms")?,
                    reason: row.get("reason")?,
                };
                Ok((seq, run, last, finished))
            });
        let Some((seq, run, last, finished)) = finished.optional()? else {
            return Ok(None);
        };
        let content = self.account(daemon, run, last, &finished)?;
        let due = Due {
            mark: Mark::Finished(seq),
            event: finished.event().name(),
            id: format!("{}/{run}/finished/{seq}", file_name(daemon)),
            at_ms: finished.ended_at_ms,
            content,
        };
        Ok(Some((due, last)))
    }

    /// The streams of a room or a session, by outcome and one by one.
    fn account(
        &self,
        daemon: &str,
        run: i64,
        last: i64,
        finished: &Finished,
    ) -> rusqlite::Result<Map<String, Value>> {
        const OF_IT: &str = "daemon = ?1 AND run = ?2 AND seq <= ?3 AND room = ?4
            AND opened_at_ms BETWEEN ?5 AND ?6 AND participant = coalesce(?7, participant)";
        let begun = finished.begun_at_ms.saturating_sub(CLOCKS_DIFFER_MS);
        let ended = finished.ended_at_ms + CLOCKS_DIFFER_MS;
        let who = &finished.participant;
        let values = params![daemon, run, last, finished.room, begun, ended, who];
        let sql = format!(
            "SELECT outcome, count(*), total(audio_seconds) FROM streams WHERE {OF_IT} \
             GROUP BY outcome"
        );
        let mut statement = self.connection.prepare(&sql)?;
        let mut rows = statement.query(values)?;
        let (mut outcomes, mut audio_seconds) = (Map::new(), 0.0);
        while let Some(row) = rows.next()? {
            outcomes.insert(row.get(0)?, row.get::<_, i64>(1)?.into());
            audio_seconds += row.get::<_, f64>(2)?;
        }
        let columns = read::columns();
        let sql = format!(
            "SELECT {columns} FROM streams WHERE {OF_IT} ORDER BY seq DESC LIMIT {MAX_RECEIPTS}"
        );
        let mut statement = self.connection.prepare(&sql)?;
        let receipts = statement.query_map(values, read::object)?;
        let receipts = receipts.collect::<Result<Vec<_>, _>>()?;
        let about = json!({
            "room": finished.room,
            "room_sid": finished.room_sid,
            "participant": finished.participant,
            "begun_at_ms": finished.begun_at_ms,
            "ended_at_ms": finished.ended_at_ms,
            "reason": finished.reason,
            "audio_seconds": audio_seconds,
            "streams": outcomes,
            "receipts": receipts,
        });
        let name = if who.is_some() { "session" } else { "room" };
        Ok(Map::from_iter([(name.to_owned(), about)]))
    }

    /// Deletes receipts of before a moment, in Unix milliseconds; how many, of at most so many. With
    /// `reports`, none whose report is due.
    fn delete(&self, before_ms: u64, reports: bool) -> rusqlite::Result<usize> {
        let sql = "DELETE FROM streams WHERE seq IN (SELECT seq FROM streams \
                   WHERE settled_at_ms < ?1 AND opened_at_ms < ?1 AND NOT (due AND ?3) LIMIT ?2)";
        self.connection
            .execute(sql, params![before_ms, DELETE_AT_ONCE, reports])
    }
}

#[cfg(test)]
mod tests;
