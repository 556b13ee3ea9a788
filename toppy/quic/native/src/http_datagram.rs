//! What stands before the UDP payload in a DATAGRAM frame: RFC 9297 section 2.1, RFC 9298
//! section 5.

/// A quarter stream ID names a client-initiated bidirectional stream: at most (2^62 - 1) / 4.
const MAX_QUARTER_STREAM_ID: u64 = (1 << 60) - 1;

/// Quarter stream ID and context ID 0, encoded.
const MAX_PREFIX_BYTES: usize = 9;

/// An HTTP Datagram, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpDatagram<'a> {
    pub quarter_stream_id: u64,
    pub context_id: u64,
    pub payload: &'a [u8],
}

/// Takes the content of a DATAGRAM frame apart; `None` when it is malformed.
pub fn parse(data: &[u8]) -> Option<HttpDatagram<'_>> {
    let (quarter_stream_id, rest) = take_varint(data)?;
    if quarter_stream_id > MAX_QUARTER_STREAM_ID {
        return None;
    }
    let (context_id, payload) = take_varint(rest)?;
    Some(HttpDatagram {
        quarter_stream_id,
        context_id,
        payload,
    })
}

/// What stands before each payload of one tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Prefix {
    bytes: [u8; MAX_PREFIX_BYTES],
    length: usize,
}

impl Prefix {
    /// For context ID 0; `None` when the quarter stream ID is out of range.
    pub fn new(quarter_stream_id: u64) -> Option<Self> {
        if quarter_stream_id > MAX_QUARTER_STREAM_ID {
            return None;
        }
        let mut bytes = [0; MAX_PREFIX_BYTES];
        // RFC 9000 section 16: the two highest bits say how long the integer is
        let length: usize = match quarter_stream_id {
            0..0x40 => 1,
            0x40..0x4000 => 2,
            0x4000..0x4000_0000 => 4,
            _ => 8,
        };
        let encoded = quarter_stream_id.to_be_bytes();
        bytes[..length].copy_from_slice(&encoded[8 - length..]);
        bytes[0] |= match length {
            1 => 0x00,
            2 => 0x40,
            4 => 0x80,
            _ => 0xC0,
        };
        Some(Self {
            bytes,
            length: length + 1,
        })
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

fn take_varint(data: &[u8]) -> Option<(u64, &[u8])> {
    let first = *data.first()?;
    let length = 1 << (first >> 6);
    if data.len() < length {
        return None;
    }
    let (bytes, rest) = data.split_at(length);
    let value = bytes[1..]
        .iter()
        .fold(u64::from(first & 0x3F), |value, &byte| {
            value << 8 | u64::from(byte)
        });
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_parsed_again() {
        let edges = [0, 1, 63, 64, 16_383, 16_384, (1 << 30) - 1, 1 << 30];
        for id in edges.into_iter().chain([MAX_QUARTER_STREAM_ID]) {
            let mut data = Prefix::new(id).unwrap().as_bytes().to_vec();
            data.extend(b"payload");
            let parsed = parse(&data).unwrap();
            assert_eq!(
                parsed,
                HttpDatagram {
                    quarter_stream_id: id,
                    context_id: 0,
                    payload: b"payload"
                }
            );
        }
        assert!(Prefix::new(MAX_QUARTER_STREAM_ID + 1).is_none());
    }

    #[test]
    fn long_encodings_of_small_numbers_are_understood() {
        let parsed = parse(b"\x40\x05\x80\0\0\x02rest").unwrap();
        assert_eq!((parsed.quarter_stream_id, parsed.context_id), (5, 2));
        assert_eq!(parsed.payload, b"rest");
    }

    #[test]
    fn what_is_cut_short_is_malformed() {
        let whole = b"\xc0\0\0\0\0\0\0\x01\x40\x00";
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
        assert_eq!(parse(whole).unwrap().payload, b"");
    }

    #[test]
    fn a_quarter_stream_id_of_no_stream_is_malformed() {
        assert_eq!(parse(b"\xd0\0\0\0\0\0\0\0\0"), None);
        assert!(parse(b"\xcf\xff\xff\xff\xff\xff\xff\xff\0").is_some());
    }
}
