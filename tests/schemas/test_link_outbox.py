"""The order, the window and the end of publishes, without a network."""

from __future__ import annotations

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from fedge.schemas.link.paho.outbox import BARREN_LOSSES, LONE_LOSSES, Outbox, Outgoing

loop = asyncio.new_event_loop()


def outgoing(name: str) -> Outgoing:
    return Outgoing(name, b"", retain=False, done=loop.create_future())


def send_all(outbox: Outbox, first_id: int = 1) -> list[Outgoing]:
    """Sends what may be sent, under rising packet identifiers."""
    sent = []
    while found := outbox.next_to_send():
        outbox.sent(first_id + len(sent))
        sent.append(found)
    return sent


class OutboxMachine(RuleBasedStateMachine):
    """Against a plain list: every publish is acknowledged, withdrawn, or still in the box."""

    publishes = Bundle("publishes")

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(8)
        self.limit = 8
        self.next_id = 1
        self.waiting: list[Outgoing] = []
        self.in_flight: dict[int, Outgoing] = {}

    @rule(target=publishes)
    def ask(self) -> Outgoing:
        new = outgoing("t")
        self.outbox.add(new)
        self.waiting.append(new)
        return new

    @rule(maximum=st.integers(1, 20))
    def reconnect(self, maximum: int) -> None:
        # Losses by silence convict nobody, so the model stays a list.
        assert self.outbox.lost(closed_by_peer=False) is None
        alive = [each for each in self.in_flight.values() if not each.done.done()]
        self.waiting = [*alive, *self.waiting]
        self.in_flight.clear()
        self.outbox.connected(maximum)
        self.limit = min(8, maximum)

    @rule()
    def send(self) -> None:
        for each in send_all(self.outbox, self.next_id):
            assert each is self.waiting.pop(0)
            self.in_flight[self.next_id] = each
            self.next_id += 1
        assert not self.waiting or len(self.in_flight) == self.limit

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        packet_id = data.draw(st.sampled_from([*self.in_flight, 0]))
        assert self.outbox.acknowledged(packet_id) is self.in_flight.pop(packet_id, None)

    @rule(each=publishes)
    def withdraw(self, each: Outgoing) -> None:
        # Also where it is over already: an answer and a cancellation may come together.
        each.done.cancel()
        self.outbox.withdraw(each)
        if each in self.waiting:
            self.waiting.remove(each)

    @invariant()
    def nothing_is_lost_or_made_up(self) -> None:
        assert len(self.outbox) == len(self.waiting) + len(self.in_flight)
        assert len(self.in_flight) <= self.limit


OutboxMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestOutbox = OutboxMachine.TestCase


def test_what_was_lost_goes_first_and_in_order():
    outbox = Outbox(2)
    names = [outgoing(name) for name in "abcd"]
    for each in names:
        outbox.add(each)
    assert send_all(outbox) == names[:2]
    outbox.lost(closed_by_peer=True)
    assert send_all(outbox) == names[:2]
    outbox.acknowledged(1)
    assert send_all(outbox, 3) == names[2:3]


def test_a_publish_that_always_ends_the_connection_is_found_among_innocent_ones():
    outbox = Outbox(8)
    innocent = [outgoing("innocent") for _ in range(5)]
    for each in innocent[:2]:
        outbox.add(each)
    guilty = outgoing("guilty")
    outbox.add(guilty)
    for each in innocent[2:]:
        outbox.add(each)
    acknowledged: list[Outgoing] = []
    losses = 0
    while True:
        sent = send_all(outbox)
        if len(sent) == 1 and sent[0] is not guilty:
            acknowledged.append(outbox.acknowledged(1))
            continue
        losses += 1
        if outbox.lost(closed_by_peer=True) is guilty:
            break
        assert losses < 20
    while sent := send_all(outbox):
        acknowledged += [outbox.acknowledged(1 + n) for n in range(len(sent))]
    assert acknowledged == innocent


def test_losses_by_silence_convict_nobody():
    outbox = Outbox(8)
    outbox.add(outgoing("large, over a bad network"))
    for _ in range(10 * (BARREN_LOSSES + LONE_LOSSES)):
        assert len(send_all(outbox)) == 1
        assert outbox.lost(closed_by_peer=False) is None


def test_what_expired_is_over_and_not_sent():
    outbox = Outbox(8)
    names = [outgoing(name) for name in "abc"]
    names[0].expires_s = names[2].expires_s = 10.0
    for each in names:
        outbox.add(each)
    assert outbox.next_to_send(9.9) is names[0]
    assert outbox.next_to_send(10.0) is names[1]
    assert names[0].done.done()
    outbox.sent(1)
    assert outbox.waits_for_answers
    assert outbox.next_to_send(10.0) is None
    assert names[2].done.done()
    assert len(outbox) == 1
