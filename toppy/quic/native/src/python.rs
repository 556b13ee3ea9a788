//! The extension module `toppy.quic._native`: bytes, numbers and tuples in and out.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use bytes::BytesMut;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use quinn_proto::{Dir, VarInt};

use crate::connection::Event;
use crate::endpoint::{Admission, Endpoint as Core};
use crate::settings::Settings;

/// Address tuples that are kept for use again.
const MAX_KNOWN_ADDRESSES: usize = 4096;
/// Network interfaces that link-local addresses name.
const MAX_ZONES: usize = 64;

/// The extension module.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::Endpoint;
}

/// Many QUIC connections behind one UDP port; `toppy.quic.native_engine` describes it.
#[pyclass(module = "toppy.quic._native")]
struct Endpoint {
    core: Core,
    gate: Option<Py<PyAny>>,
    addresses: AddressBook,
    scratch: Vec<u8>,
}

#[pymethods]
impl Endpoint {
    #[new]
    fn new(config: &Bound<'_, PyAny>, gate: Option<Py<PyAny>>, now: f64) -> PyResult<Self> {
        let settings = read_settings(config)?;
        Ok(Self {
            core: Core::new(&settings, now).map_err(PyValueError::new_err)?,
            gate,
            addresses: AddressBook::default(),
            scratch: Vec::new(),
        })
    }

    fn connect(
        &mut self,
        address: &Bound<'_, PyTuple>,
        server_name: &str,
        now: f64,
    ) -> PyResult<u64> {
        let address = self.addresses.parse(address)?;
        self.core
            .connect(address, server_name, now)
            .map_err(PyValueError::new_err)
    }

    fn receive(
        &mut self,
        py: Python<'_>,
        buffer: &Bound<'_, PyAny>,
        segment_size: usize,
        source: &Bound<'_, PyTuple>,
        now: f64,
    ) -> PyResult<()> {
        let source = self.addresses.parse(source)?;
        let data = copy(buffer)?;
        let core = &mut self.core;
        py.detach(|| core.receive(data, segment_size, source, now));
        self.decide_on_attempts(py)
    }

    fn handle_timeout(&mut self, py: Python<'_>, now: f64) {
        let core = &mut self.core;
        py.detach(|| core.handle_timeout(now));
    }

    fn next_timeout(&self) -> Option<f64> {
        self.core.next_timeout()
    }

    fn poll_events<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for event in self.core.poll_events() {
            list.append(self.event_tuple(py, event)?)?;
        }
        Ok(list)
    }

    fn poll_datagrams<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for group in self.core.poll_datagrams() {
            list.append((
                group.connection,
                group.quarter_stream_id,
                PyBytes::new(py, &group.data),
                group.segment_bytes,
            ))?;
        }
        Ok(list)
    }

    fn poll_transmits<'py>(&mut self, py: Python<'py>, now: f64) -> PyResult<Bound<'py, PyList>> {
        let core = &mut self.core;
        let transmits = py.detach(|| core.poll_transmits(now));
        let list = PyList::empty(py);
        for transmit in transmits {
            let destination = self.addresses.tuple(py, transmit.destination)?;
            let data = PyBytes::new(py, &transmit.data);
            list.append((data, transmit.segment_bytes, destination))?;
            self.core.recycle(transmit.data);
        }
        Ok(list)
    }

    fn open_stream(&mut self, connection: u64, is_unidirectional: bool) -> Option<u64> {
        let dir = if is_unidirectional { Dir::Uni } else { Dir::Bi };
        self.core.open_stream(connection, dir)
    }

    fn send_stream(
        &mut self,
        connection: u64,
        stream_id: u64,
        data: &Bound<'_, PyAny>,
        end: bool,
    ) -> PyResult<()> {
        let data = borrow(data, &mut self.scratch)?;
        self.core.send_stream(connection, stream_id, data, end);
        Ok(())
    }

    fn stream_backlog_bytes(&self, connection: u64, stream_id: u64) -> usize {
        self.core.stream_backlog_bytes(connection, stream_id)
    }

    fn datagram_backlog_bytes(&self, connection: u64, quarter_stream_id: u64) -> usize {
        self.core
            .datagram_backlog_bytes(connection, quarter_stream_id)
    }

    fn reset_stream(&mut self, connection: u64, stream_id: u64, error_code: u64) -> PyResult<()> {
        let code = read_code(error_code)?;
        self.core.reset_stream(connection, stream_id, code);
        Ok(())
    }

    fn stop_stream(&mut self, connection: u64, stream_id: u64, error_code: u64) -> PyResult<()> {
        let code = read_code(error_code)?;
        self.core.stop_stream(connection, stream_id, code);
        Ok(())
    }

    fn pause_reading(&mut self, connection: u64, stream_id: u64) {
        self.core.pause_reading(connection, stream_id);
    }

    fn resume_reading(&mut self, connection: u64, stream_id: u64) {
        self.core.resume_reading(connection, stream_id);
    }

    fn notify_writable(&mut self, connection: u64, stream_id: u64, below_bytes: usize) {
        self.core
            .notify_writable(connection, stream_id, below_bytes);
    }

    fn widen_connection(&mut self, connection: u64, window_bytes: u64) {
        self.core.widen_connection(connection, window_bytes);
    }

    fn max_payload_bytes(&mut self, connection: u64, quarter_stream_id: u64) -> i64 {
        self.core
            .max_payload_bytes(connection, quarter_stream_id)
            .and_then(|bytes| i64::try_from(bytes).ok())
            .unwrap_or(-1)
    }

    fn send_datagrams(
        &mut self,
        connection: u64,
        quarter_stream_id: u64,
        payloads: &Bound<'_, PyAny>,
        segment_size: usize,
    ) -> PyResult<()> {
        let payloads = borrow(payloads, &mut self.scratch)?;
        self.core
            .send_datagrams(connection, quarter_stream_id, payloads, segment_size);
        Ok(())
    }

    fn close(&mut self, connection: u64, error_code: u64, reason: &str, now: f64) -> PyResult<()> {
        self.core
            .close(connection, read_code(error_code)?, reason, now);
        Ok(())
    }

    fn peer_address<'py>(
        &mut self,
        py: Python<'py>,
        connection: u64,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        match self.core.peer_address(connection) {
            Some(address) => self.addresses.tuple(py, address).map(Some),
            None => Ok(None),
        }
    }

    fn peer_certificates<'py>(
        &self,
        py: Python<'py>,
        connection: u64,
    ) -> PyResult<Bound<'py, PyList>> {
        let chain = self.core.peer_certificates(connection);
        PyList::new(py, chain.iter().map(|each| PyBytes::new(py, each)))
    }

    fn supports_datagrams(&mut self, connection: u64) -> bool {
        self.core.supports_datagrams(connection)
    }

    fn round_trip_s(&self, connection: u64) -> f64 {
        self.core.round_trip_s(connection)
    }

    fn take_drops(&mut self) -> Vec<(&'static str, u64)> {
        self.core.take_drops()
    }
}

impl Endpoint {
    /// Ask the gate about each connection attempt. Should it raise, all of them are ignored.
    fn decide_on_attempts(&mut self, py: Python<'_>) -> PyResult<()> {
        let mut raised = None;
        while let Some((source, is_validated)) = self.core.next_attempt() {
            let decision = match &self.gate {
                _ if raised.is_some() => Ok(Admission::Ignore),
                Some(gate) => self
                    .addresses
                    .tuple(py, source)
                    .and_then(|source| gate.bind(py).call1((source, is_validated)))
                    .and_then(|answer| read_admission(&answer)),
                None => Ok(Admission::Accept),
            };
            let admission = decision.unwrap_or_else(|error| {
                raised = Some(error);
                Admission::Ignore
            });
            self.core.decide(admission);
        }
        raised.map_or(Ok(()), Err)
    }

    /// (index of the event's class in `native_engine`, its arguments).
    fn event_tuple<'py>(&mut self, py: Python<'py>, event: Event) -> PyResult<Bound<'py, PyTuple>> {
        let (kind, fields) = match event {
            Event::Accepted { connection, source } => {
                let source = self.addresses.tuple(py, source)?;
                (0, (connection, source).into_pyobject(py)?)
            }
            Event::HandshakeCompleted {
                connection,
                alpn_protocol,
            } => (1, (connection, alpn_protocol).into_pyobject(py)?),
            Event::StreamData {
                connection,
                stream,
                data,
                is_ended,
            } => {
                let data = PyBytes::new(py, &data);
                (2, (connection, stream, data, is_ended).into_pyobject(py)?)
            }
            Event::StreamReset {
                connection,
                stream,
                error_code,
            } => (3, (connection, stream, error_code).into_pyobject(py)?),
            Event::StopSending {
                connection,
                stream,
                error_code,
            } => (4, (connection, stream, error_code).into_pyobject(py)?),
            Event::Closed { connection, ending } => {
                let fields = (
                    connection,
                    ending.error_code,
                    ending.reason,
                    ending.is_by_peer,
                );
                (5, fields.into_pyobject(py)?)
            }
            Event::StreamsAvailable { connection } => (6, (connection,).into_pyobject(py)?),
            Event::StreamWritable { connection, stream } => {
                (7, (connection, stream).into_pyobject(py)?)
            }
        };
        (kind, fields).into_pyobject(py)
    }
}

/// Addresses as Python has them: (host, port), where a link-local host names its zone.
#[derive(Default)]
struct AddressBook {
    tuples: HashMap<SocketAddr, Py<PyTuple>>,
    /// The name of a zone is at its scope ID less 1.
    zones: Vec<String>,
}

impl AddressBook {
    fn parse(&mut self, address: &Bound<'_, PyTuple>) -> PyResult<SocketAddr> {
        let host = address.get_item(0)?;
        let host: &str = host.extract()?;
        let port: u16 = address.get_item(1)?.extract()?;
        self.find(host, port)
            .ok_or_else(|| PyValueError::new_err(format!("{host} is not a numeric address")))
    }

    fn find(&mut self, host: &str, port: u16) -> Option<SocketAddr> {
        let Some((host, zone)) = host.split_once('%') else {
            return Some(SocketAddr::new(host.parse::<IpAddr>().ok()?, port));
        };
        let address = host.parse::<Ipv6Addr>().ok()?;
        let known = self.zones.iter().position(|each| each == zone);
        let index = match known {
            Some(index) => index,
            None if self.zones.len() < MAX_ZONES => {
                self.zones.push(zone.to_owned());
                self.zones.len() - 1
            }
            None => return None,
        };
        let scope = u32::try_from(index + 1).ok()?;
        Some(SocketAddrV6::new(address, port, 0, scope).into())
    }

    fn tuple<'py>(
        &mut self,
        py: Python<'py>,
        address: SocketAddr,
    ) -> PyResult<Bound<'py, PyTuple>> {
        if let Some(tuple) = self.tuples.get(&address) {
            return Ok(tuple.bind(py).clone());
        }
        let host = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => {
                let index = v6.scope_id() as usize - 1;
                let zone = self.zones.get(index).map_or("", String::as_str);
                format!("{}%{zone}", v6.ip())
            }
            other => other.ip().to_string(),
        };
        let tuple = (host, address.port()).into_pyobject(py)?;
        if self.tuples.len() >= MAX_KNOWN_ADDRESSES {
            self.tuples.clear();
        }
        self.tuples.insert(address, tuple.clone().unbind());
        Ok(tuple)
    }
}

fn read_settings(config: &Bound<'_, PyAny>) -> PyResult<Settings> {
    let number = |name: &str| -> PyResult<u64> {
        let value = config.getattr(name)?;
        value.extract().map_err(|_| {
            PyValueError::new_err(format!("{name} must be a whole number of 0 or more"))
        })
    };
    Ok(Settings {
        is_client: config.getattr("is_client")?.extract()?,
        alpn_protocols: config.getattr("alpn_protocols")?.extract()?,
        certificate_chain_pem: config.getattr("certificate_chain_pem")?.extract()?,
        private_key_pem: config.getattr("private_key_pem")?.extract()?,
        ca_certificates_pem: config.getattr("ca_certificates_pem")?.extract()?,
        idle_timeout_s: config.getattr("idle_timeout_s")?.extract()?,
        keep_alive_s: config.getattr("keep_alive_s")?.extract()?,
        congestion_control: config.getattr("congestion_control")?.extract()?,
        initial_packet_bytes: number("initial_packet_bytes")?,
        max_packet_bytes: number("max_packet_bytes")?,
        max_bidirectional_streams: number("max_bidirectional_streams")?,
        max_unidirectional_streams: number("max_unidirectional_streams")?,
        stream_window_bytes: number("stream_window_bytes")?,
        connection_window_bytes: number("connection_window_bytes")?,
        paused_window_bytes: number("paused_window_bytes")?,
        tunnel_queue_bytes: number("tunnel_queue_bytes")?,
        connection_queue_bytes: number("connection_queue_bytes")?,
        connection_id_prefix: config.getattr("connection_id_prefix")?.extract()?,
        reset_prefix: config.getattr("reset_prefix")?.extract()?,
        connection_id_bytes: number("connection_id_bytes")?,
        reset_key: config.getattr("reset_key")?.extract()?,
        token_key: config.getattr("token_key")?.extract()?,
        resumes_sessions: config.getattr("resumes_sessions")?.extract()?,
        client_ca_pem: config.getattr("client_ca_pem")?.extract()?,
        requires_client_certificate: config.getattr("requires_client_certificate")?.extract()?,
        cipher_suites: config.getattr("cipher_suites")?.extract()?,
    })
}

fn read_admission(answer: &Bound<'_, PyAny>) -> PyResult<Admission> {
    match answer.extract()? {
        "accept" => Ok(Admission::Accept),
        "retry" => Ok(Admission::Retry),
        "refuse" => Ok(Admission::Refuse),
        "ignore" => Ok(Admission::Ignore),
        other => Err(PyValueError::new_err(format!("{other} is no admission"))),
    }
}

fn read_code(error_code: u64) -> PyResult<VarInt> {
    VarInt::from_u64(error_code)
        .map_err(|_| PyValueError::new_err("error_code must be from 0 to 2**62 - 1"))
}

/// The bytes of a buffer, in memory of our own.
fn copy(buffer: &Bound<'_, PyAny>) -> PyResult<BytesMut> {
    if let Ok(bytes) = buffer.cast::<PyBytes>() {
        return Ok(BytesMut::from(bytes.as_bytes()));
    }
    let view = PyBuffer::<u8>::get(buffer)?;
    let mut data = BytesMut::zeroed(view.item_count());
    view.copy_to_slice(buffer.py(), &mut data)?;
    Ok(data)
}

/// The bytes of a buffer, in place where Python promises not to change them.
fn borrow<'a>(buffer: &'a Bound<'_, PyAny>, scratch: &'a mut Vec<u8>) -> PyResult<&'a [u8]> {
    if let Ok(bytes) = buffer.cast::<PyBytes>() {
        return Ok(bytes.as_bytes());
    }
    let view = PyBuffer::<u8>::get(buffer)?;
    let length = view.item_count();
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
    view.copy_to_slice(buffer.py(), &mut scratch[..length])?;
    Ok(&scratch[..length])
}
