//! Transceivers, and RTP in both directions.

use std::time::Instant;

use str0m::{
    format::Codec,
    media::{Mid, Pt},
    rtp::{ExtensionValues, RtpPacket, RtpWrite},
};

use super::{
    received::Source,
    session::{Event, Session},
};
use crate::{
    MediaType, RtcError,
    encoded_audio::EncodedAudioFrame,
    rtp_sender::{EncodedPacket, RtpSender},
    rtp_transceiver::{RtpTransceiver, RtpTransceiverDirection, RtpTransceiverInit},
};

/// Sources that are remembered; beyond, all are looked up anew.
const MAX_SOURCES: usize = 1024;

impl Session {
    pub(crate) fn transceivers(&self) -> &[RtpTransceiver] {
        &self.transceivers
    }

    pub(crate) fn add_transceiver(
        &mut self,
        kind: MediaType,
        init: RtpTransceiverInit,
    ) -> Result<RtpTransceiver, RtcError> {
        self.check_open()?;
        let transceiver = RtpTransceiver::new(kind, init, self.peer.clone());
        // The SDK adds some for video in advance. They are not offered: servers ask for sections when
        // there is something to put in, over and over until they have them, so later ones are.
        let in_advance = self.local.is_none() && self.remote.is_none();
        if kind == MediaType::Video && in_advance {
            return Ok(transceiver);
        }
        self.transceivers.push(transceiver.clone());
        self.flag_negotiation();
        Ok(transceiver)
    }

    pub(crate) fn remove_track(&mut self, sender: &RtpSender) -> Result<(), RtcError> {
        self.check_open()?;
        sender.set_track(None)?;
        if let Some(transceiver) = self.transceivers.iter().find(|t| t.sender().is(sender)) {
            let direction = transceiver.direction();
            if direction.sends() {
                let receives = direction.receives();
                transceiver.set_direction(RtpTransceiverDirection::of(false, receives));
                self.flag_negotiation();
            }
        }
        Ok(())
    }

    pub(super) fn transceiver(&self, mid: Mid) -> Option<&RtpTransceiver> {
        self.transceivers
            .iter()
            .find(|transceiver| transceiver.bound_mid() == Some(mid))
    }

    pub(crate) fn can_send(&self, mid: Mid) -> bool {
        self.payload_type(mid).is_some()
    }

    /// What Opus is sent as in that section. None if it does not send now.
    fn payload_type(&self, mid: Mid) -> Option<Pt> {
        if !self.has_way() {
            return None;
        }
        let rtc = self.rtc.as_ref()?;
        let media = rtc
            .media(mid)
            .filter(|media| media.direction().is_sending())?;
        let is_opus = |pt: &Pt| {
            let mut known = rtc.codec_config().iter();
            known.any(|params| params.pt() == *pt && params.spec().codec == Codec::Opus)
        };
        media.remote_pts().iter().copied().find(is_opus)
    }

    /// Returns false if the packet can't go now: never connected, or the section does not send.
    /// Nothing is queued then, as it would be too late when it went.
    pub(crate) fn send_audio(
        &mut self,
        mid: Mid,
        sequence: u64,
        timestamp: u32,
        marker: bool,
        packet: EncodedPacket,
    ) -> bool {
        let Some(pt) = self.payload_type(mid) else {
            return false;
        };
        let Some(rtc) = &mut self.rtc else {
            return false;
        };
        let mut api = rtc.direct_api();
        let Some(stream) = api.stream_tx_by_mid(mid, None) else {
            return false;
        };
        let extensions = ExtensionValues {
            audio_level: packet.level,
            voice_activity: packet.level.map(|level| level > -127),
            ..ExtensionValues::default()
        };
        stream.write_rtp(
            RtpWrite::new(
                pt,
                sequence.into(),
                timestamp,
                Instant::now(),
                packet.payload,
            )
            .marker(marker)
            .ext_vals(extensions),
        );
        true
    }

    pub(super) fn on_rtp(&mut self, packet: RtpPacket) {
        let ssrc = *packet.header.ssrc;
        let Some(source) = self.source(ssrc) else {
            return log::trace!("packet of unknown source {ssrc} dropped");
        };
        let missing = source.received.note(&packet);
        // Padding only: a bandwidth probe.
        if packet.payload.is_empty() {
            return;
        }
        let Some(track) = source.transceiver.receiver().audio_track(ssrc) else {
            return;
        };
        let frame = EncodedAudioFrame {
            payload: packet.payload,
            rtp_timestamp: packet.header.timestamp,
            sequence: *packet.seq_no,
            missing,
            ssrc,
            audio_level: packet.header.ext_vals.audio_level,
            voice_activity: packet.header.ext_vals.voice_activity,
            received_at: packet.timestamp,
        };
        self.output.events.push(Event::Audio(track, frame));
    }

    /// The stack's packets don't say their section.
    fn source(&mut self, ssrc: u32) -> Option<&mut Source> {
        if !self.sources.contains_key(&ssrc) {
            let mid = self
                .rtc
                .as_mut()?
                .direct_api()
                .stream_rx(&ssrc.into())?
                .mid();
            let transceiver = self.transceiver(mid)?.clone();
            if self.sources.len() >= MAX_SOURCES {
                self.sources.clear();
            }
            self.sources.insert(ssrc, Source::new(transceiver));
        }
        self.sources.get_mut(&ssrc)
    }

    /// Sources that a new description took away: the stack would keep them for ever.
    pub(super) fn forget_sources(&mut self, ssrcs: &[u32]) {
        for ssrc in ssrcs {
            self.sources.remove(ssrc);
            if let Some(rtc) = &mut self.rtc {
                rtc.direct_api().remove_stream_rx((*ssrc).into());
            }
        }
    }
}
