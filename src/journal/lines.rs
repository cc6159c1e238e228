//! What stands in the file: JSON lines, written and read.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{JournalError, KEPT_FOR_STORE, Orphan, Over, StreamName};
use crate::{ledger::Settled, registry::OpenStream};

pub(super) const VERSION: u32 = 1;
/// What is longer is no line of ours.
pub(super) const MAX_LINE: u64 = 1 << 20;
/// Damaged lines that are named one by one.
const MAX_NAMED: usize = 10;
/// Of a file name made from an identity.
const MAX_NAME: usize = 100;

#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    run: u64,
    #[serde(flatten)]
    what: What<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What<'a> {
    Open(&'a OpenStream),
    Settled(&'a Settled),
    Orphaned(&'a Orphan),
}

pub(super) fn to_line(run: u64, what: What<'_>) -> Vec<u8> {
    let line = Line {
        v: VERSION,
        run,
        what,
    };
    // Cannot fail: text and numbers, with text for keys.
    let mut line = serde_json::to_vec(&line).unwrap_or_default();
    line.push(b'\n');
    line
}

/// What a journal said.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) open: BTreeMap<StreamName, (OpenStream, Vec<u8>)>,
    pub(super) over: VecDeque<(Over, Vec<u8>)>,
    pub(super) last_run: u64,
    pub(super) damaged: usize,
    pub(super) damage: Vec<String>,
}

pub(super) fn read(path: &Path) -> Result<Found, JournalError> {
    let failed = |error| JournalError::Io {
        path: path.to_owned(),
        error,
    };
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let mut found = Found::default();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line);
        if length.map_err(failed)? == 0 {
            break;
        }
        let whole = line.last() == Some(&b'\n');
        if !whole && line.len() as u64 == MAX_LINE {
            reader.skip_until(b'\n').map_err(failed)?;
            found.damage(format!("line {number} is too long"));
            continue;
        }
        match ReadLine::parse(&line) {
            Ok(read) => found.take(read, &line),
            Err(LineError::Newer(version)) => {
                let path = path.to_owned();
                return Err(JournalError::Newer { path, version });
            }
            // Written when the process was killed, or the power went.
            Err(LineError::Damaged(_)) if !whole => {
                tracing::info!(journal = %path.display(), "the last line was cut off by a crash");
            }
            Err(LineError::Damaged(said)) => found.damage(format!("line {number}: {said}")),
        }
    }
    Ok(found)
}

enum LineError {
    Newer(u64),
    Damaged(serde_json::Error),
}

#[derive(Deserialize)]
struct ReadLine {
    run: u64,
    #[serde(flatten)]
    what: ReadWhat,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ReadWhat {
    Open(OpenStream),
    Settled(Arc<Settled>),
    Orphaned(Orphan),
}

impl ReadLine {
    fn parse(line: &[u8]) -> Result<Self, LineError> {
        #[derive(Deserialize)]
        struct Versioned {
            v: u64,
        }
        let Versioned { v } = serde_json::from_slice(line).map_err(LineError::Damaged)?;
        if v > VERSION.into() {
            return Err(LineError::Newer(v));
        }
        serde_json::from_slice(line).map_err(LineError::Damaged)
    }
}

impl Found {
    fn damage(&mut self, said: String) {
        self.damaged += 1;
        if self.damage.len() < MAX_NAMED {
            self.damage.push(said);
        }
    }

    fn take(&mut self, read: ReadLine, line: &[u8]) {
        let run = read.run;
        self.last_run = self.last_run.max(run);
        let mut line = line.to_vec();
        // It parsed, so nothing but the line's end can be missing.
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        match read.what {
            ReadWhat::Open(stream) => {
                self.open.insert((run, stream.id), (stream, line));
            }
            ReadWhat::Settled(settled) => self.end(Over::Settled(run, settled), line),
            ReadWhat::Orphaned(orphan) if orphan.run == run => {
                self.end(Over::Orphaned(orphan), line);
            }
            // Of before there was a store: it was told, and names another run than its own.
            ReadWhat::Orphaned(_) => {}
        }
    }

    fn end(&mut self, over: Over, line: Vec<u8>) {
        self.open.remove(&over.name());
        if self.over.len() == KEPT_FOR_STORE {
            self.over.pop_front();
        }
        self.over.push_back((over, line));
    }
}

/// The identity as a file name: other characters than letters, digits, `-` and `_` as `%` and their
/// code, and what is too long by a hash of it.
pub fn file_name(identity: &str) -> String {
    let mut name = String::new();
    for byte in identity.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            byte => name.push_str(&format!("%{byte:02X}")),
        }
    }
    if name.len() > MAX_NAME {
        // FNV-1a: the same in every version, unlike the standard library's.
        let hash = identity
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        name.truncate(MAX_NAME);
        name.push_str(&format!("-{hash:016x}"));
    }
    name
}
