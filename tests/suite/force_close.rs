//! `roomwarden force-close` on the real binary: the room server says which rooms are gone, the STT
//! server how the streams in them ended.

use std::{collections::BTreeSet, process::Output};

use livekit_api::services::room::CreateRoomOptions;
use livekit_protocol::DisconnectReason;
use rehearsal::room::Whom;
use roomwarden::{
    cli::{EXIT_ABANDONED, EXIT_CHECK, EXIT_OK, EXIT_USAGE},
    daemon::Daemon,
    transcripts::Sinks,
};
use serde_json::{Value, json};

use crate::{
    control,
    stage::{LIMIT, Stage, stop},
    worker::{dispatches, roomwarden},
};

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn steps(report: &Value) -> Vec<&str> {
    let steps = report["rooms"][0]["steps"].as_array().expect("steps");
    steps
        .iter()
        .map(|step| step["step"].as_str().expect("a step"))
        .collect()
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

/// The daemon that is asked leaves by itself, before anybody is removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_closes_rooms_for_everybody_whether_or_not_it_is_in_them() {
    let stage = Stage::new().await;
    let ours = [("ROOMWARDEN__ROOMS__INCLUDE", "ours")];
    let daemon = control::Daemon::start(&stage, &ours).await;
    let ann = stage.speaker("ours", "ann").await;
    let bob = stage.speaker("others/ü", "bob").await;
    let made = async |name: &str| {
        let made = stage
            .api()
            .create_room(name, CreateRoomOptions::default())
            .await;
        made.expect("a room");
    };
    for name in ["test-1", "test-2", "spared"] {
        made(name).await;
    }
    stage.streaming(1).await;
    let one = "/api/v1/rooms/ours/force-close";
    let dry = daemon.post(&format!("{one}?dry_run=true")).await.ok();
    assert_eq!(outcomes(&dry), ["would_close"]);
    assert_eq!(
        dry["rooms"][0]["participants"],
        json!(["roomwarden", "ann"])
    );
    assert_eq!(stage.stt.witness().open_now, 1);

    let done = daemon.post(one).await.ok();
    assert_eq!(outcomes(&done), ["closed"], "{done}");
    assert_eq!(done["exit_code"], EXIT_OK);
    assert_eq!(done["rooms"][0]["ours"], json!(["roomwarden"]));
    assert_eq!(steps(&done), ["leave", "remove", "delete", "verify"]);
    let all_done = |step: &Value| step["result"] == "done";
    let each = done["rooms"][0]["steps"].as_array().expect("steps");
    assert!(each.iter().all(all_done), "{done}");
    let witness = stage.rooms.witness();
    let room = witness.room("ours").expect("the room");
    assert_eq!(room.end_reason, Some(DisconnectReason::RoomDeleted));
    let (us, her) = (room.participant("roomwarden"), room.participant("ann"));
    let (us, her) = (us.expect("us"), her.expect("ann"));
    assert_eq!(us.reason, Some(DisconnectReason::ClientInitiated));
    assert_eq!(her.reason, Some(DisconnectReason::ParticipantRemoved));
    assert!(us.left.expect("gone").ms <= her.left.expect("gone").ms);
    stage.all_acknowledged(1).await;
    let receipts = daemon.get("/api/v1/receipts").await.ok();
    assert_eq!(receipts[0]["reason"], "requested", "{receipts}");

    let done = daemon
        .post("/api/v1/rooms/others%2F%C3%BC/force-close")
        .await
        .ok();
    assert_eq!(steps(&done), ["remove", "delete", "verify"], "{done}");
    let again = daemon.post(one).await.ok();
    assert_eq!(outcomes(&again), ["not_there"]);

    let several = "/api/v1/force-close";
    let asked = async |body: Value| daemon.send_json("POST", several, &body).await;
    let dry = asked(json!({"pattern": "test-*", "dry_run": true})).await;
    assert_eq!(outcomes(&dry.ok()), ["would_close"; 2]);
    let done = asked(json!({"pattern": "test-?", "deadline_ms": 20_000})).await;
    assert_eq!(outcomes(&done.ok()), ["closed"; 2]);
    let left = || {
        let witness = stage.rooms.witness();
        let left = witness.live_rooms().map(|room| room.name.clone());
        left.collect::<Vec<_>>()
    };
    assert_eq!(left(), ["spared"]);

    for wrong in [
        json!({}),
        json!({"pattern": ""}),
        json!({"pattern": "x".repeat(1025)}),
        json!({"pattern": "*", "deadline_ms": 999}),
        json!({"pattern": "*", "rooms": []}),
    ] {
        assert_eq!(asked(wrong).await.refused(400), "bad_request");
    }
    let refused = daemon.post(&format!("{one}?deadline_ms=999")).await;
    assert_eq!(refused.refused(400), "bad_request");

    stage.faults(|faults| faults.api_failing = true).await;
    let refused = asked(json!({"pattern": "*", "deadline_ms": 1000})).await;
    assert_eq!(refused.refused(502), "livekit");
    let failed = "/api/v1/rooms/spared/force-close?deadline_ms=1000";
    let failed = daemon.post(failed).await;
    assert_eq!(failed.status, 504, "{}", failed.body);
    assert_eq!(outcomes(&failed.json()), ["not_closed"]);
    assert_eq!(failed.json()["exit_code"], EXIT_ABANDONED);
    stage.faults(|_| {}).await;

    // Who goes away once it has begun does not leave it half done.
    let eve = stage.speaker("ours", "eve").await;
    stage.streaming(1).await;
    stage.faults(|faults| faults.api_failing = true).await;
    let asked = daemon.send(&daemon.head("POST", one, &[])).await;
    stage.open(0).await;
    drop(asked);
    stage.faults(|_| {}).await;
    let gone = |w: &rehearsal::room::Witness| w.live_rooms().all(|room| room.name != "ours");
    let gone = stage.rooms.wait_for(gone, LIMIT).await;
    assert!(gone.is_ok(), "{:?}", left());
    daemon.end(EXIT_OK).await;
    for speaker in [ann, bob, eve] {
        speaker.leave().await;
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_are_dispatched_over_the_control_api() {
    let stage = Stage::new().await;
    let name = [("ROOMWARDEN__AGENT__NAME", "scribe")];
    let daemon = control::Daemon::start(&stage, &name).await;
    let asked = async |body: Value| {
        let path = "/api/v1/rooms/r/dispatches";
        daemon.send_json("POST", path, &body).await
    };
    let wrong = asked(json!({"metadata": {"modle": "nova-2"}})).await;
    assert_eq!(wrong.refused(400), "bad_request");
    assert!(wrong.body.contains("did you mean model?"), "{}", wrong.body);
    for wrong in [
        json!({"agent_name": " x"}),
        json!({"metadata": "{}"}),
        json!({"name": "x"}),
    ] {
        assert_eq!(asked(wrong).await.refused(400), "bad_request");
    }
    // What only LiveKit knows to be wrong.
    let path = format!("/api/v1/rooms/{}/dispatches", "r".repeat(300));
    let wrong = daemon.send_json("POST", &path, &json!({})).await;
    assert_eq!(wrong.refused(400), "bad_request");
    assert!(wrong.body.contains("LiveKit refuses"), "{}", wrong.body);
    assert_eq!(stage.rooms.witness().live_rooms().count(), 0);
    let mut made = Vec::new();
    for (body, agent) in [
        (json!({"metadata": {"model": "nova-2"}}), "scribe"),
        (json!({"agent_name": "other"}), "other"),
    ] {
        let answer = asked(body).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        let answer = answer.json();
        let text = |name: &str| answer[name].as_str().expect("a text").to_owned();
        assert_eq!((&*text("room"), &*text("agent_name")), ("r", agent));
        made.push((text("dispatch"), agent.to_owned(), text("metadata")));
    }
    let listed = dispatches(&stage).list_dispatch("r").await.expect("a list");
    // The server itself dispatches who has no name to every room.
    let listed = listed.into_iter().filter(|d| !d.agent_name.is_empty());
    let listed = listed.map(|d| (d.id, d.agent_name, d.metadata));
    assert_eq!(made[0].2, r#"{"model":"nova-2"}"#);
    let (listed, made): (BTreeSet<_>, BTreeSet<_>) = (listed.collect(), made.into_iter().collect());
    assert_eq!(listed, made);
    daemon.end(EXIT_OK).await;
    stage.end().await;
}
