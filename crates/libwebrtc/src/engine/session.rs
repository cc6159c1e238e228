//! All protocol state of one peer connection, sans-IO: it takes `now` and bytes, and says what to
//! send, what to report and when to come back. Split by topic: `negotiation` (offers, answers),
//! `media` (transceivers, RTP), `channels` (data); here the life of the connection.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use str0m::{
    Candidate, Event as StackEvent, IceConnectionState as StackIce, Input, Output as StackOutput,
    Rtc,
    net::{Protocol, Receive, TcpType, Transmit},
};

use super::{
    Peer,
    faults::{Fault, Faults},
    negotiation::Exchange,
    network::{News, Received},
    received::Source,
    stats::Figures,
};
use crate::{
    RtcError,
    audio_track::RtcAudioTrack,
    data_channel::{ChannelInner, DataChannel, DataChannelState},
    encoded_audio::EncodedAudioFrame,
    ice_candidate::IceCandidate,
    peer_connection::{
        IceCandidateError, IceConnectionState, IceGatheringState, PeerConnectionState,
        SignalingState, TrackEvent,
    },
    peer_connection_factory::RtcConfiguration,
    rtp_transceiver::RtpTransceiver,
    session_description::SessionDescription,
    stats::DtlsTransportState,
};

/// The stack never gives up on ICE or DTLS; after this time without a connection, we do.
const FAIL_AFTER: Duration = Duration::from_secs(15);
/// The stack checks a connection every 3 s at least; silence for longer than two checks is shown
/// as a disconnect, long before it would notice itself.
const SILENCE: Duration = Duration::from_secs(7);
/// The remote side closed DTLS: no way back, but its signalling may say why within this time.
const FAREWELL: Duration = Duration::from_secs(3);
/// Remote candidates that are looked at; a peer has a handful.
pub(super) const MAX_REMOTE_CANDIDATES: usize = 64;
/// Passive ones of TCP that are connected to.
const MAX_TCP_CANDIDATES: usize = 4;
/// How long datagrams have for themselves before connections are tried as well. Two lost checks and
/// a round trip of half a second fit in; a join, with its limit of 15 s, still has the time that
/// TCP, TLS, ICE and DTLS need on such a line.
pub(super) const HEAD_START: Duration = Duration::from_secs(2);
/// A peer with candidates for TCP only is connected to at once, but candidates are told one by
/// one: the others may be under way.
const GRACE: Duration = Duration::from_millis(100);

/// The shortest time there is.
const INSTANT: Duration = Duration::from_nanos(1);

/// How far the stack is emptied.
#[derive(Clone, Copy, PartialEq)]
enum Until {
    /// It has nothing more.
    Quiet,
    /// The packet that it was given has come out; what else it has waits for the next step. The
    /// stack holds one packet.
    Packet,
}

/// What the driver is to do.
#[derive(Default)]
pub(super) struct Output {
    pub transmits: Vec<Transmit>,
    /// In order; to be dispatched without the session's lock.
    pub events: Vec<Event>,
    pub network: Vec<NetworkRequest>,
    /// When to call `step` again at the latest. None: the session is closed, this was the last.
    pub deadline: Option<Instant>,
}

pub(super) enum Event {
    Connection(PeerConnectionState),
    IceConnection(IceConnectionState),
    Gathering(IceGatheringState),
    Signaling(SignalingState),
    NegotiationNeeded,
    Candidate(IceCandidate),
    CandidateError(IceCandidateError),
    Track(TrackEvent),
    /// The remote side opened it.
    Channel(DataChannel),
    ChannelState(Arc<ChannelInner>, DataChannelState),
    ChannelMessage(Arc<ChannelInner>, Vec<u8>, bool),
    /// It got a listener: what waits can be delivered.
    ChannelListening(Arc<ChannelInner>),
    ChannelSent(Arc<ChannelInner>, u64),
    Audio(RtcAudioTrack, EncodedAudioFrame),
}

/// What is wanted of the network.
#[derive(Debug)]
pub(super) enum NetworkRequest {
    /// Local candidates.
    Gather,
    /// Those that are new, and connections of their own: ICE was restarted.
    Restart,
    /// The local address of the route to this remote candidate.
    Towards(IpAddr),
    /// A connection to this remote candidate.
    Tcp(SocketAddr),
    /// Connections to relays.
    Streams,
    Configure(RtcConfiguration),
}

pub(crate) struct Session {
    pub(super) peer: Weak<Peer>,
    /// None once there is no way on: closed, or the stack failed.
    pub(super) rtc: Option<Rtc>,
    pub(super) output: Output,

    pub(super) signaling: SignalingState,
    pub(super) exchange: Exchange,
    pub(super) local: Option<SessionDescription>,
    pub(super) remote: Option<SessionDescription>,
    pub(super) restart_wanted: bool,
    pub(super) negotiation_flagged: bool,

    pub(super) transceivers: Vec<RtpTransceiver>,
    /// Which section a source was seen in, and what came of it.
    pub(super) sources: HashMap<u32, Source>,

    pub(super) channels: Vec<Arc<ChannelInner>>,
    pub(super) figures: Figures,
    /// Both sides have the application section.
    pub(super) data_negotiated: bool,
    /// Negotiated stream ids that were lost with a dropped offer: the stack can't take them twice.
    pub(super) lost_streams: Vec<u16>,

    connection: PeerConnectionState,
    ice: IceConnectionState,
    gathering: IceGatheringState,
    stack_ice: StackIce,
    /// DTLS is done.
    secured: bool,
    connected_once: bool,
    /// The remote side closed, or the stack failed.
    gone: bool,
    silent: bool,
    failed: bool,
    fail_at: Option<Instant>,
    heard: Option<Instant>,
    local_candidates: Vec<Candidate>,
    remote_candidates: Vec<Candidate>,
    /// When the search for a way through began, and when the first candidate for TCP was seen.
    searching_since: Option<Instant>,
    tcp_since: Option<Instant>,
    /// Connections are in use as well as datagrams.
    streams: bool,
    pub(super) faults: Faults,
    /// The time that the stack was told with the packets that wait for a step.
    told: Option<Instant>,
}

impl Session {
    pub(super) fn new(rtc: Rtc, peer: Weak<Peer>) -> Self {
        Self {
            peer,
            rtc: Some(rtc),
            output: Output::default(),
            signaling: SignalingState::Stable,
            exchange: Exchange::default(),
            local: None,
            remote: None,
            restart_wanted: false,
            negotiation_flagged: false,
            transceivers: Vec::new(),
            sources: HashMap::new(),
            channels: Vec::new(),
            figures: Figures::default(),
            data_negotiated: false,
            lost_streams: Vec::new(),
            connection: PeerConnectionState::New,
            ice: IceConnectionState::New,
            gathering: IceGatheringState::New,
            stack_ice: StackIce::New,
            secured: false,
            connected_once: false,
            gone: false,
            silent: false,
            failed: false,
            fail_at: None,
            heard: None,
            local_candidates: Vec::new(),
            remote_candidates: Vec::new(),
            searching_since: None,
            tcp_since: None,
            streams: false,
            faults: Faults::default(),
            told: None,
        }
    }

    /// Lets time pass, then hands over all that is to be done.
    pub(super) fn step(&mut self, now: Instant, output: &mut Output) {
        self.tell(now);
        self.told = None;
        let stack_deadline = self.drain(now, Until::Quiet);
        self.watch(now);
        let streams_at = self.fall_back(now);

        output.transmits.append(&mut self.output.transmits);
        output.events.append(&mut self.output.events);
        output.network.append(&mut self.output.network);
        // Only of a connection, as silence is.
        let quiet_at = (self.is_linked() && !self.silent)
            .then_some(self.heard)
            .flatten()
            .map(|at| at + SILENCE);
        output.deadline = match self.signaling {
            SignalingState::Closed => None,
            _ => [stack_deadline, self.fail_at, quiet_at, streams_at]
                .into_iter()
                .flatten()
                .min()
                .or(Some(now + FAIL_AFTER)),
        };
    }

    /// Lets the stack go through all that it has timers for, once for this time.
    fn tell(&mut self, now: Instant) {
        if self.told.replace(now) == Some(now) {
            return;
        }
        if let Some(rtc) = &mut self.rtc
            && let Err(err) = rtc.handle_input(Input::Timeout(now))
        {
            self.lose_stack(&err.to_string());
        }
    }

    /// Takes a datagram; one that makes no sense is ignored. Those that were read together have the
    /// same `now`, and `step` is called with it after them.
    pub(super) fn receive(&mut self, now: Instant, received: &Received) {
        let Received {
            protocol,
            source,
            local,
            arrived,
            bytes,
        } = *received;
        // With each datagram the stack lets time pass, which is most of what a packet costs where there
        // are many tracks; but not with one of the past, as one that is read is.
        self.tell(now);
        let at = arrived.min(now.checked_sub(INSTANT).unwrap_or(now));
        let is_rtp = received.is_rtp();
        let Some(rtc) = &mut self.rtc else { return };
        let receive = match Receive::new(protocol, source, local, bytes) {
            Ok(receive) => receive,
            Err(err) => {
                let detail = format_args!("{} bytes from {source}: {err}", bytes.len());
                return self.faults.note(Fault::Datagram, detail);
            }
        };
        let input = Input::Receive(at, receive);
        if !rtc.accepts(&input) {
            log::trace!("datagram of a stranger ignored");
            return;
        }
        match rtc.handle_input(input) {
            Ok(()) => {
                self.heard = Some(now);
                let figures = &mut self.figures;
                figures.note_received(now, protocol, source, local, bytes);
            }
            Err(err) => {
                let detail = format_args!("{} bytes from {source}: {err}", bytes.len());
                self.faults.note(Fault::Refused, detail);
            }
        }
        if is_rtp {
            // No packet came out of it.
            if self.drain(now, Until::Packet).is_some() {
                self.faults.note(Fault::Packet, source);
            }
        } else {
            // What came of it has to be done now.
            self.told = None;
            self.tell(now);
            self.drain(now, Until::Quiet);
        }
    }

    /// Ends everything. Idempotent.
    pub(super) fn close(&mut self) {
        if self.signaling == SignalingState::Closed {
            return;
        }
        if let Some(mut rtc) = self.rtc.take()
            && rtc.close().is_ok()
        {
            // The farewell; bounded, as what it answers to is the remote side's.
            for _ in 0..64 {
                match rtc.poll_output() {
                    Ok(StackOutput::Transmit(transmit)) => self.output.transmits.push(transmit),
                    Ok(StackOutput::Event(_)) => {}
                    Ok(StackOutput::Timeout(_)) | Err(_) => break,
                }
            }
        }
        self.end_channels();
        for transceiver in std::mem::take(&mut self.transceivers) {
            transceiver.receiver().end();
        }
        self.sources = HashMap::new();
        self.exchange = Exchange::default();
        self.local = None;
        self.remote = None;
        self.fail_at = None;
        self.heard = None;
        self.connection = PeerConnectionState::Closed;
        self.ice = IceConnectionState::Closed;
        self.set_signaling(SignalingState::Closed);
    }

    pub(crate) fn check_open(&self) -> Result<(), RtcError> {
        match self.signaling {
            SignalingState::Closed => Err(RtcError::closed()),
            _ => Ok(()),
        }
    }

    /// The stack, if the connection is neither closed nor beyond repair.
    pub(super) fn stack(&mut self) -> Result<&mut Rtc, RtcError> {
        self.check_open()?;
        match &mut self.rtc {
            Some(rtc) if rtc.is_alive() => Ok(rtc),
            _ => Err(RtcError::invalid_state(
                "the remote side closed the connection",
            )),
        }
    }

    pub(crate) fn connection_state(&self) -> PeerConnectionState {
        self.connection
    }

    pub(crate) fn ice_connection_state(&self) -> IceConnectionState {
        self.ice
    }

    pub(super) fn dtls_state(&self) -> DtlsTransportState {
        match self.stack_ice {
            _ if self.signaling == SignalingState::Closed || self.gone => {
                DtlsTransportState::Closed
            }
            _ if self.secured => DtlsTransportState::Connected,
            StackIce::Connected | StackIce::Completed => DtlsTransportState::Connecting,
            _ => DtlsTransportState::New,
        }
    }

    pub(crate) fn ice_gathering_state(&self) -> IceGatheringState {
        self.gathering
    }

    pub(crate) fn signaling_state(&self) -> SignalingState {
        self.signaling
    }

    pub(crate) fn local_description(&self) -> Option<SessionDescription> {
        self.local.clone()
    }

    pub(crate) fn remote_description(&self) -> Option<SessionDescription> {
        self.remote.clone()
    }

    pub(crate) fn restart_ice(&mut self) {
        self.restart_wanted = true;
        self.flag_negotiation();
    }

    /// A trickled candidate. Ones of kinds that this engine does not use are ignored.
    pub(crate) fn add_remote_candidate(&mut self, line: &str) -> Result<(), RtcError> {
        self.check_open()?;
        if self.remote.is_none() {
            return Err(RtcError::invalid_state(
                "a candidate before any remote description",
            ));
        }
        if line.is_empty() {
            return Ok(());
        }
        let candidate = match Candidate::from_sdp_string(line) {
            Ok(candidate) => candidate,
            // A name that hides an address (mDNS); such a peer shows itself when it calls.
            Err(_) if line.contains(".local ") => return Ok(()),
            Err(err) => return Err(RtcError::invalid_sdp(format!("candidate: {err}"))),
        };
        // The remote side may be gone already: candidates travel another way than its farewell.
        if self.note_remote_candidate(&candidate)
            && let Some(rtc) = &mut self.rtc
        {
            rtc.add_remote_candidate(candidate);
        }
        Ok(())
    }

    /// Asks for a way to the candidate. Returns false for one to ignore.
    pub(super) fn note_remote_candidate(&mut self, candidate: &Candidate) -> bool {
        let (addr, protocol) = (candidate.addr(), candidate.proto());
        let known = |known: &&Candidate| known.proto() == protocol;
        let mut alike = self.remote_candidates.iter().filter(known);
        let usable = match protocol {
            Protocol::Udp => true,
            // One that calls by itself can't reach us: nobody listens here.
            Protocol::Tcp => candidate.tcptype() == Some(TcpType::Passive),
            _ => false,
        };
        if !usable || alike.clone().any(|known| known.addr() == addr) {
            return false;
        }
        if self.remote_candidates.len() >= MAX_REMOTE_CANDIDATES {
            log::debug!("more than {MAX_REMOTE_CANDIDATES} remote candidates: one ignored");
            return false;
        }
        if protocol == Protocol::Tcp {
            if alike.nth(MAX_TCP_CANDIDATES - 1).is_some() {
                return false;
            }
            if self.streams {
                self.output.network.push(NetworkRequest::Tcp(addr));
            }
        } else if self.gathering != IceGatheringState::New {
            self.output.network.push(NetworkRequest::Towards(addr.ip()));
        }
        self.figures.note_candidate(candidate);
        self.remote_candidates.push(candidate.clone());
        true
    }

    pub(crate) fn configure(&mut self, config: RtcConfiguration) -> Result<(), RtcError> {
        self.check_open()?;
        self.output.network.push(NetworkRequest::Configure(config));
        Ok(())
    }

    /// Starts the search for local addresses, once.
    pub(super) fn gather(&mut self) {
        if self.gathering != IceGatheringState::New {
            return;
        }
        self.set_gathering(IceGatheringState::Gathering);
        self.output.network.push(NetworkRequest::Gather);
        let datagrams = self
            .remote_candidates
            .iter()
            .filter(|candidate| candidate.proto() == Protocol::Udp);
        self.output
            .network
            .extend(datagrams.map(|remote| NetworkRequest::Towards(remote.addr().ip())));
    }

    /// ICE was restarted: a new attempt to connect begins, maybe on another network.
    pub(super) fn search_again(&mut self) {
        self.failed = false;
        self.fail_at = None;
        self.remote_candidates.clear();
        self.searching_since = None;
        self.tcp_since = None;
        self.streams = false;
        if self.gathering != IceGatheringState::New {
            self.output.network.push(NetworkRequest::Restart);
        }
    }

    /// Takes up connections when datagrams have found no way. Returns when that will be.
    fn fall_back(&mut self, now: Instant) -> Option<Instant> {
        let negotiated = self.local.is_some() && self.remote.is_some();
        if self.streams || !negotiated || (self.is_linked() && !self.silent) {
            return None;
        }
        let mut at = *self.searching_since.get_or_insert(now) + HEAD_START;
        let has = |protocol| {
            let candidates = &mut self.remote_candidates.iter();
            candidates.any(|candidate| candidate.proto() == protocol)
        };
        if has(Protocol::Tcp) {
            let since = *self.tcp_since.get_or_insert(now);
            // After a restart of ICE too, what helped before is not left for later.
            let helped = matches!(self.figures.path(), Some((Protocol::Tcp, ..)));
            if helped || !has(Protocol::Udp) {
                at = at.min(since + GRACE);
            }
        }
        if now < at {
            return Some(at);
        }
        self.streams = true;
        let remotes = self.remote_candidates.iter();
        let passive = remotes
            .filter(|candidate| candidate.proto() == Protocol::Tcp)
            .map(|candidate| NetworkRequest::Tcp(candidate.addr()));
        self.output.network.extend(passive);
        self.output.network.push(NetworkRequest::Streams);
        None
    }

    pub(super) fn take_news(&mut self, news: News) {
        match news {
            News::Candidate(candidate) => self.add_local_candidate(candidate),
            News::Withdrawn(candidate) => {
                self.local_candidates.retain(|known| *known != candidate);
                if let Some(rtc) = &mut self.rtc {
                    rtc.direct_api().invalidate_candidate(&candidate);
                }
            }
            News::Error(error) => self.output.events.push(Event::CandidateError(error)),
            News::Gathered => {
                if self.gathering == IceGatheringState::Gathering {
                    self.set_gathering(IceGatheringState::Complete);
                }
            }
        }
    }

    /// Tells the stack and the remote side.
    fn add_local_candidate(&mut self, candidate: Candidate) {
        let Some(rtc) = &mut self.rtc else { return };
        let active = candidate.tcptype() == Some(TcpType::Active);
        if self.local_candidates.contains(&candidate) {
            return;
        }
        self.figures.note_candidate(&candidate);
        self.local_candidates.push(candidate.clone());
        // Not if another stands for the same: that our address looks the same from outside.
        let Some(line) = rtc
            .add_local_candidate(candidate)
            .map(Candidate::to_sdp_string)
        else {
            return;
        };
        // One that calls by itself is of no use to the remote side.
        if !active {
            let candidate = IceCandidate::new(self.first_mid(), 0, line);
            self.output.events.push(Event::Candidate(candidate));
        }
    }

    #[cfg(test)]
    pub(super) fn path(&self) -> Option<(Protocol, SocketAddr, SocketAddr)> {
        self.figures.path()
    }

    #[cfg(test)]
    pub(super) fn streams(&self) -> bool {
        self.streams
    }

    #[cfg(test)]
    pub(super) fn faults(&self) -> &Faults {
        &self.faults
    }

    pub(super) fn set_signaling(&mut self, state: SignalingState) {
        if self.signaling != state {
            self.signaling = state;
            self.output.events.push(Event::Signaling(state));
        }
    }

    /// At most once until the next offer.
    pub(super) fn flag_negotiation(&mut self) {
        if !self.negotiation_flagged && self.signaling != SignalingState::Closed {
            self.negotiation_flagged = true;
            self.output.events.push(Event::NegotiationNeeded);
        }
    }

    fn set_gathering(&mut self, state: IceGatheringState) {
        self.gathering = state;
        self.output.events.push(Event::Gathering(state));
    }

    /// Takes out of the stack what it has, and returns when it wants to be called again.
    fn drain(&mut self, now: Instant, until: Until) -> Option<Instant> {
        let deadline = loop {
            match self.rtc.as_mut()?.poll_output() {
                Ok(StackOutput::Timeout(at)) => break at,
                Ok(StackOutput::Event(StackEvent::RtpPacket(packet))) => {
                    self.on_rtp(packet);
                    if until == Until::Packet {
                        return None;
                    }
                }
                Ok(StackOutput::Transmit(transmit)) => {
                    self.figures.note_sent(now, &transmit);
                    self.output.transmits.push(transmit);
                }
                Ok(StackOutput::Event(event)) => self.on_stack_event(now, event),
                Err(err) => {
                    self.lose_stack(&err.to_string());
                    return None;
                }
            }
        };
        self.report_sent();
        Some(deadline)
    }

    fn on_stack_event(&mut self, now: Instant, event: StackEvent) {
        match event {
            StackEvent::Connected => self.secured = true,
            StackEvent::IceConnectionStateChange(state) => {
                self.stack_ice = state;
                self.heard = Some(now);
            }
            StackEvent::ChannelOpen(id, label) => self.on_channel_open(id, &label),
            StackEvent::ChannelData(data) => self.on_channel_data(data),
            StackEvent::ChannelClose(id) => self.on_channel_close(id),
            StackEvent::Closed => {
                self.gone = true;
                self.fail_at = Some(now + FAREWELL);
                self.end_channels();
            }
            StackEvent::PeerStats(stats) => self.figures.note_peer(stats),
            StackEvent::MediaIngressStats(stats) => self.figures.note_ingress(stats),
            StackEvent::MediaEgressStats(stats) => self.figures.note_egress(stats),
            // Bandwidth estimates and requests of video receivers.
            _ => {}
        }
        self.watch(now);
    }

    fn lose_stack(&mut self, reason: &str) {
        log::warn!("the peer connection failed: {reason}");
        self.rtc = None;
        self.gone = true;
        self.failed = true;
        self.end_channels();
    }

    /// Something can be sent, if maybe in vain: the last way through is used until there is another,
    /// also while ICE is restarted.
    pub(super) fn has_way(&self) -> bool {
        self.connected_once && !self.gone && !self.failed
    }

    fn is_linked(&self) -> bool {
        matches!(self.stack_ice, StackIce::Connected | StackIce::Completed)
    }

    /// Derives the states that the API shows, and reports changes.
    fn watch(&mut self, now: Instant) {
        if self.signaling == SignalingState::Closed {
            return;
        }
        let linked = self.is_linked();
        self.silent = linked && self.heard.is_some_and(|heard| now >= heard + SILENCE);
        let up = linked && self.secured && !self.silent && !self.gone;
        let negotiated = self.local.is_some() && self.remote.is_some();
        if up {
            self.connected_once = true;
            self.failed = false;
            self.fail_at = None;
        } else if negotiated && !self.failed {
            let fail_at = *self.fail_at.get_or_insert(now + FAIL_AFTER);
            if now >= fail_at {
                self.failed = true;
            }
        }
        if self.failed {
            self.fail_at = None;
        }

        let ice = if self.failed {
            IceConnectionState::Failed
        } else if self.gone || self.silent {
            IceConnectionState::Disconnected
        } else {
            match self.stack_ice {
                StackIce::New => IceConnectionState::New,
                StackIce::Checking => IceConnectionState::Checking,
                StackIce::Connected => IceConnectionState::Connected,
                StackIce::Completed => IceConnectionState::Completed,
                // Before there was a connection, this only means that no candidate has worked yet.
                StackIce::Disconnected if !self.connected_once => IceConnectionState::Checking,
                StackIce::Disconnected => IceConnectionState::Disconnected,
            }
        };
        let connection = match ice {
            IceConnectionState::Failed => PeerConnectionState::Failed,
            IceConnectionState::Disconnected => PeerConnectionState::Disconnected,
            _ if up => PeerConnectionState::Connected,
            _ if negotiated => PeerConnectionState::Connecting,
            _ => PeerConnectionState::New,
        };
        if self.ice != ice {
            self.ice = ice;
            self.output.events.push(Event::IceConnection(ice));
        }
        if self.connection != connection {
            self.connection = connection;
            self.output.events.push(Event::Connection(connection));
        }
    }
}
