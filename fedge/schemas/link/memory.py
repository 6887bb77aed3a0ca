"""A broker in memory, and the `Link` to it: everything a network does to messages, from a seed.

No sockets, no threads, no tasks, no real time: calls act at once, and what is delayed waits until
`MemoryBroker.advance` moves the broker's own clock. Two runs with one seed and one order of calls
are the same run, so a failing interleaving can be replayed and shrunk (the idea of FoundationDB's
simulation: Zhou et al. 2021, "FoundationDB: A Distributed Unbundled Transactional Key Value
Store", section 4).

It keeps what MQTT promises (sessions, retained messages, order, redelivery until acknowledged,
wills) until `Faults` say otherwise. It knows nothing of Fedge's topics and messages.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field, replace

from fedge.schemas.errors import LinkClosed, PayloadTooLarge
from fedge.schemas.link.filters import FilterSet, covers
from fedge.schemas.link.protocol import Delivery, LinkDown, LinkEvent, LinkUp, Will

RETRY_S = 1.0
"""How long a link whose session was taken over waits before it connects again."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with each copy of a message on its way to one subscriber.

    `drop`: probability that it is lost although its publisher was told that all is well, as a
    broker does when a queue overflows. `duplicate`: that it comes twice. `reorder`: that it does
    not wait for those before it. `delay_s`: it is held for up to so long, in order.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.0


NO_FAULTS = Faults()


@dataclass(frozen=True, slots=True)
class _Message:
    topic: str
    payload: bytes
    retained: bool
    expires_s: float = math.inf


@dataclass(frozen=True, slots=True)
class _Publish:
    message: _Message
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Session:
    """What the broker keeps for a client id, connected or not."""

    filters: FilterSet = field(default_factory=FilterSet)
    waiting: deque[_Message] = field(default_factory=deque)
    unacknowledged: dict[int, _Message] = field(default_factory=dict)
    last_due_s: float = 0.0
    link: MemoryLink | None = None


class MemoryBroker:
    """The broker. `rng` decides every fault; `now_s` is its clock and starts at 0.

    `max_queued_messages`: what a session may have waiting; more is dropped silently, as mosquitto
    does by default at 1000.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        faults: Faults = NO_FAULTS,
        max_payload_bytes: int = 256 * 1024 * 1024,
        max_queued_messages: int = 1000,
    ) -> None:
        self.faults = faults
        self.max_payload_bytes = max_payload_bytes
        self.max_queued_messages = max_queued_messages
        self.now_s = 0.0
        self.dropped = 0
        """Copies that were lost, by faults or by full queues."""
        self._rng = rng
        self._running = True
        self._sessions: dict[str, _Session] = {}
        self._retained: dict[str, _Message] = {}
        self._links: list[MemoryLink] = []
        self._partitioned: set[str] = set()
        self._held: list[tuple[float, int, str, _Message]] = []
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------ what a test does to it

    def link(
        self, client_id: str, *, will: Will | None = None, receive_maximum: int = 32
    ) -> MemoryLink:
        """A link of this client; `start` connects it. A second one takes the session over."""
        return MemoryLink(self, client_id, will, receive_maximum)

    @property
    def retained(self) -> dict[str, bytes]:
        """The payloads of the retained messages by topic."""
        return {topic: each.payload for topic, each in self._retained.items() if self._lives(each)}

    @property
    def held(self) -> int:
        """How many copies wait for `advance`."""
        return len(self._held)

    def advance(self, seconds: float) -> None:
        """Lets time pass: delivers what is due, and lets links that were thrown out try again."""
        self.now_s += seconds
        while self._held and self._held[0][0] <= self.now_s:
            _, _, client_id, message = heapq.heappop(self._held)
            self._queue(client_id, message)
        for link in [each for each in self._links if each.retry_at_s <= self.now_s]:
            self._connect(link)

    def advance_until_idle(self) -> None:
        """Lets time pass until no copy is held."""
        while self._held:
            self.advance(max(self._held[0][0] - self.now_s, 0.0))

    def partition(self, *client_ids: str) -> None:
        """Cuts these clients off. Their wills are published at once, as after the keep-alive."""
        for client_id in client_ids:
            self._partitioned.add(client_id)
            for link in self._links_of(client_id):
                self._disconnect(link, "partitioned", publish_will=True)

    def heal(self, *client_ids: str) -> None:
        """Lets these clients connect again; they do at once."""
        self._partitioned.difference_update(client_ids)
        for client_id in client_ids:
            for link in self._links_of(client_id):
                self._connect(link)

    def kill(self) -> None:
        """kill -9: sessions, queues and retained messages are gone; no will is published."""
        self._running = False
        for link in list(self._links):
            self._disconnect(link, "the broker was killed", publish_will=False)
        self._sessions.clear()
        self._retained.clear()
        self._held.clear()

    def start(self) -> None:
        """Runs again after `kill`; the links connect at once."""
        self._running = True
        for link in list(self._links):
            self._connect(link)

    # ------------------------------------------------------------------ what links ask for

    def enter(self, link: MemoryLink) -> None:
        """A link was started: connects it, or tells it that it is down."""
        self._links.append(link)
        self._connect(link)
        if not link.connected:
            link.went_down("no connection")

    def leave(self, link: MemoryLink) -> None:
        """A goodbye: the session stays, no will is published."""
        if link in self._links:
            self._links.remove(link)
            self._release(link)

    def accept(self, message: _Message) -> None:
        """A publish: keeps it if retained, and starts a copy to each subscriber."""
        if message.retained and message.payload:
            self._retained[message.topic] = message
        elif message.retained:
            self._retained.pop(message.topic, None)
        for client_id, session in self._sessions.items():
            if session.filters.covers(message.topic):
                self._send(client_id, replace(message, retained=False))

    def subscribe(self, client_id: str, filters: list[str]) -> None:
        """Notes filters in the session and sends what is retained under each."""
        for topic_filter in filters:
            self._sessions[client_id].filters.add(topic_filter)
            for topic, message in list(self._retained.items()):
                if covers(topic_filter, topic):
                    self._send(client_id, message)

    def unsubscribe(self, client_id: str, filters: list[str]) -> None:
        """Takes filters out of the session."""
        for topic_filter in filters:
            self._sessions[client_id].filters.discard(topic_filter)

    def acknowledge(self, link: MemoryLink, token: int) -> None:
        """Forgets a delivery of this link's connection, and sends what waited for its place."""
        session = self._sessions.get(link.client_id)
        if session is not None and session.link is link:
            session.unacknowledged.pop(token, None)
            self._fill(session)

    # ------------------------------------------------------------------ inside

    def _lives(self, message: _Message) -> bool:
        return self.now_s < message.expires_s

    def _links_of(self, client_id: str) -> list[MemoryLink]:
        return [link for link in self._links if link.client_id == client_id]

    def _connect(self, link: MemoryLink) -> None:
        if link.connected or not self._running or link.client_id in self._partitioned:
            return
        session_present = link.client_id in self._sessions
        session = self._sessions.setdefault(link.client_id, _Session())
        if session.link is not None:
            other = session.link
            self._disconnect(other, "session taken over", publish_will=True)
            other.retry_at_s = self.now_s + RETRY_S
        session.link = link
        link.went_up(session_present)
        self._fill(session)

    def _disconnect(self, link: MemoryLink, reason: str, *, publish_will: bool) -> None:
        if not link.connected:
            return
        self._release(link)
        link.went_down(reason)
        if publish_will and link.will is not None:
            self.accept(_Message(link.will.topic, link.will.payload, retained=True))

    def _release(self, link: MemoryLink) -> None:
        session = self._sessions.get(link.client_id)
        if session is not None and session.link is link:
            session.link = None
            session.waiting.extendleft(reversed(session.unacknowledged.values()))
            session.unacknowledged.clear()

    def _send(self, client_id: str, message: _Message) -> None:
        faults = self.faults
        if self._rng.random() < faults.drop:
            self.dropped += 1
            return
        copies = 2 if self._rng.random() < faults.duplicate else 1
        for _ in range(copies):
            session = self._sessions[client_id]
            due_s = self.now_s + self._rng.uniform(0.0, faults.delay_s)
            if self._rng.random() < faults.reorder:
                # Late enough to be overtaken even where nothing else is delayed.
                due_s += self._rng.uniform(0.0, max(faults.delay_s, 1.0))
            else:
                due_s = session.last_due_s = max(due_s, session.last_due_s)
            if due_s <= self.now_s:
                self._queue(client_id, message)
            else:
                heapq.heappush(self._held, (due_s, next(self._numbers), client_id, message))

    def _queue(self, client_id: str, message: _Message) -> None:
        session = self._sessions.get(client_id)
        if session is None:
            return
        if len(session.waiting) >= self.max_queued_messages:
            self.dropped += 1
            return
        session.waiting.append(message)
        self._fill(session)

    def _fill(self, session: _Session) -> None:
        link = session.link
        while (
            link is not None
            and session.waiting
            and len(session.unacknowledged) < link.receive_maximum
        ):
            message = session.waiting.popleft()
            if not self._lives(message):
                continue
            token = next(self._numbers)
            session.unacknowledged[token] = message
            link.arrived(Delivery(message.topic, message.payload, message.retained, token))


class MemoryLink:
    """A `Link` to a `MemoryBroker`; `fedge.schemas.link.protocol` says what the calls promise."""

    def __init__(
        self, broker: MemoryBroker, client_id: str, will: Will | None, receive_maximum: int
    ) -> None:
        self.client_id = client_id
        self.will = will
        self.receive_maximum = receive_maximum
        self.retry_at_s = float("inf")
        self._broker = broker
        self._filters = FilterSet()
        self._granted: set[str] = set()
        self._revoked: set[str] = set()
        self._events: deque[LinkEvent] = deque()
        self._pending: deque[_Publish] = deque()
        self._wake_up: asyncio.Future[None] | None = None
        self._up = False
        self._started = False
        self._closed = False

    # ------------------------------------------------------------------ Link

    @property
    def connected(self) -> bool:
        """Whether the broker holds a connection of this link."""
        return self._up

    @property
    def max_payload_bytes(self) -> int:
        """The broker's limit."""
        return self._broker.max_payload_bytes

    async def start(self) -> None:
        """Connects at once if the broker runs and can be reached. Call once."""
        if self._started or self._closed:
            raise RuntimeError("a link is started once")
        self._started = True
        self._broker.enter(self)

    def hurry(self) -> None:
        """Nothing: this broker's clients never wait."""

    async def close(self) -> None:
        """Says goodbye. Waiting calls raise `LinkClosed`."""
        if self._closed:
            return
        self._closed = True
        self._up = False
        self._broker.leave(self)
        for publish in self._pending:
            if not publish.done.done():
                publish.done.set_exception(LinkClosed("the link was closed"))
        self._pending.clear()
        self._events.clear()
        self._wake()

    async def next_event(self) -> LinkEvent:
        """The next event, in order. Raises `LinkClosed` after `close`. For one caller at a time."""
        while self._closed or not self._events:
            self._raise_if_closed()
            if self._wake_up is not None:
                raise RuntimeError("somebody else waits for the link's next event")
            self._wake_up = asyncio.get_running_loop().create_future()
            try:
                await self._wake_up
            finally:
                self._wake_up = None
        return self._events.popleft()

    def ack(self, delivery: Delivery) -> None:
        """Tells the broker that it may forget this delivery. Harmless when repeated or too late."""
        self._broker.acknowledge(self, delivery.token)

    async def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: float | None = None
    ) -> None:
        """Returns when the broker has it, or it expired. Raises `PayloadTooLarge`, `LinkClosed`."""
        self._raise_if_closed()
        if len(payload) > self._broker.max_payload_bytes:
            raise PayloadTooLarge(topic, len(payload), self._broker.max_payload_bytes)
        if "+" in topic or "#" in topic:
            raise ValueError(f"wildcards in a topic to publish to: {topic[:200]!r}")
        # Even an acknowledgement that is there at once is a step of the event loop.
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        expires_s = math.inf if expiry_s is None else self._broker.now_s + expiry_s
        message = _Message(topic, bytes(payload), retain, expires_s)
        self._pending.append(_Publish(message, done))
        self._flush()
        try:
            await done
        except asyncio.CancelledError:
            self._pending = deque(each for each in self._pending if each.done is not done)
            raise
        await asyncio.sleep(0)

    async def subscribe(self, *filters: str) -> None:
        """Subscribes now, or as soon as the link is up."""
        self._raise_if_closed()
        for topic_filter in filters:
            self._filters.add(topic_filter)
            self._granted.discard(topic_filter)
            self._revoked.discard(topic_filter)
        if self._up:
            self._granted.update(filters)
            self._broker.subscribe(self.client_id, list(filters))

    async def unsubscribe(self, *filters: str) -> None:
        """Takes back a subscription, here at once and at the broker as soon as it can be told."""
        self._raise_if_closed()
        for topic_filter in filters:
            self._filters.discard(topic_filter)
            self._granted.discard(topic_filter)
            self._revoked.add(topic_filter)
        if self._up:
            self._broker.unsubscribe(self.client_id, list(filters))
            self._revoked.clear()

    # ------------------------------------------------------------------ what the broker tells

    def went_up(self, session_present: bool) -> None:
        """The broker accepted the connection."""
        self.retry_at_s = float("inf")
        if not session_present:
            self._granted.clear()
        self._broker.unsubscribe(self.client_id, list(self._revoked))
        self._revoked.clear()
        self._up = True
        self._emit(LinkUp(session_present))
        missing = [each for each in self._filters if each not in self._granted]
        self._granted.update(missing)
        self._broker.subscribe(self.client_id, missing)
        self._flush()

    def went_down(self, reason: str) -> None:
        """The connection is lost, or an attempt failed."""
        self._up = False
        self._emit(LinkDown(reason))

    def arrived(self, delivery: Delivery) -> None:
        """A message for the owner; what nobody here asked for is acknowledged and dropped."""
        if self._filters.covers(delivery.topic):
            self._emit(delivery)
        else:
            self._broker.acknowledge(self, delivery.token)

    # ------------------------------------------------------------------ inside

    def _flush(self) -> None:
        while self._up and self._pending:
            publish = self._pending.popleft()
            if not publish.done.done():
                publish.done.set_result(None)
                if self._broker.now_s < publish.message.expires_s:
                    self._broker.accept(publish.message)

    def _emit(self, event: LinkEvent) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._wake_up is not None and not self._wake_up.done():
            self._wake_up.set_result(None)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise LinkClosed("the link was closed")
