//! Who is in the rooms that clients have named: the server's lists, asked for as long as somebody
//! wants to know, once for all who do.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use livekit_protocol::participant_info::State;
use tokio::{sync::watch, task::JoinSet};

use crate::room::api::{ApiError, RoomApi};

/// Identities, as of the last list.
type Present = Arc<HashSet<String>>;

/// A list that was under way may be from before somebody came.
const ROUNDS: u32 = 2;

pub(super) struct Presence {
    api: Arc<RoomApi>,
    rooms: Mutex<HashMap<String, Weak<Watched>>>,
}

/// A room that is watched as long as this is held.
struct Watched {
    present: watch::Receiver<Present>,
    _task: JoinSet<()>,
}

/// What a stream is for: it is over when that is.
pub(super) struct Tie {
    watched: Arc<Watched>,
    present: watch::Receiver<Present>,
    /// None for anybody: then it is the room that counts.
    identity: Option<String>,
    /// Lists in a row that do not have them.
    missing: u32,
}

impl Presence {
    pub fn new(api: Arc<RoomApi>) -> Self {
        let rooms = Mutex::default();
        Self { api, rooms }
    }

    /// A tie to a participant, or to a room; None if there is no such one.
    pub async fn tie(
        &self,
        room: &str,
        identity: Option<&str>,
        every: Duration,
    ) -> Result<Option<Tie>, ApiError> {
        let there = present(&self.api, room).await?;
        if !is_there(&there, identity) {
            return Ok(None);
        }
        let watched = self.watch(room, there, every);
        let mut present = watched.present.clone();
        present.mark_unchanged();
        Ok(Some(Tie {
            present,
            watched,
            identity: identity.map(str::to_owned),
            missing: 0,
        }))
    }

    fn watch(&self, room: &str, there: HashSet<String>, every: Duration) -> Arc<Watched> {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watched) = rooms.get(room).and_then(Weak::upgrade) {
            return watched;
        }
        rooms.retain(|_, watched| watched.strong_count() > 0);
        let (sender, present) = watch::channel(Arc::new(there));
        let mut task = JoinSet::new();
        task.spawn(look(self.api.clone(), room.to_owned(), every, sender));
        let watched = Arc::new(Watched {
            present,
            _task: task,
        });
        rooms.insert(room.to_owned(), Arc::downgrade(&watched));
        watched
    }
}

impl Tie {
    /// Waits until who it is to has left; why. Cancel safe.
    pub async fn left(&mut self) -> String {
        let identity = self.identity.as_deref();
        while self.missing < ROUNDS {
            // Its sender lives as long as this.
            let _watched = &self.watched;
            if self.present.changed().await.is_err() {
                return std::future::pending().await;
            }
            self.missing = match is_there(&self.present.borrow_and_update(), identity) {
                true => 0,
                false => self.missing + 1,
            };
        }
        match identity {
            Some(_) => "found by the gateway".to_owned(),
            None => "nobody is in the room any more, found by the gateway".to_owned(),
        }
    }
}

fn is_there(there: &HashSet<String>, identity: Option<&str>) -> bool {
    match identity {
        Some(identity) => there.contains(identity),
        None => !there.is_empty(),
    }
}

async fn look(api: Arc<RoomApi>, room: String, every: Duration, sender: watch::Sender<Present>) {
    let mut failing = false;
    loop {
        tokio::time::sleep(every).await;
        match present(&api, &room).await {
            Ok(there) => {
                failing = false;
                sender.send_replace(Arc::new(there));
            }
            // Nobody is taken for gone because the server does not say.
            Err(error) if !std::mem::replace(&mut failing, true) => {
                tracing::warn!(room, %error, "the gateway cannot tell who is there; it tries again");
            }
            Err(_) => {}
        }
    }
}

async fn present(api: &RoomApi, room: &str) -> Result<HashSet<String>, ApiError> {
    let listed = api.list_participants(room).await?;
    let there = listed
        .into_iter()
        .filter(|p| p.state() != State::Disconnected);
    Ok(there.map(|participant| participant.identity).collect())
}
