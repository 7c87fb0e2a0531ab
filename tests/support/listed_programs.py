"""Compares the programs that a run compiles with those that plan and a dry run list."""

import contextlib
import logging
import re
import sys

import jax
import numpy as np

from espl_jax.plan import programs
from espl_jax.run import update
from espl_jax.run.parts import assemble, workloads_of
from espl_jax.run.workloads import Lengths
from espl_jax.sampling import decode

CALLED = {
    name: module
    for module, names in (
        (decode, ("prefill", "admit", "move", "extend", "decode_chunk")),
        (update, ("policy_gradient_step", "batch_logprobs")),
    )
    for name in names
}
LONGEST_PROMPT = 300
"""Tokens that system prompts grow to at most in these runs."""

UNLISTED = {"row_keys"}
"""Jitted functions whose memory is negligible."""


def _bytes(tree):
    leaves = (x for x in jax.tree.leaves(tree) if hasattr(x, "shape"))
    return sum(np.dtype(x.dtype).itemsize * int(np.prod(x.shape)) for x in leaves)


def _described(function, arguments, keywords):
    """Describes a call for comparison with the list: function and static arguments, columns and bytes."""
    static = {name: keywords.get(name) for name in ("steps", "greedy", "truncation", "aligned")}
    return (function, str(static)), keywords.get("columns", 0), _bytes((arguments, keywords))


def _jitted():
    """Names of the jitted functions of the package."""
    modules = [module for name, module in sys.modules.items() if name.startswith("espl_jax.")]
    kind = type(decode.prefill)
    return {name for module in modules for name, x in vars(module).items() if isinstance(x, kind)}


@contextlib.contextmanager
def nothing_else(config, monkeypatch, caplog):
    """Fails if a run of this configuration calls a program that is not listed, or compiles anything else.

    Yields:
      A set that gets what was called: names of functions, and `constrained`.
    """
    parts = assemble(config)
    decoder, held_bytes = parts.reference.config, parts.capacity.held_bytes
    longest = Lengths(LONGEST_PROMPT, parts.capacity.longest_problem, config.sampling.max_new_tokens)
    stages = {each: each.sizes(decoder, held_bytes, None) for each in workloads_of(config, parts, longest)}
    held = programs.held(config, decoder, parts.optimizer, None)
    listed = list(programs.run_programs(config, decoder, held, parts.optimizer, stages, None, stop_ids=1))
    most = {}
    for program in listed:
        kind, *sizes = _described(program.function, program.call.arguments, program.call.static)
        most.setdefault(kind, []).append(sizes)
    seen = set()

    def listen(name, function):
        def call(*arguments, **keywords):
            kind, columns, size = _described(name, arguments, keywords)
            assert any(columns <= c and size <= 1.01 * b for c, b in most.get(kind, ())), (
                kind,
                columns,
                size,
            )
            seen.update({name, "constrained"} if keywords.get("steps") == 1 else {name})
            return function(*arguments, **keywords)

        return call

    jitted = _jitted()
    with monkeypatch.context() as patch, jax.log_compiles(), caplog.at_level(logging.WARNING):
        for name, module in CALLED.items():
            patch.setattr(module, name, listen(name, getattr(module, name)))
        yield seen
    compiled = set(re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)) & jitted
    assert compiled <= {program.function for program in listed} | UNLISTED
