//! `roomwarden check` on the real binary: what it finds, how it says so, and that it leaves nothing
//! behind.

use std::process::Stdio;

use rehearsal::{room, stt};
use roomwarden::cli::{EXIT_CHECK, EXIT_OK, EXIT_USAGE};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    process::{Child, Command},
};

use crate::stage::{LIMIT, Stage, send};

/// What `check --json` found.
struct Found {
    code: Option<i32>,
    report: Value,
    text: String,
}

impl Found {
    /// Runs it in the environment of the stage and these variables.
    async fn with(stage: &Stage, more: &[(&str, &str)]) -> Self {
        let child = Self::start(stage, more);
        Self::by(child).await
    }

    fn start(stage: &Stage, more: &[(&str, &str)]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roomwarden"));
        command
            .args(["check", "--json"])
            .env_clear()
            .envs(stage.environment())
            .env("ROOMWARDEN__STATE__DIR", std::env::temp_dir())
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command.spawn().expect("it starts")
    }

    async fn by(child: Child) -> Self {
        let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
        let output = output.expect("it ends").expect("its output");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let report = serde_json::from_str(&text).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{error} in {text:?}, and {said}")
        });
        Self {
            code: output.status.code(),
            report,
            text,
        }
    }

    /// What was found of this name, and what to do about it.
    fn of(&self, name: &str) -> (&str, String) {
        let checks = self.report["checks"].as_array().expect("checks");
        let found = checks.iter().find(|found| found["name"] == name);
        let found = found.unwrap_or_else(|| panic!("nothing of {name}: {}", self.text));
        let text = |field: &str| found[field].as_str().unwrap_or_default();
        let status = text("status");
        (status, format!("{} -> {}", text("said"), text("fix")))
    }

    /// This has failed, with these words, and the check with it.
    fn failed(&self, name: &str, words: &[&str]) {
        let (status, said) = self.of(name);
        assert_eq!(
            (status, self.code),
            ("failed", Some(EXIT_CHECK.into())),
            "{said}"
        );
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert_eq!(self.report["exit_code"], EXIT_CHECK);
    }

    fn ok(&self, name: &str) {
        let (status, said) = self.of(name);
        assert_eq!(status, "ok", "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_well_and_the_stream_that_was_tried_is_acknowledged() {
    let stage = Stage::new().await;
    let file = std::env::temp_dir().join(format!("roomwarden-{}.jsonl", fastrand::u64(..)));
    let state = std::env::temp_dir().join(format!("roomwarden-{}", fastrand::u64(..)));
    let found = Found::with(
        &stage,
        &[
            (
                "ROOMWARDEN__TRANSCRIPTS__FILE",
                file.to_str().expect("UTF-8"),
            ),
            ("ROOMWARDEN__STATE__DIR", state.to_str().expect("UTF-8")),
            ("ROOMWARDEN__STT__PARAMETERS__ENDPOINTING", "300"),
        ],
    )
    .await;
    assert_eq!(found.code, Some(EXIT_OK.into()), "{}", found.text);
    for name in [
        "configuration",
        "LiveKit",
        "joining",
        "STT",
        "receipt",
        "state",
        "transcripts",
    ] {
        found.ok(name);
    }
    assert!(
        !file.exists() && !state.exists(),
        "it leaves nothing behind"
    );
    stage.all_acknowledged(1).await;
    let stream = &stage.stt.witness().streams[0];
    assert_eq!((stream.audio_bytes, stream.texts.close_stream), (0, 1));
    assert_eq!(found.report["receipt"]["outcome"]["kind"], "acknowledged");
    assert_eq!(found.report["receipt"]["request_id"], stream.request_id);
    let rooms = stage.rooms.witness();
    assert_eq!(rooms.rooms.len(), 0, "it makes no room: {rooms:?}");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_told_apart() {
    let stage = Stage::new().await;
    let found = Found::with(&stage, &[("LIVEKIT_API_KEY", "unknown-key")]).await;
    found.failed(
        "LiveKit",
        &["refuses", "check livekit.api_key (LIVEKIT_API_KEY)"],
    );
    found.ok("STT");

    let wrong = "not-the-secret-of-this-server-at-all";
    let found = Found::with(&stage, &[("LIVEKIT_API_SECRET", wrong)]).await;
    found.failed(
        "LiveKit",
        &["refuses", "check livekit.api_secret (LIVEKIT_API_SECRET)"],
    );
    assert!(!found.text.contains(wrong), "{}", found.text);

    let faults = room::Faults {
        api_refused: true,
        ..Default::default()
    };
    stage.rooms.set_faults(faults).await;
    let found = Found::with(&stage, &[("DEEPGRAM_API_KEY", "unknown-key")]).await;
    found.failed("LiveKit", &["permissions denied", "roomList"]);
    found.failed(
        "STT",
        &[
            "401",
            "INVALID_AUTH",
            "check stt.api_key (DEEPGRAM_API_KEY)",
        ],
    );
    assert!(!found.text.contains("unknown-key"), "{}", found.text);
    stage.all_acknowledged(2).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reached_is_told_apart() {
    let stage = Stage::new().await;
    // Nobody listens on a port that was just given back.
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let nobody = format!("ws://{}", closed.local_addr().expect("its address"));
    drop(closed);
    let both = [
        ("LIVEKIT_URL", nobody.as_str()),
        ("ROOMWARDEN__STT__URL", &nobody),
    ];
    let found = Found::with(&stage, &both).await;
    found.failed("LiveKit", &["nothing listens", "LIVEKIT_URL"]);
    found.failed("STT", &["refused", "stt.url"]);

    // No label of a name is this long, so that no name server needs to be asked.
    let nowhere = format!("ws://{}.invalid", "x".repeat(64));
    let both = [
        ("LIVEKIT_URL", nowhere.as_str()),
        ("ROOMWARDEN__STT__URL", &nowhere),
    ];
    let found = Found::with(&stage, &both).await;
    found.failed("LiveKit", &["DNS", "LIVEKIT_URL"]);
    found.failed("STT", &["cannot be resolved", "DNS"]);

    let plain = format!("wss://{}", stage.stt.address());
    let other = format!("ws://{}", stage.stt.address());
    let found = Found::with(&stage, &[("LIVEKIT_URL", plain.as_str())]).await;
    found.failed("LiveKit", &["TLS", "certificate"]);
    let found = Found::with(&stage, &[("LIVEKIT_URL", other.as_str())]).await;
    found.failed("LiveKit", &["is not a LiveKit server", "404"]);

    let found = Found::with(&stage, &[("ROOMWARDEN__STT__URL", plain.as_str())]).await;
    found.failed("STT", &["no secure connection", "certificate"]);

    // Connections are taken by the kernel, and nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent_url = format!("ws://{}", silent.local_addr().expect("its address"));
    let both = [
        ("LIVEKIT_URL", silent_url.as_str()),
        ("ROOMWARDEN__STT__URL", &silent_url),
        ("ROOMWARDEN__STT__CONNECT_TIMEOUT_MS", "300"),
    ];
    let found = Found::with(&stage, &both).await;
    found.failed("LiveKit", &["does not answer", "LIVEKIT_URL"]);
    found.failed("STT", &["not acknowledged", "timed out connecting"]);
    // By the checks in which only LiveKit's URL was wrong.
    stage.all_acknowledged(2).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_the_provider_come_with_what_to_do() {
    let stage = Stage::new().await;
    for (status, words) in [
        (400, ["Bad Request", "[stt.parameters]"]),
        (402, ["ASR_PAYMENT_REQUIRED", "credit"]),
        (403, ["requested model", "another stt.model"]),
        (429, ["TOO_MANY_REQUESTS", "limit"]),
        (503, ["SERVICE_UNAVAILABLE", "later"]),
    ] {
        stage.stt.set_faults(stt::Faults {
            reject_with: Some(stt::Reject::status(status)),
            ..Default::default()
        });
        let found = Found::with(&stage, &[]).await;
        found.ok("LiveKit");
        found.failed("STT", &words);
        assert_eq!(found.report["receipt"]["outcome"]["kind"], "never_opened");
    }
    assert_eq!(stage.stt.witness().opened, 0);

    stage.stt.set_faults(stt::Faults {
        never_answer_close: true,
        ..Default::default()
    });
    let found = Found::with(&stage, &[("ROOMWARDEN__STT__CLOSE_GRACE_MS", "300")]).await;
    found.failed("STT", &["not acknowledged", "CloseStream"]);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_here_is_found_too() {
    let stage = Stage::new().await;
    let found = Found::with(
        &stage,
        &[
            ("ROOMWARDEN__STATE__DIR", "/proc/no/such"),
            (
                "ROOMWARDEN__TRANSCRIPTS__FILE",
                "/no/such/directory/t.jsonl",
            ),
        ],
    )
    .await;
    found.failed("state", &["/proc/no/such", "state.dir"]);
    found.failed(
        "transcripts",
        &["/no/such/directory/t.jsonl", "transcripts.file"],
    );
    stage.all_acknowledged(1).await;

    // Where nobody has asked for a directory, none is needed.
    let usual = [
        ("ROOMWARDEN__STATE__DIR", ""),
        ("STATE_DIRECTORY", "/proc/no/such"),
    ];
    let found = Found::with(&stage, &usual).await;
    assert_eq!(found.code, Some(EXIT_OK.into()), "{}", found.text);
    let (status, said) = found.of("state");
    assert!(
        status == "warning" && said.contains("no journal is kept"),
        "{said}"
    );

    let found = Found::with(&stage, &[("ROOMWARDEN__STT__PAGE", "40")]).await;
    assert_eq!(found.code, Some(EXIT_USAGE.into()), "{}", found.text);
    let (status, said) = found.of("configuration");
    assert!(status == "failed" && said.contains("ROOMWARDEN__STT__PAGE: names no key"));
    stage.all_acknowledged(2).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_it_in_order() {
    let stage = Stage::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent_url = format!("ws://{}", silent.local_addr().expect("its address"));
    let hold = stt::Faults {
        close_delay: Some(LIMIT),
        ..Default::default()
    };
    stage.stt.set_faults(hold);
    let child = Found::start(&stage, &[("LIVEKIT_URL", &silent_url)]);
    stage
        .witnessed("the stream waits for its answer", |w| {
            w.streams.iter().any(|stream| stream.close_requested)
        })
        .await;
    send("INT", child.id().expect("running"));
    stage.stt.set_faults(stt::Faults::default());
    let found = Found::by(child).await;
    found.failed("LiveKit", &["interrupted"]);
    found.ok("STT");
    stage.all_acknowledged(1).await;
    stage.end().await;
}
