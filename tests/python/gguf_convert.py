"""A Hugging Face folder as a GGUF file, for llama.cpp: gguf_convert.py FOLDER OUT.gguf bf16|q8_0.

llama.cpp's own converter is no package, and wants a tokenizer; a model of random weights has none. Only what our shapes
need: the Qwen2 and Qwen3 families, whose rotation llama.cpp computes on the same halves as Hugging Face (for the Llama
family it would have to be permuted), weights in bf16.
"""

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def tensors(path):
    """Name and bf16 bits of every tensor of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            sys.exit(f"{name} is {entry['dtype']}: only BF16 is converted")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def f32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def main(folder, out, kind):
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    if family not in ARCHITECTURES:
        sys.exit(f"{family} is not one of {', '.join(ARCHITECTURES)}")
    arch, layers = ARCHITECTURES[family], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, bits in tensors(folder / "model.safetensors"):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            sys.exit(f"{name} has no name in GGUF")
        if bits.ndim == 1:  # norms and biases are f32 in every GGUF file
            writer.add_tensor(theirs, f32(bits))
        elif kind == "q8_0":
            writer.add_tensor(theirs, gguf.quants.quantize(f32(bits), q8), raw_dtype=q8)
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in ("bf16", "q8_0"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
