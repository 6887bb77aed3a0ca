"""The agent machine: the table at its top, as claims; then any order of events, by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.edge_agent import machine
from fedge.edge_agent.machine import (
    Aborted,
    Activate,
    Activated,
    Assigned,
    CheckIn,
    Command,
    Connected,
    Counted,
    Deferred,
    Disconnected,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Receipted,
    Rest,
    RetryDue,
    RoundSeen,
    SayTrainingFailed,
    SendOffer,
    StopTraining,
    Train,
    Trained,
    TrainingStopped,
    VersionSeen,
)
from fedge.schemas.errors import RejectReason
from fedge.schemas.messages import (
    Assignment,
    Receipt,
    ReceiptStatus,
    Retry,
    RoundAnnouncement,
    RoundPhase,
)
from tests.edge_agent.announcements import version


def announced(number: int, phase: RoundPhase = RoundPhase.GATHERING) -> RoundAnnouncement:
    return RoundAnnouncement(round=number, base=number - 1, phase=phase, checkin_spread_s=2.0)


def assignment(number: int, base: int | None = None) -> Assignment:
    return Assignment(
        round=number,
        base=number - 1 if base is None else base,
        plan_sha256="0" * 64,
        deadline_s=60,
        seed=1,
        batch_size=1,
        learning_rate=0.1,
        local_epochs=1,
    )


def receipt(number: int, status: ReceiptStatus = ReceiptStatus.ACCEPTED) -> Receipt:
    reason = None if status is ReceiptStatus.ACCEPTED else RejectReason.LATE
    return Receipt(round=number, sha256="0" * 64, status=status, reason=reason)


@dataclass
class Device:
    state: machine.Agent = field(default_factory=machine.Agent)

    def feed(self, *events: Event) -> list[Command]:
        """The commands of the last event."""
        commands: list[Command] = []
        for event in events:
            self.state, found = machine.step(self.state, event)
            commands = list(found)
        return commands


def ready(base: int = 0) -> Device:
    """Connected, with examples, holding and using version `base`."""
    device = Device()
    device.feed(Counted(10), Connected(), VersionSeen(version(base)), Fetched(base))
    device.feed(Activated(base))
    return device


def in_training(number: int = 1) -> Device:
    device = ready(number - 1)
    device.feed(RoundSeen(announced(number)))
    assert device.feed(Assigned(assignment(number))) == [Train(device.state.work.assignment)]
    return device


def test_a_new_version_is_fetched_then_activated() -> None:
    device = Device()
    assert device.feed(VersionSeen(version(3))) == [Fetch(device.state.announced)]
    assert device.feed(Fetched(3)) == [Activate(device.state.announced)]
    assert device.feed(Activated(3), VersionSeen(version(3))) == []


def test_an_older_version_is_ignored() -> None:
    device = ready(5)
    assert device.feed(VersionSeen(version(4))) == []
    assert device.state.announced.number == 5


def test_a_version_announced_again_while_it_is_fetched_is_fetched_once() -> None:
    device = Device()
    device.feed(VersionSeen(version(3)))
    assert device.feed(VersionSeen(version(3))) == []


def test_a_device_checks_in_once_while_a_round_gathers() -> None:
    device = ready()
    assert device.feed(RoundSeen(announced(1))) == [CheckIn(1, 2.0)]
    assert device.feed(RoundSeen(announced(1, RoundPhase.TRAINING))) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


def test_a_device_without_examples_never_checks_in() -> None:
    device = Device()
    device.feed(Counted(0), Connected())
    assert device.feed(RoundSeen(announced(1))) == []


def test_a_device_that_is_told_to_come_back_later_rests_first() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)))
    assert device.feed(Deferred(Retry(round=1, after_s=30))) == [Rest(30)]
    assert device.feed(RoundSeen(announced(2))) == []
    assert device.feed(RetryDue()) == [CheckIn(2, 2.0)]


def test_after_a_reconnect_the_device_says_again_what_has_no_answer() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)), Disconnected())
    assert device.feed(Connected()) == [CheckIn(1, 2.0)]
    offered = in_training(4)
    offered.feed(Trained(4), Disconnected())
    assert offered.feed(Connected()) == [SendOffer(4)]


def test_a_round_announced_again_means_that_nobody_heard_us() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)))
    assert device.feed(RoundSeen(announced(1))) == [CheckIn(1, 2.0)]
    offered = in_training(4)
    offered.feed(RoundSeen(announced(4, RoundPhase.TRAINING)), Trained(4))
    assert offered.feed(RoundSeen(announced(4, RoundPhase.TRAINING))) == [SendOffer(4)]


def test_training_waits_for_its_base() -> None:
    device = ready(0)
    device.feed(RoundSeen(announced(2)))
    assert device.feed(Assigned(assignment(2))) == []
    device.feed(VersionSeen(version(1)))
    commands = device.feed(Fetched(1))
    assert commands == [Train(device.state.work.assignment), Activate(device.state.announced)]


def test_a_version_that_cannot_be_had_is_reported_and_tried_again_when_announced_again() -> None:
    device = ready(0)
    device.feed(RoundSeen(announced(2)), VersionSeen(version(1)), Assigned(assignment(2)))
    assert device.feed(FetchFailed(1, "broken")) == [SayTrainingFailed(2, "broken")]
    assert device.feed(VersionSeen(version(1))) == [Fetch(device.state.announced)]


def test_an_assignment_from_a_version_that_was_replaced_is_ignored() -> None:
    device = ready(7)
    assert device.feed(Assigned(assignment(3, base=2))) == []
    assert device.state.work is None


def test_a_repeated_assignment_never_trains_twice() -> None:
    device = in_training(1)
    assert device.feed(Assigned(assignment(1))) == []
    device.feed(Trained(1))
    assert device.feed(Assigned(assignment(1))) == [SendOffer(1)]


def test_training_for_a_round_that_is_over_is_stopped() -> None:
    device = in_training(1)
    assert device.feed(RoundSeen(announced(2))) == [StopTraining(1), CheckIn(2, 2.0)]
    assert in_training(1).feed(Aborted(1)) == [StopTraining(1)]


def test_an_update_stays_in_the_outbox_until_its_receipt() -> None:
    device = in_training(1)
    assert device.feed(Trained(1)) == [SendOffer(1)]
    device.feed(Aborted(1), RoundSeen(announced(2)))
    assert device.state.outbox == {1}
    assert device.feed(Receipted(receipt(1, ReceiptStatus.REJECTED))) == [Forget(1)]
    assert device.state.outbox == frozenset()


def test_a_training_that_failed_is_reported_and_not_repeated_in_that_round() -> None:
    device = in_training(1)
    failed = device.feed(TrainingStopped(1, "out of memory"))
    assert failed == [SayTrainingFailed(1, "out of memory")]
    assert device.feed(RoundSeen(announced(1, RoundPhase.TRAINING))) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order, the device trains once a round and loses no update."""

    numbers = st.integers(1, 4)

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.running: int | None = None
        self.finished: set[int] = set()
        self.settled: set[int] = set()
        self.device.feed(Counted(3))

    def take(self, event: Event) -> None:
        for command in self.device.feed(event):
            match command:
                case Train(work):
                    assert self.running is None
                    assert work.round not in self.finished
                    assert self.device.state.held == work.base
                    self.running = work.round
                case StopTraining(number):
                    assert self.running == number
                    self.running = None
                case SendOffer(number):
                    assert number in self.finished
                case Forget(number):
                    assert number in self.settled

    @rule(number=st.integers(0, 4))
    def version_announced(self, number: int) -> None:
        self.take(VersionSeen(version(number)))

    @precondition(lambda self: self.device.state.announced is not None)
    @rule()
    def fetched(self) -> None:
        self.take(Fetched(self.device.state.announced.number))

    @rule(number=numbers, phase=st.sampled_from(RoundPhase))
    def round_announced(self, number: int, phase: RoundPhase) -> None:
        self.take(RoundSeen(announced(number, phase)))

    @rule(number=numbers)
    def assigned(self, number: int) -> None:
        # The coordinator assigns nothing to a device whose answer it has decided.
        if number not in self.settled:
            self.take(Assigned(assignment(number)))

    @precondition(lambda self: self.running is not None)
    @rule(works=st.booleans())
    def training_ended(self, works: bool) -> None:
        number, self.running = self.running, None
        if works:
            self.finished.add(number)
            self.take(Trained(number))
        else:
            self.take(TrainingStopped(number, "failed"))

    @precondition(lambda self: self.device.state.outbox)
    @rule(data=st.data(), status=st.sampled_from(ReceiptStatus))
    def receipted(self, data: st.DataObject, status: ReceiptStatus) -> None:
        number = data.draw(st.sampled_from(sorted(self.device.state.outbox)))
        self.settled.add(number)
        self.take(Receipted(receipt(number, status)))

    @rule(number=numbers)
    def aborted(self, number: int) -> None:
        self.take(Aborted(number))

    @rule(after_s=st.sampled_from([0.0, 5.0]))
    def deferred(self, after_s: float) -> None:
        self.take(Deferred(Retry(round=1, after_s=after_s)))

    @rule()
    def rested(self) -> None:
        self.take(RetryDue())

    @rule(up=st.booleans())
    def connection(self, up: bool) -> None:
        self.take(Connected() if up else Disconnected())

    @invariant()
    def every_update_is_in_the_outbox_until_its_receipt(self) -> None:
        assert self.device.state.outbox == self.finished - self.settled


TestAnyOrder = AnyOrder.TestCase
