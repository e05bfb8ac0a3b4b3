//! Whose blocks are on disk: names that are too long for each record, numbered in a file beside them.
//!
//! A line of JSON for each origin, appended when its first block is written. Numbers are never used again: a node has seen
//! as many origins as its operator has models and tenants. A line that can't be read is passed over, and blocks of an origin
//! without a line are nobody's: they can be found all the same.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::store::Origin;

/// Most bytes of the file that are read: some hundred thousand origins.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Line {
    number: u32,
    model: [u8; 16],
    tenant: String,
}

/// The numbers of all origins seen. Written and read by whoever moves blocks to disk.
#[derive(Debug)]
pub(crate) struct Origins {
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// None once it could not be written: then new origins get no number that lasts.
    file: Option<File>,
    numbers: HashMap<Origin, u32>,
    next: u32,
}

impl Origins {
    /// What a directory knows; beginning anew if there is nothing to be read. Number 0 is nobody.
    pub(crate) fn open(directory: &Path) -> (Self, HashMap<u32, Origin>) {
        let path = directory.join("origins");
        let file = File::options().read(true).append(true).create(true).open(&path);
        let file = file.inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "blocks on disk will be nobody's after a restart");
        });
        let mut names = HashMap::new();
        if let Ok(file) = &file {
            let lines = BufReader::new(file.take(MAX_BYTES)).split(b'\n').map_while(Result::ok);
            for line in lines.filter_map(|line| serde_json::from_slice::<Line>(&line).ok()) {
                names.insert(line.number, Origin { model: line.model, tenant: line.tenant });
            }
        }
        let numbers: HashMap<_, _> = names.iter().map(|(&number, origin)| (origin.clone(), number)).collect();
        let next = names.keys().max().map_or(1, |max| max.saturating_add(1));
        (Self { known: Mutex::new(Known { file: file.ok(), numbers, next }) }, names)
    }

    /// The number of an origin, a new one if it has none.
    pub(crate) fn number(&self, origin: &Origin) -> u32 {
        if *origin == Origin::default() {
            return 0;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = known.numbers.get(origin) {
            return number;
        }
        let number = known.next;
        let line = Line { number, model: origin.model, tenant: origin.tenant.clone() };
        let line = serde_json::to_string(&line).expect("numbers and text are JSON");
        // The line before it may have been torn: this one starts anew.
        let text = format!("\n{line}\n");
        let Some(file) = &mut known.file else { return 0 };
        if let Err(error) = file.write_all(text.as_bytes()) {
            tracing::warn!(%error, "blocks of new tenants on disk will be nobody's after a restart");
            known.file = None;
            return 0;
        }
        known.next = number.saturating_add(1);
        known.numbers.insert(origin.clone(), number);
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_their_numbers_after_a_restart_and_damage_costs_names_only() {
        let directory = tempfile::tempdir().unwrap();
        let origin = |tenant: &str| Origin { model: [7; 16], tenant: tenant.into() };
        let (origins, names) = Origins::open(directory.path());
        assert!(names.is_empty());
        let [a, b, again] = ["a", "b", "a"].map(|tenant| origins.number(&origin(tenant)));
        assert_eq!((origins.number(&Origin::default()), a), (0, again));
        assert_ne!(a, b);
        let path = directory.path().join("origins");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [b"{torn\n\xff\xfe\n".as_slice(), &whole, b"{to"].concat()).unwrap();
        let (origins, names) = Origins::open(directory.path());
        assert_eq!((&names[&a], &names[&b]), (&origin("a"), &origin("b")));
        let c = origins.number(&origin("c"));
        assert!(![0, a, b].contains(&c));
        let (_, names) = Origins::open(directory.path());
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(names[&c], origin("c"));
    }
}
