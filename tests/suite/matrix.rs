//! Every cause of a close in every phase of a stream. Alice is whom it strikes; bob's stream goes on
//! in the same room, where the cause leaves one. In each cell the STT server says how every stream
//! ended, and the daemon's own report or exit code must agree.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use rehearsal::{
    room::{self, Whom},
    speaker::Speaker,
    stt::{self, CloseWith, End, Reject},
};
use roomwarden::{
    cli::{EXIT_ABANDONED, EXIT_UNACKNOWLEDGED},
    config::Config,
    daemon::Daemon,
    domain::Transcript,
    transcripts::{Sink, Sinks},
};
use tokio::sync::Semaphore;

use crate::stage::{Binary, LIMIT, Stage, stop};

const ROOM: &str = "r";
/// Of cells that run at a time.
const AT_ONCE: usize = 6;
/// How long the STT server takes to acknowledge a stream that is closing when the cause strikes.
const SLOW_ANSWER: Duration = Duration::from_secs(3);

/// What alice's stream is doing when the cause strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The daemon is joining her room, whose server does not answer.
    Joining,
    /// She is muted, and the stream is kept alive.
    Silent,
    /// The STT server has not answered the handshake.
    Handshake,
    Streaming,
    /// The connection was lost, and the STT server refuses another.
    Reconnecting,
    /// The track was taken back, and the STT server takes its time to answer.
    Closing,
}

use Phase::{Closing, Handshake, Joining, Reconnecting, Silent, Streaming};

const ALL: [Phase; 6] = [Joining, Silent, Handshake, Streaming, Reconnecting, Closing];

struct Cell {
    stage: Stage,
    phase: Phase,
    /// Taken by causes that end her.
    alice: Option<Speaker>,
    bob: Option<Speaker>,
}

impl Cell {
    /// Brings everything to the phase; `start` starts the daemon.
    async fn new<D>(phase: Phase, start: impl AsyncFnOnce(&Stage) -> D) -> (Self, D) {
        Self::on(Stage::new().await, phase, start).await
    }

    async fn on<D>(stage: Stage, phase: Phase, start: impl AsyncFnOnce(&Stage) -> D) -> (Self, D) {
        if phase == Joining {
            let frozen = Whom::identity("roomwarden");
            stage.faults(|f| f.signal_frozen = frozen).await;
            let alice = stage.speaker(ROOM, "alice").await;
            let daemon = start(&stage).await;
            stage.has("roomwarden").await;
            let cell = Self {
                stage,
                phase,
                alice: Some(alice),
                bob: None,
            };
            return (cell, daemon);
        }
        let daemon = start(&stage).await;
        let bob = stage.speaker(ROOM, "bob").await;
        stage.streaming(1).await;
        if phase == Handshake {
            stage.stt.set_faults(stt::Faults {
                hold_handshake: true,
                ..Default::default()
            });
        }
        let alice = stage.speaker(ROOM, "alice").await;
        let cell = Self {
            stage,
            phase,
            alice: Some(alice),
            bob: Some(bob),
        };
        cell.reach().await;
        (cell, daemon)
    }

    async fn reach(&self) {
        let stage = &self.stage;
        match self.phase {
            Joining => {}
            Handshake => {
                // The server has taken the connection; what it was asked, it does not tell.
                stage
                    .witnessed("a held handshake", |w| w.held_handshakes > 0)
                    .await;
            }
            Streaming => stage.streaming(2).await,
            Silent => {
                stage.streaming(2).await;
                self.alice().mute();
                let kept = |w: &stt::Witness| w.streams[1].texts.keep_alive > 0;
                stage.witnessed("a KeepAlive", kept).await;
            }
            Reconnecting => {
                stage.streaming(2).await;
                stage.stt.set_faults(stt::Faults {
                    reject_with: Some(Reject::status(503)),
                    ..Default::default()
                });
                self.fault_of_alices(stt::Faults {
                    drop_after: Some(Duration::ZERO),
                    ..Default::default()
                });
                stage.witnessed("a refusal", |w| w.rejections() > 0).await;
            }
            Closing => {
                stage.streaming(2).await;
                self.fault_of_alices(stt::Faults {
                    close_delay: Some(SLOW_ANSWER),
                    ..Default::default()
                });
                self.alice().unpublish().await;
                let asked = |w: &stt::Witness| w.streams[1].close_requested;
                stage.witnessed("CloseStream", asked).await;
            }
        }
    }

    fn alice(&self) -> &Speaker {
        self.alice.as_ref().expect("she is there")
    }

    async fn alice_leaves(&mut self) {
        self.alice.take().expect("she is there").leave().await;
    }

    /// Hers is the second stream that was opened.
    fn fault_of_alices(&self, faults: stt::Faults) {
        let streams = self.stage.stt.witness().streams;
        let set = self
            .stage
            .stt
            .set_stream_faults(&streams[1].request_id, Some(faults));
        assert!(set, "{:?}: {streams:#?}", self.phase);
    }

    /// The room server and the STT server answer again.
    async fn relent(&self) {
        self.stage.rooms.set_faults(room::Faults::default()).await;
        self.stage.stt.set_faults(stt::Faults::default());
    }

    /// Whether an unacknowledged end of this phase is the phase's own doing.
    fn lost_before(&self, end: Option<&End>) -> bool {
        let dropped =
            |end: &End| matches!(end, End::ServerFault { fault } if fault == "drop_after");
        self.phase == Reconnecting && end.is_some_and(dropped)
    }

    /// At the end: nothing open, and every stream acknowledged but for what `else_allowed` allows.
    async fn witnessed(&self, else_allowed: impl Fn(&End) -> bool) {
        let witness = self.stage.open(0).await;
        for stream in &witness.streams {
            let end = stream.end.as_ref();
            let fine = end == Some(&End::Acknowledged)
                || end.is_some_and(&else_allowed)
                || self.lost_before(end);
            assert!(fine, "{:?}: {stream:#?}", self.phase);
        }
    }

    async fn over(self) {
        for speaker in [self.alice, self.bob].into_iter().flatten() {
            speaker.leave().await;
        }
        self.stage.end().await;
    }
}

/// Runs the cells of some phases, a few at a time.
async fn in_each<F: Future<Output = ()>>(phases: &[Phase], cell: impl Fn(Phase) -> F) {
    static CELLS: Semaphore = Semaphore::const_new(AT_ONCE);
    let cells = phases.iter().map(async |phase| {
        let _turn = CELLS.acquire().await.expect("never closed");
        println!("{phase:?} begins");
        cell(*phase).await;
        println!("{phase:?} is fine");
    });
    join_all(cells).await;
}

fn config(stage: &Stage) -> Config {
    let mut config = stage.config();
    config.rooms.reconcile_interval_ms = 200;
    config.stt.idle_after_ms = 5000;
    config.stt.read_timeout_ms = 8000;
    (config.stt.retry_first_ms, config.stt.retry_most_ms) = (100, 500);
    config
}

// --- What happens to alice ---------------------------------------------------------------------

/// A cause that ends alice's stream, and hers alone.
async fn of_alice(phase: Phase, strike: impl AsyncFn(&mut Cell)) {
    let start = async |stage: &Stage| Daemon::start(config(stage), Sinks::default());
    let (mut cell, daemon) = Cell::new(phase, start).await;
    strike(&mut cell).await;
    cell.relent().await;
    // Bob's goes on, and whatever was hers ends.
    if cell.bob.is_some() {
        let only_bob = |w: &stt::Witness| w.open_now == 1 && w.streams[0].end.is_none();
        cell.stage.witnessed("bob's stream alone", only_bob).await;
    }
    let report = stop(&daemon).await;
    cell.witnessed(|_| false).await;
    assert_eq!(report.opened, cell.stage.stt.witness().opened);
    cell.over().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaves() {
    in_each(&ALL, async |phase| {
        of_alice(phase, async |cell| {
            cell.alice_leaves().await;
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn is_removed() {
    in_each(&ALL, async |phase| {
        of_alice(phase, async |cell| {
            let api = cell.stage.api();
            api.remove_participant(ROOM, "alice")
                .await
                .expect("removal");
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unpublishes() {
    in_each(&ALL, async |phase| {
        of_alice(phase, async |cell| cell.alice().unpublish().await).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vanishes() {
    in_each(&ALL, async |phase| {
        of_alice(phase, async |cell| {
            let alice = cell.alice.take().expect("she is there");
            alice.vanish(&cell.stage.rooms).await;
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaves_and_nobody_is_told() {
    in_each(&ALL, async |phase| {
        of_alice(phase, async |cell| {
            let frozen = cell.stage.rooms.faults().signal_frozen;
            cell.stage
                .faults(|f| {
                    f.departures_lost = Whom::identity("alice");
                    f.signal_frozen = frozen;
                })
                .await;
            cell.alice_leaves().await;
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn is_replaced_by_a_client_of_the_same_identity() {
    in_each(&ALL, async |phase| {
        let start = async |stage: &Stage| Daemon::start(config(stage), Sinks::default());
        let (cell, daemon) = Cell::new(phase, start).await;
        let second = cell.stage.speaker(ROOM, "alice").await;
        cell.relent().await;
        let people = if cell.bob.is_some() { 2 } else { 1 };
        cell.stage.streaming(people).await;
        second.leave().await;
        stop(&daemon).await;
        cell.witnessed(|_| false).await;
        cell.over().await;
    })
    .await;
}

// --- What happens to the room, or its server ------------------------------------------------------

/// A cause that ends every stream.
async fn of_all(phase: Phase, strike: impl AsyncFn(&mut Cell)) {
    let start = async |stage: &Stage| Daemon::start(config(stage), Sinks::default());
    let (mut cell, daemon) = Cell::new(phase, start).await;
    strike(&mut cell).await;
    cell.relent().await;
    cell.witnessed(|_| false).await;
    let report = stop(&daemon).await;
    assert_eq!(report.opened, cell.stage.stt.witness().opened);
    cell.over().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_room_is_deleted() {
    in_each(&ALL, async |phase| {
        of_all(phase, async |cell| {
            cell.stage.api().delete_room(ROOM).await.expect("deletion");
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_livekit_server_stops() {
    in_each(&ALL, async |phase| {
        of_all(phase, async |cell| {
            let another = room::Server::start(room::Config::default()).expect("room server");
            let rooms = std::mem::replace(&mut cell.stage.rooms, another);
            rooms.shutdown().await;
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_livekit_server_is_killed() {
    in_each(&ALL, async |phase| {
        of_all(phase, async |cell| {
            let another = room::Server::start(room::Config::default()).expect("room server");
            let rooms = std::mem::replace(&mut cell.stage.rooms, another);
            rooms.kill().await;
        })
        .await;
    })
    .await;
}

// --- What happens to the STT server ----------------------------------------------------------------

const CONNECTED: [Phase; 3] = [Silent, Streaming, Closing];

/// A fault that ends alice's stream; another must follow where she is still heard.
async fn of_the_provider(phase: Phase, faults: stt::Faults) {
    let start = async |stage: &Stage| Daemon::start(config(stage), Sinks::default());
    let (cell, daemon) = Cell::new(phase, start).await;
    cell.fault_of_alices(faults);
    let ended = |w: &stt::Witness| w.streams[1].end.is_some();
    cell.stage.witnessed("alice's stream ends", ended).await;
    cell.alice().unmute();
    if phase != Closing {
        cell.stage.streaming(2).await;
    }
    stop(&daemon).await;
    let by_the_server = |end: &End| matches!(end, End::ServerFault { .. } | End::Abrupt);
    cell.witnessed(by_the_server).await;
    let acknowledged = |stream: &stt::StreamRecord| stream.end == Some(End::Acknowledged);
    let others = cell
        .stage
        .stt
        .witness()
        .streams
        .into_iter()
        .filter(|s| !acknowledged(s));
    assert!(others.count() <= 1, "only that one");
    cell.over().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_closes_with_1011() {
    in_each(&CONNECTED, async |phase| {
        let close_with = Some(CloseWith {
            code: 1011,
            reason: "NET-0000".into(),
            after: Duration::ZERO,
        });
        let faults = stt::Faults {
            close_with,
            ..Default::default()
        };
        of_the_provider(phase, faults).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_resets() {
    in_each(&CONNECTED, async |phase| {
        let faults = stt::Faults {
            drop_after: Some(Duration::ZERO),
            ..Default::default()
        };
        of_the_provider(phase, faults).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_is_half_open() {
    in_each(&CONNECTED, async |phase| {
        let faults = stt::Faults {
            stall: true,
            ..Default::default()
        };
        of_the_provider(phase, faults).await;
    })
    .await;
}

/// CloseStream is never answered: the outcome says so, within the deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_close_is_not_answered() {
    in_each(&CONNECTED, async |phase| {
        let start = async |stage: &Stage| {
            let mut config = config(stage);
            config.stt.close_grace_ms = 1000;
            Daemon::start(config, Sinks::default())
        };
        let (mut cell, daemon) = Cell::new(phase, start).await;
        cell.fault_of_alices(stt::Faults {
            never_answer_close: true,
            ..Default::default()
        });
        cell.alice_leaves().await;
        let only_bob = |w: &stt::Witness| w.open_now == 1 && w.streams[1].end.is_some();
        cell.stage.witnessed("bob's stream alone", only_bob).await;
        let report = stop(&daemon).await;
        let [alices, bobs] = report.receipts.as_slice() else {
            panic!("{:#?}", report.receipts)
        };
        assert!(
            alices.outcome.to_string().starts_with("timed out"),
            "{alices:#?}"
        );
        assert_eq!(bobs.outcome.to_string(), "acknowledged");
        assert_eq!((report.timed_out, report.acknowledged), (1, 1));
        cell.over().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_final_comes_late() {
    for late in [400, 3000] {
        in_each(&CONNECTED, async |phase| {
            let start = async |stage: &Stage| Daemon::start(config(stage), Sinks::default());
            let (mut cell, daemon) = Cell::new(phase, start).await;
            cell.fault_of_alices(stt::Faults {
                final_delay: Duration::from_millis(late),
                ..Default::default()
            });
            cell.alice_leaves().await;
            let only_bob = |w: &stt::Witness| w.open_now == 1 && w.streams[1].end.is_some();
            cell.stage.witnessed("bob's stream alone", only_bob).await;
            stop(&daemon).await;
            cell.witnessed(|_| false).await;
            cell.over().await;
        })
        .await;
    }
}

// --- What happens to the daemon ----------------------------------------------------------------

/// Signals to the real binary, each as soon as it has said that it heard the one before; it may be
/// over before that.
async fn of_the_process(phase: Phase, signals: &[(&str, &str)], codes: &[u8]) {
    let variables = [
        ("ROOMWARDEN__SHUTDOWN__HURRY_MS", "4000"),
        ("ROOMWARDEN__STT__RETRY_FIRST_MS", "100"),
        ("ROOMWARDEN__STT__RETRY_MOST_MS", "500"),
    ];
    let start = async |stage: &Stage| Binary::run(stage, &variables);
    let (cell, mut binary) = Cell::new(phase, start).await;
    for (signal, heard) in signals {
        binary.signal(signal);
        if !binary.logged_or_over(heard).await {
            break;
        }
    }
    // A handshake that is never answered ends with the deadline; this one is, in the end.
    cell.stage.stt.set_faults(stt::Faults::default());
    let (status, log) = binary.exit().await;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let fine = code.is_some_and(|code| codes.contains(&code));
    assert!(fine, "{phase:?}: {status}\n{log}");
    let otherwise = |_: &End| code != Some(0);
    cell.relent().await;
    cell.witnessed(otherwise).await;
    cell.over().await;
}

const FIRST: &str = "closing everything";
const SECOND: &str = "hurrying";
const THIRD: &str = "abandoned";

#[tokio::test(flavor = "multi_thread")]
async fn sigint() {
    in_each(&ALL, async |phase| {
        of_the_process(phase, &[("INT", FIRST)], &[0]).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm() {
    in_each(&ALL, async |phase| {
        of_the_process(phase, &[("TERM", FIRST)], &[0]).await
    })
    .await;
}

/// On the same path, with less time: enough here.
#[tokio::test(flavor = "multi_thread")]
async fn two_signals() {
    let signals = [("TERM", FIRST), ("TERM", SECOND)];
    in_each(&ALL, async |phase| {
        of_the_process(phase, &signals, &[0]).await
    })
    .await;
}

/// What was over before the third is no less acknowledged for it.
#[tokio::test(flavor = "multi_thread")]
async fn three_signals() {
    let signals = [("TERM", FIRST), ("INT", SECOND), ("TERM", THIRD)];
    let codes = [0, EXIT_UNACKNOWLEDGED, EXIT_ABANDONED];
    in_each(&ALL, async |phase| {
        of_the_process(phase, &signals, &codes).await
    })
    .await;
}

/// Does something on alice's first final transcript, on the task that transcribes her.
struct Defect {
    struck: AtomicBool,
    what: Box<dyn Fn() + Send + Sync>,
}

impl Defect {
    fn sinks(what: impl Fn() + Send + Sync + 'static) -> Sinks {
        Sinks::new(vec![Box::new(Self {
            struck: AtomicBool::new(false),
            what: Box::new(what),
        })])
    }
}

impl Sink for Defect {
    fn deliver(&self, transcript: &Transcript) {
        let hers = transcript.is_final && transcript.participant == "alice";
        if hers && !self.struck.swap(true, Ordering::SeqCst) {
            (self.what)();
        }
    }
}

/// Her stream is closed by the book, and she is transcribed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_panics() {
    let start = async |stage: &Stage| {
        Daemon::start(
            config(stage),
            Defect::sinks(|| panic!("a defect, on purpose")),
        )
    };
    let (cell, daemon) = Cell::new(Streaming, start).await;
    let again = |w: &stt::Witness| w.streams.len() == 3 && w.streams[1].end.is_some();
    cell.stage.witnessed("a third stream", again).await;
    cell.stage.streaming(2).await;
    stop(&daemon).await;
    cell.witnessed(|_| false).await;
    cell.over().await;
}

/// What holds threads until it is dropped.
#[derive(Default)]
struct Hang(Arc<(Mutex<bool>, Condvar)>);

impl Hang {
    /// Does not return before then.
    fn held(&self) -> impl Fn() + Send + Sync + 'static {
        let hang = self.0.clone();
        move || {
            let (over, told) = &*hang;
            let over = over.lock().expect("no panic");
            drop(told.wait_while(over, |over| !*over).expect("no panic"));
        }
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        let (over, told) = &*self.0;
        *over.lock().expect("no panic") = true;
        told.notify_all();
    }
}

/// Her session's task never comes back, and holds a thread of the runtime: her stream is closed past
/// it, and everybody else's is none the worse.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_hangs() {
    let hang = Hang::default();
    // It is not to be the provider who ends the stream, for want of a KeepAlive.
    let patient = stt::Config::default().idle_timeout(LIMIT * 10);
    let start = async |stage: &Stage| Daemon::start(config(stage), Defect::sinks(hang.held()));
    let (cell, daemon) = Cell::on(Stage::with(patient).await, Streaming, start).await;
    let deaf =
        |w: &stt::Witness| w.streams[1].last_audio_ms.is_some() && w.streams[1].finals_sent > 0;
    cell.stage.witnessed("a final of hers", deaf).await;
    let report = stop(&daemon).await;
    cell.witnessed(|_| false).await;
    assert_eq!(report.opened, 2);
    drop(hang);
    cell.over().await;
}
