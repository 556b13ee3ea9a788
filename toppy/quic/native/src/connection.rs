//! One connection: what quinn-proto reports of it, made into events, groups and counters.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::{
    ConnectionHandle, ConnectionId, Dir, Event as QuicEvent, SendDatagramError, StreamEvent,
    StreamId, VarInt,
};
use rustls::pki_types::CertificateDer;

use crate::arrived::Arrived;
use crate::datagram_queue::DatagramQueue;
use crate::drops::{DropReason, Drops};
use crate::ending::{Ending, sendable};
use crate::http_datagram::{Prefix, parse};
use crate::reading::{StreamReaders, Windows};
use crate::settings::DATAGRAM_BUFFER_BYTES;
use crate::streams::{KnownStreams, StreamWriters};

/// RFC 9297 section 5.2.
const H3_DATAGRAM_ERROR: u32 = 0x33;
/// The only protocol here whose DATAGRAM frames are HTTP Datagrams.
const H3_ALPN: &[u8] = b"h3";
/// Segments of one GSO send.
const MAX_SEGMENTS: usize = 60;
/// Bytes of one GSO send.
const MAX_TRANSMIT_BYTES: usize = 65_000;
/// What quinn-proto counts for each datagram that it holds, beside its content.
const HELD_OVERHEAD_BYTES: usize = size_of::<quinn_proto::Datagram>();
/// Transmits below this get memory of their own size.
pub const SMALL_TRANSMIT_BYTES: usize = 4096;
/// Datagrams that are handed on at once: three quarters of a transmit, the rest is for streams.
const MAX_PORTION_BYTES: usize = 48_000;

/// What the caller is told, in order per connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Accepted {
        connection: u64,
        source: SocketAddr,
    },
    HandshakeCompleted {
        connection: u64,
        alpn_protocol: String,
    },
    StreamData {
        connection: u64,
        stream: u64,
        data: Vec<u8>,
        is_ended: bool,
    },
    StreamReset {
        connection: u64,
        stream: u64,
        error_code: u64,
    },
    StopSending {
        connection: u64,
        stream: u64,
        error_code: u64,
    },
    StreamWritable {
        connection: u64,
        stream: u64,
    },
    StreamsAvailable {
        connection: u64,
    },
    Closed {
        connection: u64,
        ending: Ending,
    },
}

/// Where connections put what they have for the caller.
#[derive(Debug, Default)]
pub struct Outbox {
    pub events: VecDeque<Event>,
    pub arrived: Arrived,
    pub drops: Drops,
    /// Connections with streams to read in the next poll, some of them twice.
    pub unread: Vec<u64>,
}

/// UDP datagrams for one destination; `segment_bytes` is 0 for a single one.
#[derive(Debug)]
pub struct Transmit {
    pub data: Vec<u8>,
    pub segment_bytes: usize,
    pub destination: SocketAddr,
}

/// Bounds of the outgoing datagrams that wait, in bytes, and of the peer's streams and their bytes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub tunnel: usize,
    pub connection: usize,
    /// Bidirectional ones that the peer may have open at once.
    pub streams: VarInt,
    pub windows: Windows,
}

/// A client of which nothing is known but its first packet.
#[derive(Debug)]
pub struct Unproved {
    /// The UDP payload of its first packet.
    pub first_bytes: usize,
    /// The ID that it chose for us.
    pub initial_id: ConnectionId,
}

/// A connection and what surrounds it. `number` is the caller's name for it.
pub struct Connection {
    pub number: u64,
    pub handle: ConnectionHandle,
    pub quic: quinn_proto::Connection,
    /// When the endpoint's timers expect it.
    pub deadline: Option<Instant>,
    /// It is in the endpoint's list of connections that may have something to send.
    pub is_dirty: bool,
    /// quinn-proto panicked on it; it is only good for removal.
    pub is_broken: bool,
    is_ready: bool,
    is_closed: bool,
    carries_http: bool,
    known: KnownStreams,
    writers: StreamWriters,
    readers: StreamReaders,
    queue: DatagramQueue,
    unproved: Option<Unproved>,
    most_streams: VarInt,
    /// The caller found no free stream.
    wants_stream: bool,
    /// Datagrams that quinn-proto took, less those that it dropped and that were counted.
    handed_on: u64,
    mtu: u16,
    /// The MTU shrank: quinn-proto may have dropped datagrams that no longer fit.
    may_have_dropped: bool,
}

impl Connection {
    /// `unproved` is there for a client whose address may be forged.
    pub fn new(
        number: u64,
        handle: ConnectionHandle,
        quic: quinn_proto::Connection,
        bounds: Bounds,
        unproved: Option<Unproved>,
    ) -> Self {
        Self {
            number,
            handle,
            deadline: None,
            is_dirty: false,
            is_broken: false,
            is_ready: false,
            is_closed: false,
            carries_http: false,
            known: KnownStreams::new(quic.side()),
            writers: StreamWriters::default(),
            readers: StreamReaders::new(bounds.windows),
            queue: DatagramQueue::new(bounds.tunnel, bounds.connection),
            unproved,
            most_streams: bounds.streams,
            wants_stream: false,
            handed_on: 0,
            mtu: quic.current_mtu(),
            may_have_dropped: false,
            quic,
        }
    }

    /// Whether the caller was told that it is closed.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Whether packets that came from the peer's address answer packets that went there.
    pub fn has_proved_address(&self) -> bool {
        self.unproved.is_none()
    }

    /// A long-header packet to `id` arrived. Who uses an ID of ours has seen a packet of ours, so
    /// its address is not forged.
    pub fn see_destination(&mut self, id: &ConnectionId) {
        if self
            .unproved
            .as_ref()
            .is_some_and(|it| it.initial_id != *id)
        {
            self.unproved = None;
        }
    }

    /// Put everything that has happened into `outbox`, and hand on what streams have waiting.
    pub fn collect(&mut self, now: Instant, outbox: &mut Outbox) {
        while let Some(event) = self.quic.poll() {
            if self.is_closed {
                continue;
            }
            match event {
                QuicEvent::Connected => self.complete_handshake(outbox),
                QuicEvent::Stream(event) => self.handle_stream_event(event, outbox),
                QuicEvent::ConnectionLost { reason } => {
                    self.take_datagrams(now, outbox);
                    self.readers.read_all(&mut self.quic, self.number, outbox);
                    self.report_closed(Ending::from_error(&reason), outbox);
                }
                QuicEvent::HandshakeDataReady
                | QuicEvent::DatagramReceived
                | QuicEvent::DatagramsUnblocked => {}
            }
        }
        self.take_datagrams(now, outbox);
        if !self.is_closed {
            self.writers.flush(&mut self.quic);
            self.report_writable(outbox);
        }
    }

    /// Read the streams that have something, a turn each.
    pub fn read_on(&mut self, outbox: &mut Outbox) {
        if !self.is_closed {
            self.readers.read_on(&mut self.quic, self.number, outbox);
        }
    }

    /// Close with an application error code.
    pub fn close(&mut self, now: Instant, error_code: VarInt, reason: &str, outbox: &mut Outbox) {
        if self.is_closed {
            return;
        }
        let phrase = Bytes::copy_from_slice(sendable(reason).as_bytes());
        self.quic.close(now, error_code, phrase);
        self.report_closed(Ending::ours(error_code.into_inner(), reason), outbox);
    }

    /// Tell the caller, once, and forget what can no longer be sent.
    pub fn report_closed(&mut self, ending: Ending, outbox: &mut Outbox) {
        if self.is_closed {
            return;
        }
        self.is_closed = true;
        self.writers.clear();
        self.readers.clear();
        let unsent = self.queue.clear() + self.forget_held();
        outbox.drops.add(DropReason::UnknownStream, unsent);
        outbox.events.push_back(Event::Closed {
            connection: self.number,
            ending,
        });
    }

    /// A new stream; `None` while the peer allows no more.
    pub fn open_stream(&mut self, dir: Dir) -> Option<u64> {
        if self.is_closed {
            return None;
        }
        let Some(id) = self.quic.streams().open(dir) else {
            self.wants_stream |= dir == Dir::Bi;
            return None;
        };
        self.known.add(id);
        Some(id.into())
    }

    /// Queue bytes on a stream.
    pub fn send_stream(&mut self, stream: u64, data: &[u8], is_ended: bool) {
        if self.is_closed {
            return;
        }
        if let Some(id) = self.known.sendable(stream) {
            self.writers.write(&mut self.quic, id, data, is_ended);
        }
    }

    /// Bytes of a stream that wait outside of quinn-proto.
    pub fn stream_backlog_bytes(&self, stream: u64) -> usize {
        self.known
            .sendable(stream)
            .map_or(0, |id| self.writers.backlog_bytes(id))
    }

    /// Bytes of a tunnel's datagrams that wait outside of quinn-proto.
    pub fn datagram_backlog_bytes(&self, quarter_stream_id: u64) -> usize {
        self.queue.tunnel_bytes(quarter_stream_id)
    }

    /// Abandon our sending side.
    pub fn reset_stream(&mut self, stream: u64, error_code: VarInt) {
        if let Some(id) = self.known.sendable(stream) {
            self.reset(id, error_code);
        }
    }

    /// Tell the peer that we read no more.
    pub fn stop_stream(&mut self, stream: u64, error_code: VarInt) {
        if let Some(id) = self.known.receivable(stream) {
            self.readers.forget(id);
            // an error means that the stream has ended already
            let _ = self.quic.recv_stream(id).stop(error_code);
        }
    }

    /// Report nothing more of what arrives on a stream, and give the peer no more credit for it.
    pub fn pause_reading(&mut self, stream: u64) {
        if self.is_closed {
            return;
        }
        // a stream that has ended, or that we stopped, is not readable
        let Some(id) = self.known.receivable(stream) else {
            return;
        };
        if self.quic.recv_stream(id).read(true).is_ok() {
            self.readers.pause(&mut self.quic, id);
        }
    }

    /// Report what arrives on a stream again.
    pub fn resume_reading(&mut self, stream: u64, outbox: &mut Outbox) {
        if self.is_closed {
            return;
        }
        if let Some(id) = self.known.receivable(stream) {
            self.readers.resume(id, self.number, outbox);
        }
    }

    #[cfg(test)]
    pub fn readers_are_idle(&self) -> bool {
        self.readers.is_idle()
    }

    /// Say once, now or later, that less than `below` bytes of a stream wait.
    pub fn notify_writable(&mut self, stream: u64, below: usize, outbox: &mut Outbox) {
        if self.is_closed {
            return;
        }
        let Some(id) = self.known.sendable(stream) else {
            return;
        };
        if matches!(self.quic.send_stream(id).stopped(), Ok(None)) {
            self.writers.watch(id, below);
            self.report_writable(outbox);
        }
    }

    /// Let the peer have this much unread of all streams together; it only grows.
    pub fn widen(&mut self, window: u64) {
        if !self.is_closed {
            self.readers.widen(&mut self.quic, window);
        }
    }

    /// The chain that the peer has shown, the leaf first; empty before the handshake's end.
    pub fn peer_certificates(&self) -> Vec<CertificateDer<'static>> {
        if self.is_closed || self.quic.is_handshaking() {
            return Vec::new();
        }
        let identity = self.quic.crypto_session().peer_identity();
        identity
            .and_then(|chain| chain.downcast().ok())
            .map_or_else(Vec::new, |chain| *chain)
    }

    /// Whether the peer takes DATAGRAM frames.
    pub fn supports_datagrams(&mut self) -> bool {
        !self.is_closed && self.quic.datagrams().max_size().is_some()
    }

    /// The largest payload of a tunnel that fits a packet now.
    pub fn max_payload_bytes(&mut self, quarter_stream_id: u64) -> Option<usize> {
        if self.is_closed {
            return None;
        }
        let prefix = Prefix::new(quarter_stream_id)?;
        let frame = self.quic.datagrams().max_size()?;
        frame.checked_sub(prefix.as_bytes().len())
    }

    /// Queue payloads, `segment_bytes` long each, the last may be shorter; 0 means one payload.
    pub fn send_datagrams(
        &mut self,
        quarter_stream_id: u64,
        payloads: &[u8],
        segment_bytes: usize,
        drops: &mut Drops,
    ) {
        let count = segments(payloads.len(), segment_bytes);
        if self.is_closed {
            drops.add(DropReason::UnknownStream, count);
            return;
        }
        let (Some(prefix), Some(limit)) = (
            Prefix::new(quarter_stream_id),
            self.max_payload_bytes(quarter_stream_id),
        ) else {
            drops.add(DropReason::TooLarge, count);
            return;
        };
        let prefix = prefix.as_bytes();
        let step = if segment_bytes == 0 {
            payloads.len().max(1)
        } else {
            segment_bytes
        };
        // one piece of memory for the whole batch; each frame is a slice of it
        let mut memory = BytesMut::with_capacity(payloads.len() + count * prefix.len());
        let empty = payloads.is_empty().then_some(payloads);
        for payload in payloads.chunks(step).chain(empty) {
            if payload.len() > limit {
                drops.add(DropReason::TooLarge, 1);
                continue;
            }
            memory.extend_from_slice(prefix);
            memory.extend_from_slice(payload);
            let frame = memory.split().freeze();
            self.queue.push(quarter_stream_id, frame, drops);
        }
    }

    /// Everything that may be sent now, appended to `transmits`. `spare` has used buffers.
    pub fn transmit(
        &mut self,
        now: Instant,
        transmits: &mut Vec<Transmit>,
        spare: &mut Vec<Vec<u8>>,
        drops: &mut Drops,
    ) {
        let mut is_short = false;
        let mut is_probing = false;
        loop {
            // behind a short one nothing more can be sent, or streams have to be probed
            if !self.is_closed && !is_short {
                self.writers.flush(&mut self.quic);
            }
            if !self.queue.is_empty() && self.is_buffer_empty() {
                self.hand_on_datagrams(drops);
            }
            let mtu = usize::from(self.quic.current_mtu()).max(1);
            let mut most = (MAX_TRANSMIT_BYTES / mtu).clamp(1, MAX_SEGMENTS);
            if let Some(budget) = self.unproved_budget() {
                most = most.min(budget / mtu);
                if most == 0 {
                    break;
                }
            }
            let mut data = spare.pop().unwrap_or_default();
            data.clear();
            let held = self.held_datagram_bytes();
            let Some(transmit) = self.quic.poll_transmit(now, most, &mut data) else {
                spare.push(data);
                is_short = true;
                is_probing = !self.is_closed && !is_probing && self.writers.probe(&mut self.quic);
                if is_probing {
                    continue;
                }
                break;
            };
            let was_probing = std::mem::take(&mut is_probing);
            if was_probing {
                self.writers.see_empty();
            }
            let datagrams = held - self.held_datagram_bytes();
            let lost = self.quic.stats().path.lost_bytes;
            let size = transmit.size.saturating_sub(datagrams) as u64;
            self.writers.see_sent(size, lost);
            is_short = !was_probing && datagrams == 0 && transmit.size < (most - 1) * mtu;
            data.truncate(transmit.size);
            if data.len() < SMALL_TRANSMIT_BYTES {
                // quinn-proto made room for a whole batch: not for each of a thousand small answers
                let small = data.as_slice().to_vec();
                spare.push(std::mem::replace(&mut data, small));
            }
            transmits.push(Transmit {
                data,
                segment_bytes: transmit.segment_size.unwrap_or(0),
                destination: transmit.destination,
            });
        }
        self.count_dropped(drops);
    }

    /// Where the peer is now.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        (!self.is_closed).then(|| self.quic.remote_address())
    }

    /// Smoothed round-trip time in seconds; 0 while it is not known.
    pub fn round_trip_s(&self) -> f64 {
        if self.is_ready && !self.is_closed {
            self.quic.rtt().as_secs_f64()
        } else {
            0.0
        }
    }

    fn complete_handshake(&mut self, outbox: &mut Outbox) {
        let protocol = self
            .quic
            .crypto_session()
            .handshake_data()
            .and_then(|data| data.downcast::<HandshakeData>().ok())
            .and_then(|data| data.protocol)
            .unwrap_or_default();
        self.is_ready = true;
        self.unproved = None;
        self.carries_http = protocol == H3_ALPN;
        outbox.events.push_back(Event::HandshakeCompleted {
            connection: self.number,
            alpn_protocol: String::from_utf8_lossy(&protocol).into_owned(),
        });
    }

    fn handle_stream_event(&mut self, event: StreamEvent, outbox: &mut Outbox) {
        match event {
            StreamEvent::Opened { dir } => {
                while let Some(id) = self.quic.streams().accept(dir) {
                    self.known.add(id);
                    self.see_readable(id, outbox);
                }
                self.allow_more_streams();
            }
            StreamEvent::Readable { id } => self.see_readable(id, outbox),
            StreamEvent::Stopped { id, error_code } => {
                self.reset(id, error_code);
                outbox.events.push_back(Event::StopSending {
                    connection: self.number,
                    stream: id.into(),
                    error_code: error_code.into_inner(),
                });
            }
            StreamEvent::Available { dir: Dir::Bi } if self.wants_stream => {
                self.wants_stream = false;
                outbox.events.push_back(Event::StreamsAvailable {
                    connection: self.number,
                });
            }
            // writers are flushed after every collection
            StreamEvent::Writable { .. }
            | StreamEvent::Finished { .. }
            | StreamEvent::Available { .. } => {}
        }
    }

    /// Twice as many once half of those that the peer may open are open.
    fn allow_more_streams(&mut self) {
        let allowed = self.quic.max_concurrent_streams(Dir::Bi);
        let open = self.quic.streams().remote_open_streams(Dir::Bi);
        if allowed < self.most_streams.into_inner() && open * 2 > allowed {
            let more = VarInt::from_u64(allowed * 2).unwrap_or(VarInt::MAX);
            self.quic
                .set_max_concurrent_streams(Dir::Bi, more.min(self.most_streams));
        }
    }

    fn see_readable(&mut self, id: StreamId, outbox: &mut Outbox) {
        self.readers.see(&mut self.quic, id, self.number, outbox);
    }

    fn report_writable(&mut self, outbox: &mut Outbox) {
        for id in self.writers.take_writable() {
            outbox.events.push_back(Event::StreamWritable {
                connection: self.number,
                stream: id.into(),
            });
        }
    }

    fn reset(&mut self, id: StreamId, error_code: VarInt) {
        self.writers.forget(id);
        // an error means that the stream has ended already
        let _ = self.quic.send_stream(id).reset(error_code);
    }

    fn take_datagrams(&mut self, now: Instant, outbox: &mut Outbox) {
        while let Some(data) = self.quic.datagrams().recv() {
            if self.is_closed || !self.carries_http {
                outbox.drops.add(DropReason::UnknownStream, 1);
                continue;
            }
            match parse(&data) {
                Some(datagram) if datagram.context_id == 0 => {
                    outbox
                        .arrived
                        .add(self.number, datagram.quarter_stream_id, datagram.payload);
                }
                Some(_) => outbox.drops.add(DropReason::UnknownContext, 1),
                None => {
                    outbox.drops.add(DropReason::Malformed, 1);
                    let code = VarInt::from_u32(H3_DATAGRAM_ERROR);
                    self.close(now, code, "malformed HTTP Datagram", outbox);
                }
            }
        }
    }

    /// Give quinn-proto a portion of the datagrams that wait.
    ///
    /// quinn-proto sends datagrams before stream data, whatever streams have waiting. Because it
    /// gets the next portion only when it has sent the last, streams can use what one transmit, or
    /// the congestion window, has left then. And what waits here can still make room for newer ones.
    fn hand_on_datagrams(&mut self, drops: &mut Drops) {
        let window = self.quic.congestion_state().window() / 2;
        let portion =
            usize::try_from(window).map_or(MAX_PORTION_BYTES, |it| it.min(MAX_PORTION_BYTES));
        let mut bytes = 0;
        while bytes < portion {
            let Some(frame) = self.queue.pop() else { break };
            let cost = frame.len() + HELD_OVERHEAD_BYTES;
            match self.quic.datagrams().send(frame, false) {
                Ok(()) => {
                    self.handed_on += 1;
                    bytes += cost;
                }
                Err(SendDatagramError::Blocked(_)) => drops.add(DropReason::QueueFull, 1),
                Err(_) => drops.add(DropReason::TooLarge, 1),
            }
        }
    }

    /// What may still be sent to an address that may be forged: three times what came from there
    /// (RFC 9000 section 8.1). quinn-proto itself goes beyond it by a part of a packet.
    fn unproved_budget(&self) -> Option<usize> {
        let unproved = self.unproved.as_ref()?;
        let stats = self.quic.stats();
        let received = unproved.first_bytes as u64 + stats.udp_rx.bytes;
        let allowed = received.saturating_mul(3);
        usize::try_from(allowed.saturating_sub(stats.udp_tx.bytes)).ok()
    }

    /// Datagrams that quinn-proto dropped by itself, because a smaller MTU left them no room.
    fn count_dropped(&mut self, drops: &mut Drops) {
        let mtu = self.quic.current_mtu();
        self.may_have_dropped |= mtu < self.mtu;
        self.mtu = mtu;
        if self.may_have_dropped && self.is_buffer_empty() {
            self.may_have_dropped = false;
            let dropped = self.forget_held();
            drops.add(DropReason::TooLarge, dropped);
        }
    }

    /// How many datagrams quinn-proto took and did not send; they are accounted for from now on.
    fn forget_held(&mut self) -> usize {
        let sent = self.quic.stats().frame_tx.datagram;
        let held = self.handed_on.saturating_sub(sent);
        self.handed_on -= held;
        usize::try_from(held).unwrap_or(usize::MAX)
    }

    fn is_buffer_empty(&mut self) -> bool {
        self.held_datagram_bytes() == 0
    }

    /// What quinn-proto holds of datagrams, as it counts.
    fn held_datagram_bytes(&mut self) -> usize {
        let room = DATAGRAM_BUFFER_BYTES - HELD_OVERHEAD_BYTES;
        room.saturating_sub(self.quic.datagrams().send_buffer_space())
    }
}

fn segments(bytes: usize, segment_bytes: usize) -> usize {
    if segment_bytes == 0 || bytes == 0 {
        1
    } else {
        bytes.div_ceil(segment_bytes)
    }
}
