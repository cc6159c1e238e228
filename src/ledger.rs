//! What was settled: receipts are counted, logged and kept for the final report.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    domain::{CloseReason, Outcome, Service, StreamId, StreamKey, StreamTotals},
    store::Store,
};

/// Receipts kept for the report; the counts go on beyond.
const KEPT: usize = 1000;

/// Proof of how one stream ended. Only the registry makes one, by consuming the stream's permit,
/// and only the ledger takes it.
#[must_use = "a receipt is settled in the ledger, or the stream stays on the books"]
#[derive(Debug)]
pub struct CloseReceipt {
    entry: Settled,
}

impl CloseReceipt {
    pub(crate) fn new(entry: Settled) -> Self {
        Self { entry }
    }
}

/// A settled stream, as the report shows it and the journal keeps it until the store has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settled {
    pub id: StreamId,
    #[serde(flatten)]
    pub key: StreamKey,
    #[serde(flatten)]
    pub service: Arc<Service>,
    pub outcome: Outcome,
    pub reason: CloseReason,
    #[serde(flatten)]
    pub totals: StreamTotals,
    /// Unix time of the permit, in milliseconds.
    pub opened_at_ms: u64,
    /// Unix time, in milliseconds; the clock may have been set meanwhile.
    #[serde(default)]
    pub settled_at_ms: u64,
    /// From permit to settlement.
    pub wall_seconds: f64,
    /// From the end of the handshake to settlement; 0 if there was no connection.
    #[serde(default)]
    pub connection_seconds: f64,
    /// From the order to close (or the loss of the stream) to settlement.
    pub close_seconds: f64,
}

/// Streams by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Streams that the provider counted, or may have: their handshake was not refused.
    pub opened: u64,
    pub acknowledged: u64,
    pub timed_out: u64,
    pub peer_gone: u64,
    /// Attempts that never became a stream; not part of `opened`.
    pub never_opened: u64,
    /// Opened streams that the shutdown closed, or that lost their owner, unacknowledged.
    pub unacknowledged_at_the_end: u64,
}

impl Counts {
    /// Opened streams that ended otherwise than by acknowledgement.
    pub fn other_outcomes(&self) -> u64 {
        self.timed_out + self.peer_gone
    }
}

/// Cheap to clone; all clones are one book.
#[derive(Clone, Default)]
pub struct Ledger(Arc<Inner>);

#[derive(Default)]
struct Inner {
    book: Mutex<Book>,
    store: Option<Store>,
}

#[derive(Default)]
struct Book {
    counts: Counts,
    kept: VecDeque<Arc<Settled>>,
}

impl Ledger {
    /// As the default one, and every receipt goes to the store as well.
    pub fn with_store(store: Option<Store>) -> Self {
        let book = Mutex::default();
        Self(Arc::new(Inner { book, store }))
    }

    pub fn store(&self) -> Option<&Store> {
        self.0.store.as_ref()
    }

    /// Takes a receipt: the stream is off the books.
    pub fn settle(&self, receipt: CloseReceipt) -> Arc<Settled> {
        let settled = Arc::new(receipt.entry);
        let acknowledged = settled.outcome == Outcome::Acknowledged;
        let (id, key, outcome, reason) =
            (settled.id, &settled.key, &settled.outcome, &settled.reason);
        let request = settled.totals.request_id.as_deref().unwrap_or("-");
        let audio = settled.totals.audio_seconds;
        let took_ms = (settled.close_seconds * 1000.0).round();
        if acknowledged {
            tracing::info!(%id, %key, %reason, request, audio, took_ms, "stream closed: {outcome}");
        } else {
            tracing::warn!(%id, %key, %reason, request, audio, took_ms, "stream closed: {outcome}");
        }
        let mut book = self.book();
        let counts = &mut book.counts;
        counts.opened += u64::from(settled.outcome.opened());
        // Streams that were lost and reopened days ago are no fault of the end.
        let end = matches!(
            settled.reason,
            CloseReason::Shutdown(_) | CloseReason::OwnerLost
        );
        counts.unacknowledged_at_the_end +=
            u64::from(end && settled.outcome.opened() && !acknowledged);
        *match settled.outcome {
            Outcome::Acknowledged => &mut counts.acknowledged,
            Outcome::TimedOut { .. } => &mut counts.timed_out,
            Outcome::PeerGone { .. } => &mut counts.peer_gone,
            Outcome::NeverOpened { .. } => &mut counts.never_opened,
        } += 1;
        if book.kept.len() == KEPT {
            book.kept.pop_front();
        }
        book.kept.push_back(settled.clone());
        drop(book);
        if let Some(store) = &self.0.store {
            store.settle(&settled);
        }
        settled
    }

    pub fn counts(&self) -> Counts {
        self.book().counts
    }

    /// The last receipts, oldest first.
    pub fn receipts(&self) -> Vec<Arc<Settled>> {
        self.book().kept.iter().cloned().collect()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic elsewhere leaves the book as consistent as it was.
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since the Unix epoch.
pub fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
