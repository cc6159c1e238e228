//! The control API of the real binary, asked byte by byte, and the commands over it.

use std::{
    collections::{BTreeSet, HashMap},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    process::Output,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use livekit_api::{access_token::AccessToken, services::room::CreateRoomOptions};
use rehearsal::stt::{self, Reject};
use roomwarden::{
    cli::{EXIT_CHECK, EXIT_FAILURE, EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE},
    webhooks::PATH,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::stage::{Binary, LIMIT, Stage};

const LISTEN: &str = "ROOMWARDEN__CONTROL__LISTEN";
const ANY_PORT: (&str, &str) = (LISTEN, "127.0.0.1:0");
const TOKEN: &str = "the-token-for-everything";
const READ_TOKEN: &str = "the-token-for-reading";

/// A daemon with its API on a port.
pub struct Daemon {
    pub binary: Binary,
    pub address: SocketAddr,
    pub token: Option<String>,
}

pub struct Answer {
    /// 0 if there was no answer.
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        let said = || format!("{}: {}", self.status, self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", said()))
    }

    /// The body of a refusal, which has one shape; its code.
    pub fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let body = self.json();
        for part in ["code", "message", "fix"] {
            let said = body["error"][part].as_str();
            assert!(said.is_some_and(|said| !said.is_empty()), "{part}: {body}");
        }
        assert_eq!(self.headers["content-type"], "application/json");
        body["error"]["code"].as_str().expect("a code").to_owned()
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }
}

impl Daemon {
    pub async fn start(stage: &Stage, more: &[(&str, &str)]) -> Self {
        let more: Vec<_> = [ANY_PORT].iter().chain(more).copied().collect();
        let mut binary = Binary::run(stage, &more);
        binary.logged("the control API listens").await;
        let log = binary.log();
        let (_, after) = log.split_once("the control API listens").expect("logged");
        let (_, address) = after.split_once("address=").expect("an address");
        let address = address.split_whitespace().next().expect("an address");
        Self {
            binary,
            address: address.parse().expect("an address"),
            token: None,
        }
    }

    pub async fn send(&self, request: &str) -> TcpStream {
        let mut tcp = TcpStream::connect(self.address).await.expect("connected");
        tcp.write_all(request.as_bytes()).await.expect("sent");
        tcp
    }

    pub fn head(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head.push_str(&format!("Host: {}\r\n", self.address));
        }
        if let Some(token) = &self.token {
            head.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        head
    }

    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let length = body.len().to_string();
        let mut headers = headers.to_vec();
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "Content-Length") {
            headers.push(("Content-Length", &length));
        }
        let request = self.head(method, path, &headers) + body;
        answer(self.send(&request).await).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "").await
    }

    pub async fn post(&self, path: &str) -> Answer {
        self.ask("POST", path, &[], "").await
    }

    pub async fn send_json(&self, method: &str, path: &str, body: &Value) -> Answer {
        let json = [("Content-Type", "application/json")];
        self.ask(method, path, &json, &body.to_string()).await
    }

    /// Asks again and again until the answer fits.
    pub async fn until(&self, path: &str, fits: impl Fn(&Value) -> bool) -> Value {
        self.until_within(LIMIT, path, fits).await
    }

    async fn until_within(
        &self,
        limit: Duration,
        path: &str,
        fits: impl Fn(&Value) -> bool,
    ) -> Value {
        let begun = Instant::now();
        loop {
            let answer = self.get(path).await;
            // The place of a connection that is over is free a moment later.
            if answer.status != 0 && fits(&answer.json()) {
                return answer.json();
            }
            assert!(
                begun.elapsed() < limit,
                "{path} never fits: {}",
                answer.body
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn status(&self, fits: impl Fn(&Value) -> bool) -> Value {
        self.until("/api/v1/status", fits).await
    }

    pub async fn end(self, code: u8) -> String {
        self.binary.signal("TERM");
        let (status, log) = self.binary.exit().await;
        assert_eq!(status.code(), Some(code.into()), "{log}");
        log
    }
}

/// What comes to the end of the connection.
pub async fn answer(mut tcp: impl AsyncRead + Unpin) -> Answer {
    let mut bytes = Vec::new();
    let read = timeout(LIMIT, tcp.read_to_end(&mut bytes)).await;
    // A refusal of a body that is still on its way may end in a reset.
    let _ = read.expect("an answer");
    let text = String::from_utf8(bytes).expect("text");
    if text.is_empty() {
        return Answer {
            status: 0,
            headers: HashMap::new(),
            body: text,
        };
    }
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no head: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    let header = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_lowercase(), value.to_owned()))
    };
    let headers: HashMap<_, _> = lines.filter_map(header).collect();
    let body = match headers.get("transfer-encoding") {
        Some(_) => unchunked(body),
        None => body.to_owned(),
    };
    Answer {
        status: status.expect("a status").parse().expect("a number"),
        headers,
        body,
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        whole.push_str(&rest[..length]);
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}

async fn roomwarden(stage: &Stage, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"));
    let command = command.args(args).env_clear().envs(stage.environment());
    command.output().await.expect("roomwarden runs")
}

async fn says(stage: &Stage, args: &[&str], code: u8) -> String {
    let output = roomwarden(stage, args).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(code.into()),
        "{args:?}: {said} {error}"
    );
    said + &error
}

async fn room(stage: &Stage, name: &str) {
    let made = stage
        .api()
        .create_room(name, CreateRoomOptions::default())
        .await;
    made.expect("a room");
}

fn participants(rooms: &Value) -> Vec<&str> {
    let rooms = rooms.as_array().expect("rooms");
    let there = rooms
        .iter()
        .flat_map(|room| room["participants"].as_array().expect("a list"));
    there
        .map(|p| p["participant"].as_str().expect("a name"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_can_be_seen() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[]).await;
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r/2 ü", "bob").await;
    stage.streaming(2).await;

    let status = daemon.status(|s| s["tracks"]["streaming"] == 2).await;
    assert_eq!(
        (&status["state"], &status["not_ready"]),
        (&json!("running"), &json!(null))
    );
    assert_eq!(status["identity"], "roomwarden");
    assert_eq!(
        (&status["rooms"], &status["participants"]),
        (&json!(2), &json!(2))
    );
    let open = &status["open"];
    assert_eq!(
        (&open["registry"], &open["agree"]),
        (&json!(2), &json!(true)),
        "{open}"
    );
    if cfg!(target_os = "linux") {
        assert_eq!(open["kernel"], 2, "{open}");
    }
    assert_eq!(open["provider"], json!(null));
    assert_eq!(
        (&status["gate"]["held"], &status["gate"]["peak"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(daemon.get("/healthz").await.ok()["state"], "running");
    assert_eq!(
        daemon.get("/readyz").await.ok(),
        json!({"ready": true, "reason": null})
    );

    let rooms = daemon.get("/api/v1/rooms").await.ok();
    let track = &rooms[0]["participants"][0]["tracks"][0];
    assert_eq!(
        (&rooms[0]["state"], &track["state"]),
        (&json!("joined"), &json!("streaming"))
    );
    assert!(track["age_seconds"].as_f64().expect("a number") < LIMIT.as_secs_f64());
    let ours = |id: &Value| {
        stage
            .stt
            .witness()
            .stream(id.as_str().expect("an id"))
            .is_some()
    };
    assert!(ours(&track["stream"]["request_id"]), "{track}");
    let streams = daemon.get("/api/v1/streams").await.ok();
    let open: Vec<_> = streams["open"].as_array().expect("a list").iter().collect();
    assert_eq!(open.len(), 2);
    assert!(
        open.iter()
            .all(|stream| stream["state"] == "open" && ours(&stream["request_id"]))
    );
    assert_eq!(
        (&streams["waiting"], &streams["quarantined"]),
        (&json!([]), &json!(0))
    );

    alice.leave().await;
    stage.open(1).await;
    daemon
        .status(|s| s["streams"]["acknowledged"] == 1 && s["participants"] == 1)
        .await;
    let receipts = daemon.get("/api/v1/receipts?last=5").await.ok();
    assert_eq!(receipts.as_array().map(Vec::len), Some(1), "{receipts}");
    let receipt = &receipts[0];
    assert_eq!(
        (&receipt["participant"], &receipt["outcome"]),
        (&json!("alice"), &json!("acknowledged"))
    );
    assert!(ours(&receipt["request_id"]) && receipt["audio_seconds"].as_f64() > Some(0.5));
    assert_eq!(daemon.get("/api/v1/errors").await.ok(), json!([]));
    // The ledger is written by a thread of its own.
    let usage = daemon.until("/api/v1/usage?by=room,participant&since=1d", |usage| {
        usage["total"]["streams"] == 1
    });
    let usage = usage.await;
    let row = &usage["rows"][0];
    assert_eq!(
        (&row["room"], &row["participant"]),
        (&json!("r"), &json!("alice")),
        "{usage}"
    );

    let metrics = daemon.get("/metrics").await;
    assert!(metrics.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    let samples = samples(&metrics.body);
    for (name, value) in [
        ("roomwarden_ready", 1.0),
        ("roomwarden_state{state=\"running\"}", 1.0),
        ("roomwarden_state{state=\"closing\"}", 0.0),
        ("roomwarden_streams{state=\"open\"}", 1.0),
        ("roomwarden_tracks{state=\"streaming\"}", 1.0),
        (
            "roomwarden_streams_settled_total{outcome=\"acknowledged\"}",
            1.0,
        ),
        ("roomwarden_stream_failures_total{cause=\"quota\"}", 0.0),
        ("roomwarden_stream_close_seconds_bucket{le=\"+Inf\"}", 1.0),
        ("roomwarden_stream_close_seconds_count", 1.0),
        ("roomwarden_counts_disagree", 0.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name}: {}", metrics.body);
    }
    for private in ["alice", "bob", "r/2"] {
        assert!(
            !metrics.body.contains(private),
            "{private}: {}",
            metrics.body
        );
    }

    let said = says(&stage, &["status"], EXIT_OK).await;
    for words in [
        "roomwarden, running",
        "registry 1",
        "1 acknowledged",
        "tracks 1 streaming",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let said = says(&stage, &["status", "--json"], EXIT_OK).await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(said["streams"]["acknowledged"], 1);
    let api = format!("http://{}", daemon.address);
    let said = says(&stage, &["status", "--api", &api], EXIT_OK).await;
    assert!(said.contains("registry 1"), "{said}");

    let socket = stage.state.path().join("roomwarden.sock");
    let found = std::fs::metadata(&socket).expect("a socket");
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    daemon.end(EXIT_OK).await;
    assert!(!socket.exists(), "the socket is left");
    let said = says(&stage, &["status"], EXIT_CHECK).await;
    assert!(
        said.contains("is it running") && said.contains("--api"),
        "{said}"
    );
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

/// By name and label; every family has its type, and its help, before its samples, once.
fn samples(text: &str) -> HashMap<String, f64> {
    let mut samples = HashMap::new();
    let mut families = BTreeSet::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            rest.split(' ')
                .next()
                .expect("a name")
                .clone_into(&mut family);
            assert!(families.insert(family.clone()), "twice: {line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, family);
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            assert!(!name.ends_with("_total") || kind == "counter", "{line}");
        } else {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            assert!(name.starts_with(&family), "{line} in {family}");
            let value: f64 = value.parse().expect("a number");
            assert!(
                samples.insert(name.to_owned(), value).is_none(),
                "twice: {line}"
            );
        }
    }
    samples
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_closed_by_request_is_acknowledged_and_not_opened_again() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(
        &stage,
        &[("ROOMWARDEN__ROOMS__RECONCILE_INTERVAL_MS", "200")],
    )
    .await;
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let carol = stage.speaker("other", "carol").await;
    stage.streaming(3).await;
    let id_of = |streams: &Value, who: &str| {
        let open = streams["open"].as_array().expect("a list");
        let stream = open.iter().find(|stream| stream["participant"] == who);
        stream.expect("a stream")["id"].as_u64().expect("a number")
    };

    let streams = daemon.get("/api/v1/streams").await.ok();
    let id = id_of(&streams, "alice");
    let closed = daemon
        .post(&format!("/api/v1/streams/{id}/close"))
        .await
        .ok();
    assert_eq!(
        (&closed["closed"], &closed["still_open"]),
        (&json!(true), &json!([]))
    );
    let receipt = &closed["receipts"][0];
    assert_eq!(
        (&receipt["id"], &receipt["reason"]),
        (&json!(id), &json!("requested"))
    );
    assert_eq!(receipt["outcome"], "acknowledged");
    let request_id = receipt["request_id"].as_str().expect("an id");
    let acknowledged = |w: &stt::Witness| {
        let stream = w.stream(request_id).expect("seen");
        stream.end == Some(stt::End::Acknowledged)
    };
    stage.witnessed("acknowledged", acknowledged).await;
    assert_eq!(
        daemon
            .post(&format!("/api/v1/streams/{id}/close"))
            .await
            .refused(404),
        "not_found"
    );

    let closed = daemon
        .post("/api/v1/rooms/r/participants/bob/close")
        .await
        .ok();
    assert_eq!(
        closed["receipts"].as_array().map(Vec::len),
        Some(1),
        "{closed}"
    );
    assert_eq!(closed["receipts"][0]["participant"], "bob");
    let closed = daemon.post("/api/v1/rooms/other/close").await.ok();
    assert_eq!(
        (&closed["closed"], &closed["receipts"][0]["participant"]),
        (&json!(true), &json!("carol"))
    );
    stage.all_acknowledged(3).await;
    let rooms = daemon.get("/api/v1/rooms").await.ok();
    assert_eq!(rooms.as_array().map(Vec::len), Some(1), "{rooms}");

    // Reviews, lists and a reload go on meanwhile; a room that was left for another reason would be
    // joined again after 10 s.
    daemon.binary.signal("HUP");
    tokio::time::sleep(Duration::from_secs(13)).await;
    assert_eq!(stage.stt.witness().opened, 3, "opened again");

    // Who comes back is another participant.
    bob.leave().await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(1).await;
    let said = says(&stage, &["reopen", "participant", "r", "alice"], EXIT_OK).await;
    assert!(said.contains("running"), "{said}");
    stage.streaming(2).await;
    daemon.post("/api/v1/rooms/other/reopen").await.ok();
    stage.streaming(3).await;

    let said = says(&stage, &["close", "participant", "r", "alice"], EXIT_OK).await;
    assert!(
        said.contains("alice") && said.contains("acknowledged"),
        "{said}"
    );
    stage.open(2).await;
    let said = says(&stage, &["close", "room", "r", "--json"], EXIT_OK).await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(said["receipts"][0]["participant"], "bob");
    // Another room of the name is another room.
    stage.api().delete_room("r").await.expect("deletion");
    alice.leave().await;
    bob.leave().await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(2).await;

    for path in ["rooms/none", "rooms/r/participants/none", "streams/99"] {
        assert_eq!(
            daemon
                .post(&format!("/api/v1/{path}/close"))
                .await
                .refused(404),
            "not_found"
        );
    }
    for path in [
        "rooms/none",
        "rooms/none/participants/x",
        "rooms/r/participants/none",
    ] {
        assert_eq!(
            daemon
                .post(&format!("/api/v1/{path}/reopen"))
                .await
                .refused(404),
            "not_found"
        );
    }
    let said = says(&stage, &["close", "stream", "99"], EXIT_FAILURE).await;
    assert!(said.contains("99"), "{said}");
    daemon.end(EXIT_OK).await;
    stage.all_acknowledged(7).await;
    for speaker in [alice, carol] {
        speaker.leave().await;
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_silent_is_shown_as_parked() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[("ROOMWARDEN__STT__PARK_AFTER_MS", "500")]).await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.mute();
    stage.open(0).await;
    daemon.status(|s| s["tracks"]["parked"] == 1).await;
    let streams = daemon.get("/api/v1/streams").await.ok();
    let parked = &streams["parked"][0];
    assert_eq!(
        (&parked["participant"], &parked["state"]),
        (&json!("alice"), &json!("parked"))
    );
    assert_eq!(streams["open"], json!([]));
    let said = says(&stage, &["streams"], EXIT_OK).await;
    assert!(
        said.lines()
            .any(|line| line.starts_with("parked") && line.contains("alice")),
        "{said}"
    );
    alice.unmute();
    daemon
        .status(|s| s["tracks"]["streaming"] == 1 && s["tracks"]["parked"] == 0)
        .await;
    daemon.end(EXIT_OK).await;
    alice.leave().await;
    stage.end().await;
}

/// A provider that does not answer: the caller is told what became of it, and waits no longer than
/// the grace; or does not wait at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_close_that_is_not_acknowledged_says_so() {
    let faults = stt::Faults {
        never_answer_close: true,
        ..Default::default()
    };
    let stage = Stage::with(stt::Config::default().faults(faults)).await;
    // For both requests to come within it.
    let grace = [("ROOMWARDEN__STT__CLOSE_GRACE_MS", "5000")];
    let daemon = Daemon::start(&stage, &grace).await;
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    let begun = daemon
        .post("/api/v1/rooms/r/participants/alice/close?wait=false")
        .await;
    assert_eq!(begun.status, 202, "{}", begun.body);
    let begun = begun.json();
    assert_eq!(
        (&begun["closed"], &begun["receipts"]),
        (&json!(false), &json!([]))
    );
    assert_eq!(begun["still_open"][0]["participant"], "alice");
    // Again, while it is under way: the same order.
    let closed = daemon.post("/api/v1/rooms/r/close").await.ok();
    let receipts = closed["receipts"].as_array().expect("a list");
    let outcomes: Vec<_> = receipts.iter().map(|receipt| &receipt["outcome"]).collect();
    assert_eq!(outcomes, ["timed_out", "timed_out"], "{closed}");
    let errors = daemon.get("/api/v1/errors").await.ok();
    assert_eq!(errors[0]["failure"]["cause"], "timeout", "{errors}");
    let streams = daemon.get("/api/v1/streams").await.ok();
    assert_eq!(streams["quarantined"], 2);
    // No fault of the end.
    daemon.end(EXIT_OK).await;
    alice.leave().await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_nobody_new_in_and_ends_with_the_last_room() {
    let stage = Stage::new().await;
    let mut daemon = Daemon::start(&stage, &[]).await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    daemon.status(|s| s["state"] == "running").await;
    assert_eq!(daemon.post("/api/v1/drain").await.ok()["state"], "draining");
    let ready = daemon.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("drains"), "{}", ready.body);
    let bob = stage.speaker("r", "bob").await;
    let carol = stage.speaker("new", "carol").await;
    room(&stage, "newer").await;
    // Reviews and lists go on meanwhile.
    let heard = stage.stt.witness().streams[0].audio_seconds;
    let goes_on = |w: &stt::Witness| w.streams[0].audio_seconds > heard + 3.0;
    let witness = stage.witnessed("alice goes on", goes_on).await;
    assert_eq!(witness.opened, 1, "somebody new is transcribed");
    let rooms = daemon.get("/api/v1/rooms").await.ok();
    assert_eq!(participants(&rooms), ["alice"]);

    // Taken back: they are there, and so are the rooms.
    let said = says(&stage, &["undrain"], EXIT_OK).await;
    assert!(said.contains("running"), "{said}");
    stage.streaming(3).await;
    let said = says(&stage, &["drain", "--json"], EXIT_OK).await;
    assert!(said.contains("draining"), "{said}");
    for name in ["new", "newer"] {
        stage.api().delete_room(name).await.expect("deletion");
    }
    // Those who were there go on.
    stage.streaming(2).await;
    daemon
        .status(|s| s["rooms"] == 1 && s["state"] == "draining")
        .await;
    stage.api().delete_room("r").await.expect("deletion");
    daemon.binary.logged("shutdown (drained)").await;
    let (status, log) = daemon.binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.all_acknowledged(3).await;
    for speaker in [alice, bob, carol] {
        speaker.leave().await;
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_rooms_drains_at_once() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[]).await;
    daemon.status(|s| s["state"] == "running").await;
    daemon.post("/api/v1/drain").await;
    let (status, log) = daemon.binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_is_shown_and_makes_it_not_ready() {
    let stage = Stage::new().await;
    let refusing = stt::Faults {
        reject_with: Some(Reject::status(402).message("No credits, hush.")),
        ..Default::default()
    };
    stage.stt.set_faults(refusing);
    let daemon = Daemon::start(&stage, &[]).await;
    let mut events = Events::open(&daemon, None).await;
    let alice = stage.speaker("r", "alice").await;
    let status = daemon.status(|s| !s["trouble"].is_null()).await;
    let trouble = &status["trouble"];
    assert_eq!(
        (&trouble["cause"], &trouble["blocks_all"]),
        (&json!("quota"), &json!(true))
    );
    let message = trouble["message"].as_str().expect("a text");
    assert!(
        message.contains("402") && message.contains("No credits"),
        "{message}"
    );
    assert!(
        trouble["retry_in_seconds"].as_f64() > Some(1.0),
        "{trouble}"
    );
    daemon.status(|s| s["tracks"]["waiting"] == 1).await;
    let ready = daemon.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("credit is used up"), "{}", ready.body);
    assert!(
        !ready.body.contains("hush"),
        "the provider's words are not for everybody"
    );
    let errors = daemon.get("/api/v1/errors?last=1").await.ok();
    let failure = &errors[0]["failure"];
    assert_eq!(
        (&failure["cause"], &failure["status"]),
        (&json!("quota"), &json!(402))
    );
    let samples = samples(&daemon.get("/metrics").await.body);
    assert_eq!(samples["roomwarden_provider_trouble{cause=\"quota\"}"], 1.0);
    assert_eq!(samples["roomwarden_ready"], 0.0);
    let said = says(&stage, &["status"], EXIT_OK).await;
    assert!(
        said.contains("not ready") && said.contains("next try in"),
        "{said}"
    );
    let said = says(&stage, &["streams"], EXIT_OK).await;
    let waiting = said.lines().find(|line| line.starts_with("waiting"));
    assert!(waiting.is_some_and(|line| line.contains("alice")), "{said}");

    stage.stt.set_faults(stt::Faults::default());
    daemon.binary.signal("HUP");
    stage.streaming(1).await;
    daemon
        .status(|s| s["trouble"].is_null() && s["not_ready"].is_null())
        .await;
    let begun = events.until("trouble_begun").await;
    assert_eq!(begun.data["trouble"]["cause"], "quota");
    let over = events.until("trouble_over").await;
    assert_eq!(over.data["cause"], "quota");
    daemon.end(EXIT_OK).await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn livekit_that_does_not_answer_makes_it_not_ready() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[("LIVEKIT_URL", "ws://127.0.0.1:9")]).await;
    assert_eq!(daemon.get("/healthz").await.ok()["state"], "starting");
    let ready = daemon.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert_eq!(ready.json()["ready"], false);
    let status = daemon.status(|s| !s["livekit"].is_null()).await;
    assert_eq!(status["state"], "starting");
    daemon.end(EXIT_OK).await;
    stage.end().await;
}

struct Events {
    lines: tokio::io::Lines<BufReader<TcpStream>>,
}

#[derive(Debug)]
struct Event {
    id: Option<String>,
    name: String,
    data: Value,
}

impl Events {
    async fn open(daemon: &Daemon, last: Option<&str>) -> Self {
        let last: Vec<_> = last.iter().map(|last| ("Last-Event-ID", *last)).collect();
        let request = daemon.head("GET", "/api/v1/events", &last);
        let tcp = daemon.send(&request).await;
        let mut lines = BufReader::new(tcp).lines();
        let status = timeout(LIMIT, lines.next_line()).await.expect("an answer");
        let status = status.expect("read").expect("a line");
        assert_eq!(status, "HTTP/1.1 200 OK");
        let mut new = Self { lines };
        while !new.line().await.expect("a head").is_empty() {}
        new
    }

    async fn line(&mut self) -> Option<String> {
        self.lines.next_line().await.ok().flatten()
    }

    /// None at the end.
    async fn next(&mut self) -> Option<Event> {
        timeout(LIMIT, self.read()).await.expect("an event")
    }

    async fn read(&mut self) -> Option<Event> {
        let (mut id, mut name) = (None, None);
        loop {
            // Chunks' lengths, and comments, are lines as well.
            let line = self.line().await?;
            if let Some(of) = line.strip_prefix("id: ") {
                id = Some(of.to_owned());
            } else if let Some(of) = line.strip_prefix("event: ") {
                name = Some(of.to_owned());
            } else if let Some(data) = line.strip_prefix("data: ") {
                let data = serde_json::from_str(data).expect("JSON");
                let name = name.expect("a name before the data");
                return Some(Event { id, name, data });
            }
        }
    }

    pub async fn until(&mut self, name: &str) -> Event {
        loop {
            let event = self
                .next()
                .await
                .unwrap_or_else(|| panic!("the end, and no {name}"));
            if event.name == name {
                return event;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_told_as_they_happen_and_can_be_read_on() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[]).await;
    let mut events = Events::open(&daemon, None).await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.leave().await;
    stage.open(0).await;
    let mut all = Vec::new();
    while all
        .last()
        .is_none_or(|last: &Event| last.name != "session_ended")
    {
        all.push(events.next().await.expect("more"));
    }
    let names: Vec<_> = all.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "room_joined",
            "session_begun",
            "stream_opening",
            "stream_open",
            "stream_closing",
            "stream_settled",
            "session_ended",
        ]
    );
    assert_eq!(all[0].data["room"], "r");
    assert_eq!(all[1].data["participant"], "alice");
    let receipt = &all[5].data["receipt"];
    assert_eq!(receipt["outcome"], "acknowledged");
    let id = receipt["request_id"].as_str().expect("an id");
    assert!(stage.stt.witness().stream(id).is_some());
    drop(events);

    // From there on, nothing twice and nothing lost.
    let mut again = Events::open(&daemon, all[3].id.as_deref()).await;
    for expected in &all[4..] {
        let event = again.next().await.expect("more");
        assert_eq!((&event.id, &event.name), (&expected.id, &expected.name));
        assert_eq!(event.data, expected.data);
    }
    // Of another run, or of none: what there is, and that something may be missing.
    for unknown in ["0", "1-1", "99999999999999999999-1", "x"] {
        let mut other = Events::open(&daemon, Some(unknown)).await;
        let gap = other.next().await.expect("a gap");
        assert_eq!(
            (gap.name.as_str(), &gap.data),
            ("gap", &json!({"missed": null}))
        );
        assert_eq!(other.next().await.expect("more").id, all[0].id);
    }

    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"));
    command
        .args(["events", "--after", "0", "--json"])
        .env_clear();
    command.envs(stage.environment()).kill_on_drop(true);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("runs");
    let mut lines = crate::stage::lines(&mut child);
    for expected in ["gap", "room_joined", "session_begun"] {
        let line = timeout(LIMIT, lines.next_line()).await.expect("an event");
        let line = line.expect("read").expect("a line");
        let event: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(event["event"], expected);
    }

    // The end is told, and is one.
    let log = daemon.end(EXIT_OK).await;
    again.until("closing").await;
    again.until("room_left").await;
    assert!(again.next().await.is_none(), "{log}");
    let ended = timeout(LIMIT, child.wait()).await.expect("it ends");
    assert_eq!(ended.expect("a status").code(), Some(EXIT_OK.into()));
    stage.end().await;
}

/// Who listens to all events there are, and reads none of them.
async fn stuck(daemon: &Daemon, count: usize) -> Vec<TcpStream> {
    let mut stuck = Vec::new();
    for _ in 0..count {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        // As small as it can be, so that what is sent stands.
        socket.set_recv_buffer_size(1).expect("set");
        let mut tcp = socket.connect(daemon.address).await.expect("connected");
        let head = daemon.head("GET", "/api/v1/events", &[("Last-Event-ID", "0")]);
        tcp.write_all(head.as_bytes()).await.expect("sent");
        stuck.push(tcp);
    }
    stuck
}

async fn listeners(daemon: &Daemon, count: f64) {
    let begun = Instant::now();
    let now = async || samples(&daemon.get("/metrics").await.body)["roomwarden_api_listeners"];
    while now().await != count {
        assert!(begun.elapsed() < LIMIT, "never {count} listeners");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_and_reads_nothing_is_dropped_and_holds_up_nothing() {
    let stage = Stage::new().await;
    // What happens very often: it is tried again and again.
    let refusing = stt::Faults {
        reject_with: Some(Reject::status(503).message("x".repeat(250))),
        ..Default::default()
    };
    stage.stt.set_faults(refusing);
    let often = [
        ("ROOMWARDEN__STT__RETRY_FIRST_MS", "10"),
        ("ROOMWARDEN__STT__RETRY_MOST_MS", "10"),
    ];
    let daemon = Daemon::start(&stage, &often).await;
    let alice = stage.speaker("r", "alice").await;
    // More than is kept, and more than the sockets' buffers take. Each is one after the other, with
    // its line on disk first, and disks may be slow.
    daemon
        .until_within(5 * LIMIT, "/api/v1/status", |s| {
            s["streams"]["never_opened"].as_u64() > Some(600)
        })
        .await;
    let unread = stuck(&daemon, 8).await;
    listeners(&daemon, 8.0).await;
    listeners(&daemon, 0.0).await;
    drop(unread);

    let mut unread = stuck(&daemon, 8).await;
    // And some who have not even asked yet.
    for _ in 0..8 {
        unread.push(daemon.send("GET /api/v1/status HT").await);
    }
    listeners(&daemon, 8.0).await;
    let begun = Instant::now();
    daemon.end(EXIT_OK).await;
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    drop(unread);
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_say_who_may_do_what_and_can_be_changed() {
    let stage = Stage::new().await;
    let file = |name: &str, token: &str| {
        let path = stage.state.path().join(name);
        std::fs::write(&path, format!("{token}\n")).expect("a file");
        path.display().to_string()
    };
    let (all, read) = (file("token", TOKEN), file("read", READ_TOKEN));
    let mut daemon = Daemon::start(
        &stage,
        &[
            (LISTEN, "0.0.0.0:0"),
            ("ROOMWARDEN__CONTROL__TOKEN_FILE", &all),
            ("ROOMWARDEN__CONTROL__READ_TOKEN_FILE", &read),
        ],
    )
    .await;
    daemon.address.set_ip(Ipv4Addr::LOCALHOST.into());
    let nobody = daemon.get("/api/v1/status").await;
    assert_eq!(nobody.refused(401), "unauthorized");
    assert_eq!(nobody.headers["www-authenticate"], "Bearer");
    for path in [
        "/metrics",
        "/api/v1/events",
        "/api/v1/openapi.json",
        "/none",
    ] {
        assert_eq!(
            daemon.get(path).await.refused(401),
            "unauthorized",
            "{path}"
        );
    }
    // Probes have no token.
    assert_eq!(daemon.get("/healthz").await.status, 200);
    daemon
        .until("/readyz", |ready| ready["ready"] == true)
        .await;

    daemon.token = Some(READ_TOKEN.to_owned());
    for path in ["/api/v1/status", "/metrics", "/api/v1/receipts"] {
        assert_eq!(daemon.get(path).await.status, 200, "{path}");
    }
    for path in [
        "drain",
        "undrain",
        "rooms/r/close",
        "streams/1/close",
        "none",
    ] {
        assert_eq!(
            daemon.post(&format!("/api/v1/{path}")).await.refused(403),
            "read_only"
        );
    }
    let body = r#"{"filter":"debug"}"#;
    let json = [("Content-Type", "application/json")];
    assert_eq!(
        daemon
            .ask("PUT", "/api/v1/log", &json, body)
            .await
            .refused(403),
        "read_only"
    );
    daemon.token = Some(TOKEN.to_owned());
    assert_eq!(daemon.post("/api/v1/undrain").await.status, 200);

    // On the command line; never as an argument.
    let api = format!("http://{}", daemon.address);
    let said = says(
        &stage,
        &["status", "--api", &api, "--token-file", &read],
        EXIT_OK,
    )
    .await;
    assert!(said.contains("running"), "{said}");
    let said = says(
        &stage,
        &["drain", "--api", &api, "--token-file", &read],
        EXIT_USAGE,
    )
    .await;
    assert!(said.contains("may only read"), "{said}");
    let said = says(&stage, &["status", "--api", &api], EXIT_USAGE).await;
    assert!(said.contains("a token is needed"), "{said}");

    // Renewed in its file.
    file("token", "another-token-for-everything");
    daemon.binary.signal("HUP");
    daemon.binary.logged("configuration reloaded").await;
    assert_eq!(
        daemon.get("/api/v1/status").await.refused(401),
        "unauthorized"
    );
    daemon.token = Some("another-token-for-everything".to_owned());
    assert_eq!(daemon.get("/api/v1/status").await.status, 200);
    // A file that has no good one changes nothing.
    file("token", "short");
    daemon.binary.signal("HUP");
    daemon.binary.logged("at least 16 characters").await;
    assert_eq!(daemon.get("/api/v1/status").await.status, 200);
    file("token", "another-token-for-everything");

    // Who guesses has to wait.
    daemon.token = Some("a-guess-of-a-token".to_owned());
    let mut answers = BTreeSet::new();
    for _ in 0..20 {
        let answer = daemon.get("/api/v1/status").await;
        answers.insert(answer.status);
        if answer.status == 429 {
            assert_eq!(answer.refused(429), "too_many_guesses");
            assert!(
                answer.headers["retry-after"]
                    .parse::<u64>()
                    .expect("seconds")
                    >= 1
            );
        }
    }
    assert_eq!(answers, [401, 429].into());
    // And on the socket there is nothing to guess.
    let said = says(&stage, &["status", "--json"], EXIT_OK).await;
    let log = daemon.end(EXIT_OK).await;
    for said in [log, said] {
        for secret in [
            "token-for",
            "a-guess",
            stage.stt.api_key(),
            stage.rooms.api_secret(),
        ] {
            assert!(!said.contains(secret), "{secret}: {said}");
        }
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_much_or_from_elsewhere_is_refused() {
    let stage = Stage::new().await;
    let named = [("ROOMWARDEN__CONTROL__HOSTS", "warden.internal")];
    let mut daemon = Daemon::start(&stage, &named).await;
    let status = "/api/v1/status";
    let with = async |headers: &[(&str, &str)]| daemon.ask("GET", status, headers, "").await;
    for host in [
        "localhost",
        "localhost:1",
        "127.0.0.1",
        "[::1]:7460",
        "warden.internal",
    ] {
        assert_eq!(with(&[("Host", host)]).await.status, 200, "{host}");
    }
    for host in ["evil.example", "localhost.evil.example:7460", ""] {
        assert_eq!(
            with(&[("Host", host)]).await.refused(421),
            "wrong_host",
            "{host}"
        );
    }
    let here = format!("http://{}", daemon.address);
    assert_eq!(with(&[("Origin", &here)]).await.status, 200);
    for origin in ["null", "https://evil.example", "http://localhost"] {
        let refused = with(&[("Origin", origin)]).await;
        assert_eq!(refused.refused(403), "wrong_origin", "{origin}");
    }
    let site = [("Sec-Fetch-Site", "cross-site")];
    assert_eq!(
        daemon
            .ask("POST", "/api/v1/drain", &site, "")
            .await
            .refused(403),
        "wrong_origin"
    );
    // Nothing was done.
    assert_ne!(daemon.get(status).await.ok()["state"], "draining");

    assert_eq!(daemon.get("/api/v2/status").await.refused(404), "not_found");
    assert_eq!(daemon.get("/").await.refused(404), "not_found");
    let wrong = daemon.get("/api/v1/drain").await;
    assert_eq!(wrong.refused(405), "wrong_method");
    assert_eq!(wrong.headers["allow"], "POST");
    assert_eq!(
        daemon.ask("DELETE", status, &[], "").await.refused(405),
        "wrong_method"
    );
    for path in [
        "receipts?last=0",
        "receipts?last=1001",
        "receipts?last=x",
        "receipts?most=1",
        "errors?last=-1",
        "usage?by=",
        "usage?by=room,room,room,room,room,room",
        "usage?by=place",
        "usage?since=yesterday",
    ] {
        let answer = daemon.get(&format!("/api/v1/{path}")).await;
        assert_eq!(answer.refused(400), "bad_request", "{path}");
    }
    for path in [
        "streams/x/close",
        "streams/1/close?wait=maybe",
        "rooms/%ff/close",
    ] {
        let answer = daemon.post(&format!("/api/v1/{path}")).await;
        assert!(
            matches!(answer.status, 400 | 404),
            "{path}: {}",
            answer.body
        );
        answer.refused(answer.status);
    }

    let json = ("Content-Type", "application/json");
    let log = "/api/v1/log";
    let large = format!("{{\"filter\":\"{}\"}}", "x".repeat(64 << 10));
    assert_eq!(
        daemon.ask("PUT", log, &[json], &large).await.refused(413),
        "too_large"
    );
    let chunked = [
        json,
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", ""),
    ];
    let body = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let request = daemon.head("PUT", log, &chunked[..2]) + &body;
    assert_eq!(
        answer(daemon.send(&request).await).await.refused(413),
        "too_large"
    );
    let filter = r#"{"filter":"info"}"#;
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
    ] {
        let answer = daemon
            .ask("PUT", log, &[("Content-Type", kind)], filter)
            .await;
        assert_eq!(answer.refused(415), "not_json", "{kind}");
    }
    assert_eq!(
        daemon.ask("PUT", log, &[], filter).await.refused(415),
        "not_json"
    );
    for body in [
        "",
        "{",
        "{}",
        r#"{"filter":1}"#,
        r#"{"filter":""}"#,
        r#"{"filter":"a=b=c"}"#,
        "[]",
    ] {
        let answer = daemon.ask("PUT", log, &[json], body).await;
        assert_eq!(answer.refused(400), "bad_request", "{body}");
    }
    let head = format!(
        "GET {status} HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(20 << 10)
    );
    let refused = answer(daemon.send(&head).await).await;
    assert_eq!(refused.status, 431);

    assert_eq!(
        daemon.get("/webhooks/livekit").await.refused(405),
        "wrong_method"
    );
    // Who does not come to the end of a head, or of a body, is not waited for; see below.
    let mut slow = daemon.send(&head[..100]).await;
    let announced = [json, ("Content-Length", "100")];
    let slow_log = daemon.send(&daemon.head("PUT", log, &announced)).await;
    let hook = |token: &str| {
        let headers = [announced[0], announced[1], ("Authorization", token)];
        daemon.head("POST", PATH, &headers)
    };
    let slow_hook = daemon.send(&hook(&signed(&stage, "anything"))).await;
    // Who is nobody need not even be slow.
    let nobody = answer(daemon.send(&hook("none")).await).await;
    assert_eq!(nobody.status, 401, "{}", nobody.body);

    // As many listeners as may, and then no more.
    let mut listeners = Vec::new();
    for _ in 0..16 {
        listeners.push(Events::open(&daemon, None).await);
    }
    assert_eq!(
        daemon.get("/api/v1/events").await.refused(429),
        "too_many_listeners"
    );
    drop(listeners);

    // As many connections as may; one more is closed, and the socket is another matter.
    let mut connections = Vec::new();
    for _ in 0..80 {
        connections.push(TcpStream::connect(daemon.address).await.expect("connected"));
    }
    let mut byte = [0];
    let closed = timeout(LIMIT, connections[79].read(&mut byte))
        .await
        .expect("closed");
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    says(&stage, &["status"], EXIT_OK).await;
    drop(connections);
    daemon.status(|s| s["state"] == "running").await;

    let mut answers = BTreeSet::new();
    let begun = Instant::now();
    while !answers.contains(&429) && begun.elapsed() < LIMIT {
        let all = (0..20).map(|_| daemon.post("/api/v1/undrain"));
        for answer in futures_util::future::join_all(all).await {
            answers.insert(answer.status);
            if answer.status == 429 {
                assert_eq!(answer.refused(429), "too_many_writes");
                assert!(answer.headers.contains_key("retry-after"));
            }
        }
    }
    assert_eq!(answers, [200, 429].into());
    // Who looks is not held up by that.
    assert_eq!(daemon.get(status).await.status, 200);

    let closed = timeout(LIMIT, slow.read(&mut byte)).await.expect("closed");
    assert!(closed.is_ok(), "{closed:?}");
    assert_eq!(answer(slow_log).await.refused(408), "too_slow");
    // In LiveKit's own way.
    assert_eq!(answer(slow_hook).await.status, 408);

    // Writes are allowed again.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let said = says(&stage, &["log", "a=b=c"], EXIT_USAGE).await;
    assert!(said.contains("a=b=c"), "{said}");
    says(&stage, &["log", "debug"], EXIT_OK).await;
    daemon.binary.logged("DEBUG").await;
    daemon.end(EXIT_OK).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_taken_is_said_and_what_to_do() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[]).await;
    let other = Stage::new().await;
    let taken = daemon.address.to_string();
    let (status, log) = Binary::run(&other, &[(LISTEN, &taken)]).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    for words in ["control.listen", &taken, "in use", "off"] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let socket = stage.state.path().join("roomwarden.sock");
    let path = socket.display().to_string();
    let variable = "ROOMWARDEN__CONTROL__SOCKET";
    let (status, log) = Binary::run(&other, &[(variable, &path)]).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    assert!(
        log.contains("control.socket") && log.contains(&path),
        "{log}"
    );
    // One that was killed has left its socket.
    daemon.binary.signal("KILL");
    daemon.binary.exit().await;
    assert!(socket.exists());
    let daemon = Daemon::start(&stage, &[]).await;
    let said = says(&stage, &["status"], EXIT_OK).await;
    assert!(said.contains("roomwarden, "), "{said}");
    daemon.end(EXIT_OK).await;
    assert!(!socket.exists());
    other.end().await;
    stage.end().await;
}

/// What is open while the daemon closes can still be seen.
#[tokio::test(flavor = "multi_thread")]
async fn the_close_can_be_watched() {
    let stage = Stage::with(stt::Config::default().close_delay(Duration::from_secs(50))).await;
    // For all that is asked to be answered within it.
    let deadline = [("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "15000")];
    let daemon = Daemon::start(&stage, &deadline).await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    daemon.binary.signal("TERM");
    let status = daemon
        .status(|s| s["state"] == "closing" && s["tracks"]["closing"] == 1)
        .await;
    assert_eq!(status["open"]["registry"], 1);
    assert_eq!(daemon.get("/readyz").await.status, 503);
    assert_eq!(daemon.get("/healthz").await.ok()["state"], "closing");
    assert_eq!(daemon.post("/api/v1/drain").await.refused(409), "closing");
    let (status, log) = daemon.binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_UNACKNOWLEDGED.into()), "{log}");
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_very_much_is_refused_and_what_to_ask_for_is_said() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(&stage, &[]).await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.leave().await;
    let usage = "/api/v1/usage?by=room,participant";
    daemon
        .until(usage, |usage| usage["total"]["streams"] == 1)
        .await;
    // As many as may be, of a day long ago.
    let add = |from: u32, to: u32| {
        let file = stage.state.path().join("roomwarden.db");
        let ledger = rusqlite::Connection::open(file).expect("opens");
        let limit = Duration::from_secs(10);
        ledger.busy_timeout(limit).expect("set");
        let sql = "WITH RECURSIVE n(n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM n WHERE n < ?2)
            INSERT INTO streams (receipt, daemon, run, id, room, participant, track, provider,
                model, encoding, opened_at_ms, settled_at_ms, reconnects, outcome, reason)
            SELECT 'old-' || n, 'old', 1, n, 'room ' || n, 'ann', 'TR', 'p', 'm', 'e',
                1000, 2000, 0, 'acknowledged', 'left' FROM n";
        ledger.execute(sql, [from, to]).expect("written");
    };
    add(1, 9_999);
    let most = daemon.get(usage).await.ok();
    assert_eq!(most["rows"].as_array().map(Vec::len), Some(10_000));
    add(10_000, 10_000);
    let refused = daemon.get(usage).await;
    assert_eq!(refused.refused(400), "too_many_rows");
    assert!(refused.body.contains("later since"), "{}", refused.body);
    let fewer = daemon.get("/api/v1/usage?by=participant").await.ok();
    assert_eq!(fewer["total"]["streams"], 10_001, "{fewer}");
    let later = daemon.get(&format!("{usage}&since=7d")).await.ok();
    assert_eq!(later["rows"][0]["room"], "r", "{later}");
    // The command prints all of it.
    let said = says(
        &stage,
        &["usage", "--by", "room,participant", "--json"],
        EXIT_OK,
    )
    .await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(said["rows"].as_array().map(Vec::len), Some(10_001));
    daemon.end(EXIT_OK).await;
    stage.end().await;
}

/// LiveKit's token for a webhook.
fn signed(stage: &Stage, body: &str) -> String {
    signed_with(stage, stage.rooms.api_secret(), body)
}

fn signed_with(stage: &Stage, secret: &str, body: &str) -> String {
    let hash = BASE64_STANDARD.encode(Sha256::digest(body));
    let token = AccessToken::with_api_key(stage.rooms.api_key(), secret).with_sha256(&hash);
    token.to_jwt().expect("a token")
}

/// LiveKit's webhooks come to the same address, with LiveKit's signature in place of a token. The rooms
/// would be asked for in an hour.
#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_makes_the_rooms_be_asked_for_at_once() {
    let stage = Stage::new().await;
    let hourly = ("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "3600000");
    let token = ("ROOMWARDEN__CONTROL__TOKEN", TOKEN);
    let daemon = Daemon::start(&stage, &[hourly, token]).await;
    daemon
        .until("/readyz", |ready| ready["ready"] == true)
        .await;
    let alice = stage.speaker("r", "alice").await;
    let created = std::time::UNIX_EPOCH.elapsed().expect("a time").as_secs();
    let event = json!({
        "event": "room_started", "id": "EV_1", "createdAt": created.to_string(),
        "room": {"name": "r"},
    });
    let event = event.to_string();
    let forged = signed_with(&stage, "another secret, of the same length...", &event);
    let told = async |token: &str| {
        let headers = [("Authorization", token)];
        daemon.ask("POST", PATH, &headers, &event).await.status
    };
    for _ in 0..20 {
        assert_eq!(told(&forged).await, 401);
    }
    assert_eq!(stage.stt.witness().opened, 0);
    assert_eq!(told(&signed(&stage, &event)).await, 200);
    stage.streaming(1).await;
    let log = daemon.end(EXIT_OK).await;
    let refusals = log.matches("a webhook is refused").count();
    assert!((1..=3).contains(&refusals), "one a minute at most: {log}");
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_can_complete_the_commands() {
    let stage = Stage::new().await;
    for shell in ["bash", "zsh", "fish"] {
        let script = says(&stage, &["completions", shell], EXIT_OK).await;
        for command in ["status", "undrain", "reopen"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    stage.end().await;
}
