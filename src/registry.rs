//! The loan book of open streams. A stream is entered before its connection is attempted (the
//! [`Permit`]) and leaves only against a receipt. The registry owns the tasks that own the
//! sockets, and the reaper: what becomes of a socket whose task died.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::{
    board::{Board, What},
    close::{CloseOrder, now, strengthen},
    domain::{CloseReason, Outcome, Service, StreamId, StreamKey, StreamTotals},
    journal::{Journal, Orphan},
    kernel::{self, KnownSockets, SocketId},
    ledger::{CloseReceipt, Ledger, Settled, unix_ms},
    stt::gate::Admission,
};

/// Cheap to clone; all clones are one registry.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    ledger: Ledger,
    board: Board,
    journal: Option<Journal>,
    orphans: Vec<Orphan>,
    tasks: TaskTracker,
    last_id: AtomicU64,
    book: Mutex<Book>,
    open_now: watch::Sender<usize>,
    past_owners: watch::Sender<PastOwners>,
}

/// Orders that reach a stream whoever owns it, and however stuck that is.
#[derive(Default)]
struct PastOwners {
    /// To every stream there is or will be.
    all: Option<CloseOrder>,
    /// To those of them that are open.
    one: BTreeMap<StreamId, CloseOrder>,
}

/// What is ordered of one stream past its owner.
pub(crate) struct Orders {
    id: StreamId,
    given: watch::Receiver<PastOwners>,
}

impl Orders {
    /// Waits for an order; it may be one that was given before. Cancel safe.
    pub async fn next(&mut self) -> CloseOrder {
        while self.given.changed().await.is_ok() {
            let given = self.given.borrow_and_update();
            let one = given.one.get(&self.id).cloned();
            match (given.all.clone(), one) {
                (Some(mut order), Some(one)) => {
                    order.merge(&one);
                    return order;
                }
                (Some(order), None) | (None, Some(order)) => return order,
                (None, None) => {}
            }
        }
        // Without a registry nobody gives any.
        std::future::pending().await
    }
}

#[derive(Default)]
struct Book {
    sealed: bool,
    open: BTreeMap<StreamId, OpenStream>,
    sockets: KnownSockets,
}

/// A stream on the books.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenStream {
    pub id: StreamId,
    #[serde(flatten)]
    pub key: StreamKey,
    #[serde(flatten)]
    pub service: Arc<Service>,
    pub state: StreamState,
    /// Unix time, in milliseconds.
    pub opened_at_ms: u64,
    /// The provider's id of the stream, once it is known.
    pub request_id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamState {
    Opening,
    Open,
    Closing,
}

impl StreamState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Closing => "closing",
        }
    }
}

#[derive(Debug, Error, PartialEq, Eq)]
#[error("no new streams: the daemon is closing")]
pub struct Sealed;

impl Registry {
    /// Without a journal: nothing survives the process.
    pub fn new(ledger: Ledger) -> Self {
        Self::with_journal(ledger, None, Vec::new())
    }

    /// `orphans`: what an earlier run left open.
    pub fn with_journal(ledger: Ledger, journal: Option<Journal>, orphans: Vec<Orphan>) -> Self {
        Self(Arc::new(Inner {
            ledger,
            board: Board::default(),
            journal,
            orphans,
            tasks: TaskTracker::new(),
            last_id: AtomicU64::new(0),
            book: Mutex::default(),
            open_now: watch::Sender::new(0),
            past_owners: watch::Sender::default(),
        }))
    }

    /// Enters a stream. To be called before anything is sent to the provider. The admission, if the
    /// provider has a gate, is given back with the receipt.
    pub fn permit(
        &self,
        key: StreamKey,
        service: Arc<Service>,
        admission: Option<Admission>,
    ) -> Result<Permit, Sealed> {
        let mut book = self.book();
        if book.sealed {
            return Err(Sealed);
        }
        let id = StreamId(self.0.last_id.fetch_add(1, Ordering::Relaxed) + 1);
        let opened_at = SystemTime::now();
        let opened_at_ms = unix_ms(opened_at);
        let entry = OpenStream {
            id,
            key: key.clone(),
            service: service.clone(),
            state: StreamState::Opening,
            opened_at_ms,
            request_id: None,
        };
        book.open.insert(id, entry.clone());
        self.0.open_now.send_replace(book.open.len());
        drop(book);
        let ticket = self.journal().map(|journal| journal.enter(&entry));
        self.board().tell(What::Stream(entry));
        Ok(Permit {
            ticket,
            admission,
            loan: Some(Loan {
                id,
                key,
                service,
                opened_at_ms,
                since: now(),
                connected_since: None,
                closing_since: None,
            }),
            registry: self.clone(),
        })
    }

    /// From now on [`Registry::permit`] refuses.
    pub fn seal(&self) {
        self.book().sealed = true;
    }

    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    /// Where those who watch look.
    pub fn board(&self) -> &Board {
        &self.0.board
    }

    pub fn journal(&self) -> Option<&Journal> {
        self.0.journal.as_ref()
    }

    /// What an earlier run left open, since it was killed.
    pub fn orphans(&self) -> &[Orphan] {
        &self.0.orphans
    }

    /// The tasks that own sockets. They end by themselves once their streams are settled.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.0.tasks
    }

    /// Orders every stream to close, past their owners: for those whose owner is stuck, and to
    /// hurry. Streams that are being closed already keep the stronger order.
    pub fn close_all(&self, new: &CloseOrder) {
        let given = &self.0.past_owners;
        given.send_modify(|given| strengthen(&mut given.all, new));
    }

    /// Orders one stream to close, past its owner: for those that no room of ours owns. One that is
    /// over needs no order.
    pub fn close_one(&self, id: StreamId, new: &CloseOrder) {
        // Held, so that it is not over before its order is there.
        let book = self.book();
        if !book.open.contains_key(&id) {
            return;
        }
        let given = &self.0.past_owners;
        given.send_modify(|given| {
            let mut order = given.one.remove(&id);
            strengthen(&mut order, new);
            given.one.extend(order.map(|order| (id, order)));
        });
    }

    pub(crate) fn orders_to(&self, id: StreamId) -> Orders {
        let mut given = self.0.past_owners.subscribe();
        // An order given before the stream's permit is to be seen as new.
        given.mark_changed();
        Orders { id, given }
    }

    pub fn open(&self) -> Vec<OpenStream> {
        self.book().open.values().cloned().collect()
    }

    /// As [`Registry::open`], for a thread of its own that must not wait for a stuck one; `None` if
    /// the book could not be had in time.
    pub fn try_open(&self, limit: Duration) -> Option<Vec<OpenStream>> {
        let until = Instant::now() + limit;
        loop {
            let book = match self.0.book.try_lock() {
                Ok(book) => book,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    #[allow(
                        clippy::disallowed_methods,
                        reason = "for a thread that must not wait for a lock"
                    )]
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(TryLockError::WouldBlock) => return None,
            };
            return Some(book.open.values().cloned().collect());
        }
    }

    pub fn open_now(&self) -> usize {
        *self.0.open_now.borrow()
    }

    /// Completes when no stream is on the books and no task owns a socket. Cancel safe. Sealing
    /// first is the caller's business, else it may complete between two streams.
    pub async fn drained(&self) {
        // Cannot fail: the sender lives in self.
        let _ = self
            .0
            .open_now
            .subscribe()
            .wait_for(|open| *open == 0)
            .await;
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.0.tasks.reopen();
    }

    /// Sockets to the provider that the kernel says this process holds; `None` where the system
    /// doesn't tell.
    pub fn kernel_sockets(&self) -> Option<usize> {
        // First, so that nobody waits for the kernel.
        let held = kernel::held()?;
        Some(self.book().sockets.count(&held))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // A panic elsewhere leaves the book as consistent as it was.
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters what changed of an open stream.
    fn update(&self, id: StreamId, change: impl FnOnce(&mut OpenStream)) {
        let mut book = self.book();
        let Some(entry) = book.open.get_mut(&id) else {
            return;
        };
        let before = entry.state;
        change(entry);
        let entry = entry.clone();
        drop(book);
        if let Some(journal) = self.journal() {
            journal.update(&entry);
        }
        if entry.state != before {
            self.board().tell(What::Stream(entry));
        }
    }

    fn remove(&self, id: StreamId) {
        let mut book = self.book();
        book.open.remove(&id);
        self.0.open_now.send_replace(book.open.len());
        self.0.past_owners.send_if_modified(|given| {
            given.one.remove(&id);
            false
        });
    }
}

/// Leave to open one stream. Consumed by [`Permit::settle`]; dropping it otherwise is a defect,
/// which panics in debug builds and is settled as `PeerGone` in release.
#[must_use = "a permit that is dropped is a stream nobody accounts for"]
pub struct Permit {
    loan: Option<Loan>,
    /// For what the journal was told.
    ticket: Option<u64>,
    admission: Option<Admission>,
    registry: Registry,
}

struct Loan {
    id: StreamId,
    key: StreamKey,
    service: Arc<Service>,
    opened_at_ms: u64,
    since: Instant,
    connected_since: Option<Instant>,
    closing_since: Option<Instant>,
}

impl Permit {
    pub fn id(&self) -> StreamId {
        self.loan.as_ref().map_or(StreamId(0), |loan| loan.id)
    }

    /// A connection to the provider exists, for the kernel's count.
    pub fn connected(&self, socket: SocketId) {
        self.registry.book().sockets.add(socket);
    }

    /// Waits, for a short while at most, until the stream would be named after a crash. To be
    /// awaited before anything is asked of the provider. Cancel safe.
    pub async fn journaled(&self) {
        if let (Some(journal), Some(ticket)) = (self.registry.journal(), self.ticket) {
            // If not, the journal has said so and counted it: a stream is worth more.
            let _ = journal.durable(ticket).await;
        }
    }

    /// The handshake is complete.
    pub fn opened(&mut self) {
        if let Some(loan) = &mut self.loan {
            loan.connected_since = Some(now());
        }
        if let Some(admission) = &mut self.admission {
            admission.connected();
        }
        self.registry
            .update(self.id(), |entry| entry.state = StreamState::Open);
    }

    /// How long the handshake has been complete.
    pub fn open_for(&self) -> Duration {
        let since = self.loan.as_ref().and_then(|loan| loan.connected_since);
        since.map_or(Duration::ZERO, |since| {
            now().saturating_duration_since(since)
        })
    }

    /// The provider does its work on the stream.
    pub fn proven(&mut self) {
        if let Some(admission) = &mut self.admission {
            admission.proven();
        }
    }

    /// The provider has told its id of the stream.
    pub fn named(&self, request_id: &str) {
        self.registry.update(self.id(), |entry| {
            entry.request_id = Some(request_id.to_owned());
        });
    }

    /// The close has begun; counts from the first call.
    pub fn closing(&mut self) {
        if let Some(loan) = &mut self.loan
            && loan.closing_since.is_none()
        {
            loan.closing_since = Some(now());
            let id = loan.id;
            self.registry
                .update(id, |entry| entry.state = StreamState::Closing);
        }
    }

    /// The stream is over: makes the receipt, settles it and takes the stream off the books.
    pub fn settle(
        mut self,
        outcome: Outcome,
        reason: CloseReason,
        totals: StreamTotals,
    ) -> Arc<Settled> {
        let loan = self.loan.take().expect("taken only here and in drop");
        self.settle_loan(loan, outcome, reason, totals)
    }

    fn settle_loan(
        &mut self,
        loan: Loan,
        outcome: Outcome,
        reason: CloseReason,
        totals: StreamTotals,
    ) -> Arc<Settled> {
        let id = loan.id;
        let elapsed = |since| now().saturating_duration_since(since).as_secs_f64();
        let seconds = |since: Option<Instant>| since.map_or(0.0, elapsed);
        let settled = Settled {
            id,
            key: loan.key,
            service: loan.service,
            outcome,
            reason,
            totals,
            opened_at_ms: loan.opened_at_ms,
            settled_at_ms: unix_ms(SystemTime::now()),
            wall_seconds: elapsed(loan.since),
            connection_seconds: seconds(loan.connected_since),
            close_seconds: seconds(loan.closing_since),
        };
        // Before the store has it, which tells the journal to forget it.
        if let Some(journal) = self.registry.journal() {
            journal.settle(&settled);
        }
        let settled = self.registry.0.ledger.settle(CloseReceipt::new(settled));
        self.registry.remove(id);
        if let Some(admission) = self.admission.take() {
            admission.over(&settled.outcome);
        }
        self.registry.board().settled(&settled);
        settled
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(loan) = self.loan.take() else {
            return;
        };
        let id = loan.id;
        let detail = "its task ended without closing it".to_owned();
        let outcome = Outcome::PeerGone {
            detail,
            failure: None,
        };
        self.settle_loan(
            loan,
            outcome,
            CloseReason::OwnerLost,
            StreamTotals::default(),
        );
        // Panicking while unwinding would abort the process.
        debug_assert!(
            std::thread::panicking(),
            "stream {id} was dropped without a receipt"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use futures_util::FutureExt;

    use super::*;

    fn permit(registry: &Registry) -> Permit {
        let key = StreamKey {
            room: "r".into(),
            participant: "p".into(),
            track: "t".into(),
        };
        registry.permit(key, Arc::default(), None).expect("permit")
    }

    fn settle(permit: Permit) {
        let totals = StreamTotals::default();
        permit.settle(Outcome::Acknowledged, CloseReason::TrackEnded, totals);
    }

    #[test]
    fn a_book_that_a_stuck_thread_holds_is_not_waited_for() {
        let registry = Registry::new(Ledger::default());
        let permit = permit(&registry);
        let limit = Duration::from_millis(5);
        let held = registry.book();
        let found = std::thread::scope(|scope| {
            let other = scope.spawn(|| registry.try_open(limit));
            other.join().expect("no panic")
        });
        assert_eq!(found, None);
        drop(held);
        let found = registry.try_open(limit).expect("free");
        assert_eq!((found.len(), found[0].id), (1, permit.id()));
        settle(permit);
    }

    #[tokio::test]
    async fn drained_is_when_neither_a_stream_nor_a_task_is_left() {
        let registry = Registry::new(Ledger::default());
        assert_eq!(registry.drained().now_or_never(), Some(()));
        let permit = permit(&registry);
        assert_eq!(registry.drained().now_or_never(), None, "a stream is open");
        settle(permit);
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let task = registry.tasks().spawn(ended);
        assert_eq!(registry.drained().now_or_never(), None, "a task is left");
        drop(end);
        let _ = task.await;
        assert_eq!(registry.drained().now_or_never(), Some(()));
    }

    #[test]
    fn a_permit_that_is_dropped_is_a_defect_and_has_its_receipt() {
        let registry = Registry::new(Ledger::default());
        let permit = permit(&registry);
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(permit)));
        assert_eq!(dropped.is_err(), cfg!(debug_assertions));
        let [receipt] = &registry.ledger().receipts()[..] else {
            panic!("one receipt")
        };
        assert!(matches!(receipt.outcome, Outcome::PeerGone { .. }));
        assert_eq!(receipt.reason, CloseReason::OwnerLost);
        assert_eq!(registry.open_now(), 0);
    }

    #[tokio::test]
    async fn an_order_past_the_owner_is_not_taken_back_and_reaches_who_it_is_for() {
        let registry = Registry::new(Ledger::default());
        let now = Instant::now();
        let within = |seconds| CloseOrder {
            reason: CloseReason::OwnerLost,
            deadline: now + Duration::from_secs(seconds),
        };
        let key = StreamKey {
            room: "r".into(),
            participant: "p".into(),
            track: "t".into(),
        };
        let permit = || registry.permit(key.clone(), Arc::default(), None);
        let (one, other) = (permit().expect("open"), permit().expect("open"));
        let (mut to_one, mut to_other) =
            (registry.orders_to(one.id()), registry.orders_to(other.id()));
        registry.close_one(one.id(), &within(3));
        registry.close_one(one.id(), &within(4));
        assert_eq!(to_one.next().await.deadline, within(3).deadline);
        let nothing = tokio::time::timeout(Duration::from_millis(10), to_other.next());
        assert!(nothing.await.is_err());
        registry.close_all(&within(1));
        registry.close_all(&within(2));
        for orders in [
            &mut to_one,
            &mut to_other,
            &mut registry.orders_to(one.id()),
        ] {
            assert_eq!(orders.next().await.deadline, within(1).deadline);
        }
        let never = || Outcome::NeverOpened {
            detail: String::new(),
            failure: None,
        };
        let id = one.id();
        for permit in [one, other] {
            let receipt = permit.settle(never(), CloseReason::OwnerLost, StreamTotals::default());
            let _ = receipt;
        }
        // Who is over is not kept.
        registry.close_one(id, &within(1));
        assert!(registry.0.past_owners.borrow().one.is_empty());
    }
}
