//! From toppy's `EngineConfig` to the configuration of quinn-proto and rustls.

use std::sync::Arc;
use std::time::Duration;

use quinn_proto::congestion::{ControllerFactory, CubicConfig, NewRenoConfig};
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, NoneTokenStore, ServerConfig,
    TimeSource, TransportConfig, VarInt,
};
use ring::rand::{SecureRandom, SystemRandom};
use ring::{hkdf, hmac};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::quic::Suite;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, SupportedCipherSuite};

use crate::connection_id::{MAX_CONNECTION_ID_BYTES, PrefixedIds};
use crate::delivery_rate::DeliveryRateConfig;
use crate::streams::MIN_SEND_WINDOW_BYTES;
use crate::tickets::Tickets;

/// Of the reset key and the token key.
pub const KEY_BYTES: usize = 64;

/// What quinn-proto may hold of outgoing datagrams. It is fed much less at a time; the size leaves
/// room for the largest datagram beside that, so that it never refuses one.
pub const DATAGRAM_BUFFER_BYTES: usize = 256 * 1024;

/// Arrived datagrams are taken out of quinn-proto after each received buffer, of 64 KiB at most.
const DATAGRAM_RECEIVE_BUFFER_BYTES: usize = 4 << 20;
/// Below this an Initial packet does not fit (RFC 9000 section 14).
const MIN_PACKET_BYTES: u16 = 1200;
/// What a path that seems to drop larger packets still gets: IPv4 with an MTU of 1,280. quinn-proto
/// takes a few bursts of losses for such a path where every lost packet is above this. So it is above
/// the packets of an inner QUIC handshake (1,200 bytes and some 36 around them): below them, a buffer
/// that overflowed would have sent them as capsules for a minute.
const FALLBACK_PACKET_BYTES: u16 = 1252;
/// Then larger packets are tried again.
const BLACK_HOLE_COOLDOWN: Duration = Duration::from_secs(2);
/// The largest UDP payload that IPv6 carries.
const MAX_PACKET_BYTES: u16 = 65_527;
const MAX_STREAMS: u32 = 100_000;
/// What a peer may have open at first. quinn-proto makes room for each allowed stream at once, 64
/// bytes or so: more are allowed as they are used.
const FIRST_STREAMS: u32 = 64;
/// RFC 9000 section 7.2 asks for 8 at least of a client's first ID, which is of the server's length
/// after a Retry.
const MIN_CONNECTION_ID_BYTES: usize = 8;
const MIN_RANDOM_BYTES: usize = 4;
/// At most a thousand stateless resets a second.
const MIN_RESET_INTERVAL: Duration = Duration::from_millis(1);
const RETRY_TOKEN_LIFETIME: Duration = Duration::from_secs(15);
/// Gateways whose sessions a client remembers.
const MAX_SESSIONS: usize = 16;
/// Connection attempts are decided on after each received buffer, which holds some fifty.
const MAX_ATTEMPTS: usize = 1024;
const ATTEMPT_BUFFER_BYTES: u64 = 64 * 1024;
const ATTEMPT_BUFFERS_BYTES: u64 = 4 << 20;

/// `toppy.quic.engine.EngineConfig`, field by field.
#[derive(Clone)]
pub struct Settings {
    pub is_client: bool,
    pub alpn_protocols: Vec<String>,
    pub certificate_chain_pem: Vec<u8>,
    pub private_key_pem: Vec<u8>,
    pub ca_certificates_pem: Option<Vec<u8>>,
    pub idle_timeout_s: f64,
    pub keep_alive_s: Option<f64>,
    pub congestion_control: String,
    pub initial_packet_bytes: u64,
    pub max_packet_bytes: u64,
    pub max_bidirectional_streams: u64,
    pub max_unidirectional_streams: u64,
    pub stream_window_bytes: u64,
    pub connection_window_bytes: u64,
    pub paused_window_bytes: u64,
    pub tunnel_queue_bytes: u64,
    pub connection_queue_bytes: u64,
    pub connection_id_prefix: Vec<u8>,
    pub reset_prefix: Vec<u8>,
    pub connection_id_bytes: u64,
    pub reset_key: Vec<u8>,
    pub token_key: Vec<u8>,
    pub resumes_sessions: bool,
    pub client_ca_pem: Vec<u8>,
    pub requires_client_certificate: bool,
    pub cipher_suites: Vec<String>,
}

/// The same for quinn-proto: one of `server` and `client` is there.
pub struct Prepared {
    pub endpoint: EndpointConfig,
    pub server: Option<ServerConfig>,
    pub client: Option<ClientConfig>,
}

impl Settings {
    /// Check everything and translate it; the error is a sentence that names the setting.
    pub fn prepare(&self, time_source: Arc<dyn TimeSource>) -> Result<Prepared, String> {
        if self.alpn_protocols.is_empty() {
            return Err("alpn_protocols must name at least one protocol".into());
        }
        let endpoint = self.endpoint_config()?;
        let transport = Arc::new(self.transport_config()?);
        let token_key = key("token_key", &self.token_key)?;
        if self.is_client {
            let mut client = ClientConfig::new(Arc::new(self.client_crypto()?));
            client
                .transport_config(transport)
                .token_store(Arc::new(NoneTokenStore));
            return Ok(Prepared {
                endpoint,
                server: None,
                client: Some(client),
            });
        }
        let crypto = self.server_crypto(&token_key)?;
        let token_key = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&token_key);
        let mut server = ServerConfig::new(Arc::new(crypto), Arc::new(token_key));
        server
            .transport_config(transport)
            .retry_token_lifetime(RETRY_TOKEN_LIFETIME)
            .time_source(time_source)
            .max_incoming(MAX_ATTEMPTS)
            .incoming_buffer_size(ATTEMPT_BUFFER_BYTES)
            .incoming_buffer_size_total(ATTEMPT_BUFFERS_BYTES);
        Ok(Prepared {
            endpoint,
            server: Some(server),
            client: None,
        })
    }

    fn endpoint_config(&self) -> Result<EndpointConfig, String> {
        let length = usize::try_from(self.connection_id_bytes).unwrap_or(usize::MAX);
        if !(MIN_CONNECTION_ID_BYTES..=MAX_CONNECTION_ID_BYTES).contains(&length) {
            return Err("connection_id_bytes must be from 8 to 20".into());
        }
        if length < self.connection_id_prefix.len() + MIN_RANDOM_BYTES {
            return Err("connection_id_bytes must leave 4 random bytes behind the prefix".into());
        }
        let reset_key = key("reset_key", &self.reset_key)?;
        let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &reset_key);
        let ids = PrefixedIds::new(
            self.connection_id_prefix.clone(),
            self.reset_prefix.clone(),
            length,
        );
        let mut config = EndpointConfig::new(Arc::new(reset_key));
        config
            .cid_generator(move || Box::new(ids.clone()))
            .supported_versions(vec![1])
            .min_reset_interval(MIN_RESET_INTERVAL);
        config
            .max_udp_payload_size(MAX_PACKET_BYTES)
            .map_err(|error| error.to_string())?;
        Ok(config)
    }

    /// What a peer may come to have open at once; see `FIRST_STREAMS`.
    pub fn most_streams(&self) -> Result<VarInt, String> {
        streams("max_bidirectional_streams", self.max_bidirectional_streams)
    }

    fn transport_config(&self) -> Result<TransportConfig, String> {
        let initial = packet_bytes("initial_packet_bytes", self.initial_packet_bytes)?;
        let largest = packet_bytes("max_packet_bytes", self.max_packet_bytes)?;
        let mut discovery = MtuDiscoveryConfig::default();
        discovery
            .upper_bound(largest.max(initial))
            .black_hole_cooldown(BLACK_HOLE_COOLDOWN);
        let mut config = TransportConfig::default();
        config
            .initial_mtu(initial)
            .min_mtu(initial.min(FALLBACK_PACKET_BYTES))
            .mtu_discovery_config(Some(discovery))
            .max_concurrent_bidi_streams(self.most_streams()?.min(FIRST_STREAMS.into()))
            .max_concurrent_uni_streams(streams(
                "max_unidirectional_streams",
                self.max_unidirectional_streams,
            )?)
            .stream_receive_window(window("stream_window_bytes", self.stream_window_bytes)?)
            .receive_window(window(
                "connection_window_bytes",
                self.connection_window_bytes,
            )?)
            .send_window(MIN_SEND_WINDOW_BYTES)
            .max_idle_timeout(idle_timeout(self.idle_timeout_s)?)
            .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BUFFER_BYTES))
            .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES)
            .congestion_controller_factory(congestion(&self.congestion_control)?);
        if let Some(seconds) = self.keep_alive_s {
            let interval = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            if interval.is_zero() {
                return Err("keep_alive_s must be a number of seconds above 0".into());
            }
            config.keep_alive_interval(self.is_client.then_some(interval));
        }
        Ok(config)
    }

    fn client_crypto(&self) -> Result<QuicClientConfig, String> {
        let builder = rustls::ClientConfig::builder_with_provider(self.provider()?)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(self.roots()?);
        let mut config = if self.certificate_chain_pem.is_empty() {
            builder.with_no_client_auth()
        } else {
            builder
                .with_client_auth_cert(self.chain()?, self.private_key()?)
                .map_err(|error| unusable_pair(&error))?
        };
        config.alpn_protocols = self.alpn();
        config.resumption = if self.resumes_sessions {
            Resumption::in_memory_sessions(MAX_SESSIONS)
        } else {
            Resumption::disabled()
        };
        QuicClientConfig::with_initial(Arc::new(config), initial_suite()?)
            .map_err(|error| error.to_string())
    }

    fn server_crypto(&self, token_key: &[u8]) -> Result<QuicServerConfig, String> {
        let provider = self.provider()?;
        let verifier = self.client_verifier(&provider)?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain()?, self.private_key()?)
            .map_err(|error| unusable_pair(&error))?;
        config.alpn_protocols = self.alpn();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = usize::from(self.resumes_sessions);
        if self.resumes_sessions {
            // a session keeps its client's certificate: another CA means that it is shown again
            let is_required = [u8::from(self.requires_client_certificate)];
            let seen = [
                &*self.certificate_chain_pem,
                &*self.client_ca_pem,
                &is_required,
            ]
            .concat();
            config.ticketer = Arc::new(Tickets::new(token_key, &seen));
        }
        QuicServerConfig::with_initial(Arc::new(config), initial_suite()?)
            .map_err(|error| error.to_string())
    }

    fn client_verifier(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, String> {
        if self.client_ca_pem.is_empty() {
            return Ok(WebPkiClientVerifier::no_client_auth());
        }
        let mut roots = RootCertStore::empty();
        let found = certificates("client_ca_pem", &self.client_ca_pem)?;
        if roots.add_parsable_certificates(found).0 == 0 {
            return Err("client_ca_pem holds no usable root certificate".into());
        }
        let builder =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
        let builder = if self.requires_client_certificate {
            builder
        } else {
            builder.allow_unauthenticated()
        };
        builder
            .build()
            .map_err(|error| format!("client_ca_pem cannot be used: {error}"))
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        certificates("certificate_chain_pem", &self.certificate_chain_pem)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, String> {
        PrivateKeyDer::from_pem_slice(&self.private_key_pem)
            .map_err(|_| "private_key_pem is not an unencrypted private key in PEM".into())
    }

    /// ring, with the cipher suites that are wanted, in their order.
    fn provider(&self) -> Result<Arc<CryptoProvider>, String> {
        let mut provider = rustls::crypto::ring::default_provider();
        if !self.cipher_suites.is_empty() {
            let known = provider.cipher_suites;
            provider.cipher_suites = self
                .cipher_suites
                .iter()
                .map(|name| {
                    known
                        .iter()
                        .find(|suite| suite.tls13().is_some() && suite_name(suite) == *name)
                        .copied()
                        .ok_or_else(|| format!("cipher_suites: TLS 1.3 has none called {name}"))
                })
                .collect::<Result<_, _>>()?;
        }
        Ok(Arc::new(provider))
    }

    fn alpn(&self) -> Vec<Vec<u8>> {
        self.alpn_protocols
            .iter()
            .map(|protocol| protocol.clone().into_bytes())
            .collect()
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        let (name, found) = match &self.ca_certificates_pem {
            Some(pem) => (
                "ca_certificates_pem",
                certificates("ca_certificates_pem", pem)?,
            ),
            None => (
                "the system's certificate store",
                rustls_native_certs::load_native_certs().certs,
            ),
        };
        let (usable, _) = roots.add_parsable_certificates(found);
        if usable == 0 {
            return Err(format!("{name} holds no usable root certificate"));
        }
        Ok(roots)
    }
}

/// As RFC 8446 writes it: rustls has `TLS13_` for its `TLS_`.
fn suite_name(suite: &SupportedCipherSuite) -> String {
    format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1)
}

/// What protects first packets, whatever suites are wanted after them (RFC 9001 section 5.2).
fn initial_suite() -> Result<Suite, String> {
    TLS13_AES_128_GCM_SHA256
        .tls13()
        .and_then(|suite| suite.quic_suite())
        .ok_or_else(|| "TLS13_AES_128_GCM_SHA256 is not built in".into())
}

fn unusable_pair(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            "private_key_pem does not belong to the first certificate".into()
        }
        other => {
            format!("certificate_chain_pem and private_key_pem cannot be used together: {other}")
        }
    }
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!(
            "{name} holds no certificate in PEM, or a broken one"
        )),
    }
}

/// The given key, or a random one where it is empty.
fn key(name: &str, given: &[u8]) -> Result<[u8; KEY_BYTES], String> {
    if given.is_empty() {
        let mut random = [0; KEY_BYTES];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| "the system gives no random bytes")?;
        return Ok(random);
    }
    given
        .try_into()
        .map_err(|_| format!("{name} must be {KEY_BYTES} bytes"))
}

fn packet_bytes(name: &str, value: u64) -> Result<u16, String> {
    u16::try_from(value)
        .ok()
        .filter(|bytes| (MIN_PACKET_BYTES..=MAX_PACKET_BYTES).contains(bytes))
        .ok_or_else(|| format!("{name} must be from {MIN_PACKET_BYTES} to {MAX_PACKET_BYTES}"))
}

fn streams(name: &str, value: u64) -> Result<VarInt, String> {
    u32::try_from(value)
        .ok()
        .filter(|&count| count <= MAX_STREAMS)
        .map(VarInt::from_u32)
        .ok_or_else(|| format!("{name} must be from 0 to {MAX_STREAMS}"))
}

fn window(name: &str, value: u64) -> Result<VarInt, String> {
    VarInt::from_u64(value)
        .ok()
        .filter(|&bytes| bytes > VarInt::from_u32(0))
        .ok_or_else(|| format!("{name} must be from 1 to 2**62 - 1"))
}

fn idle_timeout(seconds: f64) -> Result<Option<IdleTimeout>, String> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|timeout| !timeout.is_zero())
        .and_then(|timeout| IdleTimeout::try_from(timeout).ok())
        .map(Some)
        .ok_or_else(|| "idle_timeout_s must be a number of seconds above 0".into())
}

fn congestion(name: &str) -> Result<Arc<dyn ControllerFactory + Send + Sync>, String> {
    match name {
        "cubic" => Ok(Arc::new(CubicConfig::default())),
        "bbr" => Ok(Arc::new(DeliveryRateConfig)),
        "newreno" => Ok(Arc::new(NewRenoConfig::default())),
        other => Err(format!(
            "congestion_control must be cubic, bbr or newreno, not {other}"
        )),
    }
}

#[cfg(test)]
pub mod examples {
    use super::Settings;

    /// A server's settings with a certificate for localhost, and a client's that trust it.
    pub fn pair() -> (Settings, Settings) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let certificate = made.cert.pem().into_bytes();
        let server = Settings {
            is_client: false,
            alpn_protocols: vec!["h3".into()],
            certificate_chain_pem: certificate.clone(),
            private_key_pem: made.signing_key.serialize_pem().into_bytes(),
            ca_certificates_pem: None,
            idle_timeout_s: 30.0,
            keep_alive_s: None,
            congestion_control: "cubic".into(),
            initial_packet_bytes: 1350,
            max_packet_bytes: 1452,
            max_bidirectional_streams: 8,
            max_unidirectional_streams: 4,
            stream_window_bytes: 1 << 20,
            connection_window_bytes: 16 << 20,
            paused_window_bytes: 64 << 20,
            tunnel_queue_bytes: 1 << 20,
            connection_queue_bytes: 8 << 20,
            connection_id_prefix: Vec::new(),
            reset_prefix: Vec::new(),
            connection_id_bytes: 10,
            reset_key: vec![1; 64],
            token_key: vec![2; 64],
            resumes_sessions: true,
            client_ca_pem: Vec::new(),
            requires_client_certificate: false,
            cipher_suites: Vec::new(),
        };
        let client = Settings {
            is_client: true,
            ca_certificates_pem: Some(certificate),
            certificate_chain_pem: Vec::new(),
            private_key_pem: Vec::new(),
            ..server.clone()
        };
        (server, client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    fn refusal(settings: &Settings) -> String {
        let prepared = settings.prepare(Clock::new(0.0).time_source());
        prepared.err().unwrap_or_default()
    }

    #[test]
    fn good_settings_are_taken() {
        let (server, client) = examples::pair();
        assert_eq!(refusal(&server), "");
        assert_eq!(refusal(&client), "");
        for name in ["cubic", "bbr", "newreno"] {
            let changed = Settings {
                congestion_control: name.into(),
                keep_alive_s: Some(10.0),
                reset_key: Vec::new(),
                ..client.clone()
            };
            assert_eq!(refusal(&changed), "");
        }
    }

    #[test]
    fn a_bad_setting_is_named() {
        type Change = fn(&mut Settings);
        let changes: [(&str, Change); 16] = [
            ("alpn_protocols", |s| s.alpn_protocols.clear()),
            ("congestion_control", |s| {
                s.congestion_control = "vegas".into();
            }),
            ("initial_packet_bytes", |s| s.initial_packet_bytes = 1199),
            ("max_packet_bytes", |s| s.max_packet_bytes = 65_528),
            ("max_bidirectional_streams", |s| {
                s.max_bidirectional_streams = 1 << 40;
            }),
            ("max_unidirectional_streams", |s| {
                s.max_unidirectional_streams = 100_001;
            }),
            ("stream_window_bytes", |s| s.stream_window_bytes = 0),
            ("connection_window_bytes", |s| {
                s.connection_window_bytes = 1 << 62;
            }),
            ("connection_id_bytes", |s| s.connection_id_bytes = 21),
            ("connection_id_bytes", |s| s.connection_id_bytes = 7),
            ("prefix", |s| s.connection_id_prefix = vec![0; 7]),
            ("reset_key", |s| s.reset_key = vec![0; 63]),
            ("token_key", |s| s.token_key = vec![0; 65]),
            ("idle_timeout_s", |s| s.idle_timeout_s = 0.0),
            ("idle_timeout_s", |s| s.idle_timeout_s = f64::NAN),
            ("keep_alive_s", |s| s.keep_alive_s = Some(-1.0)),
        ];
        for (name, change) in changes {
            let (mut server, _) = examples::pair();
            change(&mut server);
            assert!(refusal(&server).contains(name), "{}", refusal(&server));
        }
    }

    #[test]
    fn cipher_suites_are_those_of_tls_13_alone() {
        let (server, client) = examples::pair();
        for names in [
            &["TLS_CHACHA20_POLY1305_SHA256"][..],
            &["TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"],
        ] {
            for settings in [&server, &client] {
                let mut changed = settings.clone();
                changed.cipher_suites = names.iter().map(|&name| name.to_owned()).collect();
                assert_eq!(refusal(&changed), "");
            }
        }
        let mut changed = server;
        changed.cipher_suites = vec!["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256".into()];
        assert!(refusal(&changed).contains("cipher_suites"));
    }

    #[test]
    fn client_certificates_need_an_authority_that_can_be_read() {
        let (server, client) = examples::pair();
        let mut changed = server.clone();
        changed.client_ca_pem = server.certificate_chain_pem.clone();
        changed.requires_client_certificate = true;
        assert_eq!(refusal(&changed), "");
        changed.client_ca_pem = b"garbage".to_vec();
        assert!(refusal(&changed).contains("client_ca_pem"));
        let mut changed = client;
        changed.certificate_chain_pem = server.certificate_chain_pem;
        assert!(refusal(&changed).contains("private_key_pem"));
        changed.private_key_pem = server.private_key_pem;
        assert_eq!(refusal(&changed), "");
    }

    #[test]
    fn bad_certificates_and_keys_are_refused() {
        let (server, client) = examples::pair();
        let (other, _) = examples::pair();
        let cut = &server.certificate_chain_pem[..100];
        for chain in [b"".as_slice(), b"garbage", cut] {
            let mut changed = server.clone();
            changed.certificate_chain_pem = chain.to_vec();
            assert!(refusal(&changed).contains("certificate_chain_pem"));
            let mut changed = client.clone();
            changed.ca_certificates_pem = Some(chain.to_vec());
            assert!(refusal(&changed).contains("ca_certificates_pem"));
        }
        let empty = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        for key in [b"".as_slice(), b"garbage", empty, &other.private_key_pem] {
            let mut changed = server.clone();
            changed.private_key_pem = key.to_vec();
            assert!(refusal(&changed).contains("private_key_pem"));
        }
    }
}
