//! Small helpers that several services would otherwise write again.

use std::{
    error::Error,
    fs,
    hash::{BuildHasher, Hasher},
    io,
    path::Path,
};

/// An error and its causes in one line: `a: b: c`.
///
/// A cause that begins with the text before it (a library that repeats its cause, a key named twice) replaces that text
/// instead of repeating it, and line breaks become spaces: what is printed stays one readable line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        match parts.last_mut() {
            Some(last) if text.starts_with(last.as_str()) => *last = text,
            Some(last) if last.ends_with(&text) => {}
            _ => parts.push(text),
        }
        next = error.source();
    }
    parts.join(": ")
}

/// A random number for names and incarnations. Not for secrets: it comes from the standard library's hash seeds.
pub fn random_u64() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Writes the addresses a service got to its port file, so that a reader sees either nothing or all of it.
pub fn write_port_file(path: &Path, addresses: &serde_json::Value) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "names no file"))?;
    // In the same directory: a rename is atomic only within a file system.
    let partial = path.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
    fs::write(&partial, format!("{addresses}\n"))?;
    fs::rename(&partial, path).inspect_err(|_| {
        let _ = fs::remove_file(&partial); // the rename's error is the one to tell
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_one_line_and_repeats_nothing() {
        let inner = anyhow::anyhow!("address in\nuse").context("admin.listen: cannot listen on :1");
        let error = inner.context("admin.listen");
        assert_eq!(chain(error.as_ref()), "admin.listen: cannot listen on :1: address in use");
    }

    #[test]
    fn a_port_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ports.json");
        write_port_file(&path, &serde_json::json!({"grpc": "127.0.0.1:1"})).unwrap();
        write_port_file(&path, &serde_json::json!({"grpc": "127.0.0.1:2"})).unwrap();
        let read: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(read["grpc"], "127.0.0.1:2");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_port_file(&dir.path().join("no/such/dir"), &read).is_err());
    }

    #[test]
    fn random_numbers_differ() {
        let numbers: std::collections::HashSet<_> = (0..1000).map(|_| random_u64()).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
