"""Renders the page: a template with text, and data that scripts show.

Text from models, problems and users reaches the page in two ways only: through the template, which escapes
it, and as base64, which scripts decode and put into text nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from espl_jax.console.tables import duration, percent
from espl_jax.report import compare
from espl_jax.report.build import ROOM, RunPage, build
from espl_jax.report.configuration import ABSENT, Field, fields_of, find_defaults, resume_command
from espl_jax.report.read import Record, RunLogs, names_of
from espl_jax.report.sample import RULE, packed, packed_text

SCRIPTS = ("base", "charts", "tables", "curves", "family", "member", "scores", "rollouts", "health", "main")
"""Names of the page's scripts, in the order in which they run."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A test accuracy: its share for a bar, and the text with its interval."""

    share: float
    text: str


@dataclasses.dataclass(frozen=True)
class View:
    """What the template shows of a run; all texts are escaped there.

    Attributes:
      name, mode: of the run.
      iterations: iterations done, and in all.
      finished: whether the run has ended.
      before, after: test accuracy of the initial weights and root prompt, and of the outcome; or None.
      validations: first and last validation accuracy, for a run without a test.
      rows: (weights, cell of the root, cell of the deployed prompt) of the test.
      deployed: id of the deployed prompt; `prompt` its text, `reason` why it was chosen.
      costs: (what, how much).
      fields: of the configuration.
      has_defaults: whether the defaults are known.
      command: resumes the run.
      versions: (package, version).
      has_tokens: whether replies are shown token by token.
    """

    name: str
    mode: str
    iterations: tuple[int, int]
    finished: bool
    before: Cell | None
    after: Cell | None
    validations: tuple[Cell, ...]
    rows: tuple[tuple[str, Cell | None, Cell | None], ...]
    deployed: str
    prompt: str
    reason: str
    costs: tuple[tuple[str, str], ...]
    fields: tuple[Field, ...]
    has_defaults: bool
    command: str
    versions: tuple[tuple[str, str], ...]
    has_tokens: bool


def render(runs: Sequence[RunLogs]) -> str:
    """Returns the page of one or several runs as HTML, the same for the same work directories.

    Lone surrogates, which a file cannot hold, become question marks.
    """
    defaults = find_defaults()
    names = names_of(runs)
    pages = [build(run, number, ROOM // len(runs)) for number, run in enumerate(runs)]
    views = [_view(*each, defaults) for each in zip(runs, pages, names, strict=True)]
    overview = [
        {"name": view.name, "mode": view.mode, "deployed": view.deployed, **page.overview}
        for view, page in zip(views, pages, strict=True)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("espl_jax.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html").render(
        title=f"{names[0]}: report" if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=views,
        comparison=_comparison(runs, views, names) if len(runs) > 1 else None,
        rule=RULE,
        style=Markup(_source("report.css")),
        scripts=Markup("\n".join(_source(f"{name}.js") for name in SCRIPTS)),
        overview=packed(overview),
        blocks=[block for page in pages for block in page.blocks],
        plotly=_plotly(),
    )
    return page.encode("utf-8", "replace").decode()


def _plotly() -> str:
    """Returns the script of the package plotly as base64 of gzip."""
    from plotly.offline import get_plotlyjs  # late: only pages need it

    return packed_text(get_plotlyjs())


def _source(name: str) -> str:
    return (resources.files("espl_jax.report") / "page" / name).read_text(encoding="utf-8")


def _view(run: RunLogs, page: RunPage, name: str, defaults: Any) -> View:
    fields = fields_of(run.config, defaults)
    test = run.results.get("test") or {}
    cells = {
        weights: {prompt: _cell(value) for prompt, value in prompts.items()}
        for weights, prompts in test.items()
    }
    members = {each.id: each for each in run.members}
    deployed = run.deployed
    validated = [each["validation"] for each in run.metrics if each.get("validation")]
    return View(
        name=name,
        mode=run.config["mode"],
        iterations=(len(run.metrics), int(run.config.get("num_iterations", len(run.metrics)))),
        finished=bool(run.results),
        before=cells.get("initial", {}).get("root"),
        after=compare.outcome({(w, p): cell for w, prompts in cells.items() for p, cell in prompts.items()}),
        validations=tuple(map(_cell, [validated[0], validated[-1]] if len(validated) > 1 else validated)),
        rows=tuple(
            (w, cells[w].get("root"), cells[w].get("deployed")) for w in compare.WEIGHTS if w in cells
        ),
        deployed=deployed,
        prompt=members[deployed].render() if deployed in members else "",
        reason=run.results.get("reason", "the best so far; the run has not ended"),
        costs=tuple(_costs(run, page)),
        fields=tuple(fields),
        has_defaults=defaults is not None,
        command=resume_command(run, fields),
        versions=tuple(_versions(run.machine)),
        has_tokens=any(block.id.endswith("-vocabulary") for block in page.blocks),
    )


def _cell(evaluation: Record) -> Cell:
    share = evaluation["accuracy"]
    return Cell(share, percent(share, evaluation["low"], evaluation["high"]))


def _costs(run: RunLogs, page: RunPage) -> list[tuple[str, str]]:
    """Returns what the run cost, as far as its work directory tells."""
    seconds = sum(each.get("time", {}).get("total", 0.0) for each in run.metrics)
    reflected = [each.get("reflector") or {} for each in run.metrics]
    read = sum(int(each.get("prompt_tokens", 0)) for each in reflected)
    written = sum(int(each.get("completion_tokens", 0)) for each in reflected)
    price = sum(float(each.get("cost", 0.0)) for each in reflected)
    costs = [("Time of all iterations", duration(seconds))]
    costs += [("Tokens sampled in rollouts", f"{page.tokens['rollouts']:,}")]
    costs += [("Tokens trained on", f"{page.tokens['trained']:,}")] if page.tokens["trained"] else []
    if page.tokens["evaluations"]:
        costs.append(("Tokens sampled in evaluations", f"{page.tokens['evaluations']:,}"))
    costs += [("Tokens read and written by the reflector", f"{read:,} and {written:,}")] if read else []
    costs += [("Price of the reflector", f"{price:,.2f}")] if price else []
    for name, size in sorted(run.machine.get("peak_bytes", {}).items()):
        where = "of a device" if name == "device" else "of the process on the host"
        costs.append((f"Peak memory {where}", f"{size / 2**30:.2f} GiB"))
    return costs


def _versions(machine: Record) -> list[tuple[str, str]]:
    """Returns the versions that a run recorded, and its devices."""
    found = list(machine.get("versions", {}).items())
    if devices := machine.get("devices"):
        found.append(("devices", f"{devices['count']} x {devices['kind']}"))
    return found


def _comparison(runs: Sequence[RunLogs], views: Sequence[View], names: Sequence[str]) -> dict[str, Any]:
    """Returns the tables that compare runs."""
    rates = [compare.test_rates(run) for run in runs]
    methods = compare.methods_of(runs, names, rates)
    by_run = [{each.name: each.value for each in view.fields} for view in views]
    differing = [
        (field, [fields.get(field, ABSENT) for fields in by_run])
        for field in sorted({name for fields in by_run for name in fields})
        if len({fields.get(field) for fields in by_run}) > 1
    ]
    return {
        "methods": [
            (
                method.name,
                [names[index] for index in method.runs],
                compare.accuracy(method),
                len(method.problems),
            )
            for method in methods
        ],
        "seeds": any(len(method.runs) > 1 for method in methods),
        "differences": compare.differences(methods),
        "fields": differing,
    }
