//! The server gives a job away once: it is lost when its worker drops, and none is given when no
//! worker was there. So rooms are looked at from time to time: one with people in it that one of our
//! dispatches is for, and none of our participants is in, is taken up without a job. Several daemons
//! may see the same; since they join under one identity the server leaves one of them in, and that
//! one is seen from then on.
//!
//! Jobs about one participant each are different: there the participants of several daemons are in
//! a room, each under its own identity, and only a daemon that was killed takes up its own again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use livekit_protocol::{
    AgentDispatch, Job, JobState, JobStatus, JobType, ParticipantInfo, participant_info::Kind,
    participant_info::State,
};

use crate::{
    config::{Config, JobKind},
    overrides::Overrides,
    room::{
        api::{ApiError, DAEMON_ATTRIBUTE, ListedRoom, RoomApi},
        claims::Claim,
    },
};

/// A loss is believed when it is still seen after this: LiveKit shows a job up to 5 s late among those
/// of its dispatch (CheckEnabledTimeout of its pkg/agent/client.go), while somebody is at it already.
const BELIEVED_AFTER: Duration = Duration::from_secs(6);
/// The same if another program has the job, which may take its time to join.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(30);
/// Rooms that no dispatch of ours is for are looked at more seldom.
const SELDOM: u32 = 6;
/// Whether a job's dispatch is still there is asked so often.
const ASK_AGAIN_AFTER: [Duration; 4] = [
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::ZERO,
];
/// Requests at a time.
const AT_ONCE: usize = 8;
/// Rooms that are looked at in one go.
const MAX_ROOMS: usize = 500;

/// As what rooms are looked at.
#[derive(Debug, Clone)]
pub struct Us {
    pub agent_name: String,
    pub job_type: JobKind,
    /// In rooms that we are dispatched to.
    pub identity: String,
    /// Of this daemon alone.
    pub daemon: String,
}

impl Us {
    pub fn new(config: &Config) -> Self {
        Self {
            agent_name: config.agent.name.clone().unwrap_or_default(),
            job_type: config.agent.job_type,
            identity: identity(config),
            daemon: config.rooms.identity.clone(),
        }
    }
}

/// As whom a room is joined for a job. For jobs about rooms the daemons share an identity, so that
/// only one of them is in a room.
pub fn identity(config: &Config) -> String {
    match config.agent.job_type {
        JobKind::Room => config.agent.identity.clone(),
        JobKind::Publisher | JobKind::Participant => config.rooms.identity.clone(),
    }
}

/// What is found of one room.
#[derive(Debug, Clone, PartialEq)]
pub enum Sight {
    /// The server does not say.
    Unknown,
    /// No dispatch is for us.
    NotOurs,
    /// Another program's worker of our name has the job, or has refused it for all.
    Theirs,
    /// Somebody of ours is there, or nobody who could be transcribed.
    Served,
    /// These are wanted and nobody is there for them; when that is believed.
    Lost {
        claims: Vec<Claim>,
        believed_after: Duration,
    },
}

#[derive(Debug, Default)]
struct Seen {
    next_at: Option<Instant>,
    lost_since: Option<Instant>,
}

/// When to look at which room. Decides, and asks nobody itself.
#[derive(Debug, Default)]
pub struct Rescue {
    /// None for never.
    every: Option<Duration>,
    /// By SID.
    seen: HashMap<String, Seen>,
    /// Rooms that are there when we come: no job is on its way for them.
    came: bool,
}

impl Rescue {
    pub fn look_every(&mut self, every: Option<Duration>) {
        self.every = every;
    }

    /// After the server has forgotten our jobs, all rooms are looked at again at once.
    pub fn start_anew(&mut self) {
        self.seen.values_mut().for_each(|seen| seen.next_at = None);
    }

    /// Which of the rooms to look at now.
    pub fn due(&mut self, listed: &[ListedRoom], now: Instant) -> Vec<ListedRoom> {
        let Some(every) = self.every else {
            return Vec::new();
        };
        let there: HashSet<&str> = listed.iter().map(|room| room.sid.as_str()).collect();
        self.seen.retain(|sid, _| there.contains(sid.as_str()));
        let mut due = Vec::new();
        for room in listed {
            let new = !self.seen.contains_key(&room.sid);
            let seen = self.seen.entry(room.sid.clone()).or_default();
            // Its job is on its way, if there is one.
            if new && self.came {
                seen.next_at = Some(now + every);
            }
            if seen.next_at.is_none_or(|at| at <= now) && due.len() < MAX_ROOMS {
                // Jittered, so that daemons that were started together do not look together.
                seen.next_at = Some(now + every.mul_f64(0.75 + 0.5 * fastrand::f64()));
                due.push(room.clone());
            }
        }
        self.came = true;
        due
    }

    /// The claims to make, by what was found of a room.
    pub fn found(&mut self, sid: &str, sight: Sight, now: Instant) -> Vec<Claim> {
        let (Some(seen), Some(every)) = (self.seen.get_mut(sid), self.every) else {
            return Vec::new();
        };
        match sight {
            Sight::Lost {
                claims,
                believed_after,
            } => {
                let believed_at = *seen.lost_since.get_or_insert(now) + believed_after;
                if now >= believed_at {
                    seen.lost_since = None;
                    return claims;
                }
                // Not all daemons at once.
                seen.next_at = Some(believed_at + every.mul_f64(0.2 * fastrand::f64()));
            }
            Sight::NotOurs => {
                seen.lost_since = None;
                seen.next_at = Some(now + every * SELDOM);
            }
            Sight::Theirs | Sight::Served | Sight::Unknown => seen.lost_since = None,
        }
        Vec::new()
    }
}

/// Which dispatches a room has. None if the server does not say, though asked more than once.
pub async fn dispatches(api: &RoomApi, room: &str) -> Option<HashSet<String>> {
    for pause in ASK_AGAIN_AFTER {
        match api.list_dispatches(room).await {
            Ok(dispatches) => {
                let there = dispatches.into_iter().filter(|d| !is_deleted(d));
                return Some(there.map(|dispatch| dispatch.id).collect());
            }
            Err(error) => tracing::debug!(room, %error, "dispatches can't be listed"),
        }
        tokio::time::sleep(pause).await;
    }
    None
}

fn is_deleted(dispatch: &AgentDispatch) -> bool {
    dispatch.state.as_ref().is_some_and(|s| s.deleted_at != 0)
}

/// Looks at rooms.
pub async fn look(api: Arc<RoomApi>, us: Us, rooms: Vec<ListedRoom>) -> Vec<(ListedRoom, Sight)> {
    let looks = stream::iter(rooms).map(|room| {
        let (api, us) = (&api, &us);
        async move {
            let sight = look_at(api, us, &room).await.unwrap_or_else(|error| {
                tracing::debug!(room = room.name, %error, "dispatches can't be listed");
                Sight::Unknown
            });
            (room, sight)
        }
    });
    looks.buffer_unordered(AT_ONCE).collect().await
}

async fn look_at(api: &RoomApi, us: &Us, room: &ListedRoom) -> Result<Sight, ApiError> {
    let dispatches = api.list_dispatches(&room.name).await?;
    let ours =
        |dispatch: &&AgentDispatch| dispatch.agent_name == us.agent_name && !is_deleted(dispatch);
    let ours: Vec<_> = dispatches.iter().filter(ours).collect();
    if ours.is_empty() {
        return Ok(Sight::NotOurs);
    }
    let participants = api.list_participants(&room.name).await?;
    Ok(sight(us, &room.sid, &ours, &participants))
}

/// The jobs of a dispatch, each with the identity that it was taken under.
fn jobs_of(dispatch: &AgentDispatch) -> impl Iterator<Item = (&str, &Job)> {
    let jobs = dispatch.state.iter().flat_map(|state| &state.jobs);
    jobs.filter_map(|job| Some((job.state.as_ref()?.participant_identity.as_str(), job)))
}

/// The jobs for the room that workers of other programs have taken, who may go by our name; none if we
/// have one as well.
fn others_jobs<'a>(us: &Us, dispatch: &'a AgentDispatch) -> Vec<(&'a str, &'a Job)> {
    // A dispatch has jobs of all types.
    let jobs = jobs_of(dispatch).filter(|(_, job)| job.r#type() == JobType::JtRoom);
    let (ours, others): (Vec<_>, Vec<_>) = jobs.partition(|(i, _)| *i == us.identity);
    if ours.is_empty() { others } else { Vec::new() }
}

/// What a room with dispatches of ours is in need of.
fn sight(
    us: &Us,
    sid: &str,
    dispatches: &[&AgentDispatch],
    participants: &[ParticipantInfo],
) -> Sight {
    let there = |p: &&ParticipantInfo| p.state() != State::Disconnected;
    let person = |p: &&ParticipantInfo| !matches!(p.kind(), Kind::Agent | Kind::Egress);
    let people: Vec<_> = participants.iter().filter(there).filter(person).collect();
    let claim = |dispatch: &AgentDispatch, participant: Option<String>| {
        // What is wrong with it was said to the job, if there was one.
        let overrides = Overrides::parse(&dispatch.metadata).ok()?;
        Some(Claim {
            dispatch: dispatch.id.clone(),
            sid: sid.to_owned(),
            participant,
            overrides,
            ..Claim::default()
        })
    };
    let ours = |p: &ParticipantInfo| {
        let daemon = p.attributes.get(DAEMON_ATTRIBUTE).map(String::as_str);
        // By its attribute, since others may have the same identity; without one it is in doubt.
        (p.kind() == Kind::Agent && daemon.is_some()) || p.identity == us.identity
    };
    let mut of_daemons = participants.iter().filter(there).filter(|p| ours(p));
    let us_before = |p: &ParticipantInfo| {
        p.attributes.get(DAEMON_ATTRIBUTE) == Some(&us.daemon) || p.identity == us.daemon
    };
    let (claims, believed_after): (Vec<Claim>, Duration) = match us.job_type {
        JobKind::Room => {
            let served = of_daemons.clone().any(|p| !us_before(p));
            if people.is_empty() || served {
                return Sight::Served;
            }
            let theirs = |(identity, job): &(&str, &Job)| {
                let mut there = participants.iter().filter(there);
                let present = there.any(|p| p.identity == *identity && !ours(p));
                let refused =
                    job.state.as_ref().map(JobState::status) == Some(JobStatus::JsSuccess);
                present || refused
            };
            let is_theirs = |d: &&&AgentDispatch| others_jobs(us, d).iter().any(theirs);
            if dispatches.iter().all(|d| is_theirs(&d)) {
                return Sight::Theirs;
            }
            // We are not in the room, and the server has us in it: we were, and were killed.
            let believed_after = if of_daemons.any(us_before) {
                Duration::ZERO
            } else if dispatches.iter().all(|d| others_jobs(us, d).is_empty()) {
                BELIEVED_AFTER
            } else {
                GIVEN_UP_AFTER
            };
            let claims = dispatches.iter().filter(|d| !is_theirs(d));
            let claims = claims.filter_map(|d| claim(d, None));
            (claims.take(1).collect(), believed_after)
        }
        JobKind::Publisher | JobKind::Participant => {
            let of = |dispatch: &&&AgentDispatch| {
                jobs_of(dispatch)
                    .filter(|(agent, _)| *agent == us.daemon)
                    .filter_map(|(_, job)| Some(job.participant.as_ref()?.identity.clone()))
                    .filter(|identity| people.iter().any(|p| p.identity == *identity))
                    .collect::<HashSet<_>>()
            };
            let claims = dispatches.iter().flat_map(|dispatch| {
                let lost = of(&dispatch).into_iter();
                lost.filter_map(|identity| claim(dispatch, Some(identity)))
            });
            (claims.collect(), Duration::ZERO)
        }
    };
    match claims.is_empty() {
        true => Sight::Served,
        false => Sight::Lost {
            claims,
            believed_after,
        },
    }
}

#[cfg(test)]
mod tests {
    use livekit_protocol::AgentDispatchState;

    use super::*;

    fn us(job_type: JobKind) -> Us {
        Us {
            agent_name: "scribe".into(),
            job_type,
            identity: "agent".into(),
            daemon: "d1".into(),
        }
    }

    fn person(identity: &str) -> ParticipantInfo {
        ParticipantInfo {
            identity: identity.into(),
            state: State::Active.into(),
            ..ParticipantInfo::default()
        }
    }

    fn agent(identity: &str, daemon: Option<&str>) -> ParticipantInfo {
        let attribute = daemon.map(|daemon| (DAEMON_ATTRIBUTE.to_owned(), daemon.to_owned()));
        ParticipantInfo {
            kind: Kind::Agent.into(),
            attributes: attribute.into_iter().collect(),
            ..person(identity)
        }
    }

    fn dispatch(metadata: &str, jobs: &[(&str, &str)]) -> AgentDispatch {
        let job = |(identity, participant): &(&str, &str)| Job {
            participant: Some(person(participant)),
            state: Some(JobState {
                participant_identity: (*identity).to_owned(),
                ..JobState::default()
            }),
            ..Job::default()
        };
        AgentDispatch {
            id: "AD_1".into(),
            metadata: metadata.into(),
            state: Some(AgentDispatchState {
                jobs: jobs.iter().map(job).collect(),
                ..AgentDispatchState::default()
            }),
            ..AgentDispatch::default()
        }
    }

    fn believed_after(sight: &Sight) -> Option<Duration> {
        match sight {
            Sight::Lost { believed_after, .. } => Some(*believed_after),
            _ => None,
        }
    }

    #[test]
    fn a_room_with_people_and_none_of_ours_is_lost() {
        let us = us(JobKind::Room);
        let ours = dispatch("{\"model\": \"m\"}", &[]);
        let see = |participants: &[ParticipantInfo]| sight(&us, "RM_1", &[&ours], participants);
        let found = see(&[person("ann"), agent("another's", None)]);
        let Sight::Lost {
            claims,
            believed_after: BELIEVED_AFTER,
        } = &found
        else {
            panic!("{found:?}")
        };
        assert_eq!((claims.len(), claims[0].dispatch.as_str()), (1, "AD_1"));
        assert_eq!(claims[0].overrides.model.as_deref(), Some("m"));
        assert_eq!(see(&[]), Sight::Served, "nobody to transcribe");
        assert_eq!(see(&[agent("another's", None)]), Sight::Served);
        // Another daemon is there, dispatched or because it found the room.
        for other in [
            agent("agent", Some("d2")),
            agent("d2", Some("d2")),
            agent("agent", None),
        ] {
            assert_eq!(see(&[person("ann"), other]), Sight::Served);
        }
        // We are, and were killed.
        let before = see(&[person("ann"), agent("agent", Some("d1"))]);
        assert_eq!(believed_after(&before), Some(Duration::ZERO));
        let gone = ParticipantInfo {
            state: State::Disconnected.into(),
            ..agent("agent", Some("d2"))
        };
        assert_eq!(
            believed_after(&see(&[person("ann"), gone])),
            Some(BELIEVED_AFTER)
        );
        // Another program's worker of our name has the job.
        let theirs = dispatch("", &[("another's", "")]);
        let see = |dispatches: &[&AgentDispatch], agent| {
            sight(&us, "RM_1", dispatches, &[person("ann"), agent])
        };
        let another = || agent("another's", None);
        let third = || agent("a third", None);
        assert_eq!(see(&[&theirs], another()), Sight::Theirs);
        assert_eq!(
            believed_after(&see(&[&theirs, &ours], another())),
            Some(GIVEN_UP_AFTER)
        );
        assert_eq!(
            believed_after(&see(&[&theirs], third())),
            Some(GIVEN_UP_AFTER)
        );
        let mut refused = theirs.clone();
        let job = |d: &mut AgentDispatch, change: fn(&mut Job)| {
            d.state.iter_mut().for_each(|s| change(&mut s.jobs[0]));
        };
        job(&mut refused, |job| {
            let state = job.state.get_or_insert_default();
            state.set_status(JobStatus::JsSuccess);
        });
        assert_eq!(see(&[&refused], third()), Sight::Theirs);
        // A job about a participant, which says nothing of the room's.
        let mut about = theirs.clone();
        job(&mut about, |job| job.set_type(JobType::JtPublisher));
        assert_eq!(
            believed_after(&see(&[&about], another())),
            Some(BELIEVED_AFTER)
        );
        // We have one as well, in another namespace.
        let both = dispatch("", &[("another's", ""), ("agent", "")]);
        assert_eq!(
            believed_after(&see(&[&both], another())),
            Some(BELIEVED_AFTER)
        );
        let wrong = dispatch("{\"modle\": 1}", &[]);
        let found = sight(&us, "RM_1", &[&wrong], &[person("ann")]);
        assert_eq!(found, Sight::Served, "it failed its job, and would again");
    }

    #[test]
    fn of_jobs_about_participants_only_our_own_are_taken_up_again() {
        let us = us(JobKind::Publisher);
        let jobs = [("d1", "ann"), ("d2", "bob"), ("d1", "gone"), ("d1", "ann")];
        let ours = dispatch("", &jobs);
        let found = sight(&us, "RM_1", &[&ours], &[person("ann"), person("bob")]);
        let Sight::Lost {
            claims,
            believed_after: Duration::ZERO,
        } = found
        else {
            panic!("{found:?}")
        };
        let about: Vec<_> = claims.iter().map(|c| c.participant.as_deref()).collect();
        assert_eq!(about, [Some("ann")]);
        let found = sight(&us, "RM_1", &[&ours], &[person("bob")]);
        assert_eq!(found, Sight::Served);
    }

    const EVERY: Duration = Duration::from_secs(5);

    fn rescue() -> Rescue {
        let mut rescue = Rescue::default();
        rescue.look_every(Some(EVERY));
        rescue
    }

    fn listed(sids: &[&str]) -> Vec<ListedRoom> {
        let room = |sid: &&str| ListedRoom {
            sid: (*sid).to_owned(),
            name: format!("room of {sid}"),
        };
        sids.iter().map(room).collect()
    }

    fn sids(rooms: &[ListedRoom]) -> Vec<&str> {
        rooms.iter().map(|room| room.sid.as_str()).collect()
    }

    #[test]
    fn rooms_that_were_there_first_are_looked_at_at_once_and_new_ones_when_their_job_has_come() {
        let (mut rescue, every) = (rescue(), EVERY);
        let now = Instant::now();
        assert_eq!(sids(&rescue.due(&listed(&["a"]), now)), ["a"]);
        assert_eq!(sids(&rescue.due(&listed(&["a", "b"]), now)), [""; 0]);
        let later = now + 2 * every;
        assert_eq!(sids(&rescue.due(&listed(&["a", "b"]), later)), ["a", "b"]);
        rescue.found("a", Sight::NotOurs, later);
        let after = later + 2 * every;
        assert_eq!(sids(&rescue.due(&listed(&["a", "b"]), after)), ["b"]);
        rescue.start_anew();
        assert_eq!(sids(&rescue.due(&listed(&["a", "b"]), after)), ["a", "b"]);
        assert_eq!(sids(&rescue.due(&listed(&["b"]), after)), [""; 0]);
        assert_eq!(rescue.seen.len(), 1, "a room that is gone is forgotten");
        let mut never = Rescue::default();
        assert_eq!(sids(&never.due(&listed(&["a"]), now)), [""; 0]);
    }

    #[test]
    fn a_loss_is_believed_when_it_lasts_or_is_sure() {
        let mut rescue = rescue();
        let now = Instant::now();
        rescue.due(&listed(&["a"]), now);
        let lost = |sure| Sight::Lost {
            claims: vec![Claim::default()],
            believed_after: if sure { Duration::ZERO } else { BELIEVED_AFTER },
        };
        let (soon, later) = (now + BELIEVED_AFTER / 2, now + BELIEVED_AFTER);
        let denied = [Sight::Served, Sight::Theirs, Sight::Unknown, Sight::NotOurs];
        for (sight, at) in denied.into_iter().zip([now, soon, later, later]) {
            assert_eq!(rescue.found("a", lost(false), at), []);
            assert_eq!(rescue.found("a", sight, at), []);
        }
        let again = later + BELIEVED_AFTER;
        for at in [later, later + BELIEVED_AFTER / 2] {
            assert_eq!(rescue.found("a", lost(false), at), []);
            // Looked at again as soon as it is believed.
            assert_eq!(sids(&rescue.due(&listed(&["a"]), again)), [""; 0]);
        }
        let by = again + EVERY.mul_f64(0.2);
        assert_eq!(sids(&rescue.due(&listed(&["a"]), by)), ["a"]);
        assert_eq!(rescue.found("a", lost(false), again).len(), 1);
        assert_eq!(rescue.found("a", lost(true), now).len(), 1);
        assert_eq!(rescue.found("unknown", lost(true), now), []);
    }
}
