use std::{
    fmt,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::{
    MediaType, RtcError,
    audio_track::RtcAudioTrack,
    engine::{Of, Peer},
    media_stream::MediaStream,
    media_stream_track::MediaStreamTrack,
    native::create_random_uuid,
    rtp_parameters::RtpParameters,
    stats::RtcStats,
    video_track::RtcVideoTrack,
};

/// The receiving half of a transceiver.
#[derive(Clone)]
pub struct RtpReceiver {
    inner: Arc<Inner>,
}

struct Inner {
    peer: Weak<Peer>,
    kind: MediaType,
    state: Mutex<State>,
}

struct State {
    track: MediaStreamTrack,
    /// The remote side's `a=msid`, while it sends.
    msid: Option<Msid>,
    /// The remote side's `a=ssrc`; empty if it named none.
    ssrcs: Vec<u32>,
}

/// Stream and track id as in `a=msid` (RFC 8830).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Msid {
    pub stream: String,
    pub track: String,
}

/// How a new remote description changed what a receiver gets.
#[derive(Debug, Default)]
pub(crate) struct ReceiverChange {
    /// A track that was not there before.
    pub added: bool,
    /// Sources that do not belong to the section any more.
    pub stale_ssrcs: Vec<u32>,
}

impl RtpReceiver {
    /// With a track that nothing arrives on until a remote description announces one.
    pub(crate) fn new(kind: MediaType, peer: Weak<Peer>) -> Self {
        let track = new_track(kind, create_random_uuid());
        Self {
            inner: Arc::new(Inner {
                peer,
                kind,
                state: Mutex::new(State {
                    track,
                    msid: None,
                    ssrcs: Vec::new(),
                }),
            }),
        }
    }

    pub fn track(&self) -> Option<MediaStreamTrack> {
        Some(self.inner.state.lock().track.clone())
    }

    pub fn stream_ids(&self) -> Vec<String> {
        let state = self.inner.state.lock();
        state.msid.iter().map(|msid| msid.stream.clone()).collect()
    }

    pub fn streams(&self) -> Vec<MediaStream> {
        let state = self.inner.state.lock();
        let stream = |msid: &Msid| MediaStream::new(msid.stream.clone(), state.track.clone());
        state.msid.iter().map(stream).collect()
    }

    /// Of this receiver and the transport; see the peer connection's. Empty once that is gone.
    pub async fn get_stats(&self) -> Result<Vec<RtcStats>, RtcError> {
        let peer = self.inner.peer.upgrade();
        Ok(peer.map_or_else(Vec::new, |peer| peer.session().stats(Of::Receiver(self))))
    }

    pub fn parameters(&self) -> RtpParameters {
        match self.inner.kind {
            MediaType::Audio => RtpParameters::opus(),
            MediaType::Video | MediaType::Data | MediaType::Unsupported => RtpParameters::default(),
        }
    }

    /// Takes over what a remote description says of this section; `msid` is None if the remote
    /// side does not send. A track that is withdrawn or replaced ends.
    pub(crate) fn announce(&self, msid: Option<Msid>, ssrcs: Vec<u32>) -> ReceiverChange {
        let mut state = self.inner.state.lock();
        let stale_ssrcs = state
            .ssrcs
            .iter()
            .copied()
            .filter(|s| !ssrcs.contains(s))
            .collect();
        state.ssrcs = ssrcs;
        if state.msid == msid {
            return ReceiverChange {
                added: false,
                stale_ssrcs,
            };
        }
        let ended = match &msid {
            Some(msid) => {
                let id = if msid.track.is_empty() {
                    create_random_uuid()
                } else {
                    msid.track.clone()
                };
                std::mem::replace(&mut state.track, new_track(self.inner.kind, id))
            }
            None => state.track.clone(),
        };
        let added = msid.is_some();
        state.msid = msid;
        drop(state);
        ended.end();
        ReceiverChange { added, stale_ssrcs }
    }

    pub(crate) fn is(&self, other: &RtpReceiver) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The audio track for a packet of this source, unless the remote side named others.
    pub(crate) fn audio_track(&self, ssrc: u32) -> Option<RtcAudioTrack> {
        let state = self.inner.state.lock();
        if !state.ssrcs.is_empty() && !state.ssrcs.contains(&ssrc) {
            return None;
        }
        match &state.track {
            MediaStreamTrack::Audio(track) => Some(track.clone()),
            MediaStreamTrack::Video(_) => None,
        }
    }

    /// Ends the present track. For whoever asked for decryption that this engine does not have.
    pub(crate) fn bar(&self) {
        if let MediaStreamTrack::Audio(track) = self.inner.state.lock().track.clone() {
            track.bar();
        }
    }

    pub(crate) fn end(&self) {
        let track = self.inner.state.lock().track.clone();
        track.end();
    }
}

impl fmt::Debug for RtpReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RtpReceiver")
            .field("track", &self.track())
            .finish()
    }
}

fn new_track(kind: MediaType, id: String) -> MediaStreamTrack {
    match kind {
        MediaType::Video => MediaStreamTrack::Video(RtcVideoTrack::new(id)),
        MediaType::Audio | MediaType::Data | MediaType::Unsupported => {
            MediaStreamTrack::Audio(RtcAudioTrack::new(id, None))
        }
    }
}
