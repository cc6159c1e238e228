//! The STT server as a client of LiveKit Inference sees it.

mod stt_client;

use std::time::Duration;

use futures_util::SinkExt as _;
use rehearsal::stt::{Config, End, Faults, Protocol, Reject, Server, StreamRecord};
use serde_json::{Value, json};
use stt_client::*;
use tokio_tungstenite::tungstenite::Message;

const QUERY: &str = "model=deepgram%2Fnova-3";
const FOREVER: Duration = Duration::from_secs(3600);

fn start(config: Config) -> Server {
    Server::start(config).expect("a server")
}

/// What the frameworks send first.
fn create() -> Value {
    json!({
        "type": "session.create",
        "model": "deepgram/nova-3",
        "settings": {"sample_rate": "16000", "encoding": "pcm_s16le", "language": "de", "extra": {}},
        "connection": {"timeout": 10, "retries": 3},
    })
}

async fn created(server: &Server) -> Client {
    let mut client = Client::connect_inference(server, QUERY).await;
    client.send_json(create()).await;
    let created = client.next_json().await;
    assert_eq!(created["type"], "session.created");
    assert_eq!(created["session_id"], client.request_id.as_str());
    client
}

async fn only_record(server: &Server) -> StreamRecord {
    let witness = all_ended(server).await;
    assert_eq!(witness.opened, 1);
    witness.streams[0].clone()
}

#[tokio::test]
async fn a_session_is_created_fed_finalized_and_closed() {
    let server = start(Config::default().keep_audio(Duration::from_secs(60)));
    let mut client = created(&server).await;
    let signal = [
        silence(0.5, 16_000),
        tone(440.0, 0.25, 1.5, 16_000),
        silence(1.0, 16_000),
        tone(880.0, 0.25, 0.5, 16_000),
    ]
    .concat();
    client.send_input_audio(&signal).await;
    client.send_type("session.finalize").await;
    let mut messages = Vec::new();
    while messages
        .last()
        .is_none_or(|m: &Value| m["type"] != "session.finalized")
    {
        messages.push(client.next_json().await);
    }
    client.send_type("session.close").await;
    let ended = client.read_to_end().await;
    let kinds: Vec<_> = ended.messages.iter().map(|m| &m["type"]).collect();
    assert_eq!(kinds, ["session.closed"]);
    assert_eq!(ended.close_code(), Some(1000));

    let of_type = |kind: &str| {
        let all: Vec<_> = messages.iter().filter(|m| m["type"] == kind).collect();
        all
    };
    assert_eq!(of_type("start_of_speech").len(), 2);
    let interim = of_type("interim_transcript");
    // About two a second of sound.
    assert!((3..=6).contains(&interim.len()), "{interim:#?}");
    let finals = of_type("final_transcript");
    assert_eq!(finals.len(), 2, "{finals:#?}");
    let texts: Vec<_> = finals
        .iter()
        .map(|f| f["transcript"].as_str().expect("text"))
        .collect();
    assert!(texts[0].starts_with("tone 440 Hz 0.50-2.00 s"), "{texts:?}");
    assert!(texts[1].starts_with("tone 880 Hz 3.00-3.50 s"), "{texts:?}");
    for message in [interim, finals].concat() {
        assert_eq!(message["language"], "de");
        assert_eq!(message["session_id"], ended.request_id.as_str());
        assert!(message["start"].is_f64() && message["duration"].is_f64());
        assert!(message["confidence"].is_f64());
        assert!(message["words"][0]["word"].is_string());
    }

    let record = only_record(&server).await;
    assert_eq!(record.end, Some(End::Acknowledged));
    assert_eq!(record.protocol, Protocol::Inference);
    assert_eq!(record.audio_seconds, 3.5);
    assert_eq!((record.audio_messages, record.audio_bytes), (70, 112_000));
    assert_eq!((record.texts.create, record.texts.finalize), (1, 1));
    assert!(record.close_requested && record.metadata_sent);
    assert_eq!(record.finals_sent, 2);
    let shown = |name: &str| record.parameters.iter().filter(|(n, _)| n == name).count();
    assert_eq!((shown("model"), shown("language")), (1, 1));
    let audio = server.audio(&ended.request_id).expect("kept audio");
    assert!(purity(&audio[28_800..91_200], 440.0) > 0.98);
    server.shutdown().await;
}

#[tokio::test]
async fn rate_and_language_are_as_the_session_says() {
    let server = start(Config::default());
    let mut client = Client::connect_inference(&server, QUERY).await;
    let settings = json!({"sample_rate": 48_000});
    client
        .send_json(json!({"type": "session.create", "settings": settings}))
        .await;
    client
        .send_json(json!({"type": "session.update", "settings": {"language": "fr"}}))
        .await;
    client
        .send_input_audio(&tone(440.0, 0.25, 1.0, 48_000))
        .await;
    client.send_type("session.close").await;
    let ended = client.read_to_end().await;
    let finals = ended.of_type("final_transcript");
    assert_eq!(finals.len(), 1, "{:#?}", ended.messages);
    assert_eq!(finals[0]["language"], "fr");
    assert_eq!(finals[0]["duration"], 1.0);
    let record = only_record(&server).await;
    assert_eq!((record.texts.create, record.texts.update), (1, 1));
    server.shutdown().await;
}

#[tokio::test]
async fn tokens_are_checked_and_the_answer_says_what_is_wrong() {
    let server = start(Config::default());
    let expired = inference_token(&server, Duration::ZERO);
    for (token, said) in [
        (expired.as_str(), "expired"),
        (server.api_key(), "not a token"),
    ] {
        let request = inference_request(&server, QUERY, token);
        let (response, body) = refused_request(&request).await;
        assert_eq!(response.status(), 401);
        let error = body["error"].as_str().expect("text");
        assert!(error.contains(said), "{error}");
    }
    assert_eq!(server.witness().rejected[&401], 2);
    server.shutdown().await;
}

#[tokio::test]
async fn session_close_frees_the_slot_whatever_follows_and_a_bare_close_does_not() {
    let config = Config::default().max_streams(1).abrupt_linger(FOREVER);
    let server = start(config.close_delay(FOREVER));
    let mut closed = created(&server).await;
    closed.send_type("session.close").await;
    closed.ws.close(None).await.expect("sent");
    closed.read_to_end().await;
    let record = only_record(&server).await;
    assert_eq!(record.end, Some(End::CloseFrame { code: 1005 }));
    assert!(record.close_requested && record.freed_ms.is_some());

    let mut bare = created(&server).await;
    bare.ws.close(None).await.expect("sent");
    bare.read_to_end().await;
    let ended = server.wait_for(|w| w.opened == 2 && w.open_now == 0, LIMIT);
    let witness = ended.await.expect("both end");
    assert_eq!(witness.counted_now, 1);

    let token = inference_token(&server, FOREVER);
    let (response, body) = refused_request(&inference_request(&server, QUERY, &token)).await;
    assert_eq!(response.status(), 429);
    assert_eq!(body["type"], "inference_quota_exceeded");
    assert_eq!(body["quota_type"], "stt");
    assert!(
        body["category"]
            .as_str()
            .expect("text")
            .contains("Concurrent")
    );
    // The other key has a limit of its own.
    let listen = Client::connect(&server, "").await;
    assert_eq!(server.witness().counted[&Protocol::Listen], 1);
    drop(listen);
    server.shutdown().await;
}

#[tokio::test]
async fn a_quota_can_be_used_up_on_demand() {
    let server = start(Config::default().faults(Faults {
        reject_with: Some(Reject::quota("MaxGatewayCredits").retry_after(FOREVER)),
        ..Faults::default()
    }));
    let token = inference_token(&server, FOREVER);
    let (response, body) = refused_request(&inference_request(&server, QUERY, &token)).await;
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "3600");
    assert_eq!(body["type"], "inference_quota_exceeded");
    assert_eq!(body["category"], "MaxGatewayCredits");
    assert!(body["hint"].is_string() && body["error"].is_string());
    server.shutdown().await;
}

#[tokio::test]
async fn an_inactive_session_is_told_2007() {
    let timeout = Duration::from_millis(300);
    let server = start(Config::default().inference_idle_timeout(timeout));
    // Creating it could take longer than that on a slow machine.
    let client = Client::connect_inference(&server, QUERY).await;
    let ended = client.read_to_end().await;
    assert_eq!(ended.messages.len(), 1);
    assert_eq!(ended.messages[0]["type"], "error");
    assert_eq!(ended.messages[0]["code"], 2007);
    let record = only_record(&server).await;
    assert_eq!(record.end, Some(End::TimedOut));
    server.shutdown().await;
}

#[tokio::test]
async fn messages_that_make_no_sense_end_the_session_and_unknown_ones_do_not() {
    let server = start(Config::default());
    let mut tolerant = created(&server).await;
    tolerant.send_type("session.dance").await;
    tolerant.send_type("session.close").await;
    assert_eq!(tolerant.read_to_end().await.close_code(), Some(1000));
    for (first, message) in [
        (Some(create()), json!({"type": "input_audio", "audio": "?"})),
        (Some(create()), json!({"type": "input_audio"})),
        (Some(create()), create()),
        (None, json!({"type": "input_audio", "audio": "AAAA"})),
        (None, json!({"type": "session.finalize"})),
        (
            None,
            json!({"type": "session.create", "settings": {"encoding": "opus"}}),
        ),
        (None, json!([])),
    ] {
        let mut client = Client::connect_inference(&server, QUERY).await;
        if let Some(first) = first {
            client.send_json(first).await;
        }
        client.send_json(message.clone()).await;
        let ended = client.read_to_end().await;
        let errors = ended.of_type("error");
        assert_eq!(errors.len(), 1, "{message}");
        assert!(errors[0]["message"].is_string(), "{message}");
        assert_eq!(ended.close_code(), Some(1008), "{message}");
        let record = all_ended(&server).await.stream(&ended.request_id).cloned();
        let end = record.expect("a record").end;
        assert_eq!(end, Some(End::ProtocolError { code: 1008 }), "{message}");
    }
    let mut binary = created(&server).await;
    binary.send_audio(&[0; 320]).await;
    assert_eq!(binary.read_to_end().await.close_code(), Some(1008));
    server.shutdown().await;
}

/// Sessions that are damaged somewhere, the same ones in every run.
#[tokio::test]
async fn damage_ends_at_most_its_own_session() {
    use rand::{Rng as _, SeedableRng as _};
    let server = start(Config::default());
    let mut random = rand::rngs::StdRng::seed_from_u64(12);
    let audio = json!({"type": "input_audio", "audio": "AAAAAAAAAAAA"});
    let session = [
        create(),
        audio,
        json!({"type": "session.update", "settings": {"language": "de"}}),
        json!({"type": "session.finalize"}),
        json!({"type": "session.close"}),
    ];
    for _ in 0..200 {
        let mut client = Client::connect_inference(&server, QUERY).await;
        let struck = random.random_range(0..session.len());
        for (index, message) in session.iter().enumerate() {
            let mut bytes = message.to_string().into_bytes();
            if index == struck {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..3) {
                    0 => bytes.truncate(at),
                    1 => bytes.insert(at, random.random()),
                    _ => bytes[at] ^= 1 << random.random_range(0..8),
                }
            }
            let text = String::from_utf8_lossy(&bytes).into_owned();
            // The session may be over by then.
            let _ = client.ws.send(Message::text(text)).await;
        }
        let _ = client.ws.close(None).await;
        client.read_to_end().await;
    }
    let witness = all_ended(&server).await;
    assert_eq!(witness.opened, 200);
    assert!(witness.streams.iter().all(|s| s.end != Some(End::Lost)));
    let mut good = created(&server).await;
    good.send_type("session.close").await;
    assert_eq!(good.read_to_end().await.close_code(), Some(1000));
    server.shutdown().await;
}

#[tokio::test]
async fn faults_are_the_same_as_with_the_other_protocol() {
    let server = start(Config::default().faults(Faults {
        never_answer_close: true,
        ..Faults::default()
    }));
    let mut client = created(&server).await;
    client.send_type("session.close").await;
    let arrived = server.wait_for(|w| w.streams[0].close_requested, LIMIT);
    arrived.await.expect("session.close arrives");
    assert!(!server.witness().streams[0].metadata_sent);
    server.set_faults(Faults::default());
    let ended = client.read_to_end().await;
    assert_eq!(ended.of_type("session.closed").len(), 1);
    assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
    server.shutdown().await;
}
