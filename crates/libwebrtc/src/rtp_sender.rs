use std::{
    fmt,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use str0m::media::Mid;

use crate::{
    RtcError,
    audio_source::native::NativeAudioSource,
    engine::{Of, Peer},
    media_stream_track::MediaStreamTrack,
    opus::{DTX_LEN, Encoder, MAX_PACKET, PACKET_TICKS, Settings},
    pcm::Pcm,
    rtp_parameters::{RtpEncodingParameters, RtpParameters},
    stats::RtcStats,
};

/// Bits per second of each channel, if nobody says otherwise.
const DEFAULT_BITRATE: u32 = 32_000;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum VideoEncoderBackend {
    #[default]
    Auto,
    Software,
    Hardware,
    Nvenc,
    Vaapi,
    VideoToolbox,
    PreEncoded,
}

impl VideoEncoderBackend {
    /// Empty: this engine does not encode video.
    pub fn list_available() -> impl IntoIterator<Item = VideoEncoderBackend> {
        []
    }
}

/// The sending half of a transceiver.
#[derive(Clone)]
pub struct RtpSender {
    pub(crate) inner: Arc<SenderInner>,
}

impl RtpSender {
    pub(crate) fn new(peer: Weak<Peer>, encodings: Vec<RtpEncodingParameters>) -> Self {
        let encodings = if encodings.is_empty() {
            vec![RtpEncodingParameters::default()]
        } else {
            encodings
        };
        let random = uuid::Uuid::new_v4().as_u64_pair();
        Self {
            inner: Arc::new(SenderInner {
                peer,
                state: Mutex::new(SenderState {
                    track: None,
                    parameters: RtpParameters {
                        encodings,
                        ..RtpParameters::default()
                    },
                    mid: None,
                    // Random starts (RFC 3550, 5.1); the sequence number in the lower half, so
                    // that a receiver can't miss the first roll-over (RFC 3711, 3.3.1).
                    timestamp: random.0 as u32,
                    sequence: random.1 & 0x7fff,
                    gap: true,
                    barred: false,
                    wish: Wish::default(),
                    sent: Sent::default(),
                }),
                encoder: Mutex::default(),
            }),
        }
    }

    pub fn track(&self) -> Option<MediaStreamTrack> {
        self.inner.state.lock().track.clone()
    }

    /// What is sent is of this track from now on; needs no negotiation.
    pub fn set_track(&self, track: Option<MediaStreamTrack>) -> Result<(), RtcError> {
        if matches!(track, Some(MediaStreamTrack::Video(_))) {
            return Err(RtcError::unsupported("sending video"));
        }
        let source = match &track {
            Some(MediaStreamTrack::Audio(track)) => track.source().cloned(),
            Some(MediaStreamTrack::Video(_)) | None => None,
        };
        self.inner.state.lock().track = track;
        if let Some(source) = source {
            source.attach(&self.inner);
        }
        Ok(())
    }

    /// Of this sender and the transport; see the peer connection's. Empty once that is gone.
    pub async fn get_stats(&self) -> Result<Vec<RtcStats>, RtcError> {
        let peer = self.inner.peer.upgrade();
        Ok(peer.map_or_else(Vec::new, |peer| peer.session().stats(Of::Sender(self))))
    }

    pub fn parameters(&self) -> RtpParameters {
        self.inner.state.lock().parameters.clone()
    }

    /// Of the first encoding, `active` and (for PCM) `max_bitrate` are followed; the rest is kept.
    pub fn set_parameters(&self, parameters: RtpParameters) -> Result<(), RtcError> {
        self.inner.state.lock().parameters = parameters;
        Ok(())
    }

    pub fn set_video_encoder_backend(&self, _backend: VideoEncoderBackend) {}

    pub(crate) fn is(&self, other: &RtpSender) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn sent(&self) -> Sent {
        self.inner.state.lock().sent
    }

    /// As far as it is up to this side.
    pub(crate) fn is_active(&self) -> bool {
        let state = self.inner.state.lock();
        let enabled = state.track.as_ref().is_some_and(|track| track.enabled());
        let active = state.parameters.encodings.first().is_none_or(|e| e.active);
        enabled && active && !state.barred
    }

    pub(crate) fn set_mid(&self, mid: Option<Mid>) {
        self.inner.state.lock().mid = mid;
    }

    /// What the remote side wants to hear, from now on.
    pub(crate) fn set_wish(&self, wish: Wish) {
        self.inner.state.lock().wish = wish;
    }

    /// Sends nothing from now on. For whoever asked for encryption that this engine does not have.
    pub(crate) fn bar(&self) {
        self.inner.state.lock().barred = true;
    }
}

impl fmt::Debug for RtpSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RtpSender")
            .field("track", &self.track())
            .finish()
    }
}

/// A packet on its way from a source to its senders.
#[derive(Clone)]
pub(crate) struct EncodedPacket {
    pub payload: Arc<[u8]>,
    /// Duration at 48 kHz.
    pub samples: u32,
    /// dBov.
    pub level: Option<i8>,
}

/// What a remote description says of the Opus that is to be sent (RFC 7587, 6.1).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish {
    pub stereo: bool,
    pub dtx: bool,
    pub fec: bool,
    /// Bits per second.
    pub max_bitrate: Option<u32>,
}

/// Counts since the start.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Sent {
    pub packets: u64,
    /// Extended; all packets before it in a row, if there are any.
    pub last_sequence: u64,
    /// Of payload.
    pub bytes: u64,
    pub level: Option<i8>,
    /// Bits per second that the encoder was asked for last; 0 if none was.
    pub target: u32,
}

pub(crate) struct SenderInner {
    peer: Weak<Peer>,
    state: Mutex<SenderState>,
    /// Made for PCM only. Locked before the others, which are not held while it works.
    encoder: Mutex<Option<Coder>>,
}

struct SenderState {
    track: Option<MediaStreamTrack>,
    parameters: RtpParameters,
    mid: Option<Mid>,
    /// RTP time of the next packet.
    timestamp: u32,
    sequence: u64,
    /// The packets before were not sent: the next one starts a talkspurt (RFC 3551, 4.1).
    gap: bool,
    barred: bool,
    wish: Wish,
    sent: Sent,
}

struct Coder {
    encoder: Encoder,
    rate: u32,
    channels: usize,
    /// The packet before said that a pause begins: the ones that only say so again are not sent.
    pausing: bool,
}

impl SenderState {
    /// Whether packets of `source` are to go out now. None if it is not what this sender sends.
    fn sends(&self, source: &NativeAudioSource) -> Option<bool> {
        match &self.track {
            Some(MediaStreamTrack::Audio(track))
                if track.source().is_some_and(|s| s.is(source)) =>
            {
                let active = self.parameters.encodings.first().is_none_or(|e| e.active);
                Some(track.enabled() && active && !self.barred)
            }
            _ => None,
        }
    }

    fn settings(&self, channels: usize) -> Settings {
        let stereo = channels == 2 && self.wish.stereo;
        let asked = self
            .parameters
            .encodings
            .first()
            .and_then(|e| e.max_bitrate);
        let asked = asked.and_then(|bits| u32::try_from(bits).ok());
        let default = DEFAULT_BITRATE * if stereo { 2 } else { 1 };
        Settings {
            bitrate: asked
                .unwrap_or(default)
                .min(self.wish.max_bitrate.unwrap_or(u32::MAX)),
            stereo,
            dtx: self.wish.dtx,
            fec: self.wish.fec,
        }
    }
}

impl SenderInner {
    /// Sends `packet` if there is a way now; its time passes in any case.
    /// Returns false once `source` is no longer what this sender sends.
    pub(crate) fn send(&self, source: &NativeAudioSource, packet: EncodedPacket) -> bool {
        let peer = self.peer.upgrade();
        let mut session = peer.as_ref().map(|peer| peer.session());
        let mut state = self.state.lock();
        let Some(enabled) = state.sends(source) else {
            return false;
        };
        let timestamp = state.timestamp;
        state.timestamp = timestamp.wrapping_add(packet.samples);

        let (bytes, level) = (packet.payload.len() as u64, packet.level);
        let sent = match (&mut session, state.mid) {
            (Some(session), Some(mid)) if enabled => {
                session.send_audio(mid, state.sequence, timestamp, state.gap, packet)
            }
            _ => false,
        };
        state.gap = !sent;
        if sent {
            state.sent.last_sequence = state.sequence;
            state.sequence += 1;
            state.sent.packets += 1;
            state.sent.bytes += bytes;
            state.sent.level = level;
            drop(state);
            drop(session);
            if let Some(peer) = peer {
                peer.wake();
            }
        }
        true
    }

    /// Lets time pass, in which there is nothing to be sent. Returns as `send`.
    pub(crate) fn skip(&self, source: &NativeAudioSource, samples: u32) -> bool {
        let mut state = self.state.lock();
        if state.sends(source).is_none() {
            return false;
        }
        state.timestamp = state.timestamp.wrapping_add(samples);
        state.gap = true;
        true
    }

    /// Encodes and sends, as `send`. Nothing is encoded that could not go.
    pub(crate) fn send_pcm(&self, source: &NativeAudioSource, pcm: &Pcm) -> bool {
        let mut coder = self.encoder.lock();
        let (settings, mid) = {
            let mut state = self.state.lock();
            match state.sends(source) {
                None => return false,
                Some(enabled) => {
                    let settings = state.settings(pcm.channels);
                    state.sent.target = settings.bitrate;
                    (settings, state.mid.filter(|_| enabled))
                }
            }
        };
        let peer = self.peer.upgrade();
        let way = |mid| {
            peer.as_ref()
                .is_some_and(|peer| peer.session().can_send(mid))
        };
        if !mid.is_some_and(way) {
            return self.skip(source, PACKET_TICKS);
        }

        let known = coder
            .take()
            .filter(|coder| (coder.rate, coder.channels) == (pcm.rate, pcm.channels));
        let Some(known) = known.or_else(|| Coder::new(pcm)) else {
            log::error!("no memory for an Opus encoder");
            return self.skip(source, PACKET_TICKS);
        };
        let coder = coder.insert(known);
        let mut buffer = [0; MAX_PACKET];
        match coder.encode(settings, pcm, &mut buffer) {
            Some(payload) => self.send(
                source,
                EncodedPacket {
                    payload: payload.into(),
                    samples: PACKET_TICKS,
                    level: Some(pcm.level()),
                },
            ),
            None => self.skip(source, PACKET_TICKS),
        }
    }
}

impl Coder {
    fn new(pcm: &Pcm) -> Option<Self> {
        Some(Self {
            encoder: Encoder::new(pcm.rate, pcm.channels)?,
            rate: pcm.rate,
            channels: pcm.channels,
            pausing: false,
        })
    }

    /// None if there is nothing to be sent.
    fn encode<'a>(
        &mut self,
        settings: Settings,
        pcm: &Pcm,
        buffer: &'a mut [u8; MAX_PACKET],
    ) -> Option<&'a [u8]> {
        let packet = self.encoder.encode(settings, &pcm.samples, buffer)?;
        let pausing = packet.len() <= DTX_LEN;
        let again = std::mem::replace(&mut self.pausing, pausing) && pausing;
        (!again).then_some(packet)
    }
}
