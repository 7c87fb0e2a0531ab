"""Small but working models and runs: a byte-level tokenizer with a chat template, and a two-layer decoder."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import threading

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import common
from espl_jax import train
from espl_jax.data.order import Cursor
from espl_jax.evolution import population as populations
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import abstract, init
from espl_jax.parallel import sharding
from espl_jax.pretrained.load import Pretrained
from espl_jax.rollouts.turns import as_text
from espl_jax.run import parts as run_parts
from espl_jax.run import state as run_state
from espl_jax.run import tasks, weights
from espl_jax.storage.workdir import WorkDir
from espl_jax.types import Grade, Problem, SystemPrompt

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special tokens; `<|im_end|>` ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    bpe.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


CONFIG = DecoderConfig(
    vocab_size=259,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    tied_head=True,
    max_positions=4096,
    sampling_layout="stacked",
)


@functools.cache
def model(**numerics) -> Pretrained:
    """Random weights, the same every time."""
    config = CONFIG.replace(**numerics)
    return Pretrained(init(jax.random.key(0), config), config, tokenizer())


def load_pretrained(source, dtype="float32", mesh=None, **numerics) -> Pretrained:
    """Replaces `espl_jax.pretrained.load.load_pretrained`."""
    loaded = model(dtype=dtype, **numerics)
    params = sharding.place(loaded.params, abstract(loaded.config), mesh, "sampling")
    return dataclasses.replace(loaded, params=params)


def take_over(monkeypatch):
    """Patches runs to use the tiny model on one device, graded by `Letters`."""
    monkeypatch.setattr(weights, "load_pretrained", load_pretrained)
    monkeypatch.setattr(tasks, "Arithmetic", Letters)
    monkeypatch.setattr(run_parts.sharding, "make_mesh", lambda sizes: None)


class Letters:
    """An environment for models that write noise: rewards are a function of a reply's letters."""

    def __init__(self, answer_format="boxed", instruction=None):
        pass

    def user_message(self, problem: Problem) -> str:
        return problem.text

    def grade(self, problems, replies):
        sums = [len(p.text) + sum(map(ord, reply)) for p, reply in zip(problems, replies, strict=True)]
        return [Grade((n % 7) / 4, n % 7 > 3, str(n)) for n in sums]


class Talker(Letters):
    """Says something after each of the first two turns, every other time as a future."""

    tools = ()

    def respond(self, problem, transcript):
        turns = sum(message["role"] == "assistant" for message in transcript)
        if turns == 3:
            return None
        answer = [{"role": "user", "content": f"{problem.answer} e {turns}"}]
        if len(transcript[-1]["content"]) % 2:
            return answer
        future = concurrent.futures.Future()
        threading.Timer(0.05, lambda: future.set_result(answer)).start()
        return future

    def grade(self, problems, transcripts):
        return super().grade(problems, [as_text(transcript) for transcript in transcripts])


class Caller(Talker):
    """Has a tool."""

    tools = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)


PROBLEMS = tuple(
    Problem(f"q{i}", text, "1") for i, text in enumerate(["2 + 2?", "What is 13 + 9?", "0+7", "8 + 1"])
)
PROMPTS = (
    SystemPrompt(id="p0"),
    SystemPrompt(id="p1", text="Reply with the sum."),
    SystemPrompt(id="p2", text="Add.", principles=("Count twice.", "Say only the number.")),
)


def config(**changes):
    """Returns the config of a two-iteration run with few shapes to compile; `__` in names stands for dots."""
    c = common.get_config()
    small = {
        "num_iterations": 2,
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "model.matmul_precision": "default",
        "model.sampling_layout": "stacked",
        "model.remat": "none",
        "lora.rank": 2,
        "data.train": "addition:digits=1,count=6",
        "data.validation": "addition:digits=1,count=2",
        "data.test": "addition:digits=1,count=2",
        "environment.name": "arithmetic",
        "population.text": "Reply.",
        "num_prompts": 2,
        "batch_size": 2,
        "group_size": 3,
        "sampling.max_new_tokens": 6,
        "sampling.temperature": 1.0,
        "evolution.max_principles": 5,
        "evolution.crossover_prob": 0.5,
        "reflection.max_new_tokens": 8,
        "optimizer.learning_rate": 1e-2,
        "evaluation.every": 1,
        "evaluation.validation_samples": 3,
        "evaluation.test_samples": 3,
        "evaluation.temperature": 1.0,
        "compilation_cache": "",
    }
    c.update_from_flattened_dict(small)
    c.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
    c.lock()
    return c


@contextlib.contextmanager
def killed_before_saving(iteration):
    """Ends the run inside as a kill would, after this iteration and before it is saved."""
    save = train.save

    class Killed(BaseException):
        pass

    def save_or_die(workdir, state):
        if state.iteration == iteration:
            raise Killed
        save(workdir, state)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", save_or_die)
        yield


def scripted_replies(conversations):
    """Returns valid replies for every stage of reflection, as a function of the conversation only."""
    return [_scripted(conversation) for conversation in conversations]


def _scripted(conversation):
    text = conversation[1]["content"]
    rule = "R" + hashlib.blake2b(text.encode(), digest_size=2).hexdigest()[:3]
    if "Verdict:" in text:
        return "It went so."
    if "New principles:" in text:
        return f'[{{"op": "merge", "ids": ["C0", "C1"], "principle": "{rule}"}}]'
    return f'[{{"op": "add", "principle": "{rule}"}}]'


def workdir(path, **changes):
    """Creates the work directory of a two-iteration run without training; trained numbers grow by 0.5."""
    c = config(**changes)
    roots = [SystemPrompt(text=text) for text in ("Reply.", "Reply with the sum.", "Think {{ twice }}.")]
    members = populations.start(roots, c.population.max_size).with_ratings({"p0": (25, 3), "p1": (28, 2)})
    with WorkDir(path, c.to_dict()) as folder:
        parts = run_parts.assemble(c)
        state = run_state.first_train_state(c, parts)
        if state is not None:
            state = state.replace(trainable=jax.tree.map(lambda x: x + 0.5, state.trainable))
        for iteration in (1, 2):
            folder.append("metrics", {"iteration": iteration, "reward": iteration / 4})
        run_state.save(folder, run_state.Run(2, members.members[0], state, members, Cursor(c.seed)))
    return path
