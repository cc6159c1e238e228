//! What may be asked of a running daemon, and what it keeps in mind of that: what is closed by
//! request is not opened again by the next review of its room.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// Participants and tracks of a room that are closed by request.
const MAX_CLOSED: usize = 4096;

/// A part of the tree, by the names that users know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Room(String),
    Participant {
        room: String,
        identity: String,
    },
    /// By its SID.
    Track {
        room: String,
        identity: String,
        track: String,
    },
}

impl Scope {
    pub fn room(&self) -> &str {
        match self {
            Self::Room(room) | Self::Participant { room, .. } | Self::Track { room, .. } => room,
        }
    }

    pub fn identity(&self) -> Option<&str> {
        match self {
            Self::Room(_) => None,
            Self::Participant { identity, .. } | Self::Track { identity, .. } => Some(identity),
        }
    }

    pub fn track(&self) -> Option<&str> {
        match self {
            Self::Room(_) | Self::Participant { .. } => None,
            Self::Track { track, .. } => Some(track),
        }
    }
}

/// Of a daemon, or passed on to a room of it.
pub enum Request {
    /// To close it on the one path, and to leave it closed while it lives.
    Close(Scope, Answer),
    /// To take back a request to close it.
    Reopen(Scope, Answer),
    /// To take no new rooms and participants, and to end with the last room.
    Drain(Answer),
    /// To take them again.
    Undrain(Answer),
}

/// The order is given, which is not yet the end of it; or there is no such thing.
pub type Answer = oneshot::Sender<Result<(), Refused>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    NoSuchRoom,
    NoSuchParticipant,
    NoSuchTrack,
    /// More is closed by request than is kept in mind.
    TooManyClosed,
    /// The daemon, or the room, is being closed.
    Closing,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSuchRoom => "the daemon is in no such room",
            Self::NoSuchParticipant => "there is no such participant in the room",
            Self::NoSuchTrack => "the participant has no such track",
            Self::TooManyClosed => "too much of the room is closed by request already",
            Self::Closing => "it is being closed",
        })
    }
}

/// Who is not transcribed in a room though they are selected. Outlives the room's supervisor, as
/// long as the room lives. All clones are one.
#[derive(Clone, Default)]
pub struct Exceptions(Arc<Mutex<Excepted>>);

#[derive(Default)]
struct Excepted {
    /// SIDs of participants and tracks, which no other ones will ever have, and that of the
    /// participant: who has left has no tracks any more by which these could be found.
    closed: HashMap<String, String>,
    /// While the daemon drains: the participants, by SID, who were there before.
    before_drain: Option<HashSet<String>>,
}

impl Exceptions {
    /// A participant, or a track of theirs, that is not to be transcribed.
    ///
    /// # Errors
    /// There are too many.
    pub fn close(&self, participant: &str, sid: &str) -> Result<(), Refused> {
        let mut excepted = self.excepted();
        if excepted.closed.len() >= MAX_CLOSED && !excepted.closed.contains_key(sid) {
            return Err(Refused::TooManyClosed);
        }
        let of = participant.to_owned();
        excepted.closed.insert(sid.to_owned(), of);
        Ok(())
    }

    /// A participant and all tracks of theirs, also when they are gone for good.
    pub fn forget(&self, participant: &str) {
        self.excepted().closed.retain(|_, of| of != participant);
    }

    pub fn is_closed(&self, sid: &str) -> bool {
        self.excepted().closed.contains_key(sid)
    }

    /// Whether a participant is not to be transcribed.
    pub fn keep_out(&self, participant: &str) -> bool {
        let excepted = self.excepted();
        let came_late = |before: &HashSet<String>| !before.contains(participant);
        excepted.closed.contains_key(participant)
            || excepted.before_drain.as_ref().is_some_and(came_late)
    }

    /// From now on nobody new; those who are `present` by the first call.
    pub fn drain(&self, present: impl Iterator<Item = String>) {
        let mut excepted = self.excepted();
        if excepted.before_drain.is_none() {
            excepted.before_drain = Some(present.collect());
        }
    }

    pub fn undrain(&self) {
        self.excepted().before_drain = None;
    }

    fn excepted(&self) -> MutexGuard<'_, Excepted> {
        // Every change is complete before anything that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_there_before_the_drain_stays() {
        let exceptions = Exceptions::default();
        exceptions.drain(["PA_1".to_owned()].into_iter());
        exceptions.drain(["PA_1".to_owned(), "PA_2".to_owned()].into_iter());
        assert!(!exceptions.keep_out("PA_1") && exceptions.keep_out("PA_2"));
        exceptions.undrain();
        assert!(!exceptions.keep_out("PA_2"));
    }

    #[test]
    fn what_is_closed_by_request_is_bounded_and_forgotten_with_its_participant() {
        let exceptions = Exceptions::default();
        let close = |participant, sid: &str| exceptions.close(participant, sid);
        assert_eq!(close("PA_1", "PA_1"), Ok(()));
        for n in 1..MAX_CLOSED - 1 {
            assert_eq!(close("PA_1", &format!("TR_{n}")), Ok(()));
        }
        assert_eq!(close("PA_2", "TR_of_2"), Ok(()));
        assert_eq!(close("PA_2", "PA_2"), Err(Refused::TooManyClosed));
        assert_eq!(close("PA_2", "TR_of_2"), Ok(()));
        exceptions.forget("PA_1");
        assert!(!exceptions.keep_out("PA_1") && !exceptions.is_closed("TR_1"));
        assert_eq!(close("PA_2", "PA_2"), Ok(()));
        assert!(exceptions.keep_out("PA_2") && exceptions.is_closed("TR_of_2"));
    }
}
