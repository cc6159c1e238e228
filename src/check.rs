//! `roomwarden check`: whether a daemon with this configuration would work, and what to do if not.
//! Everything is really tried: the rooms are listed, a join token is presented, and an STT stream is
//! opened and closed on the path that every stream takes, with a receipt.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    path::Path,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anstyle::{AnsiColor, Style};
use livekit_net::{Header, HttpClientExt};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    cli::{self, ConfigArgs, EXIT_CHECK, EXIT_FAILURE, EXIT_OK, EXIT_USAGE},
    close::CloseOrder,
    config::{Config, LogFormat},
    domain::{CloseReason, Outcome, StreamKey},
    ledger::{Ledger, Settled},
    registry::{Registry, StreamState},
    room::api::{ApiError, RoomApi},
    signals::{self, SignalSource},
    store::{Reader, StoreError},
    stt::{
        connect::Provider,
        stream::{self, StreamHandle},
    },
};

/// Errors only: what was found is told on standard output.
const QUIET: &str = "error,livekit=off,livekit_api=off";
/// For one step of what a server is asked; the LiveKit client's own limit is 10 s.
const STEP_LIMIT: Duration = Duration::from_secs(12);
/// How often it is looked whether the stream is open.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Room that a token is asked for when there is none; a token does not make a room.
const ROOM: &str = "roomwarden-check";
/// Fewer file descriptors than this are few.
const FEW_DESCRIPTORS: u64 = 1024;
/// What the process itself needs, a room, and a speaker in it.
const DESCRIPTORS: (u64, u64, u64) = (50, 4, 1);
/// Of what a server says.
const MAX_SAID: usize = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warning,
    Failed,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    status: Status,
    said: String,
    /// What to do about it.
    fix: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, said: impl Into<String>) -> Self {
        let (status, said) = (Status::Ok, said.into());
        Self {
            name,
            status,
            said,
            fix: None,
        }
    }

    fn failed(name: &'static str, said: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            status: Status::Failed,
            fix: Some(fix.into()),
            ..Self::ok(name, said)
        }
    }

    fn warning(name: &'static str, said: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            status: Status::Warning,
            ..Self::failed(name, said, fix)
        }
    }
}

/// What `check --json` prints.
#[derive(Serialize)]
struct CheckReport {
    exit_code: u8,
    checks: Vec<Finding>,
    /// Of the stream that was opened to try it.
    receipt: Option<Arc<Settled>>,
}

/// Checks, prints what was found, and returns the exit code.
pub(crate) async fn check(args: ConfigArgs, format: Option<LogFormat>, json: bool) -> u8 {
    let report = match args.load(format) {
        Ok(config) => {
            if let Err(said) = cli::log_to_stderr(QUIET, config.log.format) {
                return cli::complain(EXIT_USAGE, &said);
            }
            let signals = match SignalSource::install() {
                Ok(signals) => signals,
                Err(error) => {
                    let said = format!("cannot listen for signals: {error}");
                    return cli::complain(EXIT_FAILURE, &said);
                }
            };
            look(&args, &config, signals).await
        }
        Err(error) => {
            let problem = |problem: &crate::config::Problem| {
                let fix = "config/roomwarden.example.toml lists every key";
                Finding::failed("configuration", problem.to_string(), fix)
            };
            CheckReport {
                exit_code: EXIT_USAGE,
                checks: error.problems.iter().map(problem).collect(),
                receipt: None,
            }
        }
    };
    match print(&report, json) {
        Ok(()) => report.exit_code,
        Err(error) => cli::complain(EXIT_FAILURE, &format!("cannot print: {error}")),
    }
}

async fn look(args: &ConfigArgs, config: &Config, mut signals: SignalSource) -> CheckReport {
    let from = match args.file() {
        Some(file) => format!("{} and the environment", file.display()),
        None => "the environment; no file is given".to_owned(),
    };
    let mut checks = vec![Finding::ok("configuration", from)];
    let stop = CancellationToken::new();
    let mut servers = pin!(async {
        // Only the stream has to be closed in order.
        tokio::join!(
            stop.run_until_cancelled(livekit(config)),
            stt(config, &stop)
        )
    });
    let (livekit, (stt, tried)) = loop {
        tokio::select! {
            found = &mut servers => break found,
            _ = signals.terminate(signals::nothing_to_reload) => stop.cancel(),
        }
    };
    let interrupted = || vec![Finding::failed("LiveKit", "interrupted", "check again")];
    checks.extend(livekit.unwrap_or_else(interrupted));
    checks.push(stt);
    // Where nothing was opened there is nothing to account for.
    let opened = tried
        .as_ref()
        .filter(|(settled, _)| settled.outcome.opened());
    checks.extend(opened.map(|(settled, registry)| receipt(settled, registry)));
    checks.extend(
        [
            unencrypted("livekit.url", &config.livekit.url),
            unencrypted("stt.url", &config.stt.url),
            state(config),
            ledger(config),
            transcripts(config),
            descriptors(),
        ]
        .into_iter()
        .flatten(),
    );
    let failed = checks.iter().any(|found| found.status == Status::Failed);
    CheckReport {
        exit_code: if failed { EXIT_CHECK } else { EXIT_OK },
        checks,
        receipt: tried.map(|(settled, _)| settled),
    }
}

/// Lists the rooms and presents a token to join one.
async fn livekit(config: &Config) -> Vec<Finding> {
    let api = RoomApi::new(&config.livekit);
    let url = cli::shown(&config.livekit.url);
    let listed = match tokio::time::timeout(STEP_LIMIT, api.list_rooms(&[])).await {
        Ok(Ok(rooms)) => rooms,
        Ok(Err(error)) => return vec![not_listed(config, error).await],
        Err(_) => {
            let said = format!("{url} does not answer within {STEP_LIMIT:?}");
            return vec![Finding::failed("LiveKit", said, REACH_LIVEKIT)];
        }
    };
    let said = format!("{url} takes the key; rooms now: {}", listed.len());
    let named = config.rooms.join.first().cloned();
    let room = named.or_else(|| listed.first().map(|room| room.name.clone()));
    let room = room.unwrap_or_else(|| ROOM.to_owned());
    vec![
        Finding::ok("LiveKit", said),
        joining(config, &api, &room).await,
    ]
}

const REACH_LIVEKIT: &str = "check livekit.url (LIVEKIT_URL), the server, and what is in between";

/// Why the rooms could not be listed.
async fn not_listed(config: &Config, error: ApiError) -> Finding {
    let name = "LiveKit";
    match error {
        ApiError::Credentials { said } => {
            let lower = said.to_lowercase();
            let is = |words: &[&str]| words.iter().any(|word| lower.contains(word));
            let fix = if is(&["api key"]) {
                "the server does not know this key: check livekit.api_key (LIVEKIT_API_KEY)"
            } else if is(&["permission"]) {
                "the key may not list rooms (grant roomList): take one that may"
            } else if is(&["expired", "not valid yet", "nbf"]) {
                "the clocks of this machine and the server differ: set them right"
            } else {
                "the secret does not belong to the key: check livekit.api_secret \
                 (LIVEKIT_API_SECRET)"
            };
            Finding::failed(name, format!("refuses the credentials: {said}"), fix)
        }
        ApiError::Argument { said } => Finding::failed(
            name,
            format!("refuses to list rooms: {said}"),
            "check livekit.url (LIVEKIT_URL)",
        ),
        ApiError::Other { said, .. } => {
            let url = cli::shown(&config.livekit.url);
            let (what, fix) = match unreachable(&config.livekit.url).await {
                Some(why) => (why, REACH_LIVEKIT),
                // It can be reached, so it is what was said over the connection.
                None => match said.strip_prefix("status ") {
                    Some(status) if status.starts_with('5') => (
                        format!("{url} is in trouble"),
                        "look after the LiveKit server",
                    ),
                    Some(_) => (
                        format!("{url} is not a LiveKit server"),
                        "check livekit.url (LIVEKIT_URL)",
                    ),
                    None if said.contains("timed out") => {
                        (format!("{url} does not answer in time"), REACH_LIVEKIT)
                    }
                    None if matches!(config.livekit.url.scheme(), "wss" | "https") => (
                        format!("TLS with {url} fails"),
                        "check whether the server speaks TLS on that port, and its certificate",
                    ),
                    None => (
                        format!("{url} does not answer like a LiveKit server"),
                        "check livekit.url (LIVEKIT_URL)",
                    ),
                },
            };
            Finding::failed(name, format!("{what}: {said}"), fix)
        }
    }
}

/// Why there is no TCP connection to a server, if there is none.
async fn unreachable(url: &Url) -> Option<String> {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or(443);
    // An IPv6 address stands in brackets in a URL, not in a socket address.
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let late = |what: &str| Some(format!("{what} within {STEP_LIMIT:?}"));
    let found = tokio::time::timeout(STEP_LIMIT, tokio::net::lookup_host((name, port))).await;
    let addresses: Vec<SocketAddr> = match found {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(_)) => return Some(format!("the name {host} has no address (DNS)")),
        Err(_) => return late(&format!("DNS does not answer for {host}")),
    };
    match tokio::time::timeout(STEP_LIMIT, TcpStream::connect(&addresses[..])).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Some(format!("nothing listens on port {port} of {host}"))
        }
        Ok(Err(_)) => Some(format!("no connection to port {port} of {host}")),
        Err(_) => late(&format!("no connection to port {port} of {host}")),
    }
}

/// Whether a token to join is accepted, as clients ask before they join.
async fn joining(config: &Config, api: &RoomApi, room: &str) -> Finding {
    let name = "joining";
    let identity = &config.rooms.identity;
    let token = match api.join_token(room, identity, identity, config.rooms.hidden) {
        Ok(token) => token,
        Err(error) => {
            let said = format!("no token can be made: {error}");
            return Finding::failed(name, said, "check livekit.api_secret (LIVEKIT_API_SECRET)");
        }
    };
    let mut url = config.livekit.url.clone();
    let secure = matches!(url.scheme(), "wss" | "https");
    // Cannot fail between web schemes.
    let _ = url.set_scheme(if secure { "https" } else { "http" });
    let url = format!("{}/rtc/validate", url.as_str().trim_end_matches('/'));
    let headers = vec![Header {
        name: "Authorization".to_owned(),
        value: format!("Bearer {token}"),
    }];
    let Some(client) = livekit_net::http_client() else {
        return Finding::failed(
            name,
            "there is no HTTP client",
            "this is a defect: report it",
        );
    };
    let answer = match tokio::time::timeout(STEP_LIMIT, client.get(url, headers)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Finding::failed(name, error.to_string(), REACH_LIVEKIT),
        Err(_) => {
            let said = format!("no answer within {STEP_LIMIT:?}");
            return Finding::failed(name, said, REACH_LIVEKIT);
        }
    };
    let body = &answer.body[..answer.body.len().min(MAX_SAID)];
    let said = String::from_utf8_lossy(body).replace(char::is_control, " ");
    match answer.status {
        200 => {
            let said = format!("a token for {:?} is accepted", config.rooms.identity);
            Finding::ok(name, said)
        }
        404 => Finding::warning(
            name,
            format!("the server does not say whether the token is good: {said}"),
            "if it makes no rooms by itself, make those of rooms.join before",
        ),
        status => Finding::failed(
            name,
            format!("a token to join is refused with status {status}: {said}"),
            "check the key's grants at the server, and the clocks of both machines",
        ),
    }
}

/// A stream's receipt, and the book it was in.
type Tried = (Arc<Settled>, Registry);

/// Opens a stream and closes it again, without audio.
async fn stt(config: &Config, stop: &CancellationToken) -> (Finding, Option<Tried>) {
    let name = "STT";
    let url = cli::shown(&config.stt.url);
    let registry = Registry::new(Ledger::default());
    let provider = Arc::new(Provider::new(&config.stt));
    let key = StreamKey {
        room: ROOM.to_owned(),
        participant: "check".to_owned(),
        track: "none".to_owned(),
    };
    let grace = Duration::from_millis(config.stt.close_grace_ms);
    let settled = match stream::open(&registry, provider, key, grace, None) {
        Ok(handle) => open_and_close(&registry, handle, grace, stop).await,
        Err(_) => None,
    };
    registry.seal();
    registry.drained().await;
    let Some(settled) = settled else {
        let said = "the stream ended without a receipt";
        return (
            Finding::failed(name, said, "this is a defect: report it"),
            None,
        );
    };
    let finding = match &settled.outcome {
        Outcome::Acknowledged => Finding::ok(
            name,
            format!("{url} takes the key and the parameters, and acknowledges the close"),
        ),
        Outcome::NeverOpened { detail, failure } => {
            let advice = failure
                .as_ref()
                .map_or("", |failure| failure.cause.advice());
            Finding::failed(name, format!("{url}: {detail}"), advice)
        }
        outcome @ (Outcome::TimedOut { .. } | Outcome::PeerGone { .. }) => Finding::failed(
            name,
            format!("{url}: the stream was not acknowledged: {outcome}"),
            "check that stt.url is a Deepgram-style server, and what is in between; such a stream \
             may be counted as open by the provider until its idle time-out",
        ),
    };
    (finding, Some((settled, registry)))
}

/// What the stream that was tried has come to.
fn receipt(settled: &Settled, registry: &Registry) -> Finding {
    let request = settled.totals.request_id.as_deref().unwrap_or("none");
    let kernel = registry.kernel_sockets();
    let left = registry.open_now() + kernel.unwrap_or_default();
    let said = format!(
        "stream {}: {} in {:.0} ms, request {request}, {:.2} s of audio; open now: {} by the \
         registry, {} by the kernel",
        settled.id,
        settled.outcome,
        settled.close_seconds * 1000.0,
        settled.totals.audio_seconds,
        registry.open_now(),
        kernel.map_or("?".to_owned(), |count| count.to_string()),
    );
    match left {
        0 => Finding::ok("receipt", said),
        _ => Finding::failed("receipt", said, "this is a defect: report it"),
    }
}

async fn open_and_close(
    registry: &Registry,
    mut handle: StreamHandle,
    grace: Duration,
    stop: &CancellationToken,
) -> Option<Arc<Settled>> {
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        let interrupted = tokio::select! {
            settled = handle.settled() => return settled,
            () = stop.cancelled() => true,
            _ = look.tick() => false,
        };
        let open = |stream: &crate::registry::OpenStream| stream.state == StreamState::Open;
        if interrupted || registry.open().iter().any(open) {
            handle.close(&CloseOrder {
                reason: CloseReason::Shutdown("check".to_owned()),
                deadline: Instant::now() + grace,
            });
            return handle.settled().await;
        }
    }
}

/// A warning if audio and keys would go over a network unencrypted.
fn unencrypted(key: &'static str, url: &Url) -> Option<Finding> {
    let local = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => true,
    };
    if local || matches!(url.scheme(), "wss" | "https") {
        return None;
    }
    let said = format!("{key} is not encrypted: keys and audio go over the network as they are");
    Some(Finding::warning(
        "encryption",
        said,
        "use wss://, or a network that you trust",
    ))
}

fn state(config: &Config) -> Option<Finding> {
    let name = "state";
    let Some(directory) = config.state.directory() else {
        let said = "there is no directory for the journal, so none is kept";
        return Some(Finding::warning(name, said, "set state.dir"));
    };
    let shown = directory.display();
    let fix = "set state.dir to a directory that this user may write";
    Some(match try_directory(&directory) {
        Ok(()) => Finding::ok(name, format!("{shown} can be written")),
        Err(error) if config.state.dir.is_some() => {
            Finding::failed(name, format!("{shown} cannot be written: {error}"), fix)
        }
        // Where nobody asked for one, the daemon goes without.
        Err(error) => Finding::warning(
            name,
            format!("{shown} cannot be written, so no journal is kept: {error}"),
            fix,
        ),
    })
}

fn ledger(config: &Config) -> Option<Finding> {
    let name = "ledger";
    let path = config.ledger_file().filter(|_| config.ledger.enabled)?;
    let shown = path.display();
    Some(match Reader::open(&path) {
        Ok(_) => Finding::ok(name, format!("{shown} can be read")),
        Err(StoreError::Missing { .. }) => Finding::ok(name, format!("{shown} will be made")),
        Err(StoreError::Older { .. }) => {
            Finding::ok(name, format!("{shown} will be brought up to date"))
        }
        Err(error @ StoreError::Damaged { .. }) => Finding::warning(
            name,
            error.to_string(),
            "the daemon saves what is readable of it",
        ),
        Err(error) => Finding::failed(
            name,
            error.to_string(),
            "set ledger.file to a file of its own, or ledger.enabled = false",
        ),
    })
}

/// Writes to a directory, and leaves it as it was.
fn try_directory(directory: &Path) -> io::Result<()> {
    let was_there = directory.exists();
    fs::create_dir_all(directory)?;
    let probe = directory.join(format!(".check-{:016x}", fastrand::u64(..)));
    let written = fs::write(&probe, "x");
    let _ = fs::remove_file(&probe);
    if !was_there {
        let _ = fs::remove_dir(directory);
    }
    written
}

fn transcripts(config: &Config) -> Option<Finding> {
    let name = "transcripts";
    let file = config.transcripts.file.as_ref()?;
    let shown = file.display();
    let was_there = file.exists();
    let opened = OpenOptions::new().create(true).append(true).open(file);
    if !was_there && opened.is_ok() {
        let _ = fs::remove_file(file);
    }
    Some(match opened {
        Ok(_) => Finding::ok(name, format!("{shown} can be written")),
        Err(error) => Finding::failed(
            name,
            format!("{shown} cannot be written: {error}"),
            "set transcripts.file to a file that this user may write",
        ),
    })
}

fn descriptors() -> Option<Finding> {
    let name = "file descriptors";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let Some(soft) = limit.current else {
        return Some(Finding::ok(name, "no limit"));
    };
    let (base, room, speaker) = DESCRIPTORS;
    let rooms = soft.saturating_sub(base) / (room + 2 * speaker);
    let said = format!(
        "{soft} are allowed, enough for about {rooms} rooms of two speakers (a room takes {room}, \
         a speaker {speaker})"
    );
    Some(match soft < FEW_DESCRIPTORS {
        true => Finding::warning(name, said, "ulimit -n 65536, or LimitNOFILE= in the unit"),
        false => Finding::ok(name, said),
    })
}

fn print(report: &CheckReport, json: bool) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return writeln!(out);
    }
    for Finding {
        name,
        status,
        said,
        fix,
    } in &report.checks
    {
        let (word, colour) = match status {
            Status::Ok => ("ok", AnsiColor::Green),
            Status::Warning => ("warning", AnsiColor::Yellow),
            Status::Failed => ("FAILED", AnsiColor::Red),
        };
        let style = Style::new().fg_color(Some(colour.into())).bold();
        // Servers' words are in it, and must not drive the terminal.
        let said = said.replace(char::is_control, " ");
        writeln!(out, "{style}{word:<8}{style:#} {name:<17} {said}")?;
        if let Some(fix) = fix {
            writeln!(out, "{:<8} {:<17} -> {fix}", "", "")?;
        }
    }
    out.flush()
}
