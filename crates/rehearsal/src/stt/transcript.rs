//! Turns measured sound into Deepgram's messages: what is heard, when, and how loud.
//!
//! Pure: takes samples, gives messages. Final results tile the time line without gaps.

use std::fmt::Write as _;
use std::time::Duration;

use super::messages::{Alternative, Channel, Results, ResultsMetadata, ServerMessage, Word};
use super::parameters::Parameters;
use super::vad::{SAMPLE_RATE, Stretch, Vad, VadEvent};

/// Pauses within a phrase are bridged, however short the client wants endpointing to be.
const MIN_HANGOVER: Duration = Duration::from_millis(200);
/// Samples between two interim results.
const INTERIM_EVERY: u64 = SAMPLE_RATE as u64 / 2;
/// A final result covers about this much at most, in samples.
const MAX_WINDOW: u64 = 10 * SAMPLE_RATE as u64;
const CHANNEL: [u32; 2] = [0, 1];

/// Why a final result is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Endpoint,
    WindowFull,
    Finalize,
    EndOfStream,
}

/// See the module's description.
pub(super) struct Transcriber {
    vad: Vad,
    request_id: String,
    options: Options,
    /// Where the last final result ended.
    window_start: u64,
    /// Stretches since then that have ended.
    stretches: Vec<Stretch>,
    /// Where the last result of either kind was made.
    last_result: u64,
    /// End of the last stretch, until UtteranceEnd has been sent for it.
    utterance_end_due: Option<u64>,
    /// A stretch was cut at this sample; what begins here is no new speech.
    cut_at: Option<u64>,
}

struct Options {
    interim_results: bool,
    endpointing: bool,
    utterance_end: Option<u64>,
    vad_events: bool,
    punctuated: bool,
    diarize: bool,
    languages: Option<Vec<String>>,
}

impl Transcriber {
    pub(super) fn new(request_id: &str, parameters: &Parameters) -> Self {
        let hangover = parameters.endpointing.unwrap_or_default().max(MIN_HANGOVER);
        Self {
            vad: Vad::new(hangover),
            request_id: request_id.to_owned(),
            options: Options {
                interim_results: parameters.interim_results,
                endpointing: parameters.endpointing.is_some(),
                utterance_end: parameters.utterance_end.map(samples),
                vad_events: parameters.vad_events,
                punctuated: parameters.punctuated,
                diarize: parameters.diarize,
                languages: (parameters.language.as_deref() == Some("multi"))
                    .then(|| vec!["en".to_owned()]),
            },
            window_start: 0,
            stretches: Vec::new(),
            last_result: 0,
            utterance_end_due: None,
            cut_at: None,
        }
    }

    /// Audio taken so far, in seconds.
    pub(super) fn seconds(&self) -> f64 {
        seconds(self.vad.position())
    }

    /// Takes samples and appends the messages that they give rise to.
    pub(super) fn push(&mut self, mut pcm: &[i16], messages: &mut Vec<ServerMessage>) {
        while !pcm.is_empty() {
            let (taken, event) = self.vad.push(pcm);
            pcm = &pcm[taken..];
            match event {
                Some(VadEvent::Started(at)) => self.started(at, messages),
                Some(VadEvent::Ended(stretch)) => self.ended(stretch, messages),
                None => {}
            }
            self.end_full_window(messages);
            self.end_utterance(messages);
        }
        self.interim(messages);
    }

    /// What Finalize asks for: all audio so far becomes final.
    pub(super) fn finalize(&mut self, messages: &mut Vec<ServerMessage>) {
        self.finish_window(Cause::Finalize, messages);
    }

    /// The last results of the stream.
    pub(super) fn end_of_stream(&mut self, messages: &mut Vec<ServerMessage>) {
        self.finish_window(Cause::EndOfStream, messages);
    }

    fn started(&mut self, at: u64, messages: &mut Vec<ServerMessage>) {
        let continued = self.cut_at.take().is_some_and(|cut| at <= cut);
        if self.options.vad_events && !continued {
            messages.push(ServerMessage::SpeechStarted {
                channel: CHANNEL,
                timestamp: to_millisecond(at),
            });
        }
    }

    fn ended(&mut self, stretch: Stretch, messages: &mut Vec<ServerMessage>) {
        self.utterance_end_due = Some(stretch.end);
        self.stretches.push(stretch);
        if self.options.endpointing {
            self.finish_window(Cause::Endpoint, messages);
        }
    }

    fn end_full_window(&mut self, messages: &mut Vec<ServerMessage>) {
        let position = self.vad.position();
        let current = self.vad.current();
        // Silence before the sound doesn't count, so that sound isn't cut early.
        let begun = match (&current, self.stretches.first()) {
            (_, Some(first)) => first.start,
            (Some(current), None) => current.start,
            (None, None) => self.window_start,
        };
        if position.saturating_sub(begun.max(self.window_start)) >= MAX_WINDOW {
            self.finish_window(Cause::WindowFull, messages);
        }
    }

    fn end_utterance(&mut self, messages: &mut Vec<ServerMessage>) {
        let (Some(gap), Some(last)) = (self.options.utterance_end, self.utterance_end_due) else {
            return;
        };
        if self.vad.current().is_none() && self.vad.position() >= last + gap {
            self.utterance_end_due = None;
            messages.push(ServerMessage::UtteranceEnd {
                channel: CHANNEL,
                last_word_end: to_millisecond(last),
            });
        }
    }

    fn interim(&mut self, messages: &mut Vec<ServerMessage>) {
        if !self.options.interim_results || self.vad.position() < self.last_result + INTERIM_EVERY {
            return;
        }
        let Some(current) = self.vad.current() else {
            return;
        };
        self.last_result = self.vad.position();
        let heard: Vec<&Stretch> = self.stretches.iter().chain([&current]).collect();
        messages.push(self.results(&heard, None));
    }

    fn finish_window(&mut self, cause: Cause, messages: &mut Vec<ServerMessage>) {
        let mut heard = std::mem::take(&mut self.stretches);
        if let Some(current) = self.vad.split() {
            self.cut_at = Some(self.vad.position());
            self.utterance_end_due = Some(current.end);
            heard.push(current);
        }
        let position = self.vad.position();
        if position > self.window_start {
            let heard: Vec<&Stretch> = heard.iter().collect();
            messages.push(self.results(&heard, Some(cause)));
        }
        self.window_start = position;
        self.last_result = position;
    }

    /// Results from the window's start to here; interim without a cause.
    fn results(&self, heard: &[&Stretch], cause: Option<Cause>) -> ServerMessage {
        let words: Vec<Word> = heard.iter().flat_map(|s| self.words(s)).collect();
        let transcript = heard
            .iter()
            .map(|stretch| describe(stretch))
            .collect::<Vec<_>>()
            .join(" ");
        let speech_final = match cause {
            Some(Cause::Endpoint) => true,
            Some(Cause::Finalize | Cause::EndOfStream) => !heard.is_empty(),
            Some(Cause::WindowFull) | None => false,
        };
        ServerMessage::Results(Results {
            channel_index: CHANNEL,
            duration: seconds(self.vad.position() - self.window_start),
            start: seconds(self.window_start),
            is_final: cause.is_some(),
            speech_final,
            channel: Channel {
                alternatives: [Alternative {
                    confidence: if words.is_empty() { 0.0 } else { 1.0 },
                    transcript,
                    languages: self.options.languages.clone(),
                    words,
                }],
            },
            metadata: ResultsMetadata::new(&self.request_id),
            from_finalize: cause == Some(Cause::Finalize),
        })
    }

    /// The description's words, spread evenly: the first starts and the last ends where the sound
    /// did.
    fn words(&self, stretch: &Stretch) -> Vec<Word> {
        let description = describe(stretch);
        let words: Vec<&str> = description.split(' ').collect();
        let (start, length) = (stretch.start, stretch.end - stretch.start);
        let edge =
            |index: usize| to_millisecond(start + length * index as u64 / words.len() as u64);
        words
            .iter()
            .enumerate()
            .map(|(index, &word)| Word {
                word: word.to_owned(),
                start: edge(index),
                end: edge(index + 1),
                confidence: 1.0,
                punctuated_word: self.options.punctuated.then(|| word.to_owned()),
                speaker: self.options.diarize.then_some(0),
            })
            .collect()
    }
}

/// Such as `speech 0.80-2.10 s -18 dBFS`.
fn describe(stretch: &Stretch) -> String {
    let mut text = match stretch.tone_hz {
        Some(hz) => format!("tone {hz:.0} Hz"),
        None => "speech".to_owned(),
    };
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        " {:.2}-{:.2} s {:.0} dBFS",
        seconds(stretch.start),
        seconds(stretch.end),
        stretch.level_dbfs
    );
    text
}

fn seconds(samples: u64) -> f64 {
    samples as f64 / f64::from(SAMPLE_RATE)
}

/// Finer, measured edges of sound would pretend to an exactness that they don't have.
fn to_millisecond(samples: u64) -> f64 {
    (seconds(samples) * 1000.0).round() / 1000.0
}

fn samples(duration: Duration) -> u64 {
    let samples = duration.as_millis() * u128::from(SAMPLE_RATE) / 1000;
    u64::try_from(samples).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: usize = SAMPLE_RATE as usize;

    fn transcriber(query: &str) -> Transcriber {
        let uri = format!("/v1/listen?{query}").parse().expect("a URI");
        Transcriber::new("id", &Parameters::parse(&uri).expect("parameters"))
    }

    /// A square wave: loud, and cheap to make.
    fn sound(seconds: usize) -> Vec<i16> {
        (0..seconds * RATE)
            .map(|n| if n % 100 < 50 { 3000 } else { -3000 })
            .collect()
    }

    fn silence(seconds: usize) -> Vec<i16> {
        vec![0; seconds * RATE]
    }

    /// All messages, and those of the end.
    fn run(query: &str, signal: &[i16], chunk: usize) -> Vec<ServerMessage> {
        let mut transcriber = transcriber(query);
        let mut messages = Vec::new();
        for chunk in signal.chunks(chunk) {
            transcriber.push(chunk, &mut messages);
        }
        transcriber.end_of_stream(&mut messages);
        messages
    }

    fn finals(messages: &[ServerMessage]) -> Vec<&Results> {
        let results = messages.iter().filter_map(|message| match message {
            ServerMessage::Results(results) if results.is_final => Some(results),
            _ => None,
        });
        results.collect()
    }

    fn assert_tiled(finals: &[&Results], total: f64) {
        let mut position = 0.0;
        for result in finals {
            assert!((result.start - position).abs() < 1e-9, "{finals:#?}");
            position += result.duration;
        }
        assert!((position - total).abs() < 1e-9, "{finals:#?}");
    }

    fn count(messages: &[ServerMessage], wanted: fn(&ServerMessage) -> bool) -> usize {
        messages.iter().filter(|message| wanted(message)).count()
    }

    #[test]
    fn long_sound_is_cut_but_starts_once() {
        let messages = run("vad_events=true", &sound(25), 960);
        let finals = finals(&messages);
        let ends: Vec<_> = finals
            .iter()
            .map(|result| (result.duration, result.speech_final))
            .collect();
        assert_eq!(ends, [(10.0, false), (10.0, false), (5.0, true)]);
        assert_tiled(&finals, 25.0);
        let words: Vec<_> = finals
            .iter()
            .flat_map(|result| &result.channel.alternatives[0].words)
            .collect();
        assert!(words.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let started = |m: &ServerMessage| matches!(m, ServerMessage::SpeechStarted { .. });
        assert_eq!(count(&messages, started), 1);
    }

    #[test]
    fn long_silence_gives_empty_finals() {
        let messages = run("", &silence(25), 4096);
        let finals = finals(&messages);
        assert_eq!(finals.len(), 3);
        assert_tiled(&finals, 25.0);
        for result in finals {
            assert_eq!(result.channel.alternatives[0].transcript, "");
            assert!(!result.speech_final);
        }
    }

    #[test]
    fn without_endpointing_phrases_share_a_final() {
        let phrase = [sound(1), silence(1)].concat();
        let signal = phrase.repeat(3);
        let with = run("endpointing=300", &signal, 960);
        assert_eq!(finals(&with).len(), 4);
        assert!(finals(&with)[0].speech_final);
        let without = run("endpointing=false", &signal, 960);
        let finals = finals(&without);
        assert_eq!(finals.len(), 1);
        assert_tiled(&finals, 6.0);
        let transcript = &finals[0].channel.alternatives[0].transcript;
        assert_eq!(transcript.matches("dBFS").count(), 3);
    }

    #[test]
    fn interim_results_come_about_twice_a_second_and_once_a_message() {
        let interim = |m: &ServerMessage| matches!(m, ServerMessage::Results(r) if !r.is_final);
        let query = "interim_results=true";
        let small = count(&run(query, &sound(4), 960), interim);
        assert!((7..=8).contains(&small), "{small}");
        assert_eq!(count(&run(query, &sound(4), 4 * RATE), interim), 1);
        assert_eq!(count(&run(query, &silence(4), 960), interim), 0);
        assert_eq!(count(&run("", &sound(4), 960), interim), 0);
    }

    #[test]
    fn an_utterance_ends_once_and_only_after_the_gap() {
        let ended = |m: &ServerMessage| matches!(m, ServerMessage::UtteranceEnd { .. });
        let query = "interim_results=true&utterance_end_ms=1500";
        let phrase = |gap| [sound(1), silence(gap), sound(1)].concat();
        assert_eq!(count(&run(query, &phrase(1), 960), ended), 0);
        assert_eq!(count(&run(query, &phrase(5), 960), ended), 1);
    }

    #[test]
    fn the_way_audio_is_cut_into_messages_changes_no_final() {
        let signal = [silence(1), sound(2), silence(1), sound(1)].concat();
        let texts = |chunk| {
            let messages = run("", &signal, chunk);
            let finals = finals(&messages);
            serde_json::to_string(&finals).expect("JSON")
        };
        assert!(
            [1, 7, 960, 100_000]
                .windows(2)
                .all(|c| texts(c[0]) == texts(c[1]))
        );
    }
}
