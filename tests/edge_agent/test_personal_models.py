"""The files of a personal model: killed at any step, forgotten at any moment, never half there."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_limits import DEFAULT_LIMITS
from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.forgetting import (
    ForgottenMeanwhile,
    nothing_forgotten,
    write_unless_forgotten,
)
from fedge.edge_agent.library import Library
from fedge.edge_agent.personal_models import PersonalModels, PersonalRecord
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.ids import sha256
from tests.edge_agent.small_disks import small_disk

PLAN = "1" * 64
OTHER_PLAN = "2" * 64


def record(version: int, weights: bytes | None, **changes) -> PersonalRecord:
    return PersonalRecord(
        version=version,
        plan_sha256=PLAN,
        settings_sha256="3" * 64,
        training=40,
        hold_out=10,
        at=1.0,
        outcome="not better" if weights is None else "better",
        weights_sha256=None if weights is None else sha256(weights),
    ).model_copy(update=changes)


def keep(models: PersonalModels, version: int, weights: bytes | None) -> None:
    """What the training process writes, and what the agent makes of it."""
    parts = models.parts(version)
    if weights is not None:
        parts.weights.write_bytes(weights)
        parts.model.write_bytes(b"onnx of " + weights)
    models.keep(record(version, weights), parts)


@pytest.fixture
def models(tmp_path) -> PersonalModels:
    (tmp_path / "models").mkdir()
    return PersonalModels(tmp_path)


def files(folder: Path) -> list[str]:
    """Every file of a personal model, wherever and however half."""
    return sorted(path.name for path in folder.rglob("*") if "personal" in path.name)


def test_before_the_first_there_is_none(models, tmp_path):
    assert models.record() is None
    assert models.model_of(0, PLAN) is None
    assert models.weights_of(0) is None
    models.forget()
    PersonalModels(tmp_path / "absent").forget()


def test_a_personal_model_is_of_exactly_its_version_and_plan(models):
    keep(models, 3, b"w")
    model, weights = models.model_of(3, PLAN), models.weights_of(3)
    assert model is not None
    assert weights is not None
    assert (model.read_bytes(), weights.read_bytes()) == (b"onnx of w", b"w")
    assert models.model_of(4, PLAN) is None
    assert models.weights_of(2) is None
    assert models.model_of(3, OTHER_PLAN) is None


def test_a_later_one_takes_the_place_of_the_one_before(models, tmp_path):
    for version, weights in ((3, b"w"), (3, b"w2"), (4, b"w3")):
        keep(models, version, weights)
        found = models.weights_of(version)
        assert found is not None
        assert found.read_bytes() == weights
        assert len(files(tmp_path)) == 3


def test_one_that_is_not_better_leaves_the_version_itself(models, tmp_path):
    keep(models, 3, b"w")
    keep(models, 3, None)
    assert models.model_of(3, PLAN) is None
    assert files(tmp_path) == ["personal.json"]


def test_what_belongs_to_an_older_version_goes_when_another_is_in_use(models, tmp_path):
    keep(models, 3, b"w")
    models.sweep(4)
    assert files(tmp_path) == ["personal.json"]
    assert models.model_of(3, PLAN) is None
    assert models.record() == record(3, b"w")


def test_a_record_that_is_damaged_is_none(models, tmp_path):
    keep(models, 3, b"w")
    (tmp_path / "personal.json").write_bytes(b'{"v": 1, "vers')
    assert models.record() is None
    assert models.model_of(3, PLAN) is None
    models.sweep()
    assert files(tmp_path) == ["personal.json"]


def test_forgetting_removes_also_what_is_on_its_way(models, tmp_path):
    keep(models, 3, b"w")
    parts = models.parts(3)
    parts.weights.write_bytes(b"half")
    (tmp_path / ".personal.json.part").write_bytes(b"half")
    models.forget()
    assert files(tmp_path) == []


# ---------------------------------------------------------------- killed


class Killed(BaseException):
    """The process is gone: nothing that it would still do is done."""


class Killer:
    """Ends the process before its step number `at`, counting from 0; `steps`: how many came."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.at, self.steps = at, 0
        for name in ("replace", "unlink", "fsync"):
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))

    def _before(self, act):
        def acts(*args, **named):
            if self.steps >= self.at:
                raise Killed
            self.steps += 1
            return act(*args, **named)

        return acts


def killed_at_each_step(tmp_path: Path, monkeypatch, prepare, work):
    """Each folder as `work` left it, killed at every one of its steps; the last was not killed."""
    for at in itertools.count():
        folder = tmp_path / str(at)
        (folder / "models").mkdir(parents=True)
        found = PersonalModels(folder)
        prepare(found)
        with monkeypatch.context() as patch:
            killer = Killer(patch, at)
            with contextlib.suppress(Killed):
                work(found)
        yield folder
        if killer.steps < at:
            assert killer.steps >= 3
            return


def test_killed_at_any_step_the_old_model_answers_or_the_new_one_or_none(tmp_path, monkeypatch):
    seen = []
    for folder in killed_at_each_step(
        tmp_path, monkeypatch, lambda m: keep(m, 3, b"old"), lambda m: keep(m, 3, b"new")
    ):
        models = PersonalModels(folder)
        weights, model = models.weights_of(3), models.model_of(3, PLAN)
        assert weights is not None
        assert model is not None
        assert model.read_bytes() == b"onnx of " + weights.read_bytes()
        seen.append(weights.read_bytes())
        # The next life clears what no record names.
        Library(folder).sweep()
        assert len(files(folder)) == 3
        assert models.weights_of(3) == weights
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {b"old", b"new"}


def test_killed_at_any_step_of_a_forget_no_model_answers_that_the_record_does_not_name(
    tmp_path, monkeypatch
):
    for folder in killed_at_each_step(
        tmp_path, monkeypatch, lambda m: keep(m, 3, b"w"), lambda m: m.forget()
    ):
        models = PersonalModels(folder)
        if models.record() is None:
            assert models.model_of(3, PLAN) is None
        # Whoever forgets again, or the next start, ends it.
        models.forget()
        assert files(folder) == []


def test_a_start_clears_what_a_crash_left(models, tmp_path):
    keep(models, 3, b"w")
    parts = models.parts(4)
    parts.weights.write_bytes(b"half")
    (tmp_path / "models" / "personal-4-0123456789ab.onnx").write_bytes(b"without a record")
    Library(tmp_path).sweep()
    assert len(files(tmp_path)) == 3
    assert models.weights_of(3) is not None


# ---------------------------------------------------------------- forgetting


@pytest.fixture
def store_path(tmp_path, models) -> Path:
    path = tmp_path / FILE_NAME
    (tmp_path / "agent.sqlite").write_bytes(b"")
    with ExampleStore(path) as store:
        store.add("my secret is here")
        store.add("see you soon")
    return path


@pytest.mark.parametrize(
    "forget",
    [
        lambda store: store.forget_all(),
        lambda store: store.forget_containing("secret"),
        lambda store: store.forget_before(0.0),
        lambda store: store.forget_ids([1]),
    ],
    ids=["all", "containing", "before", "ids"],
)
def test_every_forget_takes_the_personal_model_with_it(models, store_path, tmp_path, forget):
    keep(models, 3, b"w")
    with ExampleStore(store_path) as store:
        forget(store)
    assert files(tmp_path) == []


def test_a_store_that_is_removed_unread_takes_it_too(models, store_path, tmp_path):
    keep(models, 3, b"w")
    ExampleStore.remove(store_path)
    assert files(tmp_path) == []


def test_every_forget_takes_a_training_that_is_suspended_with_it(models, store_path, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("7.checkpoint", ".8.checkpoint.part", "notes"):
        (folder / name).write_bytes(b"learned")
    with ExampleStore(store_path) as store:
        store.forget_ids([99])
    assert [path.name for path in folder.iterdir()] == ["notes"]


def strangers(folder: Path) -> list[Path]:
    """Files of others, with names as ours or nearly."""
    found = [folder / "personal.json", folder / "models" / "personal-report.txt"]
    found += [folder / "models" / "personal-1-0123abcd.onnx", folder / "checkpoint/1.checkpoint"]
    for path in found:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    return found


def test_a_forget_deletes_nothing_where_no_agent_has_its_state(tmp_path):
    found = strangers(tmp_path)
    with ExampleStore(tmp_path / FILE_NAME) as store:
        store.add("see you soon")
        store.forget_all()
    ExampleStore.remove(tmp_path / FILE_NAME)
    assert [path for path in found if not path.exists()] == []


def test_a_forget_in_an_agent_s_folder_deletes_nothing_that_is_not_named_as_the_agent_s(
    models, store_path, tmp_path
):
    strangers(tmp_path)
    with ExampleStore(store_path) as store:
        store.forget_all()
    assert files(tmp_path) == ["personal-report.txt"]


def test_a_forget_that_cannot_remove_the_model_forgets_nothing_and_says_so(
    models, store_path, monkeypatch
):
    keep(models, 3, b"w")

    def read_only(path, *, dir_fd=None):
        raise OSError(30, "Read-only file system")

    with ExampleStore(store_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", read_only)
            with pytest.raises(StoreUnavailable, match="Read-only"):
                store.forget_containing("secret")
        assert len(store.last(10)) == 2


def test_the_command_leaves_no_personal_model(models, store_path, tmp_path):
    keep(models, 3, b"w")
    (tmp_path / "agent.toml").write_text('population = "p"\ndevice = "d"\nstate_dir = "."\n')
    command = (sys.executable, "-m", "fedge.edge_agent", "examples", "forget")
    done = subprocess.run(
        [*command, "--containing", "secret", "--config", str(tmp_path / "agent.toml")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "1 forgotten" in done.stdout
    assert files(tmp_path) == []


def written(store_path: Path, generation: int | None, path: Path) -> None:
    data = DataConfig(path=store_path)
    write_unless_forgotten(data, DEFAULT_LIMITS, generation, {path: b"learned"})
    assert path.stat().st_mode & 0o077 == 0


def test_what_was_learned_from_a_forgotten_text_is_not_written(store_path, tmp_path):
    path = tmp_path / "models" / ".personal-3-0123abcd.onnx.part"
    with ExampleStore(store_path) as store:
        generation = store.generation()
        written(store_path, generation, path)
        assert path.read_bytes() == b"learned"
        store.forget_containing("secret")
        assert not path.exists()
        with pytest.raises(ForgottenMeanwhile):
            written(store_path, generation, path)
        assert not path.exists()
        written(store_path, store.generation(), path)
    # Other data cannot be forgotten.
    written(tmp_path / "data.npz", None, path)
    assert path.exists()


def test_a_forget_waits_until_what_is_being_written_is_there_to_be_removed(store_path, tmp_path):
    """The moment between the look at the generation and the file."""
    path = tmp_path / "models" / ".personal-3-0123abcd.onnx.part"
    with ExampleStore(store_path) as store:
        generation = store.generation()

    def forget() -> None:
        with ExampleStore(store_path) as other:
            other.forget_containing("secret")

    forgetting = threading.Thread(target=forget)
    with nothing_forgotten(DataConfig(path=store_path), DEFAULT_LIMITS, generation):
        forgetting.start()
        forgetting.join(timeout=0.3)
        assert forgetting.is_alive()
        path.write_bytes(b"learned")
    forgetting.join(timeout=30)
    assert not forgetting.is_alive()
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    with small_disk(tmp_path / "disk", 128 * 1024) as disk:
        disk.fill(leave_bytes=8192)
        written_to = [disk.folder / "a", disk.folder / "b"]
        before = sorted(path.name for path in disk.folder.iterdir())
        with pytest.raises(StoreUnavailable, match="No space left"):
            write_unless_forgotten(
                DataConfig(path=tmp_path / "data.npz"), None, None,
                dict(zip(written_to, (b"small", b"x" * 100_000), strict=True)),
            )  # fmt: skip
        assert sorted(path.name for path in disk.folder.iterdir()) == before


# ---------------------------------------------------------------- what answers


def active_library(folder: Path, version: int) -> Library:
    library = Library(folder)
    (folder / "models" / f"model-{version}.onnx").write_bytes(b"common")
    (folder / "active.json").write_text(
        f'{{"version": {version}, "plan_sha256": "{PLAN}", "model": "model-{version}.onnx", '
        f'"model_sha256": "{"0" * 64}"}}'
    )
    return library


def test_the_personal_model_of_the_version_in_use_answers(tmp_path):
    library = active_library(tmp_path, 3)
    common = library.active()
    assert library.serving() == common
    keep(library.personal, 3, b"w")
    serving = library.serving()
    assert serving is not None
    assert common is not None
    assert (serving.personal, serving.version) == (True, 3)
    assert serving.model == library.personal.model_of(3, PLAN)
    assert serving.manifest == common.manifest
    # What others are made from is the version itself.
    assert library.active() == common


def test_a_new_version_answers_itself_until_it_has_a_personal_model(tmp_path):
    keep(active_library(tmp_path, 3).personal, 3, b"w")
    library = active_library(tmp_path, 4)
    assert library.serving() == library.active()
    keep(library.personal, 4, b"w4")
    serving = library.serving()
    assert serving is not None
    assert serving.personal
