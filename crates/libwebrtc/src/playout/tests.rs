use super::*;
use crate::opus::{Encoder, MAX_PACKET, PACKET_TICKS, Settings};

#[path = "../../tests/signal/mod.rs"]
mod signal;

use signal::{find, random, speech};

const PACKET: Duration = Duration::from_millis(20);
const MS: Duration = Duration::from_millis(1);

/// A sender, a network and a receiver, in a time of their own.
struct Scene {
    start: Instant,
    now: Instant,
    playout: Playout,
    /// By arrival.
    on_the_way: Vec<Packet>,
    heard: Vec<i16>,
    /// Moments at which something came out.
    moments: Vec<Duration>,
}

impl Scene {
    fn new(rate: u32, channels: usize) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: start,
            playout: Playout::new(rate, channels).unwrap(),
            on_the_way: Vec::new(),
            heard: Vec::new(),
            moments: Vec::new(),
        }
    }

    fn send(&mut self, number: u64, timestamp: u32, payload: &[u8], arrival: Duration) {
        self.on_the_way.push(Packet {
            payload: payload.into(),
            timestamp,
            sequence: number,
            ssrc: 1,
            arrival: self.start + arrival,
        });
        self.on_the_way.sort_by_key(|packet| packet.arrival);
    }

    /// Until so long after the start.
    fn run(&mut self, until: Duration) {
        while self.now < self.start + until {
            self.now += MS;
            let due = self.on_the_way.iter().take_while(|p| p.arrival <= self.now);
            for packet in self.on_the_way.drain(..due.count()) {
                self.playout.push(packet);
            }
            while let Some(frame) = self.playout.pull(self.now) {
                self.heard.extend(frame);
                self.moments.push(self.now - self.start);
            }
        }
    }

    fn finish(&mut self) {
        self.playout.finish();
        self.run(self.now - self.start + Duration::from_secs(2));
        assert_eq!(self.playout.deadline(), None);
    }
}

fn encode(pcm: &[i16], rate: u32, channels: usize, bitrate: u32) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(rate, channels).unwrap();
    let settings = Settings {
        bitrate,
        stereo: channels == 2,
        dtx: false,
        fec: true,
    };
    pcm.chunks_exact((PACKET_TICKS / (CLOCK / rate)) as usize * channels)
        .map(|pcm| {
            let mut packet = [0; MAX_PACKET];
            encoder.encode(settings, pcm, &mut packet).unwrap().to_vec()
        })
        .collect()
}

/// How far each second of the original is from where it belongs, in samples. At 16 kHz.
fn offsets(original: &[i16], heard: &[i16]) -> Vec<(i64, f64)> {
    const SECOND: usize = 16_000;
    (1..original.len() / SECOND - 1)
        .map(|second| {
            let at = second * SECOND;
            let piece = &original[at..at + SECOND];
            let (found, alike) = find(piece, heard, at, at + 400);
            (found as i64 - at as i64, alike)
        })
        .collect()
}

#[test]
fn a_perfect_network_loses_and_moves_nothing() {
    let original = speech(16_000, 16_000 * 5, 1);
    let mut scene = Scene::new(16_000, 1);
    for (n, payload) in encode(&original, 16_000, 1, 64_000).iter().enumerate() {
        // Wraps within the first second.
        let timestamp = (n as u32 * PACKET_TICKS).wrapping_sub(20_000);
        scene.send(n as u64, timestamp, payload, PACKET * n as u32);
    }
    scene.run(Duration::from_secs(5));
    scene.finish();
    assert_eq!(scene.heard.len(), original.len());
    // Frames come evenly.
    let gaps = scene.moments.windows(2).map(|pair| pair[1] - pair[0]);
    assert_eq!(gaps.clone().max(), Some(10 * MS));
    let (lag, alike) = find(&original[8_000..40_000], &scene.heard, 8_000, 8_400);
    assert!(alike >= 0.95, "{alike} at {lag}");
    let stats = scene.playout.stats();
    assert_eq!((stats.concealed, stats.discarded), (0, 0));
    assert_eq!(stats.played, stats.decoded);
}

#[test]
fn loss_and_jitter_leave_the_time_line_right() {
    for seed in 1..=2 {
        let original = speech(16_000, 16_000 * 30, seed);
        let mut scene = Scene::new(16_000, 1);
        let mut state = seed * 7919;
        let mut lost = 0;
        let packets = encode(&original, 16_000, 1, 64_000);
        for (n, payload) in packets.iter().enumerate() {
            let jitter = Duration::from_secs_f64(0.060 * random(&mut state));
            if random(&mut state) < 0.05 && n > 0 {
                lost += 1;
                continue;
            }
            let timestamp = (n as u32 * PACKET_TICKS).wrapping_sub(700_000);
            let arrival = PACKET * n as u32 + jitter;
            scene.send(n as u64, timestamp, payload, arrival);
            if random(&mut state) < 0.02 {
                scene.send(n as u64, timestamp, payload, arrival + 5 * MS);
            }
        }
        assert!(lost > 40, "{lost} lost");
        scene.run(Duration::from_secs(30));
        scene.finish();

        let missing = original.len().abs_diff(scene.heard.len());
        assert!(missing <= 320, "seed {seed}: {missing} samples of 30 s");
        let offsets = offsets(&original, &scene.heard);
        let lag = offsets[0].0;
        for (offset, alike) in &offsets {
            assert!(
                (offset - lag).abs() <= 320,
                "seed {seed}: {offset} after {lag}"
            );
            assert!(*alike > 0.6, "seed {seed}: {alike}");
        }
        let mean = offsets.iter().map(|(_, alike)| alike).sum::<f64>() / offsets.len() as f64;
        assert!(mean > 0.9, "seed {seed}: {mean}");
        let stats = scene.playout.stats();
        // All that was not lost was played, but for a few at the start.
        let expected = lost * u64::from(PACKET_TICKS);
        assert!(
            stats.concealed.abs_diff(expected) <= 4 * u64::from(PACKET_TICKS),
            "seed {seed}: {} concealed, {expected} lost",
            stats.concealed
        );
        assert!(stats.delay < 90 * MS, "{:?}", stats.delay);
    }
}

#[test]
fn in_band_fec_brings_back_some_of_what_was_lost() {
    let original = speech(16_000, 16_000 * 10, 5);
    let packets = encode(&original, 16_000, 1, 32_000);
    let hear = |lost: bool, repeated: bool| {
        let mut scene = Scene::new(16_000, 1);
        for (n, payload) in packets.iter().enumerate() {
            if lost && n % 10 == 5 && opus::repeats(&packets[n + 1]) {
                continue;
            }
            let mut payload = payload.clone();
            if !repeated {
                // One packet on its own is of another form, which is not looked into.
                payload[0] |= 3;
                payload.insert(1, 1);
            }
            scene.send(
                n as u64,
                n as u32 * PACKET_TICKS,
                &payload,
                PACKET * n as u32,
            );
        }
        scene.run(Duration::from_secs(10));
        (scene.heard, scene.playout.stats().concealed)
    };
    let (whole, _) = hear(false, true);
    let ((guessed, lost), (repeated, _)) = (hear(true, false), hear(true, true));
    assert!(lost >= 30 * u64::from(PACKET_TICKS), "{lost} lost");
    let error = |heard: &[i16]| {
        let pairs = whole.iter().zip(heard);
        pairs
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum::<f64>()
    };
    let (guessed, repeated) = (error(&guessed), error(&repeated));
    assert!(
        repeated < guessed / 2.0,
        "{repeated} with, {guessed} without"
    );
}

#[test]
fn a_pause_of_the_sender_is_silent_and_takes_its_time() {
    let original = speech(16_000, 16_000 * 4, 6);
    let mut scene = Scene::new(16_000, 1);
    let packets = encode(&original, 16_000, 1, 64_000);
    let mut sequence = 0;
    for (n, payload) in packets.iter().enumerate() {
        let arrival = PACKET * n as u32;
        let timestamp = n as u32 * PACKET_TICKS;
        match n {
            // One packet that says so, then nothing.
            50 => scene.send(sequence, timestamp, &payload[..1], arrival),
            51..150 => continue,
            _ => scene.send(sequence, timestamp, payload, arrival),
        }
        sequence += 1;
    }
    scene.run(Duration::from_secs(4));
    scene.finish();
    assert_eq!(scene.heard.len(), original.len());
    let (begin, end) = (16_000, 47_500);
    assert!(scene.heard[begin..end].iter().all(|sample| *sample == 0));
    let stats = scene.playout.stats();
    assert_eq!((stats.concealed, stats.discarded), (0, 0));
    let (lag, alike) = find(&original[50_000..60_000], &scene.heard, 50_000, 50_300);
    assert!(alike > 0.9 && lag < 50_200, "{alike} at {lag}");
}

#[test]
fn a_pause_that_is_known_before_its_turn_is_silent_and_a_loss_is_not() {
    let original = speech(16_000, 16_000 * 2, 13);
    let packets = encode(&original, 16_000, 1, 64_000);
    for lost in [0, 1] {
        let mut scene = Scene::new(16_000, 1);
        for (n, payload) in packets.iter().enumerate() {
            if n == 40 {
                continue;
            }
            let sequence = if n < 40 { n } else { n - 1 + lost };
            let timestamp = n as u32 * PACKET_TICKS;
            scene.send(sequence as u64, timestamp, payload, PACKET * n as u32);
        }
        scene.run(Duration::from_secs(2));
        let gap = &scene.heard[40 * 320..41 * 320];
        assert_eq!(gap.iter().all(|sample| *sample == 0), lost == 0);
    }
}

#[test]
fn a_packet_that_is_half_late_is_half_heard_and_moves_nothing() {
    let original = speech(16_000, 16_000 * 10, 14);
    let packets = encode(&original, 16_000, 1, 64_000);
    let mut scene = Scene::new(16_000, 1);
    for (n, payload) in packets.iter().enumerate() {
        // When the delay is short already: late by more than that, but not by a packet more. The next
        // one comes after it.
        let late = match n {
            300 => 30 * MS,
            301 => 12 * MS,
            _ => Duration::ZERO,
        };
        let timestamp = n as u32 * PACKET_TICKS;
        scene.send(n as u64, timestamp, payload, PACKET * n as u32 + late);
    }
    scene.run(Duration::from_secs(10));
    scene.finish();
    assert_eq!(scene.heard.len(), original.len());
    let stats = scene.playout.stats();
    assert_eq!((stats.concealed, stats.discarded), (u64::from(SLICE), 0));
    let offsets = offsets(&original, &scene.heard);
    assert!(
        offsets.iter().all(|o| (o.0 - offsets[0].0).abs() < 4),
        "{offsets:?}"
    );
}

#[test]
fn what_stops_without_a_word_fades_and_is_no_loss_if_nothing_was_missing() {
    let original = speech(16_000, 16_000 * 2, 7);
    let packets = encode(&original, 16_000, 1, 64_000);
    for (skipped, concealed) in [(0, 0), (20, 20 * u64::from(PACKET_TICKS))] {
        let mut scene = Scene::new(16_000, 1);
        for (n, payload) in packets.iter().enumerate() {
            if !(40..60).contains(&n) {
                let sequence = if n < 40 { n } else { n - 20 + skipped };
                let timestamp = n as u32 * PACKET_TICKS;
                scene.send(sequence as u64, timestamp, payload, PACKET * n as u32);
            }
        }
        scene.run(Duration::from_secs(2));
        scene.finish();
        assert_eq!(scene.heard.len(), original.len());
        assert_eq!(scene.playout.stats().concealed, concealed);
        let quiet = &scene.heard[16_000 * 82 / 100..16_000 * 118 / 100];
        assert!(quiet[2000..].iter().all(|s| *s == 0));
    }
}

#[test]
fn a_sender_that_starts_anew_is_heard_at_once_and_time_goes_on() {
    let original = speech(16_000, 16_000 * 6, 8);
    let packets = encode(&original, 16_000, 1, 64_000);
    let mut scene = Scene::new(16_000, 1);
    for (n, payload) in packets.iter().enumerate() {
        let time = n as u32 * PACKET_TICKS;
        let (timestamp, ssrc) = match n {
            0..100 => (time, 1),
            // The clock jumps back by far, and forward, and the source changes.
            100..150 => (time.wrapping_sub(900_000), 1),
            150..200 => (time.wrapping_add(1 << 31), 1),
            // A second behind the one before.
            _ => (time.wrapping_add((1 << 31) - CLOCK), 2),
        };
        scene.send(n as u64, timestamp, payload, PACKET * n as u32);
        scene.on_the_way.last_mut().unwrap().ssrc = ssrc;
    }
    scene.run(Duration::from_secs(6));
    scene.finish();
    let missing = original.len().abs_diff(scene.heard.len());
    assert!(missing <= 320, "{missing} samples of 6 s");
    let offsets = offsets(&original, &scene.heard);
    for (offset, alike) in &offsets {
        assert!(*alike > 0.7 && offset.abs() < 700, "{offsets:?}");
    }
}

#[test]
fn a_stall_is_made_up_and_the_time_line_goes_on() {
    let original = speech(16_000, 16_000 * 20, 9);
    let packets = encode(&original, 16_000, 1, 64_000);
    let mut scene = Scene::new(16_000, 1);
    for (n, payload) in packets.iter().enumerate() {
        let arrival = PACKET * n as u32;
        // Nothing gets through from second 3 to second 4; then all of it at once.
        let stalled = (Duration::from_secs(3)..Duration::from_secs(4)).contains(&arrival);
        let arrival = if stalled {
            Duration::from_secs(4)
        } else {
            arrival
        };
        scene.send(n as u64, n as u32 * PACKET_TICKS, payload, arrival);
    }
    scene.run(Duration::from_secs(20));
    scene.finish();
    let missing = original.len().abs_diff(scene.heard.len());
    assert!(missing <= 320, "{missing} samples of 20 s");
    let offsets = offsets(&original, &scene.heard);
    let lag = offsets[0].0;
    for (second, (offset, alike)) in (1..).zip(&offsets) {
        let hurt = second == 3;
        assert!(
            hurt || (offset == &lag && *alike > 0.8),
            "{second}: {offset} {alike}"
        );
    }
    // The delay that the stall called for is given up again.
    assert!(
        scene.playout.stats().delay < 100 * MS,
        "{:?}",
        scene.playout.stats()
    );
}

#[test]
fn a_lasting_delay_is_taken_over() {
    let original = speech(16_000, 16_000 * 8, 10);
    let packets = encode(&original, 16_000, 1, 64_000);
    let mut scene = Scene::new(16_000, 1);
    for (n, payload) in packets.iter().enumerate() {
        let more = if n >= 100 { 900 * MS } else { Duration::ZERO };
        scene.send(
            n as u64,
            n as u32 * PACKET_TICKS,
            payload,
            PACKET * n as u32 + more,
        );
    }
    scene.run(Duration::from_secs(10));
    let (_, alike) = find(&original[80_000..96_000], &scene.heard, 85_000, 96_000);
    assert!(alike > 0.8, "{alike}");
}

#[test]
fn every_rate_and_number_of_channels_comes_out() {
    let left = speech(48_000, 48_000 * 2, 11);
    let right = speech(48_000, 48_000 * 2, 12);
    let stereo: Vec<i16> = left
        .iter()
        .zip(&right)
        .flat_map(|(l, r)| [*l, *r])
        .collect();
    let packets = encode(&stereo, 48_000, 2, 128_000);
    for rate in [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000] {
        for channels in [1, 2, 3, 6] {
            let mut scene = Scene::new(rate, channels);
            for (n, payload) in packets.iter().enumerate() {
                scene.send(
                    n as u64,
                    n as u32 * PACKET_TICKS,
                    payload,
                    PACKET * n as u32,
                );
            }
            scene.run(Duration::from_secs(2));
            scene.finish();
            let samples = scene.heard.len() / channels;
            let frame = rate as usize / 100;
            assert!(
                (2 * rate as usize - samples) <= frame * 2,
                "{samples} at {rate} Hz"
            );
            assert!(samples.is_multiple_of(frame));
            if rate == 48_000 && channels > 1 {
                for (channel, original) in [(0, &left), (1, &right)] {
                    let heard: Vec<i16> = scene
                        .heard
                        .iter()
                        .skip(channel)
                        .step_by(channels)
                        .copied()
                        .collect();
                    let (_, alike) = find(&original[20_000..60_000], &heard, 20_000, 20_500);
                    assert!(alike > 0.95, "channel {channel}: {alike}");
                }
            }
        }
    }
}
