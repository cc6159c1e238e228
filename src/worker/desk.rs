//! What a worker says to the server and to the daemon, without sockets and clocks: messages and
//! `now` go in, messages and events come out.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use livekit_protocol::{
    AvailabilityRequest, AvailabilityResponse, Job, JobAssignment, JobStatus, MigrateJobRequest,
    RegisterWorkerResponse, UpdateJobStatus, UpdateWorkerStatus, WorkerStatus,
    worker_message::Message as Request,
};

use crate::room::claims::Ticket;

/// A job that we have agreed to take and that has not come by then went to somebody else.
const ASSIGNED_WITHIN: Duration = Duration::from_secs(15);
/// How often the load is reported if nothing else changes.
const REPORT_EVERY: Duration = Duration::from_millis(2500);
/// Below the threshold by this much, a worker takes jobs again.
const HYSTERESIS: f32 = 0.05;
/// LiveKit's servers give nothing to who reports this load or more (`agents.target_load`, by default
/// 0.7), even if it says that it is available: so that is reported where our own limits are reached.
const TARGET_LOAD: f32 = 0.7;
/// What is reported at most as long as there is room for a job.
const MOST_LOAD: f32 = TARGET_LOAD - 0.01;
/// Ends of jobs that wait for a connection.
const MAX_UNSENT: usize = 10_000;
/// Jobs that are asked about at a time; the server waits for an answer before it asks anew.
const MAX_ASKED: usize = 1000;
/// Of why a job failed.
const MAX_ERROR: usize = 1000;

/// What the daemon is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Once more, if it is `again`: the server knows nothing of the jobs of before.
    Registered {
        again: bool,
    },
    /// To be answered with [`Command::Answer`], at once.
    Asked(Job),
    Assigned(Job, Ticket),
    Terminated(String),
}

/// What the daemon says.
#[derive(Debug)]
pub enum Command {
    /// Whether the job is taken, and as whom the room is joined then.
    Answer {
        job: String,
        identity: Option<String>,
    },
    /// The job has ended, well or for this reason.
    Over {
        job: String,
        result: Result<(), String>,
    },
    /// How many are served without a job, and take slots all the same.
    Jobless(usize),
    /// Whether no more jobs are to be taken.
    Drain(bool),
    /// The rooms are left: say what is to be said, and go.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The daemon has not answered yet.
    Asked,
    /// We said yes; the server gives it to us, or forgets to say that it does not.
    Offered {
        until: Instant,
    },
    Running,
}

pub struct Desk {
    /// Jobs at a time.
    slots: Option<usize>,
    /// The load from which on no more jobs are taken.
    threshold: Option<f32>,
    /// Of our participant in the rooms.
    attributes: HashMap<String, String>,
    jobs: BTreeMap<String, Phase>,
    jobless: usize,
    connected: bool,
    registered_before: bool,
    draining: bool,
    loaded: bool,
    load: f32,
    reported: Option<(WorkerStatus, u32, Instant)>,
    sequence: u64,
    unsent: VecDeque<UpdateJobStatus>,
    out: Vec<Request>,
    events: Vec<Event>,
}

impl Desk {
    pub fn new(
        slots: Option<usize>,
        threshold: Option<f32>,
        attributes: HashMap<String, String>,
    ) -> Self {
        Self {
            slots,
            threshold,
            attributes,
            jobs: BTreeMap::new(),
            jobless: 0,
            connected: false,
            registered_before: false,
            draining: false,
            loaded: false,
            load: 0.0,
            reported: None,
            sequence: 0,
            unsent: VecDeque::new(),
            out: Vec::new(),
            events: Vec::new(),
        }
    }

    /// What is to be sent to the server.
    pub fn take_out(&mut self) -> Vec<Request> {
        std::mem::take(&mut self.out)
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub fn registered(&mut self, response: &RegisterWorkerResponse, now: Instant) {
        tracing::info!(worker = response.worker_id, "registered as an agent worker");
        self.connected = true;
        self.reported = None;
        self.sequence = 0;
        let again = std::mem::replace(&mut self.registered_before, true);
        let running = self
            .jobs
            .iter()
            .filter(|(_, phase)| **phase == Phase::Running);
        let job_ids: Vec<String> = running.map(|(job, _)| job.clone()).collect();
        if !job_ids.is_empty() {
            let job_ids = job_ids.clone();
            self.out
                .push(Request::MigrateJob(MigrateJobRequest { job_ids }));
        }
        for job in &job_ids {
            self.out.push(Request::UpdateJob(running_status(job)));
        }
        self.out
            .extend(self.unsent.drain(..).map(Request::UpdateJob));
        self.events.push(Event::Registered { again });
        self.report(now);
    }

    /// The connection is gone. What runs goes on; what was only talked of goes to another worker.
    pub fn dropped(&mut self) {
        self.connected = false;
        self.out.clear();
        self.jobs.retain(|_, phase| *phase == Phase::Running);
    }

    pub fn asked(&mut self, request: AvailabilityRequest, now: Instant) {
        let Some(job) = request.job else {
            return;
        };
        let full = self.is_full(now);
        let asked = self.jobs.values().filter(|phase| **phase == Phase::Asked);
        let busy = full || asked.count() >= MAX_ASKED;
        match self.jobs.get(&job.id) {
            // Given to us before, and not known to be by the server: as the same as before.
            Some(Phase::Running) => self.events.push(Event::Asked(job)),
            Some(_) => {}
            None if busy || job.id.is_empty() || job.room.is_none() => self.refuse(&job.id),
            None => {
                self.jobs.insert(job.id.clone(), Phase::Asked);
                self.events.push(Event::Asked(job));
            }
        }
    }

    pub fn assigned(&mut self, assignment: JobAssignment, now: Instant) {
        let JobAssignment { job, url, token } = assignment;
        let Some(job) = job.filter(|job| !job.id.is_empty()) else {
            return;
        };
        if self.jobs.get(&job.id) == Some(&Phase::Running) {
            return;
        }
        self.jobs.insert(job.id.clone(), Phase::Running);
        if self.draining {
            let shutdown = "the daemon takes no more rooms".to_owned();
            return self.over(&job.id, Err(shutdown), now);
        }
        self.out.push(Request::UpdateJob(running_status(&job.id)));
        let url = url.filter(|url| !url.is_empty());
        self.events
            .push(Event::Assigned(job, Ticket { url, token }));
        self.report_changes(now);
    }

    pub fn terminated(&mut self, job: String) {
        // One that is over here already needs no end.
        if self.jobs.get(&job) == Some(&Phase::Running) {
            self.events.push(Event::Terminated(job));
        }
    }

    /// The daemon's answer to [`Event::Asked`].
    pub fn answer(&mut self, job: &str, identity: Option<String>, now: Instant) {
        let Some(phase) = self.jobs.get_mut(job) else {
            return;
        };
        let Some(identity) = identity.filter(|_| !self.draining) else {
            if *phase == Phase::Asked {
                self.jobs.remove(job);
            }
            return self.refuse(job);
        };
        if *phase == Phase::Asked {
            let until = now + ASSIGNED_WITHIN;
            *phase = Phase::Offered { until };
        }
        self.out.push(Request::Availability(AvailabilityResponse {
            job_id: job.to_owned(),
            available: true,
            supports_resume: true,
            participant_identity: identity,
            participant_attributes: self.attributes.clone(),
            ..AvailabilityResponse::default()
        }));
    }

    pub fn over(&mut self, job: &str, result: Result<(), String>, now: Instant) {
        if self.jobs.remove(job).is_none() {
            return;
        }
        let (status, mut error) = match result {
            Ok(()) => (JobStatus::JsSuccess, String::new()),
            Err(error) => (JobStatus::JsFailed, error),
        };
        error.truncate(error.floor_char_boundary(MAX_ERROR));
        let update = UpdateJobStatus {
            job_id: job.to_owned(),
            status: status.into(),
            error,
        };
        if self.connected {
            self.out.push(Request::UpdateJob(update));
            return self.report_changes(now);
        }
        if self.unsent.len() == MAX_UNSENT {
            self.unsent.pop_front();
        }
        self.unsent.push_back(update);
    }

    pub fn jobless(&mut self, jobless: usize, now: Instant) {
        self.jobless = jobless;
        self.report_changes(now);
    }

    pub fn drain(&mut self, draining: bool, now: Instant) {
        self.draining = draining;
        self.report_changes(now);
    }

    /// A new figure of the load, from 0 to 1.
    pub fn loaded(&mut self, load: f32, now: Instant) {
        self.load = load.clamp(0.0, 1.0);
        if let Some(threshold) = self.threshold {
            let limit = match self.loaded {
                true => threshold - HYSTERESIS,
                false => threshold,
            };
            self.loaded = self.load >= limit;
        }
        let due = |(_, _, at): &(_, _, Instant)| now.duration_since(*at) >= REPORT_EVERY;
        match self.reported.as_ref().is_none_or(due) {
            true => self.report(now),
            false => self.report_changes(now),
        }
    }

    pub fn job_count(&self) -> usize {
        let running = self.jobs.values().filter(|phase| **phase == Phase::Running);
        running.count()
    }

    fn is_full(&mut self, now: Instant) -> bool {
        let late = |phase: &Phase| matches!(phase, Phase::Offered { until } if *until <= now);
        self.jobs.retain(|_, phase| !late(phase));
        let taken = self
            .slots
            .is_some_and(|slots| self.jobs.len() + self.jobless >= slots);
        self.draining || self.loaded || taken
    }

    fn refuse(&mut self, job: &str) {
        self.out.push(Request::Availability(AvailabilityResponse {
            job_id: job.to_owned(),
            available: false,
            ..AvailabilityResponse::default()
        }));
    }

    /// Only what the server should know at once.
    fn report_changes(&mut self, now: Instant) {
        let status = self.status(now);
        let count = self.job_count() as u32;
        if self
            .reported
            .is_none_or(|(s, c, _)| (s, c) != (status, count))
        {
            self.report(now);
        }
    }

    fn status(&mut self, now: Instant) -> WorkerStatus {
        match self.is_full(now) {
            true => WorkerStatus::WsFull,
            false => WorkerStatus::WsAvailable,
        }
    }

    fn report(&mut self, now: Instant) {
        if !self.connected {
            return;
        }
        let status = self.status(now);
        let job_count = self.job_count() as u32;
        let taken = self.job_count() + self.jobless;
        let slots = self.slots.map_or(0.0, |slots| taken as f32 / slots as f32);
        let used = (self.load / self.threshold.unwrap_or(1.0)).max(slots);
        let load = match status {
            WorkerStatus::WsAvailable => (used * TARGET_LOAD).min(MOST_LOAD),
            WorkerStatus::WsFull => TARGET_LOAD + used.min(1.0) * (1.0 - TARGET_LOAD),
        };
        self.reported = Some((status, job_count, now));
        self.sequence += 1;
        self.out.push(Request::UpdateWorker(UpdateWorkerStatus {
            status: Some(status.into()),
            load,
            job_count,
            draining: self.draining,
            seq: self.sequence,
        }));
    }
}

fn running_status(job: &str) -> UpdateJobStatus {
    UpdateJobStatus {
        job_id: job.to_owned(),
        status: JobStatus::JsRunning.into(),
        error: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use livekit_protocol::Room;

    use super::*;

    fn job(id: &str) -> Job {
        Job {
            id: id.to_owned(),
            room: Some(Room::default()),
            ..Job::default()
        }
    }

    fn ask(desk: &mut Desk, id: &str, now: Instant) {
        let request = AvailabilityRequest {
            job: Some(job(id)),
            resuming: false,
        };
        desk.asked(request, now);
    }

    fn assign(desk: &mut Desk, id: &str, now: Instant) {
        let assignment = JobAssignment {
            job: Some(job(id)),
            ..JobAssignment::default()
        };
        desk.assigned(assignment, now);
    }

    fn take(desk: &mut Desk, id: &str, now: Instant) {
        ask(desk, id, now);
        desk.answer(id, Some("us".into()), now);
        assign(desk, id, now);
    }

    fn desk(slots: usize, threshold: Option<f32>) -> (Desk, Instant) {
        let now = Instant::now();
        let mut desk = Desk::new(Some(slots), threshold, HashMap::new());
        desk.registered(&RegisterWorkerResponse::default(), now);
        assert_eq!(desk.take_events(), [Event::Registered { again: false }]);
        desk.take_out();
        (desk, now)
    }

    fn answers(desk: &mut Desk) -> Vec<bool> {
        let answer = |request| match request {
            Request::Availability(answer) => Some(answer.available),
            _ => None,
        };
        desk.take_out().into_iter().filter_map(answer).collect()
    }

    fn status(desk: &mut Desk) -> Option<WorkerStatus> {
        let status = |request: &Request| match request {
            Request::UpdateWorker(update) => Some(update.status()),
            _ => None,
        };
        desk.take_out().iter().filter_map(status).next_back()
    }

    #[test]
    fn without_a_free_slot_the_worker_is_full_and_refuses_at_once() {
        let (mut desk, now) = desk(2, None);
        take(&mut desk, "a", now);
        assert_eq!(status(&mut desk), Some(WorkerStatus::WsAvailable));
        // One that is only talked of counts as well.
        ask(&mut desk, "b", now);
        desk.answer("b", Some("us".into()), now);
        ask(&mut desk, "c", now);
        assert_eq!(answers(&mut desk), [true, false]);
        // It went elsewhere.
        let later = now + ASSIGNED_WITHIN;
        ask(&mut desk, "c", later);
        desk.answer("c", Some("us".into()), later);
        assign(&mut desk, "c", later);
        assert_eq!(status(&mut desk), Some(WorkerStatus::WsFull));
        desk.over("a", Ok(()), later);
        assert_eq!(status(&mut desk), Some(WorkerStatus::WsAvailable));
    }

    #[test]
    fn a_worker_that_drains_refuses_what_is_asked_and_ends_what_is_assigned() {
        let (mut desk, now) = desk(9, None);
        ask(&mut desk, "late", now);
        desk.answer("late", Some("us".into()), now);
        ask(&mut desk, "asked", now);
        desk.drain(true, now);
        assert_eq!(status(&mut desk), Some(WorkerStatus::WsFull));
        desk.answer("asked", Some("us".into()), now);
        ask(&mut desk, "new", now);
        assert_eq!(answers(&mut desk), [false, false]);
        assign(&mut desk, "late", now);
        let ended = |request: &Request| matches!(request, Request::UpdateJob(update) if update.status() == JobStatus::JsFailed);
        assert!(desk.take_out().iter().any(ended));
    }

    #[test]
    fn load_makes_full_and_available_again_with_some_hysteresis() {
        let (mut desk, now) = desk(9, Some(0.8));
        for (load, full) in [
            (0.79, None),
            (0.8, Some(true)),
            (0.77, None),
            (0.7, Some(false)),
        ] {
            desk.loaded(load, now);
            let expected = full.map(|full| match full {
                true => WorkerStatus::WsFull,
                false => WorkerStatus::WsAvailable,
            });
            assert_eq!(status(&mut desk), expected, "{load}");
        }
    }

    #[test]
    fn the_servers_own_limit_is_reached_where_ours_is() {
        // Slots, threshold, load, jobs; what is reported.
        for (slots, threshold, load, jobs, expected) in [
            (10, Some(0.8), 0.0, 0, 0.0),
            (10, Some(0.8), 0.4, 0, 0.35),
            (10, Some(0.8), 0.79, 0, 0.69),
            (10, Some(0.8), 0.8, 0, 1.0),
            (10, None, 1.0, 0, 0.69),
            (10, None, 0.2, 5, 0.35),
            (10, None, 0.2, 9, 0.63),
            (10, None, 0.2, 10, 1.0),
        ] {
            let (mut desk, now) = desk(slots, threshold);
            (0..jobs).for_each(|n| take(&mut desk, &n.to_string(), now));
            desk.loaded(load, now);
            desk.report(now);
            let reported = match desk.take_out().pop() {
                Some(Request::UpdateWorker(update)) => update.load,
                other => panic!("{other:?}"),
            };
            let case = (slots, threshold, load, jobs);
            assert!((reported - expected).abs() < 0.001, "{case:?}: {reported}");
        }
    }

    #[test]
    fn after_a_lost_connection_jobs_are_told_again_and_ends_made_up_for() {
        let (mut desk, now) = desk(9, None);
        take(&mut desk, "goes on", now);
        take(&mut desk, "ends", now);
        ask(&mut desk, "asked", now);
        desk.take_events();
        desk.dropped();
        desk.over("ends", Err("for a reason".into()), now);
        assert_eq!(desk.take_out(), []);
        desk.registered(&RegisterWorkerResponse::default(), now);
        let out = desk.take_out();
        let job_ids = vec!["goes on".to_owned()];
        assert_eq!(out[0], Request::MigrateJob(MigrateJobRequest { job_ids }));
        assert_eq!(out[1], Request::UpdateJob(running_status("goes on")));
        let Request::UpdateJob(end) = &out[2] else {
            panic!("{out:?}")
        };
        assert_eq!(
            (end.status(), end.error.as_str()),
            (JobStatus::JsFailed, "for a reason")
        );
        assert_eq!(desk.take_events(), [Event::Registered { again: true }]);
        // The server gives it back, which changes nothing.
        ask(&mut desk, "goes on", now);
        desk.answer("goes on", Some("us".into()), now);
        assert_eq!(answers(&mut desk), [true]);
        desk.take_events();
        assign(&mut desk, "goes on", now);
        assert_eq!(desk.take_events(), []);
    }

    /// Whatever comes, in whatever order: a job is begun once at most while it is not over, has an
    /// end if it had a beginning, and there are never more of them than slots.
    #[test]
    fn whatever_comes_each_job_begins_once_and_ends_once() {
        const SLOTS: usize = 3;
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut desk, mut now) = desk(SLOTS, Some(0.8));
            let (mut running, mut offered) = (BTreeSet::new(), BTreeSet::new());
            let mut drained = false;
            for _ in 0..120 {
                let id = format!("AJ_{}", random.u8(..6));
                match random.u8(..12) {
                    0..=2 => ask(&mut desk, &id, now),
                    3..=4 => {
                        let identity = random.bool().then(|| "us".to_owned());
                        desk.answer(&id, identity, now);
                    }
                    // A server assigns what it was told yes for, perhaps twice.
                    5..=6 if offered.contains(&id) => assign(&mut desk, &id, now),
                    7 => desk.terminated(id.clone()),
                    8 => {
                        desk.over(&id, Ok(()), now);
                        if running.remove(&id) {
                            offered.remove(&id);
                        }
                    }
                    9 => desk.loaded(random.f32(), now),
                    10 => {
                        desk.dropped();
                        offered.clear();
                        desk.registered(&RegisterWorkerResponse::default(), now);
                    }
                    11 if random.u8(..20) == 0 => {
                        drained = true;
                        desk.drain(true, now);
                    }
                    _ => now += Duration::from_secs(random.u64(..6)),
                }
                for request in desk.take_out() {
                    match request {
                        Request::Availability(answer) if answer.available => {
                            assert!(!drained, "seed {seed}");
                            offered.insert(answer.job_id);
                        }
                        Request::UpdateJob(update) if update.status() == JobStatus::JsFailed => {
                            assert!(drained, "seed {seed}: nothing else fails here");
                        }
                        _ => {}
                    }
                }
                for event in desk.take_events() {
                    match event {
                        Event::Assigned(job, _) => {
                            assert!(running.insert(job.id), "seed {seed}: begun twice");
                        }
                        Event::Terminated(job) => assert!(running.contains(&job), "seed {seed}"),
                        Event::Asked(_) | Event::Registered { .. } => {}
                    }
                }
                assert_eq!(desk.job_count(), running.len(), "seed {seed}");
            }
        }
    }
}
