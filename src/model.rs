//! A reference model of sessions and registry, and the real ones run against it: random events, by
//! seed, on a paused clock, with a provider in memory whose behaviour is random as well and which
//! keeps an account of its own.
//!
//! ROOMWARDEN_MODEL_SEEDS sets how many seeds are run (default 300), ROOMWARDEN_MODEL_SEED one to
//! run alone. A seed that fails is printed; it goes to tests/model/seeds.txt.

#![allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fastrand::Rng;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, DuplexStream},
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{ErrorResponse, Request, Response},
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::{
    close::{CloseOrder, now, order},
    config::Config,
    domain::{CloseReason, Outcome, Phase},
    ledger::{Ledger, Settled},
    registry::{OpenStream, Registry},
    session::{self, Command, Context, Packet, Packets, Settings, Stt, Track},
    stt::{
        connect::{InMemory, Provider},
        gate::{Gate, Limits},
    },
    transcripts::Sinks,
};

/// What a machine without load may take between two things that happen at the same instant of the
/// paused clock.
const SLACK: Duration = Duration::from_millis(50);
const MAX_SESSIONS: usize = 4;
const MAX_TRACKS: usize = 2;
/// 20 ms of CELT.
const FRAME: [u8; 4] = [0x78, 1, 2, 3];
/// Its level, in dBov.
const SPEECH: i8 = -20;
const METADATA: &str = r#"{"type":"Metadata","request_id":"r","duration":0.0}"#;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

// --- The provider ---------------------------------------------------------------------------

/// What the provider does to one connection, drawn when it comes.
#[derive(Debug, Clone, Copy)]
enum Handshake {
    Accept(Duration),
    Refuse { retry_after: Option<u64> },
    Hang,
    Cut(Duration),
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    After(Duration),
    Never,
    /// Ends the connection instead.
    Cut,
}

#[derive(Debug, Clone, Copy)]
enum Mishap {
    Cut,
    Close1011,
    /// Neither reads nor writes any more, and keeps the connection.
    Stall,
}

#[derive(Debug, Clone, Copy)]
struct Behaviour {
    handshake: Handshake,
    answer: Answer,
    mishap: Option<(Duration, Mishap)>,
}

impl Behaviour {
    fn draw(rng: &mut Rng) -> Self {
        let handshake = match rng.u32(0..10) {
            0 => Handshake::Hang,
            1 => Handshake::Refuse {
                retry_after: rng.bool().then(|| rng.u64(1..4)),
            },
            2 => Handshake::Cut(ms(rng.u64(0..300))),
            _ => Handshake::Accept(ms(rng.u64(0..800))),
        };
        let answer = match rng.u32(0..6) {
            0 => Answer::Never,
            1 => Answer::Cut,
            _ => Answer::After(ms(rng.u64(0..3000))),
        };
        let mishap = (rng.u32(0..3) == 0).then(|| {
            let what = *rng
                .choice(&[Mishap::Cut, Mishap::Close1011, Mishap::Stall])
                .expect("there are some");
            (ms(rng.u64(0..8000)), what)
        });
        Self {
            handshake,
            answer,
            mishap,
        }
    }
}

/// The provider's own account of a connection.
#[derive(Debug, Clone)]
struct Seen {
    #[expect(dead_code, reason = "said when a seed fails")]
    behaviour: Behaviour,
    accepted: bool,
    close_asked: bool,
    /// The answer to CloseStream was sent, and the websocket closed by both.
    acknowledged: bool,
    /// It ended the connection by itself, or stopped taking part.
    misbehaved: bool,
    /// It is not looking, so the connection may have ended.
    away: bool,
    ended: bool,
}

type Account = Arc<Mutex<Vec<Seen>>>;
/// Enters a change into the account of one connection.
type Note<'a> = dyn Fn(&dyn Fn(&mut Seen)) + Sync + 'a;

async fn provide(
    mut connections: mpsc::UnboundedReceiver<DuplexStream>,
    account: Account,
    mut rng: Rng,
) {
    let mut serving = JoinSet::new();
    while let Some(connection) = connections.recv().await {
        let behaviour = Behaviour::draw(&mut rng);
        let mut seen = account.lock().expect("no panic");
        seen.push(Seen {
            behaviour,
            accepted: false,
            close_asked: false,
            acknowledged: false,
            misbehaved: false,
            away: false,
            ended: false,
        });
        let id = seen.len() - 1;
        drop(seen);
        let account = account.clone();
        serving.spawn(async move {
            let note =
                |change: &dyn Fn(&mut Seen)| change(&mut account.lock().expect("no panic")[id]);
            serve(id, connection, behaviour, &note).await;
            note(&|seen| seen.ended = true);
        });
    }
}

async fn serve(id: usize, mut connection: DuplexStream, behaviour: Behaviour, note: &Note<'_>) {
    let refusal = match behaviour.handshake {
        Handshake::Accept(delay) => {
            be_away(delay, note).await;
            None
        }
        Handshake::Refuse { retry_after } => Some(retry_after),
        Handshake::Cut(delay) => return be_away(delay, note).await,
        Handshake::Hang => {
            let mut taken = [0; 1024];
            while connection.read(&mut taken).await.is_ok_and(|n| n > 0) {}
            return;
        }
    };
    #[allow(clippy::result_large_err, reason = "the library's own type")]
    let decide = |_: &Request, mut response: Response| match refusal {
        None => {
            let id = id.to_string().parse().expect("a number");
            response.headers_mut().insert("dg-request-id", id);
            Ok(response)
        }
        Some(retry_after) => {
            let mut refused = ErrorResponse::new(None);
            *refused.status_mut() =
                tokio_tungstenite::tungstenite::http::StatusCode::TOO_MANY_REQUESTS;
            if let Some(seconds) = retry_after {
                refused.headers_mut().insert("retry-after", seconds.into());
            }
            Err(refused)
        }
    };
    let Ok(mut socket) = accept_hdr_async(connection, decide).await else {
        return;
    };
    note(&|seen| seen.accepted = true);
    let mishap_at = behaviour.mishap.map(|(after, _)| now() + after);
    loop {
        let message = tokio::select! {
            message = socket.next() => message,
            () = sleep_until(mishap_at) => {
                note(&|seen| seen.misbehaved = true);
                match behaviour.mishap.map(|(_, mishap)| mishap) {
                    Some(Mishap::Close1011) => {
                        let frame = CloseFrame { code: CloseCode::Error, reason: "NET-0000".into() };
                        let _ = socket.close(Some(frame)).await;
                        while socket.next().await.is_some_and(|message| message.is_ok()) {}
                    }
                    Some(Mishap::Stall) => {
                        tokio::time::sleep(ms(120_000)).await;
                        while socket.next().await.is_some_and(|message| message.is_ok()) {}
                    }
                    Some(Mishap::Cut) | None => {}
                }
                return;
            }
        };
        let Some(Ok(message)) = message else {
            return;
        };
        if message
            .to_text()
            .is_ok_and(|text| text.contains("CloseStream"))
        {
            note(&|seen| seen.close_asked = true);
            match behaviour.answer {
                Answer::Never => {}
                Answer::Cut => {
                    note(&|seen| seen.misbehaved = true);
                    return;
                }
                Answer::After(delay) => {
                    be_away(delay, note).await;
                    if acknowledge(&mut socket).await {
                        note(&|seen| seen.acknowledged = true);
                    }
                    return;
                }
            }
        }
    }
}

async fn be_away(delay: Duration, note: &Note<'_>) {
    note(&|seen| seen.away = true);
    tokio::time::sleep(delay).await;
    note(&|seen| seen.away = false);
}

/// Metadata and the close handshake; whether the client completed it.
async fn acknowledge(socket: &mut WebSocketStream<DuplexStream>) -> bool {
    // A client that gave up while nobody looked has said so; audio may still be before that.
    while let Some(message) = socket.next().now_or_never() {
        if message.is_none_or(|message| message.map_or(true, |message| message.is_close())) {
            return false;
        }
    }
    if socket.send(Message::text(METADATA)).await.is_err() {
        return false;
    }
    let frame = CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    if socket.close(Some(frame)).await.is_err() {
        return false;
    }
    let mut answered = false;
    while let Some(Ok(message)) = socket.next().await {
        answered |= message.is_close();
    }
    answered
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

// --- The world ------------------------------------------------------------------------------

/// A participant's track, as the room would bring it: a packet every 20 ms while somebody talks.
struct Microphone {
    talking: watch::Sender<bool>,
    muted: Arc<AtomicBool>,
    /// Dropped, the track ends.
    _here: watch::Sender<()>,
}

impl Microphone {
    fn new(sid: &str) -> (Self, Track) {
        let (talking, listening) = watch::channel(false);
        let (here, ended) = watch::channel(());
        let muted = Arc::new(AtomicBool::new(false));
        let (same, begun) = (muted.clone(), now());
        let packets = move || -> Packets {
            let state = (listening.clone(), ended.clone(), begun);
            Box::pin(futures_util::stream::unfold(state, next_packet))
        };
        let track = Track {
            sid: sid.to_owned(),
            packets: Box::new(packets),
            muted: Box::new(move || same.load(Ordering::Relaxed)),
            priority: Box::new(|| 0),
        };
        (
            Self {
                talking,
                muted,
                _here: here,
            },
            track,
        )
    }
}

type PacketState = (watch::Receiver<bool>, watch::Receiver<()>, Instant);

async fn next_packet((mut talking, mut here, begun): PacketState) -> Option<(Packet, PacketState)> {
    tokio::select! {
        _ = here.changed() => return None,
        spoken = talking.wait_for(|talking| *talking) => { spoken.ok()?; }
    }
    tokio::select! {
        _ = here.changed() => return None,
        () = tokio::time::sleep(ms(20)) => {}
    }
    let received_at = now();
    let at = received_at.saturating_duration_since(begun).as_millis() as u64;
    let packet = Packet {
        payload: FRAME.into(),
        timestamp: (at * 48) as u32,
        sequence: at,
        level: Some(SPEECH),
        received_at,
    };
    Some((packet, (talking, here, begun)))
}

/// A session under test, with what the model knows of it.
struct Live {
    name: String,
    commands: Option<mpsc::Sender<Command>>,
    orders: watch::Sender<Option<CloseOrder>>,
    task: AbortHandle,
    dead: bool,
    tracks: BTreeMap<String, Expected>,
    made: usize,
}

impl Live {
    fn end_tracks(&mut self, by: Instant) {
        self.tracks.values_mut().for_each(|track| track.end(by));
    }
}

/// What the model says of a track.
struct Expected {
    microphone: Option<Microphone>,
    /// When it must have no stream any more; `None` while it is wanted.
    over_by: Option<Instant>,
    /// When that was last said.
    ended_at: Option<Instant>,
    /// Since when it has talked without a break, unmuted.
    talking_since: Option<Instant>,
}

impl Expected {
    /// The earliest end holds. Of two in the same moment only one may be heard: the strongest.
    fn end(&mut self, by: Instant) {
        let same_moment = self.ended_at == Some(now());
        self.over_by = Some(match self.over_by {
            None => by,
            Some(other) if same_moment => other.max(by),
            Some(other) => other.min(by),
        });
        self.ended_at = Some(now());
        self.talking_since = None;
    }
}

struct World {
    registry: Registry,
    context: Arc<Context>,
    account: Account,
    sessions: Vec<Live>,
    tasks: JoinSet<()>,
    rng: Rng,
    made: usize,
    started: Instant,
    /// How many streams were tried, and when the last.
    last_try: (usize, Instant),
    /// Receipts of each track, and when the last was first seen.
    settled: BTreeMap<String, (usize, Instant)>,
    log: Vec<String>,
}

fn config(rng: &mut Rng) -> Config {
    let mut config = Config::for_tests();
    config.stt.connect_timeout_ms = 1000;
    config.stt.close_grace_ms = rng.u64(500..5000);
    config.stt.idle_after_ms = [0, 1500][rng.usize(0..2)];
    config.stt.park_after_ms = [0, 1000][rng.usize(0..2)];
    config.stt.read_timeout_ms = 3000;
    config.stt.write_timeout_ms = 3000;
    config.stt.retry_first_ms = 100;
    config.stt.retry_most_ms = 1000;
    config
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        // Jitter of the code under test.
        fastrand::seed(rng.u64(..));
        let config = config(&mut rng);
        let (connect, connections) = mpsc::unbounded_channel();
        let account = Account::default();
        let registry = Registry::new(Ledger::default());
        let provider = Provider::in_memory(&config.stt, InMemory(connect));
        let gate = Gate::new(Limits::new(&config.stt));
        let stt = Stt::new(provider, Settings::new(&config.stt), gate);
        let context = Context {
            room: "r".to_owned(),
            registry: registry.clone(),
            stt: watch::channel(Arc::new(stt)).1,
            sinks: Sinks::default(),
            to_room: None,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(provide(connections, account.clone(), rng.fork()));
        Self {
            registry,
            context: Arc::new(context),
            account,
            sessions: Vec::new(),
            tasks,
            rng,
            made: 0,
            started: now(),
            settled: BTreeMap::new(),
            last_try: (0, now()),
            log: Vec::new(),
        }
    }

    fn say(&mut self, what: String) {
        let at = now().saturating_duration_since(self.started);
        self.log.push(format!("{at:.3?} {what}"));
    }

    /// One random event, in the world and in the model.
    fn happen(&mut self) {
        if self.sessions.len() < MAX_SESSIONS && self.rng.u32(0..4) == 0 {
            return self.join();
        }
        if self.sessions.is_empty() {
            return;
        }
        let n = self.rng.usize(0..self.sessions.len());
        let grace = self.context.stt().settings.close_grace;
        let roll = self.rng.u32(0..20);
        let within = ms(self.rng.u64(0..6000));
        let deadline = now() + within;
        let rng = &mut self.rng;
        let session = &mut self.sessions[n];
        let name = session.name.clone();
        let open = session.orders.borrow().is_none() && session.commands.is_some();
        let did = match roll {
            0..=4 if open && session.tracks.len() < MAX_TRACKS => {
                session.made += 1;
                let sid = format!("{name}-{}", session.made);
                let (microphone, track) = Microphone::new(&sid);
                let talks = rng.u32(0..3) > 0;
                microphone.talking.send_replace(talks);
                let commands = session.commands.as_ref().expect("it is open");
                // A session that was aborted takes nothing.
                if commands.try_send(Command::Add(track)).is_err() {
                    return;
                }
                session.tracks.insert(
                    sid.clone(),
                    Expected {
                        microphone: Some(microphone),
                        over_by: None,
                        ended_at: None,
                        talking_since: talks.then(now),
                    },
                );
                format!("{sid} is published, talking: {talks}")
            }
            0..=14 => {
                let sids: Vec<String> = session.tracks.keys().cloned().collect();
                let Some(sid) = rng.choice(&sids) else {
                    return;
                };
                let expected = session.tracks.get_mut(sid).expect("it is there");
                let Some(microphone) = &expected.microphone else {
                    return;
                };
                let wanted = expected.over_by.is_none();
                match rng.u32(0..8) {
                    0..=3 => {
                        microphone.muted.store(false, Ordering::Relaxed);
                        microphone.talking.send_replace(true);
                        if wanted {
                            expected.talking_since.get_or_insert(now());
                        }
                        format!("{sid} talks")
                    }
                    4 | 5 => {
                        microphone.muted.store(rng.bool(), Ordering::Relaxed);
                        microphone.talking.send_replace(false);
                        expected.talking_since = None;
                        format!("{sid} is silent")
                    }
                    6 => {
                        drop(expected.microphone.take());
                        // One that is closing has its order already.
                        if wanted {
                            expected.end(now() + grace);
                        }
                        format!("{sid} ends")
                    }
                    _ => {
                        let Some(commands) = &session.commands else {
                            return;
                        };
                        let new = CloseOrder {
                            reason: CloseReason::TrackEnded,
                            deadline,
                        };
                        // An ordered or aborted session closes all the same.
                        if commands.try_send(Command::Remove(sid.clone(), new)).is_ok() && open {
                            expected.end(deadline);
                        }
                        format!("{sid} is removed within {within:?}")
                    }
                }
            }
            15 | 16 => {
                let new = CloseOrder {
                    reason: CloseReason::ParticipantLeft("client_initiated".into()),
                    deadline,
                };
                order(&session.orders, &new);
                if !session.dead {
                    session.end_tracks(deadline);
                }
                format!("{name} leaves within {within:?}")
            }
            17 => {
                if session.commands.take().is_none() {
                    return;
                }
                // One that was told to close no longer looks.
                if open {
                    session.end_tracks(now() + grace);
                }
                format!("{name} is forgotten")
            }
            18 => {
                session.task.abort();
                session.dead = true;
                session.commands = None;
                // A stream that had its order keeps it; it may not have got there yet.
                for track in session.tracks.values_mut() {
                    let by = track.over_by.unwrap_or(now()).max(now() + grace);
                    (track.over_by, track.talking_since) = (Some(by), None);
                }
                format!("{name} dies")
            }
            _ => return,
        };
        self.say(did);
    }

    fn join(&mut self) {
        self.made += 1;
        let name = format!("p{}", self.made);
        let (commands, received) = mpsc::channel(16);
        let (orders, ordered) = watch::channel(None);
        let board = self.context.registry.board();
        let card = board.room(&self.context.room, "us").session(&name, &name);
        let life = session::run(self.context.clone(), name.clone(), card, received, ordered);
        let task = self.tasks.spawn(life);
        self.say(format!("{name} joins"));
        self.sessions.push(Live {
            name,
            commands: Some(commands),
            orders,
            task,
            dead: false,
            tracks: BTreeMap::new(),
            made: 0,
        });
    }

    /// What must hold at any time.
    fn check(&mut self) {
        let open = self.registry.open();
        let receipts = self.registry.ledger().receipts();
        let settings = self.context.stt().settings.clone();
        let tried = receipts.len() + open.len();
        if self.last_try.0 < tried {
            self.last_try = (tried, now());
        }
        for track in self.sessions.iter().flat_map(|session| &session.tracks) {
            let (sid, expected) = track;
            let of_it: Vec<&OpenStream> = open.iter().filter(|o| &o.key.track == sid).collect();
            assert!(of_it.len() <= 1, "{sid} has several streams: {of_it:#?}");
            if expected.over_by.is_some_and(|by| by + SLACK < now()) {
                assert!(of_it.is_empty(), "{sid} should be over: {of_it:#?}");
            }
            // Who talks has a stream, or one is tried for again and again. The longest pause is
            // that of a close by a provider that does not answer, and one that was asked for; after
            // trouble another stream must have been connected and have proven good, or not.
            let patience = settings.retry_most + settings.close_grace + ms(9000) + SLACK;
            if let Some(since) = expected.talking_since {
                let count = receipts.iter().filter(|r| &r.key.track == sid).count();
                let settled = self.settled.entry(sid.clone()).or_insert((count, since));
                if settled.0 < count {
                    *settled = (count, now());
                }
                // One may wait for the others, while somebody tries.
                let last = since.max(settled.1).max(self.last_try.1);
                assert!(
                    !of_it.is_empty() || last + patience > now(),
                    "{sid} talks since {since:?} and has had no stream since {settled:?}"
                );
            }
        }
        let held = {
            let account = self.account.lock().expect("no panic");
            account
                .iter()
                .filter(|seen| !seen.ended && !seen.misbehaved && !seen.away)
                .count()
        };
        assert!(
            held <= open.len(),
            "{held} connections, {} on the books",
            open.len()
        );
        // Who is over, and known to be so, is not looked at again.
        self.sessions.retain(|session| {
            let over = |t: &Expected| t.over_by.is_some_and(|by| by + SLACK < now());
            !(session.task.is_finished() && session.tracks.values().all(over))
        });
    }

    /// The daemon's close, and what must hold after it.
    async fn end(mut self) {
        self.registry.seal();
        let within = ms(self.rng.u64(500..6000));
        let mut order_all = CloseOrder {
            reason: CloseReason::Shutdown("SIGTERM".into()),
            deadline: now() + within,
        };
        self.say(format!("everything is to be over within {within:?}"));
        for session in &self.sessions {
            order(&session.orders, &order_all);
        }
        if self.rng.bool() {
            tokio::time::sleep(ms(self.rng.u64(0..1000))).await;
            let hurry = ms(self.rng.u64(0..500));
            order_all.deadline = order_all.deadline.min(now() + hurry);
            self.say(format!("hurry: within {hurry:?}"));
        }
        self.registry.close_all(&order_all);
        let over_by = order_all.deadline.max(now()) + SLACK;
        let drained = tokio::time::timeout_at(over_by.into(), self.registry.drained()).await;
        assert!(drained.is_ok(), "still open: {:#?}", self.registry.open());
        // Stalled connections are looked at by the provider once more after two minutes.
        tokio::time::sleep(ms(130_000)).await;
        let account = self.account.lock().expect("no panic").clone();
        let receipts = self.registry.ledger().receipts();
        let counts = self.registry.ledger().counts();
        assert_eq!(counts.opened, counts.acknowledged + counts.other_outcomes());
        assert_eq!(receipts.len() as u64, counts.opened + counts.never_opened);
        for (id, seen) in account.iter().enumerate() {
            assert!(seen.ended, "connection {id} is still there: {seen:?}");
            let id = id.to_string();
            let of_it = |r: &&Arc<Settled>| r.totals.request_id.as_deref() == Some(&id);
            let found: Vec<_> = receipts.iter().filter(of_it).collect();
            if seen.accepted {
                // Given up on in the very moment of the answer, its id was never heard.
                let [receipt] = found[..] else {
                    let given_up = receipts.iter().any(|r| {
                        r.outcome
                            == Outcome::TimedOut {
                                phase: Phase::Connecting,
                            }
                    });
                    assert!(
                        found.is_empty() && given_up,
                        "{id}: {seen:?} has {found:#?}"
                    );
                    continue;
                };
                assert!(
                    seen.explains(&receipt.outcome),
                    "{id}: {seen:?} has {receipt:#?}"
                );
            }
        }
        let acknowledged = account.iter().filter(|seen| seen.acknowledged).count() as u64;
        assert!(counts.acknowledged <= acknowledged, "{counts:?}");
    }
}

impl Seen {
    /// Whether a stream that was accepted may have this outcome.
    fn explains(&self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Acknowledged => self.acknowledged,
            // Answered in the very moment of the deadline.
            Outcome::TimedOut {
                phase: Phase::AwaitingEnd,
            } => true,
            Outcome::TimedOut { .. } => !self.acknowledged,
            Outcome::PeerGone { .. } => self.misbehaved,
            Outcome::NeverOpened { .. } => false,
        }
    }
}

/// Runs one seed; what it says when it fails.
fn run(seed: u64) -> Result<usize, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("runtime");
    let log = Arc::new(Mutex::new(Vec::new()));
    let kept = log.clone();
    let run = std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async move {
            let mut world = World::new(seed);
            let events = world.rng.u32(5..60);
            for _ in 0..events {
                world.happen();
                *kept.lock().expect("no panic") = world.log.clone();
                let pause = ms([0, 0, 1, 10, 100, 1000, 4000][world.rng.usize(0..7)]);
                tokio::time::sleep(pause).await;
                world.check();
            }
            let account = world.account.clone();
            world.end().await;
            account.lock().expect("no panic").len()
        })
    });
    std::panic::catch_unwind(run).map_err(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let log = log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        format!(
            "seed {seed}: {}\n{}",
            said.unwrap_or_default(),
            log.join("\n")
        )
    })
}

#[test]
fn the_real_ones_do_what_the_model_says() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let kept = include_str!("../tests/model/seeds.txt");
    let kept = kept.lines().filter_map(|line| line.parse().ok());
    let seeds: Vec<u64> = match number("ROOMWARDEN_MODEL_SEED") {
        Some(seed) => vec![seed],
        None => kept
            .chain(0..number("ROOMWARDEN_MODEL_SEEDS").unwrap_or(300))
            .collect(),
    };
    let mut connections = 0;
    for seed in &seeds {
        match run(*seed) {
            Ok(seen) => connections += seen,
            Err(said) => panic!("{said}"),
        }
    }
    println!("{} seeds, {connections} connections", seeds.len());
}
