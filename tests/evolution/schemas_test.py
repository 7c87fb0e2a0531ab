"""Schemas of edits: their form, what replies may say under them, and what is refused."""

import json
import re

import jsonschema
import pytest

from espl_jax.evolution import schemas
from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.schemas import blocks_schema, edits_schema, relaxed

ALL = schemas.OPERATIONS


def edits_of(schema):
    return schema["properties"]["edits"]


def alternatives(schema):
    items = edits_of(schema)["items"]
    return items.get("anyOf", [items])


def operations(schema):
    return [each["properties"]["op"]["enum"][0] for each in alternatives(schema)]


def is_valid(schema, *edits):
    return jsonschema.Draft202012Validator(schema).is_valid({"edits": list(edits)})


def add(principle):
    return {"op": "add", "principle": principle}


class TestForm:
    def test_every_object_is_strict_and_keys_stand_in_the_order_of_writing(self):
        schema = edits_schema(ALL, ("G0", "C0"), evidence=True, max_edits=2)
        jsonschema.Draft202012Validator.check_schema(schema)
        keys = [list(each["properties"]) for each in alternatives(schema)]
        assert keys == [
            ["op", "principle", "evidence"],
            ["op", "id", "principle", "evidence"],
            ["op", "ids", "principle", "evidence"],
            ["op", "id", "evidence"],
        ]
        for each in [schema, *alternatives(schema)]:
            assert each["required"] == list(each["properties"]) and each["additionalProperties"] is False

    def test_operations_that_no_id_allows_are_left_out(self):
        assert operations(edits_schema(ALL, (), max_edits=2)) == ["add"]
        assert operations(edits_schema(ALL, ("G0",), max_edits=2)) == ["add", "modify", "remove"]
        assert operations(edits_schema(ALL, ("G0", "G0"), max_edits=2)) == ["add", "modify", "remove"]
        assert operations(edits_schema(("merge", "add"), ("G0", "G1"), max_edits=2)) == ["merge", "add"]

    def test_a_merge_names_two_ids_at_least(self):
        schema = edits_schema(("merge",), ("G0", "G1", "C0", "C1", "C2"), max_edits=2)

        def merges(*ids):
            return is_valid(schema, {"op": "merge", "ids": list(ids), "principle": "One rule."})

        assert merges("G0", "C2") and merges("C2", "G1", "G0") and merges("G0", "G1", "C0", "C1")
        assert not merges("G0") and not merges("G0", "G0") and not merges("G0", "G9")
        assert not merges("G0", "G1", "C0", "C1", "C2")
        text = json.dumps({"edits": [{"op": "merge", "ids": ["G0", "C1", "C1"], "principle": "One rule."}]})
        ((merge,), drops) = parse_edits(text)
        assert merge.ids == ("G0", "C1") and not drops

    @pytest.mark.parametrize(
        ("principle", "valid"),
        [
            ("Check the units.", True),
            ('Say "none" where $\\frac{a}{b}$ has b = 0.', True),
            ("Rechne π ≈ 3,14 über zwei Wege nach.", True),
            ("检查每一步。", True),
            ("Проверяй каждый шаг.", True),
            ("", False),
            ("123", False),
            ("G0. Check the units.", False),
            ("C3", False),
            ("Two\nlines", False),
            ("A tab\there", False),
            ("x" * 3000, True),  # no text is cut to fit a length
            ("Five" + "\\" * 500, True),
            ("步" * 500, True),
            ("Grin \N{GRINNING FACE}", False),
        ],
    )
    def test_what_a_principle_may_say(self, principle, valid):
        schema = edits_schema(("add",), (), max_edits=2)
        assert is_valid(schema, add(principle)) == valid
        if valid:
            ((edit,), drops) = parse_edits(json.dumps({"edits": [add(principle)]}, ensure_ascii=False))
            assert edit.principle == principle and not drops

    def test_blocks_replace_passages_or_stand_at_the_end(self):
        schema = blocks_schema(["Add.", 'Say "x".', "Tab\there.", "x" * 3000, ""], max_edits=2)

        def edits(search, replace):
            return is_valid(schema, {"search": search, "replace": replace})

        assert edits("Add.", "Subtract.") and edits('Say "x".', "- 1") and edits("Add.", "")
        assert edits("", "More words.") and not edits("", "") and not edits("", "12")
        assert edits("x" * 3000, "y" * 3000) and edits("", "Y" * 3000)
        assert not edits("Tab\there.", "y") and not edits("Other.", "y")
        (only,) = alternatives(blocks_schema([], max_edits=2))
        assert only["properties"]["search"]["enum"] == [""]
        for block in alternatives(blocks_schema(["Add."], evidence=True, max_edits=2)):
            assert list(block["properties"]) == ["search", "replace", "evidence"] == block["required"]

    @pytest.mark.parametrize("evidence", [False, True])
    def test_nothing_has_a_longest_length(self, evidence):
        """A bound would end a string in the middle of a sentence, and nothing would show it."""
        made = [
            edits_schema(ALL, ("G0", "G1"), max_edits=3, evidence=evidence),
            blocks_schema(["Add.", "x" * 500], max_edits=3, evidence=evidence),
        ]
        for schema in made:
            written = json.dumps(schema)
            assert "maxLength" not in written
            assert all("{" not in pattern for pattern in re.findall(r'"pattern": "(.*?)"[,}]', written))

    def test_how_many_edits_a_reply_may_have(self):
        schema = edits_schema(("add",), (), max_edits=3, min_edits=1)
        assert [is_valid(schema, *[add("Do it.")] * count) for count in range(5)] == [0, 1, 1, 1, 0]
        schema = blocks_schema([], max_edits=1)
        append = {"search": "", "replace": "Do it."}
        assert [is_valid(schema, *[append] * count) for count in range(3)] == [1, 1, 0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"operations \['swap'\] are unknown"):
        edits_schema(("add", "swap"), (), max_edits=2)
    with pytest.raises(ValueError, match=r"none is possible with ids=\('G0',\)"):
        edits_schema(("merge",), ("G0",), max_edits=2)


def test_merges_of_many_ids_stay_small():
    names = [f"{letter}{number}" for letter in "GC" for number in range(200)]
    schema = edits_schema(("modify", "merge"), names, max_edits=8)
    assert len(json.dumps(schema)) < 20_000


def test_servers_are_sent_the_structure_alone():
    schema = edits_schema(("modify", "merge"), ("G1", "G0"), max_edits=3, min_edits=1)
    sent = relaxed(schema)
    edits = sent["properties"]["edits"]
    assert (edits["type"], edits["minItems"], edits["maxItems"]) == ("array", 1, 3)
    modify, merge = edits["items"]["anyOf"]
    assert modify["properties"] == {
        "op": {"type": "string", "enum": ["modify"]},
        "id": {"type": "string", "enum": ["G1", "G0"]},
        "principle": {"type": "string"},
    }
    # One kind of list, whichever id stood first.
    ids = {"type": "string", "enum": ["G0", "G1"]}
    assert merge["properties"]["ids"] == {"type": "array", "items": ids, "minItems": 2, "maxItems": 2}
    assert merge["required"] == ["op", "ids", "principle"] and merge["additionalProperties"] is False
    assert not any(word in json.dumps(sent) for word in ("pattern", "maxLength", "prefixItems"))
    assert relaxed(sent) == sent
