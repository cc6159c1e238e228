//! Opening a stream: DNS, TCP, TLS and the websocket handshake, each failure with its cause.

use std::{
    borrow::Cow,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use livekit_api::access_token::{AccessToken, AccessTokenError, InferenceGrants};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{
        self,
        client::IntoClientRequest,
        http::{HeaderMap, HeaderValue, Request, header::AUTHORIZATION},
        protocol::WebSocketConfig,
    },
};
use url::Url;

use super::{
    dialect::{self, Dialect},
    machine::Limits,
};
use crate::{
    audio::LINEAR16_RATE,
    config::{Encoding, Endpointing, ProviderKind, SttConfig, SttParameters},
    domain::Service,
    failure::{self, Answer, Cause, Failure},
    kernel::SocketId,
    tls,
};

pub type Socket = WebSocketStream<MaybeTlsStream<Wire>>;

/// Results of the longest utterances are a few hundred kilobytes.
const MAX_MESSAGE: usize = 1 << 20;
/// Of one name, tried in turn.
const MAX_ADDRESSES: usize = 8;
/// A peer that acknowledges nothing for so long is gone; the kernel's own patience is a quarter of
/// an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);
/// What comes is small; the library's default of 128 KiB a stream would be most of its memory.
const READ_BUFFER: usize = 8 << 10;
/// What a token of LiveKit Inference is good for.
const INFERENCE_TOKEN: Duration = Duration::from_secs(600);
/// Longer than this nobody is left alone, whatever Retry-After says.
const MOST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// What bytes go over: TCP, or in tests memory, which goes with a paused clock.
pub enum Wire {
    Tcp(TcpStream),
    #[cfg(test)]
    Memory(tokio::io::DuplexStream),
}

impl Wire {
    /// Has what is left unsent thrown away, and the peer told so, when this is dropped.
    pub fn reset(&self) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_zero_linger(),
            #[cfg(test)]
            Self::Memory(_) => Ok(()),
        }
    }
}

/// Passes a method on to what the wire is.
macro_rules! over {
    ($wire:expr, $io:ident => $call:expr) => {
        match $wire.get_mut() {
            Wire::Tcp($io) => $call,
            #[cfg(test)]
            Wire::Memory($io) => $call,
        }
    };
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        over!(self, io => Pin::new(io).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        over!(self, io => Pin::new(io).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        over!(self, io => Pin::new(io).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.is_write_vectored(),
            #[cfg(test)]
            Self::Memory(memory) => memory.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        over!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        over!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}

/// A connection to the provider, on which nothing has been said.
pub struct Dialled(Wire);

impl Dialled {
    pub fn socket_id(&self) -> Option<SocketId> {
        match &self.0 {
            Wire::Tcp(tcp) => SocketId::of(tcp),
            #[cfg(test)]
            Wire::Memory(_) => None,
        }
    }
}

/// A stream whose handshake is complete.
pub struct Connected {
    pub socket: Socket,
    /// `dg-request-id` of the handshake's answer.
    pub request_id: Option<String>,
}

/// Where and how to open streams; made once from the configuration.
pub struct Provider {
    url: Url,
    config: SttConfig,
    /// Its streams are spoken on by their owner.
    is_owners: bool,
    service: Arc<Service>,
    #[cfg(test)]
    in_memory: Option<InMemory>,
}

/// A provider within the process: takes the other end of each connection.
#[cfg(test)]
pub struct InMemory(pub tokio::sync::mpsc::UnboundedSender<tokio::io::DuplexStream>);

#[cfg(test)]
impl InMemory {
    /// What the kernel would buffer of a connection, in bytes.
    const BUFFER: usize = 16 << 10;

    async fn dial(&self) -> Result<Dialled, Failure> {
        let (ours, theirs) = tokio::io::duplex(Self::BUFFER);
        let taken = self.0.send(theirs);
        taken.map_err(|_| Failure::io(&io::ErrorKind::ConnectionRefused.into()))?;
        Ok(Dialled(Wire::Memory(ours)))
    }
}

impl Provider {
    pub fn new(config: &SttConfig) -> Self {
        let mut url = config.url.clone();
        if matches!(url.path(), "" | "/") {
            url.set_path(config.provider.path());
        }
        let query = match config.provider {
            ProviderKind::Deepgram => listen_query(config),
            ProviderKind::DeepgramFlux => flux_query(config),
            // The rest is said by the first message.
            ProviderKind::LivekitInference => vec![("model", config.model.clone())],
        };
        url.query_pairs_mut().extend_pairs(query);
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        let service = Arc::new(Service {
            provider: format!("{}{port}", url.host_str().unwrap_or_default()),
            model: config.model.clone(),
            language: config.language.clone(),
            encoding: config.encoding.name().to_owned(),
        });
        Self {
            url,
            service,
            config: config.clone(),
            is_owners: false,
            #[cfg(test)]
            in_memory: None,
        }
    }

    /// For one stream, with the parameters of an owner who speaks `/v1/listen` itself.
    pub fn of_owner(config: &SttConfig, parameters: &[(String, String)]) -> Self {
        let mut provider = Self::new(config);
        provider.is_owners = true;
        let asked = |name: &str| {
            let mut of_name = parameters.iter().filter(|(key, _)| key == name);
            of_name.next().map(|(_, value)| value.clone())
        };
        provider.service = Arc::new(Service {
            provider: provider.service.provider.clone(),
            model: asked("model").unwrap_or_default(),
            language: asked("language"),
            encoding: asked("encoding").unwrap_or_else(|| "container".to_owned()),
        });
        let mut url = config.url.clone();
        url.set_path(provider.url.path());
        if !parameters.is_empty() {
            url.query_pairs_mut().extend_pairs(parameters);
        }
        provider.url = url;
        provider
    }

    /// As configured, but within the process.
    #[cfg(test)]
    pub fn in_memory(config: &SttConfig, server: InMemory) -> Self {
        let mut provider = Self::new(config);
        provider.url = Url::parse("ws://memory").expect("URL");
        Self {
            in_memory: Some(server),
            ..provider
        }
    }

    /// What its streams are asked for, for the books.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// What a stream of this provider may keep us waiting.
    pub fn limits(&self) -> Limits {
        Limits {
            read: nonzero(self.config.read_timeout_ms),
            write: nonzero(self.config.write_timeout_ms),
        }
    }

    /// What a stream of this provider speaks.
    pub fn dialect(&self) -> Box<dyn Dialect> {
        match self.is_owners {
            true => dialect::of_owner(),
            false => dialect::of(&self.config),
        }
    }

    /// What the provider says, without the key.
    pub fn hide<'a>(&self, text: &'a str) -> Cow<'a, str> {
        failure::without(self.secret().expose_secret(), text)
    }

    fn secret(&self) -> &SecretString {
        match self.config.provider {
            ProviderKind::Deepgram | ProviderKind::DeepgramFlux => &self.config.api_key,
            ProviderKind::LivekitInference => &self.config.inference_api_secret,
        }
    }

    /// The limit for dialling and handshake together.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.config.connect_timeout_ms)
    }

    /// Resolves and connects. Nothing is asked of the provider yet, so this may be dropped at any
    /// time.
    pub async fn dial(&self) -> Result<Dialled, Failure> {
        #[cfg(test)]
        if let Some(server) = &self.in_memory {
            return server.dial().await;
        }
        let host = self.url.host_str().unwrap_or_default();
        let port = self.url.port_or_known_default().unwrap_or(443);
        // An IPv6 address stands in brackets in a URL, not in a socket address.
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host((name, port))
            .await
            .map_err(|error| Failure::new(Cause::Dns, format!("{host}: {error}")))?
            .take(MAX_ADDRESSES)
            .collect();
        // A dead route must leave time for the next address.
        let share = self.connect_timeout() / (addresses.len().max(1) as u32 + 1);
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses {
            let connected = tokio::time::timeout(share, TcpStream::connect(address)).await;
            match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(tcp) => match prepare(&tcp) {
                    Ok(()) => return Ok(Dialled(Wire::Tcp(tcp))),
                    Err(error) => last = error,
                },
                Err(error) => last = error,
            }
        }
        let cause = Failure::io(&last).cause;
        Err(Failure::new(cause, format!("{host}:{port}: {last}")))
    }

    /// TLS and the websocket handshake. Not to be dropped lightly: from here on the provider may
    /// count a stream.
    pub async fn upgrade(&self, dialled: Dialled) -> Result<Connected, Failure> {
        let failed = |error| match error {
            tungstenite::Error::Http(response) => {
                let hide = |text: &str| self.hide(text).into_owned();
                refused(&response, hide)
            }
            error => ended(&error),
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            // Nothing is held back, so that what counts as sent has left for the kernel.
            .write_buffer_size(0)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let request = self.request().map_err(failed)?;
        let connector = match self.url.scheme() {
            "wss" => {
                let connector = tls::connector().await;
                Some(connector.map_err(|error| Failure::new(Cause::Tls, error.to_string()))?)
            }
            _ => None,
        };
        let (socket, response) =
            client_async_tls_with_config(request, dialled.0, Some(config), connector)
                .await
                .map_err(failed)?;
        let request_id = header(response.headers(), "dg-request-id");
        let request_id = request_id.map(|id| self.hide(id).into_owned());
        Ok(Connected { socket, request_id })
    }

    fn request(&self) -> Result<Request<()>, tungstenite::Error> {
        let mut request = self.url.as_str().into_client_request()?;
        let secret = self.secret().expose_secret();
        let token = match self.config.provider {
            ProviderKind::Deepgram | ProviderKind::DeepgramFlux => format!("Token {secret}"),
            ProviderKind::LivekitInference => {
                let key = &self.config.inference_api_key;
                format!(
                    "Bearer {}",
                    inference_token(key, secret).unwrap_or_default()
                )
            }
        };
        let mut token = HeaderValue::try_from(token).map_err(tungstenite::http::Error::from)?;
        token.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, token);
        Ok(request)
    }
}

fn nonzero(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

/// As the agent frameworks make it: fresh for each session.
fn inference_token(key: &str, secret: &str) -> Result<String, AccessTokenError> {
    AccessToken::with_api_key(key, secret)
        .with_identity("agent")
        .with_ttl(INFERENCE_TOKEN)
        .with_inference_grants(InferenceGrants::default().with_perform())
        .to_jwt()
}

/// The query of `/v2/listen`, by Deepgram's API reference.
fn flux_query(config: &SttConfig) -> Vec<(&str, String)> {
    let mut query = vec![("model", config.model.clone())];
    let mut add = |name, value: Option<String>| query.extend(value.map(|value| (name, value)));
    if config.encoding == Encoding::Linear16 {
        add("encoding", Some("linear16".to_owned()));
        add("sample_rate", Some(LINEAR16_RATE.to_string()));
    }
    add("language_hint", config.language.clone());
    let parameters = &config.parameters;
    for (name, value) in [
        ("numerals", parameters.numerals),
        ("profanity_filter", parameters.profanity_filter),
        ("mip_opt_out", parameters.mip_opt_out),
    ] {
        add(name, value.map(|value| value.to_string()));
    }
    for (name, values) in [
        ("keyterm", &parameters.keyterm),
        ("redact", &parameters.redact),
        ("tag", &parameters.tag),
    ] {
        query.extend(values.iter().map(|value| (name, value.clone())));
    }
    let extra = config.extra.iter();
    query.extend(extra.map(|(name, value)| (name.as_str(), value.clone())));
    query
}

/// The query of `/v1/listen`, by Deepgram's API reference. Of Ogg-Opus the provider finds out
/// encoding and rate by itself.
fn listen_query(config: &SttConfig) -> Vec<(&str, String)> {
    let mut query = vec![("model", config.model.clone())];
    let mut add = |name, value: Option<String>| query.extend(value.map(|value| (name, value)));
    let flag = |value: Option<bool>| value.map(|value| value.to_string());
    add("language", config.language.clone());
    add("interim_results", flag(Some(config.interim_results)));
    if config.encoding == Encoding::Linear16 {
        add("encoding", Some("linear16".to_owned()));
        add("sample_rate", Some(LINEAR16_RATE.to_string()));
        add("channels", Some("1".to_owned()));
    }
    // Taken apart, so that no parameter is forgotten.
    let SttParameters {
        punctuate,
        smart_format,
        numerals,
        profanity_filter,
        dictation,
        diarize,
        endpointing,
        utterance_end_ms,
        vad_events,
        filler_words,
        detect_entities,
        no_delay,
        mip_opt_out,
        keyterm,
        keywords,
        redact,
        replace,
        search,
        tag,
        extra,
        callback,
        callback_method,
        version,
    } = &config.parameters;
    for (name, value) in [
        ("punctuate", punctuate),
        ("smart_format", smart_format),
        ("numerals", numerals),
        ("profanity_filter", profanity_filter),
        ("dictation", dictation),
        ("diarize", diarize),
        ("vad_events", vad_events),
        ("filler_words", filler_words),
        ("detect_entities", detect_entities),
        ("no_delay", no_delay),
        ("mip_opt_out", mip_opt_out),
    ] {
        add(name, flag(*value));
    }
    let endpointing = endpointing.map(|value| match value {
        Endpointing::Milliseconds(ms) => ms.to_string(),
        Endpointing::Enabled(enabled) => enabled.to_string(),
    });
    add("endpointing", endpointing);
    add(
        "utterance_end_ms",
        utterance_end_ms.map(|ms| ms.to_string()),
    );
    for (name, values) in [
        ("keyterm", keyterm),
        ("keywords", keywords),
        ("redact", redact),
        ("replace", replace),
        ("search", search),
        ("tag", tag),
        ("extra", extra),
    ] {
        values
            .iter()
            .for_each(|value| add(name, Some(value.clone())));
    }
    add("callback", callback.clone());
    add("callback_method", callback_method.clone());
    add("version", version.clone());
    query.extend(
        config
            .extra
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone())),
    );
    query
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    // Pages are small and must not wait for each other.
    tcp.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(tcp).set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Everything the provider said about a refusal: it comes in headers, in the body, or both.
fn refused(
    response: &tungstenite::http::Response<Option<Vec<u8>>>,
    hide: impl Fn(&str) -> String,
) -> Failure {
    let headers = response.headers();
    let said = |name| header(headers, name).map(&hide);
    let (error, request_id) = (said("dg-error"), said("dg-request-id"));
    let body = response.body().as_deref().unwrap_or_default();
    let body = hide(&String::from_utf8_lossy(body));
    let answer = Answer {
        error: error.as_deref(),
        request_id: request_id.as_deref(),
        retry_after: retry_after(headers, SystemTime::now()),
        body: body.as_bytes(),
    };
    Failure::refused(response.status().as_u16(), &answer)
}

/// How a connection ended, or did not come to be.
pub fn ended(error: &tungstenite::Error) -> Failure {
    use tungstenite::Error;
    match error {
        Error::Io(error) => Failure::io(error),
        Error::Tls(error) => Failure::new(Cause::Tls, error.to_string()),
        Error::ConnectionClosed | Error::AlreadyClosed => {
            Failure::new(Cause::Reset, "connection closed")
        }
        error => Failure::new(Cause::Protocol, error.to_string()),
    }
}

/// Retry-After is in seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let said = header(headers, "retry-after")?;
    let asked = match said.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(said)
            .ok()?
            .duration_since(now)
            .ok()?,
    };
    Some(asked.min(MOST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_url_has_the_configured_parameters_and_no_others() {
        let mut config = Config::for_tests().stt;
        assert_eq!(
            Provider::new(&config).url.as_str(),
            "wss://api.deepgram.com/v1/listen?model=nova-3&interim_results=true"
        );
        config.url = Url::parse("ws://127.0.0.1:1/base/v1/listen?a=b").expect("URL");
        config.language = Some("en".into());
        config.encoding = Encoding::Linear16;
        config.parameters = SttParameters {
            punctuate: Some(true),
            endpointing: Some(Endpointing::Milliseconds(300)),
            keyterm: vec!["one".into(), "two".into()],
            ..Default::default()
        };
        config.extra.insert("sentiment".into(), "a&b".into());
        assert_eq!(
            Provider::new(&config).url.as_str(),
            "ws://127.0.0.1:1/base/v1/listen?a=b&model=nova-3&language=en&interim_results=true\
             &encoding=linear16&sample_rate=16000&channels=1&punctuate=true&endpointing=300\
             &keyterm=one&keyterm=two&sentiment=a%26b"
        );
    }

    #[test]
    fn retry_after_is_in_seconds_or_a_date_and_bounded() {
        let asked = |value: &str| {
            let headers = [("retry-after", value)].map(|(name, value)| {
                let name = tungstenite::http::HeaderName::from_static(name);
                (
                    name,
                    HeaderValue::try_from(value).expect("a header's value"),
                )
            });
            retry_after(&HeaderMap::from_iter(headers), SystemTime::UNIX_EPOCH)
        };
        assert_eq!(asked("5"), Some(Duration::from_secs(5)));
        let date = "Thu, 01 Jan 1970 00:00:07 GMT";
        assert_eq!(asked(date), Some(Duration::from_secs(7)));
        assert_eq!(asked("99999999"), Some(MOST_RETRY_AFTER));
        assert_eq!(asked("soon"), None);
    }
}
