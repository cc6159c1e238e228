//! `roomwarden rehearsal`, the real binary, as somebody uses it who has only its help.

use std::{collections::HashMap, process::Stdio};

use livekit_api::services::room::RoomClient;
use roomwarden::cli::EXIT_USAGE;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::{Child, Command},
};

use crate::stage::{LIMIT, lines, send};

const SECRET: &str = "it's a secret of more than 32 characters, with blanks";

fn rehearsal(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roomwarden"));
    command.arg("rehearsal").args(arguments).env_clear();
    command.envs(environment.iter().copied());
    command.stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What it prints to export, as a shell would take it.
async fn started(mut command: Command) -> (Child, HashMap<String, String>) {
    let mut child = command.spawn().expect("it starts");
    let mut output = lines(&mut child);
    let mut exports = String::new();
    for _ in 0..5 {
        let line = tokio::time::timeout(LIMIT, output.next_line()).await;
        let line = line.expect("in time").expect("its output").expect("a line");
        exports += &(line + "\n");
    }
    let shell = Command::new("sh")
        .args(["-c", &format!("{exports}\nenv -0")])
        .env_clear()
        .output();
    let exported = shell.await.expect("a shell").stdout;
    let exported = String::from_utf8(exported).expect("text");
    let pairs = exported.split('\0').filter_map(|pair| pair.split_once('='));
    let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
    (child, pairs.collect())
}

/// Ends it with SIGTERM; what it said on standard error.
async fn ended(mut child: Child) -> String {
    send("TERM", child.id().expect("it runs"));
    let output = tokio::time::timeout(LIMIT, async {
        let mut said = String::new();
        let mut stderr = child.stderr.take().expect("piped");
        stderr.read_to_string(&mut said).await.expect("text");
        (child.wait().await.expect("its status"), said)
    });
    let (status, said) = output.await.expect("it ends");
    assert!(status.success(), "{status}: {said}");
    said
}

async fn create_room(exported: &HashMap<String, String>) {
    let url = exported["LIVEKIT_URL"].replace("ws:", "http:");
    let (key, secret) = (
        &exported["LIVEKIT_API_KEY"],
        &exported["LIVEKIT_API_SECRET"],
    );
    let api = RoomClient::with_api_key(&url, key, secret);
    let created = api.create_room("r", Default::default()).await;
    assert_eq!(created.expect("creation").name, "r");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_key_and_secret_are_kept_and_webhooks_go_where_told() {
    let hook = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let url = format!("http://{}/hook", hook.local_addr().expect("its address"));
    let environment = [("LIVEKIT_API_KEY", "key"), ("LIVEKIT_API_SECRET", SECRET)];
    let (child, exported) = started(rehearsal(&["--webhook-url", &url], &environment)).await;
    assert_eq!(exported["LIVEKIT_API_KEY"], "key");
    assert_eq!(exported["LIVEKIT_API_SECRET"], SECRET);
    create_room(&exported).await;

    let called = tokio::time::timeout(LIMIT, async {
        let (mut stream, _) = hook.accept().await.expect("a call");
        let mut request = String::new();
        let mut part = [0; 4096];
        while !request.contains("\r\n\r\n{") || !request.ends_with('}') {
            let read = stream.read(&mut part).await.expect("the request");
            assert_ne!(read, 0, "{request}");
            request.push_str(std::str::from_utf8(&part[..read]).expect("text"));
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(answer).await.expect("answered");
        request
    });
    let request = called.await.expect("a webhook in time");
    let (_, body) = request.split_once("\r\n\r\n").expect("a body");
    let event: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(event["event"], "room_started");
    let said = ended(child).await;
    assert!(!said.contains(SECRET), "{said}");

    // What is on the command line comes first.
    let other = SECRET.replace(' ', "_");
    let arguments = ["--api-key", "other", "--api-secret", &other];
    let (child, exported) = started(rehearsal(&arguments, &environment)).await;
    assert_eq!(exported["LIVEKIT_API_KEY"], "other");
    assert_eq!(exported["LIVEKIT_API_SECRET"], other);
    create_room(&exported).await;
    ended(child).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_is_too_short_is_refused_and_not_repeated() {
    let environment = [("LIVEKIT_API_SECRET", "too-short-to-be-taken")];
    let output = rehearsal(&[], &environment)
        .output()
        .await
        .expect("it ends");
    assert_eq!(output.status.code(), Some(EXIT_USAGE.into()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("LIVEKIT_API_SECRET must have at least 32"),
        "{said}"
    );
    assert!(!said.contains("too-short"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn its_help_has_all_that_it_takes_and_prints() {
    let output = rehearsal(&["--help"], &[]).output().await.expect("it ends");
    let help = String::from_utf8(output.stdout).expect("text");
    for word in [
        "--bind <IP>",
        "--livekit-port <PORT>",
        "--media-port <PORT>",
        "--stt-port <PORT>",
        "--webhook-url <URL>",
        "--api-key <KEY>",
        "--api-secret <SECRET>",
        "/witness",
        "/faults",
    ] {
        assert!(help.contains(word), "{word} is not in\n{help}");
    }
    let (child, exported) = started(rehearsal(&[], &[])).await;
    for name in exported
        .keys()
        .filter(|name| *name != "PWD" && *name != "_")
    {
        assert!(help.contains(&format!("export {name}=")), "{name}");
    }
    ended(child).await;
}
