//! The command line of the real binary, and how it logs.

use std::{ffi::OsStr, process::Output};

use roomwarden::cli::EXIT_USAGE;

use crate::stage::{Binary, Stage};

fn roomwarden(args: &[impl AsRef<OsStr>]) -> Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"))
        .args(args)
        .env_clear()
        .output()
        .expect("roomwarden runs")
}

#[test]
fn the_version_says_with_which_features() {
    let expected = format!(
        "roomwarden {} (with the rehearsal servers)\n",
        env!("CARGO_PKG_VERSION")
    );
    for args in ["version", "--version"] {
        let output = roomwarden(&[args]);
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}

#[test]
fn every_problem_of_the_configuration_is_told_at_once() {
    let output = roomwarden(&["run", "--stt-url", "http://x", "--log-format", "text"]);
    assert_eq!(output.status.code(), Some(EXIT_USAGE.into()));
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 4, "{said}");
    assert!(
        lines.iter().all(|line| line.starts_with("roomwarden: ")),
        "{said}"
    );
    for words in [
        "--stt-url: stt.url is \"http://x\"",
        "set LIVEKIT_API_KEY,",
        "set LIVEKIT_API_SECRET,",
        "set DEEPGRAM_API_KEY,",
    ] {
        assert!(
            lines.iter().any(|line| line.contains(words)),
            "{words}: {said}"
        );
    }
    // A command that is nearly right is suggested.
    let output = roomwarden(&["chekc"]);
    assert_eq!(output.status.code(), Some(EXIT_USAGE.into()));
    assert!(String::from_utf8_lossy(&output.stderr).contains("check"));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_terminal_the_log_is_json_lines() {
    let stage = Stage::new().await;
    let mut binary = Binary::run(&stage, &[("ROOMWARDEN__LOG__FORMAT", "auto")]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    binary.logged("starting").await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(0), "{log}");
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect();
    let closed = lines
        .iter()
        .find(|line| line["message"] == "stream closed: acknowledged")
        .unwrap_or_else(|| panic!("no receipt in {log}"));
    assert_eq!(closed["level"], "INFO");
    assert_eq!(closed["reason"], "shutdown (SIGTERM)");
    alice.leave().await;
    stage.end().await;
}
