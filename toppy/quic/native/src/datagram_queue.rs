//! Outgoing DATAGRAM frames that wait in one connection: bounded, and fair between its tunnels.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

use crate::drops::{DropReason, Drops};

/// What one tunnel may send before the next has its turn: a few large datagrams, so that several
/// equal ones still leave in one GSO send.
const QUANTUM_BYTES: usize = 6000;
/// What an entry costs in memory whatever its length: many empty datagrams are not free.
const MIN_COST_BYTES: usize = 64;

/// A queue per tunnel, served in turns.
#[derive(Debug)]
pub struct DatagramQueue {
    max_tunnel_bytes: usize,
    max_bytes: usize,
    tunnels: HashMap<u64, Tunnel>,
    /// Tunnels with something to send; the first has its turn.
    turns: VecDeque<u64>,
    credit: usize,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Tunnel {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl DatagramQueue {
    /// Bounds in bytes, for each tunnel and for all together.
    pub fn new(max_tunnel_bytes: usize, max_bytes: usize) -> Self {
        Self {
            max_tunnel_bytes,
            max_bytes,
            tunnels: HashMap::new(),
            turns: VecDeque::new(),
            credit: QUANTUM_BYTES,
            bytes: 0,
        }
    }

    /// Queue a frame. A full tunnel loses its oldest, a full connection the oldest of its longest
    /// tunnel.
    pub fn push(&mut self, tunnel: u64, frame: Bytes, drops: &mut Drops) {
        let cost = cost(&frame);
        if cost > self.max_tunnel_bytes || cost > self.max_bytes {
            drops.add(DropReason::QueueFull, 1);
            return;
        }
        while self.tunnel_bytes(tunnel) + cost > self.max_tunnel_bytes {
            self.drop_oldest(tunnel, drops);
        }
        while self.bytes + cost > self.max_bytes {
            let longest = self.tunnels.iter().max_by_key(|(_, each)| each.bytes);
            let Some((&longest, _)) = longest else { break };
            self.drop_oldest(longest, drops);
        }
        let queue = self.tunnels.entry(tunnel).or_default();
        if queue.frames.is_empty() {
            self.turns.push_back(tunnel);
        }
        queue.frames.push_back(frame);
        queue.bytes += cost;
        self.bytes += cost;
    }

    /// The frame whose turn it is.
    pub fn pop(&mut self) -> Option<Bytes> {
        let tunnel = *self.turns.front()?;
        let frame = self.remove_oldest(tunnel)?;
        if self.turns.front() != Some(&tunnel) {
            self.credit = QUANTUM_BYTES;
        } else if self.credit <= frame.len() {
            self.credit = QUANTUM_BYTES;
            self.turns.rotate_left(1);
        } else {
            self.credit -= frame.len();
        }
        Some(frame)
    }

    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Forget everything; returns how many frames there were.
    pub fn clear(&mut self) -> usize {
        let count = self.tunnels.values().map(|each| each.frames.len()).sum();
        self.tunnels.clear();
        self.turns.clear();
        self.bytes = 0;
        count
    }

    /// What one tunnel has waiting.
    pub fn tunnel_bytes(&self, tunnel: u64) -> usize {
        self.tunnels.get(&tunnel).map_or(0, |each| each.bytes)
    }

    fn drop_oldest(&mut self, tunnel: u64, drops: &mut Drops) {
        if self.remove_oldest(tunnel).is_some() {
            drops.add(DropReason::QueueFull, 1);
        }
    }

    fn remove_oldest(&mut self, tunnel: u64) -> Option<Bytes> {
        let queue = self.tunnels.get_mut(&tunnel)?;
        let frame = queue.frames.pop_front()?;
        queue.bytes -= cost(&frame);
        self.bytes -= cost(&frame);
        if queue.frames.is_empty() {
            self.tunnels.remove(&tunnel);
            if self.turns.front() == Some(&tunnel) {
                self.turns.pop_front();
            } else {
                self.turns.retain(|&each| each != tunnel);
            }
        }
        Some(frame)
    }
}

fn cost(frame: &Bytes) -> usize {
    frame.len().max(MIN_COST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(mark: u8, size: usize) -> Bytes {
        vec![mark; size].into()
    }

    fn marks(queue: &mut DatagramQueue) -> Vec<u8> {
        std::iter::from_fn(|| queue.pop())
            .map(|frame| frame[0])
            .collect()
    }

    #[test]
    fn a_tunnel_keeps_its_order() {
        let mut queue = DatagramQueue::new(100_000, 100_000);
        let mut drops = Drops::default();
        for mark in 0..50 {
            queue.push(0, frame(mark, 1000), &mut drops);
        }
        assert_eq!(marks(&mut queue), (0..50).collect::<Vec<u8>>());
        assert!(queue.is_empty());
        assert_eq!(queue.bytes, 0);
        assert_eq!(drops.take(), []);
    }

    #[test]
    fn a_full_tunnel_loses_its_oldest() {
        let mut queue = DatagramQueue::new(3000, 100_000);
        let mut drops = Drops::default();
        for mark in 0..5 {
            queue.push(0, frame(mark, 1000), &mut drops);
        }
        assert_eq!(marks(&mut queue), [2, 3, 4]);
        assert_eq!(drops.take(), [("queue_full", 2)]);
    }

    #[test]
    fn a_full_connection_loses_the_oldest_of_its_longest_tunnel() {
        let mut queue = DatagramQueue::new(100_000, 5000);
        let mut drops = Drops::default();
        for mark in 0..4 {
            queue.push(0, frame(mark, 1000), &mut drops);
        }
        for mark in 10..13 {
            queue.push(1, frame(mark, 1000), &mut drops);
        }
        assert_eq!(drops.take(), [("queue_full", 2)]);
        let mut left = marks(&mut queue);
        left.sort_unstable();
        assert_eq!(left, [2, 3, 10, 11, 12]);
    }

    #[test]
    fn what_is_larger_than_a_bound_is_dropped_itself() {
        let mut queue = DatagramQueue::new(1000, 100_000);
        let mut drops = Drops::default();
        queue.push(0, frame(1, 500), &mut drops);
        queue.push(0, frame(2, 1001), &mut drops);
        assert_eq!(marks(&mut queue), [1]);
        assert_eq!(drops.take(), [("queue_full", 1)]);
    }

    #[test]
    fn empty_frames_are_bounded_too() {
        let mut queue = DatagramQueue::new(640, 100_000);
        let mut drops = Drops::default();
        for _ in 0..1000 {
            queue.push(0, frame(0, 2), &mut drops);
        }
        assert_eq!(queue.clear(), 10);
        assert_eq!(drops.take(), [("queue_full", 990)]);
    }

    #[test]
    fn a_greedy_tunnel_waits_for_its_turn() {
        let mut queue = DatagramQueue::new(1 << 20, 1 << 20);
        let mut drops = Drops::default();
        for _ in 0..500 {
            queue.push(0, frame(0, 1000), &mut drops);
        }
        queue.push(1, frame(1, 100), &mut drops);
        let position = marks(&mut queue).iter().position(|&mark| mark == 1);
        assert!(position.unwrap() <= QUANTUM_BYTES / 1000 + 1);
    }

    #[test]
    fn tunnels_share_by_bytes() {
        let mut queue = DatagramQueue::new(1 << 20, 1 << 20);
        let mut drops = Drops::default();
        for _ in 0..1000 {
            queue.push(0, frame(0, 1000), &mut drops);
            queue.push(1, frame(1, 200), &mut drops);
        }
        let mut sent = [0; 2];
        for _ in 0..600 {
            let frame = queue.pop().unwrap();
            sent[usize::from(frame[0])] += frame.len();
        }
        assert!(sent[0].abs_diff(sent[1]) <= 2 * QUANTUM_BYTES, "{sent:?}");
    }
}
