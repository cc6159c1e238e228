//! What a client asks for in the query of `/v1/listen`.

use std::time::Duration;

use axum::extract::Query;
use axum::http::Uri;

use super::decode::Format;
use super::reject::Reject;

/// Encodings that Deepgram knows; this server decodes some of them.
const ENCODINGS: [&str; 11] = [
    "linear16", "linear32", "flac", "alaw", "mulaw", "amr-nb", "amr-wb", "opus", "ogg-opus",
    "speex", "g729",
];
pub(super) const SAMPLE_RATES: std::ops::RangeInclusive<u32> = 8000..=192_000;
const CHANNELS: std::ops::RangeInclusive<u32> = 1..=16;
/// Deepgram's documented bounds of `utterance_end_ms`.
const UTTERANCE_END_MS: std::ops::RangeInclusive<u32> = 1000..=5000;
const DEFAULT_ENDPOINTING: Duration = Duration::from_millis(10);
const MAX_ENDPOINTING_MS: u32 = 60_000;

const MAX_PARAMETERS: usize = 64;
const MAX_PARAMETER_LEN: usize = 256;
/// Their values are not for logs: URLs with credentials, or credentials.
const SECRET_PARAMETERS: [&str; 5] = ["callback", "token", "access_token", "api_key", "key"];

/// The parameters that change what the server does.
#[derive(Debug)]
pub(super) struct Parameters {
    pub format: Format,
    pub channels: u32,
    pub interim_results: bool,
    /// `None` if it is turned off.
    pub endpointing: Option<Duration>,
    pub utterance_end: Option<Duration>,
    pub vad_events: bool,
    pub punctuated: bool,
    pub diarize: bool,
    pub language: Option<String>,
    /// All of them as given, bounded and masked.
    pub shown: Vec<(String, String)>,
}

impl Parameters {
    /// Reads and checks the query.
    pub(super) fn parse(uri: &Uri) -> Result<Self, Reject> {
        let pairs = query(uri)?;
        let get = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.as_str())
        };
        let flag = |name: &str| match get(name) {
            None => Ok(false),
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(_) => Err(Reject::bad_request(format!(
                "{name}: expected `true` or `false`"
            ))),
        };
        let number = |name: &str, range: std::ops::RangeInclusive<u32>| {
            get(name)
                .map(|value| {
                    value
                        .parse()
                        .ok()
                        .filter(|number| range.contains(number))
                        .ok_or_else(|| {
                            let (low, high) = (range.start(), range.end());
                            Reject::bad_request(format!(
                                "{name}: expected a number of {low} to {high}"
                            ))
                        })
                })
                .transpose()
        };

        if get("model").is_some_and(str::is_empty) {
            return Err(Reject::bad_request("model: must not be empty"));
        }
        let channels = number("channels", CHANNELS)?.unwrap_or(1);
        let format = format(
            get("encoding"),
            number("sample_rate", SAMPLE_RATES)?,
            channels,
        )?;
        let interim_results = flag("interim_results")?;
        let utterance_end = number("utterance_end_ms", UTTERANCE_END_MS)?
            .map(|ms| Duration::from_millis(ms.into()));
        if utterance_end.is_some() && !interim_results {
            return Err(Reject::bad_request(
                "utterance_end_ms: needs interim_results=true",
            ));
        }
        let endpointing = match get("endpointing") {
            Some("false") => None,
            None | Some("true") => Some(DEFAULT_ENDPOINTING),
            Some(_) => number("endpointing", 0..=MAX_ENDPOINTING_MS)?
                .map(|ms| Duration::from_millis(ms.into())),
        };
        let punctuate = flag("punctuate")?;
        let smart_format = flag("smart_format")?;
        for name in [
            "multichannel",
            "numerals",
            "dictation",
            "filler_words",
            "no_delay",
        ] {
            flag(name)?;
        }
        Ok(Self {
            format,
            channels,
            interim_results,
            endpointing,
            utterance_end,
            vad_events: flag("vad_events")?,
            punctuated: punctuate || smart_format,
            diarize: flag("diarize")?,
            language: get("language").map(str::to_owned),
            shown: pairs.iter().map(shown).collect(),
        })
    }
}

/// The query's pairs, no more of them than is reasonable.
pub(super) fn query(uri: &Uri) -> Result<Vec<(String, String)>, Reject> {
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri)
        .map_err(|_| Reject::bad_request("failed to deserialize query parameters"))?;
    if pairs.len() > MAX_PARAMETERS {
        return Err(Reject::bad_request("too many query parameters"));
    }
    Ok(pairs)
}

fn format(
    encoding: Option<&str>,
    sample_rate: Option<u32>,
    channels: u32,
) -> Result<Format, Reject> {
    let needs_rate = || Reject::bad_request("sample_rate: must be given for a raw encoding");
    match encoding {
        None | Some("ogg-opus") => Ok(Format::Container),
        Some("linear16") => Ok(Format::Linear16 {
            sample_rate: sample_rate.ok_or_else(needs_rate)?,
            channels,
        }),
        Some("opus") => match sample_rate.ok_or_else(needs_rate)? {
            8000 | 12_000 | 16_000 | 24_000 | 48_000 => Ok(Format::Opus),
            _ => Err(Reject::bad_request("sample_rate: not one that Opus has")),
        },
        Some(known) if ENCODINGS.contains(&known) => Err(Reject::bad_request(format!(
            "encoding: the rehearsal server has no decoder for {known}"
        ))),
        Some(_) => Err(Reject::bad_request(format!(
            "encoding: unknown variant, expected one of {}",
            ENCODINGS.join(", ")
        ))),
    }
}

/// A pair as the witness may show it: bounded, and masked if it may be secret.
pub(super) fn shown((name, value): &(String, String)) -> (String, String) {
    let cut = |text: &str| text.chars().take(MAX_PARAMETER_LEN).collect();
    if SECRET_PARAMETERS.contains(&name.as_str()) {
        (cut(name), "...".to_owned())
    } else {
        (cut(name), cut(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Parameters, Reject> {
        let uri = format!("/v1/listen?{query}").parse().expect("a URI");
        Parameters::parse(&uri)
    }

    #[test]
    fn formats_follow_encoding_and_sample_rate() {
        assert_eq!(parse("model=nova-3").unwrap().format, Format::Container);
        assert_eq!(
            parse("encoding=linear16&sample_rate=16000&channels=2")
                .unwrap()
                .format,
            Format::Linear16 {
                sample_rate: 16_000,
                channels: 2
            }
        );
        assert_eq!(
            parse("encoding=opus&sample_rate=48000").unwrap().format,
            Format::Opus
        );
    }

    #[test]
    fn bad_parameters_are_400_and_named() {
        for (query, name) in [
            ("encoding=mp9", "encoding"),
            ("encoding=flac&sample_rate=16000", "encoding"),
            ("encoding=linear16", "sample_rate"),
            ("encoding=linear16&sample_rate=-1", "sample_rate"),
            ("encoding=linear16&sample_rate=4000000000", "sample_rate"),
            ("encoding=opus&sample_rate=44100", "sample_rate"),
            ("channels=0", "channels"),
            ("interim_results=yes", "interim_results"),
            ("endpointing=soon", "endpointing"),
            ("utterance_end_ms=1000", "utterance_end_ms"),
            (
                "utterance_end_ms=10&interim_results=true",
                "utterance_end_ms",
            ),
            ("model=", "model"),
        ] {
            let refused = parse(query).expect_err(query);
            assert_eq!(refused.status, 400, "{query}");
            assert!(
                refused.message.contains(name),
                "{query}: {}",
                refused.message
            );
        }
    }

    #[test]
    fn parameters_are_shown_without_secrets_and_bounded() {
        let long = "x".repeat(10_000);
        let query = format!("tag={long}&callback=https%3A%2F%2Fu%3Ap%40h&keyterm=roomwarden");
        let shown = parse(&query).unwrap().shown;
        assert_eq!(shown[0].1.len(), MAX_PARAMETER_LEN);
        assert_eq!(shown[1], ("callback".to_owned(), "...".to_owned()));
        assert_eq!(shown[2], ("keyterm".to_owned(), "roomwarden".to_owned()));
        assert_eq!(
            parse(&"tag=x&".repeat(MAX_PARAMETERS + 1))
                .unwrap_err()
                .status,
            400
        );
    }
}
