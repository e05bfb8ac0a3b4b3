//! A Unix socket that carries whole messages, with file descriptors beside them.
//!
//! `SOCK_SEQPACKET`: a message arrives whole or not at all, so the decoder never sees a half, and the kernel keeps the order.
//! What arrives is bounded twice: a message longer than the buffer, or with more than [`MAX_FDS`] descriptors, is an
//! error, and descriptors nobody asked for are closed as they come.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    ptr,
};

use socket2::{Domain, SockAddr, Socket as RawSocket, Type};

/// Most descriptors beside one message.
pub(super) const MAX_FDS: usize = 2;
/// Room for [`MAX_FDS`] descriptors as the kernel packs them, in words so that it is aligned for a `cmsghdr`.
const CONTROL_WORDS: usize = 4;
/// Connections the kernel may hold for us before we accept them.
const BACKLOG: i32 = 1024;

const fn control_space(fds: usize) -> usize {
    // SAFETY: pure arithmetic.
    unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) as usize }
}

const _: () = assert!(control_space(MAX_FDS) <= CONTROL_WORDS * size_of::<u64>());

/// One end of a connection, or a listener. Never blocks: what can't be done now is `WouldBlock`.
#[derive(Debug)]
pub(super) struct Socket(RawSocket);

/// What [`Socket::receive`] found.
#[derive(Debug)]
pub(super) struct Received {
    /// Bytes of the message; zero: the other end closed.
    pub(super) len: usize,
    /// What came beside it.
    pub(super) fds: Vec<OwnedFd>,
}

impl Socket {
    /// Listens at `name`: a path, or an abstract name if its first byte is zero.
    pub(super) fn listen(name: &Path) -> io::Result<Self> {
        let socket = Self::new()?;
        socket.0.bind(&SockAddr::unix(name)?)?;
        socket.0.listen(BACKLOG)?;
        Ok(socket)
    }

    /// Connects at once, or fails: a Unix socket never waits unless the other side's backlog is full (`WouldBlock`).
    pub(super) fn connect(name: &Path) -> io::Result<Self> {
        let socket = Self::new()?;
        socket.0.connect(&SockAddr::unix(name)?)?;
        Ok(socket)
    }

    /// The next connection.
    pub(super) fn accept(&self) -> io::Result<Self> {
        let (socket, _) = self.0.accept()?;
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    fn new() -> io::Result<Self> {
        let socket = RawSocket::new(Domain::UNIX, Type::SEQPACKET, None)?; // close-on-exec
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// The user on the other end, as the kernel noted it when the connection was made.
    pub(super) fn peer_uid(&self) -> io::Result<u32> {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: pointer and length name a local structure of the type this option fills in.
        let result = unsafe {
            libc::getsockopt(
                self.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                ptr::from_mut(&mut credentials).cast(),
                &mut len,
            )
        };
        if result == 0 { Ok(credentials.uid) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends one message, whole or not at all. `fds` are shared with the receiver; ours stay ours.
    pub(super) fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        assert!(fds.len() <= MAX_FDS, "no message carries {} descriptors", fds.len());
        let mut piece = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
        let mut control = [0u64; CONTROL_WORDS];
        // SAFETY: `msghdr` is a plain C structure for which all zeroes means nothing.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &mut piece;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = control_space(fds.len()) as _;
            // SAFETY: control is set and long enough for a header (checked at compile time), so this is not null.
            let beside = unsafe { &mut *libc::CMSG_FIRSTHDR(&header) };
            beside.cmsg_level = libc::SOL_SOCKET;
            beside.cmsg_type = libc::SCM_RIGHTS;
            // SAFETY: pure arithmetic.
            beside.cmsg_len = unsafe { libc::CMSG_LEN(size_of_val(fds) as u32) } as _;
            for (index, fd) in fds.iter().enumerate() {
                // SAFETY: the data part has room for `fds.len()` descriptors; nothing is said of its alignment.
                unsafe { libc::CMSG_DATA(beside).cast::<RawFd>().add(index).write_unaligned(fd.as_raw_fd()) };
            }
        }
        loop {
            // SAFETY: the header names the message, which is only read, and the control block, both alive until return.
            let sent = unsafe { libc::sendmsg(self.as_raw_fd(), &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match usize::try_from(sent) {
                Ok(len) if len == message.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()), // the kernel doesn't split messages
                Err(_) => retry_if_interrupted()?,
            }
        }
    }

    /// Takes one message into `buffer`.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = [0u64; CONTROL_WORDS];
        // SAFETY: as in `send`.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &mut piece;
        header.msg_iovlen = 1;
        let len = loop {
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = control_space(MAX_FDS) as _;
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            // SAFETY: the header names `buffer`, borrowed exclusively, and the control block, both alive until return.
            match usize::try_from(unsafe { libc::recvmsg(self.as_raw_fd(), &mut header, flags) }) {
                Ok(len) => break len,
                Err(_) => retry_if_interrupted()?,
            }
        };
        let fds = received_fds(&header); // owned before anything is refused: so none leaks
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message or its descriptors beyond the limit"));
        }
        Ok(Received { len, fds })
    }

    /// Says that nothing more will come from here. The other end sees us close, we still see it close.
    pub(super) fn finish_sending(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Write); // fails only if it has gone already
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn retry_if_interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

fn received_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel filled in the header and the control block behind it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: a pointer from the macros is null or names a whole header inside the control block.
    while let Some(beside) = unsafe { next.as_ref() } {
        if (beside.cmsg_level, beside.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: pure arithmetic.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let len: usize = beside.cmsg_len as _; // of another width with another libc
            for index in 0..len.saturating_sub(head) / size_of::<RawFd>() {
                // SAFETY: inside the data part, whose length the kernel wrote.
                let fd = unsafe { libc::CMSG_DATA(beside).cast::<RawFd>().add(index).read_unaligned() };
                // SAFETY: the kernel has just opened it for this process; nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: header and current element belong together.
        next = unsafe { libc::CMSG_NXTHDR(header, beside) };
    }
    fds
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd, path::PathBuf};

    use super::*;
    use crate::owner::random_u64;

    fn pair() -> (Socket, Socket) {
        let name = PathBuf::from(format!("\0kvasir-test-{:016x}", random_u64()));
        let listener = Socket::listen(&name).unwrap();
        let near = Socket::connect(&name).unwrap();
        (near, listener.accept().unwrap())
    }

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (near, far) = pair();
        let file = File::open("/proc/self/comm").unwrap();
        near.send(b"one", &[file.as_fd(), file.as_fd()]).unwrap();
        near.send(b"two", &[]).unwrap();
        let mut buffer = [0; 8];
        let mut one = far.receive(&mut buffer).unwrap();
        assert_eq!((&buffer[..one.len], one.fds.len()), (&b"one"[..], 2));
        let mut text = String::new();
        File::from(one.fds.remove(1)).read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        let two = far.receive(&mut buffer).unwrap();
        assert_eq!((&buffer[..two.len], two.fds.len()), (&b"two"[..], 0));
        assert_eq!(far.receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(near);
        assert_eq!(far.receive(&mut buffer).unwrap().len, 0);
    }

    #[test]
    fn what_is_beyond_the_limits_is_an_error_and_leaves_no_descriptor() {
        let (near, far) = pair();
        near.send(&[0; 9], &[]).unwrap();
        assert_eq!(far.receive(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        // Half the room is ours to send into: the receiver's limit is tried by asking it to take two in the room of none.
        let file = File::open("/proc/self/comm").unwrap();
        let ours = file.as_raw_fd();
        near.send(b"x", &[file.as_fd()]).unwrap();
        let received = far.receive(&mut [0; 8]).unwrap();
        let theirs = received.fds[0].as_raw_fd();
        assert_ne!(ours, theirs);
        drop(received);
        // SAFETY: asks about a number, whatever it names.
        assert_eq!(unsafe { libc::fcntl(theirs, libc::F_GETFD) }, -1);
    }

    #[test]
    fn the_user_on_the_other_end_is_known() {
        let (near, far) = pair();
        // SAFETY: always succeeds.
        let us = unsafe { libc::geteuid() };
        assert_eq!((near.peer_uid().unwrap(), far.peer_uid().unwrap()), (us, us));
    }

    #[test]
    fn after_the_last_word_the_other_ends_close_is_still_seen() {
        let (near, far) = pair();
        far.finish_sending();
        let mut buffer = [0; 8];
        assert_eq!(near.receive(&mut buffer).unwrap().len, 0);
        assert_eq!(far.receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        near.send(b"still", &[]).unwrap();
        assert_eq!(far.receive(&mut buffer).unwrap().len, 5);
        drop(near);
        assert_eq!(far.receive(&mut buffer).unwrap().len, 0);
    }
}
