//! PCM on its way to the encoder.

use std::time::Duration;

use crate::{
    opus::{self, CLOCK, PACKET_TICKS},
    resample::Resampler,
};

/// One packet's worth of samples, interleaved, in what an Opus encoder takes.
pub(crate) struct Pcm {
    pub samples: Vec<i16>,
    pub rate: u32,
    pub channels: usize,
}

impl Pcm {
    /// In dBov: 0 is the loudest, -127 is silence (RFC 6464).
    pub(crate) fn level(&self) -> i8 {
        let sum: f64 = self.samples.iter().map(|s| f64::from(*s).powi(2)).sum();
        let power = sum / self.samples.len().max(1) as f64 / f64::from(i16::MIN).powi(2);
        (10.0 * power.log10()).round().clamp(-127.0, 0.0) as i8
    }
}

/// Turns frames of any rate, length and number of channels into packets' worth.
pub(crate) struct Intake {
    given_channels: usize,
    resampler: Option<Resampler>,
    rate: u32,
    channels: usize,
    buffer: Vec<i16>,
}

impl Intake {
    /// None for what nobody means.
    pub(crate) fn new(rate: u32, channels: u32) -> Option<Self> {
        if !(1_000..=384_000).contains(&rate) || !(1..=32).contains(&channels) {
            return None;
        }
        let given_channels = channels as usize;
        let channels = given_channels.min(2);
        let native = opus::is_native_rate(rate);
        Some(Self {
            given_channels,
            resampler: (!native).then(|| Resampler::new(rate, CLOCK, channels)),
            rate: if native { rate } else { CLOCK },
            channels,
            buffer: Vec::new(),
        })
    }

    /// Whole samples, interleaved.
    pub(crate) fn push(&mut self, data: &[i16]) {
        let folded;
        let data = if self.given_channels == self.channels {
            data
        } else {
            folded = fold(data, self.given_channels);
            &folded
        };
        match &mut self.resampler {
            Some(resampler) => resampler.process(data, &mut self.buffer),
            None => self.buffer.extend_from_slice(data),
        }
    }

    pub(crate) fn queued(&self) -> Duration {
        let samples = (self.buffer.len() / self.channels) as u64;
        Duration::from_micros(samples * 1_000_000 / u64::from(self.rate))
    }

    pub(crate) fn packet(&mut self) -> Option<Pcm> {
        let wanted = self.packet_len();
        if self.buffer.len() < wanted {
            return None;
        }
        let samples = self.buffer.drain(..wanted).collect();
        Some(self.pcm(samples))
    }

    /// What is not a whole packet, made one with silence.
    pub(crate) fn rest(&mut self) -> Option<Pcm> {
        if self.buffer.is_empty() {
            return None;
        }
        let wanted = self.packet_len().max(self.buffer.len());
        self.buffer.resize(wanted, 0);
        self.packet()
    }

    pub(crate) fn clear(&mut self) {
        self.buffer.clear();
    }

    fn packet_len(&self) -> usize {
        (PACKET_TICKS / (CLOCK / self.rate)) as usize * self.channels
    }

    fn pcm(&self, samples: Vec<i16>) -> Pcm {
        Pcm {
            samples,
            rate: self.rate,
            channels: self.channels,
        }
    }
}

/// More than two channels: the odd ones are left, the even ones right.
fn fold(data: &[i16], channels: usize) -> Vec<i16> {
    let side = |sample: &[i16], from: usize| {
        let (mut sum, mut count) = (0, 0);
        for value in sample.iter().skip(from).step_by(2) {
            sum += i32::from(*value);
            count += 1;
        }
        (sum / count.max(1)) as i16
    };
    data.chunks_exact(channels)
        .flat_map(|sample| [side(sample, 0), side(sample, 1)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(intake: &mut Intake) -> Vec<Pcm> {
        std::iter::from_fn(|| intake.packet()).collect()
    }

    #[test]
    fn as_much_time_comes_out_as_went_in() {
        for rate in [8_000, 16_000, 22_050, 44_100, 48_000, 96_000] {
            for channels in [1, 2, 5] {
                let mut intake = Intake::new(rate, channels).unwrap();
                let frame = vec![1000; (rate / 100 * channels) as usize];
                for _ in 0..100 {
                    intake.push(&frame);
                }
                let queued = intake.queued().as_secs_f64();
                let given = f64::from(rate / 100 * 100) / f64::from(rate);
                assert!(
                    (queued - given).abs() < 0.005,
                    "{rate}: {queued} of {given}"
                );
                let packets = packets(&mut intake);
                assert!((49..=50).contains(&packets.len()));
                let last = packets.last().unwrap();
                let samples = last.samples.len() / last.channels;
                assert_eq!(samples, last.rate as usize / 50);
                let near = |s: &i16| (990..=1010).contains(s);
                assert!(last.samples.iter().all(near), "{rate}, {channels}");
            }
        }
        assert!(Intake::new(0, 1).is_none() && Intake::new(48_000, 0).is_none());
    }

    #[test]
    fn a_rest_is_made_whole_once() {
        let mut intake = Intake::new(16_000, 1).unwrap();
        intake.push(&[5; 160]);
        assert!(intake.packet().is_none());
        let rest = intake.rest().unwrap();
        assert_eq!(rest.samples[..160], [5; 160]);
        assert_eq!(rest.samples[160..], [0; 160]);
        assert!(intake.rest().is_none());
        assert_eq!(intake.queued(), Duration::ZERO);
    }

    #[test]
    fn levels_are_those_of_rfc_6464() {
        let level = |samples: Vec<i16>| {
            let pcm = Pcm {
                samples,
                rate: 48_000,
                channels: 1,
            };
            pcm.level()
        };
        assert_eq!(level(vec![i16::MIN; 960]), 0);
        assert_eq!(level(vec![3277; 960]), -20);
        assert_eq!(level(vec![0; 960]), -127);
    }
}
