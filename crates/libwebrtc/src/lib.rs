//! The API of LiveKit's `libwebrtc` crate, as far as the `livekit` SDK uses it, for audio and
//! data, implemented in Rust on [str0m](https://docs.rs/str0m), a sans-IO WebRTC stack.
//!
//! It is put in the genuine crate's place through `[patch.crates-io]`; module and type names are
//! the genuine ones. What it adds is the module `encoded_audio` (feature of the same name): Opus
//! packets as they were on the wire. What it lacks returns an [`RtcError`] that says so, or is
//! inert: sending video, decoding video, audio devices, frame encryption. PCM is encoded and decoded
//! by libopus, on the engine's threads, and only for those who ask for it.
//!
//! Inside: [`peer_connection::PeerConnection`] and its objects are thin handles; `engine::session`
//! holds all protocol state and never touches a socket or a clock; `engine::network` owns the
//! sockets (UDP, TCP, relays) and `engine::driver` the clock, in one task for each peer connection,
//! on a small runtime of this crate's own.

mod conceal;
mod engine;
mod enum_dispatch;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod opus;
mod pcm;
mod playout;
mod queue;
mod resample;

pub mod audio_frame;
pub mod audio_source;
pub mod audio_stream;
pub mod audio_track;
pub mod data_channel;
#[cfg(feature = "encoded-audio")]
pub mod encoded_audio;
#[cfg(not(feature = "encoded-audio"))]
#[allow(dead_code)]
mod encoded_audio;
pub mod ice_candidate;
pub mod media_stream;
pub mod media_stream_track;
pub mod native;
pub mod peer_connection;
pub mod peer_connection_factory;
pub mod prelude;
pub mod rtp_parameters;
pub mod rtp_receiver;
pub mod rtp_sender;
pub mod rtp_transceiver;
pub mod session_description;
pub mod stats;
pub mod video_frame;
pub mod video_source;
pub mod video_stream;
pub mod video_track;

/// What a media section or a track carries.
#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum MediaType {
    Audio,
    Video,
    Data,
    Unsupported,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum RtcErrorType {
    /// The engine, the operating system or a limit of this implementation.
    Internal,
    /// A description or a candidate that can't be used.
    InvalidSdp,
    /// Not possible in the object's present state.
    InvalidState,
}

#[derive(thiserror::Error, Debug)]
#[error("an RtcError occurred: {error_type:?} - {message}")]
pub struct RtcError {
    pub error_type: RtcErrorType,
    pub message: String,
}

impl RtcError {
    pub(crate) fn internal(message: impl ToString) -> Self {
        Self {
            error_type: RtcErrorType::Internal,
            message: message.to_string(),
        }
    }

    pub(crate) fn invalid_sdp(message: impl ToString) -> Self {
        Self {
            error_type: RtcErrorType::InvalidSdp,
            message: message.to_string(),
        }
    }

    pub(crate) fn invalid_state(message: impl ToString) -> Self {
        Self {
            error_type: RtcErrorType::InvalidState,
            message: message.to_string(),
        }
    }

    pub(crate) fn unsupported(what: &str) -> Self {
        Self::internal(format!("{what} is not supported by this engine"))
    }

    pub(crate) fn closed() -> Self {
        Self::invalid_state("the peer connection is closed")
    }
}
