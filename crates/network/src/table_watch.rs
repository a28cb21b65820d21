//! Noticing that someone has removed a table: `nft flush ruleset` is how many firewalls begin.
//!
//! The kernel tells of every nftables transaction, our own included; what is looked for is one that deletes the
//! table and does not make it again. Messages: linux/netfilter/nf_tables.h.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{self, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

use crate::nfnetlink::{Attributes, GENERIC, Messages};
use crate::sys::wait_on;
use crate::{nft, on_own_thread};

/// Multicast group 7, NFNLGRP_NFTABLES.
const GROUP: u32 = 1 << (7 - 1);
const SUBSYSTEM: u16 = 10 << 8;
const NEW_TABLE: u16 = SUBSYSTEM;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
/// Ends the messages of one transaction.
const NEW_GENERATION: u16 = SUBSYSTEM | 15;
const TABLE_NAME: u16 = 1;
const AF_INET: u8 = 2;

/// Watches one IPv4 table of the network namespace in which it was made.
#[derive(Debug)]
pub struct TableWatch {
    table: String,
    socket: AsyncFd<OwnedFd>,
    /// Deleted by the transaction that is being told.
    deleted: bool,
}

impl TableWatch {
    /// Must be called within a tokio runtime.
    pub fn new(table: &str) -> io::Result<TableWatch> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            net::socket_with(net::AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
        net::bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
        Ok(TableWatch { table: table.to_owned(), socket: wait_on(socket)?, deleted: false })
    }

    /// Returns when the table has been removed. May be dropped and called again.
    pub async fn removed(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let mut ready = self.socket.readable().await?;
            let received = ready.try_io(|socket| {
                net::recv(socket, &mut buffer[..], RecvFlags::empty()).map_err(io::Error::from)
            });
            match received {
                // Not readable after all.
                Err(_) => {}
                Ok(Ok((length, _))) => {
                    if read(&buffer[..length], &self.table, &mut self.deleted) {
                        return Ok(());
                    }
                }
                // A large transaction has told more than fits; the table may have been in it.
                Ok(Err(error)) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                    self.deleted = false;
                    let table = self.table.clone();
                    let tables = on_own_thread(move || nft::tables(&table)).await;
                    if tables.is_ok_and(|tables| !tables.contains(&self.table)) {
                        return Ok(());
                    }
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

/// Whether these messages complete a transaction that has removed `table`.
pub(crate) fn read(bytes: &[u8], table: &str, deleted: &mut bool) -> bool {
    for message in Messages(bytes) {
        let about_it = || {
            let attributes = message.body.get(GENERIC..).unwrap_or_default();
            let mut names = Attributes(attributes).filter(|attribute| attribute.kind == TABLE_NAME);
            let name = names.next().map(|name| name.value.strip_suffix(&[0]).unwrap_or(name.value));
            message.body.first() == Some(&AF_INET) && name == Some(table.as_bytes())
        };
        match message.kind {
            DELETE_TABLE if about_it() => *deleted = true,
            NEW_TABLE if about_it() => *deleted = false,
            NEW_GENERATION if std::mem::take(deleted) => return true,
            _ => {}
        }
    }
    false
}
