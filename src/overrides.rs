//! What a dispatch may set for its room alone: JSON in the metadata of the dispatch, laid over the
//! configuration. Everything is checked before the job is taken up, and each error names the field,
//! its value and what is allowed.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::{
    config::{self, Encoding, SttConfig},
    room::supervisor::ToRoom,
};

/// LiveKit allows more; none of the settings needs it.
const MAX_METADATA: usize = 16 << 10;
const MAX_ITEMS: usize = 100;
/// Of a value, in an error.
const MAX_SHOWN: usize = 80;
const FIELDS: [&str; 9] = [
    "model",
    "language",
    "encoding",
    "interim_results",
    "punctuate",
    "smart_format",
    "diarize",
    "keyterm",
    "transcripts_to_room",
];

/// Settings of one room; what is None is as configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    pub model: Option<String>,
    pub language: Option<String>,
    pub encoding: Option<Encoding>,
    pub interim_results: Option<bool>,
    pub punctuate: Option<bool>,
    pub smart_format: Option<bool>,
    pub diarize: Option<bool>,
    pub keyterm: Option<Vec<String>>,
    pub transcripts_to_room: Option<bool>,
}

impl Overrides {
    /// Reads the metadata of a dispatch; empty metadata sets nothing.
    ///
    /// # Errors
    /// Everything that is wrong with it, in one line.
    pub fn parse(metadata: &str) -> Result<Self, String> {
        if metadata.trim().is_empty() {
            return Ok(Self::default());
        }
        if metadata.len() > MAX_METADATA {
            let len = metadata.len();
            return Err(format!(
                "the dispatch's metadata has {len} bytes: at most {MAX_METADATA} are allowed"
            ));
        }
        let fields = match serde_json::from_str::<Value>(metadata) {
            Ok(Value::Object(fields)) => fields,
            Ok(other) => {
                let shown = shown(&other);
                return Err(format!(
                    "the dispatch's metadata is {shown}: it must be empty or a JSON object, such \
                     as {{\"model\": \"nova-3\"}}"
                ));
            }
            Err(error) => {
                return Err(format!(
                    "the dispatch's metadata is no JSON ({error}): it must be empty or a JSON \
                     object, such as {{\"model\": \"nova-3\"}}"
                ));
            }
        };
        let mut reading = Reading {
            fields,
            wrong: String::new(),
        };
        let read = Self {
            model: reading.text("model"),
            language: reading.text("language"),
            encoding: reading.encoding(),
            interim_results: reading.boolean("interim_results"),
            punctuate: reading.boolean("punctuate"),
            smart_format: reading.boolean("smart_format"),
            diarize: reading.boolean("diarize"),
            keyterm: reading.texts("keyterm"),
            transcripts_to_room: reading.boolean("transcripts_to_room"),
        };
        reading.done().map(|()| read)
    }

    /// As metadata of a dispatch; empty if nothing is set.
    pub fn to_metadata(&self) -> String {
        let encoding = self.encoding.map(Encoding::name);
        let mut fields = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(name.to_owned(), value);
            }
        };
        set("model", self.model.clone().map(Value::from));
        set("language", self.language.clone().map(Value::from));
        set("encoding", encoding.map(Value::from));
        set("interim_results", self.interim_results.map(Value::from));
        set("punctuate", self.punctuate.map(Value::from));
        set("smart_format", self.smart_format.map(Value::from));
        set("diarize", self.diarize.map(Value::from));
        set("keyterm", self.keyterm.clone().map(Value::from));
        let to_room = self.transcripts_to_room.map(Value::from);
        set("transcripts_to_room", to_room);
        match fields.is_empty() {
            true => String::new(),
            false => Value::Object(fields).to_string(),
        }
    }

    /// Whether it asks anything else of the provider than is configured.
    pub fn is_for_provider(&self) -> bool {
        let without = Self {
            transcripts_to_room: None,
            ..self.clone()
        };
        without != Self::default()
    }

    pub fn apply(&self, config: &SttConfig) -> SttConfig {
        let mut config = config.clone();
        if let Some(model) = &self.model {
            config.model.clone_from(model);
        }
        if let Some(encoding) = self.encoding {
            config.encoding = encoding;
        }
        if let Some(interim) = self.interim_results {
            config.interim_results = interim;
            // It needs them.
            if !interim {
                config.parameters.utterance_end_ms = None;
            }
        }
        if let Some(keyterm) = &self.keyterm {
            config.parameters.keyterm.clone_from(keyterm);
        }
        config.language = self.language.clone().or(config.language);
        let parameters = &mut config.parameters;
        parameters.punctuate = self.punctuate.or(parameters.punctuate);
        parameters.smart_format = self.smart_format.or(parameters.smart_format);
        parameters.diarize = self.diarize.or(parameters.diarize);
        config
    }

    pub fn to_room(&self, configured: ToRoom) -> ToRoom {
        match self.transcripts_to_room {
            None => configured,
            Some(false) => ToRoom {
                text: false,
                packets: false,
            },
            Some(true) => ToRoom {
                text: true,
                ..configured
            },
        }
    }
}

struct Reading {
    fields: Map<String, Value>,
    wrong: String,
}

impl Reading {
    fn done(mut self) -> Result<(), String> {
        let unknown: Vec<_> = self.fields.keys().cloned().collect();
        for name in unknown {
            let alike = |known: &&str| strsim::normalized_damerau_levenshtein(known, &name);
            let nearest = FIELDS.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let said = match nearest.filter(|nearest| alike(nearest) > 0.6) {
                Some(nearest) => format!("did you mean {nearest}?"),
                None => format!("it may have {}", FIELDS.join(", ")),
            };
            let name = shown(&Value::from(name));
            self.blame(&format!(
                "the dispatch's metadata has no field {name}: {said}"
            ));
        }
        match self.wrong.is_empty() {
            true => Ok(()),
            false => Err(self.wrong),
        }
    }

    fn blame(&mut self, said: &str) {
        if !self.wrong.is_empty() {
            self.wrong.push_str("; ");
        }
        self.wrong.push_str(said);
    }

    fn fault(&mut self, name: &str, value: &Value, allowed: &str) {
        let shown = shown(value);
        let mut said = String::new();
        // Writing to a text does not fail.
        let _ = write!(
            said,
            "{name} in the dispatch's metadata is {shown}: {allowed}"
        );
        self.blame(&said);
    }

    /// The field, which is known by that; null is as if it were not there.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Option<String> {
        let value = self.take(name)?;
        let wrong = match &value {
            Value::String(text) => config::wrong_text(text),
            _ => Some("expected a text in quotes".to_owned()),
        };
        match (wrong, value) {
            (None, Value::String(text)) => Some(text),
            (wrong, value) => {
                self.fault(name, &value, &wrong.unwrap_or_default());
                None
            }
        }
    }

    fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        let value = self.take(name)?;
        let Value::Array(items) = &value else {
            self.fault(name, &value, "expected a list of texts");
            return None;
        };
        let text = |item: &Value| {
            let text = item.as_str().filter(|t| config::wrong_text(t).is_none());
            text.map(str::to_owned)
        };
        let texts: Option<Vec<_>> = items.iter().map(text).collect();
        let texts = texts.filter(|texts| texts.len() <= MAX_ITEMS);
        if texts.is_none() {
            let allowed = format!(
                "expected a list of at most {MAX_ITEMS} texts, none of them empty or with control \
                 characters"
            );
            self.fault(name, &value, &allowed);
        }
        texts
    }

    fn boolean(&mut self, name: &str) -> Option<bool> {
        let value = self.take(name)?;
        if value.as_bool().is_none() {
            self.fault(name, &value, "expected true or false");
        }
        value.as_bool()
    }

    fn encoding(&mut self) -> Option<Encoding> {
        let value = self.take("encoding")?;
        let known = [Encoding::OggOpus, Encoding::Linear16];
        let found = known.into_iter().find(|e| value == e.name());
        if found.is_none() {
            let names = known.map(Encoding::name).join(", ");
            self.fault("encoding", &value, &format!("expected one of {names}"));
        }
        found
    }
}

/// A value as it is quoted in an error: bounded, and in one line.
fn shown(value: &Value) -> String {
    let text = value.to_string().replace(char::is_control, "\u{fffd}");
    let cut = text
        .char_indices()
        .nth(MAX_SHOWN)
        .map_or(text.len(), |(at, _)| at);
    match cut < text.len() {
        true => format!("{}...", &text[..cut]),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn settings_of_a_dispatch_are_laid_over_the_configuration() {
        let metadata = r#"{"model": "nova-2", "language": "de", "encoding": "linear16",
            "interim_results": false, "keyterm": ["a b", "c"], "transcripts_to_room": false,
            "diarize": null}"#;
        let read = Overrides::parse(metadata).expect("good");
        let mut config = Config::for_tests().stt;
        config.parameters.utterance_end_ms = Some(1000);
        config.parameters.diarize = Some(true);
        let applied = read.apply(&config);
        assert_eq!(applied.model, "nova-2");
        assert_eq!(applied.language.as_deref(), Some("de"));
        assert_eq!(applied.encoding, Encoding::Linear16);
        assert_eq!(applied.parameters.keyterm, ["a b", "c"]);
        assert!(!applied.interim_results);
        assert_eq!(applied.parameters.utterance_end_ms, None);
        assert_eq!(applied.parameters.diarize, Some(true), "as configured");
        assert_eq!(applied.url, config.url);
        let both = ToRoom {
            text: true,
            packets: true,
        };
        let none = ToRoom {
            text: false,
            packets: false,
        };
        assert_eq!(read.to_room(both), none);
        assert_eq!(Overrides::parse(&read.to_metadata()), Ok(read.clone()));
        assert!(read.is_for_provider());
        for empty in ["", "  ", "{}"] {
            let nothing = Overrides::parse(empty).expect("good");
            assert_eq!(nothing, Overrides::default());
            assert_eq!(nothing.to_room(both), both);
            assert_eq!(nothing.to_metadata(), "");
        }
        let to_room = Overrides::parse(r#"{"transcripts_to_room": true}"#).expect("good");
        assert!(!to_room.is_for_provider());
        assert!(to_room.to_room(none).text);
    }

    #[test]
    fn errors_name_the_field_the_value_and_what_is_allowed() {
        for (metadata, words) in [
            ("[1]", ["metadata is [1]", "a JSON object"]),
            ("nova-3", ["no JSON", "a JSON object"]),
            (
                r#"{"modle": "x"}"#,
                ["no field \"modle\"", "did you mean model?"],
            ),
            (
                r#"{"qqqq": 1}"#,
                ["no field \"qqqq\"", "keyterm, transcripts_to_room"],
            ),
            (
                r#"{"model": 3}"#,
                ["model in the dispatch's metadata is 3", "a text in quotes"],
            ),
            (r#"{"model": ""}"#, ["is \"\"", "says nothing"]),
            (r#"{"language": " de"}"#, ["language", "a blank"]),
            (r#"{"language": "d\ne"}"#, ["language", "a line break"]),
            (
                r#"{"encoding": "mp3"}"#,
                ["is \"mp3\"", "one of ogg-opus, linear16"],
            ),
            (r#"{"punctuate": "yes"}"#, ["is \"yes\"", "true or false"]),
            (r#"{"keyterm": "a"}"#, ["keyterm", "a list of texts"]),
            (
                r#"{"keyterm": ["a", 1]}"#,
                ["[\"a\",1]", "at most 100 texts"],
            ),
        ] {
            let said = Overrides::parse(metadata).expect_err(metadata);
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
            assert!(!said.contains(char::is_control), "{said:?}");
        }
        let said = Overrides::parse(r#"{"model": 1, "x": 2}"#).unwrap_err();
        assert!(said.contains("; "), "all at once: {said}");
        let long = format!("{{\"model\": \"{}\"}}", "x".repeat(20_000));
        let said = Overrides::parse(&long).unwrap_err();
        assert!(said.contains("at most 16384") && said.len() < 200, "{said}");
        let long = format!("{{\"model\": [\"{}\"]}}", "x".repeat(10_000));
        assert!(Overrides::parse(&long).unwrap_err().len() < 250);
    }
}
