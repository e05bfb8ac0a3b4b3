//! A sequence in the engine, as an async task sees it.

use std::sync::Arc;

use kvasir_engine::{Admission, Event, Handle, MAX_CHOICES, Mode, Request, SeqId};
use kvasir_types::{BlockHash, Priority, RequestId, Sampled, Sampling, TokenId};
use tokio::sync::mpsc;

use crate::{caller::Caller, error::Error, host::Host, spill::Spills};

/// Owns a sequence: dropping it gives the sequence's blocks back. Whoever holds it must have fenced every peer and
/// awaited every transfer that touches those blocks before letting it go.
pub(crate) struct Sequence {
    engine: Handle,
    /// Who may be reading into its blocks without its owner's knowledge.
    spills: Option<Spills>,
    id: SeqId,
    events: mpsc::Receiver<Event>,
}

/// What to put into the engine.
pub(crate) struct Prompt {
    pub(crate) id: RequestId,
    pub(crate) tokens: Arc<[TokenId]>,
    pub(crate) root: BlockHash,
    pub(crate) sampling: Sampling,
    pub(crate) priority: Priority,
    pub(crate) choices: u32,
}

impl Sequence {
    /// Queues a prompt; it is refused at once if the engine cannot take it.
    ///
    /// Compiling a grammar takes milliseconds, so that is done where it keeps no other request's bytes waiting. A caller that
    /// goes away meanwhile drops the sequence as soon as it is there.
    pub(crate) async fn admit(host: &Arc<Host>, prompt: Prompt, mode: Mode) -> Result<Self, Error> {
        if prompt.sampling.grammar.is_none() {
            return Self::admit_now(host, prompt, mode);
        }
        let host = host.clone();
        let admitted = tokio::task::spawn_blocking(move || Self::admit_now(&host, prompt, mode));
        admitted.await.unwrap_or_else(|_| Err(Error::Engine(kvasir_engine::Error::Closed)))
    }

    fn admit_now(host: &Host, prompt: Prompt, mode: Mode) -> Result<Self, Error> {
        // One event for each token, each choice's end, and admission: the engine's thread never finds the channel full.
        let capacity = 4 + match mode {
            Mode::Generate => {
                let answers = prompt.choices.min(MAX_CHOICES) as usize;
                answers * (1 + (prompt.sampling.max_tokens as usize).min(host.max_len()))
            }
            Mode::PrefillOnly => 1,
        };
        let (sender, events) = mpsc::channel(capacity);
        let id = prompt.id.clone();
        let request = Request {
            id: prompt.id,
            prompt: prompt.tokens,
            root: prompt.root,
            sampling: prompt.sampling,
            mode,
            priority: prompt.priority,
            choices: prompt.choices,
        };
        let sink = Box::new(move |event: Event| {
            // Closed means that the owner let go; its abort is on the way.
            let _ = sender.try_send(event);
        });
        let (engine, spills) = (host.engine.clone(), host.spills.clone());
        let seq = engine.admit(request, sink).map_err(|rejected| Error::Rejected(rejected.error))?;
        if let Some(spills) = &spills {
            spills.enter(seq, engine.clone(), id);
        }
        Ok(Self { engine, spills, id: seq, events })
    }

    /// Its name in the engine.
    pub(crate) fn id(&self) -> SeqId {
        self.id
    }

    /// The next event; an error once the caller is gone, the deadline passed or the engine failed.
    pub(crate) async fn next<T>(&mut self, caller: &Caller<T>) -> Result<Event, Error> {
        // Receiving is cancel safe: an event not taken stays in the channel.
        match caller.while_waiting(self.events.recv()).await? {
            Some(Event::Failed(error)) => Err(Error::Engine(error)),
            Some(event) => Ok(event),
            None => Err(Error::Engine(kvasir_engine::Error::Closed)),
        }
    }

    /// Waits until blocks are reserved for the whole prompt.
    pub(crate) async fn admitted<T>(&mut self, caller: &Caller<T>) -> Result<Admission, Error> {
        loop {
            if let Event::Admitted(admission) = self.next(caller).await? {
                return Ok(admission);
            }
        }
    }

    /// Waits for the next token, ignoring everything else.
    pub(crate) async fn token<T>(&mut self, caller: &Caller<T>) -> Result<Sampled, Error> {
        loop {
            if let Event::Token { sampled, .. } = self.next(caller).await? {
                return Ok(sampled);
            }
        }
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        // One that is being brought back from the store is aborted when the read into its blocks has ended.
        if !self.spills.as_ref().is_some_and(|spills| spills.leave(self.id)) {
            self.engine.abort(self.id); // idempotent: a sequence that ended has nothing left to free
        }
    }
}
