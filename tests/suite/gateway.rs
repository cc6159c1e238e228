//! `/v1/listen` of the daemon's own, with clients of other people's making: what passes through it, and
//! that nothing of a client that is gone stays open at the provider.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use rehearsal::{
    room,
    stt::{self, CloseWith, End, Faults, Protocol, Reject},
};
use roomwarden::cli::{EXIT_OK, EXIT_USAGE};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{self, Message, client::IntoClientRequest, http},
};

use crate::{
    agents::{Agent, Framework, seen},
    stage::{Binary, LIMIT, Stage},
};

const KEY: &str = "the-gateways-own-key";
pub const LINEAR16: &str = "model=nova-3&encoding=linear16&sample_rate=16000&interim_results=true";

/// The real daemon, which joins no room, and its gateway.
struct Rig {
    stage: Stage,
    binary: Binary,
    /// `127.0.0.1:PORT`
    address: String,
}

pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Rig {
    async fn new(stt: stt::Config, more: &[(&str, &str)]) -> Self {
        let stage = Stage::with(stt).await;
        let mut variables = vec![
            ("ROOMWARDEN__GATEWAY__LISTEN", "127.0.0.1:0"),
            ("ROOMWARDEN__GATEWAY__TOKEN", KEY),
            ("ROOMWARDEN__ROOMS__EXCLUDE", "*"),
        ];
        variables.extend(more);
        let mut binary = Binary::run(&stage, &variables);
        binary.logged("the gateway listens address=").await;
        let log = binary.log();
        let (_, rest) = log.split_once("the gateway listens address=").expect("it");
        let address = rest.lines().next().expect("an address").trim().to_owned();
        Self {
            stage,
            binary,
            address,
        }
    }

    async fn connect(&self, path: &str) -> Result<(Socket, http::HeaderMap), Refused> {
        connect(&format!("ws://{}{path}", self.address), KEY).await
    }

    async fn listen(&self, query: &str) -> Socket {
        let opened = self.connect(&format!("/v1/listen?{query}")).await;
        opened.expect("a stream").0
    }

    /// Ends the daemon, which must have left nothing.
    async fn end(self) -> String {
        self.binary.signal("TERM");
        let (status, log) = self.binary.exit().await;
        assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
        assert!(!log.contains(KEY), "{log}");
        self.stage.end().await;
        log
    }
}

#[derive(Debug)]
struct Refused {
    status: u16,
    headers: http::HeaderMap,
    body: Value,
}

async fn connect(url: &str, key: &str) -> Result<(Socket, http::HeaderMap), Refused> {
    match try_connect(url, key).await {
        Ok(opened) => Ok(opened),
        Err(tungstenite::Error::Http(response)) => {
            let (parts, body) = response.into_parts();
            let body = body.unwrap_or_default();
            Err(Refused {
                status: parts.status.as_u16(),
                headers: parts.headers,
                body: serde_json::from_slice(&body).expect("JSON"),
            })
        }
        Err(error) => panic!("{url}: {error}"),
    }
}

pub async fn try_connect(
    url: &str,
    key: &str,
) -> Result<(Socket, http::HeaderMap), tungstenite::Error> {
    let mut request = url.into_client_request()?;
    let key = format!("Token {key}").parse().expect("a header's value");
    request.headers_mut().insert("authorization", key);
    let (socket, response) = connect_async(request).await?;
    Ok((socket, response.into_parts().0.headers))
}

/// A second of a tone, or of nothing, in messages of 50 ms; 16 kHz.
pub fn second(loud: bool) -> Vec<Vec<u8>> {
    let sample = |n: usize| match loud && n % 32 < 16 {
        true => 8000_i16,
        false => 0,
    };
    let message = |start: usize| {
        let samples = start..start + 800;
        samples.flat_map(|n| sample(n).to_le_bytes()).collect()
    };
    (0..16_000).step_by(800).map(message).collect()
}

async fn say(socket: &mut Socket, text: &str) {
    socket.send(Message::text(text)).await.expect("sent");
}

/// What comes until the end, and how it ends.
async fn rest(mut socket: Socket) -> (Vec<Value>, u16, String) {
    let mut messages = Vec::new();
    let reading = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    messages.push(serde_json::from_str(&text).expect("JSON"));
                }
                Some(Ok(Message::Close(frame))) => {
                    // The answer goes out with the next read.
                    while let Some(Ok(_)) = socket.next().await {}
                    let frame = frame.expect("a code");
                    break (frame.code.into(), frame.reason.to_string());
                }
                Some(Ok(_)) => {}
                other => panic!("no close frame, but {other:?} after {messages:#?}"),
            }
        }
    };
    let (code, reason) = tokio::time::timeout(LIMIT, reading).await.expect("an end");
    (messages, code, reason)
}

/// What is the same in two streams: types, transcripts and times.
fn shape(message: &Value) -> String {
    let transcript = &message["channel"]["alternatives"][0]["transcript"];
    let parts = ["type", "start", "duration", "is_final", "from_finalize"];
    let parts = parts.map(|part| message[part].to_string());
    format!("{} {transcript}", parts.join(" "))
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_passes_as_it_is() {
    let rig = Rig::new(stt::Config::default(), &[]).await;
    let (key, url) = (rig.stage.stt.api_key().to_owned(), rig.stage.stt.url());
    let mut heard = Vec::new();
    for direct in [true, false] {
        let (mut socket, headers) = match direct {
            true => connect(&format!("{url}?{LINEAR16}"), &key).await,
            false => rig.connect(&format!("/v1/listen?{LINEAR16}")).await,
        }
        .expect("a stream");
        let id = headers["dg-request-id"].to_str().expect("an id").to_owned();
        for message in second(true).into_iter().chain(second(false)) {
            socket.send(Message::binary(message)).await.expect("sent");
        }
        say(&mut socket, r#"{"type":"KeepAlive"}"#).await;
        say(&mut socket, r#"{"type":"Finalize"}"#).await;
        for message in second(true) {
            socket.send(Message::binary(message)).await.expect("sent");
        }
        say(&mut socket, r#"{"type":"SomethingNew"}"#).await;
        say(&mut socket, r#"{"type":"CloseStream"}"#).await;
        let (messages, code, _) = rest(socket).await;
        assert_eq!(code, 1000);
        assert!(
            messages.iter().any(|m| m["type"] == "Metadata"),
            "{messages:#?}"
        );
        let ended = |w: &stt::Witness| w.stream(&id).expect("it").end.is_some();
        let witness = rig.stage.witnessed("the end", ended).await;
        let record = witness.stream(&id).expect("it").clone();
        assert_eq!(
            (record.protocol, record.end),
            (Protocol::Listen, Some(End::Acknowledged))
        );
        assert_eq!(record.audio_seconds, 3.0);
        // Interim results come by the clock of the machine.
        let finals = messages.iter().filter(|m| m["is_final"] != false);
        heard.push((
            finals.map(shape).collect::<Vec<_>>(),
            record.parameters,
            record.texts,
            (record.audio_messages, record.audio_bytes),
        ));
    }
    assert_eq!(heard[0], heard[1]);
    let log = rig.end().await;
    let receipt = "reason=the gateway's client asked for it";
    assert!(log.contains(receipt) && log.contains("audio=3"), "{log}");
}

/// However a client ends, the provider is told, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_client_stays_open() {
    let rig = Rig::new(stt::Config::default(), &[]).await;
    for (n, how) in ["cut", "close frame", "nothing"].into_iter().enumerate() {
        let mut socket = rig.listen(LINEAR16).await;
        for message in second(true) {
            socket.send(Message::binary(message)).await.expect("sent");
        }
        match how {
            "cut" => {
                let MaybeTlsStream::Plain(tcp) = socket.get_ref() else {
                    panic!("no TLS");
                };
                tcp.set_zero_linger().expect("a reset");
                drop(socket);
            }
            "close frame" => socket.close(None).await.expect("closed"),
            _ => {
                socket
                    .send(Message::binary(Vec::new()))
                    .await
                    .expect("sent");
                let (messages, code, _) = rest(socket).await;
                assert_eq!(
                    (code, messages.last().expect("some")["type"].as_str()),
                    (1000, Some("Metadata"))
                );
            }
        }
        rig.stage.all_acknowledged(n + 1).await;
    }
    // During the handshake, of which the provider knows already.
    rig.stage.stt.set_faults(Faults {
        hold_handshake: true,
        ..Faults::default()
    });
    let path = format!("/v1/listen?{LINEAR16}");
    let waiting = rig.connect(&path);
    let held = rig.stage.witnessed("held", |w| w.held_handshakes == 1);
    tokio::select! {
        _ = waiting => panic!("it is held"),
        _ = held => {}
    }
    rig.stage.stt.set_faults(Faults::default());
    let opened = |w: &stt::Witness| w.opened == 4 && w.open_now == 0;
    rig.stage.witnessed("opened, and closed", opened).await;
    rig.stage.all_acknowledged(4).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_who_it_is_for() {
    let rig = Rig::new(stt::Config::default(), &[]).await;
    let ann = "/rooms/r/participants/ann/v1/listen?model=nova-3";
    let refused = rig.connect(ann).await.expect_err("nobody is there");
    assert_eq!(
        (refused.status, &refused.body["err_code"]),
        (409, &"NOT_IN_ROOM".into())
    );
    let speaker = rig.stage.speaker("r", "ann").await;
    let other = rig.stage.speaker("r", "bob").await;
    let (of_ann, _) = rig.connect(ann).await.expect("a stream");
    let (of_room, _) = rig.connect("/rooms/r/v1/listen").await.expect("a stream");
    let (of_nobody, _) = rig.connect("/v1/listen").await.expect("a stream");
    // The last list of the room is older than carol.
    let carol = rig.stage.speaker("r", "carol").await;
    let of_carol = rig.connect("/rooms/r/participants/carol/v1/listen").await;
    let (of_carol, _) = of_carol.expect("a stream");
    // Some lists later.
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.stage.open(4).await;
    drop(of_carol);
    rig.stage.open(3).await;
    carol.leave().await;

    let begun = Instant::now();
    rig.stage
        .api()
        .remove_participant("r", "ann")
        .await
        .expect("removed");
    let (_, code, reason) = rest(of_ann).await;
    assert_eq!(
        (code, reason.as_str()),
        (1001, "participant left (found by the gateway)")
    );
    rig.stage.open(2).await;
    println!("acknowledged {:?} after the removal", begun.elapsed());
    let refused = rig.connect(ann).await.expect_err("ann is gone");
    assert_eq!(refused.status, 409);

    other.leave().await;
    speaker.leave().await;
    let (_, code, _) = rest(of_room).await;
    assert_eq!(code, 1001);
    rig.stage.open(1).await;
    drop(of_nobody);
    rig.stage.all_acknowledged(4).await;
    rig.end().await;
}

/// No room of ours owns them.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_closed_by_request() {
    let rig = Rig::new(stt::Config::default(), &[]).await;
    let ann = rig.stage.speaker("r", "ann").await;
    let of_ann = "/rooms/r/participants/ann/v1/listen";
    let mut clients = Vec::new();
    for path in [of_ann, of_ann, "/rooms/r/v1/listen", "/v1/listen"] {
        clients.push(rig.connect(path).await.expect("a stream").0);
    }
    rig.stage.open(4).await;
    let close = async |args: &[&str], closed: usize| {
        let all = [&["close"], args, &["--json"]].concat();
        let output = crate::worker::roomwarden(&rig.stage, &all).await;
        assert_eq!(output.status.code(), Some(EXIT_OK.into()), "{output:?}");
        let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let receipts = said["receipts"].as_array().expect("receipts");
        assert_eq!((&said["closed"], receipts.len()), (&true.into(), closed));
        for receipt in receipts {
            assert_eq!(receipt["reason"], "requested", "{receipt}");
        }
    };
    // One of two of a name, by its number.
    close(&["stream", "2"], 1).await;
    rig.stage.open(3).await;
    let (_, code, reason) = rest(clients.remove(1)).await;
    assert_eq!((code, reason.as_str()), (1001, "requested"));
    close(&["participant", "r", "ann"], 1).await;
    close(&["room", "r"], 1).await;
    rig.stage.open(1).await;
    for client in clients.drain(..2) {
        assert_eq!(rest(client).await.1, 1001);
    }
    drop(clients);
    rig.stage.all_acknowledged(4).await;
    ann.leave().await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_says_what_the_provider_said() {
    let rig = Rig::new(
        stt::Config::default(),
        &[("ROOMWARDEN__STT__MAX_STREAMS", "1")],
    )
    .await;
    let url = format!("ws://{}/v1/listen", rig.address);
    for key in ["another", ""] {
        let refused = connect(&url, key).await.expect_err("a wrong key");
        assert_eq!(
            (refused.status, &refused.body["err_code"]),
            (401, &"INVALID_AUTH".into())
        );
    }
    let refused = rig.connect("/v2/listen").await.expect_err("no such path");
    assert_eq!(refused.status, 404);
    assert_eq!(rig.stage.stt.witness().opened, 0);

    let refused = rig
        .connect("/v1/listen?encoding=mp9")
        .await
        .expect_err("bad");
    assert_eq!(
        (refused.status, &refused.body["err_code"]),
        (400, &"BAD_REQUEST".into())
    );
    let said = refused.body["err_msg"].as_str().expect("words");
    assert!(said.contains("encoding: unknown variant"), "{said}");
    let id = refused.headers["dg-request-id"].to_str().expect("an id");
    assert_eq!(refused.body["request_id"], id);

    let socket = rig.listen(LINEAR16).await;
    let refused = rig
        .connect("/v1/listen")
        .await
        .expect_err("there is one place");
    assert_eq!(
        (refused.status, &refused.body["err_code"]),
        (429, &"TOO_MANY_REQUESTS".into())
    );
    assert!(refused.headers.contains_key("retry-after"));
    drop(socket);
    rig.stage.all_acknowledged(1).await;

    rig.stage.stt.set_faults(Faults {
        reject_with: Some(Reject::status(402)),
        ..Faults::default()
    });
    let refused = rig.connect("/v1/listen").await.expect_err("no credit");
    assert_eq!(
        (refused.status, &refused.body["err_code"]),
        (402, &"QUOTA".into())
    );
    let said = refused.body["err_msg"].as_str().expect("words");
    assert!(said.contains("ASR_PAYMENT_REQUIRED"), "{said}");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_providers_end_is_the_clients() {
    let rig = Rig::new(stt::Config::default(), &[]).await;
    let socket = rig.listen(LINEAR16).await;
    rig.stage.stt.set_faults(Faults {
        close_with: Some(CloseWith {
            code: 1011,
            reason: "NET-0000".into(),
            after: Duration::ZERO,
        }),
        ..Faults::default()
    });
    let (_, code, reason) = rest(socket).await;
    assert_eq!((code, reason.as_str()), (1011, "NET-0000"));
    rig.stage.stt.set_faults(Faults::default());
    let open = rig.listen(LINEAR16).await;
    rig.binary.signal("TERM");
    let (_, code, reason) = rest(open).await;
    assert_eq!((code, reason.as_str()), (1001, "shutdown (SIGTERM)"));
    rig.end().await;
}

/// Much faster than it is spoken: nothing may be lost, and nothing be kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_in_a_hurry_waits_for_the_provider() {
    const SECONDS: u64 = 600;
    let rig = Rig::new(stt::Config::default(), &[]).await;
    let mut socket = rig.listen(LINEAR16).await;
    for n in 0..SECONDS {
        for message in second(n % 10 == 0) {
            socket.send(Message::binary(message)).await.expect("sent");
        }
    }
    say(&mut socket, r#"{"type":"CloseStream"}"#).await;
    let (messages, code, _) = rest(socket).await;
    assert_eq!(code, 1000);
    assert_eq!(messages.last().expect("some")["duration"], SECONDS as f64);
    rig.stage.all_acknowledged(1).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_a_key_is_refused() {
    let stage = Stage::new().await;
    for (more, words) in [
        (vec![], "it needs gateway.token"),
        (
            vec![("ROOMWARDEN__GATEWAY__TOKEN", "short")],
            "at least 16 characters are needed",
        ),
        (
            vec![
                ("ROOMWARDEN__GATEWAY__TOKEN", KEY),
                ("ROOMWARDEN__STT__PROVIDER", "deepgram_flux"),
            ],
            "it needs stt.provider = \"deepgram\"",
        ),
    ] {
        let mut variables = vec![("ROOMWARDEN__GATEWAY__LISTEN", "127.0.0.1:0")];
        variables.extend(more);
        let (status, log) = Binary::run(&stage, &variables).exit().await;
        assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
        assert!(log.contains(words), "{words}: {log}");
    }
    stage.end().await;
}

/// The complaint that this project was born from, with the agents that it is about.
async fn an_agent_of_theirs_leaves_nothing(framework: Framework) {
    for end in ["KILL", "INT", "removed"] {
        let rig = Rig::new(stt::Config::default(), &[]).await;
        // Its Deepgram is the gateway.
        let url = format!("ws://{}/rooms/r/participants/ann/v1/listen", rig.address);
        let mut agent = Agent::start(framework, &rig.stage, &url, &[("DEEPGRAM_API_KEY", KEY)]);
        let registered = |w: &room::Witness| w.live_workers().count() == 1;
        seen(&rig.stage, "the worker registers", registered).await;
        let ann = rig.stage.speaker("r", "ann").await;
        agent.says("transcript").await;
        rig.stage.open(1).await;
        let begun = Instant::now();
        match end {
            "removed" => rig
                .stage
                .api()
                .remove_participant("r", "ann")
                .await
                .expect("removed"),
            "INT" => {
                agent.signal("INT");
                agent.signal("INT");
            }
            signal => assert!(agent.signal(signal)),
        }
        let ended = async {
            if end != "removed" {
                // Of two signals that come before it has looked it sees one, and goes on.
                let patience = Duration::from_secs(20);
                while tokio::time::timeout(patience, agent.over()).await.is_err() {
                    assert!(begun.elapsed() < 5 * patience, "the agent ends");
                    agent.signal("INT");
                }
            }
            begun.elapsed()
        };
        let closed = async {
            let witness = rig.stage.open(0).await;
            (witness, begun.elapsed())
        };
        let (ended, (witness, closed)) = tokio::join!(ended, closed);
        println!("{framework:?}, {end}: over after {ended:?}, the stream closed after {closed:?}");
        let ours = witness
            .streams
            .iter()
            .all(|s| s.end == Some(End::Acknowledged));
        assert!(ours, "{framework:?}, {end}: {:#?}", witness.streams);
        drop(agent);
        ann.leave().await;
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_python_leaves_nothing() {
    an_agent_of_theirs_leaves_nothing(Framework::Python).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_node_leaves_nothing() {
    an_agent_of_theirs_leaves_nothing(Framework::Node).await;
}
