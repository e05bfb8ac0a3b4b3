//! Endpoints: what is sent to a peer, put into and got from its memory, and how that is stopped.
//!
//! Each operation carries a token and ends in exactly one [`Event::Done`] with it, whether it ended at once, later, or
//! by [`Endpoint::close`], which is always by force: every operation still under way is ended (with an error) before
//! the close itself is done, and from then on the endpoint's lanes are gone.

use std::{ffi::c_void, net::SocketAddr, ptr};

use kvasir_ucx_sys as sys;
use socket2::SockAddr;

use super::worker::{Event, Incoming, MAX_MESSAGE, MESSAGE_ID, Memory, Status, Worker, check, library, note};

/// Tokens travel through C as pointers.
const _: () = assert!(size_of::<*mut c_void>() == size_of::<u64>());

/// A contiguous run of bytes: `ucp_dt_make_contig(1)`.
const BYTES: sys::ucp_datatype_t = 1 << 3;

/// Tells endpoints apart while they live; a later one may get the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EndpointId(usize);

/// A connection to one peer. Dropped, it is closed by force and forgotten.
pub(super) struct Endpoint {
    worker: Worker,
    raw: sys::ucp_ep_h,
}

impl Endpoint {
    /// Begins to connect; what is sent meanwhile waits. Failure comes as [`Event::Failed`] with `token`.
    pub(super) fn connect(worker: &Worker, address: SocketAddr, token: u64) -> Result<Self, Status> {
        let address = SockAddr::from(address);
        Self::create(
            worker,
            token,
            sys::ucp_ep_params_t {
                field_mask: (sys::UCP_EP_PARAM_FIELD_FLAGS | sys::UCP_EP_PARAM_FIELD_SOCK_ADDR).into(),
                flags: sys::UCP_EP_PARAMS_FLAGS_CLIENT_SERVER,
                sockaddr: sys::ucs_sock_addr_t { addr: address.as_ptr().cast(), addrlen: address.len() },
                ..Default::default()
            },
        )
    }

    /// The owner's end of a peer's connection.
    pub(super) fn accept(worker: &Worker, incoming: Incoming, token: u64) -> Result<Self, Status> {
        Self::create(
            worker,
            token,
            sys::ucp_ep_params_t {
                field_mask: sys::UCP_EP_PARAM_FIELD_CONN_REQUEST.into(),
                conn_request: incoming.0,
                ..Default::default()
            },
        )
    }

    fn create(worker: &Worker, token: u64, mut params: sys::ucp_ep_params_t) -> Result<Self, Status> {
        // Mode "peer" is what makes a dead peer an error and a close by force possible; both sides must have it.
        params.field_mask |= u64::from(sys::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | sys::UCP_EP_PARAM_FIELD_ERR_HANDLER);
        params.err_mode = sys::UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler = sys::ucp_err_handler_t { cb: Some(on_failure), arg: as_pointer(token) };
        let mut raw = ptr::null_mut();
        // SAFETY: the worker is alive; the mask names the fields that are set; addresses are copied.
        check(unsafe { worker.ucp().ucp_ep_create(worker.raw(), &raw const params, &raw mut raw) })?;
        Ok(Self { worker: worker.clone(), raw })
    }

    pub(super) fn id(&self) -> EndpointId {
        Self::id_of(self.raw)
    }

    pub(super) fn id_of(raw: sys::ucp_ep_h) -> EndpointId {
        EndpointId(raw.addr())
    }

    /// Sends an active message of at most [`MAX_MESSAGE`] bytes. One that can't be sent is reported by the endpoint's
    /// failure.
    pub(super) fn send(&self, message: Vec<u8>) {
        self.send_noting(message, None);
    }

    /// As [`Endpoint::send`]; `Done` comes when UCX needs the message's memory no more.
    pub(super) fn send_tracked(&self, message: Vec<u8>, token: u64) {
        self.send_noting(message, Some(token));
    }

    fn send_noting(&self, message: Vec<u8>, token: Option<u64>) {
        assert!(message.len() <= MAX_MESSAGE, "messages of ours are bounded");
        // UCX reads it until `on_sent`, which frees it.
        let kept = Box::into_raw(Box::new(Sent { message, token }));
        let mut params = params(kept.cast(), on_sent);
        params.op_attr_mask |= sys::UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = sys::UCP_AM_SEND_FLAG_EAGER | sys::UCP_AM_SEND_FLAG_REPLY;
        // SAFETY: `kept` is a live allocation that nobody else has.
        let (data, len) = unsafe { ((&*kept).message.as_ptr(), (&*kept).message.len()) };
        let ucp = self.worker.ucp();
        // SAFETY: endpoint alive, this is its thread; the bytes stay until `on_sent`.
        let started =
            unsafe { ucp.ucp_am_send_nbx(self.raw, MESSAGE_ID, ptr::null(), 0, data.cast(), len, &raw const params) };
        if !started.is_null() && !is_error(started) {
            return;
        }
        // SAFETY: over already, so the callback will not come: freed here instead.
        drop(unsafe { Box::from_raw(kept) });
        if let Some(token) = token {
            note_if_over(started, token);
        }
    }

    /// Writes into the peer's memory. `Done` says that the local bytes are no longer needed; only a [`Self::flush`]
    /// begun afterwards says that they have arrived.
    ///
    /// # Safety
    /// The local bytes lie in `memory` and stay mapped until `Done`.
    pub(super) unsafe fn put(&self, local: Local<'_>, remote: Remote<'_>, token: u64) {
        let params = with_memory(params(as_pointer(token), on_done), local.memory);
        // SAFETY: endpoint and key are alive, this is their thread; the bytes stay, as the caller promises.
        let started = unsafe {
            self.worker.ucp().ucp_put_nbx(
                self.raw,
                local.address.cast_const().cast(),
                local.len,
                remote.address,
                remote.key.raw,
                &raw const params,
            )
        };
        note_if_over(started, token);
    }

    /// Reads from the peer's memory; `Done` says that the bytes are here.
    ///
    /// # Safety
    /// The local bytes lie in `memory`, stay mapped and are not referenced until `Done`.
    pub(super) unsafe fn get(&self, local: Local<'_>, remote: Remote<'_>, token: u64) {
        let params = with_memory(params(as_pointer(token), on_done), local.memory);
        // SAFETY: as in `put`.
        let started = unsafe {
            self.worker.ucp().ucp_get_nbx(
                self.raw,
                local.address.cast(),
                local.len,
                remote.address,
                remote.key.raw,
                &raw const params,
            )
        };
        note_if_over(started, token);
    }

    /// Done when every put begun before has arrived in the peer's memory.
    pub(super) fn flush(&self, token: u64) {
        let params = params(as_pointer(token), on_done);
        // SAFETY: the endpoint is alive and this is its thread.
        let started = unsafe { self.worker.ucp().ucp_ep_flush_nbx(self.raw, &raw const params) };
        note_if_over(started, token);
    }

    /// Ends everything on it by force; see the module's text for what `Done` then says.
    pub(super) fn close(mut self, token: u64) {
        let raw = std::mem::replace(&mut self.raw, ptr::null_mut());
        let params = forced(params(as_pointer(token), on_done));
        // SAFETY: the endpoint is alive, this is its thread; nobody uses it afterwards.
        let started = unsafe { self.worker.ucp().ucp_ep_close_nbx(raw, &raw const params) };
        note_if_over(started, token);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        let params = forced(sys::ucp_request_param_t::default());
        // SAFETY: the endpoint is alive, this is its thread; nobody uses it afterwards.
        let started = unsafe { self.worker.ucp().ucp_ep_close_nbx(self.raw, &raw const params) };
        if !started.is_null() && !is_error(started) {
            // SAFETY: a request of ours without callback; UCX keeps it until it is complete.
            unsafe { self.worker.ucp().ucp_request_free(started) };
        }
    }
}

/// Local bytes of an operation.
#[derive(Clone, Copy)]
pub(super) struct Local<'a> {
    pub(super) address: *mut u8,
    pub(super) len: usize,
    pub(super) memory: &'a Memory,
}

/// Where they go to or come from.
#[derive(Clone, Copy)]
pub(super) struct Remote<'a> {
    /// Address in the owner's process.
    pub(super) address: u64,
    pub(super) key: &'a RemoteKey,
}

/// The right to reach a peer's registered memory through one endpoint.
pub(super) struct RemoteKey {
    worker: Worker,
    raw: sys::ucp_rkey_h,
}

impl RemoteKey {
    /// Takes what the owner's [`Memory::pack_key`] gave. UCX trusts these bytes to be of its own making, beyond a check
    /// of their form: see the module `ucx` on whom to connect.
    pub(super) fn unpack(endpoint: &Endpoint, packed: &[u8]) -> Result<Self, Status> {
        // UCX reads the key's length out of the key; spare zeros end every list in it that claims to be longer.
        let mut padded = packed.to_vec();
        padded.resize(packed.len() + 4096, 0);
        let mut raw = ptr::null_mut();
        let ucp = endpoint.worker.ucp();
        // SAFETY: endpoint alive, this is its thread; the bytes are valid for the call and are copied.
        check(unsafe { ucp.ucp_ep_rkey_unpack(endpoint.raw, padded.as_ptr().cast(), &raw mut raw) })?;
        Ok(Self { worker: endpoint.worker.clone(), raw })
    }
}

impl Drop for RemoteKey {
    fn drop(&mut self) {
        // SAFETY: unpacked once, destroyed once; no operation uses it (see `client`).
        unsafe { self.worker.ucp().ucp_rkey_destroy(self.raw) };
    }
}

fn as_pointer(token: u64) -> *mut c_void {
    ptr::without_provenance_mut(token as usize)
}

type Callback = unsafe extern "C" fn(*mut c_void, sys::ucs_status_t, *mut c_void);

fn params(user_data: *mut c_void, callback: Callback) -> sys::ucp_request_param_t {
    sys::ucp_request_param_t {
        op_attr_mask: sys::UCP_OP_ATTR_FIELD_CALLBACK
            | sys::UCP_OP_ATTR_FIELD_USER_DATA
            | sys::UCP_OP_ATTR_FIELD_DATATYPE,
        cb: sys::ucp_request_param_t__bindgen_ty_1 { send: Some(callback) },
        datatype: BYTES,
        user_data,
        ..Default::default()
    }
}

fn with_memory(params: sys::ucp_request_param_t, memory: &Memory) -> sys::ucp_request_param_t {
    let op_attr_mask = params.op_attr_mask | sys::UCP_OP_ATTR_FIELD_MEMH;
    sys::ucp_request_param_t { op_attr_mask, memh: memory.raw(), ..params }
}

fn forced(params: sys::ucp_request_param_t) -> sys::ucp_request_param_t {
    let op_attr_mask = params.op_attr_mask | sys::UCP_OP_ATTR_FIELD_FLAGS;
    sys::ucp_request_param_t { op_attr_mask, flags: sys::UCP_EP_CLOSE_FLAG_FORCE, ..params }
}

/// `UCS_PTR_IS_ERR`: errors are pointers to the last hundred bytes.
fn is_error(started: sys::ucs_status_ptr_t) -> bool {
    started.addr() >= (sys::UCS_ERR_LAST as isize) as usize
}

/// What ended within the call that started it gets no callback.
fn note_if_over(started: sys::ucs_status_ptr_t, token: u64) {
    if started.is_null() {
        note(Event::Done { token, result: Ok(()) });
    } else if is_error(started) {
        note(Event::Done { token, result: Err(Status(started.addr() as isize as sys::ucs_status_t)) });
    }
}

unsafe extern "C" fn on_done(request: *mut c_void, status: sys::ucs_status_t, token: *mut c_void) {
    note(Event::Done { token: token.addr() as u64, result: check(status) });
    free(request);
}

/// A message while UCX needs it.
struct Sent {
    message: Vec<u8>,
    token: Option<u64>,
}

unsafe extern "C" fn on_sent(request: *mut c_void, status: sys::ucs_status_t, sent: *mut c_void) {
    // SAFETY: made by `send_noting`, which left it to this one call.
    let sent = unsafe { Box::from_raw(sent.cast::<Sent>()) };
    if let Some(token) = sent.token {
        note(Event::Done { token, result: check(status) });
    }
    free(request);
}

unsafe extern "C" fn on_failure(token: *mut c_void, _: sys::ucp_ep_h, status: sys::ucs_status_t) {
    note(Event::Failed { endpoint: token.addr() as u64, status: Status(status) });
}

fn free(request: *mut c_void) {
    let library = library().expect("libucp is loaded: it has just called");
    // SAFETY: a completed request that UCX allocated; freed once, in its callback.
    unsafe { library.ucp().ucp_request_free(request) };
}
