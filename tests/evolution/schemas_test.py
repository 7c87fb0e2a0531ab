"""Schemas of edits: their form, what fits into a reply, and what is refused."""

import json

import jsonschema
import pytest

from espl_jax.evolution import schemas
from espl_jax.evolution.edit_replies import parse_edits
from espl_jax.evolution.schemas import blocks_schema, edits_schema, most_bytes, relaxed

ALL = schemas.OPERATIONS
ROOMY = {"max_reply_tokens": 4000, "max_edits": 2, "max_chars": 200}


def edits_of(schema):
    return schema["properties"]["edits"]


def alternatives(schema):
    items = edits_of(schema)["items"]
    return items.get("anyOf", [items])


def operations(schema):
    return [each["properties"]["op"]["enum"][0] for each in alternatives(schema)]


def chars(schema):
    """Most characters of the texts, which are all alike."""
    (length,) = {
        field["maxLength"]
        for each in alternatives(schema)
        for field in each["properties"].values()
        if "maxLength" in field
    }
    return length


def is_valid(schema, *edits):
    return jsonschema.Draft202012Validator(schema).is_valid({"edits": list(edits)})


def add(principle):
    return {"op": "add", "principle": principle}


class TestForm:
    def test_every_object_is_strict_and_keys_stand_in_the_order_of_writing(self):
        schema = edits_schema(ALL, ("G0", "C0"), evidence=True, **ROOMY)
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
        assert operations(edits_schema(ALL, (), **ROOMY)) == ["add"]
        assert operations(edits_schema(ALL, ("G0",), **ROOMY)) == ["add", "modify", "remove"]
        assert operations(edits_schema(ALL, ("G0", "G0"), **ROOMY)) == ["add", "modify", "remove"]
        assert operations(edits_schema(("merge", "add"), ("G0", "G1"), **ROOMY)) == ["merge", "add"]

    def test_a_merge_names_two_ids_at_least(self):
        schema = edits_schema(("merge",), ("G0", "G1", "C0", "C1", "C2"), **ROOMY)

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
            ("x" * 200, True),
            ("x" * 201, False),
            ("Five" + "\\" * 25, True),
            ("Five" + "\\" * 26, True),  # of any kind: 80
            ("Five" + "\\" * 77, False),
            ("步" * 80, True),
            ("步" * 81, False),
            ("Grin \N{GRINNING FACE}", False),
        ],
    )
    def test_what_a_principle_may_say(self, principle, valid):
        schema = edits_schema(("add",), (), **ROOMY)
        assert is_valid(schema, add(principle)) == valid
        if valid:
            ((edit,), drops) = parse_edits(json.dumps({"edits": [add(principle)]}, ensure_ascii=False))
            assert edit.principle == principle and not drops

    def test_blocks_replace_passages_or_stand_at_the_end(self):
        schema = blocks_schema(["Add.", 'Say "x".', "Tab\there.", "x" * 201, ""], **ROOMY)

        def edits(search, replace):
            return is_valid(schema, {"search": search, "replace": replace})

        assert edits("Add.", "Subtract.") and edits('Say "x".', "- 1") and edits("Add.", "")
        assert edits("", "More words.") and not edits("", "") and not edits("", "12")
        assert not edits("Tab\there.", "y") and not edits("x" * 201, "y") and not edits("Other.", "y")
        (only,) = alternatives(blocks_schema([], **ROOMY))
        assert only["properties"]["search"]["enum"] == [""]
        for block in alternatives(blocks_schema(["Add."], evidence=True, **ROOMY)):
            assert list(block["properties"]) == ["search", "replace", "evidence"] == block["required"]


class TestBytes:
    def test_by_hand(self):
        longest = {"edits": [add("x" * 97 + "步" * 13)] * 2}  # 110 characters, 13 of them others
        expected = len(json.dumps(longest, ensure_ascii=False).encode())
        schema = edits_schema(("add",), (), max_reply_tokens=2000, max_edits=2, max_chars=110)
        assert most_bytes(schema) == expected == 13 + 2 * (30 + 110 + 2 * 13) + 2
        ids = edits_schema(("remove",), ("G0", "G10"), max_reply_tokens=2000, max_edits=1, max_chars=110)
        assert most_bytes(ids) == len('{"edits": [{"op": "remove", "id": "G10"}]}')
        merge = edits_schema(("merge",), ("G0", "G1", "G2"), max_reply_tokens=500, max_edits=1, max_chars=24)
        least = len('{"edits": [{"op": "merge", "ids": ["G0", "G1", "G2"], "principle": ""}]}')
        assert most_bytes(merge) == least + 24 + 2 * 3

    @pytest.mark.parametrize("tokens", [100, 128, 192, 256, 300, 400, 512, 1000, 2048])
    @pytest.mark.parametrize("evidence", [False, True])
    def test_fewer_edits_rather_than_short_texts(self, tokens, evidence):
        def of(tokens, max_edits, max_chars):
            limits = {"max_reply_tokens": tokens, "max_edits": max_edits, "max_chars": max_chars}
            return edits_schema(("add", "modify"), ("G0",), evidence=evidence, **limits)

        if evidence and tokens < 192:
            with pytest.raises(ValueError, match=f"reflection.max_new_tokens={tokens}"):
                of(tokens, 5, 256)
            return
        schema = of(tokens, 5, 256)
        count = edits_of(schema)["maxItems"]
        assert most_bytes(schema) <= tokens
        assert count == 1 or chars(schema) >= schemas.SHORT_CHARS
        # Neither another edit nor a longer text would fit.
        assert count == 5 or most_bytes(of(9999, count + 1, schemas.SHORT_CHARS)) > tokens
        assert chars(schema) == 256 or most_bytes(of(9999, count, chars(schema) + 1)) > tokens

    def test_too_small_a_reply_is_refused_with_the_least_that_works(self):
        limits = {"max_edits": 2, "min_edits": 1, "max_chars": 256}
        with pytest.raises(ValueError, match=r"reflection.max_new_tokens=48: .* raise it to (\d+)") as error:
            edits_schema(("add", "modify"), ("G0",), max_reply_tokens=48, **limits)
        least = int(str(error.value).split("raise it to ")[1].split()[0])
        assert chars(edits_schema(("add", "modify"), ("G0",), max_reply_tokens=least, **limits)) == 24
        with pytest.raises(ValueError, match=f"max_new_tokens={least - 1}"):
            edits_schema(("add", "modify"), ("G0",), max_reply_tokens=least - 1, **limits)

    def test_passages_give_way_to_texts(self):
        passages = ["short one.", "x" * 90, "y" * 60]
        limits = {"max_edits": 3, "max_chars": 200}

        def left(tokens):
            schema = blocks_schema(passages, max_reply_tokens=tokens, **limits)
            assert most_bytes(schema) <= tokens
            return {text for each in alternatives(schema) for text in each["properties"]["search"]["enum"]}

        assert left(2000) == {"", *passages}
        assert left(140) == {"", "short one.", "y" * 60}
        assert left(90) == {"", "short one."}
        assert left(75) == {""}
        with pytest.raises(ValueError, match=r"reflection.max_new_tokens=60: .* raise it to 72 at least"):
            left(60)

    def test_what_makes_no_sense_is_refused(self):
        with pytest.raises(ValueError, match=r"operations \['swap'\] are unknown"):
            edits_schema(("add", "swap"), (), **ROOMY)
        with pytest.raises(ValueError, match=r"none is possible with ids=\('G0',\)"):
            edits_schema(("merge",), ("G0",), **ROOMY)


def test_merges_of_many_ids_stay_small():
    names = [f"{letter}{number}" for letter in "GC" for number in range(200)]
    schema = edits_schema(("modify", "merge"), names, max_reply_tokens=2000, max_edits=8, max_chars=200)
    assert len(json.dumps(schema)) < 20_000


def test_servers_are_sent_the_structure_alone():
    schema = edits_schema(
        ("modify", "merge"), ("G1", "G0"), max_reply_tokens=400, max_edits=3, min_edits=1, max_chars=60
    )
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
