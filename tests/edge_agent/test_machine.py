"""The agent machine: the table at its top, as claims; then any order of events, by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.edge_agent import machine
from fedge.edge_agent.commands import (
    Activate,
    CheckIn,
    Command,
    Fetch,
    Forget,
    KeepFailures,
    Rest,
    SayTrainingFailed,
    SendCheckIn,
    SendOffer,
    StopTraining,
    Suspend,
    Train,
)
from fedge.edge_agent.events import (
    Aborted,
    Activated,
    Assigned,
    CheckInDue,
    Connected,
    Counted,
    Deferred,
    Disconnected,
    EligibilityChanged,
    Event,
    Fetched,
    FetchFailed,
    Outlook,
    Overdue,
    Receipted,
    Recovered,
    RetryDue,
    RoundSeen,
    Trained,
    TrainingStopped,
    UpdateLost,
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


def announced(
    number: int,
    phase: RoundPhase = RoundPhase.GATHERING,
    *,
    oldest: int | None = None,
    share: float = 1.0,
) -> RoundAnnouncement:
    return RoundAnnouncement(
        round=number,
        base=number - 1,
        phase=phase,
        checkin_spread_s=2.0,
        checkin_share=share,
        oldest=oldest,
    )


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
    # Nor after the receipt: a copy of the assignment may come late.
    device.feed(Receipted(receipt(1)))
    (said,) = device.feed(Assigned(assignment(1)))
    assert isinstance(said, SayTrainingFailed)
    assert said.round == 1


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
    assert failed[0] == SayTrainingFailed(1, "out of memory")
    assert device.feed(RetryDue()) == []
    assert device.feed(RoundSeen(announced(1, RoundPhase.TRAINING))) == []
    assert device.feed(Connected()) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


# ---------------------------------------------------------------- rest after failures


def test_a_device_that_always_fails_rests_longer_each_time_and_one_success_ends_that() -> None:
    device = ready(0)
    rests = []
    for number in range(1, 13):
        device.feed(VersionSeen(version(number - 1)), Fetched(number - 1))
        assert device.feed(RoundSeen(announced(number))) == [CheckIn(number, 2.0)]
        device.feed(Assigned(assignment(number)))
        said, kept, rest = device.feed(TrainingStopped(number, "no memory"))
        assert said == SayTrainingFailed(number, "no memory")
        assert kept == KeepFailures(number)
        assert isinstance(rest, Rest)
        rests.append(rest.after_s)
        assert device.feed(RoundSeen(announced(number, RoundPhase.TRAINING))) == []
        device.feed(RetryDue())
    assert rests == [2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900]
    device.feed(VersionSeen(version(12)), Fetched(12), RoundSeen(announced(13)))
    device.feed(Assigned(assignment(13)))
    assert device.feed(Trained(13)) == [SendOffer(13), KeepFailures(0)]
    assert device.state.failures == 0


def test_while_it_rests_a_device_checks_in_for_no_round_and_then_for_the_newest() -> None:
    device = in_training(1)
    device.feed(TrainingStopped(1, "no memory"))
    assert device.feed(RoundSeen(announced(2))) == []
    assert device.feed(RoundSeen(announced(3)), Disconnected(), Connected()) == []
    assert device.feed(RetryDue()) == [CheckIn(3, 2.0)]


def test_a_restart_does_not_end_the_rest() -> None:
    device = Device()
    assert device.feed(Recovered(3)) == [Rest(8, 2)]
    assert device.feed(Counted(10), Connected(), RoundSeen(announced(1))) == []
    assert device.feed(RetryDue()) == [CheckIn(1, 2.0)]
    device.feed(VersionSeen(version(0)), Fetched(0), Assigned(assignment(1)))
    assert device.feed(TrainingStopped(1, "again"))[1:] == [KeepFailures(4), Rest(16, 4)]
    assert Device().feed(Recovered(0)) == []


def test_a_training_that_the_coordinator_stopped_is_no_failure() -> None:
    device = in_training(1)
    assert device.feed(Aborted(1)) == [StopTraining(1)]
    assert device.state.failures == 0
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


# ---------------------------------------------------------------- pace steering


def test_the_share_and_the_spread_go_with_the_check_in() -> None:
    device = ready()
    assert device.feed(RoundSeen(announced(1, share=0.1))) == [CheckIn(1, 2.0, 0.1)]
    # The coordinator wants more devices than came: it says the round again, for all.
    assert device.feed(RoundSeen(announced(1, share=1.0))) == [CheckIn(1, 2.0, 1.0)]
    assert device.feed(CheckInDue(1, drawn=True)) == [SendCheckIn(1)]


def test_a_device_outside_the_share_checks_in_only_while_the_round_still_gathers() -> None:
    for phase, expected in (
        (RoundPhase.GATHERING, [SendCheckIn(1)]),
        (RoundPhase.TRAINING, []),
        (RoundPhase.CLOSED, []),
    ):
        device = ready()
        device.feed(RoundSeen(announced(1, share=0.1)))
        if phase is not RoundPhase.GATHERING:
            device.feed(RoundSeen(announced(1, phase, share=0.1)))
        assert device.feed(CheckInDue(1, drawn=False)) == expected


def test_a_check_in_whose_round_is_over_is_not_sent() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)), RoundSeen(announced(2)))
    assert device.feed(CheckInDue(1, drawn=True)) == []
    assert device.feed(CheckInDue(2, drawn=True)) == [SendCheckIn(2)]
    device.feed(RoundSeen(announced(2, RoundPhase.CLOSED)))
    assert device.feed(CheckInDue(2, drawn=True)) == []


def test_a_device_with_an_assignment_of_the_round_needs_no_check_in() -> None:
    device = in_training(1)
    assert device.feed(CheckInDue(1, drawn=True)) == []
    device.feed(Trained(1), Receipted(receipt(1)))
    assert device.feed(CheckInDue(1, drawn=False)) == []


def test_a_check_in_that_comes_due_without_a_network_is_made_up_for() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)), Disconnected())
    assert device.feed(CheckInDue(1, drawn=True)) == []
    assert device.feed(Connected()) == [CheckIn(1, 2.0)]


def test_a_retry_with_a_spread_is_a_rest_with_that_spread() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)))
    retry = Retry(round=1, after_s=0, spread_s=60)
    assert device.feed(Deferred(retry)) == [Rest(0, 60)]
    assert device.feed(RetryDue()) == [CheckIn(1, 2.0)]
    assert device.feed(Deferred(Retry(round=1, after_s=0))) == []


# ---------------------------------------------------------------- asynchronous mode


def seen(number: int, oldest: int) -> RoundSeen:
    """A round of asynchronous mode, which trains as soon as it is open."""
    return RoundSeen(announced(number, RoundPhase.TRAINING, oldest=oldest))


def flying(number: int = 1) -> Device:
    """In training for a round of asynchronous mode."""
    device = ready(number - 1)
    assert device.feed(seen(number, number)) == [CheckIn(number, 2.0)]
    assert device.feed(Assigned(assignment(number)))[-1:] == [Train(assignment_of(device))]
    return device


def assignment_of(device: Device) -> Assignment:
    assert device.state.work is not None
    return device.state.work.assignment


def test_work_that_a_later_round_still_wants_goes_on() -> None:
    device = flying(1)
    device.feed(VersionSeen(version(1)), Fetched(1))
    assert device.feed(seen(2, 1)) == []
    assert device.feed(seen(3, 1)) == []
    assert assignment_of(device).round == 1
    assert device.feed(Trained(1)) == [SendOffer(1)]


def test_work_that_no_round_wants_any_more_is_stopped() -> None:
    device = flying(1)
    device.feed(seen(2, 1))
    assert device.feed(seen(3, 2)) == [StopTraining(1), CheckIn(3, 2.0)]


def test_after_a_receipt_the_device_checks_in_for_the_newest_round_at_once() -> None:
    for status in ReceiptStatus:
        device = flying(1)
        device.feed(seen(2, 1), seen(3, 1), Trained(1))
        assert device.feed(Receipted(receipt(1, status))) == [Forget(1), CheckIn(3, 2.0)]


def test_a_device_is_in_a_round_once_even_if_it_is_done_before_the_round_is() -> None:
    device = flying(1)
    device.feed(Trained(1))
    assert device.feed(Receipted(receipt(1))) == [Forget(1)]
    for event in (Connected(), seen(1, 1), RetryDue(), Counted(12), CheckInDue(1, drawn=True)):
        assert device.feed(event) == []
    assert device.feed(seen(2, 2)) == [CheckIn(2, 2.0)]


def test_a_flight_that_is_called_back_frees_the_device_for_the_newest_round() -> None:
    device = flying(1)
    device.feed(seen(2, 1))
    assert device.feed(Aborted(1)) == [StopTraining(1), CheckIn(2, 2.0)]


def test_after_a_failure_the_device_rests_and_then_checks_in_for_the_newest_round() -> None:
    device = flying(1)
    device.feed(seen(2, 1))
    assert device.feed(TrainingStopped(1, "x"))[-1] == Rest(2, 0.5)
    assert device.feed(RetryDue()) == [CheckIn(2, 2.0)]


def test_work_whose_base_was_replaced_before_it_came_is_given_up_and_said_so() -> None:
    device = ready(0)
    device.feed(seen(2, 2), VersionSeen(version(1)), Assigned(assignment(2)))
    fetch, said = device.feed(VersionSeen(version(2)))
    assert fetch == Fetch(device.state.announced)
    assert isinstance(said, SayTrainingFailed)
    assert said.round == 2
    assert device.state.failures == 0
    assert device.feed(seen(3, 2)) == [CheckIn(3, 2.0)]


def test_an_assignment_from_a_replaced_version_is_answered_in_asynchronous_mode() -> None:
    device = ready(7)
    device.feed(seen(8, 3))
    (said,) = device.feed(Assigned(assignment(4, base=3)))
    assert isinstance(said, SayTrainingFailed)
    assert (said.round, device.state.work) == (4, None)


def test_an_assignment_of_a_round_that_is_over_is_ignored() -> None:
    device = ready(7)
    device.feed(seen(8, 5))
    assert device.feed(Assigned(assignment(4, base=7))) == []
    synchronous = ready(7)
    synchronous.feed(RoundSeen(announced(8)))
    assert synchronous.feed(Assigned(assignment(7, base=7))) == []


def test_a_newer_assignment_takes_the_place_of_older_work_and_says_so() -> None:
    device = flying(1)
    device.feed(seen(2, 1))
    said, stop, train = device.feed(Assigned(assignment(2, base=0)))
    assert isinstance(said, SayTrainingFailed)
    assert (said.round, stop, train) == (1, StopTraining(1), Train(assignment_of(device)))


def test_in_synchronous_mode_nothing_is_asked_for_between_a_receipt_and_the_next_round() -> None:
    device = in_training(1)
    device.feed(Trained(1), RoundSeen(announced(1, RoundPhase.TRAINING)))
    assert device.feed(Receipted(receipt(1))) == [Forget(1)]
    assert device.feed(Disconnected(), Connected()) == []
    assert device.feed(RoundSeen(announced(1, RoundPhase.CLOSED))) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


# ---------------------------------------------------------------- eligibility and participation


BARRED, FREE = EligibilityChanged(eligible=False), EligibilityChanged(eligible=True)


def suspended(number: int = 1) -> Device:
    device = in_training(number)
    assert device.feed(BARRED) == [Suspend(assignment_of(device))]
    return device


def test_a_device_that_is_not_eligible_does_not_check_in_until_it_is() -> None:
    device = ready()
    assert device.feed(BARRED, RoundSeen(announced(1))) == []
    assert device.feed(FREE) == [CheckIn(1, 2.0)]
    # A rule that breaks while the check-in waits for its moment.
    assert device.feed(BARRED, CheckInDue(1, drawn=True)) == []
    assert device.feed(FREE) == [CheckIn(1, 2.0)]
    assert device.feed(CheckInDue(1, drawn=True)) == [SendCheckIn(1)]
    # It is said: the coordinator need not hear it again.
    assert device.feed(BARRED, FREE) == []


def test_a_rule_that_breaks_suspends_the_training_and_its_end_resumes_it() -> None:
    device = suspended(1)
    assert device.feed(BARRED) == []
    assert device.feed(Assigned(assignment(1)), Disconnected(), Connected()) == []
    assert device.feed(RoundSeen(announced(1, RoundPhase.TRAINING))) == []
    assert device.feed(FREE) == [Train(assignment_of(device))]
    assert device.feed(FREE) == []
    assert device.feed(Trained(1)) == [SendOffer(1)]


def test_an_assignment_that_comes_while_a_rule_is_broken_waits_for_it() -> None:
    device = ready()
    device.feed(RoundSeen(announced(1)), BARRED)
    assert device.feed(Assigned(assignment(1))) == [Suspend(assignment_of(device))]
    assert device.feed(FREE) == [Train(assignment_of(device))]


def test_a_base_that_arrives_while_a_rule_is_broken_is_not_trained_from_yet() -> None:
    device = ready(0)
    device.feed(RoundSeen(announced(2)), VersionSeen(version(1)), Assigned(assignment(2)), BARRED)
    waits, activate = device.feed(Fetched(1))
    assert (waits, activate) == (Suspend(assignment_of(device)), Activate(device.state.announced))
    assert device.feed(FREE) == [Train(assignment_of(device))]


def test_a_suspended_training_whose_time_is_over_is_said_and_is_no_failure() -> None:
    device = suspended(1)
    stop, said = device.feed(Overdue(1, "on battery"))
    assert (stop, said) == (StopTraining(1), SayTrainingFailed(1, "on battery"))
    assert (device.state.failures, device.state.resting) == (0, False)
    assert device.feed(Overdue(1, "on battery")) == []
    assert device.feed(FREE) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


def test_an_end_of_time_that_comes_late_changes_nothing() -> None:
    device = suspended(1)
    device.feed(FREE)
    assert device.feed(Overdue(1, "on battery")) == []
    assert device.feed(Trained(1)) == [SendOffer(1)]
    assert device.feed(Overdue(1, "on battery")) == []


def test_a_training_that_ended_before_it_could_be_stopped_is_offered() -> None:
    device = suspended(1)
    assert device.feed(Trained(1)) == [SendOffer(1)]
    assert device.feed(FREE) == []
    assert device.feed(Receipted(receipt(1))) == [Forget(1)]


def test_a_round_that_is_over_ends_a_suspended_training() -> None:
    assert suspended(1).feed(RoundSeen(announced(2))) == [StopTraining(1)]
    assert suspended(1).feed(Aborted(1)) == [StopTraining(1)]


def test_in_asynchronous_mode_a_newer_version_ends_a_suspended_training_and_that_is_said() -> None:
    device = flying(1)
    device.feed(BARRED, seen(2, 1), VersionSeen(version(1)))
    stop, said, activate = device.feed(Fetched(1))
    assert (stop, activate) == (StopTraining(1), Activate(device.state.announced))
    assert isinstance(said, SayTrainingFailed)
    assert device.state.failures == 0
    assert device.feed(FREE) == [CheckIn(2, 2.0)]


def test_a_device_lets_so_many_rounds_pass_between_two_updates() -> None:
    device = ready(0)
    device.state = replace(device.state, every_rounds=3)
    device.feed(RoundSeen(announced(1)), Assigned(assignment(1)), Trained(1))
    device.feed(Receipted(receipt(1)))
    for number in (2, 3):
        device.feed(VersionSeen(version(number - 1)), Fetched(number - 1))
        assert device.feed(RoundSeen(announced(number))) == []
    device.feed(VersionSeen(version(3)), Fetched(3))
    assert device.feed(RoundSeen(announced(4))) == [CheckIn(4, 2.0)]


def test_a_training_that_failed_is_no_participation() -> None:
    device = in_training(1)
    device.state = replace(device.state, every_rounds=3)
    device.feed(TrainingStopped(1, "no memory"), RetryDue())
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


def test_a_device_checks_in_for_rounds_of_its_sampling_period_only() -> None:
    device = ready()
    assert device.feed(RoundSeen(announced(1), sampled=False)) == []
    assert device.feed(Disconnected(), Connected()) == []
    assert device.feed(RoundSeen(announced(2))) == [CheckIn(2, 2.0)]


# ---------------------------------------------------------------- versions that do not come


def test_a_version_that_does_not_fit_is_not_fetched_again_until_there_is_another() -> None:
    device = ready(0)
    device.feed(VersionSeen(version(1)))
    device.feed(FetchFailed(1, "too large", Outlook.NEVER))
    assert device.feed(VersionSeen(version(1))) == []
    assert device.feed(VersionSeen(version(2))) == [Fetch(device.state.announced)]


def test_a_device_without_the_round_s_base_does_not_check_in_and_refuses_assignments() -> None:
    device = ready(0)
    device.feed(VersionSeen(version(1)), FetchFailed(1, "too large", Outlook.NEVER))
    assert device.feed(RoundSeen(announced(2))) == []
    assert device.feed(Assigned(assignment(2))) == [SayTrainingFailed(2, "too large")]
    device.feed(VersionSeen(version(2)), Fetched(2))
    assert device.feed(RoundSeen(announced(3))) == [CheckIn(3, 2.0)]


def test_a_fetch_that_waits_for_the_disk_is_said_once_and_goes_on() -> None:
    device = ready(0)
    device.feed(RoundSeen(announced(2)), VersionSeen(version(1)), Assigned(assignment(2)))
    stalled = FetchFailed(1, "the disk is full", Outlook.UNDER_WAY)
    assert device.feed(stalled) == [SayTrainingFailed(2, "the disk is full")]
    assert device.feed(VersionSeen(version(1))) == []  # it is under way
    assert device.feed(RoundSeen(announced(2, RoundPhase.CLOSED))) == []
    device.feed(RoundSeen(RoundAnnouncement(round=3, base=1, phase=RoundPhase.GATHERING)))
    activate, check_in = device.feed(Fetched(1))
    assert (activate, check_in) == (Activate(device.state.announced), CheckIn(3, 0.0))


def test_an_update_that_was_lost_is_forgotten_and_said_so() -> None:
    device = in_training(1)
    device.feed(Trained(1))
    assert device.feed(UpdateLost(1, "gone")) == [Forget(1), SayTrainingFailed(1, "gone")]
    assert device.state.outbox == frozenset()
    assert device.feed(UpdateLost(1, "gone")) == []
    assert device.feed(Connected()) == []


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order, the device trains once a round and loses no update."""

    numbers = st.integers(1, 4)

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.running: int | None = None
        self.suspended: int | None = None
        self.eligible = True
        self.finished: set[int] = set()
        self.settled: set[int] = set()
        self.assigned: set[int] = set()
        self.answered: set[int] = set()
        self.waiting: tuple[int, bool] | None = None
        self.rests = False
        self.device.feed(Counted(3))

    def take(self, event: Event) -> None:
        wanted_before = self.wanted()
        for command in self.device.feed(event):
            match command:
                case Train(work):
                    assert self.running is None
                    assert work.round not in self.finished
                    assert self.device.state.held == work.base
                    assert work.round >= self.wanted()
                    assert self.eligible
                    self.running, self.suspended = work.round, None
                case Suspend(work):
                    assert not self.eligible
                    assert self.running in (None, work.round)
                    self.running, self.suspended = None, work.round
                case StopTraining(number):
                    assert number in (self.running, self.suspended)
                    self.running = self.suspended = None
                case SendOffer(number):
                    assert number in self.finished
                case Forget(number):
                    assert number in self.settled
                case CheckIn(number, _, share):
                    assert number not in self.assigned
                    assert not self.rests
                    self.waiting = (number, share == 1.0)
                case SendCheckIn(number):
                    assert number not in self.assigned
                    assert self.running is None
                    assert number == self.device.state.round.round
                    assert self.eligible
                    assert self.device.state.sampled
                case Rest():
                    self.rests = True
        if isinstance(event, RoundSeen) and self.running is not None:
            # A round stops the work that it does not want, and no other.
            assert self.running >= max(self.wanted(), wanted_before)

    def wanted(self) -> int:
        announcement = self.device.state.round
        return 0 if announcement is None else announcement.oldest_wanted

    @rule(number=st.integers(0, 4))
    def version_announced(self, number: int) -> None:
        self.take(VersionSeen(version(number)))

    @precondition(lambda self: self.device.state.announced is not None)
    @rule()
    def fetched(self) -> None:
        self.take(Fetched(self.device.state.announced.number))

    @precondition(lambda self: self.device.state.announced is not None)
    @rule(outlook=st.sampled_from(Outlook))
    def fetch_failed(self, outlook: Outlook) -> None:
        number = self.device.state.announced.number
        if number != self.device.state.held:
            self.take(FetchFailed(number, "failed", outlook))

    @rule(
        number=numbers,
        phase=st.sampled_from(RoundPhase),
        behind=st.none() | st.integers(0, 3),
        share=st.sampled_from([0.1, 1.0]),
        sampled=st.booleans(),
    )
    def round_announced(
        self, number: int, phase: RoundPhase, behind: int | None, share: float, sampled: bool
    ) -> None:
        oldest = None if behind is None else max(1, number - behind)
        self.take(RoundSeen(announced(number, phase, oldest=oldest, share=share), sampled))

    @rule(eligible=st.booleans())
    def eligibility_changed(self, eligible: bool) -> None:
        self.eligible = eligible
        self.take(EligibilityChanged(eligible))

    @precondition(lambda self: self.suspended is not None)
    @rule(done=st.booleans())
    def time_passes_for_what_is_suspended(self, done: bool) -> None:
        number = self.suspended
        if done:
            # It was at its end when it was told to stop.
            self.finished.add(number)
            self.suspended = None
            self.take(Trained(number))
        else:
            failures = self.device.state.failures
            self.take(Overdue(number, "not eligible"))
            assert self.device.state.failures == failures
            assert self.suspended is None

    @rule(number=numbers)
    def assigned_to_us(self, number: int) -> None:
        self.take(Assigned(assignment(number)))
        if self.device.state.assigned >= number:
            self.assigned.add(number)

    @precondition(lambda self: self.waiting is not None)
    @rule()
    def check_in_due(self) -> None:
        (number, drawn), self.waiting = self.waiting, None
        self.take(CheckInDue(number, drawn))

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
    @rule(data=st.data(), status=st.none() | st.sampled_from(ReceiptStatus))
    def answered_or_lost(self, data: st.DataObject, status: ReceiptStatus | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.device.state.outbox)))
        self.settled.add(number)
        lost = UpdateLost(number, "lost")
        self.take(lost if status is None else Receipted(receipt(number, status)))

    @rule(number=numbers)
    def aborted(self, number: int) -> None:
        self.take(Aborted(number))

    @rule(after_s=st.sampled_from([0.0, 5.0]), spread_s=st.sampled_from([0.0, 5.0]))
    def deferred(self, after_s: float, spread_s: float) -> None:
        self.take(Deferred(Retry(round=1, after_s=after_s, spread_s=spread_s)))

    @rule()
    def rested(self) -> None:
        self.rests = False
        self.take(RetryDue())

    @rule(up=st.booleans())
    def connection(self, up: bool) -> None:
        self.take(Connected() if up else Disconnected())

    @invariant()
    def every_update_is_in_the_outbox_until_its_receipt(self) -> None:
        assert self.device.state.outbox == self.finished - self.settled

    @invariant()
    def it_trains_only_while_the_rules_hold(self) -> None:
        work = self.device.state.work
        stages = {machine.Stage.TRAINING: True, machine.Stage.SUSPENDED: False}
        if work is not None and work.stage in stages:
            assert self.device.state.eligible == stages[work.stage]

    @invariant()
    def a_device_that_is_free_has_asked_for_the_newest_round(self) -> None:
        """No order of events leaves a device idle for ever."""
        state = self.device.state
        asked = (
            state.round is None
            or state.round.phase is RoundPhase.CLOSED
            or not state.connected
            or state.resting
            or state.work is not None
            or not (state.eligible and state.sampled)
            or (state.missing is not None and state.held != state.round.base)
            or max(state.checked_in, state.assigned) >= state.round.round
        )
        assert asked


TestAnyOrder = AnyOrder.TestCase
