"""Invented names, made of random syllables, and titles of works."""

from __future__ import annotations

import random
from collections.abc import Sequence


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_ONSETS = _split("b br d dr f g gl gr h k kl l m n p pr r s sk st t tr v w z")
_VOWELS = _split("a e i o u")
_CLUSTERS = _split("lv lk lz mb md mr nd ng nk nv nz rb rd rk rl rv rz sk st vr zd zm zr")

ENDINGS = {
    "given": _split("a e in o is ek"),
    "family": _split("an ev ock ard esk um"),
    "city": _split("holm ar ova ith ond"),
    "region": _split("ermark oria uland"),
    "country": _split("avia onia eth"),
    "event": _split("el ur ax"),
    "language": _split("ic ese i"),
    "currency": _split("o ek un"),
}
"""Kind of name -> its endings."""

_ADJECTIVES = _split(
    "Amber Ashen Borrowed Bronze Clouded Copper Crooked Distant Drowned Dusty Empty Fallen Feathered "
    "Folded Frozen Gilded Hidden Hollow Idle Inverted Ivory Knotted Lacquered Lonely Mended Mirrored "
    "Nameless Numbered Painted Patient Quiet Rusted Salted Scattered Sealed Silver Sleeping Sunken "
    "Tangled Threadbare Unfinished Velvet Woven"
)
_NOUNS = _split(
    "Anchor Aviary Balcony Basin Bellows Bridge Candle Causeway Cellar Chimney Cistern Compass Corridor "
    "Doorway Ferry Furnace Gate Granary Harbor Hourglass Kiln Ladder Lantern Loom Meadow Mill Observatory "
    "Orchard Parlor Pavilion Pendulum Quarry Reservoir Sparrow Spire Staircase Sundial Terrace Thimble "
    "Threshold Tollhouse Viaduct Windmill"
)

MAX_WORKS = len(_ADJECTIVES) * len(_NOUNS)


class Names:
    """Draws distinct names: no two words begin with the same five letters.

    Args:
      rng: the random generator.
    """

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._taken: set[str] = set()

    def words(self, kind: str, count: int) -> list[str]:
        """Returns `count` new words with the endings of a kind."""
        found: list[str] = []
        while len(found) < count:
            parts = (_ONSETS, _VOWELS, _CLUSTERS, ENDINGS[kind])
            word = "".join(self._rng.choice(part) for part in parts).capitalize()
            if word[:5] not in self._taken:
                self._taken.add(word[:5])
                found.append(word)
        return found

    def people(self, count: int) -> list[str]:
        """Returns full names; people share given or family names, but not both."""
        given = self.words("given", count // 4 + 1)
        family = self.words("family", count // 2 + 1)
        pairs = self._rng.sample(range(len(given) * len(family)), count)
        return [f"{given[pair % len(given)]} {family[pair // len(given)]}" for pair in pairs]

    def works(self, count: int) -> list[str]:
        """Returns titles of works, at most `MAX_WORKS`."""
        pairs = self._rng.sample(range(MAX_WORKS), count)
        return [
            f"The {_ADJECTIVES[pair % len(_ADJECTIVES)]} {_NOUNS[pair // len(_ADJECTIVES)]}" for pair in pairs
        ]


def listed(names: Sequence[str]) -> str:
    """Returns `A`, `A and B`, or `A, B and C`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
