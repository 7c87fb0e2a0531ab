import pytest

from espl_jax.pretrained import smollm2
from espl_jax.pretrained.gguf.file import open_gguf
from espl_jax.pretrained.gguf.tokenizer import tokenizer_from_metadata


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return tokenizer_from_metadata(open_gguf(smollm2.find_gguf()).metadata)
