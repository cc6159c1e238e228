//! Which rooms are joined and who is transcribed in them.

use std::collections::{BTreeMap, HashMap};

use livekit::{participant::ParticipantKind, prelude::*};
use wildmatch::WildMatch;

use crate::config::{AudioSource, ParticipantsConfig, RoomsConfig};

/// Names that fit one of `include` and none of `exclude`: `*` stands for any text, `?` for any
/// character, everything else for itself.
#[derive(Debug, Clone)]
pub struct Names {
    include: Vec<WildMatch>,
    exclude: Vec<WildMatch>,
}

impl Names {
    fn new(include: &[String], exclude: &[String]) -> Self {
        let patterns = |texts: &[String]| texts.iter().map(|text| WildMatch::new(text)).collect();
        Self {
            include: patterns(include),
            exclude: patterns(exclude),
        }
    }

    fn fit(&self, name: &str) -> bool {
        let any = |patterns: &[WildMatch]| patterns.iter().any(|pattern| pattern.matches(name));
        any(&self.include) && !any(&self.exclude)
    }
}

/// Which rooms are joined.
#[derive(Debug, Clone)]
pub struct RoomSelection {
    /// Joined whether or not the server has them.
    pub always: Vec<String>,
    /// Of those that the server has; none if it is not to be asked.
    found: Option<Names>,
}

impl RoomSelection {
    pub fn new(config: &RoomsConfig) -> Self {
        let mut always = config.join.clone();
        always.sort();
        always.dedup();
        let found = Names::new(&config.include, &config.exclude);
        Self {
            always,
            found: config.discover.then_some(found),
        }
    }

    /// Whether a room that the server has is joined.
    pub fn fits(&self, name: &str) -> bool {
        self.is_static(name) || self.found.as_ref().is_some_and(|names| names.fit(name))
    }

    pub fn is_static(&self, name: &str) -> bool {
        self.always
            .binary_search_by(|known| known.as_str().cmp(name))
            .is_ok()
    }

    /// The rooms to ask the server for; empty for all of them, `None` if it need not be asked.
    pub fn asked_for(&self) -> Option<&[String]> {
        match &self.found {
            Some(_) => Some(&[]),
            None => Some(self.always.as_slice()).filter(|names| !names.is_empty()),
        }
    }
}

/// Who is transcribed, and what of them.
#[derive(Debug, Clone)]
pub struct Selection {
    identities: Names,
    attributes: BTreeMap<String, WildMatch>,
    sources: Vec<AudioSource>,
    /// Which attribute says it.
    priority: Option<String>,
}

impl Selection {
    pub fn new(config: &ParticipantsConfig) -> Self {
        let attributes = config.attributes.iter();
        Self {
            identities: Names::new(&config.include, &config.exclude),
            attributes: attributes
                .map(|(name, pattern)| (name.clone(), WildMatch::new(pattern)))
                .collect(),
            sources: config.sources.clone(),
            priority: config.priority_attribute.clone(),
        }
    }

    /// Whether somebody is to be transcribed. Callers by telephone are people, as are those whose
    /// audio is brought in from elsewhere; agents and recorders never are.
    pub fn participant(
        &self,
        kind: ParticipantKind,
        identity: &str,
        attributes: &HashMap<String, String>,
    ) -> bool {
        let person = !matches!(kind, ParticipantKind::Agent | ParticipantKind::Egress);
        let has = |(name, pattern): (&String, &WildMatch)| {
            attributes
                .get(name)
                .is_some_and(|value| pattern.matches(value))
        };
        person && self.identities.fit(identity) && self.attributes.iter().all(has)
    }

    /// The priority of somebody with these attributes; 0 if they say nothing of it.
    pub fn priority(&self, attributes: &HashMap<String, String>) -> i32 {
        let said = self.priority.as_ref().and_then(|name| attributes.get(name));
        said.and_then(|said| said.trim().parse().ok()).unwrap_or(0)
    }

    /// Whether an audio track is one of those that are transcribed.
    pub fn source(&self, source: TrackSource) -> bool {
        let source = match source {
            TrackSource::Microphone => AudioSource::Microphone,
            TrackSource::ScreenshareAudio => AudioSource::ScreenShareAudio,
            TrackSource::Unknown => AudioSource::Unknown,
            TrackSource::Camera | TrackSource::Screenshare => return false,
        };
        self.sources.contains(&source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn stars_and_question_marks_are_wild_and_everything_else_is_itself() {
        let fits = |pattern: &str, name: &str| Names::new(&strings(&[pattern]), &[]).fit(name);
        assert!(fits("*", "") && fits("*", "a/b.c d"));
        assert!(fits("team-*", "team-a/1") && !fits("team-*", "a team-1"));
        assert!(fits("r?om", "röom") && !fits("r?om", "rom"));
        assert!(fits("a[b].{c,d}\\", "a[b].{c,d}\\") && !fits("a[b]", "ab"));
        assert!(!fits("A", "a"), "names are case-sensitive in LiveKit");
    }

    #[test]
    fn what_is_excluded_is_out_even_if_included() {
        let names = Names::new(&strings(&["team-*", "lobby"]), &strings(&["*-test"]));
        assert!(names.fit("team-a") && names.fit("lobby"));
        assert!(!names.fit("team-test") && !names.fit("other"));
        assert!(!Names::new(&[], &[]).fit("anything"));
    }

    fn rooms(join: &[&str], discover: bool) -> RoomSelection {
        RoomSelection::new(&RoomsConfig {
            identity: "roomwarden".into(),
            hidden: false,
            join: strings(join),
            discover,
            include: strings(&["team-*"]),
            exclude: strings(&["*-test"]),
            poll_interval_ms: 1000,
            reconcile_interval_ms: 5000,
        })
    }

    #[test]
    fn rooms_of_the_list_are_joined_whatever_the_patterns_say() {
        let both = rooms(&["z-test", "a", "a"], true);
        assert_eq!(both.always, ["a", "z-test"]);
        assert!(both.fits("z-test") && both.fits("team-1") && !both.fits("team-test"));
        assert_eq!(both.asked_for(), Some(&[][..]));
        let listed = rooms(&["a"], false);
        assert!(listed.fits("a") && !listed.fits("team-1"));
        assert_eq!(listed.asked_for(), Some(&strings(&["a"])[..]));
        assert_eq!(rooms(&[], false).asked_for(), None);
    }

    fn selection(attributes: &[(&str, &str)], sources: &[AudioSource]) -> Selection {
        Selection::new(&ParticipantsConfig {
            include: strings(&["*"]),
            exclude: strings(&["bot-?"]),
            sources: sources.into(),
            priority_attribute: None,
            attributes: attributes
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        })
    }

    #[test]
    fn people_are_transcribed_and_agents_and_recorders_are_not() {
        let all = selection(&[], &[]);
        let fits = |kind, identity: &str| all.participant(kind, identity, &HashMap::new());
        for kind in [
            ParticipantKind::Standard,
            ParticipantKind::Sip,
            ParticipantKind::Ingress,
            ParticipantKind::Connector,
            ParticipantKind::Bridge,
        ] {
            assert!(fits(kind, "alice"), "{kind:?}");
        }
        assert!(!fits(ParticipantKind::Agent, "alice"));
        assert!(!fits(ParticipantKind::Egress, "alice"));
        assert!(!fits(ParticipantKind::Standard, "bot-1"));
    }

    #[test]
    fn every_attribute_must_be_there_and_fit() {
        let english = selection(&[("language", "en*"), ("consent", "yes")], &[]);
        let fits = |attributes: &[(&str, &str)]| {
            let attributes = attributes
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            english.participant(ParticipantKind::Standard, "alice", &attributes.collect())
        };
        assert!(fits(&[
            ("language", "en-GB"),
            ("consent", "yes"),
            ("more", "")
        ]));
        assert!(!fits(&[("language", "en-GB")]));
        assert!(!fits(&[("language", "de"), ("consent", "yes")]));
        assert!(!fits(&[]));
    }

    #[test]
    fn only_the_sources_that_are_named() {
        let screen = selection(&[], &[AudioSource::ScreenShareAudio]);
        assert!(screen.source(TrackSource::ScreenshareAudio));
        assert!(!screen.source(TrackSource::Microphone));
        assert!(!screen.source(TrackSource::Unknown));
        assert!(!screen.source(TrackSource::Screenshare));
    }
}
