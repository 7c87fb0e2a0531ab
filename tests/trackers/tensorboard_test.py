"""Event files that a kill cut off at any byte."""

import pytest

from espl_jax.trackers.base import Had, TrackedRun
from espl_jax.trackers.points import iteration_point, results_point
from tests.support import tracked

pytestmark = pytest.mark.slow
pytest.importorskip("tensorboard", reason="needs the package tensorboard")


def test_cut_off_at_any_byte(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from espl_jax.trackers.event_files import records
    from espl_jax.trackers.tensorboard_tracker import TensorBoard

    run = TrackedRun("id", "project", "name", str(tmp_path), {"seed": 0})
    prompts = {f"p{i}": tracked.member(i) for i in range(4)}
    points = [iteration_point(tracked.metrics(i), [(i, 0.5)], prompts) for i in (1, 2, 3)]
    points.append(results_point(tracked.results(3)))
    tracker = TensorBoard(run)
    assert tracker.open() == Had()
    for point in points:
        tracker.log(point)
    tracker.close(True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    whole = file.read_bytes()
    ends = [0, *(end for _, end in records(whole))]
    had = [Had(), Had(), Had(), Had(1), Had(2), Had(3), Had(3, 3)]
    assert len(ends) == len(had) and ends[-1] == len(whole)
    near = {end + by for end in ends for by in (-5, -1, 0, 1, 7, 8, 12, 13)}
    for length in sorted({*near, *range(0, len(whole), 97)}):
        if not 0 <= length <= len(whole):
            continue
        for other in (tmp_path / "tensorboard").iterdir():
            other.unlink()
        file.write_bytes(whole[:length])
        again = TensorBoard(run)
        found = again.open()
        assert found == had[max(i for i, end in enumerate(ends) if end <= length)]
        assert file.stat().st_size == max(end for end in ends if end <= length)
        for point in points:
            done = found.iteration if point.kind == "iteration" else found.results
            if point.step > done:
                again.log(point)
        again.close(True)
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
        events.Reload()
        assert [event.step for event in events.Tensors("rollouts/reward")] == [1, 2, 3]
        assert [event.step for event in events.Tensors("prompts/deployed")] == [3]
        assert "_hparams_/session_start_info" in events.Tags()["tensors"]
