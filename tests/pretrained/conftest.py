import gguf
import pytest

from tests.pretrained.gguf.tiny_gguf import D, F, K, L, N, write_field


@pytest.fixture
def write_gguf(tmp_path):
    """Writes a tiny model: fields and tensors may be overridden, left out (None) or quantized."""

    def write(tensors, fields=(), architecture="llama", quantize=(), *, tokenizer="gpt2", vocabulary=True):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        values = {
            "block_count": L,
            "context_length": 128,
            "embedding_length": D,
            "feed_forward_length": F,
            "attention.head_count": N,
            "attention.head_count_kv": K,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0,
        } | dict(fields)
        for name, value in values.items():
            if value is not None:
                write_field(writer, f"{architecture}.{name}", value)
        alphabet = [chr(i) for i in range(ord("a"), ord("a") + 26)]
        tokens = ["<|end|>", "<|user|>", *alphabet, "ab", "abc", "1", "2", "Ġ"]
        if tokenizer:
            writer.add_tokenizer_model(tokenizer)
        if vocabulary:
            writer.add_tokenizer_pre("smollm")
            writer.add_token_list(tokens)
            writer.add_token_types([3, 4] + [1] * (len(tokens) - 2))
            writer.add_token_merges(["a b", "ab c"])
            writer.add_eos_token_id(0)
            writer.add_chat_template("{{ messages[0].content }}")
        for name, value in tensors.items():
            if name in quantize:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
