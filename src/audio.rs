//! From a track's RTP packets to what the provider is sent: audio on an unbroken time line. Takes
//! `now` and packets, returns pages; owns no socket and no clock.
//!
//! A [`TrackClock`] says where on the track's own time line a packet belongs, whatever streams come
//! and go on it; an [`AudioLine`] is what one stream is sent. What is missing (loss, DTX, mute)
//! becomes silence, so that word times stay on the track's clock and the provider's end-of-speech
//! detection sees the pause. Pauses longer than [`MAX_SILENCE`] are not sent (they would be billed);
//! the line remembers them and [`AudioLine::track_time`] adds them back.

mod opus;
mod speech;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use ogg::writing::{PacketWriteEndInfo, PacketWriter};

use crate::config::Encoding;
pub use speech::Ear;

/// Opus always counts in 48 kHz samples, in RTP (RFC 7587) and in Ogg (RFC 7845).
const RATE: u32 = 48_000;
/// Sample rate of [`Encoding::Linear16`], in Hz.
pub const LINEAR16_RATE: u32 = opus::RATE;
/// 20 ms of digital silence: CELT, full band, mono, one frame (RFC 6716, section 3.1).
const SILENCE: [u8; 3] = [0xf8, 0xff, 0xfe];
const SILENCE_SAMPLES: u64 = 960;
/// The longest stretch of silence sent for one pause.
pub const MAX_SILENCE: Duration = Duration::from_secs(2);
/// How long nothing may arrive before silence is sent without waiting for the next packet; well
/// above the jitter of a usable call.
const PAUSE_AFTER: Duration = Duration::from_millis(200);
/// Silence sent ahead of need would delay speech that resumes, so it stays this far behind.
const PAUSE_LAG: Duration = Duration::from_millis(100);
/// An RTP clock that departs this far from the wall clock has been restarted.
const CLOCK_JUMP: Duration = Duration::from_secs(5);
/// So many packets in a row that seem late say that the sequence was restarted.
const MAX_LATE_RUN: u32 = 25;
/// Skipped pauses that are remembered; words are reported within seconds.
const MAX_SKIPS: usize = 64;

/// One Opus packet of a track, as it came from the room.
#[derive(Debug, Clone, Copy)]
pub struct OpusPacket<'a> {
    pub payload: &'a [u8],
    /// RTP timestamp, 48 kHz.
    pub timestamp: u32,
    /// RTP sequence number, extended so that it does not wrap.
    pub sequence: u64,
    pub received_at: Instant,
}

/// Counts of what was not passed on as it came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AudioCounts {
    /// Packets that came after their place on the line was taken, or twice.
    pub late: u64,
    /// Packets that are no Opus.
    pub malformed: u64,
}

/// The time line of a track: positions are samples at 48 kHz since its first packet.
#[derive(Debug, Default)]
pub struct TrackClock {
    last: Option<Last>,
    late_run: u32,
    counts: AudioCounts,
}

/// The last packet.
#[derive(Debug, Clone, Copy)]
struct Last {
    timestamp: u32,
    sequence: u64,
    received_at: Instant,
    span: Span,
}

/// Where a packet is on the track's time line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub at: u64,
    pub samples: u64,
}

impl Span {
    pub fn end(self) -> u64 {
        self.at + self.samples
    }
}

impl TrackClock {
    /// The place of a packet; `None` if it has none, because it is late or no Opus.
    pub fn place(&mut self, packet: &OpusPacket<'_>) -> Option<Span> {
        let Some(length) = opus_samples(packet.payload) else {
            self.counts.malformed += 1;
            return None;
        };
        let at = match &self.last {
            None => 0,
            Some(last) if packet.sequence <= last.sequence && self.late_run < MAX_LATE_RUN => {
                self.late_run += 1;
                self.counts.late += 1;
                return None;
            }
            Some(last) => {
                let rtp = u64::from(packet.timestamp.wrapping_sub(last.timestamp));
                let wall = packet
                    .received_at
                    .saturating_duration_since(last.received_at);
                if rtp.abs_diff(samples(wall)) > samples(CLOCK_JUMP) {
                    last.span.at + samples(wall)
                } else {
                    last.span.at + rtp
                }
            }
        };
        let span = Span {
            at,
            samples: u64::from(length),
        };
        self.late_run = 0;
        self.last = Some(Last {
            timestamp: packet.timestamp,
            sequence: packet.sequence,
            received_at: packet.received_at,
            span,
        });
        Some(span)
    }

    /// How long nothing has come, at `now`; `None` before the first packet.
    pub fn quiet(&self, now: Instant) -> Option<Duration> {
        let last = self.last.as_ref()?;
        Some(now.saturating_duration_since(last.received_at))
    }

    pub fn counts(&self) -> AudioCounts {
        self.counts
    }
}

/// One message's worth of audio.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    pub bytes: Vec<u8>,
    /// Samples at 48 kHz.
    pub samples: u64,
}

impl Page {
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// What one stream is sent: the track's time line from `origin` on.
pub struct AudioLine {
    container: Container,
    /// The last packet and its length, up to `position`: whether it ends a page shows later.
    held: Option<(Vec<u8>, u64)>,
    page_samples: u64,
    /// The track's position at the line's start.
    origin: u64,
    /// Samples written, those of them on finished pages, and those handed out.
    position: u64,
    paged: u64,
    handed: u64,
    /// The track's position at the last packet's end.
    packet_end: Option<u64>,
    /// Silence written since the last packet.
    pause_filled: u64,
    /// Samples of the track that were skipped before a position.
    skips: VecDeque<(u64, u64)>,
    skipped: u64,
}

/// How samples become bytes.
enum Container {
    Ogg(PacketWriter<'static, Vec<u8>>),
    Pcm {
        /// None where there was no memory for one: silence is sent then.
        decoder: Option<opus::Decoder>,
        bytes: Vec<u8>,
        paged: usize,
    },
}

impl AudioLine {
    /// A new line and what is to be sent before anything else: the container's headers, if it has
    /// any.
    pub fn new(encoding: Encoding, page: Duration, origin: u64) -> (Self, Page) {
        let container = match encoding {
            Encoding::OggOpus => Container::Ogg(PacketWriter::new(Vec::new())),
            Encoding::Linear16 => Container::Pcm {
                decoder: opus::Decoder::new(),
                bytes: Vec::new(),
                paged: 0,
            },
        };
        let mut line = Self {
            container,
            held: None,
            page_samples: samples(page).max(1),
            origin,
            position: 0,
            paged: 0,
            handed: 0,
            packet_end: None,
            pause_filled: 0,
            skips: VecDeque::new(),
            skipped: 0,
        };
        line.container.headers();
        let header = line.take();
        (line, header)
    }

    /// Adds a packet, after silence for what is missing before it. Returns the pages that became
    /// full; empty when none did.
    pub fn packet(&mut self, span: Span, payload: &[u8]) -> Page {
        self.fill_until(span.at);
        self.pause_filled = 0;
        self.packet_end = Some(span.end());
        self.append(payload, span.samples);
        self.take()
    }

    /// Ends the page: what has come so far is sent, with silence for a pause that goes on at `now`.
    /// Call every page length or so.
    pub fn tick(&mut self, clock: &TrackClock, now: Instant) -> Page {
        if let (Some(last), Some(end)) = (&clock.last, self.packet_end) {
            let quiet = now.saturating_duration_since(last.received_at);
            if quiet >= PAUSE_AFTER {
                let due = last.span.at + samples(quiet - PAUSE_LAG);
                self.fill_until(due.min(end + samples(MAX_SILENCE)));
            }
        }
        self.release(PacketWriteEndInfo::EndPage);
        self.take()
    }

    /// The last page, with what is still buffered; the line is over.
    pub fn finish(&mut self) -> Page {
        if self.packet_end.is_some() {
            self.append(&SILENCE, SILENCE_SAMPLES);
            self.release(PacketWriteEndInfo::EndStream);
        }
        self.take()
    }

    /// The track's position up to which packets were sent.
    pub fn sent(&self) -> u64 {
        self.packet_end.unwrap_or(self.origin)
    }

    /// Turns a time on the stream, in seconds, into one on the track: what came before the stream
    /// and the pauses that were not sent are added.
    pub fn track_time(&self, stream_seconds: f64) -> f64 {
        let skipped = self
            .skips
            .iter()
            .rev()
            .find(|(position, _)| seconds(*position) <= stream_seconds)
            .map_or(0, |(_, total)| *total);
        stream_seconds + seconds(self.origin + skipped)
    }

    /// Brings the line up to the track's position `at` with silence, or remembers what it skips.
    fn fill_until(&mut self, at: u64) {
        let missing = at.saturating_sub(self.origin + self.position + self.skipped);
        let budget = samples(MAX_SILENCE).saturating_sub(self.pause_filled);
        let fill = missing.min(budget) / SILENCE_SAMPLES;
        for _ in 0..fill {
            self.append(&SILENCE, SILENCE_SAMPLES);
        }
        let filled = fill * SILENCE_SAMPLES;
        self.pause_filled += filled;
        if missing - filled >= SILENCE_SAMPLES && self.pause_filled >= samples(MAX_SILENCE) {
            self.skipped += missing - filled;
            if self.skips.len() == MAX_SKIPS {
                self.skips.pop_front();
            }
            self.skips.push_back((self.position, self.skipped));
        }
    }

    fn append(&mut self, packet: &[u8], length: u64) {
        self.release(if self.position - self.paged >= self.page_samples {
            PacketWriteEndInfo::EndPage
        } else {
            PacketWriteEndInfo::NormalPacket
        });
        self.position += length;
        self.held = Some((packet.to_vec(), length));
    }

    /// Writes the packet that is held.
    fn release(&mut self, end: PacketWriteEndInfo) {
        let Some((packet, length)) = self.held.take() else {
            return;
        };
        if !matches!(end, PacketWriteEndInfo::NormalPacket) {
            self.paged = self.position;
        }
        self.container.write(packet, length, end, self.position);
    }

    fn take(&mut self) -> Page {
        let samples = self.paged - self.handed;
        self.handed = self.paged;
        Page {
            bytes: self.container.take(),
            samples,
        }
    }
}

impl Container {
    fn headers(&mut self) {
        let Self::Ogg(writer) = self else {
            return;
        };
        // RFC 7845, section 5: version 1, mono, no pre-skip (nothing is cut), 48 kHz, no gain.
        let mut head = b"OpusHead\x01\x01\x00\x00".to_vec();
        head.extend_from_slice(&RATE.to_le_bytes());
        head.extend_from_slice(&[0, 0, 0]);
        let vendor = b"roomwarden";
        let mut tags = b"OpusTags".to_vec();
        tags.extend_from_slice(&(vendor.len() as u32).to_le_bytes());
        tags.extend_from_slice(vendor);
        tags.extend_from_slice(&0u32.to_le_bytes());
        for packet in [head, tags] {
            // The sink is memory: writing cannot fail.
            let _ = writer.write_packet(packet, 1, PacketWriteEndInfo::EndPage, 0);
        }
    }

    /// `position` is the line's after this packet.
    fn write(&mut self, packet: Vec<u8>, length: u64, end: PacketWriteEndInfo, position: u64) {
        match self {
            Self::Ogg(writer) => {
                // The sink is memory: writing cannot fail.
                let _ = writer.write_packet(packet, 1, end, position);
            }
            Self::Pcm {
                decoder,
                bytes,
                paged,
            } => {
                // Two bytes a sample. A packet that is damaged inside keeps its place as silence.
                let whole =
                    bytes.len() + (length * u64::from(opus::RATE) / u64::from(RATE)) as usize * 2;
                if packet[..] != SILENCE {
                    let samples = decoder
                        .as_mut()
                        .map_or(&[][..], |decoder| decoder.decode(&packet));
                    bytes.extend(samples.iter().flat_map(|sample| sample.to_le_bytes()));
                }
                bytes.resize(whole, 0);
                if !matches!(end, PacketWriteEndInfo::NormalPacket) {
                    *paged = bytes.len();
                }
            }
        }
    }

    fn take(&mut self) -> Vec<u8> {
        match self {
            Self::Ogg(writer) => std::mem::take(writer.inner_mut()),
            Self::Pcm { bytes, paged, .. } => {
                let rest = bytes.split_off(std::mem::take(paged));
                std::mem::replace(bytes, rest)
            }
        }
    }
}

/// Samples at 48 kHz in a time.
pub fn samples(time: Duration) -> u64 {
    (time.as_micros() as u64) * u64::from(RATE) / 1_000_000
}

/// Samples at 48 kHz in seconds.
pub fn seconds(samples: u64) -> f64 {
    samples as f64 / f64::from(RATE)
}

/// Length of an Opus packet in samples at 48 kHz, from its table-of-contents byte (RFC 6716,
/// section 3.1). `None` when it is no valid packet.
fn opus_samples(packet: &[u8]) -> Option<u32> {
    let toc = *packet.first()?;
    let frame = match toc >> 3 {
        config @ 0..=11 => [480, 960, 1920, 2880][usize::from(config & 3)],
        config @ 12..=15 => [480, 960][usize::from(config & 1)],
        config => [120, 240, 480, 960][usize::from(config & 3)],
    };
    let frames = match toc & 3 {
        0 => 1,
        1 | 2 => 2,
        _ => u32::from(packet.get(1)? & 0x3f),
    };
    let total = frame * frames;
    // At most 120 ms.
    (total > 0 && total <= 5760).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: [u8; 4] = [0x78, 1, 2, 3]; // CELT, 20 ms, one frame
    const PAGE: Duration = Duration::from_millis(40);

    fn packets(pages: &[u8]) -> Vec<(Vec<u8>, u64)> {
        let mut reader = ogg::PacketReader::new(std::io::Cursor::new(pages.to_vec()));
        let mut all = Vec::new();
        while let Some(packet) = reader.read_packet().unwrap() {
            all.push((packet.data.clone(), packet.absgp_page()));
        }
        all
    }

    struct Track {
        clock: TrackClock,
        line: AudioLine,
        pages: Vec<u8>,
        samples: u64,
        start: Instant,
    }

    impl Track {
        fn add(&mut self, page: Page) {
            self.pages.extend(page.bytes);
            self.samples += page.samples;
        }
        fn seconds(&self) -> f64 {
            seconds(self.samples)
        }
        fn new() -> Self {
            let (line, header) = AudioLine::new(Encoding::OggOpus, PAGE, 0);
            Self {
                clock: TrackClock::default(),
                line,
                pages: header.bytes,
                samples: 0,
                start: Instant::now(),
            }
        }
        /// Packet number `n`, with the RTP timestamp `ms` after the first and arriving then.
        fn packet(&mut self, n: u64, ms: u64) {
            let start = (u64::from(u32::MAX - 5000) + ms * 48) as u32;
            self.stamped(n, start, ms);
        }
        fn stamped(&mut self, sequence: u64, timestamp: u32, ms: u64) {
            let packet = OpusPacket {
                payload: &FRAME,
                timestamp,
                sequence,
                received_at: self.start + Duration::from_millis(ms),
            };
            if let Some(span) = self.clock.place(&packet) {
                let page = self.line.packet(span, &FRAME);
                self.add(page);
            }
        }
        fn tick(&mut self, ms: u64) {
            let now = self.start + Duration::from_millis(ms);
            let page = self.line.tick(&self.clock, now);
            self.add(page);
        }
        /// Everything so far, in pages.
        fn body(&mut self) -> Vec<(Vec<u8>, u64)> {
            self.line.release(PacketWriteEndInfo::EndPage);
            let page = self.line.take();
            self.add(page);
            packets(&self.pages).split_off(2)
        }
    }

    #[test]
    fn packets_pass_undamaged_two_to_a_page_across_a_timestamp_wrap() {
        let mut track = Track::new();
        for n in 0..10 {
            track.packet(n, n * 20);
        }
        let body = track.body();
        let head = packets(&track.pages);
        assert!(head[0].0.starts_with(b"OpusHead\x01\x01"));
        assert!(head[1].0.starts_with(b"OpusTags"));
        assert_eq!(body.len(), 10);
        assert!(body.iter().all(|(data, _)| data == &FRAME));
        assert_eq!(body[1].1, 1920, "granule position after the first page");
        assert_eq!(track.seconds(), 0.2);
    }

    #[test]
    fn a_lost_packet_becomes_silence_and_its_late_copy_is_dropped() {
        let mut track = Track::new();
        track.packet(0, 0);
        track.packet(2, 40);
        track.packet(1, 20);
        track.packet(3, 60);
        let body = track.body();
        assert_eq!(
            body.iter().map(|(d, _)| d.len()).collect::<Vec<_>>(),
            [4, 3, 4, 4]
        );
        assert_eq!(track.clock.counts().late, 1);
    }

    #[test]
    fn a_pause_is_filled_while_it_lasts_and_speech_resumes_at_its_true_time() {
        let mut track = Track::new();
        track.packet(0, 0);
        for ms in (0..1000).step_by(40) {
            track.tick(ms);
        }
        assert!(track.seconds() > 0.8, "{}", track.seconds());
        track.packet(1, 1000);
        track.packet(2, 1020);
        let body = track.body();
        let resumed = body.iter().skip(1).position(|(d, _)| d.len() == 4).unwrap() + 1;
        assert_eq!(resumed, 50, "silence from 20 ms to 1000 ms is 49 packets");
        assert_eq!(track.line.track_time(1.0), 1.0);
    }

    #[test]
    fn a_long_pause_is_cut_but_remembered() {
        let mut track = Track::new();
        track.packet(0, 0);
        for ms in (0..60_000).step_by(40) {
            track.tick(ms);
        }
        assert!(track.seconds() < 2.2);
        track.packet(1, 60_000);
        let at = track.seconds();
        assert!((track.line.track_time(at + 0.001) - 60.0).abs() < 0.05);
        assert_eq!(
            track.line.track_time(0.5),
            0.5,
            "before the pause nothing is shifted"
        );
    }

    #[test]
    fn a_restarted_rtp_clock_follows_the_wall_clock() {
        let mut track = Track::new();
        track.packet(0, 0);
        track.stamped(1, 7, 500);
        track.packet(2, 520);
        assert!(track.line.track_time(0.0) < 1.0);
        assert!((0.4..0.7).contains(&track.seconds()), "{}", track.seconds());
    }

    #[test]
    fn a_restarted_sequence_is_taken_up_again() {
        let mut track = Track::new();
        track.packet(1_000_000, 0);
        for n in 1..100 {
            track.packet(n, n * 20);
        }
        assert_eq!(track.clock.counts().late, u64::from(MAX_LATE_RUN));
        assert!(track.seconds() > 1.9, "{}", track.seconds());
    }

    #[test]
    fn what_is_not_opus_is_counted_and_has_no_place() {
        let mut clock = TrackClock::default();
        let received_at = Instant::now();
        for payload in [&[][..], &[0x7b], &[0x7b, 0], &[0x1f, 0x3f]] {
            let packet = OpusPacket {
                payload,
                timestamp: 0,
                sequence: 0,
                received_at,
            };
            assert_eq!(clock.place(&packet), None);
        }
        assert_eq!(clock.counts().malformed, 4);
    }

    #[test]
    fn a_line_without_audio_has_no_last_page() {
        let mut track = Track::new();
        assert!(track.line.finish().is_empty());
    }

    #[test]
    fn finish_flushes_a_half_page() {
        let mut track = Track::new();
        track.packet(0, 0);
        assert_eq!(track.samples, 0);
        let last = track.line.finish();
        track.add(last);
        assert_eq!(track.body().len(), 2);
    }

    #[test]
    fn a_tick_sends_what_has_come_whether_or_not_the_page_is_full() {
        let mut track = Track::new();
        track.packet(0, 0);
        assert_eq!(track.samples, 0);
        track.tick(30);
        assert_eq!(track.samples, 960);
        // Nothing more has come: nothing is sent.
        track.tick(70);
        assert_eq!(track.samples, 960);
        // A burst is sent in pages of the usual length.
        (1..=5).for_each(|n| track.packet(n, n * 20));
        assert_eq!(track.samples, 960 * 5);
        track.tick(110);
        let positions: Vec<u64> = track.body().iter().map(|(_, page)| *page).collect();
        assert_eq!(positions, [960, 2880, 2880, 4800, 4800, 5760]);
    }

    #[test]
    fn a_line_that_begins_later_tells_the_tracks_time() {
        let (mut line, _) = AudioLine::new(Encoding::OggOpus, PAGE, 10 * u64::from(RATE));
        let span = Span {
            at: 10 * u64::from(RATE) + 960,
            samples: 960,
        };
        assert!(line.packet(span, &FRAME).is_empty());
        let page = line.finish();
        assert_eq!(
            page.samples, 2880,
            "20 ms of silence, the packet, and the end"
        );
        assert_eq!(line.track_time(0.5), 10.5);
    }

    /// Of a sender that pauses (DTX) there come packets without a frame.
    #[test]
    fn a_packet_without_a_frame_is_silence_in_linear16() {
        let file = include_bytes!("../crates/rehearsal/assets/anna.opus");
        let speech = packets(file).split_off(2);
        // SILK, 20 ms, one frame: as those who speak narrow band send.
        for dtx in [&[0x08][..], &[0x08, 0x00], &[0x78]] {
            let (mut line, _) = AudioLine::new(Encoding::Linear16, PAGE, 0);
            let mut last = Vec::new();
            for (n, payload) in speech
                .iter()
                .map(|(p, _)| &p[..])
                .take(20)
                .chain([dtx; 5])
                .enumerate()
            {
                let span = Span {
                    at: n as u64 * 960,
                    samples: 960,
                };
                line.packet(span, payload);
                last = line.tick(&TrackClock::default(), Instant::now()).bytes;
            }
            assert_eq!(last.len(), 640);
            assert!(last.iter().all(|byte| *byte == 0), "{dtx:?}");
        }
    }

    /// Pages of 16 kHz samples of the same length as the Opus that they stand for, the tone whole.
    #[test]
    fn linear16_is_decoded_silence_included() {
        let file = include_bytes!("../crates/rehearsal/assets/anna.opus");
        let recording = packets(file).split_off(2);
        let (mut line, header) = AudioLine::new(Encoding::Linear16, PAGE, 0);
        assert!(header.is_empty());
        let mut pcm = Vec::new();
        // Every tenth packet is lost.
        let kept = recording.iter().enumerate().filter(|(n, _)| n % 10 != 9);
        for (n, (payload, _)) in kept {
            let span = Span {
                at: n as u64 * 960,
                samples: 960,
            };
            let page = line.packet(span, payload);
            assert_eq!(page.bytes.len() as u64, page.samples * 2 / 3);
            pcm.extend(page.bytes);
        }
        let last = line.finish();
        pcm.extend(last.bytes);
        let samples: Vec<i16> = pcm
            .chunks_exact(2)
            .map(|pair| i16::from_le_bytes([pair[0], pair[1]]))
            .collect();
        let whole = samples.len() as u64 * 3 / 960;
        assert!((recording.len() as u64..=recording.len() as u64 + 1).contains(&whole));
        let loud = samples.iter().filter(|sample| sample.abs() > 1000).count();
        assert!(
            loud > samples.len() / 20,
            "speech: {loud} of {}",
            samples.len()
        );
        let lost = &samples[9 * 320..10 * 320];
        assert!(
            lost.iter().all(|sample| *sample == 0),
            "a lost packet is silence"
        );
    }
}
