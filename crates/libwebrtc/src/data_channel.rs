use std::{
    collections::VecDeque,
    fmt,
    str::Utf8Error,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use str0m::channel::{ChannelConfig, ChannelId, Reliability};
use thiserror::Error;

use crate::{
    engine::{Callback, Peer},
    rtp_parameters::Priority,
};

/// Messages kept while nobody listens yet; the oldest go first.
const MAX_BACKLOG: usize = 256;
/// The largest message that is taken.
const MAX_BACKLOG_BYTES: usize = 256 << 10;

#[derive(Clone, Debug)]
pub struct DataChannelInit {
    pub ordered: bool,
    /// Milliseconds.
    pub max_retransmit_time: Option<i32>,
    pub max_retransmits: Option<i32>,
    pub protocol: String,
    /// Both sides name `id` themselves, nothing is said in-band (RFC 8832).
    pub negotiated: bool,
    pub id: i32,
    pub priority: Option<Priority>,
}

impl Default for DataChannelInit {
    fn default() -> Self {
        Self {
            ordered: true,
            max_retransmit_time: None,
            max_retransmits: None,
            protocol: String::new(),
            negotiated: false,
            id: -1,
            priority: None,
        }
    }
}

#[derive(Debug, Error)]
pub enum DataChannelError {
    #[error("failed to send data, dc not open? send buffer is full ?")]
    Send,
    #[error("only utf8 strings can be sent")]
    Utf8(#[from] Utf8Error),
}

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum DataChannelState {
    Connecting,
    Open,
    Closing,
    Closed,
}

#[derive(Debug)]
pub struct DataBuffer<'a> {
    pub data: &'a [u8],
    pub binary: bool,
}

pub type OnStateChange = Box<dyn FnMut(DataChannelState) + Send + Sync>;
pub type OnMessage = Box<dyn FnMut(DataBuffer) + Send + Sync>;
/// Gets the number of bytes that left the send buffer.
pub type OnBufferedAmountChange = Box<dyn FnMut(u64) + Send + Sync>;

/// A channel of messages (RFC 8831). Callbacks run on the engine's thread, never under a lock.
#[derive(Clone)]
pub struct DataChannel {
    pub(crate) inner: Arc<ChannelInner>,
}

impl DataChannel {
    /// Queues one message. Fails if the channel is not open, the message is longer than the
    /// remote side takes, or 16 MiB are queued already.
    pub fn send(&self, data: &[u8], binary: bool) -> Result<(), DataChannelError> {
        if !binary {
            std::str::from_utf8(data)?;
        }
        let peer = self.inner.peer.upgrade().ok_or(DataChannelError::Send)?;
        let accepted = peer.session().send_message(&self.inner, data, binary);
        peer.wake();
        if accepted {
            Ok(())
        } else {
            Err(DataChannelError::Send)
        }
    }

    /// The SCTP stream, -1 while unknown.
    pub fn id(&self) -> i32 {
        self.inner.stream_id()
    }

    pub fn label(&self) -> String {
        self.inner.config.label.clone()
    }

    pub fn state(&self) -> DataChannelState {
        self.inner.state()
    }

    pub fn close(&self) {
        match self.inner.peer.upgrade() {
            Some(peer) => {
                peer.session().close_channel(&self.inner);
                peer.wake();
            }
            None => {
                self.inner.set_state(DataChannelState::Closed);
            }
        }
    }

    /// Bytes of messages that the remote side has not acknowledged.
    pub fn buffered_amount(&self) -> u64 {
        self.inner.state.lock().buffered
    }

    pub fn on_state_change(&self, callback: Option<OnStateChange>) {
        self.inner.on_state.set(callback);
    }

    /// Messages that came before there was a callback are delivered to it, up to a limit.
    pub fn on_message(&self, callback: Option<OnMessage>) {
        let listening = callback.is_some();
        self.inner.on_message.set(callback);
        if listening && let Some(peer) = self.inner.peer.upgrade() {
            peer.session().flush_channel(&self.inner);
            peer.wake();
        }
    }

    pub fn on_buffered_amount_change(&self, callback: Option<OnBufferedAmountChange>) {
        self.inner.on_buffered.set(callback);
    }
}

impl fmt::Debug for DataChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataChannel")
            .field("id", &self.id())
            .field("label", &self.label())
            .field("state", &self.state())
            .finish()
    }
}

pub(crate) struct ChannelInner {
    pub(crate) config: ChannelConfig,
    peer: Weak<Peer>,
    state: Mutex<ChannelState>,
    backlog: Mutex<Backlog>,
    on_state: Callback<OnStateChange>,
    on_message: Callback<OnMessage>,
    on_buffered: Callback<OnBufferedAmountChange>,
}

/// Messages that came before there was somebody to take them.
#[derive(Default)]
struct Backlog {
    messages: VecDeque<(Vec<u8>, bool)>,
    bytes: usize,
    overflown: bool,
}

impl Backlog {
    /// Returns whether it is the first time that others had to make room.
    fn push(&mut self, data: Vec<u8>, binary: bool) -> bool {
        let full = |backlog: &Self| {
            backlog.messages.len() >= MAX_BACKLOG || backlog.bytes + data.len() > MAX_BACKLOG_BYTES
        };
        let mut dropped = false;
        while full(self) && self.pop().is_some() {
            dropped = true;
        }
        self.bytes += data.len();
        self.messages.push_back((data, binary));
        dropped && !std::mem::replace(&mut self.overflown, true)
    }

    fn pop(&mut self) -> Option<(Vec<u8>, bool)> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.0.len();
        Some(message)
    }
}

struct ChannelState {
    state: DataChannelState,
    /// The stack's name for it, once it has one.
    id: Option<ChannelId>,
    stream_id: i32,
    buffered: u64,
    counts: Counts,
}

/// Since the start, for statistics.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    pub messages_sent: u32,
    pub bytes_sent: u64,
    pub messages_received: u32,
    pub bytes_received: u64,
}

impl ChannelInner {
    /// Out-of-range numbers are cut to what SCTP can say.
    pub(crate) fn new(label: &str, init: &DataChannelInit, peer: Weak<Peer>) -> Arc<Self> {
        let clamp = |value: i32| value.clamp(0, u16::MAX.into()) as u16;
        let reliability = match (init.max_retransmits, init.max_retransmit_time) {
            (Some(retransmits), _) => Reliability::MaxRetransmits {
                retransmits: clamp(retransmits),
            },
            (None, Some(lifetime)) => Reliability::MaxPacketLifetime {
                lifetime: clamp(lifetime),
            },
            (None, None) => Reliability::Reliable,
        };
        Self::with_config(
            ChannelConfig {
                label: label.to_owned(),
                ordered: init.ordered,
                reliability,
                negotiated: init.negotiated.then(|| clamp(init.id)),
                protocol: init.protocol.clone(),
            },
            peer,
        )
    }

    pub(crate) fn with_config(config: ChannelConfig, peer: Weak<Peer>) -> Arc<Self> {
        let stream_id = config.negotiated.map_or(-1, i32::from);
        Arc::new(Self {
            config,
            peer,
            state: Mutex::new(ChannelState {
                state: DataChannelState::Connecting,
                id: None,
                stream_id,
                buffered: 0,
                counts: Counts::default(),
            }),
            backlog: Mutex::default(),
            on_state: Callback::default(),
            on_message: Callback::default(),
            on_buffered: Callback::default(),
        })
    }

    pub(crate) fn state(&self) -> DataChannelState {
        self.state.lock().state
    }

    /// Returns whether it is a change. Closed is for ever.
    pub(crate) fn set_state(&self, new: DataChannelState) -> bool {
        let mut state = self.state.lock();
        let changed = state.state != new && state.state != DataChannelState::Closed;
        if changed {
            state.state = new;
        }
        changed
    }

    pub(crate) fn id(&self) -> Option<ChannelId> {
        self.state.lock().id
    }

    pub(crate) fn set_id(&self, id: Option<ChannelId>) {
        self.state.lock().id = id;
    }

    pub(crate) fn stream_id(&self) -> i32 {
        self.state.lock().stream_id
    }

    pub(crate) fn set_stream_id(&self, stream_id: u16) {
        self.state.lock().stream_id = stream_id.into();
    }

    pub(crate) fn buffered(&self) -> u64 {
        self.state.lock().buffered
    }

    pub(crate) fn set_buffered(&self, buffered: u64) {
        self.state.lock().buffered = buffered;
    }

    pub(crate) fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    pub(crate) fn count_sent(&self, bytes: usize) {
        let counts = &mut self.state.lock().counts;
        counts.messages_sent = counts.messages_sent.wrapping_add(1);
        counts.bytes_sent += bytes as u64;
    }

    pub(crate) fn count_received(&self, bytes: usize) {
        let counts = &mut self.state.lock().counts;
        counts.messages_received = counts.messages_received.wrapping_add(1);
        counts.bytes_received += bytes as u64;
    }

    pub(crate) fn notify_state(&self, state: DataChannelState) {
        self.on_state.call(|callback| callback(state));
        if state == DataChannelState::Closed {
            self.release();
        }
    }

    pub(crate) fn notify_buffered(&self, sent: u64) {
        self.on_buffered.call(|callback| callback(sent));
    }

    pub(crate) fn deliver(&self, data: Vec<u8>, binary: bool) {
        self.deliver_backlog();
        if self.on_message.call(|callback| {
            callback(DataBuffer {
                data: &data,
                binary,
            })
        }) {
            return;
        }
        if self.backlog.lock().push(data, binary) {
            let label = &self.config.label;
            log::warn!("data channel {label:?}: nobody listens, the oldest messages are dropped");
        }
    }

    pub(crate) fn deliver_backlog(&self) {
        while self.on_message.is_set() {
            let Some((data, binary)) = self.backlog.lock().pop() else {
                return;
            };
            self.on_message.call(|callback| {
                callback(DataBuffer {
                    data: &data,
                    binary,
                })
            });
        }
    }

    /// Lets go of what the callbacks hold, which may be this very channel.
    pub(crate) fn release(&self) {
        self.on_state.seal();
        self.on_message.seal();
        self.on_buffered.seal();
        *self.backlog.lock() = Backlog::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_takes_is_little_and_said_once() {
        let mut backlog = Backlog::default();
        for n in 0..2 * MAX_BACKLOG {
            assert_eq!(backlog.push(vec![n as u8], false), n == MAX_BACKLOG);
        }
        assert_eq!(backlog.messages.len(), MAX_BACKLOG);
        assert!(!backlog.push(vec![0; MAX_BACKLOG_BYTES], true));
        assert_eq!(
            (backlog.messages.len(), backlog.bytes),
            (1, MAX_BACKLOG_BYTES)
        );
        assert!(!backlog.push(vec![1], true));
        assert_eq!(backlog.pop(), Some((vec![1], true)));
        assert_eq!((backlog.pop(), backlog.bytes), (None, 0));
    }
}
