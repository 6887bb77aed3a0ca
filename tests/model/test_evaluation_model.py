"""The evaluation machine in a world that drops, repeats and restarts everything.

The world is plain: a record that survives, commands that are carried out one by one or not at all,
messages on their way, devices that come and go and forget. The claims:

1.  A device's answer counts once, with the sums that this device measured, whatever is repeated.
2.  A closed evaluation never changes again.
3.  Whoever is asked is here and was not asked before, and no more than are missing are asked.
4.  It closes once: with as many answers as were wanted, when nobody who is here could answer, or at
    the deadline; never later, through any number of restarts.
5.  Equal states and events give equal answers, no event raises, and no moment is asked for that has
    passed: a caller that sleeps until `next_deadline` never spins.
6.  Where nothing is lost any more, everybody who was asked and is here is counted or not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedge.coordinator.evaluations import (
    AGAIN_S,
    AWAY_S,
    DEADLINE,
    ENOUGH,
    GRACE_S,
    NOBODY_LEFT,
    Answered,
    Ask,
    AskAgain,
    Close,
    Command,
    Evaluation,
    Event,
    Looked,
    left_s,
    opened,
    resumed,
    step,
)
from fedge.schemas.messages import EvaluationStatus
from tests.model.profile import search

NAMES = "abcdefgh"
DEADLINE_S = 100.0
STATUSES = st.sampled_from(
    [EvaluationStatus.OK] * 3 + [EvaluationStatus.NO_HOLD_OUT, EvaluationStatus.FAILED]
)


@dataclass
class Record:
    """What the store keeps. `answers`: None for who was asked; else the status and the sum."""

    wanted: int
    seed: int
    until: float
    answers: dict[str, tuple[EvaluationStatus, float] | None] = field(default_factory=dict)
    closed: str | None = None

    def statuses(self) -> dict[str, EvaluationStatus | None]:
        return {name: None if one is None else one[0] for name, one in self.answers.items()}


class EvaluationWorld(RuleBasedStateMachine):
    @initialize(
        wanted=st.integers(1, 6),
        seed=st.integers(0, 2**32 - 1),
        online=st.frozensets(st.sampled_from(NAMES)),
        statuses=st.fixed_dictionaries(dict.fromkeys(NAMES, STATUSES)),
    )
    def begin(
        self,
        wanted: int,
        seed: int,
        online: frozenset[str],
        statuses: dict[str, EvaluationStatus],
    ) -> None:
        self.now = 1000.0
        self.online = online
        self.statuses = statuses
        self.record = Record(wanted, seed, self.now + DEADLINE_S)
        self.todo: list[Command] = []
        self.mail: list[tuple[str, str]] = []  # ("ask" | "answer", device)
        self.heard: dict[str, EvaluationStatus] = {}
        self.late = False
        self.closings = 0
        self.at_the_end: Any = None
        self.start()

    def start(self) -> None:
        left = left_s(self.record.until, DEADLINE_S, self.now)
        assert 0 < left <= max(GRACE_S, self.record.until - self.now)
        fresh = opened(
            1,
            7,
            wanted=self.record.wanted,
            seed=self.record.seed,
            deadline_s=DEADLINE_S,
            left_s=left,
            now=self.now,
        )
        self.state: Evaluation = resumed(fresh, self.record.statuses())

    # ------------------------------------------------------------ the coordinator

    def feed(self, event: Event) -> None:
        before = self.state
        self.state, commands = step(before, event, self.now)
        assert (self.state, commands) == step(before, event, self.now)
        if isinstance(event, Looked) and not self.state.closed:
            assert self.now < self.state.next_deadline <= self.state.until
        assert self.state.asked >= before.asked
        for command in commands:
            self.check(command, before, event)
        self.todo += commands

    def check(self, command: Command, before: Evaluation, event: Event) -> None:
        after, online = self.state, event.online
        missing = after.wanted - len(after.measured) - len(after.failed)
        match command:
            case Ask(devices):
                assert online is not None
                assert set(devices) <= online - before.asked
                counted_on = (after.waiting & online) - after.slow
                assert len(counted_on) <= missing
            case AskAgain(devices):
                assert online is not None
                assert set(devices) <= before.waiting & online
            case Close(reason):
                self.closings += 1
                match reason:
                    case _ if reason == ENOUGH:
                        assert missing <= 0
                    case _ if reason == NOBODY_LEFT:
                        assert online is not None
                        assert not after.waiting & online
                        assert after.answered
                        assert online <= after.asked
                    case _ if reason == DEADLINE:
                        assert self.now >= after.until
                    case _:
                        raise AssertionError(reason)

    def carry_out(self) -> None:
        match self.todo.pop(0):
            case Ask(devices):
                if self.record.closed is None:
                    for device in devices:
                        self.record.answers.setdefault(device, None)
                        self.mail.append(("ask", device))
            case AskAgain(devices):
                self.mail += [("ask", device) for device in devices]
            case Close(reason):
                if self.record.closed is None:
                    self.record.closed = reason

    @rule(seconds=st.sampled_from([0.0, 1.0, AGAIN_S, AWAY_S, 25.0, 60.0]), known=st.booleans())
    def time_passes(self, seconds: float, known: bool) -> None:
        self.now += seconds
        self.feed(Looked(self.online if known else None))

    @rule()
    def something_is_carried_out(self) -> None:
        if self.todo:
            self.carry_out()

    @rule(seconds=st.sampled_from([0.0, 5.0, 200.0]))
    def the_coordinator_is_killed_and_starts_again(self, seconds: float) -> None:
        self.todo.clear()
        self.heard.clear()
        self.now += seconds
        if self.record.closed is None:
            self.closings = 0
            self.start()

    # ------------------------------------------------------------ devices and the network

    @rule(device=st.sampled_from(NAMES))
    def one_comes_or_goes(self, device: str) -> None:
        self.online = self.online ^ {device}
        self.feed(Looked(self.online))

    @rule(devices=st.frozensets(st.sampled_from(NAMES)))
    def all_is_well_for_some(self, devices: frozenset[str]) -> None:
        while self.todo:
            self.carry_out()
        for _ in range(2):  # the requests, then the answers to them
            mine = [one for one in self.mail if one[1] in devices]
            self.mail = [one for one in self.mail if one[1] not in devices]
            for message in mine:
                self.arrive(*message)

    @rule(data=st.data())
    def a_message_is_lost(self, data: st.DataObject) -> None:
        self.take(data)

    @rule(data=st.data(), again=st.booleans())
    def a_message_arrives(self, data: st.DataObject, again: bool) -> None:
        message = self.take(data)
        if message is not None:
            if again:
                self.mail.append(message)
            self.arrive(*message)

    def take(self, data: st.DataObject) -> tuple[str, str] | None:
        if not self.mail:
            return None
        return self.mail.pop(data.draw(st.integers(0, len(self.mail) - 1)))

    def arrive(self, kind: str, device: str) -> None:
        if kind == "ask":
            # It says what it measured whenever it is asked: there is nothing that it could forget.
            if device in self.online:
                self.mail.append(("answer", device))
            return
        if self.state.closed or device not in self.state.asked:
            return  # refused by the desk
        if self.record.closed is not None or device not in self.record.answers:
            return  # refused by the store
        if self.record.answers[device] is None:
            self.record.answers[device] = (self.statuses[device], float(ord(device)))
        self.heard[device] = self.statuses[device]
        if not self.late:
            self.hear()

    def hear(self) -> None:
        heard, self.heard = self.heard, {}
        self.feed(Answered(heard, self.online))

    @rule(late=st.booleans())
    def answers_are_looked_at_together(self, late: bool) -> None:
        """From now on, or at once again: the desk gathers what comes within a second."""
        self.late = late
        self.hear()

    @rule(status=STATUSES)
    def a_stranger_answers(self, status: EvaluationStatus) -> None:
        before = self.state
        self.feed(Answered({"stranger": status}, self.online))
        assert self.state.answered == before.answered

    # ------------------------------------------------------------ claims

    @invariant()
    def every_answer_is_the_devices_own(self) -> None:
        for device, answer in self.record.answers.items():
            assert answer in (None, (self.statuses[device], float(ord(device))))
        counted = {name for name, one in self.record.answers.items() if one is not None}
        assert self.state.answered <= counted

    @invariant()
    def what_is_closed_stays_as_it_was(self) -> None:
        if self.record.closed is None:
            return
        now = (self.record.closed, dict(self.record.answers))
        assert self.at_the_end in (None, now)
        self.at_the_end = now

    @invariant()
    def it_closes_once(self) -> None:
        assert self.closings <= 1

    def teardown(self) -> None:
        """From here on nothing is lost."""
        if not hasattr(self, "record"):
            return
        while self.record.closed is None:
            while self.todo:
                self.carry_out()
            while self.mail:
                self.arrive(*self.mail.pop(0))
            self.hear()
            if self.record.closed is None and not self.todo:
                # A caller that sleeps until it is due comes to the end, and not after the deadline.
                self.now = max(self.now, self.state.next_deadline)
                self.feed(Looked(self.online))
        waited_for = {name for name, one in self.record.answers.items() if one is None}
        if self.record.closed == NOBODY_LEFT:
            assert not waited_for & self.online


TestEvaluationWorld = EvaluationWorld.TestCase
TestEvaluationWorld.settings = search(examples=150, steps=30, deep_examples=1000, deep_steps=60)
