use std::{fmt, sync::Arc};

use crate::{
    MediaType, RtcError,
    data_channel::{DataChannel, DataChannelInit},
    engine::{Of, Peer, Session},
    ice_candidate::IceCandidate,
    media_stream::MediaStream,
    media_stream_track::MediaStreamTrack,
    peer_connection_factory::RtcConfiguration,
    rtp_receiver::RtpReceiver,
    rtp_sender::RtpSender,
    rtp_transceiver::{RtpTransceiver, RtpTransceiverDirection, RtpTransceiverInit},
    session_description::SessionDescription,
    stats::RtcStats,
};

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum PeerConnectionState {
    New,
    Connecting,
    Connected,
    /// Nothing was heard of the remote side for some seconds; may recover by itself.
    Disconnected,
    /// Not connected for 15 s; an ICE restart may still help.
    Failed,
    Closed,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceConnectionState {
    New,
    Checking,
    Connected,
    Completed,
    Failed,
    Disconnected,
    Closed,
    Max,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum IceGatheringState {
    New,
    Gathering,
    Complete,
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum SignalingState {
    Stable,
    HaveLocalOffer,
    HaveLocalPrAnswer,
    HaveRemoteOffer,
    HaveRemotePrAnswer,
    Closed,
}

#[derive(Debug, Clone, Default)]
pub struct OfferOptions {
    pub ice_restart: bool,
    /// Without effect; add transceivers instead.
    pub offer_to_receive_audio: bool,
    /// Without effect; add transceivers instead.
    pub offer_to_receive_video: bool,
}

#[derive(Debug, Clone, Default)]
pub struct AnswerOptions {}

/// Bits per second. Without effect: audio is sent as it is captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BitrateSettings {
    pub min_bitrate_bps: Option<u64>,
    pub start_bitrate_bps: Option<u64>,
    pub max_bitrate_bps: Option<u64>,
}

/// A server that gave no candidate, or a candidate that could not be had.
#[derive(Debug, Clone)]
pub struct IceCandidateError {
    /// Own address that was tried; empty if there was none.
    pub address: String,
    pub port: i32,
    /// Of the STUN or TURN server; empty if there was none.
    pub url: String,
    /// What the server said (RFC 8489, RFC 8656), for instance 401 for wrong credentials; 701 if it
    /// could not be reached.
    pub error_code: i32,
    pub error_text: String,
}

#[derive(Debug, Clone)]
pub struct TrackEvent {
    pub receiver: RtpReceiver,
    pub streams: Vec<MediaStream>,
    pub track: MediaStreamTrack,
    pub transceiver: RtpTransceiver,
}

pub type OnConnectionChange = Box<dyn FnMut(PeerConnectionState) + Send + Sync>;
pub type OnDataChannel = Box<dyn FnMut(DataChannel) + Send + Sync>;
pub type OnIceCandidate = Box<dyn FnMut(IceCandidate) + Send + Sync>;
pub type OnIceCandidateError = Box<dyn FnMut(IceCandidateError) + Send + Sync>;
pub type OnIceConnectionChange = Box<dyn FnMut(IceConnectionState) + Send + Sync>;
pub type OnIceGatheringChange = Box<dyn FnMut(IceGatheringState) + Send + Sync>;
pub type OnNegotiationNeeded = Box<dyn FnMut(u32) + Send + Sync>;
pub type OnSignalingChange = Box<dyn FnMut(SignalingState) + Send + Sync>;
pub type OnTrack = Box<dyn FnMut(TrackEvent) + Send + Sync>;

/// A connection to one remote peer, negotiated as in JSEP (RFC 8829).
///
/// Clones are the same connection; it is closed with [`close`](Self::close) or when the last of
/// them goes. Every method returns without waiting for the network, the `async` ones too, so
/// cancelling them changes nothing. Callbacks run on the engine's thread, one at a time for a
/// connection, never under a lock: they may call anything, but should not block.
#[derive(Clone)]
pub struct PeerConnection {
    owner: Arc<Owner>,
}

/// Closes the connection when its last handle goes.
struct Owner(Arc<Peer>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl PeerConnection {
    pub(crate) fn new(peer: Arc<Peer>) -> Self {
        Self {
            owner: Arc::new(Owner(peer)),
        }
    }

    fn peer(&self) -> &Arc<Peer> {
        &self.owner.0
    }

    /// Runs `change` on the session and lets the driver act on what follows from it.
    fn update<T>(&self, change: impl FnOnce(&mut Session) -> T) -> T {
        let result = change(&mut self.peer().session());
        self.peer().wake();
        result
    }

    /// Takes over the servers and which candidates may be used. Servers that are new are asked at
    /// once if the search for candidates has begun; candidates that are not allowed any more are
    /// not used any more. Fails only if the connection is closed.
    pub fn set_configuration(&self, config: RtcConfiguration) -> Result<(), RtcError> {
        self.update(|session| session.configure(config))
    }

    /// Checks that the connection is open; see [`BitrateSettings`].
    pub fn set_bitrate(&self, _settings: BitrateSettings) -> Result<(), RtcError> {
        self.peer().session().check_open()
    }

    /// Only in the stable state: an offer that awaits its answer has to be answered or rolled back
    /// first.
    pub async fn create_offer(
        &self,
        options: OfferOptions,
    ) -> Result<SessionDescription, RtcError> {
        self.update(|session| session.create_offer(&options))
    }

    pub async fn create_answer(
        &self,
        _options: AnswerOptions,
    ) -> Result<SessionDescription, RtcError> {
        self.update(|session| session.create_answer())
    }

    /// Starts the search for candidates. The text may differ from the created one in its
    /// directions and format parameters only.
    pub async fn set_local_description(&self, desc: SessionDescription) -> Result<(), RtcError> {
        self.update(|session| session.set_local_description(desc))
    }

    pub async fn set_remote_description(&self, desc: SessionDescription) -> Result<(), RtcError> {
        self.update(|session| session.set_remote_description(desc))
    }

    /// Candidates that can't be used here (mDNS names, TCP ones that call by themselves) are ignored.
    /// Those for TCP are connected to if the remote side has no others, or after 2 s without a
    /// connection.
    pub async fn add_ice_candidate(&self, candidate: IceCandidate) -> Result<(), RtcError> {
        self.update(|session| session.add_remote_candidate(&candidate.candidate()))
    }

    pub fn create_data_channel(
        &self,
        label: &str,
        init: DataChannelInit,
    ) -> Result<DataChannel, RtcError> {
        self.update(|session| session.create_channel(label, &init))
    }

    pub fn add_track<T: AsRef<str>>(
        &self,
        track: MediaStreamTrack,
        streams_ids: &[T],
    ) -> Result<RtpSender, RtcError> {
        let init = RtpTransceiverInit {
            direction: RtpTransceiverDirection::SendRecv,
            stream_ids: streams_ids
                .iter()
                .map(|id| id.as_ref().to_owned())
                .collect(),
            send_encodings: vec![],
        };
        Ok(self.add_transceiver(track, init)?.sender())
    }

    pub fn remove_track(&self, sender: RtpSender) -> Result<(), RtcError> {
        self.update(|session| session.remove_track(&sender))
    }

    /// Of every track in both directions, the transport and the data channels. What the remote side
    /// reported, and round-trip times, are up to 5 s old, and missing before that.
    pub async fn get_stats(&self) -> Result<Vec<RtcStats>, RtcError> {
        Ok(self.peer().session().stats(Of::All))
    }

    /// A video track is refused: this engine can't send video.
    pub fn add_transceiver(
        &self,
        track: MediaStreamTrack,
        init: RtpTransceiverInit,
    ) -> Result<RtpTransceiver, RtcError> {
        if matches!(track, MediaStreamTrack::Video(_)) {
            return Err(RtcError::unsupported("sending video"));
        }
        let transceiver = self.update(|session| session.add_transceiver(MediaType::Audio, init))?;
        transceiver.sender().set_track(Some(track))?;
        Ok(transceiver)
    }

    pub fn add_transceiver_for_media(
        &self,
        media_type: MediaType,
        init: RtpTransceiverInit,
    ) -> Result<RtpTransceiver, RtcError> {
        match media_type {
            MediaType::Video if init.direction.sends() => {
                return Err(RtcError::unsupported("sending video"));
            }
            MediaType::Audio | MediaType::Video => {}
            MediaType::Data | MediaType::Unsupported => {
                return Err(RtcError::unsupported("a transceiver of this media type"));
            }
        }
        self.update(|session| session.add_transceiver(media_type, init))
    }

    /// Ends all tracks and channels. The state is closed at once; socket, task and memory go as
    /// soon as the driver has sent the farewell, within milliseconds.
    pub fn close(&self) {
        self.peer().close();
    }

    /// The next offer restarts ICE.
    pub fn restart_ice(&self) {
        self.update(|session| session.restart_ice());
    }

    pub fn connection_state(&self) -> PeerConnectionState {
        self.peer().session().connection_state()
    }

    pub fn ice_connection_state(&self) -> IceConnectionState {
        self.peer().session().ice_connection_state()
    }

    pub fn ice_gathering_state(&self) -> IceGatheringState {
        self.peer().session().ice_gathering_state()
    }

    pub fn signaling_state(&self) -> SignalingState {
        self.peer().session().signaling_state()
    }

    pub fn current_local_description(&self) -> Option<SessionDescription> {
        self.peer().session().local_description()
    }

    pub fn current_remote_description(&self) -> Option<SessionDescription> {
        self.peer().session().remote_description()
    }

    pub fn senders(&self) -> Vec<RtpSender> {
        self.peer()
            .session()
            .transceivers()
            .iter()
            .map(RtpTransceiver::sender)
            .collect()
    }

    pub fn receivers(&self) -> Vec<RtpReceiver> {
        self.peer()
            .session()
            .transceivers()
            .iter()
            .map(RtpTransceiver::receiver)
            .collect()
    }

    pub fn transceivers(&self) -> Vec<RtpTransceiver> {
        self.peer().session().transceivers().to_vec()
    }

    pub fn on_connection_state_change(&self, f: Option<OnConnectionChange>) {
        self.peer().callbacks.connection.set(f);
    }

    pub fn on_data_channel(&self, f: Option<OnDataChannel>) {
        self.peer().callbacks.data_channel.set(f);
    }

    pub fn on_ice_candidate(&self, f: Option<OnIceCandidate>) {
        self.peer().callbacks.candidate.set(f);
    }

    pub fn on_ice_candidate_error(&self, f: Option<OnIceCandidateError>) {
        self.peer().callbacks.candidate_error.set(f);
    }

    pub fn on_ice_connection_state_change(&self, f: Option<OnIceConnectionChange>) {
        self.peer().callbacks.ice_connection.set(f);
    }

    pub fn on_ice_gathering_state_change(&self, f: Option<OnIceGatheringChange>) {
        self.peer().callbacks.gathering.set(f);
    }

    pub fn on_negotiation_needed(&self, f: Option<OnNegotiationNeeded>) {
        self.peer().callbacks.negotiation.set(f);
    }

    pub fn on_signaling_state_change(&self, f: Option<OnSignalingChange>) {
        self.peer().callbacks.signaling.set(f);
    }

    pub fn on_track(&self, f: Option<OnTrack>) {
        self.peer().callbacks.track.set(f);
    }
}

impl fmt::Debug for PeerConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerConnection")
            .field("state", &self.connection_state())
            .field("ice_state", &self.ice_connection_state())
            .finish()
    }
}
