#![allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
use std::fs;

use super::*;
use crate::{
    config::ReportEvent,
    domain::{CloseReason, Outcome, Phase, Service, StreamId, StreamKey, StreamTotals},
    journal::{Orphan, Recovered},
    registry::{OpenStream, StreamState},
};

const LIMIT: Duration = Duration::from_secs(60);
const DAY_MS: u64 = 24 * 3600 * 1000;
/// 2026-11-24T00:00:00Z.
const TODAY_MS: u64 = 1_795_478_400_000;

fn settings(path: &Path) -> Settings {
    Settings {
        path: path.to_owned(),
        daemon: "me".to_owned(),
        prices: Prices::default(),
        retention: None,
        reports: false,
        events: vec![ReportEvent::StreamSettled],
    }
}

fn settled(id: u64) -> Settled {
    Settled {
        id: StreamId(id),
        key: StreamKey {
            room: "room \"1\"\n".into(),
            participant: "alice".into(),
            track: format!("TR_{id}"),
        },
        service: Arc::new(Service {
            provider: "stt.example".into(),
            model: "nova-3".into(),
            language: Some("en".into()),
            encoding: "ogg-opus".into(),
        }),
        outcome: Outcome::Acknowledged,
        reason: CloseReason::TrackEnded,
        totals: StreamTotals {
            request_id: Some(format!("request-{id}")),
            audio_seconds: 1.5,
            audio_bytes: 100,
            provider_seconds: Some(1.4),
        },
        opened_at_ms: TODAY_MS + id,
        settled_at_ms: TODAY_MS + 1000 + id,
        wall_seconds: 1.0,
        connection_seconds: 0.9,
        close_seconds: 0.1,
    }
}

fn open_stream(id: u64) -> OpenStream {
    let Settled { key, service, .. } = settled(id);
    OpenStream {
        id: StreamId(id),
        key,
        service,
        state: StreamState::Open,
        opened_at_ms: TODAY_MS + id,
        request_id: Some(format!("request-{id}")),
    }
}

fn over(run: u64, id: u64) -> Over {
    Over::Settled(run, Arc::new(settled(id)))
}

async fn flushed(store: &Store) -> bool {
    let flushed = tokio::time::timeout(LIMIT, store.flushed());
    flushed.await.expect("an answer")
}

/// A writer without its thread.
fn writer(path: &Path, journal: Option<Journal>) -> Writer {
    Writer {
        settings: settings(path),
        database: None,
        run: 1,
        waiting: VecDeque::new(),
        finished: Vec::new(),
        delivered: Vec::new(),
        journal,
        progress: watch::Sender::default(),
        failing: false,
        suspect: false,
        given_up: 0,
        retained: Clocks::now(),
    }
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("me.db");
    (dir, path)
}

/// The receipts of a ledger, in order.
fn receipts(path: &Path) -> Vec<String> {
    let reader = Reader::open(path).expect("readable");
    let all = reader.latest(u32::MAX).expect("read");
    all.into_iter().rev().map(|found| found.receipt).collect()
}

fn name(run: u64, id: u64) -> String {
    format!("me/{run}/{id}")
}

/// A ledger with so many receipts, closed.
fn filled(path: &Path, count: u64) {
    let mut writer = writer(path, None);
    writer.waiting.extend((1..=count).map(|id| over(1, id)));
    writer.write_all();
    assert!(!writer.failing);
}

#[tokio::test]
async fn what_is_settled_is_there_in_order_with_all_that_is_known_of_it() {
    let (_dir, path) = place();
    let mut settings = settings(&path);
    settings.prices = Prices::new(&crate::config::LedgerConfig {
        currency: "USD".into(),
        prices: [("nova-3".to_owned(), "0.6".to_owned())].into(),
        ..Default::default()
    });
    let store = Store::open(settings, None).expect("opens");
    let run = store.0.run;
    let mut late = settled(2);
    late.outcome = Outcome::TimedOut {
        phase: Phase::AwaitingAnswer,
    };
    late.key.track = "TR_1".into();
    store.settle(&Arc::new(settled(1)));
    store.settle(&Arc::new(late));
    assert!(flushed(&store).await);
    assert_eq!(receipts(&path), [name(run, 1), name(run, 2)]);
    let reader = Reader::open(&path).expect("opens");
    let mut rows = Vec::new();
    let read = reader.export(Interval::ALL, |row| {
        rows.push(serde_json::Value::Object(row));
        Ok::<(), ()>(())
    });
    assert_eq!(read.expect("read"), Ok(()));
    let expected = serde_json::json!({
        "receipt": name(run, 1), "daemon": "me", "room": "room \"1\"\n", "participant": "alice",
        "track": "TR_1", "provider": "stt.example", "model": "nova-3", "language": "en",
        "encoding": "ogg-opus", "request_id": "request-1",
        "opened_at": "2026-11-24T00:00:00.001Z", "settled_at": "2026-11-24T00:00:01.001Z",
        "wall_seconds": 1.0, "close_seconds": 0.1, "connection_seconds": 0.9, "audio_seconds": 1.5,
        "provider_seconds": 1.4, "audio_bytes": 100, "reconnects": 0, "outcome": "acknowledged",
        "cause": null, "reason": "track ended", "cost": 0.015, "currency": "USD", "seq": 1,
    });
    assert_eq!(rows[0], expected);
    assert_eq!(
        rows[1]["cause"],
        "timed out awaiting the answer to CloseStream"
    );
    assert_eq!(rows[1]["reconnects"], 1);
    let columns: Vec<_> = Reader::columns().collect();
    assert_eq!(columns.len(), rows[0].as_object().expect("object").len());
}

#[test]
fn usage_is_summed_by_what_is_asked_for() {
    let (_dir, path) = place();
    let mut writer = writer(&path, None);
    let with = |id, change: &dyn Fn(&mut Settled)| {
        let mut settled = settled(id);
        change(&mut settled);
        Over::Settled(1, Arc::new(settled))
    };
    writer.waiting.extend([
        with(1, &|_| {}),
        with(2, &|s| s.opened_at_ms -= DAY_MS),
        with(3, &|s| {
            s.key.participant = "bob".into();
            s.outcome = Outcome::NeverOpened {
                detail: "refused".into(),
                failure: None,
            };
            s.totals = StreamTotals::default();
        }),
        Over::Orphaned(Orphan {
            run: 1,
            stream: open_stream(4),
            free_by_ms: TODAY_MS,
        }),
    ]);
    writer.write_all();
    let reader = Reader::open(&path).expect("opens");
    let of = |by: &[Dimension], interval| {
        let rows = reader.usage(by, interval, None).expect("usage");
        let sum = |row: &UsageRow| (row.of.join(" "), row.streams, row.audio_seconds);
        rows.iter().map(sum).collect::<Vec<_>>()
    };
    let days = of(&[Dimension::Day], Interval::ALL);
    let (yesterday, today) = ("2026-11-23".to_owned(), "2026-11-24".to_owned());
    assert_eq!(days, [(yesterday, 1, 1.5), (today, 3, 1.5)]);
    let since = Interval {
        from_ms: TODAY_MS as i64,
        ..Interval::ALL
    };
    let people = of(&[Dimension::Month, Dimension::Participant], since);
    let names = people.iter().map(|(name, ..)| name.as_str());
    assert_eq!(names.collect::<Vec<_>>(), ["2026-11 alice", "2026-11 bob"]);
    let whole = reader.usage(&[], Interval::ALL, None).expect("usage");
    let [whole] = &whole[..] else {
        panic!("{whole:?}")
    };
    let outcomes = (whole.acknowledged, whole.never_opened, whole.orphaned);
    assert_eq!(
        (outcomes, whole.cost, whole.audio_bytes),
        ((2, 1, 1), None, 200)
    );
    // One was open since yesterday.
    assert_eq!(reader.peak(since).expect("peak"), 1);
    assert_eq!(reader.peak(Interval::ALL).expect("peak"), 2);
    let nothing = Interval {
        from_ms: i64::MAX,
        ..Interval::ALL
    };
    assert_eq!(reader.usage(&[], nothing, None).expect("usage"), []);
    let at_most = |most| reader.usage(&[Dimension::Day], Interval::ALL, Some(most));
    assert_eq!(at_most(2).expect("usage").len(), 2);
    let refused = at_most(1).expect_err("two days");
    assert!(matches!(refused, StoreError::TooManyRows { most: 1 }));
}

/// The state directory as a crash leaves it at a moment.
fn crashed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("directory");
    for file in fs::read_dir(dir).expect("readable") {
        let from = file.expect("entry").path();
        let to = copy.path().join(from.file_name().expect("name"));
        // A log that is being cut off may be gone.
        let _ = fs::copy(from, to);
    }
    copy
}

/// The next start, and what the ledger has then.
async fn after(crash: &tempfile::TempDir) -> Vec<(String, String)> {
    let Recovered {
        journal,
        left_open,
        over,
    } = Journal::open(crash.path(), "me").expect("opens");
    let path = crash.path().join("me.db");
    let store = Store::open(settings(&path), Some(journal.clone())).expect("opens");
    let orphan = |(run, stream)| Orphan {
        run,
        stream,
        free_by_ms: TODAY_MS,
    };
    let orphans: Vec<_> = left_open.into_iter().map(orphan).collect();
    journal.settle_orphans(&orphans);
    store.carry_over(over);
    store.carry_over(orphans.into_iter().map(Over::Orphaned));
    assert!(flushed(&store).await);
    assert!(journal.flushed().await);
    let all = Reader::open(&path)
        .expect("opens")
        .latest(100)
        .expect("read");
    let all = all.into_iter().rev();
    all.map(|found| (found.receipt, found.outcome)).collect()
}

#[tokio::test]
async fn a_crash_at_any_step_between_journal_and_ledger_loses_and_doubles_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("me.db");
    let Recovered { journal, .. } = Journal::open(dir.path(), "me").expect("opens");
    journal.keep_for_store();
    let mut writer = writer(&path, Some(journal.clone()));
    writer.write().expect("made");
    let run = journal.run();
    let acknowledged = |id| (name(run, id), "acknowledged".to_owned());
    let orphaned = |id| (name(run, id), "orphaned".to_owned());

    journal.enter(&open_stream(1));
    journal.enter(&open_stream(2));
    assert!(journal.flushed().await);
    let opened = crashed(dir.path());
    journal.settle(&settled(1));
    assert!(journal.flushed().await);
    let in_the_journal = crashed(dir.path());
    writer.waiting.push_back(over(run, 1));
    let database = writer.database.as_mut().expect("open");
    let entries = writer.waiting.iter();
    let marks = Marks {
        run,
        finished: &[],
        delivered: &[],
    };
    database
        .write(entries, &marks, &settings(&path))
        .expect("written");
    let in_both = crashed(dir.path());
    writer.write().expect("written");
    let told = crashed(dir.path());

    assert_eq!(after(&opened).await, [orphaned(1), orphaned(2)]);
    for crash in [&in_the_journal, &in_both, &told] {
        assert_eq!(after(crash).await, [acknowledged(1), orphaned(2)]);
        // And the start after that has nothing to add.
        let again = crashed(crash.path());
        assert_eq!(after(&again).await, [acknowledged(1), orphaned(2)]);
    }
}

#[tokio::test]
async fn a_start_that_is_killed_before_its_orphans_are_in_the_ledger_loses_none() {
    let dir = tempfile::tempdir().expect("directory");
    let first = Journal::open(dir.path(), "me").expect("opens").journal;
    let run = first.run();
    first.enter(&open_stream(1));
    assert!(first.flushed().await);
    let killed = crashed(dir.path());
    let second = Journal::open(killed.path(), "me").expect("opens");
    let [(left, ref stream)] = second.left_open[..] else {
        panic!("{:?}", second.left_open);
    };
    assert_eq!(left, run);
    second.journal.settle_orphans(&[Orphan {
        run,
        stream: stream.clone(),
        free_by_ms: TODAY_MS,
    }]);
    assert!(second.journal.flushed().await);
    let killed_again = crashed(killed.path());
    let expected = [(name(run, 1), "orphaned".to_owned())];
    assert_eq!(after(&killed_again).await, expected);
}

/// A clock that was set back must not make a run's streams those of an earlier one.
#[tokio::test]
async fn runs_have_names_of_their_own_whatever_the_clock_says() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("me.db");
    let future = unix_ms(SystemTime::now()) + 1000 * DAY_MS;
    let mut writer = writer(&path, None);
    writer.waiting.push_back(over(future, 1));
    writer.write_all();
    let Recovered { journal, .. } = Journal::open(dir.path(), "me").expect("opens");
    let store = Store::open(settings(&path), Some(journal.clone())).expect("opens");
    journal.enter(&open_stream(1));
    journal.settle(&settled(1));
    store.settle(&Arc::new(settled(1)));
    assert!(flushed(&store).await);
    assert_eq!(journal.run(), future + 1);
    assert_eq!(receipts(&path), [name(future, 1), name(future + 1, 1)]);
}

#[tokio::test]
async fn a_database_that_cannot_be_written_is_caught_up_with_and_the_journal_keeps_all() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("me.db");
    let Recovered { journal, .. } = Journal::open(dir.path(), "me").expect("opens");
    journal.keep_for_store();
    let mut writer = writer(&path, Some(journal.clone()));
    writer.write().expect("made");
    let settle = |writer: &mut Writer, id| {
        journal.settle(&settled(id));
        writer.waiting.push_back(over(journal.run(), id));
    };
    // Until a page more is needed.
    for (limit, id) in [("max_page_count", 1), ("query_only", 2001)] {
        let connection = &writer.database.as_ref().expect("open").connection;
        connection.pragma_update(None, limit, 1).expect("set");
        for id in id..id + 2000 {
            settle(&mut writer, id);
        }
        writer.write_all();
        assert!(writer.failing && writer.progress.borrow().failing);
        let waiting = writer.waiting.len();
        assert!(waiting > 1000, "{waiting}");
        assert!(journal.flushed().await);
        let crash = crashed(dir.path());
        assert_eq!(after(&crash).await.len(), 100);
        assert_eq!(
            receipts(&crash.path().join("me.db")).len() as u64,
            id + 1999
        );
        let connection = writer.database.as_ref().map(|db| &db.connection);
        assert_eq!(
            connection.is_some(),
            limit == "max_page_count",
            "kept if it is only full"
        );
        if let Some(connection) = connection {
            connection.pragma_update(None, limit, 1 << 30).expect("set");
        }
        writer.write_all();
        assert!(!writer.failing && writer.waiting.is_empty());
        assert_eq!(receipts(&path).len() as u64, id + 1999);
    }
}

#[tokio::test]
async fn what_cannot_be_opened_holds_up_nobody_and_is_tried_again() {
    let dir = tempfile::tempdir().expect("directory");
    let below = dir.path().join("file");
    fs::write(&below, "no directory").expect("written");
    let path = below.join("me.db");
    let store = Store::open(settings(&path), None).expect("it goes on without");
    store.settle(&Arc::new(settled(1)));
    assert!(!flushed(&store).await);
    fs::remove_file(&below).expect("removed");
    let back = async {
        while !store.flushed().await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, back).await.expect("back");
    assert_eq!(receipts(&path).len(), 1);
}

#[test]
fn a_file_that_somebody_removes_is_made_again() {
    let (_dir, path) = place();
    let mut writer = writer(&path, None);
    writer.waiting.push_back(over(1, 1));
    writer.write_all();
    fs::remove_file(&path).expect("removed");
    writer.waiting.push_back(over(1, 2));
    writer.write_all();
    assert_eq!(receipts(&path), [name(1, 2)]);
}

fn said(path: &Path) -> String {
    match Store::open(settings(path), None) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_newer_one_and_somebody_elses_are_refused_and_left_as_they_are() {
    let (_dir, path) = place();
    filled(&path, 1);
    let newer = Connection::open(&path).expect("opens");
    newer.pragma_update(None, "user_version", 99).expect("set");
    drop(newer);
    let bytes = fs::read(&path).expect("there");
    let error = said(&path);
    let shown = path.display().to_string();
    for words in ["newer", "99", "ledger.file", shown.as_str()] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let reading = Reader::open(&path)
        .map(drop)
        .expect_err("newer")
        .to_string();
    assert_eq!(reading, error);
    assert_eq!(fs::read(&path).expect("there"), bytes);

    let (_dir, path) = place();
    let other = Connection::open(&path).expect("opens");
    other.execute_batch("CREATE TABLE mine (x)").expect("made");
    drop(other);
    let bytes = fs::read(&path).expect("there");
    let error = said(&path);
    assert!(error.contains("no ledger of roomwarden"), "{error}");
    assert_eq!(fs::read(&path).expect("there"), bytes);
}

#[test]
fn one_that_is_missing_or_older_is_told_when_read() {
    let (_dir, path) = place();
    let missing = |path: &Path| Reader::open(path).map(drop).expect_err("none").to_string();
    assert!(missing(&path).contains("roomwarden run"));
    assert!(!path.exists(), "reading makes nothing");
    filled(&path, 1);
    let older = Connection::open(&path).expect("opens");
    older.pragma_update(None, "user_version", 0).expect("set");
    drop(older);
    assert!(missing(&path).contains("older"));
}

#[test]
fn every_version_is_brought_up_to_date_with_what_it_has() {
    for version in 1..=schema::MIGRATIONS.len() {
        let (_dir, path) = place();
        fs::write(&path, "").expect("made");
        let old =
            schema::open_sound(&path, &schema::MIGRATIONS[..version], u64::MAX).expect("made");
        old.execute_batch(
            "INSERT INTO streams (receipt, daemon, run, id, room, participant, track, provider,
                model, encoding, opened_at_ms, settled_at_ms, reconnects, outcome, reason)
            VALUES ('me/1/1', 'me', 1, 1, 'r', 'p', 't', '', 'm', '', 1, 2, 0, 'acknowledged', 'x')",
        )
        .expect("filled");
        drop(old);
        let mut writer = writer(&path, None);
        writer.waiting.push_back(over(1, 2));
        writer.write_all();
        assert_eq!(receipts(&path), [name(1, 1), name(1, 2)]);
    }
}

#[test]
fn a_damaged_page_costs_only_what_is_on_it_and_the_damaged_file_is_kept() {
    let (dir, path) = place();
    filled(&path, 2000);
    let mut bytes = fs::read(&path).expect("there");
    let page = 4096;
    let middle = bytes.len() / page / 2 * page;
    bytes[middle..middle + page].fill(0xa5);
    fs::write(&path, &bytes).expect("damaged");
    let mut writer = writer(&path, None);
    writer.waiting.push_back(over(2, 1));
    writer.write_all();
    assert!(!writer.failing);
    let left = receipts(&path);
    assert!((1900..=2001).contains(&left.len()), "{}", left.len());
    assert_eq!(left.last(), Some(&name(2, 1)));
    let aside = fs::read_dir(dir.path())
        .expect("readable")
        .filter_map(|entry| {
            let path = entry.expect("entry").path();
            path.to_string_lossy().contains("damaged").then_some(path)
        });
    let aside: Vec<_> = aside.collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert_eq!(fs::read(&aside[0]).expect("kept"), bytes);
    assert!(!dir.path().join("me.db.new").exists());
}

/// As of a file that is too large to be looked through at the start.
#[test]
fn damage_that_shows_when_it_is_written_to_is_saved_from_as_well() {
    let (_dir, path) = place();
    filled(&path, 2000);
    let mut bytes = fs::read(&path).expect("there");
    let (page, half) = (4096, bytes.len() / 2);
    bytes[half / page * page..].fill(0xa5);
    fs::write(&path, &bytes).expect("damaged");
    let mut writer = writer(&path, None);
    let connection = schema::open_sound(&path, schema::MIGRATIONS, 0).expect("nobody looked");
    let file = schema::file_of(&path);
    writer.database = Some(Database { connection, file });
    writer.waiting.push_back(over(2, 1));
    writer.write_all();
    assert!(writer.failing && writer.suspect, "told");
    writer.write_all();
    assert!(!writer.failing);
    let left = receipts(&path);
    assert!((500..1900).contains(&left.len()), "{}", left.len());
    assert_eq!(left.last(), Some(&name(2, 1)));
}

#[test]
fn what_is_no_database_at_all_is_kept_aside() {
    let (dir, path) = place();
    fs::write(&path, "x".repeat(10_000)).expect("written");
    let mut writer = writer(&path, None);
    writer.waiting.push_back(over(1, 1));
    writer.write_all();
    assert_eq!(receipts(&path), [name(1, 1)]);
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 4);
}

#[test]
fn old_receipts_are_deleted_but_not_because_the_clock_was_set() {
    let (_dir, path) = place();
    let mut writer = writer(&path, None);
    writer.settings.retention = Some(Duration::from_millis(10 * DAY_MS));
    let at = |steady: Instant, wall_ms: u64| Clocks {
        steady,
        wall: SystemTime::UNIX_EPOCH + Duration::from_millis(wall_ms),
    };
    let mut old = settled(1);
    old.opened_at_ms -= 11 * DAY_MS;
    old.settled_at_ms -= 11 * DAY_MS;
    writer.waiting.push_back(Over::Settled(1, Arc::new(old)));
    writer.waiting.push_back(over(1, 2));
    writer.write_all();
    let start = Instant::now();
    writer.retained = at(start, TODAY_MS);
    let hour_ms = RETAIN_EVERY.as_millis() as u64;
    // An hour later, and years later by the wall clock.
    writer.retain(at(start + RETAIN_EVERY, TODAY_MS + 1000 * DAY_MS));
    assert_eq!(receipts(&path).len(), 2);
    // Set right again.
    writer.retain(at(start + 2 * RETAIN_EVERY, TODAY_MS + 2 * hour_ms));
    assert_eq!(receipts(&path).len(), 2);
    writer.retain(at(start + 3 * RETAIN_EVERY, TODAY_MS + 3 * hour_ms));
    assert_eq!(receipts(&path), [name(1, 2)]);
}

#[tokio::test]
async fn what_was_deleted_does_not_come_back_with_the_next_start() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("me.db");
    let Recovered { journal, .. } = Journal::open(dir.path(), "me").expect("opens");
    journal.keep_for_store();
    let mut writer = writer(&path, Some(journal.clone()));
    writer.settings.retention = Some(Duration::from_millis(DAY_MS));
    for id in [1, 2] {
        journal.settle(&settled(id));
        assert!(journal.flushed().await);
        writer.waiting.push_back(over(journal.run(), id));
        writer.write_all();
    }
    let start = Instant::now();
    let at = |after: Duration, wall_ms: u64| Clocks {
        steady: start + after,
        wall: SystemTime::UNIX_EPOCH + Duration::from_millis(wall_ms) + after,
    };
    writer.retained = at(Duration::ZERO, TODAY_MS + 2 * DAY_MS);
    writer.retain(at(RETAIN_EVERY, TODAY_MS + 2 * DAY_MS));
    assert_eq!(receipts(&path), [""; 0]);
    assert!(journal.flushed().await);
    assert_eq!(after(&crashed(dir.path())).await, []);
}

#[tokio::test]
async fn reports_are_due_in_order_until_they_are_taken_over_restarts_and_retention() {
    let (_dir, path) = place();
    let settings = Settings {
        reports: true,
        ..settings(&path)
    };
    let store = Store::open(settings.clone(), None).expect("opens");
    for id in 1..=3 {
        store.settle(&Arc::new(settled(id)));
    }
    assert!(flushed(&store).await);
    let mut taken = Taken::default();
    let first = store.next_due(taken).await.expect("due");
    assert_eq!(first.id, name(store.0.run, 1));
    assert_eq!(first.content["stream"]["request_id"], "request-1");
    taken.take(first.mark);
    let second = store.next_due(taken).await.expect("due");
    assert_eq!(second.id, name(store.0.run, 2));
    store.delivered(first.mark);
    assert!(flushed(&store).await);
    let run = store.0.run;
    drop(store);
    let store = Store::open(settings.clone(), None).expect("opens");
    let taken = Taken::default();
    assert_eq!(store.next_due(taken).await, Some(second.clone()));
    // Those of another daemon in the same file are its own.
    let other = Settings {
        daemon: "other".to_owned(),
        ..settings
    };
    let other = Store::open(other, None).expect("opens");
    assert_eq!(other.next_due(taken).await, None);
    drop((store, other));
    let database = Database::open(&path, false).expect("opens");
    assert_eq!(database.delete(u64::MAX >> 1, true).expect("deleted"), 1);
    assert_eq!(receipts(&path), [name(run, 2), name(run, 3)]);
    assert_eq!(database.delete(u64::MAX >> 1, false).expect("deleted"), 2);
}

#[tokio::test]
async fn what_is_finished_is_due_after_its_streams_and_has_them_all() {
    let (_dir, path) = place();
    let settings = Settings {
        reports: true,
        events: vec![
            ReportEvent::StreamSettled,
            ReportEvent::SessionFinished,
            ReportEvent::RoomFinished,
        ],
        ..settings(&path)
    };
    let store = Store::open(settings.clone(), None).expect("opens");
    let one = settled(1);
    let finished = |participant: Option<&str>| Finished {
        room: one.key.room.clone(),
        room_sid: Some("RM_1".to_owned()),
        participant: participant.map(str::to_owned),
        begun_at_ms: one.opened_at_ms,
        ended_at_ms: one.settled_at_ms,
        reason: "closed".to_owned(),
    };
    store.settle(&Arc::new(settled(1)));
    store.settle(&Arc::new(settled(2)));
    store.finished(finished(Some(&one.key.participant)));
    store.finished(finished(Some("nobody")));
    store.finished(finished(None));
    assert!(flushed(&store).await);
    store.settle(&Arc::new(settled(5000)));
    assert!(flushed(&store).await);
    drop(store);
    let store = Store::open(settings, None).expect("opens");
    let (mut taken, mut events) = (Taken::default(), Vec::new());
    while let Some(due) = store.next_due(taken).await {
        taken.take(due.mark);
        let of_it = |name: &str| {
            let streams = &due.content[name]["streams"];
            let receipts = due.content[name]["receipts"].as_array().expect("a list");
            (streams["acknowledged"].as_u64(), receipts.len())
        };
        match due.event {
            "room_finished" => assert_eq!(of_it("room"), (Some(2), 2)),
            "session_finished" if events.len() == 2 => assert_eq!(of_it("session"), (Some(2), 2)),
            "session_finished" => assert_eq!(of_it("session"), (None, 0)),
            _ => {}
        }
        events.push(due.event);
        // The marks may be written late.
        if events.len() % 2 == 0 {
            store.delivered(due.mark);
        }
    }
    let expected = [
        "stream_settled",
        "stream_settled",
        "session_finished",
        "session_finished",
        "room_finished",
        "stream_settled",
    ];
    assert_eq!(events, expected);
    assert!(flushed(&store).await);
    let left = store.next_due(Taken::default()).await.expect("due");
    assert_eq!(left.event, "stream_settled");
}

#[test]
fn nobody_else_may_read_it() {
    use std::os::unix::fs::MetadataExt;
    let (dir, path) = place();
    let mut writer = writer(&path, None);
    writer.waiting.push_back(over(1, 1));
    writer.write_all();
    let files: Vec<_> = fs::read_dir(dir.path()).expect("readable").collect();
    assert_eq!(files.len(), 3, "with its log");
    for file in files {
        let mode = file.expect("entry").metadata().expect("there").mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
