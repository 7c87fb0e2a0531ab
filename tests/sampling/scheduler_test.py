"""Continuous batching: wasted steps, multi-turn rows, stages and limits."""

import concurrent.futures
import threading

import jax
import numpy as np
import pytest

from espl_jax.models.params import abstract
from espl_jax.parallel import sharding
from espl_jax.parallel.memory import bytes_per_device
from espl_jax.sampling import decode, draw, generate, scheduler
from espl_jax.sampling import sizes as sizing
from espl_jax.sampling.truncation import Truncation
from tests.support import tiny
from tests.support.flat import sample_tree

# One layer, one head: only the bookkeeping matters here.
SMALL = tiny.CONFIG.replace(num_layers=1, num_heads=1, num_kv_heads=1, max_positions=4096)


def keys_of(shape, seed=0):
    key = jax.random.key(seed, impl="threefry2x32")
    return draw.row_keys(key, *np.ogrid[tuple(slice(n) for n in shape)])


def sample(shape=(2, 2, 3), config=tiny.CONFIG, **settings):
    settings = {"max_new_tokens": 40, "temperature": 1.0, "chunk": 8} | settings
    systems = [[5, 6, 7, 8], [9, 4]][: shape[0]]
    problems = [[[9, 10], [11, 12, 13]], [[12, 13, 14], [15]]][: shape[0]]
    problems = [lane[: shape[1]] for lane in problems]
    return sample_tree(tiny.params(config), config, systems, problems, keys_of(shape), **settings)


class Places:
    """Identifies the row that `find_end` is called with by its first tokens."""

    def __init__(self, samples):
        self.of = {tuple(tokens[:6]): index for index, tokens in self.rows(samples)}
        assert len(self.of) == samples.lengths.size

    @staticmethod
    def rows(samples):
        for index in np.ndindex(samples.lengths.shape):
            yield index, samples.tokens[index].tolist()

    def __getitem__(self, tokens):
        return self.of[tuple(int(t) for t in tokens[:6])]


class TestOccupancy:
    """Lengths that only a script knows: three lanes of fifty rows, lognormal, the longest 20 x the median."""

    MEDIAN = 96

    def lengths(self):
        normal = np.random.default_rng(0).standard_normal(150)
        normal -= np.median(normal)
        drawn = self.MEDIAN * np.exp(np.log(20) * normal / normal.max())
        return np.maximum(6, np.round(drawn)).astype(int).reshape(3, 10, 5)

    @pytest.mark.slow
    @pytest.mark.parametrize(("max_rows", "slots"), [(50, 150), (17, 51)])
    def test_row_steps_against_an_oracle(self, max_rows, slots, record_property):
        lengths = self.lengths()
        assert lengths.max() == pytest.approx(20 * np.median(lengths), rel=0.02)
        tree = {
            "system_tokens": [[1, 2], [3], [4, 5, 6]],
            "problem_tokens": [[[7 + b, 20 + m] for b in range(10)] for m in range(3)],
            "keys": keys_of((3, 10, 5)),
            "temperature": 1.0,
        }
        params = tiny.params(SMALL)
        places = Places(sample_tree(params, SMALL, **tree, max_new_tokens=6))

        def scripted_stop(tokens, looked_at):
            length = lengths[places[tokens]]
            return int(length) if looked_at < length <= len(tokens) else None

        samples = sample_tree(
            params,
            SMALL,
            **tree,
            max_new_tokens=int(lengths.max()) + 1,
            find_end=scripted_stop,
            max_rows=max_rows,
        )
        np.testing.assert_array_equal(samples.lengths, lengths)
        assert not samples.truncated.any()
        # An oracle that never runs an idle row needs one row-step a token, whatever its slots.
        ratio = samples.row_steps / lengths.sum()
        print(f"{slots} slots: {samples.row_steps} row-steps for {lengths.sum()} tokens, {ratio:.3f}")
        record_property(f"row-steps a token, {slots} slots", float(ratio))
        assert ratio <= 1.25


class TestPrograms:
    @pytest.mark.slow
    def test_other_problems_of_the_same_sizes_compile_nothing(self):
        """Lengths and random numbers differ; the longest problem that may come is known.

        No row ends early, or chunks would come in other ones of their widths.
        """

        def run(lengths, seed):
            problems = [[list(range(2, 2 + length)) for length in lengths] for _ in range(2)]
            sample_tree(
                tiny.params(),
                tiny.CONFIG,
                [[5, 6, 7, 8], [9, 4]],
                problems,
                keys_of((2, 2, 4), seed),
                max_new_tokens=40,
                temperature=1.0,
                longest_problem=30,
                max_rows=3,
                chunk=8,
            )
            programs = (decode.decode_chunk, decode.admit, decode.move, decode.prefill)
            return [program._cache_size() for program in programs]

        before = run((3, 28), 0)
        assert run((9, 21), 1) == before
        assert run((17, 2), 2) == before

    @pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 1, "tensor": 4}], ids=["one", "eight"])
    def test_no_program_copies_the_slots(self, sizes):
        """A program's temporaries are far smaller than the slots."""
        mesh = sizes and sharding.make_mesh(sizes)
        config = tiny.CONFIG.replace(num_kv_heads=4, head_dim=64)
        slots = decode.abstract_slots(config, 64, 1024, mesh)
        parts = sharding.row_shards(mesh)
        whole = bytes_per_device(slots)
        places = jax.ShapeDtypeStruct((parts, 64 // parts), np.int32)
        counts = jax.ShapeDtypeStruct((parts,), np.int32)
        params = jax.eval_shape(lambda: tiny.params(config))
        if mesh is not None:
            params = sharding.place(params, abstract(config), mesh)
        shared = decode.abstract_slots(config, 2, 32, mesh, everywhere=True)
        nodes = jax.ShapeDtypeStruct((2,), np.int32)
        level = decode.KVCache(*shared, nodes, nodes)
        lowered = {
            "admit": decode.admit.lower(slots, level, places, places, counts, mesh=mesh),
            "move": decode.move.lower(slots, places, places, counts, mesh=mesh),
            "decode_chunk": decode.decode_chunk.lower(
                params,
                config,
                level,
                slots,
                decode.abstract_rows(8, mesh),
                jax.ShapeDtypeStruct((1,), np.int32),
                np.float32(1),
                columns=32,
                steps=8,
                mesh=mesh,
            ),
        }
        for name, program in lowered.items():
            temporaries = program.compile().memory_analysis().temp_size_in_bytes
            assert temporaries < whole / 4, (name, temporaries, whole)

    @pytest.mark.slow
    def test_chunks_keep_to_the_sizes_announced(self, monkeypatch):
        seen, sizes = set(), []
        chunk, choose = decode.decode_chunk, scheduler.Scheduler.__init__

        def listen(params, config, system, slots, rows, *args, columns, aligned, **kwargs):
            seen.add((len(rows.token), columns, aligned))
            return chunk(
                params, config, system, slots, rows, *args, columns=columns, aligned=aligned, **kwargs
            )

        def listen_to_sizes(self, *args, **kwargs):
            sizes.extend(args[6])
            choose(self, *args, **kwargs)

        monkeypatch.setattr(decode, "decode_chunk", listen)
        monkeypatch.setattr(scheduler.Scheduler, "__init__", listen_to_sizes)
        sample(shape=(2, 2, 8), max_new_tokens=120, stop_ids=tuple(range(3)))
        assert {width for width, _, _ in seen} <= set(sizes[0].widths) and len(seen) > 3
        assert {columns for _, columns, _ in seen} <= set(sizes[0].columns) and len(sizes) == 1
        assert {width for width, _, aligned in seen if aligned} == {32}


def rescored(config, samples, systems, problems):
    """Logprobs of all tokens after each prompt, from plain sequences without caches."""
    out, width = np.zeros_like(samples.logprobs), samples.tokens.shape[-1]
    for place in np.ndindex(samples.lengths.shape):
        prompt = systems[place[0]] + problems[place[0]][place[1]]
        row = np.array([*prompt, *samples.tokens[place], *[0] * (8 - len(prompt))], np.int32)
        scores = np.asarray(tiny.token_logprobs(tiny.params(config), config, row[None]))[0]
        out[place] = scores[len(prompt) - 1 :][:width]
    return np.where(np.arange(width) < samples.lengths[..., None], out, 0)


ONE_OR_EIGHT = None, pytest.param({"data": 2, "fsdp": 1, "tensor": 4}, marks=pytest.mark.slow)
"""Meshes; a separate fast test covers turns on eight devices."""


class TestTurns:
    """Tokens appended between turns are read at the right positions and not marked as drawn."""

    SYSTEMS, PROBLEMS = [[5, 6, 7, 8], [9, 4]], [[[9, 10], [11, 12, 13]], [[12, 13, 14], [15]]]
    STOP = 3

    def answer(self, place, tokens):
        """Two answers a row, of lengths that differ from row to row."""
        turns = int((tokens == self.STOP).sum())
        return [40 + turns, *range(20, 20 + sum(place) + turns)] if turns < 3 else None

    def run(self, config=tiny.CONFIG, **settings):
        stops = {"stop_ids": (self.STOP,), "max_new_tokens": 90, "respond": self.answer}
        return sample(config=config, **stops | settings)

    @pytest.fixture(scope="class")
    def samples(self):
        return self.run()

    def test_what_was_appended_was_read(self, samples):
        assert (~samples.drawn & (np.arange(90) < samples.lengths[..., None])).sum() > 20
        again = rescored(tiny.CONFIG, samples, self.SYSTEMS, self.PROBLEMS)
        np.testing.assert_allclose(samples.logprobs, np.where(samples.drawn, again, 0), atol=2e-5)

    def test_conversations_are_those_that_were_held(self, samples):
        for place in np.ndindex(samples.lengths.shape):
            tokens, drawn = samples.tokens[place], samples.drawn[place]
            at, turns = 0, 0
            while at < samples.lengths[place]:
                stop = np.flatnonzero((tokens[at:] == self.STOP) & drawn[at:])
                end = at + (stop[0] + 1 if len(stop) else samples.lengths[place] - at)
                assert drawn[at:end].all()
                turns += len(stop) > 0
                said = self.answer(place, tokens[:end]) if len(stop) else None
                at = int(end)
                if said and at < samples.lengths[place]:
                    np.testing.assert_array_equal(tokens[at : at + len(said)], said)
                    assert not drawn[at : at + len(said)].any()
                    at += len(said)
            assert samples.truncated[place] == (turns < 3)

    @pytest.mark.parametrize(
        "settings", [{"max_rows": 2, "chunk": 5}, pytest.param({"max_rows": 4}, marks=pytest.mark.slow)]
    )
    def test_other_layouts_hold_the_same(self, samples, settings):
        other = self.run(**settings)
        np.testing.assert_array_equal(other.tokens, samples.tokens)
        np.testing.assert_array_equal(other.drawn, samples.drawn)

    def test_long_answers_go_in_pieces(self, monkeypatch, samples):
        monkeypatch.setattr(scheduler, "EXTENDED_TOKENS", 2)
        monkeypatch.setattr(sizing, "EXTENDED_ROWS", 3)
        pieces = self.run()
        np.testing.assert_array_equal(pieces.tokens, samples.tokens)
        np.testing.assert_allclose(pieces.logprobs, samples.logprobs, atol=2e-5)

    @pytest.mark.slow
    def test_on_eight_devices(self, samples):
        mesh = sharding.make_mesh({"data": 4, "tensor": 2})
        spread = self.run(mesh=mesh)
        np.testing.assert_array_equal(spread.tokens, samples.tokens)

    def test_a_row_that_waits_holds_back_nobody(self, samples):
        """The answer of one row arrives only after all other rows are done."""
        slow, others = (1, 0, 2), set(np.ndindex(samples.lengths.shape)) - {(1, 0, 2)}
        release = threading.Event()

        def respond(place, tokens):
            answer = self.answer(place, tokens)
            if answer is None:
                ended.add(place)
            if place != slow or (tokens == self.STOP).sum() > 1:
                return answer
            future = concurrent.futures.Future()

            def later():
                release.wait(60)
                future.set_result(answer)

            threading.Thread(target=later).start()
            return future

        long = others - {tuple(place) for place in np.argwhere(samples.truncated)}

        class Watch(set):
            def add(self, place):
                super().add(place)
                if long <= self:
                    release.set()

        ended = Watch()
        waited = self.run(respond=respond, max_rows=3)
        assert release.is_set()
        np.testing.assert_array_equal(waited.tokens, samples.tokens)

    @pytest.mark.parametrize("mesh", ONE_OR_EIGHT, ids=["one", "eight"])
    def test_rows_that_wait_among_others_keep_what_they_hold(self, samples, mesh):
        """Every answer comes a chunk or more later, while the row's slot is part of the others' chunks."""
        asked = []

        class Later(concurrent.futures.Future):
            """Done after a third of a second."""

            def __init__(self, answer):
                super().__init__()
                asked.append(self)
                timer = threading.Timer(0.3, lambda: self.set_result(answer))
                timer.daemon = True
                timer.start()

        def respond(place, tokens):
            answer = self.answer(place, tokens)
            return Later(answer) if answer and place[2] != 1 else answer

        mesh = mesh and sharding.make_mesh(mesh)
        waited = self.run(respond=respond, mesh=mesh)
        assert len(asked) > 5
        np.testing.assert_array_equal(waited.tokens, samples.tokens)
        np.testing.assert_allclose(waited.logprobs, samples.logprobs, atol=2e-5)

    @pytest.mark.parametrize("mesh", ONE_OR_EIGHT, ids=["one", "eight"])
    def test_rows_that_wait_make_room_for_the_queue(self, samples, mesh):
        """With two slots and slow tools for the first rows, other rows use the slots while these wait."""
        release, asked = threading.Event(), []

        def respond(place, tokens):
            answer = self.answer(place, tokens)
            if answer is None or release.is_set():
                return answer
            asked.append(place)
            if len(set(asked)) == talking:
                release.set()  # every row has had its first turn
            future = concurrent.futures.Future()

            def later():
                release.wait(60)
                future.set_result(answer)

            threading.Thread(target=later).start()
            return future

        talking = ((samples.tokens == self.STOP) & samples.drawn).any(-1).sum()
        assert talking > 6
        waited = self.run(respond=respond, mesh=mesh and sharding.make_mesh(mesh), max_rows=1)
        assert release.is_set()
        np.testing.assert_array_equal(waited.tokens, samples.tokens)
        np.testing.assert_allclose(waited.logprobs, samples.logprobs, atol=2e-5)

    def test_an_array_is_an_answer(self, samples):
        arrays = self.run(respond=lambda place, tokens: np.array(self.answer(place, tokens) or [], np.int64))
        np.testing.assert_array_equal(arrays.tokens, samples.tokens)

    def test_an_answer_that_does_not_fit_ends_the_row(self):
        short = sample(stop_ids=(self.STOP,), respond=lambda place, tokens: [1] * 200, max_new_tokens=90)
        assert short.truncated.all() and short.drawn.sum() == short.lengths.sum()
        assert (np.take_along_axis(short.tokens, short.lengths[..., None] - 1, -1) == self.STOP).any()

    def test_an_answer_of_unknown_tokens_is_refused(self):
        with pytest.raises(ValueError, match="respond: token id 61 is outside the model's vocabulary"):
            sample(stop_ids=(self.STOP,), respond=lambda place, tokens: [1, 61])

    def test_a_broken_tool_is_an_error(self):
        future = concurrent.futures.Future()
        future.set_exception(RuntimeError("the tool is down"))
        with pytest.raises(RuntimeError, match="the tool is down"):
            sample(stop_ids=(self.STOP,), respond=lambda place, tokens: future)


class TestStages:
    """With memory for four rows of full length, rows start in more, shorter slots and move to longer ones."""

    @pytest.fixture(scope="class")
    def samples(self):
        return self.run()

    def run(self, **settings):
        stops = {"stop_ids": (3,), "max_new_tokens": 200, "shape": (2, 2, 6)}
        return sample(config=tiny.CONFIG.replace(max_positions=1024), **stops | settings)

    @pytest.mark.slow
    @pytest.mark.parametrize("turns", [False, True])
    def test_rows_go_on_where_they_were(self, samples, monkeypatch, turns):
        begun = []
        reserve = decode.reserve

        def listen(config, slots, capacity, *rest):
            begun.append((slots, capacity))
            return reserve(config, slots, capacity, *rest)

        settings = {}
        if turns:
            settings["respond"] = lambda place, tokens: (
                list(range(20, 60)) if (tokens == 3).sum() < 3 else None
            )
            samples = self.run(**settings)
        monkeypatch.setattr(scheduler, "EXTENDED_TOKENS", 16)
        monkeypatch.setattr(sizing, "EXTENDED_TOKENS", 16)
        monkeypatch.setattr(sizing, "EXTENDED_COLUMNS", 0)
        monkeypatch.setattr(sizing, "TPU_LANES", 32)
        # Columns of 192 bytes, a row of 232 columns, 24 behind it and 8 of a chunk.
        slot = 192 * (256 + 8) + 3 * 4 * 61
        monkeypatch.setattr(sizing, "device_memory", lambda: 4 * slot / sizing.SHARE + 1)
        monkeypatch.setattr(decode, "reserve", listen)
        staged = self.run(held_bytes=0, **settings)
        assert begun == [(9, 96), (6, 160), (4, 256)]
        assert (samples.lengths > 58).sum() > 5 and (samples.lengths > 116).sum() > 3
        np.testing.assert_array_equal(staged.tokens, samples.tokens)
        np.testing.assert_array_equal(staged.truncated, samples.truncated)
        np.testing.assert_allclose(staged.logprobs, samples.logprobs, atol=2e-5)


class TestOutgrownRows:
    """Rows whose answers carry them past one stage or two; the model is replaced by a stub."""

    PROMPT, LIMIT, STOP = 400, 4096, 3
    LONGEST = 1152, 2304, 4608  # before a chunk, in slots of 1408, 2560 and 4864 columns
    SLOTS = 3, 2, 1

    def run(self, monkeypatch, respond, rows):
        """Samples rows that stop at once, are answered, and talk up to their limit. Returns also the columns
        of the slots of each stage that ran."""
        reserved = []

        def reserve(config, slots, capacity, *rest):
            reserved.append(capacity)
            return capacity

        def extend(params, config, system, capacity, at, rows, tokens, lengths, *, columns, mesh):
            fed = np.asarray(lengths) > 0
            assert (np.asarray(rows.length)[fed] + tokens.shape[1] <= capacity).all()
            return capacity

        def decode_chunk(params, config, system, capacity, rows, *args, columns, steps, **kwargs):
            live = np.asarray(rows.position < rows.limit)
            assert (np.asarray(rows.length)[live] + steps <= capacity).all()
            tokens = np.full((len(live), steps), 7, np.int32)
            stopped = live & np.asarray(rows.position == 0)
            tokens[stopped, 0] = self.STOP
            count = np.where(stopped, 1, np.minimum(steps, rows.limit - rows.position))
            numbers = np.zeros(tokens.shape, np.float32)
            return capacity, decode.Drawn(
                *(tokens, numbers, numbers, numbers, count, stopped),
                steps=np.int32(steps),
                hits=0 * count,
                misses=0 * count,
            )

        stages = [
            sizing.Sizes(1, slots, longest + 256, longest, 512, 32)
            for slots, longest in zip(self.SLOTS, self.LONGEST, strict=True)
        ]
        monkeypatch.setattr(generate, "choose_sizes", lambda *_, **__: stages)
        for name, fake in (("reserve", reserve), ("extend", extend), ("decode_chunk", decode_chunk)):
            monkeypatch.setattr(decode, name, fake)
        monkeypatch.setattr(decode, "prefill", lambda *_, **__: None)
        for name in ("admit", "move"):
            monkeypatch.setattr(decode, name, lambda capacity, *_, **__: capacity)
        samples = sample_tree(
            {},
            SMALL.replace(max_positions=8192),
            [[5]],
            [[[9] * self.PROMPT]],
            keys_of((1, 1, rows)),
            max_new_tokens=self.LIMIT,
            temperature=1.0,
            stop_ids=(self.STOP,),
            respond=respond,
            held_bytes=0,
        )
        assert (samples.lengths == self.LIMIT).all()
        return samples, reserved

    def test_an_answer_past_two_stages(self, monkeypatch):
        samples, reserved = self.run(monkeypatch, lambda place, tokens: [9] * 2600, rows=4)
        assert reserved == [1408, 4864]
        assert ((samples.tokens == 9).sum(axis=-1) == 2600).all()

    def test_each_row_waits_for_the_stage_that_holds_it(self, monkeypatch):
        """In turn past two stages, past one, to just below the second one's longest row, and past none."""
        answers = [2600, 900, 2304 - 400, 10]
        _, reserved = self.run(monkeypatch, lambda place, tokens: [9] * answers[place[2]], rows=4)
        assert reserved == [1408, 2560, 4864]


class TestEnds:
    def test_what_comes_after_an_end_found_by_the_host_is_taken_back(self):
        """Ends a turn at its second even token, after the chunk."""

        def find_end(tokens, looked_at):
            even = np.flatnonzero(np.asarray(tokens) % 2 == 0)
            return int(even[1]) + 1 if len(even) > 1 and even[1] >= looked_at else None

        free, cut = sample(), sample(find_end=find_end)
        assert (cut.lengths < 40).all() and not cut.truncated.any()
        for place in np.ndindex(cut.lengths.shape):
            length = cut.lengths[place]
            assert (cut.tokens[place][:length] % 2 == 0).sum() == 2 and cut.tokens[place][length - 1] % 2 == 0
            np.testing.assert_array_equal(cut.tokens[place][:length], free.tokens[place][:length])
            for x in (cut.tokens, cut.logprobs, cut.untruncated_logprobs, cut.drawn):
                assert not x[place][length:].any()

    def test_the_context_ends_rows(self):
        """Prompts of 6, 7, 5 and 3 tokens in a context of twenty."""
        samples = sample(context_limit=20)
        np.testing.assert_array_equal(samples.lengths[..., 0], [[14, 13], [15, 17]])
        assert samples.truncated.all()

    def test_a_prompt_that_fills_the_context_is_refused(self):
        with pytest.raises(ValueError, match="a prompt of 6 tokens leaves no room in a context of 6"):
            sample(context_limit=6)


class TestTruncation:
    def test_only_likely_tokens_are_drawn(self):
        samples = sample(truncation=Truncation(top_k=3), max_new_tokens=20)
        assert (samples.untruncated_logprobs >= samples.cutoffs)[samples.drawn].all()
        assert (samples.logprobs > samples.untruncated_logprobs)[samples.drawn].all()
        systems, problems = [[5, 6, 7, 8], [9, 4]], [[[9, 10], [11, 12, 13]], [[12, 13, 14], [15]]]
        again = rescored(tiny.CONFIG, samples, systems, problems)
        np.testing.assert_allclose(samples.untruncated_logprobs, again, atol=2e-5)
        assert np.isneginf(sample(max_new_tokens=3).cutoffs).all()


class TestArguments:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_rows": 0}, "max_rows=0: give at least 1"),
            ({"chunk": 0}, "chunk=0: give at least 1"),
            ({"context_limit": 1000}, "context_limit=1000: exceeds the model's max_positions=256"),
            ({"temperature": -1.0}, "temperature=-1.0"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            sample(**settings)

    def test_an_empty_answer_ends_a_row(self):
        silent = sample(stop_ids=(3,), respond=lambda place, tokens: [])
        plain = sample(stop_ids=(3,))
        np.testing.assert_array_equal(silent.tokens, plain.tokens)
        np.testing.assert_array_equal(silent.truncated, plain.truncated)
