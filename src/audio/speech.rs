//! Whether somebody speaks, from the packets of a track.

use super::{RATE, opus};

/// So much sound in a row is speech: a click or a cough is shorter, the shortest word is longer.
const ONSET_SAMPLES: u64 = RATE as u64 * 60 / 1000;

/// Listens to one track.
#[derive(Default)]
pub struct Ear {
    /// Made when it is needed: a sender that tells its levels is not decoded.
    decoder: Option<opus::Decoder>,
    /// Of late, up to [`ONSET_SAMPLES`]; sound adds to it and silence takes away.
    loud_samples: u64,
}

impl Ear {
    /// Whether the packet is part of somebody's speech: `level` is its level in dBov (RFC 6464), if
    /// the server passes it on; else the packet is decoded. `samples` is its length at 48 kHz, and
    /// what is below `threshold`, in dBov, is silence.
    pub fn hears(
        &mut self,
        payload: &[u8],
        level: Option<i8>,
        samples: u64,
        threshold: i8,
    ) -> bool {
        let loud = match level {
            Some(level) => level >= threshold,
            None => self.level(payload) >= f64::from(threshold),
        };
        self.loud_samples = if loud {
            (self.loud_samples + samples).min(ONSET_SAMPLES)
        } else {
            self.loud_samples.saturating_sub(samples)
        };
        self.loud_samples == ONSET_SAMPLES
    }

    fn level(&mut self, payload: &[u8]) -> f64 {
        if self.decoder.is_none() {
            self.decoder = opus::Decoder::new();
        }
        // Without memory for a decoder nobody is taken to be silent.
        let Some(decoder) = &mut self.decoder else {
            return 0.0;
        };
        let samples = decoder.decode(payload);
        let energy: f64 = samples.iter().map(|s| f64::from(*s).powi(2)).sum();
        let mean = energy / samples.len().max(1) as f64;
        10.0 * (mean / f64::from(i16::MAX).powi(2)).log10()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];
    const FRAME: u64 = 960;

    fn recording() -> Vec<Vec<u8>> {
        let file = include_bytes!("../../crates/rehearsal/assets/anna.opus");
        let mut reader = ogg::PacketReader::new(std::io::Cursor::new(file.to_vec()));
        let packets = std::iter::from_fn(|| reader.read_packet().expect("whole pages"));
        packets.skip(2).map(|packet| packet.data).collect()
    }

    #[test]
    fn three_loud_frames_are_speech_and_one_or_two_are_not() {
        let mut ear = Ear::default();
        let mut heard = |levels: &[i8]| {
            let hears = |level: &i8| ear.hears(&[0], Some(*level), FRAME, -50);
            levels.iter().map(hears).collect::<Vec<_>>()
        };
        assert_eq!(heard(&[-20, -127, -127]), [false; 3]);
        assert_eq!(heard(&[-50, -20, -51, -127, -127]), [false; 5]);
        assert_eq!(
            heard(&[-20, -20, -20, -20, -60]),
            [false, false, true, true, false]
        );
        assert_eq!(heard(&[-40]), [true], "a gap between two sounds");
    }

    /// Where no level comes with the packets, the same is heard by decoding.
    #[test]
    fn speech_is_told_from_silence_without_levels() {
        let mut ear = Ear::default();
        for _ in 0..50 {
            assert!(!ear.hears(&SILENCE, None, FRAME, -50));
            assert!(
                !ear.hears(&[0x08], None, FRAME, -50),
                "a pause of the sender (DTX)"
            );
        }
        let recording = recording();
        let hears = |packet: &Vec<u8>| ear.hears(packet, None, FRAME, -50);
        let heard: Vec<bool> = recording.iter().map(hears).collect();
        let onset = heard.iter().position(|hears| *hears).expect("speech");
        let speaking = heard.iter().filter(|hears| **hears).count();
        assert!(speaking > heard.len() / 3, "{speaking} of {}", heard.len());
        assert!(speaking < heard.len(), "there are pauses in it");
        // What follows at once is silence again, but for the sound that dies away.
        let after = (0..10).map(|_| ear.hears(&SILENCE, None, FRAME, -50));
        assert!(!after.last().expect("ten"), "onset at {onset}");
    }
}
