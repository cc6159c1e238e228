//! Access tokens, and what a client asks for when it joins. Status codes and messages are those
//! of LiveKit's server.

use super::participant::{is_dependent, new_sid};
use axum::http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use base64::{
    Engine,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
    prelude::BASE64_STANDARD as STANDARD,
};
use flate2::read::GzDecoder;
use livekit_protocol::{self as proto, client_info::Capability};
use livekit_token::{AccessToken, AccessTokenError, Claims, TokenVerifier, VideoGrants};
use prost::Message as _;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeSet, HashMap},
    io::Read,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// LiveKit's limits: of names and identities in bytes, of metadata and of attributes (keys and
/// values together).
pub(super) const MAX_NAME: usize = 256;
pub(super) const MAX_METADATA: usize = 512 * 1024;
pub(super) const MAX_ATTRIBUTES: usize = 64 * 1024;
/// A compressed join request must not become larger than this (1 MiB, as Go's header limit).
const MAX_JOIN_REQUEST: u64 = 1 << 20;
/// Validity of a refreshed token. LiveKit's default.
const REFRESHED_TTL: Duration = Duration::from_secs(600);

/// Validity of an agent's token. LiveKit's value.
const AGENT_TTL: Duration = Duration::from_secs(3_600);
/// Validity of a webhook's token. LiveKit's value.
const WEBHOOK_TTL: Duration = Duration::from_secs(300);
/// Tells others which agent a participant is.
const AGENT_NAME_ATTRIBUTE: &str = "lk.agent_name";

pub(super) type Query = HashMap<String, String>;

/// An HTTP answer that refuses something.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    pub message: String,
}

/// What a client wants when it opens a signalling websocket; checked against its token.
#[derive(Debug)]
pub(super) struct JoinRequest {
    /// With the identity, and metadata and attributes as far as the client may set them.
    pub claims: Claims,
    pub room: String,
    /// One peer connection instead of two.
    pub single: bool,
    pub auto_subscribe: bool,
    /// Wants to go on with the stay `participant_sid` after losing its websocket.
    pub reconnect: bool,
    pub participant_sid: String,
    pub offer: Option<proto::SessionDescription>,
    pub add_tracks: Vec<proto::AddTrackRequest>,
    pub client_protocol: i32,
    /// What the client can do, for others to know; only what LiveKit's protocol has a name for.
    pub capabilities: Vec<i32>,
}

/// Checks tokens and issues refreshed ones.
pub(super) struct Keys {
    api_key: String,
    api_secret: String,
    verifier: TokenVerifier,
}

impl Keys {
    pub fn new(api_key: &str, api_secret: &str) -> Self {
        Self {
            api_key: api_key.to_owned(),
            api_secret: api_secret.to_owned(),
            verifier: TokenVerifier::with_api_key(api_key, api_secret),
        }
    }

    /// The claims of the request's token, from the `Authorization` header or else the query.
    /// None if it has none.
    pub fn claims(&self, headers: &HeaderMap, query: &Query) -> Result<Option<Claims>, Refusal> {
        let token = match headers.get(AUTHORIZATION) {
            Some(header) => {
                let bearer = header.to_str().ok().and_then(|h| h.strip_prefix("Bearer "));
                bearer.ok_or_else(|| {
                    unauthorized("invalid authorization header. Must start with Bearer ")
                })?
            }
            None => match query.get("access_token").filter(|t| !t.is_empty()) {
                Some(token) => token.as_str(),
                None => return Ok(None),
            },
        };
        let unverified = Claims::from_unverified(token)
            .map_err(|_| unauthorized("invalid authorization token"))?;
        if unverified.iss != self.api_key {
            return Err(unauthorized("invalid API key"));
        }
        self.verifier.verify(token).map(Some).map_err(|e| {
            let cause = match &e {
                AccessTokenError::Encoding(e) => e.to_string(),
                e => e.to_string(),
            };
            unauthorized(&format!("invalid authorization token: {cause}"))
        })
    }

    /// A token for an agent that is to do a job in a room, on the terms of its worker. None if
    /// the worker names no identity.
    pub fn agent(
        &self,
        room: &str,
        wanted: proto::AvailabilityResponse,
        agent_name: &str,
        permission: &proto::ParticipantPermission,
    ) -> Option<String> {
        let grants = VideoGrants {
            room_join: true,
            agent: true,
            room: room.to_owned(),
            can_subscribe: Some(permission.can_subscribe),
            can_publish: Some(permission.can_publish),
            can_publish_data: Some(permission.can_publish_data),
            can_update_own_metadata: Some(permission.can_update_metadata),
            hidden: permission.hidden,
            ..VideoGrants::default()
        };
        let mut attributes = wanted.participant_attributes;
        attributes.insert(AGENT_NAME_ATTRIBUTE.to_owned(), agent_name.to_owned());
        let token = AccessToken::with_api_key(&self.api_key, &self.api_secret)
            .with_ttl(AGENT_TTL)
            .with_identity(&wanted.participant_identity)
            .with_name(&wanted.participant_name)
            .with_kind("agent")
            .with_metadata(&wanted.participant_metadata)
            .with_attributes(&attributes)
            .with_grants(grants);
        token.to_jwt().ok()
    }

    /// A token that proves who sent a webhook, and that its body is what was sent.
    pub fn webhook(&self, body: &[u8]) -> Result<String, AccessTokenError> {
        let sum = STANDARD.encode(Sha256::digest(body));
        AccessToken::with_api_key(&self.api_key, &self.api_secret)
            .with_ttl(WEBHOOK_TTL)
            .with_sha256(&sum)
            .to_jwt()
    }

    /// A token for the rest of a stay, valid as long as the original one but at least 10 min.
    /// It allows what the participant may do now.
    pub fn refresh(&self, claims: &Claims, info: &proto::ParticipantInfo) -> Option<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let left = Duration::from_secs(claims.exp as u64).saturating_sub(now);
        let permission = info.permission.clone().unwrap_or_default();
        let grants = VideoGrants {
            can_subscribe: Some(permission.can_subscribe),
            can_publish: Some(permission.can_publish),
            can_publish_data: Some(permission.can_publish_data),
            can_publish_sources: source_names(&permission),
            can_update_own_metadata: Some(permission.can_update_metadata),
            hidden: permission.hidden,
            ..claims.video.clone()
        };
        let mut token = AccessToken::with_api_key(&self.api_key, &self.api_secret)
            .with_ttl(left.max(REFRESHED_TTL))
            .with_identity(&info.identity)
            .with_name(&info.name)
            .with_kind(&claims.kind)
            .with_metadata(&info.metadata)
            .with_attributes(&info.attributes)
            .with_grants(grants);
        if let Some(config) = &claims.room_config {
            token = token.with_room_config(config.clone());
        }
        token.to_jwt().ok()
    }
}

impl JoinRequest {
    /// Checks a request to `/rtc` or `/rtc/v1` (`single`) or one of their `/validate`.
    pub fn parse(claims: Option<Claims>, query: &Query, single: bool) -> Result<Self, Refusal> {
        let claims = claims.ok_or_else(|| unauthorized("no permissions to access the room"))?;
        let room = claims.video.room.clone();
        let wrapped = query.get("join_request").filter(|r| !r.is_empty());
        let on = |name: &str| query.get(name).map(|v| v == "1" || v == "true");
        let mut join = Self {
            claims,
            room,
            single: wrapped.is_some(),
            auto_subscribe: on("auto_subscribe").unwrap_or(true),
            reconnect: on("reconnect").unwrap_or(false),
            participant_sid: query.get("sid").cloned().unwrap_or_default(),
            offer: None,
            add_tracks: Vec::new(),
            client_protocol: (query.get("client_protocol"))
                .and_then(|v| v.parse().ok())
                .unwrap_or(0),
            capabilities: (query.get("capabilities")).map_or_else(Vec::new, |names| {
                distinct(names.split(',').filter_map(Capability::from_str_name))
            }),
        };
        let (mut metadata, mut attributes) = (String::new(), HashMap::new());
        match wrapped {
            Some(wrapped) => {
                let request = unwrap(wrapped)?;
                let settings = request.connection_settings.unwrap_or_default();
                join.auto_subscribe = settings.auto_subscribe;
                join.reconnect = request.reconnect;
                join.participant_sid = request.participant_sid;
                join.offer = request.publisher_offer;
                join.add_tracks = request.add_track_requests;
                let client = request.client_info.unwrap_or_default();
                join.client_protocol = client.client_protocol;
                let named = client.capabilities.into_iter();
                join.capabilities = distinct(named.flat_map(Capability::try_from));
                metadata = request.metadata;
                attributes = request.participant_attributes;
            }
            None if single => return Err(bad_request("join_request is required")),
            None => {
                if let Some(encoded) = query.get("attributes").filter(|a| !a.is_empty()) {
                    let json = lenient_base64().decode(encoded).ok();
                    let decoded = json.and_then(|j| serde_json::from_slice(&j).ok());
                    attributes = decoded.ok_or_else(|| bad_request("cannot decode attributes"))?;
                }
            }
        }
        join.check()?;
        join.own_metadata(metadata, attributes)?;
        Ok(join)
    }

    /// Neither holds a room open nor counts towards its limit.
    pub fn is_dependent(&self) -> bool {
        is_dependent(&self.claims)
    }

    fn check(&self) -> Result<(), Refusal> {
        if !self.claims.video.room_join {
            return Err(unauthorized("permissions denied"));
        }
        if self.claims.sub.is_empty() {
            return Err(bad_request("identity cannot be empty"));
        }
        if self.claims.sub.len() > MAX_NAME {
            let message = "participant identity length exceeds limits: max length 256";
            return Err(bad_request(message));
        }
        if self.room.is_empty() {
            return Err(bad_request("no room name"));
        }
        if self.room.len() > MAX_NAME {
            return Err(bad_request(
                "room name length exceeds limits: max length 256",
            ));
        }
        Ok(())
    }

    /// Applies what the client sets itself, if its token allows that.
    fn own_metadata(
        &mut self,
        metadata: String,
        attributes: HashMap<String, String>,
    ) -> Result<(), Refusal> {
        let sets_own = !metadata.is_empty() || !attributes.is_empty();
        if sets_own && !self.claims.video.can_update_own_metadata() {
            return Err(unauthorized("no permissions to access the room"));
        }
        if !metadata.is_empty() {
            self.claims.metadata = metadata;
        }
        // An empty value deletes nothing here, unlike in a later update.
        let values = attributes.into_iter().filter(|(_, v)| !v.is_empty());
        self.claims.attributes.extend(values);
        if self.claims.metadata.len() > MAX_METADATA {
            return Err(bad_request("metadata size exceeds limits"));
        }
        if attributes_size(&self.claims.attributes) > MAX_ATTRIBUTES {
            return Err(bad_request("attribute size exceeds limits"));
        }
        Ok(())
    }
}

/// As they are written in tokens.
fn source_names(permission: &proto::ParticipantPermission) -> Vec<String> {
    let sources = permission.can_publish_sources.iter();
    sources
        .filter_map(|s| proto::TrackSource::try_from(*s).ok())
        .map(|s| s.as_str_name().to_ascii_lowercase())
        .collect()
}

fn distinct(capabilities: impl Iterator<Item = Capability>) -> Vec<i32> {
    let distinct: BTreeSet<_> = capabilities.map(|c| c as i32).collect();
    distinct.into_iter().collect()
}

/// Bytes of keys and values together.
pub(super) fn attributes_size(attributes: &HashMap<String, String>) -> usize {
    attributes.iter().map(|(k, v)| k.len() + v.len()).sum()
}

/// A secret for one run of the server, long enough for HS256.
pub(super) fn random_secret() -> String {
    (0..4).map(|_| new_sid("")).collect()
}

impl Refusal {
    pub fn new(status: StatusCode, message: &str) -> Self {
        let message = message.to_owned();
        Self { status, message }
    }
}

fn unauthorized(message: &str) -> Refusal {
    Refusal::new(StatusCode::UNAUTHORIZED, message)
}

fn bad_request(message: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, message)
}

/// Decodes the `join_request` parameter: base64, protobuf, perhaps gzip, protobuf.
fn unwrap(encoded: &str) -> Result<proto::JoinRequest, Refusal> {
    let wrapped = lenient_base64()
        .decode(encoded)
        .map_err(|_| bad_request("cannot base64 decode wrapped join request"))?;
    let wrapped = proto::WrappedJoinRequest::decode(wrapped.as_slice())
        .map_err(|_| bad_request("cannot unmarshal wrapped join request"))?;
    let request = match wrapped.compression() {
        proto::wrapped_join_request::Compression::None => wrapped.join_request,
        proto::wrapped_join_request::Compression::Gzip => {
            let mut request = Vec::new();
            GzDecoder::new(wrapped.join_request.as_slice())
                .take(MAX_JOIN_REQUEST + 1)
                .read_to_end(&mut request)
                .map_err(|_| bad_request("cannot read decompressed join request"))?;
            request
        }
    };
    if request.len() as u64 > MAX_JOIN_REQUEST {
        return Err(bad_request("join request too large"));
    }
    proto::JoinRequest::decode(request.as_slice())
        .map_err(|_| bad_request("cannot unmarshal join request"))
}

/// URL-safe, with or without padding: SDKs differ.
fn lenient_base64() -> GeneralPurpose {
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(&URL_SAFE, config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn claims(change: impl FnOnce(&mut Claims)) -> Option<Claims> {
        let token = AccessToken::with_api_key("key", "secret")
            .with_identity("ann")
            .with_grants(VideoGrants {
                room_join: true,
                room: "lobby".into(),
                ..Default::default()
            })
            .to_jwt()
            .expect("token");
        let mut claims = Claims::from_unverified(&token).expect("claims");
        change(&mut claims);
        Some(claims)
    }

    fn wrapped(request: &proto::JoinRequest, gzip: bool) -> Query {
        let mut bytes = request.encode_to_vec();
        if gzip {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&bytes).expect("gzip");
            bytes = encoder.finish().expect("gzip");
        }
        let wrapped = proto::WrappedJoinRequest {
            compression: gzip.into(),
            join_request: bytes,
        };
        let encoded = lenient_base64().encode(wrapped.encode_to_vec());
        Query::from([("join_request".to_owned(), encoded)])
    }

    fn refused(claims: Option<Claims>, query: &Query, single: bool) -> (u16, String) {
        let refusal = JoinRequest::parse(claims, query, single).expect_err("refused");
        (refusal.status.as_u16(), refusal.message)
    }

    #[test]
    fn a_join_request_parameter_makes_a_single_connection() {
        let request = proto::JoinRequest {
            participant_sid: "PA_1".into(),
            reconnect: true,
            ..Default::default()
        };
        for gzip in [false, true] {
            let join = JoinRequest::parse(claims(|_| {}), &wrapped(&request, gzip), true);
            let join = join.expect("join");
            assert!(join.single && join.reconnect && !join.auto_subscribe);
            assert_eq!(
                (join.room.as_str(), join.participant_sid.as_str()),
                ("lobby", "PA_1")
            );
        }
        let join = JoinRequest::parse(claims(|_| {}), &Query::new(), false).expect("join");
        assert!(!join.single && join.auto_subscribe);
    }

    #[test]
    fn capabilities_come_in_the_query_or_the_join_request() {
        let client_info = proto::ClientInfo {
            capabilities: vec![2, 99, 1, 2],
            ..Default::default()
        };
        let request = proto::JoinRequest {
            client_info: Some(client_info),
            ..Default::default()
        };
        let names = "CAP_COMPRESSION_DEFLATE_RAW,CAP_X,,CAP_PACKET_TRAILER".to_owned();
        let listed = Query::from([("capabilities".to_owned(), names)]);
        for (query, single) in [(wrapped(&request, false), true), (listed, false)] {
            let join = JoinRequest::parse(claims(|_| {}), &query, single).expect("join");
            assert_eq!(join.capabilities, [1, 2]);
        }
    }

    #[test]
    fn refuses_as_livekit_does() {
        let none = Query::new();
        assert_eq!(refused(None, &none, false).0, 401);
        assert_eq!(
            refused(claims(|c| c.video.room_join = false), &none, false),
            (401, "permissions denied".into())
        );
        assert_eq!(
            refused(claims(|c| c.sub.clear()), &none, false),
            (400, "identity cannot be empty".into())
        );
        assert_eq!(
            refused(claims(|c| c.sub = "x".repeat(257)), &none, false).0,
            400
        );
        assert_eq!(
            refused(claims(|c| c.video.room.clear()), &none, false),
            (400, "no room name".into())
        );
        assert_eq!(
            refused(claims(|_| {}), &none, true),
            (400, "join_request is required".into())
        );
        let nonsense = Query::from([("join_request".to_owned(), "?".to_owned())]);
        assert_eq!(refused(claims(|_| {}), &nonsense, true).0, 400);
    }

    #[test]
    fn own_metadata_needs_a_grant() {
        let request = proto::JoinRequest {
            metadata: "m".into(),
            participant_attributes: HashMap::from([("k".into(), "v".into())]),
            ..Default::default()
        };
        let query = wrapped(&request, false);
        assert_eq!(refused(claims(|_| {}), &query, true).0, 401);
        let allowed = claims(|c| c.video.can_update_own_metadata = Some(true));
        let join = JoinRequest::parse(allowed, &query, true).expect("join");
        assert_eq!(join.claims.metadata, "m");
        assert_eq!(join.claims.attributes["k"], "v");
    }

    #[test]
    fn a_gzip_bomb_is_refused() {
        let bomb = proto::JoinRequest {
            metadata: "0".repeat(8 << 20),
            ..Default::default()
        };
        let (status, message) = refused(claims(|_| {}), &wrapped(&bomb, true), true);
        assert_eq!((status, message.as_str()), (400, "join request too large"));
    }
}
