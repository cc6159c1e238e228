//! Agent workers and dispatches over real HTTP and websockets.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

mod room_support;

use livekit_protocol::{
    self as proto, DisconnectReason, JobStatus as Reported, JobType, WorkerStatus,
    server_message::Message as Answer, worker_message::Message as Request,
};
use livekit_token::{AccessToken, TokenVerifier, VideoGrants};
use rehearsal::room::{Answer as Answered, Config, JobRecord, JobStatus, Server};
use room_support::{
    Client, call, get, may_administer, may_join, start, twirp, wait,
    worker::{Worker, no, open, registration, yes},
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Error;

#[tokio::test]
async fn workers_need_the_grant_and_a_websocket() {
    let server = start(Config::default());
    assert_eq!(get(&server, "/agent").await.status, 404);
    let refused = open(&server, may_join("lobby")).await.err();
    match *refused.expect("refused") {
        Error::Http(response) => assert_eq!(response.status().as_u16(), 401),
        other => panic!("{other}"),
    }
    server.shutdown().await;
}

#[tokio::test]
async fn a_worker_that_does_not_follow_the_protocol_is_dropped() {
    let server = start(Config::default());
    let mut hasty = Worker::connect(&server, false).await;
    hasty.send(Request::UpdateWorker(Default::default())).await;
    assert_eq!(hasty.next().await, None);
    let mut wrong = Worker::connect(&server, true).await;
    let mut request = registration(JobType::JtRoom, "");
    request.deployment = "a_b".into();
    wrong.send(Request::Register(request)).await;
    assert_eq!(wrong.next().await, None);
    let mut twice = Worker::register(&server, JobType::JtRoom, "").await;
    let again = registration(JobType::JtRoom, "");
    twice.send(Request::Register(again)).await;
    assert_eq!(twice.next().await, None);
    let workers = server.witness().workers;
    assert_eq!(workers.len(), 1);
    assert!(workers[0].closed.is_some());
    server.shutdown().await;
}

#[tokio::test]
async fn a_room_job_goes_from_offer_to_the_agents_own_room() {
    let server = start(Config::default());
    for json in [false, true] {
        let room = format!("room-{json}");
        let mut request = registration(JobType::JtRoom, "");
        request.allowed_permissions = Some(proto::ParticipantPermission {
            can_subscribe: true,
            hidden: true,
            ..Default::default()
        });
        let mut worker = Worker::register_with(&server, request, json).await;
        worker
            .send(Request::Ping(proto::WorkerPing { timestamp: 7 }))
            .await;
        match worker.next().await {
            Some(Answer::Pong(pong)) => assert_eq!(pong.last_timestamp, 7),
            other => panic!("no pong but {other:?}"),
        }

        create_room(&server, &room, json!([])).await;
        let job = worker.asked().await;
        assert_eq!(
            (job.r#type(), job.agent_name.as_str()),
            (JobType::JtRoom, "")
        );
        assert_eq!(
            job.room.as_ref().map(|r| r.name.as_str()),
            Some(room.as_str())
        );
        let mut answer = yes(&job, "agent");
        answer.participant_name = "Agent".into();
        answer.participant_metadata = "m".into();
        answer.participant_attributes = [("k".to_owned(), "v".to_owned())].into();
        worker.answer(answer).await;
        let Some(Answer::Assignment(assignment)) = worker.next().await else {
            panic!("not assigned");
        };
        assert_eq!(assignment.url, None);
        let state = assignment.job.and_then(|j| j.state).expect("state");
        assert_eq!(state.status(), Reported::JsRunning);
        assert_eq!(
            (&state.worker_id, state.participant_identity.as_str()),
            (&worker.id, "agent")
        );
        let verifier = TokenVerifier::with_api_key(server.api_key(), server.api_secret());
        let claims = verifier.verify(&assignment.token).expect("token");
        assert_eq!(
            (claims.sub.as_str(), claims.kind.as_str()),
            ("agent", "agent")
        );
        assert_eq!(
            (claims.name.as_str(), claims.metadata.as_str()),
            ("Agent", "m")
        );
        assert_eq!(claims.attributes["k"], "v");
        assert_eq!(claims.attributes["lk.agent_name"], "");
        let grants = &claims.video;
        assert!(grants.room_join && grants.agent && grants.hidden && grants.room == room);
        assert!(grants.can_subscribe() && !grants.can_publish());
        let left = claims.exp as u64 - std::time::UNIX_EPOCH.elapsed().expect("clock").as_secs();
        assert!((3_500..=3_600).contains(&left), "{left} s");

        let agent = Client::join_with(&server, &assignment.token).await;
        assert_eq!(
            agent.join.participant.as_ref().map(|p| p.kind()),
            Some(proto::participant_info::Kind::Agent)
        );
        let witness = server.witness();
        let record = witness.job(&job.id).expect("job");
        assert_eq!(record.status, JobStatus::Running);
        assert_eq!(record.worker.as_ref(), Some(&worker.id));
        assert_eq!(witness.worker(&worker.id).map(|w| w.json), Some(json));

        worker.report(&job.id, Reported::JsSuccess, "").await;
        wait(&server, "success", |w| {
            w.job(&job.id)
                .is_some_and(|j| j.status == JobStatus::Succeeded)
        })
        .await;
        drop(worker);
        wait(&server, "worker gone", |w| w.live_workers().count() == 0).await;
    }
    server.shutdown().await;
}

#[tokio::test]
async fn named_agents_are_dispatched_only_by_name() {
    let server = start(Config::default());
    let mut named = Worker::register(&server, JobType::JtRoom, "scribe").await;
    let mut unnamed = Worker::register(&server, JobType::JtRoom, "").await;
    // By the room's creation: then nobody is dispatched automatically.
    create_room(
        &server,
        "a",
        json!([{"agent_name": "scribe", "metadata": "by room"}]),
    )
    .await;
    let assignment = named.take("one").await;
    assert_eq!(assignment.job.map(|j| j.metadata), Some("by room".into()));
    // By the token.
    let config = proto::RoomConfiguration {
        agents: vec![proto::RoomAgentDispatch {
            agent_name: "scribe".into(),
            metadata: "by token".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let token = AccessToken::with_api_key(server.api_key(), server.api_secret())
        .with_identity("ann")
        .with_grants(may_join("b"))
        .with_room_config(config)
        .to_jwt()
        .expect("token");
    let _ann = Client::join_with(&server, &token).await;
    let assignment = named.take("two").await;
    assert_eq!(assignment.job.map(|j| j.metadata), Some("by token".into()));
    // By a call, which creates the room, and so dispatches the one without a name as well.
    let created = dispatch(
        &server,
        "c",
        "CreateDispatch",
        json!({"agent_name": "scribe"}),
    )
    .await;
    let assignment = named.take("three").await;
    assert_eq!(
        assignment.job.map(|j| json!(j.dispatch_id)),
        Some(created["id"].clone())
    );
    assert_eq!(
        unnamed
            .take("auto")
            .await
            .job
            .and_then(|j| j.room)
            .map(|r| r.name),
        Some("c".into())
    );
    let jobs = server.witness().jobs;
    assert_eq!(jobs.iter().filter(|j| j.agent_name.is_empty()).count(), 1);
    server.shutdown().await;
}

#[tokio::test]
async fn participants_but_not_agents_or_recorders_have_jobs() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtParticipant, "").await;
    let _ann = Client::join(&server, "ann", may_join("lobby")).await;
    let assignment = worker.take("helper").await;
    let about = assignment.job.and_then(|j| j.participant);
    assert_eq!(about.map(|p| p.identity), Some("ann".into()));
    let _agent = Client::join_with(&server, &assignment.token).await;
    let recorder = VideoGrants {
        recorder: true,
        ..may_join("lobby")
    };
    let _recorder = Client::join(&server, "recorder", recorder).await;
    for kind in ["agent", "egress"] {
        let token = AccessToken::with_api_key(server.api_key(), server.api_secret())
            .with_identity(kind)
            .with_kind(kind)
            .with_grants(may_join("lobby"))
            .to_jwt()
            .expect("token");
        let _dependent = Client::join_with(&server, &token).await;
    }
    // Whoever comes next is the next to have one.
    let _bob = Client::join(&server, "bob", may_join("lobby")).await;
    let job = worker.asked().await;
    assert_eq!(job.participant.map(|p| p.identity), Some("bob".into()));
    // A dispatch that comes later finds those who are there.
    let mut late = Worker::register(&server, JobType::JtParticipant, "late").await;
    dispatch(
        &server,
        "lobby",
        "CreateDispatch",
        json!({"agent_name": "late"}),
    )
    .await;
    let mut about = Vec::new();
    for _ in 0..2 {
        about.extend(late.asked().await.participant.map(|p| p.identity));
    }
    assert_eq!(about, ["ann", "bob"]);
    server.shutdown().await;
}

#[tokio::test]
async fn a_job_moves_on_if_refused_or_the_worker_closes_but_not_if_it_is_silent() {
    let server = start(Config {
        job_timeout: Duration::from_millis(300),
        ..Config::default()
    });
    let mut first = Worker::register(&server, JobType::JtRoom, "").await;
    create_room(&server, "a", json!([])).await;
    let job = first.asked().await;
    let mut second = Worker::register(&server, JobType::JtRoom, "").await;
    first.answer(no(&job)).await;
    assert_eq!(second.asked().await.id, job.id);
    let mut third = Worker::register(&server, JobType::JtRoom, "").await;
    let second_id = second.id.clone();
    drop(second);
    assert_eq!(third.asked().await.id, job.id);
    // Silence: nobody else is asked, and the answer comes too late.
    let record = ended(&server, &job.id).await;
    assert_eq!(record.status, JobStatus::Unassigned);
    third.answer(yes(&job, "late")).await;
    third.status(WorkerStatus::WsAvailable, 0.5).await;
    let third_id = third.id.clone();
    wait(&server, "answer read", |w| {
        w.worker(&third_id).is_some_and(|w| w.load > 0.0)
    })
    .await;
    let record = server.witness().job(&job.id).cloned().expect("job");
    assert_eq!(record.status, JobStatus::Unassigned);
    let asked: Vec<_> = record
        .asked
        .iter()
        .map(|a| (a.worker.as_str(), a.answer))
        .collect();
    assert_eq!(
        asked,
        [
            (first.id.as_str(), Some(Answered::NotAvailable)),
            (second_id.as_str(), Some(Answered::Closed)),
            (third_id.as_str(), Some(Answered::None)),
        ]
    );
    server.shutdown().await;
}

#[tokio::test]
async fn a_job_may_be_answered_with_terminate() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    create_room(&server, "a", json!([])).await;
    let job = worker.asked().await;
    let answer = proto::AvailabilityResponse {
        terminate: true,
        ..no(&job)
    };
    worker.answer(answer).await;
    assert_eq!(ended(&server, &job.id).await.status, JobStatus::Succeeded);
    let listed = dispatch(&server, "a", "ListDispatch", json!({})).await;
    let jobs = &listed["agent_dispatches"][0]["state"]["jobs"];
    assert_eq!(
        (&jobs[0]["id"], &jobs[0]["state"]["status"]),
        (&json!(job.id), &json!("JS_SUCCESS"))
    );
    server.shutdown().await;
}

#[tokio::test]
async fn full_and_loaded_workers_get_no_jobs() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    let id = worker.id.clone();
    worker.status(WorkerStatus::WsFull, 0.0).await;
    wait(&server, "full", |w| w.worker(&id).is_some_and(|w| w.full)).await;
    create_room(&server, "a", json!([])).await;
    worker.status(WorkerStatus::WsAvailable, 0.7).await;
    wait(&server, "loaded", |w| {
        w.worker(&id).is_some_and(|w| !w.full && w.load == 0.7)
    })
    .await;
    create_room(&server, "b", json!([])).await;
    worker.status(WorkerStatus::WsAvailable, 0.5).await;
    wait(&server, "free", |w| {
        w.worker(&id).is_some_and(|w| w.load < 0.7)
    })
    .await;
    create_room(&server, "c", json!([])).await;
    assert_eq!(worker.asked().await.room.map(|r| r.name), Some("c".into()));
    let witness = server.witness();
    for room in ["a", "b"] {
        let job = witness.jobs_of(room).next().expect("job");
        assert_eq!((job.status, job.asked.len()), (JobStatus::Unassigned, 0));
    }
    server.shutdown().await;
}

#[tokio::test]
async fn the_job_of_a_lost_worker_is_not_dispatched_again() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    create_room(&server, "a", json!([])).await;
    let job = worker.take("agent").await.job.expect("job");
    let mut other = Worker::register(&server, JobType::JtRoom, "").await;
    drop(worker);
    assert_eq!(ended(&server, &job.id).await.status, JobStatus::WorkerLost);
    // The next that the other one hears of is another room.
    create_room(&server, "b", json!([])).await;
    assert_eq!(other.asked().await.room.map(|r| r.name), Some("b".into()));
    server.shutdown().await;
}

#[tokio::test]
async fn a_job_ends_with_its_agents_stay() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    // The room ends.
    create_room(&server, "a", json!([])).await;
    let assignment = worker.take("agent").await;
    let mut agent = Client::join_with(&server, &assignment.token).await;
    twirp(
        &server,
        may_administer("a"),
        "DeleteRoom",
        json!({"room": "a"}),
    )
    .await;
    let job = assignment.job.expect("job").id;
    assert_eq!(worker.terminated().await, job);
    assert_eq!(agent.until_leave().await, DisconnectReason::RoomDeleted);
    let record = ended(&server, &job).await;
    assert_eq!(record.status, JobStatus::Failed);
    assert!(record.terminated.is_some());
    // The final report comes after it and is kept.
    worker.report(&job, Reported::JsSuccess, "").await;
    wait(&server, "late report", |w| {
        w.job(&job).is_some_and(|j| j.updates.len() == 1)
    })
    .await;
    // The agent is removed.
    create_room(&server, "b", json!([])).await;
    let assignment = worker.take("agent").await;
    let _agent = Client::join_with(&server, &assignment.token).await;
    let who = json!({"room": "b", "identity": "agent"});
    twirp(&server, may_administer("b"), "RemoveParticipant", who).await;
    assert_eq!(worker.terminated().await, assignment.job.expect("job").id);
    // An agent that has not joined outlives its room, as on the real server.
    create_room(&server, "c", json!([])).await;
    let unjoined = worker.take("agent").await.job.expect("job").id;
    twirp(
        &server,
        may_administer("c"),
        "DeleteRoom",
        json!({"room": "c"}),
    )
    .await;
    create_room(&server, "d", json!([])).await;
    assert_eq!(worker.asked().await.room.map(|r| r.name), Some("d".into()));
    let witness = server.witness();
    assert_eq!(
        witness.job(&unjoined).map(|j| j.status),
        Some(JobStatus::Running)
    );
    server.shutdown().await;
}

#[tokio::test]
async fn deleting_a_dispatch_ends_its_jobs_and_removes_their_agents() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "scribe").await;
    let created = dispatch(
        &server,
        "a",
        "CreateDispatch",
        json!({"agent_name": "scribe"}),
    )
    .await;
    let assignment = worker.take("agent").await;
    let mut agent = Client::join_with(&server, &assignment.token).await;
    let id = json!({"dispatch_id": created["id"]});
    let listed = dispatch(&server, "a", "ListDispatch", id.clone()).await;
    assert_eq!(listed["agent_dispatches"].as_array().map(Vec::len), Some(1));
    dispatch(&server, "a", "DeleteDispatch", id.clone()).await;
    let job = assignment.job.expect("job").id;
    assert_eq!(worker.terminated().await, job);
    assert_eq!(ended(&server, &job).await.status, JobStatus::Succeeded);
    assert_eq!(
        agent.until_leave().await,
        DisconnectReason::ParticipantRemoved
    );

    // While a worker is being asked: the job is ended once it is assigned.
    let created = dispatch(
        &server,
        "a",
        "CreateDispatch",
        json!({"agent_name": "scribe"}),
    )
    .await;
    let asked = worker.asked().await;
    dispatch(
        &server,
        "a",
        "DeleteDispatch",
        json!({"dispatch_id": created["id"]}),
    )
    .await;
    worker.answer(yes(&asked, "agent")).await;
    let order = [worker.next().await, worker.next().await];
    assert!(
        matches!(
            order,
            [Some(Answer::Assignment(_)), Some(Answer::Termination(_))]
        ),
        "{order:?}"
    );

    let refused = async |room: &str, method: &str, body: Value| {
        let method = format!("AgentDispatchService/{method}");
        let answer = call(&server, may_administer(room), &method, body).await;
        (
            answer.status,
            answer.json()["code"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        )
    };
    let gone = json!({"room": "a", "dispatch_id": created["id"]});
    assert_eq!(
        refused("a", "DeleteDispatch", gone).await,
        (404, "not_found".into())
    );
    assert_eq!(
        refused("b", "ListDispatch", json!({"room": "a"})).await,
        (401, "unauthenticated".into())
    );
    assert_eq!(
        refused("b", "ListDispatch", json!({"room": "b"})).await,
        (503, "unavailable".into())
    );
    let bad = json!({"room": "a", "deployment": "a_b"});
    assert_eq!(
        refused("a", "CreateDispatch", bad).await,
        (400, "invalid_argument".into())
    );
    let big = json!({"room": "a", "metadata": "x".repeat(600_000)});
    assert_eq!(
        refused("a", "CreateDispatch", big).await,
        (400, "invalid_argument".into())
    );
    server.shutdown().await;
}

#[tokio::test]
async fn shutting_down_closes_workers() {
    let server = start(Config::default());
    let mut worker = Worker::register(&server, JobType::JtRoom, "").await;
    create_room(&server, "a", json!([])).await;
    let job = worker.take("agent").await.job.expect("job").id;
    let mut idle = Worker::connect(&server, false).await;
    let witness = server.shutdown().await;
    assert_eq!(worker.next().await, None);
    assert_eq!(idle.next().await, None);
    assert_eq!(witness.live_workers().count(), 0);
    assert_eq!(
        witness.job(&job).map(|j| j.status),
        Some(JobStatus::WorkerLost)
    );
}

async fn create_room(server: &Server, name: &str, agents: Value) {
    let room = json!({"name": name, "agents": agents});
    let created = twirp(server, may_administer(""), "CreateRoom", room).await;
    assert_eq!(created.status, 200, "{}", created.text());
}

/// A successful call of the AgentDispatchService.
async fn dispatch(server: &Server, room: &str, method: &str, mut body: Value) -> Value {
    body["room"] = json!(room);
    let method = format!("AgentDispatchService/{method}");
    let answer = call(server, may_administer(room), &method, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

async fn ended(server: &Server, job: &str) -> JobRecord {
    let over = |w: &rehearsal::room::Witness| w.job(job).is_some_and(|j| j.status.is_over());
    let witness = wait(server, "the job ends", over).await;
    witness.job(job).cloned().expect("job")
}
