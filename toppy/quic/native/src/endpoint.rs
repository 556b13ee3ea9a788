//! Many connections behind one UDP port: plain Rust, without Python.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, ConnectionHandle, ConnectionId, DatagramEvent, Dir, EndpointEvent, Incoming,
    VarInt,
};
use rustls::pki_types::CertificateDer;

use crate::arrived::Group;
use crate::clock::Clock;
use crate::connection::{
    Bounds, Connection, Event, Outbox, SMALL_TRANSMIT_BYTES, Transmit, Unproved,
};
use crate::connection_id::MAX_CONNECTION_ID_BYTES;
use crate::drops::DropReason;
use crate::ending::Ending;
use crate::reading::Windows;
use crate::settings::Settings;

/// Answers of the endpoint itself (Retry, Version Negotiation, resets) that may wait to be sent.
const MAX_ANSWERS: usize = 1024;
/// Transmit buffers that are kept for use again.
const MAX_SPARE_BUFFERS: usize = 64;
/// A timer that is due and brings nothing about is asked again so much later, not at once.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// What to do with a connection attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Accept,
    Retry,
    Refuse,
    Ignore,
}

/// The endpoint. Every call that takes time into account is told the time.
pub struct Endpoint {
    quic: quinn_proto::Endpoint,
    client: Option<ClientConfig>,
    bounds: Bounds,
    clock: Clock,
    /// By quinn-proto's handle, which is a small number that it uses again.
    connections: Vec<Option<Box<Connection>>>,
    handles: HashMap<u64, ConnectionHandle>,
    next_number: u64,
    /// Each with the length of its first packet.
    attempts: VecDeque<(Incoming, usize)>,
    outbox: Outbox,
    answers: VecDeque<Transmit>,
    dirty: Vec<ConnectionHandle>,
    touched: Vec<ConnectionHandle>,
    deadlines: BTreeSet<(Instant, u64)>,
    spare: Vec<Vec<u8>>,
}

impl Endpoint {
    /// An endpoint at time `now`; the error is a sentence that names the bad setting.
    pub fn new(settings: &Settings, now: f64) -> Result<Self, String> {
        let clock = Clock::new(now);
        let prepared = settings.prepare(clock.time_source())?;
        let bound = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Self {
            quic: quinn_proto::Endpoint::new(
                Arc::new(prepared.endpoint),
                prepared.server.map(Arc::new),
                true,
                None,
            ),
            client: prepared.client,
            bounds: Bounds {
                tunnel: bound(settings.tunnel_queue_bytes),
                connection: bound(settings.connection_queue_bytes),
                streams: settings.most_streams()?,
                windows: Windows {
                    stream: settings.stream_window_bytes,
                    connection: settings.connection_window_bytes,
                    paused: settings.paused_window_bytes,
                },
            },
            clock,
            connections: Vec::new(),
            handles: HashMap::new(),
            next_number: 1,
            attempts: VecDeque::new(),
            outbox: Outbox::default(),
            answers: VecDeque::new(),
            dirty: Vec::new(),
            touched: Vec::new(),
            deadlines: BTreeSet::new(),
            spare: Vec::new(),
        })
    }

    /// Begin a connection; the error says what is wrong with the arguments.
    pub fn connect(
        &mut self,
        address: SocketAddr,
        server_name: &str,
        now: f64,
    ) -> Result<u64, String> {
        let now = self.clock.advance(now);
        let config = self
            .client
            .clone()
            .ok_or("a server's engine opens no connections")?;
        let (handle, quic) = self
            .quic
            .connect(now, config, address, server_name)
            .map_err(|error| error.to_string())?;
        Ok(self.add(handle, quic, None))
    }

    /// Take UDP payloads, `segment_bytes` long each, the last may be shorter; 0 means one.
    pub fn receive(
        &mut self,
        mut buffer: BytesMut,
        segment_bytes: usize,
        source: SocketAddr,
        now: f64,
    ) {
        let now = self.clock.advance(now);
        let mut answer = Vec::new();
        while !buffer.is_empty() {
            let length = match segment_bytes {
                0 => buffer.len(),
                bytes => bytes.min(buffer.len()),
            };
            let data = buffer.split_to(length);
            answer.clear();
            let destination = long_header_destination(&data);
            match self.quic.handle(now, source, None, None, data, &mut answer) {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if let Some(Some(connection)) = self.connections.get_mut(handle.0) {
                        if self.touched.last() != Some(&handle) {
                            self.touched.push(handle);
                        }
                        if let Some(id) = destination {
                            connection.see_destination(&id);
                        }
                        guarded(connection, |it| it.quic.handle_event(event));
                    }
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    self.attempts.push_back((incoming, length));
                }
                Some(DatagramEvent::Response(transmit)) => self.answer(&transmit, &answer),
                None => {}
            }
        }
        let mut touched = std::mem::take(&mut self.touched);
        for handle in touched.drain(..) {
            self.process(handle);
        }
        self.touched = touched;
    }

    /// The connection attempt to decide on next: (source, whether a Retry token proved it).
    pub fn next_attempt(&self) -> Option<(SocketAddr, bool)> {
        let (incoming, _) = self.attempts.front()?;
        Some((
            incoming.remote_address(),
            incoming.remote_address_validated(),
        ))
    }

    /// Decide on the attempt that `next_attempt` showed.
    pub fn decide(&mut self, admission: Admission) {
        let Some((incoming, length)) = self.attempts.pop_front() else {
            return;
        };
        // a token does not carry the zone of a link-local address, so it would never be valid
        let may_retry = incoming.may_retry() && !has_zone(&incoming.remote_address());
        let mut answer = Vec::new();
        match admission {
            Admission::Retry if may_retry => match self.quic.retry(incoming, &mut answer) {
                Ok(transmit) => self.answer(&transmit, &answer),
                Err(error) => self.accept(error.into_incoming(), length),
            },
            Admission::Accept | Admission::Retry => self.accept(incoming, length),
            Admission::Refuse => {
                let transmit = self.quic.refuse(incoming, &mut answer);
                self.answer(&transmit, &answer);
            }
            Admission::Ignore => self.quic.ignore(incoming),
        }
    }

    /// Do what was due by `now`.
    pub fn handle_timeout(&mut self, now: f64) {
        let now = self.clock.advance(now);
        while let Some(&(deadline, number)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_first();
            let Some(&handle) = self.handles.get(&number) else {
                continue;
            };
            if let Some(Some(connection)) = self.connections.get_mut(handle.0) {
                connection.deadline = None;
                guarded(connection, |it| it.quic.handle_timeout(now));
            }
            self.process(handle);
        }
    }

    /// When `handle_timeout` is to be called, or the time itself when something waits to be polled.
    pub fn next_timeout(&self) -> Option<f64> {
        let is_waiting = !(self.outbox.events.is_empty()
            && self.outbox.unread.is_empty()
            && self.outbox.arrived.is_empty()
            && self.answers.is_empty()
            && self.dirty.is_empty());
        if is_waiting {
            return Some(self.clock.now_seconds());
        }
        let (deadline, _) = self.deadlines.first()?;
        Some(self.clock.seconds(*deadline))
    }

    /// What happened since the last call.
    pub fn poll_events(&mut self) -> VecDeque<Event> {
        for number in std::mem::take(&mut self.outbox.unread) {
            // `with` marks it: reading gives the peer credit, which has to be sent
            self.with(number, Connection::read_on);
        }
        std::mem::take(&mut self.outbox.events)
    }

    /// Payloads that arrived since the last call.
    pub fn poll_datagrams(&mut self) -> Vec<Group> {
        self.outbox.arrived.take()
    }

    /// UDP datagrams to send now. Give their buffers back with `recycle`.
    pub fn poll_transmits(&mut self, now: f64) -> Vec<Transmit> {
        let now = self.clock.advance(now);
        let mut transmits = Vec::from(std::mem::take(&mut self.answers));
        for handle in std::mem::take(&mut self.dirty) {
            let Some(Some(connection)) = self.connections.get_mut(handle.0) else {
                continue;
            };
            connection.is_dirty = false;
            let (spare, drops) = (&mut self.spare, &mut self.outbox.drops);
            guarded(connection, |it| {
                it.transmit(now, &mut transmits, spare, drops);
            });
            self.settle(handle);
            self.set_deadline(handle, now);
        }
        transmits
    }

    /// A transmit was sent: its buffer may be used again.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() >= SMALL_TRANSMIT_BYTES && self.spare.len() < MAX_SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }

    /// Counters since the last call.
    pub fn take_drops(&mut self) -> Vec<(&'static str, u64)> {
        self.outbox.drops.take()
    }

    /// See `Connection::open_stream`.
    pub fn open_stream(&mut self, connection: u64, dir: Dir) -> Option<u64> {
        self.find_mut(connection)?.open_stream(dir)
    }

    /// See `Connection::send_stream`.
    pub fn send_stream(&mut self, connection: u64, stream: u64, data: &[u8], is_ended: bool) {
        if let Some(it) = self.change(connection) {
            it.send_stream(stream, data, is_ended);
        }
    }

    /// See `Connection::stream_backlog_bytes`.
    pub fn stream_backlog_bytes(&self, connection: u64, stream: u64) -> usize {
        self.find(connection)
            .map_or(0, |it| it.stream_backlog_bytes(stream))
    }

    /// See `Connection::datagram_backlog_bytes`.
    pub fn datagram_backlog_bytes(&self, connection: u64, quarter_stream_id: u64) -> usize {
        self.find(connection)
            .map_or(0, |it| it.datagram_backlog_bytes(quarter_stream_id))
    }

    /// See `Connection::reset_stream`.
    pub fn reset_stream(&mut self, connection: u64, stream: u64, error_code: VarInt) {
        if let Some(it) = self.change(connection) {
            it.reset_stream(stream, error_code);
        }
    }

    /// See `Connection::stop_stream`.
    pub fn stop_stream(&mut self, connection: u64, stream: u64, error_code: VarInt) {
        if let Some(it) = self.change(connection) {
            it.stop_stream(stream, error_code);
        }
    }

    /// See `Connection::pause_reading`.
    pub fn pause_reading(&mut self, connection: u64, stream: u64) {
        if let Some(it) = self.change(connection) {
            it.pause_reading(stream);
        }
    }

    /// See `Connection::resume_reading`.
    pub fn resume_reading(&mut self, connection: u64, stream: u64) {
        self.with(connection, |it, outbox| it.resume_reading(stream, outbox));
    }

    /// See `Connection::notify_writable`.
    pub fn notify_writable(&mut self, connection: u64, stream: u64, below: usize) {
        self.with(connection, |it, outbox| {
            it.notify_writable(stream, below, outbox);
        });
    }

    /// See `Connection::widen`.
    pub fn widen_connection(&mut self, connection: u64, window: u64) {
        if let Some(it) = self.change(connection) {
            it.widen(window);
        }
    }

    /// See `Connection::peer_certificates`.
    pub fn peer_certificates(&self, connection: u64) -> Vec<CertificateDer<'static>> {
        self.find(connection)
            .map_or_else(Vec::new, Connection::peer_certificates)
    }

    /// See `Connection::supports_datagrams`.
    pub fn supports_datagrams(&mut self, connection: u64) -> bool {
        self.find_mut(connection)
            .is_some_and(Connection::supports_datagrams)
    }

    /// See `Connection::max_payload_bytes`.
    pub fn max_payload_bytes(&mut self, connection: u64, quarter_stream_id: u64) -> Option<usize> {
        self.find_mut(connection)?
            .max_payload_bytes(quarter_stream_id)
    }

    /// See `Connection::send_datagrams`.
    pub fn send_datagrams(
        &mut self,
        connection: u64,
        quarter_stream_id: u64,
        payloads: &[u8],
        segment_bytes: usize,
    ) {
        let mut drops = std::mem::take(&mut self.outbox.drops);
        match self.change(connection) {
            Some(it) => it.send_datagrams(quarter_stream_id, payloads, segment_bytes, &mut drops),
            None => drops.add(
                DropReason::UnknownStream,
                match (segment_bytes, payloads.len()) {
                    (0, _) | (_, 0) => 1,
                    (step, bytes) => bytes.div_ceil(step),
                },
            ),
        }
        self.outbox.drops = drops;
    }

    /// Close with an application error code.
    pub fn close(&mut self, connection: u64, error_code: VarInt, reason: &str, now: f64) {
        let now = self.clock.advance(now);
        let Some(&handle) = self.handles.get(&connection) else {
            return;
        };
        if let Some(Some(it)) = self.connections.get_mut(handle.0) {
            it.close(now, error_code, reason, &mut self.outbox);
        }
        self.process(handle);
    }

    /// See `Connection::peer_address`.
    pub fn peer_address(&self, connection: u64) -> Option<SocketAddr> {
        self.find(connection)?.peer_address()
    }

    /// See `Connection::round_trip_s`.
    pub fn round_trip_s(&self, connection: u64) -> f64 {
        self.find(connection).map_or(0.0, Connection::round_trip_s)
    }

    fn add(
        &mut self,
        handle: ConnectionHandle,
        quic: quinn_proto::Connection,
        unproved: Option<Unproved>,
    ) -> u64 {
        let number = self.take_number();
        if self.connections.len() <= handle.0 {
            self.connections.resize_with(handle.0 + 1, || None);
        }
        let connection = Connection::new(number, handle, quic, self.bounds, unproved);
        self.connections[handle.0] = Some(Box::new(connection));
        self.handles.insert(number, handle);
        self.mark_dirty(handle);
        number
    }

    fn take_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    fn accept(&mut self, incoming: Incoming, length: usize) {
        let source = incoming.remote_address();
        let unproved = (!incoming.remote_address_validated()).then(|| Unproved {
            first_bytes: length,
            initial_id: *incoming.orig_dst_cid(),
        });
        let now = self.clock.now();
        let mut answer = Vec::new();
        let accepted = catch_unwind(AssertUnwindSafe(|| {
            self.quic
                .accept(incoming, now, &mut answer, None)
                .map_err(Box::new)
        }));
        match accepted {
            Ok(Ok((handle, quic))) => {
                let connection = self.add(handle, quic, unproved);
                self.outbox
                    .events
                    .push_back(Event::Accepted { connection, source });
                self.process(handle);
            }
            Ok(Err(error)) => {
                // no answer means that the packet is not authentic: anybody can send such
                if let Some(transmit) = error.response {
                    self.answer(&transmit, &answer);
                    let connection = self.take_number();
                    let ending = Ending::from_error(&error.cause);
                    self.outbox
                        .events
                        .push_back(Event::Accepted { connection, source });
                    self.outbox
                        .events
                        .push_back(Event::Closed { connection, ending });
                }
            }
            // see `guarded`
            Err(_) => {}
        }
    }

    fn answer(&mut self, transmit: &quinn_proto::Transmit, data: &[u8]) {
        if self.answers.len() < MAX_ANSWERS {
            self.answers.push_back(Transmit {
                data: data[..transmit.size].to_vec(),
                segment_bytes: 0,
                destination: transmit.destination,
            });
        }
    }

    fn find(&self, number: u64) -> Option<&Connection> {
        let handle = self.handles.get(&number)?;
        self.connections.get(handle.0)?.as_deref()
    }

    fn find_mut(&mut self, number: u64) -> Option<&mut Connection> {
        let handle = self.handles.get(&number)?;
        self.connections.get_mut(handle.0)?.as_deref_mut()
    }

    /// Do something with a connection that may make events and something to send.
    fn with(&mut self, number: u64, action: impl FnOnce(&mut Connection, &mut Outbox)) {
        let Some(&handle) = self.handles.get(&number) else {
            return;
        };
        self.mark_dirty(handle);
        if let Some(Some(connection)) = self.connections.get_mut(handle.0) {
            action(connection, &mut self.outbox);
        }
    }

    /// A connection that is about to get something to send.
    fn change(&mut self, number: u64) -> Option<&mut Connection> {
        let handle = *self.handles.get(&number)?;
        self.mark_dirty(handle);
        self.connections.get_mut(handle.0)?.as_deref_mut()
    }

    fn mark_dirty(&mut self, handle: ConnectionHandle) {
        if let Some(Some(connection)) = self.connections.get_mut(handle.0) {
            if !connection.is_dirty {
                connection.is_dirty = true;
                self.dirty.push(handle);
            }
        }
    }

    /// Something happened to a connection: collect it, and let it send.
    fn process(&mut self, handle: ConnectionHandle) {
        self.mark_dirty(handle);
        self.settle(handle);
    }

    /// Exchange what connection and endpoint have for each other, collect events, and remove the
    /// connection when that was its end.
    fn settle(&mut self, handle: ConnectionHandle) {
        let now = self.clock.now();
        let Some(Some(connection)) = self.connections.get_mut(handle.0) else {
            return;
        };
        let mut is_drained = false;
        while let Some(event) = connection.quic.poll_endpoint_events() {
            is_drained |= event.is_drained();
            if let Some(event) = self.quic.handle_event(handle, event) {
                guarded(connection, |it| it.quic.handle_event(event));
            }
        }
        let outbox = &mut self.outbox;
        guarded(connection, |it| it.collect(now, outbox));
        if connection.is_broken && !is_drained {
            self.quic.handle_event(handle, EndpointEvent::drained());
        }
        if is_drained || connection.is_broken {
            connection.report_closed(Ending::internal(), &mut self.outbox);
            self.remove(handle);
        }
    }

    fn remove(&mut self, handle: ConnectionHandle) {
        if let Some(connection) = self.connections[handle.0].take() {
            self.handles.remove(&connection.number);
            if let Some(deadline) = connection.deadline {
                self.deadlines.remove(&(deadline, connection.number));
            }
        }
    }

    fn set_deadline(&mut self, handle: ConnectionHandle, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(handle.0) else {
            return;
        };
        let deadline = connection
            .quic
            .poll_timeout()
            .map(|at| if at <= now { now + MIN_WAIT } else { at });
        if deadline == connection.deadline {
            return;
        }
        if let Some(old) = connection.deadline {
            self.deadlines.remove(&(old, connection.number));
        }
        if let Some(new) = deadline {
            self.deadlines.insert((new, connection.number));
        }
        connection.deadline = deadline;
    }
}

/// Let quinn-proto do something for one connection. It is fed by anybody on the Internet: should
/// it panic, then only this connection ends.
fn guarded(connection: &mut Connection, action: impl FnOnce(&mut Connection)) {
    if !connection.is_broken && catch_unwind(AssertUnwindSafe(|| action(connection))).is_err() {
        connection.is_broken = true;
    }
}

/// The destination connection ID of a long-header packet (RFC 8999 section 5.1).
fn long_header_destination(data: &[u8]) -> Option<ConnectionId> {
    if data.first()? & 0x80 == 0 {
        return None;
    }
    let length = usize::from(*data.get(5)?);
    if length > MAX_CONNECTION_ID_BYTES {
        return None;
    }
    data.get(6..6 + length).map(ConnectionId::new)
}

fn has_zone(address: &SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0)
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
