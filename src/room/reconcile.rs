//! Events get lost. This compares what the SDK believes of a room with the server's list of it,
//! and says what must have been missed. It decides and does nothing itself.

use std::collections::{HashMap, HashSet};

/// What must be seen in so many lists in a row before it is believed: a list may be from just
/// before an event, and event and list may be under way at the same time.
const ROUNDS: u32 = 2;

/// What the server says of a room.
#[derive(Debug, Default)]
pub struct Listing {
    pub participants: Vec<Listed>,
    /// Whether we are among them. Hidden ones need not be listed.
    pub lists_us: bool,
    /// Whether it has this very room; asked only if it does not list us.
    pub has_room: bool,
}

#[derive(Debug, Clone)]
pub struct Listed {
    /// Participant SID.
    pub sid: String,
    /// The tracks that should be transcribed and are not muted, if the participant is active.
    pub speaking: Vec<String>,
}

/// What must have been missed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Participants, by SID, who have left.
    pub departed: Vec<String>,
    /// Participants, by SID, of whom the SDK does not know, or not of all their tracks.
    pub unknown: Vec<String>,
    /// That we are out of the room, and how.
    pub out: Option<Out>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Out {
    /// The server has no such room any more.
    RoomGone,
    /// The room is there, and we are not in it.
    NotInRoom,
}

/// What earlier lists showed.
#[derive(Debug, Default)]
pub struct Reconciler {
    departed: HashMap<String, u32>,
    unknown: HashMap<String, u32>,
    out: u32,
}

impl Reconciler {
    /// Takes a new list. `sessions` are the participants who have one; `knows` says whether the SDK
    /// knows of a participant's track. While the SDK is not `connected` it is bound to know less
    /// than the server.
    pub fn compare<'a>(
        &mut self,
        listing: &Listing,
        sessions: impl Iterator<Item = &'a str>,
        knows: impl Fn(&str, &str) -> bool,
        connected: bool,
        hidden: bool,
    ) -> Missed {
        let listed: HashSet<&str> = listing
            .participants
            .iter()
            .map(|p| p.sid.as_str())
            .collect();
        let departed = sessions.filter(|sid| !listed.contains(sid));
        let departed = seen_again(&mut self.departed, departed);
        if !connected {
            self.unknown.clear();
            self.out = 0;
            return Missed {
                departed,
                ..Missed::default()
            };
        }
        let unknown = listing.participants.iter().filter(|participant| {
            let mut tracks = participant.speaking.iter();
            tracks.any(|track| !knows(&participant.sid, track))
        });
        let unknown = seen_again(&mut self.unknown, unknown.map(|p| p.sid.as_str()));
        let out = match listing {
            Listing { lists_us: true, .. } => None,
            Listing {
                has_room: false, ..
            } => Some(Out::RoomGone),
            _ if hidden => None,
            _ => Some(Out::NotInRoom),
        };
        self.out = out.map_or(0, |_| self.out + 1);
        Missed {
            departed,
            unknown,
            out: out.filter(|_| self.out >= ROUNDS),
        }
    }
}

/// Counts who is seen in this round; those seen often enough, in a row.
fn seen_again<'a>(
    counts: &mut HashMap<String, u32>,
    now: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let before = std::mem::take(counts);
    counts.extend(now.map(|sid| (sid.to_owned(), before.get(sid).map_or(1, |n| n + 1))));
    let enough = counts.iter().filter(|(_, rounds)| **rounds >= ROUNDS);
    enough.map(|(sid, _)| sid.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(sid: &str, speaking: &[&str]) -> Listed {
        let speaking = speaking.iter().map(|track| (*track).to_owned());
        Listed {
            sid: sid.to_owned(),
            speaking: speaking.collect(),
        }
    }

    fn listing(participants: &[Listed]) -> Listing {
        Listing {
            participants: participants.to_vec(),
            lists_us: true,
            has_room: true,
        }
    }

    /// A round in which the SDK is connected and knows of alice's first track.
    fn round(reconciler: &mut Reconciler, listing: &Listing, sessions: &[&str]) -> Missed {
        let knows = |participant: &str, track: &str| (participant, track) == ("PA_a", "TR_1");
        reconciler.compare(listing, sessions.iter().copied(), knows, true, false)
    }

    #[test]
    fn who_is_not_listed_twice_in_a_row_has_left() {
        let mut reconciler = Reconciler::default();
        let (there, gone) = (listing(&[listed("PA_a", &[])]), listing(&[]));
        for listing in [&gone, &there, &gone] {
            let missed = round(&mut reconciler, listing, &["PA_a"]);
            assert_eq!(missed, Missed::default());
        }
        assert_eq!(round(&mut reconciler, &gone, &["PA_a"]).departed, ["PA_a"]);
        assert_eq!(round(&mut reconciler, &gone, &[]), Missed::default());
        assert!(reconciler.departed.is_empty(), "nobody is remembered");
    }

    #[test]
    fn a_speaker_unknown_twice_in_a_row_was_missed() {
        let mut reconciler = Reconciler::default();
        let there = listing(&[listed("PA_a", &["TR_1"]), listed("PA_b", &["TR_1"])]);
        let muted = listing(&[listed("PA_b", &[])]);
        for listing in [&there, &muted, &there] {
            assert_eq!(round(&mut reconciler, listing, &[]).unknown, [""; 0]);
        }
        assert_eq!(round(&mut reconciler, &there, &[]).unknown, ["PA_b"]);
        let another = listing(&[listed("PA_a", &["TR_1", "TR_2"])]);
        round(&mut reconciler, &another, &[]);
        assert_eq!(round(&mut reconciler, &another, &[]).unknown, ["PA_a"]);
    }

    #[test]
    fn a_room_that_is_not_there_twice_in_a_row_is_gone() {
        let mut reconciler = Reconciler::default();
        let gone = Listing::default();
        assert_eq!(round(&mut reconciler, &gone, &[]).out, None);
        assert_eq!(round(&mut reconciler, &listing(&[]), &[]).out, None);
        assert_eq!(round(&mut reconciler, &gone, &[]).out, None);
        assert_eq!(round(&mut reconciler, &gone, &[]).out, Some(Out::RoomGone));
    }

    #[test]
    fn a_room_without_us_is_one_we_are_out_of_unless_we_are_hidden() {
        let without = Listing {
            has_room: true,
            ..Listing::default()
        };
        let mut reconciler = Reconciler::default();
        round(&mut reconciler, &without, &[]);
        assert_eq!(
            round(&mut reconciler, &without, &[]).out,
            Some(Out::NotInRoom)
        );
        let mut reconciler = Reconciler::default();
        for _ in 0..3 {
            let missed = reconciler.compare(&without, [].into_iter(), |_, _| true, true, true);
            assert_eq!(missed.out, None);
        }
    }

    #[test]
    fn while_the_sdk_reconnects_only_departures_are_believed() {
        let mut reconciler = Reconciler::default();
        let there = Listing {
            participants: vec![listed("PA_b", &["TR_1"])],
            ..Listing::default()
        };
        for _ in 0..3 {
            let sessions = ["PA_a"].into_iter();
            let missed = reconciler.compare(&there, sessions, |_, _| false, false, false);
            assert_eq!((missed.unknown.len(), missed.out), (0, None));
        }
        let missed = round(&mut reconciler, &there, &["PA_a"]);
        assert_eq!(missed.departed, ["PA_a"]);
        assert_eq!(
            (missed.unknown.len(), missed.out),
            (0, None),
            "counted anew"
        );
    }
}
