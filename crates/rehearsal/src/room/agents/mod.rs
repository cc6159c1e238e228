//! Agent workers and their jobs: who is registered, who is asked, who has what.
//!
//! Which jobs there are to give away is decided in `dispatch`; the websockets are in `socket`.
//! Behaviour is that of LiveKit's server 1.13, with its peculiarities: the job of a worker that
//! drops is not given to another, and a job whose agent has not joined outlives its room.

mod dispatch;
mod record;
mod socket;

pub(super) use dispatch::check_sizes;
pub use record::{Answer, AskRecord, JobRecord, JobStatus, UpdateRecord, WorkerRecord};
pub(super) use socket::serve;

use super::{
    core::Core,
    participant::{Inbox, Key, Outbox, new_sid, outbox},
    rooms::server_info,
};
use livekit_protocol::{self as proto, DisconnectReason, server_message, worker_message};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// When all workers for a job report this load or more, nobody is asked (`agents.target_load` of
/// LiveKit's server, pkg/agent/config.go).
const TARGET_LOAD: f32 = 0.7;
/// Workers registered at a time.
const MAX_WORKERS: usize = 1_000;

/// All workers, and the jobs on their way to them.
#[derive(Default)]
pub(super) struct Agents {
    workers: BTreeMap<String, Worker>,
    /// By job.
    offers: HashMap<String, Offer>,
    /// Agents of deleted dispatches that have not left by then are removed.
    evictions: Vec<(Instant, Key)>,
}

/// What the websocket of a registered worker needs.
pub(super) struct Registered {
    worker: String,
    inbox: Inbox,
}

struct Worker {
    id: String,
    agent_name: String,
    namespace: String,
    deployment: String,
    job_type: proto::JobType,
    permission: proto::ParticipantPermission,
    full: bool,
    load: f32,
    jobs: BTreeSet<String>,
    outbox: Outbox,
}

/// A job that a worker is being asked to take.
struct Offer {
    job: proto::Job,
    /// Who is asked now.
    worker: String,
    /// Everyone who has been.
    asked: BTreeSet<String>,
    deadline: Instant,
    /// A worker that simulates a job is the only one to be asked.
    simulated: bool,
}

/// Why the server ends a job.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Termination {
    AgentLeft,
    Requested,
}

impl Core {
    /// None if there are too many, the server is stopping or the request makes no sense.
    fn register_worker(
        &mut self,
        request: proto::RegisterWorkerRequest,
        json: bool,
    ) -> Option<Registered> {
        let job_type = proto::JobType::try_from(request.r#type).ok()?;
        dispatch::check_deployment(&request.deployment).ok()?;
        if self.stopping || self.agents.workers.len() >= MAX_WORKERS {
            return None;
        }
        let (outbox, inbox) = outbox();
        let worker = Worker {
            id: new_sid("AW_"),
            agent_name: request.agent_name,
            namespace: request.namespace.unwrap_or_default(),
            deployment: request.deployment,
            job_type,
            permission: request.allowed_permissions.unwrap_or_else(all_permissions),
            full: false,
            load: 0.0,
            jobs: BTreeSet::new(),
            outbox,
        };
        let response = proto::RegisterWorkerResponse {
            worker_id: worker.id.clone(),
            server_info: Some(server_info()),
            ..proto::RegisterWorkerResponse::default()
        };
        // The outbox is new, so there is room.
        let _ = worker.send(server_message::Message::Register(response));
        self.recorder.worker_registered(WorkerRecord {
            id: worker.id.clone(),
            agent_name: worker.agent_name.clone(),
            namespace: worker.namespace.clone(),
            deployment: worker.deployment.clone(),
            job_type: job_type.as_str_name(),
            version: request.version,
            json,
            ..WorkerRecord::default()
        });
        let id = worker.id.clone();
        self.agents.workers.insert(id.clone(), worker);
        Some(Registered { worker: id, inbox })
    }

    fn worker_message(&mut self, worker: &str, message: worker_message::Message) {
        if !self.agents.workers.contains_key(worker) {
            return;
        }
        match message {
            worker_message::Message::Availability(answer) => self.job_answered(worker, answer),
            worker_message::Message::UpdateWorker(update) => self.update_worker(worker, &update),
            worker_message::Message::UpdateJob(update) => self.update_job(worker, &update),
            worker_message::Message::SimulateJob(request) => self.simulate_job(worker, request),
            // Not implemented by LiveKit's open-source server either.
            worker_message::Message::MigrateJob(_) => {}
            // The websocket answers pings.
            worker_message::Message::Ping(_) => {}
            // A second registration is an error.
            worker_message::Message::Register(_) => self.worker_closed(worker),
        }
    }

    /// Forgets a worker. What it was asked goes to others, what it had does not.
    fn worker_closed(&mut self, id: &str) {
        let Some(worker) = self.agents.workers.remove(id) else {
            return;
        };
        self.recorder.worker_closed(id);
        for job in worker.jobs {
            let lost = "the worker's connection closed";
            self.recorder.job_ended(&job, JobStatus::WorkerLost, lost);
        }
        let asked: Vec<_> = (self.agents.offers.extract_if(|_, o| o.worker == id))
            .map(|(_, offer)| offer)
            .collect();
        for offer in asked {
            self.recorder.job_answered(&offer.job.id, Answer::Closed);
            self.ask_another(offer);
        }
    }

    /// Closes all workers' websockets.
    pub(super) fn close_workers(&mut self) {
        for (_, offer) in self.agents.offers.drain() {
            let stopping = "server is shutting down";
            (self.recorder).job_ended(&offer.job.id, JobStatus::Unassigned, stopping);
        }
        let workers: Vec<_> = self.agents.workers.keys().cloned().collect();
        for worker in workers {
            self.worker_closed(&worker);
        }
    }

    /// Gives up on offers that nobody has answered in time and removes agents that were told to
    /// leave and did not.
    pub(super) fn expire_jobs(&mut self, now: Instant) {
        let offers = &mut self.agents.offers;
        let unanswered: Vec<_> = offers.extract_if(|_, o| o.deadline <= now).collect();
        for (job, _) in unanswered {
            self.recorder.job_answered(&job, Answer::None);
            let error = "agent worker availability timeout";
            self.recorder.job_ended(&job, JobStatus::Unassigned, error);
        }
        let evictions = &mut self.agents.evictions;
        let due: Vec<_> = evictions.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, agent) in due {
            self.remove(agent, DisconnectReason::ParticipantRemoved);
        }
    }

    /// Gives the job to a worker that wants it. The job is lost if there is none.
    fn offer_job(&mut self, job: proto::Job) {
        self.recorder.job_created(&job);
        let deadline = Instant::now() + self.config.job_timeout;
        self.ask_another(Offer {
            job,
            worker: String::new(),
            asked: BTreeSet::new(),
            deadline,
            simulated: false,
        });
    }

    fn ask_another(&mut self, mut offer: Offer) {
        let chosen = self.agents.choose(&offer.job, &offer.asked);
        match chosen.filter(|_| !offer.simulated) {
            Some(worker) => {
                offer.worker = worker;
                self.ask(offer);
            }
            None => {
                let error = "no workers with sufficient capacity";
                (self.recorder).job_ended(&offer.job.id, JobStatus::Unassigned, error);
            }
        }
    }

    fn ask(&mut self, mut offer: Offer) {
        let now = unix_ns();
        offer.job.state = Some(proto::JobState {
            status: proto::JobStatus::JsRunning as i32,
            started_at: now,
            updated_at: now,
            worker_id: offer.worker.clone(),
            ..proto::JobState::default()
        });
        offer.asked.insert(offer.worker.clone());
        self.recorder.job_asked(&offer.job.id, &offer.worker);
        let request = proto::AvailabilityRequest {
            job: Some(offer.job.clone()),
            resuming: false,
        };
        let worker = offer.worker.clone();
        self.agents.offers.insert(offer.job.id.clone(), offer);
        self.tell_worker(&worker, server_message::Message::Availability(request));
    }

    fn job_answered(&mut self, worker: &str, answer: proto::AvailabilityResponse) {
        let asked = self.agents.offers.get(&answer.job_id);
        if asked.is_none_or(|o| o.worker != worker) {
            tracing::debug!(worker, job = answer.job_id, "answer about an unknown job");
            return;
        }
        let Some(mut offer) = self.agents.offers.remove(&answer.job_id) else {
            return;
        };
        let job = &mut offer.job;
        let state = job.state.get_or_insert_default();
        if answer.terminate {
            state.status = proto::JobStatus::JsSuccess as i32;
            state.ended_at = state.started_at;
            self.recorder.job_answered(&job.id, Answer::Terminate);
            (self.recorder).job_ended(&job.id, JobStatus::Succeeded, "");
            self.job_settled(offer.job);
        } else if !answer.available {
            self.recorder.job_answered(&job.id, Answer::NotAvailable);
            self.ask_another(offer);
        } else {
            state.participant_identity = answer.participant_identity.clone();
            self.recorder.job_answered(&job.id, Answer::Available);
            self.assign(worker, answer, offer.job);
        }
    }

    fn assign(&mut self, id: &str, answer: proto::AvailabilityResponse, job: proto::Job) {
        let Some(worker) = self.agents.workers.get_mut(id) else {
            return;
        };
        let room = job.room.as_ref().map_or("", |r| &r.name);
        let identity = answer.participant_identity.clone();
        let agent = &worker.agent_name;
        let Some(token) = self.keys.agent(room, answer, agent, &worker.permission) else {
            let error = "cannot make a token for the agent";
            return (self.recorder).job_ended(&job.id, JobStatus::Unassigned, error);
        };
        worker.jobs.insert(job.id.clone());
        self.recorder.job_assigned(&job.id, id, &identity);
        let assignment = proto::JobAssignment {
            job: Some(job.clone()),
            url: None,
            token,
        };
        self.tell_worker(id, server_message::Message::Assignment(assignment));
        // After it: the job may have to be ended at once.
        self.job_settled(job);
    }

    fn update_worker(&mut self, id: &str, update: &proto::UpdateWorkerStatus) {
        let Some(worker) = self.agents.workers.get_mut(id) else {
            return;
        };
        if let Some(status) = update.status {
            worker.full = status != proto::WorkerStatus::WsAvailable as i32;
        }
        worker.load = if update.load.is_finite() {
            update.load
        } else {
            1.0
        };
        (self.recorder).worker_updated(id, worker.full, worker.load, update.job_count);
    }

    fn update_job(&mut self, id: &str, update: &proto::UpdateJobStatus) {
        let status = update.status();
        let over = match status {
            proto::JobStatus::JsSuccess => Some(JobStatus::Succeeded),
            proto::JobStatus::JsFailed => Some(JobStatus::Failed),
            proto::JobStatus::JsPending | proto::JobStatus::JsRunning => None,
        };
        let worker = self.agents.workers.get_mut(id);
        if let (Some(over), Some(worker)) = (over, worker)
            && worker.jobs.remove(&update.job_id)
        {
            self.recorder.job_ended(&update.job_id, over, &update.error);
        }
        // Last, so that who sees the report sees what came of it.
        self.recorder
            .job_updated(&update.job_id, status, &update.error);
    }

    /// Offers a job that the worker has made up to the worker itself.
    fn simulate_job(&mut self, id: &str, request: proto::SimulateJobRequest) {
        let Some(worker) = self
            .agents
            .workers
            .get(id)
            .filter(|_| request.room.is_some())
        else {
            return;
        };
        let job_type = match request.participant {
            Some(_) => proto::JobType::JtPublisher,
            None => proto::JobType::JtRoom,
        };
        #[allow(deprecated)]
        let job = proto::Job {
            id: new_sid("AJ_"),
            r#type: job_type as i32,
            room: request.room,
            participant: request.participant,
            namespace: worker.namespace.clone(),
            agent_name: worker.agent_name.clone(),
            ..proto::Job::default()
        };
        self.recorder.job_created(&job);
        self.ask(Offer {
            job,
            worker: id.to_owned(),
            asked: BTreeSet::new(),
            deadline: Instant::now() + self.config.job_timeout,
            simulated: true,
        });
    }

    /// Tells the worker to end a job, which counts as ended. False if nobody has it.
    fn terminate_job(&mut self, job: &str, why: Termination) -> bool {
        let mut workers = self.agents.workers.values_mut();
        let Some(worker) = workers.find_map(|w| w.jobs.remove(job).then(|| w.id.clone())) else {
            return false;
        };
        self.recorder.job_terminated(job);
        match why {
            Termination::AgentLeft => {
                let error = "agent worker left the room";
                self.recorder.job_ended(job, JobStatus::Failed, error);
            }
            Termination::Requested => self.recorder.job_ended(job, JobStatus::Succeeded, ""),
        }
        let job_id = job.to_owned();
        let termination = proto::JobTermination { job_id };
        self.tell_worker(&worker, server_message::Message::Termination(termination));
        true
    }

    fn tell_worker(&mut self, id: &str, message: server_message::Message) {
        let Some(worker) = self.agents.workers.get(id) else {
            return;
        };
        if worker.send(message).is_err() {
            tracing::warn!(worker = id, "does not read its websocket: dropped");
            self.worker_closed(id);
        }
    }
}

impl Agents {
    /// A worker for the job that has not been asked yet, at random: the less load, the likelier.
    fn choose(&self, job: &proto::Job, asked: &BTreeSet<String>) -> Option<String> {
        let able: Vec<_> = (self.workers.values())
            .filter(|w| w.serves(job) && !w.full)
            .collect();
        if able.iter().all(|worker| worker.load >= TARGET_LOAD) {
            return None;
        }
        let fit: Vec<_> = able
            .into_iter()
            .filter(|w| !asked.contains(&w.id))
            .map(|w| (w, (1.0 - w.load).max(0.0)))
            .filter(|(_, weight)| *weight > 0.0)
            .collect();
        let mut at = rand::random::<f32>() * fit.iter().map(|(_, weight)| weight).sum::<f32>();
        let chosen = fit.iter().find(|(_, weight)| {
            at -= weight;
            at <= 0.0
        });
        // Rounding can leave a little.
        chosen.or(fit.last()).map(|(worker, _)| worker.id.clone())
    }
}

impl Worker {
    fn send(&self, message: server_message::Message) -> Result<(), super::participant::Unread> {
        self.outbox.send(socket::frame(message))
    }

    #[allow(deprecated)]
    fn serves(&self, job: &proto::Job) -> bool {
        self.agent_name == job.agent_name
            && self.namespace == job.namespace
            && self.deployment == job.deployment
            && self.job_type == job.r#type()
    }
}

/// What an agent may do if its worker does not say.
fn all_permissions() -> proto::ParticipantPermission {
    proto::ParticipantPermission {
        can_subscribe: true,
        can_publish: true,
        can_publish_data: true,
        can_update_metadata: true,
        ..proto::ParticipantPermission::default()
    }
}

/// Nanoseconds since the Unix epoch, the unit of times in jobs and dispatches.
fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents(workers: &[(&str, f32, bool)]) -> Agents {
        let mut agents = Agents::default();
        for &(id, load, full) in workers {
            let worker = Worker {
                id: id.to_owned(),
                agent_name: String::new(),
                namespace: String::new(),
                deployment: String::new(),
                job_type: proto::JobType::JtRoom,
                permission: all_permissions(),
                full,
                load,
                jobs: BTreeSet::new(),
                outbox: outbox().0,
            };
            agents.workers.insert(id.to_owned(), worker);
        }
        agents
    }

    #[test]
    fn the_less_load_the_more_jobs() {
        let agents = agents(&[("busy", 0.9, false), ("idle", 0.1, false)]);
        let (job, none) = (proto::Job::default(), BTreeSet::new());
        let idle = (0..2_000).filter(|_| agents.choose(&job, &none).as_deref() == Some("idle"));
        // 1,800 expected, with a standard deviation of 13.
        assert!((1_650..1_950).contains(&idle.count()));
    }

    #[test]
    fn without_one_below_the_target_load_nobody_is_asked() {
        let (job, none) = (proto::Job::default(), BTreeSet::new());
        for (other, chosen) in [(0.7, false), (0.69, true)] {
            let agents = agents(&[("a", 0.7, false), ("b", other, false)]);
            assert_eq!(agents.choose(&job, &none).is_some(), chosen, "{other}");
        }
    }

    #[test]
    fn full_loaded_asked_and_foreign_workers_are_not_chosen() {
        let agents = agents(&[
            ("full", 0.0, true),
            ("loaded", 1.0, false),
            ("over", 7.0, false),
        ]);
        let (mut job, mut asked) = (proto::Job::default(), BTreeSet::new());
        assert_eq!(agents.choose(&job, &asked), None);
        let agents = super::tests::agents(&[("free", 0.5, false)]);
        assert_eq!(agents.choose(&job, &asked).as_deref(), Some("free"));
        job.agent_name = "other".into();
        assert_eq!(agents.choose(&job, &asked), None);
        job.agent_name = String::new();
        asked.insert("free".to_owned());
        assert_eq!(agents.choose(&job, &asked), None);
    }
}
