//! What of a request an engine's protocol can't carry: refused by its name before anything is sent, never left out.
//!
//! | asked for | vLLM | SGLang |
//! | --- | --- | --- |
//! | `seed` | carried | with `deterministic: true` only |
//! | a grammar (`guided_grammar`) | carried (its backend must know Lark) | no: its grammars are EBNF |
//! | `repetition_penalty` above 2 | carried | no: it takes 2 at most |
//! | going on with an answer of a form, or with presence or frequency penalties | no | no |
//!
//! An answer that goes on elsewhere is sent as a longer prompt, and engines know of no continued answers: a grammar would
//! begin anew, penalties would not count what was said before. Rather than tokens that should not be, the client gets the
//! error. Sampled answers go on, but not with the draws that would have come.

use kvasir_types::{Grammar, Sampling};

use super::{config::EngineKind, engine::Engine};
use crate::upstream::Field;

/// Why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Uncarried {
    /// The field that asks for it.
    pub(crate) field: Field,
    /// Why it is not possible.
    pub(crate) why: &'static str,
}

/// Whether an engine can be asked this; `seed_asked`: the client wants a seed.
pub(crate) fn carries(engine: &Engine, sampling: &Sampling, seed_asked: bool) -> Result<(), Uncarried> {
    let no = |field, why| Err(Uncarried { field, why });
    if engine.kind == EngineKind::Sglang {
        if seed_asked && !engine.seeds {
            return no(Field::Named("seed"), "the engine that serves this model follows no seeds");
        }
        if matches!(sampling.grammar, Some(Grammar::Lark(_))) {
            return no(Field::Form, "the engine that serves this model knows no Lark grammars");
        }
        if sampling.repetition_penalty > 2.0 {
            return no(Field::Named("repetition_penalty"), "the engine that serves this model takes 2 at most");
        }
    }
    if sampling.continued > 0 {
        let what = "an answer of this kind can't go on at another engine";
        if sampling.grammar.is_some() {
            return no(Field::Form, what);
        }
        if sampling.presence_penalty != 0.0 {
            return no(Field::Named("presence_penalty"), what);
        }
        if sampling.frequency_penalty != 0.0 {
            return no(Field::Named("frequency_penalty"), what);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{config::EngineRole, engine::tests::config, http::Http},
        *,
    };

    fn engine(kind: EngineKind, deterministic: bool) -> Engine {
        let mut config = config(kind, EngineRole::Decode, "http://a:1");
        config.deterministic = deterministic;
        Engine::new(&config, None, Http::default(), 0).unwrap()
    }

    #[test]
    fn what_is_not_carried_is_named() {
        let (vllm, sglang) = (engine(EngineKind::Vllm, false), engine(EngineKind::Sglang, false));
        let plain = Sampling::default;
        let field = |engine, sampling: Sampling, seed| carries(engine, &sampling, seed).err().map(|no| no.field);
        let lark = || Sampling { grammar: Some(Grammar::Lark("start: \"a\"".into())), ..plain() };
        let strong = || Sampling { repetition_penalty: 3.0, ..plain() };
        for (sampling, seed, named) in [
            (plain(), true, Some(Field::Named("seed"))),
            (plain(), false, None),
            (lark(), false, Some(Field::Form)),
            (strong(), false, Some(Field::Named("repetition_penalty"))),
            (Sampling { grammar: Some(Grammar::JsonObject), presence_penalty: 1.0, ..plain() }, false, None),
        ] {
            assert_eq!(field(&vllm, sampling.clone(), seed), None);
            assert_eq!(field(&sglang, sampling, seed), named);
        }
        assert_eq!(field(&engine(EngineKind::Sglang, true), plain(), true), None);
    }

    #[test]
    fn only_what_may_go_on_goes_on() {
        let engine = engine(EngineKind::Vllm, false);
        let goes_on = |sampling: Sampling| carries(&engine, &Sampling { continued: 1, ..sampling }, true).is_ok();
        assert!(goes_on(Sampling { temperature: 1.0, repetition_penalty: 1.2, ..Sampling::default() }));
        assert!(!goes_on(Sampling { grammar: Some(Grammar::JsonObject), ..Sampling::default() }));
        assert!(!goes_on(Sampling { presence_penalty: 0.1, ..Sampling::default() }));
        assert!(!goes_on(Sampling { frequency_penalty: -0.1, ..Sampling::default() }));
    }
}
