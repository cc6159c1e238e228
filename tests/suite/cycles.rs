//! Many rooms come and go, most of them left while somebody still speaks in them; what is held must
//! not grow. ROOMWARDEN_CYCLES sets how many (by default a short run of what is meant for 1000).

use std::{
    fs,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use livekit::webrtc::{data_channel::DataChannelInit, prelude::*};
use roomwarden::{
    daemon::Daemon,
    requests::{Request, Scope},
    transcripts::Sinks,
};
use tokio::runtime::Handle;

use crate::{
    control,
    stage::{LIMIT, Stage, stop},
};

/// The first cycles fill what is kept for later ones.
const WARM: usize = 25;
/// So much memory may be added by each of the others. It is 8 KB at most (the allocator's), and 18 KB
/// or more without half of the way round the SDK's leak (`src/room/departure.rs`).
const KB_A_CYCLE: usize = 12;
/// Has the allocator give back what is freed, so that memory is what is in use.
const GIVE_BACK: [(&str, &str); 4] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "16384"),
    ("MALLOC_TRIM_THRESHOLD_", "4096"),
    ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"),
];

fn cycles(short: usize) -> usize {
    let cycles = std::env::var("ROOMWARDEN_CYCLES").ok();
    cycles.and_then(|n| n.parse().ok()).unwrap_or(short)
}

/// A room from its first participant to its end. `close` asks the daemon to close one.
async fn cycle(stage: &Stage, n: usize, close: impl AsyncFn(&str)) {
    let room = format!("room-{n}");
    let speaker = stage.speaker(&room, "alice").await;
    stage
        .witnessed("a stream with audio", |w| {
            w.open_now == 1 && w.streams.last().is_some_and(|s| s.audio_seconds > 0.1)
        })
        .await;
    let api = stage.api();
    match n % 5 {
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
        // the daemon is put out while the participant speaks on,
        3 => {
            let removed = api.remove_participant(&room, "roomwarden").await;
            removed.expect("removal");
            stage.open(0).await;
            stage.without("roomwarden").await;
            speaker.leave().await;
            api.delete_room(&room).await.expect("deletion");
        }
        // the daemon leaves by itself while the participant speaks on.
        _ => {
            close(&room).await;
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
    /// Without what is mapped from files.
    memory_kb: usize,
}

impl Held {
    fn within(self, most: Self) -> bool {
        self.descriptors <= most.descriptors
            && self.threads <= most.threads
            && self.memory_kb <= most.memory_kb
    }
}

fn held(pid: u32) -> Held {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect(file);
        let line = text
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
        threads: field("status", "Threads:"),
        // The status has about the same, but may be wrong by some hundred KB.
        memory_kb: field("smaps_rollup", "Anonymous:"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rooms_that_come_and_go_leave_nothing_behind() {
    let cycles = cycles(30);
    let stage = Stage::new().await;
    let quiet = ("ROOMWARDEN__LOG__FILTER", "error,roomwarden::control=info");
    let environment: Vec<_> = GIVE_BACK.into_iter().chain([quiet]).collect();
    let daemon = control::Daemon::start(&stage, &environment).await;
    let pid = daemon.binary.pid();
    let close = async |room: &str| {
        let path = format!("/api/v1/rooms/{room}/close");
        daemon.post(&path).await.ok();
    };
    let mut before = None;
    for n in 0..WARM + cycles {
        cycle(&stage, n, close).await;
        let done = n + 1;
        if done == WARM {
            before = Some(held(pid));
        }
        if done >= WARM && (done - WARM).is_multiple_of((cycles / 10).max(1)) {
            println!("{:>5} cycles: {:?}", done - WARM, held(pid));
        }
    }
    let before = before.expect("warm");
    let most = Held {
        descriptors: before.descriptors + 2,
        threads: before.threads + 1,
        memory_kb: before.memory_kb + KB_A_CYCLE * cycles,
    };
    // The last of a cycle may still be ending.
    let begun = Instant::now();
    while !held(pid).within(most) {
        let after = held(pid);
        assert!(begun.elapsed() < LIMIT, "{before:?} -> {after:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    daemon.binary.signal("TERM");
    let (status, log) = daemon.binary.exit().await;
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
    let cycles = cycles(10);
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let close = async |room: &str| {
        let scope = Scope::Room(room.into());
        let asked = daemon.ask(|answer| Request::Close(scope, answer)).await;
        asked.expect("there is such a room");
    };
    let runtimes = [Handle::current(), engine().await];
    let tasks = || runtimes.each_ref().map(|r| r.metrics().num_alive_tasks());
    let mut before = None;
    for n in 0..WARM + cycles {
        cycle(&stage, n, close).await;
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
