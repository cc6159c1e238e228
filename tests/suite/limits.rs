//! A provider that refuses: who is there waits, is told why, and is served when it is over, without
//! a storm of requests. The sessions are real, and so is the STT server; most have no room.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream::unfold;
use rehearsal::stt::{self, CloseWith, ErrorWith, Faults, Reject};
use roomwarden::{
    close::{CloseOrder, order},
    config::SttConfig,
    daemon::Daemon,
    domain::CloseReason,
    ledger::Ledger,
    registry::Registry,
    session::{self, Command, Context, Packet, Settings, Stt, Track},
    stt::{
        connect::Provider,
        gate::{Gate, Limits},
    },
    transcripts::Sinks,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Interval, interval},
};

use crate::stage::{Binary, LIMIT, Stage, stop};

/// 20 ms of silence.
const FRAME: [u8; 3] = [0xf8, 0xff, 0xfe];
const FRAME_TIME: Duration = Duration::from_millis(20);

async fn next_packet(
    (mut ticks, n, frames): (Interval, u32, u32),
) -> Option<(Packet, (Interval, u32, u32))> {
    if n == frames {
        std::future::pending::<()>().await;
    }
    ticks.tick().await;
    let packet = Packet {
        payload: FRAME.into(),
        timestamp: n * 960,
        sequence: n.into(),
        level: None,
        received_at: Instant::now(),
    };
    Some((packet, (ticks, n + 1, frames)))
}

/// Somebody who talks for so long, and then stays.
fn track(number: usize, lasts: Duration) -> Track {
    let frames = (lasts.as_millis() / FRAME_TIME.as_millis()) as u32;
    let packets = move || unfold((interval(FRAME_TIME), 0, frames), next_packet);
    Track {
        sid: format!("TR_{number}"),
        packets: Box::new(move || Box::pin(packets())),
        muted: Box::new(|| false),
        priority: Box::new(|| 0),
    }
}

/// Sessions of one process, without a room: p0, p1 and so on, with a track each.
pub struct Sessions {
    registry: Registry,
    pub gate: Gate,
    orders: watch::Sender<Option<CloseOrder>>,
    tasks: JoinSet<()>,
    commands: Vec<mpsc::Sender<Command>>,
}

impl Sessions {
    pub fn start(config: &SttConfig, count: usize, lasts: Duration) -> Self {
        let tracks = (0..count).map(|number| track(number, lasts));
        Self::of(config, Sinks::default(), tracks)
    }

    pub fn of(config: &SttConfig, sinks: Sinks, tracks: impl Iterator<Item = Track>) -> Self {
        Self::behind(Gate::new(Limits::new(config)), config, sinks, tracks)
    }

    /// Of a room that asks for something of its own.
    pub fn with_own_settings(config: &SttConfig, count: usize, lasts: Duration) -> Self {
        let gate = Gate::new(Limits::new(config)).for_own_settings();
        let tracks = (0..count).map(|number| track(number, lasts));
        Self::behind(gate, config, Sinks::default(), tracks)
    }

    fn behind(
        gate: Gate,
        config: &SttConfig,
        sinks: Sinks,
        tracks: impl Iterator<Item = Track>,
    ) -> Self {
        let registry = Registry::new(Ledger::default());
        let stt = Stt::new(Provider::new(config), Settings::new(config), gate.clone());
        let context = Arc::new(Context {
            room: "none".to_owned(),
            registry: registry.clone(),
            stt: watch::channel(Arc::new(stt)).1,
            sinks,
            to_room: None,
        });
        let (orders, _) = watch::channel(None);
        let (mut tasks, mut all) = (JoinSet::new(), Vec::new());
        for (number, track) in tracks.enumerate() {
            let (commands, received) = mpsc::channel(4);
            let add = commands.try_send(Command::Add(track));
            assert!(add.is_ok());
            all.push(commands);
            let name = format!("p{number}");
            let card = registry.board().room("none", "us").session(&name, &name);
            tasks.spawn(session::run(
                context.clone(),
                name,
                card,
                received,
                orders.subscribe(),
            ));
        }
        Self {
            registry,
            gate,
            orders,
            tasks,
            commands: all,
        }
    }

    pub async fn close(mut self) {
        let reason = CloseReason::Shutdown("test".to_owned());
        let deadline = Instant::now() + LIMIT;
        order(&self.orders, &CloseOrder { reason, deadline });
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic");
        }
        drop(self.commands);
        self.registry.drained().await;
        let standing = self.gate.standing();
        assert_eq!((standing.held, standing.waiting), (0, 0));
    }
}

pub fn quickly(stage: &Stage) -> SttConfig {
    let mut config = stage.config().stt;
    config.retry_first_ms = 100;
    config.retry_most_ms = 1000;
    config
}

/// The provider never sees more than it allows, and everybody who waited had a stream.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_share_five_streams() {
    const PEOPLE: usize = 20;
    for configured in [true, false] {
        let stage = Stage::with(stt::Config::default().max_streams(5)).await;
        let mut config = quickly(&stage);
        config.max_streams = if configured { 5 } else { 0 };
        // Longer than a busy machine keeps anybody from talking on.
        config.idle_after_ms = 5000;
        let sessions = Sessions::start(&config, PEOPLE, Duration::from_secs(2));
        let witness = stage
            .witnessed("everybody had a stream", |w| {
                w.opened == PEOPLE as u64 && w.open_now == 0
            })
            .await;
        assert!(witness.peak <= 5, "{}", witness.peak);
        // Nor did anybody lose what was said while waiting.
        let whole = |stream: &&stt::StreamRecord| stream.audio_seconds > 1.9;
        assert_eq!(witness.streams.iter().filter(whole).count(), PEOPLE);
        let rejections = witness.rejections();
        if configured {
            // Of those who came a moment before the provider had noticed that another had gone.
            assert!(rejections <= PEOPLE as u64, "{rejections}");
        } else {
            // Who comes at first; and now and then one more is tried.
            assert!(rejections <= 3 * PEOPLE as u64, "{rejections}");
        }
        sessions.close().await;
        stage.all_acknowledged(PEOPLE).await;
        stage.end().await;
    }
}

/// A provider that quotes the key, in the answer to a handshake, in an error, and when it closes.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_the_provider_quotes_is_not_repeated() {
    let stage = Stage::new().await;
    let key = stage.stt.api_key();
    let quoted = |what: &str| format!("{what}: {}{key} is wrong", "x".repeat(290 - key.len() / 2));
    let refused = Faults {
        reject_with: Some(Reject::status(503).message(quoted("refused"))),
        handshakes: Some(1),
        ..Default::default()
    };
    let closed = Faults {
        error: Some(ErrorWith {
            description: quoted("error"),
            ..Default::default()
        }),
        close_with: Some(CloseWith {
            code: 1011,
            reason: format!("closed: {key}"),
            after: Duration::from_millis(100),
        }),
        ..Default::default()
    };
    stage.stt.set_faults(refused);
    let quickly = ("ROOMWARDEN__STT__RETRY_MOST_MS", "200");
    let mut binary = Binary::run(&stage, &[quickly, ("RUST_LOG", "trace")]);
    let alice = stage.speaker("r", "alice").await;
    binary.logged("refused: xxx").await;
    stage.stt.set_faults(closed);
    binary.logged("error: xxx").await;
    binary.logged("closed: ***").await;
    stage.stt.set_faults(Faults::default());
    stage.streaming(1).await;
    binary.signal("TERM");
    let (_, mut said) = binary.exit().await;
    for file in std::fs::read_dir(stage.state.path()).expect("readable") {
        let bytes = std::fs::read(file.expect("entry").path()).expect("readable");
        said.push_str(&String::from_utf8_lossy(&bytes));
    }
    // Nor a part of it that a bound has left.
    let part = &key[..key.len() / 2];
    assert!(!said.contains(part), "{said}");
    alice.leave().await;
    stage.end().await;
}

/// What the room is told of the daemon's participant.
async fn told(stage: &Stage) -> [String; 2] {
    let participants = stage.api().list_participants("r").await.expect("a list");
    let us = participants.iter().find(|p| p.identity == "roomwarden");
    let attribute = |name: &str| {
        let attribute = us.and_then(|us| us.attributes.get(name));
        attribute.cloned().unwrap_or_default()
    };
    ["roomwarden.transcription", "roomwarden.message"].map(attribute)
}

async fn until_told(stage: &Stage, what: [&str; 2]) {
    let start = Instant::now();
    while told(stage).await != what {
        assert!(start.elapsed() < LIMIT, "{:?}", told(stage).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_room_is_told_that_the_quota_is_used_up_and_when_it_is_over() {
    let stage = Stage::new().await;
    stage.stt.set_faults(Faults {
        reject_with: Some(Reject::status(402)),
        ..Default::default()
    });
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let paused = "transcription is paused: the account's credit is used up";
    until_told(&stage, ["paused", paused]).await;
    // One each at most, and one for all after a pause.
    assert!(stage.stt.witness().rejected[&402] <= 4);
    stage.stt.set_faults(Faults::default());
    stage.streaming(2).await;
    until_told(&stage, ["", ""]).await;
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(2).await;
    stop(&daemon).await;
    stage.end().await;
}
