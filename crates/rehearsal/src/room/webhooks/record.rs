//! Webhooks in the witness.

use crate::room::witness::{Recorder, Stamp, forget};
use livekit_protocol as proto;
use serde::Serialize;

/// Events whose deliveries have all ended beyond this many are forgotten, oldest first.
const MAX_DELIVERED: usize = 10_000;

/// One event, and what became of it at each receiver.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WebhookRecord {
    pub id: String,
    /// `room_started` and so on.
    pub event: String,
    pub room: String,
    pub room_sid: String,
    /// The participant's identity.
    pub participant: Option<String>,
    /// The track's sid.
    pub track: Option<String>,
    pub at: Stamp,
    /// One for each URL, in the order in which they are configured.
    pub deliveries: Vec<Delivery>,
}

/// One event on its way to one receiver.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Delivery {
    pub url: String,
    pub outcome: DeliveryOutcome,
    /// Requests that have been made.
    pub attempts: u32,
    /// The status of the last answer.
    pub status: Option<u16>,
    /// Why it did not arrive.
    pub error: String,
    pub ended: Option<Stamp>,
}

/// How a delivery stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DeliveryOutcome {
    #[default]
    Pending,
    /// The receiver answered, if only to refuse it.
    Sent,
    /// The receiver could not be reached, or failed, each time.
    Failed,
    /// Waited too long, or too many others did.
    Dropped,
    /// Not sent, because a fault was asked for.
    Lost,
}

impl Recorder {
    pub(super) fn webhook<'a>(
        &self,
        event: &proto::WebhookEvent,
        urls: impl Iterator<Item = &'a str>,
        lost: bool,
    ) {
        let room = event.room.clone().unwrap_or_default();
        self.change(|w, at| {
            let deliveries = urls.map(|url| Delivery {
                url: url.to_owned(),
                outcome: match lost {
                    true => DeliveryOutcome::Lost,
                    false => DeliveryOutcome::Pending,
                },
                ended: Some(at).filter(|_| lost),
                ..Delivery::default()
            });
            w.webhooks.push(WebhookRecord {
                id: event.id.clone(),
                event: event.event.clone(),
                room: room.name,
                room_sid: room.sid,
                participant: event.participant.as_ref().map(|p| p.identity.clone()),
                track: event.track.as_ref().map(|t| t.sid.clone()),
                at,
                deliveries: deliveries.collect(),
            });
            let ended = |w: &WebhookRecord| w.deliveries.iter().all(|d| d.ended.is_some());
            forget(&mut w.webhooks, MAX_DELIVERED, ended);
        });
    }

    pub(super) fn delivery_tried(&self, id: &str, receiver: usize, status: Option<u16>) {
        self.delivery(id, receiver, |d, _| {
            d.attempts += 1;
            d.status = status;
        });
    }

    pub(super) fn delivery_ended(
        &self,
        id: &str,
        receiver: usize,
        outcome: DeliveryOutcome,
        error: &str,
    ) {
        self.delivery(id, receiver, |d, now| {
            d.outcome = outcome;
            d.error = error.to_owned();
            d.ended = Some(now);
        });
    }

    fn delivery(&self, id: &str, receiver: usize, change: impl FnOnce(&mut Delivery, Stamp)) {
        self.change(|w, now| {
            let event = w.webhooks.iter_mut().rev().find(|e| e.id == id);
            if let Some(delivery) = event.and_then(|e| e.deliveries.get_mut(receiver)) {
                change(delivery, now);
            }
        });
    }
}
