//! Clients that nobody here wrote, against the servers that stand in for LiveKit and Deepgram: if
//! these can't tell the difference, then what the other tests show of the daemon means something.
//! The programs are in tests/clients; each checks what its client sees, and the servers' own
//! accounts are checked here.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use livekit_api::{
    access_token::{AccessToken, VideoGrants},
    services::room::{CreateRoomOptions, RoomClient},
};
use livekit_protocol::DisconnectReason;
use rehearsal::{room, stt};
use roomwarden::{daemon::Daemon, transcripts::Sinks};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
};

use crate::stage::{LIMIT, Stage, lines};

#[tokio::test(flavor = "multi_thread")]
async fn two_genuine_clients_meet_on_a_single_peer_connection() {
    two_clients_meet(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_genuine_clients_meet_on_two_peer_connections() {
    two_clients_meet(false).await;
}

/// PyPI `livekit`: tones, data, a text stream, an RPC, mute, removal, deletion.
async fn two_clients_meet(single: bool) {
    let stage = Stage::new().await;
    let mut program = python("two_clients.py");
    program.args(["r", "--peer-connections", if single { "1" } else { "2" }]);
    Client::start(program, &stage).end().await;

    let witness = stage.rooms.witness();
    let room = witness.room("r").expect("the room");
    assert_eq!(room.end_reason, Some(DisconnectReason::RoomDeleted));
    for participant in &room.participants {
        assert_eq!(participant.single_peer_connection, single);
        assert_eq!((participant.tracks.len(), participant.resumes), (1, 0));
    }
    let reasons: Vec<_> = room
        .participants
        .iter()
        .map(|p| (p.identity.as_str(), p.reason.expect("a reason")))
        .collect();
    assert_eq!(
        reasons,
        [
            ("ann", DisconnectReason::RoomDeleted),
            ("bob", DisconnectReason::ParticipantRemoved)
        ]
    );
    stage.end().await;
}

/// PyPI `livekit-api`: answers and errors of the RoomService.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_sdk_gets_livekits_answers_and_errors() {
    let stage = Stage::new().await;
    Client::start(python("room_service.py"), &stage).end().await;

    let witness = stage.rooms.witness();
    assert_eq!(witness.live_rooms().count(), 0, "{witness:#?}");
    let ended: Vec<_> = witness
        .rooms
        .iter()
        .map(|room| (room.name.as_str(), room.end_reason))
        .collect();
    let deleted = Some(DisconnectReason::RoomDeleted);
    assert_eq!(ended, [("service", deleted), ("other", deleted)]);
    stage.end().await;
}

/// PyPI `deepgram-sdk`: transcripts of each phrase, metadata, and an end as at Deepgram.
#[tokio::test(flavor = "multi_thread")]
async fn deepgrams_own_sdk_streams_and_is_acknowledged() {
    let stage = Stage::new().await;
    let mut program = python("deepgram_stream.py");
    program.arg(repository("crates/rehearsal/assets/brian.opus"));
    let said = Client::start(program, &stage).end().await;

    stage.all_acknowledged(1).await;
    let stream = &stage.stt.witness().streams[0];
    assert_eq!((stream.texts.keep_alive, stream.texts.close_stream), (1, 1));
    // The recording has three phrases, and pauses between them.
    let is_phrase = |line: &&Value| {
        line["text"]
            .as_str()
            .is_some_and(|text| text.starts_with("speech"))
    };
    assert_eq!(said.iter().filter(is_phrase).count(), 3, "{said:#?}");
    let last = said.last().expect("it says something");
    assert_eq!(last["event"], "metadata");
    assert_eq!(last["request_id"], stream.request_id);
    let duration = last["duration"].as_f64().expect("a duration");
    assert!((duration - stream.audio_seconds).abs() < 0.1, "{stream:#?}");
    assert!((7.0..8.0).contains(&duration), "{duration} s of 7.4");
    stage.end().await;
}

/// PyPI `livekit-api`, whose WebhookReceiver checks signatures: a stay is told in order, and what is
/// forged is refused.
#[tokio::test(flavor = "multi_thread")]
async fn livekits_own_receiver_takes_the_webhooks_and_none_that_are_forged() {
    let config = room::Config::default();
    let mut program = python("webhook_receiver.py");
    program
        .env("LIVEKIT_API_KEY", &config.api_key)
        .env("LIVEKIT_API_SECRET", &config.api_secret);
    let mut receiver = Client::launch(program);
    let listens = receiver.line().await;
    let address = listens["name"].as_str().expect("an address").to_owned();
    let webhook_urls = vec![format!("http://{address}/hook")];
    let config = room::Config {
        webhook_urls: webhook_urls.clone(),
        ..config
    };
    let stage = Stage::of(config, stt::Config::default());
    let ann = stage.speaker("r", "ann").await;
    let published = |w: &room::Witness| {
        let ann = w.room("r").and_then(|room| room.participant("ann"));
        ann.is_some_and(|ann| !ann.tracks.is_empty())
    };
    let witness = stage.rooms.wait_for(published, LIMIT).await;
    witness.expect("her track is published");
    ann.leave().await;
    stage.api().delete_room("r").await.expect("deletion");
    let mut told = Vec::new();
    for (name, participant, has_track) in [
        ("room_started", "", false),
        ("participant_joined", "ann", false),
        ("track_published", "ann", true),
        ("track_unpublished", "ann", true),
        ("participant_left", "ann", false),
        ("room_finished", "", false),
    ] {
        let line = receiver.line().await;
        assert_eq!(line["event"], "accepted", "{line}");
        assert_eq!((&line["name"], &line["room"]), (&name.into(), &"r".into()));
        assert_eq!(line["participant"], participant, "{line}");
        let track = line["track"].as_str().expect("text");
        assert_eq!(track.starts_with("TR_"), has_track, "{line}");
        told.push(line);
    }

    // Sent once more as it was, it is accepted: a change is what is refused.
    let (body, token) = (&told[5]["body"], &told[5]["token"]);
    let (body, token) = (body.as_str().expect("text"), token.as_str().expect("text"));
    assert_eq!(post(&address, token, body).await, 200);
    assert_eq!(receiver.line().await["name"], "room_finished");
    let tampered = body.replace("room_finished", "room_started");
    assert_ne!(tampered, body);
    assert_eq!(post(&address, token, &tampered).await, 401);
    let refused = receiver.line().await;
    assert_eq!(refused["error"], "Exception: hash mismatch");

    // By its configuration it has another secret.
    let stranger = room::Server::start(room::Config {
        webhook_urls,
        ..Default::default()
    });
    let stranger = stranger.expect("room server");
    let (key, secret) = (stranger.api_key(), stranger.api_secret());
    let api = RoomClient::with_api_key(&stranger.http_url(), key, secret);
    let created = api.create_room("r", CreateRoomOptions::default()).await;
    created.expect("creation");
    let refused = receiver.line().await;
    let error = refused["error"].as_str().unwrap_or_default();
    assert!(error.starts_with("InvalidSignatureError"), "{refused}");
    stranger.kill().await;

    receiver.close_input();
    assert_eq!(receiver.end().await.len(), 10);
    stage.end().await;
}

/// Sends a webhook in the server's place; the status of the answer.
async fn post(address: &str, token: &str, body: &str) -> u16 {
    let request = format!(
        "POST /hook HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\nauthorization: {token}\r\n\
         content-type: application/webhook+json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(LIMIT, exchange).await;
    let answer = answer.expect("in time").expect("an answer");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok());
    status.expect("a status")
}

/// npm `livekit-client` in a browser, a page for each of its connection modes.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_a_browser_hear_each_other_and_are_transcribed() {
    let stage = Stage::new().await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let mut program = in_browser("call.mjs");
    program
        .env("TOKEN_SINGLE", token(&stage, "single"))
        .env("TOKEN_DUAL", token(&stage, "dual"));
    let mut pages = Client::start(program, &stage);
    for page in ["single", "dual"] {
        let heard = pages.page_says("hears", page).await;
        assert_eq!(heard["lost"], 0, "{heard}");
        assert!(heard["packets"].as_u64() > Some(0), "{heard}");
        assert!(heard["energy"].as_f64() > Some(0.0), "{heard}");
        pages.page_says("transcribed", page).await;
    }
    stage
        .witnessed("two streams with 2 s of audio", |w| {
            w.open_now == 2 && w.streams.iter().all(|s| s.audio_seconds > 2.0)
        })
        .await;

    pages.close_input();
    pages.end().await;
    stage.all_acknowledged(2).await;
    let witness = stage.rooms.witness();
    let room = witness.room("r").expect("the room");
    for page in ["single", "dual"] {
        let page = room.participant(page).expect("the page");
        assert_eq!(page.single_peer_connection, page.identity == "single");
        assert_eq!(page.reason, Some(DisconnectReason::ClientInitiated));
        assert_eq!(page.resumes, 0);
    }
    drop(daemon);
    stage.end().await;
}

/// A program of tests/clients. Killed if the test fails before it ends.
pub struct Client {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
    said: Vec<Value>,
}

impl Client {
    pub fn start(mut program: Command, stage: &Stage) -> Self {
        program
            .envs(stage.environment())
            .env("STT_URL", format!("ws://{}", stage.stt.address()));
        Self::launch(program)
    }

    /// Starts it without a stage to stand on.
    fn launch(mut program: Command) -> Self {
        program
            // Some clients would otherwise look for a proxy even to loopback.
            .envs([("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = program.spawn().expect("the client starts");
        let output = lines(&mut child);
        let said = Vec::new();
        Self {
            child,
            output,
            said,
        }
    }

    /// The next line that it prints; none if it prints no more.
    async fn next(&mut self) -> Option<&Value> {
        let line = self.output.next_line().await.expect("its output")?;
        println!("{line}");
        self.said
            .push(serde_json::from_str(&line).expect("a JSON line"));
        self.said.last()
    }

    /// Waits for the next line that it prints.
    async fn line(&mut self) -> Value {
        match tokio::time::timeout(LIMIT, self.next()).await {
            Ok(Some(line)) => line.clone(),
            _ => panic!("it says no more than {:#?}", self.said),
        }
    }

    /// Waits until it says this of this page.
    async fn page_says(&mut self, event: &str, page: &str) -> Value {
        self.tells(|line| line["event"] == event && line["name"] == page)
            .await
    }

    /// Waits until it says this.
    pub async fn says(&mut self, event: &str) -> Value {
        self.tells(|line| line["event"] == event).await
    }

    /// Waits for a line like this, unless it has come before.
    async fn tells(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        if let Some(line) = self.said.iter().find(|line| is_it(line)) {
            return line.clone();
        }
        let said = async {
            while let Some(line) = self.next().await {
                if is_it(line) {
                    return Some(line.clone());
                }
            }
            None
        };
        match tokio::time::timeout(LIMIT, said).await {
            Ok(Some(line)) => line,
            _ => panic!("it never said what is waited for, but {:#?}", self.said),
        }
    }

    /// Ends its standard input.
    fn close_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for its end, which must be a success; all that it printed.
    pub async fn end(mut self) -> Vec<Value> {
        let end = async {
            while self.next().await.is_some() {}
            self.child.wait().await.expect("its status")
        };
        match tokio::time::timeout(LIMIT, end).await {
            Ok(status) => assert!(status.success(), "{status}, after {:#?}", self.said),
            Err(_) => panic!("not over within {LIMIT:?}, after {:#?}", self.said),
        }
        self.said
    }
}

/// One of the Python programs, in the environment that `tests/run` makes.
pub fn python(program: &str) -> Command {
    let mut command = Command::new(installed(".venv/bin/python"));
    command.arg(repository("tests/clients").join(program));
    command
}

/// One of the programs that drive a browser.
pub fn in_browser(program: &str) -> Command {
    let folder = "tests/clients/browser";
    installed(&format!("{folder}/node_modules/livekit-client"));
    let mut command = Command::new("node");
    command
        .arg(repository(folder).join(program))
        .env("CHROMIUM", browser());
    command
}

/// Chromium, or a browser made of it.
fn browser() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places: Vec<_> = std::env::split_paths(&path).collect();
    ["chromium", "google-chrome"]
        .iter()
        .flat_map(|name| places.iter().map(move |place| place.join(name)))
        .find(|program| program.exists())
        .expect("no chromium in PATH: run tests/run, which installs it")
}

pub fn token(stage: &Stage, identity: &str) -> String {
    AccessToken::with_api_key(stage.rooms.api_key(), stage.rooms.api_secret())
        .with_identity(identity)
        .with_grants(VideoGrants {
            room_join: true,
            room: "r".into(),
            ..Default::default()
        })
        .to_jwt()
        .expect("a token")
}

/// What `tests/run` installs.
fn installed(path: &str) -> PathBuf {
    let path = repository(path);
    assert!(
        path.exists(),
        "{} is not there: run tests/run, which installs it",
        path.display()
    );
    path
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
