//! `roomwarden force-close` on the real binary: the room server says which rooms are gone, the STT
//! server how the streams in them ended.

use std::process::Output;

use livekit_api::services::room::CreateRoomOptions;
use livekit_protocol::DisconnectReason;
use rehearsal::room::Whom;
use roomwarden::{
    cli::{EXIT_ABANDONED, EXIT_CHECK, EXIT_OK, EXIT_USAGE},
    daemon::Daemon,
    transcripts::Sinks,
};
use serde_json::Value;

use crate::{
    stage::{Stage, stop},
    worker::roomwarden,
};

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn outcomes(report: &Value) -> Vec<&str> {
    let rooms = report["rooms"].as_array().expect("rooms");
    rooms
        .iter()
        .map(|room| room["outcome"].as_str().expect("an outcome"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_rooms_are_closed_whether_or_not_we_are_in_them() {
    const OURS: usize = 6;
    const OTHERS: usize = 4;
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.rooms.include = vec!["ours-*".into()];
    let daemon = Daemon::start(config, Sinks::default());
    let mut speakers = Vec::new();
    for n in 0..OURS {
        speakers.push(stage.speaker(&format!("ours-{n}"), "ann").await);
    }
    for n in 0..OTHERS {
        speakers.push(stage.speaker(&format!("others-{n}"), "ann").await);
    }
    for n in 0..50 - OURS - OTHERS {
        let (api, name) = (stage.api(), format!("empty-{n}"));
        let made = api.create_room(&name, CreateRoomOptions::default());
        made.await.expect("a room");
    }
    let spared = CreateRoomOptions::default();
    stage
        .api()
        .create_room("spared", spared)
        .await
        .expect("a room");
    stage.streaming(OURS).await;

    let patterns = [
        "--pattern",
        "ours-*",
        "--pattern",
        "others-?",
        "--pattern",
        "empty-*",
    ];
    let all = |more: &[&str]| {
        let mut args = vec!["force-close", "--json"];
        args.extend(patterns);
        args.extend(more);
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        let stage = &stage;
        async move {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            roomwarden(stage, &args).await
        }
    };
    let output = all(&["--dry-run"]).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()), "{output:?}");
    assert_eq!(outcomes(&report(&output)), ["would_close"; 50]);
    assert_eq!(stage.rooms.witness().live_rooms().count(), 51);
    assert_eq!(stage.stt.witness().open_now, OURS);

    let output = all(&["--deadline", "120"]).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()), "{output:?}");
    let done = report(&output);
    assert_eq!(outcomes(&done), ["closed"; 50]);
    println!("50 rooms: {} s", done["seconds"]);
    // By the room server, which is asked last of all.
    let witness = stage.rooms.witness();
    let left: Vec<_> = witness
        .live_rooms()
        .map(|room| room.name.as_str())
        .collect();
    assert_eq!(left, ["spared"]);
    for n in 0..OURS {
        let room = witness.room(&format!("ours-{n}")).expect("the room");
        assert_eq!(room.end_reason, Some(DisconnectReason::RoomDeleted));
        let removed = Some(DisconnectReason::ParticipantRemoved);
        let (us, ann) = (room.participant("roomwarden"), room.participant("ann"));
        let (us, ann) = (us.expect("us"), ann.expect("ann"));
        assert_eq!((us.reason, ann.reason), (removed, removed), "{room:#?}");
        // Ours first.
        assert!(us.left.expect("gone").ms <= ann.left.expect("gone").ms);
    }
    let rooms = done["rooms"].as_array().expect("rooms");
    let ours = rooms
        .iter()
        .find(|room| room["room"] == "ours-0")
        .expect("it");
    assert_eq!(ours["ours"], serde_json::json!(["roomwarden"]));
    let steps: Vec<_> = ours["steps"].as_array().expect("steps").iter().collect();
    let kinds: Vec<_> = steps
        .iter()
        .map(|step| step["step"].as_str().expect("it"))
        .collect();
    assert_eq!(kinds, ["remove_ours", "remove", "delete", "verify"]);
    assert!(steps.iter().all(|step| step["result"] == "done"), "{ours}");
    // Every stream was closed in order.
    stage.all_acknowledged(OURS).await;
    // Once more is no harm.
    let output = all(&[]).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()));
    assert_eq!(outcomes(&report(&output)), [""; 0]);
    let output = roomwarden(&stage, &["force-close", "ours-0"]).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()));
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said, "ours-0: there is no such room\n");
    let report = stop(&daemon).await;
    assert_eq!(
        (report.opened, report.acknowledged),
        (OURS as u64, OURS as u64)
    );
    for speaker in speakers {
        speaker.leave().await;
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_closed_is_told_by_the_exit_code() {
    let stage = Stage::new().await;
    let made = stage
        .api()
        .create_room("r", CreateRoomOptions::default())
        .await;
    made.expect("a room");
    stage.faults(|faults| faults.api_failing = true).await;
    let output = roomwarden(&stage, &["force-close", "r", "--deadline", "1", "--json"]).await;
    assert_eq!(
        output.status.code(),
        Some(EXIT_ABANDONED.into()),
        "{output:?}"
    );
    assert_eq!(outcomes(&report(&output)), ["not_closed"]);
    let output = roomwarden(
        &stage,
        &["force-close", "--pattern", "*", "--deadline", "1"],
    )
    .await;
    assert_eq!(output.status.code(), Some(EXIT_CHECK.into()), "{output:?}");
    stage.faults(|faults| faults.api_refused = true).await;
    let output = roomwarden(
        &stage,
        &["force-close", "--pattern", "*", "--deadline", "60"],
    )
    .await;
    assert_eq!(output.status.code(), Some(EXIT_USAGE.into()), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("LIVEKIT_API_KEY"));
    stage.faults(|_| {}).await;
    let output = roomwarden(&stage, &["force-close", "r"]).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()), "{output:?}");
    stage.end().await;
}

/// As after a crash of the node that they were on: the room is deleted all the same.
#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_removed_does_not_keep_the_room() {
    let stage = Stage::new().await;
    let ann = stage.speaker("r", "ann").await;
    let bob = stage.speaker("r", "bob").await;
    stage
        .faults(|faults| faults.removals_unanswered = Whom::identity("ann"))
        .await;
    let args = ["force-close", "r", "--deadline", "12", "--json"];
    let output = roomwarden(&stage, &args).await;
    assert_eq!(output.status.code(), Some(EXIT_OK.into()), "{output:?}");
    let done = report(&output);
    assert_eq!(outcomes(&done), ["closed"], "{done}");
    assert_eq!(stage.rooms.witness().live_rooms().count(), 0);
    // But it is told.
    let steps = done["rooms"][0]["steps"].as_array().expect("steps");
    let removal = |who: &str| {
        let of = |step: &&Value| step["step"] == "remove" && step["participant"] == who;
        &steps.iter().find(of).expect("a removal")["result"]
    };
    assert!(removal("ann")["failed"].is_string(), "{done}");
    assert_eq!(removal("bob"), "done");
    for speaker in [ann, bob] {
        speaker.leave().await;
    }
    stage.end().await;
}
