//! Webhooks over real HTTP.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

mod room_support;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use livekit_protocol as proto;
use livekit_token::TokenVerifier;
use rehearsal::room::{Config, DeliveryOutcome, Faults, Server, Whom, Witness};
use room_support::{Client, LIMIT, may_administer, may_join, start, twirp, wait};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time::timeout};

#[tokio::test]
async fn a_rooms_events_come_in_order_and_signed() {
    let mut hook = Hook::start().await;
    let server = start(hook.config());
    let ann = Client::join(&server, "ann", may_join("lobby")).await;
    let sid = ann.sid().to_owned();
    let room_sid = ann.join.room.as_ref().map(|r| r.sid.clone());
    drop(ann);
    // Her media never came up.
    wait(&server, "ann leaves", |w| {
        w.room("lobby").is_some_and(|r| r.present().count() == 0)
    })
    .await;
    delete_room(&server, "lobby").await;
    let verifier = TokenVerifier::with_api_key(server.api_key(), server.api_secret());
    let mut events = Vec::new();
    for _ in 0..3 {
        let call = hook.next().await;
        assert_eq!(call.content_type, "application/webhook+json");
        let claims = verifier.verify(&call.authorization).expect("signed");
        assert_eq!(
            claims.sha256,
            BASE64_STANDARD.encode(Sha256::digest(&call.body))
        );
        events.push(call.event());
    }
    let names: Vec<_> = events.iter().map(|e| e.event.as_str()).collect();
    assert_eq!(
        names,
        [
            "room_started",
            "participant_connection_aborted",
            "room_finished"
        ]
    );
    for event in &events {
        assert_eq!(event.room.as_ref().map(|r| r.sid.clone()), room_sid);
        assert!(event.id.starts_with("EV_") && event.created_at > 0);
    }
    let who = events[1].participant.as_ref().expect("participant");
    assert_eq!(
        (who.identity.as_str(), who.sid.as_str()),
        ("ann", sid.as_str())
    );
    assert_eq!(
        who.disconnect_reason(),
        proto::DisconnectReason::SignalClose
    );

    let witness = wait(&server, "all delivered", |w| all(w, DeliveryOutcome::Sent)).await;
    let recorded: Vec<_> = witness.webhooks.iter().map(|w| w.id.as_str()).collect();
    assert_eq!(
        recorded,
        events.iter().map(|e| e.id.as_str()).collect::<Vec<_>>()
    );
    assert_eq!(witness.webhooks[1].participant.as_deref(), Some("ann"));
    server.shutdown().await;
}

#[tokio::test]
async fn a_failing_receiver_is_tried_again() {
    let mut hook = Hook::start().await;
    let config = Config {
        webhook_retry: Duration::from_millis(1),
        ..hook.config()
    };
    let server = start(config);
    hook.answer([503, 429, 200]);
    create_room(&server, "a").await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(hook.next().await.event().id);
    }
    assert!(ids.windows(2).all(|w| w[0] == w[1]));
    let witness = wait(&server, "sent", |w| all(w, DeliveryOutcome::Sent)).await;
    let delivery = &witness.webhooks[0].deliveries[0];
    assert_eq!((delivery.attempts, delivery.status), (3, Some(200)));
    // A refusal is an answer too.
    hook.answer([401]);
    create_room(&server, "b").await;
    let witness = wait(&server, "refused", |w| {
        w.webhooks.len() == 2 && all(w, DeliveryOutcome::Sent)
    });
    let refused = witness.await.webhooks[1].deliveries[0].clone();
    assert_eq!((refused.attempts, refused.status), (1, Some(401)));
    // The last failure is final.
    hook.answer([500; 5]);
    create_room(&server, "c").await;
    let failed = wait(&server, "failed", |w| {
        outcome(w, "c") == Some(DeliveryOutcome::Failed)
    })
    .await;
    let failed = failed.webhooks[2].deliveries[0].clone();
    assert_eq!((failed.attempts, failed.status), (5, Some(500)));
    server.shutdown().await;
}

#[tokio::test]
async fn one_rooms_failure_holds_up_no_other() {
    let mut hook = Hook::start().await;
    let server = start(Config {
        webhook_retry: Duration::from_secs(3_600),
        ..hook.config()
    });
    hook.answer([503]);
    create_room(&server, "a").await;
    assert_eq!(
        hook.next().await.event().room.map(|r| r.name),
        Some("a".into())
    );
    delete_room(&server, "a").await;
    create_room(&server, "b").await;
    assert_eq!(
        hook.next().await.event().room.map(|r| r.name),
        Some("b".into())
    );
    // Order within the room comes first.
    wait(&server, "b sent", |w| {
        outcome(w, "b") == Some(DeliveryOutcome::Sent)
    })
    .await;
    let pending = server.witness().webhooks;
    let of_a = pending
        .iter()
        .filter(|w| w.room == "a")
        .flat_map(|w| &w.deliveries);
    assert!(of_a.clone().count() == 2 && of_a.clone().all(|d| d.ended.is_none()));
    server.kill().await;
}

#[tokio::test]
async fn events_that_wait_too_long_or_in_too_long_a_queue_are_dropped() {
    // Nobody answers, so that the first event holds up the others of its room.
    let deaf = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let config = Config {
        webhook_urls: vec![format!("http://{}", deaf.local_addr().expect("address"))],
        ..Config::default()
    };
    let server = start(config);
    for _ in 0..110 {
        create_room(&server, "a").await;
        delete_room(&server, "a").await;
    }
    let dropped = |w: &Witness| {
        let deliveries = w.webhooks.iter().flat_map(|w| &w.deliveries);
        deliveries
            .filter(|d| d.outcome == DeliveryOutcome::Dropped)
            .count()
    };
    // Of 220 one is under way, at most, and 200 wait.
    let seen = dropped(&server.witness());
    assert!((19..=20).contains(&seen), "{seen}");
    server.kill().await;

    let mut hook = Hook::start().await;
    let config = Config {
        webhook_max_age: Duration::ZERO,
        ..hook.config()
    };
    let server = start(config);
    create_room(&server, "a").await;
    wait(&server, "too old", |w| {
        outcome(w, "a") == Some(DeliveryOutcome::Dropped)
    })
    .await;
    server.shutdown().await;
    assert!(hook.calls.try_recv().is_err(), "nothing was sent");
}

#[tokio::test]
async fn lost_webhooks_are_only_recorded() {
    let mut hook = Hook::start().await;
    let server = start(hook.config());
    let faults = Faults {
        webhooks_lost: Whom::Everyone,
        ..Faults::default()
    };
    server.set_faults(faults).await;
    create_room(&server, "a").await;
    server.set_faults(Faults::default()).await;
    delete_room(&server, "a").await;
    assert_eq!(hook.next().await.event().event, "room_finished");
    let witness = server.shutdown().await;
    assert_eq!(witness.webhooks[0].event, "room_started");
    assert_eq!(
        witness.webhooks[0].deliveries[0].outcome,
        DeliveryOutcome::Lost
    );
}

#[tokio::test]
async fn webhooks_about_one_participant_can_be_lost() {
    let mut hook = Hook::start().await;
    let server = start(hook.config());
    let faults = Faults {
        webhooks_lost: Whom::identity("ann"),
        ..Faults::default()
    };
    server.set_faults(faults).await;
    for identity in ["ann", "bob"] {
        drop(Client::join(&server, identity, may_join("lobby")).await);
        wait(&server, "gone", |w| {
            let room = w.room("lobby").expect("the room");
            room.participant(identity).is_some_and(|p| p.left.is_some())
        })
        .await;
    }
    delete_room(&server, "lobby").await;
    let mut told = Vec::new();
    for _ in 0..3 {
        let event = hook.next().await.event();
        told.push((event.event, event.participant.map(|p| p.identity)));
    }
    let aborted = "participant_connection_aborted";
    let expected = [
        ("room_started", None),
        (aborted, Some("bob")),
        ("room_finished", None),
    ];
    let expected = expected.map(|(event, who)| (event.to_owned(), who.map(str::to_owned)));
    assert_eq!(told, expected);
    let witness = server.shutdown().await;
    let lost: Vec<_> = (witness.webhooks.iter())
        .filter(|w| w.deliveries[0].outcome == DeliveryOutcome::Lost)
        .map(|w| w.participant.as_deref())
        .collect();
    assert_eq!(lost, [Some("ann")]);
}

#[tokio::test]
async fn departures_are_told_to_webhooks_as_the_faults_have_it() {
    let mut hook = Hook::start().await;
    let server = start(hook.config());
    let who = || Whom::identity("ann");
    for (faults, times) in [
        (Faults::default(), 1),
        (
            Faults {
                departures_twice: who(),
                ..Faults::default()
            },
            2,
        ),
        (
            Faults {
                departures_lost: who(),
                ..Faults::default()
            },
            0,
        ),
        (
            Faults {
                departures_late: who(),
                lateness_ms: u64::MAX,
                ..Faults::default()
            },
            0,
        ),
    ] {
        server.set_faults(faults).await;
        drop(Client::join(&server, "ann", may_join("lobby")).await);
        wait(&server, "gone", |w| {
            w.room("lobby").is_some_and(|r| r.present().count() == 0)
        })
        .await;
        delete_room(&server, "lobby").await;
        let mut told = Vec::new();
        while told.last().is_none_or(|event| event != "room_finished") {
            told.push(hook.next().await.event().event);
        }
        let aborted = ["participant_connection_aborted"].repeat(times);
        let expected = [vec!["room_started"], aborted, vec!["room_finished"]].concat();
        assert_eq!(told, expected);
    }
    server.shutdown().await;
}

#[tokio::test]
async fn the_last_events_are_delivered_before_the_server_ends() {
    let mut hook = Hook::start().await;
    let server = start(hook.config());
    create_room(&server, "a").await;
    server.shutdown().await;
    assert_eq!(hook.next().await.event().event, "room_started");
    assert_eq!(hook.next().await.event().event, "room_finished");
}

#[tokio::test]
async fn urls_that_are_not_http_are_an_error() {
    for url in ["https://localhost", "localhost", ""] {
        let config = Config {
            webhook_urls: vec![url.to_owned()],
            ..Config::default()
        };
        assert!(Server::start(config).is_err(), "{url:?}");
    }
}

/// A receiver of webhooks.
struct Hook {
    url: String,
    calls: mpsc::UnboundedReceiver<Call>,
    /// What it answers to the next calls; after that 200.
    answers: Arc<Mutex<VecDeque<u16>>>,
    server: JoinHandle<()>,
}

struct Call {
    authorization: String,
    content_type: String,
    body: Vec<u8>,
}

type Shared = (mpsc::UnboundedSender<Call>, Arc<Mutex<VecDeque<u16>>>);

impl Hook {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let url = format!("http://{}/hook", listener.local_addr().expect("address"));
        let (sender, calls) = mpsc::unbounded_channel();
        let answers = Arc::new(Mutex::new(VecDeque::new()));
        let router = Router::new()
            .route("/hook", post(receive))
            .with_state((sender, answers.clone()));
        let server = tokio::spawn(async move {
            axum::serve(listener, router).await.expect("serves");
        });
        Self {
            url,
            calls,
            answers,
            server,
        }
    }

    fn config(&self) -> Config {
        Config {
            webhook_urls: vec![self.url.clone()],
            ..Config::default()
        }
    }

    fn answer(&self, statuses: impl IntoIterator<Item = u16>) {
        self.answers.lock().expect("lock").extend(statuses);
    }

    async fn next(&mut self) -> Call {
        let call = timeout(LIMIT, self.calls.recv()).await;
        call.expect("a call in time").expect("a call")
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Call {
    fn event(&self) -> proto::WebhookEvent {
        serde_json::from_slice(&self.body).expect("event")
    }
}

async fn receive(
    State((calls, answers)): State<Shared>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> StatusCode {
    let header = |name: &str| {
        let value = headers.get(name).and_then(|v| v.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    // The test may be over.
    let _ = calls.send(Call {
        authorization: header("authorization"),
        content_type: header("content-type"),
        body: body.to_vec(),
    });
    let answer = answers.lock().expect("lock").pop_front().unwrap_or(200);
    StatusCode::from_u16(answer).expect("status")
}

fn all(witness: &Witness, outcome: DeliveryOutcome) -> bool {
    let mut deliveries = witness.webhooks.iter().flat_map(|w| &w.deliveries);
    deliveries.all(|d| d.outcome == outcome)
}

fn outcome(witness: &Witness, room: &str) -> Option<DeliveryOutcome> {
    let event = witness.webhooks.iter().find(|w| w.room == room)?;
    event.deliveries.first().map(|d| d.outcome)
}

async fn create_room(server: &Server, name: &str) {
    let created = twirp(
        server,
        may_administer(""),
        "CreateRoom",
        json!({"name": name}),
    )
    .await;
    assert_eq!(created.status, 200, "{}", created.text());
}

async fn delete_room(server: &Server, name: &str) {
    let deleted = twirp(
        server,
        may_administer(name),
        "DeleteRoom",
        json!({"room": name}),
    )
    .await;
    assert_eq!(deleted.status, 200, "{}", deleted.text());
}
