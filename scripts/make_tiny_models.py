"""Tiny random models of each supported family, with the reference implementation's greedy answers.

    python make_tiny_models.py [--demo models/demo] [--out models/tiny] [NAME ...]

Each variant covers something the demo model does not: another family, form of the configuration, weight type, number of
files, a head size that is no multiple of the vector width. The answers are computed by transformers in float32 from the
files as saved, and have the form of the demo model's golden.jsonl (see golden.py there).

Random weights repeat one token for ever or leave ties if drawn carelessly: here the layers outweigh the embedding in the
residual stream (answers wander), and prompts are kept whose answers no rounding can tip (margin above MARGIN). Logits are
spread only so far that keys and values rounded to bfloat16 move a log-probability by well under 0.05.
"""
import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, DeepseekV2Config, DeepseekV3Config, Gemma2Config,
                          Gemma3TextConfig, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config,
                          Qwen3MoeConfig)
from transformers.utils import logging

PROMPTS = 6
LONG_PROMPTS = 2  # of them, hundreds of tokens
NEW_TOKENS = 24
MARGIN = 0.08
MIN_DISTINCT = 6  # tokens of an answer
MAX_BYTES = 600_000

COMMON = dict(vocab_size=1532, bos_token_id=None, eos_token_id=2, pad_token_id=0, max_position_embeddings=1024)

MLA = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, kv_lora_rank=24, qk_nope_head_dim=16,
           qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, moe_intermediate_size=24, first_k_dense_replace=1)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 128}
# Scores so far apart that rounded keys and values seldom tip the choice of an expert.
ROUTER_GAIN = 6.0
# How far logits lie apart.
SPREAD = 2.5

VARIANTS = {
    # The demo's family with another shape: heads wider than hidden / heads.
    "qwen3-tied": dict(
        config=Qwen3Config(**COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        dtype=torch.bfloat16),
    "qwen3-f32": dict(
        config=Qwen3Config(**COMMON, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3,
                           num_key_value_heads=1, head_dim=24, tie_word_embeddings=True, attention_bias=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        dtype=torch.float32),
    # Untied, llama3 scaling (the context passes the original one), several end tokens, head size from hidden / heads.
    "llama3-untied": dict(
        config=LlamaConfig(**COMMON, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
                           num_key_value_heads=2, tie_word_embeddings=False,
                           rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}),
        dtype=torch.bfloat16, eos=[2, 0], drop=["head_dim"]),
    # The older form of the configuration, f16, several shards, every bias, no grouped heads.
    "llama-linear-f16": dict(
        config=LlamaConfig(**COMMON, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=4, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                           rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        dtype=torch.float16, shard="160KB", old_rope={"type": "linear", "factor": 4.0}, drop=["num_key_value_heads"]),
    "qwen2-tied": dict(
        config=Qwen2Config(**COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=1, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        dtype=torch.bfloat16),
    # Upper layers slide, and YaRN as its authors recommend it for long contexts. It lengthens scores, and with them what
    # rounded keys move: logits that are spread less keep that in the same bounds as elsewhere.
    "qwen2-window": dict(
        config=Qwen2Config(**COMMON, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=41,
                           max_window_layers=1,
                           rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                            "original_max_position_embeddings": 128}),
        dtype=torch.bfloat16, spread=1.6),
    "mistral-window": dict(
        config=MistralConfig(**COMMON, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, sliding_window=37,
                             rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        dtype=torch.bfloat16),
    # Caps and scale far from the published ones, so that they bite on scores of this size.
    "gemma2": dict(
        config=Gemma2Config(**COMMON, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=24, sliding_window=29, query_pre_attn_scalar=20,
                            attn_logit_softcapping=3.0, final_logit_softcapping=15.0,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        dtype=torch.bfloat16, drop=["layer_types", "tie_word_embeddings"]),
    # The older form of the configuration, as published; seven layers: the last group of sliding ones is a short one.
    "gemma3": dict(
        config=Gemma3TextConfig(**COMMON, hidden_size=48, intermediate_size=80, num_hidden_layers=7, num_attention_heads=4,
                                num_key_value_heads=1, head_dim=16, sliding_window=43, query_pre_attn_scalar=12,
                                sliding_window_pattern=3,
                                rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                                                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        dtype=torch.bfloat16, drop=["layer_types", "rope_parameters", "tie_word_embeddings", "_sliding_window_pattern"],
        keys={"sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
              "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "qwen3-moe": dict(
        config=Qwen3MoeConfig(**COMMON, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, num_experts=8,
                              num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1],
                              rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        dtype=torch.bfloat16),
    "mixtral": dict(
        config=MixtralConfig(**COMMON, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, tie_word_embeddings=True, num_local_experts=6, num_experts_per_tok=2,
                             rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        dtype=torch.bfloat16),
    # Like V2-Lite: queries in one step, the best experts of all.
    "deepseek-v2-lite": dict(
        config=DeepseekV2Config(**COMMON, **MLA, num_hidden_layers=3, tie_word_embeddings=True, q_lora_rank=None,
                                n_shared_experts=2, num_experts_per_tok=3, topk_method="greedy", routed_scaling_factor=1.0,
                                rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
        dtype=torch.bfloat16),
    # Like V2: compressed queries, experts within the best groups. Different mscales, so that rotations lengthen, too.
    "deepseek-v2": dict(
        config=DeepseekV2Config(**COMMON, **MLA, num_hidden_layers=2, tie_word_embeddings=True, q_lora_rank=20,
                                n_shared_experts=1, num_experts_per_tok=3, topk_method="group_limited_greedy", n_group=4,
                                topk_group=2, routed_scaling_factor=2.0,
                                rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
        dtype=torch.bfloat16),
    "deepseek-v3": dict(
        config=DeepseekV3Config(**COMMON, **MLA, num_hidden_layers=2, tie_word_embeddings=False, q_lora_rank=20,
                                num_key_value_heads=4, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
                                norm_topk_prob=True, routed_scaling_factor=1.5, num_nextn_predict_layers=0,
                                rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        dtype=torch.bfloat16),
}


def draw(model, seed, spread):
    """Fills a model with weights whose answers depend on the whole prompt; its logits are spread by about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    from_one = "gemma" in model.config.model_type  # norms are stored as offsets from one
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.data = 0.2 * torch.randn(b.shape, generator=generator)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if from_one and "norm" in name:
            p.data = (1.5 if "post_" in name else 0.0) + 0.25 * noise
        elif "norm" in name:
            p.data = 1 + 0.25 * noise
        elif name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
            p.data = noise * ROUTER_GAIN / p.shape[1] ** 0.5
        elif ".experts." in name and p.dim() == 3:  # all experts of a layer: gate and up in one, or down
            p.data = noise * (4.0 if name.endswith("down_proj") else 1.0) / p.shape[2] ** 0.5
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            p.data = noise * spread / p.shape[1] ** 0.5
        else:
            gain = {"o_proj": 3.0, "down_proj": 4.0, "q_proj": 1.5, "k_proj": 1.5, "q_b_proj": 1.5,
                    "kv_b_proj": 1.5}.get(name.split(".")[-2], 1.0)
            p.data = noise * gain / p.shape[1] ** 0.5


def save(variant, folder, demo, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = AutoModelForCausalLM.from_config(variant["config"])
    draw(model, seed, variant.get("spread", SPREAD))
    model.to(variant["dtype"]).save_pretrained(folder, max_shard_size=variant.get("shard", "1GB"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / name, folder / name)

    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "old_rope" in variant:
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": variant["old_rope"]}
        config["torch_dtype"] = config.pop("dtype")
    for key in variant.get("drop", []):
        config.pop(key, None)
    config |= variant.get("keys", {})
    path.write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": variant.get("eos", 2), "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def answer(model, tokenizer, messages):
    """The greedy answer, or None if it is left as soon as two tokens are too near to one another."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    eos = model.generation_config.eos_token_id
    out, margin, first, step, cache = [], float("inf"), None, torch.tensor([ids]), None
    while len(out) < NEW_TOKENS and not (out and out[-1] in (eos if isinstance(eos, list) else [eos])):
        with torch.no_grad():
            g = model(step, past_key_values=cache, use_cache=True)
        row, cache = g.logits[0, -1], g.past_key_values
        first = row if first is None else first
        best = torch.topk(row, 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        if margin <= MARGIN:
            return None
        out.append(best.indices[0].item())
        step = torch.tensor([out[-1:]])
    top = torch.topk(torch.log_softmax(first, -1), 5)
    return {"messages": messages, "prompt_ids": ids, "output_ids": out,
            "text": tokenizer.decode(out, skip_special_tokens=True),
            "first_logprobs": {str(i): round(v, 5) for i, v in zip(top.indices.tolist(), top.values.tolist())},
            "margin": round(margin, 4)}


def reference(folder):
    """The model as saved, in float32, by the plainest attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(folder):
    """Whole rows of logits at some positions of a long run of tokens, answers included: before, in and after windows."""
    lines = [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]
    tokens = max((line["prompt_ids"] + line["output_ids"] for line in lines), key=len)
    positions = sorted({0, 20, 50, 127, 128, len(tokens) - 1})
    assert len(tokens) > 129, len(tokens)
    with torch.no_grad():
        rows = reference(folder)(torch.tensor([tokens]), use_cache=False).logits[0]
    save_file({"tokens": torch.tensor(tokens, dtype=torch.int32), "positions": torch.tensor(positions, dtype=torch.int32),
               "logits": rows[positions].contiguous()}, folder / "reference.safetensors")


def golden(folder, corpus):
    rng = random.Random(7)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = reference(folder)
    lines, tried = [], 0
    while len(lines) < PROMPTS:
        tried += 1
        if tried > 1500:
            sys.exit(f"{folder.name}: only {len(lines)} of {tried} prompts have a margin above {MARGIN}")
        if len(lines) < LONG_PROMPTS:
            text = ""
            while len(text) < 700:
                text = corpus.recall(rng, 120)[0]
            messages = [{"role": "user", "content": text}]
        elif len(lines) == LONG_PROMPTS:
            messages = corpus.chat(rng)[:-1]
        else:
            messages = [{"role": "user", "content": rng.choice((corpus.fact, corpus.copy, corpus.count))(rng)[0]}]
        line = answer(model, tokenizer, messages)
        if line and len(set(line["output_ids"])) >= MIN_DISTINCT:
            lines.append(line)
    lines.reverse()  # the short ones first: a failure shows early
    (folder / "golden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tried, lines


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="*", metavar="NAME", help=", ".join(VARIANTS))
    ap.add_argument("--demo", type=Path, default=Path("models/demo"))
    ap.add_argument("--out", type=Path, default=Path("models/tiny"))
    ap.add_argument("--only-logits", action="store_true", help="of models that are there: reference.safetensors anew")
    a = ap.parse_args()
    sys.path.insert(0, str(a.demo))
    import corpus

    logging.disable_progress_bar()
    torch.manual_seed(0)
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        if a.names and name not in a.names:
            continue
        folder = a.out / name
        if a.only_logits:
            logits(folder)
            continue
        save(variant, folder, a.demo, seed)
        tried, lines = golden(folder, corpus)
        logits(folder)
        size = sum(f.stat().st_size for f in folder.iterdir())
        prompts = [len(line["prompt_ids"]) for line in lines]
        margins = [line["margin"] for line in lines]
        print(f"{name:18} {size:7} bytes  prompts {prompts}  margins {margins}  ({tried} tried)", flush=True)
        if size > MAX_BYTES:
            sys.exit(f"{name}: {size} bytes are more than {MAX_BYTES}")


if __name__ == "__main__":
    main()
