//! Dispatches: which agents a room is to have, and the jobs that follow from it.

use super::{Core, Termination, unix_ns};
use crate::room::{
    auth::{MAX_ATTRIBUTES, MAX_METADATA, attributes_size},
    participant::{Key, new_sid},
    twirp::{Code, TwirpError},
};
use livekit_protocol::{self as proto, JobType};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Dispatches of one room.
const MAX_DISPATCHES: usize = 1_000;
/// Jobs that a dispatch lists; the oldest go first.
const MAX_JOBS: usize = 1_000;
/// How long the agents of a deleted dispatch may take to leave. LiveKit's limit.
const EVICTION: Duration = Duration::from_secs(3);
const MAX_DEPLOYMENT: usize = 64;

impl Core {
    /// Sets up the dispatches that a new room was created with, and launches their jobs. Without
    /// any, every worker without a name is dispatched.
    pub(in crate::room) fn start_dispatches(
        &mut self,
        room: &str,
        mut requested: Vec<proto::RoomAgentDispatch>,
    ) {
        if requested.is_empty() {
            requested.push(proto::RoomAgentDispatch::default());
        }
        for request in requested {
            if let Err(e) = check_deployment(&request.deployment) {
                tracing::warn!(room, "agent dispatch left out: {e}");
                continue;
            }
            let dispatch = proto::AgentDispatch {
                agent_name: request.agent_name,
                metadata: request.metadata,
                restart_policy: request.restart_policy,
                deployment: request.deployment,
                attributes: request.attributes,
                ..new_dispatch(room)
            };
            if self.add_dispatch(room, dispatch.clone()) {
                self.launch(room, &dispatch, JobType::JtRoom, None);
            }
        }
    }

    /// Launches a participant's jobs. Agents and recorders have none.
    pub(in crate::room) fn launch_for(&mut self, key: Key, job_type: JobType) {
        let Some(p) = self.participants.get(&key) else {
            return;
        };
        let room = p.room.clone();
        let dispatches = self.rooms.get(&room).map(|r| r.dispatches.clone());
        for dispatch in dispatches.unwrap_or_default() {
            self.launch(&room, &dispatch, job_type, Some(key));
        }
    }

    /// A participant has left. If it was an agent, that is the end of its job.
    pub(in crate::room) fn agent_left(&mut self, room: &str, identity: &str) {
        let room = self.rooms.get_mut(room);
        if let Some(job) = room.and_then(|r| r.agents.remove(identity)) {
            self.terminate_job(&job, Termination::AgentLeft);
        }
    }

    /// A job has been assigned, or its worker says that it is done with.
    pub(super) fn job_settled(&mut self, job: proto::Job) {
        let of_room = job.room.clone().unwrap_or_default();
        let room = self.rooms.get_mut(&of_room.name);
        // Another one may have taken the name meanwhile.
        let Some(room) = room.filter(|r| r.info.sid == of_room.sid) else {
            return;
        };
        let identity = job.state.as_ref().map_or("", |s| &s.participant_identity);
        if !identity.is_empty() {
            room.agents.insert(identity.to_owned(), job.id.clone());
        }
        let mut dispatches = room.dispatches.iter_mut();
        match dispatches.find(|d| d.id == job.dispatch_id) {
            Some(dispatch) => {
                let jobs = &mut dispatch.state.get_or_insert_default().jobs;
                if jobs.len() >= MAX_JOBS {
                    jobs.remove(0);
                }
                jobs.push(job);
            }
            // The dispatch was deleted while a worker was being asked.
            None if !job.dispatch_id.is_empty() => self.evict(&of_room.name, &job),
            None => {}
        }
    }

    pub(in crate::room) fn api_create_dispatch(
        &mut self,
        request: proto::CreateAgentDispatchRequest,
    ) -> Result<proto::AgentDispatch, TwirpError> {
        let invalid = |message: &str| {
            let message = format!("twirp error unknown: {message}");
            Err(TwirpError::new(Code::InvalidArgument, &message))
        };
        if let Err(e) = check_deployment(&request.deployment) {
            return invalid(&e);
        }
        if let Err(e) = check_sizes(&request.metadata, &request.attributes) {
            return invalid(e);
        }
        let room = request.room.clone();
        self.api_create_room(proto::CreateRoomRequest {
            name: room.clone(),
            ..proto::CreateRoomRequest::default()
        })?;
        let dispatch = proto::AgentDispatch {
            agent_name: request.agent_name,
            metadata: request.metadata,
            restart_policy: request.restart_policy,
            deployment: request.deployment,
            attributes: request.attributes,
            ..new_dispatch(&room)
        };
        if !self.add_dispatch(&room, dispatch.clone()) {
            let message = "too many dispatches";
            return Err(TwirpError::new(Code::ResourceExhausted, message));
        }
        self.launch(&room, &dispatch, JobType::JtRoom, None);
        for key in self.members(&room) {
            let participant = self.participants.get(&key);
            if participant.is_some_and(|p| !p.tracks.is_empty()) {
                self.launch(&room, &dispatch, JobType::JtPublisher, Some(key));
            }
            self.launch(&room, &dispatch, JobType::JtParticipant, Some(key));
        }
        Ok(dispatch)
    }

    pub(in crate::room) fn api_delete_dispatch(
        &mut self,
        request: &proto::DeleteAgentDispatchRequest,
    ) -> Result<proto::AgentDispatch, TwirpError> {
        let room = self.rooms.get_mut(&request.room).ok_or_else(no_room)?;
        let mut dispatches = room.dispatches.iter();
        let Some(position) = dispatches.position(|d| d.id == request.dispatch_id) else {
            let message = "twirp error unknown: dispatch ID not found";
            return Err(TwirpError::new(Code::NotFound, message));
        };
        let dispatch = room.dispatches.remove(position);
        for job in dispatch.state.iter().flat_map(|s| &s.jobs) {
            self.evict(&request.room, job);
        }
        Ok(dispatch)
    }

    pub(in crate::room) fn api_list_dispatch(
        &self,
        request: &proto::ListAgentDispatchRequest,
    ) -> Result<proto::ListAgentDispatchResponse, TwirpError> {
        let room = self.rooms.get(&request.room).ok_or_else(no_room)?;
        let wanted = |d: &&proto::AgentDispatch| {
            request.dispatch_id.is_empty() || d.id == request.dispatch_id
        };
        let mut agent_dispatches: Vec<_> = room.dispatches.iter().filter(wanted).cloned().collect();
        if self.faults.borrow().jobs_unlisted {
            let states = agent_dispatches.iter_mut().filter_map(|d| d.state.as_mut());
            states.for_each(|state| state.jobs.clear());
        }
        Ok(proto::ListAgentDispatchResponse { agent_dispatches })
    }

    /// False if the room has too many, or is gone.
    fn add_dispatch(&mut self, room: &str, dispatch: proto::AgentDispatch) -> bool {
        let room = self.rooms.get_mut(room);
        let room = room.filter(|r| r.dispatches.len() < MAX_DISPATCHES);
        room.map(|r| r.dispatches.push(dispatch)).is_some()
    }

    /// Offers a dispatch's job of one type, once for each namespace that has workers for it.
    fn launch(
        &mut self,
        room: &str,
        dispatch: &proto::AgentDispatch,
        job_type: JobType,
        about: Option<Key>,
    ) {
        let about = about.and_then(|key| self.participants.get(&key));
        if about.is_some_and(|p| p.is_dependent()) {
            return;
        }
        let participant = about.map(|p| p.info.clone());
        let workers = self.agents.workers.values();
        let namespaces: BTreeSet<_> = workers
            .filter(|w| {
                w.agent_name == dispatch.agent_name
                    && w.deployment == dispatch.deployment
                    && w.job_type == job_type
            })
            .map(|w| w.namespace.clone())
            .collect();
        let room = self.room_info(room);
        for namespace in namespaces {
            // Old workers still register in one.
            #[allow(deprecated)]
            let job = proto::Job {
                id: new_sid("AJ_"),
                dispatch_id: dispatch.id.clone(),
                r#type: job_type as i32,
                room: room.clone(),
                participant: participant.clone(),
                namespace,
                metadata: dispatch.metadata.clone(),
                agent_name: dispatch.agent_name.clone(),
                deployment: dispatch.deployment.clone(),
                attributes: dispatch.attributes.clone(),
                ..proto::Job::default()
            };
            self.offer_job(job);
        }
    }

    /// Ends a job on request; its agent must leave the room.
    fn evict(&mut self, room: &str, job: &proto::Job) {
        if !self.terminate_job(&job.id, Termination::Requested) {
            return;
        }
        let identity = job.state.as_ref().map_or("", |s| &s.participant_identity);
        let room = self.rooms.get(room);
        if let Some(&agent) = room.and_then(|r| r.members.get(identity)) {
            self.agents
                .evictions
                .push((Instant::now() + EVICTION, agent));
        }
    }
}

/// LiveKit's limits on what a room or a dispatch hands to its agents.
pub(in crate::room) fn check_sizes(
    metadata: &str,
    attributes: &std::collections::HashMap<String, String>,
) -> Result<(), &'static str> {
    if metadata.len() > MAX_METADATA {
        return Err("metadata size exceeds limits");
    }
    if attributes_size(attributes) > MAX_ATTRIBUTES {
        return Err("attribute size exceeds limits");
    }
    Ok(())
}

/// LiveKit's rules for the name of a deployment.
pub(super) fn check_deployment(deployment: &str) -> Result<(), String> {
    if deployment.len() > MAX_DEPLOYMENT {
        return Err(format!("deployment exceeds {MAX_DEPLOYMENT} bytes"));
    }
    for (position, byte) in deployment.bytes().enumerate() {
        if byte == b'_' {
            return Err("deployment contains reserved character '_'".to_owned());
        }
        if byte <= b' ' || byte == 0x7f {
            let what = "deployment contains whitespace or control byte";
            return Err(format!("{what} at position {position}"));
        }
    }
    Ok(())
}

fn new_dispatch(room: &str) -> proto::AgentDispatch {
    proto::AgentDispatch {
        id: new_sid("AD_"),
        room: room.to_owned(),
        state: Some(proto::AgentDispatchState {
            created_at: unix_ns(),
            ..proto::AgentDispatchState::default()
        }),
        ..proto::AgentDispatch::default()
    }
}

/// LiveKit's server asks the node that has the room, and nobody answers.
fn no_room() -> TwirpError {
    let message = "twirp error unknown: no response from servers";
    TwirpError::new(Code::Unavailable, message)
}
