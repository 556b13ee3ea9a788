//! Two endpoints and a network between them, in virtual time.

use std::collections::VecDeque;

use super::*;
use crate::settings::examples;

const CLIENT: &str = "198.51.100.7:50000";
const SERVER: &str = "192.0.2.1:4433";
const DELAY_S: f64 = 0.01;

/// One end, and what it has reported.
struct End {
    endpoint: Endpoint,
    address: SocketAddr,
    events: Vec<Event>,
    payloads: Vec<(u64, Vec<u8>)>,
    drops: HashMap<&'static str, u64>,
}

impl End {
    fn new(settings: &Settings, address: &str) -> Self {
        Self {
            endpoint: Endpoint::new(settings, 0.0).unwrap(),
            address: address.parse().unwrap(),
            events: Vec::new(),
            payloads: Vec::new(),
            drops: HashMap::new(),
        }
    }

    fn collect(&mut self) {
        self.events.extend(self.endpoint.poll_events());
        for group in self.endpoint.poll_datagrams() {
            let empty = group.data.is_empty().then_some(&group.data[..]);
            let step = group.segment_bytes.max(1);
            for payload in group.data.chunks(step).chain(empty) {
                self.payloads
                    .push((group.quarter_stream_id, payload.to_vec()));
            }
        }
        for (reason, count) in self.endpoint.take_drops() {
            *self.drops.entry(reason).or_default() += count;
        }
    }

    fn is_closed(&self) -> bool {
        let is_end = |event: &Event| matches!(event, Event::Closed { .. });
        self.events.iter().any(is_end)
    }

    fn stream_bytes(&self) -> usize {
        let length = |event: &Event| match event {
            Event::StreamData { data, .. } => data.len(),
            _ => 0,
        };
        self.events.iter().map(length).sum()
    }
}

/// A client and a server with one connection between them.
struct Pair {
    client: End,
    server: End,
    now: f64,
    flying: VecDeque<(f64, bool, Vec<u8>)>,
    /// Larger UDP datagrams are lost.
    path_mtu: usize,
    /// UDP datagrams of the client that the path takes in a hundredth of a second.
    path_packets: usize,
    connection: u64,
    accepted: u64,
}

impl Pair {
    fn connect(change: impl Fn(&mut Settings)) -> Self {
        let (mut server, mut client) = examples::pair();
        change(&mut server);
        change(&mut client);
        let mut pair = Self {
            client: End::new(&client, CLIENT),
            server: End::new(&server, SERVER),
            now: 0.0,
            flying: VecDeque::new(),
            path_mtu: usize::MAX,
            path_packets: usize::MAX,
            connection: 0,
            accepted: 1,
        };
        let address = pair.server.address;
        pair.connection = pair
            .client
            .endpoint
            .connect(address, "localhost", 0.0)
            .unwrap();
        pair.run(0.5);
        let done = |event: &Event| matches!(event, Event::HandshakeCompleted { .. });
        assert!(
            pair.client.events.iter().any(done),
            "{:?}",
            pair.client.events
        );
        assert!(
            pair.server.events.iter().any(done),
            "{:?}",
            pair.server.events
        );
        pair
    }

    fn run(&mut self, seconds: f64) {
        let until = self.now + seconds;
        while self.now < until {
            self.step();
        }
    }

    /// A hundredth of a second at most.
    fn step(&mut self) {
        for is_client in [true, false] {
            let end = if is_client {
                &mut self.client
            } else {
                &mut self.server
            };
            end.collect();
            let mut room = if is_client {
                self.path_packets
            } else {
                usize::MAX
            };
            for transmit in end.endpoint.poll_transmits(self.now) {
                let step = match transmit.segment_bytes {
                    0 => transmit.data.len(),
                    bytes => bytes,
                };
                for data in transmit.data.chunks(step) {
                    if data.len() <= self.path_mtu && room > 0 {
                        room -= 1;
                        let due = self.now + DELAY_S;
                        self.flying.push_back((due, is_client, data.to_vec()));
                    }
                }
                end.endpoint.recycle(transmit.data);
            }
            end.collect();
        }
        let timers = [&self.client, &self.server].map(|end| end.endpoint.next_timeout());
        let due = self.flying.front().map(|&(due, ..)| due);
        let next = timers.into_iter().flatten().chain(due);
        self.now = next.fold(self.now + 0.01, f64::min);
        while self.flying.front().is_some_and(|it| it.0 <= self.now) {
            let (_, is_client, data) = self.flying.pop_front().unwrap();
            let (from, to) = if is_client {
                (self.client.address, &mut self.server.endpoint)
            } else {
                (self.server.address, &mut self.client.endpoint)
            };
            to.receive(data[..].into(), 0, from, self.now);
            while to.next_attempt().is_some() {
                to.decide(Admission::Accept);
            }
        }
        for end in [&mut self.client, &mut self.server] {
            if end.endpoint.next_timeout().is_some_and(|at| at <= self.now) {
                end.endpoint.handle_timeout(self.now);
            }
        }
    }

    fn send(&mut self, tunnel: u64, payloads: &[u8], segment_bytes: usize) {
        self.client
            .endpoint
            .send_datagrams(self.connection, tunnel, payloads, segment_bytes);
    }
}

fn is_forgotten(endpoint: &Endpoint) -> bool {
    endpoint.handles.is_empty()
        && endpoint.connections.iter().all(Option::is_none)
        && endpoint.deadlines.is_empty()
        && endpoint.dirty.is_empty()
        && endpoint.quic.open_connections() == 0
}

#[test]
fn datagrams_and_streams_cross() {
    let mut pair = Pair::connect(|_| ());
    pair.send(7, &[1; 2500], 1000);
    let stream = pair
        .client
        .endpoint
        .open_stream(pair.connection, Dir::Bi)
        .unwrap();
    pair.client
        .endpoint
        .send_stream(pair.connection, stream, b"hello", true);
    pair.run(0.5);
    let sizes: Vec<_> = pair
        .server
        .payloads
        .iter()
        .map(|(_, it)| it.len())
        .collect();
    assert_eq!(sizes, [1000, 1000, 500]);
    assert!(pair.server.events.contains(&Event::StreamData {
        connection: pair.accepted,
        stream,
        data: b"hello".to_vec(),
        is_ended: true,
    }));
    assert!(pair.client.drops.is_empty() && pair.server.drops.is_empty());
}

#[test]
fn nothing_is_left_of_a_closed_connection() {
    let mut pair = Pair::connect(|_| ());
    let code = VarInt::from_u32(0x100);
    pair.client
        .endpoint
        .close(pair.connection, code, "done", pair.now);
    pair.run(5.0);
    assert!(pair.client.is_closed() && pair.server.is_closed());
    assert!(is_forgotten(&pair.client.endpoint));
    assert!(is_forgotten(&pair.server.endpoint));
    assert_eq!(pair.client.endpoint.next_timeout(), None);
}

#[test]
fn what_waits_when_a_connection_closes_is_counted() {
    let mut pair = Pair::connect(|_| ());
    pair.send(0, &vec![0; 300_000], 1000);
    // some are sent, some are in quinn-proto, some in our queue
    let sent = pair.client.endpoint.poll_transmits(pair.now);
    assert!(!sent.is_empty());
    pair.server.collect();
    for transmit in sent {
        let data = transmit.data[..].into();
        let from = pair.client.address;
        pair.server
            .endpoint
            .receive(data, transmit.segment_bytes, from, pair.now);
    }
    let code = VarInt::from_u32(0);
    pair.client
        .endpoint
        .close(pair.connection, code, "", pair.now);
    pair.send(0, &[0; 10], 1);
    pair.run(5.0);
    let delivered = pair.server.payloads.len();
    assert!(delivered > 0);
    let lost = pair.client.drops.values().sum::<u64>();
    assert_eq!(lost, 310 - delivered as u64);
    assert_eq!(pair.client.drops.len(), 1);
    assert_eq!(pair.client.drops["unknown_stream"], lost);
}

#[test]
fn thousands_of_tiny_datagrams_arrive() {
    let mut pair = Pair::connect(|_| ());
    for _ in 0..20_000 {
        pair.send(0, b"", 0);
    }
    // each counts as 64 bytes of the mebibyte that a tunnel may have waiting
    let kept = (1 << 20) / 64;
    pair.run(5.0);
    assert_eq!(pair.server.payloads.len(), kept);
    assert_eq!(pair.client.drops["queue_full"], 20_000 - kept as u64);
}

#[test]
fn only_the_connection_that_receives_is_looked_at() {
    let mut pair = Pair::connect(|_| ());
    let address = pair.server.address;
    for _ in 0..20 {
        let client = &mut pair.client.endpoint;
        client.connect(address, "localhost", pair.now).unwrap();
    }
    pair.run(2.0);
    assert_eq!(pair.server.endpoint.handles.len(), 21);
    pair.send(0, b"x", 0);
    for transmit in pair.client.endpoint.poll_transmits(pair.now) {
        let from = pair.client.address;
        let data = transmit.data[..].into();
        pair.server.endpoint.receive(data, 0, from, pair.now);
    }
    assert_eq!(pair.server.endpoint.dirty.len(), 1);
}

#[test]
fn path_mtu_discovery_makes_room_for_larger_payloads() {
    let mut pair = Pair::connect(|_| ());
    let before = 1350 - 1 - 10 - 4 - 16 - 9 - 2;
    pair.run(5.0);
    let after = pair
        .client
        .endpoint
        .max_payload_bytes(pair.connection, 0)
        .unwrap();
    assert!(after > before, "{after}");
    assert!(after <= before + 1452 - 1350);
    pair.send(0, &vec![9; after], 0);
    pair.run(0.5);
    assert_eq!(pair.server.payloads.len(), 1);
}

#[test]
fn datagrams_that_fit_no_more_are_counted() {
    let mut pair = Pair::connect(|_| ());
    pair.run(5.0);
    let connection = pair.connection;
    let largest = pair
        .client
        .endpoint
        .max_payload_bytes(connection, 0)
        .unwrap();
    pair.path_mtu = 1250;
    let mut sent = 0;
    for _ in 0..3000 {
        let now = pair.client.endpoint.max_payload_bytes(connection, 0);
        if now.is_some_and(|bytes| bytes < largest) {
            break;
        }
        pair.send(0, &vec![0; 20 * largest], largest);
        sent += 20;
        pair.step();
    }
    let now = pair.client.endpoint.max_payload_bytes(connection, 0);
    assert!(
        now.is_some_and(|bytes| bytes < largest),
        "the black hole was not noticed"
    );
    pair.run(3.0);
    pair.send(0, &[0; 900], 0);
    pair.run(3.0);
    assert_eq!(pair.server.payloads.last().unwrap().1.len(), 900);
    assert!(pair.client.drops["too_large"] > 0);
    // what the path swallowed was sent; everything else is accounted for
    let stats = {
        let handle = pair.client.endpoint.handles[&connection];
        let connection = pair.client.endpoint.connections[handle.0].as_ref().unwrap();
        connection.quic.stats().frame_tx.datagram
    };
    let drops: u64 = pair.client.drops.values().sum();
    assert_eq!(stats + drops, sent + 1);
}

#[test]
fn a_flood_of_datagrams_leaves_streams_their_share() {
    // a narrow path, where few packets may be on their way, and a wide one
    for (path_packets, flood) in [(20, 60), (300, 900)] {
        let mut pair = Pair::connect(|_| ());
        pair.path_packets = path_packets;
        let connection = pair.connection;
        let mut before = 0;
        for round in 0..600 {
            let client = &mut pair.client.endpoint;
            if round == 300 {
                let stream = client.open_stream(connection, Dir::Bi).unwrap();
                client.send_stream(connection, stream, &[0; 100_000], true);
                before = pair.server.payloads.len();
            }
            // they fill their packets: there is no room for stream data behind them
            let full = client.max_payload_bytes(connection, 0).unwrap();
            client.send_datagrams(connection, 0, &vec![0; flood * full], full);
            pair.step();
        }
        assert!(pair.client.drops["queue_full"] > 0, "there was no overload");
        assert_eq!(pair.server.stream_bytes(), 100_000);
        assert!(pair.server.payloads.len() > before + 100);
    }
}

#[test]
fn a_panic_ends_only_its_own_connection() {
    let mut pair = Pair::connect(|_| ());
    let address = pair.server.address;
    let other = pair
        .client
        .endpoint
        .connect(address, "localhost", pair.now)
        .unwrap();
    pair.run(0.5);
    let endpoint = &mut pair.client.endpoint;
    let handle = endpoint.handles[&pair.connection];
    let connection = endpoint.connections[handle.0].as_mut().unwrap();
    guarded(connection, |_| panic!("on purpose"));
    endpoint.process(handle);
    pair.run(0.1);
    assert!(pair.client.events.contains(&Event::Closed {
        connection: pair.connection,
        ending: Ending::internal(),
    }));
    let endpoint = &mut pair.client.endpoint;
    assert_eq!(endpoint.handles.len(), 1);
    assert_eq!(endpoint.quic.open_connections(), 1);
    endpoint.send_datagrams(other, 0, b"still here", 0);
    pair.run(0.5);
    assert_eq!(pair.server.payloads, [(0, b"still here".to_vec())]);
}

#[test]
fn a_link_local_client_is_not_asked_to_retry() {
    let (server, client) = examples::pair();
    let mut client = End::new(&client, CLIENT);
    let mut server = End::new(&server, SERVER);
    client
        .endpoint
        .connect(server.address, "localhost", 0.0)
        .unwrap();
    let zoned = "[fe80::1%3]:5000".parse().unwrap();
    for transmit in client.endpoint.poll_transmits(0.0) {
        let data = transmit.data[..].into();
        server.endpoint.receive(data, 0, zoned, 0.0);
    }
    assert_eq!(server.endpoint.next_attempt(), Some((zoned, false)));
    server.endpoint.decide(Admission::Retry);
    server.collect();
    let expected = Event::Accepted {
        connection: 1,
        source: zoned,
    };
    assert_eq!(server.events, [expected]);
}

#[test]
fn a_long_header_names_its_destination() {
    assert_eq!(long_header_destination(b""), None);
    assert_eq!(long_header_destination(b"\x40\0\0\0\x01\x02ab"), None);
    assert_eq!(long_header_destination(b"\xc0\0\0\0\x01"), None);
    assert_eq!(long_header_destination(b"\xc0\0\0\0\x01\x03ab"), None);
    assert_eq!(long_header_destination(&[0xC0, 0, 0, 0, 1, 21, 0]), None);
    let found = long_header_destination(b"\xc0\0\0\0\x01\x02abc");
    assert_eq!(found, Some(ConnectionId::new(b"ab")));
}

#[test]
fn an_address_that_may_be_forged_gets_three_times_as_much_at_most() {
    let (server, client) = examples::pair();
    let mut client = End::new(&client, CLIENT);
    let mut server = End::new(&server, SERVER);
    let address = server.address;
    let number = client.endpoint.connect(address, "localhost", 0.0).unwrap();
    let mut received = 0;
    for transmit in client.endpoint.poll_transmits(0.0) {
        received += transmit.data.len();
        let data = transmit.data[..].into();
        let source = client.address;
        server.endpoint.receive(data, 0, source, 0.0);
        server.endpoint.decide(Admission::Accept);
    }
    let mut sent = Vec::new();
    for second in 0..25 {
        let now = f64::from(second);
        server.endpoint.handle_timeout(now);
        sent.extend(server.endpoint.poll_transmits(now));
    }
    let bytes: usize = sent.iter().map(|it| it.data.len()).sum();
    assert!(bytes > received && bytes <= 3 * received, "{bytes}");
    // the client answers to the ID that it was given: now it gets whatever is needed
    let source = server.address;
    let step = sent[0].segment_bytes;
    let data = sent[0].data[..].into();
    client.endpoint.receive(data, step, source, 26.0);
    assert!(client.endpoint.peer_address(number).is_some());
    for transmit in client.endpoint.poll_transmits(26.0) {
        let data = transmit.data[..].into();
        let source = client.address;
        server
            .endpoint
            .receive(data, transmit.segment_bytes, source, 26.0);
    }
    let handle = server.endpoint.handles[&1];
    let connection = server.endpoint.connections[handle.0].as_ref().unwrap();
    assert!(connection.has_proved_address());
}

#[test]
fn a_client_may_open_more_streams_the_more_it_uses() {
    let mut pair = Pair::connect(|it| it.max_bidirectional_streams = 300);
    let connection = pair.connection;
    let mut opened = 0;
    for most in [64, 128, 256, 300, 300] {
        while let Some(stream) = pair.client.endpoint.open_stream(connection, Dir::Bi) {
            let client = &mut pair.client.endpoint;
            client.send_stream(connection, stream, b"?", false);
            opened += 1;
        }
        assert_eq!(opened, most);
        pair.run(0.2);
    }
}

/// Windows of the server that a test fills quickly.
fn narrow(settings: &mut Settings) {
    settings.stream_window_bytes = 64 * 1024;
    settings.connection_window_bytes = 128 * 1024;
    settings.paused_window_bytes = 128 * 1024;
}

/// A stream of the client on which `bytes` were sent, paused at the server from the start.
fn paused_stream(pair: &mut Pair, bytes: usize) -> u64 {
    let client = &mut pair.client.endpoint;
    let stream = client.open_stream(pair.connection, Dir::Bi).unwrap();
    client.send_stream(pair.connection, stream, b"x", false);
    pair.run(0.2);
    pair.server.endpoint.pause_reading(pair.accepted, stream);
    let client = &mut pair.client.endpoint;
    client.send_stream(pair.connection, stream, &vec![7; bytes], true);
    stream
}

#[test]
fn a_paused_stream_holds_back_its_sender_until_it_is_resumed() {
    let mut pair = Pair::connect(narrow);
    let stream = paused_stream(&mut pair, 1 << 20);
    pair.client
        .endpoint
        .notify_writable(pair.connection, stream, 1);
    pair.run(2.0);
    assert_eq!(pair.server.stream_bytes(), 1);
    let writable = Event::StreamWritable {
        connection: pair.connection,
        stream,
    };
    assert!(!pair.client.events.contains(&writable));
    let waiting = pair
        .client
        .endpoint
        .stream_backlog_bytes(pair.connection, stream);
    assert!(waiting >= (1 << 20) - 2 * 64 * 1024, "{waiting}");
    pair.server.endpoint.resume_reading(pair.accepted, stream);
    pair.run(5.0);
    assert_eq!(pair.server.stream_bytes(), (1 << 20) + 1);
    let told = pair.client.events.iter().filter(|it| **it == writable);
    assert_eq!(told.count(), 1);
}

#[test]
fn what_a_connection_holds_for_paused_streams_is_bounded() {
    let mut pair = Pair::connect(narrow);
    let streams: Vec<_> = (0..6)
        .map(|_| paused_stream(&mut pair, 256 * 1024))
        .collect();
    pair.run(3.0);
    let mut sent = 0;
    for stream in streams {
        let client = &pair.client.endpoint;
        sent += 256 * 1024 - client.stream_backlog_bytes(pair.connection, stream);
    }
    // the connection's window, the extension, and what quinn-proto itself keeps unsent
    assert!(sent <= 256 * 1024 + 6 + 64 * 1024, "{sent}");
}

#[test]
fn nothing_is_left_of_paused_streams_that_ended() {
    let mut pair = Pair::connect(narrow);
    let reset = paused_stream(&mut pair, 1 << 20);
    let stopped = paused_stream(&mut pair, 10);
    let ended = paused_stream(&mut pair, 10);
    pair.run(0.5);
    let code = VarInt::from_u32(1);
    pair.client
        .endpoint
        .reset_stream(pair.connection, reset, code);
    pair.server
        .endpoint
        .stop_stream(pair.accepted, stopped, code);
    pair.server.endpoint.resume_reading(pair.accepted, ended);
    pair.run(1.0);
    let connection = pair.server.endpoint.find(pair.accepted).unwrap();
    assert!(connection.readers_are_idle());
}

#[test]
fn what_came_on_a_stream_between_two_polls_is_one_event() {
    let mut pair = Pair::connect(|_| {});
    let streams = [0, 1].map(|_| {
        let client = &mut pair.client.endpoint;
        client.open_stream(pair.connection, Dir::Bi).unwrap()
    });
    for _ in 0..4 {
        for stream in streams {
            let client = &mut pair.client.endpoint;
            client.send_stream(pair.connection, stream, &[7; 1000], false);
            // its own packets
            for transmit in client.poll_transmits(pair.now) {
                pair.flying.push_back((pair.now, true, transmit.data));
            }
        }
    }
    assert!(pair.flying.len() >= 8);
    pair.server.events.clear();
    pair.run(0.1);
    let events = streams.map(|stream| Event::StreamData {
        connection: pair.accepted,
        stream,
        data: vec![7; 4000],
        is_ended: false,
    });
    assert_eq!(pair.server.events, events);
}

#[test]
fn a_small_message_is_not_behind_what_greedy_streams_have_waiting() {
    let mut pair = Pair::connect(|_| {});
    let greedy = [0, 1].map(|_| {
        let client = &mut pair.client.endpoint;
        let stream = client.open_stream(pair.connection, Dir::Bi).unwrap();
        client.send_stream(pair.connection, stream, &[7; 500_000], false);
        stream
    });
    pair.run(0.1);
    let client = &mut pair.client.endpoint;
    let small = client.open_stream(pair.connection, Dir::Bi).unwrap();
    client.send_stream(pair.connection, small, &[8; 100], true);
    pair.server.events.clear();
    let before = pair.now;
    while pair.now < before + 0.06 {
        pair.step();
    }
    let order: Vec<_> = pair
        .server
        .events
        .iter()
        .filter_map(|event| match event {
            Event::StreamData { stream, .. } => Some(*stream),
            _ => None,
        })
        .collect();
    assert!(order.contains(&small), "{order:?}");
    for stream in greedy {
        assert!(order.contains(&stream), "{order:?}");
    }
}
