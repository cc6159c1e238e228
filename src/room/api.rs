//! LiveKit's RoomService, and the tokens the daemon joins with.

use std::time::Duration;

use livekit_api::{
    access_token::{AccessToken, AccessTokenError, VideoGrants},
    services::{
        ServerError, ServerErrorCode, ServiceError, agent_dispatch::AgentDispatchClient,
        room::RoomClient,
    },
};
use livekit_net::{Header, HttpClientExt};
use livekit_protocol::{AgentDispatch, CreateAgentDispatchRequest, ParticipantInfo};
use secrecy::ExposeSecret;
use thiserror::Error;

use crate::config::LiveKitConfig;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Of what a server says in place of an answer.
const MAX_SAID: usize = 200;
/// An attribute of the daemon's participant by which daemons know each other in a room; its value is
/// `rooms.identity`.
pub const DAEMON_ATTRIBUTE: &str = "roomwarden.daemon";

/// A room that the server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRoom {
    pub sid: String,
    pub name: String,
}

#[derive(Debug, Error)]
pub enum ApiError {
    #[error(
        "LiveKit refuses the API key or secret ({said}): check LIVEKIT_API_KEY and LIVEKIT_API_SECRET"
    )]
    Credentials { said: String },
    /// It would be refused again.
    #[error("LiveKit refuses what it was asked for: {said}")]
    Argument { said: String },
    #[error("LiveKit at {url}: {said}")]
    Other { url: String, said: String },
}

/// Holds a pool of connections: made once.
pub struct RoomApi {
    config: LiveKitConfig,
    client: RoomClient,
    dispatches: AgentDispatchClient,
    url: String,
}

impl RoomApi {
    pub fn new(config: &LiveKitConfig) -> Self {
        let mut url = config.url.clone();
        // RoomService is HTTP on the same address as signalling.
        let scheme = match url.scheme() {
            "ws" | "http" => "http",
            _ => "https",
        };
        // Cannot fail between web schemes.
        let _ = url.set_scheme(scheme);
        let secret = config.api_secret.expose_secret();
        let client = RoomClient::with_api_key(url.as_str(), &config.api_key, secret)
            .with_request_timeout(REQUEST_TIMEOUT);
        let dispatches = AgentDispatchClient::with_api_key(url.as_str(), &config.api_key, secret)
            .with_request_timeout(REQUEST_TIMEOUT);
        Self {
            config: config.clone(),
            client,
            dispatches,
            url: url.to_string(),
        }
    }

    /// The rooms there are, of these names or, without names, all of them. Cancel safe.
    pub async fn list_rooms(&self, names: &[String]) -> Result<Vec<ListedRoom>, ApiError> {
        let rooms = match self.client.list_rooms(names.to_vec()).await {
            Ok(rooms) => rooms,
            Err(error) => return Err(self.error(error).await),
        };
        Ok(rooms
            .into_iter()
            .map(|room| ListedRoom {
                sid: room.sid,
                name: room.name,
            })
            .collect())
    }

    /// Who is in a room; nobody if there is no such room. Cancel safe.
    pub async fn list_participants(&self, room: &str) -> Result<Vec<ParticipantInfo>, ApiError> {
        match self.client.list_participants(room).await {
            Ok(participants) => Ok(participants),
            Err(ServiceError::Twirp(ServerError::Twirp(twirp)))
                if twirp.code == ServerErrorCode::NOT_FOUND =>
            {
                Ok(Vec::new())
            }
            Err(error) => Err(self.error(error).await),
        }
    }

    /// Puts somebody out of a room; false if nobody of that identity is there. Cancel safe.
    pub async fn remove_participant(&self, room: &str, identity: &str) -> Result<bool, ApiError> {
        let removed = self.client.remove_participant(room, identity).await;
        self.unless_gone(removed).await
    }

    /// Ends a room for everybody; false if there is none. Cancel safe.
    pub async fn delete_room(&self, room: &str) -> Result<bool, ApiError> {
        let deleted = self.client.delete_room(room).await;
        self.unless_gone(deleted).await
    }

    /// The dispatches of agents to a room. Cancel safe.
    pub async fn list_dispatches(&self, room: &str) -> Result<Vec<AgentDispatch>, ApiError> {
        match self.dispatches.list_dispatch(room).await {
            Ok(dispatches) => Ok(dispatches),
            Err(error) => Err(self.error(error).await),
        }
    }

    /// Dispatches agents of that name to a room, which is made if there is none.
    pub async fn create_dispatch(
        &self,
        room: &str,
        agent_name: &str,
        metadata: &str,
    ) -> Result<AgentDispatch, ApiError> {
        let request = CreateAgentDispatchRequest {
            room: room.to_owned(),
            agent_name: agent_name.to_owned(),
            metadata: metadata.to_owned(),
            ..CreateAgentDispatchRequest::default()
        };
        match self.dispatches.create_dispatch(request).await {
            Ok(dispatch) => Ok(dispatch),
            Err(error) => Err(self.error(error).await),
        }
    }

    /// Takes a dispatch back, which ends its jobs; false if there is none.
    pub async fn delete_dispatch(&self, room: &str, id: &str) -> Result<bool, ApiError> {
        let deleted = self.dispatches.delete_dispatch(id, room).await;
        self.unless_gone(deleted).await
    }

    /// The error of who gave up waiting for an answer.
    pub fn too_late(&self) -> ApiError {
        ApiError::Other {
            url: self.url.clone(),
            said: "no answer in time".to_owned(),
        }
    }

    async fn unless_gone<T>(&self, answer: Result<T, ServiceError>) -> Result<bool, ApiError> {
        match answer {
            Ok(_) => Ok(true),
            Err(ServiceError::Twirp(ServerError::Twirp(twirp)))
                if twirp.code == ServerErrorCode::NOT_FOUND =>
            {
                Ok(false)
            }
            Err(error) => Err(self.error(error).await),
        }
    }

    /// A token to join `room` as a participant of kind agent: it does not keep the room alive,
    /// publishes no media and may send transcripts and say how it is. Others don't see a hidden
    /// one.
    pub fn join_token(
        &self,
        room: &str,
        identity: &str,
        daemon: &str,
        hidden: bool,
    ) -> Result<String, AccessTokenError> {
        let grants = VideoGrants {
            room_join: true,
            room: room.to_owned(),
            agent: true,
            hidden,
            // Nothing is published. But to who may, LiveKit says `fast_publish`, and only then the
            // SDK asks for a new track at once, and not 150 ms later.
            can_publish: Some(true),
            can_publish_sources: vec!["microphone".to_owned()],
            can_publish_data: Some(true),
            can_subscribe: Some(true),
            can_update_own_metadata: Some(true),
            ..Default::default()
        };
        let secret = self.config.api_secret.expose_secret();
        AccessToken::with_api_key(&self.config.api_key, secret)
            .with_identity(identity)
            .with_kind("agent")
            .with_attributes([(DAEMON_ATTRIBUTE, daemon)])
            .with_grants(grants)
            .to_jwt()
    }

    async fn error(&self, error: ServiceError) -> ApiError {
        let refused = |code: &str| matches!(code, "unauthenticated" | "permission_denied");
        let said = match &error {
            ServiceError::Twirp(ServerError::Twirp(twirp)) if refused(&twirp.code) => {
                return ApiError::Credentials {
                    said: twirp.msg.clone(),
                };
            }
            ServiceError::Twirp(ServerError::Twirp(twirp))
                if twirp.code == ServerErrorCode::INVALID_ARGUMENT =>
            {
                return ApiError::Argument {
                    said: twirp.msg.clone(),
                };
            }
            // A bad token is refused before Twirp, in plain text, and the client reports only that
            // it could not decode that.
            ServiceError::Twirp(ServerError::Request(request)) if request.is_decode() => {
                match self.ask_plainly().await {
                    Some((401 | 403, said)) => return ApiError::Credentials { said },
                    Some((status, said)) => format!("status {status}: {said}"),
                    None => with_causes(&error),
                }
            }
            error => with_causes(error),
        };
        ApiError::Other {
            url: self.url.clone(),
            said,
        }
    }

    /// What ListRooms answers, undecoded: status and the first words of the body.
    async fn ask_plainly(&self) -> Option<(u16, String)> {
        let grants = VideoGrants {
            room_list: true,
            ..Default::default()
        };
        let secret = self.config.api_secret.expose_secret();
        let token = AccessToken::with_api_key(&self.config.api_key, secret)
            .with_grants(grants)
            .to_jwt()
            .ok()?;
        let header = |name: &str, value: String| Header {
            name: name.to_owned(),
            value,
        };
        let headers = vec![
            header("Authorization", format!("Bearer {token}")),
            header("Content-Type", "application/json".to_owned()),
        ];
        let url = format!("{}twirp/livekit.RoomService/ListRooms", self.url);
        let asked = livekit_net::http_client()?;
        let answer = asked.post(url, headers, b"{}".to_vec());
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, answer)
            .await
            .ok()?
            .ok()?;
        let body = &answer.body[..answer.body.len().min(MAX_SAID)];
        let said = String::from_utf8_lossy(body).replace(char::is_control, " ");
        Some((answer.status, said.trim().to_owned()))
    }
}

/// An error and what caused it, since the outermost often says only that something failed.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let inner = error.to_string();
        if !said.contains(&inner) {
            said.push_str(": ");
            said.push_str(&inner);
        }
        cause = error.source();
    }
    said
}
