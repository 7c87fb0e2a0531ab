"""What the flags ask for, and what they may not."""

import types

import pytest

from espl_jax.evaluate.prompts import DEFAULT
from espl_jax.evaluate.request import read_request

FLAGS = {
    "model": ["smollm2"],
    "prompt": [""],
    "data": ["addition:digits=1,count=8"],
    "fields": [],
    "limit": None,
    "environment": "math",
    "answer_format": "boxed",
    "instruction": None,
    "options": "{}",
    "reward": "",
    "tool_format": "auto",
    "samples": 4,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "stop_string": [],
    "context_limit": 0,
    "max_new_tokens": 64,
    "seed": 0,
    "batch_size": 32,
    "max_rows": 0,
    "chat_template_kwargs": "{}",
    "show_thinking": None,
    "dtype": None,
    "param_dtype": None,
    "matmul_precision": None,
    "mesh": [],
    "out": [],
}


def read(**changes):
    return read_request(types.SimpleNamespace(**{**FLAGS, **changes}))


def test_defaults():
    request = read()
    assert request.models == ("smollm2",) and list(request.prompts) == [DEFAULT]
    assert request.prompts[DEFAULT].render() == ""
    assert request.numerics == {} and request.mesh == {} and request.sampling["max_rows"] is None


def test_everything_given(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"task": "1 + 1?", "gold": 2}\n{"task": "1 + 2?", "gold": 3}\n')
    data = str(tmp_path / "mine.jsonl")
    request = read(
        data=[data],
        fields=["text=task", "answer=gold"],
        limit=1,
        mesh=["data=1", "fsdp=-1"],
        dtype="bfloat16",
        max_rows=8,
        top_p=0.9,
        stop_string=["User:"],
        context_limit=99,
        chat_template_kwargs='{"enable_thinking": false}',
        show_thinking=True,
        out=[str(tmp_path / "x.json"), str(tmp_path / "x.jsonl")],
    )
    (problem,) = request.problem_sets[data].problems
    assert (problem.text, problem.answer) == ("1 + 1?", "2")
    assert request.mesh == {"data": 1, "fsdp": -1} and request.numerics == {"dtype": "bfloat16"}
    assert request.sampling["chat_template_kwargs"] == {"enable_thinking": False}
    assert request.sampling["show_thinking"] is True
    drawn = {"top_k": 0, "top_p": 0.9, "min_p": 0.0, "stop_strings": ("User:",), "context_limit": 99}
    assert drawn.items() <= request.sampling.items()
    assert request.sampling["max_rows"] == 8 and [path.name for path in request.out] == ["x.json", "x.jsonl"]


def test_generated_problems_are_those_of_the_test_split():
    (problems,) = read().problem_sets.values()
    (train,) = read(data=["addition:digits=1,count=8,split=train"]).problem_sets.values()
    assert not {p.id for p in problems.problems} & {p.id for p in train.problems}


def test_long_prompts_that_begin_alike_keep_apart():
    texts = ["Think " * 10 + "once.", "Think " * 10 + "twice."]
    prompts = read(prompt=texts).prompts
    assert [prompt.text for prompt in prompts.values()] == texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model is missing; give at least one"),
        ({"data": None}, "--data is missing; give at least one"),
        ({"data": ["none.jsonl"]}, "--data=none.jsonl: data: none.jsonl does not exist"),
        ({"data": ["sums"]}, "--data=sums: data='sums': not a data spec"),
        ({"prompt": ["none.txt"]}, "--prompt=none.txt: none.txt does not exist"),
        ({"prompt": ["none.json#p1"]}, "--prompt=none.json#p1: none.json does not exist"),
        ({"prompt": ["Add.", "Add."]}, "--prompt=Add.: same text as Add.; remove one of them"),
        ({"prompt": ["", "  "]}, "--prompt=  : same text as (the template's default); remove one of them"),
        (
            {"answer_format": "last_number"},
            "--answer_format=last_number: not supported by --environment=math; choose one of",
        ),
        ({"temperature": 0}, "--samples=4: greedy samples are identical; give --samples=1"),
        ({"top_p": 0.0}, "--top_p=0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top_p=1.5: must be above 0 and at most 1"),
        ({"min_p": -0.1}, "--min_p=-0.1: must be at least 0 and at most 1"),
        ({"fields": ["text"]}, "--fields=text: cannot parse 'text'; write it as in text=task"),
        ({"mesh": ["data=1", "fsdp=all"]}, "--mesh=data=1,fsdp=all: cannot parse 'fsdp=all'"),
        ({"chat_template_kwargs": "[1]"}, "--chat_template_kwargs=[1]: not a JSON object"),
        ({"chat_template_kwargs": "{"}, "--chat_template_kwargs={: Expecting property name"),
        ({"out": ["README.md"]}, "--out=README.md: unknown format; give a name that ends with .json"),
        ({"out": ["nowhere/x.json"]}, "--out=nowhere/x.json: the folder nowhere does not exist"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused(changes, message):
    with pytest.raises(ValueError) as refusal:
        read(**changes)
    assert str(refusal.value).startswith(message)


def test_results_are_not_written_over(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"--out=.*x\.json: the file exists; choose another name"):
        read(out=[str(path)])
