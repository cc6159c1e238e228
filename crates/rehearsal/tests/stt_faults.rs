//! What the STT server does wrong when told to, and that its witness still tells the truth.

mod stt_client;

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use rehearsal::stt::{
    CloseWith, Config, End, ErrorBody, Faults, Reject, Server, StreamRecord, TcpEnd,
};
use serde_json::Value;
use stt_client::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const LINEAR16: &str = "encoding=linear16&sample_rate=16000";
const CLOSE_STREAM: &[u8] = br#"{"type":"CloseStream"}"#;

fn start(faults: Faults) -> Server {
    Server::start(Config::default().faults(faults)).expect("a server")
}

async fn only_record(server: &Server) -> StreamRecord {
    let witness = all_ended(server).await;
    assert_eq!(witness.opened, 1);
    witness.streams[0].clone()
}

/// CloseStream has been sent and the server has read it.
async fn close_stream_arrives(server: &Server) {
    let arrived = server.wait_for(|w| w.streams[0].close_requested, LIMIT);
    arrived.await.expect("CloseStream arrives");
}

#[tokio::test]
async fn close_stream_is_never_answered_not_even_by_a_close_frame() {
    let server = start(Faults {
        never_answer_close: true,
        ..Faults::default()
    });
    let mut tcp = bare_stream(&server, LINEAR16).await;
    // Enough for a final result, had it been answered.
    tcp.write_all(&frame(2, &[1; 120])).await.expect("written");
    tcp.write_all(&frame(1, CLOSE_STREAM))
        .await
        .expect("written");
    close_stream_arrives(&server).await;
    tcp.write_all(&frame(8, &1000_u16.to_be_bytes()))
        .await
        .expect("written");
    let closed = server.wait_for(|w| w.streams[0].close_code_received.is_some(), LIMIT);
    let witness = closed.await.expect("the close frame arrives");
    assert_eq!(witness.open_now, 1);
    tcp.shutdown().await.expect("FIN");
    let mut received = Vec::new();
    tcp.read_to_end(&mut received).await.expect("the end");
    assert!(received.is_empty(), "{received:?}");
    let record = only_record(&server).await;
    assert_eq!(record.end, Some(End::CloseFrame { code: 1000 }));
    assert_eq!(record.tcp_end, Some(TcpEnd::Fin));
    assert_eq!((record.results_sent, record.metadata_sent), (0, false));
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_gives_up_on_an_answer_is_abrupt() {
    for (reset, tcp_end) in [(false, TcpEnd::Fin), (true, TcpEnd::Reset)] {
        let server = start(Faults {
            never_answer_close: true,
            ..Faults::default()
        });
        let mut client = Client::connect(&server, LINEAR16).await;
        client.send_type("CloseStream").await;
        close_stream_arrives(&server).await;
        if reset {
            client.tcp().set_zero_linger().expect("set");
        }
        drop(client);
        let record = only_record(&server).await;
        assert_eq!(record.end, Some(End::Abrupt));
        assert_eq!(record.tcp_end, Some(tcp_end));
        assert!(record.close_requested);
        server.shutdown().await;
    }
}

#[tokio::test]
async fn a_held_answer_comes_when_the_fault_is_taken_back() {
    let server = start(Faults {
        never_answer_close: true,
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    client
        .send_audio(&bytes(&tone(440.0, 0.3, 1.0, 16_000)))
        .await;
    client.send_type("CloseStream").await;
    close_stream_arrives(&server).await;
    assert_eq!(server.witness().streams[0].results_sent, 0);
    server.set_faults(Faults::default());
    let ended = client.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1000));
    assert_eq!(
        (ended.finals().len(), ended.of_type("Metadata").len()),
        (1, 1)
    );
    assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn the_answer_to_close_stream_can_be_delayed_and_audio_is_flushed_at_once() {
    let delay = Duration::from_millis(300);
    let by_config = Server::start(Config::default().close_delay(delay)).expect("a server");
    let by_fault = start(Faults {
        close_delay: Some(delay),
        ..Faults::default()
    });
    for server in [by_config, by_fault] {
        let mut client = Client::connect(&server, LINEAR16).await;
        client
            .send_audio(&bytes(&tone(440.0, 0.3, 1.0, 16_000)))
            .await;
        let begun = Instant::now();
        client.send_type("CloseStream").await;
        assert_eq!(client.next_json().await["type"], "Results");
        assert!(!server.witness().streams[0].metadata_sent);
        let ended = client.read_to_end().await;
        assert!(begun.elapsed() >= delay);
        assert_eq!(ended.messages.len(), 1);
        assert_eq!(ended.messages[0]["type"], "Metadata");
        assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
        server.shutdown().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_during_the_delay_is_not_acknowledged() {
    let server = start(Faults {
        close_delay: Some(LIMIT * 10),
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_type("CloseStream").await;
    close_stream_arrives(&server).await;
    client.ws.close(None).await.expect("sent");
    client.read_to_end().await;
    let record = only_record(&server).await;
    assert_eq!(record.end, Some(End::CloseFrame { code: 1005 }));
    assert!(!record.metadata_sent);
    server.shutdown().await;
}

#[tokio::test]
async fn final_results_can_be_delayed_and_nothing_overtakes_them() {
    let delay = Duration::from_millis(300);
    let server = start(Faults {
        final_delay: delay,
        ..Faults::default()
    });
    let query = format!("{LINEAR16}&interim_results=true");
    let mut client = Client::connect(&server, &query).await;
    let begun = Instant::now();
    client
        .send_audio(&bytes(&tone(440.0, 0.3, 1.0, 16_000)))
        .await;
    client.send_type("CloseStream").await;
    assert_eq!(client.next_json().await["is_final"], false);
    let ended = client.read_to_end().await;
    assert!(begun.elapsed() >= delay);
    let kinds: Vec<_> = ended.messages.iter().map(|m| &m["type"]).collect();
    assert_eq!(kinds, ["Results", "Metadata"]);
    assert_eq!(only_record(&server).await.end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn handshakes_are_rejected_as_told_until_told_otherwise() {
    let server = start(Faults {
        reject_with: Some(Reject::status(402)),
        ..Faults::default()
    });
    let key = server.api_key().to_owned();
    let (response, body) = refused(&server, LINEAR16, &key).await;
    assert_eq!(response.status(), 402);
    assert_eq!(body["err_code"], "ASR_PAYMENT_REQUIRED");
    assert!(body["err_msg"].is_string());
    let header = |name: &str| response.headers()[name].to_str().expect("text");
    assert_eq!(body["request_id"], header("dg-request-id"));
    assert!(header("dg-error").starts_with("ASR_PAYMENT_REQUIRED"));

    let told = Reject::status(429)
        .message("slow down\nplease")
        .retry_after(Duration::from_secs(5))
        .body(ErrorBody::Category);
    server.set_faults(Faults {
        reject_with: Some(told),
        ..Faults::default()
    });
    let (response, body) = refused(&server, LINEAR16, &key).await;
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "5");
    assert_eq!(body["category"], "TOO_MANY_REQUESTS");
    assert_eq!(body["message"], "slow down\nplease");
    assert_eq!(body["err_code"], Value::Null);

    server.set_faults(Faults::default());
    Client::connect(&server, LINEAR16)
        .await
        .close_stream()
        .await;
    let witness = all_ended(&server).await;
    assert_eq!((witness.opened, witness.rejections()), (1, 2));
    server.shutdown().await;
}

#[tokio::test]
async fn every_refusal_has_its_status_and_code() {
    let server = start(Faults::default());
    let key = server.api_key().to_owned();
    for (status, code) in [
        (400, "Bad Request"),
        (401, "INVALID_AUTH"),
        (402, "ASR_PAYMENT_REQUIRED"),
        (403, "INSUFFICIENT_PERMISSIONS"),
        (404, "PROJECT_NOT_FOUND"),
        (429, "TOO_MANY_REQUESTS"),
        (500, "INTERNAL_SERVER_ERROR"),
        (503, "SERVICE_UNAVAILABLE"),
        (504, "GATEWAY_TIMEOUT"),
    ] {
        server.set_faults(Faults {
            reject_with: Some(Reject::status(status)),
            ..Faults::default()
        });
        let (response, body) = refused(&server, LINEAR16, &key).await;
        assert_eq!(
            (response.status().as_u16(), &body["err_code"]),
            (status, &code.into())
        );
        assert_eq!(response.headers().get("retry-after"), None);
    }
    let witness = server.witness();
    assert_eq!((witness.opened, witness.rejections()), (0, 9));
    server.shutdown().await;
}

#[tokio::test]
async fn so_many_handshakes_are_refused_and_no_more() {
    let server = start(Faults {
        reject_with: Some(Reject::status(503)),
        handshakes: Some(2),
        ..Faults::default()
    });
    for left in [1, 0] {
        let (response, _) = refused(&server, LINEAR16, server.api_key()).await;
        assert_eq!(response.status(), 503);
        assert_eq!(server.faults().handshakes, Some(left));
    }
    let client = Client::connect(&server, LINEAR16).await;
    assert_eq!(client.close_stream().await.close_code(), Some(1000));
    server.shutdown().await;
}

#[tokio::test]
async fn a_held_handshake_gets_no_answer_until_the_fault_is_taken_back() {
    let server = start(Faults {
        hold_handshake: true,
        handshakes: Some(1),
        ..Faults::default()
    });
    let key = server.api_key();
    let request = format!(
        "GET /v1/listen?{LINEAR16} HTTP/1.1\r\nhost: x\r\nauthorization: Token {key}\r\n\
         connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    );
    let mut held = tokio::net::TcpStream::connect(server.address())
        .await
        .expect("connected");
    held.write_all(request.as_bytes()).await.expect("written");
    let arrived = server.wait_for(|w| w.held_handshakes == 1, LIMIT);
    arrived.await.expect("the handshake arrives");
    // Only one is held.
    let other = Client::connect(&server, LINEAR16).await;
    assert_eq!(other.close_stream().await.close_code(), Some(1000));
    let mut answer = [0; 12];
    let nothing = held.try_read(&mut answer).expect_err("no answer");
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(server.witness().opened, 1);

    server.set_faults(Faults::default());
    let answered = tokio::time::timeout(LIMIT, held.read_exact(&mut answer)).await;
    answered.expect("in time").expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 101");
    assert_eq!(server.witness().opened, 2);
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_does_not_wait_for_a_held_handshake_leaves_nothing_behind() {
    let runtime = tokio::runtime::Handle::current();
    let server = start(Faults {
        hold_handshake: true,
        ..Faults::default()
    });
    let before = runtime.metrics().num_alive_tasks();
    for wait_for_server in [false, true] {
        let mut tcp = tokio::net::TcpStream::connect(server.address())
            .await
            .expect("connected");
        let request = "GET /v1/listen HTTP/1.1\r\nhost: x\r\n\r\n";
        tcp.write_all(request.as_bytes()).await.expect("written");
        let held = u64::from(wait_for_server) + 1;
        let arrived = server.wait_for(|w| w.held_handshakes == held, LIMIT);
        arrived.await.expect("the handshake arrives");
        if wait_for_server {
            // One that stays does not keep the server from stopping.
            let stopped = tokio::time::timeout(LIMIT, server.shutdown()).await;
            stopped.expect("it stops");
            return;
        }
        drop(tcp);
        let ended = async {
            while runtime.metrics().num_alive_tasks() > before {
                tokio::task::yield_now().await;
            }
        };
        let ended = tokio::time::timeout(LIMIT, ended).await;
        ended.expect("the connection's task ends");
    }
}

#[tokio::test]
async fn a_status_that_is_no_error_is_sent_as_500() {
    for status in [0, 101, 200, 302, 9999] {
        let server = start(Faults {
            reject_with: Some(Reject::status(status)),
            ..Faults::default()
        });
        let (response, _) = refused(&server, LINEAR16, server.api_key()).await;
        assert_eq!(response.status(), 500, "{status}");
        assert_eq!(server.witness().rejected.get(&500), Some(&1));
        server.shutdown().await;
    }
}

#[tokio::test]
async fn a_dropped_stream_is_reset() {
    let server = start(Faults::default());
    let mut tcp = bare_stream(&server, LINEAR16).await;
    // Applies to streams that run already.
    server.set_faults(Faults {
        drop_after: Some(Duration::ZERO),
        ..Faults::default()
    });
    let mut received = Vec::new();
    let ended = tokio::time::timeout(LIMIT, tcp.read_to_end(&mut received)).await;
    let error = ended.expect("in time").expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let record = only_record(&server).await;
    let fault = "drop_after".to_owned();
    assert_eq!(record.end, Some(End::ServerFault { fault }));
    assert_eq!(record.tcp_end, Some(TcpEnd::CutByServer));
    server.shutdown().await;
}

#[tokio::test]
async fn a_stream_can_be_closed_with_any_code() {
    let reason = "NET-0000".to_owned() + &"é".repeat(100);
    for (code, sent) in [(1011, 1011), (4400, 4400), (1005, 1011), (1, 1011)] {
        let server = start(Faults {
            close_with: Some(CloseWith {
                code,
                reason: reason.clone(),
                after: Duration::from_millis(10),
            }),
            ..Faults::default()
        });
        let client = Client::connect(&server, LINEAR16).await;
        let ended = client.read_to_end().await;
        assert_eq!(ended.close_code(), Some(sent));
        let told = ended.close.expect("a close frame").reason;
        assert!(
            reason.starts_with(told.as_str()) && told.len() >= 120,
            "{told}"
        );
        let record = only_record(&server).await;
        let fault = "close_with".to_owned();
        assert_eq!(record.end, Some(End::ServerFault { fault }));
        assert_eq!(record.close_code_received, Some(sent));
        server.shutdown().await;
    }
}

#[tokio::test]
async fn a_close_overtakes_results_that_are_held_back() {
    let server = start(Faults {
        final_delay: LIMIT * 10,
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    client
        .send_audio(&bytes(&tone(440.0, 0.3, 1.0, 16_000)))
        .await;
    client.send_type("Finalize").await;
    let finalized = server.wait_for(|w| w.streams[0].texts.finalize == 1, LIMIT);
    finalized.await.expect("Finalize arrives");
    server.set_faults(Faults {
        close_with: Some(CloseWith {
            code: 1011,
            reason: "NET-0000".to_owned(),
            after: Duration::ZERO,
        }),
        final_delay: LIMIT * 10,
        ..Faults::default()
    });
    let ended = client.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1011));
    assert!(ended.messages.is_empty());
    let fault = "close_with".to_owned();
    assert_eq!(
        only_record(&server).await.end,
        Some(End::ServerFault { fault })
    );
    server.shutdown().await;
}

#[tokio::test]
async fn a_stalled_stream_neither_reads_nor_writes_and_goes_on_afterwards() {
    let server = start(Faults::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 3200]).await;
    let heard = server.wait_for(|w| w.streams[0].audio_messages == 1, LIMIT);
    heard.await.expect("audio arrives");
    server.set_faults(Faults {
        stall: true,
        ..Faults::default()
    });
    // Handshakes go on.
    let other = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 3200]).await;
    client.send_type("CloseStream").await;
    let silent = tokio::time::timeout(Duration::from_millis(200), client.ws.next()).await;
    assert!(silent.is_err(), "{silent:?}");
    let stalled = server.witness();
    assert_eq!(stalled.streams[0].audio_messages, 1);
    assert_eq!(stalled.open_now, 2);

    server.set_faults(Faults::default());
    let ended = client.read_to_end().await;
    assert_eq!(ended.close_code(), Some(1000));
    assert_eq!(ended.of_type("Metadata")[0]["duration"], 0.2);
    other.close_stream().await;
    assert_eq!(all_ended(&server).await.unacknowledged().count(), 0);
    server.shutdown().await;
}

#[tokio::test]
async fn a_stalled_stream_is_not_sent_what_was_ready_before() {
    let server = start(Faults {
        final_delay: LIMIT * 10,
        ..Faults::default()
    });
    let mut client = Client::connect(&server, LINEAR16).await;
    client
        .send_audio(&bytes(&tone(440.0, 0.3, 1.0, 16_000)))
        .await;
    client.send_type("Finalize").await;
    let finalized = server.wait_for(|w| w.streams[0].texts.finalize == 1, LIMIT);
    finalized.await.expect("Finalize arrives");
    // From now on it is due.
    server.set_faults(Faults {
        stall: true,
        ..Faults::default()
    });
    let silent = tokio::time::timeout(Duration::from_millis(200), client.ws.next()).await;
    assert!(silent.is_err(), "{silent:?}");
    server.set_faults(Faults::default());
    assert_eq!(client.next_json().await["type"], "Results");
    client.close_stream().await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_stalled_stream_still_notices_that_its_connection_ended() {
    for (reset, tcp_end) in [(false, TcpEnd::Fin), (true, TcpEnd::Reset)] {
        let server = start(Faults {
            stall: true,
            ..Faults::default()
        });
        let mut client = Client::connect(&server, LINEAR16).await;
        client.send_audio(&[0; 3200]).await;
        if reset {
            client.tcp().set_zero_linger().expect("set");
        }
        drop(client);
        let record = only_record(&server).await;
        assert_eq!(record.end, Some(End::Abrupt));
        assert_eq!(record.tcp_end, Some(tcp_end));
        assert_eq!(record.audio_messages, 0);
        server.shutdown().await;
    }
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_streams_that_hang() {
    for faults in [
        Faults {
            never_answer_close: true,
            ..Faults::default()
        },
        Faults {
            stall: true,
            ..Faults::default()
        },
        Faults {
            close_delay: Some(LIMIT * 10),
            ..Faults::default()
        },
    ] {
        let server = start(faults);
        let mut client = Client::connect(&server, LINEAR16).await;
        client.send_type("CloseStream").await;
        let done = tokio::time::timeout(LIMIT, server.shutdown()).await;
        assert!(done.is_ok());
    }
}
