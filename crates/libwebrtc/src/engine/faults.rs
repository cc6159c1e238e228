//! What the network brings that makes no sense: counted, and told once per kind, so that a flood of
//! it does not become a flood of logs.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A datagram that is neither STUN, DTLS nor RTP.
    Datagram,
    /// A datagram that the stack refused.
    Refused,
    /// RTP of no source that was told of, that came before, or that is damaged.
    Packet,
    /// A data channel too many.
    Channel,
    /// A stream that lost its framing.
    Frame,
    /// A frame that found the queue of its stream full.
    Full,
    /// Not what a STUN server answers.
    Stun,
    /// Not what a TURN server sends.
    Turn,
    /// A datagram that the operating system did not take.
    Unsent,
}

#[derive(Debug, Default)]
pub(super) struct Faults([u64; Fault::Unsent as usize + 1]);

impl Faults {
    pub(super) fn note(&mut self, fault: Fault, detail: impl fmt::Display) {
        let count = &mut self.0[fault as usize];
        *count += 1;
        let level = match (*count, fault) {
            // Nothing special on a busy or a changing network, or while tracks come and go.
            (1, Fault::Packet | Fault::Full | Fault::Unsent) => log::Level::Debug,
            (1, _) => log::Level::Info,
            _ => log::Level::Trace,
        };
        log::log!(level, "network: {fault:?} {count}: {detail}");
    }

    #[cfg(test)]
    pub(super) fn count(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_apart() {
        let mut faults = Faults::default();
        faults.note(Fault::Datagram, "");
        faults.note(Fault::Unsent, "");
        faults.note(Fault::Unsent, "");
        assert_eq!(faults.count(Fault::Datagram), 1);
        assert_eq!(faults.count(Fault::Unsent), 2);
        assert_eq!(faults.count(Fault::Turn), 0);
    }
}
