"""Folders and logs of this machine."""

import errno
import os

import pytest

from espl_jax.storage import folders


def test_a_log_is_whole_after_a_write_that_failed(tmp_path, monkeypatch):
    log = folders.open_log(tmp_path / "log")
    assert (log.length(), list(log.lines())) == (0, [])
    log.append(b"one\n")
    pwrite = os.pwrite

    def full(file, content, place):
        if len(content) > 2:
            return pwrite(file, content[:2], place)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="the disk is full"):
            log.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n" and log.length() == 4
    log.append(b"three\n")
    log.cut_back(8)
    log.append(b"ee\n")
    assert log.read(4, 3) == b"thr" and list(log.lines()) == [b"one\n", b"three\n"[:4] + b"ee\n"]
    log.close()
    assert folders.open_log(tmp_path / "log").length() == 11


def test_a_write_is_the_old_content_or_the_new_one(tmp_path, monkeypatch):
    folder = folders.open_folder(tmp_path / "run")
    assert folder.read("a") is None and folder.names("") == [] and not (tmp_path / "run").exists()
    folder.hold()
    folder.write("a", b"old")

    def fails(file):
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(os, "fsync", fails)
        folder.write("a", b"new")
    assert folder.read("a") == b"old"
    folder.make("b")
    folder.write("b/c", b"")
    assert set(folder.names("")) >= {"a", "b"} and folder.names("b") == ["c"] and folder.read("b/c") == b""
    folder.remove("b")
    folder.remove("a")
    assert folder.names("b") == [] and folder.read("a") is None
    folder.release()
