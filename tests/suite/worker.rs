//! Agent dispatch as a source of rooms: the room server says what became of jobs, the STT server of
//! streams.

use std::{
    net::SocketAddr,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use livekit_api::services::agent_dispatch::AgentDispatchClient;
use livekit_protocol::{CreateAgentDispatchRequest, DisconnectReason};
use rehearsal::{
    room::{self, JobRecord, JobStatus, Mishap},
    stt,
};
use roomwarden::{
    cli::{EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE},
    config::{Config, JobKind},
    daemon::Daemon,
    requests::Request,
    transcripts::Sinks,
};
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    process::Command,
    sync::watch,
    task::JoinSet,
};

use crate::{
    agents::seen,
    stage::{Binary, Kept, LIMIT, Stage, reasons, stop},
};

const IDENTITY: &str = "roomwarden-agent";

/// A stage whose server waits for workers on busy machines.
pub fn stage() -> Stage {
    let rooms = room::Config {
        job_timeout: Duration::from_secs(20),
        ..room::Config::default()
    };
    Stage::of(rooms, stt::Config::default())
}

/// That of a daemon which joins only where it is dispatched to.
pub fn agent(stage: &Stage) -> Config {
    let mut config = stage.config();
    config.rooms.discover = false;
    config.rooms.reconcile_interval_ms = 300;
    config.agent.enabled = true;
    // Machines that test are busy.
    config.agent.load_percent = 100;
    config
}

/// The same for the real binary.
pub const AGENT: [(&str, &str); 4] = [
    ("ROOMWARDEN__ROOMS__DISCOVER", "false"),
    ("ROOMWARDEN__ROOMS__RECONCILE_INTERVAL_MS", "300"),
    ("ROOMWARDEN__AGENT__ENABLED", "true"),
    ("ROOMWARDEN__AGENT__LOAD_PERCENT", "100"),
];

/// Starts a daemon and waits until the server has so many workers.
async fn start(stage: &Stage, config: Config, workers: usize) -> Daemon {
    let daemon = Daemon::start(config, Sinks::default());
    registered(stage, workers).await;
    daemon
}

async fn registered(stage: &Stage, workers: usize) {
    let there = |w: &room::Witness| w.live_workers().count() == workers;
    seen(stage, "workers register", there).await;
}

pub fn dispatches(stage: &Stage) -> AgentDispatchClient {
    let (key, secret) = (stage.rooms.api_key(), stage.rooms.api_secret());
    AgentDispatchClient::with_api_key(&stage.rooms.http_url(), key, secret)
}

pub async fn dispatch(stage: &Stage, room: &str, name: &str, metadata: &str) -> String {
    let request = CreateAgentDispatchRequest {
        room: room.to_owned(),
        agent_name: name.to_owned(),
        metadata: metadata.to_owned(),
        ..CreateAgentDispatchRequest::default()
    };
    let made = dispatches(stage).create_dispatch(request).await;
    made.expect("a dispatch").id
}

/// Waits until the newest job of a room has reported its end; the job.
async fn job_over(stage: &Stage, room: &str) -> JobRecord {
    let newest = |w: &room::Witness| w.jobs_of(room).last().cloned();
    let reported = |w: &room::Witness| {
        let last = newest(w).and_then(|job| job.updates.last().cloned());
        last.is_some_and(|update| ["JS_SUCCESS", "JS_FAILED"].contains(&update.status))
    };
    let witness = seen(stage, "the job's end is reported", reported).await;
    newest(&witness).expect("a job")
}

fn last_update(job: &JobRecord) -> (&str, &str) {
    let last = job.updates.last().expect("an update");
    (last.status, &last.error)
}

/// `roomwarden` with these arguments, on the stage.
pub async fn roomwarden(stage: &Stage, args: &[&str]) -> Output {
    let child = Command::new(env!("CARGO_BIN_EXE_roomwarden"))
        .args(args)
        .env_clear()
        .envs(stage.environment())
        // Only LiveKit is asked.
        .env_remove("DEEPGRAM_API_KEY")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it starts");
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    output.expect("it ends").expect("its output")
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_room_is_dispatched_to_and_its_job_ends_with_it() {
    let stage = stage();
    let daemon = start(&stage, agent(&stage), 1).await;
    let worker = stage.rooms.witness().workers[0].clone();
    assert_eq!(
        (worker.job_type, worker.agent_name.as_str()),
        ("JT_ROOM", "")
    );
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let witness = stage.rooms.witness();
    let job = witness.jobs_of("r").next().expect("a job");
    assert_eq!(job.status, JobStatus::Running, "{job:#?}");
    assert_eq!(job.agent_identity, IDENTITY);
    let us = witness.room("r").expect("the room").participant(IDENTITY);
    assert_eq!(us.expect("us").kind, "AGENT");

    ann.leave().await;
    stage.open(0).await;
    stage.api().delete_room("r").await.expect("deletion");
    let job = job_over(&stage, "r").await;
    assert_eq!(last_update(&job), ("JS_SUCCESS", ""), "{job:#?}");
    assert_eq!(stage.rooms.witness().jobs.len(), 1);

    // One that is still transcribed when the daemon ends.
    let bob = stage.speaker("s", "bob").await;
    stage.streaming(1).await;
    let report = stop(&daemon).await;
    let job = job_over(&stage, "s").await;
    assert_eq!(last_update(&job), ("JS_SUCCESS", ""), "{job:#?}");
    registered(&stage, 0).await;
    assert_eq!((report.opened, report.acknowledged), (2, 2), "{report:#?}");
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatch_by_name_has_settings_of_its_own_and_can_be_taken_back() {
    let stage = stage();
    let mut config = agent(&stage);
    config.agent.name = Some("scribe".into());
    config.transcripts.room = false;
    let kept = Kept::default();
    let daemon = Daemon::start(config, kept.sinks());
    registered(&stage, 1).await;
    // Nobody asked for it here.
    let other = stage.speaker("other", "bob").await;
    let ann = stage.speaker("r", "ann").await;
    // By the wrong name, which is not set here.
    let wrong = roomwarden(&stage, &["dispatch", "r", "--wait", "2"]).await;
    assert_eq!(
        wrong.status.code(),
        Some(EXIT_UNACKNOWLEDGED.into()),
        "{}",
        said(&wrong)
    );
    assert!(
        said(&wrong).contains("without agent.name"),
        "{}",
        said(&wrong)
    );

    let named = |args: &[&str]| {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let file = stage.state.path().join("named.toml");
        std::fs::write(&file, "[agent]\nname = 'scribe'\n").expect("a file");
        let stage = &stage;
        async move {
            let mut all: Vec<&str> = args.iter().map(String::as_str).collect();
            all.extend(["--config", file.to_str().expect("UTF-8")]);
            roomwarden(stage, &all).await
        }
    };
    let args = "dispatch r --json --model nova-2 --language de --wait 50";
    let output = named(&args.split(' ').collect::<Vec<_>>()).await;
    assert_eq!(
        output.status.code(),
        Some(EXIT_OK.into()),
        "{}",
        said(&output)
    );
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&told["room"], &told["identity"]),
        (&"r".into(), &IDENTITY.into())
    );
    stage.streaming(1).await;
    let witness = stage.stt.witness();
    let parameter = |name: &str| {
        let mut parameters = witness.streams[0].parameters.iter();
        parameters
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    };
    assert_eq!(
        (parameter("model"), parameter("language")),
        (Some("nova-2"), Some("de"))
    );

    // A second one with other settings is refused, the same is not.
    for (metadata, status) in [("{\"model\": \"nova-3\"}", "JS_FAILED"), ("", "JS_RUNNING")] {
        let id = dispatch(&stage, "r", "scribe", metadata).await;
        let heard = |w: &room::Witness| {
            let job = w.jobs.iter().find(|job| job.dispatch == id);
            job.and_then(|job| job.updates.last())
                .is_some_and(|update| update.status == status)
        };
        seen(&stage, status, heard).await;
    }
    let witness = stage.rooms.witness();
    let failed = witness
        .jobs
        .iter()
        .find(|job| job.status == JobStatus::Failed);
    let failed = failed.expect("the second one");
    assert!(
        failed.error.contains("other settings already"),
        "{failed:#?}"
    );

    let output = named(&["dispatch", "r", "--cancel"]).await;
    assert_eq!(
        output.status.code(),
        Some(EXIT_OK.into()),
        "{}",
        said(&output)
    );
    assert_eq!(said(&output).matches("AD_").count(), 3, "{}", said(&output));
    stage.open(0).await;
    stage.without(IDENTITY).await;
    let ended = |w: &room::Witness| {
        let jobs = w.jobs_of("r").filter(|job| job.agent_name == "scribe");
        jobs.filter(|job| job.updates.last().is_some_and(|u| u.status == "JS_SUCCESS"))
            .count()
            == 2
    };
    let witness = seen(&stage, "both jobs end well", ended).await;
    let room = witness.room("r").expect("the room");
    assert!(room.participant("ann").expect("ann").left.is_none());

    let output = named(&["dispatch", "r", "--metadata", "{\"modle\": \"x\"}"]).await;
    assert_eq!(output.status.code(), Some(EXIT_USAGE.into()));
    assert!(
        said(&output).contains("did you mean model?"),
        "{}",
        said(&output)
    );
    // Others can send it all the same.
    dispatch(&stage, "r", "scribe", "{\"modle\": \"x\"}").await;
    let job = job_over(&stage, "r").await;
    let (status, error) = last_update(&job);
    assert_eq!(
        (status, job.status),
        ("JS_FAILED", JobStatus::Failed),
        "{job:#?}"
    );
    assert!(
        error.contains("\"modle\"") && error.contains("did you mean model?"),
        "{error}"
    );

    let report = stop(&daemon).await;
    assert_eq!(
        reasons(&report),
        ["agent job ended (its dispatch was deleted)"]
    );
    stage.all_acknowledged(1).await;
    ann.leave().await;
    other.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_free_slot_it_is_full_and_what_was_lost_is_taken_up_later() {
    let stage = stage();
    let mut config = agent(&stage);
    config.agent.slots = 1;
    let daemon = start(&stage, config, 1).await;
    let ann = stage.speaker("a", "ann").await;
    stage.streaming(1).await;
    let full = |w: &room::Witness| w.workers[0].full && w.workers[0].job_count == 1;
    let witness = seen(&stage, "the worker is full", full).await;
    assert!(witness.workers[0].load > 0.9, "{:#?}", witness.workers);
    let bob = stage.speaker("b", "bob").await;
    let lost = |w: &room::Witness| {
        let mut jobs = w.jobs_of("b");
        jobs.next()
            .is_some_and(|job| job.status == JobStatus::Unassigned)
    };
    seen(&stage, "nobody gets the job", lost).await;
    ann.leave().await;
    stage.api().delete_room("a").await.expect("deletion");
    let available = |w: &room::Witness| !w.workers[0].full && w.workers[0].job_count == 0;
    seen(&stage, "the worker is available", available).await;
    // Its job is not given away again, and bob is heard all the same.
    stage.streaming(1).await;
    let witness = stage.rooms.witness();
    assert_eq!(witness.jobs_of("b").count(), 1);
    assert!(
        witness
            .room("b")
            .expect("b")
            .participant(IDENTITY)
            .is_some()
    );
    stop(&daemon).await;
    stage.all_acknowledged(2).await;
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_drains_takes_no_jobs_and_ends_with_its_last_room() {
    let stage = stage();
    let daemon = start(&stage, agent(&stage), 1).await;
    let full = async |full: bool| {
        let told = |w: &room::Witness| w.workers[0].full == full;
        seen(&stage, "the worker says whether it takes jobs", told).await;
    };
    for request in [Request::Drain, Request::Undrain] as [fn(_) -> _; 2] {
        // One room, so that the drain has something to wait for.
        if stage.rooms.witness().jobs.is_empty() {
            stage.joined("kept", &[IDENTITY]).await;
        }
        assert_eq!(daemon.ask(request).await, Ok(()));
        full(matches!(
            request(tokio::sync::oneshot::channel().0),
            Request::Drain(_)
        ))
        .await;
    }
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    assert_eq!(daemon.ask(Request::Drain).await, Ok(()));
    full(true).await;
    let bob = stage.speaker("late", "bob").await;
    let lost = |w: &room::Witness| {
        let mut jobs = w.jobs_of("late");
        jobs.next()
            .is_some_and(|job| job.status == JobStatus::Unassigned)
    };
    seen(&stage, "nobody gets the job", lost).await;
    for room in ["kept", "r"] {
        stage.api().delete_room(room).await.expect("deletion");
    }
    let report = tokio::time::timeout(LIMIT, daemon.closed()).await;
    let report = report.expect("it ends by itself");
    assert!(report.nothing_left() && report.opened == 1, "{report:#?}");
    stage.all_acknowledged(1).await;
    registered(&stage, 0).await;
    ann.leave().await;
    bob.leave().await;
    stage.end().await;
}

/// To the server the job is over as well when its participant leaves, whyever.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_puts_us_out_of_a_room_is_heeded_with_a_job_too() {
    let stage = stage();
    let daemon = start(&stage, agent(&stage), 1).await;
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let removed = stage.api().remove_participant("r", IDENTITY).await;
    removed.expect("removed");
    stage.all_acknowledged(1).await;
    job_over(&stage, "r").await;
    let report = stop(&daemon).await;
    // Not because its job was over: then it would be looked for again. The SDK lets everybody depart
    // before it tells of the end.
    let reasons = reasons(&report);
    assert!(reasons[0].ends_with("(participant_removed)"), "{reasons:?}");
    ann.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_outlived_by_what_it_was_for_when_the_connection_is_made_anew() {
    let stage = stage();
    let mut config = agent(&stage);
    // Nor is it for want of looking.
    config.rooms.reconcile_interval_ms = 0;
    let daemon = start(&stage, config, 1).await;
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    assert!(stage.rooms.befall("r", IDENTITY, Mishap::Vanish).await);
    let anew = |w: &room::Witness| {
        let room = w.room("r").expect("the room");
        let stays = room.participants.iter().filter(|p| p.identity == IDENTITY);
        stays.count() == 2 && room.present().any(|p| p.identity == IDENTITY)
    };
    seen(&stage, "we are there again", anew).await;
    job_over(&stage, "r").await;
    let goes_on = |w: &stt::Witness| {
        let last = w.streams.last().expect("a stream");
        w.opened > 1 && last.end.is_none() && last.audio_seconds > 1.0
    };
    let witness = stage.witnessed("ann is heard again", goes_on).await;
    stop(&daemon).await;
    stage.all_acknowledged(witness.streams.len()).await;
    ann.leave().await;
    stage.end().await;
}

/// The server removes the participant that a deleted dispatch's job was about, whoever else wants it.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_is_wanted_otherwise_outlives_a_deleted_dispatch() {
    for configured in [true, false] {
        let stage = stage();
        let mut config = agent(&stage);
        config.agent.name = Some("scribe".into());
        if configured {
            config.rooms.join = vec!["r".into()];
        }
        let daemon = start(&stage, config, 1).await;
        let ann = stage.speaker("r", "ann").await;
        let first = dispatch(&stage, "r", "scribe", "").await;
        stage.streaming(1).await;
        if !configured {
            dispatch(&stage, "r", "scribe", "").await;
        }
        let running = if configured { 1 } else { 2 };
        let taken = |w: &room::Witness| {
            let jobs = w.jobs.iter();
            jobs.filter(|job| job.status == JobStatus::Running).count() == running
        };
        seen(&stage, "the jobs run", taken).await;
        let deleted = dispatches(&stage).delete_dispatch(first, "r").await;
        deleted.expect("it is deleted");
        let removed = |w: &room::Witness| {
            let room = w.room("r").expect("the room");
            let mut left = room.participants.iter().filter_map(|p| p.reason);
            left.any(|reason| reason == DisconnectReason::ParticipantRemoved)
        };
        seen(&stage, "the server removes us", removed).await;
        stage.witnessed("streams anew", |w| w.opened == 2).await;
        stage.streaming(1).await;
        let report = stop(&daemon).await;
        assert_eq!(reasons(&report).len(), 2, "{report:#?}");
        stage.all_acknowledged(2).await;
        ann.leave().await;
        stage.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_about_publishers_are_about_them_alone_and_share_a_connection() {
    let stage = stage();
    let mut config = agent(&stage);
    config.agent.job_type = JobKind::Publisher;
    let daemon = start(&stage, config, 1).await;
    let ann = stage.speaker("r", "ann").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    let witness = stage.rooms.witness();
    let room = witness.room("r").expect("the room");
    let us: Vec<_> = room.present().filter(|p| p.kind == "AGENT").collect();
    assert_eq!(
        (us.len(), us[0].identity.as_str()),
        (1, "roomwarden"),
        "{us:#?}"
    );
    let about = |w: &room::Witness, who: &str| {
        let mut jobs = w.jobs.iter();
        let job = jobs.find(|job| job.participant.as_deref() == Some(who));
        job.expect("a job").clone()
    };
    ann.leave().await;
    stage.open(1).await;
    let over = |w: &room::Witness| {
        let job = about(w, "ann");
        job.updates
            .last()
            .is_some_and(|update| update.status == "JS_SUCCESS")
    };
    let witness = seen(&stage, "ann's job ends", over).await;
    assert_eq!(about(&witness, "bob").status, JobStatus::Running);
    bob.leave().await;
    stage.open(0).await;
    // The last for whom it was there.
    stage.without("roomwarden").await;
    let over = |w: &room::Witness| {
        let job = about(w, "bob");
        job.updates
            .last()
            .is_some_and(|update| update.status == "JS_SUCCESS")
    };
    seen(&stage, "bob's job ends", over).await;
    stop(&daemon).await;
    stage.all_acknowledged(2).await;
    stage.end().await;
}

/// A way to the room server on which the worker's websocket can be cut.
struct Way {
    address: SocketAddr,
    cuts: watch::Sender<u32>,
    /// How many workers came this way.
    workers: Arc<Mutex<u32>>,
    _task: JoinSet<()>,
}

impl Way {
    async fn to(server: &str) -> Self {
        let server = server
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
        let address = listener.local_addr().expect("its address");
        let (cuts, cut) = watch::channel(0);
        let workers = Arc::new(Mutex::new(0));
        let counted = workers.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let (server, mut cut, counted) = (server.clone(), cut.clone(), counted.clone());
                connections.spawn(async move {
                    let mut first = [0; 10];
                    while client.peek(&mut first).await.expect("its first bytes") < first.len() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    let mut there = TcpStream::connect(&server).await.expect("the server");
                    let both = tokio::io::copy_bidirectional(&mut client, &mut there);
                    if first.starts_with(b"GET /agent") {
                        *counted.lock().expect("no panic") += 1;
                        cut.mark_unchanged();
                        tokio::select! {
                            _ = both => {}
                            _ = cut.changed() => {}
                        }
                        let _ = there.shutdown().await;
                    } else {
                        let _ = both.await;
                    }
                });
            }
        });
        Self {
            address,
            cuts,
            workers,
            _task: task,
        }
    }

    fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loses_its_connection_keeps_its_rooms_and_comes_back() {
    let stage = stage();
    let way = Way::to(&stage.rooms.http_url()).await;
    let mut config = agent(&stage);
    config.livekit.url = format!("ws://{}", way.address).parse().expect("URL");
    let daemon = start(&stage, config, 1).await;
    let ann = stage.speaker("a", "ann").await;
    let bob = stage.speaker("b", "bob").await;
    stage.streaming(2).await;
    for cut in 1..=2 {
        way.cut();
        let back = |w: &room::Witness| w.workers.len() == cut + 1 && w.live_workers().count() == 1;
        seen(&stage, "the worker comes back", back).await;
    }
    assert_eq!(*way.workers.lock().expect("no panic"), 3);
    let witness = stage.rooms.witness();
    let lost = witness
        .jobs
        .iter()
        .filter(|job| job.status == JobStatus::WorkerLost);
    assert_eq!((lost.count(), witness.jobs.len()), (2, 2));
    let count = |w: &room::Witness| w.live_workers().all(|worker| worker.job_count == 2);
    seen(&stage, "it says what it has", count).await;

    // New rooms come as before; of the old ones it hears by their ends,
    let cid = stage.speaker("c", "cid").await;
    stage.streaming(3).await;
    stage.api().delete_room("a").await.expect("deletion");
    let job = job_over(&stage, "a").await;
    assert_eq!(last_update(&job), ("JS_SUCCESS", ""));
    stage.open(2).await;
    // and by their dispatches, since the server can't terminate what it has forgotten.
    let made = dispatches(&stage).list_dispatch("b").await.expect("a list");
    dispatches(&stage)
        .delete_dispatch(&made[0].id, "b")
        .await
        .expect("deletion");
    let job = job_over(&stage, "b").await;
    assert_eq!(last_update(&job), ("JS_SUCCESS", ""));
    stage.open(1).await;
    let report = stop(&daemon).await;
    assert_eq!((report.opened, report.acknowledged), (3, 3), "{report:#?}");
    assert!(reasons(&report).contains(&"agent job ended (its dispatch was deleted)".to_owned()));
    stage.all_acknowledged(3).await;
    for speaker in [ann, bob, cid] {
        speaker.leave().await;
    }
    stage.end().await;
}

/// Of two daemons one is killed: the other takes up its room, and only that one.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_leaves_no_room_untranscribed() {
    let stage = stage();
    let other = tempfile::tempdir().expect("state directory");
    let other = other.path().to_str().expect("UTF-8");
    let mut first = Some(Binary::run(&stage, &AGENT));
    registered(&stage, 1).await;
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let second = AGENT.into_iter().chain([
        ("ROOMWARDEN__ROOMS__IDENTITY", "second"),
        ("ROOMWARDEN__STATE__DIR", other),
    ]);
    let second = Binary::run(&stage, &second.collect::<Vec<_>>());
    registered(&stage, 2).await;
    let killed = first.take().expect("it runs");
    killed.signal("KILL");
    killed.exit().await;
    // Another stream, by another daemon, for the same speaker.
    stage
        .witnessed("the second one transcribes", |w| {
            let mut heard = w.streams.iter().filter(|s| s.audio_seconds > 0.5);
            heard.clone().count() == 2 && heard.next_back().is_some_and(|s| s.end.is_none())
        })
        .await;
    let witness = stage.rooms.witness();
    assert_eq!(
        witness.jobs.len(),
        1,
        "the server gives it away once: {:#?}",
        witness.jobs
    );
    let room = witness.room("r").expect("the room");
    let stays = room.participants.iter().filter(|p| p.identity == IDENTITY);
    assert_eq!(stays.count(), 2, "{room:#?}");
    second.signal("TERM");
    let (status, log) = second.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert!(log.contains("taken up without a job"), "{log}");
    let witness = stage.open(0).await;
    assert_eq!(witness.streams.len(), 2, "{witness:#?}");
    ann.leave().await;
    stage.end().await;
}

/// A daemon that is started again knows its own participant, which the server has not missed yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_started_again_takes_up_what_it_was_killed_with() {
    for job_type in ["room", "publisher"] {
        let stage = stage();
        let mut variables = AGENT.to_vec();
        variables.push(("ROOMWARDEN__AGENT__JOB_TYPE", job_type));
        let killed = Binary::run(&stage, &variables);
        registered(&stage, 1).await;
        let ann = stage.speaker("r", "ann").await;
        stage.streaming(1).await;
        killed.signal("KILL");
        killed.exit().await;
        let again = Binary::run(&stage, &variables);
        stage
            .witnessed("it transcribes again", |w| {
                let heard = w.streams.iter().filter(|s| s.audio_seconds > 0.5);
                heard.clone().count() == 2 && heard.filter(|s| s.end.is_none()).count() == 1
            })
            .await;
        assert_eq!(stage.rooms.witness().jobs.len(), 1);
        // Also for a room that has jobs about participants it ends with who it is about.
        ann.leave().await;
        stage.open(0).await;
        if job_type == "publisher" {
            stage.without("roomwarden").await;
        }
        again.signal("TERM");
        let (status, log) = again.exit().await;
        assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
        stage.end().await;
    }
}

/// Two daemons, and a room that neither has a job for: one of them takes it up.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_take_up_a_room_one_stays() {
    let stage = stage();
    // Nobody is there yet.
    let ann = stage.speaker("r", "ann").await;
    let mut daemons = Vec::new();
    for n in 0..3 {
        let mut config = agent(&stage);
        config.rooms.identity = format!("daemon-{n}");
        daemons.push(Daemon::start(config, Sinks::default()));
    }
    stage.streaming(1).await;
    // Who came too late has left in order, if anybody did; and so it stays.
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let witness = stage.rooms.witness();
        let room = witness.room("r").expect("the room");
        let us = room.present().filter(|p| p.kind == "AGENT");
        assert!(us.count() <= 1, "{room:#?}");
    }
    stage.streaming(1).await;
    let mut opened = 0;
    // Each of the others would take it up while the last ones end.
    for daemon in &daemons {
        daemon.close(&roomwarden::close::CloseOrder {
            reason: roomwarden::domain::CloseReason::Shutdown("test".into()),
            deadline: std::time::Instant::now() + Duration::from_secs(20),
        });
    }
    for daemon in &daemons {
        opened += stop(daemon).await.opened;
    }
    let witness = stage.witnessed("no stream open", |w| w.open_now == 0).await;
    assert_eq!(witness.opened, opened);
    ann.leave().await;
    stage.end().await;
}
