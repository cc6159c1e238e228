//! How our sockets look from outside: STUN Binding (RFC 8489) to the servers of the configuration,
//! sans-IO.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use turn_client_proto::types::stun::{
    attribute::XorMappedAddress,
    message::{BINDING, Message, MessageClass, MessageWriteVec, TransactionId},
    prelude::*,
};

/// Between the first request and the second; doubled each time (RFC 8489, 6.2.1).
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Answers after 7.5 s would come too late for a join.
const TRIES: u32 = 4;
/// Sockets times servers.
const MAX_QUERIES: usize = 32;

struct Query {
    base: SocketAddr,
    server: SocketAddr,
    url: String,
    request: Vec<u8>,
    id: TransactionId,
    tries: u32,
    next_at: Instant,
}

/// The questions that await their answers.
#[derive(Default)]
pub(super) struct Queries(Vec<Query>);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Not for us: of another protocol, or the remote peer's.
    Foreign,
    /// The server's, but useless.
    Senseless,
    Mapped {
        base: SocketAddr,
        mapped: SocketAddr,
    },
}

/// Given up.
pub(super) struct Unanswered {
    pub base: SocketAddr,
    pub url: String,
}

impl Queries {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks `server` how the socket at `base` looks.
    pub(super) fn ask(&mut self, now: Instant, base: SocketAddr, server: SocketAddr, url: &str) {
        let known = |query: &Query| query.base == base && query.server == server;
        if self.0.len() >= MAX_QUERIES || self.0.iter().any(known) {
            return;
        }
        let message = Message::builder_request(BINDING, MessageWriteVec::new());
        let id = message.transaction_id();
        self.0.push(Query {
            base,
            server,
            url: url.to_owned(),
            request: message.finish(),
            id,
            tries: 0,
            next_at: now,
        });
    }

    /// Forgets what was asked from a socket that is no more.
    pub(super) fn forget(&mut self, base: SocketAddr) {
        self.0.retain(|query| query.base != base);
    }

    /// Sends what is due, `send(base, server, bytes)`, and returns the first query that is given
    /// up; call again until there is none.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        mut send: impl FnMut(SocketAddr, SocketAddr, &[u8]),
    ) -> Option<Unanswered> {
        for query in &mut self.0 {
            if now >= query.next_at && query.tries < TRIES {
                send(query.base, query.server, &query.request);
                query.next_at = now + FIRST_WAIT * (1 << query.tries);
                query.tries += 1;
            }
        }
        let dead = |query: &Query| query.tries >= TRIES && now >= query.next_at;
        let query = self.0.swap_remove(self.0.iter().position(dead)?);
        Some(Unanswered {
            base: query.base,
            url: query.url,
        })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.iter().map(|query| query.next_at).min()
    }

    pub(super) fn receive(&mut self, source: SocketAddr, base: SocketAddr, bytes: &[u8]) -> Answer {
        let asked = |query: &&Query| query.server == source && query.base == base;
        if !self.0.iter().any(|query| asked(&query)) {
            return Answer::Foreign;
        }
        let Ok(message) = Message::from_bytes(bytes) else {
            return Answer::Foreign;
        };
        let id = message.transaction_id();
        let Some(at) = self.0.iter().position(|q| asked(&q) && q.id == id) else {
            return Answer::Foreign;
        };
        if !message.has_method(BINDING) || !message.has_class(MessageClass::Success) {
            return Answer::Senseless;
        }
        let Ok(mapped) = message.attribute::<XorMappedAddress>() else {
            return Answer::Senseless;
        };
        let mapped = mapped.addr(id);
        self.0.swap_remove(at);
        if mapped.is_ipv4() != base.is_ipv4() {
            return Answer::Senseless;
        }
        Answer::Mapped { base, mapped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn answer(request: &[u8], mapped: SocketAddr) -> Vec<u8> {
        let request = Message::from_bytes(request).unwrap();
        let mut message = Message::builder_success(&request, MessageWriteVec::new());
        let id = request.transaction_id();
        message
            .add_attribute(&XorMappedAddress::new(mapped, id))
            .unwrap();
        message.finish()
    }

    #[test]
    fn an_answer_counts_once_and_only_from_whom_was_asked() {
        let now = Instant::now();
        let (base, server, mapped) = (addr("10.0.0.1:5"), addr("1.1.1.1:6"), addr("2.2.2.2:7"));
        let mut queries = Queries::default();
        queries.ask(now, base, server, "stun:x");
        let mut request = Vec::new();
        let given_up = queries.poll(now, |from, to, bytes| {
            assert_eq!((from, to), (base, server));
            request = bytes.to_vec();
        });
        assert!(given_up.is_none());
        let good = answer(&request, mapped);
        assert_eq!(queries.receive(mapped, base, &good), Answer::Foreign);
        assert_eq!(queries.receive(server, server, &good), Answer::Foreign);
        assert_eq!(queries.receive(server, base, b"noise"), Answer::Foreign);
        let other = Message::builder_request(BINDING, MessageWriteVec::new()).finish();
        let forged = answer(&other, mapped);
        assert_eq!(queries.receive(server, base, &forged), Answer::Foreign);
        assert_eq!(queries.receive(server, base, &request), Answer::Senseless);
        assert_eq!(
            queries.receive(server, base, &good),
            Answer::Mapped { base, mapped }
        );
        assert_eq!(queries.receive(server, base, &good), Answer::Foreign);
        assert!(queries.is_empty());
    }

    #[test]
    fn a_silent_server_is_asked_four_times_and_then_given_up() {
        let start = Instant::now();
        let mut queries = Queries::default();
        queries.ask(start, addr("10.0.0.1:5"), addr("1.1.1.1:6"), "stun:x");
        let mut sent = Vec::new();
        let given_up = loop {
            let now = queries.deadline().unwrap();
            let given_up = queries.poll(now, |_, _, _| sent.push((now - start).as_millis()));
            if let Some(unanswered) = given_up {
                break (unanswered.url, now - start);
            }
        };
        assert_eq!(sent, [0, 500, 1500, 3500]);
        assert_eq!(given_up, ("stun:x".to_owned(), Duration::from_millis(7500)));
        assert_eq!(queries.deadline(), None);
    }

    #[test]
    fn damaged_answers_never_panic() {
        let now = Instant::now();
        let (base, server) = (addr("10.0.0.1:5"), addr("1.1.1.1:6"));
        let mut queries = Queries::default();
        queries.ask(now, base, server, "stun:x");
        let mut request = Vec::new();
        queries.poll(now, |_, _, bytes| request = bytes.to_vec());
        let good = answer(&request, addr("2.2.2.2:7"));
        for at in 0..good.len() {
            for bit in 0..8 {
                // The address itself may be anything.
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                queries.receive(server, base, &bad);
                queries.ask(now, base, server, "stun:x");
            }
            queries.receive(server, base, &good[..at]);
        }
    }
}
