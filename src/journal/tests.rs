#![allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
use std::{os::unix::fs::MetadataExt, time::Instant};

use super::{disk::*, lines::*, *};
use crate::{
    config::Config,
    domain::{CloseReason, Outcome, StreamKey, StreamTotals},
    ledger::Ledger,
    registry::{Registry, StreamState},
    stt::{connect::Provider, stream::open},
};

const LIMIT: Duration = Duration::from_secs(30);

fn stream(id: u64) -> OpenStream {
    OpenStream {
        id: StreamId(id),
        key: StreamKey {
            room: "room \"1\"\n".into(),
            participant: "alice".into(),
            track: format!("TR_{id}"),
        },
        service: Arc::default(),
        state: StreamState::Opening,
        opened_at_ms: 5,
        request_id: None,
    }
}

fn over(id: u64) -> Settled {
    Settled {
        id: StreamId(id),
        key: stream(id).key,
        service: Arc::default(),
        outcome: Outcome::Acknowledged,
        reason: CloseReason::TrackEnded,
        totals: StreamTotals::default(),
        opened_at_ms: 5,
        settled_at_ms: 6,
        wall_seconds: 1.0,
        connection_seconds: 0.9,
        close_seconds: 0.1,
    }
}

fn ids(streams: &[(u64, OpenStream)]) -> Vec<u64> {
    streams.iter().map(|(_, stream)| stream.id.0).collect()
}

async fn flushed(journal: &Journal) -> bool {
    tokio::time::timeout(LIMIT, journal.flushed())
        .await
        .expect("an answer")
}

/// What a crash would leave, as the next start finds it.
fn after_a_crash(dir: &Path) -> Recovered {
    let copy = tempfile::tempdir().expect("directory");
    let at = |dir: &Path| dir.join("me.journal");
    fs::copy(at(dir), at(copy.path())).expect("copied");
    Journal::open(copy.path(), "me").expect("opens")
}

/// A directory with this journal in it.
fn with(text: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("directory");
    fs::write(dir.path().join("me.journal"), text).expect("written");
    dir
}

fn open_lines(ids: &[u64]) -> Vec<u8> {
    let line = |id: &u64| to_line(1, What::Open(&stream(*id)));
    ids.iter().flat_map(line).collect()
}

#[tokio::test]
async fn after_a_crash_exactly_the_open_streams_are_named_and_only_once() {
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("a").join("b");
    let first = Journal::open(&state, "me").expect("opens");
    assert_eq!(first.left_open, []);
    for id in [1, 2, 3] {
        let ticket = first.journal.enter(&stream(id));
        assert!(first.journal.durable(ticket).await);
    }
    let known = OpenStream {
        state: StreamState::Open,
        request_id: Some("r-2".into()),
        ..stream(2)
    };
    first.journal.update(&known);
    first.journal.settle(&over(3));
    assert!(flushed(&first.journal).await);

    // The numbers start anew with each run, and must not be taken for those of the first.
    let second = after_a_crash(&state);
    let run = first.journal.run();
    assert_eq!(second.left_open, [(run, stream(1)), (run, known)]);
    second.journal.enter(&stream(1));
    second.journal.settle(&over(1));
    assert!(flushed(&second.journal).await);
    assert_eq!(ids(&second.left_open), [1, 2]);

    let orphan = |(run, stream)| Orphan {
        run,
        stream,
        free_by_ms: 9,
    };
    let orphans: Vec<Orphan> = second.left_open.into_iter().map(orphan).collect();
    second.journal.settle_orphans(&orphans);
    second.journal.enter(&stream(7));
    assert!(flushed(&second.journal).await);
    let found = after_a_crash_of(&second.journal);
    assert_eq!(ids(&found), [7]);
}

/// As the next start would find what is in memory, written out.
fn after_a_crash_of(journal: &Journal) -> Vec<(u64, OpenStream)> {
    let dir = with(&journal.shared().book().snapshot());
    Journal::open(dir.path(), "me").expect("opens").left_open
}

#[test]
fn a_line_that_a_crash_cut_off_costs_only_itself() {
    let torn = &open_lines(&[3])[..20];
    let zeros = [0; 100];
    for end in [torn, &zeros, b""] {
        let dir = with(&[&open_lines(&[1, 2]), end].concat());
        let found = Journal::open(dir.path(), "me").expect("opens");
        assert_eq!(ids(&found.left_open), [1, 2], "{end:?}");
        assert!(!dir.path().join("me.journal.damaged").exists());
    }
    // Whole, but for the end of the line.
    let whole = open_lines(&[1, 2]);
    let dir = with(whole.trim_ascii_end());
    let found = Journal::open(dir.path(), "me").expect("opens");
    assert_eq!(ids(&found.left_open), [1, 2]);
}

#[test]
fn other_damage_costs_nothing_that_is_readable_and_is_kept_aside() {
    let too_long = [b"x".repeat(MAX_LINE as usize + 5), b"\n".to_vec()].concat();
    let other_kind = b"{\"v\":1,\"run\":1,\"lent\":{\"id\":1}}\n";
    for damage in [
        b"\xff{}\n".as_slice(),
        b"\n",
        b"{}\n",
        other_kind,
        &too_long,
    ] {
        let text = [&open_lines(&[1]), damage, &open_lines(&[2])].concat();
        let dir = with(&text);
        let path = dir.path().join("me.journal");
        let found = read(&path).expect("read");
        assert_eq!(found.damaged, 1);
        assert!(found.damage[0].starts_with("line 2"), "{:?}", found.damage);
        let found = Journal::open(dir.path(), "me").expect("opens");
        assert_eq!(ids(&found.left_open), [1, 2]);
        let kept = fs::read(dir.path().join("me.journal.damaged")).expect("kept");
        assert_eq!(kept, text);
        assert_eq!(fs::read(path).expect("readable"), open_lines(&[1, 2]));
    }
}

#[test]
fn what_cannot_be_used_is_an_error_that_says_what_to_do() {
    let said = |dir: &Path| match Journal::open(dir, "me") {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    };
    let newer = b"{\"v\":2,\"run\":1,\"something\":\"new\"}\n";
    let text = [&open_lines(&[1]), newer.as_slice()].concat();
    let dir = with(&text);
    let error = said(dir.path());
    assert!(
        error.contains("newer") && error.contains("state.dir"),
        "{error}"
    );
    let path = dir.path().join("me.journal");
    assert!(error.contains(path.to_str().expect("text")), "{error}");
    assert_eq!(fs::read(&path).expect("there"), text, "left as it was");

    let dir = with(b"");
    let _held = Journal::open(dir.path(), "me").expect("opens");
    let error = said(dir.path());
    let words = ["in use", "rooms.identity", "state.dir"];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    Journal::open(dir.path(), "you").expect("another identity has another journal");

    let error = said(&path.join("below-a-file"));
    assert!(
        error.contains("state.dir") && error.contains("Not a directory"),
        "{error}"
    );
}

#[test]
fn nobody_else_may_read_it() {
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    Journal::open(&state, "me").expect("opens");
    let mode = |path: &Path| fs::metadata(path).expect("there").mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    for file in fs::read_dir(&state).expect("readable") {
        assert_eq!(mode(&file.expect("entry").path()), 0o600);
    }
}

#[test]
fn identities_make_names_that_are_files_and_differ() {
    let long = |end| file_name(&format!("{}{end}", "é".repeat(200)));
    assert_eq!(file_name("room-warden_1"), "room-warden_1");
    assert_eq!(file_name("../a b"), "%2E%2E%2Fa%20b");
    assert_ne!(long("a"), long("b"));
    assert!(long("a").len() < 150);
}

#[tokio::test]
async fn it_does_not_grow_with_the_streams_that_were() {
    let dir = tempfile::tempdir().expect("directory");
    let Recovered { journal, .. } = Journal::open(dir.path(), "me").expect("opens");
    journal.enter(&stream(0));
    let each = (open_lines(&[1]).len() + to_line(1, What::Settled(&over(1))).len()) as u64;
    let streams = 4 * MAX_SIZE / each;
    for id in 1..=streams {
        journal.enter(&stream(id));
        journal.settle(&over(id));
        // As fast as the disk takes them.
        if id % 500 == 0 {
            assert!(flushed(&journal).await);
        }
    }
    assert!(flushed(&journal).await);
    let size = fs::metadata(dir.path().join("me.journal"))
        .expect("there")
        .len();
    assert!(size < 2 * MAX_SIZE, "{size} bytes");
    assert_eq!(ids(&after_a_crash(dir.path()).left_open), [0]);
}

#[tokio::test]
async fn more_than_fits_in_memory_is_still_complete_once_the_disk_is_back() {
    let dir = tempfile::tempdir().expect("directory");
    let (faults, journal) = faulty(dir.path());
    journal.enter(&stream(0));
    faults.set(Fault::Hangs);
    let line = open_lines(&[1]).len();
    let streams = (2 * MAX_PENDING / line) as u64;
    for id in 1..=streams {
        journal.enter(&stream(id));
    }
    assert!(journal.shared().book().pending.len() <= MAX_PENDING);
    faults.set(Fault::None);
    assert!(flushed(&journal).await);
    let named = after_a_crash(dir.path()).left_open;
    assert_eq!(named.len() as u64, streams + 1);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Hangs,
    SyncHangs,
    SyncSlow,
    SyncFails,
    Fails,
}

/// What a disk does wrong.
#[derive(Clone)]
struct Faults(Arc<(Mutex<Fault>, Condvar)>);

impl Faults {
    fn set(&self, fault: Fault) {
        *self.0.0.lock().unwrap() = fault;
        self.0.1.notify_all();
    }

    fn io(&self, sync: bool) -> io::Result<()> {
        let hangs = |fault: &mut Fault| match *fault {
            Fault::Hangs => true,
            Fault::SyncHangs => sync,
            _ => false,
        };
        let fault = self
            .0
            .1
            .wait_while(self.0.0.lock().unwrap(), hangs)
            .unwrap();
        if *fault == Fault::SyncSlow && sync {
            thread::sleep(SYNC_LIMIT / 4);
        }
        match *fault {
            Fault::Fails => Err(io::ErrorKind::StorageFull.into()),
            Fault::SyncFails if sync => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

struct FaultyDisk(Disk, Faults);
struct FaultyFile(Arc<dyn Syncable>, Faults);

impl Medium for FaultyDisk {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.1.io(false)?;
        self.0.append(lines)
    }
    fn rewrite(&mut self, lines: &[u8]) -> io::Result<()> {
        self.1.io(false)?;
        self.0.rewrite(lines)
    }
    fn intact(&self) -> io::Result<()> {
        self.0.intact()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn file(&self) -> Arc<dyn Syncable> {
        Arc::new(FaultyFile(self.0.file(), self.1.clone()))
    }
}

impl Syncable for FaultyFile {
    fn sync(&self) -> io::Result<()> {
        self.1.io(true)?;
        self.0.sync()
    }
}

fn faulty(dir: &Path) -> (Faults, Journal) {
    let faults = Faults(Arc::new((Mutex::new(Fault::None), Condvar::new())));
    let path = dir.join("me.journal");
    let disk = FaultyDisk(Disk::open(&path).expect("opens"), faults.clone());
    let journal = Journal::start(&path, 1, Book::new(disk.file()), disk);
    (faults, journal.expect("threads"))
}

async fn held_up(journal: &Journal) -> Duration {
    let begun = Instant::now();
    assert!(!journal.durable(journal.enter(&stream(2))).await);
    begun.elapsed()
}

#[tokio::test]
async fn a_disk_that_hangs_holds_up_the_first_stream_for_a_moment_and_no_other() {
    for fault in [Fault::Hangs, Fault::SyncHangs] {
        let dir = tempfile::tempdir().expect("directory");
        let (faults, journal) = faulty(dir.path());
        assert!(journal.durable(journal.enter(&stream(1))).await);
        faults.set(fault);
        let first = held_up(&journal).await;
        assert!((SYNC_LIMIT..LIMIT).contains(&first), "{first:?}");
        let next = held_up(&journal).await;
        assert!(next < SYNC_LIMIT / 2, "{next:?}");
        assert_eq!(journal.missed(), 2);
        faults.set(Fault::None);
        assert!(flushed(&journal).await);
        assert!(journal.durable(journal.enter(&stream(3))).await);
        assert_eq!(ids(&after_a_crash(dir.path()).left_open), [1, 2, 3]);
    }
}

#[tokio::test]
async fn a_disk_that_fails_holds_up_nobody_and_is_caught_up_with() {
    let dir = tempfile::tempdir().expect("directory");
    let (faults, journal) = faulty(dir.path());
    assert!(journal.durable(journal.enter(&stream(1))).await);
    faults.set(Fault::Fails);
    let first = held_up(&journal).await;
    assert!(first < SYNC_LIMIT / 2, "{first:?}");
    assert!(!flushed(&journal).await);
    journal.settle(&over(1));
    faults.set(Fault::None);
    let back = async {
        while !journal.flushed().await {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(LIMIT, back).await.expect("back");
    assert_eq!(ids(&after_a_crash(dir.path()).left_open), [2]);
    assert!(journal.durable(journal.enter(&stream(3))).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_is_asked_for_nothing_before_the_stream_is_on_disk() {
    let dir = tempfile::tempdir().expect("directory");
    let (faults, journal) = faulty(dir.path());
    faults.set(Fault::SyncSlow);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("listener");
    let url = format!("ws://{}", listener.local_addr().expect("address"));
    let mut config = Config::for_tests().stt;
    config.url = url.parse().expect("URL");
    let provider = Arc::new(Provider::new(&config));
    let registry = Registry::with_journal(Ledger::default(), Some(journal.clone()), Vec::new());
    let handle = open(&registry, provider, stream(1).key, LIMIT, None).expect("opening");
    let (tcp, _) = listener.accept().await.expect("connection");
    tcp.peek(&mut [0]).await.expect("a request");
    let durable = journal.shared().progress.borrow().durable;
    // On a machine that is so busy, the stream has gone on without.
    assert!(durable == 1 || journal.missed() == 1, "asked before");
    assert_eq!(ids(&after_a_crash(dir.path()).left_open), [1]);
    drop((handle, tcp));
    registry.drained().await;
    assert!(flushed(&journal).await);
    assert_eq!(ids(&after_a_crash(dir.path()).left_open), [0; 0]);
}

#[tokio::test]
async fn a_sync_that_fails_is_not_believed_the_second_time() {
    let dir = tempfile::tempdir().expect("directory");
    let (faults, journal) = faulty(dir.path());
    let file = || {
        fs::metadata(dir.path().join("me.journal"))
            .expect("there")
            .ino()
    };
    let before = file();
    faults.set(Fault::SyncFails);
    // Its rewrite, synced in another way, works.
    assert!(journal.durable(journal.enter(&stream(1))).await);
    assert_ne!(file(), before, "a new file");
    assert_eq!(ids(&after_a_crash(dir.path()).left_open), [1]);
}

#[tokio::test]
async fn a_directory_that_is_removed_is_made_again() {
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let Recovered { journal, .. } = Journal::open(&state, "me").expect("opens");
    assert!(journal.durable(journal.enter(&stream(1))).await);
    fs::remove_dir_all(&state).expect("removed");
    assert!(journal.durable(journal.enter(&stream(2))).await);
    assert_eq!(ids(&after_a_crash(&state).left_open), [1, 2]);
    assert!(matches!(
        Journal::open(&state, "me"),
        Err(JournalError::Locked { .. })
    ));

    // Also when nothing is written.
    fs::remove_dir_all(&state).expect("removed");
    let back = async {
        while !state.join("me.journal").exists() {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(LIMIT, back).await.expect("back");
    assert_eq!(ids(&after_a_crash(&state).left_open), [1, 2]);
}
