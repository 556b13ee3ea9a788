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
/// What one stream may hand on before the next has its turn. A receiver has work for each stream in
/// each batch of packets, so it is much more than a packet.
const TURN_BYTES: usize = 32 * 1024;
/// What quinn-proto may hold unsent, as far as we know, beside the last turn; half a congestion
/// window between these. The most is what two transmits take.
const LEAST_UNSENT_BYTES: u64 = 16 * 1024;
const MOST_UNSENT_BYTES: u64 = 128 * 1024;
/// Of a stream that had nothing waiting, for its first turn: before what quinn-proto holds of all
/// the others.
const FRESH_PRIORITY: i32 = 1;
/// Less than a packet: see `StreamWriters::probe`.
const PROBE_BYTES: usize = 1024;

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
    /// Streams that had nothing waiting: they go before the others, once.
    fresh: VecDeque<StreamId>,
    /// The others, and those that have just been emptied, so that they are not fresh again at once.
    turns: VecDeque<StreamId>,
    /// Of the last turn. quinn-proto sends what has the highest priority, packet by packet in turn
    /// where it is the same: so each turn gets a lower one, and is sent as a whole.
    priority: i32,
    /// What quinn-proto holds unsent, more or less.
    unsent: u64,
    /// Bytes that the path had lost when `unsent` was last corrected for them.
    lost: u64,
    /// Streams whose caller waits until less than so many bytes wait.
    watched: HashMap<StreamId, usize>,
    /// Those that have come to it.
    writable: Vec<StreamId>,
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
    /// All is handed on.
    Done,
    /// The stream is gone.
    Gone,
}

impl StreamWriters {
    /// Queue bytes on a stream that we send on; `is_ended` says that they are the last.
    pub fn write(&mut self, quic: &mut Connection, id: StreamId, data: &[u8], is_ended: bool) {
        if let Some(writer) = self.waiting.get_mut(&id) {
            writer.append(data, is_ended);
            return;
        }
        let room = usize::try_from(set_windows(quic).saturating_sub(self.unsent));
        let first = &data[..data.len().min(room.unwrap_or(usize::MAX))];
        let taken = if first.is_empty() {
            0
        } else {
            let priority = self.next_priority();
            let mut stream = quic.send_stream(id);
            let _ = stream.set_priority(priority);
            match stream.write(first) {
                Ok(taken) => taken,
                Err(quinn_proto::WriteError::Blocked) => 0,
                Err(_) => return,
            }
        };
        self.unsent += taken as u64;
        if taken < data.len() {
            let mut writer = Writer::default();
            writer.append(&data[taken..], is_ended);
            self.waiting.insert(id, writer);
            if taken < TURN_BYTES {
                self.fresh.push_back(id);
            } else {
                self.turns.push_back(id);
            }
        } else if is_ended {
            // an error means that the stream is gone, and its event is on the way
            let _ = quic.send_stream(id).finish();
        }
    }

    /// Hand on what flow and congestion control allow now, and what quinn-proto needs.
    pub fn flush(&mut self, quic: &mut Connection) {
        if self.waiting.is_empty() {
            return;
        }
        let most = set_windows(quic);
        let mut blocked = 0;
        while self.unsent < most && blocked < self.fresh.len() + self.turns.len() {
            match self.take_turn(quic, TURN_BYTES) {
                Some(Turn::Blocked) => blocked += 1,
                Some(_) => blocked = 0,
                None => break,
            }
        }
    }

    /// The next stream's turn; `None`: there is none.
    fn take_turn(&mut self, quic: &mut Connection, most: usize) -> Option<Turn> {
        let is_fresh = !self.fresh.is_empty();
        let id = self.fresh.pop_front().or_else(|| self.turns.pop_front())?;
        let priority = if is_fresh {
            FRESH_PRIORITY
        } else {
            self.next_priority()
        };
        let (moved, turn) = self.waiting.get_mut(&id).map_or((0, Turn::Done), |writer| {
            // errors mean that the stream is gone
            let mut stream = quic.send_stream(id);
            let before = stream.priority().unwrap_or_default();
            let _ = stream.set_priority(priority);
            let (moved, turn) = writer.flush(quic, id, most);
            if moved == 0 {
                // it keeps its place: it may have something there
                let _ = quic.send_stream(id).set_priority(before);
            }
            (moved, turn)
        });
        self.unsent += moved as u64;
        let is_over = matches!(turn, Turn::Gone) || matches!(turn, Turn::Done) && !is_fresh;
        if is_over || self.turns.is_empty() && matches!(turn, Turn::Done) {
            self.waiting.remove(&id);
        } else {
            self.turns.push_back(id);
        }
        if !self.watched.is_empty() {
            self.check_watched(id);
        }
        Some(turn)
    }

    /// Behind all others. At the end of the range the rest share one, until quinn-proto has sent all.
    fn next_priority(&mut self) -> i32 {
        self.priority = self.priority.saturating_sub(1);
        self.priority
    }

    /// quinn-proto made a transmit; so many bytes of it were of streams, headers and all. `lost` is
    /// what the path has lost so far: it is sent again.
    pub fn see_sent(&mut self, bytes: u64, lost: u64) {
        // with headers for a sixteenth it is rather too little, and `probe` finds what is missing
        self.unsent += lost.saturating_sub(self.lost);
        self.unsent = self.unsent.saturating_sub(bytes - bytes / 16);
        self.lost = lost;
    }

    /// quinn-proto has nothing to send, or may not. Give it a little if more waits: if that can be
    /// sent (say so by `see_empty`), nothing was left there, and `unsent` has become wrong.
    pub fn probe(&mut self, quic: &mut Connection) -> bool {
        for _ in 0..self.fresh.len() + self.turns.len() {
            match self.take_turn(quic, PROBE_BYTES) {
                Some(Turn::Blocked) => {}
                Some(_) => return true,
                None => return false,
            }
        }
        false
    }

    /// What was given by `probe` could be sent.
    pub fn see_empty(&mut self) {
        self.unsent = 0;
        self.priority = 0;
    }

    /// Put a stream into `take_writable` once less than `below` bytes of it wait.
    pub fn watch(&mut self, id: StreamId, below: usize) {
        self.watched.insert(id, below);
        self.check_watched(id);
    }

    /// Watched streams that have little waiting; they are watched no more.
    pub fn take_writable(&mut self) -> Vec<StreamId> {
        std::mem::take(&mut self.writable)
    }

    fn check_watched(&mut self, id: StreamId) {
        if let Some(&below) = self.watched.get(&id) {
            if self.backlog_bytes(id) < below {
                self.watched.remove(&id);
                self.writable.push(id);
            }
        }
    }

    /// Bytes that wait on a stream.
    pub fn backlog_bytes(&self, id: StreamId) -> usize {
        self.waiting.get(&id).map_or(0, |writer| writer.bytes)
    }

    /// The stream was reset: forget what waits.
    pub fn forget(&mut self, id: StreamId) {
        self.watched.remove(&id);
        if self.waiting.remove(&id).is_some() {
            self.fresh.retain(|&each| each != id);
            self.turns.retain(|&each| each != id);
        }
    }

    /// The connection is gone.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.fresh.clear();
        self.turns.clear();
        self.watched.clear();
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

    /// Hand on `most` bytes or less; how many it were.
    fn flush(&mut self, quic: &mut Connection, id: StreamId, most: usize) -> (usize, Turn) {
        let mut moved = 0;
        while let Some(chunk) = self.chunks.front_mut() {
            if moved >= most {
                return (moved, Turn::Moved);
            }
            let piece = chunk.slice(..chunk.len().min(most - moved));
            let taken = match quic.send_stream(id).write_chunks(&mut [piece]) {
                Ok(written) => written.bytes,
                Err(quinn_proto::WriteError::Blocked) => 0,
                Err(_) => return (moved, Turn::Gone),
            };
            if taken == 0 {
                let turn = if moved > 0 {
                    Turn::Moved
                } else {
                    Turn::Blocked
                };
                return (moved, turn);
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
            // an error means that the stream is gone, and its event is on the way
            let _ = quic.send_stream(id).finish();
            return (moved, Turn::Gone);
        }
        (moved, Turn::Done)
    }
}

/// quinn-proto cannot be asked how much it holds unsent, so it is given little more than what may
/// be on its way: the rest stays here, where the caller can see it. Returns how much it may hold
/// unsent.
fn set_windows(quic: &mut Connection) -> u64 {
    let window = quic.congestion_state().window();
    quic.set_send_window(
        window
            .saturating_mul(SEND_WINDOW_FACTOR)
            .clamp(MIN_SEND_WINDOW_BYTES, MAX_SEND_WINDOW_BYTES),
    );
    (window / 2).clamp(LEAST_UNSENT_BYTES, MOST_UNSENT_BYTES)
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
    fn priorities_fall_until_they_cannot() {
        let mut writers = StreamWriters::default();
        assert_eq!([(); 3].map(|()| writers.next_priority()), [-1, -2, -3]);
        writers.priority = i32::MIN + 1;
        assert_eq!([(); 3].map(|()| writers.next_priority()), [i32::MIN; 3]);
        writers.see_empty();
        assert_eq!(writers.next_priority(), -1);
    }

    #[test]
    fn what_is_unsent_follows_what_was_sent_and_lost() {
        let mut writers = StreamWriters {
            unsent: 64_000,
            ..StreamWriters::default()
        };
        writers.see_sent(32_000, 0);
        assert_eq!(writers.unsent, 34_000);
        writers.see_sent(16_000, 1_000);
        assert_eq!(writers.unsent, 20_000);
        writers.see_sent(64_000, 1_000);
        assert_eq!(writers.unsent, 0);
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
