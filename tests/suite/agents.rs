//! An agent worker that nobody here wrote (PyPI `livekit-agents` with its Deepgram plugin) against
//! the servers that stand in for LiveKit and Deepgram: if it can do its work there, they speak its
//! protocols. How well it closes its stream is its own affair; that the stream ends is not.

use std::{
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use livekit::{Room, RoomOptions};
use livekit_protocol::DisconnectReason;
use rehearsal::{
    room::{self, Answer},
    stt,
};
use roomwarden::{cli::EXIT_OK, daemon::Daemon, transcripts::Sinks};
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    sync::mpsc,
};

use crate::{
    clients::token,
    stage::{Binary, LIMIT, Stage, lines, reasons, send, stop},
    worker,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_agent_takes_a_job_transcribes_and_ends_with_the_speaker() {
    let stage = Stage::new().await;
    let mut agent = Agent::worker(&stage, "ROOM");
    // Automatic dispatch is at the creation of a room; who registers later gets nothing.
    let registered = |w: &room::Witness| w.live_workers().count() == 1;
    let witness = seen(&stage, "the worker registers", registered).await;
    let worker = witness.workers[0].clone();
    assert_eq!((worker.job_type, worker.json), ("JT_ROOM", false));

    let speaker = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let transcript = agent.says("transcript").await;
    let text = transcript["text"].as_str().unwrap_or_default();
    assert!(text.starts_with("speech "), "{transcript}");
    let witness = stage.rooms.witness();
    let job = witness.jobs_of("r").next().expect("a job").clone();
    assert_eq!(job.worker.as_ref(), Some(&worker.id), "{job:#?}");
    let asked: Vec<_> = job.asked.iter().map(|ask| ask.answer).collect();
    assert_eq!(asked, [Some(Answer::Available)]);

    speaker.leave().await;
    // The agent leaves its room first, and the server ends the job for that; the worker's own
    // report comes after it.
    let ended = |w: &room::Witness| {
        let job = w.job(&job.id).expect("the job");
        let reported = job.updates.last().map(|update| update.status);
        job.status.is_over() && reported == Some("JS_SUCCESS")
    };
    let witness = seen(&stage, "the job ends", ended).await;
    assert_eq!(witness.jobs.len(), 1, "{:#?}", witness.jobs);
    let room = witness.room("r").expect("the room");
    let left = room.participant(&job.agent_identity).expect("the agent");
    assert_eq!(left.kind, "AGENT");
    assert_eq!(left.reason, Some(DisconnectReason::ClientInitiated));

    let witness = stage
        .witnessed("the agent's stream ends", |w| w.open_now == 0)
        .await;
    assert_eq!(witness.streams.len(), 1, "{:#?}", witness.streams);
    let stream = &witness.streams[0];
    assert!(stream.finals_sent > 0, "{stream:#?}");
    println!(
        "the agent's stream: {:.2} s of audio, CloseStream {}, Metadata {}, end {:?} by {:?}",
        stream.audio_seconds,
        stream.close_requested,
        stream.metadata_sent,
        stream.end,
        stream.tcp_end
    );

    let status = agent.end().await;
    assert!(status.success(), "{status}");
    let gone = |w: &room::Witness| w.live_workers().count() == 0;
    seen(&stage, "the worker's websocket closes", gone).await;
    stage.end().await;
}

/// A job for each participant who publishes, whom alone its agent listens to.
#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_agent_takes_a_publishers_job_and_hears_that_publisher() {
    let stage = Stage::new().await;
    let mut agent = Agent::worker(&stage, "PUBLISHER");
    let registered = |w: &room::Witness| w.live_workers().count() == 1;
    let witness = seen(&stage, "the worker registers", registered).await;
    assert_eq!(witness.workers[0].job_type, "JT_PUBLISHER");

    // Who only listens is none.
    let token = token(&stage, "ear");
    let (ear, _events) = Room::connect(&stage.rooms.url(), &token, RoomOptions::default())
        .await
        .expect("joins");
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let transcript = agent.says("transcript").await;
    let text = transcript["text"].as_str().unwrap_or_default();
    assert!(text.starts_with("speech "), "{transcript}");
    let witness = stage.rooms.witness();
    let [job] = witness.jobs.as_slice() else {
        panic!("one job, for ann: {:#?}", witness.jobs)
    };
    let about = (job.job_type, job.participant.as_deref());
    assert_eq!(about, ("JT_PUBLISHER", Some("ann")));

    ann.leave().await;
    let over = |w: &room::Witness| w.job(&job.id).is_some_and(|job| job.status.is_over());
    seen(&stage, "the job ends", over).await;
    stage
        .witnessed("the agent's stream ends", |w| w.open_now == 0)
        .await;
    ear.close().await.expect("closed");
    let status = agent.end().await;
    assert!(status.success(), "{status}");
    stage.end().await;
}

/// Ours beside it, on one server: who is asked for gets the job, and neither hears the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_agent_and_ours_take_their_own_jobs_in_one_room() {
    let stage = worker::stage();
    let genuine = Agent::worker(&stage, "ROOM");
    let mut config = worker::agent(&stage);
    config.agent.name = Some("scribe".into());
    let ours = Daemon::start(config, Sinks::default());
    let registered = |w: &room::Witness| w.live_workers().count() == 2;
    seen(&stage, "both register", registered).await;
    let ann = stage.speaker("r", "ann").await;
    worker::dispatch(&stage, "r", "scribe", "").await;
    stage.streaming(2).await;
    let witness = stage.rooms.witness();
    let jobs: Vec<_> = witness.jobs_of("r").collect();
    assert_eq!(jobs.len(), 2, "{jobs:#?}");
    let worker = |job: &room::JobRecord| {
        let worker = job.worker.as_ref().and_then(|id| witness.worker(id));
        worker.expect("a worker took it").agent_name.clone()
    };
    assert!(
        jobs.iter().all(|job| worker(job) == job.agent_name),
        "{jobs:#?}"
    );
    ann.leave().await;
    stage
        .witnessed("both streams end", |w| w.open_now == 0)
        .await;
    let report = stop(&ours).await;
    assert_eq!((report.opened, report.acknowledged), (1, 1), "{report:#?}");
    let status = genuine.end().await;
    assert!(status.success(), "{status}");
    stage.end().await;
}

/// Both frameworks' workers beside ours under one name, as somebody has who moves from one to another:
/// each room is one's, a worker that is full is passed over, and of what a killed one of ours leaves
/// behind another of ours takes up just that.
#[tokio::test(flavor = "multi_thread")]
async fn genuine_workers_and_ours_share_the_rooms() {
    let stage = worker::stage();
    let registered = async |count: usize| {
        let there = |w: &room::Witness| w.live_workers().count() == count;
        let witness = seen(&stage, "workers register", there).await;
        witness.workers.last().expect("a worker").id.clone()
    };
    let daemon = |more: &[_]| Binary::run(&stage, &[&worker::AGENT, more].concat());
    let first = daemon(&[("ROOMWARDEN__AGENT__SLOTS", "1")]);
    let ours = registered(1).await;
    let mut speakers = vec![stage.speaker("room-0", "ann").await];
    stage.streaming(1).await;
    let full = |w: &room::Witness| w.workers[0].full;
    seen(&stage, "ours is full", full).await;

    let url = stage.stt.url();
    let _python = Agent::start(Framework::Python, &stage, &url, &[]);
    let python = registered(2).await;
    // Nobody else can have it.
    speakers.push(stage.speaker("room-1", "ann").await);
    stage.streaming(2).await;
    let _node = Agent::start(Framework::Node, &stage, &url, &[]);
    let node = registered(3).await;
    let shares = loop {
        let room = format!("room-{}", speakers.len());
        speakers.push(stage.speaker(&room, "ann").await);
        stage.streaming(speakers.len()).await;
        let witness = stage.rooms.witness();
        assert_eq!(witness.jobs.len(), speakers.len(), "{:#?}", witness.jobs);
        let taken_by = |worker: &String| {
            let theirs = witness
                .jobs
                .iter()
                .filter(|j| j.worker.as_ref() == Some(worker));
            theirs.count()
        };
        let shares = [&ours, &python, &node].map(taken_by);
        // Which of the two is chance.
        if shares.iter().all(|share| *share > 0) {
            break shares;
        }
        assert!(speakers.len() < 16, "ours, Python, Node.js: {shares:?}");
    };
    println!("rooms of ours, Python, Node.js: {shares:?}");
    assert_eq!(shares[0], 1);

    let other = tempfile::tempdir().expect("state directory");
    let state = other.path().to_str().expect("UTF-8");
    // As LiveKit's server does not know of jobs for some seconds.
    stage.faults(|faults| faults.jobs_unlisted = true).await;
    let second = daemon(&[
        ("ROOMWARDEN__ROOMS__IDENTITY", "second"),
        ("ROOMWARDEN__STATE__DIR", state),
    ]);
    registered(4).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stage.faults(|faults| faults.jobs_unlisted = false).await;
    let (streams, before) = (speakers.len(), stage.stt.witness().opened);
    let heard = before + 1;
    first.signal("KILL");
    first.exit().await;
    let again = |w: &stt::Witness| w.opened == heard && w.open_now == streams;
    stage.witnessed("the second one transcribes", again).await;
    // For a few more looks at the rooms.
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let witness = stage.stt.witness();
        assert_eq!((witness.opened, witness.open_now), (heard, streams));
    }
    speakers.push(stage.speaker("one-more", "ann").await);
    stage.streaming(streams + 1).await;
    for speaker in speakers {
        speaker.leave().await;
    }
    stage.witnessed("all end", |w| w.open_now == 0).await;
    second.signal("TERM");
    let (status, log) = second.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.end().await;
}

/// A job of theirs that shows so late that the room was taken for lost is left to them in the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_a_genuine_worker_has_is_given_back() {
    let stage = worker::stage();
    stage.faults(|faults| faults.jobs_unlisted = true).await;
    let genuine = Agent::worker(&stage, "ROOM");
    let registered = |w: &room::Witness| w.live_workers().count() == 1;
    seen(&stage, "the worker registers", registered).await;
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(1).await;
    let ours = Daemon::start(worker::agent(&stage), Sinks::default());
    stage.streaming(2).await;
    stage.faults(|faults| faults.jobs_unlisted = false).await;
    stage.witnessed("ours ends", |w| w.open_now == 1).await;
    let report = stop(&ours).await;
    assert_eq!(
        reasons(&report),
        ["agent job ended (another worker has the job)"]
    );
    ann.leave().await;
    stage.witnessed("theirs ends", |w| w.open_now == 0).await;
    let status = genuine.end().await;
    assert!(status.success(), "{status}");
    stage.end().await;
}

/// Waits until the room server says that the condition holds.
pub async fn seen(
    stage: &Stage,
    what: &str,
    condition: impl FnMut(&room::Witness) -> bool,
) -> room::Witness {
    match stage.rooms.wait_for(condition, LIMIT).await {
        Ok(witness) => witness,
        Err(last) => panic!("{what}: not within {LIMIT:?}; the room server says {last:#?}"),
    }
}

/// Of Node.js' own server, which takes no 0 for any.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// LiveKit's frameworks, by their language.
#[derive(Debug, Clone, Copy)]
pub enum Framework {
    Python,
    Node,
}

/// tests/clients/agent.py or node-agent in a process group of its own, which is killed in the end: the
/// worker has child processes, and they outlive it for a moment.
pub struct Agent {
    child: Child,
    group: u32,
    output: mpsc::UnboundedReceiver<String>,
}

impl Agent {
    /// With this STT server, by its `/v1/listen`, and with more variables.
    pub fn start(
        framework: Framework,
        stage: &Stage,
        stt_url: &str,
        more: &[(&str, &str)],
    ) -> Self {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        let clients = repository.join("tests/clients");
        let (program, script) = match framework {
            Framework::Python => (
                repository.join(".venv/agents/bin/python"),
                clients.join("agent.py"),
            ),
            Framework::Node => ("node".into(), clients.join("node-agent/agent.mjs")),
        };
        let installed = match framework {
            Framework::Python => program.clone(),
            Framework::Node => clients.join("node-agent/node_modules"),
        };
        assert!(
            installed.exists(),
            "{} is not there: run tests/run, which installs it",
            installed.display()
        );
        let mut child = Command::new(program)
            .arg(script)
            .arg("start")
            .envs(stage.environment())
            .env("STT_URL", stt_url)
            .env("AGENT_PORT", free_port().to_string())
            // It would otherwise look for a proxy even to loopback.
            .envs([("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")])
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the agent starts");
        let group = child.id().expect("it runs");
        // Read also when nobody asks: a full pipe would halt it.
        let (said, output) = mpsc::unbounded_channel();
        let mut lines = lines(&mut child);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = said.send(line);
            }
        });
        Self {
            child,
            group,
            output,
        }
    }

    /// A worker for jobs of this type, straight with the STT server.
    fn worker(stage: &Stage, job_type: &str) -> Self {
        let more = [("JOB_TYPE", job_type)];
        Self::start(Framework::Python, stage, &stage.stt.url(), &more)
    }

    /// Waits until it prints this event. Its log, which is not ours to judge, comes in between.
    pub async fn says(&mut self, event: &str) -> Value {
        let mut said = Vec::new();
        let heard = async {
            while let Some(line) = self.output.recv().await {
                // The log of another of its processes may be on the same line.
                let told = line.find("{\"event\"").and_then(|at| {
                    let rest = serde_json::Deserializer::from_str(&line[at..]);
                    rest.into_iter::<Value>().next()?.ok()
                });
                match told {
                    Some(value) if value["event"] == event => return Some(value),
                    _ => said.push(line),
                }
            }
            None
        };
        match tokio::time::timeout(LIMIT, heard).await {
            Ok(Some(value)) => value,
            _ => panic!("the agent never said {event:?}, but {said:#?}"),
        }
    }

    /// Ends it with SIGTERM.
    pub async fn end(mut self) -> ExitStatus {
        send("TERM", self.group);
        let end = async {
            while self.output.recv().await.is_some() {}
            self.child.wait().await.expect("its status")
        };
        let status = tokio::time::timeout(LIMIT, end).await;
        status.expect("the agent ends")
    }

    /// Waits until none of its processes is left.
    pub async fn over(&mut self) {
        let over = async {
            self.child.wait().await.expect("its status");
            while self.signal("0") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let over = tokio::time::timeout(LIMIT, over).await;
        over.expect("the agent ends");
    }

    /// Sends a signal to all of it; false if nobody is left.
    pub fn signal(&self, signal: &str) -> bool {
        let status = std::process::Command::new("kill")
            .args([&format!("-{signal}"), "--", &format!("-{}", self.group)])
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.signal("KILL");
    }
}
