"""A file is the old one or the new one."""

from __future__ import annotations

import os

import pytest

from fedge.edge_agent.durable import partial_of, replace_file
from fedge.schemas.errors import StoreError


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    for data in (b"first", b"second, longer", b"3"):
        replace_file(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    replace_file(tmp_path / "file", b"old")

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="No space left"):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    partial_of(tmp_path / "file").write_bytes(b"half of somethi")
    replace_file(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(StoreError, match="absent/file"):
        replace_file(tmp_path / "absent" / "file", b"data")
