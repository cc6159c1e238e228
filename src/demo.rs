//! `demo`, `dev` and `rehearsal`: the embedded servers, with the daemon or alone.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anstyle::{AnsiColor, Color, Style};
use clap::Args;
use livekit_api::{
    access_token::{AccessToken, AccessTokenError, VideoGrants},
    services::room::RoomClient,
};
use rehearsal::{
    room, speaker,
    speaker::{Place, Recording, Speaker},
    stt,
};
use serde::Serialize;
use thiserror::Error;

use crate::{
    cli::{self, EXIT_FAILURE, EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE, LAST_LINES},
    close::CloseOrder,
    config::{Config, LogFormat},
    daemon::{Daemon, Report},
    domain::{CloseReason, Outcome, Transcript},
    ledger::Settled,
    lines::LineWriter,
    signals::{self, Ending, SignalSource},
    transcripts::{Sink, Sinks},
};

const ANNA: &[u8] = include_bytes!("../crates/rehearsal/assets/anna.opus");
const BRIAN: &[u8] = include_bytes!("../crates/rehearsal/assets/brian.opus");
const CATRIONA: &[u8] = include_bytes!("../crates/rehearsal/assets/catriona.opus");
const DEXTER: &[u8] = include_bytes!("../crates/rehearsal/assets/dexter.opus");
const EDITH: &[u8] = include_bytes!("../crates/rehearsal/assets/edith.opus");

/// Who speaks where, with which recording.
const CAST: [(&str, &str, &[u8]); 5] = [
    ("standup", "alice", ANNA),
    ("standup", "bob", BRIAN),
    ("standup", "carol", CATRIONA),
    ("support", "dave", DEXTER),
    ("standup", "erin", EDITH),
];
/// For any one step of the story; on a quiet machine each takes well under a tenth.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// How long the STT server is given to see the last connection end.
const WITNESS_LIMIT: Duration = Duration::from_secs(5);
/// Errors only: the story is told on standard output.
const QUIET: &str = "error,livekit=off";
/// The room of `dev`, who its tokens are for, and how long they are good.
const DEV_ROOM: &str = "dev";
const DEV_GUESTS: [&str; 2] = ["ann", "ben"];
const DEV_TOKENS: Duration = Duration::from_secs(12 * 3600);

#[derive(Debug, Error)]
enum DemoError {
    #[error("cannot start the embedded servers: {0}")]
    Server(#[from] io::Error),
    #[error("speaker {who}: {error}")]
    Speaker {
        who: String,
        error: speaker::SpeakerError,
    },
    #[error("the room server refuses: {0}")]
    Api(#[from] livekit_api::services::ServiceError),
    #[error("cannot make a token: {0}")]
    Token(#[from] AccessTokenError),
    #[error("{0}")]
    Config(#[from] crate::config::ConfigError),
    #[error("{what} did not happen within {STEP_LIMIT:?}")]
    Late { what: String },
}

/// Two rooms, five speakers, five ways for a stream to end; the exit code says whether the
/// daemon, the kernel and the STT server agree that every one was closed.
pub async fn demo(json: bool, format: Option<LogFormat>) -> u8 {
    logged(format, async {
        let mut signals = SignalSource::install()?;
        let rooms = room::Server::start(room::Config::default())?;
        let stt = stt::Server::start(stt::Config::default())?;
        let stage = Stage::new(rooms, stt, json)?;
        stage.story.tell(&format!(
            "room server at {}, STT server at {}",
            stage.rooms.url(),
            stage.stt.url()
        ));
        let mut speakers = Speakers::new();
        let play = tell_demo(&stage, &mut speakers);
        let (ending, failure) = stage.run(&mut signals, play).await;
        stage.end(ending, failure, speakers, json).await
    })
    .await
}

/// Options of `roomwarden dev`.
#[derive(Args)]
pub struct DevArgs {
    #[command(flatten)]
    servers: RehearsalArgs,
    /// Simulated speakers in the room, so that something is heard at once
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=100))]
    speakers: u16,
}

/// The two servers and the daemon until SIGINT or SIGTERM, for clients to join.
pub async fn dev(args: DevArgs, format: Option<LogFormat>) -> u8 {
    let (rooms, stt) = match args.servers.configs() {
        Ok(configs) => configs,
        Err(said) => return cli::complain(EXIT_USAGE, &said),
    };
    logged(format, async {
        let mut signals = SignalSource::install()?;
        let (rooms, stt) = (room::Server::start(rooms)?, stt::Server::start(stt)?);
        let mut stage = Stage::new(rooms, stt, false)?;
        stage.others = true;
        stage.story.print(&invitation(&stage)?);
        let mut speakers = Speakers::new();
        let play = async {
            for n in 0..args.speakers.into() {
                let recording = [ANNA, BRIAN, CATRIONA, DEXTER, EDITH][n % 5];
                let who = format!("speaker-{}", n + 1);
                join(&stage, &mut speakers, DEV_ROOM, &who, recording).await?;
            }
            Ok(())
        };
        let (ending, failure) = stage.run(&mut signals, play).await;
        stage.end(ending, failure, speakers, false).await
    })
    .await
}

/// With a log of errors on standard error.
async fn logged(
    format: Option<LogFormat>,
    life: impl Future<Output = Result<u8, DemoError>>,
) -> u8 {
    let log = match cli::log_to_stderr(QUIET, format.unwrap_or(LogFormat::Auto)) {
        Ok(log) => log,
        Err(said) => return cli::complain(EXIT_USAGE, &said),
    };
    let result = life.await;
    log.flush(Instant::now() + LAST_LINES);
    result.unwrap_or_else(|error| cli::complain(EXIT_FAILURE, &error.to_string()))
}

type Speakers = BTreeMap<String, Speaker>;

/// The servers, and a daemon on them.
struct Stage {
    rooms: room::Server,
    stt: stt::Server,
    daemon: Daemon,
    config: Config,
    story: Story,
    /// Whether others than the daemon may open streams, too.
    others: bool,
}

impl Stage {
    fn new(rooms: room::Server, stt: stt::Server, silent: bool) -> Result<Self, DemoError> {
        let config = config(&rooms, &stt)?;
        let story = Story::new(silent)?;
        let sinks = Sinks::new(vec![Box::new(story.clone())]);
        Ok(Self {
            daemon: Daemon::start(config.clone(), sinks),
            rooms,
            stt,
            config,
            story,
            others: false,
        })
    }

    /// Runs until the daemon is closed; if the play fails, that closes it.
    async fn run(
        &self,
        signals: &mut SignalSource,
        play: impl Future<Output = Result<(), DemoError>>,
    ) -> (Ending, Option<DemoError>) {
        let shutdown = &self.config.shutdown;
        let mut failure = None;
        let ending = tokio::select! {
            ending = signals::govern(&self.daemon, signals, signals::nothing_to_reload) => ending,
            never = async {
                if let Err(error) = play.await {
                    failure = Some(error);
                    self.daemon.close(&CloseOrder {
                        reason: CloseReason::Shutdown("the demo failed".into()),
                        deadline: Instant::now() + Duration::from_millis(shutdown.deadline_ms),
                    });
                }
                std::future::pending().await
            } => never,
        };
        (ending, failure)
    }

    /// Compares the accounts, ends the servers, prints the receipts; the exit code.
    async fn end(
        self,
        ending: Ending,
        failure: Option<DemoError>,
        speakers: Speakers,
        json: bool,
    ) -> Result<u8, DemoError> {
        let report = match ending {
            Ending::Closed => self.daemon.closed().await,
            Ending::Abandoned => self.daemon.account(),
        };
        let closed = |witness: &stt::Witness| self.account(&report, witness).witness_open == 0;
        let witness = match self.stt.wait_for(closed, WITNESS_LIMIT).await {
            Ok(witness) | Err(witness) => witness,
        };
        for (_, speaker) in speakers {
            speaker.leave().await;
        }
        let account = self.account(&report, &witness);
        match json {
            true => {
                let mut text = serde_json::to_string_pretty(&account).map_err(io::Error::from)?;
                text.push('\n');
                self.story.print(&text);
            }
            false => self.story.print(&account.table()),
        }
        self.story.flush(Instant::now() + STEP_LIMIT);
        let agree = account.agree;
        self.rooms.shutdown().await;
        self.stt.shutdown().await;
        if let Some(error) = failure {
            return Err(error);
        }
        Ok(match cli::exit_code(&report, ending) {
            EXIT_OK if !agree => EXIT_UNACKNOWLEDGED,
            code => code,
        })
    }

    fn account<'a>(&self, report: &'a Report, witness: &stt::Witness) -> DemoReport<'a> {
        let receipts = report.receipts.iter();
        let ours: BTreeSet<&str> = receipts
            .filter_map(|receipt| receipt.totals.request_id.as_deref())
            .collect();
        let streams: Vec<_> = witness
            .streams
            .iter()
            .filter(|stream| !self.others || ours.contains(stream.request_id.as_str()))
            .collect();
        let count = |condition: fn(&stt::StreamRecord) -> bool| {
            streams.iter().filter(|stream| condition(stream)).count()
        };
        let open = count(|stream| stream.end.is_none());
        let acknowledged = count(|stream| stream.end == Some(stt::End::Acknowledged)) as u64;
        let opened = streams.len() as u64;
        // After very many streams, neither side remembers the first.
        let whole = witness.forgotten == 0 && ours.len() as u64 >= report.opened;
        let agree = report.nothing_left()
            && open == 0
            && report.opened == report.acknowledged
            && (!whole || (opened, acknowledged) == (report.opened, report.acknowledged));
        DemoReport {
            ours: report,
            witness_opened: opened,
            witness_acknowledged: acknowledged,
            witness_open: open,
            agree,
        }
    }
}

/// The daemon's configuration as a user would give it: by environment variables.
fn config(rooms: &room::Server, stt: &stt::Server) -> Result<Config, DemoError> {
    let set = |name: &str, value: String| (name.to_owned(), value);
    let variables = [
        set("LIVEKIT_URL", rooms.url()),
        set("LIVEKIT_API_KEY", rooms.api_key().to_owned()),
        set("LIVEKIT_API_SECRET", rooms.api_secret().to_owned()),
        set("DEEPGRAM_API_KEY", stt.api_key().to_owned()),
        set("ROOMWARDEN__STT__URL", stt.url()),
        set("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "200".to_owned()),
    ];
    Ok(Config::load_from(None, variables.into())?)
}

async fn join(
    stage: &Stage,
    speakers: &mut Speakers,
    room: &str,
    who: &str,
    recording: &[u8],
) -> Result<(), DemoError> {
    let failed = |error| DemoError::Speaker {
        who: who.to_owned(),
        error,
    };
    let place = Place {
        url: &stage.rooms.url(),
        api_key: stage.rooms.api_key(),
        api_secret: stage.rooms.api_secret(),
        room,
        identity: who,
    };
    let recording = Recording::from_ogg(recording).map_err(failed)?;
    let speaker = Speaker::join(place, recording).await.map_err(failed)?;
    speakers.insert(who.to_owned(), speaker);
    stage.story.act(who, &format!("joins {room} and speaks"));
    Ok(())
}

/// The story of `demo`, up to the signal. Each scene is something that happens to a participant,
/// and then the end of their stream.
async fn tell_demo(stage: &Stage, speakers: &mut Speakers) -> Result<(), DemoError> {
    let story = &stage.story;
    for (room, who, recording) in CAST {
        join(stage, speakers, room, who, recording).await?;
    }
    let open_are = async |open: usize, what: &str| {
        let wait = stage.stt.wait_for(|w| w.open_now == open, STEP_LIMIT);
        wait.await.map(drop).map_err(|_| late(what))
    };
    let open = CAST.len();
    open_are(open, "a stream for each speaker").await?;
    story.tell(&format!(
        "the daemon has found both rooms: {open} streams are open"
    ));
    story.heard(CAST.len()).await?;

    // By the STT server's account, so many are left.
    let closed = async |who: &str, left: usize| {
        open_are(left, &format!("the close of {who}'s stream")).await?;
        story.good(&format!("{who}'s stream is closed"));
        Ok::<_, DemoError>(())
    };
    let api = RoomClient::with_api_key(
        &stage.rooms.http_url(),
        stage.rooms.api_key(),
        stage.rooms.api_secret(),
    );

    story.act("alice", "leaves");
    if let Some(alice) = speakers.remove("alice") {
        alice.leave().await;
    }
    closed("alice", 4).await?;

    story.act("bob", "is removed by the API");
    api.remove_participant("standup", "bob").await?;
    closed("bob", 3).await?;

    story.tell("the room support is deleted, dave in it");
    api.delete_room("support").await?;
    closed("dave", 2).await?;

    join(stage, speakers, "standup", "alice", ANNA).await?;
    open_are(3, "a new stream for alice").await?;
    story.tell("alice is back: a new stream is open");

    story.act(
        "erin",
        "vanishes without a word, as if her network was gone",
    );
    if let Some(erin) = speakers.remove("erin") {
        erin.vanish(&stage.rooms).await;
    }
    closed("erin", 2).await?;

    story.tell("the daemon gets SIGTERM while alice and carol speak");
    signal_hook::low_level::raise(signal_hook::consts::SIGTERM)?;
    Ok(())
}

fn late(what: &str) -> DemoError {
    DemoError::Late {
        what: what.to_owned(),
    }
}

/// How to join what `dev` runs.
fn invitation(stage: &Stage) -> Result<String, DemoError> {
    let (rooms, stt) = (&stage.rooms, &stage.stt);
    let (url, key, secret) = (rooms.url(), rooms.api_key(), rooms.api_secret());
    let bold = Style::new().bold();
    let mut text = format!(
        "{bold}room server{bold:#}  {url}\n\
         {bold}STT server{bold:#}   {}; what it saw: {}/witness\n\n\
         Join the room {bold}{DEV_ROOM}{bold:#} with a browser on this machine:\n",
        stt.url(),
        stt.http_url(),
    );
    let mut tokens = String::new();
    for who in DEV_GUESTS {
        let grants = VideoGrants {
            room_join: true,
            room: DEV_ROOM.to_owned(),
            ..Default::default()
        };
        let token = AccessToken::with_api_key(key, secret)
            .with_identity(who)
            .with_name(who)
            .with_ttl(DEV_TOKENS)
            .with_grants(grants)
            .to_jwt()?;
        let link = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("liveKitUrl", &url)
            .append_pair("token", &token)
            .finish();
        text.push_str(&format!("  https://meet.livekit.io/custom?{link}\n"));
        tokens.push_str(&format!("  {bold}{who}{bold:#}  {token}\n"));
    }
    let exports: String = [
        ("LIVEKIT_URL", url.as_str()),
        ("LIVEKIT_API_KEY", key),
        ("LIVEKIT_API_SECRET", secret),
    ]
    .into_iter()
    // A secret that came from the environment may be one that matters.
    .filter(|(name, value)| std::env::var(name).as_deref() != Ok(value))
    .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
    .collect();
    let hours = DEV_TOKENS.as_secs() / 3600;
    text.push_str(&format!(
        "\nor any LiveKit client, with that URL and one of these tokens ({hours} h):\n{tokens}\n\
         or the LiveKit CLI:\n\
         {exports}\
         lk room join --identity cli --publish speech.ogg {DEV_ROOM}\n\n\
         What is said appears below. Ctrl-C closes everything and shows the receipts.\n\n"
    ));
    Ok(text)
}

/// Tells what happens, with the time since the start; also takes the transcripts.
#[derive(Clone)]
struct Story(Arc<StoryInner>);

struct StoryInner {
    started: Instant,
    silent: bool,
    /// A pipe that nobody reads holds up the telling, not the story.
    out: LineWriter,
    heard: Mutex<BTreeSet<String>>,
    news: tokio::sync::Notify,
}

impl Story {
    fn new(silent: bool) -> io::Result<Self> {
        Ok(Self(Arc::new(StoryInner {
            started: Instant::now(),
            silent,
            // Without colours unless it is a terminal that wants them.
            out: LineWriter::start(anstream::stdout(), |_| {})?,
            heard: Mutex::default(),
            news: tokio::sync::Notify::new(),
        })))
    }

    fn tell(&self, what: &str) {
        if !self.0.silent {
            let at = self.0.started.elapsed().as_secs_f64();
            let dim = Style::new().dimmed();
            self.print(&format!("{dim}{at:6.2} s{dim:#}  {what}\n"));
        }
    }

    /// Somebody does something, or it is done to them.
    fn act(&self, who: &str, what: &str) {
        let style = of(who).bold();
        self.tell(&format!("{style}{who}{style:#} {what}"));
    }

    fn good(&self, what: &str) {
        let style = coloured(AnsiColor::Green);
        self.tell(&format!("{style}{what}{style:#}"));
    }

    fn print(&self, text: &str) {
        // What does not fit is lost.
        let _ = self.0.out.write(text.as_bytes().to_vec());
    }

    fn flush(&self, until: Instant) {
        self.0.out.flush(until);
    }

    /// Waits until so many participants have had a final transcript.
    async fn heard(&self, participants: usize) -> Result<(), DemoError> {
        let all = async {
            loop {
                let news = self.0.news.notified();
                let heard = self.0.heard.lock();
                if heard.unwrap_or_else(PoisonError::into_inner).len() >= participants {
                    return;
                }
                news.await;
            }
        };
        let all = tokio::time::timeout(STEP_LIMIT, all).await;
        all.map_err(|_| late("a final transcript of each speaker"))
    }
}

impl Sink for Story {
    fn deliver(&self, transcript: &Transcript) {
        if transcript.is_final {
            self.tell(&told(transcript));
            let mut heard = self.0.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.insert(transcript.participant.clone());
            drop(heard);
            self.0.news.notify_waiters();
        }
    }
}

fn told(transcript: &Transcript) -> String {
    let Transcript {
        room,
        participant,
        text,
        ..
    } = transcript;
    let style = of(participant);
    let said = shown(&format!("[{room}] {participant}: {text}"));
    format!("        {style}{said}{style:#}")
}

fn coloured(colour: AnsiColor) -> Style {
    Style::new().fg_color(Some(Color::Ansi(colour)))
}

/// The same colour for the same name.
fn of(who: &str) -> Style {
    const COLOURS: [AnsiColor; 5] = [
        AnsiColor::Cyan,
        AnsiColor::Magenta,
        AnsiColor::Yellow,
        AnsiColor::Blue,
        AnsiColor::BrightBlue,
    ];
    let sum: usize = who.bytes().map(usize::from).sum();
    coloured(COLOURS[sum % COLOURS.len()])
}

/// What `demo --json` prints.
#[derive(Serialize)]
struct DemoReport<'a> {
    #[serde(flatten)]
    ours: &'a Report,
    /// Streams that the STT server says were opened, were acknowledged, and are open now.
    witness_opened: u64,
    witness_acknowledged: u64,
    witness_open: usize,
    agree: bool,
}

impl DemoReport<'_> {
    /// The receipts and the counts, to be read.
    fn table(&self) -> String {
        let ours = self.ours;
        let bold = Style::new().bold();
        let width = |least: usize, of: fn(&Settled) -> &str| {
            let longest = ours
                .receipts
                .iter()
                .map(|receipt| of(receipt).chars().count())
                .max();
            longest.unwrap_or(0).clamp(least, 40)
        };
        let room = width(8, |receipt| &receipt.key.room);
        let who = width(12, |receipt| &receipt.key.participant);
        let mut text = format!(
            "\n{bold}stream  {:<room$} {:<who$} outcome       closed in  audio    because{bold:#}\n",
            "room", "participant"
        );
        for receipt in &ours.receipts {
            text.push_str(&line(receipt, room, who));
        }
        let kernel = ours
            .kernel_sockets
            .map_or("unknown".to_owned(), |count| count.to_string());
        let (style, verdict) = match self.agree {
            true => (coloured(AnsiColor::Green).bold(), "all agree"),
            false if ours.kernel_sockets.is_none() => (
                coloured(AnsiColor::Red).bold(),
                "the kernel can't be asked: there is no /proc",
            ),
            false => (coloured(AnsiColor::Red).bold(), "THEY DISAGREE"),
        };
        text.push_str(&format!(
            "\nopened {}, acknowledged {}\n\
             open now: {} by the registry, {kernel} by the kernel, {} by the STT server\n\
             {style}{verdict}{style:#}\n",
            ours.opened, ours.acknowledged, ours.open_now, self.witness_open
        ));
        text
    }
}

/// A receipt in the table; the columns of room and participant are so wide.
fn line(receipt: &Settled, room: usize, who: usize) -> String {
    let style = match receipt.outcome {
        Outcome::Acknowledged => coloured(AnsiColor::Green),
        Outcome::TimedOut { .. } | Outcome::PeerGone { .. } | Outcome::NeverOpened { .. } => {
            coloured(AnsiColor::Red)
        }
    };
    format!(
        "{:<7} {:<room$} {:<who$} {style}{:<13}{style:#} {:>6.1} ms {:>6.2} s  {}\n",
        receipt.id.to_string(),
        shown(&receipt.key.room),
        shown(&receipt.key.participant),
        shown(&receipt.outcome.to_string()),
        receipt.close_seconds * 1000.0,
        receipt.totals.audio_seconds,
        shown(&receipt.reason.to_string()),
    )
}

/// What others chose, without what would drive the terminal.
fn shown(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// LiveKit's servers and clients want no shorter one.
const MIN_SECRET: usize = 32;

const REHEARSAL_HELP: &str = "\
Once both servers listen, it prints what points roomwarden, an agent or any other client at them, and
runs until SIGINT or SIGTERM:

    export LIVEKIT_URL=ws://127.0.0.1:7880
    export LIVEKIT_API_KEY=devkey
    export LIVEKIT_API_SECRET=...
    export ROOMWARDEN__STT__URL=ws://127.0.0.1:7881/v1/listen
    export DEEPGRAM_API_KEY=...

The secret is another at each start. To keep it, and the addresses, give them:

    LIVEKIT_API_SECRET=$(cat secret) roomwarden rehearsal --livekit-port 7880 --stt-port 7881

Each server tells what it saw at GET /witness, and misbehaves as told by PUT /faults, for as long as
it runs: GET /faults shows how. POST /faults at the room server strikes one participant, once:
{\"room\": \"r\", \"identity\": \"ann\", \"mishap\": \"vanish\"}, or drop_signal. Neither asks for a key.";

/// Options of `roomwarden rehearsal`.
#[derive(Args)]
#[command(after_help = REHEARSAL_HELP)]
pub struct RehearsalArgs {
    /// Address to listen on, which clients are told for media, so not 0.0.0.0; anything but loopback
    /// lets others in
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// Port of the room server; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    livekit_port: u16,
    /// UDP port of the room server's media; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    media_port: u16,
    /// Port of the STT server; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    stt_port: u16,
    /// Where the room server's webhooks go, http:// only; may be given more than once
    #[arg(long, value_name = "URL")]
    webhook_url: Vec<String>,
    /// Key of the room server's API and tokens [default: LIVEKIT_API_KEY, or else devkey]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Its secret, at least 32 characters; others on this machine can see it here, so better give
    /// it in the environment [default: LIVEKIT_API_SECRET, or else a random one]
    #[arg(long, value_name = "SECRET")]
    api_secret: Option<String>,
}

impl RehearsalArgs {
    /// How the servers are to run, or why they can't.
    fn configs(self) -> Result<(room::Config, stt::Config), String> {
        let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let mut config = room::Config {
            bind: self.bind,
            port: self.livekit_port,
            media_port: self.media_port,
            webhook_urls: self.webhook_url,
            ..Default::default()
        };
        if let Some(key) = self.api_key.or_else(|| given("LIVEKIT_API_KEY")) {
            config.api_key = key;
        }
        if let Some(secret) = self.api_secret.or_else(|| given("LIVEKIT_API_SECRET")) {
            config.api_secret = secret;
        }
        if config.api_key.is_empty() || config.api_secret.chars().count() < MIN_SECRET {
            // Without the secret: this may end up in a log.
            return Err(format!(
                "LIVEKIT_API_KEY must not be empty, and LIVEKIT_API_SECRET must have at least \
                 {MIN_SECRET} characters"
            ));
        }
        let stt = stt::Config::default().bind(self.bind).port(self.stt_port);
        Ok((config, stt))
    }
}

/// Runs the two servers until SIGINT or SIGTERM.
pub async fn rehearsal(args: RehearsalArgs, format: Option<LogFormat>) -> u8 {
    if let Err(said) = cli::log_to_stderr("warn", format.unwrap_or(LogFormat::Auto)) {
        return cli::complain(EXIT_USAGE, &said);
    }
    let (rooms, stt) = match args.configs() {
        Ok(configs) => configs,
        Err(said) => return cli::complain(EXIT_USAGE, &said),
    };
    match serve(rooms, stt).await {
        Ok(()) => EXIT_OK,
        Err(error) => cli::complain(EXIT_FAILURE, &format!("cannot start the servers: {error}")),
    }
}

/// As a shell takes it for one word.
fn quoted(value: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+=@%,".contains(c);
    if value.chars().all(plain) {
        value.into()
    } else {
        format!("'{}'", value.replace('\'', r"'\''")).into()
    }
}

async fn serve(rooms: room::Config, stt: stt::Config) -> io::Result<()> {
    let mut signals = SignalSource::install()?;
    let rooms = room::Server::start(rooms)?;
    let stt = stt::Server::start(stt)?;
    let lines = [
        ("LIVEKIT_URL", rooms.url()),
        ("LIVEKIT_API_KEY", rooms.api_key().to_owned()),
        ("LIVEKIT_API_SECRET", rooms.api_secret().to_owned()),
        ("ROOMWARDEN__STT__URL", stt.url()),
        ("DEEPGRAM_API_KEY", stt.api_key().to_owned()),
    ];
    let mut out = io::stdout();
    for (name, value) in lines {
        writeln!(out, "export {name}={}", quoted(&value))?;
    }
    out.flush()?;
    signals.terminate(signals::nothing_to_reload).await;
    rooms.shutdown().await;
    stt.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{domain::StreamKey, ledger::Ledger, registry::Registry, stt as client};

    #[test]
    fn names_do_not_drive_the_terminal() {
        let settled = Settled {
            id: crate::domain::StreamId(1),
            key: StreamKey {
                room: "r\u{1b}[2J".into(),
                participant: "p\u{7}".into(),
                track: "t".into(),
            },
            service: Arc::default(),
            outcome: Outcome::Acknowledged,
            reason: CloseReason::ParticipantLeft("\u{1b}]0;x".into()),
            totals: crate::domain::StreamTotals::default(),
            opened_at_ms: 0,
            settled_at_ms: 0,
            wall_seconds: 0.0,
            connection_seconds: 0.0,
            close_seconds: 0.0,
        };
        let ledger = Ledger::default();
        let _ = ledger.settle(crate::ledger::CloseReceipt::new(settled));
        let text = told(&Transcript {
            room: "r".into(),
            participant: "p\u{1b}[2J".into(),
            track: "t".into(),
            segment: "s".into(),
            is_final: true,
            text: "\u{7}words".into(),
            start: 0.0,
            duration: 0.0,
            confidence: 0.0,
        });
        let receipt = ledger.receipts().remove(0);
        let text = text + &line(&receipt, 8, 12);
        assert!(
            text.contains("words") && text.contains("acknowledged"),
            "{text:?}"
        );
        let plain = anstream::adapter::strip_str(&text).to_string();
        assert!(
            !plain.contains(|c: char| c.is_control() && c != '\n'),
            "{plain:?}"
        );
        // What is stripped are our own colours.
        assert_eq!(plain.matches('\u{fffd}').count(), 5, "{plain:?}");
    }

    /// A stream that the daemon knows nothing of is a leak, but where others may open some.
    #[tokio::test(flavor = "multi_thread")]
    async fn streams_that_the_daemon_does_not_know_are_seen() {
        let rooms = room::Server::start(room::Config::default()).expect("room server");
        let stt = stt::Server::start(stt::Config::default()).expect("STT server");
        let mut stage = Stage::new(rooms, stt, true).expect("stage");
        let registry = Registry::new(Ledger::default());
        let provider = Arc::new(client::connect::Provider::new(&stage.config.stt));
        let key = StreamKey {
            room: "r".into(),
            participant: "p".into(),
            track: "t".into(),
        };
        let mut foreign =
            client::stream::open(&registry, provider, key, STEP_LIMIT, None).expect("open");
        let open = stage.stt.wait_for(|w| w.open_now == 1, STEP_LIMIT).await;
        let open = open.expect("a stream");
        let account = |stage: &Stage, witness: &stt::Witness| {
            let report = stage.daemon.account();
            stage.account(&report, witness).agree
        };
        assert!(!account(&stage, &open));
        foreign.close(&CloseOrder {
            reason: CloseReason::TrackEnded,
            deadline: Instant::now() + STEP_LIMIT,
        });
        foreign.settled().await.expect("a receipt");
        let closed = stage.stt.wait_for(|w| w.open_now == 0, STEP_LIMIT).await;
        let closed = closed.expect("no stream");
        assert!(
            !account(&stage, &closed),
            "one that was closed is one too many"
        );
        stage.others = true;
        assert!(account(&stage, &open) && account(&stage, &closed));
        stage.rooms.shutdown().await;
        stage.stt.shutdown().await;
    }
}
