//! The engine, under the SDK, and clients on genuine libwebrtc hear each other: the same sound goes
//! both ways, and what arrives is compared with it, packet by packet and as a wave.

use std::path::Path;

use futures_util::StreamExt as _;
use livekit::{
    options::TrackPublishOptions,
    prelude::*,
    webrtc::{
        audio_frame::AudioFrame,
        audio_source::{AudioSourceOptions, native::NativeAudioSource},
        audio_stream::native::{NativeAudioStream, NativeAudioStreamOptions},
        encoded_audio::{EncodedAudioFrame, EncodedAudioStream},
    },
};
use tokio::process::Command;

use crate::{
    clients::{Client, in_browser, python, token},
    stage::Stage,
};

const RATE: u32 = 48_000;
/// A tone that rises evenly, so that each moment of it is unlike all others.
const HZ: f64 = 300.0;
const TO_HZ: f64 = 3_400.0;
const SECONDS: usize = 5;
const AMPLITUDE: f64 = 8_000.0;
/// It is compared in pieces of this many samples.
const PIECE: usize = RATE as usize / 5;
/// Above this coefficient of correlation they are alike.
const ALIKE: f64 = 0.95;
/// So many of the 25 pieces have to be. All are, unless the machine is busy or a jitter buffer adapts;
/// where one packet in six is lost, five are.
const ENOUGH: usize = 15;
/// RTP time of a packet.
const PACKET: u32 = RATE / 50;

#[tokio::test(flavor = "multi_thread")]
async fn pypi_livekit_and_the_engine_hear_each_other() {
    hear_each_other(|heard| {
        let mut program = python("publish_tone.py");
        program
            .args(["--hz", &HZ.to_string(), "--to-hz", &TO_HZ.to_string()])
            .args(["--seconds", &SECONDS.to_string(), "--lead", "1"])
            .args(["--wait-subscriber", "30", "--hear"])
            .arg(heard);
        program
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_and_the_engine_hear_each_other() {
    hear_each_other(|heard| {
        let mut program = in_browser("rising_tone.mjs");
        program
            .args([HZ, TO_HZ, SECONDS as f64].map(|number| number.to_string()))
            .arg(heard);
        program
    })
    .await;
}

/// The client plays the tone once it is subscribed to, and writes what it hears to the given file.
async fn hear_each_other(client: impl FnOnce(&Path) -> Command) {
    let stage = Stage::new().await;
    let (url, engine) = (stage.rooms.url(), token(&stage, "engine"));
    let joined = Room::connect(&url, &engine, RoomOptions::default()).await;
    let (room, mut events) = joined.expect("joins");
    let file = stage.state.path().join("heard");
    let mut program = client(&file);
    program.env("LIVEKIT_TOKEN", token(&stage, "client"));
    let mut client = Client::start(program, &stage);

    let talking = async {
        let (source, track) = publish(&room).await;
        client.says("hears").await;
        let silence = vec![0; RATE as usize];
        for sound in [&silence, &tone(), &silence] {
            play(&source, sound).await;
        }
        client.says("tone_ended").await;
        // What is on its way still arrives.
        play(&source, &silence).await;
        let withdrawn = room.local_participant().unpublish_track(&track).await;
        withdrawn.expect("unpublished");
        client.end().await;
    };
    let listening = async {
        let track = loop {
            if let RoomEvent::TrackSubscribed { track, .. } = events.recv().await.expect("an event")
                && let RemoteTrack::Audio(track) = track
            {
                break track.rtc_track();
            }
        };
        let mut packets = EncodedAudioStream::new(&track, 256);
        let options = NativeAudioStreamOptions {
            queue_size_frames: Some(0),
        };
        let pcm = NativeAudioStream::with_options(track, RATE as i32, 1, options);
        let pcm = pcm.map(|frame| frame.data.into_owned());
        let (received, pcm) =
            tokio::join!((&mut packets).collect::<Vec<_>>(), pcm.collect::<Vec<_>>());
        (received, packets.dropped(), pcm.concat())
    };
    let ((), (received, dropped, pcm)) = tokio::join!(talking, listening);

    all_arrived(&received, dropped);
    let client_heard = std::fs::read(&file).expect("what the client heard");
    let client_heard: Vec<i16> = client_heard
        .chunks_exact(2)
        .map(|sample| i16::from_le_bytes([sample[0], sample[1]]))
        .collect();
    // The engine neither stretches nor cuts. The encoder, when it changes its mode, shifts a little.
    assert!(is_the_tone("the engine", &pcm) < RATE as usize / 1000);
    is_the_tone("the client", &client_heard);
    room.close().await.expect("closes");
    stage.end().await;
}

async fn publish(room: &Room) -> (NativeAudioSource, TrackSid) {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), RATE, 1, 200);
    let track = LocalAudioTrack::create_audio_track("tone", RtcAudioSource::Native(source.clone()));
    let options = TrackPublishOptions {
        source: TrackSource::Microphone,
        dtx: false,
        ..Default::default()
    };
    let published = room
        .local_participant()
        .publish_track(LocalTrack::Audio(track), options)
        .await;
    (source, published.expect("published").sid())
}

/// At the pace of the source.
async fn play(source: &NativeAudioSource, samples: &[i16]) {
    for samples in samples.chunks(RATE as usize / 100) {
        let frame = AudioFrame {
            data: samples.into(),
            sample_rate: RATE,
            num_channels: 1,
            samples_per_channel: samples.len() as u32,
        };
        source.capture_frame(&frame).await.expect("captured");
    }
}

fn tone() -> Vec<i16> {
    let length = SECONDS * RATE as usize;
    let [first, last] = [HZ, TO_HZ].map(|hz| std::f64::consts::TAU * hz / f64::from(RATE));
    let rise = (last - first) / length as f64;
    (0..length)
        .map(|n| n as f64)
        .map(|n| (AMPLITUDE * ((first + rise * n / 2.0) * n).sin()).round() as i16)
        .collect()
}

/// 50 packets a second by the sender's clock, none missing.
fn all_arrived(packets: &[EncodedAudioFrame], dropped: u64) {
    println!("{} packets, {dropped} dropped", packets.len());
    assert_eq!(dropped, 0);
    assert!(packets.len() >= 50 * SECONDS, "{}", packets.len());
    for pair in packets.windows(2) {
        let [before, packet] = pair else { continue };
        assert_eq!((packet.ssrc, packet.missing), (before.ssrc, 0));
        assert_eq!(packet.sequence, before.sequence + 1);
        let time = packet.rtp_timestamp.wrapping_sub(before.rtp_timestamp);
        assert_eq!(time, PACKET, "{packet:?} after {before:?}");
    }
}

/// Compares what was heard with the tone, piece by piece. Returns how far the pieces are from each
/// other that are alike, most of them, as the range of their lags.
fn is_the_tone(who: &str, heard: &[i16]) -> usize {
    let loud = |sample: &i16| f64::from(*sample).abs() > AMPLITUDE / 2.0;
    let begins = heard.iter().position(loud);
    let mut lag = begins.unwrap_or_else(|| panic!("{who} heard nothing"));
    let mut lags = Vec::new();
    let mut correlations = Vec::new();
    for (n, piece) in tone().chunks(PIECE).enumerate() {
        let heard = heard.get(n * PIECE..).unwrap_or_default();
        // Mostly where it is expected, and elsewhere if a busy machine has made a gap.
        let (mut found, mut correlation) = best_lag(piece, heard, lag, RATE / 40);
        if correlation < ALIKE {
            (found, correlation) = best_lag(piece, heard, lag, RATE / 2);
        }
        if correlation >= ALIKE {
            lag = found;
            lags.push(found);
        }
        correlations.push((correlation * 1000.0).round() / 1000.0);
    }
    println!("{who}: {correlations:?} at {lags:?}");
    assert!(lags.len() >= ENOUGH, "{who}: {correlations:?}");
    let energy = |samples: &[i16]| samples.iter().map(|s| f64::from(*s).powi(2)).sum::<f64>();
    let louder = (energy(heard) / energy(&tone())).sqrt();
    assert!(
        (0.8..1.2).contains(&louder),
        "{who}: {louder} times as loud"
    );
    lags.iter().max().unwrap_or(&0) - lags.iter().min().unwrap_or(&0)
}

/// Where about `lag` samples later the piece begins, and the coefficient of correlation there.
fn best_lag(piece: &[i16], heard: &[i16], lag: usize, reach: u32) -> (usize, f64) {
    let reach = reach as usize;
    let at = |lag, step| correlation(piece, heard.get(lag..).unwrap_or_default(), step);
    // That of some of the samples is about the same.
    let (best, _) = (lag.saturating_sub(reach)..lag + reach)
        .map(|lag| (lag, at(lag, 20)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .expect("lags");
    (best, at(best, 1))
}

/// Of every so manieth sample; none with what is shorter.
fn correlation(piece: &[i16], heard: &[i16], step: usize) -> f64 {
    if heard.len() < piece.len() {
        return 0.0;
    }
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in piece.iter().step_by(step).zip(heard.iter().step_by(step)) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    if bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}
