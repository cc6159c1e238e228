//! What systemd is told by the real binary.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use rehearsal::stt;
use roomwarden::cli::{EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE};
use tokio::net::UnixDatagram;

use crate::stage::{Binary, LIMIT, Stage};

/// A service manager's end.
pub struct Manager {
    socket: UnixDatagram,
    name: String,
}

impl Manager {
    pub fn new(stage: &Stage) -> Self {
        let path: PathBuf = stage.state.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("socket");
        Self::with(socket, path.display().to_string())
    }

    /// In the abstract namespace, where systemd's own was for long.
    #[cfg(target_os = "linux")]
    fn with_abstract_name() -> Self {
        use std::os::{linux::net::SocketAddrExt, unix::net};

        let name = format!("roomwarden-test-{}", fastrand::u64(..));
        let address = net::SocketAddr::from_abstract_name(&name).expect("address");
        let socket = net::UnixDatagram::bind_addr(&address).expect("socket");
        socket.set_nonblocking(true).expect("non-blocking");
        let socket = UnixDatagram::from_std(socket).expect("socket");
        Self::with(socket, format!("@{name}"))
    }

    fn with(socket: UnixDatagram, name: String) -> Self {
        Self { socket, name }
    }

    /// Runs the service, which is to give a sign of life twice in this time.
    pub fn run(&self, stage: &Stage, watchdog: Duration, more: &[(&str, &str)]) -> Binary {
        let mut command = Binary::command(stage, more);
        command.env("NOTIFY_SOCKET", &self.name);
        command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        Binary::start(command)
    }

    async fn next(&self) -> String {
        let mut message = [0; 4096];
        let received = tokio::time::timeout(LIMIT, self.socket.recv(&mut message)).await;
        let length = received.expect("a message").expect("received");
        String::from_utf8(message[..length].to_vec()).expect("text")
    }

    /// Waits for a message that begins so.
    pub async fn tells(&self, words: &str) -> String {
        let told = async {
            loop {
                let message = self.next().await;
                if message.starts_with(words) {
                    return message;
                }
            }
        };
        // Signs of life may go on for ever.
        let told = tokio::time::timeout(LIMIT, told).await;
        told.unwrap_or_else(|_| panic!("never told: {words}"))
    }

    /// What came since it was last asked.
    pub fn told(&self) -> Vec<String> {
        let mut message = [0; 4096];
        std::iter::from_fn(|| {
            let length = self.socket.try_recv(&mut message).ok()?;
            Some(String::from_utf8_lossy(&message[..length]).into_owned())
        })
        .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_of_the_start_the_life_and_the_end_in_this_order() {
    let stage = Stage::new().await;
    let manager = Manager::new(&stage);
    let binary = manager.run(&stage, Duration::from_millis(100), &[]);
    let mut messages = Vec::new();
    // Signs of life may come while it starts.
    while !messages
        .iter()
        .any(|m: &String| m.starts_with("READY=1\nSTATUS="))
    {
        let message = manager.next().await;
        assert!(
            message.starts_with("READY=1\n") || message == "WATCHDOG=1",
            "{message}"
        );
        messages.push(message);
    }
    for _ in 0..3 {
        assert_eq!(manager.next().await, "WATCHDOG=1");
    }
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    binary.signal("TERM");
    let stopping = manager.tells("STOPPING=1").await;
    assert!(
        stopping.contains("STATUS=closing: shutdown (SIGTERM)"),
        "{stopping}"
    );
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    let rest = manager.told();
    assert!(
        !rest.iter().any(|message| message.starts_with("READY")),
        "{rest:?}"
    );
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}

/// Right or wrong: systemd waits for the end of it.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_of_a_reload_and_of_its_end() {
    let stage = Stage::new().await;
    let manager = Manager::new(&stage);
    let key = stage.state.path().join("key");
    std::fs::write(&key, stage.stt.api_key()).expect("a file");
    let key_file = key.display().to_string();
    let variables = [
        ("DEEPGRAM_API_KEY", ""),
        ("DEEPGRAM_API_KEY_FILE", &key_file),
    ];
    let binary = manager.run(&stage, LIMIT, &variables);
    manager.tells("READY=1").await;
    for said in ["reloaded", "not reloaded; problems in the log: 1"] {
        binary.signal("HUP");
        let reloading = manager.tells("RELOADING=1\nMONOTONIC_USEC=").await;
        let (_, usec) = reloading.rsplit_once('=').expect("a time");
        assert!(usec.parse::<u64>().expect("a number") > 0);
        let ready = format!("READY=1\nSTATUS=transcribing; {said}");
        assert_eq!(manager.tells("READY=1").await, ready);
        // The next one is wrong.
        let _ = std::fs::remove_file(&key);
    }
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.end().await;
}

/// Also by an abstract name, and with a sign of life that is asked of another process.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn systemd_gives_time_to_close_but_no_more_than_the_deadline() {
    let faults = stt::Faults {
        never_answer_close: true,
        ..Default::default()
    };
    let stage = Stage::with(stt::Config::default().faults(faults)).await;
    let manager = Manager::with_abstract_name();
    let deadline = Duration::from_secs(3);
    let variables = [
        ("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "3000"),
        ("WATCHDOG_PID", "1"),
    ];
    let binary = manager.run(&stage, Duration::from_millis(100), &variables);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    let begun = Instant::now();
    binary.signal("TERM");
    manager.tells("STOPPING=1").await;
    let mut extended = Vec::new();
    for _ in 0..3 {
        let message = manager.next().await;
        let usec = message
            .strip_prefix("EXTEND_TIMEOUT_USEC=")
            .expect(&message);
        extended.push((
            begun.elapsed(),
            Duration::from_micros(usec.parse().expect("a number")),
        ));
    }
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_UNACKNOWLEDGED.into()), "{log}");
    println!("extended at and by {extended:?}");
    let mut last = Duration::MAX;
    for (at, by) in extended {
        // What follows the deadline is 1.85 s at most.
        let most = deadline + Duration::from_millis(1850);
        assert!(by <= most && by < last, "by {by:?} at {at:?}");
        last = by;
    }
    assert!(
        !manager
            .told()
            .iter()
            .any(|message| message.contains("WATCHDOG"))
    );
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_not_told_ready_by_a_daemon_that_is_refused() {
    let stage = Stage::new().await;
    let manager = Manager::new(&stage);
    let wrong = [("LIVEKIT_API_SECRET", "not-the-secret-of-this-server-at-all")];
    let binary = manager.run(&stage, Duration::from_millis(100), &wrong);
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    let told = manager.told();
    assert!(
        told.iter().all(|message| message == "WATCHDOG=1"),
        "{told:?}"
    );
    stage.end().await;
}

/// A manager that is not there, or does not read, holds up nothing.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_that_does_not_read_holds_up_nothing() {
    let stage = Stage::new().await;
    let manager = Manager::new(&stage);
    // More signs of life than any queue of datagrams holds.
    let binary = manager.run(&stage, Duration::from_millis(2), &[]);
    let alice = stage.speaker("r", "alice").await;
    stage
        .witnessed("audio", |w| w.streams.iter().any(|s| s.audio_seconds > 3.0))
        .await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    let told = manager.told();
    assert!(
        !told.iter().any(|message| message.starts_with("STOPPING")),
        "it was full"
    );
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}
