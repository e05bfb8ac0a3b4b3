"""llama.cpp under measurement, by its C interface: llama_rival.py MODEL.gguf THREADS.

One JSON object per line in, one per line out. What is timed is llama_decode alone: no sampling, no Python beside the call.
`flash` of a load: auto, on or off, for flash attention.
"""

import ctypes
import json
import sys
import time

import llama_cpp as c
import numpy as np

FLASH = {
    "auto": c.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@c.llama_log_callback
def log(level, text, _):
    if level >= 3:  # warnings and errors
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


class Rival:
    def __init__(self, path, threads):
        c.llama_log_set(log, ctypes.c_void_p(0))
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"{path} could not be loaded")
        self.threads, self.ctx = threads, None
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def context(self, sequences, tokens, flash):
        """A fresh context for so many sequences of so many tokens; a prompt is taken 512 tokens at a time, as by default."""
        if self.ctx:
            c.llama_free(self.ctx)
        params = c.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_batch, params.n_ubatch = max(2048, sequences), 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH[flash]
        params.no_perf = True
        self.ctx = c.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError("no context")

    def decode(self, rows):
        """Computes (token, position, sequence, whether logits are wanted) and says how long that took."""
        batch = c.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = logits
        start = time.perf_counter()
        status = c.llama_decode(self.ctx, batch)
        c.llama_synchronize(self.ctx)
        seconds = time.perf_counter() - start
        c.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode says {status}")
        return seconds

    def prompt(self, tokens, sequence):
        """Seconds to compute a prompt; logits of its last token only."""
        last = len(tokens) - 1
        rows = [(token, i, sequence, i == last) for i, token in enumerate(tokens)]
        return sum(self.decode(rows[at : at + 2048]) for at in range(0, len(rows), 2048))

    def likeliest(self, row):
        logits = np.ctypeslib.as_array(c.llama_get_logits_ith(self.ctx, row), (self.vocab,))
        return int(logits.argmax())

    def do_prefill(self, prompt, flash):
        self.context(1, len(prompt) + 1, flash)
        self.prompt(prompt, 0)
        c.llama_memory_clear(c.llama_get_memory(self.ctx), True)
        return {"seconds": self.prompt(prompt, 0)}

    def do_decode(self, prompts, steps, warm_up, flash):
        self.context(len(prompts), len(prompts[0]) + steps + warm_up + 1, flash)
        tokens, written = [], []
        for sequence, prompt in enumerate(prompts):
            self.prompt(prompt, sequence)
            tokens.append(self.likeliest(-1))
        times, position = [], len(prompts[0])
        for _ in range(warm_up + steps):
            written.append(tokens[0])
            times.append(self.decode([(token, position, s, True) for s, token in enumerate(tokens)]))
            tokens = [self.likeliest(row) for row in range(len(tokens))]
            position += 1
        return {"step_seconds": times[warm_up:], "tokens": written + [tokens[0]]}


def main(path, threads):
    rival = Rival(path, int(threads))
    print(json.dumps({"system": c.llama_print_system_info().decode().strip()}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            answer = getattr(rival, "do_" + ask.pop("do"))(**ask)
        except Exception as error:  # whatever it is belongs into the row of the table
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
