"""A Llama small enough to write to a GGUF file in a test."""

import numpy as np

V, L, D, N, K, H, F = 40, 2, 32, 4, 2, 8, 64


def tiny_tensors(rng, tied=False):
    """Random weights under their GGUF names, shaped [out, in]."""
    shapes = {"token_embd": (V, D), "output_norm": (D,)} | ({} if tied else {"output": (V, D)})
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_q": (N * H, D),
            f"blk.{i}.attn_k": (K * H, D),
            f"blk.{i}.attn_v": (K * H, D),
            f"blk.{i}.attn_output": (D, N * H),
            f"blk.{i}.ffn_gate": (F, D),
            f"blk.{i}.ffn_up": (F, D),
            f"blk.{i}.ffn_down": (D, F),
            f"blk.{i}.attn_norm": (D,),
            f"blk.{i}.ffn_norm": (D,),
        }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
