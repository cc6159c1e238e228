//! Every way for a stream to end that a first version must survive.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rehearsal::{room::Whom, stt};
use roomwarden::{
    cli::{EXIT_ABANDONED, EXIT_UNACKNOWLEDGED},
    daemon::Daemon,
    domain::{Outcome, Phase, Transcript},
    transcripts::{Sink, Sinks},
};

use crate::stage::{Binary, Kept, Stage, reasons, stop};

#[tokio::test(flavor = "multi_thread")]
async fn a_participant_leaves() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;

    alice.leave().await;
    let one = |w: &stt::Witness| w.open_now == 1;
    let witness = stage
        .witnessed("alice's stream closes, bob's goes on", one)
        .await;
    assert_eq!(
        witness.streams.iter().filter(|s| s.end.is_some()).count(),
        1
    );

    bob.leave().await;
    stage.all_acknowledged(2).await;
    let report = stop(&daemon).await;
    assert_eq!(reasons(&report), ["participant left (client_initiated)"; 2]);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_participant_is_removed_by_the_api_while_another_stays() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;

    stage
        .api()
        .remove_participant("r", "alice")
        .await
        .expect("removal");
    stage
        .witnessed("alice's stream closes, bob's goes on", |w| w.open_now == 1)
        .await;
    let report = stop(&daemon).await;
    assert_eq!(
        reasons(&report),
        ["participant left (participant_removed)", "shutdown (test)"]
    );
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_deleted() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let other = stage.speaker("other", "carol").await;
    stage.streaming(3).await;

    stage.api().delete_room("r").await.expect("deletion");
    stage
        .witnessed("the room's streams close", |w| w.open_now == 1)
        .await;
    other.leave().await;
    stage.all_acknowledged(3).await;
    let report = stop(&daemon).await;
    let deleted = reasons(&report)
        .iter()
        .filter(|r| r.contains("room_deleted"))
        .count();
    assert_eq!(deleted, 2, "{:?}", reasons(&report));
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_participant_who_comes_back_is_transcribed_again() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let other = stage.speaker("r", "bob").await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    alice.leave().await;
    stage
        .witnessed("alice's stream closes", |w| w.open_now == 1)
        .await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    alice.leave().await;
    other.leave().await;
    stage.all_acknowledged(3).await;
    stop(&daemon).await;
    stage.end().await;
}

/// The provider ends a stream that has had neither audio nor KeepAlive for 10 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_muted_participants_stream_is_kept_alive_and_goes_on() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.mute();
    let kept = stage
        .witnessed("three KeepAlives", |w| w.streams[0].texts.keep_alive >= 3)
        .await;
    let before = kept.streams[0].audio_seconds;
    alice.unmute();
    stage
        .witnessed("audio again", |w| w.streams[0].audio_seconds > before + 1.0)
        .await;
    alice.leave().await;
    stage.all_acknowledged(1).await;
    // Two seconds of silence stand for the pause; the rest was not sent.
    let seconds = stage.stt.witness().streams[0].audio_seconds;
    assert!(seconds < before + 10.0, "{seconds} s after {before} s");
    stop(&daemon).await;
    stage.end().await;
}

/// A `Room::connect` under way is not dropped: what it leaves behind would stay in the room.
#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_completes_after_the_signal_is_closed() {
    let stage = Stage::new().await;
    let frozen = Whom::identity("roomwarden");
    stage.faults(|f| f.signal_frozen = frozen).await;
    let alice = stage.speaker("r", "alice").await;
    let deadline = [("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "30000")];
    let mut binary = Binary::run(&stage, &deadline);
    stage.has("roomwarden").await;
    binary.signal("TERM");
    binary.logged("rooms=1").await;
    stage.faults(|_| {}).await;
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(0), "{log}");
    stage.left_in_order(1).await;
    assert_eq!(stage.stt.witness().opened, 0);
    alice.leave().await;
    stage.end().await;
}

async fn signal_closes(signal: &str) {
    let stage = Stage::new().await;
    let binary = Binary::run(&stage, &[]);
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("other", "bob").await;
    stage.streaming(2).await;

    binary.signal(signal);
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("abandoned"), "{log}");
    stage.all_acknowledged(2).await;
    stage.left_in_order(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigint_to_the_real_binary() {
    signal_closes("INT").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_to_the_real_binary() {
    signal_closes("TERM").await;
}

/// The second signal hurries on the same path: a server that would have answered too late is cut.
#[tokio::test(flavor = "multi_thread")]
async fn two_signals_hurry() {
    let stage = Stage::with(stt::Config::default().close_delay(Duration::from_secs(50))).await;
    let variables = [
        ("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "60000"),
        ("ROOMWARDEN__SHUTDOWN__HURRY_MS", "300"),
    ];
    let binary = Binary::run(&stage, &variables);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;

    let begun = Instant::now();
    binary.signal("TERM");
    stage
        .witnessed("CloseStream", |w| {
            w.streams.iter().all(|s| s.close_requested)
        })
        .await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert!(
        begun.elapsed() < Duration::from_secs(45),
        "it waited for the answer"
    );
    assert_eq!(status.code(), Some(EXIT_UNACKNOWLEDGED.into()), "{log}");
    assert!(
        log.contains("timed out awaiting the answer to CloseStream"),
        "{log}"
    );
    stage.open(0).await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_signals_abandon() {
    let faults = stt::Faults {
        never_answer_close: true,
        ..Default::default()
    };
    let stage = Stage::with(stt::Config::default().faults(faults)).await;
    let variables = [
        ("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "60000"),
        ("ROOMWARDEN__SHUTDOWN__HURRY_MS", "60000"),
    ];
    let mut binary = Binary::run(&stage, &variables);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;

    let begun = Instant::now();
    binary.signal("INT");
    stage
        .witnessed("CloseStream", |w| {
            w.streams.iter().all(|s| s.close_requested)
        })
        .await;
    binary.signal("INT");
    // Signals that come faster than they are taken may merge into one.
    binary.logged("hurrying").await;
    binary.signal("INT");
    let (status, log) = binary.exit().await;
    assert!(
        begun.elapsed() < Duration::from_secs(45),
        "it waited for the deadline"
    );
    assert_eq!(status.code(), Some(EXIT_ABANDONED.into()), "{log}");
    stage.open(0).await;
    alice.leave().await;
    stage.end().await;
}

/// Panics on the first final transcript, on the task that transcribes the track.
#[derive(Default)]
struct PanicOnce(AtomicBool);

impl Sink for PanicOnce {
    fn deliver(&self, transcript: &Transcript) {
        if transcript.is_final && !self.0.swap(true, Ordering::SeqCst) {
            panic!("a defect, on purpose");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_panics_closes_its_stream_and_is_restarted() {
    let stage = Stage::new().await;
    let sinks = Sinks::new(vec![Box::new(PanicOnce::default())]);
    let daemon = Daemon::start(stage.config(), sinks);
    let alice = stage.speaker("r", "alice").await;

    // One stream closed by the panic, another opened by the restart.
    let again = |w: &stt::Witness| w.streams.len() == 2 && w.open_now == 1;
    stage
        .witnessed("a second stream after the panic", again)
        .await;
    stage.streaming(1).await;
    let report = stop(&daemon).await;
    stage.all_acknowledged(2).await;
    assert_eq!(reasons(&report), ["owner lost", "shutdown (test)"]);
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_cut_within_the_deadline_and_the_receipt_says_so() {
    let faults = stt::Faults {
        never_answer_close: true,
        ..Default::default()
    };
    let stage = Stage::with(stt::Config::default().faults(faults)).await;
    let mut config = stage.config();
    config.stt.close_grace_ms = 500;
    let daemon = Daemon::start(config, Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;

    alice.leave().await;
    let witness = stage.open(0).await;
    let stream = &witness.streams[0];
    assert!(stream.close_requested);
    assert_ne!(stream.end, Some(stt::End::Acknowledged));
    // Told that it is over, and not left with what nobody will read.
    assert_eq!(stream.tcp_end, Some(stt::TcpEnd::Reset), "{stream:#?}");
    let report = stop(&daemon).await;
    let receipt = &report.receipts[0];
    assert_eq!(
        receipt.outcome,
        Outcome::TimedOut {
            phase: Phase::AwaitingAnswer
        }
    );
    // The order's own 500 ms, and what a busy machine takes to notice.
    assert!((0.4..10.0).contains(&receipt.close_seconds), "{receipt:?}");
    stage.end().await;
}

/// The answer comes late, but it comes: the last final transcript is delivered, not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_final_that_comes_while_closing_is_delivered() {
    let stage = Stage::with(stt::Config::default().close_delay(Duration::from_millis(400))).await;
    let kept = Kept::default();
    let daemon = Daemon::start(stage.config(), kept.sinks());
    let alice = stage.speaker("r", "alice").await;
    // Within the first phrase of the recording, so that its final result is still to come.
    stage
        .witnessed("speech", |w| {
            w.streams.iter().any(|s| s.audio_seconds > 1.0)
        })
        .await;
    alice.leave().await;
    stage.all_acknowledged(1).await;
    stop(&daemon).await;
    let finals = stage.stt.witness().streams[0].finals_sent;
    assert!(finals > 0, "the server had something to say");
    assert_eq!(kept.finals().len() as u64, finals);
    stage.end().await;
}
