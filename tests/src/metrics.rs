//! Reading a service's `/metrics` page (Prometheus text format).

use std::collections::BTreeMap;

/// One page.
#[derive(Debug, Default)]
pub struct Metrics {
    families: Vec<String>,
    samples: Vec<Sample>,
}

#[derive(Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Parses a page; lines that are neither samples nor declarations are skipped.
    pub fn parse(text: &str) -> Self {
        let declared = |line: &str| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned());
        Self {
            families: text.lines().filter_map(declared).collect(),
            samples: text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect(),
        }
    }

    /// The metrics that the page declares, with or without a sample yet. A counter's samples end in `_total`.
    pub fn families(&self) -> &[String] {
        &self.families
    }

    /// The sum of all samples of that name; 0 if there is none.
    pub fn sum(&self, name: &str) -> f64 {
        self.sum_where(name, &[])
    }

    /// The sum of the samples of that name that have all these labels.
    pub fn sum_where(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&Sample| {
            sample.name == name && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value))
        };
        self.samples.iter().filter(fits).map(|sample| sample.value).sum()
    }
}

/// `name{key="value",…} 1.5`
fn sample(line: &str) -> Option<Sample> {
    let (series, value) = line.trim().rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        None => (series, BTreeMap::new()),
        Some((name, rest)) => (name, labels(rest.strip_suffix('}')?)),
    };
    Some(Sample { name: name.to_owned(), labels, value: value.parse().ok()? })
}

/// `key="value",key="value"`; our label values come from closed sets and hold neither commas nor quotes.
fn labels(text: &str) -> BTreeMap<String, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        Some((key.to_owned(), value.trim_matches('"').to_owned()))
    };
    text.split(',').filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_label() {
        let page = Metrics::parse(
            "# TYPE kvasir_blocks gauge\nkvasir_blocks{state=\"free\"} 3\nkvasir_blocks{state=\"cached\"} 4\nup 1\n# EOF\n",
        );
        assert_eq!(page.sum("kvasir_blocks"), 7.0);
        assert_eq!(page.sum_where("kvasir_blocks", &[("state", "free")]), 3.0);
        assert_eq!((page.sum("up"), page.sum("down")), (1.0, 0.0));
        assert_eq!(page.families(), ["kvasir_blocks"]);
    }
}
