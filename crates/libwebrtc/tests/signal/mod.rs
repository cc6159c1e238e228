//! Something like speech, the same each time, and how to find it again.

use std::f64::consts::TAU;

/// The next of a row of numbers that look random, from 0 to 1.
pub fn random(state: &mut u64) -> f64 {
    // Xorshift (Marsaglia 2003).
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as f64 / (1_u64 << 53) as f64
}

/// Syllables: a gliding pitch with its harmonics, each of its own length, melody and vowel.
pub fn speech(rate: u32, samples: usize, seed: u64) -> Vec<i16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(samples);
    let mut phase = 0.0;
    while out.len() < samples {
        let length = (f64::from(rate) * (0.12 + 0.2 * random(&mut state))) as usize;
        let pitch = 140.0 + 120.0 * random(&mut state);
        let glide = 0.8 + 0.4 * random(&mut state);
        let vowel: Vec<f64> = (0..12).map(|_| random(&mut state).powi(2)).collect();
        let total: f64 = vowel.iter().sum();
        for n in 0..length {
            let at = n as f64 / length as f64;
            phase += TAU * pitch * glide.powf(at) / f64::from(rate);
            let harmonics = vowel.iter().enumerate();
            let sum: f64 = harmonics
                .map(|(k, weight)| weight * (phase * (k + 1) as f64).sin())
                .sum();
            let envelope = (at * std::f64::consts::PI).sin();
            out.push((sum / total * envelope * 20_000.0) as i16);
        }
    }
    out.truncate(samples);
    out
}

/// From -1 to 1, of the samples that both have.
pub fn correlation(a: &[i16], b: &[i16]) -> f64 {
    let pairs = || a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let product: f64 = pairs().map(|(a, b)| a * b).sum();
    let (a, b) = pairs().fold((0.0, 0.0), |sum, (a, b)| (sum.0 + a * a, sum.1 + b * b));
    if a * b == 0.0 {
        return 0.0;
    }
    product / (a * b).sqrt()
}

/// Where in `heard` the piece `of` begins, searched from `from` to `to`, and how alike they are.
pub fn find(of: &[i16], heard: &[i16], from: usize, to: usize) -> (usize, f64) {
    // Not by all samples: enough to tell, and much less to compute.
    let step = (of.len() / 4000).max(1);
    let part: Vec<i64> = of.iter().step_by(step).map(|s| i64::from(*s)).collect();
    let last = to.min(heard.len().saturating_sub(of.len()));
    let mut best = (from, f64::MIN);
    for at in from..=last {
        let (mut product, mut energy) = (0, 1);
        for (a, b) in part.iter().zip(heard[at..].iter().step_by(step)) {
            let b = i64::from(*b);
            product += a * b;
            energy += b * b;
        }
        let alike = product as f64 / (energy as f64).sqrt();
        if alike > best.1 {
            best = (at, alike);
        }
    }
    let there = heard.get(best.0..).unwrap_or_default();
    (best.0, correlation(of, there))
}
