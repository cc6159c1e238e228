//! The commands that ask a running daemon, over its Unix socket or wherever its API is.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};
use reqwest::{Client, Method, Response, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use url::Url;

use super::{
    ErrorBody,
    view::{Closed, LogFilter, Receipt, State, Status, Streams},
};
use crate::{
    cli::{self, ConfigArgs, EXIT_CHECK, EXIT_FAILURE, EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE},
    config::{Config, LogFormat, read_secret},
    table::{
        Align::{Left, Right},
        Table,
    },
    usage::{self, Failed, done},
};

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// For an answer; a close may take its whole grace.
const ANSWER_LIMIT: Duration = Duration::from_secs(150);
/// When other means are at hand.
const SHORT_LIMIT: Duration = Duration::from_secs(5);
/// Of an answer, and of an event.
const MAX_ANSWER: usize = 64 << 20;
const MAX_EVENT: usize = 1 << 20;

/// Which daemon, besides what the configuration says.
#[derive(Args)]
struct Which {
    #[command(flatten)]
    config: ConfigArgs,
    /// Its API, instead of the Unix socket of the configuration: http://127.0.0.1:7460
    #[arg(long, value_name = "URL")]
    api: Option<Url>,
    /// A file with the token of that API
    #[arg(long, value_name = "FILE", requires = "api")]
    token_file: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct PlainArgs {
    #[command(flatten)]
    which: Which,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct CloseArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A stream, by its number: its track is not transcribed again until it is published anew
    Stream {
        id: u64,
        #[command(flatten)]
        how: How,
    },
    /// A participant's streams: they are not transcribed again until they rejoin
    Participant {
        room: String,
        identity: String,
        #[command(flatten)]
        how: How,
    },
    /// A room's streams: it is left, and not joined again while it lives
    Room {
        room: String,
        #[command(flatten)]
        how: How,
    },
}

#[derive(Args)]
struct How {
    #[command(flatten)]
    which: Which,
    /// Do not wait for the receipts
    #[arg(long)]
    no_wait: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct ReopenArgs {
    #[command(subcommand)]
    what: Reopened,
}

#[derive(Subcommand)]
enum Reopened {
    /// A participant, and streams of theirs that were closed
    Participant {
        room: String,
        identity: String,
        #[command(flatten)]
        which: Which,
    },
    /// A room
    Room {
        room: String,
        #[command(flatten)]
        which: Which,
    },
}

#[derive(Args)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    which: Which,
    /// First those after the event with this id, as far as they are kept; 0 for all of them
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Print a JSON object each
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct LogArgs {
    /// In the syntax of tracing-subscriber's EnvFilter: info,roomwarden::stt=debug
    filter: String,
    #[command(flatten)]
    which: Which,
}

/// A daemon's API.
struct Remote {
    client: Client,
    base: Url,
    token: Option<SecretString>,
    /// As it is told to people.
    name: String,
}

impl Which {
    fn remote(&self, format: Option<LogFormat>) -> Result<Remote, Failed> {
        let Some(api) = &self.api else {
            let config = usage::load(&self.config, format)?;
            let remote = Remote::on_socket(&config)?;
            return remote.ok_or_else(|| {
                let said = "there is no Unix socket of a daemon by this configuration \
                            (control.socket, state.dir): give --api URL";
                Failed(EXIT_USAGE, said.to_owned())
            });
        };
        if !matches!(api.scheme(), "http" | "https") || !api.username().is_empty() {
            let said = format!(
                "--api is {}: it must be http:// or https://",
                cli::shown(api)
            );
            return Err(Failed(EXIT_USAGE, said));
        }
        let token = self.token_file.as_ref().map(|path| {
            read_secret(path).map(SecretString::from).map_err(|why| {
                Failed(
                    EXIT_USAGE,
                    format!("--token-file is {}: {why}", path.display()),
                )
            })
        });
        Ok(Remote {
            client: client(Client::builder())?,
            base: api.clone(),
            token: token.transpose()?,
            name: cli::shown(api),
        })
    }
}

fn client(builder: reqwest::ClientBuilder) -> Result<Client, Failed> {
    // No proxies: a token goes to who it is for, and to nobody else.
    let builder = builder.no_proxy().connect_timeout(CONNECT_LIMIT);
    let built = builder.redirect(reqwest::redirect::Policy::none()).build();
    built.map_err(|error| Failed(EXIT_FAILURE, error.to_string()))
}

impl Remote {
    fn on_socket(config: &Config) -> Result<Option<Self>, Failed> {
        let Some(path) = config.control_socket() else {
            return Ok(None);
        };
        let name = path.display().to_string();
        let base = Url::parse("http://localhost").expect("a URL");
        Ok(Some(Self {
            client: client(Client::builder().unix_socket(path))?,
            base,
            token: None,
            name,
        }))
    }

    fn request(&self, method: Method, path: &[&str]) -> reqwest::RequestBuilder {
        let mut url = self.base.clone();
        // Cannot fail: it has a host.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["api", "v1"]).extend(path);
        }
        let request = self.client.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<T, Failed> {
        let answer = self.send(request.timeout(ANSWER_LIMIT)).await?;
        let body = bounded(answer).await.map_err(|said| self.lost(&said))?;
        serde_json::from_slice(&body).map_err(|error| {
            let said = format!("{} answers with something else: {error}", self.name);
            Failed(EXIT_FAILURE, said)
        })
    }

    /// An answer that is none of a refusal.
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Failed> {
        let answer = request.send().await;
        let answer = answer.map_err(|error| self.lost(&with_causes(&error)))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = bounded(answer).await.unwrap_or_default();
        let said = match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => format!("{}: {}", error.message, error.fix),
            Err(_) => format!("{} answers with status {status}", self.name),
        };
        let code = match status {
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                EXIT_USAGE
            }
            _ => EXIT_FAILURE,
        };
        Err(Failed(code, said.replace(char::is_control, "\u{fffd}")))
    }

    fn lost(&self, said: &str) -> Failed {
        let said = format!(
            "no daemon answers at {}: {said}; is it running, with the same configuration? Else \
             give --api URL",
            self.name
        );
        Failed(EXIT_CHECK, said)
    }
}

async fn bounded(mut answer: Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(more) = answer.chunk().await.map_err(|error| with_causes(&error))? {
        body.extend(more);
        if body.len() > MAX_ANSWER {
            return Err("the answer is too large".to_owned());
        }
    }
    Ok(body)
}

/// The innermost says why.
fn with_causes(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// What the daemon of the configuration says of its streams; none if none answers.
pub(crate) async fn streams(config: &Config) -> Option<Streams> {
    let remote = Remote::on_socket(config).ok()??;
    let asked = remote.request(Method::GET, &["streams"]);
    let answer = tokio::time::timeout(SHORT_LIMIT, remote.ask(asked)).await;
    answer.ok()?.ok()
}

fn print_json(of: &impl Serialize) -> Result<(), Failed> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, of).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

pub(crate) async fn status(args: PlainArgs, format: Option<LogFormat>) -> u8 {
    done(print_status(&args, format).await.map(|()| EXIT_OK))
}

async fn print_status(args: &PlainArgs, format: Option<LogFormat>) -> Result<(), Failed> {
    let remote = args.which.remote(format)?;
    let asked = remote.request(Method::GET, &["status"]);
    let status: Status = remote.ask(asked).await?;
    if args.json {
        return print_json(&status);
    }
    let mut table = Table::new([("", Left), ("", Left)]);
    let mut row = |name: &str, said: String| table.row([name.to_owned(), said]);
    let or = |count: Option<usize>, none: &str| count.map_or(none.to_owned(), |n| n.to_string());
    let up = Duration::from_secs(status.uptime_seconds as u64);
    let Status { state, version, .. } = &status;
    row(
        "daemon",
        format!(
            "{}, {state} for {up:?} (version {version})",
            status.identity
        ),
    );
    if let Some(said) = &status.not_ready {
        row("not ready", said.clone());
    }
    if let Some(trouble) = &status.trouble {
        row("trouble", trouble.message.clone());
        let again = trouble.retry_in_seconds;
        row("", format!("-> {}; next try in {again:.0} s", trouble.fix));
    }
    let of = &status.open;
    let provider = of.provider.as_ref();
    let provider = provider.map_or("has no such count".to_owned(), |provider| {
        format!("{} ({:.0} s ago)", provider.open, provider.age_seconds)
    });
    let kernel = or(of.kernel, "does not tell");
    row(
        "open now",
        format!(
            "registry {}, kernel {kernel}, provider {provider}",
            of.registry
        ),
    );
    match &of.disagreement {
        Some(said) => row("", format!("-> {said}")),
        None => row("", "who counts agrees".to_owned()),
    }
    let gate = &status.gate;
    let limit = or(gate.limit, "no limit");
    row(
        "gate",
        format!(
            "{} held ({limit}), {} wait, {} in quarantine, {} at most so far",
            gate.held, gate.waiting, gate.quarantined, gate.peak
        ),
    );
    let tracks = status.tracks.iter().filter(|(_, count)| **count > 0);
    let tracks: Vec<_> = tracks
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let tracks = match tracks.is_empty() {
        true => "no tracks".to_owned(),
        false => format!("tracks {}", tracks.join(", ")),
    };
    row(
        "there",
        format!(
            "rooms {}, participants {}, {tracks}",
            status.rooms, status.participants
        ),
    );
    let streams = &status.streams;
    let other = streams.timed_out + streams.peer_gone;
    row(
        "over",
        format!(
            "{} opened, {} acknowledged, {other} otherwise, {} never opened",
            streams.opened, streams.acknowledged, streams.never_opened
        ),
    );
    if status.orphaned > 0 {
        row(
            "orphaned",
            format!("{}, by an earlier run", status.orphaned),
        );
    }
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    table.print_rows(&mut out)?;
    Ok(out.flush()?)
}

pub(crate) async fn close(args: CloseArgs, format: Option<LogFormat>) -> u8 {
    done(print_close(&args, format).await)
}

async fn print_close(args: &CloseArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let number;
    let (path, how) = match &args.what {
        What::Stream { id, how } => {
            number = id.to_string();
            (vec!["streams", &number, "close"], how)
        }
        What::Participant {
            room,
            identity,
            how,
        } => (vec!["rooms", room, "participants", identity, "close"], how),
        What::Room { room, how } => (vec!["rooms", room, "close"], how),
    };
    let remote = how.which.remote(format)?;
    let asked = remote.request(Method::POST, &path);
    let asked = asked.query(&[("wait", !how.no_wait)]);
    let closed: Closed = remote.ask(asked).await?;
    let acknowledged =
        |receipt: &Receipt| matches!(&*receipt.outcome, "acknowledged" | "never_opened");
    // Not in time, or not by the book.
    let code = match closed.receipts.iter().all(acknowledged) && (closed.closed || how.no_wait) {
        true => EXIT_OK,
        false => EXIT_UNACKNOWLEDGED,
    };
    if how.json {
        print_json(&closed)?;
        return Ok(code);
    }
    let mut table = Table::new([
        ("stream", Right),
        ("room", Left),
        ("participant", Left),
        ("outcome", Left),
        ("closed in s", Right),
        ("audio s", Right),
    ]);
    for receipt in &closed.receipts {
        table.row([
            receipt.id.to_string(),
            receipt.room.clone(),
            receipt.participant.clone(),
            receipt.detail.clone(),
            format!("{:.3}", receipt.close_seconds),
            format!("{:.2}", receipt.audio_seconds),
        ]);
    }
    for stream in &closed.still_open {
        table.row([
            stream.id.to_string(),
            stream.room.clone(),
            stream.participant.clone(),
            stream.state.clone(),
            "-".to_owned(),
            "-".to_owned(),
        ]);
    }
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    if !closed.receipts.is_empty() || !closed.still_open.is_empty() {
        table.print(&mut out)?;
    }
    match closed.closed {
        true if closed.receipts.is_empty() => writeln!(out, "closed; no stream was open")?,
        true => writeln!(out, "closed")?,
        false => writeln!(out, "not closed yet")?,
    }
    out.flush()?;
    Ok(code)
}

pub(crate) async fn reopen(args: ReopenArgs, format: Option<LogFormat>) -> u8 {
    let (path, which) = match &args.what {
        Reopened::Participant {
            room,
            identity,
            which,
        } => (
            vec!["rooms", room, "participants", identity, "reopen"],
            which,
        ),
        Reopened::Room { room, which } => (vec!["rooms", room, "reopen"], which),
    };
    done(change(which, format, &path, false).await)
}

pub(crate) async fn drain(args: PlainArgs, format: Option<LogFormat>) -> u8 {
    done(change(&args.which, format, &["drain"], args.json).await)
}

pub(crate) async fn undrain(args: PlainArgs, format: Option<LogFormat>) -> u8 {
    done(change(&args.which, format, &["undrain"], args.json).await)
}

/// Asks for something that is answered with how far the daemon is.
async fn change(
    which: &Which,
    format: Option<LogFormat>,
    path: &[&str],
    json: bool,
) -> Result<u8, Failed> {
    let remote = which.remote(format)?;
    let state: State = remote.ask(remote.request(Method::POST, path)).await?;
    match json {
        true => print_json(&state)?,
        false => writeln!(io::stdout(), "{}", state.state)?,
    }
    Ok(EXIT_OK)
}

pub(crate) async fn log(args: LogArgs, format: Option<LogFormat>) -> u8 {
    done(set_log(args, format).await)
}

async fn set_log(args: LogArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let remote = args.which.remote(format)?;
    let filter = args.filter;
    let asked = remote
        .request(Method::PUT, &["log"])
        .json(&LogFilter { filter });
    let LogFilter { filter } = remote.ask(asked).await?;
    writeln!(io::stdout(), "{filter}")?;
    Ok(EXIT_OK)
}

pub(crate) async fn events(args: EventsArgs, format: Option<LogFormat>) -> u8 {
    done(print_events(&args, format).await)
}

async fn print_events(args: &EventsArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let remote = args.which.remote(format)?;
    let mut asked = remote.request(Method::GET, &["events"]);
    if let Some(after) = &args.after {
        asked = asked.header("Last-Event-ID", after);
    }
    let mut answer = remote.send(asked).await?;
    let mut reader = EventReader::default();
    let mut out = anstream::stdout();
    loop {
        let more = answer.chunk().await;
        let Some(more) = more.map_err(|error| remote.lost(&with_causes(&error)))? else {
            // It ends with the daemon.
            return Ok(EXIT_OK);
        };
        let read = reader.read(&more);
        for event in read.ok_or_else(|| remote.lost("an event is too large"))? {
            match args.json {
                true => writeln!(out, "{}", event.json())?,
                false => writeln!(out, "{}", event.line())?,
            }
        }
        out.flush()?;
    }
}

/// Server-sent events, as far as this API makes use of them.
#[derive(Default)]
struct EventReader {
    bytes: Vec<u8>,
    event: Read,
}

#[derive(Default)]
struct Read {
    id: Option<String>,
    name: String,
    data: String,
}

impl EventReader {
    /// None if one is too large.
    fn read(&mut self, more: &[u8]) -> Option<Vec<Read>> {
        self.bytes.extend(more);
        let mut events = Vec::new();
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<_> = self.bytes.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]);
            match line.trim_end_matches('\r').split_once(": ") {
                Some(("id", id)) => self.event.id = Some(id.to_owned()),
                Some(("event", name)) => name.clone_into(&mut self.event.name),
                Some(("data", data)) => self.event.data.push_str(data),
                _ if line.is_empty() && !self.event.name.is_empty() => {
                    events.push(std::mem::take(&mut self.event));
                }
                // Comments.
                _ => {}
            }
        }
        (self.bytes.len() + self.event.data.len() < MAX_EVENT).then_some(events)
    }
}

impl Read {
    fn data(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_default()
    }

    fn json(&self) -> Value {
        json!({ "id": self.id, "event": self.name, "data": self.data() })
    }

    /// For people: when, what, of whom.
    fn line(&self) -> String {
        let data = self.data();
        let of = ["receipt", "stream"].iter().find_map(|name| data.get(name));
        let of = of.unwrap_or(&data);
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let at = data["at"].as_str().unwrap_or("-");
        let mut line = format!("{at}  {:<14}", self.name);
        for name in [
            "id",
            "room",
            "participant",
            "detail",
            "reason",
            "cause",
            "missed",
        ] {
            let value = of.get(name).filter(|value| !value.is_null());
            if let Some(value) = value {
                line.push_str(&format!("  {name}={}", text(value)));
            }
        }
        if let Some(message) = data["trouble"]["message"].as_str() {
            line.push_str("  ");
            line.push_str(message);
        }
        // Names come from others, and must not drive the terminal.
        line.replace(char::is_control, "\u{fffd}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let text = ": alive\n\nid: 5-1\nevent: room_joined\ndata: {\"room\":\"r\\u001b\",\"at\":\"T\"}\n\n\
                    event: gap\r\ndata: {\"missed\":3}\r\n\r\n: x\n\n";
        for size in [1, 7, 1000] {
            let mut reader = EventReader::default();
            let read = text
                .as_bytes()
                .chunks(size)
                .flat_map(|more| reader.read(more).expect("small"));
            let read: Vec<_> = read.map(|event| (event.json(), event.line())).collect();
            let [(first, line), (second, _)] = &read[..] else {
                panic!("{read:?}")
            };
            assert_eq!(first["id"], "5-1");
            assert_eq!(first["data"]["room"], "r\u{1b}");
            assert_eq!(line, "T  room_joined     room=r\u{fffd}");
            assert_eq!(
                *second,
                json!({"id": null, "event": "gap", "data": {"missed": 3}})
            );
        }
        let mut reader = EventReader::default();
        assert!(reader.read(&vec![b'x'; MAX_EVENT]).is_none());
    }
}
