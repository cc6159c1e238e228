//! Events that are lost, late, doubled or out of order, and servers that go away: what the room
//! server knows is what counts in the end.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
};

use rehearsal::{
    room::{self, Faults, Mishap, Whom},
    stt,
};
use roomwarden::{
    config::Config,
    daemon::Daemon,
    domain::Transcript,
    transcripts::{Sink, Sinks},
};
use tracing::field;
use tracing_subscriber::{
    Layer,
    layer::{self, SubscriberExt},
};

use crate::stage::{Binary, LIMIT, Stage, on_a_port_of_its_own, reasons, stop};

const POLLED: &str = "participant left (found by polling)";

/// Compares often.
fn config(stage: &Stage) -> Config {
    let mut config = stage.config();
    config.rooms.reconcile_interval_ms = 200;
    config
}

/// How often this identity has been in the room.
fn stays(witness: &room::Witness, room: &str, identity: &str) -> usize {
    let rooms = witness.rooms.iter().filter(|r| r.name == room);
    let stays = rooms.flat_map(|r| &r.participants);
    stays.filter(|p| p.identity == identity).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_departure_that_no_event_tells_is_found_by_polling() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    stage
        .faults(|f| f.departures_lost = Whom::identity("alice"))
        .await;

    alice.leave().await;
    stage.open(1).await;
    // And when she is back, she is somebody else, whose departure is lost as well.
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    alice.leave().await;
    stage.open(1).await;
    let report = stop(&daemon).await;
    assert_eq!(reasons(&report), [POLLED, POLLED, "shutdown (test)"]);
    stage.all_acknowledged(3).await;
    bob.leave().await;
    stage.end().await;
}

/// Whoever comes back before the news of the departure is transcribed nevertheless. The SDK takes
/// such news for one of the new stay, and then knows nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_departure_told_late_or_out_of_order_does_not_silence_who_came_back() {
    let late = Faults {
        departures_late: Whom::identity("alice"),
        lateness_ms: 1000,
        ..Faults::default()
    };
    let out_of_order = Faults {
        departures_out_of_order: Whom::identity("alice"),
        ..Faults::default()
    };
    for faults in [late, out_of_order] {
        let stage = Stage::new().await;
        let daemon = Daemon::start(config(&stage), Sinks::default());
        let bob = stage.speaker("r", "bob").await;
        let alice = stage.speaker("r", "alice").await;
        stage.streaming(2).await;
        stage.rooms.set_faults(faults).await;

        alice.leave().await;
        let alice = stage.speaker("r", "alice").await;
        // For longer than the news was late.
        let witness = stage
            .witnessed("both go on", |w| {
                let open = w.streams.iter().filter(|s| s.end.is_none());
                let old = open.filter(|s| s.audio_seconds > 2.5);
                w.streams.len() > 2 && old.count() == 2
            })
            .await;
        assert_eq!(witness.open_now, 2);
        stage.rooms.set_faults(Faults::default()).await;
        alice.leave().await;
        bob.leave().await;
        stage.all_acknowledged(witness.streams.len()).await;
        stop(&daemon).await;
        stage.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_departure_told_twice_closes_once() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let bob = stage.speaker("r", "bob").await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    stage
        .faults(|f| f.departures_twice = Whom::identity("alice"))
        .await;
    alice.leave().await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(3).await;
    stop(&daemon).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_speaker_of_whom_no_event_tells_is_found_by_polling() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    stage
        .faults(|f| f.arrivals_lost = Whom::identity("alice"))
        .await;

    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;
    assert_eq!(stays(&stage.rooms.witness(), "r", "roomwarden"), 2);
    alice.leave().await;
    bob.leave().await;
    // Bob's first, and both after the room was joined anew.
    stage.all_acknowledged(3).await;
    let report = stop(&daemon).await;
    assert_eq!(
        reasons(&report)[0],
        "room ended (found incomplete by polling)"
    );
    stage.end().await;
}

/// Joining anew may not help, and costs everybody a moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_joined_anew_only_once_for_the_same_speaker() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    stage
        .faults(|f| {
            f.unseen = Whom::identity("alice");
            f.departures_lost = Whom::Everyone;
        })
        .await;
    let alice = stage.speaker("r", "alice").await;
    stage
        .witnessed("the room joined anew", |w| w.streams.len() == 2)
        .await;
    // A departure found by polling takes as many rounds as a speaker does.
    for _ in 0..2 {
        let carol = stage.speaker("r", "carol").await;
        stage.streaming(2).await;
        carol.leave().await;
        stage.open(1).await;
    }
    assert_eq!(stays(&stage.rooms.witness(), "r", "roomwarden"), 2);
    stop(&daemon).await;
    stage.all_acknowledged(4).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_is_gone_without_a_word_is_found_by_polling() {
    let stage = Stage::new().await;
    let mut config = config(&stage);
    config.rooms.reconcile_interval_ms = 100;
    let daemon = Daemon::start(config, Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    stage
        .faults(|f| f.signal_frozen = Whom::identity("roomwarden"))
        .await;
    stage.api().delete_room("r").await.expect("deletion");
    stage.open(0).await;
    stage.faults(|_| {}).await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    let report = stop(&daemon).await;
    assert_eq!(
        reasons(&report),
        ["room ended (found gone by polling)", "shutdown (test)"]
    );
    stage.all_acknowledged(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// A list that cannot be had closes nothing, and events go on to count.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_fails_closes_nothing() {
    let stage = Stage::new().await;
    let mut config = config(&stage);
    // That alice says nothing any more closes nothing either.
    config.stt.idle_after_ms = 0;
    let daemon = Daemon::start(config, Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    stage
        .faults(|f| {
            f.api_failing = true;
            f.departures_lost = Whom::identity("alice");
        })
        .await;
    alice.leave().await;
    // For longer than it takes when the API answers.
    let heard = |w: &stt::Witness| w.streams[1].audio_seconds;
    let before = heard(&stage.stt.witness());
    stage
        .witnessed("bob goes on", |w| heard(w) > before + 2.0)
        .await;
    assert_eq!(stage.stt.witness().open_now, 2);
    stage
        .faults(|f| f.departures_lost = Whom::identity("alice"))
        .await;
    stage.open(1).await;
    let report = stop(&daemon).await;
    assert_eq!(reasons(&report)[0], POLLED);
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

async fn a_room_server_comes_back(restart: impl AsyncFnOnce(room::Server)) {
    let mut stage = Stage::new().await;
    let (rooms, config) = on_a_port_of_its_own(|port| {
        let config = room::Config {
            port,
            ..room::Config::default()
        };
        room::Server::start(config.clone()).map(|rooms| (rooms, config))
    });
    std::mem::replace(&mut stage.rooms, rooms).shutdown().await;
    let daemon = Daemon::start(self::config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("other", "bob").await;
    stage.streaming(2).await;

    restart(stage.rooms).await;
    // Nobody is there to say so, and yet nothing is kept open for nothing.
    match stage.stt.wait_for(|w| w.open_now == 0, LIMIT).await {
        Ok(witness) => assert_eq!(witness.streams.len(), 2),
        Err(last) => panic!("streams stay open without a room server: {last:#?}"),
    }
    alice.leave().await;
    bob.leave().await;
    stage.rooms = room::Server::start(config).expect("the same port");
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("other", "bob").await;
    stage.streaming(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(4).await;
    stop(&daemon).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_server_that_was_killed_comes_back() {
    a_room_server_comes_back(async |rooms| drop(rooms.kill().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_server_that_was_stopped_comes_back() {
    a_room_server_comes_back(async |rooms| drop(rooms.shutdown().await)).await;
}

/// The connection is made anew, while the media goes on: nothing closes.
#[tokio::test(flavor = "multi_thread")]
async fn signalling_that_breaks_off_costs_no_stream() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    assert!(
        stage
            .rooms
            .befall("r", "roomwarden", Mishap::DropSignal)
            .await
    );
    let resumed = |w: &room::Witness| {
        let room = w.room("r").expect("room");
        room.participant("roomwarden").expect("there").resumes == 1
    };
    stage.rooms.wait_for(resumed, LIMIT).await.expect("resumed");
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(2).await;
    stop(&daemon).await;
    stage.end().await;
}

/// Then the SDK gives up at once, and it is for the daemon to come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_refused_when_it_is_made_anew_is_made_anew_later() {
    let stage = Stage::new().await;
    let mut binary = Binary::run(&stage, &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    stage.faults(|f| f.tokens_refused = Whom::Everyone).await;
    assert!(
        stage
            .rooms
            .befall("r", "roomwarden", Mishap::DropSignal)
            .await
    );
    binary.logged("will join again").await;
    stage.open(0).await;
    stage.faults(|_| {}).await;
    stage.streaming(1).await;
    alice.leave().await;
    stage.all_acknowledged(2).await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert!(status.success(), "{log}");
    stage.end().await;
}

/// Nothing is read or written any more, and the websocket stays: only the list tells who is there.
#[tokio::test(flavor = "multi_thread")]
async fn with_signalling_frozen_departures_are_found_by_polling() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    stage
        .faults(|f| f.signal_frozen = Whom::identity("roomwarden"))
        .await;
    alice.leave().await;
    stage.open(1).await;
    let report = stop(&daemon).await;
    assert_eq!(reasons(&report)[0], POLLED);
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

/// No packet passes in either direction: the SDK must find out, and everything is joined again.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_dead_is_made_anew() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    assert!(stage.rooms.befall("r", "roomwarden", Mishap::Vanish).await);
    let witness = stage
        .witnessed("the stream ends, and another one has audio", |w| {
            let [first, .., last] = w.streams.as_slice() else {
                return false;
            };
            first.end.is_some() && last.end.is_none() && last.audio_seconds > 0.5
        })
        .await;
    alice.leave().await;
    stage.all_acknowledged(witness.streams.len()).await;
    stop(&daemon).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_client_with_the_same_identity_takes_the_firsts_place() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.events_only(), Sinks::default());
    let first = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let second = stage.speaker("r", "alice").await;
    let witness = stage
        .witnessed("the second's stream alone", |w| {
            w.streams.len() == 2 && w.open_now == 1 && w.streams[1].audio_seconds > 0.5
        })
        .await;
    assert_eq!(witness.streams[0].end, Some(stt::End::Acknowledged));
    first.leave().await;
    second.leave().await;
    stage.all_acknowledged(2).await;
    let report = stop(&daemon).await;
    assert_eq!(
        reasons(&report),
        [
            "participant left (duplicate_identity)",
            "participant left (client_initiated)"
        ]
    );
    stage.end().await;
}

/// Two daemons of one identity would put each other out for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_identity_is_taken_stays_out() {
    let stage = Stage::new().await;
    let first = Daemon::start(config(&stage), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let second = Daemon::start(config(&stage), Sinks::default());
    stage
        .witnessed("the second's stream alone", |w| {
            w.streams.len() == 2 && w.open_now == 1 && w.streams[1].audio_seconds > 0.5
        })
        .await;
    // Both have looked for rooms again once both have been in another one.
    let bob = stage.speaker("other", "bob").await;
    let both = |w: &room::Witness| stays(w, "other", "roomwarden") == 2;
    stage.rooms.wait_for(both, LIMIT).await.expect("both");
    assert_eq!(stays(&stage.rooms.witness(), "r", "roomwarden"), 2);

    let report = stop(&first).await;
    // As the SDK sees it everybody departs with the room, and that may be what comes first.
    let said = reasons(&report);
    let put_out = |reason: &String| reason.contains("duplicate_identity");
    assert!(said.iter().any(put_out), "{said:?}");
    stop(&second).await;
    let streams = stage.stt.witness().streams.len();
    stage.all_acknowledged(streams).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// Fails the task that logs that a track's transcription has failed: the session's.
struct FailSession(AtomicU32);

impl<S: tracing::Subscriber> Layer<S> for FailSession {
    fn on_event(&self, event: &tracing::Event<'_>, _: layer::Context<'_, S>) {
        struct Restarted(bool);
        impl field::Visit for Restarted {
            fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
                self.0 |= field.name() == "message" && format!("{value:?}").contains("restarted");
            }
        }
        let mut restarted = Restarted(false);
        event.record(&mut restarted);
        let left = self.0.load(Ordering::Relaxed);
        if restarted.0 && left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            panic!("on request: a session fails");
        }
    }
}

/// Fails the task that delivers a transcript: that of a track.
struct FailTrack(AtomicU32);

impl Sink for FailTrack {
    fn deliver(&self, transcript: &Transcript) {
        let left = self.0.load(Ordering::Relaxed);
        if transcript.participant == "alice" && left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            panic!("on request: a track's transcription fails");
        }
    }
}

/// One thread, so that the failing log is that of the daemon alone.
#[tokio::test]
async fn who_loses_a_session_to_a_defect_is_transcribed_again_at_once() {
    const FAILURES: u32 = 3;
    let log = tracing_subscriber::registry().with(FailSession(FAILURES.into()));
    let _log = tracing::subscriber::set_default(log);
    let stage = Stage::new().await;
    let sink = FailTrack(FAILURES.into());
    let daemon = Daemon::start(config(&stage), Sinks::new(vec![Box::new(sink)]));
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let witness = stage
        .witnessed("alice's fourth stream and bob's first", |w| {
            let open = w.streams.iter().filter(|s| s.end.is_none());
            // By then she would have failed again.
            let sound = open.filter(|s| s.finals_sent > 1);
            w.streams.len() == 5 && sound.count() == 2
        })
        .await;
    assert_eq!(witness.open_now, 2);
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(5).await;
    let report = stop(&daemon).await;
    let lost = reasons(&report)
        .iter()
        .filter(|r| *r == "owner lost")
        .count();
    assert_eq!(lost, FAILURES as usize);
    stage.end().await;
}

#[tokio::test]
async fn who_keeps_losing_sessions_is_given_up_for_a_while_and_nobody_else_notices() {
    const TRIES: usize = 5;
    let log = tracing_subscriber::registry().with(FailSession(u32::MAX.into()));
    let _log = tracing::subscriber::set_default(log);
    let stage = Stage::new().await;
    let sink = FailTrack(u32::MAX.into());
    let daemon = Daemon::start(config(&stage), Sinks::new(vec![Box::new(sink)]));
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let tried = stage
        .witnessed("alice's streams all failed", |w| {
            w.streams.len() == TRIES + 1 && w.open_now == 1
        })
        .await;
    let heard = |w: &stt::Witness| {
        let bobs = w.streams.iter().find(|s| s.end.is_none());
        bobs.map_or(0.0, |s| s.audio_seconds)
    };
    // A session that is started again fails within less.
    let until = heard(&tried) + 4.0;
    let witness = stage.witnessed("bob goes on", |w| heard(w) > until).await;
    assert_eq!(witness.streams.len(), TRIES + 1);
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(TRIES + 1).await;
    stop(&daemon).await;
    stage.end().await;
}
