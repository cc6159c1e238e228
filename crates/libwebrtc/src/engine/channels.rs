//! Data channels.

use std::sync::Arc;

use str0m::channel::{ChannelConfig, ChannelData, ChannelId};

use super::{
    faults::Fault,
    session::{Event, Session},
};
use crate::{
    RtcError,
    data_channel::{ChannelInner, DataChannel, DataChannelInit, DataChannelState},
};

/// Channels of one connection, the remote side's included.
const MAX_CHANNELS: usize = 256;

impl Session {
    pub(crate) fn create_channel(
        &mut self,
        label: &str,
        init: &DataChannelInit,
    ) -> Result<DataChannel, RtcError> {
        self.check_open()?;
        if self.channels.len() >= MAX_CHANNELS {
            return Err(RtcError::invalid_state("too many data channels"));
        }
        if init.negotiated {
            // 65535 is not a stream (RFC 8832, 6); the stack panics on a number in use.
            let id = u16::try_from(init.id).ok().filter(|id| *id != u16::MAX);
            let id = id.ok_or_else(|| RtcError::invalid_state("not a data channel id"))?;
            let used = self.channels.iter().any(|channel| {
                channel.config.negotiated == Some(id) || channel.stream_id() == i32::from(id)
            });
            if used || self.lost_streams.contains(&id) {
                return Err(RtcError::invalid_state(format!(
                    "data channel id {id} is in use"
                )));
            }
        }
        let channel = ChannelInner::new(label, init, self.peer.clone());
        self.channels.push(channel.clone());
        if self.data_negotiated {
            self.open_channels();
        } else {
            self.flag_negotiation();
        }
        Ok(DataChannel { inner: channel })
    }

    /// Opens the channels that no offer had to carry.
    pub(super) fn open_channels(&mut self) {
        let Some(rtc) = &mut self.rtc else { return };
        // Not through the offer API, which would invalidate an offer that awaits its answer.
        let mut api = rtc.direct_api();
        for channel in self
            .channels
            .iter()
            .filter(|channel| channel.id().is_none())
        {
            channel.set_id(Some(api.create_data_channel(channel.config.clone())));
        }
    }

    /// Returns false if the message can't be queued.
    pub(crate) fn send_message(
        &mut self,
        channel: &ChannelInner,
        data: &[u8],
        binary: bool,
    ) -> bool {
        if channel.state() != DataChannelState::Open {
            return false;
        }
        let Some(mut stack) = channel
            .id()
            .and_then(|id| self.rtc.as_mut().and_then(|rtc| rtc.channel(id)))
        else {
            return false;
        };
        match stack.write(binary, data) {
            Ok(true) => {
                channel.set_buffered(channel.buffered() + data.len() as u64);
                channel.count_sent(data.len());
                true
            }
            Ok(false) => false,
            Err(err) => {
                log::debug!("message of {} bytes not sent: {err}", data.len());
                false
            }
        }
    }

    pub(crate) fn close_channel(&mut self, channel: &Arc<ChannelInner>) {
        if !channel.set_state(DataChannelState::Closed) {
            return;
        }
        match (channel.id(), &mut self.rtc) {
            // It is forgotten when the stack says that it is closed; if it is not open yet, it is
            // closed again when it opens.
            (Some(id), Some(rtc)) => rtc.direct_api().close_data_channel(id),
            _ => self.channels.retain(|known| !Arc::ptr_eq(known, channel)),
        }
        let event = Event::ChannelState(channel.clone(), DataChannelState::Closed);
        self.output.events.push(event);
    }

    pub(crate) fn flush_channel(&mut self, channel: &Arc<ChannelInner>) {
        self.output
            .events
            .push(Event::ChannelListening(channel.clone()));
    }

    pub(super) fn on_channel_open(&mut self, id: ChannelId, label: &str) {
        let Some(rtc) = &mut self.rtc else { return };
        let stream_id = rtc.direct_api().sctp_stream_id_by_channel_id(id);
        let known = self
            .channels
            .iter()
            .find(|channel| channel.id() == Some(id))
            .cloned();
        let event = match known {
            Some(channel) if channel.state() == DataChannelState::Closed => {
                return rtc.direct_api().close_data_channel(id);
            }
            Some(channel) => Event::ChannelState(channel.clone(), DataChannelState::Open),
            None if self.channels.len() >= MAX_CHANNELS => {
                let detail = format_args!("more than {MAX_CHANNELS} data channels");
                self.faults.note(Fault::Channel, detail);
                return rtc.direct_api().close_data_channel(id);
            }
            None => {
                let config = rtc
                    .channel(id)
                    .and_then(|channel| channel.config().cloned());
                let config = config.unwrap_or_else(|| ChannelConfig {
                    label: label.to_owned(),
                    ..ChannelConfig::default()
                });
                let channel = ChannelInner::with_config(config, self.peer.clone());
                channel.set_id(Some(id));
                self.channels.push(channel.clone());
                Event::Channel(DataChannel { inner: channel })
            }
        };
        let channel = match &event {
            Event::ChannelState(channel, _) => channel,
            Event::Channel(channel) => &channel.inner,
            _ => return,
        };
        if let Some(stream_id) = stream_id {
            channel.set_stream_id(stream_id);
        }
        channel.set_state(DataChannelState::Open);
        self.figures.note_channel();
        self.output.events.push(event);
    }

    pub(super) fn on_channel_data(&mut self, data: ChannelData) {
        if let Some(channel) = self
            .channels
            .iter()
            .find(|channel| channel.id() == Some(data.id))
        {
            channel.count_received(data.data.len());
            let event = Event::ChannelMessage(channel.clone(), data.data, data.binary);
            self.output.events.push(event);
        }
    }

    pub(super) fn on_channel_close(&mut self, id: ChannelId) {
        let Some(at) = self
            .channels
            .iter()
            .position(|channel| channel.id() == Some(id))
        else {
            return;
        };
        let channel = self.channels.swap_remove(at);
        if channel.set_state(DataChannelState::Closed) {
            self.output
                .events
                .push(Event::ChannelState(channel, DataChannelState::Closed));
        }
    }

    /// The stack tells only "low": what left the buffers is found by comparing.
    pub(super) fn report_sent(&mut self) {
        let Some(rtc) = &mut self.rtc else { return };
        for channel in &self.channels {
            let before = channel.buffered();
            if before == 0 {
                continue;
            }
            let now = channel
                .id()
                .and_then(|id| rtc.channel(id))
                .map_or(0, |mut stack| stack.buffered_amount() as u64);
            if now < before {
                channel.set_buffered(now);
                self.output
                    .events
                    .push(Event::ChannelSent(channel.clone(), before - now));
            }
        }
    }

    /// All of them are closed, without a word to the remote side.
    pub(super) fn end_channels(&mut self) {
        for channel in std::mem::take(&mut self.channels) {
            if channel.set_state(DataChannelState::Closed) {
                self.output
                    .events
                    .push(Event::ChannelState(channel, DataChannelState::Closed));
            }
        }
    }

    pub(super) fn take_channels(&mut self) -> Vec<Arc<ChannelInner>> {
        let mut channels = std::mem::take(&mut self.channels);
        for event in self.output.events.drain(..) {
            if let Event::ChannelState(channel, _) = event {
                channels.push(channel);
            }
        }
        channels
    }
}
