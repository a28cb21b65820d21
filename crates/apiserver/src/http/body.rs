//! Bodies of answers: bytes that exist, lists put together from objects as they are sent, streams.

use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::stream::{BoxStream, StreamExt};
use hyper::body::{Body as _, Frame, SizeHint};
use minke_api::Object;

/// Bytes that are put together before they are sent.
const CHUNK: usize = 64 << 10;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request.
pub type Payload = http_body_util::combinators::UnsyncBoxBody<Bytes, hyper::Error>;

/// The body of an answer.
pub enum Body {
    Full(Bytes),
    List(List),
    Stream(BoxStream<'static, Result<Bytes, BoxError>>),
    /// What a kubelet or a pod answers, passed on.
    Proxied(hyper::body::Incoming),
    Gzip(Box<Gzip>),
}

impl Body {
    pub fn empty() -> Body {
        Body::Full(Bytes::new())
    }

    /// Length in bytes, where it is known.
    pub fn len(&self) -> Option<u64> {
        match self {
            Body::Full(bytes) => Some(bytes.len() as u64),
            Body::List(list) => Some(list.left),
            _ => None,
        }
    }

    /// All the bytes of a body that needs no waiting for.
    pub fn whole(self) -> Bytes {
        match self {
            Body::Full(bytes) => bytes,
            Body::List(mut list) => {
                let mut all = BytesMut::with_capacity(list.left as usize);
                while let Some(chunk) = list.next() {
                    all.put(chunk);
                }
                all.freeze()
            }
            _ => Bytes::new(),
        }
    }

    pub fn gzip(self) -> Body {
        // Fast rather than small: this is for links that are slower than memory, not for archives.
        let encoder = GzEncoder::new(Vec::new(), Compression::new(1));
        Body::Gzip(Box::new(Gzip { inner: self, encoder: Some(encoder) }))
    }
}

/// A list that holds its objects and writes their bytes one after the other.
pub struct List {
    head: Bytes,
    objects: std::vec::IntoIter<Arc<Object>>,
    /// Bytes at the start of each object that items of a list do not have: kind and apiVersion.
    skip: usize,
    first: bool,
    done: bool,
    left: u64,
}

impl List {
    /// `head` is everything before the first item. All objects are of the kind whose bytes begin with
    /// `skip` bytes of kind and apiVersion, brace included.
    pub fn new(head: Bytes, objects: Vec<Arc<Object>>, skip: usize) -> List {
        let items: usize = objects.iter().map(|object| object.json().len() - skip + 1).sum();
        let commas = objects.len().saturating_sub(1);
        let left = (head.len() + items + commas + 2) as u64;
        List { head, objects: objects.into_iter(), skip, first: true, done: false, left }
    }

    fn next(&mut self) -> Option<Bytes> {
        if self.done {
            return None;
        }
        let mut chunk = BytesMut::with_capacity(CHUNK.min(self.left as usize));
        chunk.put(std::mem::take(&mut self.head));
        loop {
            let Some(object) = self.objects.as_slice().first() else {
                chunk.put_slice(b"]}");
                self.done = true;
                break;
            };
            let item = &object.json()[self.skip..];
            if !chunk.is_empty() && chunk.len() + item.len() + 2 > CHUNK {
                break;
            }
            if !std::mem::take(&mut self.first) {
                chunk.put_u8(b',');
            }
            chunk.put_u8(b'{');
            chunk.put_slice(item);
            self.objects.next();
        }
        self.left -= chunk.len() as u64;
        Some(chunk.freeze())
    }
}

/// A body that is compressed as it is sent.
pub struct Gzip {
    inner: Body,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Body::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Body::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Body::List(list) => Poll::Ready(list.next().map(|chunk| Ok(Frame::data(chunk)))),
            Body::Stream(stream) => stream.poll_next_unpin(context).map_ok(Frame::data),
            Body::Proxied(body) => Pin::new(body).poll_frame(context).map_err(Into::into),
            Body::Gzip(gzip) => gzip.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Full(bytes) => bytes.is_empty(),
            Body::Proxied(body) => body.is_end_stream(),
            _ => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.len() {
            Some(len) => SizeHint::with_exact(len),
            None => match self {
                Body::Proxied(body) => body.size_hint(),
                _ => SizeHint::default(),
            },
        }
    }
}

impl Gzip {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        while let Some(encoder) = &mut self.encoder {
            match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        encoder.write_all(&data)?;
                    }
                    if encoder.get_ref().len() >= CHUNK / 4 {
                        let compressed = std::mem::take(encoder.get_mut());
                        return Poll::Ready(Some(Ok(Frame::data(compressed.into()))));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let rest = self.encoder.take().map(GzEncoder::finish).transpose()?.unwrap_or_default();
                    return Poll::Ready(Some(Ok(Frame::data(rest.into()))));
                }
            }
        }
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http_body_util::BodyExt;
    use minke_api::Kind;
    use serde_json::{Value, json};

    use super::*;

    fn list(count: usize, size: usize) -> Body {
        let kind = Kind::by_plural("", "v1", "configmaps").unwrap();
        let objects = (0..count)
            .map(|n| {
                let value = json!({"metadata": {"name": format!("c{n}")}, "data": {"x": "y".repeat(size)}});
                Arc::new(Object::from_value(kind, &value).unwrap())
            })
            .collect();
        let skip = br#"{"kind":"ConfigMap","apiVersion":"v1","#.len();
        Body::List(List::new(Bytes::from_static(b"{\"items\":["), objects, skip))
    }

    #[tokio::test]
    async fn lists_are_put_together_from_their_objects() {
        for (count, size) in [(0, 0), (1, 10), (3, 10), (500, 1000), (3, CHUNK * 2)] {
            let body = list(count, size);
            let said = body.len().unwrap();
            let bytes = body.collect().await.unwrap().to_bytes();
            assert_eq!(bytes.len() as u64, said);
            let value: Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(value["items"].as_array().unwrap().len(), count);
            if count > 0 {
                assert_eq!(value["items"][0]["metadata"]["name"], "c0");
                assert!(value["items"][0].get("kind").is_none());
            }
        }
    }

    #[tokio::test]
    async fn compressed_bodies_say_the_same() {
        let plain = list(500, 1000).collect().await.unwrap().to_bytes();
        let packed = list(500, 1000).gzip().collect().await.unwrap().to_bytes();
        assert!(packed.len() < plain.len() / 10);
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut unpacked).unwrap();
        assert_eq!(unpacked, plain);
    }
}
