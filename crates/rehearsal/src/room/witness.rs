//! What the server saw for itself: every room and participant, when each came and went, and why.
//!
//! The record knows nothing of sockets or protocols; the rest of the server writes it through a
//! [`Recorder`] and tests read it as a [`Witness`].

use super::{
    agents::{JobRecord, WorkerRecord},
    webhooks::WebhookRecord,
};
use livekit_protocol::DisconnectReason;
use serde::Serialize;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Ended rooms beyond this many are forgotten, oldest first.
const MAX_ENDED_ROOMS: usize = 10_000;
/// Departed participants of one room beyond this many are forgotten, oldest first.
const MAX_DEPARTED: usize = 10_000;
/// Spells of speech of one track beyond this many are forgotten, oldest first.
const MAX_SPELLS: usize = 1_000;
/// Unpublished tracks of one participant beyond this many are forgotten, oldest first.
const MAX_UNPUBLISHED: usize = 1_000;

/// A point in time, on the server's own clock and on the wall clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stamp {
    /// Milliseconds since the server started (monotonic).
    pub ms: u64,
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
}

/// Everything the server has seen since it started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Witness {
    /// When the server started, in milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// Live and past rooms, oldest first. A name can occur more than once; each has its own sid.
    pub rooms: Vec<RoomRecord>,
    /// Past rooms that are no longer listed because there were too many.
    pub forgotten_rooms: u64,
    /// Agent workers in the order they registered.
    pub workers: Vec<WorkerRecord>,
    /// Jobs that workers were asked to take, or would have been if any had been free.
    pub jobs: Vec<JobRecord>,
    /// Events that webhooks were sent for, if any URL is configured.
    pub webhooks: Vec<WebhookRecord>,
}

/// One room, from creation to end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoomRecord {
    pub sid: String,
    pub name: String,
    pub created: Stamp,
    pub ended: Option<Stamp>,
    /// `ROOM_DELETED` (by the API), `ROOM_CLOSED` (empty for too long) or `SERVER_SHUTDOWN`.
    pub end_reason: Option<DisconnectReason>,
    /// Present and departed participants in the order they joined. An identity that joined
    /// twice is listed twice, with two sids.
    pub participants: Vec<ParticipantRecord>,
    /// Data packets received from participants and the API.
    pub data_packets: u64,
}

/// One stay of a participant in a room.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ParticipantRecord {
    pub sid: String,
    pub identity: String,
    /// `STANDARD`, `AGENT`, `EGRESS`, `INGRESS`, `SIP` or another name from LiveKit's protocol.
    pub kind: &'static str,
    pub hidden: bool,
    /// Whether the client uses one peer connection (`/rtc/v1`) or two (`/rtc`).
    pub single_peer_connection: bool,
    pub joined: Stamp,
    /// When its (primary) peer connection was first established.
    pub active: Option<Stamp>,
    pub left: Option<Stamp>,
    pub reason: Option<DisconnectReason>,
    /// How often the client came back on a new websocket within the same stay.
    pub resumes: u32,
    pub tracks: Vec<TrackRecord>,
}

/// One published track.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TrackRecord {
    pub sid: String,
    pub name: String,
    /// `MICROPHONE`, `CAMERA` and so on.
    pub source: &'static str,
    pub muted: bool,
    pub published: Stamp,
    pub unpublished: Option<Stamp>,
    /// RTP packets received; refreshed a few times a second.
    pub packets: u64,
    /// When it carried speech, by the levels of its packets (RFC 6464), oldest first; a pause of
    /// 400 ms ends a spell. The newest is refreshed a few times a second.
    pub spells: Vec<Spell>,
}

/// A while in which somebody spoke.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spell {
    /// When the first packet of speech came.
    pub from: Stamp,
    /// When the last one came.
    pub until: Stamp,
    pub packets: u64,
}

impl Witness {
    /// The newest room of this name, live or past.
    pub fn room(&self, name: &str) -> Option<&RoomRecord> {
        self.rooms.iter().rev().find(|r| r.name == name)
    }

    /// Rooms that have not ended.
    pub fn live_rooms(&self) -> impl Iterator<Item = &RoomRecord> {
        self.rooms.iter().filter(|r| r.ended.is_none())
    }
}

impl RoomRecord {
    /// The newest stay of this identity.
    pub fn participant(&self, identity: &str) -> Option<&ParticipantRecord> {
        self.participants
            .iter()
            .rev()
            .find(|p| p.identity == identity)
    }

    /// Participants that have not left.
    pub fn present(&self) -> impl Iterator<Item = &ParticipantRecord> {
        self.participants.iter().filter(|p| p.left.is_none())
    }
}

/// The writing end of the record. Readers are woken by each change except packet counts and what goes
/// with them.
pub(super) struct Recorder {
    epoch: Instant,
    sender: watch::Sender<Witness>,
}

impl Recorder {
    pub fn new() -> (Self, watch::Receiver<Witness>) {
        let started_unix_ms = unix_ms();
        let (sender, receiver) = watch::channel(Witness {
            started_unix_ms,
            ..Witness::default()
        });
        let epoch = Instant::now();
        (Self { epoch, sender }, receiver)
    }

    pub fn room_created(&self, sid: &str, name: &str) {
        let room = RoomRecord {
            sid: sid.to_owned(),
            name: name.to_owned(),
            created: self.now(),
            ..RoomRecord::default()
        };
        self.sender.send_modify(|w| {
            w.rooms.push(room);
            let forgotten = forget(&mut w.rooms, MAX_ENDED_ROOMS, |r| r.ended.is_some());
            w.forgotten_rooms += forgotten;
        });
    }

    pub fn room_ended(&self, sid: &str, reason: DisconnectReason) {
        let now = self.now();
        self.room(sid, |r| {
            r.ended = Some(now);
            r.end_reason = Some(reason);
        });
    }

    pub fn data_received(&self, room: &str) {
        self.room(room, |r| r.data_packets += 1);
    }

    pub fn joined(&self, room: &str, participant: ParticipantRecord) {
        let joined = self.now();
        self.room(room, |r| {
            r.participants.push(ParticipantRecord {
                joined,
                ..participant
            });
            forget(&mut r.participants, MAX_DEPARTED, |p| p.left.is_some());
        });
    }

    pub fn active(&self, room: &str, participant: &str) {
        let now = self.now();
        self.participant(room, participant, |p| p.active = p.active.or(Some(now)));
    }

    pub fn resumed(&self, room: &str, participant: &str) {
        self.participant(room, participant, |p| p.resumes += 1);
    }

    pub fn left(&self, room: &str, participant: &str, reason: DisconnectReason) {
        let now = self.now();
        self.participant(room, participant, |p| {
            p.left = Some(now);
            p.reason = Some(reason);
            for t in &mut p.tracks {
                t.unpublished = t.unpublished.or(Some(now));
            }
        });
    }

    pub fn published(&self, room: &str, participant: &str, track: TrackRecord) {
        let published = self.now();
        self.participant(room, participant, |p| {
            p.tracks.push(TrackRecord { published, ..track });
            forget(&mut p.tracks, MAX_UNPUBLISHED, |t| t.unpublished.is_some());
        });
    }

    pub fn unpublished(&self, room: &str, participant: &str, track: &str) {
        let now = self.now();
        self.track(room, participant, track, |t| t.unpublished = Some(now));
    }

    pub fn muted(&self, room: &str, participant: &str, track: &str, muted: bool) {
        self.track(room, participant, track, |t| t.muted = muted);
    }

    pub fn spell_begun(&self, room: &str, participant: &str, track: &str, spell: Spell) {
        self.track(room, participant, track, |t| {
            t.spells.push(spell);
            forget(&mut t.spells, MAX_SPELLS, |_| true);
        });
    }

    /// Refreshes a packet count, and the newest spell, without waking readers.
    pub fn packets(
        &self,
        room: &str,
        participant: &str,
        track: &str,
        packets: u64,
        spell: Option<&Spell>,
    ) {
        self.sender.send_if_modified(|w| {
            let found = find(w, room, participant)
                .and_then(|p| p.tracks.iter_mut().rev().find(|t| t.sid == track));
            if let Some(t) = found {
                t.packets = packets;
                if let Some((newest, spell)) = t.spells.last_mut().zip(spell) {
                    *newest = *spell;
                }
            }
            false
        });
    }

    /// Changes the record at a moment.
    pub fn change(&self, change: impl FnOnce(&mut Witness, Stamp)) {
        let now = self.now();
        self.sender.send_modify(|w| change(w, now));
    }

    fn room(&self, sid: &str, change: impl FnOnce(&mut RoomRecord)) {
        self.sender.send_if_modified(|w| {
            let room = w.rooms.iter_mut().rev().find(|r| r.sid == sid);
            room.map(change).is_some()
        });
    }

    fn participant(&self, room: &str, sid: &str, change: impl FnOnce(&mut ParticipantRecord)) {
        self.sender
            .send_if_modified(|w| find(w, room, sid).map(change).is_some());
    }

    fn track(
        &self,
        room: &str,
        participant: &str,
        sid: &str,
        change: impl FnOnce(&mut TrackRecord),
    ) {
        self.participant(room, participant, |p| {
            if let Some(t) = p.tracks.iter_mut().rev().find(|t| t.sid == sid) {
                change(t);
            }
        });
    }

    pub fn now(&self) -> Stamp {
        Stamp {
            ms: self.epoch.elapsed().as_millis() as u64,
            unix_ms: unix_ms(),
        }
    }
}

/// Milliseconds since the Unix epoch; 0 on a machine whose clock is before it.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

fn find<'a>(w: &'a mut Witness, room: &str, sid: &str) -> Option<&'a mut ParticipantRecord> {
    let room = w.rooms.iter_mut().rev().find(|r| r.sid == room)?;
    room.participants.iter_mut().rev().find(|p| p.sid == sid)
}

/// Drops the oldest finished entries beyond `limit` finished ones; says how many.
pub(super) fn forget<T>(list: &mut Vec<T>, limit: usize, finished: impl Fn(&T) -> bool) -> u64 {
    if list.len() <= limit {
        return 0;
    }
    let ended = list.iter().filter(|t| finished(t)).count();
    let mut excess = ended.saturating_sub(limit);
    let forgotten = excess as u64;
    list.retain(|t| {
        let drop = excess > 0 && finished(t);
        excess -= usize::from(drop);
        !drop
    });
    forgotten
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_is_recorded_from_join_to_leave() {
        let (recorder, receiver) = Recorder::new();
        recorder.room_created("RM_1", "lobby");
        let who = ParticipantRecord {
            sid: "PA_1".into(),
            identity: "ann".into(),
            ..ParticipantRecord::default()
        };
        recorder.joined("RM_1", who);
        let track = TrackRecord {
            sid: "TR_1".into(),
            ..TrackRecord::default()
        };
        recorder.published("RM_1", "PA_1", track);
        recorder.left("RM_1", "PA_1", DisconnectReason::ParticipantRemoved);
        recorder.room_ended("RM_1", DisconnectReason::RoomDeleted);

        let witness = receiver.borrow().clone();
        assert_eq!(witness.live_rooms().count(), 0);
        let room = witness.room("lobby").expect("room");
        assert_eq!(room.present().count(), 0);
        let ann = room.participant("ann").expect("participant");
        assert_eq!(ann.reason, Some(DisconnectReason::ParticipantRemoved));
        assert!(ann.tracks[0].unpublished.is_some());
        let json = serde_json::to_value(&witness).expect("json");
        assert_eq!(
            json["rooms"][0]["participants"][0]["reason"],
            "PARTICIPANT_REMOVED"
        );
    }

    #[test]
    fn only_finished_entries_are_forgotten() {
        let mut list: Vec<u32> = vec![1, 2, 3, 4, 5, 6];
        assert_eq!(forget(&mut list, 1, |n| n % 2 == 0), 2);
        assert_eq!(list, [1, 3, 5, 6]);
    }
}
