//! Who may open a stream now. One gate stands before the provider for the whole process: it keeps
//! the account's limit of streams, makes everybody wait while the provider is known to refuse, lets
//! one at a time try whether it is over, and then lets the others in by degrees, so that an outage
//! or a used-up quota costs the provider a few requests and not a storm.
//!
//! Takes `now` from the runtime's clock; knows no sockets and no sessions.

use std::{
    collections::BTreeSet,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::{
    close::now,
    config::SttConfig,
    domain::{Outcome, Phase, backoff},
    failure::{Cause, Failure, Retry, Trouble},
};

/// Failures in a row, of whatever streams, that say that it is the provider.
const FAILURES: u32 = 5;

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Streams at once; None for as many as there are participants.
    pub streams: Option<usize>,
    /// How long the provider may go on counting a stream that it has not acknowledged the end of.
    pub quarantine: Duration,
    /// The pauses of a provider in trouble: the first and the longest.
    pub first: Duration,
    pub most: Duration,
}

impl Limits {
    pub fn new(config: &SttConfig) -> Self {
        let ms = Duration::from_millis;
        Self {
            streams: (config.max_streams > 0).then_some(config.max_streams),
            quarantine: ms(config.provider_idle_ms),
            first: ms(config.retry_first_ms),
            most: ms(config.retry_most_ms),
        }
    }
}

/// Cheap to clone; all clones are one gate.
#[derive(Clone)]
pub struct Gate(Arc<Inner>, Asked);

/// What the provider is asked for by those who come through here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// What everybody asks for.
    TheSame,
    /// Something of their own: that it is refused says nothing of what others ask for.
    TheirOwn,
}

struct Inner {
    state: Mutex<State>,
    /// Something has changed for who waits.
    changed: Notify,
    trouble: watch::Sender<Option<Arc<Trouble>>>,
}

struct State {
    limits: Limits,
    /// Why nobody is let in, whatever the provider says.
    held_back: Option<Arc<Trouble>>,
    health: Health,
    /// Why the provider lets nobody in.
    refused: Option<Arc<Trouble>>,
    /// Streams that were let in and are not over.
    held: usize,
    /// Those of them whose handshake is under way.
    connecting: usize,
    /// Those of them that have not proven good.
    unproven: usize,
    /// When the provider has forgotten streams that ended unacknowledged.
    quarantined: Vec<Instant>,
    /// Who waits: by priority, then in the order of their coming.
    queue: BTreeSet<(i32, u64)>,
    last_ticket: u64,
    peak: usize,
}

enum Health {
    Well {
        /// Failures since a stream has last proven good.
        failures: u32,
    },
    /// Nobody is let in before `until`, and then one.
    Paused {
        until: Instant,
        tries: u32,
        /// But so many streams may be held, as the provider has shown by refusing one more.
        places: usize,
    },
    /// So many at a time, doubled with each that proves good.
    Recovering { width: usize, tries: u32 },
}

impl Default for Health {
    fn default() -> Self {
        Self::Well { failures: 0 }
    }
}

/// How a gate stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    /// Streams that are open or being opened or closed.
    pub held: usize,
    pub waiting: usize,
    /// Streams that are over for us but may still be counted by the provider.
    pub quarantined: usize,
    /// The limit that holds now: the configured one, or a lower one that the provider has shown.
    pub limit: Option<usize>,
    /// Most held at once.
    pub peak: usize,
}

impl Gate {
    pub fn new(limits: Limits) -> Self {
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                limits,
                held_back: None,
                health: Health::default(),
                refused: None,
                held: 0,
                connecting: 0,
                unproven: 0,
                quarantined: Vec::new(),
                queue: BTreeSet::new(),
                last_ticket: 0,
                peak: 0,
            }),
            changed: Notify::new(),
            trouble: watch::Sender::new(None),
        });
        Self(inner, Asked::TheSame)
    }

    /// The same gate, for those who ask the provider for something of their own.
    pub fn for_own_settings(&self) -> Self {
        Self(self.0.clone(), Asked::TheirOwn)
    }

    /// Whether a failure of this cause makes nobody wait here, so that who has it is to wait by itself.
    pub fn leaves_alone(&self, cause: Cause) -> bool {
        let theirs = matches!(cause, Cause::Permission | Cause::BadRequest);
        theirs && self.1 == Asked::TheirOwn
    }

    /// New limits, and perhaps another provider or key: what is known of the old one's health is
    /// forgotten.
    pub fn renew(&self, limits: Limits) {
        let mut state = self.state();
        state.limits = limits;
        state.health = Health::default();
        state.refused = None;
        self.tell(state);
    }

    /// Lets nobody in for this reason, or does so no longer.
    pub fn hold(&self, trouble: Option<Trouble>) {
        let mut state = self.state();
        match (&state.held_back, &trouble) {
            (None, None) => return,
            // The same, in words that differ.
            (Some(was), Some(is)) if was.is_same(is) => return,
            (_, Some(trouble)) => trouble.log(),
            (Some(was), None) => {
                let cause = was.failure.cause.name();
                tracing::info!(cause, "streams may be opened again");
            }
        }
        state.held_back = trouble.map(Arc::new);
        self.tell(state);
    }

    /// After a change: who waits looks again, and whoever is interested is told of the trouble.
    fn tell(&self, state: MutexGuard<'_, State>) {
        let trouble = state.held_back.as_ref().or(state.refused.as_ref()).cloned();
        drop(state);
        let tell = |told: &mut Option<Arc<Trouble>>| {
            let differs = *told != trouble;
            *told = trouble;
            differs
        };
        self.0.trouble.send_if_modified(tell);
        self.0.changed.notify_waiters();
    }

    /// Waits until a stream may be opened: higher priorities first, then whoever came first. Cancel
    /// safe: who gives up has lost its place and nothing else.
    pub fn admit(&self, priority: i32) -> impl Future<Output = Admission> + Send + use<> {
        let waiting = Waiting::new(self.clone(), priority);
        async move {
            loop {
                let changed = waiting.gate.0.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let wake_at = match waiting.try_enter() {
                    Ok(admission) => return admission,
                    Err(wake_at) => wake_at,
                };
                match wake_at {
                    Some(at) => tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(at.into()) => {}
                    },
                    None => changed.await,
                }
            }
        }
    }

    /// Slots that the provider may still count from an earlier run, until then.
    pub fn quarantine(&self, until: impl IntoIterator<Item = Instant>) {
        self.state().quarantined.extend(until);
    }

    /// Why nobody is let in, as it changes; None while all is well.
    pub fn trouble(&self) -> watch::Receiver<Option<Arc<Trouble>>> {
        self.0.trouble.subscribe()
    }

    /// Whether somebody waits for a place that a stream takes.
    pub fn is_crowded(&self) -> bool {
        let mut state = self.state();
        if state.queue.is_empty() {
            return false;
        }
        state.forget(now());
        let taken = state.held + state.quarantined.len();
        state.limit().is_some_and(|limit| taken >= limit)
    }

    pub fn standing(&self) -> Standing {
        let mut state = self.state();
        state.forget(now());
        Standing {
            held: state.held,
            waiting: state.queue.len(),
            quarantined: state.quarantined.len(),
            limit: state.limit(),
            peak: state.peak,
        }
    }

    /// Whether one more may be let in now; if not, when to look again unless something changes.
    fn may_enter(&self, state: &mut State, now: Instant) -> Result<(), Option<Instant>> {
        state.forget(now);
        if state.held_back.is_some() {
            return Err(None);
        }
        let taken = state.held + state.quarantined.len();
        let forgotten = state.quarantined.iter().min().copied();
        if state.limits.streams.is_some_and(|limit| taken >= limit) {
            return Err(forgotten);
        }
        match state.health {
            Health::Well { .. } => Ok(()),
            Health::Paused { places, .. } if taken < places => Ok(()),
            Health::Paused { until, .. } if now < until => {
                Err(Some(forgotten.map_or(until, |at| at.min(until))))
            }
            Health::Paused { .. } if state.connecting > 0 => Err(None),
            Health::Recovering { width, .. } if state.unproven >= width => Err(None),
            Health::Paused { .. } | Health::Recovering { .. } => Ok(()),
        }
    }

    /// A handshake is complete.
    fn connected(&self) {
        let mut state = self.state();
        state.connecting -= 1;
        // In the place of another: that one more can be had is not shown, but may be tried now.
        if let Health::Paused { places, tries, .. } = state.health
            && state.held > places
        {
            state.health = Health::Recovering { width: 1, tries };
        }
        self.tell(state);
    }

    /// A stream has proven good: the provider does its work.
    fn proven(&self) {
        let mut state = self.state();
        state.unproven -= 1;
        state.health = match state.health {
            Health::Paused { .. } => return,
            Health::Recovering { width, tries } if state.queue.len() > width => {
                let width = width.saturating_mul(2);
                Health::Recovering { width, tries }
            }
            Health::Recovering { .. } | Health::Well { .. } => Health::default(),
        };
        if let Some(trouble) = state.refused.take() {
            let cause = trouble.failure.cause.name();
            tracing::info!(cause, "the STT provider takes streams again");
        }
        self.tell(state);
    }

    /// Who was let in gives the place back, and what became of the stream may make others wait.
    /// Without an outcome there was none.
    fn over(&self, was_connecting: bool, proven: bool, outcome: Option<&Outcome>) {
        let now = now();
        let mut state = self.state();
        state.held -= 1;
        state.connecting -= usize::from(was_connecting);
        state.unproven -= usize::from(!proven);
        let failure = outcome.and_then(Outcome::failure);
        // What the provider closed itself it does not count any more.
        let closed = failure
            .as_ref()
            .is_some_and(|failure| failure.close_code.is_some());
        let unacknowledged =
            |outcome: &Outcome| outcome.opened() && *outcome != Outcome::Acknowledged;
        if outcome.is_some_and(unacknowledged) && !closed {
            let forgotten = now + state.limits.quarantine;
            state.quarantined.push(forgotten);
        }
        // A close that is not answered says nothing of whether streams can be had.
        let unanswered =
            matches!(outcome, Some(Outcome::TimedOut { phase }) if *phase != Phase::Connecting);
        let failure = failure.filter(|_| !unanswered);
        if let Some(trouble) = failure.and_then(|failure| self.failed(&mut state, now, failure)) {
            trouble.log();
            state.refused = Some(Arc::new(trouble));
        }
        self.tell(state);
    }

    /// Draws the conclusions of a failure: the trouble that everybody is now in, if so.
    fn failed(&self, state: &mut State, now: Instant, failure: Failure) -> Option<Trouble> {
        let Limits { first, most, .. } = state.limits;
        let retry = failure.cause.retry();
        if retry == Retry::ThisStream || self.leaves_alone(failure.cause) {
            return None;
        }
        let tries = match &mut state.health {
            // What was under way when the others were stopped tells nothing new, but how many may be.
            Health::Paused { until, places, .. } if now < *until => {
                *places = (*places).min(state.held);
                return None;
            }
            Health::Paused { tries, .. } | Health::Recovering { tries, .. } => *tries + 1,
            Health::Well { failures } => {
                *failures += 1;
                if retry == Retry::Later && *failures < FAILURES && failure.retry_after_ms.is_none()
                {
                    return None;
                }
                0
            }
        };
        let (first, most) = match retry {
            Retry::Probe { first, most } => (first, most),
            Retry::Slot | Retry::Later | Retry::ThisStream => (first, most),
        };
        let pause = backoff(tries, first, most, fastrand::f64());
        let pause = failure.retry_after().unwrap_or_default().max(pause);
        let until = now + pause;
        // As many as there are may be: who waits goes in when one of them ends.
        let places = match failure.cause {
            Cause::Concurrency => state.held,
            _ => 0,
        };
        state.health = Health::Paused {
            until,
            tries,
            places,
        };
        Some(Trouble { failure, until })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything that could panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The limit that holds now.
    fn limit(&self) -> Option<usize> {
        let shown = match self.health {
            Health::Paused { places, .. } if places > 0 => Some(places),
            _ => None,
        };
        [self.limits.streams, shown].into_iter().flatten().min()
    }

    fn forget(&mut self, now: Instant) {
        self.quarantined.retain(|until| *until > now);
    }
}

/// A place in the queue.
struct Waiting {
    gate: Gate,
    place: (i32, u64),
}

impl Waiting {
    fn new(gate: Gate, priority: i32) -> Self {
        let mut state = gate.state();
        state.last_ticket += 1;
        // The set is in ascending order.
        let place = (priority.saturating_neg(), state.last_ticket);
        state.queue.insert(place);
        drop(state);
        Self { gate, place }
    }

    /// If it is this one's turn, and there is room; else when to look again at the latest.
    fn try_enter(&self) -> Result<Admission, Option<Instant>> {
        let gate = &self.gate;
        let mut state = gate.state();
        if state.queue.first() != Some(&self.place) {
            return Err(None);
        }
        gate.may_enter(&mut state, now())?;
        state.queue.remove(&self.place);
        state.held += 1;
        state.connecting += 1;
        state.unproven += 1;
        state.peak = state.peak.max(state.held);
        drop(state);
        // The next in the queue is the first now.
        gate.0.changed.notify_waiters();
        Ok(Admission {
            gate: gate.clone(),
            connecting: true,
            proven: false,
            outcome: None,
        })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.gate.state().queue.remove(&self.place) {
            self.gate.0.changed.notify_waiters();
        }
    }
}

/// Leave to have one stream, until it is dropped.
pub struct Admission {
    gate: Gate,
    connecting: bool,
    proven: bool,
    outcome: Option<Outcome>,
}

impl Admission {
    /// The handshake is complete.
    pub fn connected(&mut self) {
        if std::mem::take(&mut self.connecting) {
            self.gate.connected();
        }
    }

    /// The provider has said something about the audio, or the stream has lasted for a while.
    pub fn proven(&mut self) {
        if !std::mem::replace(&mut self.proven, true) {
            self.gate.proven();
        }
    }

    /// The stream is over.
    pub fn over(mut self, outcome: &Outcome) {
        if *outcome == Outcome::Acknowledged {
            self.proven();
        }
        self.outcome = Some(outcome.clone());
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let outcome = self.outcome.as_ref();
        self.gate.over(self.connecting, self.proven, outcome);
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinSet;

    use super::*;

    const FIRST: Duration = Duration::from_millis(500);
    const MOST: Duration = Duration::from_secs(30);
    const QUARANTINE: Duration = Duration::from_secs(10);

    fn gate(streams: Option<usize>) -> Gate {
        Gate::new(Limits {
            streams,
            quarantine: QUARANTINE,
            first: FIRST,
            most: MOST,
        })
    }

    fn refused(cause: Cause) -> Outcome {
        Outcome::never_opened(Failure::new(cause, "no"))
    }

    /// A provider that refuses with this, or not; and what it saw.
    #[derive(Default)]
    struct Provider {
        refuses: Mutex<Option<Cause>>,
        tries: AtomicUsize,
        open: AtomicUsize,
        most: AtomicUsize,
    }

    impl Provider {
        fn refuse(&self, cause: Option<Cause>) {
            *self.refuses.lock().unwrap() = cause;
        }

        /// As a session does: again and again until a stream is open, then keeps it for a while.
        async fn stream(self: Arc<Self>, gate: Gate, kept: Duration) {
            let mut failures = 0;
            loop {
                let mut admission = gate.admit(0).await;
                self.tries.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                let refuses = *self.refuses.lock().unwrap();
                let Some(cause) = refuses else {
                    admission.connected();
                    admission.proven();
                    let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
                    self.most.fetch_max(open, Ordering::SeqCst);
                    tokio::time::sleep(kept).await;
                    self.open.fetch_sub(1, Ordering::SeqCst);
                    return admission.over(&Outcome::Acknowledged);
                };
                admission.over(&refused(cause));
                if matches!(cause.retry(), Retry::Later | Retry::ThisStream) {
                    tokio::time::sleep(backoff(failures, FIRST, MOST, 0.5)).await;
                    failures += 1;
                }
            }
        }
    }

    /// Fifty who want a stream while the provider refuses, for an hour; then it does not, and they
    /// all have one. In between it saw few requests.
    #[tokio::test(start_paused = true)]
    async fn a_refusal_costs_few_requests_and_everybody_is_served_when_it_is_over() {
        // How many requests an hour may bring: a first volley, then one at a time.
        let table = [
            (Cause::Authentication, 60),
            (Cause::Permission, 60),
            (Cause::BadRequest, 60),
            (Cause::Quota, 80),
            (Cause::RateLimit, 320),
            (Cause::Concurrency, 320),
            (Cause::ProviderFault, 320),
            (Cause::Dns, 320),
            (Cause::Unreachable, 320),
            (Cause::Reset, 320),
            (Cause::Tls, 320),
            (Cause::Timeout(Phase::Connecting), 320),
        ];
        for (cause, most) in table {
            let (gate, provider) = (gate(None), Arc::new(Provider::default()));
            provider.refuse(Some(cause));
            let mut sessions = JoinSet::new();
            let hours = Duration::from_secs(7200);
            for _ in 0..50 {
                sessions.spawn(provider.clone().stream(gate.clone(), hours));
            }
            tokio::time::sleep(Duration::from_secs(3600)).await;
            let tries = provider.tries.load(Ordering::SeqCst);
            assert!((50..=most).contains(&tries), "{cause:?}: {tries} requests");
            let trouble = gate.trouble().borrow().clone().expect("trouble is known");
            assert_eq!(trouble.failure.cause, cause);

            provider.refuse(None);
            // The longest pause between two tries of any cause.
            tokio::time::sleep(Duration::from_secs(15 * 60 + 60)).await;
            assert_eq!(provider.open.load(Ordering::SeqCst), 50, "{cause:?}");
            assert_eq!(*gate.trouble().borrow(), None);
            let after = provider.tries.load(Ordering::SeqCst) - tries;
            assert!(after <= 51, "{cause:?}: {after} requests for 50 streams");
        }
    }

    /// A provider that lets everybody in, and throws them out at once, is no better.
    #[tokio::test(start_paused = true)]
    async fn streams_that_do_not_last_are_no_success() {
        let (gate, tries) = (gate(None), Arc::new(AtomicUsize::new(0)));
        let mut sessions = JoinSet::new();
        for _ in 0..50 {
            let (gate, tries) = (gate.clone(), tries.clone());
            sessions.spawn(async move {
                loop {
                    let mut admission = gate.admit(0).await;
                    tries.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    admission.connected();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    admission.over(&Outcome::peer_gone(Failure::closed(1011, "NET-0000")));
                    tokio::time::sleep(FIRST).await;
                }
            });
        }
        tokio::time::sleep(Duration::from_secs(3600)).await;
        // First everybody; then, every 15 to 30 s, one.
        let tries = tries.load(Ordering::SeqCst);
        assert!((50..=320).contains(&tries), "{tries} requests");
        assert!(gate.trouble().borrow().is_some(), "it is told all the time");
    }

    #[tokio::test(start_paused = true)]
    async fn what_concerns_one_stream_makes_nobody_wait() {
        let gate = gate(None);
        for _ in 0..20 {
            gate.admit(0).await.over(&refused(Cause::Audio));
        }
        // Nor do closes that are not answered.
        for _ in 0..20 {
            gate.admit(0).await.over(&Outcome::TimedOut {
                phase: Phase::AwaitingAnswer,
            });
        }
        assert_eq!(*gate.trouble().borrow(), None);
        // Nor do a few failures with successes in between.
        for _ in 0..20 {
            for _ in 0..FAILURES - 1 {
                gate.admit(0).await.over(&refused(Cause::Reset));
            }
            let mut admission = gate.admit(0).await;
            admission.connected();
            admission.proven();
        }
        assert_eq!(*gate.trouble().borrow(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_some_ask_for_on_their_own_makes_nobody_else_wait_unless_it_is_the_key() {
        let gate = gate(None);
        let own = gate.for_own_settings();
        for cause in [Cause::BadRequest, Cause::Permission] {
            own.admit(0).await.over(&refused(cause));
            assert_eq!(*gate.trouble().borrow(), None);
        }
        assert_eq!(gate.standing().held, 0, "it is the same gate");
        own.admit(0).await.over(&refused(Cause::Authentication));
        assert!(gate.trouble().borrow().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_kept_and_everybody_has_a_turn() {
        let (gate, provider) = (gate(Some(5)), Arc::new(Provider::default()));
        let mut sessions = JoinSet::new();
        for _ in 0..20 {
            sessions.spawn(
                provider
                    .clone()
                    .stream(gate.clone(), Duration::from_secs(10)),
            );
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let standing = gate.standing();
        assert_eq!((standing.held, standing.waiting), (5, 15));
        while sessions.join_next().await.is_some() {}
        assert_eq!(provider.most.load(Ordering::SeqCst), 5);
        assert_eq!(gate.standing().peak, 5);
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_that_a_provider_shows_is_kept_until_it_lets_more_in() {
        let gate = gate(None);
        let mut open = Vec::new();
        for _ in 0..3 {
            let mut admission = gate.admit(0).await;
            admission.connected();
            open.push(admission);
        }
        gate.admit(0).await.over(&refused(Cause::Concurrency));
        assert_eq!(gate.standing().limit, Some(3));
        let next = gate.clone();
        let mut waiting = tokio::spawn(async move { next.admit(0).await });
        assert!(
            tokio::time::timeout(FIRST / 4, &mut waiting).await.is_err(),
            "no place"
        );
        // One ends: its place is free at once.
        open.pop().unwrap().over(&Outcome::Acknowledged);
        let mut admission = waiting.await.unwrap();
        admission.connected();
        open.push(admission);
        assert_eq!(gate.standing().limit, Some(3), "not more than there were");
        // Later one more is tried, and had.
        let mut admission = gate.admit(0).await;
        admission.connected();
        assert_eq!(gate.standing().limit, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_acknowledgement_counts_for_as_long_as_the_provider_may_count_it() {
        let gate = gate(Some(1));
        let start = now();
        let mut admission = gate.admit(0).await;
        admission.connected();
        admission.over(&Outcome::TimedOut {
            phase: Phase::AwaitingAnswer,
        });
        assert_eq!(gate.standing().quarantined, 1);
        drop(gate.admit(0).await);
        assert!(now() - start >= QUARANTINE);
        // Not if the provider has closed it itself.
        let mut admission = gate.admit(0).await;
        admission.connected();
        admission.over(&Outcome::peer_gone(Failure::closed(1011, "NET-0000")));
        assert_eq!(gate.standing().quarantined, 0);
        // Those of an earlier run, too; but nobody asked for this last one.
        gate.quarantine([now() + QUARANTINE]);
        let start = now();
        drop(gate.admit(0).await);
        assert!(now() - start >= QUARANTINE);
        drop(gate.admit(0).await);
        assert!(now() - start < 2 * QUARANTINE);
    }

    #[tokio::test(start_paused = true)]
    async fn higher_priorities_come_first_and_who_gives_up_is_forgotten() {
        let gate = gate(Some(1));
        let held = gate.admit(0).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut sessions = JoinSet::new();
        for (name, priority) in [("a", 0), ("b", 5), ("c", 0), ("gone", 9), ("d", 5)] {
            let (gate, order) = (gate.clone(), order.clone());
            let task = async move {
                let _admission = gate.admit(priority).await;
                order.lock().unwrap().push(name);
            };
            match name {
                "gone" => {
                    let waited = tokio::time::timeout(Duration::from_millis(1), task).await;
                    assert!(waited.is_err());
                }
                _ => drop(sessions.spawn(task)),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(gate.standing().waiting, 4);
        drop(held);
        while sessions.join_next().await.is_some() {}
        assert_eq!(*order.lock().unwrap(), ["b", "d", "a", "c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn new_settings_end_a_pause() {
        let gate = gate(None);
        gate.admit(0).await.over(&refused(Cause::Authentication));
        let next = gate.clone();
        let waiting = tokio::spawn(async move { next.admit(0).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        let start = now();
        gate.renew(Limits {
            streams: None,
            quarantine: QUARANTINE,
            first: FIRST,
            most: MOST,
        });
        let mut admission = waiting.await.unwrap();
        admission.connected();
        assert!(now() - start < Duration::from_secs(1));
        assert_eq!(*gate.trouble().borrow(), None);
    }
}
