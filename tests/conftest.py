"""What holds for every test: eight virtual CPU devices, one compilation cache, reproducible examples."""

import os
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest

from tests.support.devices import OLDER_EMITTERS, xla_flags
from tests.support.forks import Forks

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()


# Environment variables and not jax.config: inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# A collective holds a thread until all devices have come to it. XLA would have no more threads than devices
# or cores, and two collectives at a time can take all of them and wait for ever.
os.environ["NPROC"] = "32"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402 (after the variables that it reads)

# XLA reads its flags when it first compiles. libtpu reads them again when it is loaded, and ends the process
# if it does not know one.
jax.block_until_ready(jax.jit(lambda x: x + 1)(0))
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(OLDER_EMITTERS, "")

hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Drops compiled programs after each module: thousands in one process have crashed the compiler."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    group = parser.getgroup("espl_jax")
    group.addoption("--family-seed", type=int, default=0, help="draws the tiny models of every family")
    group.addoption("--family-draws", type=int, help="how many models are drawn of each family")
    group.addoption("--minutes", type=float, help="skip tests that would end after this many minutes")


LONGEST_FILES = (
    "sampling/scheduler_test.py",
    "train_test.py",
    "pretrained/smollm2_test.py",
    "sampling/generate_test.py",
    "models/families_test.py",
    "training/batches_test.py",
    "readme_commands_test.py",
)
"""Test files that take longest: they start first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    """Sorts files by `LONGEST_FILES`; within a file, and beyond them, the order stays."""
    rank = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_runtest_setup(item):
    """Skips tests that would start too late, by --minutes and what they say they take."""
    limit, slow = item.config.getoption("minutes"), item.get_closest_marker("slow")
    if limit is not None:
        expected = slow.kwargs.get("minutes", 1) if slow else 0
        if (time.monotonic() - STARTED) / 60 + expected > limit:
            pytest.skip(f"takes {expected} of the {limit:g} minutes that --minutes gives all tests")


def pytest_terminal_summary(terminalreporter):
    """How near the drawn models of each family came to transformers."""
    worst = {}
    for report in terminalreporter.stats.get("passed", []):
        if "models/families_test.py" in report.nodeid:
            family = report.nodeid.partition("[")[2].partition("-")[0]
            for name, error in report.user_properties:
                errors = worst.setdefault(family, {})
                errors[name] = max(error, errors.get(name, 0.0))
    for family, errors in worst.items():
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        terminalreporter.write_line(f"{family} against transformers, worst relative error: {said}")


def run_module(module, *args, seconds=300, **environment):
    """`python -m module args` in a process of its own, with these variables added to its environment."""
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env={**os.environ, **environment}
    )


@pytest.fixture(scope="session")
def without_jax(tmp_path_factory):
    """Runs commands where importing jax fails, to show that what they do comes before it."""
    folder = tmp_path_factory.mktemp("no_jax")
    (folder / "jax.py").write_text("raise ImportError('jax was imported')\n")
    forks = Forks(str(ROOT), {**os.environ, "PYTHONPATH": str(folder)})
    yield forks.run
    forks.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real problems beside the repository, or where ESPL_SHARED says; skips without it."""
    path = Path(os.environ.get("ESPL_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the folder {path} (another place: set ESPL_SHARED)")
    return path
