//! The one place with a clock: a task that drives one peer connection and its network.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{Instant as TokioInstant, sleep_until};

use super::{
    Peer,
    network::{Network, Ready, Received},
    session::{Event, Output},
};

/// Longer than any datagram that a peer has reason to send.
const MAX_DATAGRAM: usize = 2048;
/// Datagrams that are read in a row before anything else gets its turn.
const BATCH: usize = 32;
/// Datagrams that come faster than this are read together: each of them alone would wake a thread. A
/// voice sends every 20 ms, and is never kept waiting.
const READ_EVERY: Duration = Duration::from_millis(5);
/// The session's deadline may be years away, which timers do not take.
const MAX_SLEEP: Duration = Duration::from_secs(3600);

/// Runs until the peer is closed.
pub(super) async fn drive(peer: Arc<Peer>, mut network: Network) {
    let peer = Closing(peer);
    let mut output = Output::default();
    let mut buffer = vec![0; MAX_DATAGRAM];
    let timer = sleep_until(TokioInstant::now());
    tokio::pin!(timer);
    let (mut last_read, mut next_read) = (Instant::now(), Instant::now());

    loop {
        let now = Instant::now();
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
            continue;
        }

        let mut deadline = network.deadline().map_or(deadline, |at| at.min(deadline));
        let may_read = next_read <= Instant::now();
        if !may_read {
            deadline = deadline.min(next_read);
        }
        timer
            .as_mut()
            .reset(TokioInstant::from_std(deadline).min(TokioInstant::now() + MAX_SLEEP));
        let deliver = |received: Received| {
            peer.0.session().receive(Instant::now(), &received);
        };
        tokio::select! {
            () = peer.0.bell.notified() => {}
            ready = network.ready(), if may_read => match ready {
                Ready::Socket(index) => {
                    let now = Instant::now();
                    if now.saturating_duration_since(last_read) < READ_EVERY {
                        next_read = now + READ_EVERY;
                    }
                    last_read = now;
                    let mut read = 0;
                    while read < BATCH
                        && let Some((len, source, local)) = network.receive(index, &mut buffer)
                    {
                        read += 1;
                        network.sort(Instant::now(), source, local, &buffer[..len], deliver);
                    }
                    // There is more: a socket that is not emptied fills up.
                    if read == BATCH {
                        next_read = now;
                    }
                }
                Ready::Link(index, event) => network.on_link(Instant::now(), index, event, deliver),
                Ready::Lookup(server, result) => {
                    network.on_lookup(Instant::now(), server, result).await;
                }
            },
            () = &mut timer => {}
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
