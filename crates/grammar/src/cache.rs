//! Grammars compiled lately, the latest last.

use kvasir_types::Grammar;

use crate::automaton::Automaton;

/// So few that looking at each is cheaper than hashing a schema would be.
pub(crate) struct Cache {
    limit: usize,
    entries: Vec<(Grammar, Automaton)>,
}

impl Cache {
    pub fn new(limit: usize) -> Self {
        Self { limit, entries: Vec::with_capacity(limit) }
    }

    /// A fresh automaton of a grammar that is here.
    pub fn get(&mut self, grammar: &Grammar) -> Option<Automaton> {
        let at = self.entries.iter().position(|(known, _)| known == grammar)?;
        let entry = self.entries.remove(at);
        let automaton = entry.1.fork();
        self.entries.push(entry);
        Some(automaton)
    }

    /// Keeps a grammar instead of the one not asked for the longest.
    pub fn put(&mut self, grammar: Grammar, automaton: Automaton) {
        if self.entries.iter().any(|(known, _)| *known == grammar) {
            return;
        }
        if self.entries.len() == self.limit {
            self.entries.remove(0);
        }
        self.entries.push((grammar, automaton));
    }
}
