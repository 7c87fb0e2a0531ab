"""The history of a population: what a run records of it, ratings recomputed from that, and a text to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from espl_jax.evolution.population import prompt_from_json
from espl_jax.evolution.ratings import Rating, crossover_rating, drifted, game, mutation_rating
from espl_jax.types import SystemPrompt


def entry(event: str, member: SystemPrompt, at: int) -> dict[str, Any]:
    """A line of the log `lineage`: the member as it was when it entered or left, at that iteration."""
    return {"event": event, "at": at, **dataclasses.asdict(member)}


def members_of(lineage: Iterable[Mapping[str, Any]], living: Sequence[SystemPrompt]) -> list[SystemPrompt]:
    """Every member that there ever was, the oldest first, each as it is now or was when it left.

    Args:
      lineage: the log's lines.
      living: the members now.
    """
    members: dict[str, SystemPrompt] = {}
    for line in lineage:
        fields = {name: value for name, value in line.items() if name not in ("event", "at")}
        members[line["id"]] = prompt_from_json(fields, f"member {line['id']}")
    return list((members | {member.id: member for member in living}).values())


def recompute_ratings(
    lineage: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    *,
    system: str = "trueskill",
    tie_margin: float = 0.01,
    mutation_sigma: float = 1.0,
    crossover_sigma: float = 1.0,
) -> dict[str, Rating]:
    """Everybody's last rating, from the recorded tournaments alone.

    Args:
      lineage, metrics: lines of these logs. Of the metrics `iteration`, `tournament` and `drift_sigma` are
        read; of the lineage the first ratings of the roots, who descends from whom, and who left when.
      system, tie_margin, mutation_sigma, crossover_sigma: as the run had them.

    Returns:
      id -> (mu, sigma), bit for bit what the run computed.
    """
    ratings = {line["id"]: (line["mu"], line["sigma"]) for line in lineage if line["event"] == "root"}
    living = set(ratings)
    for record in metrics:
        now = [line for line in lineage if line["at"] == record["iteration"] and line["event"] != "root"]
        tournament = record["tournament"]
        ratings |= game(ratings, tournament["prompts"], tournament["values"], tie_margin, system)[1]
        for line in now:
            if line["event"] == "left":
                living.discard(line["id"])
                continue
            rated = [ratings[parent] for parent in line["parents"]]
            parents = [SystemPrompt(mu=mu, sigma=sigma) for mu, sigma in rated]
            ratings[line["id"]] = (
                mutation_rating(parents[0], mutation_sigma)
                if line["operator"] == "mutation"
                else crossover_rating(parents, crossover_sigma)
            )
            living.add(line["id"])
        for member_id in living:
            mu, sigma = ratings[member_id]
            ratings[member_id] = mu, drifted(sigma, record.get("drift_sigma", 0.0))
    return ratings


def lineage_text(members: Sequence[SystemPrompt], living: Iterable[str] = (), deployed: str = "") -> str:
    """Who came from whom, by which edits, and how each did; a few lines a member, the oldest first.

    Args:
      members: see `members_of`.
      living: ids of those alive.
      deployed: id of the prompt to deploy.
    """
    alive = set(living)
    lines = []
    for member in members:
        origin = f"{member.operator} of {', '.join(member.parents)}" if member.parents else member.operator
        born = f", iteration {member.iteration}" if member.iteration else ""
        games = len(member.tournaments)
        wins = sum(result["rank"] == 0 for result in member.tournaments)
        played = f"first in {wins} of {games} tournaments" if games else "never played"
        notes = [f"{member.mu:.2f} ± {member.sigma:.2f}", played]
        notes += ["deployed"] if member.id == deployed else [] if member.id in alive else ["left"]
        lines.append(f"{member.id}  {origin}{born}: {', '.join(notes)}")
        lines += [f"      {line}" for line in (_show_edits(member.edits) or member.render().splitlines())]
    return "\n".join(lines) + "\n"


def _show_edits(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    return [line for edit in edits for line in _show_edit(edit)]


def _show_edit(edit: Mapping[str, Any]) -> list[str]:
    operation = edit["op"]
    if operation == "rewrite":
        said = [
            "rewrite",
            *(
                f"    {line}"
                for line in SystemPrompt(edit["text"], tuple(edit["principles"])).render().splitlines()
            ),
        ]
    elif operation == "replace":
        what = f"replace {edit['search']!r} by" if edit["search"] else "append"
        said = [f"{what} {edit['replace']!r}"]
    elif operation == "remove":
        said = [f"remove {edit['id']}"]
    else:
        ids = ", ".join(edit.get("ids", [edit.get("id", "")]))
        said = [f"{operation} {ids}: {edit['principle']}".replace(" :", ":")]
    return said + ([f"    because {edit['evidence']}"] if edit.get("evidence") else [])
