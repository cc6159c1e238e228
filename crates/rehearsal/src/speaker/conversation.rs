//! Taking turns: who of several speakers has the floor.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Speakers who take turns: one at a time says a phrase of its recording, in the order in which they
/// came, and the others are silent meanwhile. Who leaves, or vanishes, loses its turn. Cheap to
/// clone.
#[derive(Debug, Clone)]
pub struct Conversation {
    pause: Duration,
    floor: Arc<Mutex<Floor>>,
}

#[derive(Debug)]
struct Floor {
    /// Whose turn it is comes first.
    line: VecDeque<u64>,
    next: u64,
    /// Since when nobody has spoken.
    free: Instant,
}

/// One speaker's place in the line; dropping it gives it up.
pub(super) struct Seat {
    conversation: Conversation,
    id: u64,
}

impl Conversation {
    /// With a pause between one's last word and another's first.
    pub fn new(pause: Duration) -> Self {
        let floor = Floor {
            line: VecDeque::new(),
            next: 0,
            free: Instant::now(),
        };
        let floor = Arc::new(Mutex::new(floor));
        Self { pause, floor }
    }

    /// At the end of the line.
    pub(super) fn enter(&self) -> Seat {
        let mut floor = self.floor();
        let id = floor.next;
        floor.next += 1;
        floor.line.push_back(id);
        drop(floor);
        let conversation = self.clone();
        Seat { conversation, id }
    }

    fn floor(&self) -> MutexGuard<'_, Floor> {
        self.floor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    pub fn may_speak(&self, now: Instant) -> bool {
        let floor = self.conversation.floor();
        let pause = now.saturating_duration_since(floor.free);
        floor.line.front() == Some(&self.id) && pause >= self.conversation.pause
    }

    /// Lets the next one speak, after the pause.
    pub fn pass_on(&self, now: Instant) {
        let mut floor = self.conversation.floor();
        if floor.line.front() == Some(&self.id) {
            floor.line.rotate_left(1);
            floor.free = now;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut floor = self.conversation.floor();
        if floor.line.front() == Some(&self.id) {
            floor.free = Instant::now();
        }
        floor.line.retain(|id| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_goes_round_and_past_those_who_left() {
        let pause = Duration::from_millis(100);
        let conversation = Conversation::new(pause);
        let seats = [(); 3].map(|()| conversation.enter());
        let start = Instant::now();
        let speaks = |now| {
            let may = seats.each_ref().map(|seat| seat.may_speak(now));
            assert!(may.iter().filter(|may| **may).count() <= 1);
            may.iter().position(|may| *may)
        };
        let mut now = start + pause;
        for speaker in [0, 1, 2, 0] {
            assert_eq!(speaks(now), Some(speaker));
            // Only who has the floor can pass it on.
            seats[(speaker + 1) % 3].pass_on(now);
            assert_eq!(speaks(now), Some(speaker));
            seats[speaker].pass_on(now);
            assert_eq!(speaks(now + pause / 2), None);
            now += pause;
        }
        let [_zero, one, two] = seats;
        drop(one);
        let now = Instant::now();
        assert!(!two.may_speak(now) && two.may_speak(now + pause));
    }
}
