//! The room server's own webhooks, and all sources of rooms at once.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use axum::{Router, body::Bytes, http::HeaderMap};
use base64::{Engine, engine::general_purpose::STANDARD};
use livekit_api::{access_token::AccessToken, services::room::CreateRoomOptions};
use livekit_protocol::{CreateAgentDispatchRequest, DisconnectReason};
use rehearsal::{
    room::{self, DeliveryOutcome, Whom},
    speaker::Speaker,
    stt,
};
use roomwarden::{
    cli::EXIT_OK,
    daemon::Daemon,
    ledger::unix_ms,
    transcripts::Sinks,
    webhooks::{self, Hints, PATH},
};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    agents::seen,
    stage::{Binary, Stage, stop},
    worker::agent,
};

/// Where the room server sends its webhooks, before a daemon is there to take them.
struct Receiver {
    listener: TcpListener,
    url: String,
}

impl Receiver {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
        let address = listener.local_addr().expect("its address");
        let url = format!("http://{address}{PATH}");
        Self { listener, url }
    }

    fn serve(self, router: Router) -> JoinSet<()> {
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            axum::serve(self.listener, router).await.expect("served");
        });
        serving
    }
}

fn stage(url: &str) -> Stage {
    let rooms = room::Config {
        webhook_urls: vec![url.to_owned()],
        webhook_retry: Duration::from_millis(50),
        job_timeout: Duration::from_secs(20),
        ..room::Config::default()
    };
    Stage::of(rooms, stt::Config::default())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_makes_the_daemon_look_at_once() {
    let receiver = Receiver::new().await;
    let stage = stage(&receiver.url);
    let mut config = stage.config();
    // It would not look by itself.
    config.rooms.poll_interval_ms = 3_600_000;
    config.rooms.reconcile_interval_ms = 3_600_000;
    let livekit = config.livekit.clone();
    let daemon = Daemon::start(config, Sinks::default());
    let mut ready = daemon.life().ready;
    ready
        .wait_for(|ready| *ready)
        .await
        .expect("it lists the rooms");
    let _serving = receiver.serve(webhooks::router(&livekit, daemon.hints()));
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let sent = |w: &room::Witness| {
        let deliveries = w.webhooks.iter().flat_map(|event| &event.deliveries);
        let all = deliveries.clone().count();
        all >= 3 && deliveries.filter(|d| d.status == Some(200)).count() == all
    };
    seen(&stage, "all are taken", sent).await;
    // In a room it is in, too: nobody says that ann has left, but the webhook that somebody else has.
    stage
        .faults(|faults| faults.departures_lost = Whom::identity("ann"))
        .await;
    ann.leave().await;
    for n in 0..10 {
        let name = format!("visitor-{n}");
        stage.speaker("r", &name).await.leave().await;
        if stage.stt.witness().streams[0].end.is_some() {
            break;
        }
    }
    stage
        .witnessed("ann's stream ends", |w| {
            w.streams[0].end == Some(stt::End::Acknowledged)
        })
        .await;
    stop(&daemon).await;
    stage.end().await;
}

/// On the control API's address, without a token of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_control_api_takes_them() {
    let stage = Stage::new().await;
    let mut binary = Binary::run(
        &stage,
        &[
            ("ROOMWARDEN__CONTROL__LISTEN", "127.0.0.1:0"),
            (
                "ROOMWARDEN__CONTROL__TOKEN",
                "a-token-that-livekit-does-not-have",
            ),
            ("ROOMWARDEN__ROOMS__POLL_INTERVAL_MS", "3600000"),
        ],
    );
    binary.logged("the control API listens").await;
    let log = binary.log();
    let (_, after) = log.split_once("the control API listens").expect("logged");
    let (_, address) = after.split_once("address=").expect("an address");
    let address = address.split_whitespace().next().expect("an address");
    let url = format!("http://{address}{PATH}");
    // Its first list of rooms may come a moment after this; hints go on until it is in the room.
    let ann = stage.speaker("r", "ann").await;
    let mut n = 0;
    while stage.stt.witness().opened == 0 {
        n += 1;
        let now = unix_ms(SystemTime::now()) / 1000;
        let body = format!("{{\"id\": \"EV_{n}\", \"createdAt\": \"{now}\"}}");
        let (key, secret) = (stage.rooms.api_key(), stage.rooms.api_secret());
        let token = AccessToken::with_api_key(key, secret)
            .with_sha256(&STANDARD.encode(Sha256::digest(&body)))
            .to_jwt()
            .expect("a token");
        let mut headers = HeaderMap::new();
        headers.insert("authorization", token.parse().expect("a header"));
        let kind = "application/webhook+json".parse().expect("a header");
        headers.insert("content-type", kind);
        assert_eq!(post_again(&url, &headers, &body.into()).await, 200);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(n < 600, "it never looks");
    }
    stage.streaming(1).await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.all_acknowledged(1).await;
    ann.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_secret_they_are_refused_and_a_repetition_changes_nothing() {
    let receiver = Receiver::new().await;
    let stage = stage(&receiver.url);
    let livekit = stage.config().livekit;
    let (hints, mut hinted) = Hints::new();
    let (kept, posts) = Posts::new();
    let router = webhooks::router(&livekit, hints).layer(axum::middleware::from_fn(
        move |request: axum::extract::Request, next: axum::middleware::Next| {
            let kept = kept.clone();
            async move { kept.keep(request, next).await }
        },
    ));
    let url = receiver.url.clone();
    let _serving = receiver.serve(router);
    let options = CreateRoomOptions::default();
    stage.api().create_room("r", options).await.expect("a room");
    assert_eq!(hinted.recv().await.as_deref(), Some("r"));
    let (headers, body) = posts.first();
    let sent = post_again(&url, &headers, &body).await;
    assert_eq!(
        (sent, hinted.try_recv().is_err()),
        (200, true),
        "known already"
    );
    let mut changed = body.to_vec();
    changed.push(b' ');
    let sent = post_again(&url, &headers, &changed.into()).await;
    assert_eq!((sent, hinted.try_recv().is_err()), (401, true));
    stage.end().await;

    // A server with another secret, as LiveKit's would be to whom it is not known.
    let receiver = Receiver::new().await;
    let stage = self::stage(&receiver.url);
    let (hints, mut hinted) = Hints::new();
    let _serving = receiver.serve(webhooks::router(&livekit, hints));
    let options = CreateRoomOptions::default();
    stage.api().create_room("r", options).await.expect("a room");
    let refused = |w: &room::Witness| {
        let mut deliveries = w.webhooks.iter().flat_map(|event| &event.deliveries);
        deliveries.any(|d| d.status == Some(401) && d.outcome == DeliveryOutcome::Sent)
    };
    seen(&stage, "it is refused", refused).await;
    assert!(hinted.try_recv().is_err());
    stage.end().await;
}

/// What was posted.
#[derive(Clone, Default)]
struct Posts(Arc<Mutex<Vec<(HeaderMap, Bytes)>>>);

impl Posts {
    fn new() -> (Self, Self) {
        let posts = Self::default();
        (posts.clone(), posts)
    }

    async fn keep(
        &self,
        request: axum::extract::Request,
        next: axum::middleware::Next,
    ) -> axum::response::Response {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        let kept = (parts.headers.clone(), body.clone());
        self.0.lock().expect("no panic").push(kept);
        next.run(axum::extract::Request::from_parts(parts, body.into()))
            .await
    }

    fn first(&self) -> (HeaderMap, Bytes) {
        self.0.lock().expect("no panic")[0].clone()
    }
}

async fn post_again(url: &str, headers: &HeaderMap, body: &Bytes) -> u16 {
    use livekit_net::{Header, HttpClientExt};
    let header = |name: &str| Header {
        name: name.to_owned(),
        value: headers[name].to_str().expect("text").to_owned(),
    };
    let headers = vec![header("authorization"), header("content-type")];
    let client = livekit_net::http_client().expect("a client");
    let answer = client.post(url.to_owned(), headers, body.to_vec()).await;
    answer.expect("an answer").status
}

/// Rooms that are configured, found, dispatched to and told of, all at once, with events doubled, lost
/// and late: no participant is ever transcribed twice at a time. ROOMWARDEN_SEED repeats a run as far
/// as the machine's own timing allows.
#[tokio::test(flavor = "multi_thread")]
async fn all_sources_together_make_one_session_for_each_participant() {
    const ROOMS: u64 = 4;
    const STEPS: usize = 40;
    let seed = std::env::var("ROOMWARDEN_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("ROOMWARDEN_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let receiver = Receiver::new().await;
    let stage = stage(&receiver.url);
    let mut config = agent(&stage);
    // room-0 is always there, room-1 is found as well, the others are only dispatched to.
    config.rooms.join = vec!["room-0".into()];
    config.rooms.discover = true;
    config.rooms.include = vec!["room-1".into()];
    config.agent.name = Some("scribe".into());
    let livekit = config.livekit.clone();
    let daemon = Daemon::start(config, Sinks::default());
    let hints = daemon.hints();
    let _serving = receiver.serve(webhooks::router(&livekit, hints.clone()));
    let registered = |w: &room::Witness| w.live_workers().count() == 1;
    seen(&stage, "the worker registers", registered).await;

    let (key, secret) = (stage.rooms.api_key(), stage.rooms.api_secret());
    let dispatches = livekit_api::services::agent_dispatch::AgentDispatchClient::with_api_key(
        &stage.rooms.http_url(),
        key,
        secret,
    );
    let mut speakers: BTreeMap<String, (String, Speaker)> = BTreeMap::new();
    for step in 0..STEPS {
        let room = format!("room-{}", random.u64(..ROOMS));
        match random.u8(..10) {
            0..=2 if speakers.len() < 5 => {
                let name = format!("speaker-{step}");
                if let Ok(speaker) = stage.try_speaker(&room, &name).await {
                    speakers.insert(name, (room, speaker));
                }
            }
            3..=4 => {
                for _ in 0..random.u8(1..3) {
                    let request = CreateAgentDispatchRequest {
                        room: room.clone(),
                        agent_name: "scribe".into(),
                        ..CreateAgentDispatchRequest::default()
                    };
                    dispatches
                        .create_dispatch(request)
                        .await
                        .expect("a dispatch");
                }
            }
            5 => {
                for _ in 0..random.u8(1..20) {
                    hints.give(&room);
                }
            }
            6 => {
                // It may be gone.
                let _ = stage.api().delete_room(&room).await;
                let there: Vec<_> = speakers
                    .extract_if(.., |_, (of, _)| *of == room)
                    .map(|(_, (_, speaker))| speaker)
                    .collect();
                for speaker in there {
                    speaker.leave().await;
                }
            }
            7 => {
                if let Some((_, (_, speaker))) = speakers.pop_first() {
                    speaker.leave().await;
                }
            }
            8 => {
                let everyone = || Whom::Everyone;
                let (lost, late, twice, hooks) =
                    (random.bool(), random.bool(), random.bool(), random.bool());
                stage
                    .faults(|faults| {
                        if lost {
                            faults.departures_lost = everyone();
                        } else if late {
                            (faults.departures_late, faults.lateness_ms) = (everyone(), 300);
                        } else if twice {
                            faults.departures_twice = everyone();
                        }
                        if hooks {
                            faults.webhooks_lost = everyone();
                        }
                    })
                    .await;
            }
            _ => {
                if let Ok(there) = dispatches.list_dispatch(room.as_str()).await
                    && let Some(first) = there.first()
                {
                    let _ = dispatches.delete_dispatch(&first.id, room.as_str()).await;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(random.u64(..300))).await;
    }
    stage.faults(|_| {}).await;
    // Whoever is in a room that is wanted is heard in the end.
    for room in ["room-0", "room-1"] {
        let name = format!("last of {room}");
        let speaker = stage.speaker(room, &name).await;
        speakers.insert(name, (room.to_owned(), speaker));
    }
    let heard = speakers
        .values()
        .filter(|(room, _)| room == "room-0" || room == "room-1");
    let heard = heard.count();
    stage
        .witnessed("all who are wanted are heard", |w| {
            let open = w.streams.iter().filter(|s| s.end.is_none());
            open.filter(|s| s.audio_seconds > 0.5).count() >= heard
        })
        .await;
    let report = stop(&daemon).await;
    for (_, speaker) in speakers.into_values() {
        speaker.leave().await;
    }

    // By the books: no two streams of a participant at a time, but for the close of one and the
    // opening of the next after the room was joined anew.
    let mut of_participants: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for receipt in &report.receipts {
        let whose = (receipt.key.room.clone(), receipt.key.participant.clone());
        of_participants.entry(whose).or_default().push(receipt);
    }
    for (whose, mut receipts) in of_participants {
        receipts.sort_by_key(|receipt| receipt.opened_at_ms);
        for pair in receipts.windows(2) {
            let closing = (pair[0].close_seconds * 1000.0) as u64;
            let ordered = pair[0].settled_at_ms.saturating_sub(closing);
            // Clocks of milliseconds, and what is rounded.
            assert!(
                pair[1].opened_at_ms + 20 >= ordered,
                "seed {seed}: {whose:?} twice at a time: {pair:#?}"
            );
        }
    }
    // By the room server: at no time two of ours in a room.
    for room in &stage.rooms.witness().rooms {
        let us = room.participants.iter().filter(|p| p.kind == "AGENT");
        let us: Vec<_> = us.collect();
        let displaced = Some(DisconnectReason::DuplicateIdentity);
        let displaced = us.iter().find(|stay| stay.reason == displaced);
        assert!(displaced.is_none(), "seed {seed}: {displaced:#?}");
        for pair in us.windows(2) {
            let left = pair[0].left.expect("it has left").ms;
            assert!(left <= pair[1].joined.ms, "seed {seed}: {room:#?}");
        }
    }
    let witness = stage.witnessed("no stream open", |w| w.open_now == 0).await;
    assert_eq!(witness.opened, report.opened, "seed {seed}");
    // Every job was told its end.
    let told = |w: &room::Witness| {
        let mut jobs = w.jobs.iter().filter(|job| job.worker.is_some());
        jobs.all(|job| {
            let last = job.updates.last().map(|update| update.status);
            matches!(last, Some("JS_SUCCESS" | "JS_FAILED"))
        })
    };
    let witness = seen(&stage, "all jobs are over", told).await;
    println!(
        "{} streams, {} jobs, {} rooms, {} webhooks",
        report.opened,
        witness.jobs.len(),
        witness.rooms.len(),
        witness.webhooks.len()
    );
    stage.end().await;
}
