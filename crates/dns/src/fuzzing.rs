//! What of this crate reads packets, as `crates/fuzzing` feeds it: it panics when something is wrong.

use hickory_proto::op::{Message, MessageType};

use crate::answer::{Outcome, TCP_MAX, encode, resolve};
use crate::index::Index;

/// A packet to the server, over UDP and over TCP: the answer is one, to this question, and fits.
pub fn packet(index: &Index, data: &[u8]) {
    for tcp in [false, true] {
        let reply = match resolve(index, data, tcp) {
            Outcome::Reply(bytes) => bytes,
            Outcome::Forward(forward) => {
                assert!(forward.size_max <= TCP_MAX);
                encode(forward.partial, forward.size_max)
            }
            Outcome::Ignore => continue,
        };
        assert!(reply.len() <= if tcp { TCP_MAX } else { 1232 }, "{} bytes", reply.len());
        let read = Message::from_vec(&reply).expect("an answer can be read");
        assert_eq!(read.metadata.message_type, MessageType::Response);
        assert_eq!(reply[..2], data[..2], "the id is the question's");
    }
}
