use std::{
    fmt,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use str0m::media::Mid;

use crate::{
    MediaType, RtcError,
    engine::Peer,
    rtp_parameters::{RtpCodecCapability, RtpEncodingParameters},
    rtp_receiver::RtpReceiver,
    rtp_sender::RtpSender,
};

#[derive(Debug, Clone)]
pub struct RtpTransceiverInit {
    pub direction: RtpTransceiverDirection,
    pub stream_ids: Vec<String>,
    pub send_encodings: Vec<RtpEncodingParameters>,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum RtpTransceiverDirection {
    SendRecv,
    SendOnly,
    RecvOnly,
    Inactive,
    Stopped,
}

impl RtpTransceiverDirection {
    pub(crate) fn sends(self) -> bool {
        matches!(self, Self::SendRecv | Self::SendOnly)
    }

    pub(crate) fn receives(self) -> bool {
        matches!(self, Self::SendRecv | Self::RecvOnly)
    }

    pub(crate) fn of(sends: bool, receives: bool) -> Self {
        match (sends, receives) {
            (true, true) => Self::SendRecv,
            (true, false) => Self::SendOnly,
            (false, true) => Self::RecvOnly,
            (false, false) => Self::Inactive,
        }
    }
}

/// A media section, with its sender and its receiver.
#[derive(Clone)]
pub struct RtpTransceiver {
    inner: Arc<Inner>,
}

struct Inner {
    kind: MediaType,
    /// Stream that the sender's track is announced in.
    stream_id: Option<String>,
    state: Mutex<State>,
    sender: RtpSender,
    receiver: RtpReceiver,
}

struct State {
    mid: Option<Mid>,
    direction: RtpTransceiverDirection,
    current_direction: Option<RtpTransceiverDirection>,
}

impl RtpTransceiver {
    pub(crate) fn new(kind: MediaType, init: RtpTransceiverInit, peer: Weak<Peer>) -> Self {
        Self {
            inner: Arc::new(Inner {
                kind,
                stream_id: init.stream_ids.into_iter().next(),
                state: Mutex::new(State {
                    mid: None,
                    direction: init.direction,
                    current_direction: None,
                }),
                sender: RtpSender::new(peer.clone(), init.send_encodings),
                receiver: RtpReceiver::new(kind, peer),
            }),
        }
    }

    pub fn mid(&self) -> Option<String> {
        self.bound_mid().map(|mid| mid.to_string())
    }

    /// As negotiated last.
    pub fn current_direction(&self) -> Option<RtpTransceiverDirection> {
        self.inner.state.lock().current_direction
    }

    /// As wanted for the next offer or answer.
    pub fn direction(&self) -> RtpTransceiverDirection {
        self.inner.state.lock().direction
    }

    pub fn sender(&self) -> RtpSender {
        self.inner.sender.clone()
    }

    pub fn receiver(&self) -> RtpReceiver {
        self.inner.receiver.clone()
    }

    /// Without effect: the engine knows one audio codec.
    pub fn set_codec_preferences(&self, _codecs: Vec<RtpCodecCapability>) -> Result<(), RtcError> {
        Ok(())
    }

    /// Neither sends nor receives after the next negotiation.
    pub fn stop(&self) -> Result<(), RtcError> {
        self.set_direction(RtpTransceiverDirection::Stopped);
        Ok(())
    }

    pub(crate) fn kind(&self) -> MediaType {
        self.inner.kind
    }

    pub(crate) fn stream_id(&self) -> Option<&str> {
        self.inner.stream_id.as_deref()
    }

    pub(crate) fn bound_mid(&self) -> Option<Mid> {
        self.inner.state.lock().mid
    }

    pub(crate) fn bind(&self, mid: Option<Mid>) {
        self.inner.state.lock().mid = mid;
        self.inner.sender.set_mid(mid);
    }

    pub(crate) fn set_direction(&self, direction: RtpTransceiverDirection) {
        self.inner.state.lock().direction = direction;
    }

    pub(crate) fn set_current_direction(&self, direction: RtpTransceiverDirection) {
        self.inner.state.lock().current_direction = Some(direction);
    }
}

impl fmt::Debug for RtpTransceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RtpTransceiver")
            .field("mid", &self.mid())
            .field("direction", &self.direction())
            .field("sender", &self.sender())
            .field("receiver", &self.receiver())
            .finish()
    }
}
