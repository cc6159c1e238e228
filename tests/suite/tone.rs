//! A client that nobody here wrote: PyPI `livekit`, on genuine libwebrtc, publishes a tone; what
//! the STT server decoded must be that tone, for its whole length.

use std::time::Duration;

use rehearsal::stt;
use roomwarden::{daemon::Daemon, transcripts::Sinks};
use serde_json::Value;

use crate::{
    clients::{Client, python, token},
    stage::Stage,
};

const RATE: f64 = 48_000.0;
const HZ: f64 = 440.0;
const SECONDS: f64 = 5.0;
/// The client's tone has a peak of 8000.
const RMS: f64 = 8000.0 / std::f64::consts::SQRT_2;

/// Share of the window's power at `hz` (Goertzel), and its root mean square.
fn tone(window: &[i16], hz: f64) -> (f64, f64) {
    let w = 2.0 * std::f64::consts::PI * hz / RATE;
    let (mut a, mut b, mut power) = (0.0, 0.0, 0.0);
    for &sample in window {
        let x = f64::from(sample);
        power += x * x;
        (a, b) = (x + 2.0 * w.cos() * a - b, a);
    }
    let n = window.len() as f64;
    let at = (a * a + b * b - 2.0 * w.cos() * a * b) * 2.0 / n;
    (
        if power > 0.0 { at / power } else { 0.0 },
        (power / n).sqrt(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_clients_tone_reaches_the_stt_server_whole() {
    let stage = Stage::with(stt::Config::default().keep_audio(Duration::from_secs(20))).await;
    let daemon = Daemon::start(stage.config(), Sinks::default());
    let mut program = python("publish_tone.py");
    program
        .args(["--seconds", &SECONDS.to_string(), "--hz", &HZ.to_string()])
        .args(["--wait-subscriber", "30", "--lead", "1", "--linger", "2"])
        .env("LIVEKIT_TOKEN", token(&stage, "toner"));
    let events = Client::start(program, &stage).end().await;
    stage.all_acknowledged(1).await;

    let stream = &stage.stt.witness().streams[0];
    let audio = stage.stt.audio(&stream.request_id).expect("its audio");
    // 100 ms windows; those with the tone must be as many as it is long, in one piece, and true in
    // pitch and level.
    let windows: Vec<bool> = audio
        .chunks_exact(4800)
        .map(|window| {
            let (share, rms) = tone(window, HZ);
            share > 0.95 && (0.9..1.1).contains(&(rms / RMS))
        })
        .collect();
    let first = windows
        .iter()
        .position(|&tone| tone)
        .expect("no window has the tone");
    let whole = windows[first..].iter().take_while(|&&tone| tone).count();
    let expected = (SECONDS * 10.0) as usize;
    assert!(
        (expected - 2..=expected).contains(&whole),
        "the tone is whole for {whole} of {expected} windows of 100 ms: {windows:?}"
    );

    // The client heard what was made of it, in its own name, with a final one.
    let heard = |event: &&Value| event["event"] == "transcription" && event["identity"] == "toner";
    let last = events
        .iter()
        .rfind(heard)
        .expect("no transcript reached the client");
    assert!(
        last["text"]
            .as_str()
            .is_some_and(|text| text.contains("tone 440 Hz")),
        "{last}"
    );
    let finals = |e: &Value| heard(&e) && e["attributes"]["lk.transcription_final"] == "true";
    assert!(events.iter().any(finals), "{events:#?}");

    drop(daemon);
    stage.end().await;
}
