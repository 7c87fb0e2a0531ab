import re

import pytest

from espl_jax.data.encyclopedia import problems as encyclopedia_problems
from espl_jax.data.encyclopedia.relations import RELATIONS
from espl_jax.data.encyclopedia.world import MADE_BY, make_world
from espl_jax.data.problems import check_disjoint
from espl_jax.environments.retrievers.load import Bm25

WORLDS = [(120, 0), (120, 1), (120, 2), (20, 0), (300, 0)]


def every_question(people, seed, hops="1-3"):
    """All questions that there are, whatever the split."""
    for split in encyclopedia_problems.SPLITS:
        with pytest.raises(ValueError, match=r"has \d+ questions") as caught:
            encyclopedia_problems.questions(split, seed, 10**9, hops, people)
        number = int(re.search(r"has (\d+) questions", str(caught.value))[1])
        yield from encyclopedia_problems.questions(split, seed, number, hops, people).problems


@pytest.mark.parametrize(("people", "seed"), WORLDS)
def test_facts_fit_together(people, seed):
    world = make_world(people, seed)
    fact = world.facts

    def year(title, relation):
        return int(fact[title, relation])

    for person in world.titles("person"):
        assert 50 <= year(person, "died") - year(person, "born") <= 88
        teacher = fact.get((person, "teacher"))
        if teacher:
            assert year(teacher, "born") + 20 <= year(person, "born") <= year(teacher, "died") - 18
            assert fact[teacher, "profession"] == fact[person, "profession"]
    for kind, relation in MADE_BY.items():
        for work in world.titles(kind):
            maker = fact[work, relation]
            assert year(maker, "born") + 22 <= year(work, "completed") <= year(maker, "died")
    for event in world.titles("event"):
        leader = fact[event, "leader"]
        assert year(leader, "born") + 22 <= year(event, "held") <= year(leader, "died")
    for country in world.titles("country"):
        assert fact[fact[fact[country, "capital"], "region"], "country"] == country
    for region in world.titles("region"):
        assert world.subjects("region", region), "a region without a city"
    for (title, relation), value in fact.items():
        assert title in world.kinds
        if relation in RELATIONS:
            assert world.kinds[title] in RELATIONS[relation].kinds
            assert (value in world.kinds) >= bool(RELATIONS[relation].phrase)


def test_pages():
    passages = encyclopedia_problems.passages()
    assert passages == encyclopedia_problems.passages(seed=0, people=120)
    assert passages != encyclopedia_problems.passages(seed=1)
    assert len(passages) == len({passage.title for passage in passages}) == 325
    for passage in passages:
        assert passage.title in passage.text
        assert 3 <= len(re.findall(r"\.(?: |$)", passage.text)) <= 6, passage.text
        assert all(sentence[0].isupper() for sentence in passage.text.split(". "))


@pytest.mark.parametrize(("people", "seed"), WORLDS)
def test_pages_are_found_by_their_titles(people, seed):
    passages = encyclopedia_problems.passages(seed, people)
    found = Bm25(passages).search([passage.title for passage in passages], 1)
    assert [page.title for (page,) in found] == [passage.title for passage in passages]


@pytest.mark.parametrize(("people", "seed"), [(120, 0), (60, 7)])
def test_whoever_knows_the_plan_answers_every_question(people, seed):
    bm25 = Bm25(encyclopedia_problems.passages(seed, people))
    problems = list(every_question(people, seed))
    plans = [encyclopedia_problems.plan(problem.id) for problem in problems]
    titles = sorted({title for plan in plans for title in plan})
    page = dict(zip(titles, (found[0] for found in bm25.search(titles, 1)), strict=True))
    for problem, plan in zip(problems, plans, strict=True):
        assert 1 <= len(plan) <= 3
        assert plan[0] in problem.text
        for title, said in zip(plan, (*plan[1:], problem.answer), strict=True):
            assert page[title].title == title
            assert said in page[title].text


@pytest.mark.parametrize(("people", "seed"), [(120, 0), (20, 3)])
def test_every_question_has_one_answer_that_it_does_not_say(people, seed):
    world = make_world(people, seed)
    objects = {}
    for (title, relation), value in world.facts.items():
        objects.setdefault((title, relation), set()).add(value)
    problems = list(every_question(people, seed))
    assert len({problem.text for problem in problems}) == len({problem.id for problem in problems})
    for problem in problems:
        _, slug, *chain = problem.id.split(".")
        here = {title for title in world.kinds if title.lower().replace(" ", "-") == slug}
        assert len(here) == 1
        for relation in chain:
            here = set().union(*(objects[title, relation] for title in here))
        assert here == {problem.answer}
        assert problem.answer.lower() not in problem.text.lower()
        assert problem.text[0].isupper() and problem.text.endswith("?")


def test_wording():
    """Of a world that stays as it is: ids of earlier runs keep their meaning."""
    first = encyclopedia_problems.questions(count=3).problems
    assert [len(encyclopedia_problems.plan(problem.id)) for problem in first] == [1, 2, 3]
    assert first[1].id == "encyclopedia-120-0.the-drowned-sparrow.painter.died"
    assert first[1].text == "What is the year of death of the painter of The Drowned Sparrow?"
    assert first[1].answer == "1864"
    assert encyclopedia_problems.plan(first[1].id) == ("The Drowned Sparrow", "Stango Bovrard")


def test_splits_are_disjoint_and_have_their_sizes():
    splits = {split: encyclopedia_problems.questions(split) for split in encyclopedia_problems.SPLITS}
    assert {
        split: len(problems) for split, problems in splits.items()
    } == encyclopedia_problems.DEFAULT_COUNTS
    check_disjoint(**splits)
    starts = [
        {encyclopedia_problems.plan(problem.id)[0] for problem in problems.problems}
        for problems in splits.values()
    ]
    assert not (starts[0] & starts[1] or starts[0] & starts[2] or starts[1] & starts[2])


def test_counts_and_hops():
    for hops, number in ((1, 1), ("2", 2), ("3", 3)):
        problems = encyclopedia_problems.questions(hops=hops, count=30, people=40).problems
        assert {len(encyclopedia_problems.plan(problem.id)) for problem in problems} == {number}
    mixed = encyclopedia_problems.questions(hops="1-2", count=100, people=40)
    assert [len(encyclopedia_problems.plan(problem.id)) for problem in mixed.problems] == [1, 2] * 50
    assert encyclopedia_problems.questions(hops="1-2", count=7, people=40).problems == mixed.problems[:7]
    assert (
        encyclopedia_problems.questions(seed=1).problems != encyclopedia_problems.questions(seed=0).problems
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split='dev' is unknown"),
        ({"hops": "3-1"}, "hops='3-1'"),
        ({"hops": 4}, "hops=4"),
        ({"hops": ""}, "hops=''"),
        ({"count": 0}, "count=0: the train split has [0-9]+ questions"),
        ({"count": 100_000}, "choose 1 to [0-9]+, or more people"),
        ({"people": 3}, "people=3"),
        ({"people": 10_000}, "people=10000"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encyclopedia_problems.questions(**options)


@pytest.mark.parametrize(
    "identity",
    ["addition-3+5", "encyclopedia-120-0.the-drowned-sparrow.born", "encyclopedia-120-0.nobody.born"],
)
def test_no_plan_for_what_is_not_a_question(identity):
    with pytest.raises(ValueError, match="is not the id of an encyclopedia question"):
        encyclopedia_problems.plan(identity)
