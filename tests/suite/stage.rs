//! What every test stands on: a room server, an STT server, speakers, and the daemon, in this
//! process or as the real binary.

use std::{
    collections::HashMap,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use livekit_api::services::room::{CreateRoomOptions, RoomClient};
use livekit_protocol::DisconnectReason;
use rehearsal::{
    room,
    speaker::{Place, Recording, Speaker, SpeakerError},
    stt,
};
use roomwarden::{
    close::CloseOrder,
    config::Config,
    daemon::{Daemon, Report},
    domain::{CloseReason, Transcript},
    transcripts::{Sink, Sinks},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
};

/// For any condition that is waited for; generous, since machines are busy.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Stage {
    pub rooms: room::Server,
    pub stt: stt::Server,
    /// Where the binary keeps its journal.
    pub state: tempfile::TempDir,
}

impl Stage {
    pub async fn new() -> Self {
        Self::with(stt::Config::default()).await
    }

    pub async fn with(stt: stt::Config) -> Self {
        Self::of(room::Config::default(), stt)
    }

    pub fn of(rooms: room::Config, stt: stt::Config) -> Self {
        let rooms = room::Server::start(rooms).expect("room server");
        let stt = stt::Server::start(stt).expect("STT server");
        let state = tempfile::tempdir().expect("state directory");
        Self { rooms, stt, state }
    }

    /// The environment that points a daemon at this stage.
    pub fn environment(&self) -> HashMap<String, String> {
        [
            ("LIVEKIT_URL", self.rooms.url()),
            ("LIVEKIT_API_KEY", self.rooms.api_key().to_owned()),
            ("LIVEKIT_API_SECRET", self.rooms.api_secret().to_owned()),
            ("DEEPGRAM_API_KEY", self.stt.api_key().to_owned()),
            ("ROOMWARDEN__STT__URL", self.stt.url()),
            ("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "100".to_owned()),
            (
                "ROOMWARDEN__STATE__DIR",
                self.state.path().display().to_string(),
            ),
            // Tests look for words in the log.
            ("ROOMWARDEN__LOG__FORMAT", "text".to_owned()),
            // Many run at once.
            ("ROOMWARDEN__CONTROL__LISTEN", "off".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    pub fn config(&self) -> Config {
        Config::load_from(None, self.environment()).expect("configuration")
    }

    /// That of a daemon that never compares a room with the server's list of it.
    pub fn events_only(&self) -> Config {
        let mut config = self.config();
        config.rooms.reconcile_interval_ms = 0;
        config
    }

    /// Sets the room server's faults, and takes back those there were.
    pub async fn faults(&self, change: impl FnOnce(&mut room::Faults)) {
        let mut faults = room::Faults::default();
        change(&mut faults);
        self.rooms.set_faults(faults).await;
    }

    pub fn api(&self) -> RoomClient {
        let (key, secret) = (self.rooms.api_key(), self.rooms.api_secret());
        RoomClient::with_api_key(&self.rooms.http_url(), key, secret)
    }

    pub async fn speaker(&self, room: &str, identity: &str) -> Speaker {
        let joined = self.try_speaker(room, identity).await;
        joined.expect("speaker joins")
    }

    /// As [`Stage::speaker`], where somebody may delete the room meanwhile.
    pub async fn try_speaker(&self, room: &str, identity: &str) -> Result<Speaker, SpeakerError> {
        let file = include_bytes!("../../crates/rehearsal/assets/anna.opus");
        let recording = Recording::from_ogg(file).expect("recording");
        let place = Place {
            url: &self.rooms.url(),
            api_key: self.rooms.api_key(),
            api_secret: self.rooms.api_secret(),
            room,
            identity,
        };
        Speaker::join(place, recording).await
    }

    /// Waits until the STT server says that the condition holds.
    pub async fn witnessed(
        &self,
        what: &str,
        condition: impl FnMut(&stt::Witness) -> bool,
    ) -> stt::Witness {
        match self.stt.wait_for(condition, LIMIT).await {
            Ok(witness) => witness,
            Err(last) => panic!("{what}: not within {LIMIT:?}; the STT server says {last:#?}"),
        }
    }

    /// Waits until so many streams are open.
    pub async fn open(&self, count: usize) -> stt::Witness {
        let what = format!("{count} streams open");
        self.witnessed(&what, |w| w.open_now == count).await
    }

    /// Waits until so many streams are open and have had audio.
    pub async fn streaming(&self, count: usize) {
        self.witnessed("streams with audio", |w| {
            let live = w
                .streams
                .iter()
                .filter(|s| s.end.is_none() && s.audio_seconds > 0.5);
            live.count() == count
        })
        .await;
    }

    /// Waits until nothing is open; every one of the `count` streams must have been acknowledged.
    pub async fn all_acknowledged(&self, count: usize) {
        let witness = self.witnessed("no stream open", |w| w.open_now == 0).await;
        assert_eq!(witness.streams.len(), count, "{:#?}", witness.streams);
        for stream in &witness.streams {
            assert_eq!(stream.end, Some(stt::End::Acknowledged), "{stream:#?}");
        }
    }

    /// Makes a room and waits until these are in it.
    pub async fn joined(&self, room: &str, identities: &[&str]) {
        let api = self.api();
        let made = api.create_room(room, CreateRoomOptions::default()).await;
        made.expect("a room");
        let there = |w: &room::Witness| {
            let present = |who: &&str| {
                w.live_rooms()
                    .flat_map(|r| r.present())
                    .any(|p| p.identity == **who)
            };
            identities.iter().all(present)
        };
        if let Err(last) = self.rooms.wait_for(there, LIMIT).await {
            panic!("{identities:?} are not there: {last:#?}");
        }
    }

    /// Waits until somebody with this identity is in a room.
    pub async fn has(&self, identity: &str) {
        let there = |w: &room::Witness| is_in_a_room(w, identity);
        if let Err(last) = self.rooms.wait_for(there, LIMIT).await {
            panic!("{identity} is not there: {last:#?}");
        }
    }

    /// Waits until nobody with this identity is in any room.
    pub async fn without(&self, identity: &str) {
        let gone = |w: &room::Witness| !is_in_a_room(w, identity);
        if let Err(last) = self.rooms.wait_for(gone, LIMIT).await {
            panic!("{identity} is still there: {last:#?}");
        }
    }

    /// Waits until the daemon is in no room; it must have been in so many, and have said goodbye.
    pub async fn left_in_order(&self, count: usize) {
        self.without("roomwarden").await;
        let witness = self.rooms.witness();
        let all = witness.rooms.iter().flat_map(|room| &room.participants);
        let stays: Vec<_> = all.filter(|p| p.identity == "roomwarden").collect();
        assert_eq!(stays.len(), count, "{stays:#?}");
        let goodbye = Some(DisconnectReason::ClientInitiated);
        assert!(stays.iter().all(|p| p.reason == goodbye), "{stays:#?}");
    }

    pub async fn end(self) {
        self.rooms.shutdown().await;
        self.stt.shutdown().await;
    }
}

/// What starts on a port that nobody gets by asking for a free one, so that it is free again later.
pub fn on_a_port_of_its_own<T, E>(start: impl Fn(u16) -> Result<T, E>) -> T {
    let mut ports = (0..100).map(|_| fastrand::u16(20_000..30_000));
    ports
        .find_map(|port| start(port).ok())
        .expect("a free port")
}

fn is_in_a_room(witness: &room::Witness, identity: &str) -> bool {
    let mut present = witness.live_rooms().flat_map(|room| room.present());
    present.any(|p| p.identity == identity)
}

/// Closes a daemon of this process; nothing may be left.
pub async fn stop(daemon: &Daemon) -> Arc<Report> {
    daemon.close(&CloseOrder {
        reason: CloseReason::Shutdown("test".into()),
        deadline: Instant::now() + Duration::from_secs(20),
    });
    let report = tokio::time::timeout(LIMIT, daemon.closed())
        .await
        .expect("the daemon closes");
    assert!(report.nothing_left(), "{report:#?}");
    report
}

/// Why each stream was closed, in the order of settlement.
pub fn reasons(report: &Report) -> Vec<String> {
    report
        .receipts
        .iter()
        .map(|receipt| receipt.reason.to_string())
        .collect()
}

/// Keeps the final transcripts.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<Vec<Transcript>>>);

impl Kept {
    pub fn sinks(&self) -> Sinks {
        Sinks::new(vec![Box::new(self.clone())])
    }

    pub fn finals(&self) -> Vec<Transcript> {
        self.0.lock().expect("no panic").clone()
    }
}

impl Sink for Kept {
    fn deliver(&self, transcript: &Transcript) {
        if transcript.is_final {
            self.0.lock().expect("no panic").push(transcript.clone());
        }
    }
}

/// The real binary. Killed if the test fails before it ends.
pub struct Binary {
    child: Child,
    log: watch::Receiver<String>,
}

impl Binary {
    /// What starts `roomwarden run` on the stage, with more variables.
    pub fn command(stage: &Stage, more: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roomwarden"));
        command.arg("run").env_clear().envs(stage.environment());
        command.envs(more.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    pub fn run(stage: &Stage, more: &[(&str, &str)]) -> Self {
        Self::start(Self::command(stage, more))
    }

    pub fn start(mut command: Command) -> Self {
        command.stderr(Stdio::piped());
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .expect("roomwarden starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (so_far, log) = watch::channel(String::new());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                so_far.send_modify(|log| {
                    log.push_str(&line);
                    log.push('\n');
                });
            }
        });
        Self { child, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("still running")
    }

    pub fn signal(&self, signal: &str) {
        send(signal, self.pid());
    }

    /// Waits until the log has `words`.
    pub async fn logged(&mut self, words: &str) {
        self.logged_times(words, 1).await;
    }

    /// Waits until the log has `words` so many times.
    pub async fn logged_times(&mut self, words: &str, times: usize) {
        let there = |log: &String| log.matches(words).count() >= times;
        let waited = tokio::time::timeout(LIMIT, self.log.wait_for(there));
        let there = matches!(waited.await, Ok(Ok(_)));
        assert!(there, "never logged: {words}; the log is {}", self.log());
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.borrow().clone()
    }

    /// The same; false if it is over without having said so.
    pub async fn logged_or_over(&mut self, words: &str) -> bool {
        let there = self.log.wait_for(|log| log.contains(words));
        let there = tokio::time::timeout(LIMIT, there).await;
        there.expect("it says something, or ends").is_ok()
    }

    /// Waits for its end; how it exited and what it logged.
    pub async fn exit(mut self) -> (ExitStatus, String) {
        let status = tokio::time::timeout(LIMIT, self.child.wait()).await;
        let Ok(status) = status else {
            let threads = threads(self.pid());
            panic!("the binary does not exit: {threads:#?}\n{}", self.log());
        };
        let status = status.expect("its status");
        // The sender goes with the last line.
        while self.log.changed().await.is_ok() {}
        let log = self.log.borrow().clone();
        (status, log)
    }
}

/// What a process's threads wait for, as far as the kernel tells.
fn threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let told = tasks.into_iter().flatten().flatten().map(|task| {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        ["comm", "wchan", "syscall"]
            .map(|name| read(name).trim().to_owned())
            .join(" ")
    });
    told.collect()
}

pub fn send(signal: &str, pid: u32) {
    let sent = std::process::Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status();
    assert!(sent.expect("kill runs").success());
}

/// Lines of a child's standard output.
pub fn lines(child: &mut Child) -> tokio::io::Lines<BufReader<tokio::process::ChildStdout>> {
    BufReader::new(child.stdout.take().expect("piped")).lines()
}
