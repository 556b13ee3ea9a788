//! Payloads that arrived, grouped by tunnel: each group is ready for one GSO send to a target.

use std::collections::HashMap;

/// Segments of one GSO send; every kernel that has GSO takes so many.
const MAX_SEGMENTS: usize = 64;
/// Bytes of one GSO send: below the 65,507 of a UDP datagram.
const MAX_GROUP_BYTES: usize = 65_000;

/// Payloads of one tunnel, back to back, all but the last `segment_bytes` long.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Group {
    pub connection: u64,
    pub quarter_stream_id: u64,
    pub data: Vec<u8>,
    /// 0 for one empty payload.
    pub segment_bytes: usize,
    segments: usize,
    is_full: bool,
}

impl Group {
    fn takes(&self, payload: &[u8]) -> bool {
        !self.is_full
            && !payload.is_empty()
            && payload.len() <= self.segment_bytes
            && self.data.len() + payload.len() <= MAX_GROUP_BYTES
    }

    fn push(&mut self, payload: &[u8]) {
        self.data.extend_from_slice(payload);
        self.segments += 1;
        self.is_full = payload.len() < self.segment_bytes || self.segments == MAX_SEGMENTS;
    }
}

/// Collects groups; keeps the order within each tunnel.
#[derive(Debug, Default)]
pub struct Arrived {
    groups: Vec<Group>,
    /// The newest group of each tunnel.
    newest: HashMap<(u64, u64), usize>,
}

impl Arrived {
    /// One payload for the tunnel `quarter_stream_id` of `connection`.
    pub fn add(&mut self, connection: u64, quarter_stream_id: u64, payload: &[u8]) {
        let key = (connection, quarter_stream_id);
        // runs of one tunnel are the rule, so look at the newest group of all before the map
        let index = match self.groups.last() {
            Some(last) if (last.connection, last.quarter_stream_id) == key => {
                Some(self.groups.len() - 1)
            }
            _ => self.newest.get(&key).copied(),
        };
        if let Some(group) = index.map(|index| &mut self.groups[index]) {
            if group.takes(payload) {
                group.push(payload);
                return;
            }
        }
        let mut group = Group {
            connection,
            quarter_stream_id,
            segment_bytes: payload.len(),
            ..Group::default()
        };
        group.push(payload);
        group.is_full |= payload.is_empty();
        self.newest.insert(key, self.groups.len());
        self.groups.push(group);
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The groups since the last call.
    pub fn take(&mut self) -> Vec<Group> {
        self.newest.clear();
        std::mem::take(&mut self.groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(groups: &[Group]) -> Vec<(u64, usize, usize)> {
        groups
            .iter()
            .map(|group| {
                (
                    group.quarter_stream_id,
                    group.data.len(),
                    group.segment_bytes,
                )
            })
            .collect()
    }

    #[test]
    fn equal_payloads_and_a_shorter_last_make_one_group() {
        let mut arrived = Arrived::default();
        for size in [100, 100, 40, 100] {
            arrived.add(1, 0, &vec![7; size]);
        }
        assert_eq!(shape(&arrived.take()), [(0, 240, 100), (0, 100, 100)]);
        assert!(arrived.is_empty());
    }

    #[test]
    fn a_longer_payload_begins_a_new_group() {
        let mut arrived = Arrived::default();
        for size in [40, 100] {
            arrived.add(1, 0, &vec![7; size]);
        }
        assert_eq!(shape(&arrived.take()), [(0, 40, 40), (0, 100, 100)]);
    }

    #[test]
    fn tunnels_that_take_turns_have_a_group_each() {
        let mut arrived = Arrived::default();
        for round in 0..10 {
            for tunnel in 0..3 {
                arrived.add(1, tunnel, &[round; 10]);
            }
        }
        let groups = arrived.take();
        assert_eq!(shape(&groups), [(0, 100, 10), (1, 100, 10), (2, 100, 10)]);
        let expected: Vec<u8> = (0..10).flat_map(|round| [round; 10]).collect();
        assert_eq!(groups[2].data, expected);
    }

    #[test]
    fn tunnels_of_different_connections_are_kept_apart() {
        let mut arrived = Arrived::default();
        arrived.add(1, 0, b"one");
        arrived.add(2, 0, b"two");
        assert_eq!(arrived.take().len(), 2);
    }

    #[test]
    fn an_empty_payload_is_a_group_of_its_own() {
        let mut arrived = Arrived::default();
        for payload in [b"ab".as_slice(), b"", b"cd", b"", b""] {
            arrived.add(1, 0, payload);
        }
        let expected = [(0, 2, 2), (0, 0, 0), (0, 2, 2), (0, 0, 0), (0, 0, 0)];
        assert_eq!(shape(&arrived.take()), expected);
    }

    #[test]
    fn a_group_fits_one_send() {
        let mut arrived = Arrived::default();
        for _ in 0..200 {
            arrived.add(1, 0, &[0; 1000]);
            arrived.add(1, 1, &[0; 2000]);
        }
        let groups = arrived.take();
        let total: usize = groups.iter().map(|group| group.data.len()).sum();
        assert_eq!(total, 200 * 3000);
        for group in &groups {
            assert!(group.data.len() <= MAX_GROUP_BYTES);
            assert!(group.data.len().div_ceil(group.segment_bytes) <= MAX_SEGMENTS);
        }
    }

    #[test]
    fn a_payload_larger_than_a_group_is_kept_whole() {
        let mut arrived = Arrived::default();
        arrived.add(1, 0, &[0; 65_400]);
        arrived.add(1, 0, &[0; 65_400]);
        assert_eq!(
            shape(&arrived.take()),
            [(0, 65_400, 65_400), (0, 65_400, 65_400)]
        );
    }
}
