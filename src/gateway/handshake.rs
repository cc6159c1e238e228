//! A client's request, and what becomes of it: it is answered once the provider has answered, and by
//! what the provider said.

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use axum::body::Body;
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{
        AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
        SEC_WEBSOCKET_PROTOCOL,
    },
    upgrade::OnUpgrade,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use url::form_urlencoded;

use super::{Relay, Shared, presence::Tie};
use crate::{
    board::Phase,
    domain::{Outcome, StreamKey},
    failure::Failure,
    stt::{
        connect::Provider,
        machine::Report,
        stream::{self, StreamHandle},
    },
};

/// For a place among the streams: clients give up a little later.
const PLACE_WITHIN: Duration = Duration::from_secs(5);
const REQUEST_ID: HeaderName = HeaderName::from_static("dg-request-id");
const ERROR: HeaderName = HeaderName::from_static("dg-error");
/// Browsers send their key as a second protocol after this one.
const TOKEN_PROTOCOL: &str = "token";
/// As many of them, and as long, as Deepgram's documentation can make any use of.
const MAX_PARAMETERS: usize = 256;
const MAX_QUERY: usize = 16 << 10;
/// LiveKit's limit of names and identities, in bytes.
const MAX_NAME: usize = 256;
/// Of a stream that is for no room that is known.
const NO_ROOM: &str = "(gateway)";
const TRACK: &str = "gateway";

/// Where streams are asked for.
#[derive(Debug, PartialEq)]
pub(super) struct Place {
    pub room: Option<String>,
    pub participant: Option<String>,
}

impl Place {
    /// `/v1/listen`, below `/rooms/{room}` or `/rooms/{room}/participants/{identity}`.
    fn of(path: &str) -> Option<Self> {
        let before = path.strip_suffix("/v1/listen")?;
        let mut parts = before.split('/');
        if parts.next() != Some("") {
            return None;
        }
        let parts: Vec<&str> = parts.collect();
        let (room, participant) = match parts[..] {
            [] => (None, None),
            ["rooms", room] => (Some(room), None),
            ["rooms", room, "participants", who] => (Some(room), Some(who)),
            _ => return None,
        };
        let name = |part: Option<&str>| match part {
            None => Some(None),
            Some(part) => decoded(part)
                .filter(|name| !name.is_empty() && name.len() <= MAX_NAME)
                .map(Some),
        };
        Some(Self {
            room: name(room)?,
            participant: name(participant)?,
        })
    }
}

/// A part of a path, percent-decoded.
fn decoded(part: &str) -> Option<String> {
    // In a query a plus would be a blank.
    let part = part.replace('+', "%2B");
    let mut pairs = form_urlencoded::parse(part.as_bytes());
    match (pairs.next(), pairs.next()) {
        (Some((name, value)), None) if value.is_empty() && !part.contains(['=', '&']) => {
            Some(name.into_owned())
        }
        _ => None,
    }
}

/// A refusal, in the shape that Deepgram's have.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    code: String,
    said: String,
    request_id: Option<String>,
    retry_after: Option<Duration>,
}

impl Refusal {
    fn new(status: StatusCode, code: &str, said: impl Into<String>) -> Self {
        Self {
            status,
            code: code.to_owned(),
            said: said.into(),
            request_id: None,
            retry_after: None,
        }
    }

    fn later(self, after: Duration) -> Self {
        let retry_after = Some(after);
        Self {
            retry_after,
            ..self
        }
    }

    /// What the provider refused, as it did; what else failed, by the gateway's own word.
    fn of(failure: &Failure) -> Self {
        let status = failure.status.and_then(|s| StatusCode::from_u16(s).ok());
        let status = status.filter(|status| status.is_client_error() || status.is_server_error());
        Self {
            status: status.unwrap_or(StatusCode::BAD_GATEWAY),
            code: failure.cause.name().to_ascii_uppercase(),
            said: format!("{failure}; {}", failure.cause.advice()),
            request_id: failure.request_id.clone(),
            retry_after: failure.retry_after(),
        }
    }

    fn response(self) -> Response<Body> {
        let body = json!({
            "err_code": self.code,
            "err_msg": self.said,
            "request_id": self.request_id,
        });
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        set(headers, ERROR, &self.code);
        if let Some(id) = &self.request_id {
            set(headers, REQUEST_ID, id);
        }
        if let Some(after) = self.retry_after {
            set(headers, RETRY_AFTER, &after.as_secs().max(1).to_string());
        }
        response
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Answers a request, and opens a stream if it asks for one.
pub(super) async fn answer(
    shared: Arc<Shared>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    match open(shared.clone(), peer, request).await {
        Ok(response) => response,
        Err(refusal) => {
            let (status, said) = (refusal.status.as_u16(), &refusal.said);
            let mut refusals = shared
                .refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(untold) = refusals.tell(Instant::now()) {
                tracing::warn!(%peer, status, untold, "a client of the gateway is refused: {said}");
            }
            drop(refusals);
            refusal.response()
        }
    }
}

async fn open(
    shared: Arc<Shared>,
    peer: SocketAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let config = shared.daemon.config();
    let place = Place::of(request.uri().path()).ok_or_else(|| {
        let said = "there is /v1/listen, below /rooms/ROOM or /rooms/ROOM/participants/IDENTITY if \
                    the stream is for one of LiveKit's";
        Refusal::new(StatusCode::NOT_FOUND, "NOT_FOUND", said)
    })?;
    let subprotocol = authenticated(request.headers(), config.gateway.token.as_ref())?;
    let parameters = parameters(request.uri().query().unwrap_or_default())?;
    let mut response = create_response_with_body(&request, Body::empty)
        .map_err(|error| bad_request(format!("this is no websocket handshake: {error}")))?;
    let upgrade = request
        .extensions_mut()
        .remove::<OnUpgrade>()
        .ok_or_else(|| bad_request("the connection cannot become a websocket"))?;
    let closing = || {
        let said = "roomwarden takes no more streams: it drains, or closes";
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "CLOSING", said)
    };
    if matches!(
        shared.daemon.registry().board().phase(),
        Phase::Draining | Phase::Closing
    ) {
        return Err(closing());
    }
    let tie = tie(&shared, &place, config.gateway.watch_interval_ms).await?;
    // What is wrong with what one client asks for keeps nobody else out.
    let gate = shared.daemon.gate().for_own_settings();
    let admission = tokio::time::timeout(PLACE_WITHIN, gate.admit(0)).await;
    let admission = admission.map_err(|_| no_place(gate.trouble().borrow().as_deref()))?;
    let provider = Arc::new(Provider::of_owner(&config.stt, &parameters));
    let key = StreamKey {
        room: place.room.unwrap_or_else(|| NO_ROOM.to_owned()),
        participant: place.participant.unwrap_or_else(|| peer.ip().to_string()),
        track: TRACK.to_owned(),
    };
    let grace = Duration::from_millis(config.stt.close_grace_ms);
    let registry = shared.daemon.registry();
    let stream = stream::open(registry, provider, key, grace, Some(admission));
    // Dropped while this waits, as when the client goes, it is closed in order.
    let (stream, request_id) = opened(stream.map_err(|_| closing())?).await?;
    let headers = response.headers_mut();
    if let Some(id) = &request_id {
        set(headers, REQUEST_ID, id);
    }
    if subprotocol {
        set(headers, SEC_WEBSOCKET_PROTOCOL, TOKEN_PROTOCOL);
    }
    let relay = Relay {
        stream,
        tie,
        bytes_a_second: bytes_a_second(&parameters),
        grace,
        closing: false,
    };
    shared.relays.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => relay.run(upgraded).await,
            Err(error) => relay.forsaken(&error).await,
        }
    });
    Ok(response)
}

fn bad_request(said: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "BAD_REQUEST", said)
}

/// Whether the key came as a websocket protocol, as browsers have to send it.
fn authenticated(headers: &HeaderMap, token: Option<&SecretString>) -> Result<bool, Refusal> {
    let unauthorized = || {
        let said = "the key is not accepted: send that of gateway.token, as `Authorization: Token \
                    KEY`, in the place of the provider's";
        Refusal::new(StatusCode::UNAUTHORIZED, "INVALID_AUTH", said)
    };
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let by_header = text(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        let known = ["token", "bearer"]
            .iter()
            .any(|known| scheme.eq_ignore_ascii_case(known));
        known.then_some(key.trim())
    });
    let by_protocol = || {
        let (first, key) = text(SEC_WEBSOCKET_PROTOCOL)?.split_once(',')?;
        (first.trim() == TOKEN_PROTOCOL).then_some(key.trim())
    };
    let (given, subprotocol) = match by_header {
        Some(key) => (key, false),
        None => (by_protocol().ok_or_else(unauthorized)?, true),
    };
    let given = Sha256::digest(given);
    let is = |token: &SecretString| given.ct_eq(&Sha256::digest(token.expose_secret()));
    match token.is_some_and(|token| is(token).into()) {
        true => Ok(subprotocol),
        false => Err(unauthorized()),
    }
}

fn parameters(query: &str) -> Result<Vec<(String, String)>, Refusal> {
    let pairs: Vec<_> = form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .take(MAX_PARAMETERS + 1)
        .collect();
    if pairs.len() > MAX_PARAMETERS || query.len() > MAX_QUERY {
        let said = format!("at most {MAX_PARAMETERS} parameters of {MAX_QUERY} bytes are allowed");
        return Err(bad_request(said));
    }
    Ok(pairs)
}

async fn tie(shared: &Shared, place: &Place, every_ms: u64) -> Result<Option<Tie>, Refusal> {
    let Some(room) = &place.room else {
        return Ok(None);
    };
    let (who, every) = (
        place.participant.as_deref(),
        Duration::from_millis(every_ms),
    );
    match shared.presence.tie(room, who, every).await {
        Ok(Some(tie)) => Ok(Some(tie)),
        Ok(None) => {
            let said = match who {
                Some(who) => format!("{who:?} is not in room {room:?}"),
                None => format!("nobody is in room {room:?}"),
            };
            Err(Refusal::new(StatusCode::CONFLICT, "NOT_IN_ROOM", said))
        }
        Err(error) => {
            let said = format!("whether they are in the room cannot be told: {error}");
            let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "LIVEKIT", said);
            Err(refusal.later(Duration::from_secs(1)))
        }
    }
}

/// Nobody is let in: for a cause that is known, or since all places are taken.
fn no_place(trouble: Option<&crate::failure::Trouble>) -> Refusal {
    if let Some(trouble) = trouble {
        let refusal = Refusal::of(&trouble.failure);
        let wait = trouble.until.saturating_duration_since(Instant::now());
        return refusal.later(wait);
    }
    let said = "all of stt.max_streams are in use: wait for others to end, or raise it";
    Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TOO_MANY_REQUESTS", said).later(PLACE_WITHIN)
}

/// Waits for the provider's answer to the handshake; the stream, and its id.
async fn opened(mut stream: StreamHandle) -> Result<(StreamHandle, Option<String>), Refusal> {
    while let Some(report) = stream.report().await {
        if let Report::Opened(request_id) = report {
            return Ok((stream, request_id));
        }
    }
    let settled = stream.settled().await;
    let failure = settled
        .as_ref()
        .and_then(|settled| settled.outcome.failure());
    Err(match (failure, settled.as_deref().map(|s| &s.outcome)) {
        (Some(failure), _) => Refusal::of(&failure),
        (None, Some(Outcome::TimedOut { .. })) => Refusal::new(
            StatusCode::GATEWAY_TIMEOUT,
            "TIMEOUT",
            "the provider did not answer",
        ),
        _ => Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "CLOSING",
            "closed meanwhile",
        ),
    })
}

/// Of linear16, whose length says how long it lasts.
fn bytes_a_second(parameters: &[(String, String)]) -> Option<u64> {
    let asked = |name: &str| {
        let mut of_name = parameters.iter().filter(|(key, _)| key == name);
        of_name.next().map(|(_, value)| value.as_str())
    };
    if asked("encoding") != Some("linear16") {
        return None;
    }
    let rate: u64 = asked("sample_rate")?.parse().ok()?;
    let channels: u64 = asked("channels").unwrap_or("1").parse().ok()?;
    rate.checked_mul(channels)?
        .checked_mul(2)
        .filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_in_the_path() {
        let of = |path: &str| {
            Place::of(path).map(|place| (place.room.unwrap_or_default(), place.participant))
        };
        let named = |room: &str, who: Option<&str>| Some((room.to_owned(), who.map(str::to_owned)));
        assert_eq!(of("/v1/listen"), named("", None));
        assert_eq!(of("/rooms/a%20b+c/v1/listen"), named("a b+c", None));
        assert_eq!(
            of("/rooms/r/participants/%C3%A4%2F%3D/v1/listen"),
            named("r", Some("ä/="))
        );
        for path in [
            "/",
            "/v1/listen/",
            "/v2/listen",
            "v1/listen",
            "//v1/listen",
            "/rooms//v1/listen",
            "/rooms/r/participants//v1/listen",
            "/rooms/r/people/p/v1/listen",
            "/rooms/r/participants/p/q/v1/listen",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
        assert_eq!(of(&format!("/rooms/{}/v1/listen", "r".repeat(257))), None);
    }

    #[test]
    fn a_key_is_taken_as_deepgrams_clients_send_it() {
        let token = SecretString::from("the-gateways-own-key");
        let with = |pairs: &[(HeaderName, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                set(&mut headers, name.clone(), value);
            }
            authenticated(&headers, Some(&token)).map_err(|refusal| refusal.status.as_u16())
        };
        assert_eq!(
            with(&[(AUTHORIZATION, "Token the-gateways-own-key")]),
            Ok(false)
        );
        assert_eq!(
            with(&[(AUTHORIZATION, "bearer the-gateways-own-key")]),
            Ok(false)
        );
        let protocols = "token, the-gateways-own-key";
        assert_eq!(with(&[(SEC_WEBSOCKET_PROTOCOL, protocols)]), Ok(true));
        for wrong in [
            "Token another",
            "Token ",
            "the-gateways-own-key",
            "Basic dG9rZW4=",
        ] {
            assert_eq!(with(&[(AUTHORIZATION, wrong)]), Err(401), "{wrong}");
        }
        assert_eq!(with(&[]), Err(401));
        assert!(authenticated(&HeaderMap::new(), None).is_err());
    }

    #[test]
    fn linear16_tells_how_long_it_lasts() {
        let of = |query: &str| bytes_a_second(&parameters(query).expect("good"));
        assert_eq!(of("encoding=linear16&sample_rate=16000"), Some(32_000));
        assert_eq!(
            of("encoding=linear16&sample_rate=48000&channels=2"),
            Some(192_000)
        );
        for other in [
            "",
            "encoding=opus&sample_rate=48000",
            "encoding=linear16",
            "encoding=linear16&sample_rate=0",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        assert!(parameters(&"a=b&".repeat(1000)).is_err());
    }
}
