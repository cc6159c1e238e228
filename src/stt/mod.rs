//! The provider side: one Deepgram-style websocket per stream. Knows nothing of rooms.

pub mod connect;
pub mod gate;
pub mod machine;
pub mod stream;
