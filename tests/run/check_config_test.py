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
    choices = checked._CHOICES[field]
    wrong = "nonsense" if isinstance(choices[0], str) else max(choices) + 1
    message = refusal(**{field.replace(".", "__"): wrong})
    assert message == f"{field}={wrong!r}: choose one of {', '.join(map(str, choices))}"


@pytest.mark.parametrize("field", sorted(checked._AT_LEAST))
def test_a_number_too_small_is_refused(field):
    least = checked._AT_LEAST[field]
    message = refusal(**{field.replace(".", "__"): least - 1})
    assert message in (
        f"{field}={least - 1}: must be at least {least}",
        f"{field}={least - 1:.1f}: must be at least {least}",
    )


@pytest.mark.parametrize("changes", [{}, {"mode": "evolution", "lora__rank": 0}])
def test_frozen_weights_can_be_int8(changes):
    check_config(valid(model__param_dtype="int8", **changes))


def test_every_table_names_fields_that_exist():
    fields = checked._flat(common.get_config())
    assert set(checked._CHOICES) | set(checked._AT_LEAST) <= set(fields)


def test_all_tokens_can_be_drawn_by_the_settings_that_say_so():
    assert dataclasses.asdict(truncation.UNTRUNCATED) == check_groups.UNTRUNCATED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.source": ""}, "model.source='': no model; give smollm2"),
        ({"model.source": "no/such.gguf"}, "model.source='no/such.gguf': file not found"),
        ({"data.train": ""}, "data.train='': no training data; give a .jsonl file"),
        ({"data.train": "no/such.jsonl"}, "data.train='no/such.jsonl': no/such.jsonl does not exist"),
        ({"data.validation": "none.jsonl"}, "data.validation='none.jsonl': none.jsonl does not exist"),
        ({"data.test": "none.jsonl"}, "data.test='none.jsonl': none.jsonl does not exist"),
        (
            {"population.start_from": "p.json", "population.text": ""},
            "population.start_from='p.json': file not found",
        ),
        (
            {"population.start_from": "runs/a"},
            "population.start_from='runs/a': initial prompts come from this file; leave",
        ),
        ({"sampling.top_p": 0.0}, "sampling.top_p=0.0: must be above 0 and at most 1"),
        ({"sampling.top_p": 1.1}, "sampling.top_p=1.1: must be above 0 and at most 1"),
        ({"sampling.min_p": 1.1}, "sampling.min_p=1.1: must be at most 1"),
        ({"sampling.draft_tokens": 16}, "sampling.draft_tokens=16: give 1 to 15, or 0 for no drafts"),
        ({"sampling.draft_tokens": -1}, "sampling.draft_tokens=-1: give 1 to 15, or 0 for no drafts"),
        ({"sampling.cache_dtype": "fp8"}, "sampling.cache_dtype='fp8': choose one of same, int8"),
        ({"compile_ahead": "yes"}, "compile_ahead='yes': choose one of auto, on, off"),
        ({"sampling.top_k": 1}, "sampling.top_k=1: only the most likely token can be sampled"),
        ({"sampling.min_p": 1.0}, "sampling.min_p=1.0: only the most likely token can be sampled"),
        (
            {"sampling.stop_strings": ("\ufffd",)},
            "sampling.stop_strings=('\ufffd',): stop strings must be non-empty",
        ),
        (
            {"sampling.stop_strings": ("a", "")},
            "sampling.stop_strings=('a', ''): stop strings must be non-empty",
        ),
        ({"sampling.temperature": 0.0}, "sampling.temperature=0.0: greedy rollouts have no gradient"),
        ({"group_size": 1}, "group_size=1: the advantage is always 0 in a group of one"),
        ({"group_size": 1, "num_prompts": 1, "mode": "rl"}, "group_size=1: the advantage is always 0"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0: must be positive"),
        (
            {"model.param_dtype": "int8", "lora.rank": 0},
            "model.param_dtype='int8': lora.rank=0 trains all weights, and only frozen weights can be int8",
        ),
        (
            {"lora.targets": ("query", "nose")},
            "lora.targets=('query', 'nose'): ['nose'] are not LoRA targets",
        ),
        (
            {"evolution.crossover_prob": 1.5},
            "evolution.crossover_prob=1.5: must be between 0 and 1",
        ),
        ({"selection.temperature": 0.0}, "selection.temperature=0.0: must be positive, or None"),
        (
            {"environment.answer_format": "expression"},
            "environment.answer_format='expression': environment.name=",
        ),
        (
            {"environment.name": "math"},
            "environment.answer_format='last_number': environment.name=math does not support it",
        ),
        (
            {"population.start_from": "p.jsonl", "population.text": ""},
            "population.start_from='p.jsonl': file not found",
        ),
        (
            {"evolution.form": "prose", "population.principles": ("Count twice.",)},
            r"population.principles=('Count twice.',): evolution.form=prose edits only the text",
        ),
        (
            {"num_prompts": 1},
            "deployment.rule='ratings': with one prompt per iteration there are no tournaments",
        ),
        ({"selection.window": 1, "mode": "evolution"}, "deployment.rule='ratings': with one prompt"),
        (
            {"reflection.show": ("verdict", "colour")},
            "reflection.show=('verdict', 'colour'): 'colour' is unknown",
        ),
        (
            {"reflection.show": ("summary", "trajectory")},
            "reflection.show=('summary', 'trajectory'): an attempt is shown whole or as a summary",
        ),
        ({"reflection.show": ("task",)}, "reflection.show=('task',): nothing says what was wrong"),
        ({"evolution.output": "rewrite"}, "evolution.output='rewrite': a rewrite takes one call"),
        (
            {"reflection.templates": "/no/folder"},
            "reflection.templates='/no/folder': there is no such folder",
        ),
        ({"reflection.chat_template_kwargs": "[]"}, "reflection.chat_template_kwargs='[]': "),
        (
            {"reflection.source": "smollm2", "reflection.policy": "current"},
            "reflection.source='smollm2': another model reflects on device",
        ),
        ({"reflection.reflector": "openai"}, "reflection.model='': no model; give the name of a model"),
        (
            {"reflection.reflector": "openai", "reflection.model": "m", "reflection.base_url": "localhost"},
            "reflection.base_url='localhost': not an HTTP address",
        ),
        *(
            (
                {"reflection.reflector": "openai", "reflection.model": "m", "reflection.base_url": url},
                f"reflection.base_url='{url}': {fix}",
            )
            for url, fix in (
                ("http://:8000/v1", "not an HTTP address"),
                ("http://localhost:8000/v1/chat/completions/", "/chat/completions is appended automatically"),
            )
        ),
        (
            {"reflection.reflector": "openai", "reflection.model": "m", "reflection.opening": True},
            "reflection.opening=True: replies of a server cannot be prefilled",
        ),
        (
            {"reflection.reflector": "replay"},
            "reflection.replay='': no file to replay; give the reflections.jsonl",
        ),
        (
            {"reflection.reflector": "replay", "reflection.replay": "r.jsonl"},
            "reflection.replay='r.jsonl': file not found",
        ),
        (
            {"reflection.reflector": "replay", "reflection.replay": __file__, "reflection.policy": "current"},
            "reflection.policy='current': only reflection.reflector=local can use",
        ),
        ({"reflection.timeout": 0.0}, "reflection.timeout=0.0: must be a positive number of seconds"),
        ({"ratings.system": "elo"}, "ratings.system='elo': choose one of trueskill, openskill"),
        ({"deployment.rule": "test"}, "deployment.rule='test': choose one of ratings, newest, validation"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"lora.targets": ()}, "lora.targets=(): no targets; name at least one"),
        ({"evolution.max_principles": 0}, "evolution.max_principles=0: must be at least 1"),
        (
            {"population.principles": ("a",) * 5},
            "evolution.max_principles=2: must be at least 1, and at least the number",
        ),
        ({"optimizer.b1": 1.0}, "optimizer.b1=1.0: must be at least 0 and below 1"),
        ({"optimizer.b2": -0.1}, "optimizer.b2=-0.1: must be at least 0 and below 1"),
        ({"loss.clip_low": 0.2}, "loss.clip_low=0.2: loss.kind=importance_sampling does not clip; give None"),
        (
            {"loss.clip_high": 0.0, "loss.kind": "sequence_importance_sampling"},
            "loss.clip_high=0.0: loss.kind=sequence_importance_sampling does not clip; give None",
        ),
        (
            {"loss.clip_low": 1.1, "loss.kind": "cispo"},
            "loss.clip_low=1.1: must be at least 0, and clip_low at most 1",
        ),
        ({"loss.clip_high": -0.1, "loss.kind": "ppo"}, "loss.clip_high=-0.1: must be at least 0"),
        (
            {"loss.aggregation": "token_mean", "loss.kind": "gspo"},
            "loss.aggregation='token_mean': loss.kind=gspo has one term per rollout, not per token",
        ),
        (
            {"loss.aggregation": "constant_length", "loss.kind": "sequence_importance_sampling"},
            "loss.aggregation='constant_length': loss.kind=sequence_importance_sampling has one term",
        ),
        (
            {"loss.sampler_weight_cap": 0.5},
            "loss.sampler_weight_cap=0.5: a cap below 1 scales down all terms",
        ),
        (
            {"loss.kl_estimator": "k1", "loss.kl_coef": 0.1},
            "loss.kl_estimator='k1': its expected gradient is zero, so it does not regularize; use",
        ),
        *(
            (
                {"loss.kl_estimator": kind, "loss.kl_coef": 0.1, f"sampling.{cut}": value},
                f"loss.kl_estimator='{kind}': requires untruncated sampling, but sampling.{cut}=",
            )
            for kind, cut, value in (("k2", "top_p", 0.95), ("k3", "top_k", 20), ("k2", "min_p", 0.1))
        ),
        (
            {"optimizer.weight_decay": 0.1},
            "optimizer.weight_decay=0.1: adam has no weight decay; set optimizer.kind=adamw",
        ),
        (
            {"optimizer.final_rate": 0.1},
            "optimizer.final_rate=0.1: optimizer.schedule=constant does not decay",
        ),
        (
            {"optimizer.final_rate": 1.1, "optimizer.schedule": "linear"},
            "optimizer.final_rate=1.1: must be at most 1: it is a fraction of learning_rate",
        ),
        # Quickstart has 4 iterations.
        (
            {"optimizer.warmup_steps": 4, "optimizer.schedule": "cosine"},
            "optimizer.warmup_steps=4: optimizer.schedule=cosine decays after the warm-up",
        ),
        ({"evaluation.test_samples": 2}, "evaluation.test_samples=2: greedy samples are identical"),
        (
            {"evaluation.validation_samples": 2},
            "evaluation.validation_samples=2: greedy samples are identical",
        ),
        (
            {"model.chat_template_kwargs": "[]"},
            "model.chat_template_kwargs='[]': not a JSON object; give an object",
        ),
        ({"model.chat_template_kwargs": "no"}, "model.chat_template_kwargs='no': Expecting value"),
        (
            {"mesh.expert": -1},
            "mesh={'data': 1, 'expert': -1, 'fsdp': -1, 'tensor': 1}: only one axis can be -1",
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


class TestTrackers:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch):
        """Every package of a tracker is there, except mlflow."""
        monkeypatch.setattr(check_groups, "_is_installed", lambda package: package != "mlflow")

    def test_any_number(self):
        check_config(valid(trackers=()))
        check_config(valid(trackers=("trackio", "wandb"), tracking__project="my-project_1.0"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"trackers": ("x",)},
                "trackers=('x',): unknown 'x'; choose from tensorboard, wandb, trackio, mlflow",
            ),
            ({"trackers": ("wandb", "wandb")}, "trackers=('wandb', 'wandb'): name each tracker once"),
            (
                {"trackers": ("mlflow",)},
                "trackers=('mlflow',): the package mlflow is not installed; pip install -e '.[mlflow]'",
            ),
            (
                {"trackers": ("wandb",), "tracking__project": "a/b"},
                "tracking.project='a/b': use letters, digits, '.', '_' and '-' only",
            ),
        ],
    )
    def test_refused(self, changes, message):
        assert refusal(**changes) == message


def test_a_folder_is_not_a_package(tmp_path, monkeypatch):
    """W&B writes a folder `wandb` where a run is started."""
    (tmp_path / "wandbx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not check_groups._is_installed("wandbx") and not check_groups._is_installed("none_such")
    (tmp_path / "wandbx" / "__init__.py").touch()
    assert check_groups._is_installed("wandbx")
