"""Every point reaches a tracker exactly once, whatever is killed or fails in between."""

import collections
import json
import threading
import time

import numpy as np
import pytest

from espl_jax.storage.local import LocalFolder
from espl_jax.trackers.base import Had
from tests.support import tracked

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Killed(BaseException):
    """What a kill does to a thread: no handler of errors sees it."""


class Kill:
    """Kills at the n-th step of all that is written; 0 never does."""

    def __init__(self, at=0):
        self._left = at
        self.happened = False

    def step(self):
        if self.happened:
            raise Killed
        self._left -= 1
        if self._left == 0:
            self.happened = True
            raise Killed


class Store:
    """What a tracker's server keeps: (name, step) -> how often it was logged, and the values."""

    def __init__(self):
        self.counts = collections.Counter()
        self.values = {}
        self.texts = {}
        self.lengths = {}
        self.complete = Had()
        self.opened = 0

    def put(self, name, step, value):
        self.counts[name, step] += 1
        self.values[name, step] = value


class Atomic:
    """Points are atomic; a kill loses those that are still buffered."""

    fix = "check the fake"

    def __init__(self, store, kill, buffered=0):
        self._store, self._kill, self._buffered = store, kill, buffered
        self._waiting = []

    def open(self):
        self._store.opened += 1
        self._kill.step()
        return self._store.complete

    def log(self, point):
        self._kill.step()
        self._waiting.append(point)
        while len(self._waiting) > self._buffered:
            self._write(self._waiting.pop(0))
        self._kill.step()

    def close(self, finished):
        self._kill.step()
        for point in self._waiting:
            self._write(point)
            self._kill.step()
        self._waiting = []

    def _write(self, point):
        for name, value in point.scalars.items():
            self._store.put(name, point.step, value)
        self._keep(point)

    def _keep(self, point):
        store = self._store
        store.texts |= {(name, point.step): text for name, text in point.texts.items()}
        store.lengths |= {(name, point.step): values for name, values in point.histograms.items()}
        iteration, results = store.complete.iteration, store.complete.results
        store.complete = Had(point.step, results) if point.kind == "iteration" else Had(iteration, point.step)


class Partial(Atomic):
    """Writes one number at a time; a point that is logged again is completed."""

    def _write(self, point):
        for name, value in point.scalars.items():
            if not self._store.counts[name, point.step]:
                self._store.put(name, point.step, value)
                self._kill.step()
        self._keep(point)


class Blind(Atomic):
    """Cannot tell what it has."""

    def open(self):
        super().open()


def run(path, store, kind=Atomic, kill=None, settings=None, **options):
    kill = kill or Kill()
    said = []
    settings = settings or tracked.config(["fake"])
    make = {"make": lambda name: lambda tracked_run: kind(store, kill)} | options.pop("how", {})
    tracked.simulate(path, settings, say=said.append, **make, **options)
    return said


def check(path, store, iterations=6):
    """Compares what the tracker has with the logs."""
    wanted = {(name, i): v for i, flat in tracked.logged(path).items() for name, v in flat.items()}
    cells = ("initial/root", "trained/root", "trained/deployed")
    test = {(f"test/{cell}/{name}", iterations) for cell in cells for name in ("accuracy", "low", "high")}
    got = {key: value for key, value in store.values.items() if not key[0].startswith("test/")}
    assert got == wanted
    assert {key for key in store.values if key[0].startswith("test/")} == test
    assert set(store.counts.values()) == {1}
    for i in range(1, iterations + 1):
        lengths, rewards = tracked.lengths_and_rewards(i)
        assert np.array_equal(store.lengths["distributions/reply_tokens", i], lengths)
        assert np.array_equal(store.lengths["distributions/reward", i], rewards)
        assert f"p{i}: mutation of p0" in store.texts["prompts/entered", i]
        assert f"rating {25 + i}.00 ± 8.00" in store.texts["prompts/best", i]
    assert store.texts["prompts/entered", 1].startswith("p0: root")
    assert "Reason: largest mu" in store.texts["prompts/deployed", iterations]


@pytest.fixture
def notes(monkeypatch):
    """Makes notes a step of the kill that the test puts here."""
    held = {"kill": Kill()}
    write = LocalFolder.write

    def counted(self, name, content):
        if not name.startswith("trackers/"):
            return write(self, name, content)
        held["kill"].step()
        write(self, name, content)
        held["kill"].step()

    monkeypatch.setattr(LocalFolder, "write", counted)
    return held


def test_a_run_that_nothing_interrupts(tmp_path):
    store = Store()
    assert run(tmp_path, store) == []
    check(tmp_path, store)
    note = json.loads((tmp_path / "trackers" / "fake.json").read_text())
    assert (note["iteration"], note["results"], note["failures"]) == (6, 6, 0)


@pytest.mark.parametrize(
    ("kind", "buffered", "iterations"), [(Atomic, 0, 3), (Atomic, 2, 3), (Partial, 0, 2)]
)
def test_a_kill_at_every_step(kind, buffered, iterations, tmp_path, notes):
    """The tracker dies alone here; the run goes on to its next kill, and the tracker resumes with it."""
    settings = tracked.config(["fake"], iterations)
    for at in range(1, 200):
        path, store, kill = tmp_path / str(at), Store(), Kill(at)
        notes["kill"] = kill
        make = {"make": lambda name, kill=kill, store=store: lambda run: _made(kind, store, kill, buffered)}
        run(path, store, settings=settings, how=make, every=2)
        notes["kill"] = Kill()
        how = {"make": lambda name, store=store: lambda run: _made(kind, store, Kill(), buffered)}
        run(path, store, settings=settings, how=how, every=2)
        check(path, store, iterations)
        if not kill.happened:
            break
    assert 15 < at < 199, "every step was one to be killed at"


def _made(kind, store, kill, buffered):
    return kind(store, kill, buffered)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_what_no_checkpoint_holds_is_not_logged(stop_after, tmp_path):
    """The iterations after the checkpoint are repeated, with other times."""
    store = Store()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, store, every=3, stop_after=stop_after)
    assert store.complete.iteration == stop_after // 3 * 3
    run(tmp_path, store, every=3)
    check(tmp_path, store)


def test_a_tracker_that_cannot_tell_gets_what_was_not_noted(tmp_path):
    store = Store()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, store, Blind, stop_after=4)
    run(tmp_path, store, Blind)
    check(tmp_path, store)


def test_a_tracker_that_lost_everything_gets_it_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Store(), stop_after=4)
    store = Store()
    run(tmp_path, store)
    check(tmp_path, store)


def test_a_tracker_that_is_added_later_gets_the_iterations_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Store(), settings=tracked.config(), stop_after=4)
    store = Store()
    run(tmp_path, store)
    check(tmp_path, store)


def test_a_finished_run_that_goes_on(tmp_path):
    store = Store()
    run(tmp_path, store, settings=tracked.config(["fake"], iterations=4))
    run(tmp_path, store, settings=tracked.config(["fake"], iterations=6))
    earlier = [key for key in store.values if key[0].startswith("test/") and key[1] == 4]
    assert len(earlier) == 9
    for key in earlier:
        del store.values[key]
    check(tmp_path, store)


class TestFailures:
    def test_are_reported_once_counted_and_made_up_for(self, tmp_path):
        store, failures = Store(), []

        class Failing(Atomic):
            def log(self, point):
                if 2 <= point.step <= 4 and len(failures) < 2:
                    failures.append(point.step)
                    raise SystemExit("no\n network at https://me:hunter22@host/.")
                super().log(point)

        said = run(tmp_path, store, Failing)
        check(tmp_path, store)
        assert said[0] == (
            "Tracker fake failed: SystemExit: no network at https://***@host/. The run continues, and the "
            "tracker gets the missing points after a later checkpoint; check the fake."
        )
        assert len(said) == 1
        note = json.loads((tmp_path / "trackers" / "fake.json").read_text())
        assert note["failures"] == len(failures) >= 1 and note["error"] == ""

    def test_that_do_not_end_are_said_at_the_end(self, tmp_path):
        class Failing(Atomic):
            def log(self, point):
                raise ConnectionError("no network")

        said = run(tmp_path, Store(), Failing)
        assert len(said) == 2
        assert (
            said[1].startswith("Tracker fake failed ") and "iterations up to 0. The same command" in said[1]
        )
        assert tracked.logged(tmp_path).keys() == {1, 2, 3, 4, 5, 6}
        store = Store()
        run(tmp_path, store)
        check(tmp_path, store)

    def test_at_the_beginning(self, tmp_path):
        def make(name):
            raise ImportError("a package is broken")

        said = run(tmp_path, Store(), how={"make": make})
        assert (
            "ImportError: a package is broken" in said[0] and "check that the package is installed" in said[0]
        )

    def test_one_tracker_does_not_hold_up_another(self, tmp_path):
        store, release, begin = Store(), threading.Event(), time.monotonic()

        class Hanging(Atomic):
            def log(self, point):
                release.wait(60)

        kinds = {"one": lambda run: Hanging(Store(), Kill()), "two": lambda run: Atomic(store, Kill())}
        settings = tracked.config(["one", "two"])
        said = run(tmp_path, store, settings=settings, how={"make": kinds.get}, drain=3.0)
        assert time.monotonic() - begin < 30
        (line,) = said
        assert line.startswith("Tracker one did not finish in time; it has the iterations up to 0.")
        check(tmp_path, store)
        release.set()

    def test_a_run_without_trackers_writes_nothing_about_them(self, tmp_path):
        run(tmp_path, Store(), settings=tracked.config())
        assert not (tmp_path / "trackers").exists()


def test_the_id_stays(tmp_path):
    ids = []

    def make(name):
        def record(run):
            ids.append((run.id, run.project, run.name, run.config["model.source"], run.config["trackers"]))
            return Atomic(Store(), Kill())

        return record

    for iterations in (2, 4):
        run(tmp_path / "q", Store(), settings=tracked.config(["fake"], iterations), how={"make": make})
    assert ids[0] == ids[1]
    assert ids[0][1:] == ("espl_test", "q", "https://***@host/model", "['fake']")


def test_logs_are_not_read_from_the_beginning_again(tmp_path, monkeypatch):
    """What an earlier process has sent is skipped by its offset."""
    from espl_jax.storage.local import LocalLog

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, store := Store(), stop_after=5)
    begins, read = [], LocalLog.read

    def noted(self, begin, length):
        if self.path.name == "rollouts.jsonl":
            begins.append(begin)
        return read(self, begin, length)

    monkeypatch.setattr(LocalLog, "read", noted)
    run(tmp_path, store)
    size = (tmp_path / "rollouts.jsonl").stat().st_size
    assert begins and min(begins) > size / 2
    check(tmp_path, store)
