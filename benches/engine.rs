//! The WebRTC engine's figures, printed: what a track and a room cost a subscriber, how soon a room
//! is joined and left, how late a packet is. The subscriber is the SDK with the engine's encoded
//! audio, in a process of its own; the room server and those who speak are in this one.
//!
//! `cargo bench --bench engine [-- SECTION...]`, with sections tracks, rooms, join, peers. The goals: of
//! a core 0.08 % a track, 300 KB a room, 40 KB a further track, p99 of a close 5 ms. Peers compares with
//! the genuine libwebrtc, in PyPI's livekit, which tests/run installs.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

use std::{
    fs,
    path::Path,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures_util::{StreamExt, future::join_all};
use livekit::{
    options::TrackPublishOptions,
    prelude::*,
    webrtc::{
        audio_source::{AudioSourceOptions, native::NativeAudioSource},
        audio_stream::native::NativeAudioStream,
        encoded_audio::{self, EncodedAudioStream},
    },
};
use livekit_api::access_token::{AccessToken, VideoGrants};
use rehearsal::{
    room::{Config, Server},
    speaker::{Place, Recording, Speaker as Voice},
};
use roomwarden::room::departure::{self, Left};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{process::Command, task::JoinHandle};

const LIMIT: Duration = Duration::from_secs(60);
/// Before anything is measured: joins and negotiations are over, and so is what they cost.
const SETTLE: Duration = Duration::from_secs(5);
const WINDOW: Duration = Duration::from_secs(20);
const FRAME: Duration = Duration::from_millis(20);
/// What speech in Opus takes at 32 kbit/s.
const PACKET: usize = 80;
const JOINS: usize = 200;
/// How often packets are read: as the engine does if it is told nothing, and as the daemon has it for
/// pages of 40 ms.
const BEATS_MS: [u64; 2] = [20, 40];

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let sections: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match sections[..] {
        [
            how @ ("packets" | "pcm"),
            url,
            key,
            secret,
            beat,
            ref rooms @ ..,
        ] => {
            encoded_audio::read_every(Duration::from_millis(beat.parse().expect("a number")));
            let account = Account { url, key, secret };
            return answer(&subscribe(account, rooms, how == "pcm").await);
        }
        ["join", url, key, secret, room] => {
            return answer(&join(Account { url, key, secret }, room).await);
        }
        _ => {}
    }
    let named = sections.iter().any(|a| !a.starts_with('-'));
    let wanted = |name: &str| !named || sections.contains(&name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores; {}", load());
    for beat in BEATS_MS {
        if wanted("tracks") {
            compare("track", &[&[10], &[100]], beat).await;
        }
        if wanted("rooms") {
            compare("room", &[&[1; 10], &[1; 100]], beat).await;
        }
    }
    if wanted("join") {
        joins().await;
    }
    if wanted("peers") {
        peers().await;
    }
    println!("{}", load());
}

fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let minute = load.split(' ').next().unwrap_or_default();
    format!("load of the last minute {minute}")
}

// --- Those who speak, and the server --------------------------------------------------------------

/// What a client needs to get in.
#[derive(Clone, Copy)]
struct Account<'a> {
    url: &'a str,
    key: &'a str,
    secret: &'a str,
}

impl Account<'_> {
    fn token(self, room: &str, identity: &str) -> String {
        let grants = VideoGrants {
            room_join: true,
            room: room.to_owned(),
            ..Default::default()
        };
        let token = AccessToken::with_api_key(self.key, self.secret)
            .with_identity(identity)
            .with_grants(grants);
        token.to_jwt().expect("token")
    }
}

struct Speaker {
    room: Room,
    voice: JoinHandle<()>,
}

impl Speaker {
    async fn join(account: Account<'_>, name: &str, identity: &str) -> Self {
        let token = account.token(name, identity);
        let mut options = RoomOptions::default();
        options.auto_subscribe = false;
        let joined = Room::connect(account.url, &token, options).await;
        let (room, mut events) = joined.expect("the speaker joins");
        let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
        let track =
            LocalAudioTrack::create_audio_track("m", RtcAudioSource::Native(source.clone()));
        let options = TrackPublishOptions {
            source: TrackSource::Microphone,
            dtx: false,
            red: false,
            ..Default::default()
        };
        let published = room
            .local_participant()
            .publish_track(LocalTrack::Audio(track), options)
            .await;
        published.expect("published");
        let voice = tokio::spawn(async move {
            let mut pace = tokio::time::interval(FRAME);
            loop {
                tokio::select! {
                    _ = pace.tick() => {}
                    Some(_) = events.recv() => continue,
                }
                // CELT, 20 ms, one frame; what follows is for nobody's ears, but says when.
                let mut packet = [0; PACKET];
                packet[0] = 0x78;
                packet[1..9].copy_from_slice(&now().to_be_bytes());
                let captured = source.capture_encoded(&packet, FRAME, Some(-30));
                captured.expect("captured");
            }
        });
        Self { room, voice }
    }

    async fn leave(self) {
        self.voice.abort();
        let _ = self.room.close().await;
    }
}

/// Nanoseconds that two processes agree on.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

struct Stage(Server);

impl Stage {
    fn new() -> Self {
        Self(Server::start(Config::default()).expect("room server"))
    }

    /// Has a subscriber do it, and returns what it measured.
    async fn subscriber<T: DeserializeOwned>(&self, what: &str, arguments: &[String]) -> T {
        let server = &self.0;
        let mut program = Command::new(std::env::current_exe().expect("this program"));
        program
            .args([what, &server.url(), server.api_key(), server.api_secret()])
            .args(arguments);
        Self::figures(program).await
    }

    /// The same on the genuine libwebrtc.
    async fn genuine(&self, rooms: &[String]) -> Heard {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = repository.join(".venv/bin/python");
        assert!(python.exists(), "there is no .venv: tests/run makes it");
        let mut program = Command::new(python);
        program
            .arg(repository.join("tests/clients/hear_rooms.py"))
            .args(rooms)
            .env("LIVEKIT_URL", self.0.url())
            .env("LIVEKIT_API_KEY", self.0.api_key())
            .env("LIVEKIT_API_SECRET", self.0.api_secret());
        Self::figures(program).await
    }

    async fn figures<T: DeserializeOwned>(mut program: Command) -> T {
        let output = program
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the subscriber starts")
            .wait_with_output()
            .await
            .expect("the subscriber runs");
        assert!(output.status.success(), "the subscriber failed");
        serde_json::from_slice(&output.stdout).expect("its figures")
    }
}

/// Two stages of growth; each is the number of speakers in each room.
async fn compare(unit: &str, stages: &[&[usize]; 2], beat_ms: u64) {
    let stage = Stage::new();
    println!("packets read every {beat_ms} ms");
    let (url, key, secret) = (stage.0.url(), stage.0.api_key(), stage.0.api_secret());
    let account = Account {
        url: &url,
        key,
        secret,
    };
    let mut speakers = Vec::new();
    let mut figures = Vec::new();
    for (n, counts) in stages.iter().enumerate() {
        for (room, count) in counts.iter().enumerate() {
            let name = format!("{n}-{room}");
            let names: Vec<_> = (0..*count).map(|n| format!("speaker-{n}")).collect();
            // Few at a time: it is not them that is measured.
            for names in names.chunks(10) {
                let joined = names.iter().map(|who| Speaker::join(account, &name, who));
                speakers.extend(join_all(joined).await);
            }
        }
        let rooms: Vec<_> = (counts.iter().enumerate())
            .map(|(room, count)| format!("{n}-{room}={count}"))
            .collect();
        let arguments = [vec![beat_ms.to_string()], rooms].concat();
        let heard: Heard = stage.subscriber("packets", &arguments).await;
        let (rooms, tracks) = (counts.len(), counts.iter().sum::<usize>());
        heard.print(rooms, tracks);
        figures.push((heard, rooms.max(tracks)));
        join_all(speakers.drain(..).map(Speaker::leave)).await;
    }
    if let [(few, less), (many, more)] = &figures[..] {
        let further = (more - less) as f64;
        println!(
            "{:<44} {:.3} % of a core, {:.0} KB, {:.1} descriptors\n",
            format!("each further {unit}"),
            (many.cpu - few.cpu) / further,
            (many.resident - few.resident) / further,
            (many.descriptors - few.descriptors) / further,
        );
    }
    stage.0.shutdown().await;
}

/// Ten voices in one room, and one in each of ten, heard by this engine and by the genuine one.
async fn peers() {
    let stage = Stage::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/rehearsal/assets/brian.opus");
    let recording = fs::read(file).expect("the recording");
    let recording = Recording::from_ogg(&recording).expect("a recording");
    for counts in [&[10][..], &[1; 10]] {
        let rooms: Vec<_> = (counts.iter().enumerate())
            .map(|(room, count)| format!("{}-{room}={count}", counts.len()))
            .collect();
        let mut speakers = Vec::new();
        for room in &rooms {
            let (name, count) = room.split_once('=').expect("name=tracks");
            for who in 0..count.parse().expect("a number") {
                let identity = format!("speaker-{who}");
                let place = Place {
                    url: &stage.0.url(),
                    api_key: stage.0.api_key(),
                    api_secret: stage.0.api_secret(),
                    room: name,
                    identity: &identity,
                };
                let joined = Voice::join(place, recording.clone()).await;
                speakers.push(joined.expect("the speaker joins"));
            }
        }
        let beat = |ms: u64| [vec![ms.to_string()], rooms.clone()].concat();
        let [a, b] = BEATS_MS.map(beat);
        let heard: [(&str, Heard); 4] = [
            (
                "genuine libwebrtc, PCM, in Python",
                stage.genuine(&rooms).await,
            ),
            ("this engine, PCM", stage.subscriber("pcm", &a).await),
            (
                "this engine, packets",
                stage.subscriber("packets", &a).await,
            ),
            (
                "this engine, packets every 40 ms",
                stage.subscriber("packets", &b).await,
            ),
        ];
        println!("{} rooms x {} voices", counts.len(), counts[0]);
        let genuine = &heard[0].1;
        for (what, heard) in &heard {
            let sound = heard.frames as f64 / 10.0 + heard.packets as f64 / 50.0;
            let voices = counts.iter().sum::<usize>() as f64;
            let share = sound / voices / WINDOW.as_secs_f64();
            assert!((0.9..1.1).contains(&share), "{what}: heard {share} of it");
            println!(
                "  {what:<42} {:6.2} % of a core (1/{:.0}), {:6.1} MB (1/{:.1})",
                heard.cpu,
                genuine.cpu / heard.cpu,
                heard.resident / 1024.0,
                genuine.resident / heard.resident,
            );
        }
        join_all(speakers.into_iter().map(Voice::leave)).await;
    }
    stage.0.shutdown().await;
}

async fn joins() {
    let stage = Stage::new();
    let (url, key, secret) = (stage.0.url(), stage.0.api_key(), stage.0.api_secret());
    let speaker = Speaker::join(
        Account {
            url: &url,
            key,
            secret,
        },
        "room",
        "speaker",
    )
    .await;
    let stays: Stays = stage.subscriber("join", &["room".to_owned()]).await;
    speaker.leave().await;
    print("join (Room::connect)", stays.join);
    print("join -> first packet", stays.first);
    print("leave, others depart first", stays.leave);
    print("leave, Room::close alone", stays.close);
    stage.0.shutdown().await;
}

/// Median, 99th percentile and maximum of what was measured in microseconds.
fn print(what: &str, mut times: Vec<u32>) {
    times.sort_unstable();
    let at = |part: f64| {
        let index = (times.len().saturating_sub(1) as f64 * part).round() as usize;
        f64::from(times.get(index).copied().unwrap_or(0)) / 1e3
    };
    println!(
        "{what:<44} p50 {:7.2} ms   p99 {:7.2} ms   max {:7.2} ms   n {}",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}

// --- The subscriber: in a process of its own ----------------------------------------------------

fn answer(figures: &impl Serialize) {
    println!("{}", serde_json::to_string(figures).expect("JSON"));
}

/// Of a subscriber that stays for a while. Times are in microseconds.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Heard {
    /// In percent of a core.
    cpu: f64,
    /// In KB.
    resident: f64,
    descriptors: f64,
    packets: u64,
    /// Of PCM, 100 ms each.
    frames: u64,
    missing: u64,
    dropped: u64,
    join: Vec<u32>,
    leave: Vec<u32>,
    since_sent: Vec<u32>,
    since_arrived: Vec<u32>,
}

impl Heard {
    fn print(self: &Heard, rooms: usize, tracks: usize) {
        println!(
            "{:<44} {:.2} % of a core ({:.3} % a track), {:.1} MB, {} descriptors",
            format!("{rooms} x {} tracks", tracks / rooms),
            self.cpu,
            self.cpu / tracks as f64,
            self.resident / 1024.0,
            self.descriptors,
        );
        println!(
            "{:<44} {} ({:.1} a second and track), {} missing, {} dropped",
            "  packets",
            self.packets,
            self.packets as f64 / WINDOW.as_secs_f64() / tracks as f64,
            self.missing,
            self.dropped
        );
        print(
            "  captured by the sender -> consumer",
            self.since_sent.clone(),
        );
        print(
            "  arrived at the socket -> consumer",
            self.since_arrived.clone(),
        );
        print("  join (Room::connect), one by one", self.join.clone());
        print("  leave, one by one", self.leave.clone());
    }
}

fn micros(since: Duration) -> u32 {
    u32::try_from(since.as_micros()).unwrap_or(u32::MAX)
}

/// CPU time of this process so far, in seconds.
fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Resident memory of this process, in KB.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"));
    let value = line.and_then(|line| line.split_whitespace().next());
    value.and_then(|kb| kb.parse().ok()).expect("VmRSS")
}

/// Set while it is measured.
type Measured = Mutex<Option<Heard>>;

/// Hears every track of every room (`name=tracks`) for a while.
async fn subscribe(account: Account<'_>, rooms: &[&str], pcm: bool) -> Heard {
    departure::install();
    let heard: Arc<Measured> = Arc::default();
    let subscribed = Arc::new(AtomicUsize::new(0));
    let (mut joined, mut join, mut expected) = (Vec::new(), Vec::new(), 0);
    for room in rooms {
        let (name, tracks) = room.split_once('=').expect("name=tracks");
        expected += tracks.parse::<usize>().expect("a number");
        let token = account.token(name, "subscriber");
        let begun = Instant::now();
        let connected = Room::connect(account.url, &token, RoomOptions::default()).await;
        let (room, mut events) = connected.expect("the subscriber joins");
        join.push(micros(begun.elapsed()));
        let room = Arc::new(room);
        departure::attach(&room);
        joined.push(room);
        let (heard, subscribed) = (heard.clone(), subscribed.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let RoomEvent::TrackSubscribed {
                    track: RemoteTrack::Audio(track),
                    ..
                } = event
                {
                    subscribed.fetch_add(1, Ordering::Relaxed);
                    match pcm {
                        true => tokio::spawn(listen(track, heard.clone())),
                        false => tokio::spawn(hear(track, heard.clone())),
                    };
                }
            }
        });
    }
    let begun = Instant::now();
    while subscribed.load(Ordering::Relaxed) < expected {
        assert!(begun.elapsed() < LIMIT, "not all tracks came");
        tokio::time::sleep(FRAME).await;
    }
    tokio::time::sleep(SETTLE).await;

    let descriptors = fs::read_dir("/proc/self/fd").expect("descriptors").count() as f64;
    let (resident, before, begun) = (resident(), cpu(), Instant::now());
    *locked(&heard) = Some(Heard::default());
    tokio::time::sleep(WINDOW).await;
    let cpu = (cpu() - before) / begun.elapsed().as_secs_f64() * 100.0;
    let measured = locked(&heard).take().expect("it was set");

    let mut leave = Vec::new();
    for room in &joined {
        let begun = Instant::now();
        let left = departure::leave(room, begun + LIMIT).await;
        leave.push(micros(begun.elapsed()));
        assert_eq!(left, Left::Closed);
    }
    Heard {
        cpu,
        resident,
        descriptors,
        join,
        leave,
        ..measured
    }
}

async fn listen(track: RemoteAudioTrack, heard: Arc<Measured>) {
    let mut stream = NativeAudioStream::new(track.rtc_track(), 48_000, 1);
    let mut samples = 0;
    while let Some(frame) = stream.next().await {
        samples += u64::from(frame.samples_per_channel);
        if let Some(heard) = &mut *locked(&heard) {
            heard.frames += samples / 4_800;
            samples %= 4_800;
        }
    }
}

async fn hear(track: RemoteAudioTrack, heard: Arc<Measured>) {
    let mut stream = EncodedAudioStream::new(&track.rtc_track(), 250);
    let mut dropped = 0;
    while let Some(frame) = stream.next().await {
        let dropped_before = std::mem::replace(&mut dropped, stream.dropped());
        if let Some(heard) = &mut *locked(&heard) {
            heard.packets += 1;
            heard.missing += u64::from(frame.missing);
            heard.dropped += dropped - dropped_before;
            heard
                .since_arrived
                .push(micros(frame.received_at.elapsed()));
            let sent = sent(&frame.payload).expect("a speaker's packet");
            let late = now().saturating_sub(sent);
            heard.since_sent.push(micros(Duration::from_nanos(late)));
        }
    }
}

/// When a packet was captured, if it is one of our speakers'.
fn sent(packet: &[u8]) -> Option<u64> {
    let time = packet.get(1..9)?.try_into().ok()?;
    Some(u64::from_be_bytes(time))
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of many short stays, in microseconds.
#[derive(Default, Serialize, Deserialize)]
struct Stays {
    join: Vec<u32>,
    first: Vec<u32>,
    leave: Vec<u32>,
    close: Vec<u32>,
}

async fn join(account: Account<'_>, name: &str) -> Stays {
    departure::install();
    let mut stays = Stays::default();
    for n in 0..JOINS {
        let token = account.token(name, "subscriber");
        let begun = Instant::now();
        let connected = Room::connect(account.url, &token, RoomOptions::default()).await;
        let (room, mut events) = connected.expect("the subscriber joins");
        stays.join.push(micros(begun.elapsed()));
        let track = loop {
            if let RoomEvent::TrackSubscribed {
                track: RemoteTrack::Audio(track),
                ..
            } = events.recv().await.expect("a track")
            {
                break track;
            }
        };
        let mut stream = EncodedAudioStream::new(&track.rtc_track(), 8);
        stream.next().await.expect("a packet");
        stays.first.push(micros(begun.elapsed()));
        let room = Arc::new(room);
        let begun = Instant::now();
        if n % 2 == 0 {
            let left = departure::leave(&room, begun + LIMIT).await;
            stays.leave.push(micros(begun.elapsed()));
            assert_eq!(left, Left::Closed);
        } else {
            room.close().await.expect("closed");
            stays.close.push(micros(begun.elapsed()));
        }
    }
    stays
}
