//! Configuration: built-in defaults < file (TOML) < environment < flags. Every key, with its unit
//! and default, is in `config/roomwarden.example.toml`, which is the built-in defaults as well.

mod keys;
mod rules;
mod sources;

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::journal;
use keys::Keys;
pub(crate) use rules::wrong_setting as wrong_text;
use sources::Settings;
pub(crate) use sources::read_secret;
pub use sources::{Flag, Problem};

const DEFAULTS: &str = include_str!("../config/roomwarden.example.toml");

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub livekit: LiveKitConfig,
    pub rooms: RoomsConfig,
    pub agent: AgentConfig,
    pub participants: ParticipantsConfig,
    pub stt: SttConfig,
    pub transcripts: TranscriptsConfig,
    pub shutdown: ShutdownConfig,
    /// Nothing in it is set by default.
    #[serde(default)]
    pub state: StateConfig,
    pub ledger: LedgerConfig,
    pub budget: BudgetConfig,
    /// As in this one.
    #[serde(default)]
    pub quota: QuotaConfig,
    pub usage_reports: UsageReportsConfig,
    pub control: ControlConfig,
    pub gateway: GatewayConfig,
    pub log: LogConfig,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LiveKitConfig {
    pub url: Url,
    pub api_key: String,
    pub api_secret: SecretString,
    pub api_key_file: Option<PathBuf>,
    pub api_secret_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoomsConfig {
    /// Identity of the daemon's participant. Two daemons need two identities.
    pub identity: String,
    /// Whether other participants see it.
    pub hidden: bool,
    /// Names of rooms that are joined whether or not the server lists them.
    pub join: Vec<String>,
    /// Whether the server is asked for its rooms.
    pub discover: bool,
    /// Patterns of names of rooms that are joined when the server lists them.
    pub include: Vec<String>,
    pub exclude: Vec<String>,
    pub poll_interval_ms: u64,
    /// 0 for never.
    pub reconcile_interval_ms: u64,
}

/// LiveKit's agent dispatch as a source of rooms.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    pub enabled: bool,
    /// None for automatic dispatch.
    pub name: Option<String>,
    pub job_type: JobKind,
    /// In rooms of jobs about rooms; the same for all daemons of that name.
    pub identity: String,
    /// Jobs at a time; 0 for no limit.
    pub slots: u64,
    /// Load from which on no more jobs are taken; 100 for never.
    pub load_percent: u64,
}

/// What a job is about, and so how many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    #[default]
    Room,
    /// Each participant who publishes.
    Publisher,
    Participant,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParticipantsConfig {
    /// Patterns of identities.
    pub include: Vec<String>,
    pub exclude: Vec<String>,
    pub sources: Vec<AudioSource>,
    /// Attributes that a participant must have, and the patterns of their values.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
    /// The attribute that holds a participant's priority; None if all are equal.
    pub priority_attribute: Option<String>,
}

/// What an audio track carries, as LiveKit calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AudioSource {
    Microphone,
    ScreenShareAudio,
    Unknown,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SttConfig {
    pub provider: ProviderKind,
    /// Base (then [`ProviderKind::path`] is added) or full URL.
    pub url: Url,
    /// Of Deepgram.
    pub api_key: SecretString,
    /// Of LiveKit Inference; `livekit.api_key` and its secret, unless set.
    #[serde(default)]
    pub inference_api_key: String,
    #[serde(default)]
    pub inference_api_secret: SecretString,
    pub inference_api_key_file: Option<PathBuf>,
    pub inference_api_secret_file: Option<PathBuf>,
    pub model: String,
    pub language: Option<String>,
    pub interim_results: bool,
    pub encoding: Encoding,
    #[serde(default)]
    pub parameters: SttParameters,
    /// Any other query parameter of `/v1/listen`.
    #[serde(default)]
    pub extra: BTreeMap<String, String>,
    pub page_ms: u64,
    pub connect_timeout_ms: u64,
    pub close_grace_ms: u64,
    /// 0 for never.
    pub idle_after_ms: u64,
    pub read_timeout_ms: u64,
    pub write_timeout_ms: u64,
    pub provider_idle_ms: u64,
    pub replay_ms: u64,
    pub retry_first_ms: u64,
    pub retry_most_ms: u64,
    /// 0 for no limit.
    pub max_streams: usize,
    /// 0 for never.
    pub park_after_ms: u64,
    /// In dB below full scale.
    pub speech_level: u8,
    pub preroll_ms: u64,
    pub api_key_file: Option<PathBuf>,
}

/// Whose protocol streams speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProviderKind {
    /// `/v1/listen`, of Deepgram or a server that speaks the same.
    Deepgram,
    /// `/v2/listen`.
    DeepgramFlux,
    LivekitInference,
}

impl ProviderKind {
    /// Of a URL that has none.
    pub fn path(self) -> &'static str {
        match self {
            Self::Deepgram => "/v1/listen",
            Self::DeepgramFlux => "/v2/listen",
            Self::LivekitInference => "/v1/stt",
        }
    }
}

/// How audio goes to the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// The room's Opus packets in Ogg pages, undecoded.
    OggOpus,
    /// Decoded: 16 bits, 16 kHz, mono.
    Linear16,
}

impl Encoding {
    /// As the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OggOpus => "ogg-opus",
            Self::Linear16 => "linear16",
        }
    }
}

/// Query parameters of `/v1/listen`, by their names there (Deepgram's API reference). What is left
/// out is not sent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SttParameters {
    pub punctuate: Option<bool>,
    pub smart_format: Option<bool>,
    pub numerals: Option<bool>,
    pub profanity_filter: Option<bool>,
    pub dictation: Option<bool>,
    pub diarize: Option<bool>,
    pub endpointing: Option<Endpointing>,
    pub utterance_end_ms: Option<u64>,
    pub vad_events: Option<bool>,
    pub filler_words: Option<bool>,
    pub detect_entities: Option<bool>,
    pub no_delay: Option<bool>,
    pub mip_opt_out: Option<bool>,
    pub keyterm: Vec<String>,
    pub keywords: Vec<String>,
    pub redact: Vec<String>,
    pub replace: Vec<String>,
    pub search: Vec<String>,
    pub tag: Vec<String>,
    pub extra: Vec<String>,
    pub callback: Option<String>,
    pub callback_method: Option<String>,
    pub version: Option<String>,
}

/// Milliseconds of silence that end an utterance, or whether silence does at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Endpointing {
    Milliseconds(u64),
    Enabled(bool),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TranscriptsConfig {
    pub stdout: bool,
    pub room: bool,
    /// As the older `Transcription` packets, too.
    pub room_packet: bool,
    pub file: Option<PathBuf>,
    pub file_max_mb: u64,
    pub file_keep: u32,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConfig {
    pub deadline_ms: u64,
    pub hurry_ms: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateConfig {
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerConfig {
    pub enabled: bool,
    pub file: Option<PathBuf>,
    /// 0 for ever.
    pub retention_days: u64,
    pub currency: String,
    pub billed_by: BilledBy,
    /// Of a minute, by model; `*` is any other.
    #[serde(default)]
    pub prices: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaConfig {
    /// Of the provider's management API, without `/v1`; none for the host of `stt.url`.
    pub url: Option<Url>,
    /// None for the only one of the key.
    pub project: Option<String>,
}

/// Limits of what is used, of a day and a month of UTC.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetConfig {
    /// Of audio; 0 for no limit.
    pub day_minutes: u64,
    pub month_minutes: u64,
    /// None for no limit.
    pub day_cost: Option<String>,
    pub month_cost: Option<String>,
    pub warn_at_percent: u64,
}

impl BudgetConfig {
    pub fn is_set(&self) -> bool {
        let minutes = self.day_minutes > 0 || self.month_minutes > 0;
        minutes || self.day_cost.is_some() || self.month_cost.is_some()
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageReportsConfig {
    /// None for no reports.
    pub url: Option<Url>,
    /// None for `livekit.api_secret`.
    pub secret: Option<SecretString>,
    pub secret_file: Option<PathBuf>,
    pub events: Vec<ReportEvent>,
    pub timeout_ms: u64,
}

/// What is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportEvent {
    StreamSettled,
    /// Everything of a participant's is closed.
    SessionFinished,
    RoomFinished,
}

impl ReportEvent {
    pub fn name(self) -> &'static str {
        match self {
            Self::StreamSettled => "stream_settled",
            Self::SessionFinished => "session_finished",
            Self::RoomFinished => "room_finished",
        }
    }
}

/// The control API.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlConfig {
    /// [`OFF`], or an IP address and a port.
    pub listen: String,
    /// [`OFF`], or a path; none for the usual one.
    pub socket: Option<PathBuf>,
    /// Names under which it may be asked, besides `localhost` and IP addresses.
    pub hosts: Vec<String>,
    /// For everything.
    pub token: Option<SecretString>,
    pub token_file: Option<PathBuf>,
    /// For what changes nothing.
    pub read_token: Option<SecretString>,
    pub read_token_file: Option<PathBuf>,
}

/// `/v1/listen` for other programs' agents.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// [`OFF`], or an IP address and a port.
    pub listen: String,
    /// What clients give for the provider's key.
    pub token: Option<SecretString>,
    pub token_file: Option<PathBuf>,
    pub watch_interval_ms: u64,
}

impl GatewayConfig {
    /// None if it is switched off.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

/// Instead of an address.
pub const OFF: &str = "off";

impl ControlConfig {
    /// None if it is switched off.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

/// Which minutes cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BilledBy {
    /// Those of audio that was sent.
    #[default]
    Audio,
    /// Those that the connection was open.
    Connection,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    pub filter: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text on a terminal, JSON lines elsewhere.
    Auto,
    Text,
    Json,
}

impl LogFormat {
    /// As the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

impl StateConfig {
    /// Where the journal is: as configured, or where systemd or the user's desktop has such things.
    /// None if nothing says so.
    pub fn directory(&self) -> Option<PathBuf> {
        let usual = || usual_directory(|name| std::env::var_os(name));
        self.dir.clone().or_else(usual)
    }
}

/// systemd may name several, separated by colons; of all only absolute ones count, as the XDG
/// specification has it.
fn usual_directory(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let first = |name| {
        let first = std::env::split_paths(&variable(name)?).next()?;
        first.is_absolute().then_some(first)
    };
    let under = |name, path| Some(first(name)?.join(path));
    first("STATE_DIRECTORY")
        .or_else(|| under("XDG_STATE_HOME", "roomwarden"))
        .or_else(|| under("HOME", ".local/state/roomwarden"))
}

/// Everything that is wrong with a configuration, each with where, which key, its value unless that
/// is a secret, and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.problems.iter().enumerate() {
            let line = if n == 0 { "" } else { "\n" };
            write!(f, "{line}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Where the ledger is; none if nothing says so.
    pub fn ledger_file(&self) -> Option<PathBuf> {
        let usual = || {
            let name = format!("{}.db", journal::file_name(&self.rooms.identity));
            Some(self.state.directory()?.join(name))
        };
        self.ledger.file.clone().or_else(usual)
    }

    /// Where the control API's Unix socket is; none if there is none, or nothing says where.
    pub fn control_socket(&self) -> Option<PathBuf> {
        match &self.control.socket {
            Some(path) if path.as_os_str() == OFF => None,
            Some(path) => Some(path.clone()),
            None => {
                let name = format!("{}.sock", journal::file_name(&self.rooms.identity));
                Some(self.state.directory()?.join(name))
            }
        }
    }

    /// Reads defaults, then `file` if given, then this process's environment, then flags.
    ///
    /// # Errors
    /// Unknown keys, wrong types, missing or impossible values: all that there are.
    pub fn load(file: Option<&Path>, flags: &[Flag]) -> Result<Self, ConfigError> {
        Self::from_sources(file, Self::environment(), flags, true)
    }

    /// As [`Config::load`], for those who only read what a daemon has written: secrets that are
    /// missing are empty.
    pub fn load_without_secrets(file: Option<&Path>, flags: &[Flag]) -> Result<Self, ConfigError> {
        Self::from_sources(file, Self::environment(), flags, false)
    }

    fn environment() -> HashMap<String, String> {
        // Others' variables may be anything; of ours, what is no text is refused with the rest.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((
                name.into_string().ok()?,
                value.to_string_lossy().into_owned(),
            ))
        };
        std::env::vars_os().filter_map(text).collect()
    }

    /// As [`Config::load`], with the environment given, and no flags.
    pub fn load_from(
        file: Option<&Path>,
        environment: HashMap<String, String>,
    ) -> Result<Self, ConfigError> {
        Self::from_sources(file, environment, &[], true)
    }

    /// Keeps of `running` what can't change while it runs. The keys of which that made a difference.
    pub fn keep_fixed(&mut self, running: &Self) -> Vec<&'static str> {
        let mut differ = Vec::new();
        macro_rules! keep {
            ($($section:ident.$key:ident)*) => {$(
                if self.$section.$key != running.$section.$key {
                    differ.push(concat!(stringify!($section), ".", stringify!($key)));
                    self.$section.$key = running.$section.$key.clone();
                }
            )*};
        }
        keep!(livekit.url livekit.api_key);
        // By what is in the files, not by their names.
        let secret = |config: &Self| config.livekit.api_secret.expose_secret().to_owned();
        if secret(self) != secret(running) {
            differ.push("livekit.api_secret");
        }
        self.livekit = running.livekit.clone();
        keep!(rooms.identity rooms.hidden state.dir log.format);
        keep!(agent.enabled agent.name agent.job_type agent.identity agent.slots);
        keep!(agent.load_percent);
        keep!(transcripts.stdout transcripts.room transcripts.room_packet);
        keep!(ledger.enabled ledger.file ledger.retention_days ledger.currency ledger.billed_by);
        keep!(ledger.prices usage_reports.url usage_reports.events usage_reports.timeout_ms);
        keep!(control.listen control.socket gateway.listen);
        let secret = |config: &Self| {
            let secret = config.usage_reports.secret.as_ref();
            secret.map(|secret| secret.expose_secret().to_owned())
        };
        if secret(self) != secret(running) {
            differ.push("usage_reports.secret");
        }
        self.usage_reports = running.usage_reports.clone();
        differ
    }

    /// With what follows from something else.
    fn completed(mut self) -> Self {
        let stt = &mut self.stt;
        if stt.inference_api_key.is_empty() {
            stt.inference_api_key = self.livekit.api_key.clone();
            stt.inference_api_secret = self.livekit.api_secret.clone();
        }
        self
    }

    fn from_sources(
        file: Option<&Path>,
        environment: HashMap<String, String>,
        flags: &[Flag],
        secrets: bool,
    ) -> Result<Self, ConfigError> {
        let keys = Keys::of::<Self>();
        let mut settings = Settings::new(&keys);
        settings.add_toml(DEFAULTS, None);
        if let Some(file) = file {
            match sources::read(file) {
                Ok(text) => settings.add_toml(&text, Some(file)),
                // Anything else would follow from this.
                Err(problem) => {
                    let problems = vec![problem];
                    return Err(ConfigError { problems });
                }
            }
        }
        settings.add_environment(&environment);
        settings.add_flags(flags);
        settings.read_secrets(&environment, secrets);
        rules::check_values(&mut settings);
        let mut config = settings.deserialise();
        if let Some(read) = &config {
            rules::check_together(read, &mut settings);
            // Who only reads has no need of them, and may not see them.
            if secrets {
                rules::check_tokens(read, &mut settings);
            }
            // A default may have given way to what was set.
            config = settings.deserialise();
        }
        match config {
            Some(config) if settings.problems.is_empty() => Ok(config.completed()),
            _ => {
                let mut problems = settings.problems;
                // A file's by their lines.
                problems.sort_by(|a, b| a.place().cmp(&b.place()));
                Err(ConfigError { problems })
            }
        }
    }
}

#[cfg(test)]
impl Config {
    /// The defaults, with the keys that have none.
    pub fn for_tests() -> Self {
        let needed = ["LIVEKIT_API_KEY", "LIVEKIT_API_SECRET", "DEEPGRAM_API_KEY"];
        let variables = needed.map(|name| (name.to_owned(), "key".to_owned()));
        Self::load_from(None, variables.into()).expect("configuration")
    }
}

#[cfg(test)]
mod tests {
    use super::{keys::Kind, *};

    const NEEDED: [(&str, &str); 3] = [
        ("LIVEKIT_API_KEY", "devkey"),
        ("LIVEKIT_API_SECRET", "secret"),
        ("DEEPGRAM_API_KEY", "1e5"),
    ];

    fn environment(variables: &[(&str, &str)]) -> HashMap<String, String> {
        let own = |(k, v): &(&str, &str)| (k.to_string(), v.to_string());
        variables.iter().map(own).collect()
    }

    fn load(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let all: Vec<_> = NEEDED.iter().chain(variables).copied().collect();
        Config::load_from(None, environment(&all))
    }

    /// A file that is removed with its test.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(text: &str) -> Self {
            let name = format!("roomwarden-{}.toml", fastrand::u64(..));
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).expect("a file");
            Self(path)
        }

        fn path(&self) -> &str {
            self.0.to_str().expect("UTF-8")
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn load_file(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let file = Temporary::new(text);
        let all: Vec<_> = NEEDED.iter().chain(variables).copied().collect();
        Config::load_from(Some(&file.0), environment(&all))
    }

    #[test]
    fn the_four_common_variables_are_enough() {
        let config = load(&[("LIVEKIT_URL", "wss://example.livekit.cloud")]).unwrap();
        assert_eq!(config.livekit.url.as_str(), "wss://example.livekit.cloud/");
        assert_eq!(
            config.stt.api_key.expose_secret(),
            "1e5",
            "a key is never read as a number"
        );
        assert_eq!(config.stt.url.host_str(), Some("api.deepgram.com"));
    }

    #[test]
    fn variables_set_any_key_and_win_over_the_file_and_flags_over_both() {
        let file = Temporary::new(
            "[stt]\nmodel = 'from-file'\npage_ms = 100\nurl = 'ws://file'\n[shutdown]\nhurry_ms = 99",
        );
        let variables = [
            ("ROOMWARDEN__STT__URL", "ws://127.0.0.1:9"),
            ("ROOMWARDEN__STT__API_KEY", "mine"),
            ("ROOMWARDEN__STT__MODEL", "12"),
            ("ROOMWARDEN__STT__LANGUAGE", "de"),
            ("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "5000"),
            ("ROOMWARDEN__TRANSCRIPTS__STDOUT", "false"),
            ("ROOMWARDEN__ROOMS__JOIN", "a, b"),
            ("ROOMWARDEN__ROOMS__EXCLUDE", ""),
            ("ROOMWARDEN__PARTICIPANTS__SOURCES", "microphone"),
            ("ROOMWARDEN__PARTICIPANTS__ATTRIBUTES__LANGUAGE", "en*"),
            ("ROOMWARDEN__PARTICIPANTS__ATTRIBUTES__mixedCase", "1e5"),
            ("ROOMWARDEN__STT__PARAMETERS__ENDPOINTING", "300"),
            ("ROOMWARDEN__STT__PARAMETERS__DIARIZE", "true"),
            ("ROOMWARDEN__STT__PARAMETERS__KEYTERM", "one,two words"),
            ("ROOMWARDEN__STT__EXTRA__DETECT_TOPICS", "true"),
            ("ROOMWARDEN_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ];
        let flag = |name, key, value: &str| Flag {
            name,
            key,
            value: value.to_owned(),
        };
        let all: Vec<_> = NEEDED.iter().chain(&variables).copied().collect();
        let flags = [flag("--stt-language", "stt.language", "fr")];
        let config = Config::from_sources(Some(&file.0), environment(&all), &flags, true).unwrap();
        assert_eq!(config.stt.page_ms, 100);
        assert_eq!(config.shutdown.hurry_ms, 99);
        assert_eq!(config.stt.url.as_str(), "ws://127.0.0.1:9/");
        assert_eq!(config.stt.api_key.expose_secret(), "mine");
        assert_eq!(config.stt.model, "12", "a text stays one");
        assert_eq!(config.stt.language.as_deref(), Some("fr"));
        assert_eq!(config.shutdown.deadline_ms, 5000);
        assert!(!config.transcripts.stdout);
        assert_eq!(config.rooms.join, ["a", "b"]);
        assert_eq!(config.participants.sources, [AudioSource::Microphone]);
        let attributes: Vec<_> = config.participants.attributes.into_iter().collect();
        let text = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            attributes,
            [text("language", "en*"), text("mixedCase", "1e5")]
        );
        let parameters = config.stt.parameters;
        assert_eq!(parameters.endpointing, Some(Endpointing::Milliseconds(300)));
        assert_eq!(parameters.diarize, Some(true));
        assert_eq!(parameters.keyterm, ["one", "two words"]);
        assert_eq!(config.stt.extra["detect_topics"], "true");
    }

    /// A variable, its value, and what the error says of it.
    const WRONG: [(&str, &str, [&str; 3]); 36] = [
        (
            "STT__MODEL",
            "a\u{fffd}",
            ["stt.model", "a\u{fffd}", "not UTF-8"],
        ),
        (
            "STT__PARAMETERS__CALLBACK",
            "ftp://u:hush@x",
            ["callback", "(not shown)", "https, http"],
        ),
        (
            "STT__PARAMETERS__CALLBACK_METHOD",
            "post",
            ["callback_method", "post", "needs"],
        ),
        (
            "LIVEKIT__URL",
            "ws://x?a=hush",
            ["livekit.url", "query", "(not shown)"],
        ),
        (
            "STT__PARAMETERS__QQQQ",
            "1",
            ["names no key", "[stt.parameters]", "punctuate, redact"],
        ),
        ("STT__PAGE_MS", "7", ["stt.page_ms", "is 7", "20 to 1000"]),
        (
            "STT__PAGE_MS",
            "soon",
            ["stt.page_ms", "soon", "whole number"],
        ),
        ("STT__PAGE_MS", "-1", ["stt.page_ms", "-1", "whole number"]),
        (
            "STT__REPLAY_MS",
            "99999",
            ["stt.replay_ms", "99999", "or 0"],
        ),
        (
            "STT__PAGE",
            "40",
            ["STT__PAGE", "names no key", "__STT__PAGE_MS"],
        ),
        ("STT__URL", "http://x", ["stt.url", "http", "wss"]),
        (
            "STT__URL",
            "nonsense",
            ["stt.url", "nonsense", "wss://host"],
        ),
        (
            "STTT__URL",
            "ws://x",
            ["STTT__URL", "names no key", "stt.url"],
        ),
        (
            "ZZZ__QQQ",
            "x",
            ["ZZZ__QQQ", "the sections are", "stt.parameters"],
        ),
        ("STT", "x", ["__STT", "names no key", "model, page_ms"]),
        (
            "STT__EXTRA",
            "x",
            ["STT__EXTRA", "section", "STT__EXTRA__NAME"],
        ),
        (
            "STT__EXTRA__MODEL",
            "x",
            ["stt.extra.model", "key of its own", "stt.model"],
        ),
        (
            "STT__EXTRA__CHANNELS",
            "2",
            ["stt.extra.channels", "stt.encoding", "own"],
        ),
        (
            "STT__EXTRA__DIARIZE",
            "true",
            ["stt.extra.diarize", "own", "stt.parameters.diarize"],
        ),
        (
            "STT__URL",
            "ws://u:hush@x",
            ["stt.url", "password", "not supported"],
        ),
        (
            "STT__URL",
            "ws://x?token=hush&model=y",
            ["stt.url", "model has a key of its own", "stt.model"],
        ),
        (
            "STT__API_KEY",
            "a\nb",
            ["stt.api_key", "(not shown)", "line break"],
        ),
        (
            "STT__ENCODING",
            "mp3",
            ["stt.encoding", "mp3", "ogg-opus, linear16"],
        ),
        (
            "STT__PARAMETERS__DIARISE",
            "true",
            ["names no key", "__DIARIZE", "stt.parameters.diarize"],
        ),
        (
            "STT__PARAMETERS__ENDPOINTING",
            "soon",
            ["endpointing", "soon", "number, true or false"],
        ),
        (
            "PARTICIPANTS__SOURCES",
            "camera",
            ["participants.sources", "camera", "screen_share_audio"],
        ),
        ("ROOMS__INCLUDE", "a,,b", ["rooms.include", "\"\"", "empty"]),
        (
            "ROOMS__DISCOVER",
            "false",
            ["rooms.discover", "false", "rooms.join"],
        ),
        (
            "LOG__FILTER",
            "info,=x=",
            ["log.filter", "info,=x=", "ROOMWARDEN__LOG__FILTER"],
        ),
        (
            "LEDGER__PRICES__NOVA-3",
            "$1",
            ["ledger.prices.nova-3", "$1", "price of a minute"],
        ),
        (
            "USAGE_REPORTS__URL",
            "http://me:hush@x",
            ["usage_reports.url", "password", "not supported"],
        ),
        (
            "QUOTA__URL",
            "wss://x",
            ["quota.url", "wss://x", "one of http, https"],
        ),
        (
            "LEDGER__CURRENCY",
            "US dollars",
            ["ledger.currency", "US dollars", "1 to 8 letters"],
        ),
        (
            "LEDGER__BILLED_BY",
            "words",
            ["ledger.billed_by", "words", "audio, connection"],
        ),
        (
            "LEDGER__RETENTION_DAYS",
            "40000",
            [
                "ledger.retention_days",
                "40000",
                "from 1 to 36500 (days), or 0",
            ],
        ),
        (
            "TRANSCRIPTS__FILE_KEEP",
            "4294967296",
            ["transcripts.file_keep", "4294967296", "1000"],
        ),
    ];

    #[test]
    fn errors_name_the_variable_the_key_the_value_and_what_is_allowed() {
        for (variable, value, words) in WRONG {
            let variable = format!("ROOMWARDEN__{variable}");
            let error = load(&[(&variable, value)]).expect_err(&variable);
            let said = error.to_string();
            assert_eq!(error.problems.len(), 1, "{said}");
            assert!(said.starts_with(&format!("{variable}: ")), "{said}");
            assert!(!said.contains("hush"), "{said}");
            assert!(
                words.iter().all(|word| said.contains(word)),
                "{variable}={value}: {said}"
            );
        }
    }

    #[test]
    fn one_underscore_too_few_is_told_and_strangers_are_left_alone() {
        let said = load(&[("ROOMWARDEN_STT_URL", "ws://x")]).unwrap_err();
        let expected = "ROOMWARDEN_STT_URL: names no key: ROOMWARDEN__STT__URL sets stt.url";
        assert_eq!(said.to_string(), expected);
        assert!(load(&[("ROOMWARDEN_SERVICE_HOST", "10.0.0.1")]).is_ok());
    }

    #[test]
    fn errors_of_a_file_name_its_line_and_come_all_at_once() {
        let text = "[livekit]\nurl = 'ftp://x'\n\n[stt]\npage_ms = '40'\nmodell = 'x'\n\
            [stt.parameters]\ndiarise = true\nutterance_end_ms = 1000\nredact = [\"a\\u0007\"]\n\
            [rooms]\npage_ms = 40\n[sst]\nx = 1\n[stt.extra]\nsentiment = true\n";
        let file = Temporary::new(text);
        let more = [("ROOMWARDEN__STT__INTERIM_RESULTS", "false")];
        let all: Vec<_> = NEEDED.iter().chain(&more).copied().collect();
        let error = Config::load_from(Some(&file.0), environment(&all)).unwrap_err();
        let said: Vec<_> = error.problems.iter().map(Problem::to_string).collect();
        let at = |line: u32, said: &str| format!("{}, line {line}: {said}", file.path());
        let expected = [
            at(
                2,
                "livekit.url is \"ftp://x\": it must be a URL that names a host and starts with \
                 one of ws, wss, http, https, such as https://host",
            ),
            at(5, "stt.page_ms is '40': expected a whole number, 0 or more"),
            at(6, "there is no key stt.modell; did you mean stt.model?"),
            at(
                8,
                "there is no key stt.parameters.diarise; did you mean stt.parameters.diarize?; \
                 any other parameter goes into [stt.extra]",
            ),
            at(
                9,
                "stt.parameters.utterance_end_ms is 1000: it needs stt.interim_results = true",
            ),
            at(
                10,
                "stt.parameters.redact is [\"a\u{fffd}\"]: it has a line break or another control \
                 character: set it without",
            ),
            at(
                12,
                "there is no key rooms.page_ms; did you mean stt.page_ms?",
            ),
            at(13, "there is no key sst; did you mean stt?"),
            at(
                16,
                "stt.extra.sentiment is (not shown): expected a text in quotes",
            ),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn what_would_do_nothing_is_an_error() {
        let text = "[rooms]\ninclude = []\n[participants]\ninclude = []\nsources = []\n";
        let error = load_file(text, &[]).unwrap_err();
        let said: Vec<_> = error.problems.iter().map(Problem::to_string).collect();
        for (said, words) in said.iter().zip([
            "line 2: rooms.include is []: no room would be joined",
            "line 4: participants.include is []: nobody would be transcribed",
            "line 5: participants.sources is []: nothing would be transcribed",
        ]) {
            assert!(said.contains(words), "{said}");
        }
        assert_eq!(said.len(), 3);
        assert!(load_file("[rooms]\ninclude = []\njoin = ['a']\n", &[]).is_ok());
    }

    #[test]
    fn a_file_that_is_no_configuration_is_refused_whole() {
        let said = load_file("[stt]\nmodel = 'a'\nmodel = 'b'\n", &[]).unwrap_err();
        assert_eq!(said.problems.len(), 1);
        let said = said.to_string();
        assert!(said.contains("line 3: not TOML: duplicate key"), "{said}");
        let said = load_file(&"#".repeat(2 << 20), &[])
            .unwrap_err()
            .to_string();
        assert!(said.contains("larger than 1024 KiB (--config)"), "{said}");
        let missing = Config::load_from(Some(Path::new("/no/such.toml")), HashMap::new());
        let said = missing.unwrap_err().to_string();
        assert!(said.starts_with("cannot read /no/such.toml: "), "{said}");
    }

    #[test]
    fn what_is_no_toml_is_not_quoted() {
        let said = load_file("[stt]\napi_key = 'hush\n", &[])
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("line 2: not TOML") && !said.contains("hush"),
            "{said}"
        );
    }

    #[test]
    fn defaults_give_way_but_what_was_set_must_fit() {
        let config = load(&[("ROOMWARDEN__SHUTDOWN__DEADLINE_MS", "300")]).unwrap();
        assert_eq!(config.shutdown.hurry_ms, 300);
        let config = load(&[("ROOMWARDEN__STT__RETRY_MOST_MS", "100")]).unwrap();
        assert_eq!(config.stt.retry_first_ms, 100);
        for (name, value, words) in [
            (
                "ROOMWARDEN__SHUTDOWN__HURRY_MS",
                "9000",
                "not be above shutdown.deadline_ms, which is 8000",
            ),
            (
                "ROOMWARDEN__STT__RETRY_FIRST_MS",
                "60000",
                "not be above stt.retry_most_ms, which is 30000",
            ),
        ] {
            let said = load(&[(name, value)]).unwrap_err().to_string();
            assert!(said.starts_with(name) && said.contains(words), "{said}");
        }
    }

    #[test]
    fn secrets_come_from_files_too_but_not_from_both() {
        let file = Temporary::new("from a file\r\n");
        let other = Temporary::new("another\n");
        // A nearer file wins over a value, and a nearer value over a file.
        let config = load(&[("ROOMWARDEN__STT__API_KEY_FILE", file.path())]).unwrap();
        assert_eq!(config.stt.api_key.expose_secret(), "from a file");
        let text = format!("[livekit]\napi_secret_file = '{}'\n", other.path());
        let config = load_file(&text, &[]).unwrap();
        assert_eq!(config.livekit.api_secret.expose_secret(), "secret");
        assert_eq!(config.livekit.api_secret_file, None);

        let without = &NEEDED[..2];
        let with = |more: &[(&str, &str)]| {
            let all: Vec<_> = without.iter().chain(more).copied().collect();
            Config::load_from(None, environment(&all))
        };
        let config = with(&[
            ("DEEPGRAM_API_KEY", ""),
            ("DEEPGRAM_API_KEY_FILE", other.path()),
        ]);
        assert_eq!(config.unwrap().stt.api_key.expose_secret(), "another");
        let both = [
            ("DEEPGRAM_API_KEY", "hush"),
            ("DEEPGRAM_API_KEY_FILE", other.path()),
        ];
        assert_eq!(
            with(&both).unwrap_err().to_string(),
            "DEEPGRAM_API_KEY: stt.api_key and stt.api_key_file (DEEPGRAM_API_KEY_FILE) are both \
             set: set only one"
        );
        let text = format!(
            "[stt]\napi_key = 'hush'\napi_key_file = '{}'\n",
            other.path()
        );
        let said = load_file(&text, &[]).unwrap_err().to_string();
        assert!(
            said.contains("line 2: stt.api_key and stt.api_key_file ("),
            "{said}"
        );
        assert!(
            said.contains("line 3) are both set") && !said.contains("hush"),
            "{said}"
        );

        let said = with(&[]).unwrap_err().to_string();
        assert!(
            said.starts_with("stt.api_key is not set: set DEEPGRAM_API_KEY, or"),
            "{said}"
        );
        let said = with(&[("DEEPGRAM_API_KEY_FILE", "/no/such/file")])
            .unwrap_err()
            .to_string();
        assert!(said.contains("DEEPGRAM_API_KEY_FILE: stt.api_key_file is \"/no/such/file\""));
        let huge = Temporary::new(&"x".repeat(70_000));
        let said = with(&[("DEEPGRAM_API_KEY_FILE", huge.path())])
            .unwrap_err()
            .to_string();
        assert!(said.contains("larger than 64 KiB"), "{said}");
    }

    #[test]
    fn who_only_reads_needs_no_secrets() {
        let read = |variables: &[(&str, &str)]| {
            Config::from_sources(None, environment(variables), &[], false)
        };
        let config = read(&[("DEEPGRAM_API_KEY_FILE", "/no/such/file")]).unwrap();
        assert_eq!(config.stt.api_key.expose_secret(), "");
        let config = read(&[("DEEPGRAM_API_KEY", "mine")]).unwrap();
        assert_eq!(config.stt.api_key.expose_secret(), "mine");
        let said = read(&[("ROOMWARDEN__STT__PAGE_MS", "7")]).unwrap_err();
        assert_eq!(said.problems.len(), 1, "{said}");
    }

    #[test]
    fn systemd_credentials_fill_in_what_nothing_else_sets() {
        let directory = std::env::temp_dir().join(format!("roomwarden-{}", fastrand::u64(..)));
        std::fs::create_dir(&directory).expect("a directory");
        for name in ["livekit.api_key", "livekit.api_secret", "stt.api_key"] {
            std::fs::write(directory.join(name), format!("credential {name}\n")).expect("a file");
        }
        let path = directory.to_str().expect("UTF-8");
        let config = Config::load_from(
            None,
            environment(&[("CREDENTIALS_DIRECTORY", path), ("LIVEKIT_API_KEY", "mine")]),
        );
        std::fs::remove_dir_all(&directory).expect("removable");
        let config = config.unwrap();
        assert_eq!(config.livekit.api_key, "mine");
        let secret = config.livekit.api_secret.expose_secret();
        assert_eq!(secret, "credential livekit.api_secret");
        assert_eq!(config.stt.api_key.expose_secret(), "credential stt.api_key");
    }

    /// The example with every key that is commented out.
    fn whole_example() -> String {
        let uncommented = |line: &'static str| {
            let setting = line.strip_prefix("# ").filter(|rest| {
                let name = rest
                    .split(" = ")
                    .next()
                    .filter(|name| name.len() < rest.len());
                name.is_some_and(|name| {
                    name.chars()
                        .all(|c| c.is_ascii_lowercase() || "_-0123456789".contains(c))
                })
            });
            setting.unwrap_or(line)
        };
        let lines: Vec<_> = DEFAULTS.lines().map(uncommented).collect();
        lines.join("\n")
    }

    #[test]
    fn the_example_is_good_as_it_is_and_with_every_key_in_it() {
        assert!(load_file(DEFAULTS, &[]).is_ok());
        let secret = Temporary::new("hush");
        let mut text = whole_example();
        for name in [
            "livekit_api_key",
            "livekit_api_secret",
            "livekit_inference_api_key",
            "livekit_inference_api_secret",
            "deepgram_api_key",
            "usage_reports",
        ] {
            let path = format!("/run/secrets/{name}");
            assert!(text.contains(&path), "{path}");
            text = text.replace(&path, secret.path());
        }
        let tokens = [
            ("roomwarden_token", "token-for-all-of-it"),
            ("roomwarden_read_token", "token-for-reading"),
            ("roomwarden_gateway_token", "token-for-clients"),
        ]
        .map(|(name, token)| (name, Temporary::new(token)));
        for (name, token) in &tokens {
            let path = format!("/run/secrets/{name}\"");
            assert!(text.contains(&path), "{path}");
            text = text.replace(&path, &format!("{}\"", token.path()));
        }
        let file = Temporary::new(&text);
        let config = Config::load_from(Some(&file.0), HashMap::new()).unwrap();
        assert_eq!(config.stt.api_key.expose_secret(), "hush");
        assert_eq!(config.stt.parameters.search, ["hello"]);
        assert_eq!(config.stt.extra.len(), 1);
    }

    #[test]
    fn who_may_use_the_control_api_is_settled_before_it_listens() {
        const LISTEN: &str = "ROOMWARDEN__CONTROL__LISTEN";
        const TOKEN: (&str, &str) = ("ROOMWARDEN__CONTROL__TOKEN", "0123456789abcdef");
        const READ: (&str, &str) = ("ROOMWARDEN__CONTROL__READ_TOKEN", "abcdef0123456789");
        let good: [&[_]; 5] = [
            &[(LISTEN, "off")],
            &[(LISTEN, "[::1]:0")],
            &[(LISTEN, "0.0.0.0:7460"), TOKEN],
            &[TOKEN, READ],
            &[("ROOMWARDEN__CONTROL__SOCKET", "off")],
        ];
        for variables in good {
            assert!(load(variables).is_ok(), "{variables:?}");
        }
        let bad: [(&[_], &str); 8] = [
            (&[(LISTEN, "0.0.0.0:7460")], "set control.token"),
            (&[(LISTEN, "[::]:7460"), READ], "set control.token"),
            (&[(LISTEN, "localhost:7460")], "127.0.0.1:7460"),
            (&[(LISTEN, "7460")], "127.0.0.1:7460"),
            (&[READ], "it needs control.token"),
            (&[("ROOMWARDEN__CONTROL__TOKEN", "hush")], "at least 16"),
            (
                &[("ROOMWARDEN__CONTROL__TOKEN", "hush hush hush hush")],
                "without blanks",
            ),
            (
                &[TOKEN, ("ROOMWARDEN__CONTROL__READ_TOKEN", TOKEN.1)],
                "must not be the same",
            ),
        ];
        for (variables, words) in bad {
            let said = load(variables).expect_err(words).to_string();
            assert!(said.contains(words), "{said}");
            for secret in ["hush", TOKEN.1, READ.1] {
                assert!(!said.contains(secret), "{said}");
            }
        }
        let config = load(&[]).expect("defaults");
        assert_eq!(config.control.address(), "127.0.0.1:7460".parse().ok());
        let off = load(&[("ROOMWARDEN__CONTROL__SOCKET", "off")]).expect("good");
        assert_eq!(off.control_socket(), None);
    }

    #[test]
    fn every_key_is_in_the_example_and_every_number_has_bounds() {
        let keys = Keys::of::<Config>();
        let mut settings = Settings::new(&keys);
        settings.add_toml(&whole_example(), None);
        assert_eq!(settings.problems, []);
        let there: Vec<&str> = settings.iter().map(|(key, _)| key).collect();
        assert!(keys.names().count() > 60, "all are found");
        for key in keys.names() {
            let entry = format!("{key}.");
            // An empty text in the example is a secret, which counts as not set.
            let there = there
                .iter()
                .any(|set| *set == key || set.starts_with(&entry))
                || sources::SECRETS.iter().any(|secret| secret.key == key);
            assert!(there, "{key} is not in the example");
            if matches!(keys.kind(key), Some(Kind::Number | Kind::Mixed)) {
                assert!(rules::has_range(key), "{key} has no bounds");
            }
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let config = load(&[("LIVEKIT_API_SECRET", "hush-hush")]).unwrap();
        assert!(!format!("{config:?}").contains("hush-hush"));
    }

    #[test]
    fn state_goes_where_systemd_or_the_user_keeps_it() {
        let dir = |variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name)?;
                Some(OsString::from(found.1))
            };
            usual_directory(variable).map(|dir| dir.display().to_string())
        };
        let systemd = ("STATE_DIRECTORY", "/var/lib/a:/var/lib/b");
        let (xdg, home) = (("XDG_STATE_HOME", "/x"), ("HOME", "/h"));
        for (variables, expected) in [
            (&[systemd, xdg, home][..], Some("/var/lib/a")),
            (&[xdg, home], Some("/x/roomwarden")),
            (
                &[("XDG_STATE_HOME", "x"), home],
                Some("/h/.local/state/roomwarden"),
            ),
            (
                &[("STATE_DIRECTORY", ""), home],
                Some("/h/.local/state/roomwarden"),
            ),
            (&[("HOME", "")], None),
            (&[], None),
        ] {
            assert_eq!(dir(variables).as_deref(), expected, "{variables:?}");
        }
    }
}
