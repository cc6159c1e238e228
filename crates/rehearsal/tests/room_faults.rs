//! Faults: each shows where it should and nowhere else.

mod room_support;

use livekit_protocol::{
    self as proto, DisconnectReason, JobType, participant_info::State,
    signal_request::Message as Request, signal_response::Message as Response,
};
use rehearsal::room::{Config, Faults, Mishap, Server, Whom};
use room_support::{
    Client, connect, get, http, may_administer, may_join, next, start, token, twirp,
    worker::{self, Worker},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio_tungstenite::tungstenite::Error;

#[tokio::test]
async fn departures_are_told_as_the_faults_have_it() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let who = || Whom::identity("bob");
    let news = async |ann: &mut Client, faults: Faults| {
        server.set_faults(faults).await;
        let bob = Client::join(&server, "bob", may_join("lobby")).await;
        leave(bob).await;
        assert_eq!(members(&server).await, ["ann"], "the API knows");
        // Somebody who comes afterwards ends the list.
        let _cid = Client::join(&server, "cid", may_join("lobby")).await;
        let seen = news_until(ann, "cid").await;
        leave(_cid).await;
        while news_until(ann, "cid").await.is_empty() {}
        seen
    };
    let told = [
        ("bob", State::Joined),
        ("bob", State::Disconnected),
        ("cid", State::Joined),
    ];
    let once = news(&mut ann, Faults::default()).await;
    assert_eq!(once, told.map(owned));
    let twice = Faults {
        departures_twice: who(),
        ..Faults::default()
    };
    let twice = news(&mut ann, twice).await;
    assert_eq!(twice, [told[0], told[1], told[1], told[2]].map(owned));
    let lost = Faults {
        departures_lost: who(),
        ..Faults::default()
    };
    let lost = news(&mut ann, lost).await;
    assert_eq!(lost, [told[0], told[2]].map(owned));

    let reordered = Faults {
        departures_out_of_order: who(),
        ..Faults::default()
    };
    server.set_faults(reordered).await;
    leave(Client::join(&server, "bob", may_join("lobby")).await).await;
    let _dan = Client::join(&server, "dan", may_join("lobby")).await;
    let before = news_until(&mut ann, "dan").await;
    assert_eq!(before, [told[0], ("dan", State::Joined)].map(owned));
    assert_eq!(ann.until_update("bob").await.state(), State::Disconnected);

    let late = Duration::from_millis(300);
    server
        .set_faults(Faults {
            departures_late: who(),
            lateness_ms: late.as_millis() as u64,
            ..Faults::default()
        })
        .await;
    let bob = Client::join(&server, "bob", may_join("lobby")).await;
    assert_eq!(ann.until_update("bob").await.state(), State::Joined);
    let left = Instant::now();
    leave(bob).await;
    assert_eq!(ann.until_update("bob").await.state(), State::Disconnected);
    assert!(left.elapsed() >= late);
    server.shutdown().await;
}

#[tokio::test]
async fn a_dropped_signal_can_come_back_and_a_standing_fault_drops_it_again() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let mut bob = Client::join(&server, "bob", may_join("lobby")).await;
    assert!(!server.befall("lobby", "nobody", Mishap::DropSignal).await);
    assert!(server.befall("lobby", "bob", Mishap::DropSignal).await);
    bob.until_closed().await;
    // Without media there is nothing else to hold him.
    let left = ann.until(gone).await;
    assert_eq!(
        (left.0.as_str(), left.1),
        ("bob", DisconnectReason::SignalClose)
    );

    let faults = Faults {
        signal_dropped: Whom::identity("bob"),
        ..Faults::default()
    };
    server.set_faults(faults).await;
    let bob = token(&server, "bob", may_join("lobby"));
    let mut bob = connect(&server, &format!("/rtc?access_token={bob}"))
        .await
        .expect("websocket");
    while next(&mut bob).await.is_some() {}
    let left = ann.until(gone).await;
    assert_eq!(left.0, "bob");
    server.set_faults(Faults::default()).await;
    let mut bob = Client::join(&server, "bob", may_join("lobby")).await;
    ping(&mut bob).await;
    ping(&mut ann).await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_frozen_signal_neither_speaks_nor_listens_until_it_thaws() {
    let server = start(Config::default());
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let mut bob = Client::join(&server, "bob", may_join("lobby")).await;
    let frozen = Faults {
        signal_frozen: Whom::identity("bob"),
        ..Faults::default()
    };
    server.set_faults(frozen).await;
    // What he says is not heard: he would be gone otherwise.
    bob.send(Request::Leave(proto::LeaveRequest::default()))
        .await;
    let _cid = Client::join(&server, "cid", may_join("lobby")).await;
    assert_eq!(ann.until_update("cid").await.state(), State::Joined);
    assert_eq!(members(&server).await, ["ann", "bob", "cid"]);
    server.set_faults(Faults::default()).await;
    // What was said meanwhile comes now, in both directions.
    assert_eq!(bob.until_update("cid").await.state(), State::Joined);
    let left = ann.until(gone).await;
    assert_eq!(
        (left.0.as_str(), left.1),
        ("bob", DisconnectReason::ClientInitiated)
    );
    server.shutdown().await;
}

#[tokio::test]
async fn tokens_and_the_api_fail_on_request() {
    let server = start(Config::default());
    let list = async || {
        twirp(&server, may_administer(""), "ListRooms", json!({}))
            .await
            .status
    };
    assert_eq!(list().await, 200);
    server
        .set_faults(Faults {
            api_failing: true,
            ..Faults::default()
        })
        .await;
    assert_eq!(list().await, 503);
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    server
        .set_faults(Faults {
            api_refused: true,
            ..Faults::default()
        })
        .await;
    assert_eq!(list().await, 401);
    server
        .set_faults(Faults {
            tokens_refused: Whom::Everyone,
            ..Faults::default()
        })
        .await;
    assert_eq!(list().await, 401);
    let bob = token(&server, "bob", may_join("lobby"));
    let join = format!("/rtc?access_token={bob}");
    let refused = connect(&server, &join).await.err();
    assert_eq!(status(refused), Some(401));
    let agent = livekit_token::VideoGrants {
        agent: true,
        ..Default::default()
    };
    assert_eq!(status(worker::open(&server, agent).await.err()), Some(401));
    // Who is in stays in.
    ping(&mut ann).await;
    // Of one participant only.
    server
        .set_faults(Faults {
            tokens_refused: Whom::identity("bob"),
            ..Faults::default()
        })
        .await;
    let refused = connect(&server, &join).await.err();
    assert_eq!(status(refused), Some(401));
    assert_eq!(list().await, 200);
    let mut cid = Client::join(&server, "cid", may_join("lobby")).await;
    ping(&mut cid).await;
    server.set_faults(Faults::default()).await;
    assert_eq!(list().await, 200);
    server.shutdown().await;
}

#[tokio::test]
async fn faults_are_set_over_http() {
    let server = start(Config::default());
    let none = serde_json::to_value(Faults::default()).expect("json");
    let json = [("content-type", "application/json")];
    let put = async |body: Value| {
        let body = body.to_string();
        http(&server, "PUT", "/faults", &json, body.as_bytes())
            .await
            .status
    };
    assert_eq!(get(&server, "/faults").await.json(), none);
    assert_eq!(
        put(json!({"api_failing": true, "media_stopped": {"identities": ["ann"]}})).await,
        204
    );
    let expected = Faults {
        api_failing: true,
        media_stopped: Whom::identity("ann"),
        ..Faults::default()
    };
    assert_eq!(server.faults(), expected);
    assert_eq!(
        get(&server, "/faults").await.json(),
        serde_json::to_value(expected).expect("json")
    );
    assert_eq!(put(json!({"unheard_of": true})).await, 422);
    assert_eq!(
        http(&server, "DELETE", "/faults", &[], &[]).await.status,
        204
    );
    assert_eq!(server.faults(), Faults::default());

    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let befall = async |identity: &str, mishap: &str| {
        let body = json!({"room": "lobby", "identity": identity, "mishap": mishap});
        http(
            &server,
            "POST",
            "/faults",
            &json,
            body.to_string().as_bytes(),
        )
        .await
        .status
    };
    assert_eq!(befall("nobody", "drop_signal").await, 404);
    assert_eq!(befall("ann", "explode").await, 422);
    assert_eq!(befall("ann", "drop_signal").await, 204);
    ann.until_closed().await;
    let bob = Client::join(&server, "bob", may_join("lobby")).await;
    assert_eq!(befall("bob", "vanish").await, 204);
    drop(bob);
    // A closed websocket without media would otherwise end her stay.
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    ping(&mut ann).await;
    assert_eq!(members(&server).await, ["ann", "bob"]);
    server.shutdown().await;
}

#[tokio::test]
async fn a_killed_server_says_nothing_and_another_takes_its_place() {
    let runtime = tokio::runtime::Handle::current();
    let before = runtime.metrics().num_alive_tasks();
    let mut config = Config::default();
    let server = start(config.clone());
    config.port = server
        .url()
        .rsplit(':')
        .next()
        .and_then(|p| p.parse().ok())
        .expect("port");
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    let witness = server.kill().await;
    assert_eq!(runtime.metrics().num_alive_tasks(), before);
    assert_eq!(witness.live_rooms().count(), 1);
    // Neither a Leave nor a close frame.
    assert!(!ann.until_end().await, "a word");
    assert_eq!(worker.next().await, None);
    let server = start(config.clone());
    let list = twirp(&server, may_administer(""), "ListRooms", json!({})).await;
    assert_eq!(list.json(), json!({}));
    let token = token(&server, "ann", may_join("lobby"));
    let mut ann = Client::join_with(&server, &token).await;
    ping(&mut ann).await;
    // A restart in good order: who is there is told, and may come back to the next with the same
    // token.
    let (_, reason) = tokio::join!(server.shutdown(), ann.until_leave());
    assert_eq!(reason, DisconnectReason::ServerShutdown);
    let server = start(config);
    let mut ann = Client::join_with(&server, &token).await;
    ping(&mut ann).await;
    server.shutdown().await;
}

#[tokio::test]
async fn who_vanishes_is_silent_and_cannot_go_on_but_can_come_anew() {
    // Without media nothing else ends her stay.
    let server = start(Config {
        join_timeout: Duration::from_secs(2),
        ..Config::default()
    });
    let mut bob = Client::join(&server, "bob", may_join("other")).await;
    let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
    assert!(server.befall("lobby", "ann", Mishap::Vanish).await);
    // What she says is not heard, and a closed websocket would end her stay at once.
    ann.send(Request::Leave(proto::LeaveRequest::default()))
        .await;
    ping(&mut bob).await;
    assert_eq!(members(&server).await, ["ann"]);
    let token_of_ann = token(&server, "ann", may_join("lobby"));
    let resume = format!(
        "/rtc?access_token={token_of_ann}&reconnect=1&sid={}",
        ann.sid()
    );
    let refused = connect(&server, &resume).await.err();
    assert_eq!(status(refused), Some(503));
    let ended = room_support::wait(&server, "given up", |w| {
        w.room("lobby").is_some_and(|r| r.present().count() == 0)
    });
    let ended = ended.await;
    let stay = ended.room("lobby").and_then(|r| r.participant("ann"));
    let reason = stay.and_then(|p| p.reason);
    assert_eq!(reason, Some(DisconnectReason::JoinFailure));
    assert!(!ann.until_end().await, "a word");

    let ann = Client::join(&server, "ann", may_join("lobby")).await;
    assert!(server.befall("lobby", "ann", Mishap::Vanish).await);
    let mut again = Client::join(&server, "ann", may_join("lobby")).await;
    assert_ne!(ann.sid(), again.sid());
    ping(&mut again).await;
    server.shutdown().await;
}

#[tokio::test]
async fn a_resumption_fails_as_the_client_has_asked() {
    use proto::simulate_scenario::Scenario;
    let server = start(Config::default());
    for (scenario, answered) in [
        (Scenario::DisconnectSignalOnResume(true), true),
        (Scenario::DisconnectSignalOnResumeNoMessages(true), false),
    ] {
        let mut ann = Client::join(&server, "ann", may_join("lobby")).await;
        let scenario = Some(scenario);
        ann.send(Request::Simulate(proto::SimulateScenario { scenario }))
            .await;
        // Once it is answered, the request before it is taken in.
        ping(&mut ann).await;
        let token = token(&server, "ann", may_join("lobby"));
        let path = format!("/rtc?access_token={token}&reconnect=1&sid={}", ann.sid());
        let mut resumed = connect(&server, &path).await.expect("websocket");
        let mut said = Vec::new();
        while let Some(message) = next(&mut resumed).await {
            said.push(message);
        }
        let reconnected = matches!(said.first(), Some(Response::Reconnect(_)));
        assert_eq!((reconnected, said.is_empty()), (answered, !answered));
    }
    server.shutdown().await;
}

#[tokio::test]
async fn everyones_signal_can_be_frozen_and_dropped() {
    let server = start(Config::default());
    let mut clients = Vec::new();
    for identity in ["ann", "bob"] {
        clients.push(Client::join(&server, identity, may_join("lobby")).await);
    }
    let frozen = Faults {
        signal_frozen: Whom::Everyone,
        ..Faults::default()
    };
    server.set_faults(frozen).await;
    for client in &mut clients {
        client
            .send(Request::Leave(proto::LeaveRequest::default()))
            .await;
    }
    // Who comes now is frozen from the start.
    let cid = token(&server, "cid", may_join("lobby"));
    let mut cid = connect(&server, &format!("/rtc?access_token={cid}"))
        .await
        .expect("websocket");
    assert_eq!(members(&server).await, ["ann", "bob", "cid"]);
    let dropped = Faults {
        signal_dropped: Whom::Everyone,
        ..Faults::default()
    };
    server.set_faults(dropped).await;
    while next(&mut cid).await.is_some() {}
    for client in &mut clients {
        client.until_closed().await;
    }
    server.shutdown().await;
}

/// What `ann` hears of others until somebody has come.
async fn news_until(ann: &mut Client, last: &str) -> Vec<(String, State)> {
    let mut seen = Vec::new();
    ann.until(|m| match m {
        Response::Update(update) => {
            seen.extend(
                update
                    .participants
                    .into_iter()
                    .map(|p| (p.identity.clone(), p.state())),
            );
            seen.iter().any(|(who, _)| who == last).then_some(())
        }
        _ => None,
    })
    .await;
    seen
}

fn owned((identity, state): (&str, State)) -> (String, State) {
    (identity.to_owned(), state)
}

/// Who has left, and why.
fn gone(message: Response) -> Option<(String, DisconnectReason)> {
    let Response::Update(update) = message else {
        return None;
    };
    let mut infos = update.participants.into_iter();
    let left = infos.find(|p| p.state() == State::Disconnected)?;
    Some((left.identity.clone(), left.disconnect_reason()))
}

async fn leave(mut client: Client) {
    client
        .send(Request::Leave(proto::LeaveRequest::default()))
        .await;
    client.until_closed().await;
}

async fn ping(client: &mut Client) {
    client.send(Request::Ping(1)).await;
    client
        .until(|m| matches!(m, Response::Pong(_)).then_some(()))
        .await;
}

async fn members(server: &Server) -> Vec<String> {
    let room = json!({"room": "lobby"});
    let list = twirp(server, may_administer("lobby"), "ListParticipants", room)
        .await
        .json();
    let participants = list["participants"].as_array().cloned().unwrap_or_default();
    let identities = participants.iter().filter_map(|p| p["identity"].as_str());
    identities.map(str::to_owned).collect()
}

fn status(error: Option<Box<Error>>) -> Option<u16> {
    match *error? {
        Error::Http(response) => Some(response.status().as_u16()),
        other => panic!("{other}"),
    }
}
