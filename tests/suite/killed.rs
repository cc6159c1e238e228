//! SIGKILL at any moment: the next start names the streams that were open, and no others.
//! ROOMWARDEN_KILLS sets how many (default 5, a short run of what is meant for 200), ROOMWARDEN_SEED
//! repeats a run as far as the machine's own timing allows.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use rehearsal::stt;
use roomwarden::{
    cli::{EXIT_OK, EXIT_USAGE},
    close::CloseOrder,
    daemon::Daemon,
    domain::{CloseReason, StreamId, StreamKey},
    journal::{Journal, JournalError},
    ledger::unix_ms,
    registry::{OpenStream, StreamState},
    transcripts::Sinks,
};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::stage::{Binary, LIMIT, Stage};

const SPEAKERS: usize = 4;
const ROOMS: usize = 2;
/// Long enough that some are killed while they are closing.
const CLOSE_DELAY: Duration = Duration::from_millis(100);

/// What a start says of the run before.
struct Named {
    state: String,
    request: Option<String>,
}

/// The streams that the log names as orphaned, in the words and fields of the log's text format.
fn named(log: &str) -> Vec<Named> {
    let field = |line: &str, name: &str| {
        let (_, value) = line.split_once(&format!(" {name}="))?;
        let value = value.split_whitespace().next()?;
        Some(value.trim_matches('"').to_owned())
    };
    log.lines()
        .filter(|line| line.contains("an earlier run was killed with this stream open"))
        .map(|line| {
            for words in [
                "room=",
                "participant=",
                "track=",
                "opened=",
                " at the latest",
            ] {
                assert!(line.contains(words), "{words} is missing: {line}");
            }
            Named {
                state: field(line, "state").expect("a state"),
                request: field(line, "request").filter(|id| id != "-"),
            }
        })
        .collect()
}

#[derive(Debug, Default)]
struct Figures {
    /// By the STT server: streams that a kill cut off.
    dropped: usize,
    /// Of those: named by request id; named as being opened.
    by_id: usize,
    opening: usize,
    /// Named as being closed, and acknowledged just before the kill.
    closing: usize,
    /// Named as being opened, and never seen by the server.
    unseen: usize,
    acknowledged: usize,
}

impl Figures {
    /// Compares what was named with what the server saw of the killed run's streams.
    fn add(&mut self, named: Vec<Named>, seen: &[stt::StreamRecord], log: &str) {
        let mut unnamed: BTreeMap<&str, &stt::StreamRecord> = seen
            .iter()
            .map(|stream| (stream.request_id.as_str(), stream))
            .collect();
        let mut without_id = 0;
        for Named { state, request } in named {
            let Some(request) = request else {
                assert_eq!(state, "Opening", "without an id: {log}");
                without_id += 1;
                continue;
            };
            let stream = unnamed.remove(request.as_str());
            let stream = stream.unwrap_or_else(|| panic!("{request} is named twice or made up"));
            if stream.end == Some(stt::End::Acknowledged) {
                assert_eq!(state, "Closing", "named though it was closed: {stream:#?}");
                self.closing += 1;
            } else {
                self.dropped += 1;
                self.by_id += 1;
            }
        }
        let closed = |stream: &&stt::StreamRecord| stream.end == Some(stt::End::Acknowledged);
        let (closed, dropped): (Vec<_>, Vec<_>) = unnamed.into_values().partition(closed);
        assert!(
            dropped.len() <= without_id,
            "cut off and not named: {dropped:#?} {log}"
        );
        // The id comes with the handshake's answer, and audio after it.
        let known = dropped.iter().find(|stream| stream.audio_seconds > 0.5);
        assert!(known.is_none(), "named without its id: {known:#?} {log}");
        self.acknowledged += closed.len();
        self.dropped += dropped.len();
        self.opening += dropped.len();
        self.unseen += without_id - dropped.len();
    }
}

/// Speakers who come and go until they are told to stop.
async fn come_and_go(stage: &Stage, seed: u64, stop: &CancellationToken) {
    let one = async |n: usize| {
        let mut random = fastrand::Rng::with_seed(seed + n as u64);
        let mut pause = async |most: u64| {
            let pause = Duration::from_millis(random.u64(..most));
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        };
        while !stop.is_cancelled() {
            let speaker = stage
                .speaker(&format!("room-{}", n % ROOMS), &format!("speaker-{n}"))
                .await;
            pause(1500).await;
            speaker.leave().await;
            pause(300).await;
        }
    };
    futures_util::future::join_all((0..SPEAKERS).map(one)).await;
}

/// Waits for a moment that is drawn: after a while, or when a stream opens or is asked to close.
async fn some_moment(stage: &Stage, random: &mut fastrand::Rng) {
    let before = stage.stt.witness();
    let closing = |w: &stt::Witness| w.streams.iter().filter(|s| s.close_requested).count();
    let asked = closing(&before);
    let count = random.usize(1..=3);
    match random.u8(..3) {
        0 => {
            stage
                .witnessed("a stream", |w| w.opened > before.opened)
                .await;
            let while_long = Duration::from_millis(random.u64(..1500));
            tokio::time::sleep(while_long).await;
        }
        1 => {
            let opened = before.opened + count as u64;
            stage.witnessed("streams", |w| w.opened >= opened).await;
        }
        _ => {
            stage
                .witnessed("closes", |w| closing(w) >= asked + count)
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_start_names_exactly_the_streams_that_a_sigkill_cut_off() {
    let number = |name| {
        let value = std::env::var(name).ok();
        value.map(|n| n.parse::<u64>().expect(name))
    };
    let kills = number("ROOMWARDEN_KILLS").unwrap_or(5);
    let seed = number("ROOMWARDEN_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("{kills} kills, ROOMWARDEN_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let stage = Stage::with(stt::Config::default().close_delay(CLOSE_DELAY)).await;
    let stop = CancellationToken::new();
    let mut figures = Figures::default();
    let killing = async {
        // The streams of the runs before the one that is killed.
        let mut before = 0;
        let mut binary = Binary::run(&stage, &[]);
        binary.logged("journal opened").await;
        assert_eq!(named(&binary.log()).len(), 0);
        for _ in 0..kills {
            some_moment(&stage, &mut random).await;
            binary.signal("KILL");
            binary.exit().await;
            let witness = stage.open(0).await;
            binary = Binary::run(&stage, &[]);
            binary.logged("journal opened").await;
            let log = binary.log();
            let seen: Vec<_> = witness
                .streams
                .into_iter()
                .filter(|s| s.id > before)
                .collect();
            before = witness.opened;
            figures.add(named(&log), &seen, &log);
        }
        // An end in order leaves nothing to name.
        binary.signal("TERM");
        let (status, log) = binary.exit().await;
        assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
        stop.cancel();
    };
    tokio::join!(killing, come_and_go(&stage, seed, &stop));
    println!("{kills} kills: {figures:?}");
    let mut binary = Binary::run(&stage, &[]);
    binary.logged("journal opened").await;
    assert_eq!(named(&binary.log()).len(), 0);
    binary.signal("TERM");
    binary.exit().await;
    stage.end().await;
}

/// Also shows what disk space that ends does: a file of this process can't grow any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_cannot_be_written_is_told_once_and_costs_no_stream() {
    let stage = Stage::new().await;
    let binary = Binary::command(&stage, &[]);
    let program = binary.as_std().get_program();
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" run"])
        .arg(program)
        .env_clear()
        .envs(stage.environment())
        .stdout(std::process::Stdio::null());
    let mut binary = Binary::start(limited);
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    binary.logged("the journal can't be written").await;
    alice.leave().await;
    stage
        .witnessed("alice's stream closes", |w| w.open_now == 1)
        .await;
    // Long enough for it to have been tried again.
    stage
        .witnessed("bob's goes on", |w| {
            w.streams.iter().any(|s| s.audio_seconds > 4.0)
        })
        .await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert_eq!(
        log.matches("the journal can't be written").count(),
        1,
        "{log}"
    );
    assert!(log.contains("File too large"), "{log}");
    assert!(
        log.contains("the last receipts are not in the journal"),
        "{log}"
    );
    assert!(log.contains("unjournaled=2"), "{log}");
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_is_set_must_do_and_the_usual_one_may() {
    let stage = Stage::new().await;
    let unusable = [("ROOMWARDEN__STATE__DIR", "/dev/null/state")];
    let (status, log) = Binary::run(&stage, &unusable).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    for words in [
        "state.dir",
        "/dev/null/state",
        "Not a directory",
        "may write",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }

    let mut command = Binary::command(&stage, &[("STATE_DIRECTORY", "/dev/null/state")]);
    command.env_remove("ROOMWARDEN__STATE__DIR");
    let mut binary = Binary::start(command);
    binary.logged("no journal is kept").await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_do_not_share_a_journal() {
    let stage = Stage::new().await;
    let mut first = Binary::run(&stage, &[]);
    first.logged("journal opened").await;
    let (status, log) = Binary::run(&stage, &[]).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    assert!(
        log.contains("in use") && log.contains("rooms.identity"),
        "{log}"
    );
    first.signal("TERM");
    let ended = tokio::time::timeout(LIMIT, first.exit())
        .await
        .expect("it ends");
    assert_eq!(ended.0.code(), Some(EXIT_OK.into()), "{}", ended.1);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_left_open_is_in_the_report_with_the_time_by_which_it_is_free() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.stt.provider_idle_ms = 12_345;
    let left = OpenStream {
        id: StreamId(7),
        key: StreamKey {
            room: "r".into(),
            participant: "alice".into(),
            track: "TR_1".into(),
        },
        service: Default::default(),
        state: StreamState::Open,
        opened_at_ms: 1_000,
        request_id: Some("request".into()),
    };
    let open = async || {
        let opened = async {
            loop {
                // The threads of one that was dropped are still at their last lines.
                match Journal::open(stage.state.path(), "me") {
                    Err(JournalError::Locked { .. }) => tokio::task::yield_now().await,
                    opened => return opened.expect("opens"),
                }
            }
        };
        tokio::time::timeout(LIMIT, opened).await.expect("free")
    };
    let earlier = open().await;
    earlier.journal.enter(&left);
    let run = earlier.journal.run();
    drop(earlier);

    let recovered = open().await;
    let before = unix_ms(SystemTime::now());
    let daemon = Daemon::start_with(config, Sinks::default(), Some(recovered), None);
    let after = unix_ms(SystemTime::now());
    daemon.close(&CloseOrder {
        reason: CloseReason::Shutdown("test".into()),
        deadline: Instant::now() + LIMIT,
    });
    let report = daemon.closed().await;
    let [orphan] = &report.orphaned[..] else {
        panic!("{:?}", report.orphaned);
    };
    assert_eq!((orphan.run, &orphan.stream), (run, &left));
    let free_by = before + 12_345..=after + 12_345;
    assert!(
        free_by.contains(&orphan.free_by_ms),
        "{orphan:?} {free_by:?}"
    );
    // An orphan is no stream of this run.
    assert_eq!((report.opened, report.receipts.len()), (0, 0));
    drop((daemon, report));
    assert_eq!(open().await.left_open, []);
    stage.end().await;
}
