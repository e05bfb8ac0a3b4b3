"""transformers on torch's CPU kernels under measurement: transformers_rival.py FOLDER THREADS.

One JSON object per line in, one per line out, as llama_rival.py. bf16 weights and cache, scaled_dot_product_attention, no
compilation; what is timed is the forward pass alone.
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Rival:
    def __init__(self, folder, threads):
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model.eval()

    def forward(self, ids, cache):
        start = time.perf_counter()
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return time.perf_counter() - start, logits[:, -1].argmax(-1, keepdim=True)

    def do_prefill(self, prompt):
        self.forward(torch.tensor([prompt]), DynamicCache())
        return {"seconds": self.forward(torch.tensor([prompt]), DynamicCache())[0]}

    def do_decode(self, prompts, steps, warm_up):
        cache, times, written = DynamicCache(), [], []
        _, tokens = self.forward(torch.tensor(prompts), cache)
        for _ in range(warm_up + steps):
            written.append(int(tokens[0, 0]))
            seconds, tokens = self.forward(tokens, cache)
            times.append(seconds)
        return {"step_seconds": times[warm_up:], "tokens": written + [int(tokens[0, 0])]}


def main(folder, threads):
    rival = Rival(folder, int(threads))
    print(json.dumps({"system": f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            with torch.inference_mode():
                answer = getattr(rival, "do_" + ask.pop("do"))(**ask)
        except Exception as error:  # whatever it is belongs into the row of the table
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
