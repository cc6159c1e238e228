//! Offers and answers as in JSEP (RFC 8829), on the stack's offer API.
//!
//! The stack applies a local offer only when its answer comes, so an offer is held here until
//! then, and dropping it undoes it; a remote offer it applies and answers at once.

use std::{collections::HashSet, sync::Arc};

use str0m::{
    Candidate, Rtc,
    change::{SdpAnswer, SdpOffer, SdpPendingOffer},
    media::{Direction, MediaKind, Mid},
};

use super::{
    sdp::{self, Section, Shown},
    session::{Event, MAX_REMOTE_CANDIDATES, Session},
};
use crate::{
    MediaType, RtcError,
    data_channel::{ChannelInner, DataChannelState},
    peer_connection::{OfferOptions, SignalingState, TrackEvent},
    rtp_receiver::Msid,
    rtp_transceiver::{RtpTransceiver, RtpTransceiverDirection, RtpTransceiverInit},
    session_description::{SdpType, SessionDescription},
};

/// Media sections of one description that are looked at.
const MAX_SECTIONS: usize = 2048;

/// The exchange that is under way.
#[derive(Default)]
pub(super) struct Exchange {
    offer: Option<Offer>,
    /// A remote offer and the stack's answer to it.
    answer: Option<(SessionDescription, SessionDescription)>,
}

/// A local offer that awaits its answer.
struct Offer {
    /// None if there was nothing to negotiate: the last description was offered again.
    pending: Option<SdpPendingOffer>,
    /// Sections that come into being with it.
    sections: Vec<(RtpTransceiver, Mid)>,
    /// The channel that stands for the application section: there is none without a channel.
    carrier: Option<Arc<ChannelInner>>,
    restart: bool,
}

impl Session {
    pub(crate) fn create_offer(
        &mut self,
        options: &OfferOptions,
    ) -> Result<SessionDescription, RtcError> {
        self.stack()?;
        if self.signaling != SignalingState::Stable {
            return Err(RtcError::invalid_state("another exchange is not finished"));
        }
        self.drop_offer();
        let carrier = self.choose_carrier();
        let restart = (options.ice_restart || self.restart_wanted) && self.remote.is_some();
        let transceivers = self.transceivers.clone();

        let rtc = self.stack()?;
        for transceiver in &transceivers {
            declare_source(rtc, transceiver);
        }
        let spare = spare_section(rtc, &transceivers);
        let mut api = rtc.sdp_api();
        let mut sections = Vec::new();
        for transceiver in transceivers {
            let direction = transceiver.direction();
            match (transceiver.bound_mid(), direction) {
                (Some(mid), RtpTransceiverDirection::Stopped) => api.stop_media(mid),
                (Some(mid), _) => api.set_direction(mid, stack_direction(direction)),
                (None, RtpTransceiverDirection::Stopped) => {}
                (None, _) => {
                    let kind = match transceiver.kind() {
                        MediaType::Video => MediaKind::Video,
                        _ => MediaKind::Audio,
                    };
                    let msid = local_msid(&transceiver);
                    let (stream, track) = (Some(msid.stream), Some(msid.track));
                    let direction = stack_direction(direction);
                    let mid = api.add_media(kind, direction, stream, track, None);
                    sections.push((transceiver, mid));
                }
            }
        }
        if let Some(channel) = &carrier {
            channel.set_id(Some(api.add_channel_with_config(channel.config.clone())));
        }
        if restart {
            api.ice_restart(true);
        }
        if !api.has_changes()
            && let Some((mid, direction)) = spare
        {
            // Asked for all the same: servers hand out sections in answers.
            let other = match direction {
                Direction::Inactive => Direction::RecvOnly,
                _ => Direction::Inactive,
            };
            api.set_direction(mid, other);
            api.set_direction(mid, direction);
        }
        let (text, pending) = match api.apply() {
            Some((offer, pending)) => (
                sdp::rewrite(&offer.to_sdp_string(), |_| None),
                Some(pending),
            ),
            None => match &self.local {
                Some(local) if local.sdp_type() == SdpType::Offer => (local.to_string(), None),
                _ => return Err(RtcError::invalid_state("there is nothing to offer")),
            },
        };
        self.negotiation_flagged = false;
        self.exchange.offer = Some(Offer {
            pending,
            sections,
            carrier,
            restart,
        });
        Ok(SessionDescription::new(&text, SdpType::Offer))
    }

    pub(crate) fn create_answer(&mut self) -> Result<SessionDescription, RtcError> {
        self.check_open()?;
        match &self.exchange.answer {
            Some((_, answer)) => Ok(answer.clone()),
            None => Err(RtcError::invalid_state("there is no remote offer")),
        }
    }

    pub(crate) fn set_local_description(
        &mut self,
        description: SessionDescription,
    ) -> Result<(), RtcError> {
        self.stack()?;
        match description.sdp_type() {
            SdpType::Offer => self.set_local_offer(description),
            SdpType::Answer => {
                let Some((offer, _)) = self.exchange.answer.take() else {
                    return Err(RtcError::invalid_state("there is no remote offer"));
                };
                self.remote = Some(offer);
                self.local = Some(description);
                self.set_signaling(SignalingState::Stable);
                self.gather();
                Ok(())
            }
            SdpType::PrAnswer => Err(RtcError::unsupported("a provisional answer")),
            SdpType::Rollback => {
                self.roll_back();
                Ok(())
            }
        }
    }

    pub(crate) fn set_remote_description(
        &mut self,
        description: SessionDescription,
    ) -> Result<(), RtcError> {
        self.stack()?;
        let text = sdp::with_few_candidates(description.as_str(), MAX_REMOTE_CANDIDATES);
        let description = SessionDescription::new(&text, description.sdp_type());
        match description.sdp_type() {
            SdpType::Offer => self.set_remote_offer(description),
            SdpType::Answer => self.set_remote_answer(description),
            SdpType::PrAnswer => Err(RtcError::unsupported("a provisional answer")),
            SdpType::Rollback => {
                self.roll_back();
                Ok(())
            }
        }
    }

    /// Candidates are sent with the first section's name.
    pub(super) fn first_mid(&self) -> String {
        let answer = self.exchange.answer.as_ref().map(|(_, answer)| answer);
        let text = self
            .local
            .as_ref()
            .or(answer)
            .map_or("", SessionDescription::as_str);
        sdp::sections(text)
            .first()
            .map_or(String::new(), |section| section.mid.to_owned())
    }

    fn set_local_offer(&mut self, description: SessionDescription) -> Result<(), RtcError> {
        if self.signaling != SignalingState::Stable {
            return Err(RtcError::invalid_state("another exchange is not finished"));
        }
        let Some(offer) = &self.exchange.offer else {
            return Err(RtcError::invalid_state("no offer was created"));
        };
        for (transceiver, mid) in &offer.sections {
            transceiver.bind(Some(*mid));
        }
        // The SDK edits directions in the text, to offer sections that it does not use any more
        // for receiving; the next offer has to say the same.
        for section in sdp::sections(description.as_str()) {
            if let Some(transceiver) = self.transceiver(section.mid.into())
                && transceiver.direction() != RtpTransceiverDirection::Stopped
            {
                transceiver.set_direction(section.direction);
            }
        }
        self.local = Some(description);
        self.set_signaling(SignalingState::HaveLocalOffer);
        self.gather();
        Ok(())
    }

    fn set_remote_answer(&mut self, description: SessionDescription) -> Result<(), RtcError> {
        if self.signaling != SignalingState::HaveLocalOffer {
            return Err(RtcError::invalid_state("an answer without an offer"));
        }
        // How the SDK withdraws an offer: it applies the last answer again.
        if self
            .remote
            .as_ref()
            .is_some_and(|last| last.as_str() == description.as_str())
        {
            self.withdraw(description.as_str());
            return Ok(());
        }
        let sections = checked_sections(description.as_str())?;
        let answer = SdpAnswer::from_sdp_string(description.as_str())
            .map_err(|err| RtcError::invalid_sdp(format!("answer: {err}")))?;
        let Some(mut offer) = self.exchange.offer.take() else {
            return Err(RtcError::invalid_state("no offer was created"));
        };
        if let Some(pending) = offer.pending.take()
            && let Err(err) = self.stack()?.sdp_api().accept_answer(pending, answer)
        {
            self.exchange.offer = Some(offer);
            self.roll_back();
            return Err(RtcError::invalid_sdp(format!("answer: {err}")));
        }
        if offer.restart {
            self.restart_wanted = false;
            self.search_again();
        }
        self.note_data_section(&sections);
        self.note_candidates(description.as_str());
        for section in &sections {
            if let Some(transceiver) = self.transceiver(section.mid.into()).cloned() {
                self.apply_section(&transceiver, section);
            }
        }
        self.drop_sources();
        self.remote = Some(description);
        self.set_signaling(SignalingState::Stable);
        Ok(())
    }

    /// The stack has a source for each section that it has offered, also for those that only receive:
    /// kilobytes of buffers, time with each packet, and a report of nothing a second.
    fn drop_sources(&mut self) {
        let Some(rtc) = &mut self.rtc else { return };
        for transceiver in &self.transceivers {
            // One that has sent keeps its source, for its sequence numbers go on.
            let idle = !transceiver.direction().sends() && transceiver.sender().sent().packets == 0;
            let Some(mid) = transceiver.bound_mid().filter(|_| idle) else {
                continue;
            };
            let mut api = rtc.direct_api();
            if let Some(ssrc) = api.stream_tx_by_mid(mid, None).map(|source| source.ssrc()) {
                api.remove_stream_tx(ssrc);
            }
        }
    }

    fn set_remote_offer(&mut self, description: SessionDescription) -> Result<(), RtcError> {
        let sections = checked_sections(description.as_str())?;
        let offer = SdpOffer::from_sdp_string(description.as_str())
            .map_err(|err| RtcError::invalid_sdp(format!("offer: {err}")))?;
        self.roll_back();
        let answer = self.stack()?.sdp_api().accept_offer(offer);
        let answer = answer.map_err(|err| RtcError::invalid_sdp(format!("offer: {err}")))?;

        let restarted = self
            .remote
            .as_ref()
            .is_some_and(|last| sdp::ufrag(last.as_str()) != sdp::ufrag(description.as_str()));
        if restarted {
            self.search_again();
        }
        self.note_data_section(&sections);
        self.note_candidates(description.as_str());
        for section in &sections {
            let Some(transceiver) = self.section_transceiver(section) else {
                continue;
            };
            self.limit_direction(&transceiver);
            self.apply_section(&transceiver, section);
        }
        let text = sdp::rewrite(&answer.to_sdp_string(), |mid| {
            let transceiver = self.transceiver(mid.into())?;
            Some(Shown {
                direction: transceiver.current_direction()?,
                msid: Some(local_msid(transceiver)),
            })
        });
        let answer = SessionDescription::new(&text, SdpType::Answer);
        self.exchange.answer = Some((description, answer));
        self.set_signaling(SignalingState::HaveRemoteOffer);
        Ok(())
    }

    /// Takes back an offer that the remote side may have applied, its answer lost: sections that it
    /// added keep their places and names, or the next offer would contradict it.
    fn withdraw(&mut self, last_answer: &str) {
        let offered = self.local.as_ref().map_or("", SessionDescription::as_str);
        if let Some(answer) = sdp::unchanged(offered, last_answer)
            && let Ok(answer) = SdpAnswer::from_sdp_string(&answer)
            && let Some(offer) = &mut self.exchange.offer
            && !offer.restart
            && let Some(pending) = offer.pending.take()
            && let Some(rtc) = &mut self.rtc
            && rtc.sdp_api().accept_answer(pending, answer).is_ok()
        {
            if offer.carrier.is_some() {
                self.data_negotiated = true;
                self.open_channels();
            }
            self.exchange.offer = None;
        }
        self.roll_back();
    }

    /// Undoes a local offer. The stack has applied a remote one already; it stays without answer.
    fn roll_back(&mut self) {
        self.drop_offer();
        self.exchange.answer = None;
        if self.signaling != SignalingState::Closed {
            self.set_signaling(SignalingState::Stable);
        }
    }

    fn drop_offer(&mut self) {
        let Some(offer) = self.exchange.offer.take() else {
            return;
        };
        for (transceiver, _) in &offer.sections {
            transceiver.bind(None);
        }
        if let Some(carrier) = offer.carrier {
            carrier.set_id(None);
            self.lost_streams.extend(carrier.config.negotiated);
            if carrier.state() == DataChannelState::Closed {
                self.channels
                    .retain(|channel| !Arc::ptr_eq(channel, &carrier));
            }
        }
    }

    fn choose_carrier(&self) -> Option<Arc<ChannelInner>> {
        if self.data_negotiated {
            return None;
        }
        let usable = |channel: &&Arc<ChannelInner>| {
            let lost = channel
                .config
                .negotiated
                .is_some_and(|id| self.lost_streams.contains(&id));
            channel.state() != DataChannelState::Closed && !lost
        };
        self.channels.iter().find(usable).cloned()
    }

    fn note_data_section(&mut self, sections: &[Section]) {
        if sections
            .iter()
            .any(|section| section.kind == "application" && !section.rejected)
        {
            self.data_negotiated = true;
            self.open_channels();
        }
    }

    /// The stack takes candidates from the text by itself; here for the local addresses.
    fn note_candidates(&mut self, text: &str) {
        for line in sdp::candidates(text) {
            if let Ok(candidate) = Candidate::from_sdp_string(line) {
                self.note_remote_candidate(&candidate);
            }
        }
    }

    /// The transceiver of a section that the remote side offers. A new one takes over one that
    /// wants to send, if there is one without a section (RFC 8829, 5.10).
    fn section_transceiver(&mut self, section: &Section) -> Option<RtpTransceiver> {
        let mid: Mid = section.mid.into();
        if let Some(transceiver) = self.transceiver(mid) {
            return Some(transceiver.clone());
        }
        let kind = match section.kind {
            "audio" => MediaType::Audio,
            "video" => MediaType::Video,
            _ => return None,
        };
        self.rtc.as_ref()?.media(mid)?;
        let waiting = self.transceivers.iter().find(|transceiver| {
            transceiver.bound_mid().is_none()
                && transceiver.kind() == kind
                && transceiver.direction().sends()
        });
        let transceiver = match waiting {
            Some(transceiver) if section.direction.receives() => transceiver.clone(),
            _ => {
                let init = RtpTransceiverInit {
                    direction: RtpTransceiverDirection::RecvOnly,
                    stream_ids: vec![],
                    send_encodings: vec![],
                };
                let transceiver = RtpTransceiver::new(kind, init, self.peer.clone());
                self.transceivers.push(transceiver.clone());
                transceiver
            }
        };
        transceiver.bind(Some(mid));
        Some(transceiver)
    }

    /// The stack mirrors what is offered; we may want less.
    fn limit_direction(&mut self, transceiver: &RtpTransceiver) {
        let Some(mid) = transceiver.bound_mid() else {
            return;
        };
        let Some(rtc) = &mut self.rtc else { return };
        let Some(offered) = rtc.media(mid).map(|media| media.direction()) else {
            return;
        };
        let wanted = transceiver.direction();
        let agreed = RtpTransceiverDirection::of(
            offered.is_sending() && wanted.sends(),
            offered.is_receiving() && wanted.receives(),
        );
        rtc.sdp_api().set_direction(mid, stack_direction(agreed));
    }

    /// Takes over what the remote side says of a section, after the stack has.
    fn apply_section(&mut self, transceiver: &RtpTransceiver, section: &Section) {
        let negotiated = transceiver
            .bound_mid()
            .and_then(|mid| self.rtc.as_ref().and_then(|rtc| rtc.media(mid)))
            .map_or(Direction::Inactive, |media| media.direction());
        transceiver.set_current_direction(RtpTransceiverDirection::of(
            negotiated.is_sending(),
            negotiated.is_receiving(),
        ));

        transceiver.sender().set_wish(section.wish);

        // Servers mark idle sections as sending too; only those with a track are meant.
        let sends = section.direction.sends() && !section.rejected && negotiated.is_receiving();
        let msid = section.msid.clone().filter(|_| sends);
        let ssrcs = if msid.is_some() {
            section.ssrcs.clone()
        } else {
            Vec::new()
        };
        let receiver = transceiver.receiver();
        let change = receiver.announce(msid, ssrcs);
        self.forget_sources(&change.stale_ssrcs);
        if change.added
            && let Some(track) = receiver.track()
        {
            let streams = receiver.streams();
            let transceiver = transceiver.clone();
            let event = TrackEvent {
                receiver,
                streams,
                track,
                transceiver,
            };
            self.output.events.push(Event::Track(event));
        }
    }
}

/// Sections of a remote description; an error if they can't be told apart.
fn checked_sections(text: &str) -> Result<Vec<Section<'_>>, RtcError> {
    let sections = sdp::sections(text);
    if sections.len() > MAX_SECTIONS {
        return Err(RtcError::invalid_sdp("too many media sections"));
    }
    let mut mids = HashSet::new();
    if !sections
        .iter()
        .all(|section| mids.insert(Mid::from(section.mid)))
    {
        return Err(RtcError::invalid_sdp(
            "two media sections have the same mid",
        ));
    }
    Ok(sections)
}

/// One for a section that is to send after all, so that the offer can name it.
fn declare_source(rtc: &mut Rtc, transceiver: &RtpTransceiver) {
    if let Some(mid) = transceiver.bound_mid()
        && transceiver.kind() == MediaType::Audio
        && transceiver.direction().sends()
        && rtc.media(mid).is_some()
    {
        let mut api = rtc.direct_api();
        if api.stream_tx_by_mid(mid, None).is_none() {
            let ssrc = api.new_ssrc();
            api.declare_stream_tx(ssrc, None, mid, None);
        }
    }
}

/// A section whose direction can be touched without disturbing anything, if there is one.
fn spare_section(rtc: &Rtc, transceivers: &[RtpTransceiver]) -> Option<(Mid, Direction)> {
    let sections = transceivers.iter().filter_map(|transceiver| {
        let mid = transceiver.bound_mid()?;
        Some((mid, rtc.media(mid)?.direction()))
    });
    sections.min_by_key(|(_, direction)| (direction.is_sending(), direction.is_receiving()))
}

/// How a transceiver's own track is named; the server finds the publication by the track's id.
fn local_msid(transceiver: &RtpTransceiver) -> Msid {
    let track = transceiver
        .sender()
        .track()
        .map(|track| track.id())
        .unwrap_or_default();
    Msid {
        stream: transceiver.stream_id().unwrap_or("-").to_owned(),
        track,
    }
}

fn stack_direction(direction: RtpTransceiverDirection) -> Direction {
    match direction {
        RtpTransceiverDirection::SendRecv => Direction::SendRecv,
        RtpTransceiverDirection::SendOnly => Direction::SendOnly,
        RtpTransceiverDirection::RecvOnly => Direction::RecvOnly,
        RtpTransceiverDirection::Inactive | RtpTransceiverDirection::Stopped => Direction::Inactive,
    }
}
