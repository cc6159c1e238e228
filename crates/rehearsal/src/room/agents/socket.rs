//! One worker's websocket: protobuf or JSON frames between a worker and the actor.

use super::Registered;
use crate::room::{
    core::{Command, Handle},
    participant::Inbox,
    witness::unix_ms,
};
use axum::{
    body::Bytes,
    extract::ws::{Message, WebSocket},
};
use livekit_protocol::{self as proto, server_message, worker_message};
use prost::Message as _;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;

/// How long a worker may take to register. LiveKit's limit.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the server sends a websocket ping. LiveKit's interval; the pong is not awaited.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A worker that takes no bytes for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the websocket until the worker goes, the actor drops it or the server is stopped. As
/// LiveKit's server does, it closes the connection without a close frame.
pub(in crate::room) async fn serve(socket: WebSocket, core: Handle, cancel: CancellationToken) {
    let mut socket = Socket {
        socket,
        json: false,
    };
    let serve = async {
        let registered = timeout(REGISTER_TIMEOUT, socket.register(&core)).await;
        if let Ok(Some(Registered { worker, inbox })) = registered {
            let ended = cancel.run_until_cancelled(socket.run(&worker, inbox, &core));
            ended.await;
            let closed = move |core: &mut crate::room::core::Core| core.worker_closed(&worker);
            // Fails only when the actor has stopped, and with it all jobs.
            let _ = core.send(Command::Call(Box::new(closed))).await;
        }
    };
    tokio::select! {
        () = serve => {}
        () = cancel.cancelled() => {}
    }
}

struct Socket {
    socket: WebSocket,
    /// The worker's last frame was JSON; it is answered in kind.
    json: bool,
}

impl Socket {
    /// Waits for the registration; None if the worker says anything else but ping.
    async fn register(&mut self, core: &Handle) -> Option<Registered> {
        loop {
            match self.recv().await? {
                worker_message::Message::Register(request) => {
                    let json = self.json;
                    let register = core
                        .call(move |core| core.register_worker(request, json))
                        .await;
                    return register.ok().flatten();
                }
                worker_message::Message::Ping(ping) => self.send(pong(&ping)).await?,
                _ => return None,
            }
        }
    }

    async fn run(&mut self, worker: &str, mut inbox: Inbox, core: &Handle) -> Option<()> {
        let mut ping = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                frame = inbox.recv() => self.send(frame?).await?,
                message = self.recv() => match message? {
                    worker_message::Message::Ping(ping) => self.send(pong(&ping)).await?,
                    message => {
                        let worker = worker.to_owned();
                        let handle = move |core: &mut crate::room::core::Core| {
                            core.worker_message(&worker, message);
                        };
                        core.send(Command::Call(Box::new(handle))).await.ok()?;
                    }
                },
                _ = ping.tick() => self.write(Message::Ping(Bytes::new())).await?,
            }
        }
    }

    /// The next message; None if the websocket is closed or the frame makes no sense. Cancel
    /// safe.
    async fn recv(&mut self) -> Option<worker_message::Message> {
        loop {
            let decoded = match self.socket.recv().await?.ok()? {
                Message::Binary(bytes) => {
                    self.json = false;
                    proto::WorkerMessage::decode(bytes).ok()
                }
                Message::Text(text) => {
                    self.json = true;
                    serde_json::from_str::<proto::WorkerMessage>(&text).ok()
                }
                Message::Ping(_) | Message::Pong(_) => continue,
                Message::Close(_) => return None,
            };
            return decoded.and_then(|m| m.message);
        }
    }

    /// Sends an encoded `ServerMessage`, as JSON if the worker speaks that.
    async fn send(&mut self, frame: Bytes) -> Option<()> {
        let message = if self.json {
            let message = proto::ServerMessage::decode(frame).ok()?;
            Message::Text(serde_json::to_string(&message).ok()?.into())
        } else {
            Message::Binary(frame)
        };
        self.write(message).await
    }

    async fn write(&mut self, message: Message) -> Option<()> {
        let sent = timeout(WRITE_TIMEOUT, self.socket.send(message)).await;
        sent.ok()?.ok()
    }
}

/// A message to a worker as it goes over the wire in protobuf.
pub(super) fn frame(message: server_message::Message) -> Bytes {
    let message = Some(message);
    proto::ServerMessage { message }.encode_to_vec().into()
}

fn pong(ping: &proto::WorkerPing) -> Bytes {
    frame(server_message::Message::Pong(proto::WorkerPong {
        last_timestamp: ping.timestamp,
        timestamp: unix_ms() as i64,
    }))
}
