"""The rollout machine: it widens only over what passed, and stops what is bad, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.coordinator import rollouts
from fedge.coordinator.rollouts import Looked, Phase, Rollout, RolloutPolicy, Wish, Wished
from fedge.schemas.rollout_share import place_of, reach

POLICY = RolloutPolicy(
    stages=(0.25, 0.5, 1.0), soak_s=100.0, min_devices=2, min_answered=0.5, max_failure_share=0.2
)
PLACES = tuple(sorted(place_of("p", 1, f"d{number}") for number in range(20)))


def looked(active: int = 0, failed: int = 0, places=PLACES) -> Looked:
    return Looked(active, failed, places)


def after(*events, state=None, policy=POLICY) -> Rollout:
    """The state after events, each with its moment."""
    state = state or Rollout()
    for now, event in events:
        state = rollouts.step(state, event, policy, now)
    return state


# ---------------------------------------------------------------- the table, row by row


def test_it_begins_with_the_devices_of_the_first_stage() -> None:
    state = after((0, looked()))
    assert (state.phase, state.stage, state.reached) == (Phase.RUNNING, 0, 5)
    assert sum(place < state.share for place in PLACES) == 5


def test_time_does_not_count_before_enough_have_answered() -> None:
    state = after((0, looked()), (10_000, looked(active=2)), (10_001, looked(active=2)))
    assert state.stage == 0
    assert rollouts.wanted(state, POLICY) == 3
    assert rollouts.soaked(state, 10_001) == 0


def test_with_enough_answers_it_soaks_and_then_reaches_more() -> None:
    state = after((0, looked()), (10, looked(active=3)), (109.9, looked(active=3)))
    assert (state.stage, rollouts.next_look(state, POLICY, 109.9)) == (0, pytest.approx(110))
    state = after((110, looked(active=3)), state=state)
    assert (state.stage, state.reached, state.soaked_s) == (1, 10, 0)
    assert rollouts.wanted(state, POLICY) == 5


def test_after_the_last_stage_it_is_done() -> None:
    state = replace(after((0, looked())), stage=2, share=1.0, reached=20)
    state = after((0, looked(active=10)), (100, looked(active=10)), state=state)
    assert state.phase is Phase.DONE
    assert after((101, Wished(Wish.ABORT)), (102, looked(failed=20)), state=state) == state


def test_too_many_failures_stop_it_before_the_sample_is_whole() -> None:
    state = replace(after((0, looked())), stage=2, share=1.0, reached=20)
    # Ten of twenty are wanted: with three failures even seven that pass would be too few.
    assert after((1, looked(active=1, failed=2)), state=state).phase is Phase.RUNNING
    halted = after((1, looked(active=0, failed=3)), state=state)
    assert halted.phase is Phase.HALTED
    assert "3 of 3 devices rolled it back" in halted.reason


def test_a_pause_keeps_the_share_and_stops_the_time() -> None:
    state = after((0, looked()), (10, looked(active=3)), (60, Wished(Wish.PAUSE)))
    state = after((500, looked(active=5)), state=state)
    assert (state.phase, state.stage, rollouts.soaked(state, 900)) == (Phase.PAUSED, 0, 50)
    state = after((1000, Wished(Wish.RUN)), (1049, looked(active=5)), state=state)
    assert state.stage == 0
    assert after((1050, looked(active=5)), state=state).stage == 1


def test_what_is_paused_is_stopped_too_if_it_fails() -> None:
    state = after((0, looked()), (1, Wished(Wish.PAUSE)), (2, looked(active=1, failed=2)))
    assert state.phase is Phase.HALTED


def test_a_restart_takes_up_the_stage_and_what_was_soaked_and_not_the_time_between() -> None:
    state = after((0, looked()), (10, looked(active=3)), (70, looked(active=3)))
    kept = Rollout(stage=0, share=state.share, reached=5, soaked_s=rollouts.soaked(state, 70))
    # Another life has another clock.
    state = after((5, looked(active=3)), (44, looked(active=3)), state=kept)
    assert state.stage == 0
    assert after((45, looked(active=3)), state=state).stage == 1


@pytest.mark.parametrize(("devices", "reached"), [(0, [0]), (1, [1]), (3, [1, 1, 2, 3])])
def test_the_smallest_fleets_are_not_reached_all_at_once(devices: int, reached: list[int]) -> None:
    policy = RolloutPolicy(soak_s=0.0, max_failure_share=0.0)
    places = tuple(sorted(place_of("small", 1, f"d{n}") for n in range(devices)))
    state, seen = Rollout(), []
    for now in range(20):
        state = rollouts.step(state, looked(state.reached, 0, places), policy, now)
        if state.phase is Phase.RUNNING and (not seen or seen[-1][0] != state.stage):
            seen.append((state.stage, state.reached))
    assert [count for _, count in seen][: len(reached)] == reached


# ---------------------------------------------------------------- whom a stage reaches


@given(
    devices=st.integers(1, 400),
    rollout=st.integers(1, 5),
    min_devices=st.integers(1, 50),
    stages=st.lists(st.floats(0.001, 0.999), max_size=5, unique=True),
)
def test_stages_reach_more_and_more_and_the_last_one_all(devices, rollout, min_devices, stages):
    names = [f"device-{number}" for number in range(devices)]
    places = sorted(place_of("p", rollout, name) for name in names)
    rising = [*sorted(stages), 1.0]
    counts = []
    for stage, nominal in enumerate(rising):
        share = reach(places, rising, stage, min_devices)
        counts.append(sum(place < share for place in places))
        assert counts[-1] >= nominal * devices - 1e-9
        # Only the minimum makes it more, and never more than the stage's part of the steps.
        part = devices * (stage + 1) // len(rising)
        assert counts[-1] <= max(nominal * devices + 1, min(min_devices, part))
    assert counts == sorted(counts)
    assert counts[-1] == devices


def test_places_are_even_and_others_in_each_rollout() -> None:
    names = [f"pi-{number}" for number in range(20_000)]
    first = {name for name in names if place_of("kitchen", 1, name) < 0.1}
    second = {name for name in names if place_of("kitchen", 2, name) < 0.1}
    other = {name for name in names if place_of("office", 1, name) < 0.1}
    for chosen in (first, second, other):
        # Binomial: five standard deviations are 212.
        assert abs(len(chosen) - 2000) < 212
    for one in (second, other):
        assert abs(len(first & one) - 200) < 75
    parts = [0] * 20
    for name in names:
        parts[int(place_of("kitchen", 1, name) * 20)] += 1
    assert max(abs(part - 1000) for part in parts) < 160


def test_a_place_is_the_same_for_ever() -> None:
    """Devices and coordinators of different releases must agree."""
    assert place_of("digits", 3, "pi-7") == 0.9127583843655884
    assert place_of("digits", 3, "pi-7") * 2**32 % 1 == 0


# ---------------------------------------------------------------- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Devices report, again and late; the operator wishes; the coordinator is started again.

    `outcomes` is the store: a device counts once in it. `heard`: who has heard that the candidate
    was withdrawn goes back; nobody else is told to use it then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy = POLICY
        self.names = [f"d{number}" for number in range(20)]
        self.known = self.names[:12]
        self.outcomes: dict[str, bool] = {}
        self.now = 0.0
        self.state = Rollout()
        self.kept = self.state
        self.most_share = 0.0
        self.soaked_since_s: float | None = None
        self._look()

    def _places(self) -> list[float]:
        return sorted(place_of("p", 1, name) for name in self.known)

    def _step(self, event: rollouts.Event) -> None:
        before = self.state
        self.state = rollouts.step(before, event, self.policy, self.now)
        after = self.state
        if after.share > before.share or after.stage > before.stage:
            assert after.phase is Phase.RUNNING
            assert rollouts.failure_share(after, self.policy) <= self.policy.max_failure_share
        if after.stage > before.stage:
            assert after.stage == before.stage + 1
            assert after.answered >= rollouts.wanted(
                replace(before, active=after.active, failed=after.failed), self.policy
            )
            assert rollouts.soaked(before, self.now) >= self.policy.soak_s
        if before.phase.is_open:
            # First on disk, then in the world.
            self.kept = replace(after, soaked_s=rollouts.soaked(after, self.now), since=None)

    def _look(self) -> None:
        active = sum(self.outcomes.values())
        self._step(Looked(active, len(self.outcomes) - active, self._places()))

    @rule(index=st.integers(0, 19), passes=st.sampled_from([True, True, True, True, False]))
    def report(self, index: int, passes: bool) -> None:
        """Also of a device that said something else before, and of one that was never reached."""
        name = self.names[index]
        if place_of("p", 1, name) < self.state.share:
            self.outcomes.setdefault(name, passes)
        self._look()

    @rule(seconds=st.sampled_from([0.1, 30.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._look()

    @precondition(lambda self: len(self.known) < 20)
    @rule()
    def somebody_comes(self) -> None:
        self.known = self.names[: len(self.known) + 1]
        self._look()

    @rule()
    def devices_are_forgotten(self) -> None:
        self.known = self.known[:6]
        self._look()

    @rule(wish=st.sampled_from([Wish.PAUSE, Wish.RUN, Wish.PAUSE, Wish.RUN, Wish.ABORT]))
    def wish(self, wish: Wish) -> None:
        self._step(Wished(wish, "because"))

    @rule(later=st.sampled_from([-1000.0, 0.0, 5000.0]))
    def restart(self, later: float) -> None:
        """Another life has another clock, and remembers what was kept."""
        self.now = max(0.0, self.now + later)
        self.state = replace(self.kept, active=0, failed=0)
        self._look()

    @invariant()
    def the_share_never_shrinks(self) -> None:
        assert self.state.share >= self.most_share
        self.most_share = self.state.share

    @invariant()
    def a_device_is_counted_once(self) -> None:
        if self.state.phase.is_open:
            assert self.state.answered <= len(self.outcomes)

    @invariant()
    def above_the_failure_share_it_is_stopped(self) -> None:
        if self.state.phase.is_open:
            assert rollouts.failure_share(self.state, self.policy) <= self.policy.max_failure_share

    @invariant()
    def what_was_stopped_says_why(self) -> None:
        if self.state.phase in (Phase.HALTED, Phase.ABORTED):
            assert self.state.reason


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck), deadline=None
)
