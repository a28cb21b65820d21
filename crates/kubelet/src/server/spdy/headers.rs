//! Header blocks of SPDY/3.1: pairs with lengths, compressed by zlib with a dictionary of the
//! specification. One direction of a connection is one zlib stream.

use std::sync::LazyLock;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// Bytes of a block when it is unpacked, and pairs in it.
const BLOCK_MAX: usize = 64 << 10;
const PAIRS_MAX: usize = 128;

/// The words of section 2.6.10.1 that come with their length.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// And those that come without.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
    403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
    text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = vec![];
    for word in WORDS {
        dictionary.extend((word.len() as u32).to_be_bytes());
        dictionary.extend(word.bytes());
    }
    dictionary.extend(TEXT.bytes());
    dictionary
});

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("header block does not unpack: {0}")]
    Zlib(String),
    #[error("header block is too long")]
    TooLong,
    #[error("header block is cut off")]
    CutOff,
    #[error("header is not text")]
    NotText,
}

/// Names, in lower case as they are sent, and values.
pub type Headers = Vec<(String, String)>;

/// Unpacks blocks in the order in which they came.
pub struct Unpacker(Decompress);

impl Default for Unpacker {
    fn default() -> Unpacker {
        Unpacker(Decompress::new(true))
    }
}

impl Unpacker {
    pub fn unpack(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        let zlib = |error: &dyn std::fmt::Display| HeaderError::Zlib(error.to_string());
        let mut out = vec![];
        let mut chunk = [0; 4096];
        let mut at = 0;
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let result = self.0.decompress(&block[at..], &mut chunk, FlushDecompress::Sync);
            at += (self.0.total_in() - before_in) as usize;
            match result {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|error| zlib(&error))?;
                    continue;
                }
                Err(error) => return Err(zlib(&error)),
            }
            let made = (self.0.total_out() - before_out) as usize;
            out.extend_from_slice(&chunk[..made]);
            if out.len() > BLOCK_MAX {
                return Err(HeaderError::TooLong);
            }
            if made < chunk.len() {
                return parse(&out);
            }
        }
    }
}

/// Reads an unpacked block.
pub fn parse(block: &[u8]) -> Result<Headers, HeaderError> {
    let mut rest = block;
    let word = |rest: &mut &[u8]| {
        let (word, tail) = rest.split_first_chunk::<4>().ok_or(HeaderError::CutOff)?;
        *rest = tail;
        Ok::<usize, HeaderError>(u32::from_be_bytes(*word) as usize)
    };
    let count = word(&mut rest)?;
    if count > PAIRS_MAX {
        return Err(HeaderError::TooLong);
    }
    let mut headers = vec![];
    for _ in 0..count {
        let mut text = || {
            let length = word(&mut rest)?;
            let (text, tail) = rest.split_at_checked(length).ok_or(HeaderError::CutOff)?;
            rest = tail;
            String::from_utf8(text.to_vec()).map_err(|_| HeaderError::NotText)
        };
        headers.push((text()?, text()?));
    }
    Ok(headers)
}

/// Packs blocks in the order in which they are sent.
pub struct Packer(Compress);

impl Default for Packer {
    fn default() -> Packer {
        let mut zlib = Compress::new(Compression::default(), true);
        zlib.set_dictionary(&DICTIONARY).expect("a fresh stream takes a dictionary");
        Packer(zlib)
    }
}

impl Packer {
    pub fn pack(&mut self, headers: &Headers) -> Vec<u8> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend((text.len() as u32).to_be_bytes());
            plain.extend(text.bytes());
        }
        let mut out = vec![];
        let mut at = 0;
        loop {
            // The room is what makes zlib end: it stops early only when there is none left.
            out.reserve(plain.len() + 256);
            let before = self.0.total_in();
            let room = out.capacity() - out.len();
            let had = out.len();
            self.0
                .compress_vec(&plain[at..], &mut out, FlushCompress::Sync)
                .expect("packing in memory does not fail");
            at += (self.0.total_in() - before) as usize;
            if at == plain.len() && out.len() - had < room {
                return out;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_dictionary_is_the_specified_one() {
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        // The checksum that stands in every SPDY/3 stream.
        assert_eq!((DICTIONARY.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_survive_the_way_in_order() {
        let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
        let long = "x".repeat(20_000);
        for block in [
            headers(&[("streamtype", "stdin")]),
            headers(&[]),
            headers(&[("streamtype", "error"), ("port", "80"), ("requestid", "0")]),
            headers(&[("long", &long)]),
            headers(&[("streamtype", "data")]),
        ] {
            assert_eq!(unpacker.unpack(&packer.pack(&block)), Ok(block));
        }
    }

    #[test]
    fn bad_blocks_are_refused() {
        assert!(matches!(Unpacker::default().unpack(b"nonsense"), Err(HeaderError::Zlib(_))));
        assert_eq!(parse(&[0, 0, 0, 1, 0, 0, 0, 9, b'a']), Err(HeaderError::CutOff));
        assert_eq!(parse(&[0xff, 0xff, 0xff, 0xff]), Err(HeaderError::TooLong));
        assert_eq!(parse(&[0, 0]), Err(HeaderError::CutOff));
        assert_eq!(parse(&[0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0]), Err(HeaderError::NotText));
        // Much in little: a block that unpacks to more than is allowed.
        let bomb = Packer::default().pack(&headers(&[("a", &"y".repeat(BLOCK_MAX + 1))]));
        assert!(bomb.len() < 1000);
        assert_eq!(Unpacker::default().unpack(&bomb), Err(HeaderError::TooLong));
    }
}
