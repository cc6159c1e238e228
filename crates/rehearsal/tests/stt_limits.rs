//! How many streams the STT server's provider counts, and what it does above the limit.

mod stt_client;

use std::time::Duration;

use rehearsal::stt::{Config, End, Protocol, Server};
use stt_client::*;

const LINEAR16: &str = "encoding=linear16&sample_rate=16000";
const FOREVER: Duration = Duration::from_secs(3600);

fn start(config: Config) -> Server {
    Server::start(config).expect("a server")
}

#[tokio::test]
async fn streams_that_were_dropped_go_on_counting_after_everything_is_closed() {
    let config = Config::default().max_streams(3).abrupt_linger(FOREVER);
    let server = start(config.retry_after(Duration::from_secs(7)));
    for _ in 0..3 {
        drop(Client::connect(&server, LINEAR16).await);
    }
    let ended = server.wait_for(|w| w.opened == 3 && w.open_now == 0, LIMIT);
    let witness = ended.await.expect("all end");
    assert_eq!((witness.open_now, witness.counted_now), (0, 3));
    assert_eq!(witness.counted[&Protocol::Listen], 3);
    assert!(witness.streams.iter().all(|s| s.freed_ms.is_none()));

    let (response, body) = refused(&server, LINEAR16, server.api_key()).await;
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "7");
    assert_eq!(body["err_code"], "TOO_MANY_REQUESTS");
    assert_eq!(server.witness().rejected[&429], 1);
    server.shutdown().await;
}

#[tokio::test]
async fn acknowledged_streams_are_freed_at_once() {
    let server = start(Config::default().max_streams(1).abrupt_linger(FOREVER));
    for opened in 1..=5 {
        Client::connect(&server, LINEAR16)
            .await
            .close_stream()
            .await;
        let freed = server.wait_for(|w| w.opened == opened && w.counted_now == 0, LIMIT);
        let witness = freed.await.expect("the stream is freed");
        assert_eq!(witness.open_now, 0);
    }
    let witness = server.witness();
    assert_eq!(witness.unacknowledged().count(), 0);
    assert!(witness.streams.iter().all(|s| s.freed_ms == s.ended_ms));
    server.shutdown().await;
}

#[tokio::test]
async fn open_streams_count_too_and_there_is_no_retry_after_unless_asked_for() {
    let server = start(Config::default().max_streams(1));
    let client = Client::connect(&server, LINEAR16).await;
    let (response, _) = refused(&server, LINEAR16, server.api_key()).await;
    assert_eq!(response.status(), 429);
    assert!(!response.headers().contains_key("retry-after"));
    assert_eq!(server.witness().counted_now, 1);
    client.close_stream().await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_dropped_stream_is_freed_once_it_has_lingered() {
    let linger = Duration::from_millis(300);
    let server = start(Config::default().max_streams(1).abrupt_linger(linger));
    drop(Client::connect(&server, LINEAR16).await);
    let freed = server.wait_for(|w| w.opened == 1 && w.counted_now == 0, LIMIT);
    let record = freed.await.expect("the stream is freed").streams[0].clone();
    assert_eq!(record.end, Some(End::Abrupt));
    let lingered = record.freed_ms.expect("freed") - record.ended_ms.expect("ended");
    assert!(lingered >= 299, "{lingered} ms");
    Client::connect(&server, LINEAR16)
        .await
        .close_stream()
        .await;
    server.shutdown().await;
}
