//! The sending side of streams: what quinn-proto does not take yet waits here, bounded by the
//! caller, and goes on in turns.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use quinn_proto::{Connection, Dir, Side, StreamId, VarInt};

/// What quinn-proto may hold of the data of all streams, sent or not: at first, and at least.
pub const MIN_SEND_WINDOW_BYTES: u64 = 64 * 1024;
/// And at most.
const MAX_SEND_WINDOW_BYTES: u64 = 16 << 20;
/// In congestion windows: one is on its way, one is on its way back as acknowledgements, and the
/// rest waits behind a lost packet until it was sent again.
const SEND_WINDOW_FACTOR: u64 = 4;
/// What one stream may hand on before the next has its turn.
const TURN_BYTES: usize = 16 * 1024;

/// Which streams there are: those that we opened and those that the peer opened.
#[derive(Debug)]
pub struct KnownStreams {
    side: Side,
    ours: [u64; 2],
    theirs: [u64; 2],
}

impl KnownStreams {
    pub fn new(side: Side) -> Self {
        Self {
            side,
            ours: [0; 2],
            theirs: [0; 2],
        }
    }

    /// Either end opened `id`, and with it all of its kind before it.
    pub fn add(&mut self, id: StreamId) {
        let counts = if id.initiator() == self.side {
            &mut self.ours
        } else {
            &mut self.theirs
        };
        let count = &mut counts[id.dir() as usize];
        *count = (*count).max(id.index() + 1);
    }

    /// The stream with this number if it has a side that we send on.
    pub fn sendable(&self, number: u64) -> Option<StreamId> {
        self.find(number)
            .filter(|id| id.dir() == Dir::Bi || id.initiator() == self.side)
    }

    /// The stream with this number if it has a side that we receive on.
    pub fn receivable(&self, number: u64) -> Option<StreamId> {
        self.find(number)
            .filter(|id| id.dir() == Dir::Bi || id.initiator() != self.side)
    }

    fn find(&self, number: u64) -> Option<StreamId> {
        let id = StreamId::from(VarInt::from_u64(number).ok()?);
        let counts = if id.initiator() == self.side {
            &self.ours
        } else {
            &self.theirs
        };
        (id.index() < counts[id.dir() as usize]).then_some(id)
    }
}

/// Bytes that wait for flow or congestion control, per stream.
#[derive(Debug, Default)]
pub struct StreamWriters {
    waiting: HashMap<StreamId, Writer>,
    turns: VecDeque<StreamId>,
}

#[derive(Debug, Default)]
struct Writer {
    chunks: VecDeque<Bytes>,
    bytes: usize,
    is_ended: bool,
}

enum Turn {
    /// Bytes were handed on; more wait.
    Moved,
    /// Nothing more can be handed on now.
    Blocked,
    /// All is handed on, or the stream is gone.
    Done,
}

impl StreamWriters {
    /// Queue bytes on a stream that we send on; `is_ended` says that they are the last.
    pub fn write(&mut self, quic: &mut Connection, id: StreamId, data: &[u8], is_ended: bool) {
        if let Some(writer) = self.waiting.get_mut(&id) {
            writer.append(data, is_ended);
            return;
        }
        set_send_window(quic);
        let taken = if data.is_empty() {
            0
        } else {
            match quic.send_stream(id).write(data) {
                Ok(taken) => taken,
                Err(quinn_proto::WriteError::Blocked) => 0,
                Err(_) => return,
            }
        };
        if taken < data.len() {
            let mut writer = Writer::default();
            writer.append(&data[taken..], is_ended);
            self.waiting.insert(id, writer);
            self.turns.push_back(id);
        } else if is_ended {
            // an error means that the stream is gone, and its event is on the way
            let _ = quic.send_stream(id).finish();
        }
    }

    /// Hand on what flow and congestion control allow now.
    pub fn flush(&mut self, quic: &mut Connection) {
        if self.turns.is_empty() {
            return;
        }
        set_send_window(quic);
        let mut blocked = 0;
        while blocked < self.turns.len() {
            let Some(id) = self.turns.pop_front() else {
                break;
            };
            let turn = self
                .waiting
                .get_mut(&id)
                .map_or(Turn::Done, |writer| writer.flush(quic, id));
            match turn {
                Turn::Moved => {
                    self.turns.push_back(id);
                    blocked = 0;
                }
                Turn::Blocked => {
                    self.turns.push_back(id);
                    blocked += 1;
                }
                Turn::Done => {
                    self.waiting.remove(&id);
                }
            }
        }
    }

    /// Bytes that wait on a stream.
    pub fn backlog_bytes(&self, id: StreamId) -> usize {
        self.waiting.get(&id).map_or(0, |writer| writer.bytes)
    }

    /// The stream was reset: forget what waits.
    pub fn forget(&mut self, id: StreamId) {
        if self.waiting.remove(&id).is_some() {
            self.turns.retain(|&each| each != id);
        }
    }

    /// The connection is gone.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.turns.clear();
    }
}

impl Writer {
    fn append(&mut self, data: &[u8], is_ended: bool) {
        if self.is_ended {
            return;
        }
        if !data.is_empty() {
            self.chunks.push_back(Bytes::copy_from_slice(data));
            self.bytes += data.len();
        }
        self.is_ended = is_ended;
    }

    fn flush(&mut self, quic: &mut Connection, id: StreamId) -> Turn {
        let mut moved = 0;
        while let Some(chunk) = self.chunks.front_mut() {
            if moved >= TURN_BYTES {
                return Turn::Moved;
            }
            let piece = chunk.slice(..chunk.len().min(TURN_BYTES));
            let taken = match quic.send_stream(id).write_chunks(&mut [piece]) {
                Ok(written) => written.bytes,
                Err(quinn_proto::WriteError::Blocked) => 0,
                Err(_) => return Turn::Done,
            };
            if taken == 0 {
                return if moved > 0 {
                    Turn::Moved
                } else {
                    Turn::Blocked
                };
            }
            moved += taken;
            self.bytes -= taken;
            if taken == chunk.len() {
                self.chunks.pop_front();
            } else {
                *chunk = chunk.slice(taken..);
            }
        }
        if self.is_ended {
            let _ = quic.send_stream(id).finish();
        }
        Turn::Done
    }
}

/// quinn-proto cannot be asked how much it holds unsent, so it is given little more than what may
/// be on its way: the rest stays here, where the caller can see it.
fn set_send_window(quic: &mut Connection) {
    let window = quic.congestion_state().window();
    quic.set_send_window(
        window
            .saturating_mul(SEND_WINDOW_FACTOR)
            .clamp(MIN_SEND_WINDOW_BYTES, MAX_SEND_WINDOW_BYTES),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_opened_streams_are_known() {
        let mut known = KnownStreams::new(Side::Client);
        for number in 0..16 {
            assert_eq!(known.sendable(number), None);
            assert_eq!(known.receivable(number), None);
        }
        known.add(StreamId::new(Side::Client, Dir::Bi, 1));
        assert!(known.sendable(0).is_some() && known.receivable(4).is_some());
        assert_eq!(known.sendable(8), None);
        assert_eq!(known.sendable(1 << 62), None);
        assert_eq!(known.sendable(u64::MAX), None);
    }

    #[test]
    fn one_way_streams_have_one_side() {
        let mut known = KnownStreams::new(Side::Server);
        known.add(StreamId::new(Side::Server, Dir::Uni, 0));
        known.add(StreamId::new(Side::Client, Dir::Uni, 0));
        known.add(StreamId::new(Side::Client, Dir::Bi, 0));
        assert!(known.sendable(3).is_some() && known.receivable(3).is_none());
        assert!(known.sendable(2).is_none() && known.receivable(2).is_some());
        assert!(known.sendable(0).is_some() && known.receivable(0).is_some());
    }
}
