"""Room in the cache for a version that is measured: never at the cost of what a round needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.edge_agent.cache import CacheTooSmall
from fedge.edge_agent.library import Library
from tests.edge_agent.test_cache import PLAN, WEIGHTS_BYTES, announcement, blob, put

PLAN_BYTES = sum(
    len(data) for data in (PLAN.manifest.encode(), PLAN.train, PLAN.infer, PLAN.golden)
)
VERSION_BYTES = WEIGHTS_BYTES + 1000
MEASURED_BYTES = WEIGHTS_BYTES + len(PLAN.eval)


def measuring(library: Library, number: int) -> tuple[str, str]:
    """Everything to measure that version with is here: its weights and the graph."""
    version, graph = announcement(number), PLAN.manifest.graphs.eval
    library.make_room_to_measure((version.plan, graph, version.weights), announcement(5))
    library.blobs.put(PLAN.eval)
    library.blobs.put(blob(number, "weights", WEIGHTS_BYTES))
    return version.weights.sha256, graph.sha256


def test_what_is_measured_stays_while_a_version_is_fetched_if_both_fit(tmp_path: Path) -> None:
    library = Library(tmp_path, PLAN_BYTES + 2 * VERSION_BYTES + MEASURED_BYTES)
    put(library, 5)
    weights, graph = measuring(library, 2)
    library.make_room(announcement(6), announcement(5))
    assert library.blobs.has(weights)
    assert library.blobs.has(graph)


def test_a_version_that_is_fetched_takes_the_room_of_what_is_measured(tmp_path: Path) -> None:
    library = Library(tmp_path, PLAN_BYTES + 2 * VERSION_BYTES + len(PLAN.eval))
    put(library, 5)
    weights, graph = measuring(library, 2)
    library.make_room(announcement(6), announcement(5))
    assert library.holds(announcement(5))
    assert not library.blobs.has(weights)
    # The small graph is of use to the next version, too.
    assert library.blobs.has(graph)


def test_a_version_is_not_measured_where_it_does_not_fit_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    library = Library(tmp_path, PLAN_BYTES + VERSION_BYTES + MEASURED_BYTES - 1)
    put(library, 5)
    with pytest.raises(CacheTooSmall, match="to be measured") as error:
        measuring(library, 2)
    assert error.value.need_bytes == error.value.limit_bytes + 1
    assert library.holds(announcement(5))


def test_what_nobody_needs_makes_room_for_what_is_measured(tmp_path: Path) -> None:
    library = Library(tmp_path, PLAN_BYTES + VERSION_BYTES + MEASURED_BYTES)
    put(library, 4)
    put(library, 5)
    measuring(library, 2)
    assert library.holds(announcement(5))
    assert not library.blobs.has(announcement(4).weights.sha256)


def test_afterwards_the_weights_go_and_what_is_in_hand_stays(tmp_path: Path) -> None:
    library = Library(tmp_path)
    put(library, 5)
    weights, graph = measuring(library, 2)
    library.stop_measuring(announcement(5))
    assert not library.blobs.has(weights)
    assert library.blobs.has(graph)
    measuring(library, 5)
    library.stop_measuring(announcement(5))
    assert library.holds(announcement(5))
