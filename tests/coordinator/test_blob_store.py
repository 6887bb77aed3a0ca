"""Blobs in another place: safe there, cached here, believed only after hashing."""

from __future__ import annotations

import itertools
import time
from importlib.util import find_spec

import fsspec
import pytest

from fedge.coordinator.store import Retention, Store
from fedge.coordinator.store.blobs import Blobs
from fedge.coordinator.store.remote_blobs import RemoteBlobs
from fedge.schemas.blob_files import BlobDirectory, read_chunk
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ConfigError, PeerError, StoreError, StoreUnavailable
from fedge.schemas.ids import sha256
from tests.coordinator.states import closed_round, put, put_plan, put_version

DATA = b"the weights of a version"
_PLACES = itertools.count()


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path / 'elsewhere'}"
    return f"memory://bucket-{next(_PLACES)}/blobs"


@pytest.fixture
def there(url):
    """The other place as its owner sees it: name → bytes."""
    place, root = fsspec.core.url_to_fs(url)

    class There:
        def __getitem__(self, name):
            return place.cat_file(f"{root}/{name}")

        def __setitem__(self, name, data):
            place.pipe_file(f"{root}/{name}", data)

        def names(self):
            return {path.rpartition("/")[2] for path in place.ls(root, detail=False)}

        def delete(self, name):
            place.rm_file(f"{root}/{name}")

    return There()


@pytest.fixture
def blobs(tmp_path, url):
    return RemoteBlobs(tmp_path / "cache", url)


def wipe(blobs):
    for path in blobs.folder.iterdir():
        path.unlink()


def test_a_blob_lies_in_the_other_place_when_it_was_put(blobs, there):
    blobs.put(DATA)
    assert there[sha256(DATA)] == DATA
    assert blobs.has(sha256(DATA))
    assert set(blobs.digests()) == {sha256(DATA)}
    assert blobs.path(sha256(DATA)).read_bytes() == DATA


def test_a_wiped_cache_is_filled_again(blobs, url, tmp_path):
    blobs.put(DATA)
    wipe(blobs)
    assert blobs.read(sha256(DATA)) == DATA
    wipe(blobs)
    # The publisher reads chunks of the file.
    ref = describe(DATA)
    assert read_chunk(blobs.path(ref.sha256), ref, 0) == DATA
    other = RemoteBlobs(tmp_path / "another computer", url)
    assert other.path(sha256(DATA)).read_bytes() == DATA


def test_a_damaged_copy_is_fetched_again(blobs, url):
    blobs.put(DATA)
    (blobs.folder / sha256(DATA)).write_bytes(b"damaged")
    assert blobs.read(sha256(DATA)) == DATA
    (blobs.folder / sha256(DATA)).write_bytes(b"damaged")
    # A process that has not seen it whole does not trust the file for its name.
    assert RemoteBlobs(blobs.folder, url).path(sha256(DATA)).read_bytes() == DATA


def test_a_damaged_blob_in_the_other_place_is_never_believed(blobs, there):
    blobs.put(DATA)
    there[sha256(DATA)] = b"not the weights"
    with pytest.raises(StoreError, match="another digest"):
        blobs.verify(sha256(DATA))
    assert blobs.read(sha256(DATA)) == DATA  # the copy here is whole
    wipe(blobs)
    for ask in (blobs.read, blobs.path):
        with pytest.raises(StoreError, match="another digest"):
            ask(sha256(DATA))
    assert list(blobs.folder.iterdir()) == []
    blobs.put(DATA)
    blobs.verify(sha256(DATA))


def test_a_blob_that_is_nowhere_is_missing_and_not_unavailable(blobs):
    for ask in (blobs.read, blobs.path, blobs.verify):
        with pytest.raises(StoreError, match="does not have it") as refused:
            ask("0" * 64)
        assert not isinstance(refused.value, StoreUnavailable)
    assert not blobs.has("0" * 64)
    blobs.delete("0" * 64)
    assert blobs.discard("0" * 64) == 0


def test_a_name_that_is_no_digest_is_refused(blobs):
    with pytest.raises(PeerError):
        blobs.read("../owner")


def test_what_is_deleted_is_gone_from_both(blobs, there):
    for data in (DATA, b"another"):
        blobs.put(data)
    blobs.delete(sha256(DATA))
    assert there.names() == {sha256(b"another")}
    assert not (blobs.folder / sha256(DATA)).exists()
    with pytest.raises(StoreError):
        blobs.read(sha256(DATA))


def test_what_another_process_wrote_here_is_made_safe(blobs, there):
    BlobDirectory(blobs.folder).put(DATA)
    assert not blobs.has(sha256(DATA))
    blobs.secure([sha256(DATA), "0" * 64])
    assert there[sha256(DATA)] == DATA


def test_a_place_that_cannot_be_reached_is_a_state_that_passes(blobs, monkeypatch):
    blobs.put(DATA)

    def no_network(*_arguments, **_options):
        raise ConnectionResetError("no network")

    for name in ("cat_file", "pipe_file", "exists", "ls", "info", "rm_file"):
        monkeypatch.setattr(blobs._place, name, no_network, raising=True)
    wipe(blobs)
    asked = [blobs.read, blobs.path, blobs.has, blobs.describe, blobs.delete]
    for ask in asked:
        with pytest.raises(StoreUnavailable, match="no network"):
            ask(sha256(DATA))
    with pytest.raises(StoreUnavailable, match="no network"):
        blobs.digests()


def test_a_put_that_did_not_reach_the_other_place_is_no_put(tmp_path, monkeypatch):
    blobs = RemoteBlobs(tmp_path / "cache", f"memory://bucket-{next(_PLACES)}/blobs")

    def no_network(*_arguments, **_options):
        raise TimeoutError("no network")

    with monkeypatch.context() as cut:
        cut.setattr(blobs._place, "pipe_file", no_network)
        with pytest.raises(StoreUnavailable):
            blobs.put(DATA)
    assert not blobs.has(sha256(DATA))
    blobs.put(DATA)
    blobs.verify(sha256(DATA))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        pytest.param(
            *("s3://bucket/blobs", "s3fs"),
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
        ("nowhere://x", "Protocol not known: nowhere"),
    ],
)
def test_a_missing_driver_is_a_setting_to_change(tmp_path, url, said):
    with pytest.raises(ConfigError, match=said):
        RemoteBlobs(tmp_path, url)


def test_files_in_the_state_folder_are_as_they_were(tmp_path):
    blobs = Blobs(tmp_path)
    blobs.put(DATA)
    assert (tmp_path / sha256(DATA)).read_bytes() == DATA
    assert blobs.path("0" * 64) == tmp_path / ("0" * 64)
    with pytest.raises(StoreError):
        blobs.read("0" * 64)


# ---------------------------------------------------------------- the store with such blobs


@pytest.fixture
def where(tmp_path, url):
    return {"state_dir": tmp_path / "state", "blobs": url}


def test_a_state_is_served_from_the_other_place_alone(where, there, tmp_path):
    with Store.open(**where, create=True, serve=True) as store:
        plan = put_plan(store)
        put_version(store, plan, 0)
        closed_round(store, plan, 1)
        names = set(store.named_blobs())
    assert there.names() == names | {"owner"}
    for path in (where["state_dir"] / "blobs").iterdir():
        path.unlink()
    with Store.open(**where, serve=True) as store:
        assert set(store.named_blobs()) == names
        for digest in names:
            store.blobs.verify(digest)


def test_the_blobs_of_a_state_move_when_a_place_is_named(where, there):
    with Store.open(where["state_dir"], create=True, serve=True) as store:
        plan = put_plan(store)
        put_version(store, plan, 0)
        names = set(store.named_blobs())
        put(store, b"a leftover")
    with Store.open(**where, serve=True) as store:
        assert there.names() == names | {"owner"}
        assert set(store.named_blobs()) == names


def test_another_states_place_is_refused(where, tmp_path):
    Store.open(**where, create=True, serve=True).close()
    with pytest.raises(ConfigError, match="belongs to another coordinator's state"):
        Store.open(tmp_path / "other", blobs=where["blobs"], create=True, serve=True)
    # What was taken on the way is free again.
    Store.open(tmp_path / "other", serve=True).close()
    Store.open(**where, serve=True).close()


def test_retention_deletes_there_what_it_deletes_here(where, there):
    with Store.open(**where, create=True, serve=True) as store:
        plan = put_plan(store)
        put_version(store, plan, 0)
        for number in (1, 2, 3):
            closed_round(store, plan, number)
        old = {store.version(0).weights.sha256, store.version(1).weights.sha256}
        assert old <= there.names()
    with Store.open(**where, serve=True) as store:
        collected = store.collect(Retention(versions=2), now=time.time())
        assert (collected.versions, collected.blobs) == (2, 6)
        assert collected.bytes_freed > 2000
        assert not old & there.names()
        assert there.names() == set(store.named_blobs()) | {"owner"}
