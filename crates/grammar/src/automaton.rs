//! One answer under one grammar.

use kvasir_engine::{BadGrammar, Constraint, Mask};
use kvasir_types::TokenId;
use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar};

/// The parser's state after the answer so far.
pub(crate) struct Automaton {
    matcher: Matcher,
    vocab: usize,
}

impl Automaton {
    pub fn compile(factory: &ParserFactory, grammar: TopLevelGrammar, vocab: usize) -> Result<Self, BadGrammar> {
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(told(&error));
        }
        // What no text matches is found out by asking for the first token.
        matcher.compute_mask_or_eos().map_err(|error| told(&format!("{error:#}")))?;
        Ok(Self { matcher, vocab })
    }

    /// The same state, independent of this one: nothing computed for one answer is locked against another.
    pub fn fork(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), vocab: self.vocab }
    }

    fn mask(&mut self) -> Result<Mask, BadGrammar> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| told(&format!("{error:#}")))?;
        let mut words = allowed.as_slice().to_vec();
        words.truncate(self.vocab.div_ceil(32));
        Ok(Mask::from_words(words))
    }
}

impl Constraint for Automaton {
    fn advance(&mut self, token: TokenId) -> Result<bool, BadGrammar> {
        self.matcher.consume_token(token.0).map_err(|error| told(&format!("{error:#}")))?;
        Ok(self.matcher.is_stopped())
    }

    fn masks(&mut self, drafts: &[TokenId]) -> Result<Vec<Mask>, BadGrammar> {
        let mut masks = vec![self.mask()?];
        let mut ahead = 0;
        for &draft in drafts {
            if self.matcher.is_stopped() || !masks.last().is_some_and(|mask| mask.allows(draft)) {
                break;
            }
            self.matcher.consume_token(draft.0).map_err(|error| told(&format!("{error:#}")))?;
            ahead += 1;
            masks.push(self.mask()?);
        }
        self.matcher.rollback(ahead).map_err(|error| told(&format!("{error:#}")))?;
        Ok(masks)
    }
}

/// llguidance's words on one line, cut; from a line in angle brackets on it is its state.
fn told(error: &str) -> BadGrammar {
    let lines = error.lines().map(str::trim).take_while(|line| !line.starts_with('<'));
    let words = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    BadGrammar::new(if words.is_empty() {
        "no reason given".into()
    } else {
        words.chars().take(300).collect::<String>()
    })
}
