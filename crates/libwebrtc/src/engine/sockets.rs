//! The UDP sockets of one peer connection, each bound to one local address.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket},
    task::Context,
};

use str0m::Candidate;
use tokio::net::UdpSocket;

use super::faults::{Fault, Faults};

/// More local addresses than this are not tried.
const MAX_SOCKETS: usize = 8;

pub(super) struct Socket {
    pub local: SocketAddr,
    socket: UdpSocket,
    /// Those that stand on it.
    pub candidates: Vec<Candidate>,
}

#[derive(Default)]
pub(super) struct Sockets(Vec<Socket>);

impl Sockets {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn locals(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().map(|socket| socket.local)
    }

    /// The address of the socket that is bound to this one, if there is one.
    pub(super) fn at(&self, ip: IpAddr) -> Option<SocketAddr> {
        self.locals().find(|local| local.ip() == ip)
    }

    /// Binds one more. Returns its address.
    pub(super) async fn open(&mut self, ip: IpAddr) -> io::Result<SocketAddr> {
        if self.0.len() >= MAX_SOCKETS {
            return Err(io::Error::other("too many local addresses"));
        }
        let socket = StdUdpSocket::bind((ip, 0))?;
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?;
        let socket = UdpSocket::from_std(socket)?;
        // At once true, but not known before: the first datagrams would be lost.
        socket.writable().await?;
        self.0.push(Socket {
            local,
            socket,
            candidates: Vec::new(),
        });
        Ok(local)
    }

    /// Takes out those whose address this machine has no more.
    pub(super) fn take_lost(&mut self) -> Vec<Socket> {
        let lost = |socket: &mut Socket| {
            StdUdpSocket::bind((socket.local.ip(), 0))
                .is_err_and(|err| err.kind() == io::ErrorKind::AddrNotAvailable)
        };
        self.0.extract_if(.., lost).collect()
    }

    /// Notes a candidate that stands on the socket at `base`. False if that is known, or there is no
    /// such socket.
    pub(super) fn add_candidate(&mut self, base: SocketAddr, candidate: &Candidate) -> bool {
        let socket = self.0.iter_mut().find(|socket| socket.local == base);
        let Some(Socket { candidates, .. }) = socket else {
            return false;
        };
        let new = !candidates.contains(candidate);
        if new {
            candidates.push(candidate.clone());
        }
        new
    }

    /// Takes out the candidates that are not to be kept.
    pub(super) fn retain_candidates(
        &mut self,
        keep: impl Fn(&Candidate) -> bool,
    ) -> Vec<Candidate> {
        let candidates = self.0.iter_mut().map(|socket| &mut socket.candidates);
        candidates
            .flat_map(|list| list.extract_if(.., |candidate| !keep(candidate)))
            .collect()
    }

    /// Sends at once or not at all, as UDP may. False if there is no such socket.
    pub(super) fn send(
        &self,
        faults: &mut Faults,
        local: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
    ) -> bool {
        let Some(Socket { socket, .. }) = self.0.iter().find(|socket| socket.local == local) else {
            return false;
        };
        if let Err(err) = socket.try_send_to(bytes, to) {
            let detail = format_args!("{} bytes to {to}: {err}", bytes.len());
            faults.note(Fault::Unsent, detail);
        }
        true
    }

    /// True if the socket may be readable; else it wakes the task when it is. An error shows, and
    /// is handled, when it is read.
    pub(super) fn is_ready(&self, index: usize, cx: &mut Context<'_>) -> bool {
        self.0[index].socket.poll_recv_ready(cx).is_ready()
    }

    /// Length, source and own address of a datagram, or None if none waits.
    pub(super) fn receive(
        &self,
        index: usize,
        buffer: &mut [u8],
    ) -> Option<(usize, SocketAddr, SocketAddr)> {
        let Socket { local, socket, .. } = self.0.get(index)?;
        loop {
            match socket.try_recv_from(buffer) {
                Ok((len, source)) => return Some((len, source, *local)),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return None,
                // An ICMP answer to something sent earlier; the next datagram may be fine.
                Err(err) => log::debug!("receiving on {local}: {err}"),
            }
        }
    }

    /// As if the machine had lost the address.
    #[cfg(test)]
    pub(super) fn lose(&mut self, local: SocketAddr) {
        let socket = self.0.iter_mut().find(|socket| socket.local == local);
        // Of a documentation range (RFC 5737).
        let other = std::net::Ipv4Addr::new(198, 51, 100, 7);
        socket.unwrap().local.set_ip(other.into());
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn sockets_are_few() {
        let mut sockets = Sockets::default();
        for last in 1..20 {
            let ip = Ipv4Addr::new(127, 0, 0, last).into();
            let opened = sockets.open(ip).await;
            assert_eq!(opened.is_ok(), usize::from(last) <= MAX_SOCKETS);
            assert_eq!(sockets.at(ip), opened.ok());
        }
        assert_eq!(sockets.len(), MAX_SOCKETS);
    }

    #[tokio::test]
    async fn what_has_no_socket_is_not_sent() {
        let mut sockets = Sockets::default();
        let local = sockets.open(Ipv4Addr::LOCALHOST.into()).await.unwrap();
        let other = SocketAddr::new(local.ip(), 1);
        let mut faults = Faults::default();
        assert!(sockets.send(&mut faults, local, local, b"x"));
        assert!(!sockets.send(&mut faults, other, local, b"x"));
        assert_eq!(faults.count(Fault::Unsent), 0);
        // Too long for a datagram.
        assert!(sockets.send(&mut faults, local, local, &[0; 70_000]));
        assert_eq!(faults.count(Fault::Unsent), 1);
    }
}
