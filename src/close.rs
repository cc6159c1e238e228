//! Orders to close. Every cause, from a participant who leaves to SIGTERM, becomes one of these and
//! runs the same steps; see ARCHITECTURE.md for their order.

use std::time::Instant;

use tokio::sync::watch;

use crate::domain::CloseReason;

/// The instant that deadlines are counted from: that of tokio's clock, which tests may pause.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// An order to close: why, and the instant by which everything is over, come what may.
#[derive(Debug, Clone)]
pub struct CloseOrder {
    pub reason: CloseReason,
    pub deadline: Instant,
}

impl CloseOrder {
    /// The stronger of both reasons, the earlier of both deadlines.
    pub fn merge(&mut self, other: &CloseOrder) {
        if other.reason > self.reason {
            self.reason = other.reason.clone();
        }
        self.deadline = self.deadline.min(other.deadline);
    }
}

/// Sticky order: set once, only ever strengthened. Cancelling who set it changes nothing.
pub fn order(orders: &watch::Sender<Option<CloseOrder>>, new: &CloseOrder) {
    orders.send_modify(|current| strengthen(current, new));
}

pub fn strengthen(current: &mut Option<CloseOrder>, new: &CloseOrder) {
    match current {
        Some(current) => current.merge(new),
        None => *current = Some(new.clone()),
    }
}
