"""The bench of scripts/gpu-check by PyTorch: bf16, scaled-dot-product attention, CUDA graphs for decoding.

A plain decoder of Llama-3.1-8B's dimensions with random weights, as somebody who knows PyTorch would write it for speed:
projections fused, a static cache that is contiguous by sequence (no blocks), grouped-query attention by the library,
one graph a decode step. It also measures what a matrix product reaches at most.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F

HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, MLP, VOCAB = 4096, 32, 32, 8, 128, 14336, 128256


class Model:
    def __init__(self, layers):
        def matrix(rows, columns):
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

        self.embedding = matrix(VOCAB, HIDDEN)
        self.head = matrix(VOCAB, HIDDEN)
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.layers = [
            {
                "qkv": matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
                "o": matrix(HIDDEN, HEADS * DIM),
                "gate_up": matrix(2 * MLP, HIDDEN),
                "down": matrix(HIDDEN, MLP),
            }
            for _ in range(layers)
        ]
        self.frequencies = 500000.0 ** (-torch.arange(0, DIM, 2, device="cuda").float() / DIM)

    def weight_bytes(self):
        """Of one step: all but the embedding, of which it takes a row a token."""
        return 2 * (self.head.numel() + sum(matrix.numel() for layer in self.layers for matrix in layer.values()))

    def rotate(self, x, positions):
        angles = positions[:, None].float() * self.frequencies
        cos, sin = torch.cat([angles.cos()] * 2, -1).to(x.dtype), torch.cat([angles.sin()] * 2, -1).to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, tokens, positions, caches):
        """tokens [batch, n] at positions [n] of each; caches: keys and values [batch, KV_HEADS, length, DIM] a layer."""
        batch, n = tokens.shape
        x = F.embedding(tokens, self.embedding)
        for layer, (keys, values) in zip(self.layers, caches):
            qkv = F.linear(F.rms_norm(x, (HIDDEN,), self.norm, 1e-5), layer["qkv"])
            q, k, v = qkv.view(batch, n, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], 1)
            keys.index_copy_(2, positions, self.rotate(k, positions))
            values.index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(self.rotate(q, positions), keys, values, is_causal=n > 1, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, n, HEADS * DIM), layer["o"])
            gate, up = F.linear(F.rms_norm(x, (HIDDEN,), self.norm, 1e-5), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(F.rms_norm(x[:, -1], (HIDDEN,), self.norm, 1e-5), self.head)


def caches(layers, batch, length):
    def empty():
        return torch.zeros(batch, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)

    return [(empty(), empty()) for _ in range(layers)]


def median(work, rounds=15):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def decode(model, batch, context):
    """A step of `batch` sequences that have `context` tokens each, as one graph."""
    held = caches(len(model.layers), batch, context + 1)
    tokens = torch.full((batch, 1), 7, device="cuda")
    positions = torch.tensor([context], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.forward(tokens, positions, held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.forward(tokens, positions, held)
    return median(graph.replay)


def matrix_rate(n):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median(lambda: a @ b)


def copy_rate(bytes):
    a, b = (torch.empty(bytes, device="cuda", dtype=torch.uint8) for _ in range(2))
    return 2 * bytes / median(lambda: b.copy_(a))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers instead of 32: to see that it works")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args()
    torch.manual_seed(1)
    results = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "matrix_tflops": matrix_rate(8192) / 1e12,
        "copy_gb_s": copy_rate(1 << 30) / 1e9,
        "rows": [],
    }
    print(f"torch {results['torch']} on {results['device']}: products {results['matrix_tflops']:.0f} TFLOP/s, copies {results['copy_gb_s']:.0f} GB/s")
    with torch.inference_mode():
        model = Model(2 if options.quick else LAYERS)

        def told(what, seconds, tokens):
            print(f"{what:44} {seconds * 1e3:10.3f} ms {tokens / seconds:10.0f} tok/s")
            results["rows"].append({"what": what, "seconds": seconds, "tokens_per_second": tokens / seconds})

        for batch, context in [(1, 1024), (64, 2048)]:
            told(f"decode, batch {batch}, {context} tokens", decode(model, batch, context), batch)
        prompt = 8192
        held = caches(len(model.layers), 1, prompt)
        tokens = torch.arange(prompt, device="cuda")[None] * 37 % VOCAB
        positions = torch.arange(prompt, device="cuda")
        told(f"prefill of {prompt} tokens", median(lambda: model.forward(tokens, positions, held), 5), prompt)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


main()
