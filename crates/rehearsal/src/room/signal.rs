//! One signalling websocket: protobuf frames between a client and the actor.

use super::{
    core::{Command, Handle, Session},
    faults::Faults,
};
use axum::{
    body::Bytes,
    extract::ws::{CloseFrame, Message, WebSocket, close_code},
};
use livekit_protocol as proto;
use prost::Message as _;
use std::time::Duration;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

/// A client that takes no bytes for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

enum Event {
    /// To the client; None if the actor has dropped it.
    Out(Option<Bytes>),
    /// From the client.
    In(Option<Result<Message, axum::Error>>),
}

/// Serves the websocket until the client goes, the actor drops it or the server is stopped. A cut
/// websocket ends without a word; a frozen one only waits.
pub(super) async fn serve(
    mut socket: WebSocket,
    session: Session,
    core: Handle,
    mut faults: watch::Receiver<Faults>,
    cancel: CancellationToken,
) {
    let Session {
        participant,
        generation,
        mut inbox,
        identity,
        cut,
        vanished,
    } = session;
    let close = loop {
        let gone = vanished.is_cancelled();
        let frozen = gone || faults.borrow_and_update().signal_frozen.includes(&identity);
        let event = async {
            tokio::select! {
                frame = inbox.recv() => Event::Out(frame),
                message = socket.recv() => Event::In(message),
            }
        };
        let event = tokio::select! {
            // Before traffic, so that faults hold at once.
            biased;
            () = cut.cancelled() => break None,
            () = cancel.cancelled() => break Some((close_code::AWAY, "")),
            () = vanished.cancelled(), if !gone => continue,
            Ok(()) = faults.changed(), if !gone => continue,
            event = event, if !frozen => event,
        };
        match event {
            Event::Out(None) => break Some((close_code::NORMAL, "")),
            Event::Out(Some(frame)) => {
                let sent = timeout(WRITE_TIMEOUT, socket.send(Message::Binary(frame))).await;
                if !matches!(sent, Ok(Ok(()))) {
                    break None;
                }
            }
            Event::In(Some(Ok(Message::Binary(bytes)))) => {
                let Ok(request) = proto::SignalRequest::decode(bytes) else {
                    break Some((close_code::INVALID, "cannot decode signal request"));
                };
                // A request of a kind that this protocol version does not know.
                let Some(request) = request.message else {
                    continue;
                };
                let request = Box::new(request);
                let command = Command::Signal {
                    participant,
                    generation,
                    request,
                };
                if core.send(command).await.is_err() {
                    break Some((close_code::AWAY, "")).filter(|_| !cut.is_cancelled());
                }
            }
            Event::In(Some(Ok(Message::Text(_)))) => {
                let reason = "only binary messages are supported";
                break Some((close_code::UNSUPPORTED, reason));
            }
            Event::In(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
            Event::In(Some(Ok(Message::Close(_)) | Err(_)) | None) => break None,
        }
    };
    let closed = Command::SignalClosed {
        participant,
        generation,
    };
    // Fails only when the actor has stopped, and with it the stay.
    let _ = core.send(closed).await;
    if let Some((code, reason)) = close {
        let reason = reason.into();
        let frame = Message::Close(Some(CloseFrame { code, reason }));
        let _ = timeout(WRITE_TIMEOUT, socket.send(frame)).await;
        // Without reading the client's own close the kernel may reset the connection and the
        // last messages with it.
        let goodbye = async { while let Some(Ok(_)) = socket.recv().await {} };
        tokio::select! {
            _ = timeout(WRITE_TIMEOUT, goodbye) => {}
            () = cancel.cancelled() => {}
        }
    }
}
