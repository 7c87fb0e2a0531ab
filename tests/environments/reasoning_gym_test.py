r"""Answers to tasks of reasoning-gym: how they are read, and what is said about them."""

import re

import pytest

from espl_jax import gym
from espl_jax.data.load import load
from espl_jax.environments import reasoning_gym as module
from espl_jax.environments.reasoning_gym import ReasoningGym, last_tagged
from espl_jax.types import Grade, Problem

pytest.importorskip("reasoning_gym")

TASKS = {
    "leg_counting": "7",
    "gcd": "what?",
    "spiral_matrix": "1 2 3",
    "countdown": "1 + 1",
    "simple_integration": "x**77",
    "basic_arithmetic": "-1.5",
    "sudoku": "1 2 3",
    "knights_knaves": "Nobody is a knight.",
    "shortest_path": "up up",
    "path_star": "0 1 2",
}
"""Task -> a wrong answer."""

HOSTILE = {
    "countdown": "9**9**9**9",
    "coin_flip": "1e999999999",
    "boxnet": "null",
    "prime_factorization": "9" * 5000,
    "propositional_logic": "(" * 3000 + ")" * 3000,
    "spiral_matrix": "[" * 5000,
    "game_of_life": '{"a": 1}',
}
"""Task -> an answer whose scoring raises, or never ends."""

QUICK = {
    "knight_swap": "max_nodes=6,impossible_ratio=1",
    "sokoban": "max_w=6,max_h=6,min_boxes=1,max_boxes=2,max_depth=20",
}
"""Options of tasks that otherwise take seconds to generate a problem."""


def first(task, options=""):
    return load(f"reasoning_gym:{task}:count=1{options and ','}{options}").problems[0]


def tagged(answer):
    return f"I think it is this.\n<answer>{answer}</answer>"


@pytest.fixture(scope="module")
def environment():
    environment = ReasoningGym(timeout=1.0, workers=1)
    yield environment
    environment.close()


def test_right_and_wrong_answers(environment):
    problems = [first(task) for task in TASKS]
    rights = environment.grade(problems, [tagged(problem.answer) for problem in problems])
    assert [(grade.reward, grade.success, grade.feedback) for grade in rights] == [(1.0, True, "")] * 10
    wrongs = environment.grade(problems, [tagged(wrong) for wrong in TASKS.values()])
    for problem, wrong, grade in zip(problems, TASKS.values(), wrongs, strict=True):
        assert 0 <= grade.reward <= 0.1 and not grade.success, problem.id
        assert grade.answer == wrong and grade.feedback, problem.id
        assert problem.answer not in grade.feedback
    assert wrongs[0].feedback == "The answer that was read, 7, is wrong."
    assert wrongs[-1].feedback.startswith("The path has to begin at node ")


def test_the_packages_rule_decides(environment):
    """Another expression, and a list where numbers were asked for."""
    countdown, spiral = first("countdown"), first("spiral_matrix")
    listed = f"[{', '.join(spiral.answer.split())}]"
    grades = environment.grade([countdown, spiral], [tagged(f"({countdown.answer})"), tagged(listed)])
    assert grades[0] == Grade(1.0, True, f"({countdown.answer})")
    assert (grades[1].reward, grades[1].success, grades[1].answer) == (0.1, False, listed)
    assert grades[1].feedback == (
        "The answer earned 0.1 of 1. It is partly right, or not in the form that the task asks for; only the "
        "final answer belongs between <answer> and </answer>."
    )


def test_an_answer_with_words_around_it_is_partly_right(environment):
    problem = first("leg_counting")
    (grade,) = environment.grade([problem], [tagged(f"The animals have {problem.answer} legs.")])
    assert 0 < grade.reward < 0.2 and not grade.success
    assert problem.answer not in grade.feedback


def test_star_graphs_say_where_the_path_breaks(environment):
    problem = first("path_star", "degree=3,min_path_length=3,max_path_length=3,node_range=50")
    start, *_, target = problem.answer.split()
    (grade,) = environment.grade([problem], [tagged(f"{start} {target}")])
    assert grade.feedback == f"There is no edge from {start} to {target} (step 1)."
    backward = first("path_star", "reversed=true")
    path = backward.answer.split()
    grades = environment.grade([backward] * 2, [tagged(" ".join(path[::-1])), tagged(" ".join(path[:-1]))])
    assert grades[0].feedback == f"The path has to begin at node {path[0]}."
    assert grades[1].feedback == f"The path ends at {path[-2]}, not at the target."


def test_all_grade_hostile_answers(environment):
    problems = [first(task) for task in HOSTILE]
    grades = environment.grade(problems, [tagged(answer) for answer in HOSTILE.values()])
    feedback = {task: grade.feedback for task, grade in zip(HOSTILE, grades, strict=True)}
    for task in ("countdown", "coin_flip"):
        assert feedback[task] == "The answer could not be evaluated within 1 seconds; simplify it."
    for task in ("boxnet", "prime_factorization", "propositional_logic", "game_of_life"):
        assert feedback[task] == "The answer could not be read; write it in the form that the task asks for."
    assert all((grade.reward, grade.success) == (0.0, False) for grade in grades)


def test_answers_are_not_executed(environment, tmp_path):
    file = tmp_path / "executed"
    code = f"__import__('os').system('touch {file}')"
    tasks = ("binary_matrix", "n_queens", "string_insertion", "spiral_matrix", "countdown", "puzzle24")
    problems = [first(task) for task in tasks]
    for text in (code, f"[{code}]"):
        grades = environment.grade(problems, [tagged(text)] * len(tasks))
        assert all(grade.reward < 0.1 for grade in grades)
    assert not file.exists()


def test_nan_is_no_complex_number(environment):
    (grade,) = environment.grade([first("complex_arithmetic")], [tagged("nan")])
    assert (grade.reward, grade.success) == (0.0, False)


def test_begin_changes_nothing(environment):
    problem = first("countdown")
    environment.begin(problem, tagged("2 + 2"))
    assert environment.grade([problem], [tagged("2 + 2")])[0].reward == 0.05


@pytest.mark.parametrize(
    ("answer_format", "right", "missing", "empty"),
    [
        (
            "tag",
            "<answer>1</answer> <answer>\n{}\n</answer>",
            ("{}", "There is no answer between tags. The answer has to be written as <answer>...</answer>."),
            ("<answer> </answer>", "There is nothing between <answer> and </answer>."),
        ),
        (
            "boxed",
            r"It is \boxed{{{}}}.",
            ("<answer>{}</answer>", module.boxed.NO_BOX),
            (r"\boxed{{}}", module.boxed.NO_BOX),
        ),
        (
            "last_line",
            "First.\n  {} \n\n",
            ("", "The reply is empty. The answer has to be on its last line."),
            (" \n ", "The reply is empty. The answer has to be on its last line."),
        ),
    ],
)
def test_answer_formats(answer_format, right, missing, empty):
    problem = first("leg_counting")
    environment = ReasoningGym(answer_format)
    replies = [each.format(problem.answer) for each in (right, missing[0], empty[0])]
    grades = environment.grade([problem] * 3, replies)
    assert grades[0] == Grade(1.0, True, problem.answer)
    assert [grade.feedback for grade in grades[1:]] == [missing[1], empty[1]]
    assert not any(grade.reward for grade in grades[1:])
    asked = module.INSTRUCTIONS[answer_format]
    assert environment.user_message(problem) == f"{problem.text}\n\n{asked}"
    assert ReasoningGym(answer_format, "").user_message(problem) == problem.text
    assert ReasoningGym(answer_format, "Be brief.").user_message(problem).endswith("\n\nBe brief.")


@pytest.mark.parametrize(
    "reply",
    [
        "<answer>1</answer>",
        "<answer> 1\n2 </answer> and <answer>3</answer> after",
        "<answer>1 <answer>2</answer> 3</answer>",
        "<answer>1</answer></answer>",
        "<answer>1</answer> <answer>2",
        "</answer><answer>",
        "<answer></answer>",
        "none",
    ],
)
def test_tags_are_read_as_the_package_does(reply):
    assert last_tagged(reply) == gym.package().utils.extract_answer(reply)


def test_many_tags_take_no_time():
    assert last_tagged("<answer>" * 100_000) is None


def test_a_long_answer_is_not_scored(environment):
    problem = first("countdown")
    (grade,) = environment.grade([problem], [tagged("1+" * 20_000)])
    assert grade.feedback == (
        "There are 40000 characters between <answer> and </answer>; only the final answer belongs there."
    )
    assert grade.reward == 0.0 and len(grade.answer) == 2000


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="answer_format='box' is unknown; choose one of tag, boxed, last_"):
        ReasoningGym("box")
    for options, message in (
        ({"timeout": 0}, "timeout=0: give seconds"),
        ({"workers": 0}, "workers=0: give at least 1"),
        ({"memory_mib": 5}, "memory_mib=5: reasoning-gym needs more"),
    ):
        with pytest.raises(ValueError, match=message):
            ReasoningGym(**options)
    with pytest.raises(ValueError, match="problem 'p': the id names no entry of reasoning_gym"):
        ReasoningGym().user_message(Problem("p", "text", "1"))
    problem = first("gcd")
    with pytest.raises(ValueError, match="the installed version of reasoning-gym generates another question"):
        ReasoningGym().grade([Problem(problem.id, "Another question", "1")], [tagged("2")])


@pytest.mark.slow(minutes=2)
def test_all_tasks_grade_hostile_answers(monkeypatch):
    """Whatever a reply holds, it is graded, and nothing but the right answer is a success."""
    monkeypatch.setattr(gym, "HASH_SEEDED", ())
    environment = ReasoningGym(timeout=2.0)
    answers = [
        *("9" * 19_000, "1e999999999", "nan", "9**9**9**9", "[" * 5000, "(" * 5000 + ")" * 5000, "null"),
        *('{"a": 1}', "1/0", "\ud800\0é", "A->B " * 3000, "U R " * 3000, "LRUD" * 4000, "x" + "," * 19_000),
        *("1 2 3\n" * 3000, "[1, 2, 3]", "-1", "True", "2020-01-01", "A & " * 4000 + "B", "x+" * 5000 + "x"),
    ]
    lenient = ("game_of_life_halting",)  # accepts any text where the right answer is False
    for task in gym.task_names():
        problem = first(task, QUICK.get(task, ""))
        for grade in environment.grade([problem] * len(answers), [tagged(answer) for answer in answers]):
            assert grade.feedback or grade.success, task
            right = problem.answer in (grade.answer, "") or task in lenient
            assert 0 <= grade.reward <= 1 and (not grade.success or right), (task, grade)
            assert not re.search(r"Traceback|Error\b", grade.feedback)
    environment.close()
