//! Names, reasons and outcomes. Knows no runtime and does no IO.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::failure::{Cause, Failure};

/// What a stream carries: one audio track of one participant in one room.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamKey {
    pub room: String,
    /// LiveKit participant identity.
    pub participant: String,
    /// LiveKit track SID (`TR_...`).
    pub track: String,
}

impl fmt::Display for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.room, self.participant, self.track)
    }
}

/// What a stream was asked of the provider for; settled when it is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    /// The provider's host, with its port if that is an unusual one.
    pub provider: String,
    pub model: String,
    /// None if the provider's default holds.
    pub language: Option<String>,
    pub encoding: String,
}

/// Process-wide number of a stream, in the order of its permit; names it in logs and receipts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamId(pub u64);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Why a scope (stream, session, room, daemon) is closed. Ordered by strength: when two causes
/// meet, the stronger one is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CloseReason {
    /// The participant, not muted, has sent nothing for a while; the next packet opens another.
    Idle,
    /// The participant has been silent for a while; their next words open another.
    Parked,
    /// The track was unpublished or its subscription ended.
    TrackEnded,
    /// The provider or the network ended the stream; the session may open another.
    StreamFailed,
    /// The participant is still there and no longer one of those who are transcribed.
    Deselected,
    /// Somebody asked for it, by the control API.
    Requested,
    /// The gateway's client asked for it, or has gone; how.
    ClientDone(String),
    /// The participant is gone; LiveKit's disconnect reason in lower case.
    ParticipantLeft(String),
    /// The agent job is over that the room was transcribed for, and nobody else wants it; why.
    JobEnded(String),
    /// The room is gone or we are out of it; LiveKit's disconnect reason in lower case.
    RoomEnded(String),
    /// The task that wanted the stream vanished without closing it (panic, abort).
    OwnerLost,
    /// The daemon stops: signal or API.
    Shutdown(String),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("no audio from the participant"),
            Self::Parked => f.write_str("parked: the participant is silent"),
            Self::TrackEnded => f.write_str("track ended"),
            Self::StreamFailed => f.write_str("stream failed"),
            Self::Deselected => f.write_str("no longer selected"),
            Self::Requested => f.write_str("requested"),
            Self::ClientDone(how) => write!(f, "the gateway's client {how}"),
            Self::ParticipantLeft(why) => write!(f, "participant left ({why})"),
            Self::JobEnded(why) => write!(f, "agent job ended ({why})"),
            Self::RoomEnded(why) => write!(f, "room ended ({why})"),
            Self::OwnerLost => f.write_str("owner lost"),
            Self::Shutdown(why) => write!(f, "shutdown ({why})"),
        }
    }
}

/// Where a stream was when its deadline ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// DNS, TCP, TLS or the websocket handshake.
    Connecting,
    /// Audio under way to the provider, which takes no more.
    Flushing,
    /// CloseStream sent, its answer not yet complete.
    AwaitingAnswer,
    /// Answered, but the provider does not end the connection.
    AwaitingEnd,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Flushing => "flushing",
            Self::AwaitingAnswer => "awaiting the answer to CloseStream",
            Self::AwaitingEnd => "awaiting the connection's end",
        })
    }
}

/// How a stream ended. Anything but `Acknowledged` says why there is no acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Outcome {
    /// The provider answered CloseStream in full and the connection is closed.
    Acknowledged,
    /// The deadline passed in this phase; the connection was reset.
    TimedOut { phase: Phase },
    /// The provider or the network ended the stream before we asked, or instead of answering.
    PeerGone {
        detail: String,
        /// None if it was neither, but our own task that died.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Box<Failure>>,
    },
    /// No websocket came to be, so there was nothing to close.
    NeverOpened {
        detail: String,
        /// None if we gave it up ourselves.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Box<Failure>>,
    },
}

impl Outcome {
    pub fn peer_gone(failure: Failure) -> Self {
        Self::PeerGone {
            detail: failure.to_string(),
            failure: Some(Box::new(failure)),
        }
    }

    pub fn never_opened(failure: Failure) -> Self {
        Self::NeverOpened {
            detail: failure.to_string(),
            failure: Some(Box::new(failure)),
        }
    }

    /// What the provider or the network did to end or refuse the stream, if they did.
    pub fn failure(&self) -> Option<Failure> {
        match self {
            Self::Acknowledged => None,
            Self::TimedOut { phase } => Some(Failure::new(Cause::Timeout(*phase), "")),
            Self::PeerGone { failure, .. } | Self::NeverOpened { failure, .. } => {
                failure.as_deref().cloned()
            }
        }
    }

    /// Whether the provider counted a stream, or may have.
    pub fn opened(&self) -> bool {
        !matches!(self, Self::NeverOpened { .. })
    }

    /// Without what there is to say of it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Acknowledged => "acknowledged",
            Self::TimedOut { .. } => "timed_out",
            Self::PeerGone { .. } => "peer_gone",
            Self::NeverOpened { .. } => "never_opened",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acknowledged => f.write_str("acknowledged"),
            Self::TimedOut { phase } => write!(f, "timed out {phase}"),
            Self::PeerGone { detail, .. } => write!(f, "peer gone: {detail}"),
            Self::NeverOpened { detail, .. } => write!(f, "never opened: {detail}"),
        }
    }
}

/// What went over a stream, and what the provider said of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamTotals {
    /// The provider's id of the stream (`dg-request-id`, or `request_id` in its messages).
    pub request_id: Option<String>,
    /// Seconds of audio sent, silence filled in included.
    pub audio_seconds: f64,
    /// Bytes of audio sent, container included.
    pub audio_bytes: u64,
    /// `Metadata.duration`: the seconds that the provider says it processed.
    pub provider_seconds: Option<f64>,
}

/// One stretch of transcribed speech.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Transcript {
    pub room: String,
    pub participant: String,
    pub track: String,
    /// The same for all interim results and the final one of one stretch of speech.
    pub segment: String,
    pub is_final: bool,
    pub text: String,
    /// Start on the stream's time line: seconds of audio since the track's first packet.
    pub start: f64,
    /// Seconds.
    pub duration: f64,
    /// 0..=1, as the provider gives it.
    pub confidence: f64,
}

/// Delay before try number `attempt` (from 0) of something that failed: doubling from `first` to
/// `most`, the upper half drawn by `random` in 0..1 so that many do not come back at once.
pub fn backoff(attempt: u32, first: Duration, most: Duration, random: f64) -> Duration {
    let full = first.saturating_mul(1u32 << attempt.min(16)).min(most);
    full.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stronger_reasons_win() {
        let left = CloseReason::ParticipantLeft("client_initiated".into());
        let stop = CloseReason::Shutdown("SIGTERM".into());
        assert_eq!(left.clone().max(stop.clone()), stop);
        assert!(CloseReason::TrackEnded < left);
    }

    #[test]
    fn backoff_doubles_and_is_bounded() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(5));
        assert_eq!(backoff(0, first, most, 1.0), first);
        assert_eq!(backoff(3, first, most, 1.0), Duration::from_millis(800));
        assert_eq!(backoff(3, first, most, 0.0), Duration::from_millis(400));
        assert_eq!(backoff(60, first, most, 1.0), most);
    }
}
