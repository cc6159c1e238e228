//! `roomwarden dev` on the real binary: what it prints is enough to join, and Ctrl-C closes all.

use std::process::Stdio;

use livekit_net::{Header, HttpClientExt, HttpResponse};
use rehearsal::{
    speaker::{Place, Recording, Speaker},
    stt,
};
use tokio::process::Command;

use crate::stage::{LIMIT, lines, send};

async fn get(url: &str, token: Option<&str>) -> HttpResponse {
    let client = livekit_net::http_client().expect("a client");
    let headers = token.map(|token| Header {
        name: "Authorization".to_owned(),
        value: format!("Bearer {token}"),
    });
    let answer = client.get(url.to_owned(), headers.into_iter().collect());
    answer.await.expect("an answer")
}

/// Asks the STT server in the other process until the condition holds.
async fn witnessed(url: &str, what: &str, condition: impl Fn(&stt::Witness) -> bool) {
    let mut last = None;
    let seen = async {
        loop {
            let witness: stt::Witness =
                serde_json::from_slice(&get(url, None).await.body).expect("a witness");
            if condition(&witness) {
                return;
            }
            last = Some(witness);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let seen = tokio::time::timeout(LIMIT, seen).await;
    assert!(seen.is_ok(), "{what}: the STT server says {last:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_transcribed_and_an_interrupt_closes_everything() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_roomwarden"))
        .args(["dev", "--speakers", "1"])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("roomwarden starts");
    let mut output = lines(&mut child);
    let mut printed: Vec<String> = Vec::new();
    while !printed.iter().any(|line| line.contains("Ctrl-C")) {
        let line = tokio::time::timeout(LIMIT, output.next_line()).await;
        let line = line.expect("it says how to join").expect("its output");
        printed.push(line.expect("more of it"));
    }
    let after = |words: &str| {
        let found = printed.iter().find_map(|line| line.split_once(words));
        let found = found.unwrap_or_else(|| panic!("no {words:?} in {printed:#?}"));
        found.1.trim().to_owned()
    };
    let url = after("export LIVEKIT_URL=");
    let witness = after("what it saw: ");

    let token = after("  ann  ");
    let validate = format!("{}/rtc/validate", url.replace("ws://", "http://"));
    assert_eq!(get(&validate, Some(&token)).await.status, 200);

    let file = include_bytes!("../../crates/rehearsal/assets/brian.opus");
    let place = Place {
        url: &url,
        api_key: &after("export LIVEKIT_API_KEY="),
        api_secret: &after("export LIVEKIT_API_SECRET="),
        room: "dev",
        identity: "guest",
    };
    let recording = Recording::from_ogg(file).expect("recording");
    let guest = Speaker::join(place, recording).await.expect("guest joins");
    witnessed(&witness, "two streams with finals", |w| {
        let live = w.streams.iter();
        live.filter(|s| s.end.is_none() && s.finals_sent > 0)
            .count()
            == 2
    })
    .await;
    guest.leave().await;
    witnessed(&witness, "the guest's stream is acknowledged", |w| {
        let ended: Vec<_> = w.streams.iter().filter_map(|s| s.end.as_ref()).collect();
        ended == [&stt::End::Acknowledged]
    })
    .await;

    send("INT", child.id().expect("running"));
    let end = async {
        while let Some(line) = output.next_line().await.expect("its output") {
            printed.push(line);
        }
        child.wait().await.expect("its status")
    };
    let status = tokio::time::timeout(LIMIT, end).await.expect("it ends");
    let text = printed.join("\n");
    assert_eq!(status.code(), Some(0), "{text}");
    for words in [
        "[dev] guest: speech",
        "[dev] speaker-1: speech",
        "shutdown (SIGINT)",
        "opened 2, acknowledged 2",
        "open now: 0 by the registry, 0 by the kernel, 0 by the STT server",
        "all agree",
    ] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    assert!(!text.contains('\u{1b}'), "colours, and no terminal: {text}");
}

#[test]
fn the_demo_is_acknowledged_by_all() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"))
        .args(["demo", "--json"])
        .env_clear()
        .output()
        .expect("roomwarden runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).expect("one JSON object");
    for (field, value) in [
        ("opened", 6),
        ("acknowledged", 6),
        ("witness_opened", 6),
        ("witness_acknowledged", 6),
        ("witness_open", 0),
    ] {
        assert_eq!(report[field], value, "{field}: {text}");
    }
    // Who vanishes says no farewell: it is the silence that is noticed, or the lost connection.
    let receipts = report["receipts"].as_array().expect("receipts");
    let erin = receipts
        .iter()
        .find(|receipt| receipt["participant"] == "erin");
    let reason = erin.expect("her receipt")["reason"].to_string();
    assert!(
        ["\"idle\"", "{\"participant_left\":\"connection_timeout\"}"].contains(&&*reason),
        "{reason}"
    );
}
