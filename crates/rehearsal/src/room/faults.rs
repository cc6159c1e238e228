//! Faults on request: what a room server, or the network to it, does on a bad day.
//!
//! [`Faults`] hold until they are replaced. What happens once to one participant is a
//! [`Mishap`].

use super::{
    core::Core,
    participant::{Key, Track},
    webhooks::Event,
};
use livekit_protocol::{self as proto, signal_response::Message};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Departures that may be held back at a time; beyond that the oldest is told early.
const MAX_HELD: usize = 10_000;

/// Faults that hold until they are replaced. In JSON every field may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Whose signalling websockets are cut, at once and whenever they come back.
    pub signal_dropped: Whom,
    /// Whose signalling websockets stay open with nothing read from them or written to them. A
    /// client for whom too much waits is given up (SIGNAL_CLOSE).
    pub signal_frozen: Whom,
    /// Of whom those already in the room are told nothing as long as they stay: neither that they
    /// are there nor what they publish. Who joins later learns it, and the API knows.
    pub arrivals_lost: Whom,
    /// Of whom nobody is told that they are there or what they publish. The API knows.
    pub unseen: Whom,
    /// Whose departure nobody is told of: neither by signalling nor by webhook. The API knows.
    pub departures_lost: Whom,
    /// Whose departure is told `lateness_ms` late.
    pub departures_late: Whom,
    pub lateness_ms: u64,
    /// Whose departure is told after the next news of another participant of the room. If there
    /// is none, after the room's end.
    pub departures_out_of_order: Whom,
    /// Whose departure is told twice.
    pub departures_twice: Whom,
    /// Whose media is received and not forwarded.
    pub media_stopped: Whom,
    /// Of whom every datagram is lost in both directions: media, data, and what keeps the
    /// connection up.
    pub datagrams_lost: Whom,
    /// Whose tokens are refused (401), as if they had expired.
    pub tokens_refused: Whom,
    /// The API refuses every call (401).
    pub api_refused: bool,
    /// The API answers every call with an error (503).
    pub api_failing: bool,
    /// Whom the API cannot remove, as if the node that they are on were gone: it waits for that,
    /// and then says so (408).
    pub removals_unanswered: Whom,
    /// Jobs are not listed among those of their dispatches, as with LiveKit's server for up to 5 s
    /// while it has not yet learned which workers there are.
    pub jobs_unlisted: bool,
    /// Webhooks about whom are recorded and not sent; if about everyone, those about rooms too.
    pub webhooks_lost: Whom,
}

/// Participants by identity, in any room. In JSON `"nobody"`, `"everyone"` or
/// `{"identities": ["ann"]}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whom {
    #[default]
    Nobody,
    Everyone,
    Identities(BTreeSet<String>),
}

/// What happens once, to one participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mishap {
    /// The signalling websocket is cut without a word. The client may come back.
    DropSignal,
    /// Nothing comes through any more in either direction: no packet of the media, and nothing on
    /// the signalling websocket, which is not even closed. Nobody says farewell: each side has to
    /// notice for itself. The client cannot take up the stay again (503), but it can join anew.
    Vanish,
}

/// A departure that is still to be told.
pub(super) struct Departure {
    /// The room as it was then.
    room: proto::Room,
    info: proto::ParticipantInfo,
    hidden: bool,
    /// Whether media had come up.
    was_active: bool,
    tracks: Vec<proto::TrackInfo>,
    /// When to tell it; None after the next news of the room.
    due: Option<Instant>,
}

impl Whom {
    /// One participant.
    pub fn identity(identity: &str) -> Self {
        Self::Identities([identity.to_owned()].into())
    }

    pub fn includes(&self, identity: &str) -> bool {
        match self {
            Self::Nobody => false,
            Self::Everyone => true,
            Self::Identities(identities) => identities.contains(identity),
        }
    }
}

impl Core {
    pub(super) fn set_faults(&mut self, faults: Faults) {
        self.faults.send_replace(faults);
        let keys: Vec<_> = self.participants.keys().copied().collect();
        for key in keys {
            self.apply_faults(key);
            let sources = self.participants.get(&key).map(|p| {
                let stopped = self
                    .faults
                    .borrow()
                    .media_stopped
                    .includes(&p.info.identity);
                let sources = p.tracks.iter().map(|t| t.source);
                (stopped, sources.collect::<Vec<_>>())
            });
            let (stopped, sources) = sources.unwrap_or_default();
            for source in sources {
                self.media.stop(source, stopped);
            }
        }
    }

    /// Brings the faults upon a participant who has just got a websocket or a connection.
    pub(super) fn apply_faults(&mut self, key: Key) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        let faults = self.faults.borrow();
        if faults.signal_dropped.includes(&p.info.identity) {
            p.signal.cut.cancel();
        }
        let lost = faults.datagrams_lost.includes(&p.info.identity);
        let silent = lost || p.signal.vanished.is_cancelled();
        for id in [p.publisher, p.subscriber].into_iter().flatten() {
            self.media.silence(id, silent);
        }
    }

    /// Whether news of a participant are kept from those in the room.
    pub(super) fn is_untold(&self, identity: &str) -> bool {
        let faults = self.faults.borrow();
        faults.arrivals_lost.includes(identity) || faults.unseen.includes(identity)
    }

    /// False if there is no such participant.
    pub(super) fn befall(&mut self, room: &str, identity: &str, mishap: Mishap) -> bool {
        let room = self.rooms.get(room);
        let key = room.and_then(|r| r.members.get(identity));
        let Some(p) = key.and_then(|key| self.participants.get(key)) else {
            return false;
        };
        match mishap {
            Mishap::DropSignal => p.signal.cut.cancel(),
            Mishap::Vanish => {
                p.signal.vanished.cancel();
                for id in [p.publisher, p.subscriber].into_iter().flatten() {
                    self.media.silence(id, true);
                }
            }
        }
        true
    }

    /// Tells the room and the webhooks of a departure, or does not, as the faults have it.
    pub(super) fn departed(
        &mut self,
        room: proto::Room,
        info: proto::ParticipantInfo,
        hidden: bool,
        was_active: bool,
        tracks: &[Track],
    ) {
        let mut departure = Departure {
            room,
            info,
            hidden,
            was_active,
            tracks: tracks.iter().map(|t| t.info.clone()).collect(),
            due: None,
        };
        let faults = self.faults.borrow().clone();
        let who = departure.info.identity.as_str();
        if faults.departures_lost.includes(who) {
            return;
        }
        if faults.departures_late.includes(who) {
            let late = Duration::from_millis(faults.lateness_ms);
            // Too late for the clock is never.
            let Some(due) = Instant::now().checked_add(late) else {
                return;
            };
            departure.due = Some(due);
            return self.hold(departure);
        }
        if faults.departures_out_of_order.includes(who) {
            return self.hold(departure);
        }
        self.tell_departure(&departure);
        self.tell_overtaken_departures(&departure.room.name);
        if faults.departures_twice.includes(who) {
            self.tell_departure(&departure);
        }
    }

    /// Tells departures that are late enough.
    pub(super) fn tell_late_departures(&mut self, now: Instant) {
        self.tell_held(|d| d.due.is_some_and(|due| due <= now));
    }

    /// There was other news of the room: tells departures that were to come after it.
    pub(super) fn tell_overtaken_departures(&mut self, room: &str) {
        self.tell_held(|d| d.due.is_none() && d.room.name == room);
    }

    fn hold(&mut self, departure: Departure) {
        self.held_departures.push(departure);
        if self.held_departures.len() > MAX_HELD {
            let oldest = self.held_departures.remove(0);
            self.tell_departure(&oldest);
        }
    }

    fn tell_held(&mut self, ready: impl Fn(&Departure) -> bool) {
        if self.held_departures.iter().any(&ready) {
            let held = &mut self.held_departures;
            let ready: Vec<_> = held.extract_if(.., |d| ready(d)).collect();
            for departure in &ready {
                self.tell_departure(departure);
            }
        }
    }

    fn tell_departure(&mut self, departure: &Departure) {
        let Departure { room, info, .. } = departure;
        for track in &departure.tracks {
            self.notify(room, &Event::TrackUnpublished(info, track));
        }
        let mut webhook_info = info.clone();
        webhook_info.tracks.clear();
        let event = match departure.was_active {
            true => Event::ParticipantLeft(&webhook_info),
            false => Event::ParticipantConnectionAborted(&webhook_info),
        };
        self.notify(room, &event);
        // Another room may have taken the name meanwhile.
        let current = self.rooms.get(&room.name);
        if current.is_none_or(|r| r.info.sid != room.sid) {
            return;
        }
        for key in self.members(&room.name) {
            self.negotiate(key);
        }
        if !departure.hidden {
            let participants = vec![info.clone()];
            let update = Message::Update(proto::ParticipantUpdate { participants });
            self.broadcast(&room.name, None, update);
            self.announce_room(&room.name);
        }
    }

    /// Queues a webhook, or only records it if the faults say so.
    pub(super) fn notify(&mut self, room: &proto::Room, event: &Event<'_>) {
        let lost = match &self.faults.borrow().webhooks_lost {
            Whom::Everyone => true,
            whom => event.participant().is_some_and(|p| whom.includes(p)),
        };
        self.webhooks.notify(room, event, lost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_only_what_is_wrong() {
        let faults: Faults = serde_json::from_str(
            r#"{"signal_frozen": "everyone", "departures_lost": {"identities": ["ann"]}}"#,
        )
        .expect("valid");
        assert!(faults.signal_frozen.includes("bob"));
        assert!(faults.departures_lost.includes("ann"));
        assert!(!faults.departures_lost.includes("bob"));
        assert_eq!(faults.media_stopped, Whom::Nobody);
        serde_json::from_str::<Faults>(r#"{"unknown": 1}"#).expect_err("a typing error");
    }
}
