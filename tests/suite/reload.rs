//! SIGHUP: what a running daemon takes over from a changed configuration, and what it does not.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use rehearsal::stt;
use roomwarden::cli::{EXIT_OK, EXIT_UNACKNOWLEDGED};

use crate::stage::{Binary, LIMIT, Stage};

/// The real binary with a file of configuration.
struct Configured {
    binary: Binary,
    file: PathBuf,
    reloads: usize,
}

impl Configured {
    fn run(stage: &Stage, text: &str, more: &[(&str, &str)]) -> Self {
        let file = stage.state.path().join("roomwarden.toml");
        std::fs::write(&file, text).expect("a file");
        let mut command = Binary::command(stage, more);
        command.arg("--config").arg(&file);
        Self {
            binary: Binary::start(command),
            file,
            reloads: 0,
        }
    }

    fn hang_up(&self, text: &str) {
        std::fs::write(&self.file, text).expect("a file");
        self.binary.signal("HUP");
    }

    async fn reload(&mut self, text: &str) {
        self.hang_up(text);
        self.reloads += 1;
        self.binary
            .logged_times("configuration reloaded", self.reloads)
            .await;
    }

    /// Everything is acknowledged at the end.
    async fn end(self) -> String {
        self.binary.signal("TERM");
        let (status, log) = self.binary.exit().await;
        assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
        log
    }
}

fn has(stream: &stt::StreamRecord, name: &str, value: &str) -> bool {
    let mut parameters = stream.parameters.iter();
    parameters.any(|(n, v)| n == name && v == value)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_opened_after_a_reload_follow_it_and_open_ones_stay() {
    let stage = Stage::new().await;
    let mut daemon = Configured::run(&stage, "[stt]\nmodel = 'first'\n", &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let text = "[stt]\nmodel = 'second'\nencoding = 'linear16'\npage_ms = 40\n\
        [stt.parameters]\nnumerals = true\n";
    daemon.reload(text).await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    let witness = stage.stt.witness();
    let [first, second] = &witness.streams[..] else {
        panic!("not two streams: {witness:#?}");
    };
    assert!(has(first, "model", "first") && first.end.is_none());
    for (name, value) in [
        ("model", "second"),
        ("encoding", "linear16"),
        ("numerals", "true"),
    ] {
        assert!(has(second, name, value), "{name}: {second:#?}");
    }
    // The old one goes on as it began.
    let heard = first.audio_seconds;
    stage
        .witnessed("more of alice", |w| {
            w.streams[0].audio_seconds > heard + 1.0 && w.streams[0].end.is_none()
        })
        .await;
    daemon.end().await;
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// A budget that is used up lets nobody in, open streams go on, and a raised one lets them in; what
/// was used is known after a restart as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_budget_opens_no_streams_until_it_is_raised() {
    let stage = Stage::new().await;
    // A second costs 10.
    let price = ("ROOMWARDEN__LEDGER__PRICES__NOVA-3", "600");
    let small = "[budget]\nday_cost = '20'\n";
    let mut daemon = Configured::run(&stage, small, &[price]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let used_up = "who is not yet transcribed has to wait";
    daemon.binary.logged(used_up).await;
    let bob = stage.speaker("r", "bob").await;
    let heard = stage.stt.witness().streams[0].audio_seconds;
    let goes_on = |w: &stt::Witness| w.streams[0].audio_seconds > heard + 3.0;
    let witness = stage.witnessed("alice goes on", goes_on).await;
    assert_eq!((witness.opened, witness.open_now), (1, 1));
    daemon.reload("[budget]\nday_cost = '1000000'\n").await;
    stage.streaming(2).await;
    let log = daemon.end().await;
    assert!(log.contains("streams may be opened again"), "{log}");
    assert!(log.contains("20 USD of this day (UTC) are used"), "{log}");
    stage.all_acknowledged(2).await;

    let mut daemon = Configured::run(&stage, small, &[price]);
    daemon.binary.logged(used_up).await;
    daemon.binary.logged("joined").await;
    daemon.end().await;
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// A key that was renewed, in its file.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_read_from_their_files_again() {
    let stage = Stage::new().await;
    let key = stage.state.path().join("key");
    std::fs::write(&key, stage.stt.api_key()).expect("a file");
    let key_file = key.display().to_string();
    let mut daemon = Configured::run(
        &stage,
        "",
        &[
            ("DEEPGRAM_API_KEY", ""),
            ("DEEPGRAM_API_KEY_FILE", &key_file),
            ("ROOMWARDEN__STT__RETRY_MOST_MS", "200"),
        ],
    );
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    std::fs::write(&key, "another-key-and-hush").expect("a file");
    daemon.reload("").await;
    let bob = stage.speaker("r", "bob").await;
    let refused = |w: &stt::Witness| w.rejected.get(&401).is_some_and(|count| *count > 0);
    stage.witnessed("a refusal", refused).await;
    std::fs::write(&key, stage.stt.api_key()).expect("a file");
    daemon.reload("").await;
    stage.streaming(2).await;
    let log = daemon.end().await;
    assert!(!log.contains("hush"), "{log}");
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rooms_and_people_who_are_excluded_are_left_and_taken_back() {
    let stage = Stage::new().await;
    let mut daemon = Configured::run(&stage, "", &[]);
    let alice = stage.speaker("kept", "alice").await;
    let bob = stage.speaker("kept", "bob").await;
    let carol = stage.speaker("left", "carol").await;
    stage.streaming(3).await;
    let text = "[rooms]\nexclude = ['left']\n[participants]\nexclude = ['bob']\n";
    daemon.reload(text).await;
    let witness = stage.witnessed("two ended", |w| w.open_now == 1).await;
    let ended: Vec<_> = witness
        .streams
        .iter()
        .filter_map(|s| s.end.clone())
        .collect();
    assert_eq!(ended, [stt::End::Acknowledged, stt::End::Acknowledged]);
    let gone = |w: &rehearsal::room::Witness| {
        let mut left = w.live_rooms().filter(|room| room.name == "left");
        left.any(|room| room.present().all(|p| p.identity != "roomwarden"))
    };
    let gone = stage.rooms.wait_for(gone, LIMIT).await;
    gone.expect("the daemon is out of the room");
    daemon.reload("").await;
    stage.streaming(3).await;
    daemon
        .reload("[participants]\nsources = ['screen_share_audio']\n")
        .await;
    stage.open(0).await;
    let log = daemon.end().await;
    let receipts = log.lines().filter(|line| line.contains("stream closed: "));
    let reasons = receipts.filter(|line| line.contains("reason=no longer selected"));
    assert_eq!(reasons.count(), 5, "{log}");
    stage.all_acknowledged(5).await;
    for speaker in [alice, bob, carol] {
        speaker.leave().await;
    }
    stage.end().await;
}

/// A reload asks for the rooms at once, and a room that was left by one may be joined at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_taken_back_without_waiting_for_a_poll() {
    let stage = Stage::new().await;
    let alice = stage.speaker("r", "alice").await;
    let rooms = "[rooms]\npoll_interval_ms = 3600000\n";
    let by_file = [("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "")];
    let mut daemon = Configured::run(&stage, rooms, &by_file);
    stage.streaming(1).await;
    daemon.reload(&format!("{rooms}exclude = ['r']\n")).await;
    stage.without("roomwarden").await;
    daemon.reload(rooms).await;
    stage.streaming(1).await;
    daemon.end().await;
    stage.all_acknowledged(2).await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_changes_nothing_and_every_problem_is_named() {
    let stage = Stage::new().await;
    let mut daemon = Configured::run(&stage, "[stt]\nmodel = 'first'\n", &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    daemon
        .hang_up("[stt]\nmodel = 'second'\npage_ms = 7\napi_kez = 'x'\n[rooms]\nexclude = ['r']\n");
    let problems = [
        "roomwarden.toml, line 3: stt.page_ms is 7: it must be from 20",
        "roomwarden.toml, line 4: there is no key stt.api_kez",
    ];
    for problem in problems {
        daemon.binary.logged(problem).await;
    }
    // Nor by a file that can't be written.
    daemon.hang_up("[stt]\nmodel = 'second'\n[transcripts]\nfile = '/no/such/directory/t'\n");
    daemon
        .binary
        .logged("not reloaded: cannot write transcripts to /no/such")
        .await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    let witness = stage.stt.witness();
    let first = |stream| has(stream, "model", "first") && stream.end.is_none();
    assert!(witness.streams.iter().all(first), "{witness:#?}");
    let log = daemon.end().await;
    assert!(!log.contains("configuration reloaded"), "{log}");
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_change_is_named() {
    let stage = Stage::new().await;
    let mut daemon = Configured::run(&stage, "", &[]);
    // Until then a hangup ends it.
    daemon.binary.logged("starting").await;
    let text = "[rooms]\nidentity = 'other'\nhidden = true\n[transcripts]\nroom = false\n\
        [stt]\nmodel = 'second'\n";
    daemon.reload(text).await;
    let said = "restart to change keys=\"rooms.identity, rooms.hidden, transcripts.room\"";
    daemon.binary.logged(said).await;
    // The rest is taken.
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let witness = stage.stt.witness();
    assert!(has(&witness.streams[0], "model", "second"), "{witness:#?}");
    let rooms = stage.rooms.witness();
    let room = rooms.room("r").expect("room");
    assert!(
        room.present()
            .any(|p| p.identity == "roomwarden" && !p.hidden)
    );
    daemon.end().await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_filter_of_the_log_and_the_file_of_transcripts_change() {
    let stage = Stage::new().await;
    let transcripts = stage.state.path().join("transcripts");
    let rotated = stage.state.path().join("rotated");
    let file = format!("[transcripts]\nfile = '{}'\n", transcripts.display());
    let quiet = format!("{file}[log]\nfilter = 'warn'\n");
    let mut daemon = Configured::run(&stage, &quiet, &[]);
    let alice = stage.speaker("r", "alice").await;
    let written = async |path: &PathBuf| {
        let begun = Instant::now();
        while std::fs::read(path).is_ok_and(|text| text.is_empty()) {
            assert!(begun.elapsed() < LIMIT, "nothing is written to {path:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    stage.streaming(1).await;
    written(&transcripts).await;
    assert!(!daemon.binary.log().contains("INFO"));
    // As logrotate does it.
    std::fs::rename(&transcripts, &rotated).expect("renamed");
    daemon.reload(&file).await;
    written(&transcripts).await;
    let bob = stage.speaker("another", "bob").await;
    daemon.binary.logged("joined").await;
    let log = daemon.end().await;
    assert!(log.contains("stream closed: acknowledged"), "{log}");
    for path in [rotated, transcripts] {
        let text = std::fs::read_to_string(path).expect("text");
        assert!(!text.is_empty());
        for line in text.lines() {
            serde_json::from_str::<serde_json::Value>(line).expect("whole");
        }
    }
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// Longer than before, so that the watchdog must know it, too.
#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_of_a_shutdown_changes() {
    let faults = stt::Faults {
        never_answer_close: true,
        ..Default::default()
    };
    let stage = Stage::with(stt::Config::default().faults(faults)).await;
    let mut daemon = Configured::run(&stage, "[shutdown]\ndeadline_ms = 200\n", &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    daemon.reload("[shutdown]\ndeadline_ms = 4000\n").await;
    let begun = Instant::now();
    daemon.binary.signal("TERM");
    let (status, log) = daemon.binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_UNACKNOWLEDGED.into()), "{log}");
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(2500), "{took:?}");
    alice.leave().await;
    stage.end().await;
}
