//! What anybody may cause is not told each time: the first, and from then on now and then.

use std::time::{Duration, Instant};

/// What is refused is told at once, and then once in so long: anybody can send it.
const TELL_EVERY: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(crate) struct Refusals {
    told: Option<Instant>,
    untold: u64,
}

impl Refusals {
    /// If this one is to be told, how many before it were not.
    pub fn tell(&mut self, now: Instant) -> Option<u64> {
        let lately = |told: Instant| now.saturating_duration_since(told) < TELL_EVERY;
        if self.told.is_some_and(lately) {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_now_and_then() {
        let mut refusals = Refusals::default();
        let begun = Instant::now();
        assert_eq!(refusals.tell(begun), Some(0));
        for second in 0..60 {
            let now = begun + Duration::from_secs(second);
            assert_eq!(refusals.tell(now), None);
        }
        assert_eq!(refusals.tell(begun + TELL_EVERY), Some(60));
        assert_eq!(refusals.tell(begun + TELL_EVERY), None);
        assert_eq!(refusals.tell(begun + 3 * TELL_EVERY), Some(1));
    }
}
