//! One WebRTC peer connection: what it carries down to the client, and the negotiation of it.
//!
//! Clients use either two connections ("publisher" and "subscriber", `/rtc`), where the server
//! offers on the second, or a single one (`/rtc/v1`), where the client always offers and the
//! server asks it to by a `MediaSectionsRequirement`. [`Connection::negotiate`] hides that.

use super::{
    rebase::Rebase,
    sdp::{self, Kind, Msid, Section},
};
use livekit_protocol as proto;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};
use str0m::{
    Candidate, Event, IceConnectionState, Input, Output, Rtc, RtcError,
    change::{SdpAnswer, SdpOffer, SdpPendingOffer},
    channel::{ChannelConfig, ChannelId, Reliability},
    config::CryptoProvider,
    format::Codec,
    media::{Direction, MediaKind, Mid},
    net::{TcpType, Transmit},
    rtp::{ExtensionValues, RtpPacket, RtpWrite},
};

/// libwebrtc's own limit for one message.
const MAX_MESSAGE: u32 = 256 * 1024;
/// What SCTP may hold for a client that is slow to acknowledge.
const SCTP_BUFFER: usize = 4 << 20;
/// What is held beyond that before the client counts as stuck.
const MAX_QUEUED: usize = 16 << 20;

pub(super) type ConnectionId = u64;

/// A stream of RTP that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Source {
    pub connection: ConnectionId,
    pub mid: Mid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Publisher,
    Subscriber,
    Single,
}

/// LiveKit's two data channels, `_reliable` and `_lossy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Reliable,
    Lossy,
}

/// What happened on a connection.
#[derive(Debug)]
// Most are packets, and they live no longer than one pass over the connection.
#[expect(clippy::large_enum_variant)]
pub(super) enum Happening {
    /// Media and data can flow for the first time.
    Connected,
    /// The client's path is gone, perhaps for good.
    Lost,
    /// ... and is back.
    Found,
    Data(Lane, Vec<u8>),
    Rtp(Mid, RtpPacket),
}

/// What the client must be sent so that negotiation goes on.
#[derive(Debug)]
pub(super) enum Demand {
    Offer(proto::SessionDescription),
    Sections(proto::MediaSectionsRequirement),
}

/// The outcome of a client's offer.
#[derive(Debug)]
pub(super) struct Answered {
    pub answer: proto::SessionDescription,
    pub sections: Vec<Section>,
    /// Sids of tracks that flow from now on.
    pub subscribed: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum NegotiationError {
    #[error("session description: {0}")]
    Sdp(#[from] str0m::error::SdpError),
    #[error("negotiation: {0}")]
    Rtc(#[from] RtcError),
    #[error("an answer without an offer")]
    UnexpectedAnswer,
}

/// The client does not drain its data channel.
#[derive(Debug)]
pub(super) struct Stuck;

pub(super) struct Connection {
    rtc: Rtc,
    role: Role,
    downlinks: Vec<Downlink>,
    /// Sections that have carried a track before: their stream needs a new SSRC for the next.
    used: HashSet<Mid>,
    /// Subscriber: sections of ours without a track. Single: the client's audio sections that
    /// could take one.
    sections: Vec<Mid>,
    offer: OfferState,
    reliable: DataLane,
    lossy: DataLane,
}

/// A track on its way to the client.
struct Downlink {
    track: String,
    stream: String,
    source: Source,
    mid: Option<Mid>,
    state: State,
    enabled: bool,
    rebase: Rebase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Wanted,
    Offered,
    Active,
    Ended,
}

#[derive(Default)]
struct OfferState {
    pending: Option<SdpPendingOffer>,
    restart_ice: bool,
    id: u32,
    channels_added: bool,
    /// Single: the client's first offer has been answered.
    answered: bool,
    /// Single: the client has been asked for an offer that has not come yet.
    requested: bool,
}

#[derive(Default)]
struct DataLane {
    channel: Option<ChannelId>,
    queue: VecDeque<Arc<[u8]>>,
    queued: usize,
}

impl Connection {
    pub fn new(
        role: Role,
        udp: Option<SocketAddr>,
        tcp: SocketAddr,
        crypto: Arc<CryptoProvider>,
        now: Instant,
    ) -> Self {
        let mut rtc = Rtc::builder()
            .set_crypto_provider(crypto)
            .set_ice_lite(true)
            .set_rtp_mode(true)
            .set_stats_interval(None)
            // Not offering RED makes clients send plain Opus. The video codecs stay: a single
            // connection's offer has video sections even where nobody uses them.
            .enable_opus(true, false)
            .set_sctp_max_message_size(MAX_MESSAGE)
            .set_sctp_max_buffered_amount(SCTP_BUFFER)
            .build(now);
        let passive = Candidate::builder().tcp().host(tcp);
        let tcp = passive.tcptype(TcpType::Passive).build();
        for candidate in udp
            .map(|udp| Candidate::host(udp, "udp"))
            .into_iter()
            .chain([tcp])
        {
            match candidate {
                Ok(c) => drop(rtc.add_local_candidate(c)),
                Err(e) => tracing::warn!("no local candidate: {e}"),
            }
        }
        Self {
            rtc,
            role,
            downlinks: Vec::new(),
            used: HashSet::new(),
            sections: Vec::new(),
            offer: OfferState::default(),
            reliable: DataLane::default(),
            lossy: DataLane::default(),
        }
    }

    /// Wants the track sent down; takes effect through [`Self::negotiate`]. False if it is
    /// already there.
    pub fn subscribe(&mut self, track: &str, stream: String, source: Source) -> bool {
        if self.has_subscribed(track) {
            return false;
        }
        self.downlinks.push(Downlink {
            track: track.to_owned(),
            stream,
            source,
            mid: None,
            state: State::Wanted,
            enabled: true,
            rebase: Rebase::default(),
        });
        true
    }

    /// Stops the track at once; the section is released through [`Self::negotiate`]. False if it
    /// was not there.
    pub fn unsubscribe(&mut self, track: &str) -> bool {
        let mut any = false;
        for d in self.live_downlinks().filter(|d| d.track == track) {
            d.state = State::Ended;
            any = true;
        }
        self.downlinks
            .retain(|d| d.state != State::Ended || d.mid.is_some());
        any
    }

    pub fn has_subscribed(&self, track: &str) -> bool {
        let mut downlinks = self.downlinks.iter();
        downlinks.any(|d| d.track == track && d.state != State::Ended)
    }

    /// Pauses or resumes a subscribed track without negotiation.
    pub fn enable(&mut self, track: &str, enabled: bool) {
        for d in self.live_downlinks().filter(|d| d.track == track) {
            d.enabled = enabled;
        }
    }

    /// What to send to the client for the subscriptions as they are now, if anything.
    pub fn negotiate(&mut self) -> Option<Demand> {
        match self.role {
            Role::Publisher => None,
            Role::Subscriber => self.make_offer().map(Demand::Offer),
            Role::Single => self.require_sections().map(Demand::Sections),
        }
    }

    /// The client came back on a new websocket: an offer or request in flight may be lost.
    pub fn restart(&mut self) -> Option<Demand> {
        self.offer.requested = false;
        if self.role == Role::Subscriber {
            self.offer.pending = None;
            self.offer.restart_ice = true;
            for d in &mut self.downlinks {
                if d.state == State::Offered {
                    // The unanswered section never came to be.
                    (d.state, d.mid) = (State::Wanted, None);
                }
            }
        }
        self.negotiate()
    }

    /// Answers a client's offer.
    pub fn accept_offer(
        &mut self,
        offer: &proto::SessionDescription,
    ) -> Result<Answered, NegotiationError> {
        let parsed = SdpOffer::from_sdp_string(&offer.sdp)?;
        let sections = sdp::sections(&offer.sdp);
        if self.role == Role::Single {
            self.assign(&sections);
        }
        let answer = self.rtc.sdp_api().accept_offer(parsed)?;
        let (msids, tracks) = self.announced();
        let subscribed = match self.role {
            Role::Single => self.activate(),
            Role::Publisher | Role::Subscriber => Vec::new(),
        };
        Ok(Answered {
            answer: proto::SessionDescription {
                r#type: "answer".into(),
                sdp: sdp::announce(&answer.to_sdp_string(), &msids),
                id: offer.id,
                mid_to_track_id: tracks,
            },
            sections,
            subscribed,
        })
    }

    /// Takes the client's answer to the last offer; the result is the sids of tracks that flow
    /// from now on. Call [`Self::negotiate`] after it.
    pub fn accept_answer(
        &mut self,
        answer: &proto::SessionDescription,
    ) -> Result<Vec<String>, NegotiationError> {
        // Clients that know offer ids echo them; an answer to an offer that a restart has
        // replaced must not be applied to its successor.
        if answer.id != 0 && answer.id != self.offer.id {
            return Ok(Vec::new());
        }
        let pending = self.offer.pending.take();
        let pending = pending.ok_or(NegotiationError::UnexpectedAnswer)?;
        let parsed = SdpAnswer::from_sdp_string(&answer.sdp)?;
        self.rtc.sdp_api().accept_answer(pending, parsed)?;
        Ok(self.activate())
    }

    /// Sends a source's packet down, if the client has subscribed to it. That of a muted source
    /// is left out in such a way that the client sees no loss.
    pub fn forward(&mut self, source: Source, packet: &RtpPacket, muted: bool) {
        let active = |d: &&mut Downlink| d.source == source && d.state == State::Active;
        let Some(downlink) = self.downlinks.iter_mut().find(active) else {
            return;
        };
        let seq = *packet.seq_no;
        // Bandwidth probes are empty: of no use to this client, and not to be counted as loss.
        if packet.payload.is_empty() || !downlink.enabled || muted {
            downlink.rebase.skip(seq);
            return;
        }
        let Some(mid) = downlink.mid.filter(|_| self.rtc.is_connected()) else {
            return;
        };
        let codecs = self.rtc.codec_config();
        let opus = codecs.iter().find(|c| c.spec().codec == Codec::Opus);
        let Some(pt) = opus.map(|c| c.pt()) else {
            return;
        };
        let Some(seq) = downlink.rebase.forward(seq) else {
            return;
        };
        let header = &packet.header;
        // Section ids and transport-wide numbers belong to the other connection.
        let extensions = ExtensionValues {
            audio_level: header.ext_vals.audio_level,
            voice_activity: header.ext_vals.voice_activity,
            ..ExtensionValues::default()
        };
        if let Some(stream) = self.rtc.direct_api().stream_tx_by_mid(mid, None) {
            stream.write_rtp(
                RtpWrite::new(
                    pt,
                    seq.into(),
                    header.timestamp,
                    packet.timestamp,
                    packet.payload.clone(),
                )
                .marker(header.marker)
                .ext_vals(extensions)
                .nackable(true),
            );
        }
    }

    /// Sends or queues a message. Reliable ones wait for the channel to open; lossy ones that
    /// can't go now are dropped.
    pub fn send_data(&mut self, lane: Lane, message: Arc<[u8]>) -> Result<(), Stuck> {
        let queue = self.lane(lane);
        if queue.queued + message.len() > MAX_QUEUED {
            return match lane {
                Lane::Reliable => Err(Stuck),
                Lane::Lossy => Ok(()),
            };
        }
        queue.queued += message.len();
        queue.queue.push_back(message);
        self.flush(lane);
        if lane == Lane::Lossy {
            let queue = self.lane(Lane::Lossy);
            queue.queue.clear();
            queue.queued = 0;
        }
        Ok(())
    }

    pub fn accepts(&self, input: &Input<'_>) -> bool {
        self.rtc.accepts(input)
    }

    pub fn is_connected(&self) -> bool {
        self.rtc.is_connected()
    }

    pub fn handle(&mut self, input: Input<'_>) -> Result<(), RtcError> {
        self.rtc.handle_input(input)
    }

    /// Runs the connection until it has nothing more to do; the result is when it must be run
    /// again at the latest.
    pub fn poll(
        &mut self,
        now: Instant,
        transmit: &mut dyn FnMut(Transmit),
        happenings: &mut Vec<Happening>,
    ) -> Result<Instant, RtcError> {
        self.rtc.handle_input(Input::Timeout(now))?;
        loop {
            self.flush(Lane::Reliable);
            match self.rtc.poll_output()? {
                Output::Timeout(at) => return Ok(at),
                Output::Transmit(datagram) => transmit(datagram),
                Output::Event(event) => happenings.extend(self.event(event)),
            }
        }
    }

    /// Says goodbye to the client (DTLS close) as far as that is possible.
    pub fn close(&mut self, now: Instant, transmit: &mut dyn FnMut(Transmit)) {
        if self.rtc.close().is_err() || self.rtc.handle_input(Input::Timeout(now)).is_err() {
            return;
        }
        while let Ok(Output::Transmit(datagram)) = self.rtc.poll_output() {
            transmit(datagram);
        }
    }

    fn event(&mut self, event: Event) -> Option<Happening> {
        match event {
            Event::Connected => Some(Happening::Connected),
            Event::IceConnectionStateChange(IceConnectionState::Disconnected) | Event::Closed => {
                Some(Happening::Lost)
            }
            Event::IceConnectionStateChange(state) if state.is_connected() => {
                Some(Happening::Found)
            }
            Event::ChannelOpen(id, label) => {
                match label.as_str() {
                    "_reliable" => self.reliable.channel = Some(id),
                    "_lossy" => self.lossy.channel = Some(id),
                    _ => {}
                }
                None
            }
            Event::ChannelClose(id) => {
                for lane in [&mut self.reliable, &mut self.lossy] {
                    lane.channel = lane.channel.filter(|c| *c != id);
                }
                None
            }
            Event::ChannelData(data) => {
                let lane = match Some(data.id) {
                    id if id == self.reliable.channel => Lane::Reliable,
                    id if id == self.lossy.channel => Lane::Lossy,
                    _ => return None,
                };
                Some(Happening::Data(lane, data.data))
            }
            Event::RtpPacket(packet) => {
                // str0m replaces the SSRC, and the mid extension is only on the first packets.
                let ssrc = packet.header.ssrc;
                let mid = self.rtc.direct_api().stream_rx(&ssrc)?.mid();
                Some(Happening::Rtp(mid, packet))
            }
            _ => None,
        }
    }

    fn make_offer(&mut self) -> Option<proto::SessionDescription> {
        if self.offer.pending.is_some() {
            return None;
        }
        // Sections that carried another track before come first; their new SSRC is in the offer.
        let reused = self.reuse_sections();
        let mut api = self.rtc.sdp_api();
        if !std::mem::replace(&mut self.offer.channels_added, true) {
            api.add_channel_with_config(ChannelConfig {
                label: "_reliable".into(),
                ordered: true,
                ..ChannelConfig::default()
            });
            api.add_channel_with_config(ChannelConfig {
                label: "_lossy".into(),
                ordered: false,
                reliability: Reliability::MaxRetransmits { retransmits: 0 },
                ..ChannelConfig::default()
            });
        }
        if std::mem::take(&mut self.offer.restart_ice) {
            api.ice_restart(true);
        }
        for mid in reused {
            api.set_direction(mid, Direction::SendOnly);
        }
        for d in self
            .downlinks
            .iter_mut()
            .filter(|d| d.state == State::Wanted)
        {
            let (stream, track) = (Some(d.stream.clone()), Some(d.track.clone()));
            let mid = api.add_media(MediaKind::Audio, Direction::SendOnly, stream, track, None);
            (d.state, d.mid) = (State::Offered, Some(mid));
        }
        for d in self.downlinks.iter().filter(|d| d.state == State::Ended) {
            if let Some(mid) = d.mid {
                api.set_direction(mid, Direction::Inactive);
                self.sections.push(mid);
            }
        }
        self.downlinks.retain(|d| d.state != State::Ended);
        let (offer, pending) = api.apply()?;
        self.offer.pending = Some(pending);
        self.offer.id += 1;
        let (msids, mid_to_track_id) = self.announced();
        Some(proto::SessionDescription {
            r#type: "offer".into(),
            sdp: sdp::announce(&offer.to_sdp_string(), &msids),
            id: self.offer.id,
            mid_to_track_id,
        })
    }

    fn reuse_sections(&mut self) -> Vec<Mid> {
        let mut reused = Vec::new();
        for d in &mut self.downlinks {
            if d.state != State::Wanted {
                continue;
            }
            let Some(mid) = self.sections.pop() else {
                break;
            };
            (d.state, d.mid) = (State::Offered, Some(mid));
            reused.push(mid);
        }
        for mid in &reused {
            self.renew_stream(*mid);
        }
        reused
    }

    fn require_sections(&mut self) -> Option<proto::MediaSectionsRequirement> {
        if !self.offer.answered || self.offer.requested {
            return None;
        }
        let wanted = self.count(State::Wanted);
        if wanted == 0 && self.count(State::Ended) == 0 {
            return None;
        }
        let free = self.sections.iter().filter(|mid| self.is_free(**mid));
        let missing = wanted.saturating_sub(free.count());
        self.offer.requested = true;
        Some(proto::MediaSectionsRequirement {
            num_audios: missing as u32,
            num_videos: 0,
        })
    }

    /// Gives wanted tracks to the client's sections, which it numbers itself.
    fn assign(&mut self, sections: &[Section]) {
        (self.offer.answered, self.offer.requested) = (true, false);
        self.downlinks.retain(|d| d.state != State::Ended);
        let takes = |s: &&Section| s.kind == Kind::Audio && s.receives && !s.sends;
        self.sections = (sections.iter().filter(takes))
            .map(|s| Mid::from(s.mid.as_str()))
            .collect();
        for d in &mut self.downlinks {
            if d.mid.is_some_and(|mid| !self.sections.contains(&mid)) {
                (d.state, d.mid, d.rebase) = (State::Wanted, None, Rebase::default());
            }
        }
        for mid in self.sections.clone() {
            if !self.is_free(mid) {
                continue;
            }
            let mut downlinks = self.downlinks.iter_mut();
            let Some(d) = downlinks.find(|d| d.state == State::Wanted) else {
                break;
            };
            (d.state, d.mid) = (State::Offered, Some(mid));
            if !self.used.insert(mid) {
                self.renew_stream(mid);
            }
        }
    }

    /// A section's next track is a new stream to the client: new SSRC, rollover counter 0.
    fn renew_stream(&mut self, mid: Mid) {
        let mut api = self.rtc.direct_api();
        let ssrc = api.new_ssrc();
        api.reset_stream_tx(mid, None, ssrc, None);
    }

    fn activate(&mut self) -> Vec<String> {
        let offered = self
            .downlinks
            .iter_mut()
            .filter(|d| d.state == State::Offered);
        offered
            .map(|d| {
                d.state = State::Active;
                d.track.clone()
            })
            .collect()
    }

    /// What each section announces, and LiveKit's map of it.
    fn announced(&self) -> (HashMap<String, Msid>, HashMap<String, String>) {
        let sending = |d: &&Downlink| matches!(d.state, State::Offered | State::Active);
        let (mut msids, mut tracks) = (HashMap::new(), HashMap::new());
        for d in self.downlinks.iter().filter(sending) {
            let Some(mid) = d.mid else { continue };
            let (stream, track) = (d.stream.clone(), d.track.clone());
            tracks.insert(mid.to_string(), track.clone());
            msids.insert(mid.to_string(), Msid { stream, track });
        }
        (msids, tracks)
    }

    fn flush(&mut self, lane: Lane) {
        let Self {
            rtc,
            reliable,
            lossy,
            ..
        } = self;
        let lane = match lane {
            Lane::Reliable => reliable,
            Lane::Lossy => lossy,
        };
        let Some(channel) = lane.channel else { return };
        while let Some(message) = lane.queue.front() {
            let Some(mut open) = rtc.channel(channel) else {
                return;
            };
            match open.write(true, message) {
                Ok(true) => {}
                // Full: goes on once the client has acknowledged some.
                Ok(false) => return,
                Err(e) => tracing::debug!("message dropped: {e}"),
            }
            lane.queued -= message.len();
            lane.queue.pop_front();
        }
    }

    fn lane(&mut self, lane: Lane) -> &mut DataLane {
        match lane {
            Lane::Reliable => &mut self.reliable,
            Lane::Lossy => &mut self.lossy,
        }
    }

    fn live_downlinks(&mut self) -> impl Iterator<Item = &mut Downlink> {
        self.downlinks
            .iter_mut()
            .filter(|d| d.state != State::Ended)
    }

    fn count(&self, state: State) -> usize {
        self.downlinks.iter().filter(|d| d.state == state).count()
    }

    fn is_free(&self, mid: Mid) -> bool {
        let mut downlinks = self.downlinks.iter();
        !downlinks.any(|d| d.mid == Some(mid) && d.state != State::Ended)
    }
}
