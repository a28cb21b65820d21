//! The frames of SPDY/3.1, in bytes. Pure.
//!
//! ```text
//! control: |1|  version=3 (15) |  type (16)  |  flags (8) | length (24) |  body
//! data:    |0|        stream id (31)         |  flags (8) | length (24) |  payload
//! ```

/// Bytes that every frame begins with.
pub const HEAD: usize = 8;
/// Largest body of a control frame that is read. Header blocks here have some 100 bytes.
pub const CONTROL_MAX: usize = 64 << 10;
/// Settings that one frame may hold.
const SETTINGS_MAX: usize = 256;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("SPDY version {0} instead of 3")]
    Version(u16),
    #[error("control frame of {0} bytes is too long")]
    TooLong(usize),
    #[error("control frame is cut off")]
    CutOff,
}

/// The first 8 bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    Control { kind: u16, flags: u8, length: usize },
    Data { stream: u32, fin: bool, length: usize },
}

impl Head {
    pub fn decode(bytes: [u8; HEAD]) -> Result<Head, FrameError> {
        let word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let length = u32::from_be_bytes([0, bytes[5], bytes[6], bytes[7]]) as usize;
        let flags = bytes[4];
        if word >> 31 == 0 {
            return Ok(Head::Data { stream: word, fin: flags & FLAG_FIN != 0, length });
        }
        match (word >> 16) as u16 & 0x7fff {
            VERSION if length > CONTROL_MAX => Err(FrameError::TooLong(length)),
            VERSION => Ok(Head::Control { kind: word as u16, flags, length }),
            other => Err(FrameError::Version(other)),
        }
    }
}

/// A control frame; header blocks are still compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        block: Vec<u8>,
    },
    SynReply {
        stream: u32,
        fin: bool,
        block: Vec<u8>,
    },
    RstStream {
        stream: u32,
        status: u32,
    },
    /// Identifiers and values.
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    GoAway {
        last: u32,
        status: u32,
    },
    Headers {
        stream: u32,
        fin: bool,
        block: Vec<u8>,
    },
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A type that is not known, which the specification says to ignore.
    Unknown(u16),
}

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GO_AWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn word(&mut self) -> Result<u32, FrameError> {
        let (word, rest) = self.0.split_first_chunk::<4>().ok_or(FrameError::CutOff)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    /// 31 bits; the first is reserved.
    fn id(&mut self) -> Result<u32, FrameError> {
        Ok(self.word()? & 0x7fff_ffff)
    }
}

impl Control {
    /// Reads the body of a control frame.
    pub fn decode(kind: u16, flags: u8, body: &[u8]) -> Result<Control, FrameError> {
        let mut body = Reader(body);
        let fin = flags & FLAG_FIN != 0;
        Ok(match kind {
            SYN_STREAM => {
                let stream = body.id()?;
                let _associated = body.id()?;
                let block = body.0.get(2..).ok_or(FrameError::CutOff)?.to_vec();
                Control::SynStream { stream, fin, block }
            }
            SYN_REPLY => Control::SynReply { stream: body.id()?, fin, block: body.0.to_vec() },
            RST_STREAM => Control::RstStream { stream: body.id()?, status: body.word()? },
            SETTINGS => {
                let count = body.word()? as usize;
                let mut settings = vec![];
                for _ in 0..count.min(SETTINGS_MAX) {
                    settings.push((body.word()? & 0x00ff_ffff, body.word()?));
                }
                Control::Settings(settings)
            }
            PING => Control::Ping(body.word()?),
            GO_AWAY => Control::GoAway { last: body.id()?, status: body.word()? },
            HEADERS => Control::Headers { stream: body.id()?, fin, block: body.0.to_vec() },
            WINDOW_UPDATE => Control::WindowUpdate { stream: body.id()?, delta: body.id()? },
            other => Control::Unknown(other),
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut body: Vec<u8> = vec![];
        let word = |body: &mut Vec<u8>, word: u32| body.extend(word.to_be_bytes());
        let (kind, fin) = match self {
            Control::SynStream { stream, fin, block } => {
                word(&mut body, *stream);
                word(&mut body, 0);
                body.extend([0, 0]);
                body.extend(block);
                (SYN_STREAM, *fin)
            }
            Control::SynReply { stream, fin, block } => {
                word(&mut body, *stream);
                body.extend(block);
                (SYN_REPLY, *fin)
            }
            Control::RstStream { stream, status } => {
                word(&mut body, *stream);
                word(&mut body, *status);
                (RST_STREAM, false)
            }
            Control::Settings(settings) => {
                word(&mut body, settings.len() as u32);
                for (id, value) in settings {
                    word(&mut body, *id);
                    word(&mut body, *value);
                }
                (SETTINGS, false)
            }
            Control::Ping(id) => {
                word(&mut body, *id);
                (PING, false)
            }
            Control::GoAway { last, status } => {
                word(&mut body, *last);
                word(&mut body, *status);
                (GO_AWAY, false)
            }
            Control::Headers { stream, fin, block } => {
                word(&mut body, *stream);
                body.extend(block);
                (HEADERS, *fin)
            }
            Control::WindowUpdate { stream, delta } => {
                word(&mut body, *stream);
                word(&mut body, *delta);
                (WINDOW_UPDATE, false)
            }
            Control::Unknown(kind) => (*kind, false),
        };
        let mut frame = Vec::with_capacity(HEAD + body.len());
        frame.extend((0x8000 | VERSION).to_be_bytes());
        frame.extend(kind.to_be_bytes());
        frame.push(if fin { FLAG_FIN } else { 0 });
        frame.extend(&(body.len() as u32).to_be_bytes()[1..]);
        frame.extend(body);
        frame
    }
}

/// A data frame; `payload` has fewer than 2^24 bytes.
pub fn data(stream: u32, fin: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + payload.len());
    frame.extend((stream & 0x7fff_ffff).to_be_bytes());
    frame.push(if fin { FLAG_FIN } else { 0 });
    frame.extend(&(payload.len() as u32).to_be_bytes()[1..]);
    frame.extend(payload);
    frame
}

/// Reads any bytes as a frame, as a peer's bytes are read; for fuzzing.
pub fn decode_any(bytes: &[u8]) -> Option<Result<Control, FrameError>> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    match Head::decode(*head) {
        Err(error) => Some(Err(error)),
        Ok(Head::Data { .. }) => None,
        Ok(Head::Control { kind, flags, length }) => {
            Some(Control::decode(kind, flags, &rest[..length.min(rest.len())]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(control: Control, want: &[u8]) {
        assert_eq!(control.encode(), want);
        assert_eq!(decode_any(want), Some(Ok(control)));
    }

    #[test]
    fn control_frames_are_as_specified() {
        check(
            Control::SynStream { stream: 1, fin: false, block: vec![9] },
            &[0x80, 3, 0, 1, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 9],
        );
        check(
            Control::SynReply { stream: 1, fin: true, block: vec![9] },
            &[0x80, 3, 0, 2, 1, 0, 0, 5, 0, 0, 0, 1, 9],
        );
        check(
            Control::RstStream { stream: 3, status: 5 },
            &[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5],
        );
        check(
            Control::Settings(vec![(7, 65_536)]),
            &[0x80, 3, 0, 4, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 7, 0, 1, 0, 0],
        );
        check(Control::Ping(2), &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 2]);
        check(Control::GoAway { last: 9, status: 0 }, &[0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 0]);
        check(
            Control::Headers { stream: 1, fin: false, block: vec![] },
            &[0x80, 3, 0, 8, 0, 0, 0, 4, 0, 0, 0, 1],
        );
        check(
            Control::WindowUpdate { stream: 1, delta: 256 },
            &[0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 1, 0],
        );
        check(Control::Unknown(77), &[0x80, 3, 0, 77, 0, 0, 0, 0]);
    }

    #[test]
    fn data_frames_are_as_specified() {
        let frame = data(5, true, b"hi");
        assert_eq!(frame, [0, 0, 0, 5, 1, 0, 0, 2, b'h', b'i']);
        let head = frame.first_chunk().copied().expect("eight bytes");
        assert_eq!(Head::decode(head), Ok(Head::Data { stream: 5, fin: true, length: 2 }));
    }

    #[test]
    fn bad_frames_are_refused() {
        let head = |bytes| Head::decode(bytes).expect_err("a bad head");
        assert_eq!(head([0x80, 2, 0, 1, 0, 0, 0, 0]), FrameError::Version(2));
        assert_eq!(head([0x80, 3, 0, 1, 0, 1, 0, 1]), FrameError::TooLong(65_537));
        for kind in 1..=9 {
            let short = Control::decode(kind, 0, &[0, 0]);
            assert!(kind == 5 || short == Err(FrameError::CutOff), "{kind}: {short:?}");
        }
        // A count that lies costs nothing.
        assert_eq!(Control::decode(SETTINGS, 0, &[0xff; 4]), Err(FrameError::CutOff));
    }
}
