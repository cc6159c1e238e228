//! Many rooms come and go, every second one left while somebody still speaks in it; what is held
//! must not grow. ROOMWARDEN_CYCLES sets how many (default 20, a short run of what is meant for
//! 1000).

use std::{
    fs,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use livekit::webrtc::{data_channel::DataChannelInit, prelude::*};
use roomwarden::{daemon::Daemon, transcripts::Sinks};
use tokio::runtime::Handle;

use crate::stage::{Binary, LIMIT, Stage, stop};

/// The first cycles fill what is kept for later ones.
const WARM: usize = 20;

fn cycles() -> usize {
    let cycles = std::env::var("ROOMWARDEN_CYCLES").ok();
    cycles.and_then(|n| n.parse().ok()).unwrap_or(20)
}

/// A room from its first participant to its end.
async fn cycle(stage: &Stage, n: usize) {
    let room = format!("room-{n}");
    let speaker = stage.speaker(&room, "alice").await;
    stage
        .witnessed("a stream with audio", |w| {
            w.open_now == 1 && w.streams.last().is_some_and(|s| s.audio_seconds > 0.1)
        })
        .await;
    let api = stage.api();
    match n % 4 {
        // The participant leaves, and then
        0 => {
            speaker.leave().await;
            api.delete_room(&room).await.expect("deletion");
        }
        // the room is deleted with everyone in it,
        1 => {
            api.delete_room(&room).await.expect("deletion");
            speaker.leave().await;
        }
        // the participant is put out, and then
        2 => {
            let removed = api.remove_participant(&room, "alice").await;
            removed.expect("removal");
            speaker.leave().await;
            stage.open(0).await;
            api.delete_room(&room).await.expect("deletion");
        }
        // the daemon is put out while the participant speaks on.
        _ => {
            let removed = api.remove_participant(&room, "roomwarden").await;
            removed.expect("removal");
            stage.open(0).await;
            stage.without("roomwarden").await;
            speaker.leave().await;
            api.delete_room(&room).await.expect("deletion");
        }
    }
    stage.open(0).await;
    stage.without("roomwarden").await;
}

/// What the daemon's process holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    descriptors: usize,
    threads: usize,
    resident_kb: usize,
}

fn held(pid: u32) -> Held {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .expect("field");
        line.split_whitespace()
            .nth(1)
            .and_then(|value| value.parse().ok())
            .expect("number")
    };
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its descriptors")
        .count();
    Held {
        descriptors,
        threads: field("Threads:"),
        resident_kb: field("VmRSS:"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rooms_that_come_and_go_leave_nothing_behind() {
    let cycles = cycles();
    let stage = Stage::new().await;
    let binary = Binary::run(&stage, &[("ROOMWARDEN__LOG__FILTER", "error")]);
    let mut before = None;
    for n in 0..WARM + cycles {
        cycle(&stage, n).await;
        let done = n + 1;
        if done == WARM {
            before = Some(held(binary.pid()));
        }
        if done >= WARM && (done - WARM).is_multiple_of((cycles / 10).max(1)) {
            println!("{:>5} cycles: {:?}", done - WARM, held(binary.pid()));
        }
    }
    let (before, after) = (before.expect("warm"), held(binary.pid()));
    assert!(
        after.descriptors <= before.descriptors + 2,
        "{before:?} -> {after:?}"
    );
    assert!(
        after.threads <= before.threads + 1,
        "{before:?} -> {after:?}"
    );
    // The allocator's own noise, and 10 KB a cycle; the SDK's known leak is nine times that.
    let allowed = before.resident_kb + 2048 + 10 * cycles;
    assert!(after.resident_kb <= allowed, "{before:?} -> {after:?}");

    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert!(status.success(), "{log}");
    stage.all_acknowledged(WARM + cycles).await;
    stage.end().await;
}

/// The engine's own runtime, which is shown to nobody: a callback runs on one of its threads.
async fn engine() -> Handle {
    let connection = PeerConnectionFactory::default()
        .create_peer_connection(RtcConfiguration::default())
        .expect("a peer connection");
    let handle: Arc<OnceLock<Handle>> = Arc::default();
    let found = handle.clone();
    connection.on_negotiation_needed(Some(Box::new(move |_| {
        found.get_or_init(Handle::current);
    })));
    let channel = connection.create_data_channel("any", DataChannelInit::default());
    channel.expect("a data channel");
    let begun = Instant::now();
    let engine = loop {
        if let Some(handle) = handle.get() {
            break handle.clone();
        }
        assert!(begun.elapsed() < LIMIT, "no callback");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let driver = engine.metrics().num_alive_tasks();
    assert!(driver > 0, "the connection's own task is not seen");
    connection.close();
    engine
}

/// The tasks of this process: daemon, speakers and servers here, peer connections on the engine's
/// runtime.
#[tokio::test(flavor = "multi_thread")]
async fn rooms_that_come_and_go_leave_no_task_behind() {
    let cycles = cycles();
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let runtimes = [Handle::current(), engine().await];
    let tasks = || runtimes.each_ref().map(|r| r.metrics().num_alive_tasks());
    let mut before = None;
    for n in 0..WARM + cycles {
        cycle(&stage, n).await;
        let done = n + 1;
        if done < WARM || !(done - WARM).is_multiple_of((cycles / 10).max(1)) {
            continue;
        }
        let most = *before.get_or_insert_with(tasks);
        // The last of a cycle may still be ending, at either side.
        let begun = Instant::now();
        while tasks().iter().zip(most).any(|(now, most)| *now > most) {
            let now = tasks();
            assert!(begun.elapsed() < LIMIT, "tasks: {most:?} -> {now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("{:>5} cycles: tasks {:?}", done - WARM, tasks());
    }
    stop(&daemon).await;
    stage.all_acknowledged(WARM + cycles).await;
    drop(daemon);
    stage.end().await;
}
