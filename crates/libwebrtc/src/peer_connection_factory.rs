use std::fmt;

use crate::{
    MediaType, RtcError, engine,
    peer_connection::PeerConnection,
    rtp_parameters::{RtpCapabilities, RtpCodecCapability},
};

/// A STUN or TURN server.
///
/// `stun:`, `turn:` (UDP, TCP) and `turns:` (TLS) URLs of RFC 7064 and RFC 7065; others are reported
/// as candidate errors. Of all servers of a configuration, 8 URLs are used. Connections to relays
/// (TCP, TLS) are made only if datagrams brought no connection within 2 s, or relays are all that is
/// allowed.
#[derive(Clone)]
pub struct IceServer {
    pub urls: Vec<String>,
    pub username: String,
    pub password: String,
}

impl fmt::Debug for IceServer {
    // The credentials are good for a relay: not for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IceServer")
            .field("urls", &self.urls)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum ContinualGatheringPolicy {
    GatherOnce,
    GatherContinually,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceTransportsType {
    /// Only through a TURN server: the remote side sees no address of this host.
    Relay,
    /// No candidate shows an address of an interface.
    NoHost,
    All,
}

#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RtcConfiguration {
    pub ice_servers: Vec<IceServer>,
    pub continual_gathering_policy: ContinualGatheringPolicy,
    pub ice_transport_type: IceTransportsType,
    /// Negotiate SCTP within the SDP (draft-hancke-tsvwg-snap), which saves two round trips.
    pub enable_sctp_snap: bool,
}

impl Default for RtcConfiguration {
    fn default() -> Self {
        Self {
            ice_servers: vec![],
            continual_gathering_policy: ContinualGatheringPolicy::GatherContinually,
            ice_transport_type: IceTransportsType::All,
            enable_sctp_snap: false,
        }
    }
}

#[derive(Clone, Default)]
pub struct PeerConnectionFactory {}

impl fmt::Debug for PeerConnectionFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerConnectionFactory").finish()
    }
}

impl PeerConnectionFactory {
    /// The same as [`Default`]: nothing is played out here.
    pub fn with_zero_playout_delay() -> Self {
        Self {}
    }

    /// The same as [`Default`].
    pub fn with_options(_zero_playout_delay: bool, _enable_warp: bool) -> Self {
        Self {}
    }

    /// Fails if the engine's threads can't be started.
    pub fn create_peer_connection(
        &self,
        config: RtcConfiguration,
    ) -> Result<PeerConnection, RtcError> {
        Ok(PeerConnection::new(engine::Peer::start(&config)?))
    }

    /// Opus; no video, as none can be sent.
    pub fn get_rtp_sender_capabilities(&self, media_type: MediaType) -> RtpCapabilities {
        let opus = RtpCodecCapability {
            channels: Some(2),
            clock_rate: Some(48_000),
            mime_type: "audio/opus".to_owned(),
            sdp_fmtp_line: Some("minptime=10;useinbandfec=1".to_owned()),
        };
        let codecs = match media_type {
            MediaType::Audio => vec![opus],
            MediaType::Video | MediaType::Data | MediaType::Unsupported => vec![],
        };
        RtpCapabilities {
            codecs,
            header_extensions: vec![],
        }
    }

    pub fn get_rtp_receiver_capabilities(&self, media_type: MediaType) -> RtpCapabilities {
        self.get_rtp_sender_capabilities(media_type)
    }
}

pub mod native {
    use super::PeerConnectionFactory;
    use crate::{
        audio_source::native::NativeAudioSource, audio_track::RtcAudioTrack,
        video_source::native::NativeVideoSource, video_track::RtcVideoTrack,
    };

    /// Tracks, and audio devices: of these there are none, and every attempt to use one says no.
    pub trait PeerConnectionFactoryExt {
        fn create_video_track(&self, label: &str, source: NativeVideoSource) -> RtcVideoTrack;
        fn create_audio_track(&self, label: &str, source: NativeAudioSource) -> RtcAudioTrack;
        fn create_device_audio_track(&self, label: &str) -> RtcAudioTrack;

        fn playout_devices(&self) -> i16 {
            0
        }
        fn recording_devices(&self) -> i16 {
            0
        }
        fn playout_device_name(&self, _index: u16) -> String {
            String::new()
        }
        fn recording_device_name(&self, _index: u16) -> String {
            String::new()
        }
        fn playout_device_guid(&self, _index: u16) -> String {
            String::new()
        }
        fn recording_device_guid(&self, _index: u16) -> String {
            String::new()
        }
        fn set_playout_device(&self, _index: u16) -> bool {
            false
        }
        fn set_recording_device(&self, _index: u16) -> bool {
            false
        }
        fn set_playout_device_by_guid(&self, _guid: &str) -> bool {
            false
        }
        fn set_recording_device_by_guid(&self, _guid: &str) -> bool {
            false
        }

        fn stop_recording(&self) -> bool {
            false
        }
        fn init_recording(&self) -> bool {
            false
        }
        fn start_recording(&self) -> bool {
            false
        }
        fn recording_is_initialized(&self) -> bool {
            false
        }
        fn stop_playout(&self) -> bool {
            false
        }
        fn init_playout(&self) -> bool {
            false
        }
        fn start_playout(&self) -> bool {
            false
        }
        fn playout_is_initialized(&self) -> bool {
            false
        }

        fn builtin_aec_is_available(&self) -> bool {
            false
        }
        fn builtin_agc_is_available(&self) -> bool {
            false
        }
        fn builtin_ns_is_available(&self) -> bool {
            false
        }
        fn enable_builtin_aec(&self, _enable: bool) -> bool {
            false
        }
        fn enable_builtin_agc(&self, _enable: bool) -> bool {
            false
        }
        fn enable_builtin_ns(&self, _enable: bool) -> bool {
            false
        }

        fn set_adm_recording_enabled(&self, _enabled: bool) {}
        fn adm_recording_enabled(&self) -> bool {
            false
        }
        fn set_adm_playout_enabled(&self, _enabled: bool) {}
        fn adm_playout_enabled(&self) -> bool {
            false
        }
        fn acquire_platform_adm(&self) -> bool {
            false
        }
        fn release_platform_adm(&self) {}
        fn platform_adm_ref_count(&self) -> i32 {
            0
        }
        fn is_platform_adm_active(&self) -> bool {
            false
        }
    }

    impl PeerConnectionFactoryExt for PeerConnectionFactory {
        fn create_video_track(&self, label: &str, _source: NativeVideoSource) -> RtcVideoTrack {
            RtcVideoTrack::new(label.to_owned())
        }

        fn create_audio_track(&self, label: &str, source: NativeAudioSource) -> RtcAudioTrack {
            RtcAudioTrack::new(label.to_owned(), Some(source))
        }

        fn create_device_audio_track(&self, label: &str) -> RtcAudioTrack {
            RtcAudioTrack::new(label.to_owned(), None)
        }
    }
}
