//! Where settings come from, one layer over the other: built-in defaults, a file, the environment,
//! flags. The `config` crate lays them over each other; each value says where it was set, so that an
//! error can say so.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use config::{Map, Source, Value, ValueKind, builder::DefaultState};
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::keys::{Keys, Kind};

const PREFIX: &str = "ROOMWARDEN_";
/// Where systemd puts the credentials of a unit (LoadCredential=).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// Between a file's name and the line's number.
const AT_LINE: &str = ", line ";
const MAX_FILE: u64 = 1 << 20;
const MAX_SECRET: u64 = 64 << 10;
/// Of a value, in an error.
const MAX_SHOWN: usize = 80;

/// A key whose value is never shown, and the other ways to set it.
pub(super) struct Secret {
    pub key: &'static str,
    pub file_key: &'static str,
    pub variable: &'static str,
    pub file_variable: &'static str,
    /// Whether nothing works without it.
    pub needed: bool,
}

pub(super) const SECRETS: [Secret; 9] = [
    Secret {
        key: "livekit.api_key",
        file_key: "livekit.api_key_file",
        variable: "LIVEKIT_API_KEY",
        file_variable: "LIVEKIT_API_KEY_FILE",
        needed: true,
    },
    Secret {
        key: "livekit.api_secret",
        file_key: "livekit.api_secret_file",
        variable: "LIVEKIT_API_SECRET",
        file_variable: "LIVEKIT_API_SECRET_FILE",
        needed: true,
    },
    Secret {
        key: "stt.api_key",
        file_key: "stt.api_key_file",
        variable: "DEEPGRAM_API_KEY",
        file_variable: "DEEPGRAM_API_KEY_FILE",
        needed: true,
    },
    Secret {
        key: "stt.inference_api_key",
        file_key: "stt.inference_api_key_file",
        variable: "LIVEKIT_INFERENCE_API_KEY",
        file_variable: "LIVEKIT_INFERENCE_API_KEY_FILE",
        needed: false,
    },
    Secret {
        key: "stt.inference_api_secret",
        file_key: "stt.inference_api_secret_file",
        variable: "LIVEKIT_INFERENCE_API_SECRET",
        file_variable: "LIVEKIT_INFERENCE_API_SECRET_FILE",
        needed: false,
    },
    Secret {
        key: "usage_reports.secret",
        file_key: "usage_reports.secret_file",
        variable: "ROOMWARDEN__USAGE_REPORTS__SECRET",
        file_variable: "ROOMWARDEN__USAGE_REPORTS__SECRET_FILE",
        needed: false,
    },
    Secret {
        key: "control.token",
        file_key: "control.token_file",
        variable: "ROOMWARDEN__CONTROL__TOKEN",
        file_variable: "ROOMWARDEN__CONTROL__TOKEN_FILE",
        needed: false,
    },
    Secret {
        key: "control.read_token",
        file_key: "control.read_token_file",
        variable: "ROOMWARDEN__CONTROL__READ_TOKEN",
        file_variable: "ROOMWARDEN__CONTROL__READ_TOKEN_FILE",
        needed: false,
    },
    Secret {
        key: "gateway.token",
        file_key: "gateway.token_file",
        variable: "ROOMWARDEN__GATEWAY__TOKEN",
        file_variable: "ROOMWARDEN__GATEWAY__TOKEN_FILE",
        needed: false,
    },
];

/// Something that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was set: a file and its line, a variable or a flag. None if nobody set anything.
    pub origin: Option<String>,
    /// The key, its value unless that is a secret, and what is allowed.
    pub said: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            None => f.write_str(&self.said),
            Some(origin) => write!(f, "{origin}: {}", self.said),
        }
    }
}

impl Problem {
    /// For their order: a file's by its lines, then variables and flags by name.
    pub(super) fn place(&self) -> (bool, usize, &str) {
        let origin = self.origin.as_deref().unwrap_or_default();
        match origin.rsplit_once(AT_LINE).map(|(_, line)| line.parse()) {
            Some(Ok(line)) => (false, line, ""),
            _ => (self.origin.is_some(), 0, origin.trim_start_matches('-')),
        }
    }
}

/// A flag of the command line that sets a key.
#[derive(Debug, Clone)]
pub struct Flag {
    /// As it is written, `--stt-url`.
    pub name: &'static str,
    pub key: &'static str,
    pub value: String,
}

/// All layers together.
pub(super) struct Settings<'a> {
    pub keys: &'a Keys,
    pub problems: Vec<Problem>,
    layers: config::ConfigBuilder<DefaultState>,
    /// What they come to, by full names.
    set: BTreeMap<String, Value>,
    /// Keys that something was said about: one problem each is enough.
    faulty: BTreeSet<String>,
}

/// What one source sets, by full names.
type Layer = BTreeMap<String, Value>;

/// A layer as sections. Its parts were looked at before, each for itself, since a [`Source`] can
/// report one problem only.
#[derive(Clone)]
struct Sections(Map<String, Value>);

impl fmt::Debug for Sections {
    /// Not the values: some are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl Source for Sections {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

impl<'a> Settings<'a> {
    pub fn new(keys: &'a Keys) -> Self {
        Self {
            keys,
            problems: Vec::new(),
            layers: config::Config::builder(),
            set: BTreeMap::new(),
            faulty: BTreeSet::new(),
        }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.set.get(key)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(text)
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)?.kind {
            ValueKind::U64(number) => Some(number),
            _ => None,
        }
    }

    /// Puts another value in the place of a default.
    pub fn replace_default(&mut self, key: &str, value: impl Into<ValueKind>) {
        self.lay([(key.to_owned(), Value::new(None, value))].into());
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.set.iter().map(|(key, set)| (key.as_str(), set))
    }

    pub fn is_default(&self, key: &str) -> bool {
        self.get(key).is_none_or(|value| value.origin().is_none())
    }

    /// What all layers together come to. None, and a problem noted, if a value does not fit its key.
    pub fn deserialise<T: DeserializeOwned>(&mut self) -> Option<T> {
        let built = self.layers.build_cloned();
        match built.and_then(config::Config::try_deserialize) {
            Ok(read) => Some(read),
            // Its own words may quote the value.
            Err(error) => {
                self.misfit(&key_of(&error));
                None
            }
        }
    }

    /// Notes what is wrong with a key's value.
    pub fn fault(&mut self, key: &str, allowed: &str) {
        let (origin, said) = match self.set.get(key) {
            Some(value) => {
                let shown = shown(key, value);
                (origin(value), format!("{key} is {shown}: {allowed}"))
            }
            None => (None, format!("{key} is not set: {allowed}")),
        };
        self.blame(key, origin, said);
    }

    /// Notes that a value is none that its key takes.
    fn misfit(&mut self, key: &str) {
        let kind = self.keys.kind(key).unwrap_or(&Kind::Text);
        let allowed = wanted(kind, key, true);
        self.fault(key, &allowed);
    }

    fn blame(&mut self, key: &str, origin: Option<String>, said: String) {
        if self.faulty.insert(key.to_owned()) {
            self.problems.push(Problem { origin, said });
        }
    }

    /// The built-in defaults, or a file.
    pub fn add_toml(&mut self, text: &str, path: Option<&Path>) {
        let at = |span: std::ops::Range<usize>| {
            let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
            path.map(|path| format!("{}{AT_LINE}{line}", path.display()))
        };
        match DeTable::parse(text) {
            Ok(table) => {
                let mut layer = Layer::new();
                let document = Document { text, at: &at };
                self.walk(&document, table.get_ref(), "", &mut layer);
                self.apply(layer);
            }
            Err(error) => {
                let origin = at(error.span().unwrap_or_default());
                // Not as it prints itself: it would quote the line.
                let said = format!("not TOML: {}", error.message());
                self.problems.push(Problem { origin, said });
            }
        }
    }

    fn walk(
        &mut self,
        document: &Document<'_>,
        table: &DeTable<'_>,
        section: &str,
        layer: &mut Layer,
    ) {
        let keys = self.keys;
        for (name, value) in table {
            let key = match section {
                "" => name.get_ref().to_string(),
                section => format!("{section}.{}", name.get_ref()),
            };
            let kind = match (keys.kind(&key), keys.in_table(&key)) {
                (_, Some(_)) => &Kind::Text,
                (Some(kind), None) => kind,
                (None, None) if keys.is_section(&key) => &Kind::Table,
                (None, None) => {
                    let said = unknown(keys, &key);
                    self.blame(&key, (document.at)(name.span()), said);
                    continue;
                }
            };
            match (kind, value.get_ref()) {
                (Kind::Table, DeValue::Table(table)) => self.walk(document, table, &key, layer),
                (kind, given) => match from_toml(kind, given) {
                    Some(kind) => {
                        let origin = (document.at)(name.span());
                        layer.insert(key, Value::new(origin.as_ref(), kind));
                    }
                    None => {
                        let shown = match is_secret(&key) {
                            true => "(not shown)".to_owned(),
                            false => cut(&document.text[value.span()]),
                        };
                        let said = format!("{key} is {shown}: {}", wanted(kind, &key, true));
                        self.blame(&key, (document.at)(name.span()), said);
                    }
                },
            }
        }
    }

    /// The names that people have set already, and over them the project's own.
    pub fn add_environment(&mut self, environment: &HashMap<String, String>) {
        let mut common = Layer::new();
        let mut pairs = vec![("LIVEKIT_URL", "livekit.url")];
        for secret in &SECRETS {
            pairs.push((secret.variable, secret.key));
            pairs.push((secret.file_variable, secret.file_key));
        }
        for (name, key) in pairs {
            if let Some(value) = environment.get(name) {
                self.add_text(&mut common, key, name, value);
            }
        }
        self.apply(common);

        let mut own = Layer::new();
        let ordered: BTreeMap<_, _> = environment.iter().collect();
        for (name, value) in ordered {
            match own_key(self.keys, name) {
                Ok(None) => {}
                Ok(Some(key)) => {
                    self.add_text(&mut own, &key, name, value);
                }
                Err(said) => self.problems.push(Problem {
                    origin: Some(name.clone()),
                    said,
                }),
            }
        }
        self.apply(own);
    }

    pub fn add_flags(&mut self, flags: &[Flag]) {
        let mut layer = Layer::new();
        for flag in flags {
            self.add_text(&mut layer, flag.key, flag.name, &flag.value);
        }
        self.apply(layer);
    }

    /// What is empty counts as not set: that is how containers are given nothing.
    fn add_text(&mut self, layer: &mut Layer, key: &str, origin: &str, text: &str) {
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        let kind = self.keys.kind(key).unwrap_or(&Kind::Text);
        match from_text(kind, text) {
            Some(value) => {
                let value = Value::new(Some(&origin.to_owned()), value);
                layer.insert(key.to_owned(), value);
            }
            None => {
                let shown = shown(key, &Value::new(None, text));
                let said = format!("{key} is {shown}: {}", wanted(kind, key, false));
                self.blame(key, Some(origin.to_owned()), said);
            }
        }
    }

    /// Lays a source's layer over what there is.
    fn apply(&mut self, mut layer: Layer) {
        for Secret { key, file_key, .. } in &SECRETS {
            if layer.get(*key).and_then(text) == Some("") {
                layer.remove(*key);
            }
            match (layer.get(*key), layer.get(*file_key)) {
                (Some(value), Some(file)) => {
                    let said = format!(
                        "{key} and {file_key} ({}) are both set: set only one",
                        file.origin().unwrap_or("by default")
                    );
                    self.blame(key, origin(value), said);
                }
                // A file that is named holds, unless a nearer layer has the value itself.
                (Some(_), None) => {
                    layer.insert((*file_key).to_owned(), Value::default());
                }
                (None, _) => {}
            }
        }
        self.lay(layer);
    }

    fn lay(&mut self, layer: Layer) {
        let mut sections = Map::new();
        for (key, value) in layer {
            let split = self.keys.in_table(&key).or_else(|| key.rsplit_once('.'));
            if let Some((section, name)) = split {
                table_of(&mut sections, section).insert(name.to_owned(), value);
            }
        }
        self.layers = std::mem::take(&mut self.layers).add_source(Sections(sections));
        let built = self.layers.build_cloned();
        let all = built.expect("layers that are in memory can be read").cache;
        self.set.clear();
        flatten(all, String::new(), &mut self.set);
    }

    /// Fills in the secrets that are in files, or among systemd's credentials.
    /// Those that are missing or can't be read are a problem only if they are `needed`.
    pub fn read_secrets(&mut self, environment: &HashMap<String, String>, needed: bool) {
        let credentials = environment.get(CREDENTIALS).filter(|dir| !dir.is_empty());
        let mut found = Layer::new();
        let inference = self.text("stt.provider") == Some("livekit_inference");
        for secret in &SECRETS {
            let Secret { key, file_key, .. } = secret;
            let mut fill = |value: String, origin: Option<String>| {
                found.insert((*key).to_owned(), Value::new(origin.as_ref(), value));
            };
            let set = self.set.contains_key(*key);
            if let Some(file) = self.set.get(*file_key) {
                let origin = origin(file);
                let path = PathBuf::from(text(file).unwrap_or_default());
                match read_secret(&path) {
                    Ok(value) => {
                        fill(value, origin);
                        continue;
                    }
                    Err(_) if !needed => {}
                    Err(why) => {
                        let said = format!("{file_key} is {:?}: {why}", path.display().to_string());
                        self.faulty.insert((*key).to_owned());
                        self.blame(file_key, origin, said);
                    }
                }
            } else if !set
                && let Some(path) = credentials.map(|dir| Path::new(dir).join(key))
                && path.exists()
            {
                let origin = Some(CREDENTIALS.to_owned());
                match read_secret(&path) {
                    Ok(value) => {
                        fill(value, origin);
                        continue;
                    }
                    Err(_) if !needed => {}
                    Err(why) => {
                        let said = format!("{key} is the credential {}: {why}", path.display());
                        self.blame(key, origin, said);
                    }
                }
            }
            if !set && secret.needed && inference && *key == "stt.api_key" {
                fill(String::new(), None);
                self.faulty.insert((*key).to_owned());
            } else if !set && secret.needed {
                // So that the rest can be looked at.
                fill(String::new(), None);
                if !needed {
                    // Nothing else is to be said of it either.
                    self.faulty.insert((*key).to_owned());
                    continue;
                }
                let said = format!(
                    "{key} is not set: set {}, or name a file that holds it in {} or {file_key}",
                    secret.variable, secret.file_variable
                );
                self.blame(key, None, said);
            }
        }
        self.lay(found);
    }
}

/// The table of a section, made if need be.
fn table_of<'a>(root: &'a mut Map<String, Value>, section: &str) -> &'a mut Map<String, Value> {
    section.split('.').fold(root, |table, name| {
        let entry = table
            .entry(name.to_owned())
            .or_insert_with(|| Value::new(None, Map::<String, Value>::new()));
        match &mut entry.kind {
            ValueKind::Table(table) => table,
            _ => unreachable!("no section is a key with a value"),
        }
    })
}

fn flatten(value: Value, key: String, into: &mut BTreeMap<String, Value>) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                let key = match key.as_str() {
                    "" => name,
                    section => format!("{section}.{name}"),
                };
                flatten(value, key, into);
            }
        }
        // A nearer layer has taken it back.
        ValueKind::Nil => {}
        _ => drop(into.insert(key, value)),
    }
}

/// The key that an error is about.
fn key_of(error: &config::ConfigError) -> String {
    use config::ConfigError::{At, NotFound, Type};
    let key = match error {
        Type { key, .. } | At { key, .. } => key.as_deref(),
        NotFound(key) => Some(key.as_str()),
        _ => None,
    };
    // An item of a list is its key's.
    let key = key.and_then(|key| key.split('[').next());
    key.unwrap_or_default().to_owned()
}

fn origin(value: &Value) -> Option<String> {
    value.origin().map(str::to_owned)
}

/// The value, if it is a text: not what could be read as one.
pub(super) fn text(value: &Value) -> Option<&str> {
    match &value.kind {
        ValueKind::String(text) => Some(text),
        _ => None,
    }
}

/// A text of TOML, and how a place in it is named.
struct Document<'a> {
    text: &'a str,
    at: &'a dyn Fn(std::ops::Range<usize>) -> Option<String>,
}

/// Reads a configuration file.
pub(super) fn read(path: &Path) -> Result<String, Problem> {
    read_bounded(path, MAX_FILE).map_err(|error| Problem {
        origin: None,
        said: format!("cannot read {}: {error} (--config)", path.display()),
    })
}

/// A secret that a file holds, without a line break at its end.
pub(crate) fn read_secret(path: &Path) -> Result<String, String> {
    let text =
        read_bounded(path, MAX_SECRET).map_err(|error| format!("cannot read it: {error}"))?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err("the file is empty".to_owned()),
        secret => Ok(secret.to_owned()),
    }
}

fn read_bounded(path: &Path, most: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(most + 1).read_to_string(&mut text)?;
    match text.len() as u64 > most {
        true => Err(io::Error::other(format!(
            "it is larger than {} KiB",
            most >> 10
        ))),
        false => Ok(text),
    }
}

fn from_toml(kind: &Kind, given: &DeValue<'_>) -> Option<ValueKind> {
    match (kind, given) {
        (Kind::Text | Kind::Mixed, DeValue::String(text)) => Some(text.as_ref().into()),
        (Kind::Boolean | Kind::Mixed, DeValue::Boolean(value)) => Some((*value).into()),
        (Kind::Number | Kind::Mixed, DeValue::Integer(number)) => {
            let number = i64::from_str_radix(number.as_str(), number.radix());
            let number = number.ok().and_then(|number| u64::try_from(number).ok());
            number.map(Into::into)
        }
        (Kind::Choice(_), DeValue::String(text)) => from_text(kind, text),
        (Kind::List(kind), DeValue::Array(items)) => {
            list_of(items.iter().map(|item| from_toml(kind, item.get_ref())))
        }
        _ => None,
    }
}

/// What a text of the environment or of a flag is, by what its key takes: never guessed from the
/// text, or a key of digits would be a number.
fn from_text(kind: &Kind, text: &str) -> Option<ValueKind> {
    let boolean = || text.parse::<bool>().ok().map(ValueKind::from);
    let number = || {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = digits.then(|| text.parse::<i64>().ok()).flatten();
        number.map(|number| number.cast_unsigned().into())
    };
    match kind {
        Kind::Text => Some(text.into()),
        Kind::Boolean => boolean(),
        Kind::Number => number(),
        Kind::Mixed => boolean().or_else(number).or_else(|| Some(text.into())),
        Kind::Choice(allowed) => allowed.contains(&text).then(|| text.into()),
        Kind::List(kind) => list_of(text.split(',').map(|item| from_text(kind, item.trim()))),
        Kind::Table => None,
    }
}

fn list_of(items: impl Iterator<Item = Option<ValueKind>>) -> Option<ValueKind> {
    let items = items.map(|kind| Some(Value::new(None, kind?)));
    items.collect::<Option<Vec<_>>>().map(ValueKind::Array)
}

/// What a key takes, as an error says it.
fn wanted(kind: &Kind, key: &str, toml: bool) -> String {
    match kind {
        Kind::Text if toml => "expected a text in quotes".to_owned(),
        Kind::Text => "expected a text".to_owned(),
        Kind::Boolean => "expected true or false".to_owned(),
        Kind::Number => "expected a whole number, 0 or more".to_owned(),
        Kind::Mixed => "expected a number, true or false".to_owned(),
        Kind::Choice(allowed) => format!("expected one of {}", allowed.join(", ")),
        Kind::List(item) => {
            let of = match item.as_ref() {
                Kind::Choice(allowed) => format!(" of {}", allowed.join(", ")),
                _ => String::new(),
            };
            match toml {
                true => format!("expected a list{of}, such as [\"a\", \"b\"]"),
                false => format!("expected a list{of}, separated by commas"),
            }
        }
        Kind::Table => format!("it is a section, [{key}], whose keys are set one by one"),
    }
}

fn unknown(keys: &Keys, key: &str) -> String {
    let said = format!("there is no key {key}");
    let section = key.rsplit_once('.').map_or("", |(section, _)| section);
    let more = match section {
        "stt.parameters" => "; any other parameter goes into [stt.extra]",
        _ => "",
    };
    if let Some(meant) = keys.nearest(key) {
        return format!("{said}; did you mean {meant}?{more}");
    }
    format!("{said}: {}{more}", list(keys, section))
}

/// What there is instead of a key that is unknown.
fn list(keys: &Keys, section: &str) -> String {
    let names: Vec<_> = match keys.is_section(section) {
        true => keys.within(section).collect(),
        false => keys.sections().collect(),
    };
    match keys.is_section(section) {
        true => format!("the keys of [{section}] are {}", names.join(", ")),
        false => format!("the sections are {}", names.join(", ")),
    }
}

/// The key that a variable sets, if it is one of ours.
fn own_key(keys: &Keys, variable: &str) -> Result<Option<String>, String> {
    let Some(rest) = variable.strip_prefix(PREFIX) else {
        return Ok(None);
    };
    let flat = |key: &str| key.replace(['.', '_'], "").to_lowercase();
    let meant = keys.names().find(|known| flat(known) == flat(rest));
    let sets = |key: &str| {
        let name = key.to_uppercase().replace('.', "__");
        format!("{PREFIX}_{name} sets {key}")
    };
    let Some(rest) = rest.strip_prefix('_') else {
        // The commonest slip is a single underscore. Anything else is somebody else's: Kubernetes
        // makes variables of this form for a service called roomwarden.
        return match meant {
            Some(meant) => Err(format!("names no key: {}", sets(meant))),
            None => Ok(None),
        };
    };
    let key = rest.to_ascii_lowercase().replace("__", ".");
    if let Some((table, _)) = keys.in_table(&key) {
        let before = table.replace('.', "__").len() + "__".len();
        let given = rest.get(before..).unwrap_or_default();
        // A name in capitals alone is so because variables are.
        let entry = match given.chars().any(char::is_lowercase) {
            true => given.to_owned(),
            false => given.to_lowercase(),
        };
        return Ok(Some(format!("{table}.{entry}")));
    }
    match (
        keys.kind(&key),
        meant.map(str::to_owned).or_else(|| keys.nearest(&key)),
    ) {
        (Some(Kind::Table), _) => Err(format!(
            "names no key: {key} is a section, {variable}__NAME sets one of its keys"
        )),
        (Some(_), _) => Ok(Some(key)),
        (None, Some(meant)) if keys.kind(&meant).is_some() => {
            Err(format!("names no key: {}", sets(&meant)))
        }
        (None, _) => {
            let section = match keys.is_section(&key) {
                true => &key,
                false => key.rsplit_once('.').map_or("", |(section, _)| section),
            };
            Err(format!(
                "names no key: {PREFIX}_SECTION__KEY sets one; {}",
                list(keys, section)
            ))
        }
    }
}

/// Whether the value may be a secret.
fn is_secret(key: &str) -> bool {
    // A callback may carry credentials, and an extra parameter be one.
    SECRETS.iter().any(|secret| secret.key == key)
        || key == "stt.parameters.callback"
        || key.starts_with("stt.extra.")
}

/// A value as an error may show it.
fn shown(key: &str, value: &Value) -> String {
    match &value.kind {
        _ if is_secret(key) => "(not shown)".to_owned(),
        // A password or a token, most likely.
        ValueKind::String(text) if text.contains("://") && text.contains(['@', '?']) => {
            "a URL with more than an address (not shown)".to_owned()
        }
        ValueKind::String(text) => format!("{:?}", cut(text)),
        ValueKind::U64(number) => number.to_string(),
        ValueKind::Boolean(value) => value.to_string(),
        ValueKind::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| shown(key, item)).collect();
            cut(&format!("[{}]", items.join(", ")))
        }
        _ => "something else".to_owned(),
    }
}

/// Short, on one line, and harmless to a terminal.
fn cut(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    shown
        .replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
        .replace('\n', " ")
}
