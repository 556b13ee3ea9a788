//! Datagrams that the engine dropped, by reason.

/// The names are those of `toppy.model.drop_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    QueueFull,
    TooLarge,
    UnknownContext,
    Malformed,
    UnknownStream,
}

const NAMES: [&str; 5] = [
    "queue_full",
    "too_large",
    "unknown_context",
    "malformed",
    "unknown_stream",
];

/// Counters since they were last taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Drops([u64; NAMES.len()]);

impl Drops {
    pub fn add(&mut self, reason: DropReason, count: usize) {
        self.0[reason as usize] += count as u64;
    }

    /// (name, count) of every reason that occurred; all counters start again at 0.
    pub fn take(&mut self) -> Vec<(&'static str, u64)> {
        let counts = std::mem::take(&mut self.0);
        NAMES
            .into_iter()
            .zip(counts)
            .filter(|&(_, count)| count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_taken_once_by_name() {
        let mut drops = Drops::default();
        drops.add(DropReason::UnknownStream, 2);
        drops.add(DropReason::QueueFull, 1);
        drops.add(DropReason::QueueFull, 1);
        drops.add(DropReason::TooLarge, 0);
        assert_eq!(drops.take(), [("queue_full", 2), ("unknown_stream", 2)]);
        assert_eq!(drops.take(), []);
    }
}
