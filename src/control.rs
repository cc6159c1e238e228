//! The control API: what the daemon does, for people and machines, and the few things that may be
//! asked of it. HTTP on a TCP port and on a Unix socket. It has no path of its own to close anything:
//! it gives the orders that everything else gives. It ends last, and holds up nothing.

mod access;
mod api;
pub(crate) mod command;
mod error;
mod events;
mod force_close;
mod listen;
mod metrics;
pub(crate) mod view;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::Semaphore,
    task::{JoinError, JoinSet},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    access::Rates,
    listen::{SocketFile, serve},
    metrics::Requests,
};
pub(crate) use self::{error::ErrorBody, listen::Bound};
use crate::{board::What, daemon::Daemon, room::api::RoomApi, store};

/// Who may listen to events at once.
const MAX_LISTENERS: usize = 16;
/// Queries of the ledger at once.
const MAX_QUERIES: usize = 2;
/// Force-closes at once.
const MAX_FORCED: usize = 4;
/// What clients are given to read the last answers.
pub(crate) const LAST_ANSWERS: Duration = Duration::from_millis(100);

/// Sets the log's filter.
pub(crate) type Refilter = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What every request sees.
struct App {
    daemon: Arc<Daemon>,
    refilter: Refilter,
    rates: Rates,
    requests: Requests,
    listeners: Arc<Semaphore>,
    queries: Arc<Semaphore>,
    forced: Arc<Semaphore>,
    /// What goes on when nobody waits for the answer any more; ends with the API.
    tasks: TaskTracker,
    livekit: RoomApi,
    /// The API ends.
    ended: CancellationToken,
}

impl App {
    /// Who counts how many open streams now.
    fn open(&self) -> view::Open {
        let registry = self.daemon.registry();
        let before = registry.open();
        let kernel = registry.kernel_sockets();
        view::Open::new(&before, kernel, &registry.open())
    }
}

/// A running API. What is left of it when this is dropped ends at once.
pub(crate) struct Control {
    tasks: JoinSet<()>,
    ended: CancellationToken,
    _file: Option<SocketFile>,
}

impl Control {
    /// Serves from now on.
    pub fn start(bound: Bound, daemon: Arc<Daemon>, refilter: Refilter) -> Self {
        let ended = CancellationToken::new();
        let livekit = RoomApi::new(&daemon.config().livekit);
        let app = Arc::new(App {
            daemon,
            livekit,
            refilter,
            rates: Rates::default(),
            requests: Requests::default(),
            listeners: Arc::new(Semaphore::new(MAX_LISTENERS)),
            queries: Arc::new(Semaphore::new(MAX_QUERIES)),
            forced: Arc::new(Semaphore::new(MAX_FORCED)),
            tasks: TaskTracker::new(),
            ended: ended.clone(),
        });
        let mut tasks = JoinSet::new();
        let Bound { tcp, unix } = bound;
        if tcp.is_some() || unix.is_some() {
            let router = api::router(app.clone());
            tasks.spawn(tell_of_trouble(app));
            if let Some(tcp) = tcp {
                tasks.spawn(serve(tcp, router.clone(), ended.clone()));
            }
            let file = unix.map(|(unix, file)| {
                tasks.spawn(serve(unix, router, ended.clone()));
                file
            });
            return Self {
                tasks,
                ended,
                _file: file,
            };
        }
        Self {
            tasks,
            ended,
            _file: None,
        }
    }

    /// Ends it: no new connections, the answers that are under way, the last events. Whoever has
    /// not read them by then is cut off.
    pub async fn end(mut self, until: Instant) {
        self.ended.cancel();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // What is left ends with this.
        let _ = tokio::time::timeout_at(until.into(), ended).await;
    }
}

/// Trouble that is over before it is seen was none.
async fn tell_of_trouble(app: Arc<App>) {
    let board = app.daemon.registry().board().clone();
    let mut trouble = app.daemon.gate().trouble();
    let mut told = None;
    loop {
        let now = trouble.borrow_and_update().clone();
        match (&told, &now) {
            (_, Some(trouble)) => board.tell(What::TroubleBegun(trouble.clone())),
            (Some(cause), None) => board.tell(What::TroubleOver(*cause)),
            (None, None) => {}
        }
        told = now.map(|trouble| trouble.failure.cause);
        let ended = app.ended.run_until_cancelled(trouble.changed()).await;
        if !matches!(ended, Some(Ok(()))) {
            return;
        }
    }
}

/// Asks the ledger, beside the runtime and not too often at once.
async fn query<T: Send + 'static>(
    app: &App,
    ask: impl FnOnce(store::Reader) -> Result<T, store::StoreError> + Send + 'static,
) -> Result<T, error::ApiError> {
    let config = app.daemon.config();
    let path = match config.ledger.enabled {
        true => config.ledger_file(),
        false => None,
    };
    let path = path.ok_or_else(error::ApiError::no_ledger)?;
    let asked = move || ask(store::Reader::open(&path)?);
    match in_turn(app.queries.clone(), asked).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(error::ApiError::ledger(&error)),
        Err(_) => Err(error::ApiError::defect()),
    }
}

/// Runs it beside the runtime, when it may. The turn is its own: who does not wait for the answer
/// leaves it running.
async fn in_turn<T: Send + 'static>(
    turns: Arc<Semaphore>,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    let turn = turns.acquire_owned().await;
    let running = move || {
        let _turn = turn;
        run()
    };
    tokio::task::spawn_blocking(running).await
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_query_that_nobody_waits_for_keeps_its_turn() {
        let turns = Arc::new(Semaphore::new(1));
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (end, ends) = mpsc::channel::<()>();
        let query = in_turn(turns.clone(), move || {
            let _ = begun.send(());
            let _ = ends.recv();
        });
        tokio::select! {
            _ = query => panic!("it waits for the test"),
            begun = has_begun => begun.expect("it begins"),
        }
        assert_eq!(turns.available_permits(), 0);
        drop(end);
        let over = in_turn(turns.clone(), || "over").await;
        assert_eq!(over.ok(), Some("over"));
    }
}
