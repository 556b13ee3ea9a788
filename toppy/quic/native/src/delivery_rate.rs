//! Congestion control by the rate of delivery: the path's bandwidth is the largest rate at which
//! packets were acknowledged over a round trip, and what is in flight is a little more than that
//! bandwidth times the shortest round trip (BBR, draft-cardwell-iccrg-bbr-congestion-control).
//!
//! quinn-proto 0.11's own BBR keeps the largest bandwidth that it ever saw, and takes two
//! acknowledgements that arrive close to each other for a large one: it fills whatever queue the
//! path has, and what more is offered is lost there instead of waiting, in fair turns, here.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

const INITIAL_PACKETS: u64 = 32;
const MIN_PACKETS: u64 = 4;
/// While the bandwidth still grows: what is in flight doubles each round.
const STARTUP_GAIN: f64 = 2.0;
/// A round in which the bandwidth grew less than so has not grown.
const GROWTH: f64 = 1.25;
const ROUNDS_WITHOUT_GROWTH: u32 = 3;
/// How much of bandwidth times round trip is in flight, round by round: more, to see whether there
/// is more to have; then less, which empties the queue that this made and shows the path's delay.
const PROBE_GAIN: f64 = 1.25;
const DRAIN_GAIN: f64 = 1.0;
/// A round trip of so many shortest ones means that the queue of the path fills.
const FULL_QUEUE: f64 = 1.5;
const CYCLE_ROUNDS: u64 = 8;
/// In flight beside that: acknowledgements come in batches.
const BATCH: Duration = Duration::from_millis(4);
const BANDWIDTH_ROUNDS: u64 = 10;
const ROUND_TRIP_LIFE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct DeliveryRate {
    mtu: u64,
    delivered: u64,
    /// When how much had been delivered; back to the oldest packet in flight.
    history: VecDeque<(Instant, u64)>,
    newest_sent: Option<Instant>,
    /// Round and bytes per second, falling: the first is the largest of the last rounds.
    rates: VecDeque<(u64, f64)>,
    /// When, and how long, rising.
    round_trips: VecDeque<(Instant, Duration)>,
    round: u64,
    round_began: Instant,
    is_starting: bool,
    rate_before: f64,
    rounds_without_growth: u32,
    window: u64,
}

impl DeliveryRate {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            mtu: mtu.into(),
            delivered: 0,
            history: VecDeque::from([(now, 0)]),
            newest_sent: None,
            rates: VecDeque::new(),
            round_trips: VecDeque::new(),
            round: 0,
            round_began: now,
            is_starting: true,
            rate_before: 0.0,
            rounds_without_growth: 0,
            window: INITIAL_PACKETS * u64::from(mtu),
        }
    }

    fn rate(&self) -> f64 {
        self.rates.front().map_or(0.0, |&(_, rate)| rate)
    }

    fn round_trip(&self) -> Duration {
        self.round_trips
            .front()
            .map_or(Duration::ZERO, |&(_, it)| it)
    }

    fn see_round_trip(&mut self, now: Instant, sample: Duration) {
        while self.round_trips.back().is_some_and(|&(_, it)| it >= sample) {
            self.round_trips.pop_back();
        }
        self.round_trips.push_back((now, sample));
        while self
            .round_trips
            .front()
            .is_some_and(|&(when, _)| now - when > ROUND_TRIP_LIFE)
        {
            self.round_trips.pop_front();
        }
    }

    fn see_rate(&mut self, rate: f64, app_limited: bool) {
        if app_limited && rate < self.rate() {
            return;
        }
        while self.rates.back().is_some_and(|&(_, it)| it <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((self.round, rate));
        while self
            .rates
            .front()
            .is_some_and(|&(round, _)| round + BANDWIDTH_ROUNDS < self.round)
        {
            self.rates.pop_front();
        }
    }

    fn end_round(&mut self, now: Instant, took: Duration, app_limited: bool) {
        self.round += 1;
        self.round_began = now;
        if !self.is_starting || app_limited {
            return;
        }
        if took > self.round_trip().mul_f64(FULL_QUEUE) + BATCH {
            self.is_starting = false;
        } else if self.rate() >= self.rate_before * GROWTH {
            self.rate_before = self.rate();
            self.rounds_without_growth = 0;
        } else {
            self.rounds_without_growth += 1;
            self.is_starting = self.rounds_without_growth < ROUNDS_WITHOUT_GROWTH;
        }
    }

    fn set_window(&mut self) {
        let carries = self.rate() * self.round_trip().as_secs_f64();
        let batch = self.rate() * BATCH.as_secs_f64();
        let wanted = if self.is_starting {
            (STARTUP_GAIN * carries + batch).max(self.window as f64)
        } else {
            match self.round % CYCLE_ROUNDS {
                0 => PROBE_GAIN * carries + batch,
                1 => DRAIN_GAIN * carries,
                _ => carries + batch,
            }
        };
        self.window = (wanted as u64).max(MIN_PACKETS * self.mtu);
    }

    /// A packet was acknowledged.
    fn acknowledge(&mut self, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.newest_sent = self.newest_sent.max(Some(sent));
    }

    /// All packets of one acknowledgement were seen.
    fn end_acknowledgement(&mut self, now: Instant, app_limited: bool) {
        let Some(sent) = self.newest_sent.take() else {
            return;
        };
        self.see_round_trip(now, now.saturating_duration_since(sent));
        while self.history.get(1).is_some_and(|&(when, _)| when <= sent) {
            self.history.pop_front();
        }
        let (since, before) = self.history[0];
        let elapsed = now.saturating_duration_since(since).as_secs_f64();
        if elapsed > 0.0 {
            self.see_rate((self.delivered - before) as f64 / elapsed, app_limited);
        }
        let (last, _) = self.history[self.history.len() - 1];
        if now.saturating_duration_since(last) >= self.round_trip() / 64 {
            self.history.push_back((now, self.delivered));
        }
        if sent >= self.round_began {
            self.end_round(now, now.saturating_duration_since(sent), app_limited);
        }
        self.set_window();
    }
}

impl Controller for DeliveryRate {
    fn on_ack(
        &mut self,
        _now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.acknowledge(sent, bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        _in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.end_acknowledgement(now, app_limited);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        _lost_bytes: u64,
    ) {
        if is_persistent_congestion {
            let window = MIN_PACKETS * self.mtu;
            let mtu = u16::try_from(self.mtu).unwrap_or(u16::MAX);
            *self = Self {
                window,
                ..Self::new(now, mtu)
            };
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.window = self.window.max(MIN_PACKETS * self.mtu);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Makes one for each path.
#[derive(Debug, Default)]
pub struct DeliveryRateConfig;

impl ControllerFactory for DeliveryRateConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(DeliveryRate::new(now, current_mtu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_micros(100);
    const PACKET: u64 = 1250;

    /// Seconds on a path of one packet per step (100 Mbit/s); what arrived, in packets, and the
    /// most that waited in the path's queue, both in the second half. `lost_every`: 0 is never.
    fn carry(round_trip: Duration, lost_every: u64, seconds: u32) -> (u64, u64) {
        let mut now = Instant::now();
        let mut control = DeliveryRate::new(now, 1250);
        let limit = round_trip.as_micros() as u64 / 100;
        let (begin, mut sent, mut arrived, mut most) = (now, 0_u64, 0, 0);
        let mut queue = VecDeque::new();
        let mut returning: VecDeque<(Instant, Instant, bool)> = VecDeque::new();
        let mut in_flight = 0;
        while now - begin < Duration::from_secs(seconds.into()) {
            now += STEP;
            let is_second_half = (now - begin) * 2 > Duration::from_secs(seconds.into());
            if let Some((when, is_lost)) = queue.pop_front() {
                returning.push_back((now + round_trip, when, is_lost));
            }
            let mut is_acknowledged = false;
            while returning.front().is_some_and(|&(due, ..)| due <= now) {
                let (_, when, is_lost) = returning.pop_front().unwrap();
                in_flight -= PACKET;
                if is_lost {
                    control.on_congestion_event(now, when, false, PACKET);
                } else {
                    arrived += u64::from(is_second_half);
                    control.acknowledge(when, PACKET);
                    is_acknowledged = true;
                }
            }
            if is_acknowledged {
                control.end_acknowledgement(now, false);
            }
            while in_flight + PACKET < control.window() && (queue.len() as u64) < limit {
                sent += 1;
                queue.push_back((now, lost_every != 0 && sent.is_multiple_of(lost_every)));
                in_flight += PACKET;
            }
            if is_second_half {
                most = most.max(queue.len() as u64);
            }
        }
        (arrived, most)
    }

    #[test]
    fn it_fills_the_path_and_not_its_queue() {
        for (milliseconds, lost_every) in [(50, 0), (50, 100), (10, 100), (200, 100)] {
            let round_trip = Duration::from_millis(milliseconds);
            let (arrived, most) = carry(round_trip, lost_every, 20);
            let carries = 100_000 - 100_000_u64.checked_div(lost_every).unwrap_or(0);
            assert!(
                arrived * 100 >= carries * 97,
                "{milliseconds} ms: {arrived} of {carries}"
            );
            let bound = (round_trip / 2 + BATCH * 2).as_micros() as u64 / 100;
            assert!(
                most <= bound,
                "{milliseconds} ms: {most} waited, not {bound}"
            );
        }
    }

    #[test]
    fn a_path_that_loses_everything_gets_little() {
        let now = Instant::now();
        let mut control = DeliveryRate::new(now, 1250);
        control.on_congestion_event(now, now, true, PACKET);
        assert_eq!(control.window(), MIN_PACKETS * PACKET);
    }
}
