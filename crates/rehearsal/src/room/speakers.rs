//! Who speaks, from the RTP audio levels (RFC 6464), without decoding.

use std::time::Duration;

/// How often a meter is read. LiveKit's default.
pub(super) const WINDOW: Duration = Duration::from_millis(400);
/// Louder than this counts as speech, in dBov. LiveKit's default.
const THRESHOLD: f32 = -35.0;
/// Share of a window's packets that must be that loud. LiveKit's default.
const MIN_SHARE: f32 = 0.4;
/// Packets that fill a window at least (40 ms each): with DTX there are fewer, and what is missing
/// was silence.
const MIN_PACKETS: u32 = 10;
/// Steps that levels are rounded up to, so that small changes cause no messages.
const STEPS: f32 = 8.0;

/// Whether a packet of this level, in dBov, is one of speech.
pub(super) fn is_speech(level: i8) -> bool {
    f32::from(level) >= THRESHOLD
}

/// One participant's loudness since it was last read.
#[derive(Debug, Default)]
pub(super) struct Meter {
    packets: u32,
    loud: u32,
    loudest: Option<i8>,
}

impl Meter {
    /// Notes a packet's level in dBov, at most 0.
    pub fn note(&mut self, level: i8) {
        self.packets += 1;
        if is_speech(level) {
            self.loud += 1;
            self.loudest = self.loudest.max(Some(level));
        }
    }

    /// The level from 0 to 1 if the participant spoke in the window that ends now.
    pub fn read(&mut self) -> Option<f32> {
        let Self {
            packets,
            loud,
            loudest,
        } = std::mem::take(self);
        let share = loud as f32 / packets.max(MIN_PACKETS) as f32;
        let loudest = f32::from(loudest.filter(|_| share >= MIN_SHARE)?);
        // Short bursts count as less loud.
        let level = 10f32.powf((loudest + 20.0 * share.log10()) / 20.0);
        Some((level * STEPS).ceil() / STEPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(levels: impl IntoIterator<Item = i8>) -> Option<f32> {
        let mut meter = Meter::default();
        levels.into_iter().for_each(|l| meter.note(l));
        meter.read()
    }

    #[test]
    fn tells_speech_from_silence_and_clicks() {
        assert_eq!(read([]), None);
        assert_eq!(read([-60; 20]), None);
        assert_eq!(read([-10; 3]), None, "a click of 60 ms");
        assert!(read([-10; 20]).is_some());
        assert!(read([-10; 10]).is_some(), "40 ms packets");
    }

    #[test]
    fn louder_reads_higher_and_a_reading_clears() {
        assert!(read([-5; 20]) > read([-30; 20]));
        assert!(read([0; 20]).is_some_and(|l| l <= 1.0));
        let mut meter = Meter::default();
        (0..20).for_each(|_| meter.note(-5));
        assert!(meter.read().is_some());
        assert_eq!(meter.read(), None);
    }
}
