//! What somebody may have meant who wrote a key that does not exist.

/// Names longer than this are no slips.
const MAX_NAME: usize = 64;

/// The key that was meant, from the root: a neighbour that is written almost so, or the same name in another section.
/// `neighbours` are names beside it, `all` every key there is.
pub(crate) fn suggestion<'a>(
    key: &str,
    neighbours: impl IntoIterator<Item = &'a str>,
    all: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let (section, name) = key.rsplit_once('.').map_or(("", key), |(section, name)| (section, name));
    if name.len() > MAX_NAME {
        return None;
    }
    let at = |name: &str| if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
    let near = neighbours.into_iter().map(|other| (slips(name, other), other)).min();
    if let Some((slips, other)) = near
        && slips <= (name.chars().count() / 3).max(1)
    {
        return Some(at(other));
    }
    let mut elsewhere = all.into_iter().filter(|other| other.rsplit('.').next() == Some(name));
    let found = elsewhere.next()?;
    elsewhere.next().is_none().then(|| found.to_owned())
}

/// How many letters were added, left out, mistaken or exchanged with the next one.
fn slips(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().take(MAX_NAME).collect());
    let mut before_last = vec![0; other.len() + 1];
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let mut least = (last[j] + usize::from(a != b)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_counted() {
        for (one, other, count) in [("a", "a", 0), ("lmits", "limits", 1), ("flie", "file", 1), ("", "abc", 3)] {
            assert_eq!((slips(one, other), slips(other, one)), (count, count), "{one} {other}");
        }
    }

    #[test]
    fn a_neighbour_is_meant_or_the_only_one_of_that_name() {
        let all = ["limits.max_inflight", "log.filter", "a.listen", "b.listen"];
        let meant = |key: &str, neighbours: &[&'static str]| suggestion(key, neighbours.iter().copied(), all);
        assert_eq!(meant("limits.max_infligt", &["max_inflight", "x"]).as_deref(), Some("limits.max_inflight"));
        assert_eq!(meant("max_inflight", &["limits", "log"]).as_deref(), Some("limits.max_inflight"));
        assert_eq!(meant("loq", &["limits", "log"]).as_deref(), Some("log"));
        assert_eq!(meant("listen", &["limits"]), None, "there are two");
        assert_eq!(meant("umbrella", &["limits", "log"]), None);
    }
}
