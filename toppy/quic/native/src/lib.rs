//! toppy's native QUIC engine: a thin binding of quinn-proto.
//!
//! `endpoint` is the engine: many connections behind one UDP port, sans-I/O, in batches. It knows
//! nothing of Python, so it is tested without. `python` (feature `python`) is the extension module
//! `toppy.quic._native` around it. Policy and I/O stay with the caller.

pub mod arrived;
pub mod clock;
pub mod connection;
pub mod connection_id;
pub mod datagram_queue;
pub mod delivery_rate;
pub mod drops;
pub mod ending;
pub mod endpoint;
pub mod http_datagram;
#[cfg(feature = "python")]
mod python;
pub mod reading;
pub mod settings;
pub mod streams;
pub mod tickets;
