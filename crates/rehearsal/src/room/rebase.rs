//! Sequence numbers of a forwarded RTP stream.

use std::ops::RangeInclusive;

/// Where a rebased stream starts: not at 0, which some receivers take for "unset".
const FIRST: RangeInclusive<u64> = 1_000..=20_000;

/// Renumbers one source for one receiver.
///
/// SRTP's rollover counter is not on the wire: a new receiver starts at 0, so the first packet
/// it gets must have an extended sequence number below 65,536, however old the source is. If it
/// has not, everything looks connected and is silent (RFC 3711, 3.3.1).
#[derive(Debug, Default)]
pub(super) struct Rebase {
    state: Option<State>,
}

#[derive(Debug)]
struct State {
    /// Subtracted from the source's numbers, in wrapping arithmetic.
    offset: u64,
    /// Source numbers up to this one are not forwarded any more.
    floor: u64,
    newest: u64,
}

impl Rebase {
    /// The receiver's number for the source's packet `seq`, or None if it is too old to fit in.
    pub fn forward(&mut self, seq: u64) -> Option<u64> {
        let state = self.state.get_or_insert_with(|| State {
            offset: seq.wrapping_sub(rand::random_range(FIRST)),
            floor: seq.wrapping_sub(1),
            newest: seq,
        });
        if seq <= state.floor && state.floor != u64::MAX {
            return None;
        }
        state.newest = state.newest.max(seq);
        Some(seq.wrapping_sub(state.offset))
    }

    /// Leaves out the source's packet `seq` without a gap, which a receiver would report as loss.
    pub fn skip(&mut self, seq: u64) {
        // A late one can't be closed over: its neighbours have been numbered already.
        if let Some(state) = self.state.as_mut().filter(|s| seq > s.newest) {
            state.offset = state.offset.wrapping_add(1);
            state.floor = seq;
            state.newest = seq;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_below_the_first_rollover() {
        for first in [0, 5, 65_535, 65_536, 10_000_000, u64::MAX - 10] {
            let mut rebase = Rebase::default();
            let start = rebase.forward(first).expect("first packet");
            assert!(FIRST.contains(&start), "{first} became {start}");
            assert_eq!(rebase.forward(first + 1), Some(start + 1));
            assert_eq!(rebase.forward(first + 3), Some(start + 3));
            // Late, but after the start.
            assert_eq!(rebase.forward(first + 2), Some(start + 2));
        }
    }

    #[test]
    fn drops_what_came_before_the_start() {
        let mut rebase = Rebase::default();
        rebase.forward(70_000);
        assert_eq!(rebase.forward(69_999), None);
    }

    #[test]
    fn closes_the_gap_of_skipped_packets() {
        let mut rebase = Rebase::default();
        let start = rebase.forward(100_000).expect("first packet");
        rebase.skip(100_001);
        rebase.skip(100_002);
        assert_eq!(rebase.forward(100_003), Some(start + 1));
        assert_eq!(
            rebase.forward(100_001),
            None,
            "its number belongs to another"
        );
        rebase.skip(100_002);
        assert_eq!(rebase.forward(100_004), Some(start + 2));
    }

    #[test]
    fn crosses_rollovers_without_a_jump() {
        let mut rebase = Rebase::default();
        let start = rebase.forward(1).expect("first packet");
        for n in 2..200_000 {
            assert_eq!(rebase.forward(n), Some(start + n - 1));
        }
    }
}
