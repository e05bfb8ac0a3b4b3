//! What a client and its peer say to one another before the first frame: TLS if it is asked for, then hello and welcome.

use std::io;

use kvasir_types::PROTOCOL_VERSION;

use super::{
    frame::{Hello, Verdict, WELCOME_BYTES},
    link::Link,
    tls::{self, Connected, Tls},
};
use crate::{
    counters::{Counters, add_one},
    error::Error,
};

/// Why there is no connection.
pub(super) enum NoConnection {
    /// The peer answered, and it means no; or we do not trust it.
    Refused(Error),
    /// It may be different in a moment.
    Failed(Error),
}

/// The client's part, on a fresh link to `address`.
pub(super) fn shake_hands(
    link: &Link,
    tls: Option<&Tls>,
    address: &str,
    hello: Hello,
    counters: &Counters,
) -> Result<(), NoConnection> {
    let peer = || address.to_owned();
    let lost = |reason: String| NoConnection::Failed(Error::Disconnected { peer: peer(), reason: reason.into() });
    let untrusted = |reason: String| {
        add_one(&counters.untrusted);
        NoConnection::Refused(Error::Untrusted { peer: peer(), reason })
    };
    let broken = |error: io::Error| match tls::distrust(&error) {
        Some(reason) => untrusted(reason),
        None => lost(format!("in the handshake: {error}")),
    };
    let secured = match tls {
        Some(tls) => tls.connect(link, address).map_err(broken)?,
        None => Connected::Secured, // as far as it was asked for
    };
    let (welcome, clear) = match secured {
        Connected::Clear(welcome) => (welcome, true),
        Connected::Secured => {
            let mut welcome = [0; WELCOME_BYTES];
            // The owner looks at our certificate last: that it does not accept it is told instead of the welcome.
            link.send_bytes(&hello.encode()).and_then(|()| link.receive_bytes(&mut welcome)).map_err(broken)?;
            (welcome, false)
        }
    };
    let (verdict, theirs) = Verdict::decode(&welcome).map_err(|error| lost(error.to_string()))?;
    Err(NoConnection::Refused(match verdict {
        Verdict::Welcome if clear => return Err(untrusted("it welcomes without having shown a certificate".into())),
        Verdict::Welcome => return Ok(()),
        Verdict::Version => Error::Version { peer: peer(), ours: PROTOCOL_VERSION, theirs },
        Verdict::Stale => Error::Stale { segment: hello.segment, peer: peer() },
        Verdict::Busy => Error::Busy { who: peer(), what: "it accepts no more connections" },
        Verdict::Secured => return Err(untrusted("it speaks only TLS, and Config::tls is not set here".into())),
        Verdict::Plain => return Err(untrusted("it does not speak TLS, and Config::tls is set here".into())),
    }))
}
