//! Webhooks: what happens in rooms, told over HTTP as LiveKit's server does it.
//!
//! Each room has a queue of its own at each receiver: its events come in order, and a slow or
//! failing delivery holds up no other room. An event that has waited too long or finds the queue
//! full is dropped. The record says what became of each.

mod delivery;
mod record;

pub use record::{Delivery, DeliveryOutcome, WebhookRecord};

use super::{
    auth::Keys,
    participant::new_sid,
    witness::{Recorder, unix_ms},
};
use delivery::{Item, Queue, Receiver};
use livekit_protocol as proto;
use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Events that may wait for one receiver to take one room's. LiveKit's limit.
const MAX_DEPTH: usize = 200;

/// How webhooks are sent; see `Config`.
pub(super) struct Settings {
    pub urls: Vec<String>,
    pub retry: Duration,
    pub max_age: Duration,
}

pub(super) struct Webhooks {
    receivers: Vec<Arc<Receiver>>,
    /// By receiver and room.
    queues: HashMap<(usize, String), mpsc::Sender<Item>>,
    recorder: Arc<Recorder>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

/// Something that receivers are told of.
pub(super) enum Event<'a> {
    RoomStarted,
    RoomFinished,
    ParticipantJoined(&'a proto::ParticipantInfo),
    ParticipantLeft(&'a proto::ParticipantInfo),
    /// Left before its media came up.
    ParticipantConnectionAborted(&'a proto::ParticipantInfo),
    TrackPublished(&'a proto::ParticipantInfo, &'a proto::TrackInfo),
    TrackUnpublished(&'a proto::ParticipantInfo, &'a proto::TrackInfo),
}

impl Webhooks {
    /// `tasks` has all deliveries; `cancel` ends them.
    ///
    /// # Errors
    /// A URL is not one of `http://`.
    pub fn new(
        settings: Settings,
        keys: Arc<Keys>,
        recorder: Arc<Recorder>,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> io::Result<Self> {
        let (retry, max_age) = (settings.retry, settings.max_age);
        let receivers = (settings.urls.iter())
            .map(|url| Receiver::new(url, retry, max_age, keys.clone()).map(Arc::new))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            receivers,
            queues: HashMap::new(),
            recorder,
            tasks,
            cancel,
        })
    }

    /// Queues an event of a room for every receiver. With `lost` no receiver gets it, and only
    /// the record knows.
    pub fn notify(&mut self, room: &proto::Room, event: &Event<'_>, lost: bool) {
        if self.receivers.is_empty() {
            return;
        }
        let event = event.message(room);
        let urls = self.receivers.iter().map(|r| r.url());
        self.recorder.webhook(&event, urls, lost);
        if lost {
            return;
        }
        self.queues.retain(|_, queue| !queue.is_closed());
        let id: Arc<str> = event.id.as_str().into();
        for index in 0..self.receivers.len() {
            let item = Item {
                id: id.clone(),
                event: event.clone(),
                queued: Instant::now(),
            };
            if let Err(e) = self.queue(index, &room.name).try_send(item) {
                let outcome = DeliveryOutcome::Dropped;
                (self.recorder).delivery_ended(&id, index, outcome, &e.to_string());
            }
        }
    }

    /// Takes no more events. What is queued is still delivered, unless cancelled.
    pub fn close(&mut self) {
        self.receivers.clear();
        self.queues.clear();
        self.tasks.close();
    }

    fn queue(&mut self, index: usize, room: &str) -> &mpsc::Sender<Item> {
        (self.queues.entry((index, room.to_owned()))).or_insert_with(|| {
            let (sender, items) = mpsc::channel(MAX_DEPTH);
            let queue = Queue {
                index,
                receiver: self.receivers[index].clone(),
                recorder: self.recorder.clone(),
                items,
            };
            let cancel = self.cancel.clone();
            self.tasks.spawn(async move {
                cancel.run_until_cancelled(queue.run()).await;
            });
            sender
        })
    }
}

impl Event<'_> {
    /// The identity of whom it is about.
    pub(super) fn participant(&self) -> Option<&str> {
        match self {
            Self::RoomStarted | Self::RoomFinished => None,
            Self::ParticipantJoined(p)
            | Self::ParticipantLeft(p)
            | Self::ParticipantConnectionAborted(p)
            | Self::TrackPublished(p, _)
            | Self::TrackUnpublished(p, _) => Some(&p.identity),
        }
    }

    fn message(&self, room: &proto::Room) -> proto::WebhookEvent {
        let named = |event: &str| proto::WebhookEvent {
            event: event.to_owned(),
            room: Some(room.clone()),
            id: new_sid("EV_"),
            created_at: (unix_ms() / 1_000) as i64,
            ..proto::WebhookEvent::default()
        };
        let about = |event, p: &proto::ParticipantInfo| proto::WebhookEvent {
            participant: Some(p.clone()),
            ..named(event)
        };
        // Events about tracks say no more than this of where they happened.
        let of_track =
            |event, p: &proto::ParticipantInfo, t: &proto::TrackInfo| proto::WebhookEvent {
                room: Some(proto::Room {
                    sid: room.sid.clone(),
                    name: room.name.clone(),
                    ..proto::Room::default()
                }),
                participant: Some(proto::ParticipantInfo {
                    sid: p.sid.clone(),
                    identity: p.identity.clone(),
                    ..proto::ParticipantInfo::default()
                }),
                track: Some(t.clone()),
                ..named(event)
            };
        match self {
            Self::RoomStarted => named("room_started"),
            Self::RoomFinished => named("room_finished"),
            Self::ParticipantJoined(p) => about("participant_joined", p),
            Self::ParticipantLeft(p) => about("participant_left", p),
            Self::ParticipantConnectionAborted(p) => about("participant_connection_aborted", p),
            Self::TrackPublished(p, t) => of_track("track_published", p, t),
            Self::TrackUnpublished(p, t) => of_track("track_unpublished", p, t),
        }
    }
}
