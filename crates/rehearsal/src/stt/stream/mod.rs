//! One websocket: Deepgram's `/v1/listen` or LiveKit Inference's `/v1/stt`, and the account of
//! how it ended.
//!
//! Everything happens in one task that owns the socket. It waits for one event at a time, and
//! whatever is to be sent goes through the outbox, where faults may hold it back.

mod closing;
mod input;
mod mischief;
mod output;

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::Bytes;
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_util::sync::CancellationToken;

use super::book::Entry;
use super::decode::{DecodeError, Decoder};
use super::dialect::Dialect;
use super::fault_board::FaultWatch;
use super::faults::Faults;
use super::messages::ServerMessage;
use super::parameters::Parameters;
use super::server::Shared;
use super::socket;
use super::transcript::Transcriber;
use super::witness::{End, TcpEnd};

use mischief::Committed;
use output::Outgoing;

/// How a stream and its TCP connection ended.
type Outcome = (End, TcpEnd);
/// `Err` ends the stream.
type Step = Result<(), Outcome>;

/// See the module's description.
pub(super) struct Stream {
    ws: WebSocketStream<TcpStream>,
    entry: Entry,
    shared: Arc<Shared>,
    stop: CancellationToken,
    fault_watch: FaultWatch,
    faults: Faults,
    committed: Committed,
    /// Not before this, if the client is to be read from slowly.
    read_at: Option<Instant>,
    opened: Instant,
    last_input: Instant,
    audio_heard: bool,
    close_requested: bool,
    dialect: Dialect,
    decoder: Decoder,
    transcriber: Transcriber,
    digest: Sha256,
    channels: u32,
    outbox: VecDeque<Outgoing>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Audio is taken.
    Listening,
    /// The last messages are in the outbox; audio is not taken any more. The stream ends as this
    /// once the client has answered the close frame.
    Finishing(End),
    /// The server's close frame is out.
    AwaitingClose { end: End, until: Instant },
    /// The client's close frame came while the server is mute; only the connection's end is left.
    Mute(End),
}

enum Event {
    Received(Option<Result<Message, WsError>>),
    /// The connection ended while the stream was not reading.
    Gone(TcpEnd),
    FaultsChanged,
    Due,
    Stop,
}

impl Stream {
    pub(super) async fn new(
        tcp: TcpStream,
        already_read: Bytes,
        entry: Entry,
        parameters: &Parameters,
        shared: Arc<Shared>,
        stop: CancellationToken,
    ) -> Result<Self, DecodeError> {
        let ws = socket::open(tcp, already_read).await;
        let mut fault_watch = shared.faults.watch(entry.request_id());
        let faults = fault_watch.current();
        let now = Instant::now();
        let mut stream = Self {
            ws,
            decoder: Decoder::new(parameters.format)?,
            transcriber: Transcriber::new(entry.request_id(), parameters),
            shared,
            stop,
            fault_watch,
            faults,
            committed: Committed::default(),
            read_at: None,
            opened: now,
            last_input: now,
            audio_heard: false,
            close_requested: false,
            dialect: Dialect::new(entry.protocol()),
            digest: Sha256::new(),
            channels: parameters.channels,
            outbox: VecDeque::new(),
            phase: Phase::Listening,
            entry,
        };
        if matches!(stream.dialect, Dialect::Flux(_)) {
            stream.queue(&mut vec![ServerMessage::Created]);
        }
        Ok(stream)
    }

    /// Serves the stream until its TCP connection has ended, and records how.
    pub(super) async fn run(mut self) {
        let (end, tcp_end) = loop {
            let event = self.next_event().await;
            if let Err(outcome) = self.handle(event).await {
                break outcome;
            }
            if let Err(outcome) = self.send_due().await {
                break outcome;
            }
        };
        if tcp_end == TcpEnd::CutByServer {
            // A failure means that the connection is gone already.
            let _ = self.ws.get_ref().set_zero_linger();
        }
        let Self {
            ws, entry, shared, ..
        } = self;
        drop(ws);
        tracing::debug!(
            request_id = entry.request_id(),
            ?end,
            ?tcp_end,
            "stream ended"
        );
        let request_id = entry.request_id().to_owned();
        entry.end(end, tcp_end);
        // After the end, so that none can be set any more.
        shared.faults.set(&request_id, None);
    }

    async fn next_event(&mut self) -> Event {
        let deaf = self.faults.stall || matches!(self.phase, Phase::Mute(_));
        let due = self.next_due();
        let pausing = self
            .resume_reading_at()
            .is_some_and(|at| at > Instant::now());
        let ws = &mut self.ws;
        let input = async {
            if deaf {
                Event::Gone(socket::gone(ws.get_ref()).await)
            } else if pausing {
                // What is due next ends the pause; the client's FIN comes after its data.
                Event::Gone(socket::reset(ws.get_ref()).await)
            } else {
                Event::Received(ws.next().await)
            }
        };
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Event::Stop,
            () = self.fault_watch.changed() => Event::FaultsChanged,
            () = sleep_until(due.unwrap_or(self.opened)), if due.is_some() => Event::Due,
            event = input => event,
        }
    }

    async fn handle(&mut self, event: Event) -> Step {
        match event {
            Event::Received(Some(Ok(message))) => self.received(message).await,
            Event::Received(Some(Err(error))) => self.failed(error).await,
            Event::Received(None) => Err((self.end_without_close_frame(), TcpEnd::Fin)),
            Event::Gone(tcp_end) => {
                let end = match &self.phase {
                    Phase::Mute(end) => end.clone(),
                    _ => self.end_without_close_frame(),
                };
                Err((end, tcp_end))
            }
            Event::FaultsChanged => {
                self.faults = self.fault_watch.current();
                self.forgive();
                Ok(())
            }
            Event::Due => self.due().await,
            Event::Stop => {
                self.say_stopping().await;
                Err((End::ServerStopped, TcpEnd::CutByServer))
            }
        }
    }
}
