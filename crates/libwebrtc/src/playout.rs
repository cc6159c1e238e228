//! From packets, as they arrive, to an even flow of samples: jitter buffer, decoder, concealment.
//! Sans-IO: it is told the time.
//!
//! The samples keep to the sender's clock: between two of them lies what lies between their RTP
//! times, with what did not arrive in time made up or silent, and nothing is stretched or cut to
//! adapt to the network. Only the moment moves at which they come out.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    conceal::Concealer,
    engine::beats,
    opus::{self, CLOCK, Decoder, STEP_TICKS},
    resample::Resampler,
};

/// What comes out at once: 10 ms, in RTP time.
const SLICE: u32 = CLOCK / 100;
/// How long packets wait at first, while nothing is known of the network.
const FIRST_DELAY: i64 = ms(60);
/// Packets wait for the slowest of these last seconds (once or twice this)...
const MEMORY: Duration = Duration::from_secs(4);
/// ...and a bit longer than until they are read, since timers are not exact...
const MARGIN: i64 = ms(5);
/// ...but not for one that took this much longer than the fastest.
const MAX_WAIT: i64 = ms(400);
/// By how much the delay shrinks with each slice, where it is longer than it has to be.
const RELAX: i64 = ms(1);
/// Farther from where it belongs, a packet shows that its sender's clock was set anew.
const MAX_JUMP: i64 = ms(5_000);
/// The same if all packets were too late for this long.
const LATE: Duration = Duration::from_secs(1);
/// What is made up for longer is silent.
const MAX_CONCEALED: u32 = CLOCK / 1000 * 60;
const MAX_PACKETS: usize = 512;

/// Times are in microseconds here.
const fn ms(ms: i64) -> i64 {
    ms * 1000
}

/// Counts since the start. Times in RTP units (48,000 a second).
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct PlayoutStats {
    /// Of all that came out.
    pub played: u64,
    /// Made up for what was lost or late, silent or not...
    pub concealed: u64,
    /// ...and silent.
    pub silent: u64,
    pub concealments: u64,
    /// Packets that were too late, or not Opus.
    pub discarded: u64,
    /// Of what came from packets: their number of samples, and the time that those waited.
    pub decoded: u64,
    pub waited: Duration,
    /// How long packets wait now, on their way through.
    pub delay: Duration,
    /// Of the last slice, mean square, 1 for the loudest square wave; and its sum over time.
    pub power: f64,
    pub energy: f64,
}

pub(crate) struct Packet {
    pub payload: Arc<[u8]>,
    /// RTP time; wraps.
    pub timestamp: u32,
    pub sequence: u64,
    pub ssrc: u32,
    pub arrival: Instant,
}

pub(crate) struct Playout {
    decoder: Decoder,
    concealer: Concealer,
    converter: Converter,
    /// Decoded, of which the last sample lies right before `cursor`.
    pcm: Vec<i16>,
    /// By their place on the time line, which is RTP time as far as the sender keeps its clock.
    packets: BTreeMap<i64, Packet>,
    line: Option<Line>,
    finished: bool,
    stats: PlayoutStats,
}

/// How RTP times, the time line and the clock on the wall belong together.
struct Line {
    ssrc: u32,
    /// A known pair: RTP time and place.
    timestamp: u32,
    place: i64,
    /// Place 0 would have been played at this instant, had it taken no time to get here...
    epoch: Instant,
    /// ...but it is played later by this.
    delay: i64,
    network: Network,
    /// Everything before is decoded, or made up.
    cursor: i64,
    /// Source and sequence number of the packet that was decoded last.
    last: (u32, u64),
    /// The sender makes a pause: what is not there is silence, not lost.
    paused: bool,
    /// Made up in a row until here.
    filled: u32,
    late_since: Option<Instant>,
}

impl Playout {
    /// `rate` in hertz, `channels` at least 1. None if libopus has no memory.
    pub(crate) fn new(rate: u32, channels: usize) -> Option<Self> {
        let native = if opus::is_native_rate(rate) {
            rate
        } else {
            CLOCK
        };
        let decoded = channels.min(2);
        Some(Self {
            decoder: Decoder::new(native, decoded)?,
            concealer: Concealer::new(native, decoded),
            converter: Converter {
                resampler: (native != rate).then(|| Resampler::new(native, rate, decoded)),
                decoded,
                channels,
                frame: (rate / 100) as usize * channels,
                out: Vec::new(),
            },
            pcm: Vec::new(),
            packets: BTreeMap::new(),
            line: None,
            finished: false,
            stats: PlayoutStats::default(),
        })
    }

    /// Takes a packet; ones that are too late, doubled or not Opus are dropped.
    pub(crate) fn push(&mut self, packet: Packet) {
        let Some(ticks) = opus::ticks(&packet.payload) else {
            self.stats.discarded += 1;
            return;
        };
        let line = self.line.get_or_insert_with(|| Line::new(&packet));
        let place = match line.place(&packet) {
            Some(place) => place,
            None => {
                // What is left of the old clock still plays, unless that is far ahead.
                let horizon = line.cursor + ticks_of(MAX_WAIT);
                self.packets.split_off(&horizon);
                let end = self.packets.last_key_value().map_or(0, |(place, last)| {
                    *place + i64::from(opus::ticks(&last.payload).unwrap_or(0))
                });
                line.restart(&packet, end)
            }
        };
        if place + i64::from(ticks) <= line.cursor {
            self.stats.discarded += 1;
            return;
        }
        line.late_since = None;
        if self.packets.len() < MAX_PACKETS {
            self.packets.entry(place).or_insert(packet);
        } else {
            self.stats.discarded += 1;
        }
    }

    /// No packets will come any more: what is there still plays.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }

    /// When the next slice is due. None: not before there is a packet, or never if finished.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let line = self.line.as_ref()?;
        if self.finished && self.packets.is_empty() && self.pcm.is_empty() {
            return None;
        }
        Some(line.due(self.next_place(line)))
    }

    /// The next 10 ms, interleaved, if they are due.
    pub(crate) fn pull(&mut self, now: Instant) -> Option<Vec<i16>> {
        loop {
            if let Some(frame) = self.converter.frame() {
                return Some(frame);
            }
            if self.deadline()? > now {
                return None;
            }
            self.decode_slice(now);
        }
    }

    pub(crate) fn stats(&self) -> PlayoutStats {
        PlayoutStats {
            delay: self.line.as_ref().map_or(Duration::ZERO, |line| {
                micros(line.delay - line.network.fastest)
            }),
            ..self.stats
        }
    }

    /// Where on the time line the next sample to come out lies.
    fn next_place(&self, line: &Line) -> i64 {
        let ticks = self.pcm.len() * SLICE as usize / self.decoder.samples(SLICE);
        line.cursor - ticks as i64
    }

    fn decode_slice(&mut self, now: Instant) {
        let wanted = self.decoder.samples(SLICE);
        while self.pcm.len() < wanted {
            self.decode_more(now);
        }
        let slice = &self.pcm[..wanted];
        let square: f64 = slice.iter().map(|s| f64::from(*s).powi(2)).sum();
        self.stats.power = square / wanted as f64 / f64::from(i16::MIN).powi(2);
        self.stats.energy += self.stats.power * f64::from(SLICE) / f64::from(CLOCK);
        self.stats.played += u64::from(SLICE);
        self.converter.push(slice);
        self.pcm.drain(..wanted);
        if let Some(line) = &mut self.line {
            line.relax();
        }
    }

    /// Adds to `pcm`: the packet whose turn it is, or something in its place.
    fn decode_more(&mut self, now: Instant) {
        let Some(line) = &mut self.line else { return };
        let Some(entry) = self.packets.first_entry() else {
            if !self.finished {
                return self.fill(SLICE, None);
            }
            // Only what makes the last slice full.
            let full = self.decoder.samples(SLICE);
            let missing = full - self.pcm.len();
            line.cursor += (missing * SLICE as usize / full) as i64;
            return self.pcm.resize(full, 0);
        };
        let place = *entry.key();
        let ticks = opus::ticks(&entry.get().payload).unwrap_or(STEP_TICKS);
        let gap = place - line.cursor;
        let (ssrc, sequence) = line.last;
        let packet = entry.get();
        let lost = ssrc == packet.ssrc && packet.sequence != sequence.wrapping_add(1);
        if gap >= i64::from(STEP_TICKS) {
            line.paused |= !lost;
            let gap = u32::try_from(gap).unwrap_or(u32::MAX) / STEP_TICKS * STEP_TICKS;
            if gap <= ticks {
                let next = packet.payload.clone();
                return self.fill(gap, Some(&next));
            }
            return self.fill(SLICE.min(gap - ticks), None);
        }

        let packet = entry.remove();
        let start = self.pcm.len();
        if !self.decoder.decode(&packet.payload, &mut self.pcm) {
            self.stats.discarded += 1;
        }
        let decoded = self.decoder.samples(ticks);
        self.pcm.resize(start + decoded, 0);
        // Its first part may have been made up already.
        let behind = u32::try_from(-gap).unwrap_or(0).min(ticks);
        self.pcm.drain(start..start + self.decoder.samples(behind));
        self.concealer.resume(&mut self.pcm[start..]);
        if (lost || behind > 0) && line.filled > 0 {
            self.stats.concealments += 1;
            self.stats.concealed += u64::from(line.filled);
            self.stats.silent += u64::from(line.filled.saturating_sub(MAX_CONCEALED));
        }
        line.filled = 0;
        line.cursor = line.cursor.max(place + i64::from(ticks));
        line.last = (packet.ssrc, packet.sequence);
        line.paused = packet.payload.len() <= opus::DTX_LEN;
        let fresh = ticks - behind;
        self.stats.decoded += u64::from(fresh);
        self.stats.waited += now.saturating_duration_since(packet.arrival) * fresh;
    }

    /// Makes up for what is not there.
    fn fill(&mut self, ticks: u32, next: Option<&[u8]>) {
        let Some(line) = &mut self.line else { return };
        let start = self.pcm.len();
        let wanted = self.decoder.samples(ticks);
        if line.paused {
            self.concealer.reset();
        } else if let Some(next) = next.filter(|next| opus::repeats(next)) {
            // All of it has to be decoded. Its first part may have been made up already.
            let length = opus::ticks(next).unwrap_or(ticks);
            if self.decoder.recover(next, length, &mut self.pcm) {
                let excess = self.decoder.samples(length).saturating_sub(wanted);
                self.pcm.drain(start..start + excess);
                self.concealer.resume(&mut self.pcm[start..]);
            }
        } else {
            let samples = wanted / self.converter.decoded;
            self.concealer.conceal(samples, &mut self.pcm);
        }
        self.pcm.resize(start + wanted, 0);
        line.cursor += i64::from(ticks);
        if !line.paused {
            line.filled = line.filled.saturating_add(ticks);
        }
    }
}

impl Line {
    fn new(packet: &Packet) -> Self {
        Self {
            ssrc: packet.ssrc,
            timestamp: packet.timestamp,
            place: 0,
            epoch: packet.arrival,
            delay: FIRST_DELAY,
            network: Network::new(packet.arrival, 0),
            cursor: 0,
            last: (packet.ssrc, packet.sequence.wrapping_sub(1)),
            paused: false,
            filled: 0,
            late_since: None,
        }
    }

    /// When that place is to be played.
    fn due(&self, place: i64) -> Instant {
        self.at(micros_of(place) + self.delay)
    }

    fn at(&self, micros_after: i64) -> Instant {
        match micros_after {
            0.. => self.epoch + micros(micros_after),
            _ => self
                .epoch
                .checked_sub(micros(-micros_after))
                .unwrap_or(self.epoch),
        }
    }

    /// Where a packet belongs. None if its clock is not the one that we know.
    fn place(&mut self, packet: &Packet) -> Option<i64> {
        if packet.ssrc != self.ssrc {
            return None;
        }
        let place = self.place + i64::from(packet.timestamp.wrapping_sub(self.timestamp) as i32);
        // How much longer it took to get here than place 0 was assumed to.
        let transit = self.since_epoch(packet.arrival) - micros_of(place);
        let too_late = transit - self.network.fastest - MAX_WAIT;
        if too_late > 0 {
            let since = *self.late_since.get_or_insert(packet.arrival);
            if too_late > MAX_JUMP || packet.arrival.saturating_duration_since(since) > LATE {
                return None;
            }
        } else if self.delay - transit > MAX_JUMP {
            return None;
        }
        if place > self.place {
            (self.place, self.timestamp) = (place, packet.timestamp);
        }
        self.network.note(packet.arrival, transit);
        // Longer at once, shorter with time.
        self.delay = self.delay.max(self.network.delay());
        Some(place)
    }

    /// Puts a packet of another clock where it is played as soon as the first packet was, but not
    /// before `end`.
    fn restart(&mut self, packet: &Packet, end: i64) -> i64 {
        let elapsed = self.since_epoch(packet.arrival) + FIRST_DELAY - self.delay;
        let step = i64::from(STEP_TICKS);
        let place = (ticks_of(elapsed) / step * step).max(self.cursor).max(end);
        let transit = self.since_epoch(packet.arrival) - micros_of(place);
        self.delay = self.delay.max(transit + FIRST_DELAY);
        self.network = Network::new(packet.arrival, transit);
        self.ssrc = packet.ssrc;
        (self.place, self.timestamp) = (place, packet.timestamp);
        self.late_since = None;
        place
    }

    fn relax(&mut self) {
        let excess = self.delay - self.network.delay();
        self.delay -= excess.clamp(0, RELAX);
    }

    fn since_epoch(&self, instant: Instant) -> i64 {
        match instant.checked_duration_since(self.epoch) {
            Some(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX / 2),
            None => -i64::try_from(self.epoch.duration_since(instant).as_micros()).unwrap_or(0),
        }
    }
}

/// The fastest and the slowest packet of late. Only differences mean anything.
struct Network {
    /// As good as a packet at the start, until enough is known.
    floor: i64,
    fastest: i64,
    slowest: i64,
    /// Of the time before `since`, and after.
    before: Option<(i64, i64)>,
    current: (i64, i64),
    since: Instant,
}

impl Network {
    fn new(now: Instant, transit: i64) -> Self {
        Self {
            floor: transit + FIRST_DELAY,
            fastest: transit,
            slowest: transit,
            before: None,
            current: (transit, transit),
            since: now,
        }
    }

    fn note(&mut self, now: Instant, transit: i64) {
        if now.saturating_duration_since(self.since) >= MEMORY {
            self.floor = i64::MIN;
            self.before = Some(self.current);
            self.current = (transit, transit);
            self.since = now;
        }
        let (low, high) = self.current;
        self.current = (low.min(transit), high.max(transit));
        let (low, high) = self.before.unwrap_or(self.current);
        self.fastest = low.min(self.current.0);
        self.slowest = high.max(self.current.1);
    }

    fn delay(&self) -> i64 {
        let reading = beats().1.as_micros() as i64;
        (self.slowest.min(self.fastest + MAX_WAIT) + reading + MARGIN).max(self.floor)
    }
}

/// From what the decoder gives to the frames that are wanted.
struct Converter {
    resampler: Option<Resampler>,
    decoded: usize,
    channels: usize,
    /// Samples in 10 ms, of all channels.
    frame: usize,
    out: Vec<i16>,
}

impl Converter {
    fn push(&mut self, pcm: &[i16]) {
        let mut resampled = Vec::new();
        let pcm = match &mut self.resampler {
            Some(resampler) => {
                resampler.process(pcm, &mut resampled);
                &resampled
            }
            None => pcm,
        };
        if self.decoded == self.channels {
            self.out.extend_from_slice(pcm);
            return;
        }
        // Left and right in turns.
        for sample in pcm.chunks_exact(self.decoded) {
            self.out.extend(sample.iter().cycle().take(self.channels));
        }
    }

    fn frame(&mut self) -> Option<Vec<i16>> {
        if self.out.len() < self.frame {
            return None;
        }
        let rest = self.out.split_off(self.frame);
        Some(std::mem::replace(&mut self.out, rest))
    }
}

fn micros_of(ticks: i64) -> i64 {
    ticks * 125 / 6
}

fn ticks_of(micros: i64) -> i64 {
    micros * 6 / 125
}

fn micros(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests;
