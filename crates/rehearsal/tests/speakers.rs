//! Simulated participants, as the room server saw them.

mod room_support;

use futures_util::FutureExt as _;
use livekit::webrtc::encoded_audio::EncodedAudioStream;
use livekit::{Room, RoomEvent, RoomOptions, track::RemoteTrack};
use livekit_protocol::{DisconnectReason, JobStatus as Reported, JobType};
use rehearsal::{
    room::{Config, Faults, JobStatus, Mishap, ParticipantRecord, Server, Spell, Witness},
    speaker::{Conversation, Place, Recording, Speaker},
};
use room_support::{LIMIT, http, may_join, start, token, wait, worker::Worker};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};
use tokio_stream::StreamExt as _;

fn recording() -> Recording {
    let file = include_bytes!("../assets/anna.opus");
    Recording::from_ogg(file).expect("a recording")
}

async fn join(server: &Server, identity: &str, conversation: Option<&Conversation>) -> Speaker {
    let place = Place {
        url: &server.url(),
        api_key: server.api_key(),
        api_secret: server.api_secret(),
        room: "lobby",
        identity,
    };
    let speaker = match conversation {
        Some(conversation) => Speaker::converse(place, recording(), conversation).await,
        None => Speaker::join(place, recording()).await,
    };
    speaker.expect("joins")
}

/// The newest stay of this identity.
fn stay<'a>(witness: &'a Witness, identity: &str) -> Option<&'a ParticipantRecord> {
    witness.room("lobby")?.participant(identity)
}

/// Waits until this one is heard.
async fn speaks(server: &Server, identity: &str) -> Witness {
    wait(server, "speech", |w| spells(w, identity).next().is_some()).await
}

fn spells(witness: &Witness, identity: &str) -> impl Iterator<Item = Spell> {
    let tracks = stay(witness, identity).map(|p| p.tracks.clone());
    tracks
        .unwrap_or_default()
        .into_iter()
        .flat_map(|t| t.spells)
}

/// Who spoke when, in the order in which they began; the newest spell of each may not be over.
fn turns(witness: &Witness) -> Vec<(Spell, String)> {
    let room = witness.room("lobby").expect("the room");
    let mut turns = Vec::new();
    for p in &room.participants {
        let spells = p.tracks.iter().flat_map(|t| &t.spells);
        turns.extend(spells.map(|spell| (*spell, p.identity.clone())));
    }
    turns.sort_by_key(|(spell, _)| spell.from.ms);
    turns
}

#[tokio::test(flavor = "multi_thread")]
async fn speakers_in_a_conversation_take_turns() {
    let server = start(Config::default());
    // Longer than what the witness takes for one spell.
    let conversation = Conversation::new(Duration::from_millis(500));
    let begun = Instant::now();
    let ann = join(&server, "ann", Some(&conversation)).await;
    let bob = join(&server, "bob", Some(&conversation)).await;
    let cid = join(&server, "cid", Some(&conversation)).await;
    let seventh = wait(&server, "seven turns", |w| {
        w.room("lobby").is_some() && turns(w).len() == 7
    })
    .await;
    // Ann may have said more before the others came. Her turn is the one that is not over.
    let order: Vec<_> = turns(&seventh).into_iter().map(|(_, who)| who).collect();
    let first = order.iter().position(|who| who == "bob").expect("bob");
    let round = ["bob", "cid", "ann"].iter().cycle();
    assert!(order[first..].iter().eq(round.take(7 - first)), "{order:?}");

    // Bob leaves at the beginning of a turn of his own: the others go on.
    let bobs = |w: &Witness| spells(w, "bob").count();
    let told = bobs(&seventh);
    wait(&server, "bob's turn", |w| bobs(w) > told).await;
    bob.leave().await;
    let left = turns(&server.witness()).len();
    let last = wait(&server, "four more", |w| turns(w).len() >= left + 4).await;
    let after: Vec<_> = turns(&last).split_off(left);
    let after: Vec<_> = after.iter().map(|(_, who)| who.as_str()).collect();
    assert_eq!(after, ["cid", "ann", "cid", "ann"]);

    ann.leave().await;
    cid.leave().await;
    let took = begun.elapsed();
    let witness = server.shutdown().await;
    let turns = turns(&witness);
    for pair in turns.windows(2) {
        let [(one, _), (next, _)] = pair else {
            unreachable!("windows of two")
        };
        assert!(one.until.ms < next.from.ms, "both at once: {turns:#?}");
    }
    // The shortest phrase takes more than a second. Bob broke one off, and whoever was last.
    let whole = turns
        .iter()
        .filter(|(spell, _)| spell.packets >= 40)
        .count();
    assert!(whole + 2 >= turns.len(), "{turns:#?}");
    // Who is silent sends as many packets as who speaks.
    for identity in ["ann", "cid"] {
        let packets = stay(&witness, identity).expect("the stay").tracks[0].packets;
        let spoken: u64 = spells(&witness, identity).map(|s| s.packets).sum();
        let most = took.as_millis() as u64 / 20;
        assert!(
            (most * 8 / 10..=most).contains(&packets) && spoken < packets / 2,
            "{identity}: {packets} packets of {most}, {spoken} of them speech"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_speaker_is_noticed_and_comes_back_as_a_new_one() {
    let runtime = Handle::current();
    let before = runtime.metrics().num_alive_tasks();
    let server = start(Config {
        media_timeout: Duration::from_secs(1),
        ..Config::default()
    });
    let bob = join(&server, "bob", None).await;
    let ann = join(&server, "ann", None).await;
    speaks(&server, "ann").await;
    let packets = |w: &Witness| stay(w, "ann").map(|p| p.tracks[0].packets);

    ann.vanish(&server).await;
    let gone = server.witness();
    assert_eq!(stay(&gone, "ann").and_then(|p| p.left), None, "no farewell");
    let vanished = Instant::now();
    let told = wait(&server, "noticed", |w| {
        stay(w, "ann").is_some_and(|p| p.left.is_some())
    })
    .await;
    let first = stay(&told, "ann").expect("the stay");
    assert_eq!(first.reason, Some(DisconnectReason::ConnectionTimeout));
    // A close of the media would have been noticed after the time-out alone.
    let took = vanished.elapsed();
    assert!(took > Duration::from_secs(3), "noticed after {took:?}");
    println!("noticed after {took:?}");
    // She has neither come back by herself nor sent anything.
    assert_eq!(first.resumes, 0);
    let stays = |w: &Witness| {
        let room = w.room("lobby").expect("the room");
        let stays = room.participants.iter().filter(|p| p.identity == "ann");
        stays.map(|p| p.sid.clone()).collect::<Vec<_>>()
    };
    assert_eq!(stays(&told).len(), 1);
    let sent = packets(&told)
        .zip(packets(&gone))
        .map(|(now, then)| now - then);
    assert!(sent <= Some(25), "{sent:?} packets after she vanished");

    let ann = join(&server, "ann", None).await;
    let back = speaks(&server, "ann").await;
    // Before anybody notices, her own return ends the stay.
    ann.vanish(&server).await;
    let ann = join(&server, "ann", None).await;
    let again = speaks(&server, "ann").await;
    let room = again.room("lobby").expect("the room");
    let reasons: Vec<_> = room.participants.iter().map(|p| p.reason).collect();
    let (timed_out, duplicate) = (
        DisconnectReason::ConnectionTimeout,
        DisconnectReason::DuplicateIdentity,
    );
    assert_eq!(reasons, [None, Some(timed_out), Some(duplicate), None]);
    let (second, third) = (stays(&back), stays(&again));
    assert_eq!((second.len(), third.len()), (2, 3));
    assert!(third[..2] == second && !second.contains(&third[2]) && second[0] != second[1]);
    ann.leave().await;
    bob.leave().await;
    server.shutdown().await;
    // Nothing is left of any of them.
    let ended = async {
        while runtime.metrics().num_alive_tasks() > before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, ended).await.expect("all tasks end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_speaker_leaves() {
    let server = start(Config::default());
    let ann = join(&server, "ann", None).await;
    speaks(&server, "ann").await;
    drop(ann);
    let left = wait(&server, "left", |w| {
        stay(w, "ann").is_some_and(|p| p.left.is_some())
    })
    .await;
    let reason = stay(&left, "ann").and_then(|p| p.reason);
    assert_eq!(reason, Some(DisconnectReason::ClientInitiated));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_media_reaches_the_server_and_nobody_else() {
    let server = start(Config::default());
    let ann = join(&server, "ann", None).await;
    let bob = join(&server, "bob", None).await;
    let mut ear = Ear::join(&server).await;
    ear.hears("ann").await;
    ear.hears("bob").await;

    let put = async |faults: Value| {
        let json = [("content-type", "application/json")];
        let body = faults.to_string();
        let put = http(&server, "PUT", "/faults", &json, body.as_bytes()).await;
        assert_eq!(put.status, 204);
    };
    put(json!({"media_stopped": {"identities": ["ann"]}})).await;
    // What was on its way has come by then.
    ear.hears("bob").await;
    ear.drain("ann");
    ear.hears("bob").await;
    assert_eq!(ear.drain("ann"), 0);
    put(json!({"media_stopped": "everyone"})).await;
    let packets =
        |w: &Witness| ["ann", "bob"].map(|who| stay(w, who).expect("stay").tracks[0].packets);
    let more = async |than: [u64; 2]| {
        let come = async {
            while packets(&server.witness())
                .iter()
                .zip(than)
                .any(|(now, then)| *now < then + 25)
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LIMIT, come).await.expect("the server gets packets");
    };
    more(packets(&server.witness())).await;
    ear.drain("ann");
    ear.drain("bob");
    more(packets(&server.witness())).await;
    assert_eq!((ear.drain("ann"), ear.drain("bob")), (0, 0));
    server.set_faults(Faults::default()).await;
    ear.hears("ann").await;
    ear.hears("bob").await;

    // It holds for a track that comes later, too.
    put(json!({"media_stopped": {"identities": ["cid"]}})).await;
    let cid = join(&server, "cid", None).await;
    ear.finds("cid").await;
    speaks(&server, "cid").await;
    assert_eq!(ear.drain("cid"), 0);
    // Nothing comes through to who has vanished.
    assert!(server.befall("lobby", "ear", Mishap::Vanish).await);
    more(packets(&server.witness())).await;
    ear.drain("ann");
    ear.drain("bob");
    more(packets(&server.witness())).await;
    assert_eq!((ear.drain("ann"), ear.drain("bob")), (0, 0));

    let _ = ear.room.close().await;
    cid.leave().await;
    ann.leave().await;
    bob.leave().await;
    server.shutdown().await;
}

/// A client that listens to everyone.
struct Ear {
    room: Room,
    events: mpsc::UnboundedReceiver<RoomEvent>,
    streams: HashMap<String, EncodedAudioStream>,
}

impl Ear {
    async fn join(server: &Server) -> Self {
        let token = token(server, "ear", may_join("lobby"));
        Self::join_with(server, &token).await
    }

    async fn join_with(server: &Server, token: &str) -> Self {
        let connecting = Room::connect(&server.url(), token, RoomOptions::default()).await;
        let (room, events) = connecting.expect("joins");
        let streams = HashMap::new();
        Self {
            room,
            events,
            streams,
        }
    }

    /// Waits for half a second of this one's audio.
    async fn hears(&mut self, identity: &str) {
        self.finds(identity).await;
        let stream = self.streams.get_mut(identity).expect("its stream");
        let heard = async {
            for _ in 0..25 {
                stream.next().await.expect("a packet");
            }
        };
        timeout(LIMIT, heard).await.expect("it is heard");
    }

    /// Waits until this one's track is there.
    async fn finds(&mut self, identity: &str) {
        let found = async {
            while !self.streams.contains_key(identity) {
                if let RoomEvent::TrackSubscribed {
                    track: RemoteTrack::Audio(track),
                    participant,
                    ..
                } = self.events.recv().await.expect("an event")
                {
                    let stream = EncodedAudioStream::new(&track.rtc_track(), 250);
                    self.streams
                        .insert(participant.identity().to_string(), stream);
                }
            }
        };
        timeout(LIMIT, found).await.expect("its track");
    }

    /// Takes what has come from this one; how many packets.
    fn drain(&mut self, identity: &str) -> usize {
        let stream = self.streams.get_mut(identity).expect("its stream");
        let mut count = 0;
        while let Some(Some(_)) = stream.next().now_or_never() {
            count += 1;
        }
        count
    }
}

/// The agent of a participant's job hears that participant.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_job_follows_each_participant_and_hears_it() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtParticipant, "").await;
    let mut agents = Vec::new();
    for identity in ["ann", "bob"] {
        let speaker = join(&server, identity, None).await;
        let assignment = worker.take(&format!("agent-of-{identity}")).await;
        let job = assignment.job.expect("a job");
        assert_eq!(job.r#type(), JobType::JtParticipant);
        let whom = job.participant.expect("a participant");
        assert_eq!(whom.identity, identity);
        let sid = stay(&server.witness(), identity).map(|p| p.sid.clone());
        assert_eq!(Some(whom.sid), sid);

        let mut agent = Ear::join_with(&server, &assignment.token).await;
        agent.hears(identity).await;
        agents.push((job.id, speaker, agent));
    }
    for (job, speaker, agent) in agents {
        speaker.leave().await;
        worker.report(&job, Reported::JsSuccess, "").await;
        wait(&server, "the job ends", |w| {
            w.job(&job)
                .is_some_and(|j| j.status == JobStatus::Succeeded)
        })
        .await;
        agent.room.close().await.expect("closed");
    }
    server.shutdown().await;
}
