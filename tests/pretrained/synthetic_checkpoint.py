"""Llama checkpoints of any size, written without ever being in memory, and what loading one costs.

Run as a script in a process of its own, it prints one JSON line:
    python synthetic_checkpoint.py FOLDER PARAM_DTYPE
"""

import json
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np

SIZES = {"BF16": 2, "F16": 2, "F32": 4}


def hf_config(num_layers, width, mlp, vocabulary):
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "num_hidden_layers": num_layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": mlp,
        "tie_word_embeddings": False,
    }


def shapes(config):
    """Every tensor's name and shape, in the order of the files."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, k = config["num_attention_heads"] * 64, config["num_key_value_heads"] * 64
    yield "model.embed_tokens.weight", (v, d)
    for i in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (k, d),
            "self_attn.v_proj": (k, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }.items():
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (v, d)


def write(folder, config, dtype, num_shards):
    """Writes the folder: each tensor is a run of random bytes repeated, small enough never to be NaN."""
    (folder / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    block = (block.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else block
    block = block.astype(np.float16) if dtype == "F16" else block
    tensors = list(shapes(config))
    per_shard = -(-len(tensors) // num_shards)
    weight_map = {}
    for number in range(num_shards):
        part = tensors[number * per_shard : (number + 1) * per_shard]
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        header, offset = {}, 0
        for tensor, shape in part:
            end = offset + SIZES[dtype] * math.prod(shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset, weight_map[tensor] = end, name
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape in part:
                for start in range(0, math.prod(shape), block.size):
                    file.write(block[: math.prod(shape) - start].tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous_memory():
    """RssAnon of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(folder, param_dtype):
    """Loads the folder onto all devices; bytes of anonymous memory before, at most, and after."""
    import jax

    from espl_jax.parallel.sharding import make_mesh
    from espl_jax.pretrained import hf_folder

    mesh = make_mesh()
    config = hf_folder.read_config(folder, param_dtype=param_dtype)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[0]))
    before, most, done = anonymous_memory(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    params = hf_folder.read_params(folder, config, mesh)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return {
        "devices": len({shard.device for shard in shards}),
        "before": before,
        "most": most,
        "after": anonymous_memory(),
        "sharded_total": sum(shard.nbytes for shard in shards),
        "largest_tensor": max(
            math.prod(shape) for _, shape in shapes(json.loads((folder / "config.json").read_text()))
        )
        * SIZES[next(iter(hf_folder.open_checkpoint(folder).values())).dtype],
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
