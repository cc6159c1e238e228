//! The command line: what is run, what is printed, and with which code it exits.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anstream::ColorChoice;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tokio::sync::{Notify, mpsc};
use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, filter::filter_fn, layer::SubscriberExt, reload, util::SubscriberInitExt,
};
use url::Url;

use crate::{
    check,
    config::{Config, ConfigError, Flag, LogFormat, StateConfig},
    control::{
        self, Bound, Control,
        command::{self, CloseArgs, EventsArgs, LogArgs, PlainArgs, ReopenArgs},
    },
    daemon::{Daemon, Failure, Report},
    dispatch::{self, DispatchArgs},
    force_close::{self, ForceCloseArgs},
    gateway::{self, Gateway},
    journal::{Journal, Recovered},
    lines::{LineWriter, LogWriter},
    notify::{Notifier, Reload},
    quota::{self, AuditArgs, QuotaArgs},
    signals::{self, Ending, SignalSource},
    store::{self, Store},
    transcripts::{Current, JsonLines, Sink, Sinks, Stdout},
    usage::{self, StreamsArgs, UsageArgs},
    watchdog::Watchdog,
};

/// Everything was closed, and every stream that was open at the end was acknowledged.
pub const EXIT_OK: u8 = 0;
/// Something unexpected; the message says what.
pub const EXIT_FAILURE: u8 = 1;
/// Wrong usage or configuration; also refused credentials at the start.
pub const EXIT_USAGE: u8 = 2;
/// Closed, but not by the book: a stream ended without acknowledgement, or counts disagree.
pub const EXIT_UNACKNOWLEDGED: u8 = 3;
/// Something was still open at the end, or the third signal abandoned it.
pub const EXIT_ABANDONED: u8 = 4;
/// The runtime was blocked, or the process did not end: the watchdog ended it.
pub const EXIT_STUCK: u8 = 5;
/// `check`: a server can't be reached, refuses the credentials, or something else that the daemon
/// needs does not work.
pub const EXIT_CHECK: u8 = 6;

/// With the features that make a difference to who runs it.
const VERSION: &str = if cfg!(feature = "rehearsal") {
    concat!(env!("CARGO_PKG_VERSION"), " (with the rehearsal servers)")
} else {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (without the rehearsal servers)"
    )
};

/// What a task that ignores the end of the runtime is given before the process goes.
const RUNTIME_SHUTDOWN: Duration = Duration::from_millis(500);
/// What the last lines on standard output, in the file and in the log are given, all together.
pub(crate) const LAST_LINES: Duration = Duration::from_millis(500);

#[derive(Parser)]
#[command(name = "roomwarden", version = VERSION, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How the log on standard error is written; auto is text on a terminal, JSON lines elsewhere
    #[arg(long, value_name = "FORMAT", value_enum, global = true)]
    log_format: Option<LogFormat>,
}

#[derive(Subcommand)]
enum Command {
    /// Transcribe the rooms of a LiveKit server until SIGINT or SIGTERM
    Run(ConfigArgs),
    /// Say whether `run` would work with this configuration, and what to do if not
    Check {
        #[command(flatten)]
        config: ConfigArgs,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Ask LiveKit for a daemon in a room, with settings for that room, or take that back
    Dispatch(DispatchArgs),
    /// End rooms for everybody, and verify it
    ForceClose(ForceCloseArgs),
    /// Show what was used: streams, minutes and cost, from the ledger
    Usage(UsageArgs),
    /// Show how the daemon is, and how many streams are open, by whose count
    Status(PlainArgs),
    /// Show the streams that are open, and the last ones that are over
    Streams(StreamsArgs),
    /// Close a stream, a participant's or a room's, in order, and show the receipts
    Close(CloseArgs),
    /// Take back that a participant or a room was closed
    Reopen(ReopenArgs),
    /// Take no new rooms and participants, and end with the last room
    Drain(PlainArgs),
    /// Take new rooms and participants again
    Undrain(PlainArgs),
    /// Show what happens, as it happens
    Events(EventsArgs),
    /// Set what the daemon logs, until its configuration is read anew
    Log(LogArgs),
    /// Show how much is used this month, here and by the provider, and how much is left
    Quota(QuotaArgs),
    /// Compare the receipts with the provider's list of requests
    Audit(AuditArgs),
    /// Show the whole life of streams against embedded servers, in under 30 s
    #[cfg(feature = "rehearsal")]
    Demo {
        /// Print one JSON report instead of the story
        #[arg(long)]
        json: bool,
    },
    /// Run the embedded servers and the daemon, and say how to join, until Ctrl-C
    #[cfg(feature = "rehearsal")]
    Dev(crate::demo::DevArgs),
    /// Run the embedded room and STT servers alone
    #[cfg(feature = "rehearsal")]
    Rehearsal(crate::demo::RehearsalArgs),
    /// Print a script that completes this command in a shell
    Completions { shell: Shell },
    /// Print the version
    Version,
}

/// Where the configuration comes from, besides the environment. No secrets: others can see a
/// process's arguments.
#[derive(Args)]
pub(crate) struct ConfigArgs {
    /// A TOML file; config/roomwarden.example.toml lists every key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets livekit.url
    #[arg(long, value_name = "URL")]
    livekit_url: Option<String>,
    /// Sets stt.url
    #[arg(long, value_name = "URL")]
    stt_url: Option<String>,
    /// Sets stt.model
    #[arg(long, value_name = "NAME")]
    stt_model: Option<String>,
    /// Sets stt.language
    #[arg(long, value_name = "NAME")]
    stt_language: Option<String>,
    /// Sets log.filter
    #[arg(long, value_name = "FILTER")]
    log_filter: Option<String>,
}

impl ConfigArgs {
    pub(crate) fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    pub(crate) fn load(&self, format: Option<LogFormat>) -> Result<Config, ConfigError> {
        Config::load(self.file(), &self.flags(format))
    }

    /// For commands that need none of the secrets.
    pub(crate) fn load_without_secrets(
        &self,
        format: Option<LogFormat>,
    ) -> Result<Config, ConfigError> {
        Config::load_without_secrets(self.file(), &self.flags(format))
    }

    fn flags(&self, format: Option<LogFormat>) -> Vec<Flag> {
        let format = format.map(|format| format.name().to_owned());
        let flags = [
            ("--livekit-url", "livekit.url", &self.livekit_url),
            ("--stt-url", "stt.url", &self.stt_url),
            ("--stt-model", "stt.model", &self.stt_model),
            ("--stt-language", "stt.language", &self.stt_language),
            ("--log-filter", "log.filter", &self.log_filter),
            ("--log-format", "log.format", &format),
        ];
        let given = flags.into_iter().filter_map(|(name, key, value)| {
            let value = value.clone()?;
            Some(Flag { name, key, value })
        });
        given.collect()
    }
}

/// Runs the command given on the command line.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                EXIT_USAGE
            } else {
                EXIT_OK
            });
        }
    };
    // Explicit, since other crates may bring a second provider and then neither is the default.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(EXIT_FAILURE, &format!("cannot start: {error}")),
    };
    let format = cli.log_format;
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(config) => run(config, format).await,
            Command::Check { config, json } => check::check(config, format, json).await,
            Command::Dispatch(args) => dispatch::dispatch(args, format).await,
            Command::ForceClose(args) => force_close::force_close(args, format).await,
            Command::Usage(args) => usage::usage(args, format),
            Command::Status(args) => command::status(args, format).await,
            Command::Streams(args) => usage::streams(args, format).await,
            Command::Close(args) => command::close(args, format).await,
            Command::Reopen(args) => command::reopen(args, format).await,
            Command::Drain(args) => command::drain(args, format).await,
            Command::Undrain(args) => command::undrain(args, format).await,
            Command::Events(args) => command::events(args, format).await,
            Command::Log(args) => command::log(args, format).await,
            Command::Quota(args) => quota::quota(args, format).await,
            Command::Audit(args) => quota::audit(args, format).await,
            #[cfg(feature = "rehearsal")]
            Command::Demo { json } => crate::demo::demo(json, format).await,
            #[cfg(feature = "rehearsal")]
            Command::Dev(args) => crate::demo::dev(args, format).await,
            #[cfg(feature = "rehearsal")]
            Command::Rehearsal(args) => crate::demo::rehearsal(args, format).await,
            Command::Completions { shell } => completions(shell),
            Command::Version => match writeln!(io::stdout(), "roomwarden {VERSION}") {
                Ok(()) => EXIT_OK,
                Err(error) => complain(EXIT_FAILURE, &error.to_string()),
            },
        }
    });
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    ExitCode::from(code)
}

fn completions(shell: Shell) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "roomwarden", &mut script);
    match io::stdout().write_all(&script) {
        Ok(()) => EXIT_OK,
        Err(error) => complain(EXIT_FAILURE, &error.to_string()),
    }
}

async fn run(args: ConfigArgs, format: Option<LogFormat>) -> u8 {
    let config = match args.load(format) {
        Ok(config) => config,
        Err(error) => return usage_error(&error.to_string()),
    };
    let log = match log_to_stderr(&config.log.filter, config.log.format) {
        Ok(log) => log,
        Err(said) => return usage_error(&said),
    };
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    if config.transcripts.stdout {
        match Stdout::new() {
            Ok(stdout) => sinks.push(Box::new(stdout)),
            Err(error) => {
                return complain(EXIT_FAILURE, &format!("cannot start a thread: {error}"));
            }
        }
    }
    let file = Current::default();
    match JsonLines::configured(&config.transcripts) {
        Ok(configured) => file.set(configured, Instant::now()),
        Err(error) => return usage_error(&error.to_string()),
    }
    sinks.push(Box::new(file.clone()));
    let journal = match journal(&config.state, &config.rooms.identity) {
        Ok(journal) => journal,
        Err(said) => return usage_error(&said),
    };
    let store = match store(&config, journal.as_ref()) {
        Ok(store) => store,
        Err(said) => return usage_error(&said),
    };
    let mut signals = match SignalSource::install() {
        Ok(signals) => signals,
        Err(error) => {
            return complain(EXIT_FAILURE, &format!("cannot listen for signals: {error}"));
        }
    };
    // With the journal, which nobody else has: a socket that an earlier run left may be replaced.
    let bound = match Bound::bind(&config).await {
        Ok(bound) => bound,
        Err(said) => return usage_error(&said),
    };
    let gateway = match gateway::bind(config.gateway.address()).await {
        Ok(listener) => listener,
        Err(said) => return usage_error(&said),
    };
    let watchdog = match Watchdog::start(&config.shutdown, EXIT_STUCK) {
        Ok(watchdog) => watchdog,
        Err(error) => {
            return complain(EXIT_FAILURE, &format!("cannot start the watchdog: {error}"));
        }
    };
    tracing::info!(livekit = %shown(&config.livekit.url), stt = %shown(&config.stt.url), "starting");
    let sinks = Sinks::new(sinks);
    let daemon = Arc::new(Daemon::start_with(config, sinks.clone(), journal, store));
    watchdog.watch(daemon.registry().clone());
    // Ends with the runtime, whose sign of life it is.
    #[allow(
        clippy::disallowed_methods,
        reason = "it ends with the runtime, whose sign of life it is"
    )]
    tokio::spawn(watchdog.clone().beat());
    let (reloads, told) = mpsc::unbounded_channel();
    match Notifier::from_env(|name| std::env::var_os(name)) {
        // Ends with the runtime as well.
        Ok(Some(notifier)) => {
            #[allow(clippy::disallowed_methods, reason = "it ends with the runtime")]
            tokio::spawn(notifier.attend(daemon.life(), told));
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "the service manager can't be told"),
    }
    let log = Arc::new(log);
    let refilter = log.clone();
    let control = Control::start(
        bound,
        daemon.clone(),
        Box::new(move |filter| refilter.filter_as_asked(filter)),
    );
    let gateway = Gateway::start(gateway, daemon.clone());
    let reloader = Arc::new(Reloader {
        args,
        format,
        daemon: daemon.clone(),
        log: log.clone(),
        file,
        watchdog,
    });
    let hangup = Arc::new(Notify::new());
    // Ends with the runtime as well.
    #[allow(clippy::disallowed_methods, reason = "it ends with the runtime")]
    tokio::spawn(reloader.attend(hangup.clone(), reloads));
    let ending = signals::govern(&daemon, &mut signals, || hangup.notify_one()).await;
    let report = match ending {
        Ending::Closed => daemon.closed().await,
        Ending::Abandoned => daemon.account(),
    };
    let until = Instant::now() + LAST_LINES;
    // Last of all that can be watched, and out of the time for the last lines.
    let answered = Instant::now() + control::LAST_ANSWERS;
    tokio::join!(control.end(answered), gateway.end(answered));
    if ending == Ending::Closed {
        sinks.flush(until);
    }
    summarise(&report);
    log.flush(until);
    exit_code(&report, ending)
}

/// Reads the configuration anew when told to, from where it came.
struct Reloader {
    args: ConfigArgs,
    format: Option<LogFormat>,
    daemon: Arc<Daemon>,
    log: Arc<Log>,
    file: Current,
    watchdog: Watchdog,
}

impl Reloader {
    /// One at a time; several hangups meanwhile are one.
    async fn attend(self: Arc<Self>, hangup: Arc<Notify>, told: mpsc::UnboundedSender<Reload>) {
        loop {
            hangup.notified().await;
            // Nobody may be there to be told.
            let _ = told.send(Reload::Begun);
            let reloader = self.clone();
            // Files may hang.
            let done = tokio::task::spawn_blocking(move || reloader.reload()).await;
            let said = match done {
                Ok(Ok(())) => "reloaded".to_owned(),
                Ok(Err(problems)) => format!("not reloaded; problems in the log: {problems}"),
                Err(_) => "not reloaded, by a defect".to_owned(),
            };
            let _ = told.send(Reload::Done(said));
        }
    }

    /// All of it, or nothing; then how many problems there are.
    fn reload(&self) -> Result<(), usize> {
        let refused = |problems: &[String]| {
            for problem in problems {
                tracing::error!("the configuration is not reloaded: {problem}");
            }
            Err(problems.len())
        };
        if self.daemon.life().orders.borrow().is_some() {
            return refused(&["everything is being closed".to_owned()]);
        }
        let mut config = match self.args.load(self.format) {
            Ok(config) => config,
            Err(error) => {
                let problems = error.problems.iter().map(ToString::to_string);
                return refused(&problems.collect::<Vec<_>>());
            }
        };
        let fixed = config.keep_fixed(&self.daemon.config());
        let file = match JsonLines::configured(&config.transcripts) {
            Ok(file) => file,
            Err(error) => return refused(&[error.to_string()]),
        };
        if let Err(said) = self.log.filter_by(&config.log.filter) {
            return refused(&[said]);
        }
        self.file.set(file, Instant::now() + LAST_LINES);
        self.watchdog.reconfigure(&config.shutdown);
        self.daemon.reconfigure(config);
        if !fixed.is_empty() {
            let keys = fixed.join(", ");
            tracing::warn!(keys, "changed, but not while it runs: restart to change");
        }
        tracing::info!("configuration reloaded");
        Ok(())
    }
}

/// The journal in the directory that is configured, which must do, or in the usual one, which may.
fn journal(state: &StateConfig, identity: &str) -> Result<Option<Recovered>, String> {
    let opened = match state.directory() {
        Some(dir) => Journal::open(&dir, identity).map_err(|error| error.to_string()),
        None => Err("neither STATE_DIRECTORY nor XDG_STATE_HOME nor HOME is set".to_owned()),
    };
    if state.dir.is_some() {
        return opened.map(Some);
    }
    Ok(opened
        .inspect_err(|said| {
            tracing::warn!(
                "no journal is kept, so that streams that are open when this process is killed \
                 can't be named afterwards (state.dir is not set): {said}"
            );
        })
        .ok())
}

/// The ledger's database, unless it is switched off.
fn store(config: &Config, journal: Option<&Recovered>) -> Result<Option<Store>, String> {
    let Some(path) = config.ledger_file().filter(|_| config.ledger.enabled) else {
        if config.ledger.enabled {
            tracing::warn!(
                "no ledger is kept: there is no directory for it (set state.dir or ledger.file)"
            );
        }
        return Ok(None);
    };
    let journal = journal.map(|recovered| recovered.journal.clone());
    let settings = store::Settings::new(config, path);
    let opened = Store::open(settings, journal).map_err(|error| error.to_string())?;
    Ok(Some(opened))
}

/// A URL without what may be secret in it.
pub(crate) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

/// The exit code that a report earns.
pub fn exit_code(report: &Report, ending: Ending) -> u8 {
    if ending == Ending::Abandoned || !report.nothing_left() {
        return EXIT_ABANDONED;
    }
    match report.failure {
        Some(Failure::Credentials(_)) => EXIT_USAGE,
        Some(Failure::Defect(_)) => EXIT_FAILURE,
        None if report.unacknowledged_at_the_end > 0 => EXIT_UNACKNOWLEDGED,
        None => EXIT_OK,
    }
}

fn summarise(report: &Report) {
    // Said whatever the log's filter is.
    if let Some(failure) = &report.failure {
        complain(EXIT_FAILURE, &failure.to_string());
    }
    let kernel = report
        .kernel_sockets
        .map_or("?".to_owned(), |count| count.to_string());
    tracing::info!(
        opened = report.opened,
        acknowledged = report.acknowledged,
        other_outcomes = report.other_outcomes,
        open_now = report.open_now,
        kernel_sockets = kernel,
        orphaned = report.orphaned.len(),
        unjournaled = report.unjournaled,
        "closed"
    );
    for stream in &report.still_open {
        let said = format!(
            "left open: {} {} ({:?})",
            stream.id, stream.key, stream.state
        );
        complain(EXIT_ABANDONED, &said);
    }
}

/// The log on standard error, to be flushed before the process ends.
pub(crate) struct Log {
    writer: Arc<LineWriter>,
    refilter: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
}

impl Log {
    pub(crate) fn flush(&self, until: Instant) {
        self.writer.flush(until);
    }

    /// From now on. `RUST_LOG` still wins.
    fn filter_by(&self, filter: &str) -> Result<(), String> {
        self.set(self::filter(filter)?)
    }

    /// From now on, whatever `RUST_LOG` says.
    fn filter_as_asked(&self, filter: &str) -> Result<(), String> {
        self.set(parsed("filter", filter)?)
    }

    fn set(&self, filter: EnvFilter) -> Result<(), String> {
        let refiltered = (self.refilter)(filter);
        refiltered.map_err(|error| format!("log.filter can't be changed: {error}"))
    }
}

/// As configured, unless `RUST_LOG` says otherwise.
fn filter(configured: &str) -> Result<EnvFilter, String> {
    let (name, filter) = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => ("RUST_LOG", filter),
        _ => ("log.filter", configured.to_owned()),
    };
    parsed(name, &filter)
}

fn parsed(name: &str, filter: &str) -> Result<EnvFilter, String> {
    // Says something of each packet, and that a permission is under way as an error; what fails, the
    // engine tells itself. Who names it has the last word.
    let quiet = format!("turn_client_proto=off,{filter}");
    EnvFilter::try_new(quiet).map_err(|error| format!("{name} is {filter:?}: {error}"))
}

/// Whatever the filter says: below info the websocket library logs whole requests and messages, keys
/// and tokens in them.
fn is_discreet(metadata: &Metadata<'_>) -> bool {
    !metadata.target().starts_with("tungstenite") || *metadata.level() <= Level::INFO
}

/// Logs to standard error, so that standard output is the transcripts' own.
pub(crate) fn log_to_stderr(filter: &str, format: LogFormat) -> Result<Log, String> {
    let filter = self::filter(filter)?;
    // A log that can't be written can't be complained about in the log.
    let writer = LineWriter::start(io::stderr(), |_| {})
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    let writer = Arc::new(writer);
    let json = match format {
        LogFormat::Auto => !io::stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let colour = anstream::AutoStream::choice(&io::stderr()) != ColorChoice::Never;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(LogWriter(writer.clone()))
        .with_ansi(colour && !json)
        .log_internal_errors(false);
    let refilter: Box<dyn Fn(EnvFilter) -> _ + Send + Sync> = match json {
        true => {
            let log = log.json().flatten_event(true).with_filter_reloading();
            let handle = log.reload_handle();
            log.finish().with(filter_fn(is_discreet)).init();
            Box::new(move |filter| handle.reload(filter))
        }
        false => {
            let log = log.with_filter_reloading();
            let handle = log.reload_handle();
            log.finish().with(filter_fn(is_discreet)).init();
            Box::new(move |filter| handle.reload(filter))
        }
    };
    Ok(Log { writer, refilter })
}

fn usage_error(said: &str) -> u8 {
    complain(EXIT_USAGE, said)
}

/// Says what is wrong, also when nothing is logged yet.
pub(crate) fn complain(code: u8, said: &str) -> u8 {
    for line in said.lines() {
        let _ = writeln!(io::stderr(), "roomwarden: {line}");
    }
    code
}

fn fail(code: u8, said: &str) -> ExitCode {
    ExitCode::from(complain(code, said))
}
