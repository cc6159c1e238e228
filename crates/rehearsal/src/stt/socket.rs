//! The websocket and the TCP connection below it: limits, close frames, and how they end.

use std::time::Duration;

use axum::body::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::witness::TcpEnd;

/// A second of the largest PCM is well below it.
const MAX_MESSAGE: usize = 1024 * 1024;
/// Instead of the library's 128 KiB a stream: audio comes in small pieces.
const READ_BUFFER: usize = 8 * 1024;
const MAX_WRITE_BUFFER: usize = 1024 * 1024;
/// RFC 6455, 5.5: 125 bytes, of which the code takes two.
const MAX_CLOSE_REASON: usize = 123;
/// How often a stalled stream looks whether its connection still exists.
const STALL_CHECK: Duration = Duration::from_millis(20);

/// What a websocket's error means.
pub(super) enum Failure {
    /// The TCP connection ended.
    Ended(TcpEnd),
    /// The client broke the protocol or a limit; it is to be told this code.
    Violation { close_code: u16 },
}

/// The server's end of a websocket whose handshake is over.
pub(super) async fn open(tcp: TcpStream, already_read: Bytes) -> WebSocketStream<TcpStream> {
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .max_write_buffer_size(MAX_WRITE_BUFFER);
    let already_read = already_read.to_vec();
    WebSocketStream::from_partially_read(tcp, already_read, Role::Server, Some(limits)).await
}

/// Sorts the errors of a websocket.
pub(super) fn failure(error: &Error) -> Failure {
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)
        | Error::ConnectionClosed
        | Error::AlreadyClosed => Failure::Ended(TcpEnd::Fin),
        Error::Io(_) => Failure::Ended(TcpEnd::Reset),
        Error::Capacity(_) => Failure::Violation { close_code: 1009 },
        Error::Utf8(_) => Failure::Violation { close_code: 1007 },
        _ => Failure::Violation { close_code: 1002 },
    }
}

/// What RFC 6455, 7.4.1 reads from a close frame without a code.
pub(super) const NO_STATUS: u16 = 1005;

/// A close frame, with a code unless that is [`NO_STATUS`]; the reason is cut to what one can hold.
pub(super) fn close_frame(code: u16, reason: &str) -> Message {
    if code == NO_STATUS {
        return Message::Close(None);
    }
    Message::Close(Some(CloseFrame {
        code: CloseCode::from(code),
        reason: Utf8Bytes::from(cut(reason, MAX_CLOSE_REASON)),
    }))
}

/// Ends the sending half and waits for the client to end the other.
pub(super) async fn read_to_end(tcp: &mut TcpStream) -> TcpEnd {
    if tcp.shutdown().await.is_err() {
        return TcpEnd::Reset;
    }
    let mut discarded = [0; 4096];
    loop {
        match tcp.read(&mut discarded).await {
            Ok(0) => return TcpEnd::Fin,
            Ok(_) => {}
            Err(_) => return TcpEnd::Reset,
        }
    }
}

/// Waits for the connection's end without reading from it.
pub(super) async fn gone(tcp: &TcpStream) -> TcpEnd {
    loop {
        match tcp.ready(Interest::READABLE | Interest::ERROR).await {
            Err(_) => return TcpEnd::Reset,
            Ok(ready) if ready.is_error() || ready.is_write_closed() => return TcpEnd::Reset,
            Ok(ready) if ready.is_read_closed() => return TcpEnd::Fin,
            // Unread input keeps the socket ready, and to clear that would lose the input's
            // wake-up for when the stall is over: look again after a while instead.
            Ok(_) => sleep(STALL_CHECK).await,
        }
    }
}

/// Waits for the connection to be reset without reading from it.
pub(super) async fn reset(tcp: &TcpStream) -> TcpEnd {
    loop {
        match tcp.ready(Interest::READABLE | Interest::ERROR).await {
            Err(_) => return TcpEnd::Reset,
            Ok(ready) if ready.is_error() || ready.is_write_closed() => return TcpEnd::Reset,
            Ok(_) => sleep(STALL_CHECK).await,
        }
    }
}

/// At most `len` bytes of `text`, whole characters.
fn cut(text: &str, len: usize) -> String {
    text.char_indices()
        .take_while(|(index, character)| index + character.len_utf8() <= len)
        .map(|(_, character)| character)
        .collect()
}
