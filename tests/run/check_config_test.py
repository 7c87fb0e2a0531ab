"""Configurations that cannot run are refused with the field, its value and the fix."""

import dataclasses
import subprocess
import sys

import pytest

from configs import common, hmmt, quickstart
from espl_jax.run import check_config as checked
from espl_jax.run import check_groups
from espl_jax.run.check_config import check_config
from espl_jax.sampling import truncation


def valid(**changes):
    config = quickstart.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {field.replace("__", "."): value for field, value in changes.items()}
        )
    return config


def refusal(**changes):
    with pytest.raises(ValueError) as raised:
        check_config(valid(**changes))
    return str(raised.value)


@pytest.mark.parametrize("mode", checked.MODES)
def test_the_configs_that_come_along_are_fine(mode, tmp_path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "problems.jsonl").touch()
    config = hmmt.get_config()
    config.mode = mode
    config.model.source = str(tmp_path / "model.gguf")
    config.data.train = config.data.test = str(tmp_path / "problems.jsonl")
    check_config(config)
    check_config(valid(mode=mode))


@pytest.mark.parametrize("field", sorted(checked._CHOICES))
def test_an_unknown_choice_is_refused_with_the_known_ones(field):
    message = refusal(**{field.replace(".", "__"): "nonsense"})
    assert message == f"{field}='nonsense': choose one of {', '.join(checked._CHOICES[field])}"


@pytest.mark.parametrize("field", sorted(checked._AT_LEAST))
def test_a_number_too_small_is_refused(field):
    least = checked._AT_LEAST[field]
    message = refusal(**{field.replace(".", "__"): least - 1})
    assert message in (
        f"{field}={least - 1}: give at least {least}",
        f"{field}={least - 1:.1f}: give at least {least}",
    )


def test_every_table_names_fields_that_exist():
    fields = checked._flat(common.get_config())
    assert set(checked._CHOICES) | set(checked._AT_LEAST) <= set(fields)


def test_all_tokens_can_be_drawn_by_the_settings_that_say_so():
    assert dataclasses.asdict(truncation.UNTRUNCATED) == check_groups.UNTRUNCATED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.source": ""}, "model.source='': name a model"),
        ({"model.source": "no/such.gguf"}, "model.source='no/such.gguf': there is no such file"),
        ({"data.train": ""}, "data.train='': give a .jsonl file"),
        ({"data.train": "no/such.jsonl"}, "data.train='no/such.jsonl': there is no such file"),
        ({"data.validation": "none.jsonl"}, "data.validation='none.jsonl': there is no such file"),
        ({"data.test": "none.jsonl"}, "data.test='none.jsonl': there is no such file"),
        (
            {"population.start_from": "p.json", "population.text": ""},
            "population.start_from='p.json': there is no",
        ),
        (
            {"population.start_from": "runs/a"},
            "population.start_from='runs/a': a saved population has prompts already",
        ),
        ({"sampling.top_p": 0.0}, "sampling.top_p=0.0: give a probability above 0"),
        ({"sampling.top_p": 1.1}, "sampling.top_p=1.1: give a probability above 0"),
        ({"sampling.min_p": 1.1}, "sampling.min_p=1.1: give a ratio of at most 1"),
        ({"sampling.top_k": 1}, "sampling.top_k=1: this always draws the most likely token"),
        ({"sampling.min_p": 1.0}, "sampling.min_p=1.0: this always draws the most likely token"),
        ({"sampling.stop_strings": ("\ufffd",)}, "sampling.stop_strings=('\ufffd',): give non-empty strings"),
        ({"sampling.stop_strings": ("a", "")}, "sampling.stop_strings=('a', ''): give non-empty strings"),
        ({"sampling.temperature": 0.0}, "sampling.temperature=0.0: greedy rollouts cannot be trained on"),
        ({"group_size": 1}, "group_size=1: a group of one has no advantage over itself"),
        ({"group_size": 1, "num_prompts": 1, "mode": "rl"}, "group_size=1: a group of one"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0: give a positive one"),
        ({"lora.targets": ("query", "nose")}, "lora.targets=('query', 'nose'): ['nose'] cannot be adapted"),
        (
            {"evolution.crossover_prob": 1.5},
            "evolution.crossover_prob=1.5: give a probability between 0 and 1",
        ),
        ({"selection.temperature": 0.0}, "selection.temperature=0.0: give a positive one, or None"),
        (
            {"environment.answer_format": "expression"},
            "environment.answer_format='expression': environment.name=",
        ),
        (
            {"environment.name": "math"},
            "environment.answer_format='last_number': environment.name=math reads one",
        ),
        (
            {"population.start_from": "p.jsonl", "population.text": ""},
            "population.start_from='p.jsonl': there is",
        ),
        (
            {"evolution.form": "prose", "population.principles": ("Count twice.",)},
            r"population.principles=('Count twice.',): evolution.form=prose edits the text alone",
        ),
        (
            {"num_prompts": 1},
            "deployment.rule='ratings': with one prompt in each iteration, none is ever rated",
        ),
        ({"selection.window": 1, "mode": "evolution"}, "deployment.rule='ratings': with one prompt"),
        ({"reflection.max_new_tokens": 100}, "reflection.max_new_tokens=100: a reply may take"),
        (
            {"reflection.max_new_tokens": 40, "evolution.form": "prose"},
            "reflection.max_new_tokens=40: a reply may take",
        ),
        ({"reflection.reflector": "openai"}, "reflection.model='': say what the server"),
        (
            {"reflection.reflector": "openai", "reflection.model": "m", "reflection.base_url": "localhost"},
            "reflection.base_url='localhost': give an address",
        ),
        *(
            (
                {"reflection.reflector": "openai", "reflection.model": "m", "reflection.base_url": url},
                f"reflection.base_url='{url}': {fix}",
            )
            for url, fix in (
                ("http://:8000/v1", "give an address"),
                ("http://localhost:8000/v1/chat/completions/", "leave out /chat/completions"),
            )
        ),
        (
            {"reflection.reflector": "openai", "reflection.model": "m"},
            "reflection.opening=True: a server cannot be given",
        ),
        ({"reflection.reflector": "replay"}, "reflection.replay='': give the reflections.jsonl"),
        (
            {"reflection.reflector": "replay", "reflection.replay": "r.jsonl"},
            "reflection.replay='r.jsonl': there is",
        ),
        (
            {"reflection.reflector": "replay", "reflection.replay": __file__, "reflection.policy": "current"},
            "reflection.policy='current': current weights reflect on device alone",
        ),
        ({"reflection.timeout": 0.0}, "reflection.timeout=0.0: give seconds"),
        ({"ratings.system": "elo"}, "ratings.system='elo': choose one of trueskill, openskill"),
        ({"deployment.rule": "test"}, "deployment.rule='test': choose one of ratings, newest, validation"),
        ({"seed": -1}, "seed=-1: give 0 or more"),
        ({"lora.targets": ()}, "lora.targets=(): name at least one"),
        ({"evolution.max_principles": 0}, "evolution.max_principles=0: leave room"),
        ({"population.principles": ("a",) * 5}, "evolution.max_principles=2: leave room"),
        ({"optimizer.b1": 1.0}, "optimizer.b1=1.0: a decay is at least 0 and below 1"),
        ({"optimizer.b2": -0.1}, "optimizer.b2=-0.1: a decay is at least 0 and below 1"),
        ({"loss.clip_low": 0.2}, "loss.clip_low=0.2: loss.kind=importance_sampling does not clip; give None"),
        (
            {"loss.clip_high": 0.0, "loss.kind": "sequence_importance_sampling"},
            "loss.clip_high=0.0: loss.kind=sequence_importance_sampling does not clip; give None",
        ),
        (
            {"loss.clip_low": 1.1, "loss.kind": "cispo"},
            "loss.clip_low=1.1: ratios are kept from 1 - clip_low",
        ),
        ({"loss.clip_high": -0.1, "loss.kind": "ppo"}, "loss.clip_high=-0.1: ratios are kept from"),
        (
            {"loss.aggregation": "token_mean", "loss.kind": "gspo"},
            "loss.aggregation='token_mean': loss.kind=gspo has one term a rollout, none a token",
        ),
        (
            {"loss.aggregation": "constant_length", "loss.kind": "sequence_importance_sampling"},
            "loss.aggregation='constant_length': loss.kind=sequence_importance_sampling has one term",
        ),
        ({"loss.sampler_weight_cap": 0.5}, "loss.sampler_weight_cap=0.5: it would shrink the loss where"),
        (
            {"loss.kl_estimator": "k1", "loss.kl_coef": 0.1},
            "loss.kl_estimator='k1': its gradient is zero on average, so that it holds nothing back; give",
        ),
        *(
            (
                {"loss.kl_estimator": kind, "loss.kl_coef": 0.1, f"sampling.{cut}": value},
                f"loss.kl_estimator='{kind}': it requires untruncated sampling, and there is sampling.{cut}=",
            )
            for kind, cut, value in (("k2", "top_p", 0.95), ("k3", "top_k", 20), ("k2", "min_p", 0.1))
        ),
        (
            {"optimizer.weight_decay": 0.1},
            "optimizer.weight_decay=0.1: adam has none; give optimizer.kind=adamw",
        ),
        ({"optimizer.final_rate": 0.1}, "optimizer.final_rate=0.1: a constant schedule ends where it is"),
        (
            {"optimizer.final_rate": 1.1, "optimizer.schedule": "linear"},
            "optimizer.final_rate=1.1: it is a part of learning_rate; give at most 1",
        ),
        # Quickstart has 4 iterations.
        (
            {"optimizer.warmup_steps": 4, "optimizer.schedule": "cosine"},
            "optimizer.warmup_steps=4: optimizer.schedule=cosine falls after the warm-up, and the run has 4",
        ),
        ({"evaluation.test_samples": 2}, "evaluation.test_samples=2: greedy samples are all equal"),
        (
            {"evaluation.validation_samples": 2},
            "evaluation.validation_samples=2: greedy samples are all equal",
        ),
        (
            {"model.chat_template_kwargs": "[]"},
            "model.chat_template_kwargs='[]': not an object; give a JSON object",
        ),
        ({"model.chat_template_kwargs": "no"}, "model.chat_template_kwargs='no': Expecting value"),
        (
            {"mesh.expert": -1},
            "mesh={'data': 1, 'expert': -1, 'fsdp': -1, 'tensor': 1}: only one axis can take the rest",
        ),
        ({"model.remat": "dots"}, "model.remat='dots': choose one of none, attention, products, full"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_impossible_combinations(changes, message):
    assert refusal(**{field.replace(".", "__"): value for field, value in changes.items()}).startswith(
        message
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.microbatch_rows": 3},  # a batch is padded to whole microbatches
        {"loss.microbatch_rows": 1000, "mode": "rl"},
        {"group_size": 1, "mode": "rl"},
        {"sampling.top_k": 20, "sampling.top_p": 0.9, "sampling.min_p": 0.05},
        {"sampling.top_k": 1, "mode": "evolution"},
        {"sampling.stop_strings": ("\n\n",), "sampling.context_limit": 100},
        {"sampling.temperature": 0.0, "mode": "evolution"},
        {"optimizer.learning_rate": 0.0, "mode": "reflection"},
        {"loss.kind": "ppo", "loss.clip_high": 0.28, "loss.aggregation": "token_mean", "loss.epochs": 2},
        {"loss.kind": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 3.0, "loss.sampler_weight_cap": 1.0},
        {"loss.kind": "gspo", "loss.clip_low": 0.0, "loss.normalize_advantages": "std"},
        {"loss.kl_estimator": "k1"},
        {"loss.kl_estimator": "k2", "loss.kl_coef": 0.1},
        {"loss.kl_estimator": "exact", "loss.kl_coef": 0.1, "sampling.top_p": 0.95},
        {"loss.kl_estimator": "k2", "loss.kl_coef": 0.1, "sampling.top_p": 0.95, "mode": "evolution"},
        {"optimizer.kind": "adamw", "optimizer.weight_decay": 0.1, "optimizer.max_skipped": 0},
        {"optimizer.warmup_steps": 4},
        {"optimizer.warmup_steps": 4, "optimizer.schedule": "cosine", "loss.minibatches": 2},
        {"optimizer.schedule": "linear", "optimizer.final_rate": 1.0},
        {"selection.temperature": 0.5},
        {"evolution.max_principles": 1},
        {"num_prompts": 1, "deployment.rule": "validation"},
        {"num_prompts": 1, "mode": "reflection"},
        {"reflection.max_new_tokens": 8, "reflection.constrained": False},
        {"reflection.max_new_tokens": 8, "mode": "rl"},
        {"evaluation.temperature": 0.5, "evaluation.test_samples": 4},
        {"model.chat_template_kwargs": '{"enable_thinking": false}'},
    ],
    ids=str,
)
def test_what_only_looks_impossible_is_allowed(changes):
    check_config(valid(**{field.replace(".", "__"): value for field, value in changes.items()}))


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    check_config(valid(data__train="~/a.jsonl"))


def test_checking_costs_no_import_of_jax():
    code = "import sys, espl_jax.run.check_config; sys.exit(' '.join({'jax', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
