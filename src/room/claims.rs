//! Which rooms are wanted because a job was dispatched for them, and what the jobs want of them.
//! Many jobs may be about one room, from sources that know nothing of each other, told twice, late
//! or never; there is one supervisor for it all the same. Decides and does nothing itself.

use std::collections::{BTreeMap, BTreeSet};

use crate::overrides::Overrides;

/// A dispatch's wish for a room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// The job that is still to be told how it ended. None if the server has lost it, as when the
    /// daemon that had it was killed, or does not know any more that it is ours.
    pub job: Option<String>,
    /// The server has forgotten who has the job, and so would not say that it is to end.
    pub forgotten: bool,
    pub dispatch: String,
    /// The SID of the room that it is about.
    pub sid: String,
    /// The participant whom alone it is about.
    pub participant: Option<String>,
    pub overrides: Overrides,
    /// How the room is entered for the first time.
    pub ticket: Option<Ticket>,
    /// It came while the room of before was still being closed, and is for the next one.
    pub next: bool,
}

impl Claim {
    /// Nobody would say that it is to end.
    pub fn is_unwatched(&self) -> bool {
        self.job.is_none() || self.forgotten
    }
}

/// A job's invitation to its room.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// None for the server that is configured.
    pub url: Option<String>,
    pub token: String,
}

impl std::fmt::Debug for Ticket {
    /// Not the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("url", &self.url).finish()
    }
}

/// Who of a room is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Audience {
    #[default]
    Everybody,
    /// These identities.
    Only(BTreeSet<String>),
}

impl Audience {
    pub fn includes(&self, identity: &str) -> bool {
        match self {
            Self::Everybody => true,
            Self::Only(identities) => identities.contains(identity),
        }
    }
}

/// All claims, by the room's name.
#[derive(Debug, Default)]
pub struct Claims {
    rooms: BTreeMap<String, Vec<Claim>>,
}

impl Claims {
    /// Adds a claim on a room. One that is there already stays as it is, and takes on the job.
    ///
    /// # Errors
    /// The room has other settings by another dispatch.
    pub fn add(&mut self, room: &str, claim: Claim) -> Result<(), String> {
        let claims = self.rooms.entry(room.to_owned()).or_default();
        let same = |other: &&mut Claim| {
            let job = claim.job.is_some() && other.job == claim.job;
            let dispatch = other.dispatch == claim.dispatch && other.sid == claim.sid;
            job || (dispatch && other.participant == claim.participant && other.job.is_none())
        };
        if let Some(known) = claims.iter_mut().find(same) {
            known.forgotten = false;
            known.job = known.job.take().or(claim.job);
            return Ok(());
        }
        let sets = |claim: &Claim| claim.overrides != Overrides::default();
        let mut others = claims
            .iter()
            .filter(|other| other.next == claim.next && sets(other));
        if sets(&claim)
            && let Some(other) = others.find(|other| other.overrides != claim.overrides)
        {
            let said = format!(
                "the room is transcribed with other settings already, by dispatch {}: {}; delete \
                 that dispatch first",
                other.dispatch,
                other.overrides.to_metadata()
            );
            return Err(said);
        }
        claims.push(claim);
        Ok(())
    }

    /// Whether a job, or who was given up by the server, wants the room to be transcribed.
    pub fn want(&self, room: &str) -> bool {
        self.of(room).next().is_some()
    }

    /// Those that a room which is joined now is joined for.
    pub fn of(&self, room: &str) -> impl Iterator<Item = &Claim> {
        self.rooms.get(room).into_iter().flatten()
    }

    pub fn rooms(&self) -> impl Iterator<Item = (&str, &[Claim])> {
        self.rooms
            .iter()
            .map(|(room, claims)| (room.as_str(), claims.as_slice()))
    }

    /// Whom the claims on a room are about, those for the next room of that name left out.
    pub fn audience(&self, room: &str) -> Audience {
        let now = || self.of(room).filter(|claim| !claim.next);
        match now().all(|claim| claim.participant.is_some()) {
            true => Audience::Only(now().filter_map(|c| c.participant.clone()).collect()),
            false => Audience::Everybody,
        }
    }

    /// The settings that a room has by its claims.
    pub fn overrides(&self, room: &str) -> Overrides {
        let mut now = self.of(room).filter(|claim| !claim.next);
        let set = now.find(|claim| claim.overrides != Overrides::default());
        set.map(|claim| claim.overrides.clone()).unwrap_or_default()
    }

    /// The first ticket there is; each is good for one entry.
    pub fn take_ticket(&mut self, room: &str) -> Option<Ticket> {
        let claims = self.rooms.get_mut(room)?;
        claims.iter_mut().find_map(|claim| claim.ticket.take())
    }

    /// The room of a job.
    pub fn room_of(&self, job: &str) -> Option<&str> {
        let has = |claims: &[Claim]| claims.iter().any(|c| c.job.as_deref() == Some(job));
        let mut rooms = self.rooms();
        rooms.find(|(_, claims)| has(claims)).map(|(room, _)| room)
    }

    /// Takes back the claims that fit, and gives the jobs among them that are to be told.
    pub fn remove(&mut self, room: &str, fits: impl Fn(&Claim) -> bool) -> Vec<String> {
        let Some(claims) = self.rooms.get_mut(room) else {
            return Vec::new();
        };
        let removed = claims.extract_if(.., |claim| fits(claim));
        let jobs = removed.filter_map(|claim| claim.job).collect();
        if claims.is_empty() {
            self.rooms.remove(room);
        }
        jobs
    }

    /// The server has ended the jobs, but not what they were for: the claims stay. The jobs.
    pub fn bereave(&mut self, room: &str) -> Vec<String> {
        let claims = self.rooms.get_mut(room).into_iter().flatten();
        let here = claims.filter(|claim| !claim.next);
        here.filter_map(|claim| {
            claim.ticket = None;
            claim.job.take()
        })
        .collect()
    }

    /// The server has ended a job, but not what it was for: the claim stays.
    pub fn orphan(&mut self, job: &str) {
        let mut claims = self.rooms.values_mut().flatten();
        if let Some(claim) = claims.find(|claim| claim.job.as_deref() == Some(job)) {
            claim.job = None;
            claim.ticket = None;
        }
    }

    /// Those without a job.
    pub fn jobless(&self) -> usize {
        let claims = self.rooms.values().flatten();
        claims.filter(|claim| claim.job.is_none()).count()
    }

    /// The server has forgotten who has the jobs, which run on.
    pub fn forget(&mut self) {
        for claim in self.rooms.values_mut().flatten() {
            claim.forgotten = true;
        }
    }

    /// The room of before is over: what was for the next one is for now.
    pub fn renew(&mut self, room: &str) {
        for claim in self.rooms.get_mut(room).into_iter().flatten() {
            claim.next = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(job: &str, dispatch: &str, participant: Option<&str>) -> Claim {
        Claim {
            job: Some(job.to_owned()),
            dispatch: dispatch.to_owned(),
            sid: "RM_1".to_owned(),
            participant: participant.map(str::to_owned),
            ..Claim::default()
        }
    }

    fn only(identities: &[&str]) -> Audience {
        Audience::Only(identities.iter().map(|&i| i.to_owned()).collect())
    }

    #[test]
    fn a_job_that_is_told_twice_is_one() {
        let mut claims = Claims::default();
        for _ in 0..2 {
            claims.add("r", claim("AJ_1", "AD_1", None)).expect("good");
        }
        assert_eq!(claims.room_of("AJ_1"), Some("r"));
        assert_eq!(claims.remove("r", |_| true), ["AJ_1"]);
        assert!(!claims.want("r"));
        assert_eq!(claims.remove("r", |_| true), [""; 0]);
    }

    #[test]
    fn a_claim_outlives_a_job_that_the_server_lost_and_takes_on_the_next() {
        let mut claims = Claims::default();
        claims.add("r", claim("AJ_1", "AD_1", None)).expect("good");
        assert_eq!(claims.bereave("r"), ["AJ_1"]);
        assert!(claims.want("r"));
        claims.add("r", claim("AJ_2", "AD_1", None)).expect("good");
        assert_eq!(claims.of("r").count(), 1);
        assert_eq!(claims.remove("r", |_| true), ["AJ_2"]);
    }

    #[test]
    fn the_audience_is_everybody_as_soon_as_one_claim_is_about_the_room() {
        let mut claims = Claims::default();
        claims
            .add("r", claim("AJ_1", "AD_1", Some("ann")))
            .expect("good");
        claims
            .add("r", claim("AJ_2", "AD_1", Some("bob")))
            .expect("good");
        assert_eq!(claims.audience("r"), only(&["ann", "bob"]));
        claims.add("r", claim("AJ_3", "AD_2", None)).expect("good");
        assert_eq!(claims.audience("r"), Audience::Everybody);
        claims.remove("r", |c| c.job.as_deref() == Some("AJ_3"));
        let ann = |c: &Claim| c.participant.as_deref() == Some("ann");
        assert_eq!(claims.remove("r", ann), ["AJ_1"]);
        assert_eq!(claims.audience("r"), only(&["bob"]));
    }

    #[test]
    fn two_dispatches_with_different_settings_do_not_share_a_room() {
        let mut claims = Claims::default();
        let with = |job: &str, dispatch: &str, model: Option<&str>| Claim {
            overrides: Overrides {
                model: model.map(str::to_owned),
                ..Overrides::default()
            },
            ..claim(job, dispatch, None)
        };
        claims.add("r", with("AJ_1", "AD_1", None)).expect("good");
        claims
            .add("r", with("AJ_2", "AD_2", Some("a")))
            .expect("the first that sets anything");
        claims
            .add("r", with("AJ_3", "AD_3", Some("a")))
            .expect("the same");
        claims
            .add("r", with("AJ_4", "AD_4", None))
            .expect("no settings");
        let said = claims
            .add("r", with("AJ_5", "AD_5", Some("b")))
            .unwrap_err();
        assert!(said.contains("AD_2") && said.contains("\"a\""), "{said}");
        assert_eq!(claims.overrides("r").model.as_deref(), Some("a"));
        let next = Claim {
            next: true,
            ..with("AJ_6", "AD_6", Some("b"))
        };
        claims
            .add("r", next)
            .expect("it is for the room after this one");
        assert_eq!(claims.overrides("r").model.as_deref(), Some("a"));
        assert_eq!(claims.remove("r", |c| !c.next).len(), 4);
        claims.renew("r");
        assert_eq!(claims.overrides("r").model.as_deref(), Some("b"));
    }
}
