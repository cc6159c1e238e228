//! A thread of the operating system, for when the async runtime is blocked: it hears signals, names
//! what is open, and ends a process that does not end by itself.
//!
//! It must not wait for what a stuck thread may hold. So it takes no lock, and leaves all talking to
//! a second thread, which it waits for only so long.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::SignalsInfo,
};

use crate::{
    config::ShutdownConfig,
    registry::{OpenStream, Registry},
    signals::Each,
};

/// What may follow a deadline in a close that works (ARCHITECTURE.md, invariant 3), and a little:
/// with the default deadline this is 9.85 s after the first signal, of the 10 s that `docker stop`
/// gives.
pub(crate) const MARGIN: Duration = Duration::from_millis(1850);
/// How often it looks.
const TICK: Duration = Duration::from_millis(100);
const BEAT: Duration = Duration::from_millis(250);
/// A runtime that has not run a ready task for so long is blocked.
const BLOCKED_AFTER: Duration = Duration::from_secs(2);
/// If this thread itself was held up (a stopped process, a machine out of breath), the others were
/// as well, and have so long to catch up.
const HELD_UP: Duration = Duration::from_secs(1);
/// For a lock on the book of streams, and for the last words altogether.
const LOCK_LIMIT: Duration = Duration::from_millis(20);
const LAST_WORDS: Duration = Duration::from_millis(80);
/// Streams that are named one by one.
const MAX_NAMED: usize = 100;

/// Cheap to clone; the threads last as long as the process.
#[derive(Clone)]
pub struct Watchdog(Arc<Shared>);

struct Shared {
    started: Instant,
    /// Milliseconds from `started` to the runtime's last sign of life; 0 if none is expected.
    beat: AtomicU64,
    registry: OnceLock<Registry>,
    /// Milliseconds after the first signal, and after the second.
    limits: [AtomicU64; 2],
    last_words: AtomicBool,
}

impl Watchdog {
    /// Listens for SIGINT and SIGTERM, besides those who do so on the runtime, and starts to watch.
    /// A process that it must end exits with `code`.
    pub fn start(shutdown: &ShutdownConfig, code: u8) -> io::Result<Self> {
        let signals = SignalsInfo::<Each>::new([SIGINT, SIGTERM])?;
        // Not through `io::Stderr`, whose lock a stuck thread may hold.
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let shared = Arc::new(Shared {
            started: Instant::now(),
            beat: AtomicU64::new(0),
            registry: OnceLock::new(),
            limits: [shutdown.deadline_ms, shutdown.hurry_ms].map(AtomicU64::new),
            last_words: AtomicBool::new(false),
        });
        let (to_say, seen) = mpsc::sync_channel(8);
        let speaker = shared.clone();
        let judge = Judge::new(Instant::now(), shutdown);
        thread::Builder::new()
            .name("watchdog-says".into())
            .spawn(move || speaker.speak(&seen, stderr))?;
        let watching = shared.clone();
        thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || watching.watch(judge, signals, &to_say, code))?;
        Ok(Self(shared))
    }

    /// For signals from now on.
    pub fn reconfigure(&self, shutdown: &ShutdownConfig) {
        let [first, second] = &self.0.limits;
        first.store(shutdown.deadline_ms, Ordering::Relaxed);
        second.store(shutdown.hurry_ms, Ordering::Relaxed);
    }

    /// Whose streams are named.
    pub fn watch(&self, registry: Registry) {
        // A second one would be a second daemon in this process, and the first is named.
        let _ = self.0.registry.set(registry);
    }

    /// The sign of life: to be a task of the runtime that is watched, and ends with it.
    pub async fn beat(self) {
        struct End(Watchdog);
        impl Drop for End {
            fn drop(&mut self) {
                self.0.0.beat.store(0, Ordering::Relaxed);
            }
        }
        let end = End(self);
        loop {
            let alive = end.0.0.started.elapsed().as_millis() as u64;
            end.0.0.beat.store(alive.max(1), Ordering::Relaxed);
            tokio::time::sleep(BEAT).await;
        }
    }
}

impl Shared {
    fn watch(
        &self,
        mut judge: Judge,
        mut signals: SignalsInfo<Each>,
        to_say: &SyncSender<Seen>,
        code: u8,
    ) {
        loop {
            #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
            thread::sleep(judge.next_look(Instant::now()));
            let heard = signals.pending().count();
            judge.limits = limits(&self.limits.each_ref().map(|ms| ms.load(Ordering::Relaxed)));
            let beat = match self.beat.load(Ordering::Relaxed) {
                0 => None,
                beat => Some(self.started + Duration::from_millis(beat)),
            };
            judge.look(Instant::now(), beat, heard, |seen| {
                let end = matches!(seen, Seen::TooLate { .. });
                // If the other one is stuck over earlier words, nothing more can be said.
                let said = to_say.try_send(seen).is_ok();
                if end {
                    let until = Instant::now() + LAST_WORDS;
                    while said && !self.last_words.load(Ordering::Acquire) {
                        if Instant::now() >= until {
                            break;
                        }
                        #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
                        thread::sleep(Duration::from_millis(1));
                    }
                    // Not `process::exit`, which runs handlers that may wait for a stuck thread. The
                    // kernel ends the connections, and the journal has what was open.
                    signal_hook::low_level::exit(code.into());
                }
            });
        }
    }

    fn speak(&self, seen: &Receiver<Seen>, mut stderr: File) {
        for seen in seen {
            match seen {
                Seen::Blocked { silent } => {
                    tracing::error!(
                        "the runtime is blocked: nothing has run for {:.1} s",
                        silent.as_secs_f64()
                    );
                    for said in self.open() {
                        tracing::error!("open meanwhile: {said}");
                    }
                }
                Seen::Over { took } => {
                    let took = took.as_secs_f64();
                    tracing::warn!("the runtime works again; it was blocked for {took:.1} s");
                }
                Seen::Signal { left } => tracing::error!(
                    "a signal came while the runtime is blocked: the process is ended in {:.1} s \
                     if it stays so",
                    left.as_secs_f64()
                ),
                Seen::TooLate { blocked, after } => {
                    let why = if blocked {
                        "the runtime is blocked"
                    } else {
                        "something keeps the process from ending"
                    };
                    let open = self.open();
                    let mut said = format!(
                        "roomwarden: {why}, {:.1} s after the first signal: ended by the watchdog\n",
                        after.as_secs_f64(),
                    );
                    for stream in open {
                        said.push_str(&format!("roomwarden: left open: {stream}\n"));
                    }
                    let _ = stderr.write_all(said.as_bytes());
                    self.last_words.store(true, Ordering::Release);
                }
            }
        }
    }

    /// What is open, in words.
    fn open(&self) -> Vec<String> {
        let Some(registry) = self.registry.get() else {
            return Vec::new();
        };
        let Some(open) = registry.try_open(LOCK_LIMIT) else {
            return vec!["unknown, since a stuck thread holds the book".to_owned()];
        };
        let mut said: Vec<String> = open.iter().take(MAX_NAMED).map(name).collect();
        if open.len() > MAX_NAMED {
            said.push(format!("and {} more", open.len() - MAX_NAMED));
        }
        said
    }
}

fn name(stream: &OpenStream) -> String {
    let OpenStream { id, key, state, .. } = stream;
    let request = stream.request_id.as_deref().unwrap_or("-");
    // Names come from others, and must not drive the terminal.
    format!("{id} {key} ({state:?}), request {request}").replace(char::is_control, "\u{fffd}")
}

/// What is to be said.
#[derive(Debug, PartialEq)]
enum Seen {
    Blocked { silent: Duration },
    Over { took: Duration },
    Signal { left: Duration },
    TooLate { blocked: bool, after: Duration },
}

/// Judges by what it is told; owns neither clock nor signals.
struct Judge {
    /// After the first, the second, the third signal.
    limits: [Duration; 3],
    heard: usize,
    first: Option<Instant>,
    deadline: Option<Instant>,
    looked: Instant,
    /// Since when it was not held up itself.
    fair_since: Instant,
    blocked_since: Option<Instant>,
}

fn limits(ms: &[u64; 2]) -> [Duration; 3] {
    let limit = |ms| Duration::from_millis(ms) + MARGIN;
    [limit(ms[0]), limit(ms[1]), MARGIN]
}

impl Judge {
    fn new(now: Instant, shutdown: &ShutdownConfig) -> Self {
        Self {
            limits: limits(&[shutdown.deadline_ms, shutdown.hurry_ms]),
            heard: 0,
            first: None,
            deadline: None,
            looked: now,
            fair_since: now,
            blocked_since: None,
        }
    }

    fn next_look(&self, now: Instant) -> Duration {
        let left = self.deadline.map(|at| at.saturating_duration_since(now));
        left.map_or(TICK, |left| left.min(TICK))
    }

    /// `beat` is the runtime's last sign of life, if any is expected; `signals` came since the last
    /// look.
    fn look(
        &mut self,
        now: Instant,
        beat: Option<Instant>,
        signals: usize,
        mut say: impl FnMut(Seen),
    ) {
        if now.saturating_duration_since(self.looked) >= HELD_UP {
            self.fair_since = now;
            let enough = now + HELD_UP;
            self.deadline = self.deadline.map(|deadline| deadline.max(enough));
        }
        self.looked = now;
        let silent = beat.map(|beat| now.saturating_duration_since(beat.max(self.fair_since)));
        match (silent, self.blocked_since) {
            (Some(silent), None) if silent >= BLOCKED_AFTER => {
                self.blocked_since = beat;
                say(Seen::Blocked { silent });
            }
            (Some(silent), Some(since)) if silent < BLOCKED_AFTER => {
                self.blocked_since = None;
                let took = now.saturating_duration_since(since).saturating_sub(silent);
                say(Seen::Over { took });
            }
            _ => {}
        }
        for _ in 0..signals {
            self.first.get_or_insert(now);
            let limit = self.limits[self.heard.min(2)];
            self.heard += 1;
            let deadline = self.deadline.map_or(now + limit, |at| at.min(now + limit));
            self.deadline = Some(deadline);
            if self.blocked_since.is_some() {
                let left = deadline.saturating_duration_since(now);
                say(Seen::Signal { left });
            }
        }
        if let (Some(first), Some(deadline)) = (self.first, self.deadline)
            && now >= deadline
        {
            say(Seen::TooLate {
                blocked: self.blocked_since.is_some(),
                after: now.saturating_duration_since(first),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHUTDOWN: ShutdownConfig = ShutdownConfig {
        deadline_ms: 8000,
        hurry_ms: 1000,
    };

    /// A judge who looks every tick, and what it sees.
    struct Court {
        judge: Judge,
        begun: Instant,
        now: Instant,
        /// The runtime's last sign of life.
        beat: Option<Instant>,
        seen: Vec<(f64, Seen)>,
    }

    impl Court {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                judge: Judge::new(now, &SHUTDOWN),
                begun: now,
                now,
                beat: Some(now),
                seen: Vec::new(),
            }
        }

        fn look(&mut self, signals: usize) {
            let at = (self.now - self.begun).as_secs_f64();
            let seen = &mut self.seen;
            self.judge
                .look(self.now, self.beat, signals, |what| seen.push((at, what)));
        }

        /// Time goes by, with or without signs of life; what was seen.
        fn pass(&mut self, seconds: f64, alive: bool) -> Vec<(f64, Seen)> {
            let end = self.now + Duration::from_secs_f64(seconds);
            while self.now < end {
                self.now = end.min(self.now + self.judge.next_look(self.now));
                if alive {
                    self.beat = Some(self.now);
                }
                self.look(0);
                if matches!(self.seen.last(), Some((_, Seen::TooLate { .. }))) {
                    break;
                }
            }
            std::mem::take(&mut self.seen)
        }
    }

    fn about(seconds: Duration, expected: f64) -> bool {
        (seconds.as_secs_f64() - expected).abs() < 0.2
    }

    #[test]
    fn a_blocked_runtime_is_noticed_once_and_so_is_its_return() {
        let mut court = Court::new();
        assert_eq!(court.pass(100.0, true), []);
        let seen = court.pass(10.0, false);
        assert!(
            matches!(&seen[..], [(at, Seen::Blocked { silent })]
                if about(*silent, 2.0) && (101.9..102.2).contains(at)),
            "{seen:?}"
        );
        let seen = court.pass(10.0, true);
        assert!(
            matches!(&seen[..], [(_, Seen::Over { took })] if about(*took, 10.0)),
            "{seen:?}"
        );
        assert!(matches!(
            court.pass(3.0, false)[..],
            [(_, Seen::Blocked { .. })]
        ));
        // The runtime ends in order: no sign of life is expected any more.
        court.pass(1.0, true);
        court.beat = None;
        assert_eq!(court.pass(100.0, false), []);
    }

    #[test]
    fn each_signal_leaves_less_time_and_none_gives_any_back() {
        let ended = |alive: bool, signals: &[f64]| {
            let mut court = Court::new();
            court.pass(5.0, alive);
            let mut seen = Vec::new();
            for pause in signals {
                seen.extend(court.pass(*pause, alive));
                court.look(1);
            }
            seen.extend(court.pass(1000.0, alive));
            match seen.last() {
                Some((at, Seen::TooLate { blocked, .. })) => {
                    assert_eq!(*blocked, !alive);
                    *at - 5.0
                }
                _ => panic!("never ended: {seen:?}"),
            }
        };
        for alive in [true, false] {
            for (signals, expected) in [
                (&[0.0][..], 9.85),
                (&[0.0, 3.0], 3.0 + 2.85),
                (&[0.0, 1.0, 0.5], 1.5 + 1.85),
                (&[0.0, 9.0], 9.85),
                (&[0.0, 0.0, 0.0, 1.0], 1.85),
            ] {
                let at = ended(alive, signals);
                assert!((at - expected).abs() < 0.02, "{signals:?}: {at}");
            }
        }
    }

    #[test]
    fn a_process_that_was_stopped_is_not_blamed_and_gets_time_to_end() {
        let mut court = Court::new();
        court.pass(1.0, true);
        court.look(1);
        court.now += Duration::from_secs(60);
        court.look(0);
        assert_eq!(court.seen, [], "neither blocked nor too late");
        let seen = court.pass(0.9, true);
        assert_eq!(seen, []);
        let seen = court.pass(0.2, true);
        assert!(matches!(&seen[..], [(_, Seen::TooLate { .. })]), "{seen:?}");
    }

    #[test]
    fn a_signal_on_a_blocked_runtime_is_answered() {
        let mut court = Court::new();
        court.pass(3.0, false);
        court.look(1);
        let seen = std::mem::take(&mut court.seen);
        assert!(
            matches!(&seen[..], [(_, Seen::Signal { left })] if about(*left, 9.85)),
            "{seen:?}"
        );
    }
}
