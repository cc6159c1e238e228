//! Voice activity from the level of the signal: 20 ms frames against a fixed threshold.
//!
//! Pure: takes samples, gives stretches of sound. It knows nothing of messages or sockets.

use std::time::Duration;

/// Rate of all samples in this server.
pub(super) const SAMPLE_RATE: u32 = 48_000;
/// 20 ms.
const FRAME: u32 = SAMPLE_RATE / 50;
/// Quiet rooms and codec noise lie well below, speech well above.
const THRESHOLD_DBFS: f64 = -45.0;
/// Peak of a sine at the threshold; tells where in a loud frame the sound begins and ends.
const THRESHOLD_PEAK: u16 = 184;
/// One loud frame alone is a click.
const ONSET_FRAMES: u32 = 2;
/// A tone has about the same number of zero crossings in each frame; speech does not.
const TONE_CROSSING_SPREAD: u32 = 2;
const TONE_MIN_FRAMES: u32 = 10;

/// Something other than silence, from its first to its last loud sample.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stretch {
    /// In samples from the start of the stream.
    pub start: u64,
    /// In samples from the start of the stream.
    pub end: u64,
    /// Mean level of the loud frames; a full-scale sine is 0 dBFS (AES17).
    pub level_dbfs: f64,
    /// Frequency in Hz, if it is one steady tone.
    pub tone_hz: Option<f64>,
}

/// What a frame brought to light.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum VadEvent {
    /// Sound began at this sample.
    Started(u64),
    /// Sound ended, longer ago than the hangover.
    Ended(Stretch),
}

/// See the module's description.
pub(super) struct Vad {
    /// Samples taken, whole frames or not.
    position: u64,
    frame: FrameMeter,
    hangover_frames: u32,
    activity: Option<Activity>,
}

impl Vad {
    /// Sound that pauses for less than `hangover` counts as one stretch.
    pub(super) fn new(hangover: Duration) -> Self {
        let frames = hangover.as_millis().div_ceil(20).clamp(1, 3000);
        Self {
            position: 0,
            frame: FrameMeter::default(),
            hangover_frames: frames as u32,
            activity: None,
        }
    }

    /// Samples taken so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Takes samples up to the end of the current frame; returns how many and what came of it.
    pub(super) fn push(&mut self, samples: &[i16]) -> (usize, Option<VadEvent>) {
        let room = (FRAME - self.frame.len) as usize;
        let taken = room.min(samples.len());
        for &sample in &samples[..taken] {
            self.frame.push(sample, self.position);
            self.position += 1;
        }
        if self.frame.len < FRAME {
            return (taken, None);
        }
        (taken, self.finish_frame())
    }

    /// The stretch that is going on.
    pub(super) fn current(&self) -> Option<Stretch> {
        self.activity.as_ref().and_then(Activity::stretch)
    }

    /// Ends the stretch that is going on, here. Sound that continues starts a new one.
    pub(super) fn split(&mut self) -> Option<Stretch> {
        // Half a frame is enough to judge: at the end of a stream nothing fills it up any more.
        if self.frame.len >= FRAME / 2
            && self.activity.is_some()
            && let Some(VadEvent::Ended(stretch)) = self.finish_frame()
        {
            return Some(stretch);
        }
        self.activity.take()?.stretch()
    }

    fn finish_frame(&mut self) -> Option<VadEvent> {
        let frame = self.frame.take();
        let loud = frame.level_dbfs() >= THRESHOLD_DBFS;
        let Some(activity) = &mut self.activity else {
            if loud {
                self.activity = Some(Activity::new(frame));
            }
            return None;
        };
        if loud {
            activity.add_loud(frame);
            return (activity.loud_frames == ONSET_FRAMES)
                .then_some(VadEvent::Started(activity.start));
        }
        activity.quiet_frames += 1;
        activity.steady = false;
        if activity.loud_frames < ONSET_FRAMES {
            self.activity = None;
            return None;
        }
        if activity.quiet_frames < self.hangover_frames {
            return None;
        }
        self.activity.take()?.stretch().map(VadEvent::Ended)
    }
}

/// Running measurements of one frame.
#[derive(Clone, Copy, Debug, Default)]
struct FrameMeter {
    len: u32,
    sum_of_squares: f64,
    last: i16,
    crossings: Crossings,
    /// Positions of the first loud sample and of the one after the last.
    loud: Option<(u64, u64)>,
}

/// Upward zero crossings, their positions in samples.
#[derive(Clone, Copy, Debug, Default)]
struct Crossings {
    count: u32,
    first: f64,
    last: f64,
}

impl FrameMeter {
    fn push(&mut self, sample: i16, position: u64) {
        if self.last < 0 && sample >= 0 {
            let (before, after) = (f64::from(self.last), f64::from(sample));
            let at = position as f64 - after / (after - before);
            if self.crossings.count == 0 {
                self.crossings.first = at;
            }
            self.crossings.last = at;
            self.crossings.count += 1;
        }
        if sample.unsigned_abs() >= THRESHOLD_PEAK {
            let (first, _) = self.loud.unwrap_or((position, position));
            self.loud = Some((first, position + 1));
        }
        self.sum_of_squares += f64::from(sample).powi(2);
        self.last = sample;
        self.len += 1;
    }

    fn take(&mut self) -> Self {
        let next = Self {
            last: self.last,
            ..Self::default()
        };
        std::mem::replace(self, next)
    }

    fn level_dbfs(&self) -> f64 {
        level_dbfs(self.sum_of_squares, u64::from(self.len))
    }
}

fn level_dbfs(sum_of_squares: f64, samples: u64) -> f64 {
    let full_scale_sine = f64::from(i16::MAX).powi(2) / 2.0;
    10.0 * (sum_of_squares / samples.max(1) as f64 / full_scale_sine)
        .max(1e-12)
        .log10()
}

/// A stretch in the making.
#[derive(Debug)]
struct Activity {
    start: u64,
    end: u64,
    sum_of_squares: f64,
    samples: u64,
    loud_frames: u32,
    quiet_frames: u32,
    /// No quiet frame since the start, and zero crossings as a tone has them.
    steady: bool,
    /// `steady` as of the last loud frame.
    was_steady: bool,
    /// The latest loud frame's; counted once it is known not to be the last one, which the sound
    /// may fill only in part.
    latest: Crossings,
    fewest: u32,
    most: u32,
    total: Crossings,
}

impl Activity {
    fn new(frame: FrameMeter) -> Self {
        let (start, end) = frame.loud.unwrap_or_default();
        Self {
            start,
            end,
            sum_of_squares: frame.sum_of_squares,
            samples: u64::from(frame.len),
            loud_frames: 1,
            quiet_frames: 0,
            steady: true,
            was_steady: true,
            latest: frame.crossings,
            fewest: u32::MAX,
            most: 0,
            total: Crossings::default(),
        }
    }

    fn add_loud(&mut self, frame: FrameMeter) {
        // The first frame, too, may be filled in part.
        if self.loud_frames > 1 {
            self.count_latest();
        }
        self.latest = frame.crossings;
        if let Some((_, end)) = frame.loud {
            self.end = end;
        }
        self.sum_of_squares += frame.sum_of_squares;
        self.samples += u64::from(frame.len);
        self.loud_frames += 1;
        self.quiet_frames = 0;
        self.was_steady = self.steady;
    }

    fn count_latest(&mut self) {
        let latest = self.latest;
        self.fewest = self.fewest.min(latest.count);
        self.most = self.most.max(latest.count);
        if latest.count == 0 {
            return;
        }
        if self.total.count == 0 {
            self.total.first = latest.first;
        }
        self.total.last = latest.last;
        self.total.count += latest.count;
    }

    fn stretch(&self) -> Option<Stretch> {
        (self.loud_frames >= ONSET_FRAMES).then(|| Stretch {
            start: self.start,
            end: self.end,
            level_dbfs: level_dbfs(self.sum_of_squares, self.samples),
            tone_hz: self.tone_hz(),
        })
    }

    fn tone_hz(&self) -> Option<f64> {
        let steady = self.was_steady
            && self.loud_frames >= TONE_MIN_FRAMES
            && self.fewest > 0
            && self.most - self.fewest <= TONE_CROSSING_SPREAD
            && self.total.count > 1;
        steady.then(|| {
            f64::from(self.total.count - 1) * f64::from(SAMPLE_RATE)
                / (self.total.last - self.total.first)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANGOVER: Duration = Duration::from_millis(200);

    fn tone(hz: f64, amplitude: f64, seconds: f64) -> Vec<i16> {
        (0..(seconds * f64::from(SAMPLE_RATE)) as u64)
            .map(|n| {
                let phase = n as f64 * hz / f64::from(SAMPLE_RATE) * std::f64::consts::TAU;
                (amplitude * f64::from(i16::MAX) * phase.sin()) as i16
            })
            .collect()
    }

    fn silence(seconds: f64) -> Vec<i16> {
        vec![0; (seconds * f64::from(SAMPLE_RATE)) as usize]
    }

    fn events(vad: &mut Vad, mut samples: &[i16]) -> Vec<VadEvent> {
        let mut events = Vec::new();
        while !samples.is_empty() {
            let (taken, event) = vad.push(samples);
            samples = &samples[taken..];
            events.extend(event);
        }
        events
    }

    /// To the millisecond: a sine takes a few samples to become loud.
    fn seconds(samples: u64) -> f64 {
        (samples as f64 / f64::from(SAMPLE_RATE) * 1000.0).round() / 1000.0
    }

    #[test]
    fn a_tone_between_silences_is_measured() {
        let mut vad = Vad::new(HANGOVER);
        let signal = [silence(0.8), tone(440.0, 0.25, 1.3), silence(1.0)].concat();
        let events = events(&mut vad, &signal);
        let [VadEvent::Started(at), VadEvent::Ended(stretch)] = events.as_slice() else {
            panic!("{events:?}");
        };
        assert_eq!(seconds(*at), 0.8);
        assert_eq!((seconds(stretch.start), seconds(stretch.end)), (0.8, 2.1));
        assert!(
            (stretch.level_dbfs + 12.04).abs() < 0.2,
            "{}",
            stretch.level_dbfs
        );
        let hz = stretch.tone_hz.expect("a tone");
        assert!((hz - 440.0).abs() < 0.5, "{hz}");
    }

    #[test]
    fn a_pause_shorter_than_the_hangover_is_bridged_and_a_longer_one_is_not() {
        for (pause, expected) in [(0.1, 1), (0.3, 2)] {
            let mut vad = Vad::new(HANGOVER);
            let burst = tone(300.0, 0.2, 0.5);
            let signal = [&*burst, &silence(pause), &burst, &silence(0.5)].concat();
            let ended = events(&mut vad, &signal)
                .into_iter()
                .filter(|e| matches!(e, VadEvent::Ended(_)))
                .count();
            assert_eq!(ended, expected, "pause of {pause} s");
        }
    }

    #[test]
    fn a_sweep_and_two_bridged_tones_are_not_a_tone() {
        let sweep: Vec<i16> = (0..48_000_u32)
            .map(|n| {
                let t = f64::from(n) / 48_000.0;
                (8000.0 * (std::f64::consts::TAU * (200.0 * t + 900.0 * t * t)).sin()) as i16
            })
            .collect();
        let bridged = [tone(300.0, 0.2, 0.5), silence(0.1), tone(300.0, 0.2, 0.5)].concat();
        for signal in [sweep, bridged] {
            let mut vad = Vad::new(HANGOVER);
            events(&mut vad, &signal);
            assert_eq!(vad.split().expect("sound").tone_hz, None);
        }
    }

    #[test]
    fn a_click_and_faint_noise_are_not_sound() {
        let mut vad = Vad::new(HANGOVER);
        let signal = [
            silence(0.5),
            tone(1000.0, 0.5, 0.015),
            silence(0.5),
            tone(1000.0, 0.003, 1.0),
        ]
        .concat();
        assert_eq!(events(&mut vad, &signal), []);
        assert_eq!(vad.split(), None);
    }

    #[test]
    fn a_split_ends_the_stretch_at_the_last_sample_and_the_rest_is_a_new_one() {
        let mut vad = Vad::new(HANGOVER);
        let signal = tone(440.0, 0.25, 0.995);
        events(&mut vad, &signal);
        let first = vad.split().expect("sound");
        assert_eq!((seconds(first.start), seconds(first.end)), (0.0, 0.995));
        events(&mut vad, &tone(440.0, 0.25, 1.0));
        let second = vad.split().expect("sound");
        assert!(second.start >= first.end, "{second:?}");
    }

    #[test]
    fn loudest_samples_do_not_overflow() {
        let mut vad = Vad::new(Duration::MAX);
        let square: Vec<i16> = (0..96_000)
            .map(|n| if n % 100 < 50 { i16::MIN } else { i16::MAX })
            .collect();
        events(&mut vad, &square);
        let stretch = vad.split().expect("sound");
        assert!((stretch.level_dbfs - 3.01).abs() < 0.1);
    }
}
