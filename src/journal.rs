//! The journal: which streams are open, on disk, so that the start after a SIGKILL, an OOM or a
//! power loss can name them. A stream is in it before the provider is asked for anything.
//!
//! It is a file of JSON lines. Each line holds the whole of what is known of one stream, and the
//! last one of a stream counts. Two threads serve it: one writes and never waits for the disk's
//! cache, so that what a SIGKILL finds is a fraction of a millisecond old; the other syncs, for
//! everyone who waits at once. Callers only queue, under a lock that is never held over IO.

mod disk;
mod lines;

pub use self::lines::file_name;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use self::{
    disk::{Disk, Medium, Syncable},
    lines::{VERSION, What, read, to_line},
};
use crate::{
    domain::StreamId,
    ledger::{Settled, unix_ms},
    registry::OpenStream,
};

/// What a stream that is being opened waits for the disk. Then it goes on: a transcript late by
/// this much is worth the entry, one that never comes is not.
const SYNC_LIMIT: Duration = Duration::from_millis(500);
/// After a failure: how often writing it anew is tried. Also how often an idle journal is looked
/// after, since a file that somebody removed tells nobody.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The file is written anew beyond this size, and beyond twice what it was when last written anew.
const MAX_SIZE: u64 = 4 << 20;
/// Settled streams that are kept, of those that are over: without a store, for people to read; with
/// one, all that it does not have, up to a bound on memory (about 60 MB).
const KEPT: usize = 1000;
const KEPT_FOR_STORE: usize = 100_000;
/// Lines that wait for the disk; beyond that the file is written anew from memory.
const MAX_PENDING: usize = 1 << 20;

#[derive(Debug, Error)]
pub enum JournalError {
    #[error(
        "the journal {path} can't be used: {error} (state.dir: set it to a directory that this \
         user may write to)"
    )]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "the journal {path} is in use by another roomwarden: give each its own rooms.identity or \
         its own state.dir"
    )]
    Locked { path: PathBuf },
    #[error(
        "the journal {path} was written by a newer roomwarden (version {version} of the file, \
         this one knows {VERSION}): run that one, or set another state.dir"
    )]
    Newer { path: PathBuf, version: u64 },
}

/// A stream for all times: the run of the daemon it was in, and its number there.
pub type StreamName = (u64, StreamId);

/// A stream that an earlier run left open, since it was killed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Orphan {
    /// The run that left it.
    #[serde(default)]
    pub run: u64,
    #[serde(flatten)]
    pub stream: OpenStream,
    /// Unix time, in milliseconds, by which the provider has let go of it.
    pub free_by_ms: u64,
}

/// A stream that is over, and that the store may not have.
#[derive(Debug, Clone, PartialEq)]
pub enum Over {
    Settled(u64, Arc<Settled>),
    Orphaned(Orphan),
}

impl Over {
    pub fn name(&self) -> StreamName {
        match self {
            Self::Settled(run, settled) => (*run, settled.id),
            Self::Orphaned(orphan) => (orphan.run, orphan.stream.id),
        }
    }
}

/// What the journal of a daemon says that may be running.
#[derive(Debug)]
pub struct Present {
    /// Streams that are open, oldest first, each with its run.
    pub open: Vec<(u64, OpenStream)>,
    /// Whether a process has the journal; none if the system does not tell.
    pub daemon_runs: Option<bool>,
}

/// Reads the journal and leaves it as it is; none if there is none.
///
/// # Errors
/// It can't be read, or is too new.
pub fn present(dir: &Path, identity: &str) -> Result<Option<Present>, JournalError> {
    let path = dir.join(format!("{}.journal", file_name(identity)));
    if !path.exists() {
        return Ok(None);
    }
    let daemon_runs = disk::is_locked(&path);
    let found = read(&path)?;
    let open = found.open.into_iter();
    Ok(Some(Present {
        open: open.map(|((run, _), (stream, _))| (run, stream)).collect(),
        daemon_runs,
    }))
}

/// A journal that was opened, and what it said.
pub struct Recovered {
    pub journal: Journal,
    /// Streams that are open by the journal and belong to no process any more, oldest first, each
    /// with its run.
    pub left_open: Vec<(u64, OpenStream)>,
    /// Those that are over, in the order of their ends.
    pub over: Vec<Over>,
}

/// Cheap to clone. Its threads end with the last clone, once what is queued is written.
#[derive(Clone)]
pub struct Journal(Arc<Handle>);

struct Handle(Arc<Shared>);

struct Shared {
    path: PathBuf,
    /// Names this run of the daemon, since stream numbers start anew with each.
    run: AtomicU64,
    book: Mutex<Book>,
    to_write: Condvar,
    to_sync: Condvar,
    progress: watch::Sender<Progress>,
    missed: AtomicU64,
}

struct Book {
    /// The last line of each open stream.
    open: BTreeMap<StreamName, Vec<u8>>,
    /// The last lines of streams that are over, oldest first.
    settled: VecDeque<(StreamName, Vec<u8>)>,
    /// So many of them at most.
    most: usize,
    /// Settled streams that were given up before the store had them.
    given_up: u64,
    pending: Vec<u8>,
    /// Lines so far; each is known by its number.
    queued: u64,
    /// The last line that is to be synced without waiting for others to want it.
    wanted: u64,
    /// The last line in the file, and that file.
    written: u64,
    file: Arc<dyn Syncable>,
    /// The file does not hold what it should: it is to be written anew.
    rewrite: Option<String>,
    closed: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// The last line that a power loss leaves.
    durable: u64,
    /// It can't be written.
    failing: bool,
    /// It was not written within the limit, and has not been since.
    stalled: bool,
}

impl Journal {
    /// Opens the journal of the daemon with this identity, in `dir`, which is created if need be;
    /// blocks on the disk.
    ///
    /// # Errors
    /// It can't be read or written, is in use, or is too new.
    pub fn open(dir: &Path, identity: &str) -> Result<Recovered, JournalError> {
        let path = dir.join(format!("{}.journal", file_name(identity)));
        let failed = |error| JournalError::Io {
            path: path.clone(),
            error,
        };
        let mut disk = Disk::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => JournalError::Locked { path: path.clone() },
            _ => failed(error),
        })?;
        let found = read(&path)?;
        if found.damaged > 0 {
            let kept = path.with_extension("journal.damaged");
            let _ = fs::remove_file(&kept);
            fs::hard_link(&path, &kept)
                .or_else(|_| fs::copy(&path, &kept).map(drop))
                .map_err(failed)?;
            for said in &found.damage {
                tracing::error!(journal = %path.display(), "{said}");
            }
            tracing::error!(
                journal = %path.display(), lines = found.damaged, kept = %kept.display(),
                "the journal is damaged: streams that only these lines name are not known; what is \
                 readable is used"
            );
        }
        let run = unix_ms(SystemTime::now()).max(found.last_run + 1);
        let (mut left_open, mut over) = (Vec::new(), Vec::new());
        let mut book = Book::new(disk.file());
        for (name, (stream, line)) in found.open {
            left_open.push((name.0, stream));
            book.open.insert(name, line);
        }
        for (ended, line) in found.over {
            book.settled.push_back((ended.name(), line));
            over.push(ended);
        }
        disk.rewrite(&book.snapshot()).map_err(failed)?;
        let journal = Self::start(&path, run, book, disk).map_err(failed)?;
        Ok(Recovered {
            journal,
            left_open,
            over,
        })
    }

    fn start(path: &Path, run: u64, book: Book, medium: impl Medium) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            run: AtomicU64::new(run),
            book: Mutex::new(book),
            to_write: Condvar::new(),
            to_sync: Condvar::new(),
            progress: watch::Sender::default(),
            missed: AtomicU64::new(0),
        });
        let journal = Self(Arc::new(Handle(shared.clone())));
        let syncing = shared.clone();
        thread::Builder::new()
            .name("journal-sync".into())
            .spawn(move || syncing.sync_all())?;
        thread::Builder::new()
            .name("journal".into())
            .spawn(move || shared.write_all(medium))?;
        Ok(journal)
    }

    /// Enters a stream; the ticket is for [`Journal::durable`].
    pub fn enter(&self, stream: &OpenStream) -> u64 {
        self.shared().queue(stream.id, What::Open(stream), true)
    }

    /// More is known of a stream. Not synced by itself: it is an aid, not the promise.
    pub fn update(&self, stream: &OpenStream) {
        self.shared().queue(stream.id, What::Open(stream), false);
    }

    /// A stream is over.
    pub fn settle(&self, settled: &Settled) {
        let what = What::Settled(settled);
        self.shared().queue(settled.id, what, true);
    }

    /// Streams of earlier runs were reported: the next start need not.
    pub fn settle_orphans(&self, orphans: &[Orphan]) {
        self.shared().settle_orphans(orphans);
    }

    /// From now on streams that are over stay until the store has them ([`Journal::stored`]).
    pub fn keep_for_store(&self) {
        self.shared().book().most = KEPT_FOR_STORE;
    }

    /// The store has these, and will have them after a crash. They go with the next file.
    pub fn stored(&self, names: &HashSet<StreamName>) {
        let mut book = self.shared().book();
        book.settled.retain(|(name, _)| !names.contains(name));
    }

    /// Writes the file anew, without what the store has.
    pub fn compact(&self) {
        let shared = self.shared();
        shared.rewrite(&mut shared.book());
    }

    /// Names this run, for ever: stream numbers start anew with each.
    pub fn run(&self) -> u64 {
        self.shared().run.load(Ordering::Relaxed)
    }

    /// The run is named after this one, which a store knows and a journal that was lost does not.
    /// To be called before the first stream.
    pub fn follow(&self, last_run: u64) {
        self.shared().run.fetch_max(last_run + 1, Ordering::Relaxed);
    }

    /// Waits until what the ticket is for would survive a power loss; false, soon, if the disk
    /// fails or does not answer. Cancel safe.
    pub async fn durable(&self, ticket: u64) -> bool {
        let shared = self.shared();
        let mut progress = shared.progress.subscribe();
        let known = |p: &Progress| p.durable >= ticket || p.failing || p.stalled;
        let waited = tokio::time::timeout(SYNC_LIMIT, progress.wait_for(known)).await;
        if matches!(&waited, Ok(Ok(p)) if p.durable >= ticket) {
            return true;
        }
        shared.missed.fetch_add(1, Ordering::Relaxed);
        let first = waited.is_err()
            && shared
                .progress
                .send_if_modified(|p| !std::mem::replace(&mut p.stalled, true));
        if first {
            tracing::error!(
                "the journal's disk does not answer within {SYNC_LIMIT:?}: streams go on without \
                 it, and would not be named after a crash"
            );
        }
        false
    }

    /// Waits until everything so far would survive a power loss; false if it can't be written.
    /// Cancel safe; whoever calls it sets the limit.
    pub async fn flushed(&self) -> bool {
        let shared = self.shared();
        let last = {
            let mut book = shared.book();
            book.wanted = book.queued;
            shared.to_sync.notify_one();
            book.queued
        };
        let mut progress = shared.progress.subscribe();
        let known = progress.wait_for(|p| p.durable >= last || p.failing).await;
        known.is_ok_and(|p| p.durable >= last)
    }

    pub fn path(&self) -> &Path {
        &self.shared().path
    }

    /// Streams that went on without being in the journal.
    pub fn missed(&self) -> u64 {
        self.shared().missed.load(Ordering::Relaxed)
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.book().closed = true;
        self.0.to_write.notify_one();
        self.0.to_sync.notify_one();
    }
}

impl Book {
    fn new(file: Arc<dyn Syncable>) -> Self {
        Self {
            open: BTreeMap::new(),
            settled: VecDeque::new(),
            most: KEPT,
            given_up: 0,
            pending: Vec::new(),
            queued: 0,
            wanted: 0,
            written: 0,
            file,
            rewrite: None,
            closed: false,
        }
    }

    /// All that the file has to hold.
    fn snapshot(&self) -> Vec<u8> {
        let settled = self.settled.iter().map(|(_, line)| line);
        settled
            .chain(self.open.values())
            .flatten()
            .copied()
            .collect()
    }

    /// The last ones are kept.
    fn keep(&mut self, name: StreamName, line: Vec<u8>) {
        while self.settled.len() >= self.most {
            self.settled.pop_front();
            if self.most == KEPT_FOR_STORE {
                if self.given_up == 0 {
                    tracing::error!(
                        "the ledger's file can't be written for so long that the journal holds no \
                         more: the oldest receipts are in the log only"
                    );
                }
                self.given_up += 1;
            }
        }
        self.settled.push_back((name, line));
    }

    fn append(&mut self, line: &[u8]) -> u64 {
        if self.pending.len() + line.len() > MAX_PENDING {
            self.pending.clear();
            self.rewrite
                .get_or_insert_with(|| "the disk is too slow for it".to_owned());
        } else {
            self.pending.extend_from_slice(line);
        }
        self.queued += 1;
        self.queued
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic elsewhere leaves the book as consistent as it was.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, id: StreamId, what: What<'_>, sync: bool) -> u64 {
        let run = self.run.load(Ordering::Relaxed);
        let over = !matches!(what, What::Open(_));
        let line = to_line(run, what);
        let mut book = self.book();
        if over {
            book.open.remove(&(run, id));
            book.keep((run, id), line.clone());
        } else {
            book.open.insert((run, id), line.clone());
        }
        let number = book.append(&line);
        if sync {
            book.wanted = number;
        }
        self.to_write.notify_one();
        number
    }

    fn settle_orphans(&self, orphans: &[Orphan]) {
        let mut book = self.book();
        for orphan in orphans {
            let name = (orphan.run, orphan.stream.id);
            book.open.remove(&name);
            book.keep(name, to_line(orphan.run, What::Orphaned(orphan)));
        }
        self.rewrite(&mut book);
    }

    /// What is gone from memory is to go from the file.
    fn rewrite(&self, book: &mut Book) {
        book.rewrite.get_or_insert_default();
        book.queued += 1;
        book.wanted = book.queued;
        self.to_write.notify_one();
    }

    /// The thread that writes.
    fn write_all(&self, mut medium: impl Medium) {
        let mut least = MAX_SIZE;
        let mut failing = false;
        loop {
            let (lines, last, mut rewrite) = {
                let mut book = self.next_work(failing);
                if book.closed && (failing || book.pending.is_empty() && book.rewrite.is_none()) {
                    return;
                }
                let rewrite = book.rewrite.take();
                (std::mem::take(&mut book.pending), book.queued, rewrite)
            };
            if rewrite.is_none() && !failing {
                match medium.intact().and_then(|()| medium.append(&lines)) {
                    Ok(()) if medium.size() > least => rewrite = Some(String::new()),
                    Ok(()) => {
                        self.book().written = last;
                        self.to_sync.notify_one();
                    }
                    Err(error) => rewrite = Some(error.to_string()),
                }
            }
            if rewrite.is_none() && !failing {
                continue;
            }
            let why = rewrite.filter(|why| !why.is_empty());
            match self.write_anew(&mut medium) {
                Ok(()) => {
                    least = MAX_SIZE.max(2 * medium.size());
                    if failing {
                        tracing::info!("the journal can be written again, and is complete");
                    } else if let Some(why) = why {
                        tracing::error!("the journal had to be written anew: {why}");
                    }
                    failing = false;
                }
                Err(error) if !failing => {
                    let why = why.map_or(String::new(), |why| format!("{why}; "));
                    tracing::error!(
                        "the journal can't be written ({why}{error}): streams go on without it, \
                         and would not be named after a crash"
                    );
                    failing = true;
                }
                Err(_) => {}
            }
            self.progress
                .send_if_modified(|p| std::mem::replace(&mut p.failing, failing) != failing);
        }
    }

    /// Waits until there is something to do: lines, a file to write anew, or to look after it.
    fn next_work(&self, failing: bool) -> MutexGuard<'_, Book> {
        let idle = |book: &mut Book| {
            !book.closed && (failing || book.pending.is_empty() && book.rewrite.is_none())
        };
        let waited = self
            .to_write
            .wait_timeout_while(self.book(), LOOK_AGAIN, idle);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn write_anew(&self, medium: &mut impl Medium) -> io::Result<()> {
        let (whole, last) = {
            let mut book = self.book();
            book.pending.clear();
            book.rewrite = None;
            (book.snapshot(), book.queued)
        };
        medium.rewrite(&whole)?;
        let mut book = self.book();
        book.written = last;
        book.file = medium.file();
        drop(book);
        self.made_durable(last);
        Ok(())
    }

    /// The thread that syncs.
    fn sync_all(&self) {
        loop {
            let durable = self.progress.borrow().durable;
            let nothing = |book: &mut Book| {
                !book.closed && (book.written <= durable || book.wanted <= durable)
            };
            let waited = self.to_sync.wait_while(self.book(), nothing);
            let book = waited.unwrap_or_else(PoisonError::into_inner);
            if book.written <= durable || book.wanted <= durable {
                return;
            }
            let (file, last) = (book.file.clone(), book.written);
            drop(book);
            match file.sync() {
                Ok(()) => self.made_durable(last),
                Err(error) => {
                    let mut book = self.book();
                    // After a failed sync the kernel forgets what was not written: a second one
                    // would succeed for nothing.
                    if Arc::ptr_eq(&file, &book.file) {
                        book.rewrite = Some(format!("sync: {error}"));
                        book.written = durable;
                        self.to_write.notify_one();
                    }
                }
            }
        }
    }

    fn made_durable(&self, last: u64) {
        let mut was_stalled = false;
        self.progress.send_modify(|p| {
            p.durable = p.durable.max(last);
            was_stalled = std::mem::take(&mut p.stalled);
        });
        if was_stalled {
            tracing::info!("the journal's disk answers again");
        }
    }
}

#[cfg(test)]
mod tests;
