"""Apps give texts over a real socket and take them back; what is answered is so on the disk."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from fedge.edge_agent import example_store
from fedge.edge_agent.example_store import FILE_NAME, ExampleStore
from fedge.edge_agent.example_text import Split
from tests.edge_agent.app_clients import Service, running_service
from tests.edge_agent.quick_disk import quick_folder
from tests.edge_agent.small_disks import small_disk

EXAMPLES = "/v1/examples"
TYPED_AT = time.time() - 100


@pytest.fixture
def service() -> Iterator[Service]:
    with quick_folder() as folder, running_service(folder) as made:
        yield made


def store_of(service: Service) -> ExampleStore:
    return ExampleStore(service.settings.state_dir / FILE_NAME, service.settings.examples.limits)


def kept(service: Service) -> list[tuple[int, str]]:
    with store_of(service) as store:
        return [(one.id, one.text) for one in store.last(100)]


def test_what_was_answered_is_on_the_disk(service: Service) -> None:
    reply = service.ask("POST", EXAMPLES, {"texts": ["On my way home", "See you  soon "]})
    assert reply.status == 201
    first, second = reply.json["ids"]
    assert kept(service) == [(first, "On my way home"), (second, "See you  soon")]
    assert service.changes == 1


def test_a_text_may_say_when_it_was_typed(service: Service) -> None:
    at = time.time() - 3600
    [number] = service.ask("POST", EXAMPLES, {"text": "An hour ago", "at": at}).json["ids"]
    with store_of(service) as store:
        [one] = store.last(1)
    assert (one.id, one.at) == (number, at)


def test_what_was_typed_too_long_ago_is_answered_with_null(service: Service) -> None:
    reply = service.ask("POST", EXAMPLES, {"text": "long ago", "at": time.time() - 40 * 86_400})
    assert (reply.status, reply.json) == (201, {"ids": [None]})
    assert kept(service) == []


def test_of_texts_with_one_that_cannot_be_kept_none_is(service: Service) -> None:
    reply = service.ask("POST", EXAMPLES, {"texts": ["my secret", "\u0007 "]})
    assert (reply.status, reply.code) == (422, "text_refused")
    assert "text 2" in reply.json["error"]["message"]
    assert "secret" not in reply.body.decode()
    assert kept(service) == []
    assert service.changes == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"text": "a", "texts": ["b"]}, "exactly one of texts, text"),
        ({}, "exactly one of texts, text"),
        ({"text": None}, "exactly one of texts, text"),
        ({"texts": []}, "texts: List should have at least 1 item"),
        ({"texts": ["a", 3]}, "texts.1: Input should be a valid string"),
        ({"text": 3}, "text: Input should be a valid string"),
        ({"texts": ["a"], "at": 5}, "`at` goes with `text`"),
        ({"text": "a", "at": "5"}, "at: Input should be a valid number"),
        ({"text": "a", "at": -1}, "at: Input should be greater"),
        ({"text": "a", "when": 5}, "when: Extra inputs are not permitted"),
        (["a"], "Input should be an object"),
    ],
)
def test_what_is_wrong_with_a_request_is_named_and_nothing_is_kept(
    service: Service, asked: object, words: str
) -> None:
    reply = service.ask("POST", EXAMPLES, asked)
    assert (reply.status, reply.code) == (422, "invalid_request")
    assert words in reply.json["error"]["message"]
    assert kept(service) == []


def test_what_somebody_typed_is_in_no_error(service: Service) -> None:
    reply = service.ask("POST", EXAMPLES, {"texts": ["hunter2"], "at": "hunter2"})
    assert reply.status == 422
    assert "hunter2" not in reply.body.decode()


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"containing": "WAY  home"}, ["soon", "later"]),
        ({"before": TYPED_AT + 1.0}, ["later"]),
        ({"all": True}, []),
    ],
    ids=["containing", "before", "all"],
)
def test_forgotten_texts_are_gone(service: Service, asked: object, left: list[str]) -> None:
    for text, at in (("On my way home", 0.0), ("soon", 0.5), ("later", 1.5)):
        service.ask("POST", EXAMPLES, {"text": text, "at": TYPED_AT + at})
    generation = service.ask("GET", f"{EXAMPLES}/count").json["generation"]
    reply = service.ask("DELETE", EXAMPLES, asked)
    assert reply.status == 200
    assert reply.json == {
        "examples": 3 - len(left), "generation": generation + 1, "erased": True
    }  # fmt: skip
    assert [text for _, text in kept(service)] == left
    files = service.settings.state_dir.glob("examples.sqlite*")
    assert not any(b"way home" in path.read_bytes() for path in files)
    assert service.changes == 4


def test_texts_are_forgotten_by_their_ids_and_unknown_ids_are_no_error(service: Service) -> None:
    ids = service.ask("POST", EXAMPLES, {"texts": ["one", "two", "three"]}).json["ids"]
    reply = service.ask("DELETE", EXAMPLES, {"ids": [ids[0], ids[2], 10**15]})
    assert reply.json["examples"] == 2
    assert kept(service) == [(ids[1], "two")]


@pytest.mark.parametrize(
    "asked", [{}, {"all": False}, {"ids": []}, {"ids": [0]}, {"all": True, "ids": [1]}, {"ids": 1}]
)
def test_a_wish_to_forget_that_is_not_clear_forgets_nothing(
    service: Service, asked: object
) -> None:
    service.ask("POST", EXAMPLES, {"texts": ["one"]})
    assert service.ask("DELETE", EXAMPLES, asked).status == 422
    assert service.ask("DELETE", EXAMPLES).status == 411
    assert len(kept(service)) == 1


def test_the_count_is_the_stores_own(service: Service) -> None:
    texts = [f"text {number}" for number in range(40)]
    service.ask("POST", EXAMPLES, {"texts": texts})
    reply = service.ask("GET", f"{EXAMPLES}/count")
    with store_of(service) as store:
        assert reply.json == asdict(store.count())
        held_out = [one.text for one in store.read(Split.HOLD_OUT)]
    assert reply.json["training"]["examples"] + len(held_out) == 40


def test_a_disk_that_cannot_be_used_is_said_and_nothing_is_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_store, "_BUSY_S", 0.05)
    service.ask("POST", EXAMPLES, {"text": "before"})
    path = service.settings.state_dir / FILE_NAME
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        reply = service.ask("POST", EXAMPLES, {"text": "meanwhile"})
    assert (reply.status, reply.code) == (503, "store_unavailable")
    assert int(reply.headers["Retry-After"]) > 0
    assert [text for _, text in kept(service)] == ["before"]
    assert service.ask("POST", EXAMPLES, {"text": "after"}).status == 201


def test_a_full_disk_is_said_and_apps_are_served_again_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 600_000) as disk, running_service(disk.folder) as service:
        assert service.ask("POST", EXAMPLES, {"text": "before"}).status == 201
        disk.fill()
        texts = [f"{number} is said at length, over and over again. " * 40 for number in range(20)]
        reply = service.ask("POST", EXAMPLES, {"texts": texts})
        assert (reply.status, reply.code) == (503, "store_unavailable")
        assert service.ask("GET", "/v1/status").status == 200
        disk.empty()
        assert service.ask("POST", EXAMPLES, {"text": "after"}).status == 201
        assert [text for _, text in kept(service)] == ["before", "after"]


def test_a_store_that_is_damaged_is_the_agents_failure_and_the_rest_goes_on(
    service: Service,
) -> None:
    (service.settings.state_dir / FILE_NAME).write_bytes(b"no database" * 1000)
    reply = service.ask("POST", EXAMPLES, {"text": "a"})
    assert (reply.status, reply.code) == (500, "failed")
    status = service.ask("GET", "/v1/status")
    assert (status.status, status.json["kept"]) == (200, None)


def test_everything_of_a_store_that_is_damaged_can_be_forgotten(service: Service) -> None:
    service.ask("POST", EXAMPLES, {"text": "hunter2"})
    path = service.settings.state_dir / FILE_NAME
    path.write_bytes(b"no database, hunter2 " * 1000)
    assert service.ask("DELETE", EXAMPLES, {"containing": "hunter2"}).status == 500
    assert b"hunter2" in path.read_bytes()
    reply = service.ask("DELETE", EXAMPLES, {"all": True})
    assert (reply.status, reply.json["erased"]) == (200, True)
    files = service.settings.state_dir.glob("examples.sqlite*")
    assert not any(b"hunter2" in file.read_bytes() for file in files)
    assert service.ask("POST", EXAMPLES, {"text": "after"}).status == 201
    assert [text for _, text in kept(service)] == ["after"]


@pytest.mark.parametrize(
    ("data", "warned"),
    [
        ({"path": "state/examples.sqlite"}, False),
        ({"path": "other/examples.sqlite"}, True),
        ({"path": "texts.jsonl"}, True),
        (None, True),
    ],
    ids=["its store", "another store", "a file", "none"],
)
def test_that_texts_are_not_trained_on_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: dict[str, str] | None, warned: bool
) -> None:
    more = {} if data is None else {"data": {"path": tmp_path / data["path"]}}
    with running_service(tmp_path, **more):
        said = [one.message for one in caplog.records]
    assert said.count("texts_not_trained_on") == warned


def test_a_share_to_hold_out_that_is_not_the_files_is_said(service: Service) -> None:
    with ExampleStore(service.settings.state_dir / FILE_NAME, _other_share()) as store:
        store.add("held out in another way")
    reply = service.ask("POST", EXAMPLES, {"text": "a"})
    assert (reply.status, reply.code) == (500, "misconfigured")
    assert "hold_out" in reply.json["error"]["message"]


def _other_share() -> example_store.ExampleLimits:
    return example_store.ExampleLimits(hold_out=0.5)


def test_many_apps_at_once_lose_nothing(service: Service) -> None:
    def add(number: int) -> list[int]:
        ids: list[int] = service.ask(
            "POST", EXAMPLES, {"texts": [f"app {number} says {n}" for n in range(5)]}
        ).json["ids"]
        return ids

    with ThreadPoolExecutor(8) as pool:
        ids = [number for found in pool.map(add, range(24)) for number in found]
    with store_of(service) as store:
        counts = store.count()
    assert counts.training.examples + counts.hold_out.examples == len(set(ids)) == 120
