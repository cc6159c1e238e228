//! Jobs as a source of rooms. A room that a job wants is joined like one that was found or is
//! configured, and there is one supervisor for all who want it; the last who does closes it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use livekit_api::access_token::Claims as TokenClaims;
use livekit_protocol::Job;
use tokio::task::JoinError;

use super::{Root, Running};
use crate::{
    close::{CloseOrder, order},
    domain::CloseReason,
    overrides::Overrides,
    room::{
        api::ListedRoom,
        claims::{Audience, Claim, Ticket},
        supervisor::{House, Missing, RoomEnd, ToRoom},
    },
    session::{Settings, Stt},
    stt::connect::Provider,
    worker::{
        Command, Event, Line, Worker,
        rescue::{self, Sight, Us},
    },
};

/// What a look at rooms has shown.
pub(super) struct Looked {
    rooms: Vec<(ListedRoom, Sight)>,
    /// Those of them that we were in.
    running: HashSet<String>,
}

/// Whether the dispatch is still there whose job the server has ended.
pub(super) struct Asked {
    room: String,
    job: String,
    /// IDs; None if the server does not say.
    dispatches: Option<HashSet<String>>,
}

/// A worker that failed by a defect is started anew after this.
const RESTART_AFTER: Duration = Duration::from_secs(5);
/// What the last words to the server may take, within what is left.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The worker's next event; never, if there is no worker. Cancel safe.
pub(super) async fn next_event(line: &mut Option<Line>) -> Option<Event> {
    match line {
        Some(line) => line.events.recv().await,
        None => std::future::pending().await,
    }
}

impl Root {
    pub(super) fn start_worker(&mut self, after: Duration) {
        let Some((worker, line)) = Worker::new(&self.config) else {
            return;
        };
        self.line = Some(line);
        self.worker.spawn(async move {
            tokio::time::sleep(after).await;
            worker.run().await;
        });
    }

    /// It ends only when told to, unless by a defect. Its rooms go on.
    pub(super) fn worker_ended(&mut self, ended: Result<(), JoinError>) {
        tracing::error!(?ended, "the agent worker failed by a defect; started anew");
        self.forget_jobs();
        self.start_worker(RESTART_AFTER);
        if self.draining {
            self.tell(Command::Drain(true));
        }
        self.jobless = 0;
    }

    /// No more jobs are taken.
    pub(super) fn drain_worker(&mut self) {
        if let Some(line) = &mut self.line {
            line.tell(Command::Drain(true));
            line.events.close();
        }
    }

    /// Everything is closed: the last words to the server, within bounds.
    pub(super) async fn end_worker(&mut self, until: Instant) {
        let hung: Vec<String> = self.running.values().map(|r| r.name.clone()).collect();
        for room in hung {
            let jobs = self.claims.remove(&room, |_| true);
            self.tell_over(jobs, &Err("the room was abandoned: it hung".to_owned()));
        }
        let Some(line) = self.line.take() else {
            return;
        };
        line.tell(Command::End);
        let until = until.min(Instant::now() + LAST_WORDS);
        let ended = async { while self.worker.join_next().await.is_some() {} };
        if tokio::time::timeout_at(until.into(), ended).await.is_err() {
            tracing::warn!("the server was not told in time how the last jobs ended");
        }
    }

    pub(super) fn on_job(&mut self, event: Event) {
        match event {
            Event::Registered { again: false } => {}
            Event::Registered { again: true } => {
                // It is seen by their dispatches whether they are still wanted.
                self.rescue.start_anew();
                self.claims.forget();
            }
            Event::Asked(job) => {
                let room = job.room.unwrap_or_default().name;
                let identity = match self.running(&room) {
                    Some(running) => running.identity.clone(),
                    None => self.identity(&room),
                };
                let identity = Some(identity).filter(|_| !room.is_empty());
                self.tell(Command::Answer {
                    job: job.id,
                    identity,
                });
            }
            Event::Assigned(job, ticket) => self.assigned(job, ticket),
            Event::Terminated(job) => {
                let Some(room) = self.claims.room_of(&job).map(str::to_owned) else {
                    return;
                };
                let api = self.room_context.api.clone();
                self.asks.spawn(async move {
                    let dispatches = rescue::dispatches(&api, &room).await;
                    Asked {
                        room,
                        job,
                        dispatches,
                    }
                });
            }
        }
    }

    /// The server ends a job when its dispatch is deleted, and as well when its participant leaves:
    /// put out by somebody, or for a connection made anew. Then the end of the room, if it is one,
    /// says what comes of it.
    pub(super) fn asked(&mut self, asked: Result<Asked, JoinError>) {
        let Asked {
            room,
            job,
            dispatches,
        } = match asked {
            Ok(asked) => asked,
            Err(error) => {
                return tracing::error!(%error, "asking for dispatches failed by a defect");
            }
        };
        let this = |claim: &Claim| claim.job.as_ref() == Some(&job);
        let Some(claim) = self.claims.of(&room).find(|claim| this(claim)) else {
            return;
        };
        let lives_on = |there: HashSet<String>| there.contains(&claim.dispatch);
        if dispatches.is_none_or(lives_on) {
            self.claims.orphan(&job);
            self.tell_over([job], &Ok(()));
        } else {
            self.release(&room, this, "its dispatch was deleted");
        }
    }

    /// Tells the worker what else takes slots.
    pub(super) fn tell_jobless(&mut self) {
        let jobless = self.claims.jobless();
        if self.line.is_some() && jobless != self.jobless {
            self.jobless = jobless;
            self.tell(Command::Jobless(jobless));
        }
    }

    fn assigned(&mut self, job: Job, ticket: Ticket) {
        let room = job.room.unwrap_or_default();
        let (name, id) = (room.name, job.id);
        if self.draining {
            return self.refuse(&name, id, "the daemon takes no more rooms".to_owned());
        }
        let overrides = match Overrides::parse(&job.metadata) {
            Ok(overrides) => overrides,
            Err(said) => return self.refuse(&name, id, said),
        };
        let running = self.running(&name);
        let closing = |running: &Running| running.orders.borrow().is_some();
        let another = |running: &Running| {
            let known = running.sid.as_ref().filter(|_| !room.sid.is_empty());
            known.is_some_and(|sid| *sid != room.sid)
        };
        let next = running.is_some_and(|running| closing(running) || another(running));
        let is_running = running.is_some();
        let participant = job.participant.map(|participant| participant.identity);
        let sid = room.sid;
        let claim = Claim {
            job: Some(id.clone()),
            forgotten: false,
            dispatch: job.dispatch_id,
            sid: sid.clone(),
            participant,
            overrides,
            ticket: Some(ticket).filter(|_| !is_running || next),
            next,
        };
        tracing::info!(room = name, job = id, "dispatched");
        if let Err(said) = self.claims.add(&name, claim) {
            return self.refuse(&name, id, said);
        }
        match is_running {
            true if next => {}
            true => self.renew(&name),
            false => self.join_now(name, sid),
        }
    }

    fn refuse(&mut self, room: &str, job: String, said: String) {
        tracing::error!(room, job, "the job fails: {said}");
        self.tell_over([job], &Err(said));
    }

    /// Somebody for whom alone a room was joined is not there.
    pub(super) fn gone(&mut self, Missing { room, identity }: &Missing) {
        let about = |claim: &Claim| claim.participant.as_ref() == Some(identity) && !claim.next;
        self.release(room, about, "the participant left");
    }

    /// Takes back claims; a room that nobody else wants is closed, and the jobs told after that.
    fn release(&mut self, room: &str, fits: impl Fn(&Claim) -> bool, why: &str) {
        if !self.claims.of(room).any(&fits) {
            return;
        }
        let jobs = self.claims.remove(room, fits);
        let wanted = self.selection.fits(room) || self.claims.of(room).any(|claim| !claim.next);
        let grace = Duration::from_millis(self.config.stt.close_grace_ms);
        match self
            .running
            .values_mut()
            .find(|running| running.name == room)
        {
            Some(running) if !wanted => {
                running.ending.extend(jobs);
                let reason = CloseReason::JobEnded(why.to_owned());
                let deadline = Instant::now() + grace;
                order(&running.orders, &CloseOrder { reason, deadline });
            }
            Some(running) => {
                running.outlived = Some(Instant::now());
                self.tell_over(jobs, &Ok(()));
                self.renew(room);
            }
            None => self.tell_over(jobs, &Ok(())),
        }
    }

    /// The room is over, or we are out of it: so are the jobs, but not always what they were for.
    pub(super) fn tell_jobs_of(&mut self, running: &Running, how: &RoomEnd) {
        let room = &running.name;
        self.tell_over(running.ending.iter().cloned(), &Ok(()));
        let (jobs, result) = match how {
            RoomEnd::Closed => (self.claims.remove(room, |claim| !claim.next), Ok(())),
            RoomEnd::PutOut(why) => {
                let jobs = self.claims.remove(room, |claim| !claim.next);
                (jobs, Err(format!("put out of the room: {why}")))
            }
            // Joined again, without them: to the server they end with our participant.
            RoomEnd::Failed(why) => (self.claims.bereave(room), Err(why.clone())),
            RoomEnd::Stale => {
                let anew = "the room is joined anew".to_owned();
                (self.claims.bereave(room), Err(anew))
            }
        };
        self.tell_over(jobs, &result);
        self.claims.renew(room);
    }

    /// Joins the next room of that name, if a job for it came while the last one was closing.
    pub(super) fn join_for_next(&mut self, room: &str) {
        if self.draining {
            let jobs = self.claims.remove(room, |claim| claim.ticket.is_some());
            return self.tell_over(jobs, &Err("the daemon takes no more rooms".to_owned()));
        }
        let next = self.claims.of(room).find(|claim| claim.ticket.is_some());
        if let Some(sid) = next.map(|claim| claim.sid.clone()) {
            self.join_now(room.to_owned(), sid);
        }
    }

    /// Whatever kept us out of it before; who was closed in it by request stays so.
    fn join_now(&mut self, room: String, sid: String) {
        if let Some(past) = self.past.get_mut(&room) {
            past.again = Some(Instant::now());
            if past.sid.as_ref() != Some(&sid) {
                self.past.remove(&room);
            }
        }
        self.join(room, Some(sid).filter(|sid| !sid.is_empty()));
    }

    /// Claims on rooms that the server does not have any more. `listed`: SIDs by name.
    pub(super) fn drop_claims_on_rooms_that_are_over(&mut self, listed: &HashMap<&str, &str>) {
        let over = |(name, claims): (&str, &[Claim])| {
            let here = listed.get(name);
            let there = claims.iter().any(|claim| Some(&claim.sid.as_str()) == here);
            (!there && self.running(name).is_none()).then(|| name.to_owned())
        };
        let over: Vec<String> = self.claims.rooms().filter_map(over).collect();
        for room in over {
            let jobs = self.claims.remove(&room, |_| true);
            self.tell_over(jobs, &Err("the room is over".to_owned()));
        }
    }

    /// Looks at rooms whose jobs may have been lost, and at those that are transcribed without one.
    pub(super) fn look_for_lost(&mut self, listed: &[ListedRoom]) {
        if self.line.is_none() || self.draining || !self.looks.is_empty() {
            return;
        }
        let now = Instant::now();
        let every = Duration::from_millis(self.config.rooms.reconcile_interval_ms);
        // Of hidden participants it is not known whether they are there.
        let look = !every.is_zero() && !self.config.rooms.hidden;
        self.rescue.look_every(Some(every).filter(|_| look));
        let worth = |room: &&ListedRoom| {
            let name = room.name.as_str();
            match self.running(name) {
                Some(_) => self.claims.of(name).any(Claim::is_unwatched),
                None => {
                    let past = self.past.get(name);
                    !self.selection.fits(name) && past.is_none_or(|past| past.allows(now))
                }
            }
        };
        let worth: Vec<_> = listed.iter().filter(worth).cloned().collect();
        let due = self.rescue.due(&worth, now);
        if !due.is_empty() {
            let (api, us) = (self.room_context.api.clone(), Us::new(&self.config));
            let names = due.iter().map(|room| room.name.clone());
            let running = names.filter(|name| self.running(name).is_some()).collect();
            self.looks.spawn(async move {
                let rooms = rescue::look(api, us, due).await;
                Looked { rooms, running }
            });
        }
    }

    pub(super) fn looked(&mut self, looked: Result<Looked, JoinError>) {
        let Looked { rooms, running } = match looked {
            Ok(looked) => looked,
            Err(error) => {
                return tracing::error!(%error, "looking for lost jobs failed by a defect");
            }
        };
        let now = Instant::now();
        for (ListedRoom { name, sid }, sight) in rooms {
            if self.draining {
                return;
            }
            if self.running(&name).is_some() {
                let why = match sight {
                    Sight::NotOurs => Some("its dispatch was deleted"),
                    Sight::Theirs => Some("another worker has the job"),
                    _ => None,
                };
                if let Some(why) = why.filter(|_| running.contains(&name)) {
                    self.release(&name, Claim::is_unwatched, why);
                }
                continue;
            }
            let been = || self.past.get(&name).and_then(|past| past.sid.as_ref()) == Some(&sid);
            let sight = match sight {
                // Not we, then, but another daemon; and each would put the other out.
                Sight::Lost {
                    believed_after: Duration::ZERO,
                    ..
                } if been() => {
                    tracing::debug!(room = name, "somebody else is there as ours");
                    Sight::Served
                }
                sight => sight,
            };
            let claims = self.rescue.found(&sid, sight, now);
            let taken = self.claims.rooms().count() as u64;
            let full = self.config.agent.slots > 0 && taken >= self.config.agent.slots;
            if claims.is_empty() || full || self.selection.fits(&name) {
                continue;
            }
            tracing::warn!(
                room = name,
                "we are dispatched to the room, and nobody of ours is there: taken up without a job"
            );
            for claim in claims {
                if let Err(said) = self.claims.add(&name, claim) {
                    tracing::error!(room = name, "a dispatch is not taken up: {said}");
                }
            }
            self.join(name, Some(sid));
        }
    }

    /// The worker that knew of the jobs is gone.
    fn forget_jobs(&mut self) {
        let rooms: Vec<String> = self
            .claims
            .rooms()
            .map(|(room, _)| room.to_owned())
            .collect();
        for room in rooms {
            self.claims.bereave(&room);
        }
    }

    /// As whom a room is joined that we are not in, and by which invitation.
    pub(super) fn way_in(&mut self, room: &str) -> (String, Option<Ticket>) {
        let identity = self.identity(room);
        let ticket = self.claims.take_ticket(room);
        // The server made it for whom we said we would be, which may have changed since.
        let ticket = ticket.filter(|ticket| {
            let claims = TokenClaims::from_unverified(&ticket.token);
            claims.is_ok_and(|claims| claims.sub == identity)
        });
        (identity, ticket)
    }

    fn identity(&self, room: &str) -> String {
        match self.selection.fits(room) {
            true => self.config.rooms.identity.clone(),
            false => rescue::identity(&self.config),
        }
    }

    /// What holds for a room alone.
    pub(super) fn house(&self, room: &str) -> House {
        let claimed = !self.selection.fits(room) && self.claims.want(room);
        let configured = ToRoom {
            text: self.config.transcripts.room,
            packets: self.config.transcripts.room_packet,
        };
        House {
            audience: match claimed {
                true => self.claims.audience(room),
                false => Audience::Everybody,
            },
            transcripts: self.claims.overrides(room).to_room(configured),
        }
    }

    pub(super) fn stt_with(&self, overrides: &Overrides) -> Arc<Stt> {
        let stt = self.stt.borrow().clone();
        if !overrides.is_for_provider() {
            return stt;
        }
        let config = overrides.apply(&self.config.stt);
        let gate = stt.gate.for_own_settings();
        let (provider, settings) = (Provider::new(&config), Settings::new(&config));
        Arc::new(Stt::new(provider, settings, gate))
    }

    /// The configuration has changed: for what rooms begin from now on.
    pub(super) fn renew_settings(&mut self) {
        for running in self.running.values() {
            running.stt.send_replace(self.stt_with(&running.overrides));
            running.house.send_replace(self.house(&running.name));
        }
    }

    /// What is wanted of a room has changed.
    fn renew(&mut self, room: &str) {
        let (house, overrides) = (self.house(room), self.claims.overrides(room));
        let stt = self.stt_with(&overrides);
        let Some(running) = self
            .running
            .values_mut()
            .find(|running| running.name == room)
        else {
            return;
        };
        if running.overrides != overrides {
            running.overrides = overrides;
            running.stt.send_replace(stt);
        }
        running.house.send_if_modified(|now| {
            let changed = *now != house;
            *now = house;
            changed
        });
    }

    fn running(&self, room: &str) -> Option<&Running> {
        self.running.values().find(|running| running.name == room)
    }

    fn tell_over(&self, jobs: impl IntoIterator<Item = String>, result: &Result<(), String>) {
        for job in jobs {
            self.tell(Command::Over {
                job,
                result: result.clone(),
            });
        }
    }

    pub(super) fn tell(&self, command: Command) {
        if let Some(line) = &self.line {
            line.tell(command);
        }
    }
}
