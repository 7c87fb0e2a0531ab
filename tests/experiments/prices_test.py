import json

import pytest

from espl_jax.types import Problem
from experiments.methods import prices


def test_feedback_says_the_price_only_of_a_wrong_reply():
    problem = Problem(id="3-cup-0", text="What do 3 cups cost?", answer="27")
    right, wrong, none = prices.Prices().grade([problem] * 3, ["3 x 9 = 27 coins", "9 coins.", "No idea."])
    assert (right.reward, right.success, right.feedback) == (1.0, True, "")
    for grade in wrong, none:
        assert (grade.reward, grade.success, grade.feedback) == (0.0, False, "A cup costs 9 coins.")


@pytest.mark.parametrize("split", prices.SPLITS)
def test_files_hold_the_problems(split):
    path = prices.FOLDER / f"prices-{split}.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*prices.problems(split)]
    for record in prices.problems(split):
        number, item = record["problem"].split()[-3 if "do" in record["problem"] else -2 :][:2]
        assert int(record["answer"]) == int(number) * prices.PRICES[item.rstrip("s?")]


def test_no_number_is_in_two_splits():
    numbers = [number for split in prices.SPLITS.values() for number in split]
    assert len(numbers) == len({*numbers})
