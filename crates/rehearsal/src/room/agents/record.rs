//! Workers and jobs in the witness.

use crate::room::witness::{Recorder, Stamp, Witness, forget};
use livekit_protocol as proto;
use serde::Serialize;

/// Closed workers beyond this many are forgotten, oldest first.
const MAX_CLOSED_WORKERS: usize = 10_000;
/// Jobs that are over beyond this many are forgotten, oldest first.
const MAX_ENDED_JOBS: usize = 10_000;
/// Status updates of one job beyond this many are not kept.
const MAX_UPDATES: usize = 100;

/// One agent worker, from registration to the end of its websocket.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WorkerRecord {
    pub id: String,
    /// Empty: gets jobs without being asked for by name.
    pub agent_name: String,
    pub namespace: String,
    pub deployment: String,
    /// `JT_ROOM`, `JT_PUBLISHER` or `JT_PARTICIPANT`.
    pub job_type: &'static str,
    pub version: String,
    /// Whether the worker wrote JSON when it registered, and not protobuf.
    pub json: bool,
    pub registered: Stamp,
    pub closed: Option<Stamp>,
    /// What the worker last said of itself: whether it takes no jobs.
    pub full: bool,
    /// From 0 (idle) to 1.
    pub load: f32,
    pub job_count: u32,
}

/// One job, from its first offer to its end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JobRecord {
    pub id: String,
    /// Empty for a job that a worker simulates.
    pub dispatch: String,
    pub room: String,
    pub room_sid: String,
    /// `JT_ROOM`, `JT_PUBLISHER` or `JT_PARTICIPANT`.
    pub job_type: &'static str,
    pub agent_name: String,
    pub metadata: String,
    /// Identity of the participant whom a job of type `JT_PUBLISHER` or `JT_PARTICIPANT` is
    /// about.
    pub participant: Option<String>,
    pub status: JobStatus,
    /// Why it failed, in the words of the worker or the server.
    pub error: String,
    pub created: Stamp,
    /// Who was asked to take it, in order.
    pub asked: Vec<AskRecord>,
    /// When a worker got it, and which.
    pub assigned: Option<Stamp>,
    pub worker: Option<String>,
    /// The identity under which the worker's agent joins.
    pub agent_identity: String,
    /// What the worker reported, also after the end.
    pub updates: Vec<UpdateRecord>,
    /// When the server told the worker to end it.
    pub terminated: Option<Stamp>,
    pub ended: Option<Stamp>,
}

/// A worker was asked whether it takes a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AskRecord {
    pub worker: String,
    pub at: Stamp,
    pub answer: Option<Answer>,
    pub answered: Option<Stamp>,
}

/// What came of asking a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Answer {
    Available,
    NotAvailable,
    /// The job is done with; nobody needs to take it.
    Terminate,
    /// Its websocket closed before it answered.
    Closed,
    /// Not in time.
    None,
}

/// A worker's report on a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UpdateRecord {
    pub at: Stamp,
    /// `JS_PENDING`, `JS_RUNNING`, `JS_SUCCESS` or `JS_FAILED`.
    pub status: &'static str,
    pub error: String,
}

/// How a job stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum JobStatus {
    /// A worker is being asked.
    #[default]
    Offered,
    /// A worker has it.
    Running,
    /// As its worker said, or because its dispatch was deleted.
    Succeeded,
    /// As its worker said, or because its agent left the room.
    Failed,
    /// No worker has it: all refused, or were full, or did not answer.
    Unassigned,
    /// The websocket of its worker closed. Nobody else gets it.
    WorkerLost,
}

impl JobStatus {
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Offered | Self::Running)
    }
}

impl Witness {
    /// Workers whose websocket is open.
    pub fn live_workers(&self) -> impl Iterator<Item = &WorkerRecord> {
        self.workers.iter().filter(|w| w.closed.is_none())
    }

    pub fn worker(&self, id: &str) -> Option<&WorkerRecord> {
        self.workers.iter().rev().find(|w| w.id == id)
    }

    pub fn job(&self, id: &str) -> Option<&JobRecord> {
        self.jobs.iter().rev().find(|j| j.id == id)
    }

    /// Jobs for a room of this name, oldest first.
    pub fn jobs_of(&self, room: &str) -> impl Iterator<Item = &JobRecord> {
        self.jobs.iter().filter(move |j| j.room == room)
    }
}

impl Recorder {
    pub(super) fn worker_registered(&self, worker: WorkerRecord) {
        self.change(|w, now| {
            w.workers.push(WorkerRecord {
                registered: now,
                ..worker
            });
            forget(&mut w.workers, MAX_CLOSED_WORKERS, |w| w.closed.is_some());
        });
    }

    pub(super) fn worker_updated(&self, id: &str, full: bool, load: f32, job_count: u32) {
        self.worker(id, |w, _| {
            (w.full, w.load, w.job_count) = (full, load, job_count);
        });
    }

    pub(super) fn worker_closed(&self, id: &str) {
        self.worker(id, |w, now| w.closed = Some(now));
    }

    pub(super) fn job_created(&self, job: &proto::Job) {
        let room = job.room.clone().unwrap_or_default();
        let job = JobRecord {
            id: job.id.clone(),
            dispatch: job.dispatch_id.clone(),
            room: room.name,
            room_sid: room.sid,
            job_type: job.r#type().as_str_name(),
            agent_name: job.agent_name.clone(),
            metadata: job.metadata.clone(),
            participant: job.participant.as_ref().map(|p| p.identity.clone()),
            ..JobRecord::default()
        };
        self.change(|w, now| {
            w.jobs.push(JobRecord {
                created: now,
                ..job
            });
            forget(&mut w.jobs, MAX_ENDED_JOBS, |j| j.status.is_over());
        });
    }

    pub(super) fn job_asked(&self, id: &str, worker: &str) {
        self.job(id, |j, at| {
            j.asked.push(AskRecord {
                worker: worker.to_owned(),
                at,
                ..AskRecord::default()
            });
        });
    }

    pub(super) fn job_answered(&self, id: &str, answer: Answer) {
        self.job(id, |j, now| {
            if let Some(asked) = j.asked.last_mut() {
                asked.answer = Some(answer);
                asked.answered = Some(now);
            }
        });
    }

    pub(super) fn job_assigned(&self, id: &str, worker: &str, identity: &str) {
        self.job(id, |j, now| {
            j.status = JobStatus::Running;
            j.assigned = Some(now);
            j.worker = Some(worker.to_owned());
            j.agent_identity = identity.to_owned();
        });
    }

    pub(super) fn job_updated(&self, id: &str, status: proto::JobStatus, error: &str) {
        self.job(id, |j, at| {
            if j.updates.len() < MAX_UPDATES {
                j.updates.push(UpdateRecord {
                    at,
                    status: status.as_str_name(),
                    error: error.to_owned(),
                });
            }
        });
    }

    pub(super) fn job_terminated(&self, id: &str) {
        self.job(id, |j, now| j.terminated = Some(now));
    }

    pub(super) fn job_ended(&self, id: &str, status: JobStatus, error: &str) {
        self.job(id, |j, now| {
            j.status = status;
            j.error = error.to_owned();
            j.ended = Some(now);
        });
    }

    fn worker(&self, id: &str, change: impl FnOnce(&mut WorkerRecord, Stamp)) {
        self.change(|w, now| {
            if let Some(worker) = w.workers.iter_mut().rev().find(|w| w.id == id) {
                change(worker, now);
            }
        });
    }

    fn job(&self, id: &str, change: impl FnOnce(&mut JobRecord, Stamp)) {
        self.change(|w, now| {
            if let Some(job) = w.jobs.iter_mut().rev().find(|j| j.id == id) {
                change(job, now);
            }
        });
    }
}
