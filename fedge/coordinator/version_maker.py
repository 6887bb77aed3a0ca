"""Making versions: the initial weights or a mean of updates in, a stored and checked version out.

Runs on a thread of its own; it holds the newest weights in memory and nothing else of the model.
A version exists for others only when the service has recorded it: until then this module has
written blobs, which nobody names yet, and changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedge.coordinator.aggregation import AcceptedUpdate, Weighting, aggregate
from fedge.coordinator.server_optimizer import ServerOptimizer
from fedge.coordinator.store import VersionRecord
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.plan import PlanManifest
from fedge.schemas.tensors import Array, Tensors, encode_tensors, read_tensors

if TYPE_CHECKING:
    from fedge.coordinator.release import Release  # imports torch, which a restart does without

    Build = Callable[[Tensors], Release]


class VersionMaker:
    """Makes versions of one plan. Used by one thread at a time.

    `build`: exports weights and checks the result, see `Releaser.build`. `initial`: the weights of
    version 0, empty where there is a version.
    """

    def __init__(
        self,
        *,
        blobs: BlobDirectory,
        manifest: PlanManifest,
        plan_sha256: Digest,
        build: Build,
        optimizer: ServerOptimizer,
        initial: Tensors,
        weighting: Weighting = Weighting.EXAMPLES,
    ) -> None:
        self._blobs = blobs
        self._manifest = manifest
        self._plan_sha256 = plan_sha256
        self._build = build
        self._optimizer = optimizer
        self._weights = initial
        self._weighting = weighting
        self._weights_of = 0
        self._made: Tensors = {}
        self._made_number = 0

    def make_first(self, now: float) -> VersionRecord:
        """Version 0, of the initial weights. Raises `ParityFailed` if they fail the gate."""
        return self._store(0, self._weights, now, server_state=None)

    def adopt(self, version: VersionRecord) -> None:
        """Continues from `version`.

        Raises `StoreError` or `PeerError` for damaged weights, `ConfigError` if another server
        optimizer made it: better told at the start than at the end of a round.
        """
        self._optimizer.check(self._server_state(version))
        self._weights = read_tensors(
            self._blobs.path(version.weights.sha256), self._manifest.weight_specs
        )
        self._weights_of = version.number

    def make_next(
        self,
        base: VersionRecord,
        round_number: int,
        updates: Sequence[AcceptedUpdate],
        now: float,
    ) -> VersionRecord:
        """The version after `base`, from the updates in order.

        Raises `ParityFailed` if the export fails the gate, `PeerError` for a damaged update,
        `ValueError` if there are no updates.
        """
        if self._weights_of != base.number:
            # A rollback that was seen and not taken up yet: its weights are the base, not ours.
            self.adopt(base)
        mean = aggregate(updates, self._manifest.update_specs, weighting=self._weighting)
        weights, state = self._optimizer.apply(self._weights, mean, self._server_state(base))
        del mean
        self._made, self._made_number = weights, base.number + 1
        return self._store(
            base.number + 1,
            weights,
            now,
            base=base.number,
            round_number=round_number,
            server_state=self._put(encode_tensors(state)) if state else None,
        )

    def commit(self) -> None:
        """Continues from the version that was made last: it is recorded now."""
        self._weights, self._made = self._made, {}
        self._weights_of = self._made_number

    def _server_state(self, base: VersionRecord) -> Mapping[str, Array]:
        if base.server_state is None:
            return self._optimizer.init()
        return read_tensors(self._blobs.path(base.server_state))

    def _store(
        self,
        number: int,
        weights: Tensors,
        now: float,
        *,
        server_state: Digest | None,
        base: int | None = None,
        round_number: int | None = None,
    ) -> VersionRecord:
        release = self._build(weights)
        self._blobs.put(release.weights)
        self._blobs.put(release.golden)
        return VersionRecord(
            number=number,
            plan_sha256=self._plan_sha256,
            weights=release.weights_ref,
            golden=release.golden_ref,
            model_sha256=release.model_sha256,
            model_bytes=release.model_bytes,
            created_at=now,
            base=base,
            round=round_number,
            server_state=server_state,
        )

    def _put(self, data: bytes) -> Digest:
        self._blobs.put(data)
        return sha256(data)
