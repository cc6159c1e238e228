//! Who may do what: Deepgram's API key, tokens that are granted for a while in its place, and the
//! tokens of LiveKit Inference.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderValue, header};
use livekit_token::{AccessToken, Claims, TokenVerifier};
use uuid::Uuid;

use super::config::Config;
use super::reject::{ErrorBody, Reject};

/// Of the tokens that this server grants.
const GRANT_ISSUER: &str = "rehearsal-grant";

/// Who opened the stream.
#[derive(Debug)]
pub(super) struct Credentials {
    /// What may be shown of the key.
    pub masked_key: String,
    /// The subprotocol to agree to, for clients that can send no headers.
    pub subprotocol: Option<HeaderValue>,
}

/// Checks credentials.
pub(super) struct Keys {
    api_key: String,
    inference_key: String,
    inference: TokenVerifier,
    /// Signs the tokens that are granted; a new one in each server.
    grant_secret: String,
    grants: TokenVerifier,
}

impl Keys {
    pub(super) fn new(config: &Config) -> Self {
        let (key, secret) = (&config.inference_key, &config.inference_secret);
        let grant_secret = format!("{}{}", Uuid::new_v4(), Uuid::new_v4());
        Self {
            api_key: config.api_key.clone(),
            inference_key: key.clone(),
            inference: TokenVerifier::with_api_key(key, secret),
            grants: TokenVerifier::with_api_key(GRANT_ISSUER, &grant_secret),
            grant_secret,
        }
    }

    /// Checks the key of a Deepgram client, `Authorization: Token` or `Bearer`, or the
    /// subprotocols `token, <key>`; or in its place a token that was granted, as a bearer.
    pub(super) fn listen(&self, headers: &HeaderMap) -> Result<Credentials, Reject> {
        let presented = Presented::by(headers)?;
        self.check(&presented)?;
        Ok(Credentials {
            // Granted tokens draw on the key that they were granted to.
            masked_key: mask(&self.api_key),
            subprotocol: presented.subprotocol,
        })
    }

    /// Checks for the key itself, which the management API needs.
    pub(super) fn main(&self, headers: &HeaderMap) -> Result<(), Reject> {
        match self.check(&Presented::by(headers)?)? {
            Rank::Key => Ok(()),
            Rank::Token => Err(Reject::status(403).message("The token may not use this API.")),
        }
    }

    /// A token that is as good as the key for opening streams, until it expires. None if it
    /// cannot be made.
    pub(super) fn grant(&self, ttl: Duration) -> Option<String> {
        AccessToken::with_api_key(GRANT_ISSUER, &self.grant_secret)
            .with_identity(&Uuid::new_v4().to_string())
            .with_ttl(ttl)
            .to_jwt()
            .ok()
    }

    fn check(&self, presented: &Presented) -> Result<Rank, Reject> {
        if presented.key == self.api_key {
            return Ok(Rank::Key);
        }
        if !presented.bearer {
            return Err(Reject::status(401));
        }
        match verify(&self.grants, GRANT_ISSUER, presented.key) {
            Ok(_) => Ok(Rank::Token),
            Err(why) => Err(Reject::status(401).message(format!("Invalid credentials: {why}."))),
        }
    }

    /// Checks the token of a LiveKit Inference client, which must have the grant
    /// `inference.perform`.
    pub(super) fn inference(&self, headers: &HeaderMap) -> Result<Credentials, Reject> {
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or_else(|| unauthorized("a bearer token is required"))?;
        let claims = verify(&self.inference, &self.inference_key, token).map_err(unauthorized)?;
        if !claims.inference.perform {
            let message = "the token lacks the inference grant `perform`";
            return Err(unauthorized(message));
        }
        Ok(Credentials {
            masked_key: mask(&self.inference_key),
            subprotocol: None,
        })
    }
}

/// What credentials are good for.
enum Rank {
    /// Everything.
    Key,
    /// Opening streams.
    Token,
}

/// What a Deepgram client presents.
struct Presented<'a> {
    key: &'a str,
    bearer: bool,
    /// The subprotocol to agree to.
    subprotocol: Option<HeaderValue>,
}

impl<'a> Presented<'a> {
    fn by(headers: &'a HeaderMap) -> Result<Self, Reject> {
        let refused = || Reject::status(401);
        let text = |name| {
            let value = headers.get(name)?;
            Some(value.to_str().map_err(|_| refused()))
        };
        let ((scheme, key), is_header) = match text(header::AUTHORIZATION) {
            Some(value) => (value?.split_once(' ').ok_or_else(refused)?, true),
            None => {
                let value = text(header::SEC_WEBSOCKET_PROTOCOL).ok_or_else(refused)??;
                (value.split_once(',').ok_or_else(refused)?, false)
            }
        };
        let (scheme, key) = (scheme.trim(), key.trim());
        let bearer = scheme.eq_ignore_ascii_case("bearer");
        if !bearer && !scheme.eq_ignore_ascii_case("token") {
            return Err(refused());
        }
        let subprotocol = match is_header {
            true => None,
            false => Some(HeaderValue::from_str(scheme).map_err(|_| refused())?),
        };
        Ok(Self {
            key,
            bearer,
            subprotocol,
        })
    }
}

/// The claims of a token that is genuine and still valid, or what is wrong with it.
fn verify(verifier: &TokenVerifier, key: &str, token: &str) -> Result<Claims, &'static str> {
    let unverified = Claims::from_unverified(token).map_err(|_| "not a token")?;
    if unverified.iss != key {
        return Err("the token is of an unknown API key");
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    // The verifier forgives a minute.
    let expired = unverified.exp as u64 <= now;
    match verifier.verify(token) {
        Ok(_) if expired => Err("the token has expired"),
        Ok(claims) => Ok(claims),
        Err(_) if expired => Err("the token has expired"),
        Err(_) => Err("the token's signature is wrong, or it is not valid yet"),
    }
}

fn unauthorized(message: &str) -> Reject {
    Reject::status(401)
        .message(message)
        .body(ErrorBody::Inference)
}

/// The last four characters of a key that is long enough to spare them.
fn mask(key: &str) -> String {
    let tail = key.char_indices().rev().nth(3).map(|(index, _)| index);
    match tail {
        Some(index) if key.len() >= 16 => format!("...{}", &key[index..]),
        _ => "...".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;
    use livekit_token::InferenceGrants;

    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn keys() -> Keys {
        Keys::new(&Config::default().api_key(KEY))
    }

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).expect("a value"))])
    }

    #[test]
    fn every_way_to_send_the_key_is_accepted_and_only_its_tail_is_kept() {
        for (name, value) in [
            (header::AUTHORIZATION, format!("Token {KEY}")),
            (header::AUTHORIZATION, format!("token {KEY}")),
            (header::AUTHORIZATION, format!("Bearer {KEY}")),
            (header::SEC_WEBSOCKET_PROTOCOL, format!("token, {KEY}")),
        ] {
            let accepted = keys().listen(&headers(name, &value)).expect(&value);
            assert_eq!(accepted.masked_key, "...cdef");
        }
    }

    #[test]
    fn a_wrong_or_missing_key_is_401() {
        for (name, value) in [
            (header::AUTHORIZATION, "Token wrong".to_owned()),
            (header::AUTHORIZATION, format!("Basic {KEY}")),
            (header::AUTHORIZATION, KEY.to_owned()),
            (header::SEC_WEBSOCKET_PROTOCOL, "token".to_owned()),
            (header::SEC_WEBSOCKET_PROTOCOL, "token, wrong".to_owned()),
            (header::ACCEPT, "nothing".to_owned()),
        ] {
            let refused = keys().listen(&headers(name, &value)).expect_err(&value);
            assert_eq!(refused.status, 401);
        }
    }

    #[test]
    fn short_keys_are_masked_whole() {
        assert_eq!(mask("secret"), "...");
        assert_eq!(mask(""), "...");
        assert_eq!(mask("ééééééééé"), "...éééé");
    }

    fn inference_error(token: &str) -> String {
        let headers = headers(header::AUTHORIZATION, &format!("Bearer {token}"));
        let refused = keys().inference(&headers).expect_err(token);
        assert_eq!(refused.status, 401);
        refused.message
    }

    #[test]
    fn a_token_needs_the_right_key_the_right_secret_the_grant_and_time_left() {
        let config = Config::default();
        let (key, secret) = (&config.inference_key, &config.inference_secret);
        let token = |key: &str, secret: &str, ttl| {
            AccessToken::with_api_key(key, secret)
                .with_identity("agent")
                .with_ttl(Duration::from_secs(ttl))
                .with_inference_grants(InferenceGrants::default().with_perform())
                .to_jwt()
                .expect("a token")
        };
        let good = format!("Bearer {}", token(key, secret, 600));
        let accepted = keys().inference(&headers(header::AUTHORIZATION, &good));
        assert!(accepted.is_ok());

        let expired = inference_error(&token(key, secret, 0));
        assert!(expired.contains("expired"), "{expired}");
        let other_key = inference_error(&token("other", secret, 600));
        assert!(other_key.contains("unknown API key"), "{other_key}");
        let other_secret = inference_error(&token(key, "other", 600));
        assert!(other_secret.contains("signature"), "{other_secret}");
        let ungranted = AccessToken::with_api_key(key, secret).to_jwt();
        let ungranted = inference_error(&ungranted.expect("a token"));
        assert!(ungranted.contains("perform"), "{ungranted}");
        assert_eq!(inference_error("nonsense"), "not a token");
    }

    #[test]
    fn granted_tokens_open_streams_until_they_expire_and_nothing_else() {
        let keys = keys();
        let bearer = |keys: &Keys, ttl| {
            let token = keys.grant(Duration::from_secs(ttl)).expect("a token");
            headers(header::AUTHORIZATION, &format!("Bearer {token}"))
        };
        let granted = bearer(&keys, 30);
        assert_eq!(
            keys.listen(&granted).expect("accepted").masked_key,
            "...cdef"
        );
        assert_eq!(keys.main(&granted).expect_err("refused").status, 403);
        let expired = keys.listen(&bearer(&keys, 0)).expect_err("refused");
        assert_eq!(expired.status, 401);
        assert!(expired.message.contains("expired"), "{}", expired.message);
        let stranger = Keys::new(&Config::default());
        assert!(keys.listen(&bearer(&stranger, 30)).is_err());
        let as_key = granted[header::AUTHORIZATION].to_str().expect("text");
        let as_key = as_key.replace("Bearer", "Token");
        assert!(
            keys.listen(&headers(header::AUTHORIZATION, &as_key))
                .is_err()
        );
    }
}
