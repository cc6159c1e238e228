//! Which values are allowed, and which of them together.

use std::net::SocketAddr;

use config::ValueKind;
use secrecy::ExposeSecret;
use tracing_subscriber::EnvFilter;
use url::Url;

use super::{
    Config, Encoding, OFF, ProviderKind, SttConfig,
    sources::{Settings, text},
};
use crate::store;

/// Numbers: the key, whether 0 is allowed and means never, the least and the most, and the unit.
const RANGES: [(&str, bool, u64, u64, &str); 30] = [
    ("rooms.poll_interval_ms", false, 50, 3_600_000, MS),
    ("rooms.reconcile_interval_ms", true, 50, 3_600_000, MS),
    ("agent.slots", true, 1, 100_000, "jobs"),
    ("agent.load_percent", false, 1, 100, "percent"),
    ("stt.max_streams", true, 1, 100_000, "streams"),
    ("stt.park_after_ms", true, 500, 3_600_000, MS),
    // RFC 6464: -127 dBov is digital silence.
    ("stt.speech_level", false, 1, 126, "dB below full scale"),
    ("stt.preroll_ms", true, 20, 10_000, MS),
    ("stt.page_ms", false, 20, 1000, MS),
    ("stt.connect_timeout_ms", false, 100, 20_000, MS),
    ("stt.close_grace_ms", false, 100, 120_000, MS),
    ("stt.idle_after_ms", true, 100, 3_600_000, MS),
    ("stt.read_timeout_ms", true, 100, 600_000, MS),
    ("stt.write_timeout_ms", true, 100, 600_000, MS),
    ("stt.provider_idle_ms", false, 100, 3_600_000, MS),
    // In memory, for each stream: a minute of Opus is about 250 KB.
    ("stt.replay_ms", true, 20, 60_000, MS),
    ("stt.retry_first_ms", false, 10, 3_600_000, MS),
    ("stt.retry_most_ms", false, 10, 3_600_000, MS),
    // Deepgram's bounds.
    ("stt.parameters.utterance_end_ms", false, 1000, 5000, MS),
    ("stt.parameters.endpointing", true, 1, 60_000, MS),
    ("transcripts.file_max_mb", false, 1, 1_000_000, "megabytes"),
    ("transcripts.file_keep", true, 1, 1000, "files"),
    ("ledger.retention_days", true, 1, 36_500, "days"),
    ("budget.day_minutes", true, 1, 100_000_000, "minutes"),
    ("budget.month_minutes", true, 1, 1_000_000_000, "minutes"),
    ("budget.warn_at_percent", false, 1, 100, "percent"),
    ("usage_reports.timeout_ms", false, 100, 120_000, MS),
    ("gateway.watch_interval_ms", false, 50, 60_000, MS),
    ("shutdown.deadline_ms", false, 100, 600_000, MS),
    ("shutdown.hurry_ms", false, 50, 600_000, MS),
];
const MS: &str = "milliseconds";

const MAX_TEXT: usize = 4096;
/// A token that is shorter could be guessed.
const MIN_TOKEN: usize = 16;
const MAX_ITEMS: usize = 1000;
/// LiveKit's limit of identities and names of rooms, in bytes.
const MAX_NAME: usize = 256;
const NAMES: [&str; 4] = [
    "rooms.identity",
    "rooms.join",
    "agent.identity",
    "agent.name",
];
/// What else is sent as a parameter of `/v1/listen`, and is not for `stt.extra`.
const SENT: [&str; 6] = [
    "model",
    "language",
    "interim_results",
    "encoding",
    "sample_rate",
    "channels",
];

/// What of `stt.parameters` Flux knows.
const FLUX: [&str; 6] = [
    "keyterm",
    "mip_opt_out",
    "numerals",
    "profanity_filter",
    "redact",
    "tag",
];
/// Sooner than the provider gives up a stream without audio.
const FLUX_PARK_AFTER_MS: u64 = 5000;

/// Each value for itself.
pub(super) fn check_values(settings: &mut Settings<'_>) {
    let mut faults: Vec<(String, String)> = Vec::new();
    for (key, value) in settings.iter() {
        let values = match &value.kind {
            ValueKind::Array(items) => items,
            _ => std::slice::from_ref(value),
        };
        let most = match NAMES.contains(&key) {
            true => MAX_NAME,
            false => MAX_TEXT,
        };
        let wrong = values
            .iter()
            .filter_map(text)
            .find_map(|text| wrong_text(text, most));
        if values.len() > MAX_ITEMS {
            faults.push((key.to_owned(), format!("at most {MAX_ITEMS} are allowed")));
        } else if let Some(wrong) = wrong {
            faults.push((key.to_owned(), wrong));
        }
    }
    for (key, zero, least, most, unit) in RANGES {
        if let Some(number) = settings.number(key)
            && !(least..=most).contains(&number)
            && !(zero && number == 0)
        {
            let or_never = if zero { ", or 0" } else { "" };
            let allowed = format!("it must be from {least} to {most} ({unit}){or_never}");
            faults.push((key.to_owned(), allowed));
        }
    }
    for (key, schemes) in [
        ("livekit.url", &["ws", "wss", "http", "https"][..]),
        ("stt.url", &["ws", "wss"]),
        ("quota.url", &["http", "https"]),
        ("usage_reports.url", &["http", "https"]),
        ("stt.parameters.callback", &["https", "http", "wss", "ws"]),
    ] {
        let text = settings.text(key);
        // A callback is told apart from a server: it may have a user and a query.
        let server = key.ends_with(".url");
        if let Some(wrong) = text.and_then(|text| wrong_url(text, schemes, server)) {
            faults.push((key.to_owned(), wrong));
        }
    }
    for (key, value) in settings.iter() {
        let price = key.starts_with("ledger.prices.");
        if price && text(value).is_none_or(|text| store::parse_price(text).is_none()) {
            let allowed = "it must be the price of a minute, in digits, up to 1000, such as \
                           \"0.0077\"";
            faults.push((key.to_owned(), allowed.to_owned()));
        }
    }
    for key in ["budget.day_cost", "budget.month_cost"] {
        let cost = settings.text(key);
        if cost.is_some_and(|text| store::parse_amount(text).is_none_or(|cost| cost <= 0.0)) {
            let allowed = "it must be an amount of ledger.currency, in digits, above 0, such as \
                           \"25.50\"";
            faults.push((key.to_owned(), allowed.to_owned()));
        }
    }
    let currency = settings.text("ledger.currency").unwrap_or_default();
    if !matches!(currency.len(), 1..=8) || !currency.bytes().all(|b| b.is_ascii_alphabetic()) {
        let allowed = "it must be a name of 1 to 8 letters, such as USD";
        faults.push(("ledger.currency".to_owned(), allowed.to_owned()));
    }
    for key in ["control.listen", "gateway.listen"] {
        let listen = settings.text(key).unwrap_or_default();
        if listen != OFF && listen.parse::<SocketAddr>().is_err() {
            let allowed = "it must be an IP address and a port, such as 127.0.0.1:7460 or \
                           [::1]:7460, or off";
            faults.push((key.to_owned(), allowed.to_owned()));
        }
    }
    let filter = settings.text("log.filter");
    if let Some(Err(error)) = filter.map(EnvFilter::try_new) {
        faults.push(("log.filter".to_owned(), error.to_string()));
    }
    for (key, fault) in faults {
        settings.fault(&key, &fault);
    }
}

#[cfg(test)]
pub(super) fn has_range(key: &str) -> bool {
    RANGES.iter().any(|(name, ..)| *name == key)
}

/// As texts of the configuration are checked; for those that come from elsewhere.
pub(crate) fn wrong_setting(text: &str) -> Option<String> {
    wrong_text(text, MAX_TEXT)
}

fn wrong_text(text: &str, most: usize) -> Option<String> {
    if text.is_empty() {
        Some("an empty text says nothing: leave it out".to_owned())
    } else if text.trim() != text {
        Some("it has a blank or a line break at an end: set it without".to_owned())
    } else if text.contains(char::is_control) {
        Some("it has a line break or another control character: set it without".to_owned())
    } else if text.contains(char::REPLACEMENT_CHARACTER) {
        Some("it is not UTF-8".to_owned())
    } else if text.len() > most {
        Some(format!("at most {most} bytes are allowed"))
    } else {
        None
    }
}

fn wrong_url(text: &str, schemes: &[&str], server: bool) -> Option<String> {
    let example = schemes.last().unwrap_or(&"https");
    let allowed = format!(
        "it must be a URL that names a host and starts with one of {}, such as {example}://host",
        schemes.join(", ")
    );
    let url = match Url::parse(text) {
        Ok(url) => url,
        Err(error) => return Some(format!("{error}; {allowed}")),
    };
    if !schemes.contains(&url.scheme()) || url.host_str().is_none_or(str::is_empty) {
        return Some(allowed);
    }
    if !server {
        return None;
    }
    // It would end up in logs and errors.
    if !url.username().is_empty() || url.password().is_some() {
        return Some("a user name or password in it is not supported".to_owned());
    }
    if url.fragment().is_some() {
        return Some("a fragment in it is not supported".to_owned());
    }
    None
}

/// Values that are good each for itself.
pub(super) fn check_together(config: &Config, settings: &mut Settings<'_>) {
    let Config {
        rooms,
        participants,
        stt,
        ..
    } = config;
    let dispatched = config.agent.enabled;
    if rooms.discover && rooms.include.is_empty() && rooms.join.is_empty() && !dispatched {
        settings.fault(
            "rooms.include",
            "no room would be joined: give a pattern, or names in rooms.join",
        );
    }
    if !rooms.discover && rooms.join.is_empty() && !dispatched {
        settings.fault(
            "rooms.discover",
            "no room would be joined: give names in rooms.join, or set it or agent.enabled to true",
        );
    }
    if dispatched && config.agent.identity == rooms.identity {
        settings.fault(
            "agent.identity",
            "it must not be that of rooms.identity, which is for this daemon alone",
        );
    }
    if participants.include.is_empty() {
        settings.fault(
            "participants.include",
            "nobody would be transcribed: give a pattern, [\"*\"] for everybody",
        );
    }
    if participants.sources.is_empty() {
        settings.fault(
            "participants.sources",
            "nothing would be transcribed: give at least microphone",
        );
    }
    if stt.parameters.utterance_end_ms.is_some() && !stt.interim_results {
        settings.fault(
            "stt.parameters.utterance_end_ms",
            "it needs stt.interim_results = true",
        );
    }
    match stt.provider {
        ProviderKind::Deepgram => {}
        ProviderKind::DeepgramFlux => check_flux(stt, settings),
        ProviderKind::LivekitInference => check_inference(stt, settings),
    }
    if let Some(method) = &stt.parameters.callback_method {
        let key = "stt.parameters.callback_method";
        if stt.parameters.callback.is_none() {
            settings.fault(key, "it needs stt.parameters.callback");
        } else if !["post", "put"].contains(&method.as_str()) {
            settings.fault(key, "expected one of post, put");
        }
    }
    if config.usage_reports.url.is_some() && !config.ledger.enabled {
        settings.fault("usage_reports.url", "it needs ledger.enabled = true");
    }
    let budget = &config.budget;
    if budget.is_set() && !config.ledger.enabled {
        settings.fault(
            "ledger.enabled",
            "[budget] needs it: set it to true, or no budget",
        );
    }
    let costs = [
        ("budget.day_cost", &budget.day_cost),
        ("budget.month_cost", &budget.month_cost),
    ];
    for (key, cost) in costs {
        if cost.is_some() && config.ledger.prices.is_empty() {
            settings.fault(key, "it needs prices, in [ledger.prices]");
        }
    }
    at_most(settings, "shutdown.hurry_ms", "shutdown.deadline_ms");
    at_most(settings, "stt.retry_first_ms", "stt.retry_most_ms");

    let own: Vec<String> = settings
        .keys
        .within("stt.parameters")
        .map(str::to_owned)
        .collect();
    let has_key = |settings: &Settings<'_>, name: &str| match SENT.contains(&name) {
        true if settings.keys.kind(&format!("stt.{name}")).is_some() => {
            Some(format!("{name} has a key of its own, stt.{name}"))
        }
        true => Some(format!(
            "{name} follows from stt.encoding, which is a key of its own"
        )),
        false => own
            .iter()
            .any(|own| own == name)
            .then(|| format!("{name} has a key of its own, stt.parameters.{name}")),
    };
    for name in stt.extra.keys() {
        let key = format!("stt.extra.{name}");
        if let Some(said) = has_key(settings, name) {
            settings.fault(&key, &said);
        } else if name.is_empty() || name.contains(char::is_control) {
            settings.fault(&key, "this is no name of a parameter");
        }
    }
    for (name, _) in stt.url.query_pairs() {
        if let Some(said) = has_key(settings, &name) {
            settings.fault("stt.url", &said);
        }
    }
    if config.livekit.url.query().is_some() {
        settings.fault("livekit.url", "a query in it is not supported");
    }
}

fn check_flux(stt: &SttConfig, settings: &mut Settings<'_>) {
    give_way(settings, "stt.model", "flux-general-en");
    give_way(settings, "stt.park_after_ms", FLUX_PARK_AFTER_MS);
    if stt.park_after_ms == 0 && !settings.is_default("stt.park_after_ms") {
        settings.fault(
            "stt.park_after_ms",
            "a stream of deepgram_flux ends without audio, so that it must be parked: it must not \
             be 0",
        );
    }
    let parameters: Vec<String> = settings
        .keys
        .within("stt.parameters")
        .map(|name| format!("stt.parameters.{name}"))
        .collect();
    let others = parameters.iter().filter(|key| {
        let known = FLUX.iter().any(|known| key.ends_with(&format!(".{known}")));
        !known && !settings.is_default(key)
    });
    for key in others.collect::<Vec<_>>() {
        let known = FLUX.join(", ");
        let said = format!(
            "deepgram_flux has no such parameter: of [stt.parameters] it takes {known}, and its own \
             go into [stt.extra]"
        );
        settings.fault(key, &said);
    }
}

fn check_inference(stt: &SttConfig, settings: &mut Settings<'_>) {
    give_way(settings, "stt.url", "wss://agent-gateway.livekit.cloud");
    give_way(settings, "stt.model", "deepgram/nova-3");
    give_way(settings, "stt.encoding", Encoding::Linear16.name());
    if stt.encoding != Encoding::Linear16 && !settings.is_default("stt.encoding") {
        settings.fault("stt.encoding", "livekit_inference takes linear16 alone");
    }
    if stt.inference_api_key.is_empty() != stt.inference_api_secret.expose_secret().is_empty() {
        settings.fault(
            "stt.inference_api_key",
            "it and stt.inference_api_secret belong together: set both, or neither for those of \
             [livekit]",
        );
    }
}

/// A default that is not that of this provider.
fn give_way(settings: &mut Settings<'_>, key: &str, value: impl Into<ValueKind>) {
    if settings.is_default(key) {
        settings.replace_default(key, value);
    }
}

/// Who may use the control API.
pub(super) fn check_tokens(config: &Config, settings: &mut Settings<'_>) {
    let control = &config.control;
    let elsewhere = |address: SocketAddr| !address.ip().is_loopback();
    if control.address().is_some_and(elsewhere) && control.token.is_none() {
        settings.fault(
            "control.listen",
            "others can reach it: set control.token or control.token_file (such as to what \
             `openssl rand -hex 32` prints), or listen on 127.0.0.1",
        );
    }
    if control.read_token.is_some() && control.token.is_none() {
        settings.fault(
            "control.read_token",
            "it needs control.token: without that everybody on this machine may do everything",
        );
    }
    let gateway = &config.gateway;
    if gateway.address().is_some() && gateway.token.is_none() {
        settings.fault(
            "gateway.listen",
            "it needs gateway.token or gateway.token_file: what its clients give for the provider's \
             key (such as what `openssl rand -hex 32` prints)",
        );
    }
    if gateway.address().is_some() && config.stt.provider != ProviderKind::Deepgram {
        settings.fault("gateway.listen", "it needs stt.provider = \"deepgram\"");
    }
    for (key, token) in [
        ("control.token", &control.token),
        ("control.read_token", &control.read_token),
        ("gateway.token", &gateway.token),
    ] {
        let token = token.as_ref().map(ExposeSecret::expose_secret);
        if token.is_some_and(|token| token.len() < MIN_TOKEN) {
            let allowed = format!("at least {MIN_TOKEN} characters are needed");
            settings.fault(key, &allowed);
        } else if token.is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            settings.fault(
                key,
                "only visible ASCII characters are allowed, without blanks",
            );
        }
    }
    if let (Some(token), Some(read)) = (&control.token, &control.read_token)
        && token.expose_secret() == read.expose_secret()
    {
        settings.fault(
            "control.read_token",
            "it must not be the same as control.token",
        );
    }
}

/// A default gives way to what was set.
fn at_most(settings: &mut Settings<'_>, low: &str, high: &str) {
    let (Some(least), Some(most)) = (settings.number(low), settings.number(high)) else {
        return;
    };
    if least <= most {
        return;
    }
    if settings.is_default(low) {
        settings.replace_default(low, most);
    } else {
        settings.fault(
            low,
            &format!("it must not be above {high}, which is {most}"),
        );
    }
}
