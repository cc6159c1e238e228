//! What clients ask for over the signalling websocket.

use super::{
    auth::{MAX_ATTRIBUTES, MAX_METADATA, MAX_NAME, attributes_size},
    core::Core,
    participant::{FailingResume, Key},
    witness::unix_ms,
};
use livekit_protocol::{
    self as proto, DisconnectReason, leave_request::Action, request_response::Reason,
    signal_request::Message as Request, signal_response::Message, simulate_scenario::Scenario,
};
use std::time::Instant;

/// Why a change of metadata is refused.
pub(super) enum MetadataError {
    Name,
    Metadata,
    Attributes,
}

impl Core {
    pub(super) fn request(&mut self, key: Key, request: Request) {
        match request {
            Request::Offer(offer) => self.offer(key, &offer),
            Request::Answer(answer) => self.answer(key, &answer),
            // An ice-lite server never checks a path itself: it learns the client's addresses
            // from the client's own checks.
            Request::Trickle(_) => {}
            Request::AddTrack(track) => self.add_track(key, track),
            Request::Mute(mute) => {
                self.mute(key, &mute.sid, mute.muted);
            }
            Request::Subscription(update) => self.update_subscription(key, &update),
            Request::TrackSetting(settings) => self.track_settings(key, &settings),
            Request::Leave(leave) => {
                // Clients may give a reason of their own; LiveKit takes only these.
                let reason = match leave.reason() {
                    reason @ (DisconnectReason::UserUnavailable
                    | DisconnectReason::UserRejected
                    | DisconnectReason::AgentError) => reason,
                    _ => DisconnectReason::ClientInitiated,
                };
                self.remove_with(key, reason, None);
            }
            Request::SubscriptionPermission(permission) => {
                self.restrict_subscriptions(key, permission);
            }
            Request::UpdateMetadata(update) => self.update_own_metadata(key, update),
            Request::UpdateAudioTrack(update) => self.update_audio_track(key, &update),
            Request::Simulate(simulate) => self.simulate(key, simulate.scenario),
            Request::Ping(_) => self.send(key, Message::Pong(unix_ms() as i64)),
            Request::PingReq(ping) => {
                let pong = proto::Pong {
                    last_ping_timestamp: ping.timestamp,
                    timestamp: unix_ms() as i64,
                };
                self.send(key, Message::PongResp(pong));
            }
            // The stay was kept as it was, so there is nothing to bring in line.
            Request::SyncState(_) => {}
            // About video, data tracks and blobs, which are not forwarded.
            #[allow(deprecated)]
            Request::UpdateLayers(_)
            | Request::UpdateVideoTrack(_)
            | Request::PublishDataTrackRequest(_)
            | Request::UnpublishDataTrackRequest(_)
            | Request::UpdateDataSubscription(_)
            | Request::StoreDataBlobRequest(_)
            | Request::GetDataBlobRequest(_) => {}
        }
    }

    /// Sets what is given: an empty string changes nothing, an attribute without value goes.
    pub(super) fn update_metadata(
        &mut self,
        key: Key,
        name: &str,
        metadata: &str,
        attributes: &std::collections::HashMap<String, String>,
    ) -> Result<(), MetadataError> {
        let Some(p) = self.participants.get_mut(&key) else {
            return Ok(());
        };
        if name.len() > MAX_NAME {
            return Err(MetadataError::Name);
        }
        if metadata.len() > MAX_METADATA {
            return Err(MetadataError::Metadata);
        }
        let mut merged = p.info.attributes.clone();
        for (k, v) in attributes {
            if v.is_empty() {
                merged.remove(k);
            } else {
                merged.insert(k.clone(), v.clone());
            }
        }
        if attributes_size(&merged) > MAX_ATTRIBUTES {
            return Err(MetadataError::Attributes);
        }
        p.info.attributes = merged;
        if !name.is_empty() {
            p.info.name = name.to_owned();
        }
        if !metadata.is_empty() {
            p.info.metadata = metadata.to_owned();
        }
        self.announce(key, true);
        self.refresh_token(key, Instant::now());
        Ok(())
    }

    fn update_own_metadata(&mut self, key: Key, update: proto::UpdateParticipantMetadata) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        let result = if p.permission().can_update_metadata {
            self.update_metadata(key, &update.name, &update.metadata, &update.attributes)
                .map_err(|e| (Reason::LimitExceeded, e.for_client()))
        } else {
            let message = "does not have permission to update own metadata";
            Err((Reason::NotAllowed, message))
        };
        let (reason, message) = result.err().unwrap_or((Reason::Ok, ""));
        self.refuse(key, update.request_id, reason, message);
    }

    fn restrict_subscriptions(&mut self, key: Key, permission: proto::SubscriptionPermission) {
        let Some(p) = self.participants.get_mut(&key) else {
            return;
        };
        p.subscription_permission = Some(permission);
        let room = p.room.clone();
        self.review_subscriptions(&room);
    }

    fn update_audio_track(&mut self, key: Key, update: &proto::UpdateLocalAudioTrack) {
        let participant = self.participants.get_mut(&key);
        let track =
            participant.and_then(|p| p.tracks.iter_mut().find(|t| t.info.sid == update.track_sid));
        if let Some(track) = track {
            track.info.audio_features = update.features.clone();
            self.announce(key, false);
        }
    }

    /// Faults that a client may ask for, to test itself.
    fn simulate(&mut self, key: Key, scenario: Option<Scenario>) {
        let leave = |reason: DisconnectReason, action: Action| proto::LeaveRequest {
            can_reconnect: action == Action::Reconnect,
            reason: reason as i32,
            action: action as i32,
            ..proto::LeaveRequest::default()
        };
        match scenario {
            Some(Scenario::ServerLeave(true)) => {
                let reason = DisconnectReason::ServerShutdown;
                self.remove_with(key, reason, Some(leave(reason, Action::Disconnect)));
            }
            // A node that fails says nothing; the client finds out when it comes to resume.
            Some(Scenario::NodeFailure(true)) => {
                self.remove_with(key, DisconnectReason::ServerShutdown, None);
            }
            Some(Scenario::LeaveRequestFullReconnect(true)) => {
                let reason = DisconnectReason::ClientInitiated;
                self.remove_with(key, reason, Some(leave(reason, Action::Reconnect)));
            }
            Some(Scenario::DisconnectSignalOnResume(true)) => {
                self.fail_resume(key, FailingResume::Answered);
            }
            Some(Scenario::DisconnectSignalOnResumeNoMessages(true)) => {
                self.fail_resume(key, FailingResume::Unanswered);
            }
            other => tracing::debug!("not simulated: {other:?}"),
        }
    }

    fn fail_resume(&mut self, key: Key, how: FailingResume) {
        if let Some(p) = self.participants.get_mut(&key) {
            p.failing_resume = Some((how, Instant::now()));
        }
    }
}

impl MetadataError {
    /// The text in a `RequestResponse`.
    fn for_client(&self) -> &'static str {
        match self {
            Self::Name => "exceeds name length limit",
            Self::Metadata => "exceeds metadata size limit",
            Self::Attributes => "exceeds attributes size limit",
        }
    }

    /// The text in a Twirp error.
    pub(super) fn for_api(&self) -> &'static str {
        match self {
            Self::Name => "name length exceeds limits",
            Self::Metadata => "metadata size exceeds limits",
            Self::Attributes => "attribute size exceeds limits",
        }
    }
}
