//! Many speakers at once: what the room server loses, and what it costs. Prints figures.
//!
//! `cargo run --release -p rehearsal --features speakers --example load [rooms [speakers a room
//! [seconds [rounds]]]]`, by default 10 10 60 1. The server is a process of its own, so that its
//! figures are not those of the clients: speakers, and a listener in each room.

use std::{
    collections::HashMap,
    error::Error,
    process::Stdio,
    time::{Duration, Instant},
};

use livekit::{prelude::*, webrtc::encoded_audio::EncodedAudioStream};
use livekit_api::access_token::{AccessToken, VideoGrants};
use rehearsal::{
    room::{Config, Server},
    speaker::{Place, Recording, Speaker},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::StreamExt;

#[derive(Debug, Default, Clone, Copy)]
struct Heard {
    packets: u64,
    missing: u64,
    /// Dropped because the listener itself was too slow.
    dropped: u64,
}

/// The server's process, and what clients need.
struct Remote {
    child: Child,
    url: String,
    key: String,
    secret: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some(SERVE) {
        return serve().await;
    }
    let mut arguments = std::env::args().skip(1).map(|n| n.parse::<u32>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (rooms, each, seconds, rounds) = (next(10)?, next(10)?, next(60)?, next(1)?);
    let server = Remote::start().await?;
    let recording = Recording::from_ogg(include_bytes!("../assets/catriona.opus"))?;
    println!("                                                           server          clients");
    println!(
        "round  tracks  packets  packets/s/track  missing  dropped  cpu %     MB    cpu %     MB"
    );
    for round in 1..=rounds {
        let mut speakers = Vec::new();
        for room in 0..rooms {
            for n in 0..each {
                let place = Place {
                    url: &server.url,
                    api_key: &server.key,
                    api_secret: &server.secret,
                    room: &format!("room-{room}"),
                    identity: &format!("speaker-{n}"),
                };
                speakers.push(Speaker::join(place, recording.clone()).await?);
            }
        }
        let mut listeners = JoinSet::new();
        for room in 0..rooms {
            let (url, token) = (server.url.clone(), server.token(&format!("room-{room}"))?);
            listeners.spawn(async move {
                listen(&url, &token, each, Duration::from_secs(seconds.into()))
                    .await
                    .map_err(|error| error.to_string())
            });
        }
        let (ours, theirs) = (std::process::id(), server.id());
        let before = (cpu_seconds(theirs), cpu_seconds(ours), Instant::now());
        let mut all = Heard::default();
        let mut tracks = 0;
        while let Some(heard) = listeners.join_next().await {
            for heard in heard?? {
                tracks += 1;
                all.packets += heard.packets;
                all.missing += heard.missing;
                all.dropped += heard.dropped;
            }
        }
        let wall = before.2.elapsed().as_secs_f64();
        let cpu = |process, before| (cpu_seconds(process) - before) / wall * 100.0;
        println!(
            "{round:>5}  {tracks:>6}  {:>7}  {:>15.2}  {:>7}  {:>7}  {:>5.1}  {:>5.1}    {:>5.1}  {:>5.1}",
            all.packets,
            all.packets as f64 / f64::from(seconds) / f64::from(tracks),
            all.missing,
            all.dropped,
            cpu(theirs, before.0),
            resident_mb(theirs),
            cpu(ours, before.1),
            resident_mb(ours),
        );
        for speaker in speakers {
            speaker.leave().await;
        }
    }
    server.end().await
}

/// What the server's process is started with.
const SERVE: &str = "serve";

/// Serves until its standard input ends, if only by the other process's death.
async fn serve() -> Result<(), Box<dyn Error>> {
    let server = Server::start(Config::default())?;
    println!(
        "{} {} {}",
        server.url(),
        server.api_key(),
        server.api_secret()
    );
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    server.shutdown().await;
    Ok(())
}

impl Remote {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(SERVE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("no output")?;
        let line = BufReader::new(output).lines().next_line().await?;
        let line = line.ok_or("the server did not start")?;
        let [url, key, secret] = line.split(' ').collect::<Vec<_>>()[..] else {
            return Err(line.into());
        };
        let [url, key, secret] = [url, key, secret].map(str::to_owned);
        Ok(Self {
            child,
            url,
            key,
            secret,
        })
    }

    fn id(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    fn token(&self, room: &str) -> Result<String, Box<dyn Error>> {
        let grants = VideoGrants {
            room_join: true,
            room: room.to_owned(),
            ..Default::default()
        };
        let token = AccessToken::with_api_key(&self.key, &self.secret)
            .with_identity("listener")
            .with_grants(grants);
        Ok(token.to_jwt()?)
    }

    async fn end(mut self) -> Result<(), Box<dyn Error>> {
        drop(self.child.stdin.take());
        self.child.wait().await?;
        Ok(())
    }
}

/// Hears every track of a room for a while, once all are there.
async fn listen(
    url: &str,
    token: &str,
    tracks: u32,
    time: Duration,
) -> Result<Vec<Heard>, RoomError> {
    let (room, mut events) = Room::connect(url, token, RoomOptions::default()).await?;
    let mut heard = JoinSet::new();
    while heard.len() < tracks as usize
        && let Some(event) = events.recv().await
    {
        if let RoomEvent::TrackSubscribed {
            track: RemoteTrack::Audio(track),
            ..
        } = event
        {
            heard.spawn(count(track, time));
        }
    }
    let all = heard.join_all().await;
    drain(events, &room).await;
    Ok(all)
}

async fn drain(mut events: mpsc::UnboundedReceiver<RoomEvent>, room: &Room) {
    let _ = room.close().await;
    while events.recv().await.is_some() {}
}

async fn count(track: RemoteAudioTrack, time: Duration) -> Heard {
    let mut stream = EncodedAudioStream::new(&track.rtc_track(), 250);
    let mut heard = Heard::default();
    let mut seen: HashMap<u32, u64> = HashMap::new();
    let until = tokio::time::Instant::now() + time;
    while let Ok(Some(frame)) = tokio::time::timeout_at(until, stream.next()).await {
        heard.packets += 1;
        if let Some(last) = seen.insert(frame.ssrc, frame.sequence) {
            heard.missing += frame.sequence.saturating_sub(last + 1);
        }
    }
    heard.dropped = stream.dropped();
    heard
}

/// User and system time of a process.
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // After the name, which may hold blanks: state is field 3, utime 14, stime 15 (proc(5)).
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = |n: usize| -> f64 {
        fields
            .split_whitespace()
            .nth(n - 3)
            .and_then(|t| t.parse().ok())
            .unwrap_or(0.0)
    };
    (ticks(14) + ticks(15)) / 100.0
}

fn resident_mb(process: u32) -> f64 {
    let statm = std::fs::read_to_string(format!("/proc/{process}/statm")).unwrap_or_default();
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0 / 1e6
}
