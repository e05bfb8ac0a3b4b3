//! How a segment's shm address is written, and whether one can be reached from here.
//!
//! `<boot id>/<network namespace>/<abstract name>`, or, where containers share a directory, `<boot id>//<path>`. The boot id
//! tells hosts apart (and lives of one host); abstract names are known in one network namespace only, paths wherever
//! the directory is mounted at the same place.

use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use super::socket::Socket;
use crate::{error::Error, owner::random_u64};

/// Longest path of a Unix socket.
const MAX_PATH: usize = 107;

/// The host as one can see it from inside a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    boot: String,
    namespace: u64,
}

impl Host {
    /// The one we are on.
    pub(super) fn this() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Self { boot, namespace: fs::metadata("/proc/self/ns/net")?.ino() })
    }

    /// A published address as the name of a socket here; or why it is none.
    pub(super) fn resolve(&self, address: &str) -> Result<PathBuf, String> {
        let mut parts = address.splitn(3, '/');
        let (Some(boot), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            return Err("not an address of shared memory".into());
        };
        if boot != self.boot {
            return Err("another host".into());
        }
        if name.is_empty() || name.len() > MAX_PATH || name.contains('\0') {
            return Err("not the name of a socket".into());
        }
        if namespace.is_empty() {
            let path = PathBuf::from(name);
            return if path.exists() { Ok(path) } else { Err(format!("{name} is not there")) };
        }
        if namespace.parse() != Ok(self.namespace) {
            return Err("another network namespace; a shared directory (shm.dir) would help".into());
        }
        Ok(PathBuf::from(format!("\0{name}")))
    }
}

/// A listening socket and the address to publish. Its file, if it has one, goes with it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) address: String,
    file: Option<PathBuf>,
}

impl Place {
    /// Listens under a fresh random name. `others` are let through to us by the file's permissions if they may connect.
    pub(super) fn listen(host: &Host, dir: Option<&Path>, others: bool) -> Result<(Self, Socket), Error> {
        let name = format!("kvasir-{:016x}{:016x}", random_u64(), random_u64());
        let Some(dir) = dir else {
            let socket = Socket::listen(Path::new(&format!("\0{name}"))).map_err(|error| failed(&name, &error))?;
            let address = format!("{}/{}/{name}", host.boot, host.namespace);
            return Ok((Self { address, file: None }, socket));
        };
        let path = dir.join(format!("{name}.sock"));
        let text = path.to_str().filter(|_| path.as_os_str().as_bytes().len() <= MAX_PATH && path.is_absolute());
        let Some(text) = text else {
            let reason = format!("{} must be absolute, UTF-8 and leave 45 bytes of a path's {MAX_PATH}", dir.display());
            return Err(Error::Config { setting: "shm.dir", reason });
        };
        let socket = Socket::listen(&path).map_err(|error| failed(text, &error))?;
        let place = Self { address: format!("{}//{text}", host.boot), file: Some(path.clone()) };
        let mode = if others { 0o666 } else { 0o600 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(|error| failed(text, &error))?;
        Ok((place, socket))
    }

    /// Nobody new finds us any more.
    pub(super) fn leave(&self) {
        if let Some(file) = &self.file {
            let _ = fs::remove_file(file); // gone already is fine
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

fn failed(name: &str, error: &io::Error) -> Error {
    let reason = format!("cannot listen on Unix socket {name}: {error}");
    Error::TransportUnavailable { kind: kvasir_types::TransportKind::Shm, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_reached_on_its_host_and_in_its_namespace_only() {
        let host = Host::this().unwrap();
        let (place, _listener) = Place::listen(&host, None, false).unwrap();
        Socket::connect(&host.resolve(&place.address).unwrap()).unwrap();
        let elsewhere = Host { boot: "another".into(), ..host.clone() };
        assert_eq!(elsewhere.resolve(&place.address), Err("another host".into()));
        let beside = Host { namespace: host.namespace + 1, ..host.clone() };
        assert!(beside.resolve(&place.address).unwrap_err().contains("namespace"));
        for babble in ["", "a/b", "10.0.0.1:80", &format!("{}/{}/", host.boot, host.namespace)] {
            assert!(host.resolve(babble).is_err(), "{babble}");
        }
    }

    #[test]
    fn a_socket_in_a_directory_is_reached_from_every_namespace_and_goes_with_its_owner() {
        let host = Host::this().unwrap();
        let dir = std::env::temp_dir().join(format!("kvasir-shm-{:016x}", random_u64()));
        fs::create_dir(&dir).unwrap();
        let (place, _listener) = Place::listen(&host, Some(&dir), false).unwrap();
        let beside = Host { namespace: host.namespace + 1, ..host.clone() };
        Socket::connect(&beside.resolve(&place.address).unwrap()).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        let address = place.address.clone();
        drop(place);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        assert!(host.resolve(&address).unwrap_err().contains("not there"));
        fs::remove_dir(&dir).unwrap();
        let missing = Place::listen(&host, Some(&dir), false);
        assert!(matches!(missing, Err(Error::TransportUnavailable { .. })));
        let long = Place::listen(&host, Some(&dir.join("x".repeat(90))), false);
        assert!(matches!(long, Err(Error::Config { .. })));
    }
}
