//! The provider side: one websocket per stream. Knows nothing of rooms.

pub mod connect;
pub mod dialect;
pub mod gate;
pub mod machine;
pub mod stream;
