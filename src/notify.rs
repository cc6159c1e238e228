//! Tells the service manager how the daemon is: systemd's protocol, sd_notify(3).
//!
//! Without a crate: the one there is sends on a socket that blocks, and a manager that does not read
//! must hold up nothing.

use std::{
    ffi::OsString,
    io,
    os::unix::{
        ffi::OsStrExt,
        net::{SocketAddr, UnixDatagram as StdUnixDatagram},
    },
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};
use tokio::{
    net::UnixDatagram,
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use crate::{close::CloseOrder, daemon::Life, watchdog};

/// While closing: how often more time is asked for, and how much at once.
const EXTEND_EVERY: Duration = Duration::from_secs(1);
const EXTEND_BY: Duration = Duration::from_secs(5);
/// When no sign of life is asked for.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// How a reload of the configuration goes.
pub enum Reload {
    Begun,
    /// In a few words, what came of it.
    Done(String),
}

/// A service manager that wants to be told.
pub struct Notifier {
    socket: UnixDatagram,
    /// How often it expects a sign of life.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` say; `None` if nobody wants to be told.
    pub fn from_env(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<Option<Self>> {
        let Some(name) = variable("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let socket = StdUnixDatagram::unbound()?;
        socket.connect_addr(&address(&name)?)?;
        socket.set_nonblocking(true)?;
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let every = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0);
        Ok(Some(Self {
            socket: UnixDatagram::from_std(socket)?,
            watchdog: every.map(Duration::from_micros),
        }))
    }

    /// To be a task of the runtime, so that a blocked one gives no sign of life; ends with it.
    pub async fn attend(self, mut life: Life, mut reloads: mpsc::UnboundedReceiver<Reload>) {
        let every = |period| {
            let mut every = interval(period);
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            every
        };
        let mut alive = every(self.watchdog.map_or(NEVER, |asked| asked / 2));
        let mut extend = every(EXTEND_EVERY);
        let mut starting = true;
        let mut closing: Option<CloseOrder> = None;
        loop {
            tokio::select! {
                started = started(&mut life.ready), if starting => {
                    starting = false;
                    if started && closing.is_none() {
                        self.tell("READY=1\nSTATUS=transcribing").await;
                    }
                }
                changed = life.orders.changed() => {
                    if changed.is_err() {
                        // The daemon is gone: there is nothing more to tell.
                        return;
                    }
                    let first = closing.is_none();
                    closing = life.orders.borrow_and_update().clone();
                    if first && let Some(order) = &closing {
                        let reason = &order.reason;
                        self.tell(&format!("STOPPING=1\nSTATUS=closing: {reason}")).await;
                        extend.reset_immediately();
                    }
                }
                // Told as long as it is neither starting nor stopping, which the manager would take
                // to be over.
                Some(reload) = reloads.recv() => if !starting && closing.is_none() {
                    match reload {
                        Reload::Begun => {
                            let now = clock_gettime(ClockId::Monotonic);
                            let usec = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
                            self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={usec}")).await;
                        }
                        Reload::Done(said) => {
                            self.tell(&format!("READY=1\nSTATUS=transcribing; {said}")).await;
                        }
                    }
                },
                _ = alive.tick(), if self.watchdog.is_some() => self.tell("WATCHDOG=1").await,
                _ = extend.tick(), if closing.is_some() => {
                    // No longer than the daemon allows itself.
                    let by = closing.as_ref().map_or(Duration::ZERO, |order| {
                        let end = order.deadline + watchdog::MARGIN;
                        end.saturating_duration_since(Instant::now()).min(EXTEND_BY)
                    });
                    if !by.is_zero() {
                        self.tell(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros())).await;
                    }
                }
            }
        }
    }

    async fn tell(&self, message: &str) {
        if let Err(error) = self.socket.send(message.as_bytes()).await {
            tracing::warn!(%error, message, "the service manager can't be told");
        }
    }
}

/// Waits until the daemon has started; false if it never will. Cancel safe.
async fn started(ready: &mut watch::Receiver<bool>) -> bool {
    ready.wait_for(|ready| *ready).await.is_ok()
}

/// A path, or after `@` a name in Linux's abstract namespace.
fn address(name: &OsString) -> io::Result<SocketAddr> {
    #[cfg(target_os = "linux")]
    if let [b'@', name @ ..] = name.as_bytes() {
        use std::os::linux::net::SocketAddrExt;
        return SocketAddr::from_abstract_name(name);
    }
    match name.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("NOTIFY_SOCKET is {name:?}, neither a path nor an abstract name"),
        )),
    }
}
