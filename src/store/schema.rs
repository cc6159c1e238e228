//! The database's file: made, brought up to date, refused, or saved from damage.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, OpenFlags, TransactionBehavior, params_from_iter, types::Value};

use super::StoreError;
use crate::ledger::unix_ms;

/// In the file's header, so that no other program's database is taken for a ledger: "rwld".
const APPLICATION_ID: i32 = 0x7277_6c64;
/// Another process may be writing, or reading what is to be cut off.
pub(super) const BUSY: Duration = Duration::from_secs(2);
/// A file that is not larger is looked through at the start; damage of a larger one shows when it is
/// used.
const MAX_CHECKED: u64 = 64 << 20;
/// Receipts of a damaged file that are looked for, one by one.
const MAX_SOUGHT: i64 = 50_000_000;
/// Of what can't be read, so much is named.
const MAX_NAMED: usize = 20;

/// From one version to the next; the version is their number. Never changed, only added to.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE streams (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        receipt TEXT NOT NULL UNIQUE,
        daemon TEXT NOT NULL,
        run INTEGER NOT NULL,
        id INTEGER NOT NULL,
        room TEXT NOT NULL,
        participant TEXT NOT NULL,
        track TEXT NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        language TEXT,
        encoding TEXT NOT NULL,
        request_id TEXT,
        opened_at_ms INTEGER NOT NULL,
        settled_at_ms INTEGER NOT NULL,
        wall_seconds REAL,
        close_seconds REAL,
        connection_seconds REAL,
        audio_seconds REAL,
        provider_seconds REAL,
        audio_bytes INTEGER,
        reconnects INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        cause TEXT,
        reason TEXT NOT NULL,
        cost REAL,
        currency TEXT
    ) STRICT;
    CREATE INDEX streams_opened ON streams (opened_at_ms);
    CREATE INDEX streams_track ON streams (track);
    CREATE INDEX streams_run ON streams (daemon, run);
",
    "
    -- 1 while a usage report of it is to be sent.
    ALTER TABLE streams ADD COLUMN due INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX streams_due ON streams (daemon, seq) WHERE due = 1;
",
    "
    -- Rooms and sessions that are over, while that is to be reported; last is their last stream's seq.
    CREATE TABLE finished (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        daemon TEXT NOT NULL,
        run INTEGER NOT NULL,
        room TEXT NOT NULL,
        room_sid TEXT,
        participant TEXT,
        begun_at_ms INTEGER NOT NULL,
        ended_at_ms INTEGER NOT NULL,
        reason TEXT NOT NULL,
        last INTEGER NOT NULL
    ) STRICT;
",
];

pub(super) fn known() -> u32 {
    MIGRATIONS.len() as u32
}

/// Device and inode of what is there; none if that can't be told.
pub(super) fn file_of(path: &Path) -> Option<(u64, u64)> {
    let found = fs::metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Opens or makes the database, brought up to date. Of a damaged one everything that is readable
/// goes into a new one, and the rest is named. One that is `suspect` is looked through whatever its
/// size.
pub(super) fn open(path: &Path, suspect: bool) -> Result<Connection, StoreError> {
    make_file(path).map_err(|error| StoreError::Io {
        path: path.to_owned(),
        error,
    })?;
    let most = if suspect { u64::MAX } else { MAX_CHECKED };
    match open_sound(path, MIGRATIONS, most) {
        Err(StoreError::Damaged { said, .. }) => {
            save(path, &said)?;
            open_sound(path, MIGRATIONS, most)
        }
        opened => opened,
    }
}

/// For nobody else to read; what SQLite puts beside it is as this is.
fn make_file(path: &Path) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let mut options = OpenOptions::new();
    match options.append(true).create(true).mode(0o600).open(path) {
        // SQLite has its own words for one that is there and can't be written.
        Err(error) if !path.exists() => Err(error),
        _ => Ok(()),
    }
}

/// `most`: a larger file is not looked through, in bytes.
pub(super) fn open_sound(
    path: &Path,
    migrations: &[&str],
    most: u64,
) -> Result<Connection, StoreError> {
    let said = StoreError::of(path);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(said)?;
    connection.busy_timeout(BUSY).map_err(said)?;
    let version = version(&connection, path, migrations.len() as u32)?;
    if let Some(wrong) = (version > 0)
        .then(|| damage(&connection, path, most))
        .transpose()?
        .flatten()
    {
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            said: wrong,
        });
    }
    connection
        .pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))
        .map_err(said)?;
    // What is committed survives a power loss: the journal forgets it then.
    connection
        .pragma_update(None, "synchronous", "full")
        .map_err(said)?;
    migrate(&mut connection, migrations).map_err(said)?;
    Ok(connection)
}

/// The version of its schema, 0 of a new one.
pub(super) fn version(connection: &Connection, path: &Path, known: u32) -> Result<u32, StoreError> {
    let said = StoreError::of(path);
    let number = |name: &str| {
        let read = connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        read.map_err(said)
    };
    let (version, application) = (number("user_version")?, number("application_id")?);
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(said)?;
    let path = path.to_owned();
    match (version, i64::from(APPLICATION_ID) == application) {
        (0, false) if application == 0 && tables == 0 => Ok(0),
        (_, false) => Err(StoreError::Foreign { path }),
        (version, true) => match u32::try_from(version) {
            Ok(version) if version <= known => Ok(version),
            newer => Err(StoreError::Newer {
                path,
                version: newer.unwrap_or(u32::MAX),
                known,
            }),
        },
    }
}

/// What is wrong with a file that says it is sound.
fn damage(connection: &Connection, path: &Path, most: u64) -> Result<Option<String>, StoreError> {
    let small = fs::metadata(path).is_ok_and(|found| found.len() <= most);
    if !small {
        return Ok(None);
    }
    let found: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(StoreError::of(path))?;
    Ok((found != "ok").then_some(found))
}

/// Each step whole or not at all.
fn migrate(connection: &mut Connection, migrations: &[&str]) -> rusqlite::Result<()> {
    loop {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Within it, since another process may do the same.
        let version: usize =
            transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let Some(step) = migrations.get(version) else {
            return Ok(());
        };
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", version as i64 + 1)?;
        transaction.commit()?;
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Puts what is readable of a damaged database into a new one, in its place. The damaged one is kept
/// beside it.
fn save(path: &Path, said: &str) -> Result<(), StoreError> {
    let failed = |error| StoreError::Io {
        path: path.to_owned(),
        error,
    };
    let aside = beside(path, &format!(".damaged-{}", unix_ms(SystemTime::now())));
    fs::hard_link(path, &aside)
        .or_else(|_| fs::copy(path, &aside).map(drop))
        .map_err(failed)?;
    // It holds what was committed last.
    let wal = beside(path, "-wal");
    if wal.exists() {
        fs::copy(&wal, beside(&aside, "-wal")).map_err(failed)?;
    }
    let new = beside(path, ".new");
    let _ = fs::remove_file(&new);
    let _ = fs::remove_file(beside(&new, "-journal"));
    make_file(&new).map_err(failed)?;
    let saved = copy_readable(&aside, &new).map_err(StoreError::of(&new))?;
    // The new file must not get what the old one's log has.
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(beside(path, end));
    }
    fs::rename(&new, path).map_err(failed)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed)?;
    let Saved { copied, lost, all } = saved;
    let named: Vec<String> = lost.iter().take(MAX_NAMED).map(i64::to_string).collect();
    let more = lost.len().saturating_sub(MAX_NAMED);
    let lost = match all {
        false => "how many more it had can't be told".to_owned(),
        true if lost.is_empty() => "none is missing".to_owned(),
        true if more > 0 => format!(
            "can't be read: numbers {} and {more} more",
            named.join(", ")
        ),
        true => format!("can't be read: numbers {}", named.join(", ")),
    };
    tracing::error!(
        ledger = %path.display(), kept = %aside.display(),
        "the ledger is damaged ({said}): {copied} receipts are saved into a new one; {lost}"
    );
    Ok(())
}

struct Saved {
    copied: usize,
    /// Numbers of those that can't be read.
    lost: Vec<i64>,
    /// Whether it can be told how many there were.
    all: bool,
}

fn copy_readable(from: &Path, to: &Path) -> rusqlite::Result<Saved> {
    let mut new = Connection::open(to)?;
    migrate(&mut new, MIGRATIONS)?;
    let mut saved = Saved {
        copied: 0,
        lost: Vec::new(),
        all: false,
    };
    let transaction = new.transaction()?;
    // What is wrong with the old one is no reason to stop.
    if let Ok(old) = Connection::open(from) {
        let _ = copy_rows(&old, &transaction, &mut saved);
    }
    transaction.commit()?;
    Ok(saved)
}

/// One by one, so that a damaged page costs only what is on it.
fn copy_rows(old: &Connection, new: &Connection, saved: &mut Saved) -> rusqlite::Result<()> {
    let mut select = old.prepare("SELECT * FROM streams WHERE seq = ?1")?;
    let names: Vec<_> = select.column_names().map(str::to_owned).collect();
    let names = names.join(", ");
    let marks = vec!["?"; select.column_count()].join(", ");
    let mut insert = new.prepare(&format!("INSERT INTO streams ({names}) VALUES ({marks})"))?;
    let count = select.column_count();
    let number = |sql: &str| old.query_row(sql, [], |row| row.get::<_, i64>(0)).ok();
    let last = [
        "SELECT max(seq) FROM streams",
        "SELECT seq FROM sqlite_sequence WHERE name = 'streams'",
    ];
    let last = last.into_iter().filter_map(number).max();
    let first = number("SELECT min(seq) FROM streams").unwrap_or(1).max(1);
    let Some(last) = last.filter(|last| last - first < MAX_SOUGHT) else {
        return Ok(());
    };
    saved.all = true;
    for seq in first..=last {
        let values = select.query_row([seq], |row| {
            (0..count)
                .map(|n| row.get::<_, Value>(n))
                .collect::<Result<Vec<_>, _>>()
        });
        match values.map(|values| insert.execute(params_from_iter(values))) {
            Ok(Ok(_)) => saved.copied += 1,
            Err(rusqlite::Error::QueryReturnedNoRows) => {}
            Ok(Err(_)) | Err(_) => saved.lost.push(seq),
        }
    }
    Ok(())
}
