"""The cache limit: what works stays, what is wanted fits, and all the rest goes first."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.cache import CacheTooSmall, superfluous
from fedge.edge_agent.library import Library
from fedge.schemas.blobs import BlobRef, chunks_of, describe
from fedge.schemas.errors import StoreError
from fedge.schemas.messages import VersionAnnouncement
from tests.edge_agent.plans import HandMadePlan, linear_plan

PLAN = linear_plan()
WEIGHTS_BYTES = 20_000

sizes = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 100))


@given(present=sizes, needed=sizes, limit=st.none() | st.integers(1, 800))
def test_what_is_needed_never_goes_and_all_of_it_fits_in_the_end(present, needed, limit) -> None:
    present = {name: needed.get(name, size) for name, size in present.items()}
    if limit is not None and sum(needed.values()) > limit:
        with pytest.raises(CacheTooSmall) as error:
            superfluous(present, needed, limit, "both")
        assert error.value.need_bytes == sum(needed.values())
        assert error.value.limit_bytes == limit
        return
    gone = superfluous(present, needed, limit, "both")
    assert gone.isdisjoint(needed)
    after = {name: size for name, size in present.items() if name not in gone} | needed
    assert limit is None or sum(after.values()) <= limit


def blob(number: int, what: str, size_bytes: int) -> bytes:
    return f"{what} of version {number} ".encode().ljust(size_bytes, b".")


def announcement(number: int, plan: HandMadePlan = PLAN) -> VersionAnnouncement:
    return VersionAnnouncement(
        number=number,
        plan=describe(plan.manifest.encode(), 1024),
        weights=describe(blob(number, "weights", WEIGHTS_BYTES), 1024),
        golden=describe(blob(number, "golden", 1000), 1024),
        model_sha256="0" * 64,
        model_bytes=1,
    )


def put(library: Library, number: int) -> VersionAnnouncement:
    """A version that is here in full."""
    for data in (PLAN.manifest.encode(), PLAN.train, PLAN.infer, PLAN.golden):
        library.blobs.put(data)
    library.blobs.put(blob(number, "weights", WEIGHTS_BYTES))
    library.blobs.put(blob(number, "golden", 1000))
    assert library.holds(announcement(number))
    return announcement(number)


def begin(library: Library, ref: BlobRef, data: bytes) -> None:
    """Half of a blob that is arriving."""
    with library.blobs.open_partial(ref) as part:
        for index, chunk in enumerate(chunks_of(data, ref.chunk_bytes)):
            if index < ref.chunk_count // 2:
                part.receiver.receive(index, bytes(chunk))


def used_bytes(library: Library) -> int:
    return sum(path.stat().st_size for path in library.blobs.folder.iterdir())


def size_of(*versions: VersionAnnouncement) -> int:
    """All blobs of these versions of the plan, each once."""
    graphs = PLAN.manifest.graphs
    refs = {graphs.train, graphs.infer, PLAN.manifest.golden}
    return sum(
        {r.sha256: r.size_bytes for v in versions for r in (*refs, v.plan, v.weights, v.golden)}
        .values()
    )  # fmt: skip


def test_older_versions_and_leftover_parts_go_and_what_two_versions_share_stays(tmp_path) -> None:
    library = Library(tmp_path, size_of(announcement(3), announcement(4)))
    for number in (1, 2):
        put(library, number)
    held = put(library, 3)
    given_up = announcement(9).weights
    begin(library, given_up, blob(9, "weights", WEIGHTS_BYTES))
    wanted = announcement(4)
    begin(library, wanted.weights, blob(4, "weights", WEIGHTS_BYTES))
    library.make_room(wanted, held)
    assert library.holds(held)
    assert not library.blobs.has(announcement(2).weights.sha256)
    names = {path.name for path in library.blobs.folder.iterdir()}
    assert given_up.sha256 + ".part" not in names
    assert wanted.weights.sha256 + ".part" in names
    assert used_bytes(library) <= size_of(held, wanted)
    put(library, 4)
    (library.blobs.folder / (wanted.weights.sha256 + ".part")).unlink()
    assert used_bytes(library) == size_of(held, wanted)


def test_two_versions_that_do_not_fit_are_refused_and_what_works_is_untouched(tmp_path) -> None:
    need_bytes = size_of(announcement(3), announcement(4))
    library = Library(tmp_path, need_bytes - 1)
    held = put(library, 3)
    with pytest.raises(CacheTooSmall) as error:
        library.make_room(announcement(4), held)
    assert isinstance(error.value, StoreError)
    assert f"need {need_bytes} bytes" in str(error.value)
    assert f"cache_limit_bytes is {need_bytes - 1}" in str(error.value)
    assert library.holds(held)


def test_the_first_version_must_fit_by_itself(tmp_path) -> None:
    library = Library(tmp_path, 10_000)
    with pytest.raises(CacheTooSmall, match="10000"):
        library.make_room(announcement(1), None)
    Library(tmp_path, 25_000).make_room(announcement(1), None)


def test_the_plan_of_the_version_in_use_stays_for_predictions(tmp_path) -> None:
    library = Library(tmp_path)
    used = put(library, 1)
    (tmp_path / "models" / "model-1.onnx").write_bytes(b"model")
    library.activate(used)
    other = VersionAnnouncement.model_validate(
        announcement(2).model_dump() | {"plan": describe(b"another plan").model_dump()}
    )
    library.make_room(other, None)
    assert set(library.blobs.digests()) == {used.plan.sha256}
    active = library.active()
    assert active is not None
    assert active.manifest.is_file()


def test_a_blob_that_was_cut_short_is_not_held_and_is_removed(tmp_path) -> None:
    library = Library(tmp_path)
    version = put(library, 1)
    path = library.blobs.path(version.weights.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    assert not library.holds(version)
    assert not path.exists()


def test_a_manifest_that_rotted_is_removed_so_that_it_is_fetched_again(tmp_path) -> None:
    library = Library(tmp_path)
    version = put(library, 1)
    path = library.blobs.path(version.plan.sha256)
    path.write_bytes(path.read_bytes().replace(b"w", b"v"))
    with pytest.raises(StoreError, match="another digest"):
        library.holds(version)
    assert not library.blobs.has(version.plan.sha256)
    library.blobs.put(PLAN.manifest.encode())
    assert library.holds(version)


def test_the_sweep_leaves_the_model_in_use_and_the_one_before_it(tmp_path) -> None:
    library = Library(tmp_path)
    models = tmp_path / "models"
    for number in (3, 7, 8, 11):
        (models / f"model-{number}.onnx").write_bytes(b"model")
    (models / ".model-9.onnx.part").write_bytes(b"half")
    (tmp_path / ".active.json.part").write_bytes(b"half")
    (library.blobs.folder / ("0" * 32 + ".tmp")).write_bytes(b"half")
    library.activate(announcement(8))
    for number in (3, 7, 11):
        (models / f"model-{number}.onnx").write_bytes(b"model")
    library.sweep()
    assert {path.name for path in models.iterdir()} == {"model-7.onnx", "model-8.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == {"active.json", "blobs", "models"}
    assert list(library.blobs.folder.iterdir()) == []


def test_a_record_of_a_model_that_is_gone_or_damaged_is_told(tmp_path) -> None:
    library = Library(tmp_path)
    (tmp_path / "models" / "model-8.onnx").write_bytes(b"model")
    library.activate(announcement(8))
    (tmp_path / "models" / "model-8.onnx").unlink()
    with pytest.raises(StoreError, match=r"model-8\.onnx, which is gone"):
        library.active()
    (tmp_path / "active.json").write_text('{"version": 8')
    with pytest.raises(StoreError, match="cannot be read"):
        library.active()
    library.sweep()
    # It is put into use anew over the damaged record.
    (tmp_path / "models" / "model-8.onnx").write_bytes(b"model")
    library.activate(announcement(8))
    assert library.active().version == 8


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(StoreError, match="Not a directory"):
        Library(tmp_path / "state")
