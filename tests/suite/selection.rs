//! Which rooms are joined and who is transcribed.

use livekit_api::services::room::UpdateParticipantOptions;
use rehearsal::{room, stt};
use roomwarden::{daemon::Daemon, transcripts::Sinks};

use crate::stage::{LIMIT, Stage, reasons, stop};

fn present(witness: &room::Witness, room: &str, identity: &str) -> bool {
    let mut rooms = witness.live_rooms().filter(|r| r.name == room);
    rooms.any(|r| r.present().any(|p| p.identity == identity))
}

/// They are there before anybody else, and again when somebody comes back.
#[tokio::test(flavor = "multi_thread")]
async fn rooms_of_the_list_are_joined_without_being_found() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.rooms.join = vec!["lobby".to_owned()];
    config.rooms.discover = false;
    let daemon = Daemon::start(config, Sinks::default());
    stage.has("roomwarden").await;
    let bob = stage.speaker("other", "bob").await;
    let alice = stage.speaker("lobby", "alice").await;
    stage.streaming(1).await;
    stage.api().delete_room("lobby").await.expect("deletion");
    stage.open(0).await;
    alice.leave().await;
    let alice = stage.speaker("lobby", "alice").await;
    stage.streaming(1).await;
    let witness = stage.rooms.witness();
    assert!(!present(&witness, "other", "roomwarden"));
    alice.leave().await;
    bob.leave().await;
    stage.all_acknowledged(2).await;
    stop(&daemon).await;
    stage.end().await;
}

/// They need no list of what the server has.
#[tokio::test(flavor = "multi_thread")]
async fn rooms_of_the_list_are_joined_while_the_api_fails() {
    let stage = Stage::new().await;
    stage.faults(|f| f.api_failing = true).await;
    let mut config = stage.config();
    config.rooms.join = vec!["lobby".to_owned()];
    let daemon = Daemon::start(config, Sinks::default());
    let alice = stage.speaker("lobby", "alice").await;
    stage.streaming(1).await;
    alice.leave().await;
    stage.all_acknowledged(1).await;
    stop(&daemon).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_of_the_list_is_made_anew_when_it_ends() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.rooms.join = vec!["lobby".to_owned()];
    let daemon = Daemon::start(config, Sinks::default());
    stage.has("roomwarden").await;
    stage.api().delete_room("lobby").await.expect("deletion");
    let again = |w: &room::Witness| w.rooms.len() == 2 && present(w, "lobby", "roomwarden");
    stage.rooms.wait_for(again, LIMIT).await.expect("made anew");
    stop(&daemon).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rooms_are_found_by_the_patterns_of_their_names() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.rooms.include = vec!["team-*".to_owned()];
    config.rooms.exclude = vec!["*-test".to_owned()];
    config.rooms.hidden = true;
    let daemon = Daemon::start(config, Sinks::default());
    // The one that is joined comes last, so that the others have been seen by then.
    let carol = stage.speaker("lobby", "carol").await;
    let bob = stage.speaker("team-test", "bob").await;
    let alice = stage.speaker("team-a", "alice").await;
    stage.streaming(1).await;
    let witness = stage.rooms.witness();
    assert!(!present(&witness, "lobby", "roomwarden"));
    assert!(!present(&witness, "team-test", "roomwarden"));
    let room = witness.room("team-a").expect("room");
    assert!(room.participant("roomwarden").expect("there").hidden);
    alice.leave().await;
    bob.leave().await;
    carol.leave().await;
    stage.all_acknowledged(1).await;
    stop(&daemon).await;
    stage.end().await;
}

/// Attributes are set by the application while people are there.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_selected_changes_with_the_attributes() {
    let stage = Stage::new().await;
    let mut config = stage.events_only();
    config.participants.attributes = [("language".to_owned(), "en*".to_owned())].into();
    config.participants.exclude = vec!["bob".to_owned()];
    let daemon = Daemon::start(config, Sinks::default());
    let speak = async |identity: &str, language: &str| {
        let options = UpdateParticipantOptions {
            attributes: [("language".to_owned(), language.to_owned())].into(),
            ..Default::default()
        };
        let api = stage.api();
        let updated = api.update_participant("r", identity, options).await;
        updated.expect("attributes");
    };
    let alice = stage.speaker("r", "alice").await;
    let bob = stage.speaker("r", "bob").await;
    let carol = stage.speaker("r", "carol").await;
    speak("bob", "en").await;
    speak("carol", "en").await;
    stage.streaming(1).await;
    speak("alice", "en-GB").await;
    stage.streaming(2).await;
    speak("alice", "de").await;
    let witness = stage.open(1).await;
    assert_eq!(witness.streams[1].end, Some(stt::End::Acknowledged));
    speak("alice", "en-US").await;
    stage.streaming(2).await;
    alice.leave().await;
    carol.leave().await;
    bob.leave().await;
    stage.all_acknowledged(3).await;
    let report = stop(&daemon).await;
    assert_eq!(reasons(&report)[0], "no longer selected");
    stage.end().await;
}
