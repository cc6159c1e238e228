//! Usage reports of the real binary, by a receiver that refuses, fails, hangs and goes away.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, http::StatusCode, routing::post};
use base64::{Engine, engine::general_purpose::STANDARD};
use livekit_api::access_token::TokenVerifier;
use roomwarden::cli::EXIT_OK;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::stage::{Binary, LIMIT, Stage};

const SECRET: &str = "a-secret-of-the-reports-alone-0123456789";

/// A request that came.
#[derive(Debug, Clone)]
struct Came {
    token: String,
    key: String,
    report: Value,
    answered: u16,
}

struct Shared {
    secret: &'static str,
    api_key: String,
    came: watch::Sender<Vec<Came>>,
    /// How the next requests are answered; then with 200. 0 is never.
    answers: Mutex<VecDeque<u16>>,
}

struct Receiver {
    url: String,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Receiver {
    async fn start(stage: &Stage, answers: &[u16]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/usage", listener.local_addr().expect("address"));
        let shared = Arc::new(Shared {
            secret: SECRET,
            api_key: stage.rooms.api_key().to_owned(),
            came: watch::Sender::default(),
            answers: Mutex::new(answers.iter().copied().collect()),
        });
        let stop = CancellationToken::new();
        let router = Router::new()
            .route("/usage", post(take))
            .with_state(shared.clone());
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(async move {
            let serving = axum::serve(listener, router);
            tokio::select! {
                served = async { serving.await } => served.expect("it serves"),
                () = stopped => {}
            }
        });
        Self { url, shared, stop }
    }

    fn variables(&self) -> [(&str, &str); 4] {
        [
            ("ROOMWARDEN__USAGE_REPORTS__EVENTS", "stream_settled"),
            ("ROOMWARDEN__USAGE_REPORTS__URL", &self.url),
            ("ROOMWARDEN__USAGE_REPORTS__SECRET", SECRET),
            ("ROOMWARDEN__USAGE_REPORTS__TIMEOUT_MS", "1000"),
        ]
    }

    fn came(&self) -> Vec<Came> {
        self.shared.came.borrow().clone()
    }

    /// The ids that were answered with 200, in order.
    fn taken(&self) -> Vec<String> {
        let came = self.came().into_iter();
        let taken = came.filter(|came| came.answered == 200);
        taken.map(|came| came.key).collect()
    }

    async fn waits(&self, what: &str, condition: impl Fn(&[Came]) -> bool) {
        let mut came = self.shared.came.subscribe();
        let there = came.wait_for(|came| condition(came));
        let waited = tokio::time::timeout(LIMIT, there).await;
        assert!(matches!(waited, Ok(Ok(_))), "{what}: {:#?}", self.came());
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn take(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name: &str| {
        let value = headers.get(name).expect(name);
        value.to_str().expect("text").to_owned()
    };
    let token = header("authorization");
    // As receivers of LiveKit's webhooks check them.
    let verifier = TokenVerifier::with_api_key(&shared.api_key, shared.secret);
    let claims = verifier.verify(&token).expect("signed, and not too old");
    assert_eq!(claims.sha256, STANDARD.encode(Sha256::digest(&body)));
    let report: Value = serde_json::from_slice(&body).expect("JSON");
    let key = header("idempotency-key");
    assert_eq!(report["id"], key.as_str());
    let answered = shared
        .answers
        .lock()
        .expect("no panic")
        .pop_front()
        .unwrap_or(200);
    let came = Came {
        token,
        key,
        report,
        answered,
    };
    shared.came.send_modify(|all| all.push(came));
    if answered == 0 {
        std::future::pending::<()>().await;
    }
    StatusCode::from_u16(answered).expect("a status")
}

async fn talk(stage: &Stage, who: &str) {
    let speaker = stage.speaker("r", who).await;
    stage.streaming(1).await;
    speaker.leave().await;
    stage.witnessed("closed", |w| w.open_now == 0).await;
}

async fn ended(binary: Binary) -> String {
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    log
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_sent_until_it_is_taken_and_the_next_one_waits_for_it() {
    let stage = Stage::new().await;
    let receiver = Receiver::start(&stage, &[401, 200, 500, 401, 401, 0]).await;
    let mut binary = Binary::run(&stage, &receiver.variables());
    binary.logged("journal opened").await;
    talk(&stage, "alice").await;
    talk(&stage, "bob").await;
    let taken = |came: &[Came]| came.iter().filter(|came| came.answered == 200).count() == 2;
    receiver.waits("both", taken).await;
    let log = ended(binary).await;
    let came = receiver.came();
    let answers: Vec<_> = came.iter().map(|came| came.answered).collect();
    assert_eq!(answers, [401, 200, 500, 401, 401, 0, 200]);
    let who = |came: &Came| {
        came.report["stream"]["participant"]
            .as_str()
            .map(str::to_owned)
    };
    let people: Vec<_> = came.iter().filter_map(who).collect();
    assert_eq!(
        people,
        ["alice", "alice", "bob", "bob", "bob", "bob", "bob"]
    );
    assert!(
        came[2..].iter().all(|one| one.report == came[2].report),
        "the same each time"
    );
    let witness = stage.stt.witness();
    let ours = came[0].report["stream"]["request_id"].as_str();
    assert_eq!(ours, Some(witness.streams[0].request_id.as_str()));
    // Said once for the whole series, and that it is over. With another token alice's was taken.
    assert!(log.contains("status 500"), "{log}");
    assert_eq!(
        log.matches("usage reports can't be delivered").count(),
        1,
        "{log}"
    );
    assert_eq!(
        log.matches("usage reports are delivered again").count(),
        1,
        "{log}"
    );
    let on_disk = std::fs::read_dir(stage.state.path())
        .expect("readable")
        .map(|file| {
            let bytes = std::fs::read(file.expect("entry").path()).expect("readable");
            String::from_utf8_lossy(&bytes).into_owned()
        });
    let said = log + &on_disk.collect::<String>();
    for secret in [
        SECRET,
        stage.rooms.api_secret(),
        &came[0].token,
        &came[6].token,
    ] {
        assert!(!said.contains(secret), "a secret is shown or kept");
    }
    stage.end().await;
}

/// So that an application can mark as finished what is.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_finished_is_told_with_all_its_receipts() {
    let stage = Stage::new().await;
    let receiver = Receiver::start(&stage, &[]).await;
    let mut variables = receiver.variables();
    variables[0].1 = "stream_settled,session_finished,room_finished";
    let mut binary = Binary::run(&stage, &variables);
    binary.logged("journal opened").await;
    talk(&stage, "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    stage.api().delete_room("r").await.expect("deleted");
    let finished = |came: &[Came]| {
        came.iter()
            .any(|one| one.report["event"] == "room_finished")
    };
    receiver.waits("the room", finished).await;
    ended(binary).await;
    let came = receiver.came();
    let events: Vec<_> = came.iter().map(|one| &one.report["event"]).collect();
    let expected = [
        "stream_settled",
        "session_finished",
        "stream_settled",
        "session_finished",
        "room_finished",
    ];
    assert_eq!(events, expected);
    let witness = stage.stt.witness();
    let ids: Vec<_> = witness
        .streams
        .iter()
        .map(|s| s.request_id.as_str())
        .collect();
    let told = |what: &Value| {
        let receipts = what["receipts"].as_array().expect("a list").iter();
        let mut told: Vec<_> = receipts
            .map(|receipt| receipt["request_id"].as_str().expect("an id").to_owned())
            .collect();
        told.reverse();
        told
    };
    let (alice, room) = (&came[1].report["session"], &came[4].report["room"]);
    assert_eq!(alice["participant"], "alice");
    assert_eq!(told(alice), ids[..1]);
    assert_eq!(told(room), ids);
    assert_eq!(room["streams"], serde_json::json!({"acknowledged": 2}));
    assert_eq!(
        (&room["room"], &room["reason"]),
        (&"r".into(), &"closed".into())
    );
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_takes_survives_a_sigkill_and_a_shutdown_and_keeps_its_order() {
    let stage = Stage::new().await;
    // Nobody listens there.
    let nobody = [
        ("ROOMWARDEN__USAGE_REPORTS__EVENTS", "stream_settled"),
        ("ROOMWARDEN__USAGE_REPORTS__URL", "http://127.0.0.1:1/"),
        ("ROOMWARDEN__USAGE_REPORTS__SECRET", SECRET),
    ];
    let mut binary = Binary::run(&stage, &nobody);
    binary.logged("journal opened").await;
    talk(&stage, "alice").await;
    binary.logged("usage reports can't be delivered").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    binary.signal("KILL");
    binary.exit().await;
    bob.leave().await;
    stage.witnessed("cut", |w| w.open_now == 0).await;

    // One that hangs, so that the shutdown has to leave it.
    let hanging = Receiver::start(&stage, &[0; 100]).await;
    let mut binary = Binary::run(&stage, &hanging.variables());
    binary.logged("journal opened").await;
    talk(&stage, "carol").await;
    hanging.waits("a report", |came| !came.is_empty()).await;
    let begun = std::time::Instant::now();
    ended(binary).await;
    // The default deadline is 8 s, with 2 s beyond.
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    drop(hanging);

    let receiver = Receiver::start(&stage, &[]).await;
    let mut binary = Binary::run(&stage, &receiver.variables());
    binary.logged("journal opened").await;
    receiver.waits("all three", |came| came.len() >= 3).await;
    ended(binary).await;
    let came = receiver.came();
    let told = |came: &Came| {
        let stream = &came.report["stream"];
        let text = |name: &str| stream[name].as_str().unwrap_or_default().to_owned();
        (text("participant"), text("outcome"))
    };
    let told: Vec<_> = came.iter().map(told).collect();
    let expected = [
        ("alice", "acknowledged"),
        ("bob", "orphaned"),
        ("carol", "acknowledged"),
    ];
    let expected = expected.map(|(who, how)| (who.to_owned(), how.to_owned()));
    assert_eq!(told, expected);

    // Nothing is sent again.
    let mut binary = Binary::run(&stage, &receiver.variables());
    binary.logged("journal opened").await;
    talk(&stage, "dave").await;
    receiver.waits("dave", |came| came.len() >= 4).await;
    ended(binary).await;
    let mut ids = receiver.taken();
    assert_eq!(ids.len(), 4, "{ids:?}");
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4, "each once");
    stage.end().await;
}
