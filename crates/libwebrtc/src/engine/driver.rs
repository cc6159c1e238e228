//! The one place with a clock: a task that drives one peer connection and its network.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{Instant as TokioInstant, sleep_until};

use super::{
    Peer,
    network::{BATCH, Network, Ready, Received},
    runtime::next_beat,
    session::{Event, Output},
};

/// The session's deadline may be years away, which timers do not take.
const MAX_SLEEP: Duration = Duration::from_secs(3600);

/// Runs until the peer is closed.
pub(super) async fn drive(peer: Arc<Peer>, mut network: Network) {
    let peer = Closing(peer);
    let mut output = Output::default();
    let mut now = Instant::now();
    // When what flows is read next.
    let mut beat = now;
    let timer = sleep_until(now.into());
    tokio::pin!(timer);

    loop {
        peer.0.session().step(now, &mut output);
        for transmit in output.transmits.drain(..) {
            network.send(now, &transmit);
        }
        for event in output.events.drain(..) {
            dispatch(&peer.0, event);
        }
        let Some(deadline) = output.deadline else {
            network.close().await;
            return;
        };
        for request in output.network.drain(..) {
            network.handle(now, request).await;
        }
        network.poll(now);
        let mut informed = false;
        while let Some(news) = network.news() {
            peer.0.session().take_news(news);
            informed = true;
        }
        if informed {
            now = Instant::now();
            continue;
        }

        let due = network.deadline().map_or(deadline, |at| at.min(deadline));
        loop {
            let polling = network.is_polling();
            let until = match polling {
                // What is not due yet has time until then.
                true if due > now => beat,
                true | false => due,
            };
            let latest = TokioInstant::now() + MAX_SLEEP;
            timer.as_mut().reset(latest.min(until.into()));
            let deliver = |now: Instant| {
                let peer = &peer.0;
                move |received: Received<'_>| peer.session().receive(now, &received)
            };
            let mut called = true;
            tokio::select! {
                () = peer.0.bell.notified() => now = Instant::now(),
                ready = network.ready() => {
                    now = Instant::now();
                    match ready {
                        Ready::Socket(index) => {
                            network.receive(now, index, deliver(now)).await;
                        }
                        Ready::Link(index, event) => {
                            network.on_link(now, index, event, deliver(now));
                        }
                        Ready::Lookup(server, result) => {
                            network.on_lookup(now, server, result).await;
                        }
                    }
                }
                () = &mut timer => {
                    now = Instant::now();
                    called = false;
                }
            }
            if polling && now >= beat {
                let read = network.receive_polled(now, deliver(now)).await;
                called |= read > 0;
                // A socket that is not emptied fills up.
                beat = if read < BATCH { next_beat(now) } else { now };
            }
            // A beat that brings nothing is none of the session's business.
            if called || now >= due {
                break;
            }
        }
    }
}

/// Closes the peer for good when the driver ends, also by a panic of a callback.
struct Closing(Arc<Peer>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.session().close();
        self.0.callbacks.seal();
        let channels = self.0.session().take_channels();
        channels.iter().for_each(|channel| channel.release());
    }
}

fn dispatch(peer: &Peer, event: Event) {
    let callbacks = &peer.callbacks;
    match event {
        Event::Connection(state) => {
            log::debug!("peer connection: {state:?}");
            callbacks.connection.call(|f| f(state));
        }
        Event::IceConnection(state) => {
            callbacks.ice_connection.call(|f| f(state));
        }
        Event::Gathering(state) => {
            callbacks.gathering.call(|f| f(state));
        }
        Event::Signaling(state) => {
            callbacks.signaling.call(|f| f(state));
        }
        Event::NegotiationNeeded => {
            callbacks.negotiation.call(|f| f(0));
        }
        Event::Candidate(candidate) => {
            callbacks.candidate.call(|f| f(candidate));
        }
        Event::CandidateError(error) => {
            callbacks.candidate_error.call(|f| f(error));
        }
        Event::Track(event) => {
            callbacks.track.call(|f| f(event));
        }
        Event::Channel(channel) => {
            let flushed = channel.clone();
            callbacks.data_channel.call(|f| f(channel));
            flushed.inner.deliver_backlog();
        }
        Event::ChannelState(channel, state) => channel.notify_state(state),
        Event::ChannelMessage(channel, data, binary) => channel.deliver(data, binary),
        Event::ChannelListening(channel) => channel.deliver_backlog(),
        Event::ChannelSent(channel, bytes) => channel.notify_buffered(bytes),
        Event::Audio(track, frame) => track.deliver(frame),
    }
}
