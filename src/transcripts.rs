//! Where transcripts go: standard output, a file of JSON lines, the room.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};

use serde::Serialize;
use thiserror::Error;

use crate::{config::TranscriptsConfig, domain::Transcript, ledger::unix_ms, lines::LineWriter};

/// Takes transcripts, in the order of each stream. Called on a session's task: must not block for
/// long.
pub trait Sink: Send + Sync {
    fn deliver(&self, transcript: &Transcript);

    /// Blocks until what was delivered is out, or until the given instant.
    fn flush(&self, until: Instant) {
        let _ = until;
    }
}

/// The sinks of all sessions. Cheap to clone.
#[derive(Clone, Default)]
pub struct Sinks(Arc<Vec<Box<dyn Sink>>>);

impl Sinks {
    pub fn new(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self(Arc::new(sinks))
    }

    pub fn deliver(&self, transcript: &Transcript) {
        for sink in self.0.iter() {
            sink.deliver(transcript);
        }
    }

    /// Blocks until everything is out, or until the given instant.
    pub fn flush(&self, until: Instant) {
        for sink in self.0.iter() {
            sink.flush(until);
        }
    }
}

/// Prints final transcripts on standard output.
pub struct Stdout(Lines);

impl Stdout {
    pub fn new() -> io::Result<Self> {
        Lines::start("standard output".into(), io::stdout()).map(Self)
    }
}

impl Sink for Stdout {
    fn flush(&self, until: Instant) {
        self.0.flush(until);
    }

    fn deliver(&self, transcript: &Transcript) {
        if transcript.is_final {
            let Transcript {
                room,
                participant,
                start,
                text,
                ..
            } = transcript;
            let line = format!("[{room}] {participant} {start:.2}s: {text}");
            // Names and words come from others, and must not drive the terminal.
            let mut line = line.replace(char::is_control, "\u{fffd}");
            line.push('\n');
            self.0.write(line.into_bytes());
        }
    }
}

/// Appends final transcripts to a file, one JSON object a line.
pub struct JsonLines(Lines);

#[derive(Debug, Error)]
#[error("cannot write transcripts to {path}: {error} (transcripts.file)")]
pub struct FileError {
    path: PathBuf,
    error: io::Error,
}

#[derive(Serialize)]
struct Line<'a> {
    at_ms: u64,
    #[serde(flatten)]
    transcript: &'a Transcript,
}

/// How much of the file is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Bytes past which the file is renamed; 0 for never.
    pub max: u64,
    /// Renamed files that are kept.
    pub keep: u32,
}

impl From<&TranscriptsConfig> for Rotation {
    fn from(config: &TranscriptsConfig) -> Self {
        Self {
            max: config.file_max_mb.saturating_mul(1_000_000),
            keep: config.file_keep,
        }
    }
}

impl JsonLines {
    /// The file that is configured, if any.
    pub fn configured(config: &TranscriptsConfig) -> Result<Option<Self>, FileError> {
        let file = config.file.as_deref();
        file.map(|path| Self::open(path, config.into())).transpose()
    }

    /// Opens the file for appending, and creates it if need be.
    pub fn open(path: &Path, rotation: Rotation) -> Result<Self, FileError> {
        Rotated::open(path.to_owned(), rotation)
            .and_then(|file| Lines::start(path.display().to_string(), file))
            .map(Self)
            .map_err(|error| FileError {
                path: path.to_owned(),
                error,
            })
    }
}

impl Sink for JsonLines {
    fn flush(&self, until: Instant) {
        self.0.flush(until);
    }

    fn deliver(&self, transcript: &Transcript) {
        if !transcript.is_final {
            return;
        }
        let at_ms = unix_ms(SystemTime::now());
        match serde_json::to_vec(&Line { at_ms, transcript }) {
            Ok(mut line) => {
                line.push(b'\n');
                self.0.write(line);
            }
            Err(error) => tracing::error!(%error, "a transcript can't be written as JSON"),
        }
    }
}

/// The file that is configured, if any: it may be another one, or the same opened anew, while
/// transcripts come. Cheap to clone.
#[derive(Clone, Default)]
pub struct Current(Arc<RwLock<Option<JsonLines>>>);

impl Current {
    /// From now on; what was delivered before is in the earlier file by the given instant, unless
    /// that takes nothing.
    pub fn set(&self, file: Option<JsonLines>, until: Instant) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let earlier = std::mem::replace(&mut *current, file);
        drop(current);
        if let Some(earlier) = earlier {
            earlier.flush(until);
        }
    }

    fn with(&self, then: impl FnOnce(&JsonLines)) {
        let current = self.0.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(then);
    }
}

impl Sink for Current {
    fn flush(&self, until: Instant) {
        self.with(|file| file.flush(until));
    }

    fn deliver(&self, transcript: &Transcript) {
        self.with(|file| file.deliver(transcript));
    }
}

/// A file that is renamed when it is full: FILE to FILE.1, FILE.1 to FILE.2 and so on.
struct Rotated {
    path: PathBuf,
    rotation: Rotation,
    file: File,
    /// Since it was looked at; others may have written to it or cut it.
    length: u64,
    failing: bool,
}

impl Rotated {
    fn open(path: PathBuf, rotation: Rotation) -> io::Result<Self> {
        let file = append(&path)?;
        Ok(Self {
            length: file.metadata()?.len(),
            path,
            rotation,
            file,
            failing: false,
        })
    }

    /// Before a write of so many bytes. Whatever fails, there is a file to write to.
    fn make_room(&mut self, bytes: u64) {
        if self.rotation.max == 0 || self.length + bytes <= self.rotation.max {
            return;
        }
        self.length = self.file.metadata().map_or(self.length, |data| data.len());
        if self.length == 0 || self.length + bytes <= self.rotation.max {
            return;
        }
        match self.rotate() {
            Ok(file) => {
                (self.file, self.length, self.failing) = (file, 0, false);
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(path = %self.path.display(), %error,
                        "the file of transcripts can't be renamed: it grows beyond file_max_mb");
                }
            }
        }
    }

    fn rotate(&self) -> io::Result<File> {
        let keep = self.rotation.keep;
        if keep == 0 {
            self.file.set_len(0)?;
            return append(&self.path);
        }
        let free = (1..keep).find(|n| !self.numbered(*n).exists());
        for n in (0..free.unwrap_or(keep)).rev() {
            fs::rename(self.numbered(n), self.numbered(n + 1))?;
        }
        append(&self.path).inspect_err(|_| {
            // What is written goes on into it, by whatever name.
            let _ = fs::rename(self.numbered(1), &self.path);
        })
    }

    /// FILE.n; 0 is the file itself.
    fn numbered(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        if n > 0 {
            name.push(format!(".{n}"));
        }
        name.into()
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Each write is one line.
impl Write for Rotated {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.make_room(line.len() as u64);
        // Never the rest of a line into the next file.
        self.file.write_all(line)?;
        self.length += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Where lines go, and whether that was complained about.
struct Lines {
    writer: LineWriter,
    name: String,
    full: AtomicBool,
}

impl Lines {
    fn start(name: String, out: impl Write + Send + 'static) -> io::Result<Self> {
        let to = name.clone();
        let failed = move |error| tracing::error!(to, %error, "transcripts are not written");
        Ok(Self {
            writer: LineWriter::start(out, failed)?,
            name,
            full: AtomicBool::new(false),
        })
    }

    fn write(&self, line: Vec<u8>) {
        let full = !self.writer.write(line);
        if full && !self.full.swap(true, Ordering::Relaxed) {
            tracing::error!(
                to = self.name,
                "transcripts are dropped: nothing takes them"
            );
        } else if !full {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    fn flush(&self, until: Instant) {
        if !self.writer.flush(until) {
            tracing::error!(
                to = self.name,
                "transcripts are left unwritten: nothing takes them"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NEVER: Rotation = Rotation { max: 0, keep: 0 };
    /// Of a line and its end.
    const LINE: usize = 10;

    fn line(n: usize) -> String {
        format!("{n:0width$}\n", width = LINE - 1)
    }

    /// A directory of its own, and what is written there: the lines numbered from..to.
    struct Place(PathBuf);

    impl Place {
        fn new() -> Self {
            let name = format!("roomwarden-{}", fastrand::u64(..));
            let place = Self(std::env::temp_dir().join(name));
            fs::create_dir(&place.0).expect("a directory");
            place
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        fn write(&self, keep: u32, max_lines: usize, numbers: std::ops::Range<usize>) {
            let max = (max_lines * LINE) as u64;
            let rotation = Rotation { max, keep };
            let mut file = Rotated::open(self.file("t"), rotation).expect("opens");
            for n in numbers {
                file.write_all(line(n).as_bytes()).expect("written");
            }
        }

        fn numbers(&self, name: &str) -> Vec<usize> {
            let text = fs::read_to_string(self.file(name)).expect(name);
            text.lines()
                .map(|line| line.parse().expect("whole"))
                .collect()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn transcript(is_final: bool) -> Transcript {
        Transcript {
            room: "r".into(),
            participant: "alice \"a\"\nb".into(),
            track: "TR_1".into(),
            segment: "SG_1".into(),
            is_final,
            text: "hello".into(),
            start: 1.5,
            duration: 0.5,
            confidence: 0.9,
        }
    }

    #[test]
    fn the_file_gets_a_json_line_for_each_final_transcript_and_is_appended_to() {
        let path = std::env::temp_dir().join(format!("roomwarden-{}.jsonl", fastrand::u64(..)));
        for _ in 0..2 {
            let file = JsonLines::open(&path, NEVER).expect("opens");
            file.deliver(&transcript(false));
            file.deliver(&transcript(true));
            file.flush(Instant::now() + Duration::from_secs(30));
        }
        let text = std::fs::read_to_string(&path).expect("readable");
        std::fs::remove_file(&path).expect("removable");
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["participant"], "alice \"a\"\nb");
        assert_eq!(lines[0]["start"], 1.5);
        assert!(lines[0]["at_ms"].as_u64().is_some_and(|ms| ms > 0));
    }

    #[test]
    fn a_full_file_is_renamed_and_so_many_are_kept() {
        let place = Place::new();
        place.write(2, 3, 0..4);
        // The length counts from the start of the file, not of the program.
        place.write(2, 3, 4..11);
        assert_eq!(place.numbers("t"), [9, 10]);
        assert_eq!(place.numbers("t.1"), [6, 7, 8]);
        assert_eq!(place.numbers("t.2"), [3, 4, 5]);
        assert!(!place.file("t.3").exists());
    }

    #[test]
    fn without_renamed_files_the_full_one_is_emptied() {
        let place = Place::new();
        place.write(0, 3, 0..4);
        assert_eq!(place.numbers("t"), [3]);
        assert!(!place.file("t.1").exists());
    }

    #[test]
    fn a_line_longer_than_the_file_may_be_gets_a_file_of_its_own() {
        let place = Place::new();
        let rotation = Rotation { max: 1, keep: 9 };
        let mut file = Rotated::open(place.file("t"), rotation).expect("opens");
        for n in 0..3 {
            file.write_all(line(n).as_bytes()).expect("written");
        }
        assert_eq!(
            ["t", "t.1", "t.2"].map(|name| place.numbers(name)),
            [[2], [1], [0]]
        );
        assert!(!place.file("t.3").exists());
    }

    #[test]
    fn a_rename_that_fails_loses_no_line_and_is_made_up_for() {
        let place = Place::new();
        let in_the_way = place.file("t.1");
        fs::create_dir_all(in_the_way.join("full")).expect("a directory");
        place.write(1, 3, 0..7);
        assert_eq!(place.numbers("t"), [0, 1, 2, 3, 4, 5, 6]);
        fs::remove_dir_all(in_the_way).expect("removable");
        place.write(1, 3, 7..8);
        assert_eq!(place.numbers("t"), [7]);
        assert_eq!(place.numbers("t.1"), [0, 1, 2, 3, 4, 5, 6]);
    }

    /// As `logrotate` does it with `copytruncate`.
    #[test]
    fn a_file_that_others_empty_is_not_taken_for_full() {
        let place = Place::new();
        let rotation = Rotation {
            max: 3 * LINE as u64,
            keep: 1,
        };
        let mut file = Rotated::open(place.file("t"), rotation).expect("opens");
        for n in 0..5 {
            if n == 3 {
                fs::write(place.file("t"), "").expect("emptied");
            }
            file.write_all(line(n).as_bytes()).expect("written");
        }
        assert_eq!(place.numbers("t"), [3, 4]);
        assert!(!place.file("t.1").exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named_with_its_key() {
        let Err(error) = JsonLines::open(Path::new("/no/such/directory/t.jsonl"), NEVER) else {
            panic!("it opened");
        };
        let said = error.to_string();
        assert!(said.contains("/no/such/directory/t.jsonl") && said.contains("transcripts.file"));
    }
}
