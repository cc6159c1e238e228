//! Tracks, subscriptions and data: who publishes what, who gets it, and the negotiation of it.

use super::{
    connection::{Answered, ConnectionId, Demand, Lane, NegotiationError, Role, Source},
    core::Core,
    participant::{Key, PendingTrack, Track, new_sid},
    sdp::{self, Kind, Section},
    webhooks::Event,
    witness::{TrackRecord, unix_ms},
};
use livekit_protocol::{
    self as proto, AudioTrackFeature, JobType, TrackSource, TrackType, data_packet::Value,
    data_stream::header::ContentHeader, signal_response::Message,
};
use prost::Message as _;
use std::{collections::HashMap, sync::Arc, time::Instant};
use str0m::media::Mid;

/// Announced but not yet negotiated tracks of one participant. LiveKit's limit.
const MAX_PENDING: usize = 20;
/// Published tracks of one participant.
const MAX_TRACKS: usize = 50;

impl Core {
    /// AddTrack: the client is about to publish.
    pub(super) fn add_track(&mut self, key: Key, request: proto::AddTrackRequest) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        use proto::request_response::Reason;
        if !p.can_publish(request.source) {
            let message = "does not have permission to publish";
            return self.refuse(key, 0, Reason::NotAllowed, message);
        }
        if p.pending.len() >= MAX_PENDING || p.tracks.len() >= MAX_TRACKS {
            return self.refuse(key, 0, Reason::LimitExceeded, "too many tracks");
        }
        // A client that did not see the answer asks again.
        let known = p.pending.iter().find(|t| t.cid == request.cid);
        let info = known.map_or_else(|| track_info(&request), |t| t.info.clone());
        if known.is_none() {
            p.pending.push(PendingTrack {
                cid: request.cid.clone(),
                info: info.clone(),
            });
        }
        let response = proto::TrackPublishedResponse {
            cid: request.cid,
            track: Some(info),
        };
        self.send(key, Message::TrackPublished(response));
    }

    /// Mutes or unmutes a participant's track, on whoever's behalf. None if there is no such.
    pub(super) fn mute(&mut self, key: Key, sid: &str, muted: bool) -> Option<proto::TrackInfo> {
        let p = self.participants.get_mut(&key)?;
        if let Some(t) = p.pending.iter_mut().find(|t| t.info.sid == sid) {
            t.info.muted = muted;
            return Some(t.info.clone());
        }
        let track = p.tracks.iter_mut().find(|t| t.info.sid == sid)?;
        let changed = std::mem::replace(&mut track.info.muted, muted) != muted;
        let info = track.info.clone();
        if changed {
            self.media.mute(track.source, muted);
            if let Some(room) = self.rooms.get(&p.room) {
                self.recorder.muted(&room.info.sid, &p.info.sid, sid, muted);
            }
            self.announce(key, false);
        }
        Some(info)
    }

    /// An offer on the connection that the client publishes on.
    pub(super) fn offer(&mut self, key: Key, offer: &proto::SessionDescription) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        let id = match p.publisher {
            Some(id) => id,
            None => {
                let id = self.media.open(Role::Publisher, Instant::now());
                self.owners.insert(id, key);
                p.publisher = Some(id);
                id
            }
        };
        self.apply_faults(key);
        let Some(answered) = self.media.accept_offer(id, offer) else {
            return;
        };
        match answered {
            Ok(answered) => self.answered(key, id, answered),
            Err(e) => self.negotiation_failed(key, &e),
        }
    }

    /// The answer to an offer of ours.
    pub(super) fn answer(&mut self, key: Key, answer: &proto::SessionDescription) {
        let subscriber = self.participants.get(&key).and_then(|p| p.subscriber);
        let Some(id) = subscriber else { return };
        match self.media.accept_answer(id, answer) {
            Some(Ok(subscribed)) => self.tell_subscribed(key, subscribed),
            // The answer to an offer that a resume has made void.
            Some(Err(NegotiationError::UnexpectedAnswer)) => {}
            Some(Err(e)) => self.negotiation_failed(key, &e),
            None => {}
        }
        self.negotiate(key);
    }

    /// Brings what the client receives in line with its subscriptions.
    pub(super) fn negotiate(&mut self, key: Key) {
        let subscriber = self.participants.get(&key).and_then(|p| p.subscriber);
        if let Some(demand) = subscriber.and_then(|id| self.media.negotiate(id)) {
            self.demand(key, demand);
        }
    }

    pub(super) fn demand(&mut self, key: Key, demand: Demand) {
        self.send(
            key,
            match demand {
                Demand::Offer(offer) => Message::Offer(offer),
                Demand::Sections(sections) => Message::MediaSectionsRequirement(sections),
            },
        );
    }

    /// Subscribes to all there is, if the client wants that. Call [`Self::negotiate`] after it.
    pub(super) fn subscribe_to_all(&mut self, key: Key) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        if !p.auto_subscribe {
            return;
        }
        for track in self.tracks_in(&p.room.clone()) {
            self.subscribe(key, &track);
        }
    }

    /// UpdateSubscription, from the client or the API.
    pub(super) fn update_subscription(&mut self, key: Key, update: &proto::UpdateSubscription) {
        let by_participant = update.participant_tracks.iter();
        let sids = (update.track_sids.iter()).chain(by_participant.flat_map(|p| &p.track_sids));
        for sid in sids {
            self.note_choice(key, sid, update.subscribe);
            if update.subscribe {
                self.subscribe(key, sid);
            } else {
                self.unsubscribe(key, sid);
            }
        }
        self.negotiate(key);
    }

    /// Pauses or resumes tracks for one subscriber.
    pub(super) fn track_settings(&mut self, key: Key, settings: &proto::UpdateTrackSettings) {
        let subscriber = self.participants.get(&key).and_then(|p| p.subscriber);
        for sid in &settings.track_sids {
            if let Some(id) = subscriber {
                self.media.enable(id, sid, !settings.disabled);
            }
        }
    }

    /// Brings everyone's subscriptions in line with permissions that have changed.
    pub(super) fn review_subscriptions(&mut self, room: &str) {
        let tracks = self.tracks_in(room);
        for key in self.members(room) {
            let Some(p) = self.participants.get(&key) else {
                continue;
            };
            let wanted: Vec<_> = tracks.iter().map(|sid| (sid, p.wants(sid))).collect();
            for (sid, wanted) in wanted {
                if !self.may_subscribe(key, sid) {
                    self.unsubscribe(key, sid);
                } else if wanted {
                    self.subscribe(key, sid);
                }
            }
            self.negotiate(key);
        }
    }

    /// Ends tracks that the participant may not publish any more.
    pub(super) fn review_tracks(&mut self, key: Key) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        let revoked = p.tracks.iter().filter(|t| !p.can_publish(t.info.source));
        let revoked: Vec<_> = revoked.map(|t| t.info.sid.clone()).collect();
        for sid in revoked {
            self.end_track(key, &sid);
        }
    }

    /// A data packet from a participant, to be passed on.
    pub(super) fn data(&mut self, key: Key, lane: Lane, data: &[u8]) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        if !p.permission().can_publish_data {
            return;
        }
        let Ok(packet) = proto::DataPacket::decode(data) else {
            tracing::debug!(identity = p.info.identity, "not a data packet");
            return;
        };
        if packet.sequence > 0 {
            p.last_sequence = packet.sequence;
        }
        // Decoding and encoding would lose fields that this version of the protocol does not
        // know. What is appended wins over what came before it, whatever the client claimed.
        let mut stamped = data.to_vec();
        stamped.extend(sender_fields(&packet, &p.info).encode_to_vec());
        let room = p.room.clone();
        self.distribute(&room, Some(key), &packet, lane, stamped.into());
    }

    /// Sends an encoded data packet to those it is for.
    pub(super) fn distribute(
        &mut self,
        room: &str,
        from: Option<Key>,
        packet: &proto::DataPacket,
        lane: Lane,
        encoded: Arc<[u8]>,
    ) {
        if let Some(room) = self.rooms.get(room) {
            self.recorder.data_received(&room.info.sid);
        }
        let (mut identities, mut sids) = (packet.destination_identities.clone(), Vec::new());
        #[allow(deprecated)]
        if let Some(Value::User(user)) = &packet.value {
            identities.extend(user.destination_identities.iter().cloned());
            sids.extend(user.destination_sids.iter().cloned());
        }
        let to_all = identities.is_empty() && sids.is_empty();
        for key in self.members(room) {
            let Some(p) = self.participants.get(&key).filter(|_| Some(key) != from) else {
                continue;
            };
            if !to_all && !identities.contains(&p.info.identity) && !sids.contains(&p.info.sid) {
                continue;
            }
            let Some(id) = p.subscriber else { continue };
            if self.media.send_data(id, lane, encoded.clone()).is_err() {
                tracing::warn!(identity = p.info.identity, "does not take data: dropped");
                self.reconnect_fully(key);
            }
        }
    }

    /// Takes an ended track away from everyone who has it. They learn of it by
    /// [`Self::negotiate`].
    pub(super) fn drop_subscribers(&mut self, room: &str, track: &Track) {
        self.media.end_source(track.source);
        for key in self.members(room) {
            let Some(p) = self.participants.get_mut(&key) else {
                continue;
            };
            p.declined.remove(&track.info.sid);
            let Some(id) = p.subscriber else { continue };
            self.media.unsubscribe(id, &track.info.sid, track.source);
        }
    }

    /// Tells a client that its request was refused.
    pub(super) fn refuse(
        &mut self,
        key: Key,
        request_id: u32,
        reason: proto::request_response::Reason,
        message: &str,
    ) {
        let response = proto::RequestResponse {
            request_id,
            reason: reason as i32,
            message: message.to_owned(),
            request: None,
        };
        self.send(key, Message::RequestResponse(response));
    }

    fn answered(&mut self, key: Key, id: ConnectionId, answered: Answered) {
        let Answered {
            mut answer,
            sections,
            subscribed,
        } = answered;
        answer.sdp = sdp::tune(&answer.sdp, &self.wanted_of_opus(key, &sections));
        self.send(key, Message::Answer(answer));
        self.tell_subscribed(key, subscribed);
        self.reconcile_tracks(key, id, &sections);
        self.negotiate(key);
    }

    /// How the client is to encode what it has announced, by mid.
    fn wanted_of_opus(&self, key: Key, sections: &[Section]) -> HashMap<String, String> {
        let Some(p) = self.participants.get(&key) else {
            return HashMap::new();
        };
        let info = |section: &Section| {
            let named = |cid: &str| cid == section.track || cid == section.stream;
            let pending = p.pending.iter().find(|track| named(&track.cid));
            let published = || p.tracks.iter().find(|track| named(&track.cid));
            (pending.map(|t| &t.info)).or_else(|| published().map(|t| &t.info))
        };
        let audio = sections.iter().filter(|s| {
            s.kind == Kind::Audio && s.sends && !(s.track.is_empty() && s.stream.is_empty())
        });
        // Old clients know no `audio_features`.
        #[allow(deprecated)]
        let wanted = audio.filter_map(|section| {
            let info = info(section)?;
            let has = |feature| info.audio_features().any(|f| f == feature);
            let mut wanted = String::new();
            if !(info.disable_dtx || has(AudioTrackFeature::TfNoDtx)) {
                wanted.push_str(";usedtx=1");
            }
            if info.stereo || has(AudioTrackFeature::TfStereo) {
                wanted.push_str(";stereo=1;maxaveragebitrate=510000");
            }
            Some((section.mid.clone(), wanted))
        });
        wanted.collect()
    }

    /// Matches what the client sends, as its offer says, with what it has announced.
    fn reconcile_tracks(&mut self, key: Key, id: ConnectionId, sections: &[Section]) {
        for section in sections.iter().filter(|s| s.kind != Kind::Application) {
            let source = Source {
                connection: id,
                mid: Mid::from(section.mid.as_str()),
            };
            let Some(p) = self.participants.get(&key) else {
                return;
            };
            let current = p.tracks.iter().find(|t| t.source == source);
            let replaced = current.is_some_and(|t| {
                t.cid != section.track && p.pending.iter().any(|n| n.cid == section.track)
            });
            let sid = current.map(|t| t.info.sid.clone());
            if let Some(sid) = sid.filter(|_| replaced || !section.sends) {
                self.end_track(key, &sid);
            }
            if section.sends && (replaced || self.track_at(key, source).is_none()) {
                self.start_track(key, source, section);
            }
        }
    }

    fn start_track(&mut self, key: Key, source: Source, section: &Section) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        let kind = match section.kind {
            Kind::Video => TrackType::Video,
            Kind::Audio | Kind::Application => TrackType::Audio,
        } as i32;
        let named = |t: &PendingTrack| t.cid == section.track || t.cid == section.stream;
        let position = (p.pending.iter().position(named))
            .or_else(|| p.pending.iter().position(|t| t.info.r#type == kind));
        let Some(position) = position else {
            tracing::debug!(identity = p.info.identity, "media that was not announced");
            return;
        };
        let PendingTrack { mut info, .. } = p.pending.remove(position);
        info.mid = section.mid.clone();
        let record = TrackRecord {
            sid: info.sid.clone(),
            name: info.name.clone(),
            source: info.source().as_str_name(),
            muted: info.muted,
            ..TrackRecord::default()
        };
        if let Some(room) = self.rooms.get(&p.room) {
            self.recorder.published(&room.info.sid, &p.info.sid, record);
        }
        let (sid, muted, room) = (info.sid.clone(), info.muted, p.room.clone());
        p.tracks.push(Track {
            info,
            source,
            cid: section.track.clone(),
            packets: 0,
            spell: None,
        });
        let first = !std::mem::replace(&mut p.has_published, true);
        let (publisher, track) = (p.info.clone(), p.tracks.last().map(|t| t.info.clone()));
        self.media.mute(source, muted);
        let who = &publisher.identity;
        let stopped = self.faults.borrow().media_stopped.includes(who);
        self.media.stop(source, stopped);
        if let Some((room, track)) = self.room_info(&room).zip(track) {
            self.notify(&room, &Event::TrackPublished(&publisher, &track));
        }
        self.announce(key, false);
        if first {
            self.launch_for(key, JobType::JtPublisher);
        }
        for other in self.members(&room) {
            let participant = self.participants.get(&other);
            if participant.is_some_and(|p| p.auto_subscribe) && self.subscribe(other, &sid) {
                self.negotiate(other);
            }
        }
    }

    fn end_track(&mut self, key: Key, sid: &str) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        let Some(position) = p.tracks.iter().position(|t| t.info.sid == sid) else {
            return;
        };
        let track = p.tracks.remove(position);
        let room = p.room.clone();
        let publisher = p.info.clone();
        if let Some(room) = self.room_info(&room) {
            self.recorder.unpublished(&room.sid, &publisher.sid, sid);
            self.notify(&room, &Event::TrackUnpublished(&publisher, &track.info));
        }
        let track_sid = sid.to_owned();
        let response = proto::TrackUnpublishedResponse { track_sid };
        self.send(key, Message::TrackUnpublished(response));
        self.announce(key, false);
        self.drop_subscribers(&room, &track);
        for other in self.members(&room) {
            self.negotiate(other);
        }
    }

    /// Remembers that a client has decided about a track, until the track ends.
    fn note_choice(&mut self, key: Key, sid: &str, subscribe: bool) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        // Only tracks that exist: clients can name anything.
        let declined = !subscribe && self.find_track(&p.room, sid).is_some();
        if let Some(p) = self.participants.get_mut(&key) {
            if declined {
                p.declined.insert(sid.to_owned());
            } else {
                p.declined.remove(sid);
            }
        }
    }

    /// False if the participant may not, or has the track already.
    fn subscribe(&mut self, key: Key, sid: &str) -> bool {
        if !self.may_subscribe(key, sid) {
            return false;
        }
        let Some(p) = self.participants.get(&key) else {
            return false;
        };
        let (Some((publisher, track)), Some(id)) = (self.find_track(&p.room, sid), p.subscriber)
        else {
            return false;
        };
        let stream = format!("{publisher}|{sid}");
        self.media.subscribe(id, sid, stream, track)
    }

    fn unsubscribe(&mut self, key: Key, sid: &str) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        if let (Some((_, track)), Some(id)) = (self.find_track(&p.room, sid), p.subscriber) {
            self.media.unsubscribe(id, sid, track);
        }
    }

    fn may_subscribe(&self, key: Key, sid: &str) -> bool {
        let Some(p) = self.participants.get(&key) else {
            return false;
        };
        let publishers = self.members(&p.room).into_iter();
        let publisher = publishers
            .filter_map(|k| self.participants.get(&k))
            .find(|o| o.tracks.iter().any(|t| t.info.sid == sid));
        p.permission().can_subscribe
            && publisher.is_some_and(|o| o.key != key && o.lets(&p.info, sid))
    }

    /// The publisher's sid and the source of an audio track; video is not forwarded.
    fn find_track(&self, room: &str, sid: &str) -> Option<(String, Source)> {
        let members = self.members(room).into_iter();
        members
            .filter_map(|key| self.participants.get(&key))
            .find_map(|p| {
                let track = p.tracks.iter().find(|t| t.info.sid == sid)?;
                let audio = track.info.r#type == TrackType::Audio as i32;
                audio.then(|| (p.info.sid.clone(), track.source))
            })
    }

    fn track_at(&self, key: Key, source: Source) -> Option<&Track> {
        let participant = self.participants.get(&key)?;
        participant.tracks.iter().find(|t| t.source == source)
    }

    fn tracks_in(&self, room: &str) -> Vec<String> {
        let members = self.members(room).into_iter();
        members
            .filter_map(|key| self.participants.get(&key))
            .flat_map(|p| p.tracks.iter().map(|t| t.info.sid.clone()))
            .collect()
    }

    /// Tells publishers that someone hears them, and the witness nothing: it counts streams.
    fn tell_subscribed(&mut self, subscriber: Key, sids: Vec<String>) {
        let Some(p) = self.participants.get(&subscriber) else {
            return;
        };
        let members = self.members(&p.room);
        for track_sid in sids {
            let publishes = |key: &&Key| {
                let participant = self.participants.get(key);
                participant.is_some_and(|p| p.tracks.iter().any(|t| t.info.sid == track_sid))
            };
            if let Some(&publisher) = members.iter().find(publishes) {
                let message = Message::TrackSubscribed(proto::TrackSubscribed { track_sid });
                self.send(publisher, message);
            }
        }
    }

    fn negotiation_failed(&mut self, key: Key, error: &NegotiationError) {
        if let Some(p) = self.participants.get(&key) {
            tracing::warn!(identity = p.info.identity, "{error}");
        }
        self.reconnect_fully(key);
    }
}

fn track_info(request: &proto::AddTrackRequest) -> proto::TrackInfo {
    let audio = request.r#type == TrackType::Audio as i32;
    let mime_type = if audio { "audio/opus" } else { "video/vp8" };
    let screen = matches!(
        request.source(),
        TrackSource::ScreenShare | TrackSource::ScreenShareAudio
    );
    let stream = match request.stream.as_str() {
        "" if screen => "screen_share",
        "" => "camera",
        named => named,
    };
    // Old clients know no `audio_features`.
    #[allow(deprecated)]
    proto::TrackInfo {
        sid: new_sid(if audio { "TR_A" } else { "TR_V" }),
        r#type: request.r#type,
        name: request.name.clone(),
        muted: request.muted,
        width: request.width,
        height: request.height,
        disable_dtx: request.disable_dtx,
        source: request.source,
        mime_type: mime_type.into(),
        codecs: vec![proto::SimulcastCodecInfo {
            mime_type: mime_type.into(),
            cid: request.cid.clone(),
            ..proto::SimulcastCodecInfo::default()
        }],
        stereo: request.stereo,
        disable_red: true,
        encryption: request.encryption,
        stream: stream.to_owned(),
        version: Some(proto::TimedVersion {
            unix_micro: unix_ms() as i64 * 1_000,
            ticks: 0,
        }),
        audio_features: request.audio_features.clone(),
        ..proto::TrackInfo::default()
    }
}

/// The fields that say who sent a packet, to be appended to it.
fn sender_fields(packet: &proto::DataPacket, from: &proto::ParticipantInfo) -> proto::DataPacket {
    #[allow(deprecated)]
    let user = proto::UserPacket {
        participant_sid: from.sid.clone(),
        participant_identity: from.identity.clone(),
        ..proto::UserPacket::default()
    };
    // Agents may write in somebody's name, as they do with transcripts; the last value wins, so
    // what is left out stays.
    let text = match &packet.value {
        Some(Value::ChatMessage(_)) => true,
        Some(Value::StreamHeader(header)) => {
            matches!(header.content_header, Some(ContentHeader::TextHeader(_)))
        }
        _ => false,
    };
    let in_a_name = text
        && from.kind() == proto::participant_info::Kind::Agent
        && !packet.participant_identity.is_empty();
    proto::DataPacket {
        participant_sid: from.sid.clone(),
        participant_identity: if in_a_name {
            String::new()
        } else {
            from.identity.clone()
        },
        value: match &packet.value {
            Some(Value::User(_)) => Some(Value::User(user)),
            _ => None,
        },
        ..proto::DataPacket::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agents_text_may_be_in_somebodys_name() {
        let text = proto::data_stream::Header {
            content_header: Some(ContentHeader::TextHeader(Default::default())),
            ..Default::default()
        };
        let packet = proto::DataPacket {
            participant_identity: "alice".into(),
            value: Some(Value::StreamHeader(text)),
            ..Default::default()
        };
        let sent_by = |kind: proto::participant_info::Kind| {
            let from = proto::ParticipantInfo {
                identity: "scribe".into(),
                kind: kind.into(),
                ..Default::default()
            };
            let mut bytes = packet.encode_to_vec();
            bytes.extend(sender_fields(&packet, &from).encode_to_vec());
            proto::DataPacket::decode(bytes.as_slice())
                .expect("packet")
                .participant_identity
        };
        assert_eq!(sent_by(proto::participant_info::Kind::Agent), "alice");
        assert_eq!(sent_by(proto::participant_info::Kind::Standard), "scribe");
    }

    #[test]
    fn a_packet_gets_its_true_sender_and_keeps_the_rest() {
        let packet = proto::DataPacket {
            participant_identity: "forged".into(),
            destination_identities: vec!["bob".into()],
            sequence: 7,
            value: Some(Value::User(proto::UserPacket {
                payload: b"hello".to_vec(),
                topic: Some("t".into()),
                ..Default::default()
            })),
            ..Default::default()
        };
        let from = proto::ParticipantInfo {
            sid: "PA_1".into(),
            identity: "ann".into(),
            ..Default::default()
        };
        let mut bytes = packet.encode_to_vec();
        // A field that this version of the protocol does not know: number 999, varint 5.
        let unknown = [0xb8, 0x3e, 0x05];
        bytes.extend(unknown);
        bytes.extend(sender_fields(&packet, &from).encode_to_vec());
        let got = proto::DataPacket::decode(bytes.as_slice()).expect("packet");
        assert_eq!(got.participant_identity, "ann");
        assert_eq!(got.participant_sid, "PA_1");
        assert_eq!(
            (got.sequence, got.destination_identities),
            (7, vec!["bob".to_owned()])
        );
        let Some(Value::User(user)) = got.value else {
            panic!("not a user packet");
        };
        assert_eq!(user.payload, b"hello");
        assert_eq!(user.topic.as_deref(), Some("t"));
        #[allow(deprecated)]
        let identity = user.participant_identity;
        assert_eq!(identity, "ann");
        assert!(bytes.windows(3).any(|w| w == unknown));
    }
}
