//! Transcripts in the room, as its participants get them.

use std::{collections::HashMap, time::Duration};

use livekit::{data_stream::api::StreamReader, prelude::*};
use livekit_api::access_token::{AccessToken, VideoGrants};
use rehearsal::room::Whom;
use roomwarden::{daemon::Daemon, transcripts::Sinks};

use tokio::sync::mpsc::UnboundedReceiver;

use crate::stage::{Kept, LIMIT, Stage, stop};

/// What a listener got of one segment.
#[derive(Debug, Default)]
struct Segment {
    interim: usize,
    finals: Vec<String>,
    /// Got anything after it was final.
    after_final: bool,
}

impl Segment {
    fn add(&mut self, is_final: bool, text: &str) {
        self.after_final |= !self.finals.is_empty();
        match is_final {
            true => self.finals.push(text.to_owned()),
            false => self.interim += 1,
        }
    }

    fn is_complete(&self) -> bool {
        self.interim > 0 && !self.finals.is_empty()
    }
}

/// A client that gets what is sent to the room `r`.
async fn listener(stage: &Stage) -> (Room, UnboundedReceiver<RoomEvent>) {
    let grants = VideoGrants {
        room_join: true,
        room: "r".to_owned(),
        ..Default::default()
    };
    let (key, secret) = (stage.rooms.api_key(), stage.rooms.api_secret());
    let token = AccessToken::with_api_key(key, secret)
        .with_identity("listener")
        .with_grants(grants)
        .to_jwt()
        .expect("token");
    let mut options = RoomOptions::default();
    options.auto_subscribe = false;
    let joined = Room::connect(&stage.rooms.url(), &token, options).await;
    joined.expect("joins")
}

/// Both forms, and both with the same segments: interim ones, then the one that replaces them.
#[tokio::test(flavor = "multi_thread")]
async fn transcripts_come_as_text_streams_and_as_packets() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.transcripts.room_packet = true;
    let daemon = Daemon::start(config, Sinks::default());
    let (room, mut events) = listener(&stage).await;
    let alice = stage.speaker("r", "alice").await;

    let (mut texts, mut packets) = (HashMap::new(), HashMap::new());
    let mut tracks = Vec::new();
    let complete =
        |segments: &HashMap<String, Segment>| segments.values().any(Segment::is_complete);
    let listen = async {
        while !complete(&texts) || !complete(&packets) {
            match events.recv().await.expect("still in the room") {
                RoomEvent::TextStreamOpened {
                    reader,
                    topic,
                    participant_identity,
                } => {
                    assert_eq!(topic, "lk.transcription");
                    assert_eq!(participant_identity.as_str(), "alice");
                    let reader = reader.take().expect("ours alone");
                    let attributes = reader.info().attributes();
                    let text = reader.read_all().await.expect("whole");
                    let is_final = match attributes["lk.transcription_final"].as_str() {
                        "true" => true,
                        "false" => false,
                        other => panic!("{other}"),
                    };
                    tracks.push(attributes["lk.transcribed_track_id"].clone());
                    let segment: &mut Segment = texts
                        .entry(attributes["lk.segment_id"].clone())
                        .or_default();
                    segment.add(is_final, &text);
                }
                RoomEvent::TranscriptionReceived {
                    participant,
                    track_publication,
                    segments,
                } => {
                    let who = participant.expect("known").identity();
                    assert_eq!(who.as_str(), "alice");
                    tracks.push(track_publication.expect("known").sid().to_string());
                    for got in segments {
                        assert!(got.end_time > got.start_time, "{got:?}");
                        let segment: &mut Segment = packets.entry(got.id).or_default();
                        segment.add(got.r#final, &got.text);
                    }
                }
                _ => {}
            }
        }
    };
    let listened = tokio::time::timeout(LIMIT, listen).await;
    assert!(listened.is_ok(), "{texts:#?} {packets:#?}");
    let witness = stage.rooms.witness();
    let track = &witness
        .room("r")
        .expect("room")
        .participant("alice")
        .expect("alice")
        .tracks[0];
    assert!(tracks.iter().all(|sid| *sid == track.sid));
    let (id, text) = texts.iter().find(|(_, s)| s.is_complete()).expect("one");
    assert_eq!(text.finals.len(), 1);
    assert!(!text.after_final);
    assert_eq!(packets[id].finals, text.finals);
    room.close().await.expect("leaves");
    alice.leave().await;
    stage.all_acknowledged(1).await;
    stop(&daemon).await;
    stage.end().await;
}

/// And before the daemon leaves, however long the data channel takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_final_that_comes_while_closing_reaches_the_room() {
    let stage = Stage::new().await;
    let kept = Kept::default();
    let daemon = Daemon::start(stage.config(), kept.sinks());
    let (room, mut events) = listener(&stage).await;
    let alice = stage.speaker("r", "alice").await;
    // Within the first phrase of the recording.
    stage
        .witnessed("speech", |w| {
            w.streams.iter().any(|s| s.audio_seconds > 1.0)
        })
        .await;
    let lost = Whom::identity("roomwarden");
    stage.faults(|f| f.datagrams_lost = lost).await;
    let closing = tokio::spawn(async move { stop(&daemon).await });
    stage.all_acknowledged(1).await;
    let sent = stage.stt.witness().streams[0].finals_sent;
    assert!(sent > 0, "the server had something to say");
    // Ample for who would leave now.
    tokio::time::sleep(Duration::from_millis(500)).await;
    stage.faults(|_| {}).await;
    closing.await.expect("it closes");
    stage.left_in_order(1).await;

    let mut heard = Vec::new();
    let listen = async {
        while heard.len() < kept.finals().len() {
            let event = events.recv().await.expect("still in the room");
            let RoomEvent::TextStreamOpened { reader, .. } = event else {
                continue;
            };
            let reader = reader.take().expect("ours alone");
            if reader.info().attributes()["lk.transcription_final"] == "true" {
                heard.push(reader.read_all().await.expect("whole"));
            }
        }
    };
    let listened = tokio::time::timeout(LIMIT, listen).await;
    let finals = kept.finals();
    assert!(
        listened.is_ok(),
        "{finals:#?}, and the room heard {heard:?}"
    );
    let said = finals.iter().map(|transcript| &transcript.text);
    assert!(
        heard.iter().eq(said),
        "{finals:#?}, and the room heard {heard:?}"
    );
    room.close().await.expect("leaves");
    alice.leave().await;
    stage.end().await;
}
