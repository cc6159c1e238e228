//! Rates that libopus does not know.

use std::f64::consts::PI;

/// Zero crossings of the filter's kernel on either side.
const CROSSINGS: usize = 16;
/// Positions between two samples that the kernel is known at; between them it is interpolated.
const PHASES: usize = 256;
/// Of the Kaiser window: side lobes below -80 dB.
const BETA: f64 = 8.0;
/// Pass band, as a share of what the lower of the two rates can hold.
const PASS: f64 = 0.92;

/// Turns one sample rate into another, of interleaved samples, exactly in step: after `n` samples
/// in, `n * to / from` have come out, less a constant of a few milliseconds.
pub(crate) struct Resampler {
    from: u64,
    to: u64,
    channels: usize,
    /// Samples on either side of a position that its value is made of.
    half: usize,
    /// `PHASES + 1` rows of `2 * half` factors.
    kernel: Vec<f32>,
    /// The last samples, of all channels.
    history: Vec<f32>,
    /// Next position to be put out, in `1 / to` of a sample in, from the start of `history`.
    position: u64,
}

impl Resampler {
    /// Hertz, both above zero.
    pub(crate) fn new(from: u32, to: u32, channels: usize) -> Self {
        let cutoff = PASS * (f64::from(to) / f64::from(from)).min(1.0);
        let half = (CROSSINGS as f64 / cutoff).ceil() as usize;
        Self {
            from: from.into(),
            to: to.into(),
            channels,
            half,
            kernel: kernel(half, cutoff),
            // As if silence had been before, so that the first sample out is the first one in.
            history: vec![0.0; (half - 1) * channels],
            position: (half as u64 - 1) * u64::from(to),
        }
    }

    pub(crate) fn process(&mut self, input: &[i16], out: &mut Vec<i16>) {
        self.history.extend(input.iter().map(|s| f32::from(*s)));
        let (channels, width) = (self.channels, 2 * self.half);
        let have = self.history.len() / channels;
        loop {
            // The sample at or before the position, and the first one that counts.
            let center = (self.position / self.to) as usize;
            let first = center + 1 - self.half;
            if first + width > have {
                break;
            }
            let phase = (self.position % self.to) as f32 * PHASES as f32 / self.to as f32;
            let row = (phase as usize).min(PHASES - 1);
            let (low, high) = (row * width, (row + 1) * width);
            let share = phase - row as f32;
            for channel in 0..channels {
                let mut sum = 0.0;
                for tap in 0..width {
                    let (a, b) = (self.kernel[low + tap], self.kernel[high + tap]);
                    let sample = self.history[(first + tap) * channels + channel];
                    sum += sample * (a + (b - a) * share);
                }
                out.push(sum.round().clamp(i16::MIN.into(), i16::MAX.into()) as i16);
            }
            self.position += self.from;
        }
        let done = ((self.position / self.to) as usize + 1 - self.half).min(have);
        self.history.drain(..done * channels);
        self.position -= done as u64 * self.to;
    }
}

/// A windowed sinc, for each phase the factors of the `2 * half` samples around it.
fn kernel(half: usize, cutoff: f64) -> Vec<f32> {
    let mut kernel = Vec::with_capacity((PHASES + 1) * 2 * half);
    for phase in 0..=PHASES {
        let row = kernel.len();
        let mut total = 0.0;
        for tap in 0..2 * half {
            let x = tap as f64 - (half as f64 - 1.0) - phase as f64 / PHASES as f64;
            let sinc = match x {
                0.0 => 1.0,
                x => (PI * cutoff * x).sin() / (PI * cutoff * x),
            };
            let edge = 1.0 - (x / half as f64).powi(2);
            let value = sinc * bessel(BETA * edge.max(0.0).sqrt());
            total += value;
            kernel.push(value as f32);
        }
        // Exactly unity for a constant signal, whatever the phase.
        let scale = 1.0 / total as f32;
        kernel[row..].iter_mut().for_each(|value| *value *= scale);
    }
    kernel
}

/// The modified Bessel function of the first kind, of order zero.
fn bessel(x: f64) -> f64 {
    let mut term = 1.0;
    let mut sum = 1.0;
    for n in 1..40 {
        term *= (x / 2.0 / f64::from(n)).powi(2);
        sum += term;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(rate: u32, hertz: f64, samples: usize) -> Vec<i16> {
        let step = 2.0 * PI * hertz / f64::from(rate);
        (0..samples)
            .map(|n| ((n as f64 * step).sin() * 16_000.0) as i16)
            .collect()
    }

    #[test]
    fn a_tone_stays_what_it_is_at_every_rate() {
        for (from, to) in [
            (48_000, 44_100),
            (44_100, 48_000),
            (48_000, 11_025),
            (22_050, 48_000),
            (96_000, 48_000),
        ] {
            let input = tone(from, 1000.0, from as usize);
            let mut resampler = Resampler::new(from, to, 1);
            let mut out = Vec::new();
            for chunk in input.chunks(from as usize / 100) {
                resampler.process(chunk, &mut out);
            }
            let missing = to as usize - out.len();
            assert!(missing < to as usize / 200, "{from} to {to}: {missing}");
            let expected = tone(to, 1000.0, out.len());
            let settled = 200..out.len() - 200;
            let worst = settled
                .map(|n| (i32::from(out[n]) - i32::from(expected[n])).abs())
                .max();
            assert!(worst < Some(20), "{from} to {to}: {worst:?} of 16000");
        }
    }

    #[test]
    fn what_the_lower_rate_cannot_hold_is_gone() {
        let mut resampler = Resampler::new(48_000, 11_025, 1);
        let mut out = Vec::new();
        resampler.process(&tone(48_000, 9_000.0, 48_000), &mut out);
        let loudest = out[200..].iter().map(|s| s.unsigned_abs()).max();
        assert!(loudest < Some(20), "{loudest:?} of 16000");
    }

    #[test]
    fn channels_are_kept_apart_and_the_step_is_exact() {
        let mut resampler = Resampler::new(48_000, 44_100, 2);
        let left = tone(48_000, 440.0, 480_000);
        let input: Vec<i16> = left.iter().flat_map(|s| [*s, 0]).collect();
        let mut out = Vec::new();
        for chunk in input.chunks(2 * 479) {
            resampler.process(chunk, &mut out);
        }
        assert!(out.len().is_multiple_of(2));
        assert!((441_000 - 50..=441_000).contains(&(out.len() / 2)));
        assert!(out.iter().skip(1).step_by(2).all(|s| *s == 0));
        assert!(out.iter().step_by(2).any(|s| *s > 15_000));
        assert!(resampler.history.len() < 10_000, "history grows");
    }
}
