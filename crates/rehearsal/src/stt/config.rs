//! How the server behaves while it behaves.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::faults::Faults;

/// The key of a server that was given none.
pub const DEFAULT_API_KEY: &str = "rehearsal-api-key-0123456789";

/// Key and secret of LiveKit Inference tokens, of a server that was given none.
pub const DEFAULT_INFERENCE_KEY: &str = "rehearsal-inference-key";
/// See [`DEFAULT_INFERENCE_KEY`].
pub const DEFAULT_INFERENCE_SECRET: &str = "rehearsal-inference-secret-0123456789abcdef";

/// The project of a server that was given none.
pub const DEFAULT_PROJECT_ID: &str = "9a0ec700-0000-4000-8000-726568656172";

/// How a [`Server`](super::Server) behaves while it behaves.
#[derive(Clone)]
pub struct Config {
    /// Address to listen on; 127.0.0.1 by default.
    pub bind: IpAddr,
    /// Port to listen on; 0, the default, takes a free one.
    pub port: u16,
    /// The only key that is accepted; [`DEFAULT_API_KEY`] by default.
    pub api_key: String,
    /// The issuer of the tokens that `/v1/stt` accepts; [`DEFAULT_INFERENCE_KEY`] by default.
    pub inference_key: String,
    /// What those tokens are signed with; [`DEFAULT_INFERENCE_SECRET`] by default.
    pub inference_secret: String,
    /// How much of each stream's audio is kept for [`Server::audio`](super::Server::audio); none by default.
    pub keep_audio: Duration,
    /// A `/v1/listen` stream without audio and text for this long is closed; 10 s by default.
    pub idle_timeout: Duration,
    /// The same for `/v1/stt`; 30 min by default.
    pub inference_idle_timeout: Duration,
    /// How long the answer to CloseStream takes; zero by default.
    pub close_delay: Duration,
    /// How long a client may take to answer the server's close frame; 10 s by default.
    pub close_timeout: Duration,
    /// How long a client may take to accept what is written to it; 10 s by default.
    pub write_timeout: Duration,
    /// Streams that may count as concurrent for one key; more are refused with 429. 10 000 by
    /// default.
    pub max_streams: usize,
    /// How long a stream goes on counting that ended without the protocol's own close
    /// ([`End::is_abrupt`]). 60 s by default: LiveKit Inference takes about half an hour, but a
    /// minute is enough to make a leak felt without locking a developer out.
    ///
    /// [`End::is_abrupt`]: super::End::is_abrupt
    pub abrupt_linger: Duration,
    /// Sent as Retry-After, in whole seconds, with a 429 for too many streams; none by default.
    pub retry_after: Option<Duration>,
    /// The one project of the management API; [`DEFAULT_PROJECT_ID`] by default.
    pub project_id: String,
    /// US dollars that `/v1/listen` streams draw down; when they are used up, new ones are refused
    /// with 402. 10 000 by default, which no test uses up by accident.
    pub balance: f64,
    /// US dollars a minute of decoded audio; 0.0077 by default.
    pub usd_per_minute: f64,
    /// What to do wrong from the start; nothing by default.
    pub faults: Faults,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            api_key: DEFAULT_API_KEY.to_owned(),
            inference_key: DEFAULT_INFERENCE_KEY.to_owned(),
            inference_secret: DEFAULT_INFERENCE_SECRET.to_owned(),
            keep_audio: Duration::ZERO,
            idle_timeout: Duration::from_secs(10),
            inference_idle_timeout: Duration::from_secs(30 * 60),
            close_delay: Duration::ZERO,
            close_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            max_streams: 10_000,
            abrupt_linger: Duration::from_secs(60),
            retry_after: None,
            project_id: DEFAULT_PROJECT_ID.to_owned(),
            balance: 10_000.0,
            usd_per_minute: 0.0077,
            faults: Faults::default(),
        }
    }
}

impl Config {
    /// Sets [`bind`](Self::bind).
    pub fn bind(mut self, bind: IpAddr) -> Self {
        self.bind = bind;
        self
    }

    /// Sets [`port`](Self::port).
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets [`api_key`](Self::api_key).
    pub fn api_key(mut self, api_key: impl Into<String>) -> Self {
        self.api_key = api_key.into();
        self
    }

    /// Sets [`inference_key`](Self::inference_key) and
    /// [`inference_secret`](Self::inference_secret).
    pub fn inference_keys(mut self, key: impl Into<String>, secret: impl Into<String>) -> Self {
        self.inference_key = key.into();
        self.inference_secret = secret.into();
        self
    }

    /// Sets [`keep_audio`](Self::keep_audio).
    pub fn keep_audio(mut self, keep_audio: Duration) -> Self {
        self.keep_audio = keep_audio;
        self
    }

    /// Sets [`idle_timeout`](Self::idle_timeout).
    pub fn idle_timeout(mut self, idle_timeout: Duration) -> Self {
        self.idle_timeout = idle_timeout;
        self
    }

    /// Sets [`inference_idle_timeout`](Self::inference_idle_timeout).
    pub fn inference_idle_timeout(mut self, inference_idle_timeout: Duration) -> Self {
        self.inference_idle_timeout = inference_idle_timeout;
        self
    }

    /// Sets [`close_delay`](Self::close_delay).
    pub fn close_delay(mut self, close_delay: Duration) -> Self {
        self.close_delay = close_delay;
        self
    }

    /// Sets [`close_timeout`](Self::close_timeout).
    pub fn close_timeout(mut self, close_timeout: Duration) -> Self {
        self.close_timeout = close_timeout;
        self
    }

    /// Sets [`write_timeout`](Self::write_timeout).
    pub fn write_timeout(mut self, write_timeout: Duration) -> Self {
        self.write_timeout = write_timeout;
        self
    }

    /// Sets [`max_streams`](Self::max_streams).
    pub fn max_streams(mut self, max_streams: usize) -> Self {
        self.max_streams = max_streams;
        self
    }

    /// Sets [`abrupt_linger`](Self::abrupt_linger).
    pub fn abrupt_linger(mut self, abrupt_linger: Duration) -> Self {
        self.abrupt_linger = abrupt_linger;
        self
    }

    /// Sets [`retry_after`](Self::retry_after).
    pub fn retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    /// Sets [`project_id`](Self::project_id).
    pub fn project_id(mut self, project_id: impl Into<String>) -> Self {
        self.project_id = project_id.into();
        self
    }

    /// Sets [`balance`](Self::balance).
    pub fn balance(mut self, usd: f64) -> Self {
        self.balance = usd;
        self
    }

    /// Sets [`usd_per_minute`](Self::usd_per_minute).
    pub fn usd_per_minute(mut self, usd_per_minute: f64) -> Self {
        self.usd_per_minute = usd_per_minute;
        self
    }

    /// Sets [`faults`](Self::faults).
    pub fn faults(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }
}

/// Without keys and secrets.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("bind", &self.bind)
            .field("port", &self.port)
            .field("max_streams", &self.max_streams)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}
