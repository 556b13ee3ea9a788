//! Session tickets (RFC 8446 section 4.6.1) that every worker with the same key takes.
//!
//! A client that comes back proves that it was here; no certificate is sent or checked again. The
//! keys of the session are fresh all the same (psk_dhe_ke). There is no 0-RTT.

use std::time::{SystemTime, UNIX_EPOCH};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::server::ProducesTickets;

/// A ticket is taken in the epoch of its issue and in the next one.
const EPOCH_S: u64 = 6 * 3600;
const EPOCH_BYTES: usize = 8;

/// Seals and opens tickets. Another certificate means other tickets: it is to be seen again.
#[derive(Debug)]
pub struct Tickets {
    root: hmac::Key,
}

impl Tickets {
    pub fn new(token_key: &[u8], certificate_chain_pem: &[u8]) -> Self {
        let given = hmac::Key::new(hmac::HMAC_SHA256, token_key);
        let mut context = hmac::Context::with_key(&given);
        context.update(b"toppy session tickets");
        context.update(certificate_chain_pem);
        Self {
            root: hmac::Key::new(hmac::HMAC_SHA256, context.sign().as_ref()),
        }
    }

    fn key(&self, epoch: [u8; EPOCH_BYTES]) -> Option<LessSafeKey> {
        let secret = hmac::sign(&self.root, &epoch);
        let key = UnboundKey::new(&AES_256_GCM, secret.as_ref()).ok()?;
        Some(LessSafeKey::new(key))
    }

    fn seal(&self, plain: &[u8], epoch: u64) -> Option<Vec<u8>> {
        let epoch = epoch.to_be_bytes();
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut sealed = plain.to_vec();
        self.key(epoch)?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::empty(),
                &mut sealed,
            )
            .ok()?;
        Some([&epoch, nonce.as_slice(), &sealed].concat())
    }

    fn open(&self, ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        let (epoch, rest) = ticket.split_first_chunk::<EPOCH_BYTES>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let issued = u64::from_be_bytes(*epoch);
        if issued != now && issued.checked_add(1) != Some(now) {
            return None;
        }
        let mut opened = sealed.to_vec();
        let length = self
            .key(*epoch)?
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::empty(),
                &mut opened,
            )
            .ok()?
            .len();
        opened.truncate(length);
        Some(opened)
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(EPOCH_S).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, epoch_now())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket, epoch_now())
    }
}

fn epoch_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() / EPOCH_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_opens_in_its_epoch_and_the_next() {
        let tickets = Tickets::new(b"key", b"certificate");
        let ticket = tickets.seal(b"session", 7).unwrap();
        assert_eq!(tickets.open(&ticket, 6), None);
        assert_eq!(tickets.open(&ticket, 7), Some(b"session".to_vec()));
        assert_eq!(tickets.open(&ticket, 8), Some(b"session".to_vec()));
        assert_eq!(tickets.open(&ticket, 9), None);
        let now = tickets.encrypt(b"").unwrap();
        assert_eq!(tickets.decrypt(&now), Some(Vec::new()));
    }

    #[test]
    fn another_worker_with_the_same_key_opens_it_and_nobody_else() {
        let ticket = Tickets::new(b"key", b"certificate")
            .seal(b"session", 7)
            .unwrap();
        for (key, certificate, is_taken) in [
            ("key", "certificate", true),
            ("other", "certificate", false),
            ("key", "other", false),
        ] {
            let tickets = Tickets::new(key.as_bytes(), certificate.as_bytes());
            assert_eq!(tickets.open(&ticket, 7).is_some(), is_taken);
        }
    }

    #[test]
    fn what_is_cut_or_changed_is_refused() {
        let tickets = Tickets::new(b"key", b"certificate");
        let ticket = tickets.seal(b"session", 7).unwrap();
        for length in 0..ticket.len() {
            assert_eq!(tickets.open(&ticket[..length], 7), None);
            let mut changed = ticket.clone();
            changed[length] ^= 1;
            assert_eq!(tickets.open(&changed, 7), None);
            assert_eq!(tickets.open(&changed, 6), None);
        }
    }
}
