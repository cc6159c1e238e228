//! What is fuzzed (`fuzz/`): each function takes any bytes, and panics if what it tries does not
//! hold. Ordinary tests replay the corpus, and seeded random bytes.

use std::time::{Duration, Instant};

use crate::{
    engine::sdp,
    opus::{self, Decoder},
    playout::{Packet, Playout},
};

/// Descriptions: text that is rewritten says the same, and rewritten again it stays as it is.
pub fn description(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let sections = sdp::sections(&text);
    sdp::candidates(&text).for_each(drop);
    let once = sdp::rewrite(&text, |_| None);
    let again = sdp::sections(&once);
    assert_eq!(sections.len(), again.len());
    for (before, after) in sections.iter().zip(&again) {
        assert_eq!((before.kind, before.mid), (after.kind, after.mid));
        assert_eq!(before.direction, after.direction);
        if before.direction.sends() {
            assert_eq!((&before.msid, &before.ssrcs), (&after.msid, &after.ssrcs));
        }
    }
    assert_eq!(sdp::rewrite(&once, |_| None), once);
}

/// Packets: as much comes out as a packet says that it holds, or nothing.
pub fn opus(data: &[u8]) {
    let mut decoders = [(8_000, 1), (16_000, 1), (48_000, 2)]
        .map(|(rate, channels)| Decoder::new(rate, channels).expect("memory"));
    let mut rest = data;
    while let Some((length, following)) = rest.split_first() {
        let (packet, next) = following.split_at(following.len().min((*length).into()));
        rest = next;
        for decoder in &mut decoders {
            let mut out = Vec::new();
            let decoded = decoder.decode(packet, &mut out);
            let ticks = opus::ticks(packet).filter(|_| decoded).unwrap_or(0);
            assert_eq!(out.len(), decoder.samples(ticks));
            if opus::repeats(packet)
                && let Some(ticks) = opus::ticks(packet)
            {
                decoder.recover(packet, ticks, &mut out);
            }
        }
    }
}

/// The jitter buffer, a packet and a pull every 12 bytes: whatever arrives, what comes out is in
/// step with the time that passed, give or take the five seconds by which a sender's first packet
/// may have been late, and there is an end.
pub fn playout(data: &[u8]) {
    let start = Instant::now();
    let mut now = start;
    let mut playout = Playout::new(16_000, 1).expect("memory");
    let mut frames = 0;
    for step in data.chunks_exact(12) {
        now += Duration::from_millis(u64::from(step[0]) / 4);
        let far = step[1] < 8;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | u32::from(*b));
        playout.push(Packet {
            payload: step[6..6 + usize::from(step[2] % 7)].into(),
            timestamp: number(if far { &step[2..6] } else { &step[3..5] }),
            sequence: number(&step[4..6]).into(),
            ssrc: u32::from(step[5] < 4),
            arrival: now,
        });
        while playout.pull(now).is_some() {
            frames += 1;
        }
        assert!(playout.deadline().is_none_or(|deadline| deadline > now));
    }
    let elapsed = (now - start).as_millis();
    assert!(
        frames <= elapsed / 10 + 500,
        "{frames} frames in {elapsed} ms"
    );
    playout.finish();
    let far = now + Duration::from_secs(3600);
    while playout.pull(far).is_some() {
        frames += 1;
        assert!(frames < 400_000, "no end");
    }
    assert_eq!(playout.deadline(), None);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let mut files = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            run(&fs::read(entry.unwrap().path()).unwrap());
            files += 1;
        }
        assert!(files > 0, "no corpus");
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..60 {
            let bytes = (0..round * 40).map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 56) as u8
            });
            run(&bytes.collect::<Vec<_>>());
        }
    }

    #[test]
    fn descriptions() {
        replay("description", description);
    }

    #[test]
    fn opus_packets() {
        replay("opus", opus);
    }

    #[test]
    fn arrivals() {
        replay("playout", playout);
    }
}
