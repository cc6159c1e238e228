//! How streams end, and that the STT server's witness says so.

mod stt_client;

use std::time::Duration;

use rehearsal::stt::{Config, End, Server, TcpEnd, Witness};
use serde_json::{Value, json};
use stt_client::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

fn start(config: Config) -> Server {
    Server::start(config).expect("a server")
}

const LINEAR16: &str = "encoding=linear16&sample_rate=16000";

#[tokio::test]
async fn a_connection_that_ends_without_a_close_frame_is_abrupt() {
    let server = start(Config::default());
    let fin = Client::connect(&server, LINEAR16).await;
    drop(fin);
    all_ended(&server).await;
    let reset = Client::connect(&server, LINEAR16).await;
    reset.tcp().set_zero_linger().expect("set");
    drop(reset);
    let witness = server
        .wait_for(|w| w.opened == 2 && w.open_now == 0, LIMIT)
        .await;
    let streams = witness.expect("both end").streams;
    assert_eq!(streams[0].end, Some(End::Abrupt));
    assert_eq!(streams[0].tcp_end, Some(TcpEnd::Fin));
    assert_eq!(streams[1].end, Some(End::Abrupt));
    assert_eq!(streams[1].tcp_end, Some(TcpEnd::Reset));
    server.shutdown().await;
}

#[tokio::test]
async fn a_close_frame_without_close_stream_is_just_that() {
    let server = start(Config::default());
    let mut client = Client::connect(&server, LINEAR16).await;
    client.send_audio(&[0; 640]).await;
    client.ws.close(None).await.expect("closed");
    client.read_to_end().await;
    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::CloseFrame { code: 1005 }));
    assert_eq!(record.tcp_end, Some(TcpEnd::Fin));
    assert!(!record.metadata_sent);
    server.shutdown().await;
}

#[tokio::test]
async fn an_answer_that_is_not_followed_by_the_clients_close_frame_is_not_acknowledged() {
    let server = start(Config::default());
    let mut tcp = bare_stream(&server, LINEAR16).await;
    tcp.write_all(&frame(1, br#"{"type":"CloseStream"}"#))
        .await
        .expect("written");
    // The server has done its part; the client leaves without the last frame.
    server
        .wait_for(|w| w.streams[0].close_code_sent == Some(1000), LIMIT)
        .await
        .expect("the server closes");
    assert_eq!(server.witness().open_now, 1);
    tcp.shutdown().await.expect("FIN");
    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::Abrupt));
    assert!(record.close_requested && record.metadata_sent);
    assert_eq!(record.close_code_received, None);
    server.shutdown().await;
}

#[tokio::test]
async fn a_stream_is_open_until_its_tcp_connection_has_ended() {
    let server = start(Config::default());
    let mut tcp = bare_stream(&server, LINEAR16).await;
    tcp.write_all(&frame(1, br#"{"type":"CloseStream"}"#))
        .await
        .expect("written");
    tcp.write_all(&frame(8, &1000_u16.to_be_bytes()))
        .await
        .expect("written");
    // The server ends its half; the stream still counts.
    let mut rest = Vec::new();
    tcp.read_to_end(&mut rest).await.expect("the server's FIN");
    let witness = server.witness();
    assert_eq!(witness.streams[0].close_code_received, Some(1000));
    assert_eq!((witness.open_now, &witness.streams[0].end), (1, &None));
    drop(tcp);
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test]
async fn a_close_frame_that_is_never_answered_is_not_waited_for_without_end() {
    let server = start(Config::default().close_timeout(Duration::from_millis(100)));
    let mut tcp = bare_stream(&server, LINEAR16).await;
    tcp.write_all(&frame(1, br#"{"type":"CloseStream"}"#))
        .await
        .expect("written");
    let witness = all_ended(&server).await;
    let record = &witness.streams[0];
    assert_eq!(record.end, Some(End::CloseUnanswered));
    assert_eq!(record.tcp_end, Some(TcpEnd::CutByServer));
    assert!(record.metadata_sent);
    server.shutdown().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let server = start(Config::default().write_timeout(Duration::from_millis(100)));
    // A small window fills up soon.
    let mut tcp = bare_stream_with_window(&server, LINEAR16, 2048).await;
    let asking = [frame(2, &[1; 64]), frame(1, br#"{"type":"Finalize"}"#)].concat();
    let flood = asking.repeat(1000);
    // Until the server stops reading, since it cannot write, and then resets the connection.
    let flooding = async { while tcp.write_all(&flood).await.is_ok() {} };
    tokio::time::timeout(LIMIT, flooding)
        .await
        .expect("in time");
    let witness = all_ended(&server).await;
    assert_eq!(witness.streams[0].end, Some(End::NotReading));
    assert_eq!(witness.streams[0].tcp_end, Some(TcpEnd::CutByServer));
    server.shutdown().await;
}

#[tokio::test]
async fn the_witness_is_served_as_json_without_the_key() {
    let server = start(Config::default());
    let key = server.api_key().to_owned();
    let mut client = Client::connect(&server, "model=nova-3&tag=here").await;
    client.send_type("KeepAlive").await;
    server
        .wait_for(|w| w.streams[0].texts.keep_alive == 1, LIMIT)
        .await
        .expect("KeepAlive arrives");
    let response = http_get(&server, "/witness").await;
    let (head, body) = response.split_once("\r\n\r\n").expect("a response");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let witness: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(witness["open_now"], 1);
    let stream = &witness["streams"][0];
    assert_eq!(stream["request_id"], client.request_id.as_str());
    assert_eq!(
        stream["parameters"],
        json!([["model", "nova-3"], ["tag", "here"]])
    );
    assert_eq!(stream["end"], Value::Null);
    assert!(!body.contains(&key));
    assert!(key.ends_with(&stream["key"].as_str().expect("text")[3..]));
    client.close_stream().await;
    all_ended(&server).await;
    let response = http_get(&server, "/witness").await;
    assert!(
        response.contains(r#""end":{"kind":"acknowledged"}"#),
        "{response}"
    );
    let (_, body) = response.split_once("\r\n\r\n").expect("a response");
    let read_back: Witness = serde_json::from_str(body).expect("a witness");
    assert_eq!(read_back.streams[0].end, Some(End::Acknowledged));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_are_each_accounted_for() {
    const STREAMS: usize = 100;
    // However slow the machine is, none of them is to time out while it waits for the others.
    let config = Config::default().idle_timeout(LIMIT * 10);
    let server = std::sync::Arc::new(start(config));
    let all_open = std::sync::Arc::new(tokio::sync::Barrier::new(STREAMS));
    let mut clients = tokio::task::JoinSet::new();
    for index in 0..STREAMS {
        let server = std::sync::Arc::clone(&server);
        let all_open = std::sync::Arc::clone(&all_open);
        clients.spawn(async move {
            let mut client = Client::connect(&server, LINEAR16).await;
            client.send_audio(&vec![0; 640 * (index + 1)]).await;
            all_open.wait().await;
            client.close_stream().await
        });
    }
    let ended = clients.join_all().await;
    assert!(ended.iter().all(|e| e.close_code() == Some(1000)));
    let witness = all_ended(&server).await;
    assert_eq!((witness.opened, witness.peak), (100, 100));
    assert_eq!(witness.unacknowledged().count(), 0);
    for ended in &ended {
        let record = witness.stream(&ended.request_id).expect("a record");
        assert_eq!(
            ended.of_type("Metadata")[0]["duration"],
            record.audio_seconds
        );
        assert_eq!(record.audio_seconds, record.audio_bytes as f64 / 32_000.0);
    }
}

#[tokio::test]
async fn a_shutdown_ends_streams_and_leaves_nothing_listening() {
    let server = start(Config::default());
    let address = server.address();
    let mut tcp = bare_stream(&server, LINEAR16).await;
    server.shutdown().await;
    let mut rest = Vec::new();
    // A close frame, then the end, clean or not.
    let _ = tcp.read_to_end(&mut rest).await;
    assert_eq!(rest[..4], [0x88, rest[1], 0x03, 0xe9]);
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_dropped_server_leaves_nothing_running() {
    let server = start(Config::default());
    let address = server.address();
    let mut tcp = bare_stream(&server, LINEAR16).await;
    drop(server);
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(LIMIT, tcp.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the connection ends");
    assert!(TcpStream::connect(address).await.is_err());
}

async fn http_get(server: &Server, path: &str) -> String {
    let mut tcp = TcpStream::connect(server.address())
        .await
        .expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.expect("written");
    let mut response = String::new();
    tcp.read_to_string(&mut response).await.expect("text");
    response
}
