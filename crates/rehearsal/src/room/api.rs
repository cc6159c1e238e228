//! The RoomService's calls on the actor, after permissions have been checked.

use super::{
    agents::check_sizes,
    auth::{MAX_METADATA, MAX_NAME},
    core::{Core, lane},
    participant::Key,
    twirp::{Code, TwirpError},
};
use livekit_protocol::{
    self as proto, DisconnectReason, data_packet::Value, signal_response::Message,
};
use prost::Message as _;
use std::time::Instant;

type Result<T> = std::result::Result<T, TwirpError>;

impl Core {
    pub(super) fn api_create_room(
        &mut self,
        request: proto::CreateRoomRequest,
    ) -> Result<proto::Room> {
        if request.name.is_empty() {
            return Err(invalid("no room name"));
        }
        if request.name.len() > MAX_NAME {
            return Err(invalid("room name length exceeds limits: max length 256"));
        }
        check_metadata(&request.metadata)?;
        for agent in &request.agents {
            check_sizes(&agent.metadata, &agent.attributes).map_err(invalid)?;
        }
        if self.stopping {
            return Err(TwirpError::new(
                Code::Unavailable,
                "server is shutting down",
            ));
        }
        let name = request.name.clone();
        self.create_room(request, Instant::now());
        self.room_info(&name).ok_or_else(no_room)
    }

    pub(super) fn api_list_rooms(
        &self,
        request: &proto::ListRoomsRequest,
    ) -> proto::ListRoomsResponse {
        let wanted = |name: &&String| request.names.is_empty() || request.names.contains(name);
        let names = self.rooms.keys().filter(wanted);
        proto::ListRoomsResponse {
            rooms: names.filter_map(|name| self.room_info(name)).collect(),
        }
    }

    pub(super) fn api_delete_room(
        &mut self,
        request: &proto::DeleteRoomRequest,
    ) -> Result<proto::DeleteRoomResponse> {
        match self.end_room(&request.room, DisconnectReason::RoomDeleted) {
            true => Ok(proto::DeleteRoomResponse {}),
            false => Err(no_room()),
        }
    }

    /// LiveKit answers with an empty list for a room that does not exist.
    pub(super) fn api_list_participants(
        &self,
        request: &proto::ListParticipantsRequest,
    ) -> proto::ListParticipantsResponse {
        let members = self.members(&request.room).into_iter();
        let members = members.filter_map(|key| self.participants.get(&key));
        proto::ListParticipantsResponse {
            participants: members.map(|p| p.info.clone()).collect(),
        }
    }

    pub(super) fn api_get_participant(
        &self,
        request: &proto::RoomParticipantIdentity,
    ) -> Result<proto::ParticipantInfo> {
        let key = self.find(&request.room, &request.identity)?;
        self.info(key)
    }

    pub(super) fn api_remove_participant(
        &mut self,
        request: &proto::RoomParticipantIdentity,
    ) -> Result<proto::RemoveParticipantResponse> {
        let key = self.find(&request.room, &request.identity)?;
        let faults = self.faults.borrow().clone();
        if faults.removals_unanswered.includes(&request.identity) {
            let message = "no response from servers";
            return Err(TwirpError::new(Code::DeadlineExceeded, message));
        }
        self.remove(key, DisconnectReason::ParticipantRemoved);
        Ok(proto::RemoveParticipantResponse {})
    }

    pub(super) fn api_mute_track(
        &mut self,
        request: &proto::MuteRoomTrackRequest,
    ) -> Result<proto::MuteRoomTrackResponse> {
        let key = self.find(&request.room, &request.identity)?;
        if !request.muted && !self.config.remote_unmute {
            let message = "remote unmute not enabled";
            return Err(TwirpError::new(Code::FailedPrecondition, message));
        }
        let track = self.mute(key, &request.track_sid, request.muted);
        let track = track.ok_or_else(|| TwirpError::new(Code::NotFound, "track is not found"))?;
        let (sid, muted) = (request.track_sid.clone(), request.muted);
        self.send(key, Message::Mute(proto::MuteTrackRequest { sid, muted }));
        Ok(proto::MuteRoomTrackResponse { track: Some(track) })
    }

    pub(super) fn api_update_participant(
        &mut self,
        request: &proto::UpdateParticipantRequest,
    ) -> Result<proto::ParticipantInfo> {
        let key = self.find(&request.room, &request.identity)?;
        self.update_metadata(key, &request.name, &request.metadata, &request.attributes)
            .map_err(|e| invalid(e.for_api()))?;
        if let Some(permission) = &request.permission {
            if let Some(p) = self.participants.get_mut(&key) {
                p.info.permission = Some(permission.clone());
            }
            self.announce(key, true);
            self.refresh_token(key, Instant::now());
            self.review_tracks(key);
            self.review_subscriptions(&request.room);
        }
        self.info(key)
    }

    pub(super) fn api_update_subscriptions(
        &mut self,
        request: proto::UpdateSubscriptionsRequest,
    ) -> Result<proto::UpdateSubscriptionsResponse> {
        let key = self.find(&request.room, &request.identity)?;
        let update = proto::UpdateSubscription {
            track_sids: request.track_sids,
            subscribe: request.subscribe,
            participant_tracks: request.participant_tracks,
        };
        self.update_subscription(key, &update);
        Ok(proto::UpdateSubscriptionsResponse {})
    }

    pub(super) fn api_send_data(
        &mut self,
        request: proto::SendDataRequest,
    ) -> Result<proto::SendDataResponse> {
        if !self.rooms.contains_key(&request.room) {
            return Err(no_room());
        }
        if !matches!(request.nonce.len(), 0 | 16) {
            let n = request.nonce.len();
            let message = format!("nonce should be 16-bytes or not present, got: {n} bytes");
            return Err(invalid(&message));
        }
        let kind = request.kind();
        #[allow(deprecated)]
        let packet = proto::DataPacket {
            kind: request.kind,
            destination_identities: request.destination_identities.clone(),
            value: Some(Value::User(proto::UserPacket {
                payload: request.data,
                destination_sids: request.destination_sids,
                destination_identities: request.destination_identities,
                topic: request.topic,
                nonce: request.nonce,
                ..proto::UserPacket::default()
            })),
            ..proto::DataPacket::default()
        };
        let encoded = packet.encode_to_vec().into();
        self.distribute(&request.room, None, &packet, lane(kind), encoded);
        Ok(proto::SendDataResponse {})
    }

    pub(super) fn api_update_room(
        &mut self,
        request: proto::UpdateRoomMetadataRequest,
    ) -> Result<proto::Room> {
        check_metadata(&request.metadata)?;
        let room = self.rooms.get_mut(&request.room).ok_or_else(no_room)?;
        room.info.metadata = request.metadata;
        self.announce_room(&request.room);
        self.room_info(&request.room).ok_or_else(no_room)
    }

    fn find(&self, room: &str, identity: &str) -> Result<Key> {
        let room = self.rooms.get(room);
        let key = room.and_then(|r| r.members.get(identity).copied());
        key.ok_or_else(no_participant)
    }

    fn info(&self, key: Key) -> Result<proto::ParticipantInfo> {
        let participant = self.participants.get(&key);
        participant
            .map(|p| p.info.clone())
            .ok_or_else(no_participant)
    }
}

fn check_metadata(metadata: &str) -> Result<()> {
    if metadata.len() > MAX_METADATA {
        return Err(invalid("metadata size exceeds limits"));
    }
    Ok(())
}

fn invalid(message: &str) -> TwirpError {
    TwirpError::new(Code::InvalidArgument, message)
}

fn no_room() -> TwirpError {
    TwirpError::new(Code::NotFound, "requested room does not exist")
}

fn no_participant() -> TwirpError {
    TwirpError::new(Code::NotFound, "participant does not exist")
}
