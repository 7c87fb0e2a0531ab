import jax
import numpy as np

from espl_jax.parallel import memory, sharding


def test_bytes_of_a_device():
    mesh = sharding.make_mesh({"data": 8})
    rows = sharding.place_rows(np.zeros((16, 3), np.float32), mesh)
    assert memory.bytes_per_device(rows) == 24
    assert memory.bytes_per_device([np.zeros(5, np.int32), jax.ShapeDtypeStruct((2, 2), "bfloat16")]) == 28


def test_a_container_may_have_less_than_the_machine(monkeypatch, tmp_path):
    assert memory.device_memory() > 2**20
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{8 * 12_345_678}\n")
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", [tmp_path / name for name in ("none", "max", "limit")])
    assert memory.device_memory() == 8 * 12_345_678 // jax.local_device_count()
