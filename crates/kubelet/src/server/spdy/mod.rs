//! SPDY/3.1, as far as kubectl's exec, attach and port-forward need it: the frames, header compression,
//! and a server's side of a connection with many streams.
//!
//! [`frame`] and [`headers`] are pure and hold every bound on what comes from outside; [`session`] does
//! the I/O. Flow control: what is read is acknowledged with WINDOW_UPDATE, so that peers that count may go
//! on; but peers' windows are not counted here, since kubectl's library never sends an update. A peer that
//! does not read stops us by TCP.

pub mod frame;
pub mod headers;
pub mod session;
