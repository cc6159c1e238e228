//! The TCP and TLS connections of one peer connection: to passive candidates of the peer, and to
//! relays.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::ClientConfig;
use str0m::Candidate;

use super::{
    faults::{Fault, Faults},
    framing::Framing,
    link::{Link, LinkEvent},
    servers::Server,
};

/// To the peer and to relays together.
const MAX_LINKS: usize = 8;

pub(super) enum Role {
    Peer(Dialled),
    Relay(Called),
}

/// A connection to a server.
pub(super) struct Called {
    pub server: Server,
    /// Our end, once it is open.
    pub local: Option<SocketAddr>,
    /// From before a restart of ICE, which comes when a network has changed: nobody may have noticed
    /// yet that it is dead.
    stale: bool,
}

/// What is gone: a candidate that stood on a connection, or our end of one to a server.
pub(super) enum Gone {
    Candidate(Candidate),
    Called(SocketAddr),
}

/// A connection to a passive candidate of the peer (RFC 6544).
pub(super) struct Dialled {
    pub to: SocketAddr,
    /// While it is open.
    pub candidate: Option<Candidate>,
    /// From before a restart of ICE: a server ties a connection to the credentials that it saw
    /// first on it. It is left to the server to end it, as it is in use until there is another.
    pub stale: bool,
}

#[derive(Default)]
pub(super) struct Links(Vec<(Link, Role)>);

impl Links {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Connects to a passive candidate, unless that is done or under way. False if there are too
    /// many connections.
    pub(super) fn dial(&mut self, to: SocketAddr) -> bool {
        let known = |(_, role): &(Link, Role)| match role {
            Role::Peer(dialled) => dialled.to == to && !dialled.stale,
            Role::Relay(_) => false,
        };
        if self.0.iter().any(known) {
            return true;
        }
        let link = Link::open(vec![to], Framing::Datagrams, None);
        self.add(
            link,
            Role::Peer(Dialled {
                to,
                candidate: None,
                stale: false,
            }),
        )
    }

    /// Connects to a server, by `tls` if given. False if there are too many connections.
    pub(super) fn call(
        &mut self,
        server: Server,
        addresses: Vec<SocketAddr>,
        tls: Option<Arc<ClientConfig>>,
    ) -> bool {
        let tls = tls.map(|config| (config, server.target.host.clone()));
        let link = Link::open(addresses, Framing::Turn, tls);
        let called = Called {
            server,
            local: None,
            stale: false,
        };
        self.add(link, Role::Relay(called))
    }

    fn add(&mut self, link: Link, role: Role) -> bool {
        let room = self.0.len() < MAX_LINKS;
        if room {
            self.0.push((link, role));
        }
        room
    }

    /// To that server, with whichever credentials.
    pub(super) fn leads_to(&self, url: &str) -> bool {
        let leads = |(_, role): &(Link, Role)| match role {
            Role::Peer(_) => false,
            Role::Relay(called) => called.server.url == url && !called.stale,
        };
        self.0.iter().any(leads)
    }

    /// A server is being connected to.
    pub(super) fn is_calling(&self) -> bool {
        let calling = |(link, role): &(Link, Role)| {
            matches!(role, Role::Relay(_)) && link.addresses().is_none()
        };
        self.0.iter().any(calling)
    }

    /// All that was sent has left.
    pub(super) fn is_idle(&self) -> bool {
        self.0.iter().all(|(link, _)| link.is_idle())
    }

    /// Queues a message on the connection between the two; drops it if the queue is full, or there
    /// is none.
    pub(super) fn send(
        &mut self,
        faults: &mut Faults,
        local: SocketAddr,
        remote: SocketAddr,
        message: &[u8],
    ) {
        let ends = Some((local, remote));
        if let Some((link, _)) = self.0.iter_mut().find(|(link, _)| link.addresses() == ends)
            && !link.send(message)
        {
            faults.note(Fault::Full, remote);
        }
    }

    pub(super) fn get_mut(&mut self, index: usize) -> (&mut Link, &mut Role) {
        let (link, role) = &mut self.0[index];
        (link, role)
    }

    pub(super) fn poll(&mut self, index: usize, cx: &mut Context<'_>) -> Poll<LinkEvent> {
        self.0[index].0.poll(cx)
    }

    /// Drops a connection.
    pub(super) fn remove(&mut self, index: usize) -> Role {
        self.0.swap_remove(index).1
    }

    /// Drops the connection from `local`.
    pub(super) fn remove_from(&mut self, local: SocketAddr) {
        let from = |(link, _): &(Link, Role)| link.addresses().is_some_and(|(own, _)| own == local);
        if let Some(at) = self.0.iter().position(from) {
            self.remove(at);
        }
    }

    /// ICE was restarted: what is from before the last one goes, what is from before this one is
    /// stale.
    pub(super) fn age(&mut self) -> Vec<Gone> {
        let stale = |role: &Role| match role {
            Role::Peer(dialled) => dialled.stale,
            Role::Relay(called) => called.stale,
        };
        let gone = self.hang_up(stale);
        for (_, role) in &mut self.0 {
            match role {
                Role::Peer(dialled) => dialled.stale = true,
                Role::Relay(called) => called.stale = true,
            }
        }
        gone
    }

    /// Drops connections.
    pub(super) fn hang_up(&mut self, which: impl Fn(&Role) -> bool) -> Vec<Gone> {
        let gone = self.0.extract_if(.., |(_, role)| which(role));
        gone.filter_map(|(_, role)| match role {
            Role::Peer(dialled) => dialled.candidate.map(Gone::Candidate),
            Role::Relay(called) => called.local.map(Gone::Called),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn connections_are_few_and_one_to_a_candidate() {
        let mut links = Links::default();
        for port in 1..20 {
            let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            for _ in 0..2 {
                assert_eq!(links.dial(to), usize::from(port) <= MAX_LINKS);
            }
            assert_eq!(links.len(), usize::from(port).min(MAX_LINKS));
        }
        links.age();
        assert_eq!(links.len(), MAX_LINKS);
        links.age();
        assert_eq!(links.len(), 0);
    }
}
