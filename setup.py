"""Installation of espl_jax: evolving system prompts together with policy-gradient training, in JAX."""

from setuptools import find_packages, setup

# peft, accelerate, trl and transformers' server want torch, which the Makefile installs before them.
LIBTPU = "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"  # compiles for a TPU without one
GCS = ["gcsfs>=2026.1"]  # work directories in buckets
TEST = [
    *GCS,
    *(
        "pytest>=8",
        "pytest-cov>=6",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "peft>=0.17",
        "accelerate>=1.1",
    ),
    *("jsonschema>=4.20", "trueskillthroughtime>=1.1"),
    "trl==1.16.*",  # a test calls its loss, which is not public
    LIBTPU,
]
TEST_SLOW = [*TEST, "transformers[serving]"]
TPU = ["jax[tpu]"]
BENCH = ["matplotlib>=3.9", LIBTPU]

setup(
    name="espl_jax",
    version="0.1.0",
    description="Evolutionary system prompt learning with reinforcement learning of language models, in JAX",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["espl_jax", "espl_jax.*"]),
    package_data={"espl_jax.evolution": ["templates/*.txt"]},
    install_requires=[
        "absl-py>=2.1",
        "bm25s>=0.3",
        "chex>=0.1.90",
        "datasets>=4.4",
        "etils[epath]>=1.12",
        "flax>=0.12",
        "jinja2>=3.1.6",
        "gguf>=0.17",
        "huggingface-hub>=1.0",
        "jax>=0.9",
        "llguidance>=1.7.5",
        "math-verify>=0.8",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "openai>=2.0",
        "openskill>=6.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.8",
        "PyStemmer>=2.2",
        "protobuf>=4",  # it and sentencepiece: folders with tokenizer.model alone
        "pyarrow>=21",
        "rich>=13.7",
        "safetensors>=0.6",
        "scipy>=1.11",
        "sentencepiece>=0.2",
        "tenacity>=9.0",
        "tokenizers>=0.22",
        "transformers>=5.0",
        "trueskill>=0.4.5",
    ],
    extras_require={
        "test": TEST,
        "test-slow": TEST_SLOW,
        "tpu": TPU,
        "gcs": GCS,
        "bench": BENCH,
        "all": TEST_SLOW + BENCH,
    },
)
