//! Why a connection ended, in words for people.

use quinn_proto::{ApplicationClose, ConnectionClose, ConnectionError, TransportErrorCode};

/// RFC 9000 section 20.1: INTERNAL_ERROR.
const INTERNAL_ERROR: u64 = 0x1;
/// RFC 9001 section 4.8: a TLS alert is a QUIC error from here on.
const CRYPTO_ERROR: u64 = 0x100;
/// A reason phrase must fit a packet beside two others.
const MAX_REASON_BYTES: usize = 200;

/// What `ConnectionClosed` says of an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    pub error_code: u64,
    pub reason: String,
    pub is_by_peer: bool,
}

impl Ending {
    /// We close, with an application error code.
    pub fn ours(error_code: u64, reason: &str) -> Self {
        Self {
            error_code,
            reason: or(reason, "closed"),
            is_by_peer: false,
        }
    }

    /// A bug below us broke this connection, and only this one.
    pub fn internal() -> Self {
        Self::ours(INTERNAL_ERROR, "internal error")
    }

    /// quinn-proto says why.
    pub fn from_error(error: &ConnectionError) -> Self {
        match error {
            ConnectionError::TransportError(error) => {
                let code = u64::from(error.code);
                Self::ours(code, &or(&plain(&error.reason), &describe(error.code)))
            }
            ConnectionError::ConnectionClosed(close) => by_peer(close),
            ConnectionError::ApplicationClosed(close) => by_peer_application(close),
            ConnectionError::Reset => Self {
                error_code: 0,
                reason: "stateless reset".into(),
                is_by_peer: true,
            },
            ConnectionError::TimedOut => Self::ours(0, "idle timeout"),
            ConnectionError::VersionMismatch => Self {
                error_code: 0,
                reason: "the peer speaks no version of QUIC that we speak".into(),
                is_by_peer: true,
            },
            ConnectionError::LocallyClosed => Self::ours(0, ""),
            ConnectionError::CidsExhausted => Self::ours(INTERNAL_ERROR, "no connection IDs left"),
        }
    }
}

/// The longest beginning of a reason phrase that may be sent.
pub fn sendable(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

fn by_peer(close: &ConnectionClose) -> Ending {
    let said = String::from_utf8_lossy(&close.reason);
    let error_code = u64::from(close.error_code);
    let words = or(&plain(&said), &describe(close.error_code));
    let reason = match error_code.wrapping_sub(CRYPTO_ERROR) {
        42..=46 | 48 => format!("the peer does not accept the certificate: {words}"),
        // how implementations say this differs too much to be of use
        116 => describe(close.error_code),
        _ => words,
    };
    Ending {
        error_code,
        reason,
        is_by_peer: true,
    }
}

fn by_peer_application(close: &ApplicationClose) -> Ending {
    let reason = String::from_utf8_lossy(&close.reason);
    Ending {
        error_code: close.error_code.into_inner(),
        reason: or(&reason, "closed by the peer"),
        is_by_peer: true,
    }
}

fn or(text: &str, instead: &str) -> String {
    if text.is_empty() { instead } else { text }.to_owned()
}

/// rustls's words, where they need an expert.
fn plain(reason: &str) -> String {
    match reason.strip_prefix("invalid peer certificate: ") {
        Some("UnknownIssuer") => {
            "certificate refused: no trusted authority issued it (UnknownIssuer)".into()
        }
        Some("BadSignature") => {
            "certificate refused: another authority of the same name issued it \
             (the signature is not the trusted one's)"
                .into()
        }
        Some(cause) => format!("certificate refused: {cause}"),
        None => reason.to_owned(),
    }
}

fn describe(code: TransportErrorCode) -> String {
    let number = u64::from(code);
    if (CRYPTO_ERROR..CRYPTO_ERROR + 0x100).contains(&number) {
        let alert = match number - CRYPTO_ERROR {
            40 => "handshake failure",
            42 => "bad certificate",
            43 => "unsupported certificate",
            44 => "certificate revoked",
            45 => "certificate expired",
            46 => "certificate unknown",
            48 => "certificate of an unknown authority",
            80 => "internal error",
            109 => "missing extension",
            112 => "unrecognized name",
            116 => "certificate required: the peer asks for a client certificate",
            120 => "no application protocol in common",
            other => return format!("TLS alert {other}"),
        };
        return format!("TLS alert: {alert}");
    }
    match code {
        TransportErrorCode::NO_ERROR => "closed without an error".into(),
        TransportErrorCode::CONNECTION_REFUSED => "connection refused".into(),
        TransportErrorCode::INVALID_TOKEN => "the Retry token is not valid (any more)".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use quinn_proto::{TransportError, VarInt};

    use super::*;

    fn transport_error(code: TransportErrorCode, reason: &str) -> ConnectionError {
        ConnectionError::TransportError(TransportError {
            code,
            frame: None,
            reason: reason.into(),
        })
    }

    #[test]
    fn a_refused_certificate_says_why() {
        let alert = TransportErrorCode::crypto(48);
        let ending = Ending::from_error(&transport_error(
            alert,
            "invalid peer certificate: UnknownIssuer",
        ));
        assert_eq!(ending.error_code, 0x130);
        assert!(ending.reason.starts_with("certificate refused: no trusted"));
        assert!(!ending.is_by_peer);
        let name = transport_error(
            TransportErrorCode::crypto(42),
            "invalid peer certificate: certificate not valid for name \"other.test\"",
        );
        assert_eq!(
            Ending::from_error(&name).reason,
            "certificate refused: certificate not valid for name \"other.test\""
        );
    }

    #[test]
    fn every_ending_has_words() {
        let close = |code| {
            ConnectionError::ConnectionClosed(ConnectionClose {
                error_code: code,
                frame_type: None,
                reason: Bytes::new(),
            })
        };
        let application = ConnectionError::ApplicationClosed(ApplicationClose {
            error_code: VarInt::from_u32(0x100),
            reason: Bytes::new(),
        });
        let mut errors = vec![
            application,
            ConnectionError::Reset,
            ConnectionError::TimedOut,
            ConnectionError::VersionMismatch,
            ConnectionError::LocallyClosed,
            ConnectionError::CidsExhausted,
        ];
        for alert in 0..=255 {
            errors.push(close(TransportErrorCode::crypto(alert)));
        }
        errors.push(close(TransportErrorCode::NO_ERROR));
        errors.push(close(TransportErrorCode::CONNECTION_REFUSED));
        errors.push(transport_error(TransportErrorCode::PROTOCOL_VIOLATION, ""));
        for error in &errors {
            assert_ne!(Ending::from_error(error).reason, "", "{error:?}");
        }
        let reason = Ending::from_error(&errors[6 + 48]).reason;
        assert!(reason.starts_with("the peer does not accept the certificate: "));
        assert_eq!(
            Ending::from_error(&errors[6 + 120]).reason,
            "TLS alert: no application protocol in common"
        );
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        assert_eq!(sendable("short"), "short");
        assert_eq!(sendable(&"x".repeat(500)).len(), MAX_REASON_BYTES);
        let cut = sendable("aüüü").len();
        assert_eq!(cut, 7);
        let odd = format!("a{}", "ü".repeat(333));
        assert_eq!(sendable(&odd).len(), MAX_REASON_BYTES - 1);
    }
}
