//! UCX's objects with Rust's manners: what is created is destroyed, in the right order, on the thread that created it.
//!
//! Nothing here is `Send`: context, worker and all that hangs on them belong to one thread, which is why UCX can run in
//! its single-threaded mode. Callbacks of UCX run inside [`Worker::progress`] (or inside a call that starts something)
//! and do one thing: they note an [`Event`] in a list of that thread, which the thread's loop takes with
//! [`take_events`]. So no code of ours runs inside UCX.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_void},
    fmt,
    net::SocketAddr,
    os::fd::RawFd,
    ptr,
    rc::Rc,
    slice,
    sync::{Mutex, OnceLock, PoisonError},
};

use kvasir_ucx_sys as sys;
use socket2::{SockAddr, SockAddrStorage};

use super::endpoint::{Endpoint, EndpointId};

/// Number under which our active messages travel: one kind, told apart by their first byte.
pub(super) const MESSAGE_ID: u32 = 0;
/// Longest active message: a piece of a batch and its head. No more than this is ever copied out of UCX.
pub(super) const MAX_MESSAGE: usize = (64 << 10) + 4096;

/// libucp, once loaded, stays: it starts a thread and patches allocators, so taking it out of a running process is
/// unsafe.
static LIBRARY: OnceLock<sys::Library> = OnceLock::new();

/// Finds libucp, or says what to install.
pub(super) fn library() -> Result<&'static sys::Library, sys::Error> {
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    match LIBRARY.get() {
        Some(library) => Ok(library),
        None => {
            let library = sys::Library::load()?;
            tracing::info!(version = library.version(), "loaded libucp");
            Ok(LIBRARY.get_or_init(|| library))
        }
    }
}

/// UCX's answer where it is not success.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub(super) sys::ucs_status_t);

impl Status {
    /// The owner does not take the connection.
    pub(super) const REJECTED: Self = Self(sys::UCS_ERR_REJECTED);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(library) = LIBRARY.get() else { return write!(f, "UCX status {}", self.0) };
        // SAFETY: takes any value; answers with a constant text or one in a static buffer.
        let text = unsafe { library.ucp().ucs_status_string(self.0) };
        // SAFETY: null-terminated, as every text of UCX.
        f.write_str(&unsafe { CStr::from_ptr(text) }.to_string_lossy())
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({})", self.0)
    }
}

pub(super) fn check(status: sys::ucs_status_t) -> Result<(), Status> {
    if status == sys::UCS_OK { Ok(()) } else { Err(Status(status)) }
}

/// What UCX had to say.
#[derive(Debug)]
pub(super) enum Event {
    /// An operation, flush or close that was started with this token is over.
    Done { token: u64, result: Result<(), Status> },
    /// An active message; `None` if it was longer than [`MAX_MESSAGE`].
    Message { from: EndpointId, bytes: Option<Vec<u8>> },
    /// Somebody connects: to be accepted or rejected.
    Incoming(Incoming),
    /// The endpoint created with this token is dead; it still has to be closed.
    Failed { endpoint: u64, status: Status },
}

/// A connection request, waiting for an answer.
#[derive(Debug)]
#[must_use = "a request that is neither accepted nor rejected is never freed"]
pub(super) struct Incoming(pub(super) sys::ucp_conn_request_h);

thread_local! {
    static EVENTS: RefCell<Vec<Event>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn note(event: Event) {
    EVENTS.with_borrow_mut(|events| events.push(event));
}

/// Takes what has been noted since the last call, in order; `into` must be empty and its room is reused.
pub(super) fn take_events(into: &mut Vec<Event>) {
    debug_assert!(into.is_empty());
    EVENTS.with_borrow_mut(|events| std::mem::swap(events, into));
}

/// Whether something has been noted since.
pub(super) fn has_events() -> bool {
    EVENTS.with_borrow(|events| !events.is_empty())
}

/// What a context is made of.
pub(super) struct Settings {
    /// UCX's `TLS`: which of its transports.
    pub(super) tls: String,
    /// UCX's `NET_DEVICES`.
    pub(super) net_devices: Option<String>,
    /// Whether memory is reached by RMA. Without it UCX takes no puts and gets from anybody.
    pub(super) rma: bool,
}

/// A context: the devices and memory handles.
struct Context {
    ucp: &'static sys::Ucp,
    raw: sys::ucp_context_h,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: created by `Worker::new`; workers and memory handles hold a reference to it, so they are gone.
        unsafe { self.ucp.ucp_cleanup(self.raw) };
    }
}

/// The progress engine with its endpoints; a handle.
#[derive(Clone)]
pub(super) struct Worker(Rc<Inner>);

struct Inner {
    raw: sys::ucp_worker_h,
    context: Rc<Context>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: created by `Worker::new`; listeners, endpoints and remote keys hold a reference, so they are gone.
        unsafe { self.context.ucp.ucp_worker_destroy(self.raw) };
        // What still was under way has been ended by that; nobody waits for it.
        EVENTS.with_borrow_mut(Vec::clear);
    }
}

impl Worker {
    /// Opens the devices. Errors are for the operator.
    pub(super) fn new(library: &'static sys::Library, settings: &Settings) -> Result<Self, String> {
        let ucp = library.ucp();
        let config = UcxConfiguration::read(ucp)?;
        config.set(c"TLS", &settings.tls)?;
        // 1.13 takes these from the environment only.
        if library.number() > (1, 13) {
            // Over sockets a piece then is one segment: 8 KiB ones, UCX's default, took twice the processor time.
            config.set(c"TCP_TX_SEG_SIZE", "80k")?;
            config.set(c"TCP_RX_SEG_SIZE", "80k")?;
            // A restarted process takes its port again at once, as the tcp transport does.
            config.set(c"TCP_CM_REUSEADDR", "y")?;
        }
        if let Some(devices) = &settings.net_devices {
            config.set(c"NET_DEVICES", devices)?;
        }
        let rma = if settings.rma { sys::UCP_FEATURE_RMA } else { 0 };
        let params = sys::ucp_params_t {
            field_mask: (sys::UCP_PARAM_FIELD_FEATURES | sys::UCP_PARAM_FIELD_NAME).into(),
            features: (rma | sys::UCP_FEATURE_AM | sys::UCP_FEATURE_WAKEUP).into(),
            name: c"kvasir".as_ptr(),
            ..Default::default()
        };
        let (major, minor) = sys::API_VERSION;
        let mut raw = ptr::null_mut();
        // SAFETY: both structures are valid for the call and their masks name the fields that are set.
        let status = unsafe { ucp.ucp_init_version(major, minor, &raw const params, config.raw, &raw mut raw) };
        check(status).map_err(|status| format!("UCX {} has no usable device: {status}", library.version()))?;
        let context = Rc::new(Context { ucp, raw });
        let params = sys::ucp_worker_params_t {
            field_mask: sys::UCP_WORKER_PARAM_FIELD_THREAD_MODE.into(),
            thread_mode: sys::UCS_THREAD_MODE_SINGLE,
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: as above; the context is alive.
        let status = unsafe { ucp.ucp_worker_create(context.raw, &raw const params, &raw mut raw) };
        check(status).map_err(|status| format!("UCX cannot create a worker: {status}"))?;
        let worker = Self(Rc::new(Inner { raw, context }));
        worker.take_messages().map_err(|status| format!("UCX cannot take active messages: {status}"))?;
        Ok(worker)
    }

    fn take_messages(&self) -> Result<(), Status> {
        use sys::{
            UCP_AM_HANDLER_PARAM_FIELD_CB as CB, UCP_AM_HANDLER_PARAM_FIELD_FLAGS as FLAGS,
            UCP_AM_HANDLER_PARAM_FIELD_ID as ID,
        };
        let params = sys::ucp_am_handler_param_t {
            field_mask: (ID | FLAGS | CB).into(),
            id: MESSAGE_ID,
            flags: sys::UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(on_message),
            arg: ptr::null_mut(),
        };
        // SAFETY: the worker is alive; the callback is a function, which lives for ever.
        check(unsafe { self.ucp().ucp_worker_set_am_recv_handler(self.raw(), &raw const params) })
    }

    pub(super) fn ucp(&self) -> &'static sys::Ucp {
        self.0.context.ucp
    }

    pub(super) fn raw(&self) -> sys::ucp_worker_h {
        self.0.raw
    }

    /// Readable when there may be something to do; see [`Worker::arm`].
    pub(super) fn event_fd(&self) -> Result<RawFd, Status> {
        let mut fd = -1;
        // SAFETY: the worker is alive and was created with the wakeup feature; writes one number.
        check(unsafe { self.ucp().ucp_worker_get_efd(self.raw(), &raw mut fd) })?;
        Ok(fd)
    }

    /// Does what can be done now; whether that was something.
    pub(super) fn progress(&self) -> bool {
        // SAFETY: the worker is alive and this is its thread.
        unsafe { self.ucp().ucp_worker_progress(self.raw()) != 0 }
    }

    /// Makes the event descriptor tell of the next event; `false` if there is one already.
    pub(super) fn arm(&self) -> Result<bool, Status> {
        // SAFETY: the worker is alive and this is its thread.
        match unsafe { self.ucp().ucp_worker_arm(self.raw()) } {
            sys::UCS_OK => Ok(true),
            sys::UCS_ERR_BUSY => Ok(false),
            status => Err(Status(status)),
        }
    }

    /// Makes memory known to the devices.
    ///
    /// # Safety
    /// `address..address + len` is mapped and stays so while the returned value lives.
    pub(super) unsafe fn register(&self, address: *mut u8, len: usize) -> Result<Memory, Status> {
        let params = sys::ucp_mem_map_params_t {
            field_mask: (sys::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | sys::UCP_MEM_MAP_PARAM_FIELD_LENGTH).into(),
            address: address.cast(),
            length: len,
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the context is alive; the memory is mapped, as the caller promises.
        check(unsafe { self.ucp().ucp_mem_map(self.0.context.raw, &raw const params, &raw mut raw) })?;
        Ok(Memory { context: Rc::clone(&self.0.context), raw })
    }
}

/// UCX's own settings, as read from its defaults and changed by us.
struct UcxConfiguration {
    ucp: &'static sys::Ucp,
    raw: *mut sys::ucp_config_t,
}

impl UcxConfiguration {
    fn read(ucp: &'static sys::Ucp) -> Result<Self, String> {
        let mut raw = ptr::null_mut();
        // SAFETY: null prefix and file name are allowed; writes one pointer.
        let status = unsafe { ucp.ucp_config_read(ptr::null(), ptr::null(), &raw mut raw) };
        check(status).map_err(|status| format!("UCX's settings cannot be read: {status}"))?;
        Ok(Self { ucp, raw })
    }

    fn set(&self, name: &CStr, value: &str) -> Result<(), String> {
        let refused = |why: &dyn fmt::Display| format!("UCX refuses {}={value}: {why}", name.to_string_lossy());
        let text = CString::new(value).map_err(|error| refused(&error))?;
        // SAFETY: the settings are alive; both texts are null-terminated and copied.
        check(unsafe { self.ucp.ucp_config_modify(self.raw, name.as_ptr(), text.as_ptr()) })
            .map_err(|status| refused(&status))
    }
}

impl Drop for UcxConfiguration {
    fn drop(&mut self) {
        // SAFETY: read by `read`, released once.
        unsafe { self.ucp.ucp_config_release(self.raw) };
    }
}

/// Registered memory.
pub(super) struct Memory {
    context: Rc<Context>,
    raw: sys::ucp_mem_h,
}

impl Memory {
    pub(super) fn raw(&self) -> sys::ucp_mem_h {
        self.raw
    }

    /// What a peer needs to reach it.
    pub(super) fn pack_key(&self) -> Result<Vec<u8>, Status> {
        let (mut buffer, mut size) = (ptr::null_mut(), 0);
        let ucp = self.context.ucp;
        // SAFETY: context and handle are alive; writes a pointer and a length.
        check(unsafe { ucp.ucp_rkey_pack(self.context.raw, self.raw, &raw mut buffer, &raw mut size) })?;
        // SAFETY: `size` bytes of UCX's, until they are released below.
        let key = unsafe { slice::from_raw_parts(buffer.cast_const().cast::<u8>(), size) }.to_vec();
        // SAFETY: packed above, released once.
        unsafe { ucp.ucp_rkey_buffer_release(buffer) };
        Ok(key)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `register`, unmapped once; operations that use it hold it (see `client`).
        let status = unsafe { self.context.ucp.ucp_mem_unmap(self.context.raw, self.raw) };
        if let Err(status) = check(status) {
            tracing::warn!(%status, "ucx: memory cannot be deregistered");
        }
    }
}

/// Takes connections of peers.
pub(super) struct Listener {
    worker: Worker,
    raw: sys::ucp_listener_h,
}

impl Listener {
    pub(super) fn bind(worker: &Worker, address: SocketAddr) -> Result<Self, Status> {
        let wanted = SockAddr::from(address);
        let params = sys::ucp_listener_params_t {
            field_mask: (sys::UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | sys::UCP_LISTENER_PARAM_FIELD_CONN_HANDLER).into(),
            sockaddr: sys::ucs_sock_addr_t { addr: wanted.as_ptr().cast(), addrlen: wanted.len() },
            conn_handler: sys::ucp_listener_conn_handler_t { cb: Some(on_incoming), arg: ptr::null_mut() },
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the worker is alive; the address is valid for the call.
        check(unsafe { worker.ucp().ucp_listener_create(worker.raw(), &raw const params, &raw mut raw) })?;
        Ok(Self { worker: worker.clone(), raw })
    }

    /// Where it listens; the port is a real one.
    pub(super) fn address(&self) -> Result<SocketAddr, Status> {
        let mut attr =
            sys::ucp_listener_attr_t { field_mask: sys::UCP_LISTENER_ATTR_FIELD_SOCKADDR.into(), ..Default::default() };
        // SAFETY: the listener is alive; writes the fields of the mask.
        check(unsafe { self.worker.ucp().ucp_listener_query(self.raw, &raw mut attr) })?;
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: the C library's `sockaddr_storage` under another name; any bytes are one.
        *unsafe { storage.view_as::<sys::sockaddr_storage>() } = attr.sockaddr;
        let len = storage.size_of();
        // SAFETY: initialised, and no longer than it is.
        let address = unsafe { SockAddr::new(storage, len) };
        address.as_socket().ok_or(Status(sys::UCS_ERR_INVALID_ADDR))
    }

    pub(super) fn reject(&self, incoming: Incoming) {
        // SAFETY: the listener is alive; the request came from it and is answered once, as `Incoming` is consumed.
        let status = unsafe { self.worker.ucp().ucp_listener_reject(self.raw, incoming.0) };
        if let Err(status) = check(status) {
            tracing::debug!(%status, "ucx: a connection could not be rejected");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: created by `bind`, destroyed once; its worker is alive.
        unsafe { self.worker.ucp().ucp_listener_destroy(self.raw) };
    }
}

unsafe extern "C" fn on_incoming(request: sys::ucp_conn_request_h, _: *mut c_void) {
    note(Event::Incoming(Incoming(request)));
}

unsafe extern "C" fn on_message(
    _: *mut c_void,
    _header: *const c_void,
    _header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const sys::ucp_am_recv_param_t,
) -> sys::ucs_status_t {
    // SAFETY: UCX passes a valid structure for the time of the call.
    let param = unsafe { *param };
    let rendezvous = param.recv_attr & u64::from(sys::UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
    let bytes = if rendezvous || len > MAX_MESSAGE {
        None
    } else if len == 0 {
        Some(Vec::new())
    } else {
        // SAFETY: not a rendezvous, so `data` are `len` bytes, valid for the time of the call.
        Some(unsafe { slice::from_raw_parts(data.cast_const().cast::<u8>(), len) }.to_vec())
    };
    if param.recv_attr & u64::from(sys::UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0 {
        note(Event::Message { from: Endpoint::id_of(param.reply_ep), bytes });
    }
    sys::UCS_OK
}
