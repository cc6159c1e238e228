//! Who is silent for long has no stream, and loses no word when they speak again.

use std::{
    io::Cursor,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream::unfold;
use rehearsal::stt::{self, Protocol};
use roomwarden::{
    audio::Ear,
    daemon::Daemon,
    session::{Packet, Track},
};
use tokio::time::{Interval, interval};

use crate::{
    limits::{Sessions, quickly},
    stage::{Kept, LIMIT, Stage, reasons, stop},
};

const FRAME: Duration = Duration::from_millis(20);
const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];
/// Of an utterance, in seconds: what the server says is rounded.
const ROUNDING: f64 = 0.01;
/// Of an utterance, in frames.
const LENGTH: usize = 75;

/// A second and a half of somebody's speech, from a loud sound on.
fn utterance() -> Arc<[Vec<u8>]> {
    let file = include_bytes!("../../crates/rehearsal/assets/anna.opus");
    let mut reader = ogg::PacketReader::new(Cursor::new(file.to_vec()));
    let packets = std::iter::from_fn(|| reader.read_packet().expect("whole pages"));
    let mut ear = Ear::default();
    let loud = |packet: &Vec<u8>| ear.hears(packet, None, 960, -25);
    let packets = packets.skip(2).map(|packet| packet.data);
    let packets: Vec<_> = packets.collect();
    let first = packets.iter().position(loud).expect("something loud");
    packets[first..first + LENGTH].into()
}

/// What somebody does: silence, and an utterance from each of these frames on.
struct Script {
    ticks: Interval,
    frame: usize,
    starts: Vec<usize>,
    utterance: Arc<[Vec<u8>]>,
    with_levels: bool,
}

async fn next_packet(mut script: Script) -> Option<(Packet, Script)> {
    script.ticks.tick().await;
    let frame = script.frame;
    script.frame += 1;
    let said = script.starts.iter().find_map(|start| {
        let into = frame.checked_sub(*start)?;
        script.utterance.get(into)
    });
    let level = if said.is_some() { -20 } else { -127 };
    let packet = Packet {
        payload: said.map_or(&SILENCE[..], |packet| packet).into(),
        timestamp: frame as u32 * 960,
        sequence: frame as u64,
        level: script.with_levels.then_some(level),
        received_at: Instant::now(),
    };
    Some((packet, script))
}

fn track(sid: String, starts: Vec<usize>, with_levels: bool) -> Track {
    let utterance = utterance();
    let packets = move || {
        let script = Script {
            ticks: interval(FRAME),
            frame: 0,
            starts: starts.clone(),
            utterance: utterance.clone(),
            with_levels,
        };
        unfold(script, next_packet)
    };
    Track {
        sid,
        packets: Box::new(move || Box::pin(packets())),
        muted: Box::new(|| false),
        priority: Box::new(|| 0),
    }
}

/// How long each stretch of speech was that the STT server heard of somebody, in seconds: it says
/// `speech 0.80-2.10 s -18 dBFS`.
fn heard(kept: &Kept, participant: &str) -> Vec<f64> {
    let finals = kept.finals().into_iter();
    let of_them = finals.filter(|final_| final_.participant == participant);
    let length = |text: &str| {
        let times = text.strip_prefix("speech ")?.split_once(" s ")?.0;
        let (start, end) = times.split_once('-')?;
        Some(end.parse::<f64>().ok()? - start.parse::<f64>().ok()?)
    };
    of_them
        .map(|said| length(&said.text).unwrap_or_else(|| panic!("{}", said.text)))
        .collect()
}

/// Twenty people, each of whom says a sentence now and then, on five streams: the provider never
/// has more than five, everybody is heard, and every utterance from its first sound to its last.
#[tokio::test(flavor = "multi_thread")]
async fn twenty_who_mostly_listen_share_five_streams_and_no_word_is_lost() {
    const PEOPLE: usize = 20;
    const UTTERANCES: usize = 3;
    let stage = Stage::with(stt::Config::default().max_streams(5)).await;
    let mut config = quickly(&stage);
    config.park_after_ms = 2000;
    config.max_streams = 5;
    config.replay_ms = 60_000;

    // The same said by somebody who keeps a stream all the time.
    let alone = Kept::default();
    let mut kept_open = config.clone();
    kept_open.park_after_ms = 0;
    let reference = track("TR_reference".to_owned(), vec![25], false);
    let one = Sessions::of(&kept_open, alone.sinks(), [reference].into_iter());
    stage
        .witnessed("a sentence", |w| {
            w.streams.iter().any(|s| s.finals_sent > 0)
        })
        .await;
    one.close().await;
    let expected = heard(&alone, "p0");
    assert!(!expected.is_empty());
    let all: f64 = expected.iter().sum();
    assert!(all > 1.0, "{expected:?}");

    let said = Kept::default();
    let tracks = (0..PEOPLE).map(|number| {
        // Every eight seconds each, at different times: more than five streams can carry at once.
        let starts = |n| 30 + number * 20 + n * 400;
        let starts = (0..UTTERANCES).map(starts).collect();
        track(format!("TR_{number}"), starts, number % 2 == 0)
    });
    let sessions = Sessions::of(&config, said.sinks(), tracks);
    let start = Instant::now();
    let mut most = 0;
    let complete = |who: &str| {
        let heard: f64 = heard(&said, who).iter().sum();
        heard > (all - ROUNDING) * UTTERANCES as f64
    };
    while !(0..PEOPLE).all(|n| complete(&format!("p{n}"))) {
        let standing = sessions.gate.standing();
        most = most.max(standing.waiting);
        assert!(standing.held <= 5, "{standing:?}");
        let lengths = |n| heard(&said, &format!("p{n}"));
        assert!(
            start.elapsed() < LIMIT * 2,
            "of {expected:?} each: {:#?}",
            (0..PEOPLE).map(lengths).collect::<Vec<_>>()
        );
        tokio::time::sleep(FRAME).await;
    }
    for n in 0..PEOPLE {
        let heard: f64 = heard(&said, &format!("p{n}")).iter().sum();
        let most = (all + ROUNDING) * UTTERANCES as f64;
        assert!(heard < most, "p{n} is heard twice: {heard} s, not {most} s");
    }
    // Nobody has a stream who says nothing.
    let witness = stage.witnessed("all are parked", |w| w.open_now == 0).await;
    assert!(witness.peak <= 5, "{}", witness.peak);
    let streams = witness.streams.len() - 1;
    assert!(streams >= PEOPLE, "{streams}");
    let paid: f64 = witness.streams.iter().map(|s| s.audio_seconds).sum();
    let talked = 1.5 * (PEOPLE * UTTERANCES) as f64;
    println!(
        "{streams} streams, {most} waited at once, {paid:.0} s of audio for {talked:.0} s said"
    );
    sessions.close().await;
    stage.all_acknowledged(streams + 1).await;
    stage.end().await;
}

/// In a room: the stream of somebody who is silent is closed with a receipt, and they have another
/// when they speak.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_participant_is_parked_and_speaks_again() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.stt.park_after_ms = 1000;
    let daemon = Daemon::start(config, Default::default());
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.mute();
    let parked = |w: &stt::Witness| w.opened == 1 && w.open_now == 0;
    let witness = stage.witnessed("parked", parked).await;
    assert_eq!(witness.streams[0].protocol, Protocol::Listen);
    alice.unmute();
    stage.open(1).await;
    stage.streaming(1).await;
    alice.leave().await;
    stage.all_acknowledged(2).await;
    let report = stop(&daemon).await;
    let reasons = reasons(&report);
    assert_eq!(reasons[0], "parked: the participant is silent");
    assert_eq!(reasons[1], "participant left (client_initiated)");
    stage.end().await;
}
