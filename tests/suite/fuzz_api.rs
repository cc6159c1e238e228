//! Requests made from the control API's own description, with values that fit and values that do not:
//! none is answered with a defect, or with what the description does not have. ROOMWARDEN_FUZZ says how
//! many, ROOMWARDEN_SEED which.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rehearsal::stt;
use roomwarden::cli::EXIT_OK;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, UnixStream},
    time::timeout,
};
use wildmatch::WildMatch;

use crate::{
    control::{Answer, Daemon, answer},
    stage::{LIMIT, Stage},
};

const TOKEN: &str = "the-fuzzers-own-token";
const READ_TOKEN: &str = "the-fuzzers-token-for-reading";
const WRONG_TOKEN: &str = "nobodys-token-at-all";
/// A room that nothing is done to, so that a drain does not end the daemon before it is undone.
const STAYS: &str = "stays";
/// Refusals that any request may meet.
const GENERAL: [u16; 14] = [
    400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 415, 421, 429, 431,
];
const METHODS: [&str; 9] = [
    "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW",
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_asked_is_answered_with_a_defect() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let requests = number("ROOMWARDEN_FUZZ").unwrap_or(300);
    let seed = number("ROOMWARDEN_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("{requests} requests, ROOMWARDEN_SEED={seed}");
    let stage = Stage::new().await;
    let tokens = [
        ("ROOMWARDEN__CONTROL__TOKEN", TOKEN),
        ("ROOMWARDEN__CONTROL__READ_TOKEN", READ_TOKEN),
        ("ROOMWARDEN__AGENT__NAME", "scribe"),
    ];
    let mut daemon = Daemon::start(&stage, &tokens).await;
    daemon.token = Some(TOKEN.to_owned());
    let mut speakers = vec![
        stage.speaker(STAYS, "somebody").await,
        stage.speaker("r", "alice").await,
    ];
    stage.streaming(2).await;

    let document = daemon.get("/api/v1/openapi.json").await.ok();
    let mut fuzzer = Fuzzer {
        random: fastrand::Rng::with_seed(seed),
        operations: operations(&document),
        streams: Vec::new(),
        document,
    };
    // Else whatever is answered would fit.
    let refusal = json!({"$ref": "#/components/schemas/ErrorBody"});
    let wrong = json!({"error": {"code": 1}});
    assert!(fits(&fuzzer.document, &refusal, &wrong, "").is_err());
    assert_eq!(fuzzer.operations.len(), 22, "{:#?}", fuzzer.operations);
    let mut by_status: BTreeMap<(String, u16), usize> = BTreeMap::new();
    let (mut asked_again, mut drained, mut closed) = (0, false, false);
    let secrets = [
        TOKEN,
        READ_TOKEN,
        WRONG_TOKEN,
        stage.rooms.api_key(),
        stage.rooms.api_secret(),
        stage.stt.api_key(),
    ];
    let begun = Instant::now();
    let mut n = 0;
    while n < requests {
        fuzzer.streams = open_streams(&daemon).await;
        // Now and then several at once.
        let several = if fuzzer.one_in(3) { 6 } else { 1 };
        let batch: Vec<_> = (0..several).map(|_| fuzzer.request(&daemon)).collect();
        let answers = batch.iter().map(|request| ask(&stage, &daemon, request));
        let answers = futures_util::future::join_all(answers).await;
        for (request, (answer, again)) in batch.iter().zip(answers) {
            n += 1;
            asked_again += again;
            let said = || format!("request {n}, ROOMWARDEN_SEED={seed}: {request:#?}");
            if let Err(wrong) = fuzzer.judge(request, &answer) {
                let Answer { status, body, .. } = &answer;
                panic!("{wrong}: {status} {body:?}; {}", said());
            }
            let told = format!("{} {:?}", answer.body, answer.headers);
            for secret in secrets {
                assert!(!told.contains(secret), "{secret}: {told}; {}", said());
            }
            let of = request.operation.clone().unwrap_or_default();
            *by_status.entry((of, answer.status)).or_default() += 1;
            drained |= request.path == "/api/v1/drain" && answer.status == 200;
            closed |= request.path.contains("force-close") && answer.body.contains("\"closed\"");
        }
        if std::mem::take(&mut drained) {
            undrain(&daemon).await;
        }
        // Somebody is to be there again.
        if std::mem::take(&mut closed)
            && speakers.len() < 20
            && let Ok(speaker) = stage.try_speaker("r", "alice").await
        {
            speakers.push(speaker);
        }
    }
    println!("{:?}, {asked_again} asked again", begun.elapsed());
    let mut table: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for ((of, status), count) in &by_status {
        let row = table.entry(of).or_default();
        row.push(format!("{status}: {count}"));
    }
    println!("{table:#?}");
    let good = by_status.keys().filter(|(_, status)| *status < 300);
    assert!(good.count() > 5, "{by_status:?}");

    // It is none the worse for it.
    daemon.token = Some(TOKEN.to_owned());
    daemon.get("/healthz").await.ok();
    daemon
        .until("/readyz", |ready| ready["ready"] == true)
        .await;
    daemon
        .status(|status| status["state"] == "running" && status["open"]["agree"] == true)
        .await;
    let log = daemon.end(EXIT_OK).await;
    assert!(!log.contains("panicked"), "{log}");
    for secret in secrets {
        assert!(!log.contains(secret), "{secret}: {log}");
    }
    let witness = stage
        .witnessed("no stream open", |witness| witness.open_now == 0)
        .await;
    for stream in &witness.streams {
        assert_eq!(stream.end, Some(stt::End::Acknowledged), "{stream:#?}");
    }
    for speaker in speakers {
        speaker.leave().await;
    }
    stage.end().await;
}

/// Method and path of each, and what is said of it.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            all.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    all
}

async fn open_streams(daemon: &Daemon) -> Vec<u64> {
    let streams = daemon.get("/api/v1/streams").await.ok();
    let open = streams["open"].as_array().expect("a list").iter();
    open.filter(|stream| stream["room"] != STAYS)
        .filter_map(|stream| stream["id"].as_u64())
        .collect()
}

async fn undrain(daemon: &Daemon) {
    let begun = Instant::now();
    while daemon.post("/api/v1/undrain").await.status != 200 {
        assert!(begun.elapsed() < LIMIT, "it stays draining");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[derive(Debug)]
struct Request {
    /// Method and path as they are described, if it is one of those.
    operation: Option<String>,
    described: Value,
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Whether it is no HTTP that a server has to understand: it may hang up, or refuse it in its own way.
    broken: bool,
    local: bool,
    /// Whether who asks so gets nothing, whatever they ask for.
    nobody: bool,
    /// Who asks; who guesses is held off by address.
    from: u8,
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {}{} HTTP/1.1\r\n", self.method, self.path, self.query);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("Connection: close\r\n\r\n");
        [head.as_bytes(), &self.body].concat()
    }
}

/// Asks until it is not too much; how often again.
async fn ask(stage: &Stage, daemon: &Daemon, request: &Request) -> (Answer, usize) {
    let mut again = 0;
    loop {
        let answer = ask_once(stage, daemon, request).await;
        if answer.status != 429 || !answer.body.contains("too_many_writes") {
            return (answer, again);
        }
        again += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn ask_once(stage: &Stage, daemon: &Daemon, request: &Request) -> Answer {
    if request.local {
        let path = stage.state.path().join("roomwarden.sock");
        let unix = UnixStream::connect(path).await.expect("connected");
        return exchange(unix, request).await;
    }
    let socket = TcpSocket::new_v4().expect("a socket");
    // Elsewhere only the first address is there.
    if cfg!(target_os = "linux") {
        let from = ([127, 0, 0, request.from], 0).into();
        socket.bind(from).expect("an address");
    }
    let tcp = socket.connect(daemon.address).await.expect("connected");
    exchange(tcp, request).await
}

async fn exchange(mut io: impl AsyncRead + AsyncWrite + Unpin, request: &Request) -> Answer {
    // A server that refuses reads no further.
    let _ = io.write_all(&request.bytes()).await;
    // Events do not end: their head is enough.
    if request.method == "GET" && request.path == "/api/v1/events" {
        let mut bytes = Vec::new();
        let head = async {
            while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
                if io.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                    break;
                }
            }
        };
        timeout(LIMIT, head).await.expect("a head");
        if bytes.starts_with(b"HTTP/1.1 200") {
            let end = bytes.windows(4).position(|end| end == b"\r\n\r\n");
            bytes.truncate(end.expect("its end") + 4);
            return answer(&bytes[..]).await;
        }
        return answer((&bytes[..]).chain(io)).await;
    }
    if request.broken {
        // So that it does not wait for the rest.
        let _ = io.shutdown().await;
    }
    answer(io).await
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Ours,
    OtherHost,
    OtherSite,
}

#[derive(Debug, Clone, Copy)]
enum Right {
    None,
    Read,
    All,
}

struct Fuzzer {
    random: fastrand::Rng,
    document: Value,
    operations: Vec<(String, String, Value)>,
    /// Numbers of some that are open.
    streams: Vec<u64>,
}

impl Fuzzer {
    fn one_in(&mut self, n: u32) -> bool {
        self.random.u32(..n) == 0
    }

    fn choice<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.random.usize(..of.len())]
    }

    fn request(&mut self, daemon: &Daemon) -> Request {
        let at = self.random.usize(..self.operations.len());
        let (method, described_path, described) = self.operations[at].clone();
        let mut broken = false;
        let mut path = described_path.clone();
        let mut query = Vec::new();
        let mut headers = Vec::new();
        let parameters = described["parameters"].as_array();
        for parameter in parameters.cloned().unwrap_or_default() {
            let name = parameter["name"].as_str().expect("a name");
            let value = self.parameter(name, &parameter["schema"]);
            let place = parameter["in"].as_str().expect("a place");
            let wanted = place == "path" || self.random.bool();
            match place {
                "path" => path = path.replace(&format!("{{{name}}}"), &encoded(&value)),
                "query" if wanted => query.push(format!("{name}={}", encoded(&value))),
                "header" if wanted => headers.push((name.to_owned(), encoded(&value))),
                _ => {}
            }
        }
        if self.one_in(12) {
            let (name, value) = (self.text(), self.text());
            query.push(format!("{}={}", encoded(&name), encoded(&value)));
        }
        let mut operation = Some(format!("{method} {described_path}"));
        if self.one_in(25) {
            let known = path.clone();
            path = match self.random.u8(..5) {
                0 => "/".to_owned(),
                1 => format!("/{}", encoded(&self.text())),
                2 => format!("{path}/"),
                3 => path.replace("/v1/", "/v2/"),
                _ => format!("{path}/%zz/../.."),
            };
            operation = operation.filter(|_| path == known);
        }
        let method = match self.one_in(12) {
            true => self.choice(&METHODS).to_owned(),
            false => method,
        };
        if operation
            .as_ref()
            .is_some_and(|o| !o.starts_with(&format!("{method} ")))
        {
            operation = None;
        }
        let mut body = match described.get("requestBody") {
            Some(_) => self.body(&described),
            None if self.one_in(10) => self.body(&described),
            None => Vec::new(),
        };
        let local = self.one_in(4);
        let (here, right) = self.headers(daemon, &mut headers);
        let reads = matches!(&*method, "GET" | "HEAD");
        let public = reads && ["/healthz", "/readyz"].contains(&&*path);
        let nobody = match right {
            _ if local || public => false,
            Right::None => true,
            Right::Read => !reads,
            Right::All => false,
        };
        let nobody = nobody || here == Place::OtherSite || (!local && here == Place::OtherHost);
        let kind = match self.random.u8(..16) {
            0 => None,
            1 => Some("text/plain"),
            2 => Some("application/json; charset=utf-8"),
            3 => Some("application/jsonx"),
            4 => Some(""),
            _ => Some("application/json"),
        };
        if let Some(kind) = kind {
            headers.push(("Content-Type".to_owned(), kind.to_owned()));
        }
        match self.random.u8(..24) {
            // As it is sent in pieces.
            0 => {
                let mut chunked = format!("{:x}\r\n", body.len()).into_bytes();
                chunked.extend(&body);
                chunked.extend(b"\r\n0\r\n\r\n");
                if self.one_in(3) {
                    broken = true;
                    chunked.truncate(self.random.usize(..chunked.len()));
                }
                match body.is_empty() {
                    true => body = b"0\r\n\r\n".to_vec(),
                    false => body = chunked,
                }
                headers.push(("Transfer-Encoding".to_owned(), "chunked".to_owned()));
            }
            1 => {
                broken = true;
                let length =
                    self.choice(&["-1", "x", "99", "70000", "99999999999999999999999", ""]);
                headers.push(("Content-Length".to_owned(), length.to_owned()));
            }
            2 => {
                broken = true;
                let less = self.random.usize(..=body.len());
                headers.push(("Content-Length".to_owned(), less.to_string()));
            }
            // Without a length there is no body.
            3 => {
                broken = !body.is_empty();
            }
            _ if body.is_empty() => {}
            _ => headers.push(("Content-Length".to_owned(), body.len().to_string())),
        }
        let query = match query.is_empty() {
            true => String::new(),
            false => format!("?{}", query.join("&")),
        };
        // More than a head may have.
        let long: usize = headers
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        broken |= path.len() + query.len() + long > 15 << 10;
        // A target of another form.
        broken |= method == "CONNECT";
        Request {
            operation,
            described,
            method,
            path,
            query,
            headers,
            body,
            broken,
            local,
            nobody,
            from: self.random.u8(2..),
        }
    }

    /// Who asks, and where they think they do.
    fn headers(&mut self, daemon: &Daemon, headers: &mut Vec<(String, String)>) -> (Place, Right) {
        let mut add = |name: &str, value: &str| headers.push((name.to_owned(), value.to_owned()));
        let here = daemon.address.to_string();
        let mut place = Place::Ours;
        let mut evil = false;
        match self.random.u8(..60) {
            n @ 0..6 => {
                place = Place::OtherHost;
                match n {
                    0 => {}
                    1 => {
                        add("Host", "evil.example");
                        evil = true;
                    }
                    2 => add("Host", "localhost@evil.example:1"),
                    3 => add("Host", ""),
                    4 => add("Host", "\u{fc}:\u{fc}"),
                    _ => {
                        add("Host", &here);
                        add("Host", "localhost");
                    }
                }
            }
            6..12 => add("Host", "localhost"),
            _ => add("Host", &here),
        }
        match self.random.u8(..40) {
            n @ 0..4 => {
                // Who thinks that the host has that name, comes from no other site.
                if !(evil && n == 1) {
                    place = Place::OtherSite;
                }
                match n {
                    0 => add("Origin", "null"),
                    1 => add("Origin", "https://evil.example"),
                    2 => add("Origin", ""),
                    _ => add("Sec-Fetch-Site", "cross-site"),
                }
            }
            4..6 => add("Origin", &format!("http://{here}")),
            6 => add("Sec-Fetch-Site", "none"),
            _ => {}
        }
        let long = "x".repeat(5000);
        let with = |token: &str| format!("Bearer {token}");
        let right = match self.random.u8(..40) {
            n @ 0..6 => {
                match n {
                    0 => {}
                    1 => add("Authorization", &with(WRONG_TOKEN)),
                    2 => add("Authorization", &with(&long)),
                    3 => add("Authorization", "Basic Zm9vOmJhcg=="),
                    4 => add("Authorization", "Bearer"),
                    _ => add("Authorization", &with("\u{fc}")),
                }
                Right::None
            }
            6..9 => {
                add("Authorization", &with(READ_TOKEN));
                Right::Read
            }
            _ => {
                add("Authorization", &with(TOKEN));
                Right::All
            }
        };
        if self.one_in(60) {
            add("X-Much", &"y".repeat(self.random.usize(..20 << 10)));
        }
        (place, right)
    }

    /// For a parameter: most often what it may be.
    fn parameter(&mut self, name: &str, schema: &Value) -> String {
        if self.one_in(4) {
            return self.text();
        }
        if name == "id" && !self.streams.is_empty() && self.random.bool() {
            return self.streams[self.random.usize(..self.streams.len())].to_string();
        }
        match name {
            "room" => self.choice(&["r", "r", "r", "none", "r/2 \u{fc}", "..", "made"]),
            "identity" => self.choice(&["alice", "alice", "nobody", "a/b?c#d"]),
            "by" => self.choice(&["room", "participant,day", "month,model", "room,room", ","]),
            "since" => self.choice(&["7d", "0d", "today", "2026-11-01", "65535d", "-1d"]),
            "Last-Event-ID" => self.choice(&["0", "1-1", "x-y", "18446744073709551616-1"]),
            _ => {
                return match self.valid(schema, name) {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
            }
        }
        .to_owned()
    }

    /// Any text at all.
    fn text(&mut self) -> String {
        match self.random.u8(..9) {
            0 => String::new(),
            1 => self.random.i64(..).to_string(),
            2 => self
                .choice(&["0", "-1", "1e400", "NaN", "18446744073709551616"])
                .to_owned(),
            3 => {
                let length = self.random.usize(..40);
                (0..length).map(|_| self.random.char(..)).collect()
            }
            4 => "x/..;%00\"'<".repeat(self.random.usize(..30)),
            5 => self
                .choice(&["..", ".", "/", "%", "%2e%2e", "\0", "\r\nX: y", "*"])
                .to_owned(),
            6 => "\u{1f600}".repeat(self.random.usize(..300)),
            7 if self.one_in(4) => "l".repeat(self.random.usize(..20 << 10)),
            _ => self
                .choice(&["r", "alice", "true", "info", "null", "{}"])
                .to_owned(),
        }
    }

    fn body(&mut self, described: &Value) -> Vec<u8> {
        let schema = &described["requestBody"]["content"]["application/json"]["schema"];
        let schema = schema.clone();
        let mut body = self.valid(&schema, "");
        // One field is another thing, or one too many.
        if self.one_in(3)
            && let Some(fields) = body.as_object_mut()
        {
            let mut names: Vec<_> = fields.keys().cloned().collect();
            names.push(self.text());
            let name = names[self.random.usize(..names.len())].clone();
            let value = self.anything();
            fields.insert(name, value);
        }
        tame(&mut body);
        let text = body.to_string();
        match self.random.u8(..16) {
            0 => text.as_bytes()[..self.random.usize(..=text.len())].to_vec(),
            1 => self.text().into_bytes(),
            2 => self.anything().to_string().into_bytes(),
            3 => vec![b' '; self.random.usize(60 << 10..70 << 10)],
            4 => [b"\xff\xfe", text.as_bytes()].concat(),
            5 => "[".repeat(self.random.usize(..5000)).into_bytes(),
            _ => text.into_bytes(),
        }
    }

    fn anything(&mut self) -> Value {
        match self.random.u8(..7) {
            0 => Value::Null,
            1 => self.random.bool().into(),
            2 => self.random.i64(..).into(),
            3 => json!([self.text()]),
            4 => json!({ self.text(): self.text() }),
            5 => json!(-1.5e300),
            _ => self.text().into(),
        }
    }

    /// What fits the schema.
    fn valid(&mut self, schema: &Value, name: &str) -> Value {
        let schema = &resolved(&self.document, schema).clone();
        let kinds = kinds(schema);
        if kinds.iter().any(|kind| kind == "null") && self.random.bool() {
            return Value::Null;
        }
        let kind = kinds.iter().find(|kind| *kind != "null");
        match kind.map(String::as_str) {
            Some("boolean") => self.random.bool().into(),
            Some("integer") => {
                let bound = |name: &str, or| schema[name].as_u64().unwrap_or(or);
                let (least, most) = (bound("minimum", 0), bound("maximum", 1000));
                match self.random.u8(..4) {
                    0 => least.into(),
                    1 => most.into(),
                    _ => self.random.u64(least..=most).into(),
                }
            }
            Some("string") => match name {
                "pattern" => self
                    .choice(&["r", "r*", "made*", "none-*", "*", "?"])
                    .into(),
                "filter" => self
                    .choice(&[
                        "info",
                        "warn,roomwarden=debug",
                        "off",
                        "roomwarden[{x=~\"(a*)*\"}]=trace",
                    ])
                    .into(),
                "agent_name" => self.choice(&["", "scribe", "other"]).into(),
                _ => self.text().into(),
            },
            Some("object") if name == "metadata" => self.metadata(),
            Some("object") => {
                let required = schema["required"].as_array().cloned().unwrap_or_default();
                let fields = schema["properties"]
                    .as_object()
                    .cloned()
                    .unwrap_or_default();
                let mut object = Map::new();
                for (name, of) in fields {
                    let must = required.iter().any(|required| *required == *name);
                    if must || self.random.bool() {
                        let value = self.valid(&of, &name);
                        object.insert(name, value);
                    }
                }
                object.into()
            }
            _ => self.anything(),
        }
    }

    fn metadata(&mut self) -> Value {
        match self.random.u8(..4) {
            0 => json!({}),
            1 => json!({"model": "nova-2", "language": "de"}),
            2 => json!({"keyterm": ["a", "b"], "diarize": true, "encoding": "linear16"}),
            _ => json!({ self.text(): self.anything() }),
        }
    }

    /// # Errors
    /// What is wrong with the answer.
    fn judge(&self, request: &Request, answer: &Answer) -> Result<(), String> {
        let status = answer.status;
        if status == 0 {
            return match request.broken {
                true => Ok(()),
                false => Err("no answer".to_owned()),
            };
        }
        if request.nobody && !(400..500).contains(&status) {
            return Err("whoever asks so is nobody".to_owned());
        }
        if request.method == "HEAD" {
            return match answer.body.is_empty() && (status < 500 || status == 503) {
                true => Ok(()),
                false => Err("a HEAD that is answered so".to_owned()),
            };
        }
        let described = request.operation.as_ref().map(|_| &request.described);
        let listed = described.and_then(|of| of["responses"].get(status.to_string()));
        let of = match listed {
            Some(listed) => listed.clone(),
            None if GENERAL.contains(&status) => {
                let refused = json!({"$ref": "#/components/schemas/ErrorBody"});
                json!({"content": {"application/json": {"schema": refused}}})
            }
            None => return Err("a status that is not described".to_owned()),
        };
        // Refused before it was understood.
        if request.broken && matches!(status, 400 | 414 | 431) && answer.body.is_empty() {
            return Ok(());
        }
        let kind = answer.headers.get("content-type").map_or("", |kind| kind);
        let kind = kind.split(';').next().unwrap_or_default();
        let schema = &of["content"][kind]["schema"];
        if schema.is_null() {
            return Err(format!("its content type is {kind:?}"));
        }
        if kind != "application/json" {
            return Ok(());
        }
        let body = serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
        fits(&self.document, schema, &body, "")
    }
}

/// Nothing is done to the room that stays.
fn tame(body: &mut Value) {
    let matches = |pattern: &str| WildMatch::new(pattern).matches(STAYS);
    if body["pattern"].as_str().is_some_and(matches) {
        body["dry_run"] = true.into();
    }
}

fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(name) => {
            let name = name.strip_prefix('#').expect("of this document");
            let found = document.pointer(name);
            resolved(
                document,
                found.unwrap_or_else(|| panic!("{name} is not there")),
            )
        }
        None => schema,
    }
}

fn kinds(schema: &Value) -> Vec<String> {
    match &schema["type"] {
        Value::String(kind) => vec![kind.clone()],
        Value::Array(kinds) => kinds
            .iter()
            .filter_map(|kind| kind.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    }
}

/// Whether a value is as the schema has it, as far as this API's schemas go.
fn fits(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let schema = resolved(document, schema);
    let wrong = |said: &str| Err(format!("{at} {said} by its schema: {value}"));
    for one in ["oneOf", "anyOf"] {
        if let Some(some) = schema[one].as_array() {
            return match some.iter().any(|of| fits(document, of, value, at).is_ok()) {
                true => Ok(()),
                false => wrong("fits none"),
            };
        }
    }
    for of in schema["allOf"].as_array().into_iter().flatten() {
        fits(document, of, value, at)?;
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let kinds = kinds(schema);
    let is = |known: &String| known == kind || (known == "number" && kind == "integer");
    if !kinds.is_empty() && !kinds.iter().any(is) {
        return wrong("is of another type");
    }
    if let Some(known) = schema["enum"].as_array()
        && !known.contains(value)
    {
        return wrong("is another word");
    }
    if let Value::Array(items) = value {
        for (n, item) in items.iter().enumerate() {
            fits(document, &schema["items"], item, &format!("{at}[{n}]"))?;
        }
    }
    if let Value::Object(fields) = value {
        for name in schema["required"].as_array().into_iter().flatten() {
            let name = name.as_str().expect("a name");
            if !fields.contains_key(name) {
                return wrong(&format!("has no {name}"));
            }
        }
        let Some(known) = schema["properties"].as_object() else {
            return Ok(());
        };
        for (name, value) in fields {
            let at = format!("{at}.{name}");
            match known.get(name) {
                Some(of) => fits(document, of, value, &at)?,
                // What is put together is checked in its parts.
                None if schema.get("allOf").is_some() || at.matches('.').count() > 9 => {}
                None => return Err(format!("{at} is not in its schema")),
            }
        }
    }
    Ok(())
}

/// As it may stand in a path, or after `?`.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
