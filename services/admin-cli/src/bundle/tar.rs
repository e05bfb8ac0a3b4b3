//! Files in the form of `tar` (POSIX ustar): a head of 512 bytes each, the content, zeros up to the next 512.

/// A tar file in memory.
#[derive(Debug, Default)]
pub(super) struct Tar {
    bytes: Vec<u8>,
    files: usize,
}

const BLOCK: usize = 512;
/// Longest name; ours are far below.
const NAME: usize = 100;

impl Tar {
    /// How many files are in it.
    pub(super) fn files(&self) -> usize {
        self.files
    }

    /// How long it is.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds a file; a name that is too long loses its beginning.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) {
        let name = format!("kvasir-support/{name}");
        let name = name.as_bytes();
        let name = &name[name.len().saturating_sub(NAME)..];
        let mut head = [0; BLOCK];
        let mut put = |at: usize, text: &[u8]| head[at..at + text.len()].copy_from_slice(text);
        put(0, name);
        put(100, b"0000644\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", content.len()).as_bytes());
        put(136, b"00000000000\0");
        // The sum is of the head with blanks in its own place.
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum: u32 = head.iter().map(|&byte| u32::from(byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self.files += 1;
    }

    /// The file, with the two empty blocks that end it.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn tar_itself_reads_it() {
        let mut tar = Tar::default();
        let long = format!("{}/end.txt", "x".repeat(200));
        tar.add("a/empty.txt", b"");
        tar.add("a/odd.txt", &[b'z'; 700]);
        tar.add(&long, b"cut");
        assert_eq!(tar.files(), 3);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.tar");
        std::fs::write(&file, tar.finish()).unwrap();
        let output = Command::new("tar").arg("xf").arg(&file).arg("-C").arg(dir.path()).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        let folder = dir.path().join("kvasir-support/a");
        assert_eq!(std::fs::read(folder.join("odd.txt")).unwrap(), [b'z'; 700]);
        assert_eq!(std::fs::read(folder.join("empty.txt")).unwrap(), b"");
    }
}
