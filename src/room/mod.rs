//! The LiveKit side. Knows nothing of STT protocols.

pub mod api;
pub mod claims;
pub mod departure;
pub mod reconcile;
pub mod selection;
mod signalling;
pub mod supervisor;
