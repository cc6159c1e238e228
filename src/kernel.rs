//! The kernel's word on which sockets this process holds. Linux only; elsewhere nothing is known.

use std::collections::{HashSet, VecDeque};

/// Sockets that are remembered; the oldest are forgotten.
const MAX_KNOWN: usize = 1 << 16;

/// A socket as the kernel numbers it: unlike its address, no other one gets the same number while
/// the machine runs, short of four thousand million sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketId(u64);

impl SocketId {
    #[cfg(target_os = "linux")]
    pub fn of(socket: &impl std::os::fd::AsRawFd) -> Option<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).ok()?;
        Self::from_link(link.to_str()?)
    }

    #[cfg(not(target_os = "linux"))]
    pub fn of<T>(_: &T) -> Option<Self> {
        None
    }

    /// `socket:[12345]`, as /proc names a socket's descriptor (proc(5)).
    #[cfg(target_os = "linux")]
    fn from_link(link: &str) -> Option<Self> {
        let number = link.strip_prefix("socket:[")?.strip_suffix(']')?;
        number.parse().ok().map(Self)
    }
}

/// Sockets that were opened to the provider.
#[derive(Debug, Default)]
pub struct KnownSockets {
    known: HashSet<SocketId>,
    order: VecDeque<SocketId>,
}

impl KnownSockets {
    pub fn add(&mut self, socket: SocketId) {
        if self.order.len() == MAX_KNOWN
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.known.insert(socket);
        self.order.push_back(socket);
    }

    /// How many of these are among them.
    pub fn count(&self, sockets: &[SocketId]) -> usize {
        let known = sockets.iter().filter(|socket| self.known.contains(socket));
        known.count()
    }
}

/// The sockets that this process holds, of whatever kind; `None` if the system doesn't tell.
#[cfg(target_os = "linux")]
pub fn held() -> Option<Vec<SocketId>> {
    let descriptors = std::fs::read_dir("/proc/self/fd").ok()?;
    let socket = |entry: std::io::Result<std::fs::DirEntry>| {
        SocketId::from_link(std::fs::read_link(entry.ok()?.path()).ok()?.to_str()?)
    };
    Some(descriptors.filter_map(socket).collect())
}

#[cfg(not(target_os = "linux"))]
pub fn held() -> Option<Vec<SocketId>> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_socket_counts_until_it_is_closed_and_others_do_not() {
        let ours = std::net::TcpListener::bind("127.0.0.1:0").expect("socket");
        let _other = std::net::TcpListener::bind("127.0.0.1:0").expect("socket");
        let mut known = KnownSockets::default();
        known.add(SocketId::of(&ours).expect("its number"));
        assert_eq!(held().map(|held| known.count(&held)), Some(1));
        drop(ours);
        assert_eq!(held().map(|held| known.count(&held)), Some(0));
    }
}
