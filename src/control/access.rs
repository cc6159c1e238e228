//! Who may ask for what, how often and how much. On the Unix socket the file's mode says who; on
//! TCP tokens do, and against other sites' scripts in a browser on this machine, `Host` and `Origin`.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, Method, StatusCode,
        header::{
            AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HOST, ORIGIN,
            TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
        },
        uri::Authority,
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{App, error::ApiError};
use crate::config::ControlConfig;

/// Of a request, in bytes.
pub(super) const MAX_BODY: usize = 64 << 10;
/// For a body to come.
pub(super) const BODY_LIMIT: Duration = Duration::from_secs(10);
/// Tokens that are not accepted, from one address: so many at once, and then one in so long.
const GUESSES: Bucket = Bucket::new(10.0, Duration::from_secs(1));
/// Addresses that are remembered for that.
const MAX_ADDRESSES: usize = 256;
/// Requests that change something, of everybody.
const WRITES: Bucket = Bucket::new(30.0, Duration::from_millis(200));
const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// For probes, which have no token.
const PUBLIC: [&str; 2] = ["/healthz", "/readyz"];

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Peer {
    /// The Unix socket.
    Local,
    Tcp {
        ip: IpAddr,
        /// Whether only this machine can reach the address that is listened on.
        loopback: bool,
    },
}

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Read,
    All,
}

/// Every request passes here first.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let allowed = allow(&app, &request);
    let mut response = match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    app.requests.answered(response.status());
    let headers = response.headers_mut();
    headers.insert(
        CACHE_CONTROL,
        axum::http::HeaderValue::from_static("no-store"),
    );
    let nosniff = axum::http::HeaderValue::from_static("nosniff");
    headers.insert(X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

fn allow(app: &App, request: &Request) -> Result<(), ApiError> {
    let config = app.daemon.config();
    let config = &config.control;
    let headers = request.headers();
    // Who comes from nowhere is nobody.
    let Some(peer) = request.extensions().get::<Peer>() else {
        return Err(ApiError::defect());
    };
    if let Peer::Tcp { .. } = peer {
        let named = request.uri().authority().map(Authority::as_str);
        check_host(config, headers, named)?;
    }
    check_origin(headers)?;
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if reads && PUBLIC.contains(&request.uri().path()) {
        return Ok(());
    }
    let right = app.rates.identify(config, peer, headers)?;
    if reads {
        return Ok(());
    }
    if right != Right::All {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "read_only",
            "this token may only read",
            "use the token of control.token",
        ));
    }
    check_body(headers)?;
    let waited = take(&mut app.rates.writes(), Instant::now());
    waited.map_err(|wait| ApiError::too_often("too_many_writes", "too many requests at once", wait))
}

/// A name that leads here by somebody else's DNS is none of ours. Addresses are told apart from
/// names, since nobody can make those lead elsewhere.
fn check_host(
    config: &ControlConfig,
    headers: &HeaderMap,
    named: Option<&str>,
) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        let said = "there is not exactly one Host header";
        return Err(ApiError::bad_request(said, "send one"));
    };
    let host = host.to_str().unwrap_or_default();
    let ours = |host: &str| {
        let Ok(authority) = host.parse::<Authority>() else {
            return false;
        };
        let name = authority.host();
        let ip = name.trim_start_matches('[').trim_end_matches(']');
        let known = |known: &str| known.eq_ignore_ascii_case(name);
        !host.contains('@')
            && (ip.parse::<IpAddr>().is_ok()
                || known("localhost")
                || config.hosts.iter().any(|host| known(host)))
    };
    if ours(host) && named.is_none_or(ours) {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::MISDIRECTED_REQUEST,
        "wrong_host",
        format!("{host:?} is no name of this API"),
        "ask localhost or an IP address, or add the name to control.hosts",
    ))
}

/// Scripts of other sites are refused, whatever they ask for.
fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let host = headers.get(HOST).map_or(&b""[..], |host| host.as_bytes());
    let same = |origin: &[u8]| {
        let rest = origin.strip_prefix(b"http://");
        let rest = rest.or_else(|| origin.strip_prefix(b"https://"));
        rest.is_some_and(|rest| rest.eq_ignore_ascii_case(host))
    };
    let mut origins = headers.get_all(ORIGIN).iter();
    let mut sites = headers.get_all(SITE).iter();
    if origins.all(|origin| same(origin.as_bytes()))
        && sites.all(|site| matches!(site.as_bytes(), b"same-origin" | b"none"))
    {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::FORBIDDEN,
        "wrong_origin",
        "another site asks for this, in a browser",
        "ask from a page of this address, or outside of a browser",
    ))
}

fn check_body(headers: &HeaderMap) -> Result<(), ApiError> {
    let length = headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let length: u64 = length.unwrap_or(0);
    if length > MAX_BODY as u64 {
        return Err(ApiError::too_large());
    }
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    let json = kind.is_some_and(|kind| {
        let kind = kind.split(|b| *b == b';').next().unwrap_or_default();
        kind.trim_ascii().eq_ignore_ascii_case(b"application/json")
    });
    match length > 0 || headers.contains_key(TRANSFER_ENCODING) {
        true if !json => Err(ApiError::not_json()),
        _ => Ok(()),
    }
}

/// So many at once, and then one each time a while has passed.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    most: f64,
    every: Duration,
    left: f64,
    at: Option<Instant>,
}

impl Bucket {
    const fn new(most: f64, every: Duration) -> Self {
        Self {
            most,
            every,
            left: most,
            at: None,
        }
    }

    fn fill(&mut self, now: Instant) {
        let since = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.left = self
            .most
            .min(self.left + since.div_duration_f64(self.every));
        self.at = Some(now);
    }
}

/// Takes one, or says in how many seconds there is one.
fn take(bucket: &mut Bucket, now: Instant) -> Result<(), u64> {
    bucket.fill(now);
    if bucket.left < 1.0 {
        let wait = bucket.every.mul_f64(1.0 - bucket.left);
        return Err(wait.as_secs_f64().ceil() as u64);
    }
    bucket.left -= 1.0;
    Ok(())
}

pub(super) struct Rates {
    writes: Mutex<Bucket>,
    guesses: Mutex<HashMap<IpAddr, Bucket>>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            writes: Mutex::new(WRITES),
            guesses: Mutex::default(),
        }
    }
}

impl Rates {
    fn writes(&self) -> MutexGuard<'_, Bucket> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identify(
        &self,
        config: &ControlConfig,
        peer: &Peer,
        headers: &HeaderMap,
    ) -> Result<Right, ApiError> {
        let Peer::Tcp { ip, loopback } = *peer else {
            return Ok(Right::All);
        };
        let Some(admin) = &config.token else {
            // The configuration allows no other address without one; it may have been taken back.
            return match loopback {
                true => Ok(Right::All),
                false => Err(ApiError::unauthorized(
                    "no token is configured",
                    "set control.token, and have the configuration reloaded",
                )),
            };
        };
        let given = headers.get(AUTHORIZATION);
        let Some(given) = given.and_then(|given| bearer(given.as_bytes())) else {
            return Err(ApiError::unauthorized(
                "a token is needed",
                "send `Authorization: Bearer TOKEN`, with control.token or control.read_token",
            ));
        };
        // By address, so that who guesses locks out nobody else.
        let ip = network(ip);
        let now = Instant::now();
        self.guess_allowed(ip, now)?;
        let given = Sha256::digest(given);
        let is = |token: &SecretString| given.ct_eq(&Sha256::digest(token.expose_secret()));
        let all = is(admin);
        let read = config.read_token.as_ref().map_or(Choice::from(0), is);
        if all.into() {
            return Ok(Right::All);
        }
        if read.into() {
            return Ok(Right::Read);
        }
        self.guessed(ip, now);
        Err(ApiError::unauthorized(
            "the token is not accepted",
            "use that of control.token or control.read_token",
        ))
    }

    fn guess_allowed(&self, ip: IpAddr, now: Instant) -> Result<(), ApiError> {
        let mut guesses = self.guesses.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bucket) = guesses.get_mut(&ip) else {
            return Ok(());
        };
        // Looked at, not taken: a token that is accepted costs nothing.
        take(&mut { *bucket }, now).map_err(|wait| {
            let said = "too many tokens from this address were not accepted";
            ApiError::too_often("too_many_guesses", said, wait)
        })
    }

    fn guessed(&self, ip: IpAddr, now: Instant) {
        let mut guesses = self.guesses.lock().unwrap_or_else(PoisonError::into_inner);
        if guesses.len() >= MAX_ADDRESSES && !guesses.contains_key(&ip) {
            guesses.values_mut().for_each(|bucket| bucket.fill(now));
            guesses.retain(|_, bucket| bucket.left < bucket.most);
            // All of them guess: the one with most left is forgotten.
            if guesses.len() >= MAX_ADDRESSES {
                let most = guesses.iter().max_by(|a, b| a.1.left.total_cmp(&b.1.left));
                if let Some(ip) = most.map(|(ip, _)| *ip) {
                    guesses.remove(&ip);
                }
            }
        }
        let bucket = guesses.entry(ip).or_insert(GUESSES);
        let _ = take(bucket, now);
    }
}

fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(b"Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| token.trim_ascii())
}

/// What one person has of addresses: of IPv6, the first half.
fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => ip.into(),
            None => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;
    use crate::config::Config;

    fn control(admin: Option<&str>, read: Option<&str>) -> ControlConfig {
        let mut control = Config::for_tests().control;
        control.token = admin.map(SecretString::from);
        control.read_token = read.map(SecretString::from);
        control.hosts = vec!["Roomwarden.internal".to_owned()];
        control
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pair = |(name, value): &(HeaderName, &str)| {
            let value = HeaderValue::from_str(value).expect("a value");
            (name.clone(), value)
        };
        let mut all = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            all.append(name, value);
        }
        all
    }

    #[test]
    fn names_of_others_are_no_names_of_ours() {
        let config = control(None, None);
        let is_ours = |host: &str| check_host(&config, &headers(&[(HOST, host)]), None).is_ok();
        for ours in [
            "localhost",
            "LOCALHOST:7460",
            "127.0.0.1:7460",
            "10.1.2.3",
            "[::1]:7460",
            "[::1]",
            "roomwarden.internal:80",
        ] {
            assert!(is_ours(ours), "{ours}");
        }
        for other in [
            "",
            "evil.example",
            "evil.example:7460",
            "localhost.evil.example",
            "localhost@evil.example",
            "evil@localhost",
            "127.0.0.1.evil.example",
            "roomwarden.internal.",
            "a b",
        ] {
            assert!(!is_ours(other), "{other}");
        }
        let two = headers(&[(HOST, "localhost"), (HOST, "localhost")]);
        assert!(check_host(&config, &two, None).is_err());
        assert!(check_host(&config, &headers(&[]), None).is_err());
        let absolute = headers(&[(HOST, "localhost")]);
        assert!(check_host(&config, &absolute, Some("evil.example")).is_err());
    }

    #[test]
    fn scripts_of_other_sites_are_refused() {
        let host = (HOST, "localhost:7460");
        let ok = |pairs: &[(HeaderName, &str)]| {
            let all: Vec<_> = [host.clone()].iter().chain(pairs).cloned().collect();
            check_origin(&headers(&all)).is_ok()
        };
        assert!(ok(&[]));
        assert!(ok(&[
            (ORIGIN, "http://localhost:7460"),
            (SITE, "same-origin")
        ]));
        assert!(ok(&[(SITE, "none")]));
        for origin in ["null", "", "http://localhost", "https://evil.example"] {
            assert!(!ok(&[(ORIGIN, origin)]), "{origin}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!ok(&[(SITE, site)]), "{site}");
        }
    }

    #[test]
    fn rights_follow_tokens() {
        let (admin, read) = ("admin-token-admin", "read-token-read-");
        let tcp = |loopback| Peer::Tcp {
            ip: [127, 0, 0, 1].into(),
            loopback,
        };
        let right = |config: &ControlConfig, peer: Peer, given: Option<&str>| {
            let given = given.map(|given| headers(&[(AUTHORIZATION, given)]));
            let rates = Rates::default();
            rates
                .identify(config, &peer, &given.unwrap_or_default())
                .map_err(|error| error.status.as_u16())
        };
        let open = control(None, None);
        assert_eq!(right(&open, tcp(true), None), Ok(Right::All));
        assert_eq!(right(&open, tcp(false), None), Err(401));
        let closed = control(Some(admin), Some(read));
        assert_eq!(right(&closed, Peer::Local, None), Ok(Right::All));
        for (given, expected) in [
            (None, Err(401)),
            (Some("Bearer admin-token-admin"), Ok(Right::All)),
            (Some("bearer  read-token-read-"), Ok(Right::Read)),
            (Some("Bearer admin-token-admi"), Err(401)),
            (Some("Bearer "), Err(401)),
            (Some("Basic admin-token-admin"), Err(401)),
        ] {
            assert_eq!(right(&closed, tcp(true), given), expected, "{given:?}");
        }
    }

    #[test]
    fn who_guesses_has_to_wait_and_nobody_else() {
        let config = control(Some("admin-token-admin"), None);
        let rates = Rates::default();
        let ask = |ip: [u8; 4], token: &str| {
            let peer = Peer::Tcp {
                ip: ip.into(),
                loopback: true,
            };
            let given = headers(&[(AUTHORIZATION, &format!("Bearer {token}"))]);
            let right = rates.identify(&config, &peer, &given);
            right.map(drop).map_err(|error| error.status.as_u16())
        };
        let (one, other) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let answers: Vec<_> = (0..12).map(|_| ask(one, "guess")).collect();
        assert_eq!(answers[..10], [Err(401); 10]);
        assert_eq!(answers[11], Err(429));
        assert_eq!(ask(one, "admin-token-admin"), Err(429));
        assert_eq!(ask(other, "admin-token-admin"), Ok(()));
        // Very many addresses are not remembered.
        for n in 0..=u16::MAX {
            let [a, b] = n.to_be_bytes();
            let _ = ask([11, 0, a, b], "guess");
        }
        assert_eq!(rates.guesses.lock().unwrap().len(), MAX_ADDRESSES);
    }

    #[test]
    fn buckets_fill_again() {
        let mut bucket = Bucket::new(2.0, Duration::from_secs(4));
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(take(&mut bucket, at(0)), Ok(()));
        assert_eq!(take(&mut bucket, at(0)), Ok(()));
        assert_eq!(take(&mut bucket, at(0)), Err(4));
        assert_eq!(take(&mut bucket, at(3)), Err(1));
        assert_eq!(take(&mut bucket, at(4)), Ok(()));
        assert_eq!(take(&mut bucket, at(400)), Ok(()));
        assert_eq!(take(&mut bucket, at(400)), Ok(()));
        assert!(take(&mut bucket, at(400)).is_err(), "no more than it holds");
    }
}
