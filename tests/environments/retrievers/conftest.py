"""Indexes that tests build are cached in a folder of their own."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPL_JAX_CACHE", str(tmp_path / "cache"))
