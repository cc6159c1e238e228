//! The real binary, blocked. Its runtime by a debugger, which stops the worker threads where they
//! are, as code that never returns would, and no others. Its output by a pipe that nobody reads.

use std::{
    fs,
    io::Write,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    sys::{
        ptrace,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rehearsal::stt;
use roomwarden::cli::{EXIT_OK, EXIT_STUCK};

use crate::{
    service::Manager,
    stage::{Binary, LIMIT, Stage, send},
};

/// As tokio names its workers.
const WORKER: &str = "tokio-rt-worker";

/// Worker threads that are stopped, until this is dropped.
struct Blocked {
    _thaw: Sender<()>,
    debugger: Option<JoinHandle<()>>,
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // In this order: the end of the channel is what the thread waits for.
        drop(std::mem::replace(&mut self._thaw, mpsc::channel().0));
        if let Some(debugger) = self.debugger.take() {
            let _ = debugger.join();
        }
    }
}

/// Stops the workers of this process; `None` where debugging is not allowed.
fn block(pid: u32) -> Option<Blocked> {
    let (thaw, thawed) = mpsc::channel::<()>();
    let (ready, readied) = mpsc::channel();
    // A thread of its own, since what is debugged belongs to the thread that began it.
    let debugger = std::thread::spawn(move || {
        let mut workers = workers(pid);
        let stopped = workers.iter().try_for_each(|worker| {
            ptrace::seize(*worker, ptrace::Options::empty())?;
            ptrace::interrupt(*worker)?;
            waitpid(*worker, Some(WaitPidFlag::__WALL)).map(drop)
        });
        let _ = ready.send(stopped.map(|()| workers.len()));
        // A thread that is debugged stays as a zombie, and its process with it, until it is awaited
        // here.
        while let Err(RecvTimeoutError::Timeout) = thawed.recv_timeout(Duration::from_millis(5)) {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            workers.retain(|worker| {
                matches!(waitpid(*worker, Some(flags)), Ok(WaitStatus::StillAlive))
            });
        }
        for worker in workers {
            let _ = ptrace::detach(worker, None);
        }
    });
    let blocked = Blocked {
        _thaw: thaw,
        debugger: Some(debugger),
    };
    match readied.recv().expect("an answer") {
        Ok(workers) => {
            assert!(workers > 0, "no thread is named {WORKER}");
            Some(blocked)
        }
        Err(Errno::EPERM) => {
            println!("skipped: this system does not allow to debug a child");
            None
        }
        Err(error) => panic!("cannot stop the workers: {error}"),
    }
}

fn workers(pid: u32) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let worker = |thread: std::io::Result<fs::DirEntry>| {
        let thread = thread.ok()?;
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let id = thread.file_name().to_str()?.parse().ok()?;
        (name.trim() == WORKER).then_some(Pid::from_raw(id))
    };
    threads.filter_map(worker).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_runtime_is_named_with_what_is_open_and_so_is_its_return() {
    let stage = Stage::new().await;
    let manager = Manager::new(&stage);
    let mut binary = manager.run(&stage, Duration::from_millis(100), &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let Some(blocked) = block(binary.pid()) else {
        return;
    };
    manager.told();
    binary.logged("the runtime is blocked").await;
    binary.logged("open meanwhile: #1 r/alice/").await;
    assert_eq!(manager.told(), [""; 0], "no sign of life for systemd");
    drop(blocked);
    binary.logged("the runtime works again").await;
    manager.tells("WATCHDOG=1").await;
    let before = stage.stt.witness().streams[0].audio_seconds;
    stage
        .witnessed("audio again", |w| w.streams[0].audio_seconds > before + 0.5)
        .await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert_eq!(log.matches("the runtime is blocked").count(), 1, "{log}");
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}

/// Blocks the runtime, gives signals, and expects the watchdog to end the process, no sooner than
/// `least` after the first of them and long before a limit that does not hold; what it said.
async fn ended(deadline_ms: u64, hurry_ms: u64, signals: usize, least: Duration) -> Option<String> {
    let stage = Stage::new().await;
    let (deadline, hurry) = (deadline_ms.to_string(), hurry_ms.to_string());
    let variables = [
        ("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", deadline.as_str()),
        ("ROOMWARDEN__SHUTDOWN__HURRY_MS", hurry.as_str()),
    ];
    let mut binary = Binary::run(&stage, &variables);
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    let id = stage.stt.witness().streams[0].request_id.clone();
    let _blocked = block(binary.pid())?;
    binary.logged("the runtime is blocked").await;
    let begun = Instant::now();
    for n in 1..=signals {
        binary.signal("TERM");
        if n < signals {
            // Signals that come faster than they are taken may merge into one.
            binary.logged_times("a signal came", n).await;
        }
    }
    let (status, log) = binary.exit().await;
    let took = begun.elapsed();
    println!("ended {took:?} after the first of {signals} signals");
    assert_eq!(status.code(), Some(EXIT_STUCK.into()), "{log}");
    assert!(took >= least, "after {took:?}: {log}");
    assert!(took < Duration::from_secs(45), "after {took:?}: {log}");
    for words in [
        "ended by the watchdog",
        "left open: ",
        "r/alice/",
        "r/bob/",
        &id,
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let witness = stage.open(0).await;
    for stream in witness.streams {
        assert_eq!(stream.end, Some(stt::End::Abrupt), "{stream:#?}");
    }
    // The journal tells the next start.
    let mut binary = Binary::run(&stage, &[]);
    binary.logged("orphaned=2").await;
    binary.signal("TERM");
    binary.exit().await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
    Some(log)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_runtime_is_blocked_ends_by_the_deadline() {
    let least = Duration::from_millis(1000);
    let Some(log) = ended(1000, 1000, 1, least).await else {
        return;
    };
    assert!(log.contains("the runtime is blocked, "), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_and_a_third_signal_count_for_a_blocked_runtime_as_well() {
    let least = Duration::ZERO;
    ended(60_000, 1000, 2, least).await;
    ended(60_000, 60_000, 3, least).await;
}

/// `roomwarden run 2>&1 | less`, left alone: the pipe is full from the first line on, and what
/// nobody reads must hold up nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_nobody_reads_does_not_keep_it_from_closing() {
    let stage = Stage::new().await;
    let (_unread, mut full) = std::io::pipe().expect("a pipe");
    let room = fcntl(&full, FcntlArg::F_GETPIPE_SZ).expect("its size");
    let room = usize::try_from(room).expect("a size");
    full.write_all(&vec![b'\n'; room]).expect("what fits");
    let mut command = Binary::command(&stage, &[("RUST_LOG", "trace")]);
    command
        .stdout(full.try_clone().expect("the same"))
        .stderr(full);
    let mut child = command
        .kill_on_drop(true)
        .spawn()
        .expect("roomwarden starts");
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    // More lines than wait for the pipe at a time.
    stage
        .witnessed("audio", |w| w.streams.iter().any(|s| s.audio_seconds > 3.0))
        .await;
    send("TERM", child.id().expect("running"));
    let status = tokio::time::timeout(LIMIT, child.wait())
        .await
        .expect("it exits");
    assert_eq!(status.expect("its status").code(), Some(0));
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}
