//! From signals to orders: the first closes everything in order, the second hurries, the third
//! abandons.

use std::{
    io,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use rustix::process::{WaitOptions, wait};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook_tokio::Signals;

use crate::{close::CloseOrder, daemon::Daemon, domain::CloseReason};

/// Listens for SIGINT, SIGTERM and SIGHUP, from now to the end of the process: a listener that is
/// dropped does not bring back the default action, so there is one for life.
pub struct SignalSource(Signals);

impl SignalSource {
    /// Call before anything is started that must not be lost.
    pub fn install() -> io::Result<Self> {
        let signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
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
            match self.0.next().await {
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
