"""The real coordinator, whose every version has other bytes although nobody trains.

Blobs are named by their content, so a version that equals the last one is not fetched again. To
measure what a round moves without training, the server optimizer here adds a little seeded noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedge.coordinator import serving
from fedge.coordinator.cli import main
from fedge.coordinator.server_optimizer import Float64, Moments, Rule, ServerOptimizer
from fedge.schemas.plan import WeightSpec

_rng = np.random.default_rng(0)


def _noise(delta: Float64, _moments: Moments) -> tuple[Float64, Moments]:
    # One random number for the whole tensor: other bytes everywhere, at the cost of an addition.
    return delta + 1e-4 * _rng.standard_normal(), {}


def _perturbing(_config: object, specs: Sequence[WeightSpec]) -> ServerOptimizer:
    return ServerOptimizer(tuple(specs), Rule({}, _noise))


serving.server_optimizer = _perturbing  # type: ignore[assignment] # this is the benchmark's point
main()
