//! The caller's clock: seconds of some monotonic clock in, `Instant`s for quinn-proto inside.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quinn_proto::TimeSource;

/// Timers are told to the caller this much late, so that rounding never makes them early: a timer
/// that is not yet due when it is asked for would be asked for again, at once, for ever.
const ROUNDING: Duration = Duration::from_micros(1);

/// Maps the caller's seconds to `Instant`s. It reads the system's clock once, at birth.
#[derive(Debug)]
pub struct Clock {
    base: Instant,
    origin: f64,
    latest: Instant,
    seconds: f64,
    wall: Arc<CallerTime>,
}

impl Clock {
    /// A clock that shows `now`.
    pub fn new(now: f64) -> Self {
        let base = Instant::now();
        let mut clock = Self {
            base,
            origin: now,
            latest: base,
            seconds: now,
            wall: Arc::default(),
        };
        clock.advance(now);
        clock
    }

    /// Move to `now` and return it; time never goes back.
    pub fn advance(&mut self, now: f64) -> Instant {
        let since = Duration::try_from_secs_f64(now - self.origin).unwrap_or_default();
        if let Some(instant) = self.base.checked_add(since) {
            if instant >= self.latest {
                self.latest = instant;
                self.seconds = now;
                self.wall.set(now);
            }
        }
        self.latest
    }

    /// The latest time that the caller told.
    pub fn now(&self) -> Instant {
        self.latest
    }

    /// The same in the caller's seconds.
    pub fn now_seconds(&self) -> f64 {
        self.seconds
    }

    /// An instant on the caller's clock, rounded up.
    pub fn seconds(&self, instant: Instant) -> f64 {
        let since = instant.saturating_duration_since(self.base) + ROUNDING;
        self.origin + since.as_secs_f64()
    }

    /// The caller's clock for the age of Retry tokens: workers that share it share tokens.
    pub fn time_source(&self) -> Arc<dyn TimeSource> {
        self.wall.clone()
    }
}

#[derive(Debug, Default)]
struct CallerTime(AtomicU64);

impl CallerTime {
    fn set(&self, now: f64) {
        let since = Duration::try_from_secs_f64(now).unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }
}

impl TimeSource for CallerTime {
    fn now(&self) -> SystemTime {
        let since = Duration::from_millis(self.0.load(Ordering::Relaxed));
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_is_due_when_the_caller_comes_at_the_time_it_was_told() {
        for origin in [0.0, 0.1, 12_345.678_9, 1e9 + 0.123_456_789] {
            let mut clock = Clock::new(origin);
            for nanos in [0, 1, 999, 1_000_001, 33_333_333, 7_777_777_777] {
                let due = clock.base + Duration::from_nanos(nanos);
                let told = clock.seconds(due);
                assert!(clock.advance(told) >= due, "{origin} {nanos}");
            }
        }
    }

    #[test]
    fn time_never_goes_back() {
        let mut clock = Clock::new(100.0);
        let later = clock.advance(105.0);
        for odd in [103.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(clock.advance(odd), later, "{odd}");
            assert_eq!(clock.now(), later);
        }
        assert!(clock.advance(106.0) > later);
    }

    #[test]
    fn clocks_of_two_endpoints_agree_on_the_age_of_a_token() {
        let first = Clock::new(500.0);
        let mut second = Clock::new(510.0);
        second.advance(512.5);
        let age = second
            .time_source()
            .now()
            .duration_since(first.time_source().now());
        assert_eq!(age.ok(), Some(Duration::from_millis(12_500)));
    }
}
