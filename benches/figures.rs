//! The daemon's figures, printed: how soon streams are closed after each cause, what the last word
//! costs, how late audio is, what a participant costs. The real binary in a process of its own,
//! against the rehearsal in this one; the STT server answers CloseStream after 0.1 s, as it did when
//! other frameworks were measured.
//!
//! `cargo bench --bench figures [-- SECTION...]`, with sections close, shutdown, words, open, delay,
//! cost, idle, gateway. `ROOMWARDEN_BINARY` names another build of it to measure.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

use std::{
    collections::{HashMap, HashSet},
    fs,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt, future::join_all};
use livekit::{
    options::TrackPublishOptions,
    prelude::*,
    webrtc::audio_source::{AudioSourceOptions, native::NativeAudioSource},
};
use livekit_api::{
    access_token::{AccessToken, VideoGrants},
    services::room::{CreateRoomOptions, RoomClient},
};
use rehearsal::{
    room,
    speaker::{Place, Recording, Speaker},
    stt::{self, End},
};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};
use tokio_tungstenite::{
    connect_async,
    tungstenite::{Message, client::IntoClientRequest},
};

/// How long the STT server takes to answer CloseStream.
const ANSWER: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(60);
/// Linux counts CPU time in hundredths of a second (sysconf(_SC_CLK_TCK)).
const TICKS_PER_SECOND: f64 = 100.0;

#[tokio::main]
async fn main() {
    let sections: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wanted = |name: &str| sections.is_empty() || sections.iter().any(|s| s == name);
    println!(
        "STT server answers CloseStream after {ANSWER:?}; {} cores\n",
        cores()
    );
    if wanted("idle") {
        idle().await;
    }
    if wanted("open") {
        open().await;
    }
    if wanted("close") {
        close().await;
    }
    if wanted("words") {
        words().await;
    }
    if wanted("shutdown") {
        shutdown().await;
    }
    if wanted("delay") {
        delay().await;
    }
    if wanted("cost") {
        cost().await;
    }
    if wanted("gateway") {
        gateway().await;
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

// --- The stage ------------------------------------------------------------------------------

struct Stage {
    rooms: room::Server,
    stt: stt::Server,
    state: tempfile::TempDir,
}

impl Stage {
    fn new(stt: stt::Config) -> Self {
        Self {
            state: tempfile::tempdir().expect("state directory"),
            rooms: room::Server::start(room::Config::default()).expect("room server"),
            stt: stt::Server::start(stt).expect("STT server"),
        }
    }

    fn answering() -> Self {
        Self::new(stt::Config::default().close_delay(ANSWER))
    }

    fn api(&self) -> RoomClient {
        let (key, secret) = (self.rooms.api_key(), self.rooms.api_secret());
        RoomClient::with_api_key(&self.rooms.http_url(), key, secret)
    }

    fn daemon(&self, stt_url: &str, more: &[(&str, &str)]) -> Daemon {
        let ours = env!("CARGO_BIN_EXE_roomwarden").into();
        let mut command = Command::new(std::env::var_os("ROOMWARDEN_BINARY").unwrap_or(ours));
        command.arg("run").env_clear();
        command.envs([
            ("LIVEKIT_URL", self.rooms.url().as_str()),
            ("LIVEKIT_API_KEY", self.rooms.api_key()),
            ("LIVEKIT_API_SECRET", self.rooms.api_secret()),
            ("DEEPGRAM_API_KEY", self.stt.api_key()),
            ("ROOMWARDEN__STT__URL", stt_url),
            ("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "100"),
            ("ROOMWARDEN__TRANSCRIPTS__STDOUT", "false"),
            ("ROOMWARDEN__CONTROL__LISTEN", "127.0.0.1:0"),
            ("ROOMWARDEN__LOG__FILTER", "warn,roomwarden=info"),
            (
                "ROOMWARDEN__STATE__DIR",
                self.state.path().to_str().expect("a path"),
            ),
        ]);
        command.envs(more.iter().copied());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let started = Instant::now();
        let child = command
            .kill_on_drop(true)
            .spawn()
            .expect("roomwarden starts");
        Daemon { child, started }
    }

    async fn speaker(&self, room: &str, identity: &str) -> Speaker {
        let file = include_bytes!("../crates/rehearsal/assets/anna.opus");
        let place = Place {
            url: &self.rooms.url(),
            api_key: self.rooms.api_key(),
            api_secret: self.rooms.api_secret(),
            room,
            identity,
        };
        let recording = Recording::from_ogg(file).expect("recording");
        Speaker::join(place, recording)
            .await
            .expect("speaker joins")
    }

    /// A room with the daemon in it.
    async fn room(&self, name: &str) {
        let made = self
            .api()
            .create_room(name, CreateRoomOptions::default())
            .await;
        made.expect("a room");
        let joined =
            |w: &room::Witness| w.room(name).is_some_and(|room| room.present().count() > 0);
        self.rooms
            .wait_for(joined, LIMIT)
            .await
            .expect("the daemon joins");
    }

    async fn witnessed(&self, condition: impl FnMut(&stt::Witness) -> bool) -> stt::Witness {
        self.stt.wait_for(condition, LIMIT).await.expect("in time")
    }

    async fn streaming(&self, count: usize) {
        let live = |w: &stt::Witness| {
            let live = w
                .streams
                .iter()
                .filter(|s| s.end.is_none() && s.audio_seconds > 0.2);
            live.count() == count
        };
        self.witnessed(live).await;
    }

    async fn end(self) {
        self.rooms.shutdown().await;
        self.stt.shutdown().await;
    }
}

struct Daemon {
    child: Child,
    started: Instant,
}

impl Daemon {
    fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    fn signal(&self, name: &str) {
        let sent = std::process::Command::new("kill")
            .args([format!("-{name}"), self.pid().to_string()])
            .status();
        assert!(sent.expect("kill runs").success());
    }

    async fn exit(mut self) -> i32 {
        let status = tokio::time::timeout(LIMIT, self.child.wait())
            .await
            .expect("it exits");
        status.expect("its status").code().unwrap_or(-1)
    }

    /// Resident memory, in KB.
    fn resident(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("VmRSS");
        let value = line.split_whitespace().nth(1).and_then(|v| v.parse().ok());
        value.expect("a number")
    }

    /// CPU time used so far, in seconds.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("stat");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .expect("fields")
            .split_whitespace()
            .collect();
        let ticks = |n: usize| fields[n].parse::<f64>().expect("ticks");
        (ticks(11) + ticks(12)) / TICKS_PER_SECOND
    }
}

/// Median, 99th percentile and maximum.
fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at =
        |part: f64| times[((times.len() - 1) as f64 * part).round() as usize].as_secs_f64() * 1e3;
    println!(
        "{what:<44} p50 {:7.2} ms   p99 {:7.2} ms   max {:7.2} ms   n {}",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}

// --- The sections ---------------------------------------------------------------------------

async fn idle() {
    let stage = Stage::answering();
    let mut ready = Vec::new();
    let (mut fresh, mut resident) = (0.0_f64, 0.0_f64);
    for n in 0..10 {
        let mut daemon = stage.daemon(&stage.stt.url(), &[]);
        // It has long begun to look for rooms.
        tokio::time::sleep(Duration::from_secs(1)).await;
        fresh = fresh.max(daemon.resident());
        daemon.signal("TERM");
        daemon.exit().await;
        daemon = stage.daemon(&stage.stt.url(), &[]);
        let name = format!("idle-{n}");
        // Ready: it is in the first room.
        stage.room(&name).await;
        ready.push(daemon.started.elapsed());
        stage.api().delete_room(&name).await.expect("deletion");
        let left = |w: &room::Witness| w.live_rooms().count() == 0;
        stage
            .rooms
            .wait_for(left, LIMIT)
            .await
            .expect("the daemon leaves");
        resident = resident.max(daemon.resident());
        daemon.signal("TERM");
        daemon.exit().await;
    }
    print("process start -> in its first room", ready);
    for (when, most) in [("no room yet", fresh), ("after a room", resident)] {
        let what = format!("resident, idle, {when}");
        println!("{what:<44} {:.1} MB", most / 1024.0);
    }
    stage.end().await;
}

async fn open() {
    let stage = Stage::answering();
    let daemon = stage.daemon(&stage.stt.url(), &[]);
    stage.room("open").await;
    let mut times = Vec::new();
    for n in 0..100 {
        let who = format!("p{n}");
        let opened = stage.stt.witness().opened;
        let speaker = stage.speaker("open", &who).await;
        let published = Instant::now();
        stage.witnessed(|w| w.opened > opened).await;
        times.push(published.elapsed());
        speaker.leave().await;
        stage.witnessed(|w| w.open_now == 0).await;
    }
    print("published -> stream open", times);
    daemon.signal("TERM");
    daemon.exit().await;
    stage.end().await;
}

#[derive(Clone, Copy)]
enum Cause {
    Leaves,
    Removed,
    RoomDeleted,
    Vanishes,
}

/// `count` times: somebody speaks in a room in which another stays, until the cause strikes.
async fn strike(stage: &Stage, cause: Cause, count: usize) -> Vec<Duration> {
    let mut times = Vec::new();
    for n in 0..count {
        let (room, who) = (format!("room-{n}"), format!("p{n}"));
        stage.room(&room).await;
        let speaker = stage.speaker(&room, &who).await;
        stage.streaming(1).await;
        let (struck, speaker) = match cause {
            Cause::Leaves => {
                let struck = Instant::now();
                speaker.leave().await;
                (struck, None)
            }
            Cause::Removed => {
                let struck = Instant::now();
                stage
                    .api()
                    .remove_participant(&room, &who)
                    .await
                    .expect("removal");
                (struck, Some(speaker))
            }
            Cause::RoomDeleted => {
                let struck = Instant::now();
                stage.api().delete_room(&room).await.expect("deletion");
                (struck, Some(speaker))
            }
            Cause::Vanishes => {
                let struck = Instant::now();
                stage.rooms.befall(&room, &who, room::Mishap::Vanish).await;
                (struck, Some(speaker))
            }
        };
        let witness = stage.witnessed(|w| w.open_now == 0).await;
        times.push(struck.elapsed());
        let last = witness.streams.last().expect("a stream");
        assert_eq!(last.end, Some(End::Acknowledged));
        if let Some(speaker) = speaker {
            speaker.leave().await;
        }
        // It may be deleted already.
        let _ = stage.api().delete_room(&room).await;
    }
    times
}

async fn close() {
    for (what, cause, count) in [
        ("leaves -> acknowledged", Cause::Leaves, 100),
        ("removed by the API -> acknowledged", Cause::Removed, 100),
        ("room deleted -> acknowledged", Cause::RoomDeleted, 100),
        ("vanishes -> acknowledged", Cause::Vanishes, 5),
    ] {
        let stage = Stage::answering();
        let daemon = stage.daemon(&stage.stt.url(), &[]);
        print(what, strike(&stage, cause, count).await);
        daemon.signal("TERM");
        daemon.exit().await;
        stage.end().await;
    }
}

/// The answer takes 0.4 s: is the last final transcript delivered?
async fn words() {
    let stage = Stage::new(stt::Config::default().close_delay(Duration::from_millis(400)));
    let file = std::env::temp_dir().join(format!("roomwarden-words-{}", std::process::id()));
    let path = file.to_str().expect("a path");
    let daemon = stage.daemon(&stage.stt.url(), &[("ROOMWARDEN__TRANSCRIPTS__FILE", path)]);
    let mut sent = 0;
    for round in 0..10 {
        let room = format!("words-{round}");
        stage.room(&room).await;
        let names: Vec<String> = (0..10).map(|n| format!("p{n}")).collect();
        let speakers = join_all(names.iter().map(|who| stage.speaker(&room, who))).await;
        // Within the first phrase, so that its final result is still to come.
        let speaking = |w: &stt::Witness| {
            w.streams
                .iter()
                .filter(|s| s.end.is_none() && s.audio_seconds > 0.9)
                .count()
                == 10
        };
        stage.witnessed(speaking).await;
        join_all(speakers.into_iter().map(Speaker::leave)).await;
        stage.witnessed(|w| w.open_now == 0).await;
        sent += 10;
    }
    daemon.signal("TERM");
    daemon.exit().await;
    let text = fs::read_to_string(&file).expect("transcripts");
    fs::remove_file(&file).expect("removable");
    let mut said = HashSet::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        said.insert((line["room"].to_string(), line["participant"].to_string()));
    }
    println!(
        "{:<44} {} of {sent} lost",
        "last finals that come 0.4 s late",
        sent - said.len()
    );
    stage.end().await;
}

async fn shutdown() {
    let mut times = Vec::new();
    for _ in 0..5 {
        let stage = Stage::answering();
        let daemon = stage.daemon(&stage.stt.url(), &[]);
        let mut speakers = Vec::new();
        for room in 0..10 {
            let room = format!("room-{room}");
            let names: Vec<String> = (0..10).map(|n| format!("p{n}")).collect();
            speakers.extend(join_all(names.iter().map(|who| stage.speaker(&room, who))).await);
        }
        stage.streaming(100).await;
        let begun = Instant::now();
        daemon.signal("TERM");
        let code = daemon.exit().await;
        times.push(begun.elapsed());
        // The server may see the last end a moment after the exit.
        let witness = stage.witnessed(|w| w.open_now == 0).await;
        let acknowledged = witness
            .streams
            .iter()
            .filter(|s| s.end == Some(End::Acknowledged));
        assert_eq!((code, acknowledged.count(), witness.open_now), (0, 100, 0));
        join_all(speakers.into_iter().map(Speaker::leave)).await;
        stage.end().await;
    }
    print("SIGTERM with 100 streams in 10 rooms -> exit", times);
}

/// From the capture of each packet to its arrival at an STT server that takes Ogg pages apart.
async fn delay() {
    let stage = Stage::answering();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let url = format!("ws://{}", listener.local_addr().expect("address"));
    let arrived: Arc<Mutex<HashMap<u32, Instant>>> = Arc::default();
    let account = arrived.clone();
    let server = tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(take_apart(tcp, account.clone()));
        }
    });
    let daemon = stage.daemon(&url, &[]);
    stage.room("delay").await;
    let captured = numbered_packets(&stage, 1000).await;
    let arrived = std::mem::take(&mut *arrived.lock().expect("no panic"));
    let times: Vec<Duration> = captured
        .iter()
        .filter_map(|(number, at)| Some(arrived.get(number)?.saturating_duration_since(*at)))
        .collect();
    println!(
        "{:<44} {} of {}",
        "packets that arrived",
        times.len(),
        captured.len()
    );
    print("captured -> at the STT server (pages of 40 ms)", times);
    daemon.signal("KILL");
    server.abort();
    stage.end().await;
}

/// Publishes packets that hold their own number, and tells when each was captured.
async fn numbered_packets(stage: &Stage, count: u32) -> HashMap<u32, Instant> {
    let (key, secret) = (stage.rooms.api_key(), stage.rooms.api_secret());
    let grants = VideoGrants {
        room_join: true,
        room: "delay".into(),
        ..Default::default()
    };
    let token = AccessToken::with_api_key(key, secret)
        .with_identity("counter")
        .with_grants(grants)
        .to_jwt()
        .expect("token");
    let joined = Room::connect(&stage.rooms.url(), &token, RoomOptions::default()).await;
    let (room, _events) = joined.expect("the counter joins");
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
    let track = LocalAudioTrack::create_audio_track("m", RtcAudioSource::Native(source.clone()));
    let options = TrackPublishOptions {
        source: TrackSource::Microphone,
        dtx: false,
        red: false,
        ..Default::default()
    };
    let ourselves = room.local_participant();
    let published = ourselves
        .publish_track(LocalTrack::Audio(track), options)
        .await;
    published.expect("published");
    let frame = Duration::from_millis(20);
    let mut pace = tokio::time::interval(frame);
    let mut captured = HashMap::new();
    // The first second is for the stream to open.
    for number in 0..count + 50 {
        pace.tick().await;
        // CELT, 20 ms, one frame; what follows is for nobody's ears.
        let mut packet = vec![0x78];
        packet.extend(number.to_be_bytes());
        if number >= 50 {
            captured.insert(number, Instant::now());
        }
        source
            .capture_encoded(&packet, frame, Some(-30))
            .expect("captured");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _ = room.close().await;
    captured
}

/// The packets on whole Ogg pages (RFC 3533, section 6), each shorter than 255 bytes.
fn packets(mut pages: &[u8]) -> Vec<&[u8]> {
    let mut packets = Vec::new();
    while let Some((header, rest)) = pages.split_at_checked(27) {
        let (sizes, mut body) = rest.split_at(usize::from(header[26]));
        for size in sizes {
            let (packet, after) = body.split_at(usize::from(*size));
            packets.push(packet);
            body = after;
        }
        pages = body;
    }
    packets
}

async fn take_apart(tcp: TcpStream, arrived: Arc<Mutex<HashMap<u32, Instant>>>) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(tcp).await else {
        return;
    };
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(pages) => {
                let now = Instant::now();
                for packet in packets(&pages) {
                    if let [0x78, number @ ..] = packet
                        && let Ok(number) = number.try_into()
                    {
                        let mut arrived = arrived.lock().expect("no panic");
                        arrived.insert(u32::from_be_bytes(number), now);
                    }
                }
            }
            Message::Text(_) => {
                let metadata = r#"{"type":"Metadata","request_id":"r","duration":0.0}"#;
                if socket.send(Message::text(metadata)).await.is_err() {
                    return;
                }
            }
            _ => {}
        }
    }
}

async fn cost() {
    let stage = Stage::answering();
    let daemon = stage.daemon(&stage.stt.url(), &[]);
    let (few, many, seconds) = (10, 60, 20.0);
    let mut speakers = Vec::new();
    let mut figures = Vec::new();
    for count in [few, many] {
        while speakers.len() < count {
            let who = format!("p{}", speakers.len());
            speakers.push(stage.speaker("cost", &who).await);
        }
        stage.streaming(count).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        let before = daemon.cpu();
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        let cpu = (daemon.cpu() - before) / seconds * 100.0;
        figures.push((cpu, daemon.resident()));
    }
    let [(cpu_few, kb_few), (cpu_many, kb_many)] = figures[..] else {
        return;
    };
    let further = (many - few) as f64;
    println!(
        "{:<44} {few}: {cpu_few:.2} % of a core, {:.1} MB   {many}: {cpu_many:.2} %, {:.1} MB",
        "participants who speak, in one room",
        kb_few / 1024.0,
        kb_many / 1024.0
    );
    println!(
        "{:<44} {:.3} % of a core, {:.0} KB",
        "each further one",
        (cpu_many - cpu_few) / further,
        (kb_many - kb_few) / further
    );
    daemon.signal("TERM");
    daemon.exit().await;
    join_all(speakers.into_iter().map(Speaker::leave)).await;
    stage.end().await;
}

// --- The gateway ----------------------------------------------------------------------------

/// What the gateway adds: from 20 ms of audio to the answer of an STT server that answers each message
/// at once, with the gateway and without, in turns.
async fn gateway() {
    const ROUNDS: usize = 3000;
    const KEY: &str = "the-gateways-own-key";
    let stage = Stage::answering();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let provider = format!("ws://{}", listener.local_addr().expect("address"));
    let server = tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = tcp.set_nodelay(true);
            tokio::spawn(answer(tcp));
        }
    });
    // A port that is free now: the daemon's log is not read here.
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = free.local_addr().expect("an address").to_string();
    drop(free);
    let variables = [
        ("ROOMWARDEN__GATEWAY__LISTEN", address.as_str()),
        ("ROOMWARDEN__GATEWAY__TOKEN", KEY),
    ];
    let daemon = stage.daemon(&provider, &variables);
    let query = "model=nova-3&encoding=linear16&sample_rate=16000";
    let connect = |url: String, key: &str| {
        let mut request = url.into_client_request().expect("a request");
        let key = format!("Token {key}").parse().expect("a header's value");
        request.headers_mut().insert("authorization", key);
        connect_async(request)
    };
    let through = async {
        loop {
            let url = format!("ws://{address}/v1/listen?{query}");
            if let Ok((socket, _)) = connect(url, KEY).await {
                return socket;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let through = tokio::time::timeout(LIMIT, through).await;
    let through = through.expect("the gateway takes a client");
    let direct = connect(format!("{provider}/v1/listen?{query}"), "any").await;
    let mut sockets = [direct.expect("a stream").0, through];
    let mut times = [Vec::new(), Vec::new()];
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    for round in 0..2 * ROUNDS {
        pace.tick().await;
        let (socket, times) = (&mut sockets[round % 2], &mut times[round % 2]);
        let begun = Instant::now();
        let audio = Message::binary(vec![0; 640]);
        socket.send(audio).await.expect("sent");
        loop {
            let message = socket.next().await.expect("open").expect("a message");
            if message.is_text() {
                break;
            }
        }
        times.push(begun.elapsed());
    }
    let [direct, through] = times;
    print("audio -> Results, direct", direct);
    print("audio -> Results, through the gateway", through);
    daemon.signal("KILL");
    server.abort();
    stage.end().await;
}

/// Results for each message of audio.
async fn answer(tcp: TcpStream) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(tcp).await else {
        return;
    };
    let results = r#"{"type":"Results","channel_index":[0,1],"start":0.0,"duration":0.02,"is_final":false,"channel":{"alternatives":[{"transcript":"a","confidence":1.0,"words":[]}]}}"#;
    while let Some(Ok(message)) = socket.next().await {
        if message.is_binary() && socket.send(Message::text(results)).await.is_err() {
            return;
        }
    }
}
