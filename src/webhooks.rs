//! LiveKit's webhooks, which tell of rooms and participants. They come late, twice or not at all, so
//! they are hints and not the truth: who sends one that is genuine makes the daemon ask the server
//! at once, and nothing more.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Router,
    body::to_bytes,
    extract::{Request, State},
    http::{StatusCode, header::AUTHORIZATION},
    routing::post,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use livekit_api::access_token::TokenVerifier;
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::{config::LiveKitConfig, ledger::unix_ms, refusals::Refusals};

/// Where LiveKit is to send them (`webhook.urls` in its configuration).
pub const PATH: &str = "/webhooks/livekit";
/// Events with the metadata of a room and a participant have a megabyte at most.
const MAX_BODY: usize = 2 << 20;
/// For a body to come.
const BODY_LIMIT: Duration = Duration::from_secs(10);
/// LiveKit tries for some two minutes; clocks differ.
const SKEW: Duration = Duration::from_secs(300);
/// Ids that are remembered; a replay of one that is forgotten is one more hint.
const MAX_IDS: usize = 20_000;
const MAX_ID: usize = 128;
/// Rooms with news that the daemon has not heard of yet.
const MAX_HINTS: usize = 1024;

/// Tells the daemon that a room may have news.
#[derive(Debug, Clone)]
pub struct Hints(mpsc::Sender<String>);

impl Hints {
    pub fn new() -> (Self, mpsc::Receiver<String>) {
        let (sender, receiver) = mpsc::channel(MAX_HINTS);
        (Self(sender), receiver)
    }

    pub fn give(&self, room: &str) {
        // With so many waiting the server is asked anyway.
        let _ = self.0.try_send(room.to_owned());
    }
}

/// A genuine event, as far as it matters here. Not LiveKit's own type, which takes no fields that
/// are newer than itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookEvent {
    pub id: String,
    /// `room_started` and so on.
    pub event: String,
    /// Empty for what is about no room.
    pub room: String,
    /// In seconds of Unix time.
    pub created_at: u64,
}

/// Why what was sent is no event to be heeded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refused {
    #[error("no token in Authorization")]
    NoToken,
    #[error(
        "the token is not signed with livekit.api_key and livekit.api_secret, or not valid now: {0}"
    )]
    Token(String),
    #[error("the body is not the one that the token was made for")]
    Body,
    #[error("the body is no event: {0}")]
    Malformed(String),
    #[error("the event is {0} s old or early: more than {skew} s", skew = SKEW.as_secs())]
    Skew(u64),
    #[error("the event has come already")]
    Replay,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    id: String,
    #[serde(default)]
    event: String,
    room: Option<Room>,
    /// protobuf's JSON has numbers of 64 bits as texts.
    #[serde(default, rename = "createdAt", alias = "created_at")]
    created_at: Value,
}

#[derive(Deserialize)]
struct Room {
    #[serde(default)]
    name: String,
}

/// Checks what is sent, and remembers what has come.
pub struct Webhooks {
    verifier: TokenVerifier,
    seen: Mutex<Seen>,
    refusals: Mutex<Refusals>,
}

/// The SHA-256 of the body that a token was made for, by who has the secret.
struct Signed(Vec<u8>);

#[derive(Default)]
struct Seen {
    ids: HashSet<String>,
    order: VecDeque<(String, u64)>,
}

impl Seen {
    /// False if it is known. What is too old to be accepted need not be remembered.
    fn add(&mut self, id: &str, created_at: u64, now: u64) -> bool {
        while let Some((oldest, at)) = self.order.front() {
            let old = now > at.saturating_add(2 * SKEW.as_secs());
            if !old && self.order.len() < MAX_IDS {
                break;
            }
            self.ids.remove(oldest);
            self.order.pop_front();
        }
        let new = self.ids.insert(id.to_owned());
        if new {
            self.order.push_back((id.to_owned(), created_at.max(now)));
        }
        new
    }
}

impl Webhooks {
    pub fn new(livekit: &LiveKitConfig) -> Self {
        let secret = livekit.api_secret.expose_secret();
        Self {
            verifier: TokenVerifier::with_api_key(&livekit.api_key, secret),
            seen: Mutex::default(),
            refusals: Mutex::default(),
        }
    }

    /// What LiveKit has to say, if it is LiveKit who says it, now, and for the first time.
    ///
    /// # Errors
    /// It is not.
    pub fn verify(
        &self,
        body: &[u8],
        authorization: Option<&str>,
        now: SystemTime,
    ) -> Result<WebhookEvent, Refused> {
        self.heed(&self.signed(authorization)?, body, now)
    }

    /// What can be said before there is a body.
    fn signed(&self, authorization: Option<&str>) -> Result<Signed, Refused> {
        let token = authorization.ok_or(Refused::NoToken)?.trim();
        let token = token.strip_prefix("Bearer ").unwrap_or(token);
        let claims = (self.verifier.verify(token)).map_err(|e| Refused::Token(e.to_string()))?;
        match STANDARD.decode(claims.sha256) {
            Ok(hash) if hash.len() == Sha256::output_size() => Ok(Signed(hash)),
            // Such as one to join, which participants have.
            _ => Err(Refused::Body),
        }
    }

    fn heed(
        &self,
        Signed(hash): &Signed,
        body: &[u8],
        now: SystemTime,
    ) -> Result<WebhookEvent, Refused> {
        if hash[..] != Sha256::digest(body)[..] {
            return Err(Refused::Body);
        }
        let malformed = |said: &str| Refused::Malformed(said.to_owned());
        let body: Body =
            serde_json::from_slice(body).map_err(|error| Refused::Malformed(error.to_string()))?;
        let created_at = match &body.created_at {
            Value::String(text) => text.parse().ok(),
            number => number.as_u64(),
        };
        let created_at = created_at.ok_or_else(|| malformed("no createdAt"))?;
        if !(1..=MAX_ID).contains(&body.id.len()) {
            return Err(malformed("no id, or one that is too long"));
        }
        let now = unix_ms(now) / 1000;
        let skew = now.abs_diff(created_at);
        if skew > SKEW.as_secs() {
            return Err(Refused::Skew(skew));
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.add(&body.id, created_at, now) {
            return Err(Refused::Replay);
        }
        Ok(WebhookEvent {
            id: body.id,
            event: body.event,
            room: body.room.map(|room| room.name).unwrap_or_default(),
            created_at,
        })
    }

    fn refuse(&self, status: StatusCode, refused: &Refused) -> (StatusCode, String) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(untold) = refusals.tell(Instant::now()) {
            tracing::warn!(untold, "a webhook is refused: {refused}");
        }
        (status, format!("{refused}\n"))
    }
}

/// Takes webhooks at [`PATH`].
pub fn router(livekit: &LiveKitConfig, hints: Hints) -> Router {
    let webhooks = Arc::new(Webhooks::new(livekit));
    Router::new()
        .route(PATH, post(receive))
        .with_state((webhooks, hints))
}

async fn receive(
    State((webhooks, hints)): State<(Arc<Webhooks>, Hints)>,
    request: Request,
) -> (StatusCode, String) {
    let (parts, body) = request.into_parts();
    let authorization = parts.headers.get(AUTHORIZATION);
    let authorization = authorization.and_then(|value| value.to_str().ok());
    // Who is nobody is not read.
    let signed = match webhooks.signed(authorization) {
        Ok(signed) => signed,
        Err(refused) => return webhooks.refuse(StatusCode::UNAUTHORIZED, &refused),
    };
    let body = match tokio::time::timeout(BODY_LIMIT, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let said = format!("no body, or one of more than {MAX_BODY} bytes\n");
            return (StatusCode::PAYLOAD_TOO_LARGE, said);
        }
        Err(_) => {
            let said = format!("no whole body within {BODY_LIMIT:?}\n");
            return (StatusCode::REQUEST_TIMEOUT, said);
        }
    };
    match webhooks.heed(&signed, &body, SystemTime::now()) {
        Ok(event) => {
            tracing::debug!(event = event.event, room = event.room, "webhook");
            hints.give(&event.room);
            (StatusCode::OK, String::new())
        }
        // LiveKit was not told that it had come.
        Err(Refused::Replay) => (StatusCode::OK, String::new()),
        Err(refused @ Refused::Malformed(_)) => webhooks.refuse(StatusCode::BAD_REQUEST, &refused),
        Err(refused) => webhooks.refuse(StatusCode::UNAUTHORIZED, &refused),
    }
}

#[cfg(test)]
mod tests {
    use livekit_api::access_token::AccessToken;

    use super::*;
    use crate::config::Config;

    fn livekit() -> LiveKitConfig {
        Config::for_tests().livekit
    }

    fn signed(body: &str, secret: &str) -> String {
        AccessToken::with_api_key("key", secret)
            .with_sha256(&STANDARD.encode(Sha256::digest(body)))
            .to_jwt()
            .expect("a token")
    }

    fn body(id: &str, at: u64) -> String {
        format!(
            "{{\"event\": \"room_started\", \"id\": \"{id}\", \"createdAt\": \"{at}\", \
             \"room\": {{\"name\": \"r\", \"new\": 1}}, \"newer\": []}}"
        )
    }

    #[test]
    fn genuine_events_are_taken_once() {
        let webhooks = Webhooks::new(&livekit());
        let now = SystemTime::now();
        let at = unix_ms(now) / 1000;
        let body = body("EV_1", at);
        let token = signed(&body, "key");
        let event = webhooks.verify(body.as_bytes(), Some(&token), now);
        let expected = WebhookEvent {
            id: "EV_1".into(),
            event: "room_started".into(),
            room: "r".into(),
            created_at: at,
        };
        assert_eq!(event, Ok(expected));
        let bearer = format!("Bearer {token}");
        let again = webhooks.verify(body.as_bytes(), Some(&bearer), now);
        assert_eq!(again, Err(Refused::Replay));
        let number = body.replace(&format!("\"{at}\""), &at.to_string());
        let number = number.replace("EV_1", "EV_2");
        let token = signed(&number, "key");
        assert!(
            webhooks
                .verify(number.as_bytes(), Some(&token), now)
                .is_ok()
        );
    }

    #[test]
    fn forged_changed_old_and_odd_ones_are_refused() {
        let webhooks = Webhooks::new(&livekit());
        let now = SystemTime::now();
        let at = unix_ms(now) / 1000;
        let verify = |body: &str, token: Option<&str>| {
            webhooks
                .verify(body.as_bytes(), token, now)
                .expect_err("refused")
        };
        let good = body("EV_1", at);
        let token = signed(&good, "key");
        assert_eq!(verify(&good, None), Refused::NoToken);
        let forged = verify(&good, Some(&signed(&good, "another")));
        assert!(matches!(forged, Refused::Token(_)), "{forged}");
        assert_eq!(verify(&body("EV_2", at), Some(&token)), Refused::Body);
        let plain = AccessToken::with_api_key("key", "key")
            .to_jwt()
            .expect("a token");
        assert_eq!(
            verify(&good, Some(&plain)),
            Refused::Body,
            "a token to join"
        );
        for (at, skew) in [(at - 301, 301), (at + 400, 400)] {
            let off = body("EV_3", at);
            assert_eq!(
                verify(&off, Some(&signed(&off, "key"))),
                Refused::Skew(skew)
            );
        }
        let nameless = body("", at);
        let timeless = good.replace("createdAt", "x");
        let long = body(&"x".repeat(200), at);
        for odd in ["", "[]", "{", "{\"id\": 1}", &nameless, &timeless, &long] {
            let refused = verify(odd, Some(&signed(odd, "key")));
            assert!(matches!(refused, Refused::Malformed(_)), "{odd}: {refused}");
        }
        // None of these was remembered.
        assert!(webhooks.verify(good.as_bytes(), Some(&token), now).is_ok());
    }

    #[test]
    fn what_is_remembered_is_bounded_and_covers_all_that_could_be_accepted_again() {
        let mut seen = Seen::default();
        assert!(seen.add("a", 1000, 1000));
        assert!(!seen.add("a", 1000, 1000 + SKEW.as_secs()));
        assert!(seen.add("b", 9000, 9000));
        assert_eq!(seen.ids.len(), 1, "what is too old is forgotten");
        for n in 0..2 * MAX_IDS {
            assert!(seen.add(&n.to_string(), 9000, 9000));
        }
        assert_eq!((seen.ids.len(), seen.order.len()), (MAX_IDS, MAX_IDS));
    }
}
