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
use serde_json::{Map, Value};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

pub use self::{
    price::{Prices, parse as parse_price, parse_amount},
    read::{Dimension, Interval, Reader, Receipt, UsageRow},
    row::receipt,
};
use crate::{
    config::Config,
    journal::{Journal, Over},
    ledger::{Settled, unix_ms},
};

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
    /// Whether streams are marked as due for a usage report.
    pub reports: bool,
}

impl Settings {
    pub fn new(config: &Config, path: PathBuf) -> Self {
        let days = config.ledger.retention_days;
        Self {
            path,
            daemon: config.rooms.identity.clone(),
            prices: Prices::new(&config.ledger),
            reports: config.usage_reports.url.is_some(),
            retention: (days > 0).then(|| Duration::from_secs(days * 24 * 3600)),
        }
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
    /// Asks for the next usage report after this number.
    NextDue(i64, oneshot::Sender<Option<Due>>),
    Delivered(i64),
}

/// A stream that is to be reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    /// In the order of settlement.
    pub seq: i64,
    /// Names the stream, and the report of it.
    pub receipt: String,
    pub settled_at_ms: u64,
    /// All that is known of it, as it is exported.
    pub stream: Map<String, Value>,
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
            waiting: VecDeque::new(),
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

    /// The next stream that is to be reported, after this number; none if there is none, or if the
    /// database can't be read. Cancel safe.
    pub async fn next_due(&self, after: i64) -> Option<Due> {
        let (reply, answer) = oneshot::channel();
        self.0.messages.send(Message::NextDue(after, reply)).ok()?;
        answer.await.ok()?
    }

    /// The report of this number need not be sent again.
    pub fn delivered(&self, seq: i64) {
        self.0.queued.fetch_add(1, Ordering::Relaxed);
        let _ = self.0.messages.send(Message::Delivered(seq));
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
    waiting: VecDeque<Over>,
    /// Numbers of streams whose report was taken.
    delivered: Vec<i64>,
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
            Message::Delivered(seq) => self.delivered.push(seq),
            Message::NextDue(after, reply) => {
                let daemon = &self.settings.daemon;
                let due = self.database.as_ref().map(|db| db.next_due(daemon, after));
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
    }

    fn write_all(&mut self) {
        while !self.waiting.is_empty() || !self.delivered.is_empty() || self.failing {
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
        database
            .write(entries, &self.delivered, &self.settings)
            .map_err(StoreError::of(path))?;
        let delivered = std::mem::take(&mut self.delivered).len();
        let names: HashSet<_> = self
            .waiting
            .drain(..batch)
            .map(|over| over.name())
            .collect();
        if let Some(journal) = &self.journal {
            journal.stored(&names);
        }
        self.progress
            .send_modify(|p| p.done += (batch + delivered) as u64);
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
        delivered: &[i64],
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
            let mut mark = transaction.prepare("UPDATE streams SET due = 0 WHERE seq = ?1")?;
            for seq in delivered {
                mark.execute([seq])?;
            }
        }
        transaction.commit()
    }

    fn next_due(&self, daemon: &str, after: i64) -> rusqlite::Result<Option<Due>> {
        let sql = format!(
            "SELECT {}, settled_at_ms FROM streams
            WHERE due = 1 AND daemon = ?1 AND seq > ?2 ORDER BY seq LIMIT 1",
            read::columns()
        );
        let due = self
            .connection
            .query_row(&sql, params![daemon, after], |row| {
                Ok(Due {
                    seq: row.get("seq")?,
                    receipt: row.get("receipt")?,
                    settled_at_ms: row.get("settled_at_ms")?,
                    stream: read::object(row)?,
                })
            });
        due.optional()
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
