//! Other ways to members: they advertise addresses that are good inside of the cluster, and `kubectl port-forward` (or a
//! tunnel) makes others of them here.
//!
//! | form | what goes another way |
//! | --- | --- |
//! | `router-0/admin=127.0.0.1:9090` | one port of one member, by its name: `grpc`, `admin` or `http` |
//! | `10.244.1.7:9090=127.0.0.1:9090` | an address |
//! | `10.244.1.7=127.0.0.1` | all ports of a host |

use kvasir_cluster::{Member, View};

/// One other way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Via {
    from: String,
    to: String,
}

impl std::str::FromStr for Via {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?}: expected NAME/grpc=HOST:PORT (or /admin, /http), HOST:PORT=HOST:PORT or HOST=HOST, as in \
                 router-0/admin=127.0.0.1:9090"
            )
        };
        let (from, to) = text.split_once('=').ok_or_else(wrong)?;
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        let fine = match from.split_once('/') {
            Some((name, port)) => plain(name) && ["grpc", "admin", "http"].contains(&port) && has_port(to),
            None => plain(from) && has_port(from) == has_port(to),
        };
        if fine && plain(to) { Ok(Self { from: from.to_owned(), to: to.to_owned() }) } else { Err(wrong()) }
    }
}

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.from, self.to)
    }
}

/// The view with the other ways in place of the advertised addresses.
pub(crate) fn redirect(mut view: View, ways: &[Via]) -> View {
    if ways.is_empty() {
        return view;
    }
    for member in &mut view.members {
        let Member { id, grpc, admin, http, .. } = member;
        for (port, address) in [("grpc", grpc), ("admin", admin), ("http", http)] {
            let name = format!("{id}/{port}");
            if let Some(other) = ways.iter().find_map(|way| way.lead(&name, address)) {
                *address = other;
            }
        }
    }
    view
}

impl Via {
    fn lead(&self, name: &str, address: &str) -> Option<String> {
        if self.from == name || self.from == address {
            return Some(self.to.clone());
        }
        let (host, port) = address.rsplit_once(':')?;
        (host == self.from).then(|| format!("{}:{port}", self.to))
    }
}

fn has_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let closed = !host.contains(':') || host.ends_with(']');
        !host.is_empty() && closed && port.parse::<u16>().is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gather::tests::decode;

    fn via(text: &str) -> Via {
        text.parse().unwrap()
    }

    #[test]
    fn a_way_is_by_name_by_address_or_by_host() {
        let member = || decode("d-0", "10.0.0.7:4000", "10.0.0.7:9090");
        let ways = |ways: &[&str]| {
            let view = View { members: vec![member()], ..View::default() };
            let ways: Vec<Via> = ways.iter().map(|way| via(way)).collect();
            let member = redirect(view, &ways).members.remove(0);
            (member.grpc, member.admin)
        };
        let pair = |grpc: &str, admin: &str| (grpc.to_owned(), admin.to_owned());
        assert_eq!(ways(&[]), pair("10.0.0.7:4000", "10.0.0.7:9090"));
        assert_eq!(ways(&["d-0/admin=127.0.0.1:1"]), pair("10.0.0.7:4000", "127.0.0.1:1"));
        assert_eq!(ways(&["10.0.0.7:4000=[::1]:2"]), pair("[::1]:2", "10.0.0.7:9090"));
        assert_eq!(ways(&["10.0.0.7=127.0.0.1"]), pair("127.0.0.1:4000", "127.0.0.1:9090"));
        assert_eq!(ways(&["d-0/grpc=a:1", "10.0.0.7=b"]), pair("a:1", "b:9090"), "the first that fits");
        assert_eq!(ways(&["d-1/grpc=a:1", "10.0.0.8=b"]), pair("10.0.0.7:4000", "10.0.0.7:9090"));
    }

    #[test]
    fn what_is_no_way_is_refused() {
        for bad in ["", "a", "=", "a=", "=b", "a/b=c:1", "a/grpc=b", "a:1=b", "a=b:1", "a/grpc=b:99999", "a=b/c"] {
            assert!(bad.parse::<Via>().is_err(), "{bad:?}");
        }
        assert_eq!(via("d-0/grpc=a:1").to_string(), "d-0/grpc=a:1");
    }
}
