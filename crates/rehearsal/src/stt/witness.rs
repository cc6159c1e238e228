//! What the server saw on its own sockets: which streams opened and how each of them ended.
//!
//! The account's shape; the book writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The server's account of all streams, judged from its own sockets alone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Witness {
    /// Streams whose TCP connection has not ended.
    pub open_now: usize,
    /// The most that were open at once.
    pub peak: usize,
    /// Streams that a provider would count as concurrent: the open ones, and those that ended
    /// without the protocol's own close, for [`Config::abrupt_linger`](super::Config).
    pub counted_now: usize,
    /// The same by the key they were opened with, of which each protocol has one.
    pub counted: BTreeMap<Protocol, usize>,
    /// Streams ever opened.
    pub opened: u64,
    /// Decoded audio of all `/v1/listen` streams, forgotten ones included, in seconds.
    pub listen_seconds: f64,
    /// Refused handshakes by HTTP status.
    pub rejected: BTreeMap<u16, u64>,
    /// Handshakes that were left without an answer, because a fault was asked for.
    pub held_handshakes: u64,
    /// Ended streams that are no longer in `streams`.
    pub forgotten: u64,
    /// Every stream, oldest first.
    pub streams: Vec<StreamRecord>,
}

/// One stream. Times are in milliseconds since the server started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamRecord {
    /// Increases by one a stream.
    pub id: u64,
    /// What the client spoke.
    pub protocol: Protocol,
    /// As sent in `dg-request-id` and in the messages.
    pub request_id: String,
    /// The last characters of the key that was used.
    pub key: String,
    /// Query parameters of the handshake, in order, and what session.create adds to them; values
    /// that may hold secrets are masked.
    pub parameters: Vec<(String, String)>,
    /// When the handshake was accepted.
    pub opened_ms: u64,
    /// When the first audio came.
    pub first_audio_ms: Option<u64>,
    /// When the last audio came.
    pub last_audio_ms: Option<u64>,
    /// When CloseStream or session.close came.
    pub close_requested_ms: Option<u64>,
    /// When the TCP connection ended.
    pub ended_ms: Option<u64>,
    /// When it stopped counting as concurrent.
    pub freed_ms: Option<u64>,
    /// Decoded audio, in seconds.
    pub audio_seconds: f64,
    /// Payload of the audio messages, as it was before base64.
    pub audio_bytes: u64,
    /// Audio messages that were not empty.
    pub audio_messages: u64,
    /// Audio messages without payload, which Deepgram advises against.
    pub empty_audio_messages: u64,
    /// Text messages.
    pub texts: TextCounts,
    /// Results sent, interim ones included.
    pub results_sent: u64,
    /// Results sent with `is_final`.
    pub finals_sent: u64,
    /// CloseStream or session.close was received.
    pub close_requested: bool,
    /// Metadata or session.closed was written to the socket.
    pub metadata_sent: bool,
    /// Code of the close frame that the server sent of its own accord.
    pub close_code_sent: Option<u16>,
    /// Code of the client's close frame; 1005 if it had none (RFC 6455, 7.1.5).
    pub close_code_received: Option<u16>,
    /// How the stream ended; `None` while its TCP connection is open.
    pub end: Option<End>,
    /// Who ended the TCP connection, and how.
    pub tcp_end: Option<TcpEnd>,
}

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// Deepgram's `/v1/listen`.
    Listen,
    /// Deepgram Flux's `/v2/listen`.
    Flux,
    /// LiveKit Inference's `/v1/stt`.
    Inference,
}

/// Text messages received, by type; those that carry audio are not counted here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextCounts {
    /// `KeepAlive`
    pub keep_alive: u64,
    /// `Finalize`, `session.finalize`
    pub finalize: u64,
    /// `CloseStream`, `session.close`
    pub close_stream: u64,
    /// `session.create`
    pub create: u64,
    /// `session.update`
    pub update: u64,
    /// Anything else, whether it was JSON or not, and binary messages where they don't belong.
    pub other: u64,
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum End {
    /// CloseStream came, Metadata was sent, and the websocket close handshake was completed (the
    /// client's close frame came back) before the TCP connection ended. The only good one. With
    /// LiveKit Inference: session.close, session.closed, and the same handshake.
    Acknowledged,
    /// The client's close frame came without CloseStream, or before the answer to it.
    CloseFrame {
        /// 1005 if the frame had none.
        code: u16,
    },
    /// The TCP connection ended without a close frame from the client.
    Abrupt,
    /// Neither audio nor text came in time: closed with 1011 NET-0001 (Inference: error 2007).
    TimedOut,
    /// The audio could not be decoded: closed with 1008 DATA-0000.
    Undecodable,
    /// The client broke the websocket protocol, a size limit, or the protocol of its session.
    ProtocolError {
        /// Close code that it was told.
        code: u16,
    },
    /// An empty binary message ended the stream, the way that predates CloseStream.
    EmptyAudio,
    /// The client left the server's close frame unanswered until the server gave up.
    CloseUnanswered,
    /// The client did not read, so that the server could not write.
    NotReading,
    /// A fault that the server was told to commit.
    ServerFault {
        /// Name of the field in [`Faults`](super::Faults).
        fault: String,
    },
    /// The server was shut down.
    ServerStopped,
    /// The server lost the stream: its task panicked or was aborted.
    Lost,
}

/// How a TCP connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TcpEnd {
    /// The client's FIN came.
    Fin,
    /// The client reset it.
    Reset,
    /// The server cut it.
    CutByServer,
}

impl End {
    /// The client went, or had to be cut off, without the protocol's own close, so that a provider
    /// may go on counting the stream for a while. Ends that the server decided on are none of
    /// these.
    pub fn is_abrupt(&self) -> bool {
        match self {
            Self::Abrupt
            | Self::CloseFrame { .. }
            | Self::ProtocolError { .. }
            | Self::CloseUnanswered
            | Self::NotReading => true,
            Self::Acknowledged
            | Self::TimedOut
            | Self::Undecodable
            | Self::EmptyAudio
            | Self::ServerFault { .. }
            | Self::ServerStopped
            | Self::Lost => false,
        }
    }
}

impl Witness {
    /// The stream with this request id.
    pub fn stream(&self, request_id: &str) -> Option<&StreamRecord> {
        self.streams.iter().find(|s| s.request_id == request_id)
    }

    /// Streams known to have ended other than [`End::Acknowledged`].
    pub fn unacknowledged(&self) -> impl Iterator<Item = &StreamRecord> {
        self.streams
            .iter()
            .filter(|s| s.end.as_ref().is_some_and(|end| *end != End::Acknowledged))
    }

    /// Refused handshakes of every status.
    pub fn rejections(&self) -> u64 {
        self.rejected.values().sum()
    }
}
