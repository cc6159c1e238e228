//! From signals to orders: the first closes everything in order, the second hurries, the third
//! abandons.

use std::{
    io,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use rustix::process::{WaitOptions, wait};
use signal_hook::{
    consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM},
    iterator::exfiltrator::WithRawSiginfo,
};
use signal_hook_tokio::SignalsInfo;

use crate::{close::CloseOrder, daemon::Daemon, domain::CloseReason};

/// Listens for SIGINT, SIGTERM and SIGHUP, from now to the end of the process: a listener that is
/// dropped does not bring back the default action, so there is one for life.
pub struct SignalSource(SignalsInfo<Each>);

/// Who listens by this is told of each signal, also of two that come before it has looked. So this one
/// and the watchdog count the same.
pub(crate) type Each = WithRawSiginfo;

impl SignalSource {
    /// Call before anything is started that must not be lost.
    pub fn install() -> io::Result<Self> {
        let signals = SignalsInfo::new([SIGINT, SIGTERM, SIGHUP])?;
        if std::process::id() == 1 {
            signals.handle().add_signal(SIGCHLD)?;
            // Those that ended before.
            reap();
        }
        Ok(Self(signals))
    }

    /// Waits for a signal that asks the process to end; its name. `reload` is called for each
    /// SIGHUP meanwhile. Cancel safe.
    pub async fn terminate(&mut self, reload: impl Fn()) -> &'static str {
        loop {
            match self.0.next().await.map(|signal| signal.si_signo) {
                Some(SIGINT) => return "SIGINT",
                Some(SIGTERM) => return "SIGTERM",
                Some(SIGHUP) => reload(),
                Some(SIGCHLD) => reap(),
                Some(other) => tracing::debug!(other, "signal ignored"),
                None => std::future::pending().await,
            }
        }
    }
}

/// As PID 1 of a container: processes whose parents are gone are ours, and stay as zombies unless they
/// are awaited. We start none ourselves, so that nobody else waits for them.
fn reap() {
    while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
        tracing::debug!(?pid, "a process that had lost its parent has ended");
    }
}

/// What SIGHUP does where there is no configuration that could be read anew.
pub fn nothing_to_reload() {
    tracing::warn!("SIGHUP: there is no configuration to reload here");
}

/// Whether the daemon was left to close in its own time, or given up on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Closed,
    Abandoned,
}

/// Passes signals on to `daemon` until it is closed; `reload` must not take long.
pub async fn govern(daemon: &Daemon, signals: &mut SignalSource, reload: impl Fn()) -> Ending {
    let mut count = 0;
    loop {
        let name = tokio::select! {
            biased;
            _ = daemon.closed() => return Ending::Closed,
            name = signals.terminate(&reload) => name,
        };
        let shutdown = &daemon.config().shutdown;
        count += 1;
        let within = |ms| CloseOrder {
            reason: CloseReason::Shutdown(name.to_owned()),
            deadline: Instant::now() + Duration::from_millis(ms),
        };
        match count {
            1 => {
                tracing::info!(signal = name, "closing everything; again to hurry");
                daemon.close(&within(shutdown.deadline_ms));
            }
            2 => {
                tracing::warn!(signal = name, "hurrying; once more to abandon");
                daemon.hurry(&within(shutdown.hurry_ms));
            }
            _ => {
                tracing::error!(signal = name, "abandoned: connections are reset");
                daemon.hurry(&within(0));
                // Resets take no time unless the runtime is stuck, and then nothing helps.
                let _ = tokio::time::timeout(Duration::from_millis(500), daemon.closed()).await;
                return Ending::Abandoned;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn each_signal_counts() {
        let mut source = SignalSource(SignalsInfo::new([SIGHUP]).unwrap());
        // To this thread, and handled before it returns.
        for _ in 0..2 {
            signal_hook::low_level::raise(SIGHUP).unwrap();
        }
        let heard = AtomicU32::new(0);
        let listening = source.terminate(|| {
            heard.fetch_add(1, Ordering::Relaxed);
        });
        let counted = async {
            while heard.load(Ordering::Relaxed) < 2 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            name = listening => panic!("{name}"),
            counted = tokio::time::timeout(Duration::from_secs(30), counted) => {
                assert!(counted.is_ok(), "{heard:?} of 2");
            }
        }
    }
}
