"""Publication: the newest version and the round are on the broker, whatever it has forgotten.

One loop brings the version's blobs, then its announcement, then opens the next round and announces
that: in this order, so that whoever hears of something finds what it names. It is asked for by
whoever changed something, and again after each reconnect; what the broker or the disk refuses is
tried again later. Which version and which round is others' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fedge.coordinator.conductor import Conductor
from fedge.coordinator.distribution import Distribution
from fedge.coordinator.publisher import Publisher, announcement_of
from fedge.coordinator.rollout_desk import RolloutDesk
from fedge.coordinator.store import VersionRecord
from fedge.coordinator.succession import Succession
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import LinkClosed, LinkError, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

FIRST_REMINDER_S = 60.0
LAST_REMINDER_S = 3600.0
"""A round that waits for devices is announced again after a minute, then ever more rarely."""
PUBLISH_AGAIN_S = 5.0
REFUSED_AGAIN_S = 60.0
"""What could not be published because the disk, or the broker, refused is tried again then."""


class Publication:
    """Keeps what is newest published. `keep` and `keep_reminding` run for as long as the service.

    `plan`: the manifest of the population's plan. `start`: runs work beside everything else.
    `is_up`: whether both sessions are connected. `payload_limit_bytes`: the broker's, as of now.
    `published`: called once for each version that is out.
    """

    def __init__(
        self,
        *,
        plan: BlobRef,
        publisher: Publisher,
        distribution: Distribution,
        succession: Succession,
        start: Callable[[Coroutine[Any, Any, Any], str], None],
        is_up: Callable[[], bool],
        payload_limit_bytes: Callable[[], int],
        published: Callable[[VersionRecord], None],
        rollouts: RolloutDesk,
    ) -> None:
        self._plan = plan
        self._publisher = publisher
        self._distribution = distribution
        self._succession = succession
        self._start = start
        self._is_up = is_up
        self._payload_limit_bytes = payload_limit_bytes
        self._when_published = published
        self._rollouts = rollouts
        self._due = asyncio.Event()
        self._published: int | None = None

    def soon(self) -> None:
        """Something has changed: publish what is newest."""
        self._due.set()

    def again(self) -> None:
        """The same, also what was announced before and may have been lost."""
        self._publisher.say_again()
        self._due.set()

    async def keep(self, conductor: Conductor) -> None:
        """Publishes whenever it is asked for, until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            if not self._is_up():
                # The next connection asks for it again.
                continue
            try:
                await self._publish(conductor)
            except LinkClosed:
                raise
            except LinkError as error:
                log.error("not_published", reason=str(error))
                self._start(self._later(REFUSED_AGAIN_S), "publish-later")
            except StoreError as error:
                # Also a blob that is gone: a copy of another place's is fetched again then.
                log.error("not_published", reason=str(error))
                passing = isinstance(error, StoreUnavailable)
                wait_s = PUBLISH_AGAIN_S if passing else REFUSED_AGAIN_S
                self._start(self._later(wait_s), "publish-later")

    async def keep_reminding(self, conductor: Conductor) -> None:
        """A broker may drop an announcement, or all answers to it, and nobody would ever know."""
        round_number, wait_s = None, FIRST_REMINDER_S
        while True:
            await asyncio.sleep(wait_s)
            if not conductor.waits_for_devices:
                round_number, wait_s = None, FIRST_REMINDER_S
                continue
            again = round_number == conductor.round_number
            wait_s = min(LAST_REMINDER_S, 2 * wait_s) if again else FIRST_REMINDER_S
            round_number = conductor.round_number
            self.again()

    async def _later(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self._due.set()

    async def _publish(self, conductor: Conductor) -> None:
        version = self._succession.newest
        self._check_broker_limit()
        await self._distribution.bring(version)
        fresh = version.number != self._published
        await self._rollouts.announce()
        staged = self._rollouts.is_staged
        await self._publisher.announce(announcement_of(version, self._plan, staged=staged))
        if fresh:
            self._published = version.number
            log.info(
                "version_published",
                version=version.number,
                weights_bytes=version.weights.size_bytes,
                published_bytes=self._publisher.chunk_bytes_published,
            )
        await conductor.open_next_round()
        announcement = conductor.announcement()
        if announcement is not None:
            await self._publisher.announce(announcement)
        if fresh:
            self._when_published(version)

    def _check_broker_limit(self) -> None:
        limit_bytes, chunk_bytes = self._payload_limit_bytes(), self._plan.chunk_bytes
        if limit_bytes < chunk_bytes:
            log.error(
                "broker_limit",
                limit_bytes=limit_bytes,
                chunk_bytes=chunk_bytes,
                advice="raise the broker's max_packet_size, or serve a new population with a "
                "smaller chunk_bytes",
            )
