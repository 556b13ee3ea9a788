//! The receiving side of streams: who may be read, and how much of it between two polls.
//!
//! What is not read stays in quinn-proto, and the peer gets no more credit for it: that is how a
//! reader who does not keep up holds back the sender.

use std::collections::{HashMap, HashSet};

use quinn_proto::{Connection, ReadError, StreamId, VarInt};

use crate::connection::{Event, Outbox};

/// What one stream may hand to the caller between two polls, and the most of one event.
pub const TURN_BYTES: usize = 256 * 1024;

/// Connection-level flow control, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Of one stream.
    pub stream: u64,
    /// Of all streams of a connection.
    pub connection: u64,
    /// What the latter grows by, at most, for paused streams.
    pub paused: u64,
}

/// Which streams of a connection are paused, and which have more than a turn took.
#[derive(Debug)]
pub struct StreamReaders {
    windows: Windows,
    /// What the connection's window has grown by for paused streams.
    extension: u64,
    /// With each, whether the peer has sent something meanwhile.
    paused: HashMap<StreamId, bool>,
    /// How many of them are true.
    holding: u64,
    /// Streams that may have something to read in the next turn.
    unread: HashSet<StreamId>,
    /// The same in their order, and those that were taken out of it again.
    order: Vec<StreamId>,
}

impl StreamReaders {
    pub fn new(windows: Windows) -> Self {
        Self {
            windows,
            extension: 0,
            paused: HashMap::new(),
            holding: 0,
            unread: HashSet::new(),
            order: Vec::new(),
        }
    }

    /// The peer may have this much under way or unread, of all streams together; it only grows.
    pub fn widen(&mut self, quic: &mut Connection, window: u64) {
        if window > self.windows.connection {
            self.windows.connection = window;
            self.set_window(quic);
        }
    }

    /// Read no more of a stream until it is resumed.
    pub fn pause(&mut self, quic: &mut Connection, id: StreamId) {
        if self.paused.contains_key(&id) {
            return;
        }
        self.paused.insert(id, false);
        if self.unread.remove(&id) {
            self.hold(quic, id);
        }
    }

    /// Go on with a stream; what was held is read in the next turns.
    pub fn resume(&mut self, id: StreamId, number: u64, out: &mut Outbox) {
        if let Some(is_holding) = self.paused.remove(&id) {
            self.holding -= u64::from(is_holding);
            self.add(id, number, out);
        }
    }

    /// Something arrived on a stream. It is read in the next turn, with all that arrives until then:
    /// packets of many streams may come by turns, and each event costs the caller as much as some
    /// kilobytes.
    pub fn see(&mut self, quic: &mut Connection, id: StreamId, number: u64, out: &mut Outbox) {
        if self.paused.contains_key(&id) {
            self.see_while_paused(quic, id, number, out);
        } else {
            self.add(id, number, out);
        }
    }

    fn add(&mut self, id: StreamId, number: u64, out: &mut Outbox) {
        if self.unread.is_empty() {
            out.unread.push(number);
        }
        if self.unread.insert(id) {
            self.order.push(id);
        }
    }

    /// A new turn: read what has arrived.
    pub fn read_on(&mut self, quic: &mut Connection, number: u64, out: &mut Outbox) {
        // both, so that the first that is put back asks for the next turn
        let mut unread = std::mem::take(&mut self.unread);
        for id in std::mem::take(&mut self.order) {
            if !unread.remove(&id) {
                continue;
            }
            match read_some(quic, id, number, TURN_BYTES, out) {
                End::Unread => self.add(id, number, out),
                End::Blocked => {}
                End::Gone => self.forget(id),
            }
        }
    }

    /// The connection is about to end: read everything that is not paused.
    pub fn read_all(&mut self, quic: &mut Connection, number: u64, out: &mut Outbox) {
        for id in std::mem::take(&mut self.order) {
            if self.unread.remove(&id) {
                read_some(quic, id, number, usize::MAX, out);
            }
        }
    }

    /// We read no more of a stream, or the stream is gone.
    pub fn forget(&mut self, id: StreamId) {
        if self.paused.remove(&id) == Some(true) {
            self.holding -= 1;
        }
        self.unread.remove(&id);
    }

    /// The connection is gone.
    pub fn clear(&mut self) {
        self.paused.clear();
        self.unread.clear();
        self.order.clear();
        self.holding = 0;
    }

    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.paused.is_empty() && self.unread.is_empty() && self.holding == 0
    }

    /// Only a reset is reported of a paused stream.
    fn see_while_paused(
        &mut self,
        quic: &mut Connection,
        id: StreamId,
        number: u64,
        out: &mut Outbox,
    ) {
        match quic.recv_stream(id).received_reset() {
            Ok(Some(error_code)) => {
                out.events.push_back(reset_event(number, id, error_code));
                self.forget(id);
            }
            Ok(None) => self.hold(quic, id),
            Err(_) => self.forget(id),
        }
    }

    /// A paused stream has something unread: it must not take its room from the other streams.
    fn hold(&mut self, quic: &mut Connection, id: StreamId) {
        let Some(is_holding) = self.paused.get_mut(&id) else {
            return;
        };
        if !std::mem::replace(is_holding, true) {
            self.holding += 1;
            let wanted = self.holding.saturating_mul(self.windows.stream);
            let extension = wanted.min(self.windows.paused);
            // it is not taken back: a stream that was paused once will be again
            if extension > self.extension {
                self.extension = extension;
                self.set_window(quic);
            }
        }
    }

    fn set_window(&self, quic: &mut Connection) {
        let window = self.windows.connection.saturating_add(self.extension);
        quic.set_receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX));
    }
}

/// How reading a stream ended.
enum End {
    /// There may be more.
    Unread,
    /// There is no more now.
    Blocked,
    /// There will be no more.
    Gone,
}

/// Report at most `room` bytes of a stream, in events of a turn's size.
fn read_some(
    quic: &mut Connection,
    id: StreamId,
    number: u64,
    room: usize,
    out: &mut Outbox,
) -> End {
    let mut quic_stream = quic.recv_stream(id);
    let Ok(mut chunks) = quic_stream.read(true) else {
        return End::Gone;
    };
    let stream = u64::from(id);
    let mut data = Vec::new();
    let mut bytes = 0;
    let (end, is_ended, reset) = loop {
        if bytes == room {
            break (End::Unread, false, None);
        }
        match chunks.next((room - bytes).min(TURN_BYTES - data.len())) {
            Ok(Some(chunk)) => {
                bytes += chunk.bytes.len();
                data.extend_from_slice(&chunk.bytes);
                if data.len() == TURN_BYTES {
                    out.events.push_back(Event::StreamData {
                        connection: number,
                        stream,
                        data: std::mem::take(&mut data),
                        is_ended: false,
                    });
                }
            }
            Ok(None) => break (End::Gone, true, None),
            Err(ReadError::Blocked) => break (End::Blocked, false, None),
            Err(ReadError::Reset(error_code)) => break (End::Gone, false, Some(error_code)),
        }
    };
    if is_ended || !data.is_empty() {
        out.events.push_back(Event::StreamData {
            connection: number,
            stream,
            data,
            is_ended,
        });
    }
    if let Some(error_code) = reset {
        out.events.push_back(reset_event(number, id, error_code));
    }
    // what this says (send now?) is asked of every connection that received something
    let _ = chunks.finalize();
    end
}

fn reset_event(number: u64, id: StreamId, error_code: VarInt) -> Event {
    Event::StreamReset {
        connection: number,
        stream: id.into(),
        error_code: error_code.into_inner(),
    }
}
