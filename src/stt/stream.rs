//! One stream: a task of the registry that owns the websocket from before it exists until it is
//! settled. Whoever wants the stream holds a [`StreamHandle`]; dropping or cancelling that, by
//! panic or otherwise, starts the same close as asking for it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{Sink, Stream as _};
use tokio::sync::{mpsc, watch};
use tokio_tungstenite::{
    MaybeTlsStream,
    tungstenite::{
        self, Bytes, Message,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use super::{
    connect::{self, Connected, Dialled, Provider, Socket, Wire},
    gate::Admission,
    machine::{Action, Machine, Report},
};
use crate::{
    audio::{Page, seconds},
    close::{CloseOrder, now, order},
    domain::{CloseReason, Outcome, Phase, StreamId, StreamKey, StreamTotals},
    failure::{Cause, Failure},
    ledger::Settled,
    registry::{Orders, Permit, Registry, Sealed},
};

/// More audio than can come while a stream is opened: 20 s in the shortest pages.
const MAX_WAITING_PAGES: usize = 1024;
const MAX_WAITING_REPORTS: usize = 256;
/// A provider that has said nothing of the audio, but has kept the stream for so long, does its work.
const GOOD_AFTER: Duration = Duration::from_secs(3);

enum Command {
    Audio(Page),
    /// A message of the owner's, as it is.
    Text(String),
    Alive,
}

/// The owner's end of a stream. Dropping it closes the stream with [`CloseReason::OwnerLost`].
pub struct StreamHandle {
    id: StreamId,
    commands: mpsc::Sender<Command>,
    orders: watch::Sender<Option<CloseOrder>>,
    reports: mpsc::Receiver<Report>,
    settled: watch::Receiver<Option<Arc<Settled>>>,
    dropped_pages: u64,
}

impl StreamHandle {
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Queues audio. Never blocks: when the stream is stuck the page is dropped and counted.
    pub fn audio(&mut self, page: Page) {
        if !page.is_empty() && self.commands.try_send(Command::Audio(page)).is_err() {
            self.dropped_pages += 1;
        }
    }

    /// Waits until the stream takes more. Cancel safe.
    pub fn takes_more(&self) -> impl Future<Output = ()> + Send + use<> {
        let commands = self.commands.clone();
        // Closed, it takes anything, and throws it away.
        async move { drop(commands.reserve_owned().await) }
    }

    /// Queues a message that goes to the provider as it is.
    pub fn text(&mut self, text: String) {
        if self.commands.try_send(Command::Text(text)).is_err() {
            self.dropped_pages += 1;
        }
    }

    /// Tells that the stream is still wanted; without it KeepAlive stops.
    pub fn alive(&self) {
        // A full queue is a sign of life in itself, a closed one has no more need of it.
        let _ = self.commands.try_send(Command::Alive);
    }

    /// Orders the close and returns at once; [`StreamHandle::settled`] waits for it.
    pub fn close(&self, new: &CloseOrder) {
        order(&self.orders, new);
    }

    /// What the provider reports; `None` after the last. Cancel safe.
    pub async fn report(&mut self) -> Option<Report> {
        self.reports.recv().await
    }

    /// The receipt, once there is one. Cancel safe.
    pub async fn settled(&mut self) -> Option<Arc<Settled>> {
        let settled = self.settled.wait_for(Option::is_some).await.ok()?;
        settled.clone()
    }

    /// Pages that the stream did not take.
    pub fn dropped_pages(&self) -> u64 {
        self.dropped_pages
    }
}

/// Enters a stream in the registry and starts opening it. `orphan_grace` bounds the close of a
/// stream whose owner is lost.
pub fn open(
    registry: &Registry,
    provider: Arc<Provider>,
    key: StreamKey,
    orphan_grace: Duration,
    admission: Option<Admission>,
) -> Result<StreamHandle, Sealed> {
    let permit = registry.permit(key, provider.service().clone(), admission)?;
    let id = permit.id();
    let (commands, waiting) = mpsc::channel(MAX_WAITING_PAGES);
    let (orders, ordered) = watch::channel(None);
    let (reporter, reports) = mpsc::channel(MAX_WAITING_REPORTS);
    let (settled_tx, settled) = watch::channel(None);
    let inbox = Inbox {
        commands: Some(waiting),
        orders: Some(ordered),
        past_owner: registry.orders_to(id),
        ordered: None,
        orphan_grace,
    };
    let task = run(
        permit,
        registry.clone(),
        provider,
        inbox,
        reporter,
        settled_tx,
    );
    registry.tasks().spawn(task);
    Ok(StreamHandle {
        id,
        commands,
        orders,
        reports,
        settled,
        dropped_pages: 0,
    })
}

/// The whole life of a stream.
async fn run(
    permit: Permit,
    registry: Registry,
    provider: Arc<Provider>,
    mut inbox: Inbox,
    reporter: mpsc::Sender<Report>,
    settled: watch::Sender<Option<Arc<Settled>>>,
) {
    let receipt = match connect(&provider, &permit, &mut inbox).await {
        Ok(connected) => {
            // Whoever has gone needs not be told.
            let _ = reporter.try_send(Report::Opened(connected.request_id.clone()));
            let mut stream = Owned::new(permit, connected, provider, registry, inbox.orphan_grace);
            drive(stream.live_mut(), &mut inbox, Some(&reporter)).await;
            stream.settle(inbox.reason())
        }
        Err(outcome) => permit.settle(outcome, inbox.reason(), StreamTotals::default()),
    };
    // Reports end before the receipt is out, so that who sees the receipt has seen them all.
    drop(reporter);
    settled.send_replace(Some(receipt));
}

/// Connects. While nothing is asked of the provider, an order to close ends it at once; after that
/// only the deadline does, since the provider may count the stream already.
async fn connect(
    provider: &Provider,
    permit: &Permit,
    inbox: &mut Inbox,
) -> Result<Connected, Outcome> {
    let limit = provider.connect_timeout();
    let until = now() + limit;
    let dialled = tokio::select! {
        biased;
        () = inbox.ordered() => {
            return Err(Outcome::NeverOpened {
                detail: "closed before it was connected".to_owned(),
                failure: None,
            });
        }
        () = sleep_until(Some(until)) => {
            let said = format!("no connection within {limit:?}");
            let failure = Failure::new(Cause::Timeout(Phase::Connecting), said);
            return Err(Outcome::never_opened(failure));
        }
        dialled = dial(provider, permit) => dialled.map_err(Outcome::never_opened)?,
    };
    let mut upgrading = Box::pin(provider.upgrade(dialled));
    loop {
        let deadline = inbox.deadline().map_or(until, |ordered| ordered.min(until));
        tokio::select! {
            biased;
            upgraded = &mut upgrading => return upgraded.map_err(Outcome::never_opened),
            () = inbox.order() => {}
            () = sleep_until(Some(deadline)) => {
                return Err(Outcome::TimedOut { phase: Phase::Connecting });
            }
        }
    }
}

/// Dials, and returns once the stream can be named after a crash as well: the journal was told with
/// the permit, so that this has most often cost no time.
async fn dial(provider: &Provider, permit: &Permit) -> Result<Dialled, Failure> {
    let dialled = provider.dial().await?;
    if let Some(socket) = dialled.socket_id() {
        permit.connected(socket);
    }
    permit.journaled().await;
    Ok(dialled)
}

/// What comes from outside to a stream's task.
struct Inbox {
    commands: Option<mpsc::Receiver<Command>>,
    orders: Option<watch::Receiver<Option<CloseOrder>>>,
    past_owner: Orders,
    ordered: Option<CloseOrder>,
    orphan_grace: Duration,
}

impl Inbox {
    /// Waits for an order to close, or a stronger one than there was. Cancel safe.
    async fn order(&mut self) {
        let orphan_grace = self.orphan_grace;
        let new = tokio::select! {
            new = next_order(&mut self.orders, orphan_grace) => new,
            new = self.past_owner.next() => Some(new),
        };
        self.obey(new);
    }

    /// Waits until there is an order. Cancel safe.
    async fn ordered(&mut self) {
        while self.ordered.is_none() {
            self.order().await;
        }
    }

    /// Waits for an order or, if more is taken, a command, whichever comes first. Cancel safe.
    async fn next(&mut self, takes_more: bool) -> Option<Command> {
        let orphan_grace = self.orphan_grace;
        let new = tokio::select! {
            new = next_order(&mut self.orders, orphan_grace) => new,
            new = self.past_owner.next() => Some(new),
            command = next_command(&mut self.commands), if takes_more => return command,
        };
        self.obey(new);
        None
    }

    fn obey(&mut self, new: Option<CloseOrder>) {
        if let Some(new) = new {
            match &mut self.ordered {
                Some(ordered) => ordered.merge(&new),
                None => self.ordered = Some(new),
            }
        }
    }

    /// The instant by which the stream must be over, once it was ordered to close.
    fn deadline(&self) -> Option<Instant> {
        self.ordered.as_ref().map(|order| order.deadline)
    }

    fn reason(&self) -> CloseReason {
        self.ordered
            .as_ref()
            .map_or(CloseReason::StreamFailed, |order| order.reason.clone())
    }
}

async fn next_order(
    orders: &mut Option<watch::Receiver<Option<CloseOrder>>>,
    orphan_grace: Duration,
) -> Option<CloseOrder> {
    let Some(receiver) = orders else {
        // Nobody is left to give orders.
        return std::future::pending().await;
    };
    if receiver.changed().await.is_ok() {
        return receiver.borrow_and_update().clone();
    }
    let last = receiver.borrow().clone();
    *orders = None;
    Some(last.unwrap_or_else(|| CloseOrder {
        reason: CloseReason::OwnerLost,
        deadline: now() + orphan_grace,
    }))
}

async fn next_command(commands: &mut Option<mpsc::Receiver<Command>>) -> Option<Command> {
    let Some(receiver) = commands else {
        return std::future::pending().await;
    };
    let command = receiver.recv().await;
    if command.is_none() {
        *commands = None;
    }
    command
}

/// A stream with its socket.
struct Live {
    permit: Permit,
    provider: Arc<Provider>,
    socket: Socket,
    machine: Machine,
    totals: StreamTotals,
    samples: u64,
    /// Bytes handed to the websocket that may not have left for the kernel.
    unflushed: bool,
}

/// Owns a live stream and never lets go of it unsettled: if the task dies, the stream goes to a
/// new task of the registry, which closes it the same way.
struct Owned {
    live: Option<Box<Live>>,
    registry: Registry,
    orphan_grace: Duration,
    reaped: bool,
}

impl Owned {
    fn new(
        mut permit: Permit,
        connected: Connected,
        provider: Arc<Provider>,
        registry: Registry,
        orphan_grace: Duration,
    ) -> Self {
        if let Some(id) = &connected.request_id {
            permit.named(id);
        }
        permit.opened();
        let totals = StreamTotals {
            request_id: connected.request_id,
            ..Default::default()
        };
        let live = Live {
            permit,
            socket: connected.socket,
            machine: Machine::new(now(), provider.limits(), provider.dialect()),
            provider,
            totals,
            samples: 0,
            unflushed: false,
        };
        Self {
            live: Some(Box::new(live)),
            registry,
            orphan_grace,
            reaped: false,
        }
    }

    fn live_mut(&mut self) -> &mut Live {
        self.live.as_mut().expect("taken only by settle and drop")
    }

    fn orders(&mut self) -> Orders {
        let id = self.live_mut().permit.id();
        self.registry.orders_to(id)
    }

    fn settle(mut self, reason: CloseReason) -> Arc<Settled> {
        let live = self.live.take().expect("taken only here and in drop");
        live.settle(reason)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let Some(live) = self.live.take() else {
            return;
        };
        let id = live.permit.id();
        let runtime = tokio::runtime::Handle::try_current().ok();
        // A runtime that is going drops new tasks at once: without the mark, this would never end.
        let Some(runtime) = runtime.filter(|_| !self.reaped) else {
            tracing::error!(%id, "an open stream is lost with its runtime: the connection is cut");
            reset(&live.socket);
            let _ = live.settle(CloseReason::OwnerLost);
            return;
        };
        tracing::error!(%id, "the task of an open stream died; closing the stream");
        let owned = Self {
            live: Some(live),
            registry: self.registry.clone(),
            orphan_grace: self.orphan_grace,
            reaped: true,
        };
        self.registry.tasks().spawn_on(reap(owned), &runtime);
    }
}

/// The reaper: closes a stream that has lost its task.
async fn reap(mut owned: Owned) {
    let deadline = now() + owned.orphan_grace;
    let mut inbox = Inbox {
        commands: None,
        orders: None,
        past_owner: owned.orders(),
        ordered: Some(CloseOrder {
            reason: CloseReason::OwnerLost,
            deadline,
        }),
        orphan_grace: owned.orphan_grace,
    };
    drive(owned.live_mut(), &mut inbox, None).await;
    let _ = owned.settle(inbox.reason());
}

/// Runs a live stream to its outcome.
async fn drive(live: &mut Live, inbox: &mut Inbox, reporter: Option<&mpsc::Sender<Report>>) {
    loop {
        if let Some(deadline) = inbox.deadline() {
            live.begin_close(inbox, deadline);
        }
        live.report(reporter);
        if live.machine.outcome().is_some() {
            return;
        }
        let timeout = live.machine.next_timeout();
        let takes_more = live.machine.takes_more();
        tokio::select! {
            event = poll_fn(|cx| live.poll_io(cx)) => live.on_io(event),
            command = inbox.next(takes_more) => {
                if let Some(command) = command {
                    live.on_command(command);
                }
            }
            () = sleep_until(timeout) => live.machine.timeout(now()),
        }
    }
}

/// What the socket says.
enum Io {
    Flushed,
    Text(String),
    CloseFrame(u16, String),
    Nothing,
    Ended(Failure),
}

impl Live {
    /// What the owner sent before the order goes out before CloseStream.
    fn begin_close(&mut self, inbox: &mut Inbox, deadline: Instant) {
        if !self.machine.is_closing() {
            if let Some(mut commands) = inbox.commands.take() {
                commands.close();
                while let Ok(command) = commands.try_recv() {
                    self.on_command(command);
                }
            }
            self.permit.closing();
        }
        self.machine.close(now(), deadline);
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Audio(page) => self.machine.audio(now(), page),
            Command::Text(text) => self.machine.say(now(), text),
            Command::Alive => {
                self.machine.owner_alive(now());
                if self.permit.open_for() >= GOOD_AFTER {
                    self.permit.proven();
                }
            }
        }
    }

    fn on_io(&mut self, event: Io) {
        if !matches!(event, Io::Flushed) {
            self.machine.heard(now());
        }
        match event {
            Io::Flushed => self.machine.flushed(),
            Io::Text(text) => {
                let text = self.provider.hide(&text);
                self.machine.text(now(), &text);
                self.learn_name();
            }
            Io::CloseFrame(code, reason) => {
                let reason = self.provider.hide(&reason);
                self.machine.close_frame(code, &reason);
            }
            Io::Nothing => {}
            Io::Ended(failure) => self.machine.ended(failure),
        }
    }

    /// A server that gives no id with the handshake's answer may give it in its messages.
    fn learn_name(&mut self) {
        if self.totals.request_id.is_none()
            && let Some(id) = self.machine.request_id()
        {
            self.permit.named(id);
            self.totals.request_id = Some(id.to_owned());
        }
    }

    fn report(&mut self, reporter: Option<&mpsc::Sender<Report>>) {
        while let Some(report) = self.machine.next_report() {
            if matches!(report, Report::Result(_)) {
                self.permit.proven();
            }
            if let Some(reporter) = reporter
                && let Err(mpsc::error::TrySendError::Full(_)) = reporter.try_send(report)
            {
                tracing::error!(id = %self.permit.id(), "a transcript was dropped: nobody takes them");
            }
        }
    }

    /// Writes what is queued as far as the socket takes it, and reads. Keeps all state in self, so
    /// that cancelling it loses nothing.
    fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<Io> {
        let failed = |error: tungstenite::Error| Poll::Ready(Io::Ended(connect::ended(&error)));
        loop {
            match Pin::new(&mut self.socket).poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return failed(error),
                Poll::Pending => break,
            }
            let Some(action) = self.machine.next_action(now()) else {
                break;
            };
            let message = match action {
                Action::Text(text) => Message::text(text.into_owned()),
                Action::CloseFrame => Message::Close(Some(CloseFrame {
                    code: CloseCode::Normal,
                    reason: "".into(),
                })),
                Action::Ping => Message::Ping(Bytes::new()),
                Action::Audio(page) => {
                    self.samples += page.samples;
                    self.totals.audio_bytes += page.bytes.len() as u64;
                    self.machine.frame(page)
                }
            };
            self.unflushed = true;
            if let Err(error) = Pin::new(&mut self.socket).start_send(message) {
                return failed(error);
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.socket).poll_flush(cx) {
                Poll::Ready(Ok(())) => {
                    self.unflushed = false;
                    return Poll::Ready(Io::Flushed);
                }
                Poll::Ready(Err(error)) => return failed(error),
                Poll::Pending => {}
            }
        }
        match Pin::new(&mut self.socket).poll_next(cx) {
            Poll::Ready(Some(Ok(message))) => Poll::Ready(match message {
                Message::Text(text) => Io::Text(text.as_str().to_owned()),
                Message::Close(frame) => {
                    let frame = frame.map(|f| (f.code.into(), f.reason.as_str().to_owned()));
                    // 1005: a close frame without a code (RFC 6455, section 7.1.5).
                    let (code, reason) = frame.unwrap_or((1005, String::new()));
                    Io::CloseFrame(code, reason)
                }
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {
                    Io::Nothing
                }
            }),
            Poll::Ready(Some(Err(error))) => failed(error),
            Poll::Ready(None) => failed(tungstenite::Error::ConnectionClosed),
            Poll::Pending => Poll::Pending,
        }
    }

    fn settle(self: Box<Self>, reason: CloseReason) -> Arc<Settled> {
        let Self {
            permit,
            socket,
            machine,
            mut totals,
            samples,
            ..
        } = *self;
        let gone = || Outcome::PeerGone {
            detail: "lost with its task".into(),
            failure: None,
        };
        let outcome = machine.outcome().cloned().unwrap_or_else(gone);
        if outcome != Outcome::Acknowledged {
            reset(&socket);
        }
        // The descriptor is closed before the books say so.
        drop(socket);
        totals.provider_seconds = machine.provider_seconds();
        totals.audio_seconds = match samples {
            // In an encoding that only the provider has read.
            0 if totals.audio_bytes > 0 => totals.provider_seconds.unwrap_or_default(),
            samples => seconds(samples),
        };
        if machine.dropped_audio() > 0 {
            let pages = machine.dropped_audio();
            tracing::warn!(id = %permit.id(), pages, "audio dropped: the provider took none");
        }
        permit.settle(outcome, reason, totals)
    }
}

/// Makes the kernel send RST instead of lingering over what the peer does not take.
fn reset(socket: &Socket) {
    let wire = match socket.get_ref() {
        MaybeTlsStream::Plain(wire) => Some(wire),
        MaybeTlsStream::Rustls(tls) => Some(tls.get_ref().0),
        _ => None,
    };
    if let Some(Err(error)) = wire.map(Wire::reset) {
        tracing::debug!(%error, "cannot reset the connection");
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
mod tests {
    use rehearsal::stt::{self, End, Server};

    use super::*;
    use crate::{
        audio::AudioLine,
        config::{Config, Encoding},
        ledger::Ledger,
    };

    const LIMIT: Duration = Duration::from_secs(30);

    struct Rig {
        server: Server,
        registry: Registry,
        provider: Arc<Provider>,
    }

    fn provider(url: &str, key: &str) -> Arc<Provider> {
        let mut config = Config::for_tests().stt;
        config.url = url.parse().expect("URL");
        config.api_key = key.into();
        config.connect_timeout_ms = LIMIT.as_millis() as u64;
        Arc::new(Provider::new(&config))
    }

    fn key() -> StreamKey {
        StreamKey {
            room: "r".into(),
            participant: "p".into(),
            track: "t".into(),
        }
    }

    impl Rig {
        fn new() -> Self {
            let server = Server::start(stt::Config::default()).expect("STT server");
            let provider = provider(&server.url(), server.api_key());
            Self {
                server,
                registry: Registry::new(Ledger::default()),
                provider,
            }
        }

        /// Waits until the books are empty; the server must say that the one stream was
        /// acknowledged.
        async fn closed_by_the_registry(self) {
            tokio::time::timeout(LIMIT, self.registry.drained())
                .await
                .expect("drained");
            let witness = self
                .server
                .wait_for(|w| w.open_now == 0, LIMIT)
                .await
                .expect("closed");
            assert_eq!(witness.streams.len(), 1);
            assert_eq!(
                witness.streams[0].end,
                Some(End::Acknowledged),
                "{witness:#?}"
            );
            let receipts = self.registry.ledger().receipts();
            assert_eq!(receipts.len(), 1);
            assert_eq!(receipts[0].outcome, Outcome::Acknowledged);
            assert_eq!(receipts[0].reason, CloseReason::OwnerLost);
            assert_eq!(self.registry.kernel_sockets().unwrap_or(0), 0);
            self.server.shutdown().await;
        }

        async fn owned(&self) -> Owned {
            let permit = self
                .registry
                .permit(key(), Arc::default(), None)
                .expect("permit");
            let dialled = self.provider.dial().await.expect("dialled");
            permit.connected(dialled.socket_id().expect("its number"));
            let connected = self.provider.upgrade(dialled).await.expect("upgraded");
            let (provider, registry) = (self.provider.clone(), self.registry.clone());
            Owned::new(permit, connected, provider, registry, LIMIT)
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_dropped_handle_closes_the_stream() {
        let rig = Rig::new();
        let open = open(&rig.registry, rig.provider.clone(), key(), LIMIT, None).expect("opening");
        rig.server
            .wait_for(|w| w.open_now == 1, LIMIT)
            .await
            .expect("opened");
        drop(open);
        rig.closed_by_the_registry().await;
    }

    /// Waits until the handshake's request is there. Not `readable`, which may be told of a socket
    /// that has nothing to read.
    async fn asked(tcp: &tokio::net::TcpStream) {
        let there = tcp.peek(&mut [0]).await.expect("a request");
        assert_eq!(there, 1, "the connection ended without a request");
    }

    /// A provider that takes its time with the handshake, and what becomes of it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_handle_dropped_during_the_handshake_closes_the_stream_once_it_is_there() {
        use futures_util::{SinkExt, StreamExt};

        let slow = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("listener");
        let url = format!("ws://{}", slow.local_addr().expect("address"));
        let (registry, provider) = (Registry::new(Ledger::default()), provider(&url, "key"));
        let handle = open(&registry, provider, key(), LIMIT, None).expect("opening");
        let (tcp, _) = slow.accept().await.expect("connection");
        // The handshake's request is on its way; its answer is not.
        asked(&tcp).await;
        drop(handle);
        let mut socket = tokio_tungstenite::accept_async(tcp)
            .await
            .expect("handshake");
        let asked = socket.next().await.expect("message").expect("text");
        assert!(
            asked.to_text().expect("text").contains("CloseStream"),
            "{asked}"
        );
        let metadata = r#"{"type":"Metadata","request_id":"r","duration":0.0}"#;
        socket.send(Message::text(metadata)).await.expect("sent");
        socket.close(None).await.expect("closed");
        while socket.next().await.is_some_and(|message| message.is_ok()) {}
        tokio::time::timeout(LIMIT, registry.drained())
            .await
            .expect("drained");
        let receipts = registry.ledger().receipts();
        assert_eq!(receipts[0].outcome, Outcome::Acknowledged);
        assert_eq!(receipts[0].reason, CloseReason::OwnerLost);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_provider_that_leaves_the_handshake_unanswered_may_have_counted_a_stream() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("listener");
        let url = format!("ws://{}", silent.local_addr().expect("address"));
        let registry = Registry::new(Ledger::default());
        let mut handle =
            open(&registry, provider(&url, "key"), key(), LIMIT, None).expect("opening");
        let (tcp, _) = silent.accept().await.expect("connection");
        // Only now is something asked of the provider.
        asked(&tcp).await;
        let begun = Instant::now();
        handle.close(&CloseOrder {
            reason: CloseReason::TrackEnded,
            deadline: begun + Duration::from_millis(100),
        });
        let settled = handle.settled().await.expect("settled");
        assert!(begun.elapsed() < LIMIT / 2, "not by the order's deadline");
        let phase = Phase::Connecting;
        assert_eq!(settled.outcome, Outcome::TimedOut { phase });
        assert_eq!(registry.kernel_sockets().unwrap_or(0), 0);
    }

    /// With the runtime goes everything; what is left is to say so, and not to hang.
    #[test]
    fn a_runtime_that_ends_with_a_stream_open_cuts_it_and_settles() {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let servers = tokio::runtime::Runtime::new().expect("runtime");
        let rig = servers.block_on(async { Rig::new() });
        let owned = runtime.block_on(rig.owned());
        runtime.spawn(async move {
            let _owned = owned;
            std::future::pending::<()>().await;
        });
        runtime.shutdown_timeout(LIMIT);
        let counts = rig.registry.ledger().counts();
        assert_eq!((counts.peer_gone, counts.unacknowledged_at_the_end), (1, 1));
        assert_eq!(rig.registry.open_now(), 0);
        let cut = servers.block_on(rig.server.wait_for(|w| w.open_now == 0, LIMIT));
        assert_eq!(cut.expect("cut").streams[0].end, Some(End::Abrupt));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_task_that_panics_leaves_its_stream_to_the_reaper() {
        let rig = Rig::new();
        let owned = rig.owned().await;
        let task = tokio::spawn(async move {
            let _owned = owned;
            panic!("a defect, on purpose");
        });
        assert!(task.await.expect_err("it panicked").is_panic());
        rig.closed_by_the_registry().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_task_that_is_aborted_leaves_its_stream_to_the_reaper() {
        let rig = Rig::new();
        let mut owned = rig.owned().await;
        let mut inbox = Inbox {
            commands: None,
            orders: None,
            past_owner: owned.orders(),
            ordered: None,
            orphan_grace: LIMIT,
        };
        let task = tokio::spawn(async move { drive(owned.live_mut(), &mut inbox, None).await });
        task.abort();
        assert!(task.await.expect_err("it was aborted").is_cancelled());
        rig.closed_by_the_registry().await;
    }

    /// What it is given by itself may be more than a shutdown has.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_order_to_all_hurries_the_reaper() {
        let rig = Rig::new();
        rig.server.set_faults(stt::Faults {
            never_answer_close: true,
            ..Default::default()
        });
        drop(rig.owned().await);
        let asked = |w: &stt::Witness| w.streams.iter().any(|stream| stream.close_requested);
        rig.server
            .wait_for(asked, LIMIT)
            .await
            .expect("CloseStream");
        let begun = Instant::now();
        rig.registry.close_all(&CloseOrder {
            reason: CloseReason::OwnerLost,
            deadline: begun + Duration::from_millis(100),
        });
        let drained = tokio::time::timeout(LIMIT, rig.registry.drained());
        drained.await.expect("drained");
        assert!(begun.elapsed() < LIMIT / 2, "not by the order's deadline");
        let phase = Phase::AwaitingAnswer;
        let receipts = rig.registry.ledger().receipts();
        assert_eq!(receipts[0].outcome, Outcome::TimedOut { phase });
        rig.server.shutdown().await;
    }

    /// An owner that is stuck neither hears orders nor lets go.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_order_to_all_passes_a_stuck_owner() {
        let rig = Rig::new();
        let mut stuck =
            open(&rig.registry, rig.provider.clone(), key(), LIMIT, None).expect("opening");
        let (_, header) = AudioLine::new(Encoding::OggOpus, Duration::from_millis(40), 0);
        stuck.audio(header);
        // Past the handshake, where orders are heard elsewhere.
        let streaming = |w: &stt::Witness| w.streams.iter().any(|stream| stream.audio_messages > 0);
        rig.server
            .wait_for(streaming, LIMIT)
            .await
            .expect("streaming");
        rig.registry.seal();
        rig.registry.close_all(&CloseOrder {
            reason: CloseReason::OwnerLost,
            deadline: Instant::now() + LIMIT,
        });
        let settled = stuck.settled().await.expect("settled");
        assert_eq!(settled.outcome, Outcome::Acknowledged);
        let refused = rig.registry.permit(key(), Arc::default(), None);
        assert!(refused.is_err(), "sealed");
        rig.closed_by_the_registry().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_key_never_opens_and_the_receipt_has_the_providers_words() {
        let rig = Rig::new();
        let provider = provider(&rig.server.url(), "wrong-and-secret");
        let mut handle = open(&rig.registry, provider, key(), LIMIT, None).expect("opening");
        let settled = handle.settled().await.expect("settled");
        let Outcome::NeverOpened { detail, .. } = &settled.outcome else {
            panic!("{settled:?}")
        };
        assert!(
            ["401", "INVALID_AUTH", "the key is not accepted"]
                .iter()
                .all(|said| detail.contains(said)),
            "{detail}"
        );
        assert!(!detail.contains("wrong-and-secret"), "{detail}");
        assert_eq!(rig.registry.open_now(), 0);
        rig.server.shutdown().await;
    }
}
