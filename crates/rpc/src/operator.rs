//! Who may change the cluster: operators, known by the hashes of their tokens.
//!
//! ```text
//!   alice 9f86d081884c7d65…   # a line of the file: a name, and the SHA-256 of the token
//!
//!   Authorization: Bearer TOKEN  (HTTP header, gRPC metadata) ──sha256──▶ the file ─▶ Operator { name, peer }
//! ```
//!
//! Without a file everybody who can reach a port is an operator, as processes of a trusted network are. The file is read
//! again when it changes; a mistake in it is told, and the former tokens stay.

mod refusals;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status, metadata::MetadataValue};

use self::refusals::Refusals;
use crate::files::Files;

/// The key that names the file.
const KEY: &str = "operator.tokens_file";
/// Most bytes of the file.
const MAX_FILE: u64 = 1 << 20;
/// Longest name of an operator.
const MAX_NAME: usize = 64;
/// Longest `Authorization` that is looked at.
const MAX_BEARER: usize = 4096;

/// The section `operator` of every service's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A file with a line for every operator: a name and the SHA-256 of the token, in hexadecimal digits
    /// (`printf %s "$TOKEN" | sha256sum`); `#` begins a comment. Read again when it changes. Default none: whoever reaches
    /// this process may change what it does.
    pub tokens_file: Option<PathBuf>,
    /// A file with the token that this process itself shows when it changes others (a router's planner moves workers).
    /// Default none.
    pub token_file: Option<PathBuf>,
}

/// A file that can't be read, or is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {}: {reason}", path.display())]
pub struct Error {
    key: &'static str,
    path: PathBuf,
    reason: String,
}

type Known = HashMap<[u8; 32], Arc<str>>;

/// The operators that this process knows. Cheap to clone; clones are the same.
#[derive(Clone, Default)]
pub struct Operators(Option<Arc<Inner>>);

struct Inner {
    path: PathBuf,
    /// Replaced as a whole by [`Operators::open`]'s future.
    known: RwLock<Known>,
}

/// One who may do what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// The token's name; none where no token is needed.
    pub name: Option<Arc<str>>,
    /// From where.
    pub peer: Option<SocketAddr>,
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name.as_deref().unwrap_or("somebody"))?;
        match self.peer {
            Some(peer) => write!(f, " from {peer}"),
            None => Ok(()),
        }
    }
}

/// The other end of a connection, as tonic hands it to a call (`request.extensions()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub Option<SocketAddr>);

/// A change that somebody asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Who: an operator's name and address.
    pub who: &'a str,
    /// What.
    pub what: &'a str,
    /// For whom, or what.
    pub on: &'a str,
    /// Whether it was done, or why not.
    pub result: Result<(), &'a str>,
    /// It is one of many that nobody known asked for: for the log, and for no history that has an end.
    pub many: bool,
}

type Audit = dyn Fn(&Asked<'_>) + Send + Sync;

/// Where changes are asked for: lets operators in, and has every wish told, granted or not. Cheap to clone.
#[derive(Clone)]
pub struct Desk {
    operators: Operators,
    audit: Arc<Audit>,
    /// A leaf, held for a count.
    refusals: Arc<Mutex<Refusals>>,
}

impl Desk {
    /// `audit` hears of every change that was asked for, after it was done or not.
    pub fn new(operators: Operators, audit: impl Fn(&Asked<'_>) + Send + Sync + 'static) -> Self {
        Self { operators, audit: Arc::new(audit), refusals: Arc::default() }
    }

    /// Does what a call asks for, if an operator asks: `what` and `on` tell it to people.
    ///
    /// # Errors
    /// It is no operator's call, or `act` fails.
    pub async fn call<T, R, F>(
        &self,
        request: Request<T>,
        on: &str,
        what: impl FnOnce(&T) -> String,
        act: impl FnOnce(T, Operator) -> F,
    ) -> Result<Response<R>, Status>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let (operator, what) = (self.operators.of_call(&request), what(request.get_ref()));
        let peer = peer_of(&request);
        let done = match &operator {
            Ok(operator) => act(request.into_inner(), operator.clone()).await,
            Err(denied) => Err((*denied).into()),
        };
        self.tell(operator.as_ref().ok(), peer, on, &what, done.as_ref().map(|_| ()).map_err(Status::message));
        done.map(Response::new)
    }

    /// Whether this `Authorization` is an operator's; what comes of the wish is for [`Desk::tell`].
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, authorization: Option<&[u8]>, peer: Option<SocketAddr>) -> Result<Operator, Denied> {
        self.operators.check(authorization, peer)
    }

    /// What came of a wish.
    pub fn tell(
        &self,
        operator: Option<&Operator>,
        peer: Option<SocketAddr>,
        on: &str,
        what: &str,
        result: Result<(), &str>,
    ) {
        let Some(operator) = operator else {
            return self.tell_of_nobody(peer, on, what, result);
        };
        (self.audit)(&Asked { who: &operator.to_string(), what, on, result, many: false });
    }

    fn tell_of_nobody(&self, peer: Option<SocketAddr>, on: &str, what: &str, result: Result<(), &str>) {
        let who = &Operator { name: Some("nobody known".into()), peer }.to_string();
        let counted = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).one(Instant::now());
        let (what, many) = match counted {
            None => (what.to_owned(), true),
            Some(0) => (what.to_owned(), false),
            Some(more) => {
                (format!("{what} (and {more} wishes without a token before it, which only the log tells)"), false)
            }
        };
        (self.audit)(&Asked { who, what: &what, on, result, many });
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Desk({:?})", self.operators)
    }
}

/// Why somebody may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// It shows no token.
    #[error(
        "this changes the cluster, and needs an operator's token: kvasirctl takes it from KVASIR_TOKEN or --token-file"
    )]
    NoToken,
    /// It shows another one.
    #[error(
        "the token is no operator's here (operator.tokens_file): kvasirctl takes it from KVASIR_TOKEN or --token-file"
    )]
    BadToken,
}

impl Operators {
    /// As configured, and what keeps them what the file says: a future that never ends.
    ///
    /// # Errors
    /// The file can't be read, or something in it is wrong.
    pub fn open(config: &Config) -> Result<(Self, impl Future<Output = ()> + Send + 'static + use<>), Error> {
        let inner = match &config.tokens_file {
            None => None,
            Some(path) => {
                let mut files = Files::now([path.clone()]);
                // What is read now may be newer than what was looked at: then it is read once more.
                let known = RwLock::new(read(path)?);
                let inner = Arc::new(Inner { path: path.clone(), known });
                Some((Arc::clone(&inner), async move {
                    loop {
                        files.changed().await;
                        inner.again();
                    }
                }))
            }
        };
        let (inner, keeping) = inner.unzip();
        if inner.is_none() {
            tracing::info!("{KEY} is not set: whoever reaches this process may change what it does");
        }
        let keep = async move {
            match keeping {
                Some(keeping) => keeping.await,
                None => std::future::pending().await,
            }
        };
        Ok((Self(inner), keep))
    }

    /// Who shows this `Authorization`, from there.
    ///
    /// # Errors
    /// Somebody who may not.
    pub fn check(&self, authorization: Option<&[u8]>, peer: Option<SocketAddr>) -> Result<Operator, Denied> {
        let Some(inner) = &self.0 else { return Ok(Operator { name: None, peer }) };
        let shown = authorization.ok_or(Denied::NoToken)?;
        let token = bearer(shown).ok_or(Denied::BadToken)?;
        let hash = ring::digest::digest(&ring::digest::SHA256, token);
        let known = inner.known.read().unwrap_or_else(PoisonError::into_inner);
        let name = known.get(hash.as_ref()).cloned().ok_or(Denied::BadToken)?;
        Ok(Operator { name: Some(name), peer })
    }

    /// The same of a call.
    ///
    /// # Errors
    /// Somebody who may not.
    pub fn of_call<T>(&self, request: &Request<T>) -> Result<Operator, Denied> {
        let shown = request.metadata().get("authorization").map(|value| value.as_bytes());
        self.check(shown, peer_of(request))
    }
}

impl fmt::Debug for Operators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Operators(by token)" } else { "Operators(everybody)" })
    }
}

impl Inner {
    fn again(&self) {
        match read(&self.path) {
            Ok(known) => {
                tracing::info!(operators = known.len(), file = %self.path.display(), "operators' tokens read again");
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
            }
            Err(error) => {
                tracing::warn!(%error, "the operators' tokens stay as they were");
            }
        }
    }
}

/// Where a call comes from.
pub fn peer_of<T>(request: &Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<Peer>().and_then(|peer| peer.0)
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::NoToken => Self::unauthenticated(denied.to_string()),
            Denied::BadToken => Self::permission_denied(denied.to_string()),
        }
    }
}

/// The call, with a token.
///
/// # Errors
/// A token that can't be in a header.
pub fn with_token<T>(message: T, token: Option<&str>) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        let mut value: MetadataValue<_> = format!("Bearer {token}")
            .parse()
            .map_err(|_| Status::invalid_argument("the operator's token can't be sent in a header"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    Ok(request)
}

/// The token in a file, for one that shows it.
///
/// # Errors
/// The file can't be read, or holds none.
pub fn token(path: &Path) -> Result<String, Error> {
    let wrong = |reason: String| Error { key: "operator.token_file", path: path.to_owned(), reason };
    let text = limited(path).map_err(wrong)?;
    let token = text.trim();
    if token.is_empty() || token.len() > MAX_BEARER || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(wrong("expected one word of visible characters".to_owned()));
    }
    Ok(token.to_owned())
}

fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    if authorization.len() > MAX_BEARER {
        return None;
    }
    let (scheme, token) = authorization.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn limited(path: &Path) -> Result<String, String> {
    use std::io::Read as _;
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE { Err(format!("over {MAX_FILE} bytes")) } else { Ok(text) }
}

fn read(path: &Path) -> Result<Known, Error> {
    let wrong = |reason: String| Error { key: KEY, path: path.to_owned(), reason };
    parse(&limited(path).map_err(wrong)?).map_err(wrong)
}

fn parse(text: &str) -> Result<Known, String> {
    let mut known = Known::new();
    for (at, line) in text.lines().enumerate() {
        let words = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = words.split_ascii_whitespace().collect();
        let wrong = |why: &str| format!("line {}: {why}", at + 1);
        match words[..] {
            [] => {}
            [name, hash] => {
                if name.len() > MAX_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return Err(wrong("a name has up to 64 visible ASCII characters"));
                }
                let hash =
                    digits(hash).ok_or_else(|| wrong("sha256 must be 64 hexadecimal digits, never the token"))?;
                // Two tokens may be one operator's, while one takes the other's place.
                if known.insert(hash, name.into()).is_some() {
                    return Err(wrong("this token is in another line, too"));
                }
            }
            _ => return Err(wrong("expected a name and the SHA-256 of a token")),
        }
    }
    Ok(known)
}

fn digits(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    // from_str_radix takes a sign.
    text.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(token: &str) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, token.as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn operators(text: &str) -> Operators {
        Operators(Some(Arc::new(Inner { path: PathBuf::new(), known: RwLock::new(parse(text).unwrap()) })))
    }

    #[test]
    fn only_whoever_shows_a_token_of_the_file_is_an_operator_and_has_its_name() {
        let text = format!("# ours\n\nalice {}\n bob\t{} # until May\n", hash("a-token"), hash("b-token"));
        let operators = operators(&text);
        let check = |shown: &str| operators.check(Some(shown.as_bytes()), None).map(|operator| operator.to_string());
        assert_eq!(check("Bearer a-token").unwrap(), "alice");
        assert_eq!(check("bearer  b-token").unwrap(), "bob");
        for bad in ["Bearer", "Bearer ", "Bearer c", "Basic a-token", "", &format!("Bearer {}", hash("a-token"))] {
            assert_eq!(check(bad), Err(Denied::BadToken), "{bad:?}");
        }
        assert_eq!(check(&format!("Bearer {}", "x".repeat(5000))), Err(Denied::BadToken));
        assert_eq!(operators.check(None, None), Err(Denied::NoToken));
        let peer = "127.0.0.1:7".parse().ok();
        let anybody = Operators::default().check(None, peer).unwrap();
        assert_eq!(anybody.to_string(), "somebody from 127.0.0.1:7");
    }

    #[test]
    fn calls_carry_tokens_and_say_where_they_come_from() {
        let operators = operators(&format!("alice {}", hash("t")));
        let mut call = with_token((), Some("t")).unwrap();
        call.extensions_mut().insert(Peer("10.0.0.1:9".parse().ok()));
        assert_eq!(operators.of_call(&call).unwrap().to_string(), "alice from 10.0.0.1:9");
        let status: Status = operators.of_call(&with_token((), None).unwrap()).unwrap_err().into();
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
        assert!(status.message().contains("KVASIR_TOKEN"), "{status}");
        assert!(with_token((), Some("a\nb")).is_err());
    }

    #[tokio::test]
    async fn every_wish_is_told_with_what_came_of_it() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&told);
        let desk = Desk::new(operators(&format!("alice {}", hash("t"))), move |asked: &Asked<'_>| {
            let result = asked.result.err().unwrap_or("done");
            if !asked.many {
                hears.lock().unwrap().push(format!("{} {} {}: {result}", asked.who, asked.what, asked.on));
            }
        });
        let ask = async |token: Option<&str>, answer: Result<u32, Status>| {
            let call = with_token(7, token).unwrap();
            let act = |seven: u32, _| async move { answer.map(|answer| answer + seven) };
            desk.call(call, "decode-1", |seven| format!("adds {seven} to"), act).await.map(Response::into_inner)
        };
        assert_eq!(ask(Some("t"), Ok(1)).await.unwrap(), 8);
        assert_eq!(ask(Some("t"), Err(Status::internal("no"))).await.unwrap_err().message(), "no");
        assert_eq!(ask(Some("x"), Ok(1)).await.unwrap_err().code(), tonic::Code::PermissionDenied);
        for _ in 0..1000 {
            assert_eq!(ask(None, Ok(1)).await.unwrap_err().code(), tonic::Code::Unauthenticated);
        }
        assert_eq!(ask(Some("t"), Ok(2)).await.unwrap(), 9, "who may is not held up by those who may not");
        let told = told.lock().unwrap();
        assert_eq!((told.len(), told.last().unwrap().as_str()), (23, "alice adds 7 to decode-1: done"));
        assert_eq!(told[..2], ["alice adds 7 to decode-1: done", "alice adds 7 to decode-1: no"]);
        assert!(told[2].starts_with("nobody known adds 7 to decode-1: the token is no operator's"), "{}", told[2]);
    }

    #[test]
    fn a_mistake_in_the_file_is_told_with_its_line() {
        let twice = format!("a {0}\nb {0}", hash("t"));
        for (text, why) in [
            ("alice", "line 1: expected"),
            ("\nalice secret", "line 2: sha256"),
            (&format!("alice +{}", &hash("t")[1..]), "line 1: sha256"),
            (&format!("alice {} x", hash("t")), "line 1: expected"),
            (&format!("{} {}", "x".repeat(65), hash("t")), "line 1: a name"),
            (&twice, "line 2: this token"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(why), "{text:?}: {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_file_is_read_again_and_a_mistake_in_it_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(&format!("alice {}\n", hash("one")));
        let config = Config { tokens_file: Some(path.clone()), token_file: None };
        let (operators, keeping) = Operators::open(&config).unwrap();
        let may = |token: &str| operators.check(Some(format!("Bearer {token}").as_bytes()), None).is_ok();
        assert!(may("one") && !may("three"));
        let changes = async {
            write(&format!("alice {}\nlonger {}\n", hash("two"), hash("three")));
            tokio::time::sleep(std::time::Duration::from_secs(3)).await;
            assert!(!may("one") && may("two") && may("three"));
            write("nonsense");
            tokio::time::sleep(std::time::Duration::from_secs(3)).await;
            assert!(may("two"));
        };
        tokio::select! {
            () = keeping => unreachable!(),
            () = changes => {}
        }
        let missing = Config { tokens_file: Some(dir.path().join("none")), token_file: None };
        let error = Operators::open(&missing).err().unwrap().to_string();
        assert!(error.contains(KEY) && error.contains("none"), "{error}");
    }
}
