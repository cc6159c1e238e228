//! Faults told over HTTP, for all streams and for one, and those that a stream commits by itself.

mod stt_client;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use rehearsal::stt::{Config, End, ErrorWith, Faults, Server, StreamRecord, TcpEnd};
use serde_json::{Value, json};
use stt_client::*;
use tokio_tungstenite::tungstenite::{Error, Message};

const LINEAR16: &str = "encoding=linear16&sample_rate=16000";

fn start(faults: Faults) -> Server {
    // However slow the machine is, no stream is to time out.
    let config = Config::default().idle_timeout(LIMIT * 10);
    Server::start(config.faults(faults)).expect("a server")
}

async fn faults(server: &Server, method: &str, path: &str, body: &str) -> (u16, Value) {
    http(server, method, &format!("/faults{path}"), "None", body).await
}

async fn only_record(server: &Server) -> StreamRecord {
    let witness = all_ended(server).await;
    assert_eq!(witness.opened, 1);
    witness.streams[0].clone()
}

fn server_fault(fault: &str) -> Option<End> {
    let fault = fault.to_owned();
    Some(End::ServerFault { fault })
}

#[tokio::test]
async fn faults_are_put_shown_and_taken_back_for_all_streams() {
    let server = start(Faults::default());
    let running = Client::connect(&server, LINEAR16).await;
    let told = r#"{"reject_with": {"status": 402}, "final_delay_ms": 3600000}"#;
    let (status, now) = faults(&server, "PUT", "", told).await;
    assert_eq!((status, &now["final_delay_ms"]), (200, &json!(3_600_000)));
    assert_eq!(server.faults().final_delay, Duration::from_secs(3600));
    assert_eq!(faults(&server, "GET", "", "").await, (200, now.clone()));
    assert_eq!(now["reject_with"]["code"], "ASR_PAYMENT_REQUIRED");
    let (response, _) = refused(&server, LINEAR16, server.api_key()).await;
    assert_eq!(response.status(), 402);

    assert_eq!(faults(&server, "DELETE", "", "").await.0, 200);
    assert_eq!(server.faults(), Faults::default());
    assert_eq!(running.close_stream().await.close_code(), Some(1000));
    server.shutdown().await;
}

#[tokio::test]
async fn one_stream_can_have_faults_of_its_own() {
    let server = start(Faults::default());
    let struck = Client::connect(&server, LINEAR16).await;
    let spared = Client::connect(&server, LINEAR16).await;
    let path = format!("/{}", struck.request_id);
    let told = r#"{"close_with": {"code": 1011, "reason": "NET-0000"}}"#;
    assert_eq!(faults(&server, "PUT", &path, told).await.0, 200);
    let ended = struck.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1011));
    let gone = server.wait_for(|w| w.open_now == 1, LIMIT);
    gone.await.expect("one is left");
    for method in ["GET", "PUT", "DELETE"] {
        let (status, body) = faults(&server, method, &path, "{}").await;
        assert_eq!((status, &body["err_code"]), (404, &json!("NOT_FOUND")));
    }

    let path = format!("/{}", spared.request_id);
    let hold = r#"{"never_answer_close": true}"#;
    assert_eq!(faults(&server, "PUT", &path, hold).await.0, 200);
    let shown = faults(&server, "GET", &path, "").await.1;
    assert_eq!(shown["never_answer_close"], true);
    assert_eq!(server.faults(), Faults::default());
    // The general ones are in force again.
    assert_eq!(faults(&server, "DELETE", &path, "").await.0, 200);
    assert_eq!(spared.close_stream().await.close_code(), Some(1000));
    assert!(!server.set_stream_faults("unknown", None));
    server.shutdown().await;
}

#[tokio::test]
async fn bad_json_is_refused_and_the_field_is_named() {
    let server = start(Faults::default());
    for (body, named) in [
        (r#"{"stall": "yes"}"#, "stall"),
        (r#"{"close_delay_ms": -1}"#, "close_delay_ms"),
        (r#"{"drop_after_ms": 1e99}"#, "drop_after_ms"),
        (r#"{"close_with": {"code": "x"}}"#, "close_with.code"),
        (r#"{"close_with": {"code": 70000}}"#, "close_with.code"),
        (r#"{"close_with": {"reason": "x"}}"#, "code"),
        (r#"{"reject_with": {"status": []}}"#, "reject_with.status"),
        (r#"{"reject_with": {"body": "xml"}}"#, "reject_with.body"),
        (r#"{"read_bytes_per_second": 0}"#, "read_bytes_per_second"),
        (r#"{"error": {"code": null}}"#, "error.code"),
        (r#"{"mercy": true}"#, "mercy"),
        ("{", "EOF"),
        ("", "EOF"),
    ] {
        let (status, answer) = faults(&server, "PUT", "", body).await;
        assert_eq!(status, 400, "{body}");
        let message = answer["err_msg"].as_str().expect("text");
        assert!(message.contains(named), "{body}: {message}");
    }
    assert_eq!(server.faults(), Faults::default());
    // As far away as it can be is not a panic.
    let never = format!(
        r#"{{"drop_after_ms": {0}, "garbage_every_ms": {0}}}"#,
        u64::MAX
    );
    assert_eq!(faults(&server, "PUT", "", &never).await.0, 200);
    let client = Client::connect(&server, LINEAR16).await;
    assert_eq!(client.close_stream().await.close_code(), Some(1000));
    server.shutdown().await;
}

#[tokio::test]
async fn an_error_is_sent_once_and_the_stream_goes_on() {
    let server = start(Faults {
        error: Some(ErrorWith {
            variant: "NET-0000".to_owned(),
            description: "described".to_owned(),
            message: "told".to_owned(),
            code: 2006,
            ..ErrorWith::default()
        }),
        ..Faults::default()
    });
    let mut listen = Client::connect(&server, LINEAR16).await;
    let error = listen.next_json().await;
    let expected = json!({
        "type": "Error", "variant": "NET-0000", "description": "described", "message": "told",
    });
    assert_eq!(error, expected);
    let ended = listen.close_stream().await;
    assert_eq!(ended.of_type("Error").len(), 0);
    assert_eq!(ended.of_type("Metadata").len(), 1);

    let mut inference = Client::connect_inference(&server, "").await;
    let error = inference.next_json().await;
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("error"), &json!(2006))
    );
    inference.send_type("session.close").await;
    assert_eq!(inference.read_to_end().await.close_code(), Some(1000));
    assert_eq!(all_ended(&server).await.unacknowledged().count(), 0);
    server.shutdown().await;
}

#[tokio::test]
async fn garbage_comes_in_many_kinds_and_the_stream_goes_on() {
    let server = start(Faults {
        garbage_every: Some(Duration::ZERO),
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    let mut texts = Vec::new();
    let (mut binary, mut pings) = (0, 0);
    while texts.len() < 9 || binary == 0 || pings == 0 {
        match tokio::time::timeout(LIMIT, client.ws.next())
            .await
            .expect("in time")
        {
            Some(Ok(Message::Text(text))) => texts.push(text.to_string()),
            Some(Ok(Message::Binary(_))) => binary += 1,
            Some(Ok(Message::Ping(_))) => pings += 1,
            other => panic!("{other:?}"),
        }
    }
    let no_json = |text: &&String| serde_json::from_str::<Value>(text).is_err();
    assert!(texts.iter().filter(no_json).count() >= 2, "{texts:?}");
    assert!(texts.iter().any(|text| text.contains("Surprise")));
    server.set_faults(Faults::default());
    client.send_type("CloseStream").await;
    while let Some(Ok(_)) = client.ws.next().await {}
    drop(client);
    assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn a_bad_frame_breaks_the_protocol() {
    let server = start(Faults {
        bad_frame_after: Some(Duration::ZERO),
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    let broken = tokio::time::timeout(LIMIT, client.ws.next()).await;
    let broken = broken.expect("in time");
    assert!(
        matches!(broken, Some(Err(Error::Protocol(_)))),
        "{broken:?}"
    );
    drop(client);
    let record = only_record(&server).await;
    assert_eq!(record.end, server_fault("bad_frame_after"));
    server.shutdown().await;
}

#[tokio::test]
async fn a_slow_reader_takes_its_time_and_hurries_when_told() {
    let slow = |rate| Faults {
        read_bytes_per_second: NonZeroU32::new(rate),
        ..Faults::default()
    };
    let server = start(slow(16_000));
    let mut client = Client::connect(&server, LINEAR16).await;
    let begun = Instant::now();
    for _ in 0..5 {
        client.send_audio(&[0; 1600]).await;
    }
    let heard = server.wait_for(|w| w.streams[0].audio_messages == 5, LIMIT);
    heard.await.expect("all arrive");
    // A tenth of a second after each but the last.
    assert!(begun.elapsed() >= Duration::from_millis(400));

    server.set_faults(slow(1));
    for _ in 0..3 {
        client.send_audio(&[0; 1600]).await;
    }
    let heard = server.wait_for(|w| w.streams[0].audio_messages >= 6, LIMIT);
    heard.await.expect("one arrives");
    server.set_faults(Faults::default());
    let ended = client.close_stream().await;
    assert_eq!(ended.of_type("Metadata")[0]["duration"], 0.4);
    assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn a_slow_reader_still_notices_a_reset() {
    let server = start(Faults {
        read_bytes_per_second: NonZeroU32::new(1),
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 3200]).await;
    client.send_audio(&[0; 3200]).await;
    let heard = server.wait_for(|w| w.streams[0].audio_messages == 1, LIMIT);
    heard.await.expect("one arrives");
    client.tcp().set_zero_linger().expect("set");
    drop(client);
    let record = only_record(&server).await;
    assert_eq!(
        (record.end, record.tcp_end),
        (Some(End::Abrupt), Some(TcpEnd::Reset))
    );
    assert_eq!(record.audio_messages, 1);
    server.shutdown().await;
}
