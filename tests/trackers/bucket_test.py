"""Trackers, the status and the view of a run in a bucket, over the real protocol."""

import pytest

from espl_jax.storage import folders, status
from espl_jax.watch.run_view import Watcher
from tests.support import tracked
from tests.support.object_store import ObjectStore
from tests.trackers.follower_test import Atomic, Kill, Store


@pytest.fixture(scope="module")
def store():
    """One server for all tests, since gcsfs remembers the first."""
    with ObjectStore().serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


def simulate(path, tracker, **options):
    sizes = {"mode": "espl", "num_prompts": 1, "batch_size": 1, "group_size": 4}
    settings = tracked.config([tracker], iterations=3) | sizes
    said = []
    tracked.simulate(path, settings, say=said.append, **options)
    return said


def test_every_point_once(store):
    path, had = "gs://bucket/runs/fake", Store()
    make = {"make": lambda name: lambda run: Atomic(had, Kill())}
    with pytest.raises(KeyboardInterrupt):
        simulate(path, "fake", stop_after=2, **make)
    assert simulate(path, "fake", **make) == []
    steps = {step for name, step in had.counts if name == "rollouts/reward"}
    assert steps == {1, 2, 3} and set(had.counts.values()) == {1}
    assert had.complete.results == 3 and "p3: mutation of p0" in had.texts["prompts/entered", 3]


def test_the_view(store):
    path = "gs://bucket/runs/view"
    watcher = None
    with status.written(folders.open_folder(path).path, 3, True) as show:
        show(("rollouts",), 0)
        with pytest.raises(KeyboardInterrupt):
            simulate(path, "fake", stop_after=2, make=lambda name: lambda run: Atomic(Store(), Kill()))
        watcher = Watcher(path)
        view = watcher.look()
        assert (view.iteration, view.checkpoint, view.num_iterations) == (2, 2, 3)
        assert view.curves["reward"] == [1 / 8, 2 / 8]
    assert watcher.look().state == "finished"
    simulate(path, "fake", make=lambda name: lambda run: Atomic(Store(), Kill()))
    view = watcher.look()
    assert view.curves["reward"] == [1 / 8, 2 / 8, 3 / 8] and view.results
    assert [heading.split()[0] for heading, _ in view.edits] == ["p3", "p2", "p1"]


def test_event_files(store):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from espl_jax.trackers.event_files import is_results, records

    path = "gs://bucket/runs/events"
    with pytest.raises(KeyboardInterrupt):
        simulate(path, "tensorboard", stop_after=2)
    assert simulate(path, "tensorboard") == []
    folder = folders.open_folder(path)
    events = [
        event
        for name in folder.names("tensorboard")
        for event, _ in records(folder.read(f"tensorboard/{name}") or b"")
        if event.step
    ]
    assert [(event.step, is_results(event)) for event in events] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
