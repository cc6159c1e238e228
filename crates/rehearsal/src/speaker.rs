//! Simulated participants: they join over the LiveKit Rust SDK as anybody would and publish
//! recorded speech, over and over until they leave, or phrase by phrase in a [`Conversation`].
//!
//! To come back, a speaker joins again: the same identity gets a new stay.

mod conversation;

pub use conversation::Conversation;

use crate::{
    room::{Mishap, Server},
    stt::OpusDecoder,
};
use conversation::Seat;
use std::{borrow::Cow, fmt::Display, io::Cursor, ops::Range, sync::Arc, time::Duration};

use livekit::{
    options::TrackPublishOptions,
    prelude::*,
    webrtc::audio_source::{AudioSourceOptions, native::NativeAudioSource},
};
use livekit_api::access_token::{AccessToken, AccessTokenError, VideoGrants};
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

/// The recordings are encoded in frames of this length.
const FRAME: Duration = Duration::from_millis(20);
const FRAME_SAMPLES: usize = 960;
/// A frame as loud as this, in dBov, is one of speech.
const SPEECH_LEVEL: i8 = -45;
/// What a client without DTX sends while nobody speaks: 20 ms of digital silence in Opus.
const SILENCE: Packet = Packet {
    opus: Cow::Borrowed(&[0xf8, 0xff, 0xfe]),
    level: -127,
};
/// Frames of silence that end a phrase.
const PHRASE_GAP: usize = 10;

#[derive(Debug, Error)]
pub enum SpeakerError {
    #[error("not an Ogg-Opus recording: {0}")]
    Recording(#[from] ogg::OggReadError),
    #[error("not Opus packets of 20 ms: {0}")]
    Packet(String),
    #[error("the recording holds no audio")]
    Empty,
    #[error("cannot make a token: {0}")]
    Token(#[from] AccessTokenError),
    #[error("cannot join or publish: {0}")]
    Room(#[from] RoomError),
    #[error("cannot send audio: {0}")]
    Audio(#[from] livekit::webrtc::RtcError),
}

/// A recording in Opus packets of 20 ms. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Recording {
    packets: Arc<Vec<Packet>>,
    /// From the first word to the last, without the pauses around them. Not empty.
    phrases: Arc<Vec<Range<usize>>>,
}

#[derive(Debug)]
struct Packet {
    opus: Cow<'static, [u8]>,
    /// In dBov, from -127 to 0 (RFC 6464).
    level: i8,
}

impl Packet {
    fn is_speech(&self) -> bool {
        self.level >= SPEECH_LEVEL
    }
}

impl Recording {
    /// Takes an Ogg-Opus file apart; its packets must hold 20 ms each.
    pub fn from_ogg(file: &[u8]) -> Result<Self, SpeakerError> {
        let mut reader = ogg::PacketReader::new(Cursor::new(file));
        let mut packets = Vec::new();
        while let Some(packet) = reader.read_packet()? {
            packets.push(packet.data);
        }
        // The first two are the headers (RFC 7845).
        packets.drain(..2.min(packets.len()));
        let packets = measured(packets)?;
        if packets.is_empty() {
            return Err(SpeakerError::Empty);
        }
        let phrases = Arc::new(phrases(&packets));
        let packets = Arc::new(packets);
        Ok(Self { packets, phrases })
    }

    pub fn duration(&self) -> Duration {
        FRAME * self.packets.len() as u32
    }
}

/// Measures how loud each packet is, as a client does before it encodes.
fn measured(packets: Vec<Vec<u8>>) -> Result<Vec<Packet>, SpeakerError> {
    let failed = |error: &dyn Display| SpeakerError::Packet(error.to_string());
    let mut decoder = OpusDecoder::new().map_err(|e| failed(&e))?;
    let mut pcm = Vec::new();
    let measure = |opus: Vec<u8>| {
        pcm.clear();
        decoder.decode(&opus, &mut pcm).map_err(|e| failed(&e))?;
        if pcm.len() != FRAME_SAMPLES {
            return Err(failed(&format_args!("{} samples", pcm.len())));
        }
        let level = level(&pcm);
        let opus = Cow::Owned(opus);
        Ok(Packet { opus, level })
    };
    packets.into_iter().map(measure).collect()
}

/// The root mean square in dBov.
fn level(pcm: &[i16]) -> i8 {
    let full = f64::from(i16::MIN).powi(2);
    let squares = pcm.iter().map(|s| f64::from(*s).powi(2) / full);
    let mean = squares.sum::<f64>() / pcm.len() as f64;
    (10.0 * mean.log10()).clamp(-127.0, 0.0) as i8
}

/// The phrases of a recording; all of it if nobody speaks in it.
fn phrases(packets: &[Packet]) -> Vec<Range<usize>> {
    let mut phrases: Vec<Range<usize>> = Vec::new();
    let spoken = packets.iter().enumerate().filter(|(_, p)| p.is_speech());
    for (index, _) in spoken {
        match phrases.last_mut() {
            Some(phrase) if index - phrase.end < PHRASE_GAP => phrase.end = index + 1,
            _ => phrases.push(index..index + 1),
        }
    }
    if phrases.is_empty() {
        phrases.push(0..packets.len());
    }
    phrases
}

/// Where and as whom a speaker joins.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// `ws://` or `wss://`.
    pub url: &'a str,
    pub api_key: &'a str,
    pub api_secret: &'a str,
    pub room: &'a str,
    pub identity: &'a str,
}

/// A participant who speaks. Dropping it leaves the room, but nobody waits for that; see
/// [`Speaker::leave`].
pub struct Speaker {
    room: Arc<Room>,
    microphone: LocalTrackPublication,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    left: bool,
}

impl Speaker {
    /// Joins, publishes a microphone and says the recording again and again. Not cancel safe: the
    /// SDK's connection attempt would be lost half-way.
    pub async fn join(place: Place<'_>, recording: Recording) -> Result<Self, SpeakerError> {
        Self::begin(place, Voice::alone(recording)).await
    }

    /// Joins, publishes a microphone, and says a phrase of the recording whenever it is its turn.
    /// Otherwise as [`Speaker::join`].
    pub async fn converse(
        place: Place<'_>,
        recording: Recording,
        conversation: &Conversation,
    ) -> Result<Self, SpeakerError> {
        Self::begin(place, Voice::in_turn(recording, conversation.enter())).await
    }

    async fn begin(place: Place<'_>, voice: Voice) -> Result<Self, SpeakerError> {
        let token = AccessToken::with_api_key(place.api_key, place.api_secret)
            .with_identity(place.identity)
            .with_name(place.identity)
            .with_grants(VideoGrants {
                room_join: true,
                room: place.room.to_owned(),
                ..Default::default()
            })
            .to_jwt()?;
        let mut options = RoomOptions::default();
        options.auto_subscribe = false;
        let (room, events) = Room::connect(place.url, &token, options).await?;
        let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
        let track = LocalAudioTrack::create_audio_track(
            "microphone",
            RtcAudioSource::Native(source.clone()),
        );
        let publish = TrackPublishOptions {
            source: TrackSource::Microphone,
            dtx: false,
            red: false,
            ..Default::default()
        };
        let published = room
            .local_participant()
            .publish_track(LocalTrack::Audio(track), publish)
            .await;
        let microphone = match published {
            Ok(microphone) => microphone,
            Err(error) => {
                let _ = room.close().await;
                return Err(error.into());
            }
        };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let stopped = stop.clone();
        tasks.spawn(async move {
            stopped.run_until_cancelled(speak(source, voice)).await;
        });
        tasks.spawn(put_out(events, stop.clone()));
        Ok(Self {
            room: Arc::new(room),
            microphone,
            stop,
            tasks,
            left: false,
        })
    }

    /// Mutes the microphone: nothing is sent, and the recording goes on unheard.
    pub fn mute(&self) {
        self.microphone.mute();
    }

    pub fn unmute(&self) {
        self.microphone.unmute();
    }

    /// Takes the microphone back and stays.
    pub async fn unpublish(&self) {
        // An error here says that the server ended the connection first.
        let ourselves = self.room.local_participant();
        let _ = ourselves.unpublish_track(&self.microphone.sid()).await;
    }

    /// Completes when the server has put the speaker out of the room. Cancel safe.
    pub async fn put_out(&self) {
        self.stop.cancelled().await;
    }

    /// Leaves the room, awaited.
    pub async fn leave(mut self) {
        self.stop.cancel();
        // An error here says that the server ended it first.
        let _ = self.room.close().await;
        self.left = true;
        self.tasks.shutdown().await;
    }

    /// Vanishes as a machine that loses its network: no farewell, nothing closed, no media, and it
    /// does not come back by itself. `server`, which it has joined, stands in for the network: from
    /// now on nothing comes through (see [`Mishap::Vanish`]). So the SDK can be closed behind it as
    /// always, and no more is kept of it than after any other close.
    pub async fn vanish(self, server: &Server) {
        let (room, identity) = (self.room.name(), self.room.local_participant().identity());
        // If the server has put it out before, there is nobody to vanish.
        server
            .befall(&room, identity.as_str(), Mishap::Vanish)
            .await;
        self.leave().await;
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.stop.cancel();
        // The SDK's own tasks hold the room: without a close it would stay connected for ever.
        if let Ok(runtime) = Handle::try_current()
            && !self.left
        {
            let room = self.room.clone();
            runtime.spawn(async move { room.close().await });
        }
    }
}

/// What a speaker says.
struct Voice {
    recording: Recording,
    /// The packet that comes next.
    next: usize,
    turns: Option<Turns>,
}

struct Turns {
    seat: Seat,
    /// The phrase that is said, or is to be said.
    phrase: usize,
}

impl Voice {
    fn alone(recording: Recording) -> Self {
        Self {
            recording,
            next: 0,
            turns: None,
        }
    }

    fn in_turn(recording: Recording, seat: Seat) -> Self {
        Self {
            next: recording.phrases[0].start,
            recording,
            turns: Some(Turns { seat, phrase: 0 }),
        }
    }

    /// What it says in the 20 ms from `now` on.
    fn frame(&mut self, now: std::time::Instant) -> &Packet {
        let packets = &self.recording.packets;
        let Some(turns) = &mut self.turns else {
            let packet = &packets[self.next];
            self.next = (self.next + 1) % packets.len();
            return packet;
        };
        if !turns.seat.may_speak(now) {
            return &SILENCE;
        }
        let packet = &packets[self.next];
        self.next += 1;
        let phrases = &self.recording.phrases;
        if self.next == phrases[turns.phrase].end {
            turns.seat.pass_on(now);
            turns.phrase = (turns.phrase + 1) % phrases.len();
            self.next = phrases[turns.phrase].start;
        }
        packet
    }
}

/// Sends what the voice says at the pace of speech.
async fn speak(source: NativeAudioSource, mut voice: Voice) {
    let mut pace = tokio::time::interval_at(Instant::now(), FRAME);
    // A late frame is made up for, as a sound card would.
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        pace.tick().await;
        let packet = voice.frame(std::time::Instant::now());
        if let Err(error) = source.capture_encoded(&packet.opus, FRAME, Some(packet.level)) {
            tracing::error!(%error, "a speaker's packet was not sent");
            return;
        }
    }
}

/// Stops the speaker when the server ends the connection.
async fn put_out(mut events: mpsc::UnboundedReceiver<RoomEvent>, stop: CancellationToken) {
    while let Some(event) = events.recv().await {
        if matches!(event, RoomEvent::Disconnected { .. }) {
            break;
        }
    }
    stop.cancel();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said, and how long each pause is, is in assets/README.md.
    #[test]
    fn a_recording_has_its_phrases_and_levels() {
        let assets: [(&[u8], usize); 3] = [
            (include_bytes!("../assets/anna.opus"), 3),
            (include_bytes!("../assets/brian.opus"), 3),
            (include_bytes!("../assets/edith.opus"), 3),
        ];
        for (file, phrases) in assets {
            let recording = Recording::from_ogg(file).expect("a recording");
            assert_eq!(recording.phrases.len(), phrases, "{:?}", recording.phrases);
            for phrase in recording.phrases.iter() {
                let packets = &recording.packets[phrase.clone()];
                let loudest = packets.iter().map(|p| p.level).max();
                assert!((-20..0).contains(&loudest.expect("packets")), "{loudest:?}");
                assert!(packets[0].is_speech() && packets[packets.len() - 1].is_speech());
            }
        }
    }

    #[test]
    fn levels_are_those_of_rfc_6464() {
        assert_eq!(level(&[i16::MIN; 960]), 0);
        assert_eq!(level(&[0; 960]), -127);
        // Half of full scale.
        assert_eq!(level(&[0x4000; 960]), -6);
    }

    #[test]
    fn a_recording_without_a_word_is_one_phrase() {
        let packet = |level| Packet { level, ..SILENCE };
        let found = |packets: &[Packet]| {
            let phrases = phrases(packets).into_iter();
            phrases.map(|p| (p.start, p.end)).collect::<Vec<_>>()
        };
        assert_eq!(found(&[packet(-127), packet(-46)]), [(0, 2)]);
        let loud = |from: usize, until: usize| {
            (0..40).map(move |n| {
                packet(if (from..until).contains(&n) {
                    -127
                } else {
                    -20
                })
            })
        };
        let short: Vec<_> = loud(10, 10 + PHRASE_GAP - 1).collect();
        assert_eq!(found(&short), [(0, 40)]);
        let long: Vec<_> = loud(10, 10 + PHRASE_GAP).collect();
        assert_eq!(found(&long), [(0, 10), (20, 40)]);
    }
}
