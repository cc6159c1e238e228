//! The root of the tree: finds rooms, supervises one task a room, and closes everything in order.

mod jobs;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, SecondsFormat, Utc};
use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{Id, JoinSet},
    time::MissedTickBehavior,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    board::{Board, Phase},
    budget,
    close::{CloseOrder, order},
    config::{Config, SttConfig},
    domain::{CloseReason, backoff},
    journal::{Journal, Orphan, Over, Recovered},
    ledger::{Counts, Ledger, Settled, unix_ms},
    overrides::Overrides,
    registry::{OpenStream, Registry},
    reports::Webhook,
    requests::{Answer, Exceptions, Refused, Request, Scope},
    room::{
        api::{ApiError, ListedRoom, RoomApi},
        claims::Claims,
        departure,
        selection::{RoomSelection, Selection},
        supervisor::{self, Asked, Ended, Entry, House, Missing, RoomContext, RoomEnd, Terms},
    },
    session::{Context, Settings, Stt},
    store::{Finished, Store},
    stt::{
        connect::Provider,
        gate::{Gate, Limits},
    },
    tls,
    transcripts::Sinks,
    webhooks::Hints,
    worker::{Command, Line, rescue::Rescue},
};

/// Joining a room again after its connection failed.
const REJOIN_FIRST: Duration = Duration::from_millis(500);
const REJOIN_MOST: Duration = Duration::from_secs(30);
/// A room that is over may be listed for so long.
const LIST_LAG: Duration = Duration::from_secs(10);
/// A connection that lasted so long was a good one: the next failure is a first one.
const GOOD_CONNECTION: Duration = Duration::from_secs(60);
/// For what is to be known of the budget before the first stream.
const FIRST_LOOK: Duration = Duration::from_secs(2);
/// Somebody else came under the same identity, as LiveKit spells it.
const DUPLICATE: &str = "duplicate_identity";
/// As LiveKit spells it.
const REMOVED: &str = "participant_removed";
/// LiveKit removes the participant of a job whose dispatch was deleted if it has not left within
/// 3 s.
const REMOVAL: Duration = Duration::from_secs(10);
/// Hints make the server be asked at once, but not more often than this.
const HINT_PAUSE: Duration = Duration::from_millis(200);
/// Participants who are missing, of whom the root has not heard yet.
const MAX_MISSING: usize = 1024;
/// While closing: how often it is said what is still open.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// The part of the deadline after which streams are closed past their sessions: a session that
/// has not done it by then is stuck.
const PAST_OWNERS_AFTER: f64 = 0.2;
/// What streams are given when the daemon's root task has failed.
const AFTER_DEFECT: Duration = Duration::from_secs(5);
/// After the deadline: what sockets and tasks need to be gone once their streams are settled.
const SETTLING: Duration = Duration::from_millis(500);
/// What the disk of journal and store is given for the last receipts: within the deadline, and beyond it.
const LAST_RECEIPTS: Duration = Duration::from_secs(1);
const LAST_RECEIPTS_BEYOND: Duration = Duration::from_millis(200);

/// Requests that wait, for the daemon and for each room.
const MAX_REQUESTS: usize = 64;

/// What the receiver of usage reports is given for the last ones, within the deadline; what it does
/// not take by then is sent at the next start.
const LAST_REPORTS: Duration = Duration::from_secs(2);

/// A running daemon. Dropping it closes everything as [`Daemon::close`] would.
pub struct Daemon {
    config: watch::Sender<Arc<Config>>,
    orders: watch::Sender<Option<CloseOrder>>,
    requests: mpsc::Sender<Request>,
    registry: Registry,
    hints: Hints,
    gate: Gate,
    started: Instant,
    ready: watch::Receiver<bool>,
    report: watch::Receiver<Option<Arc<Report>>>,
}

/// How far a daemon is, for those who tell others.
pub struct Life {
    /// LiveKit has accepted the credentials.
    pub ready: watch::Receiver<bool>,
    /// Set once it closes.
    pub orders: watch::Receiver<Option<CloseOrder>>,
}

/// The account at the end: every stream, how it ended, and what is still open by whose count.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub opened: u64,
    pub acknowledged: u64,
    /// Opened streams that ended otherwise.
    pub other_outcomes: u64,
    pub timed_out: u64,
    pub peer_gone: u64,
    /// Attempts that never became a stream.
    pub never_opened: u64,
    /// Opened streams that the shutdown closed, or that lost their owner, unacknowledged.
    pub unacknowledged_at_the_end: u64,
    /// By the registry.
    pub open_now: usize,
    /// By the kernel: sockets of this process to the provider. `None` where it doesn't tell.
    pub kernel_sockets: Option<usize>,
    pub seconds: f64,
    pub still_open: Vec<OpenStream>,
    /// The last receipts, oldest first.
    pub receipts: Vec<Arc<Settled>>,
    /// Streams that an earlier run left open, since it was killed.
    pub orphaned: Vec<Orphan>,
    /// Streams that were opened without being in the journal, since its disk failed.
    pub unjournaled: u64,
    /// Why the daemon ended, if not because it was told to.
    pub failure: Option<Failure>,
}

/// Why a daemon ended that nobody told to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// LiveKit refused the credentials at the start.
    Credentials(String),
    /// A task that everything depends on panicked.
    Defect(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Credentials(said) => f.write_str(said),
            Self::Defect(said) => write!(f, "a defect in roomwarden: {said}"),
        }
    }
}

impl Report {
    /// Nothing is open, by any count, and every stream has its receipt.
    pub fn nothing_left(&self) -> bool {
        // Where the kernel can tell, not knowing is no proof.
        let kernel = match self.kernel_sockets {
            Some(held) => held == 0,
            None => !cfg!(target_os = "linux"),
        };
        self.open_now == 0 && kernel && self.opened == self.acknowledged + self.other_outcomes
    }
}

impl Daemon {
    /// Starts on the current tokio runtime, without a journal and a store.
    pub fn start(config: Config, sinks: Sinks) -> Self {
        Self::start_with(config, sinks, None, None)
    }

    /// As [`Daemon::start`]; what the journal says of an earlier run is reported and settled, and
    /// goes to the store, which was opened with that journal.
    pub fn start_with(
        config: Config,
        sinks: Sinks,
        journal: Option<Recovered>,
        store: Option<Store>,
    ) -> Self {
        departure::install();
        let registry = registry(&config, journal, store);
        let (orders, ordered) = watch::channel(None);
        let (reporter, report) = watch::channel(None);
        let (started_well, ready) = watch::channel(false);
        let (requests, requested) = mpsc::channel(MAX_REQUESTS);
        let gate = gate(&config.stt, &registry);
        let (config, configured) = watch::channel(Arc::new(config));
        let (hints, hinted) = Hints::new();
        let root = Root::new(
            configured.borrow().clone(),
            sinks,
            registry.clone(),
            gate.clone(),
            hinted,
        );
        let (books, started) = (registry.clone(), Instant::now());
        // The root of the tree has no parent to register with; its end is the report. It is a task
        // within a task, so that a panic of it ends in a report as well.
        #[allow(
            clippy::disallowed_methods,
            reason = "the root of the tree has no parent; its end is the report"
        )]
        tokio::spawn(async move {
            let life = root.run(configured, ordered, requested, started_well);
            let report = match tokio::spawn(life).await {
                Ok(report) => report,
                Err(error) => after_defect(&books, started, &error.to_string()).await,
            };
            reporter.send_replace(Some(Arc::new(report)));
        });
        Self {
            config,
            orders,
            requests,
            registry,
            hints,
            gate,
            started,
            ready,
            report,
        }
    }

    /// As it is now.
    pub fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }

    /// Takes another configuration, for what is begun from now on: see [`Config::keep_fixed`] for
    /// what it can't change. Streams that are open stay as they are, but for those of rooms and
    /// participants that are no longer selected.
    pub fn reconfigure(&self, config: Config) {
        tls::forget();
        self.config.send_replace(Arc::new(config));
    }

    pub fn life(&self) -> Life {
        Life {
            ready: self.ready.clone(),
            orders: self.orders.subscribe(),
        }
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// For those who hear that something has happened in a room.
    pub fn hints(&self) -> Hints {
        self.hints.clone()
    }

    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Since when it runs.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Asks for something; it is under way, not done, when this returns. Cancel safe.
    ///
    /// # Errors
    /// There is no such thing, or the daemon closes.
    pub async fn ask(&self, request: impl FnOnce(Answer) -> Request) -> Result<(), Refused> {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send(request(answer)).await;
        sent.map_err(|_| Refused::Closing)?;
        answered.await.unwrap_or(Err(Refused::Closing))
    }

    /// Orders the close of everything and returns at once. Again: a stronger order, an earlier
    /// deadline.
    pub fn close(&self, new: &CloseOrder) {
        order(&self.orders, new);
    }

    /// As [`Daemon::close`], and past everyone who may be stuck: every stream itself is ordered.
    pub fn hurry(&self, new: &CloseOrder) {
        self.registry.seal();
        self.close(new);
        self.registry.close_all(new);
    }

    /// The final report, once everything is closed. Cancel safe.
    pub async fn closed(&self) -> Arc<Report> {
        let mut report = self.report.clone();
        let done = report
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|report| report.clone());
        done.unwrap_or_else(|| self.account())
    }

    /// The account as it stands now.
    pub fn account(&self) -> Arc<Report> {
        Arc::new(account(&self.registry, self.started, None))
    }
}

/// The books of a daemon, opened with what is left of those before.
fn registry(config: &Config, journal: Option<Recovered>, store: Option<Store>) -> Registry {
    let ledger = Ledger::with_store(store);
    let Some(Recovered {
        journal,
        left_open,
        over,
    }) = journal
    else {
        return Registry::new(ledger);
    };
    // The process that had them is gone, so that from now on, at the latest, the provider hears
    // nothing of them. Most often the kernel has told it at once; a power loss tells nothing.
    let free_by = SystemTime::now() + Duration::from_millis(config.stt.provider_idle_ms);
    let free_by_ms = unix_ms(free_by);
    let free_by = rfc3339(free_by_ms);
    let orphan = |(run, stream)| Orphan {
        run,
        stream,
        free_by_ms,
    };
    let orphans: Vec<Orphan> = left_open.into_iter().map(orphan).collect();
    for Orphan { stream, .. } in &orphans {
        let OpenStream { id, key, .. } = stream;
        let request = stream.request_id.as_deref().unwrap_or("-");
        let opened = rfc3339(stream.opened_at_ms);
        tracing::warn!(
            %id, room = key.room, participant = key.participant, track = key.track, request,
            state = ?stream.state, opened,
            "an earlier run was killed with this stream open; the provider lets go of it by \
             {free_by} at the latest"
        );
    }
    journal.settle_orphans(&orphans);
    if let Some(store) = ledger.store() {
        store.carry_over(over);
        store.carry_over(orphans.iter().cloned().map(Over::Orphaned));
    }
    tracing::info!(journal = %journal.path().display(), orphaned = orphans.len(), "journal opened");
    Registry::with_journal(ledger, Some(journal), orphans)
}

fn rfc3339(unix_ms: u64) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(unix_ms);
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// The last receipts are on disk before the daemon says that it is done, or it says that they are
/// not.
async fn flush_books(registry: &Registry, until: Instant) {
    let now = Instant::now();
    let until = until.clamp(now + LAST_RECEIPTS_BEYOND, now + LAST_RECEIPTS);
    let journal = async {
        let Some(journal) = registry.journal() else {
            return;
        };
        if tokio::time::timeout_at(until.into(), journal.flushed()).await != Ok(true) {
            tracing::error!(
                "the last receipts are not in the journal: the next start may name streams that \
                 are closed"
            );
        }
    };
    let store = async {
        let Some(store) = registry.ledger().store() else {
            return;
        };
        if tokio::time::timeout_at(until.into(), store.flushed()).await != Ok(true) {
            tracing::error!(
                "the last receipts are not in the ledger: the next start takes them from the journal"
            );
        }
    };
    tokio::join!(journal, store);
}

/// The root task itself has failed: its rooms and sessions are gone, and their streams are closing
/// by themselves; wait for them.
async fn after_defect(registry: &Registry, started: Instant, said: &str) -> Report {
    tracing::error!(
        said,
        "the daemon's root task failed by a defect; closing every stream"
    );
    let deadline = Instant::now() + AFTER_DEFECT;
    registry.seal();
    registry.board().enter(Phase::Closing);
    registry.close_all(&CloseOrder {
        reason: CloseReason::OwnerLost,
        deadline,
    });
    // What is left then is in the report.
    let _ = tokio::time::timeout_at((deadline + SETTLING).into(), registry.drained()).await;
    flush_books(registry, deadline + SETTLING).await;
    account(registry, started, Some(Failure::Defect(said.to_owned())))
}

fn account(registry: &Registry, started: Instant, failure: Option<Failure>) -> Report {
    let counts = registry.ledger().counts();
    let Counts {
        opened,
        acknowledged,
        timed_out,
        peer_gone,
        never_opened,
        unacknowledged_at_the_end,
    } = counts;
    Report {
        opened,
        acknowledged,
        other_outcomes: counts.other_outcomes(),
        timed_out,
        peer_gone,
        never_opened,
        unacknowledged_at_the_end,
        open_now: registry.open_now(),
        kernel_sockets: registry.kernel_sockets(),
        seconds: started.elapsed().as_secs_f64(),
        still_open: registry.open(),
        receipts: registry.ledger().receipts(),
        orphaned: registry.orphans().to_vec(),
        unjournaled: registry.journal().map_or(0, Journal::missed),
        failure,
    }
}

struct Root {
    config: Arc<Config>,
    sinks: Sinks,
    registry: Registry,
    stt: watch::Sender<Arc<Stt>>,
    terms: watch::Sender<Arc<Terms>>,
    selection: RoomSelection,
    room_context: Arc<RoomContext>,
    rooms: JoinSet<Ended>,
    running: HashMap<Id, Running>,
    /// What goes on beside the rooms and ends with this.
    keepers: JoinSet<()>,
    /// What jobs want of rooms.
    claims: Claims,
    /// The agent worker, if there is to be one, and what it is told.
    worker: JoinSet<()>,
    line: Option<Line>,
    rescue: Rescue,
    /// Rooms are looked at for lost jobs: one look at a time.
    looks: JoinSet<jobs::Looked>,
    asks: JoinSet<jobs::Asked>,
    /// Claims without a job, as the worker was told last.
    jobless: usize,
    missing: (mpsc::Sender<Missing>, mpsc::Receiver<Missing>),
    /// Rooms that are said to have news.
    hinted: mpsc::Receiver<String>,
    /// Delivers usage reports, if they are wanted; it ends with this once it is told.
    reporter: JoinSet<()>,
    last_reports: CancellationToken,
    /// Rooms that ended or were not joined, by name.
    past: HashMap<String, Past>,
    /// LiveKit has listed its rooms once.
    answered: bool,
    draining: bool,
    started: Instant,
}

struct Running {
    name: String,
    /// As it was listed, if it was.
    sid: Option<String>,
    /// As whom.
    identity: String,
    joined: Instant,
    orders: watch::Sender<Option<CloseOrder>>,
    stt: watch::Sender<Arc<Stt>>,
    overrides: Overrides,
    house: watch::Sender<House>,
    look: Arc<Notify>,
    /// Jobs that are to be told when it is over, since nothing more is done for them.
    ending: Vec<String>,
    /// When a job ended last that the room was not closed for.
    outlived: Option<Instant>,
    requests: mpsc::Sender<Request>,
    exceptions: Exceptions,
}

impl Running {
    /// The server removes whom it knows a job's participant as, when that job's dispatch is deleted,
    /// even if the room is wanted for other reasons. Nobody has put us out then.
    fn how_it_ended(&self, how: RoomEnd, at: Instant) -> RoomEnd {
        let since = |outlived: Instant| at.saturating_duration_since(outlived);
        let expected = || {
            self.outlived
                .is_some_and(|outlived| since(outlived) < REMOVAL)
        };
        match how {
            RoomEnd::PutOut(why) if why == REMOVED && expected() => RoomEnd::Stale,
            how => how,
        }
    }
}

/// What became of a room when we were in it last, or wanted to be.
struct Past {
    /// Its SID, if it had one: another room of that name starts anew.
    sid: Option<String>,
    /// When to try again; never, if we were put out.
    again: Option<Instant>,
    failures: u32,
    /// Of [`Ended`].
    tried: HashSet<String>,
    /// It lives, and we are out of it only for a moment.
    unfinished: bool,
    exceptions: Exceptions,
}

impl Past {
    /// Whether it is about the room that is listed with this SID, or not listed.
    fn is_of(&self, listed: Option<&str>) -> bool {
        match (self.sid.as_deref(), listed) {
            (Some(past), Some(listed)) => past == listed,
            (None, Some(_)) => false,
            // The room that we were put out of is over.
            (_, None) => self.again.is_some(),
        }
    }

    fn allows(&self, now: Instant) -> bool {
        self.again.is_some_and(|at| at <= now)
    }
}

fn stt(config: &SttConfig, gate: Gate) -> Arc<Stt> {
    let stt = Stt::new(Provider::new(config), Settings::new(config), gate);
    supervisor::read_for_pages(Duration::from_millis(config.page_ms));
    Arc::new(stt.paged_since(supervisor::just_read()))
}

/// The gate before the provider, which may still count what an earlier run left open.
fn gate(config: &SttConfig, registry: &Registry) -> Gate {
    let gate = Gate::new(Limits::new(config));
    let left = |orphan: &Orphan| {
        let left = orphan.free_by_ms.saturating_sub(unix_ms(SystemTime::now()));
        Instant::now() + Duration::from_millis(left)
    };
    gate.quarantine(registry.orphans().iter().map(left));
    gate
}

fn terms(config: &Config) -> Arc<Terms> {
    let every = Duration::from_millis(config.rooms.reconcile_interval_ms);
    Arc::new(Terms {
        selection: Selection::new(&config.participants),
        reconcile_every: Some(every).filter(|every| !every.is_zero()),
    })
}

impl Root {
    fn new(
        config: Arc<Config>,
        sinks: Sinks,
        registry: Registry,
        gate: Gate,
        hinted: mpsc::Receiver<String>,
    ) -> Self {
        let (terms, current_terms) = watch::channel(terms(&config));
        let room_context = RoomContext {
            api: Arc::new(RoomApi::new(&config.livekit)),
            url: config.livekit.url.to_string(),
            identity: config.rooms.identity.clone(),
            hidden: config.rooms.hidden,
            owned: TaskTracker::new(),
            terms: current_terms,
        };
        Self {
            stt: watch::channel(stt(&config.stt, gate)).0,
            terms,
            selection: RoomSelection::new(&config.rooms),
            room_context: Arc::new(room_context),
            config,
            sinks,
            registry,
            rooms: JoinSet::new(),
            running: HashMap::new(),
            keepers: JoinSet::new(),
            claims: Claims::default(),
            worker: JoinSet::new(),
            line: None,
            rescue: Rescue::default(),
            looks: JoinSet::new(),
            asks: JoinSet::new(),
            jobless: 0,
            missing: mpsc::channel(MAX_MISSING),
            hinted,
            reporter: JoinSet::new(),
            last_reports: CancellationToken::new(),
            past: HashMap::new(),
            answered: false,
            draining: false,
            started: Instant::now(),
        }
    }

    async fn run(
        mut self,
        mut configs: watch::Receiver<Arc<Config>>,
        mut orders: watch::Receiver<Option<CloseOrder>>,
        mut requests: mpsc::Receiver<Request>,
        ready: watch::Sender<bool>,
    ) -> Report {
        if let Some(store) = self.registry.ledger().store()
            && let Some(webhook) = Webhook::new(&self.config)
        {
            let delivering = webhook.deliver(store.clone(), self.last_reports.clone());
            self.reporter.spawn(delivering);
        }
        if self.registry.ledger().store().is_some()
            && let Some(ledger) = self.config.ledger_file()
        {
            let gate = self.stt.borrow().gate.clone();
            let mut budget = budget::Keeper::new(ledger, self.registry.clone(), gate);
            // Before anything is opened, unless the disk hangs.
            let look = budget.look(&self.config, Utc::now());
            let _ = tokio::time::timeout(FIRST_LOOK, look).await;
            self.keepers.spawn(budget.run(configs.clone()));
        }
        self.start_worker(Duration::ZERO);
        let board = self.registry.board().clone();
        let mut poll = Poll::new(self.room_context.api.clone(), board.clone());
        poll.ask_for(&self.selection, &self.config);
        let (first, failure) = loop {
            self.tell_jobless();
            if self.drained() {
                let reason = CloseReason::Shutdown("drained".into());
                let deadline = self.deadline();
                break (CloseOrder { reason, deadline }, None);
            }
            tokio::select! {
                biased;
                new = orders.wait_for(Option::is_some) => {
                    let new = new.ok().and_then(|new| new.clone());
                    break (new.unwrap_or_else(|| CloseOrder {
                        reason: CloseReason::OwnerLost,
                        deadline: self.deadline(),
                    }), None);
                }
                Ok(()) = configs.changed() => {
                    let config = configs.borrow_and_update().clone();
                    self.reconfigure(config);
                    poll.ask_for(&self.selection, &self.config);
                }
                Some(ended) = self.rooms.join_next_with_id(), if !self.rooms.is_empty() => {
                    if let Some((name, again)) = self.room_ended(ended) {
                        self.join_for_next(&name);
                        if let Some(again) = again {
                            poll.sooner(again);
                        }
                    }
                }
                Some(event) = jobs::next_event(&mut self.line) => self.on_job(event),
                Some(missing) = self.missing.1.recv() => self.gone(&missing),
                Some(looked) = self.looks.join_next(), if !self.looks.is_empty() => {
                    self.looked(looked);
                }
                Some(asked) = self.asks.join_next(), if !self.asks.is_empty() => {
                    self.asked(asked);
                }
                Some(ended) = self.worker.join_next(), if !self.worker.is_empty() => {
                    self.worker_ended(ended);
                }
                Some(room) = self.hinted.recv() => {
                    let running = self.running.values().find(|running| running.name == room);
                    if let Some(running) = running {
                        running.look.notify_one();
                    }
                    poll.hinted();
                }
                Some(request) = requests.recv() => self.on_request(request),
                listed = poll.next() => match listed {
                    Ok(rooms) => {
                        ready.send_replace(true);
                        self.answered |= rooms.is_some();
                        if self.answered && !self.draining {
                            board.enter(Phase::Running);
                        }
                        self.reconcile(rooms.as_deref());
                        if let Some(rooms) = &rooms {
                            self.look_for_lost(rooms);
                        }
                    }
                    Err(fatal) => {
                        let reason = CloseReason::Shutdown("cannot start".into());
                        let new = CloseOrder { reason, deadline: self.deadline() };
                        break (new, Some(Failure::Credentials(fatal.to_string())));
                    }
                },
            }
        };
        drop((poll, requests));
        self.close(first, orders).await;
        account(&self.registry, self.started, failure)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.config.shutdown.deadline_ms)
    }

    /// Rooms follow it with their next review, streams when they are opened; rooms that are no
    /// longer wanted are closed, and the next poll joins those that are now.
    fn reconfigure(&mut self, config: Arc<Config>) {
        let gate = self.stt.borrow().gate.clone();
        gate.renew(Limits::new(&config.stt));
        self.stt.send_replace(stt(&config.stt, gate));
        self.terms.send_replace(terms(&config));
        self.selection = RoomSelection::new(&config.rooms);
        self.config = config.clone();
        self.renew_settings();
        let grace = Duration::from_millis(config.stt.close_grace_ms);
        let new = CloseOrder {
            reason: CloseReason::Deselected,
            deadline: Instant::now() + grace,
        };
        for running in self.running.values() {
            if !self.selection.fits(&running.name) && !self.claims.want(&running.name) {
                order(&running.orders, &new);
            }
        }
    }

    /// Joins what there is and what is to be there always, unless we are in it. Without a list of
    /// what the server has, only the latter.
    fn reconcile(&mut self, listed: Option<&[ListedRoom]>) {
        let now = Instant::now();
        let sids = listed.map(|listed| {
            let sids = listed.iter();
            let sids = sids.map(|room| (room.name.as_str(), room.sid.as_str()));
            sids.collect::<HashMap<_, _>>()
        });
        if let Some(sids) = &sids {
            self.drop_claims_on_rooms_that_are_over(sids);
            // Not only of those that are wanted now: a job may want them again.
            self.past
                .retain(|name, past| match sids.get(name.as_str()) {
                    Some(sid) => past.is_of(Some(sid)),
                    None if self.draining => false,
                    None => self.selection.is_static(name) && past.is_of(None),
                });
        }
        let always = self.selection.always.iter();
        let mut wanted: BTreeMap<&str, Option<&str>> =
            always.map(|name| (name.as_str(), None)).collect();
        if self.draining && listed.is_some() {
            wanted.clear();
        }
        let found = sids.iter().flatten();
        let found = found.filter(|(name, _)| self.selection.fits(name) || self.claims.want(name));
        wanted.extend(found.map(|(name, sid)| (*name, Some(*sid))));
        let running: HashSet<&str> = self.running.values().map(|r| r.name.as_str()).collect();
        let is_ours = |name: &str| self.past.get(name).is_some_and(|past| past.unfinished);
        let joined: Vec<(String, Option<String>)> = wanted
            .into_iter()
            .filter(|(name, _)| !running.contains(name))
            .filter(|(name, sid)| !self.draining || (is_ours(name) && sid.is_some()))
            .filter(|(name, _)| self.past.get(*name).is_none_or(|past| past.allows(now)))
            .map(|(name, sid)| (name.to_owned(), sid.map(str::to_owned)))
            .collect();
        for (name, sid) in joined {
            self.join(name, sid);
        }
    }

    fn join(&mut self, name: String, sid: Option<String>) {
        let (orders, ordered) = watch::channel(None);
        let overrides = self.claims.overrides(&name);
        let (stt, current) = watch::channel(self.stt_with(&overrides));
        let (house, at_home) = watch::channel(self.house(&name));
        let look = Arc::new(Notify::new());
        let (identity, ticket) = self.way_in(&name);
        let (requests, requested) = mpsc::channel(MAX_REQUESTS);
        let context = Context {
            room: name.clone(),
            registry: self.registry.clone(),
            stt: current,
            sinks: self.sinks.clone(),
            to_room: None,
        };
        let entry = Entry {
            identity: identity.clone(),
            ticket,
            house: at_home,
            look: look.clone(),
            missing: self.missing.0.clone(),
        };
        let past = self.past.get(&name);
        let tried = past.map(|past| past.tried.clone()).unwrap_or_default();
        let exceptions = past.map(|past| past.exceptions.clone()).unwrap_or_default();
        if self.draining {
            // Cannot fail: the channel is new.
            let _ = requests.try_send(Request::Drain(oneshot::channel().0));
        }
        let asked = Asked {
            requests: requested,
            exceptions: exceptions.clone(),
        };
        let room_context = self.room_context.clone();
        let life = supervisor::supervise(room_context, context, entry, tried, asked, ordered);
        let id = self.rooms.spawn(life).id();
        let running = Running {
            name,
            sid,
            identity,
            joined: Instant::now(),
            orders,
            stt,
            overrides,
            house,
            look,
            ending: Vec::new(),
            outlived: None,
            requests,
            exceptions,
        };
        self.running.insert(id, running);
    }

    /// The room, and when it is to be tried again, if that is known.
    fn room_ended(
        &mut self,
        ended: Result<(Id, Ended), tokio::task::JoinError>,
    ) -> Option<(String, Option<Instant>)> {
        let (id, ended) = match ended {
            Ok((id, ended)) => (id, Ok(ended)),
            Err(error) => (error.id(), Err(error.to_string())),
        };
        let running = self.running.remove(&id)?;
        let (how, sid, tried) = match ended {
            Ok(Ended {
                how,
                at,
                sid,
                tried,
            }) => (running.how_it_ended(how, at), sid, tried),
            Err(error) => {
                let how = RoomEnd::Failed(format!("a defect: {error}"));
                (how, None, HashSet::new())
            }
        };
        self.tell_jobs_of(&running, &how);
        // It goes on, after a moment.
        if !matches!(how, RoomEnd::Stale)
            && let Some(store) = self.registry.ledger().store()
            && let Some(sid) = sid.as_ref()
        {
            let (sid, reason) = (Some(sid.clone()), how.to_string());
            store.finished(Finished::room(&running.name, sid, running.joined, reason));
        }
        let order = running.orders.borrow().clone();
        let reason = order.map(|order| order.reason);
        let deselected = reason == Some(CloseReason::Deselected);
        let unfinished = matches!(how, RoomEnd::Stale | RoomEnd::Failed(_));
        let name = running.name;
        let sid = sid.or(running.sid);
        let now = Instant::now();
        let (again, failures) = match how {
            // It lives, and may be selected again.
            RoomEnd::Closed if deselected => (Some(now), 0),
            // Not while it lives.
            _ if reason == Some(CloseReason::Requested) => (None, 0),
            // A list that was on its way, or lags, may still have it, and joining would make it
            // anew; one that is listed for longer lives.
            RoomEnd::Closed => (Some(now + LIST_LAG), 0),
            RoomEnd::Stale => (Some(now), 0),
            // It is looked at again, and joined if nobody of ours is there.
            RoomEnd::PutOut(why)
                if why == DUPLICATE && running.identity != self.config.rooms.identity =>
            {
                tracing::warn!(
                    room = name,
                    "another daemon of ours has taken over the room"
                );
                (Some(now + LIST_LAG), 0)
            }
            RoomEnd::PutOut(why) => {
                let fix = match why == DUPLICATE {
                    true => ": somebody else uses the same rooms.identity, so change one of them",
                    false => "",
                };
                tracing::warn!(
                    room = name,
                    why,
                    "put out of the room: staying out of it{fix}"
                );
                (None, 0)
            }
            RoomEnd::Failed(why) => {
                // A connection that lasted starts the count anew.
                let earlier = self.past.get(&name).map_or(0, |past| past.failures);
                let lasted = running.joined.elapsed() >= GOOD_CONNECTION;
                let failures = if lasted { 0 } else { earlier };
                let delay = backoff(failures, REJOIN_FIRST, REJOIN_MOST, fastrand::f64());
                tracing::error!(
                    room = name,
                    why,
                    ?delay,
                    "room connection failed; will join again"
                );
                (Some(now + delay), failures + 1)
            }
        };
        let past = Past {
            sid,
            again,
            failures,
            tried,
            unfinished: unfinished && again.is_some(),
            exceptions: running.exceptions,
        };
        self.past.insert(name.clone(), past);
        Some((name, again))
    }

    fn on_request(&mut self, request: Request) {
        let (answer, result): (Answer, _) = match request {
            Request::Close(Scope::Room(name), answer) => (answer, self.close_requested(&name)),
            Request::Reopen(Scope::Room(name), answer) => (answer, self.reopen(&name)),
            Request::Close(scope, answer) => {
                return self.pass_on(scope.room().to_owned(), answer, |answer| {
                    Request::Close(scope, answer)
                });
            }
            Request::Reopen(scope, answer) => {
                return self.pass_on(scope.room().to_owned(), answer, |answer| {
                    Request::Reopen(scope, answer)
                });
            }
            Request::Drain(answer) => {
                self.drain();
                (answer, Ok(()))
            }
            Request::Undrain(answer) => {
                self.undrain();
                (answer, Ok(()))
            }
        };
        // Who asked may have left.
        let _ = answer.send(result);
    }

    fn pass_on(&self, room: String, answer: Answer, request: impl FnOnce(Answer) -> Request) {
        let found = self.running.values().find(|running| running.name == room);
        let refused = match found {
            Some(running) if running.orders.borrow().is_none() => {
                // If it takes no more, the answer is dropped, which says so.
                let _ = running.requests.try_send(request(answer));
                return;
            }
            Some(_) => Refused::Closing,
            None => Refused::NoSuchRoom,
        };
        // Who asked may have left.
        let _ = answer.send(Err(refused));
    }

    /// Closes a room, which is not joined again while it lives.
    fn close_requested(&mut self, name: &str) -> Result<(), Refused> {
        let grace = Duration::from_millis(self.config.stt.close_grace_ms);
        let new = CloseOrder {
            reason: CloseReason::Requested,
            deadline: Instant::now() + grace,
        };
        if let Some(running) = self.running.values().find(|running| running.name == name) {
            order(&running.orders, &new);
            return Ok(());
        }
        // About to be joined again.
        let past = self.past.get_mut(name).ok_or(Refused::NoSuchRoom)?;
        (past.again, past.unfinished) = (None, false);
        Ok(())
    }

    /// The next poll joins it. Who was closed in it stays so.
    fn reopen(&mut self, name: &str) -> Result<(), Refused> {
        if let Some(past) = self.past.get_mut(name)
            && past.again.is_none()
        {
            past.again = Some(Instant::now());
            return Ok(());
        }
        let mut running = self.running.values();
        match running.find(|running| running.name == name) {
            Some(running) if running.orders.borrow().is_some() => Err(Refused::Closing),
            Some(_) => Ok(()),
            None => Err(Refused::NoSuchRoom),
        }
    }

    fn drain(&mut self) {
        self.draining = true;
        self.tell(Command::Drain(true));
        self.registry.board().enter(Phase::Draining);
        for running in self.running.values() {
            // One that takes no more has very much to do, and is told no later than it would have
            // taken somebody new.
            let _ = running
                .requests
                .try_send(Request::Drain(oneshot::channel().0));
        }
    }

    fn undrain(&mut self) {
        self.draining = false;
        self.tell(Command::Drain(false));
        let past = self.past.values().map(|past| &past.exceptions);
        let running = self.running.values().map(|running| &running.exceptions);
        past.chain(running).for_each(Exceptions::undrain);
        self.registry.board().enter(match self.answered {
            true => Phase::Running,
            false => Phase::Starting,
        });
    }

    /// The last room of a daemon that drains is over.
    fn drained(&self) -> bool {
        let wanted = |name: &str| self.selection.fits(name) || self.claims.want(name);
        let over = || {
            let mut past = self.past.iter();
            past.all(|(name, past)| !past.unfinished || !wanted(name))
        };
        self.draining && self.running.is_empty() && over()
    }

    /// The close path of the daemon: no new streams; all rooms at once, each in its own order;
    /// streams whose session is stuck, past it; then wait until the sockets themselves are gone.
    async fn close(&mut self, first: CloseOrder, mut orders: watch::Receiver<Option<CloseOrder>>) {
        tracing::info!(reason = %first.reason, streams = self.registry.open_now(),
            rooms = self.running.len(), "closing");
        self.registry.seal();
        self.drain_worker();
        self.registry.board().enter(Phase::Closing);
        let begun = Instant::now();
        let mut current = first;
        let mut owner_there = true;
        let mut past_owners = false;
        let mut progress = tokio::time::interval(PROGRESS_EVERY);
        progress.set_missed_tick_behavior(MissedTickBehavior::Skip);
        progress.tick().await;
        loop {
            for running in self.running.values() {
                order(&running.orders, &current);
            }
            if past_owners {
                self.registry.close_all(&current);
            }
            let whole = current.deadline.saturating_duration_since(begun);
            let past_owners_at = begun + whole.mul_f64(PAST_OWNERS_AFTER);
            tokio::select! {
                ended = self.rooms.join_next_with_id() => match ended {
                    Some(ended) => drop(self.room_ended(ended)),
                    None => break,
                },
                changed = orders.changed(), if owner_there => match changed {
                    Ok(()) => if let Some(new) = orders.borrow_and_update().as_ref() {
                        current.merge(new);
                    },
                    Err(_) => owner_there = false,
                },
                () = tokio::time::sleep_until(past_owners_at.into()), if !past_owners => {
                    past_owners = true;
                }
                _ = progress.tick() => self.say_who_is_open(),
                () = tokio::time::sleep_until((current.deadline + SETTLING).into()) => {
                    tracing::error!("rooms hang: abandoned");
                    // Not awaited: a task that blocks its thread never ends.
                    #[allow(clippy::disallowed_methods, reason = "rooms that hang past the deadline: their streams are closed by the registry")]
                    self.rooms.abort_all();
                    break;
                }
            }
        }
        self.registry.close_all(&current);
        let until = current.deadline + SETTLING;
        self.room_context.owned.close();
        let gone = async {
            self.registry.drained().await;
            self.room_context.owned.wait().await;
        };
        if tokio::time::timeout_at(until.into(), gone).await.is_err() {
            self.say_who_is_open();
        }
        self.end_worker(until).await;
        flush_books(&self.registry, until).await;
        self.last_reports.cancel();
        let until = until.min(Instant::now() + LAST_REPORTS);
        let delivered = async { while self.reporter.join_next().await.is_some() {} };
        if tokio::time::timeout_at(until.into(), delivered)
            .await
            .is_err()
        {
            tracing::warn!("usage reports are left for the next start");
        }
        // Else what was taken just now is sent once more.
        if let Some(store) = self.registry.ledger().store() {
            let _ = tokio::time::timeout_at(until.into(), store.flushed()).await;
        }
    }

    fn say_who_is_open(&self) {
        for stream in self.registry.open() {
            tracing::warn!(id = %stream.id, key = %stream.key, state = ?stream.state, "still open");
        }
    }
}

type Asking = BoxFuture<'static, Result<Vec<ListedRoom>, ApiError>>;

/// Asks for the rooms there are, over and over.
struct Poll {
    api: Arc<RoomApi>,
    board: Board,
    /// Which rooms to ask for: empty for all of them. `None` to never ask.
    names: Option<Vec<String>>,
    every: Duration,
    next_at: Instant,
    asked_at: Option<Instant>,
    /// The request that is under way: whatever else happens meanwhile, it comes to its end.
    asking: Option<Asking>,
    failures: u32,
    /// Once it has worked, credentials that fail are the server's passing trouble.
    worked: bool,
}

impl Poll {
    fn new(api: Arc<RoomApi>, board: Board) -> Self {
        Self {
            api,
            board,
            names: None,
            every: Duration::MAX,
            next_at: Instant::now(),
            asked_at: None,
            asking: None,
            failures: 0,
            worked: false,
        }
    }

    /// From now on, and at once.
    fn ask_for(&mut self, selection: &RoomSelection, config: &Config) {
        self.names = match config.agent.enabled {
            // Any may be one that we are dispatched to.
            true => Some(Vec::new()),
            false => selection.asked_for().map(<[String]>::to_vec),
        };
        if self.names.is_none() {
            tracing::warn!("no room is ever joined: rooms.discover is off and rooms.join is empty");
        }
        self.every = Duration::from_millis(config.rooms.poll_interval_ms);
        self.asking = None;
        self.next_at = Instant::now();
    }

    /// Asks by then.
    fn sooner(&mut self, at: Instant) {
        self.next_at = self.next_at.min(at);
    }

    /// Asks at once, or soon if it has asked just now. A server that fails is left alone.
    fn hinted(&mut self) {
        if self.failures == 0 {
            let now = Instant::now();
            self.sooner(self.asked_at.map_or(now, |at| now.max(at + HINT_PAUSE)));
        }
    }

    /// The next list of rooms; none if the server did not say. Cancel safe.
    ///
    /// # Errors
    /// Only when the server refuses the credentials from the start; other trouble is logged and
    /// tried again.
    async fn next(&mut self) -> Result<Option<Vec<ListedRoom>>, ApiError> {
        let Some(names) = &self.names else {
            return std::future::pending().await;
        };
        if self.asking.is_none() {
            tokio::time::sleep_until(self.next_at.into()).await;
            let (api, names) = (self.api.clone(), names.clone());
            self.asking = Some(Box::pin(async move { api.list_rooms(&names).await }));
            self.asked_at = Some(Instant::now());
            // Until somebody wants it sooner.
            self.next_at = Instant::now() + REJOIN_MOST.max(self.every) * 2;
        }
        let Some(asking) = &mut self.asking else {
            return std::future::pending().await;
        };
        let answer = asking.await;
        self.asking = None;
        match answer {
            Ok(rooms) => {
                if self.failures > 0 {
                    tracing::info!("LiveKit answers again");
                }
                (self.failures, self.worked) = (0, true);
                self.board.livekit_failed(None);
                self.sooner(Instant::now() + self.every);
                Ok(Some(rooms))
            }
            Err(error @ ApiError::Credentials { .. }) if !self.worked => Err(error),
            Err(error) => {
                let most = REJOIN_MOST.max(self.every);
                let delay = backoff(self.failures, self.every, most, fastrand::f64());
                tracing::error!(%error, ?delay, "cannot list rooms; will try again");
                self.board.livekit_failed(Some(error.to_string()));
                self.failures += 1;
                self.next_at = Instant::now() + delay;
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
mod tests {
    use std::thread::{self, ThreadId};

    use futures_util::StreamExt;
    use tokio::sync::mpsc;
    use tokio_tungstenite::accept_async;
    use tracing::{Event, Level, subscriber};
    use tracing_subscriber::{
        Layer, Registry as Subscriber,
        layer::{self, SubscriberExt},
    };

    use super::*;
    use crate::{
        domain::{Outcome, Phase, StreamKey},
        stt::{
            connect::{InMemory, Provider},
            stream,
        },
    };

    const DEADLINE: Duration = Duration::from_secs(5);
    const LONG: Duration = Duration::from_secs(60);

    fn without_rooms() -> Config {
        let mut config = Config::for_tests();
        config.rooms.discover = false;
        config
    }

    fn key() -> StreamKey {
        StreamKey {
            room: "r".into(),
            participant: "p".into(),
            track: "t".into(),
        }
    }

    fn shutdown() -> CloseOrder {
        CloseOrder {
            reason: CloseReason::Shutdown("test".into()),
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// A daemon is ordered to close with a stream open that has lost its owner, is given [`LONG`] for
    /// its own close, and whose provider does not answer; its report.
    async fn closed_with_a_stream_of_nobody() -> Arc<Report> {
        let (connect, mut connections) = mpsc::unbounded_channel();
        let provider = Provider::in_memory(&Config::for_tests().stt, InMemory(connect));
        let daemon = Daemon::start(without_rooms(), Sinks::default());
        let stream = stream::open(daemon.registry(), Arc::new(provider), key(), LONG, None);
        let connection = connections.recv().await.expect("a connection");
        let mut deaf = accept_async(connection).await.expect("handshake");
        drop(stream);
        let asked = deaf.next().await.expect("a message").expect("read");
        assert!(asked.to_text().expect("text").contains("CloseStream"));
        let begun = tokio::time::Instant::now();
        daemon.close(&shutdown());
        let report = daemon.closed().await;
        let took = begun.elapsed();
        assert!(took < LONG / 2, "the stream's own time was waited for");
        assert!(
            daemon
                .registry()
                .permit(key(), Arc::default(), None)
                .is_err(),
            "sealed"
        );
        let [receipt] = &report.receipts[..] else {
            panic!("after {took:?}: {report:#?}")
        };
        let phase = Phase::AwaitingAnswer;
        assert_eq!(receipt.outcome, Outcome::TimedOut { phase });
        assert!(report.nothing_left(), "{report:#?}");
        report
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_lost_its_owner_is_over_by_the_deadline_of_the_shutdown() {
        let report = closed_with_a_stream_of_nobody().await;
        assert_eq!(report.failure, None);
    }

    #[tokio::test]
    async fn a_hurry_does_not_wait_for_the_root_to_hear_of_it() {
        let daemon = Daemon::start(without_rooms(), Sinks::default());
        daemon.hurry(&shutdown());
        assert!(
            daemon
                .registry()
                .permit(key(), Arc::default(), None)
                .is_err(),
            "sealed"
        );
        daemon.closed().await;
    }

    /// Panics on this thread where the daemon says that it is closing.
    struct Defect(ThreadId);

    impl<S: tracing::Subscriber> Layer<S> for Defect {
        fn on_event(&self, event: &Event<'_>, _: layer::Context<'_, S>) {
            let said = event.metadata();
            let closing = module_path!().starts_with(said.target()) && *said.level() == Level::INFO;
            let here = thread::current().id() == self.0;
            assert!(!(here && closing), "a defect, on purpose");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_root_that_panics_leaves_no_stream_open_and_the_report_says_so() {
        // For all threads: which events are wanted is remembered for all of them.
        let defect = Subscriber::default().with(Defect(thread::current().id()));
        subscriber::set_global_default(defect).expect("no other test has one");
        let report = closed_with_a_stream_of_nobody().await;
        let failed =
            matches!(&report.failure, Some(Failure::Defect(said)) if said.contains("on purpose"));
        assert!(failed, "{:?}", report.failure);
    }

    fn past(sid: Option<&str>, again: Option<Instant>) -> Past {
        Past {
            sid: sid.map(str::to_owned),
            again,
            failures: 0,
            tried: HashSet::new(),
            unfinished: false,
            exceptions: Exceptions::default(),
        }
    }

    #[test]
    fn another_room_of_the_same_name_starts_anew() {
        let now = Instant::now();
        for again in [Some(now), None] {
            assert!(past(Some("RM_1"), again).is_of(Some("RM_1")));
            assert!(!past(Some("RM_1"), again).is_of(Some("RM_2")));
            assert!(!past(None, again).is_of(Some("RM_1")), "there is one now");
        }
    }

    #[test]
    fn a_room_of_the_list_that_is_over_is_made_anew_after_a_pause_or_at_once_if_it_put_us_out() {
        let later = Instant::now() + LIST_LAG;
        let ended = past(Some("RM_1"), Some(later));
        assert!(ended.is_of(None) && !ended.allows(Instant::now()) && ended.allows(later));
        let out = past(Some("RM_1"), None);
        assert!(!out.is_of(None) && !out.allows(later));
    }
}
