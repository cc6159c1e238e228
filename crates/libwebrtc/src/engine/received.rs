//! What is known of a source by its packets' headers.

use std::time::Instant;

use str0m::rtp::RtpPacket;

use crate::{opus::CLOCK, rtp_transceiver::RtpTransceiver};

pub(super) struct Source {
    pub transceiver: RtpTransceiver,
    pub received: Received,
}

/// Counts since the first packet.
#[derive(Default)]
pub(super) struct Received {
    pub packets: u64,
    /// Of payload.
    pub bytes: u64,
    pub header_bytes: u64,
    /// As in RFC 3550 (6.4.1), in units of RTP time.
    pub jitter: f64,
    /// Of the last packet, dBov.
    pub level: Option<i8>,
    pub last: Option<Instant>,
    timestamp: u32,
    /// Extended sequence numbers, while there are packets.
    first: u64,
    highest: u64,
}

impl Source {
    pub(super) fn new(transceiver: RtpTransceiver) -> Self {
        Self {
            transceiver,
            received: Received::default(),
        }
    }
}

impl Received {
    /// Returns how many packets right before this one have not come (yet).
    pub(super) fn note(&mut self, packet: &RtpPacket) -> u32 {
        self.bytes += packet.payload.len() as u64;
        self.header_bytes += packet.header.header_len as u64;
        self.level = packet.header.ext_vals.audio_level.or(self.level);
        self.note_header(*packet.seq_no, packet.header.timestamp, packet.timestamp)
    }

    fn note_header(&mut self, sequence: u64, timestamp: u32, arrival: Instant) -> u32 {
        self.packets += 1;
        let Some(last) = self.last.replace(arrival) else {
            (self.first, self.highest) = (sequence, sequence);
            self.timestamp = timestamp;
            return 0;
        };
        let between = arrival.saturating_duration_since(last).as_secs_f64() * f64::from(CLOCK);
        let sent = timestamp.wrapping_sub(self.timestamp) as i32;
        self.jitter += ((between - f64::from(sent)).abs() - self.jitter) / 16.0;
        self.timestamp = timestamp;

        self.first = self.first.min(sequence);
        let missing = sequence.saturating_sub(self.highest.saturating_add(1));
        self.highest = self.highest.max(sequence);
        u32::try_from(missing).unwrap_or(u32::MAX)
    }

    /// Packets that have not come; ones that are doubled don't make up for it.
    pub(super) fn lost(&self) -> i64 {
        match self.packets {
            0 => 0,
            packets => (self.highest - self.first + 1) as i64 - packets as i64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn gaps_are_told_when_they_are_seen_and_lateness_evens_out() {
        let mut received = Received::default();
        let start = Instant::now();
        let mut note = |sequence: u64, millis: u64| {
            let missing = received.note_header(
                sequence,
                (sequence as u32).wrapping_mul(960),
                start + Duration::from_millis(millis),
            );
            (missing, received.lost())
        };
        assert_eq!(note(70_000, 0), (0, 0));
        assert_eq!(note(70_001, 20), (0, 0));
        assert_eq!(note(70_005, 100), (3, 3));
        assert_eq!(note(70_003, 101), (0, 2));
        assert_eq!(note(70_006, 120), (0, 2));
        assert_eq!(note(69_999, 121), (0, 2));
    }

    #[test]
    fn an_even_flow_has_no_jitter_and_an_uneven_one_has_its_own() {
        let start = Instant::now();
        for (uneven, expected) in [(0, 0.0), (10, 10.0)] {
            let mut received = Received::default();
            for n in 0..500_u32 {
                let late = if n % 2 == 0 { uneven } else { 0 };
                let arrival = start + Duration::from_millis(u64::from(n * 20 + late + 20));
                // Wraps in between.
                let timestamp = (n * 960).wrapping_sub(100_000);
                received.note_header(n.into(), timestamp, arrival);
            }
            // Every second gap is 10 ms longer, the others are 10 ms shorter.
            let millis = received.jitter / 48.0;
            assert!((millis - expected).abs() < 0.1, "{millis} ms");
        }
    }
}
