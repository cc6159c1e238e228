//! LiveKit's RoomService and AgentDispatchService over Twirp
//! (<https://twitchtv.github.io/twirp/docs/spec_v7.html>), as JSON and protobuf.

use super::core::{Core, Handle};
use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use livekit_protocol as proto;
use livekit_token::Claims;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use std::time::Duration;

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/protobuf";
/// How long another node is waited for, which is longer than clients wait.
const NODE_TIMEOUT: Duration = Duration::from_secs(15);

/// Twirp's error codes, as far as they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    BadRoute,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Malformed,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct TwirpError {
    code: Code,
    message: String,
}

/// Serves `POST /twirp/{service}/{method}`.
pub(super) async fn serve(
    core: &Handle,
    service: &str,
    method: &str,
    claims: Option<Claims>,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<Response, TwirpError> {
    let call = Call {
        core,
        claims,
        codec: Codec::of(headers)?,
        body,
    };
    match service {
        "livekit.RoomService" => room_service(method, call).await,
        "livekit.AgentDispatchService" => dispatch_service(method, call).await,
        _ => Err(TwirpError::no_route()),
    }
}

async fn dispatch_service(method: &str, call: Call<'_>) -> Result<Response, TwirpError> {
    match method {
        "CreateDispatch" => {
            let create = Core::api_create_dispatch;
            call.run(
                admin(|r: &proto::CreateAgentDispatchRequest| &r.room),
                create,
            )
            .await
        }
        "DeleteDispatch" => {
            call.run(
                admin(|r: &proto::DeleteAgentDispatchRequest| &r.room),
                |c, r| c.api_delete_dispatch(&r),
            )
            .await
        }
        "ListDispatch" => {
            call.run(
                admin(|r: &proto::ListAgentDispatchRequest| &r.room),
                |c, r| c.api_list_dispatch(&r),
            )
            .await
        }
        _ => Err(TwirpError::no_route()),
    }
}

async fn room_service(method: &str, call: Call<'_>) -> Result<Response, TwirpError> {
    match method {
        "CreateRoom" => call.run(|g, _| g.room_create, Core::api_create_room).await,
        "ListRooms" => {
            call.run(|g, _| g.room_list, |c, r| Ok(c.api_list_rooms(&r)))
                .await
        }
        "DeleteRoom" => {
            call.run(|g, _| g.room_create, |c, r| c.api_delete_room(&r))
                .await
        }
        "ListParticipants" => {
            let list = |c: &mut Core, r| Ok(c.api_list_participants(&r));
            call.run(admin(|r: &proto::ListParticipantsRequest| &r.room), list)
                .await
        }
        "GetParticipant" => {
            call.run(
                admin(|r: &proto::RoomParticipantIdentity| &r.room),
                |c, r| c.api_get_participant(&r),
            )
            .await
        }
        "RemoveParticipant" => {
            let removed = call.run(
                admin(|r: &proto::RoomParticipantIdentity| &r.room),
                |c, r| c.api_remove_participant(&r),
            );
            let removed = removed.await;
            if matches!(&removed, Err(error) if error.code == Code::DeadlineExceeded) {
                tokio::time::sleep(NODE_TIMEOUT).await;
            }
            removed
        }
        "MutePublishedTrack" => {
            call.run(admin(|r: &proto::MuteRoomTrackRequest| &r.room), |c, r| {
                c.api_mute_track(&r)
            })
            .await
        }
        "UpdateParticipant" => {
            call.run(
                admin(|r: &proto::UpdateParticipantRequest| &r.room),
                |c, r| c.api_update_participant(&r),
            )
            .await
        }
        "UpdateSubscriptions" => {
            let update = Core::api_update_subscriptions;
            call.run(
                admin(|r: &proto::UpdateSubscriptionsRequest| &r.room),
                update,
            )
            .await
        }
        "SendData" => {
            let send = Core::api_send_data;
            call.run(admin(|r: &proto::SendDataRequest| &r.room), send)
                .await
        }
        "UpdateRoomMetadata" => {
            let update = Core::api_update_room;
            call.run(
                admin(|r: &proto::UpdateRoomMetadataRequest| &r.room),
                update,
            )
            .await
        }
        _ => Err(TwirpError::no_route()),
    }
}

/// Allows what a room's administrator may do, in the room that the token names.
fn admin<R>(room: impl Fn(&R) -> &String) -> impl FnOnce(&livekit_token::VideoGrants, &R) -> bool {
    move |grants, request| grants.room_admin && grants.room == *room(request)
}

struct Call<'a> {
    core: &'a Handle,
    claims: Option<Claims>,
    codec: Codec,
    body: &'a Bytes,
}

impl Call<'_> {
    async fn run<Req, Res>(
        self,
        allowed: impl FnOnce(&livekit_token::VideoGrants, &Req) -> bool,
        call: impl FnOnce(&mut Core, Req) -> Result<Res, TwirpError> + Send + 'static,
    ) -> Result<Response, TwirpError>
    where
        Req: prost::Message + Default + DeserializeOwned + Send + 'static,
        Res: prost::Message + Serialize + Send + 'static,
    {
        let request: Req = self.codec.decode(self.body)?;
        let grants = self.claims.map(|c| c.video).unwrap_or_default();
        if !allowed(&grants, &request) {
            return Err(TwirpError::new(Code::Unauthenticated, "permissions denied"));
        }
        let result = self.core.call(move |core| call(core, request)).await;
        let stopped = |_| TwirpError::new(Code::Unavailable, "server is shutting down");
        self.codec.encode(&result.map_err(stopped)??)
    }
}

#[derive(Clone, Copy)]
enum Codec {
    Json,
    Protobuf,
}

impl Codec {
    fn of(headers: &HeaderMap) -> Result<Self, TwirpError> {
        let value = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let essence = value.unwrap_or_default().split(';').next();
        match essence.unwrap_or_default().trim() {
            JSON => Ok(Self::Json),
            PROTOBUF => Ok(Self::Protobuf),
            other => Err(TwirpError::new(
                Code::BadRoute,
                &format!("unexpected Content-Type: {other:?}"),
            )),
        }
    }

    fn decode<T: prost::Message + Default + DeserializeOwned>(
        self,
        body: &Bytes,
    ) -> Result<T, TwirpError> {
        let malformed = |what: &str| {
            let message = format!("the {what} request could not be decoded");
            TwirpError::new(Code::Malformed, &message)
        };
        match self {
            Self::Json => serde_json::from_slice(body).map_err(|_| malformed("json")),
            Self::Protobuf => T::decode(body.clone()).map_err(|_| malformed("protobuf")),
        }
    }

    fn encode<T: prost::Message + Serialize>(self, message: &T) -> Result<Response, TwirpError> {
        let (kind, body) = match self {
            Self::Json => {
                let value = serde_json::to_value(message)
                    .map_err(|e| TwirpError::new(Code::Internal, &e.to_string()))?;
                (JSON, snake_case(value).to_string().into_bytes())
            }
            Self::Protobuf => (PROTOBUF, message.encode_to_vec()),
        };
        let kind = HeaderValue::from_static(kind);
        Ok(([(CONTENT_TYPE, kind)], body).into_response())
    }
}

impl TwirpError {
    pub fn new(code: Code, message: &str) -> Self {
        let message = message.to_owned();
        Self { code, message }
    }

    pub fn no_route() -> Self {
        Self::new(Code::BadRoute, "no handler for path")
    }
}

impl IntoResponse for TwirpError {
    fn into_response(self) -> Response {
        let (code, status) = match self.code {
            Code::BadRoute => ("bad_route", StatusCode::NOT_FOUND),
            Code::DeadlineExceeded => ("deadline_exceeded", StatusCode::REQUEST_TIMEOUT),
            Code::FailedPrecondition => ("failed_precondition", StatusCode::PRECONDITION_FAILED),
            Code::Internal => ("internal", StatusCode::INTERNAL_SERVER_ERROR),
            Code::InvalidArgument => ("invalid_argument", StatusCode::BAD_REQUEST),
            Code::Malformed => ("malformed", StatusCode::BAD_REQUEST),
            Code::NotFound => ("not_found", StatusCode::NOT_FOUND),
            Code::ResourceExhausted => ("resource_exhausted", StatusCode::TOO_MANY_REQUESTS),
            Code::Unauthenticated => ("unauthenticated", StatusCode::UNAUTHORIZED),
            Code::Unavailable => ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
        };
        let body = json!({"code": code, "msg": self.message}).to_string();
        let kind = HeaderValue::from_static(JSON);
        (status, [(CONTENT_TYPE, kind)], body).into_response()
    }
}

/// Field names as LiveKit's server writes them; the Rust types write camelCase (both are valid
/// protobuf JSON). Keys of maps are data and stay.
fn snake_case(value: Value) -> Value {
    const MAPS: [&str; 2] = ["attributes", "tags"];
    match value {
        Value::Array(values) => values.into_iter().map(snake_case).collect(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| {
                let is_map = MAPS.contains(&name.as_str());
                let value = if is_map { value } else { snake_case(value) };
                (snake(&name), value)
            })
            .collect::<Map<_, _>>()
            .into(),
        other => other,
    }
}

fn snake(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_snake_case_and_map_keys_untouched() {
        let value = json!({"numParticipants": 1, "attributes": {"myKey": "vV"}, "a": [{"bC": 1}]});
        assert_eq!(
            snake_case(value),
            json!({"num_participants": 1, "attributes": {"myKey": "vV"}, "a": [{"b_c": 1}]})
        );
    }
}
