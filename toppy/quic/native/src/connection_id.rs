//! Connection IDs that begin with a prefix, so that the kernel can steer packets by it.

use std::time::Duration;

use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use ring::rand::{SecureRandom, SystemRandom};

/// RFC 9000 section 17.2: at most so many bytes.
pub const MAX_CONNECTION_ID_BYTES: usize = 20;

/// Makes IDs of `length` bytes: the prefix, then random bytes. IDs that begin with `family` are
/// those that this endpoint's key can reset, whoever issued them.
#[derive(Debug, Clone)]
pub struct PrefixedIds {
    prefix: Vec<u8>,
    family: Vec<u8>,
    length: usize,
    random: SystemRandom,
}

impl PrefixedIds {
    /// `length` is at most `MAX_CONNECTION_ID_BYTES` and longer than the prefix.
    pub fn new(prefix: Vec<u8>, family: Vec<u8>, length: usize) -> Self {
        debug_assert!(prefix.len() < length && length <= MAX_CONNECTION_ID_BYTES);
        Self {
            prefix,
            family,
            length,
            random: SystemRandom::new(),
        }
    }
}

impl ConnectionIdGenerator for PrefixedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; MAX_CONNECTION_ID_BYTES];
        let id = &mut bytes[..self.length];
        let (prefix, rest) = id.split_at_mut(self.prefix.len());
        prefix.copy_from_slice(&self.prefix);
        self.random
            .fill(rest)
            .expect("the system gives random bytes");
        ConnectionId::new(id)
    }

    /// Only packets whose ID is of the family are answered with a stateless reset.
    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        if id.starts_with(&self.family) {
            Ok(())
        } else {
            Err(InvalidCid)
        }
    }

    fn cid_len(&self) -> usize {
        self.length
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_prefix_and_random_bytes() {
        let mut ids = PrefixedIds::new(vec![0x54, 0, 3, 7], vec![0x54, 0], 10);
        let first = ids.generate_cid();
        let second = ids.generate_cid();
        assert_eq!(&first[..4], [0x54, 0, 3, 7]);
        assert_eq!(first.len(), 10);
        assert_ne!(first, second);
        assert!(ids.validate(&first).is_ok());
    }

    #[test]
    fn ids_of_others_are_told_apart() {
        let ids = PrefixedIds::new(vec![0x54, 0, 3, 7], vec![0x54, 0], 10);
        for (id, is_ours) in [
            ([0x54, 0, 4, 7, 0, 0, 0, 0, 0, 0], true),
            ([0x54, 1, 3, 7, 0, 0, 0, 0, 0, 0], false),
        ] {
            assert_eq!(ids.validate(&ConnectionId::new(&id)).is_ok(), is_ours);
        }
        assert!(ids.validate(&ConnectionId::new(&[])).is_err());
        let any = PrefixedIds::new(Vec::new(), Vec::new(), 8);
        assert!(any.validate(&ConnectionId::new(&[1; 8])).is_ok());
    }
}
