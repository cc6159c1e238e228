//! What is put in the place of lost audio: its last period over and over, fading.
//!
//! Not libopus' own: as transpiled, that of SILK screams (unsafe-libopus 0.2.0).

/// Periods that are looked for: 66 to 400 Hz.
const SHORTEST_US: usize = 2_500;
const LONGEST_US: usize = 15_000;
/// Compared over this length.
const WINDOW_US: usize = 15_000;
/// Until nothing is left.
const FADE_US: usize = 60_000;
/// From what was made up to what is heard again.
const CROSSFADE_US: usize = 5_000;

/// Samples are interleaved.
pub(crate) struct Concealer {
    rate: usize,
    channels: usize,
    history: Vec<i16>,
    repeated: Option<Repeated>,
}

struct Repeated {
    channels: usize,
    period: Vec<i16>,
    /// Samples of one channel that were made of it.
    made: usize,
}

impl Concealer {
    pub(crate) fn new(rate: u32, channels: usize) -> Self {
        Self {
            rate: rate as usize,
            channels,
            history: Vec::new(),
            repeated: None,
        }
    }

    /// Appends samples in the place of lost ones, of that many a channel.
    pub(crate) fn conceal(&mut self, samples: usize, out: &mut Vec<i16>) {
        let fade = self.samples(FADE_US);
        let repeated = match self.repeated.take() {
            Some(repeated) => self.repeated.insert(repeated),
            None => {
                let start = self.history.len() - self.period() * self.channels;
                let period = self.history[start..].to_vec();
                self.repeated.insert(Repeated {
                    channels: self.channels,
                    period,
                    made: 0,
                })
            }
        };
        for _ in 0..samples {
            out.extend((0..self.channels).map(|channel| repeated.sample(channel, fade)));
            repeated.made += 1;
        }
    }

    /// Real samples go on. Their start is blended with what was made up.
    pub(crate) fn resume(&mut self, pcm: &mut [i16]) {
        let (fade, crossfade) = (self.samples(FADE_US), self.samples(CROSSFADE_US));
        if let Some(mut repeated) = self.repeated.take() {
            let blended = pcm.chunks_exact_mut(self.channels).take(crossfade);
            for (n, sample) in blended.enumerate() {
                let share = n as f32 / crossfade as f32;
                for (channel, value) in sample.iter_mut().enumerate() {
                    let made = f32::from(repeated.sample(channel, fade));
                    *value = (f32::from(*value) * share + made * (1.0 - share)) as i16;
                }
                repeated.made += 1;
            }
        }
        self.history.extend_from_slice(pcm);
        let keep = self.samples(LONGEST_US + WINDOW_US) * self.channels;
        let excess = self.history.len().saturating_sub(keep);
        self.history.drain(..excess);
    }

    /// Silence by intent: nothing is left to go on with.
    pub(crate) fn reset(&mut self) {
        self.history.clear();
        self.repeated = None;
    }

    fn samples(&self, micros: usize) -> usize {
        self.rate * micros / 1_000_000
    }

    /// In samples of a channel: where the last ones resemble those before the most.
    fn period(&self) -> usize {
        let (window, channels) = (self.samples(WINDOW_US), self.channels);
        let have = self.history.len() / channels;
        let longest = self.samples(LONGEST_US).min(have.saturating_sub(window));
        // Enough to find it, and cheaper.
        let step = (self.rate / 8_000).max(1);
        let at = |n: usize| f32::from(self.history[n * channels]);
        let mut best = (self.samples(SHORTEST_US).min(have), 0.0);
        for lag in self.samples(SHORTEST_US)..=longest {
            let (mut product, mut energy) = (0.0, 1.0);
            for n in (have - window..have).step_by(step) {
                product += at(n) * at(n - lag);
                energy += at(n - lag) * at(n - lag);
            }
            let alike = product / f32::sqrt(energy);
            if alike > best.1 {
                best = (lag, alike);
            }
        }
        best.0
    }
}

impl Repeated {
    fn sample(&self, channel: usize, fade: usize) -> i16 {
        if self.period.is_empty() || self.made >= fade {
            return 0;
        }
        let at = (self.made * self.channels + channel) % self.period.len();
        let gain = 1.0 - self.made as f32 / fade as f32;
        (f32::from(self.period[at]) * gain) as i16
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use super::*;

    fn tone(rate: usize, hertz: f64, from: usize, samples: usize) -> Vec<i16> {
        let at = |n: usize| (n as f64 * TAU * hertz / rate as f64).sin();
        (from..from + samples)
            .map(|n| (at(n) * 10_000.0) as i16)
            .collect()
    }

    #[test]
    fn a_tone_goes_on_in_phase_fades_and_comes_back() {
        for rate in [8_000, 16_000, 48_000] {
            let mut concealer = Concealer::new(rate as u32, 1);
            concealer.resume(&mut tone(rate, 200.0, 0, rate / 10));
            let mut made = Vec::new();
            concealer.conceal(rate / 50, &mut made);
            let expected = tone(rate, 200.0, rate / 10, rate / 50);
            for (n, (made, expected)) in made.iter().zip(&expected).enumerate() {
                let gain = 1.0 - n as f64 / (rate as f64 * 0.06);
                let error = f64::from(*made) - f64::from(*expected) * gain;
                assert!(error.abs() < 600.0, "{rate} Hz, {n}: {error}");
            }
            let mut back = tone(rate, 200.0, rate / 10 + rate / 50, rate / 50);
            let original = back.clone();
            concealer.resume(&mut back);
            assert!(i32::from(back[0]).abs_diff(made[made.len() - 1].into()) < 2_000);
            assert_eq!(back[rate / 200..], original[rate / 200..]);
            concealer.conceal(rate / 10, &mut made);
            assert!(made[made.len() - rate / 50..].iter().all(|s| *s == 0));
        }
    }

    #[test]
    fn channels_stay_apart_and_nothing_is_made_of_nothing() {
        let mut concealer = Concealer::new(16_000, 2);
        let mut made = Vec::new();
        concealer.conceal(320, &mut made);
        assert_eq!(made, [0; 640]);
        let mut pcm: Vec<i16> = tone(16_000, 150.0, 0, 1600)
            .iter()
            .flat_map(|s| [*s, 77])
            .collect();
        concealer.resume(&mut pcm);
        made.clear();
        concealer.conceal(160, &mut made);
        assert!(
            made.iter()
                .skip(1)
                .step_by(2)
                .all(|s| (60..=77).contains(s))
        );
        assert!(made.iter().step_by(2).any(|s| *s > 5_000));
    }
}
