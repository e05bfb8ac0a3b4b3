//! Block hashes: the name of a block is a hash of all tokens up to its end.
//!
//! ```text
//! root   = BLAKE3-derive-key("kvasir root", fingerprint ‖ layout ‖ len(salt) ‖ salt)
//! hash_0 = BLAKE3-keyed(root     ‖ 16 zero bytes, tokens of block 0)      first 16 bytes of each
//! hash_n = BLAKE3-keyed(hash_n-1 ‖ 16 zero bytes, tokens of block n)
//! ```
//!
//! The block before is the key, not part of what is hashed: 16 tokens then are one round of BLAKE3, not two. Routers name the
//! blocks of every prompt before they choose, one after the other since each needs the one before.
//!
//! Equal hashes therefore mean: same model, same layout, same tenant salt, same tokens from the prompt's beginning. That
//! is what keeps tenants out of one another's cache, and what lets a block be looked up by its own hash alone: what is
//! found can be used as it is. (Without the layout, blocks in bf16 and in f16 would have equal names and equal sizes.)
//! Numbers enter as 4 little-endian bytes each. Only full blocks have a hash.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{KvDtype, KvLayout, ModelFingerprint, TokenId};

/// Domain separation: bumping the version in this text invalidates every cache at once.
const ROOT_CONTEXT: &str = "kvasir 2026-11 block hash root v2";
/// Tokens that are hashed in one go: those of every usual block.
const AT_ONCE: usize = 64;

/// Hash of a full block and of everything before it; also the chain's root.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl BlockHash {
    /// Where the chain of a model, a layout and a tenant's salt starts. An empty salt is the shared tenant.
    pub fn root(fingerprint: ModelFingerprint, layout: &KvLayout, salt: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(&fingerprint.0);
        let &KvLayout { block_size, layers, kv_heads, k_dim, v_dim, dtype } = layout;
        let dtype = match dtype {
            KvDtype::Bf16 => 1,
            KvDtype::F16 => 2,
            KvDtype::F32 => 3,
            KvDtype::Fp8 => 4,
        };
        for number in [block_size, layers, kv_heads, k_dim, dtype] {
            hasher.update(&number.to_le_bytes());
        }
        // Only where it says something new, so that the blocks of ordinary models keep the names they always had. The
        // marker cannot be mistaken for the length of a salt.
        if v_dim != k_dim {
            hasher.update(&[0xff; 4]);
            hasher.update(&v_dim.to_le_bytes());
        }
        hasher.update(&(salt.len() as u64).to_le_bytes());
        hasher.update(salt.as_bytes());
        Self::truncate(hasher.finalize())
    }

    /// The hash of the block that holds `tokens` and follows the block named `self`.
    #[must_use]
    pub fn extend(self, tokens: &[TokenId]) -> Self {
        let mut key = [0; blake3::KEY_LEN];
        key[..self.0.len()].copy_from_slice(&self.0);
        if tokens.len() <= AT_ONCE {
            return Self::truncate(blake3::keyed_hash(&key, &bytes_of(tokens)[..tokens.len() * 4]));
        }
        let mut hasher = blake3::Hasher::new_keyed(&key);
        for part in tokens.chunks(AT_ONCE) {
            hasher.update(&bytes_of(part)[..part.len() * 4]);
        }
        Self::truncate(hasher.finalize())
    }

    fn truncate(hash: blake3::Hash) -> Self {
        let mut short = [0; 16];
        short.copy_from_slice(&hash.as_bytes()[..16]);
        Self(short)
    }
}

/// The bytes of up to [`AT_ONCE`] tokens: a hasher call per token costs more than the hash itself.
fn bytes_of(tokens: &[TokenId]) -> [u8; AT_ONCE * 4] {
    let mut buffer = [0; AT_ONCE * 4];
    for (bytes, token) in buffer.chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.0.to_le_bytes());
    }
    buffer
}

/// The hashes of all full blocks of `tokens`; a partial last block has none.
///
/// # Panics
/// If `block_size` is zero (a [`crate::KvLayout`] never holds that).
pub fn chain(root: BlockHash, tokens: &[TokenId], block_size: usize) -> Vec<BlockHash> {
    let mut parent = root;
    tokens
        .chunks_exact(block_size)
        .map(|block| {
            parent = parent.extend(block);
            parent
        })
        .collect()
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex16(&self.0, f)
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

impl Serialize for BlockHash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BlockHash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(d)?;
        parse_hex16(&text).map(Self).ok_or_else(|| serde::de::Error::custom("a block hash is 32 hexadecimal digits"))
    }
}

pub(crate) fn hex16(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

pub(crate) fn parse_hex16(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// The salt of a request of a tenant: the tenant's own and the one that the request asks for, so that neither can be had
/// through the other. The tenant's is empty where nobody has tenants: then the request's stands for itself.
pub fn tenant_salt(tenant: &str, asked: &str) -> String {
    if tenant.is_empty() {
        return asked.to_owned();
    }
    let mut hash = blake3::Hasher::new_derive_key("kvasir 2026 cache salt of a tenant");
    hash.update(&(tenant.len() as u64).to_le_bytes()).update(tenant.as_bytes()).update(asked.as_bytes());
    hash.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    const MODEL: ModelFingerprint = ModelFingerprint([7; 16]);
    const LAYOUT: KvLayout =
        KvLayout { block_size: 4, layers: 1, kv_heads: 1, k_dim: 8, v_dim: 8, dtype: KvDtype::Bf16 };

    proptest! {
        #[test]
        fn equal_hashes_mean_equal_prefixes(a in prop::collection::vec(0u32..3, 0..40), b in prop::collection::vec(0u32..3, 0..40)) {
            let root = BlockHash::root(MODEL, &LAYOUT, "");
            let (ha, hb) = (chain(root, &tokens(&a), 4), chain(root, &tokens(&b), 4));
            for (i, (x, y)) in ha.iter().zip(&hb).enumerate() {
                prop_assert_eq!(x == y, a[..(i + 1) * 4] == b[..(i + 1) * 4]);
            }
        }

        #[test]
        fn text_form_round_trips(bytes in any::<[u8; 16]>()) {
            prop_assert_eq!(parse_hex16(&BlockHash(bytes).to_string()), Some(bytes));
        }
    }

    #[test]
    fn a_salt_a_model_or_a_layout_starts_another_chain() {
        let roots = [
            BlockHash::root(MODEL, &LAYOUT, ""),
            BlockHash::root(MODEL, &LAYOUT, "tenant-a"),
            BlockHash::root(MODEL, &LAYOUT, "tenant-b"),
            BlockHash::root(ModelFingerprint([8; 16]), &LAYOUT, ""),
            BlockHash::root(MODEL, &KvLayout { dtype: KvDtype::F16, ..LAYOUT }, ""),
            BlockHash::root(MODEL, &KvLayout { block_size: 8, ..LAYOUT }, ""),
            BlockHash::root(MODEL, &KvLayout { v_dim: 0, ..LAYOUT }, ""),
        ];
        for (i, a) in roots.iter().enumerate() {
            assert!(roots[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn the_chain_is_what_it_was() {
        // A change here makes every stored block unreachable: bump ROOT_CONTEXT and say so in the changelog instead.
        let hashes = chain(BlockHash::root(MODEL, &LAYOUT, "salt"), &tokens(&[1, 2, 3, 4, 5]), 2);
        let names: Vec<String> = hashes.iter().map(BlockHash::to_string).collect();
        // Computed by BLAKE3's own Python package from the formula above.
        assert_eq!(names, ["961f7eab7aae75442b680e09f322fd71", "017bf5f1cd9dd52b6e36a4c0273bb3d7"]);
    }

    #[test]
    fn blocks_longer_than_the_buffer_hash_all_their_tokens() {
        let root = BlockHash::root(MODEL, &LAYOUT, "");
        let mut long = tokens(&(0..200).collect::<Vec<_>>());
        let before = root.extend(&long);
        long[199] = TokenId(7);
        assert_ne!(before, root.extend(&long));
    }
}
