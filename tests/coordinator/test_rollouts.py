"""The rollout machine: it widens only over what passed, and stops what is bad, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.coordinator import rollouts
from fedge.coordinator.rollout_fleet import KnownDevice, RolloutFleet
from fedge.coordinator.rollouts import Fleet, Looked, Phase, Rollout, RolloutPolicy, Wish, Wished
from fedge.schemas.rollout_share import place_of, reach

POLICY = RolloutPolicy(
    stages=(0.25, 0.5, 1.0), soak_s=100.0, min_devices=2, min_answered=0.5, max_failure_share=0.2
)
PLACES = tuple(sorted(place_of("p", 1, f"d{number}") for number in range(20)))


def looked(active: int = 0, failed: int = 0, places=PLACES) -> Looked:
    """Everybody who is known is connected."""
    return Looked(active, failed, Fleet(places, places, places))


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


# ---------------------------------------------------------------- a fleet that is not all there


THOUSAND = tuple(sorted(place_of("p", 1, f"n{number}") for number in range(1000)))


def test_a_stage_is_a_share_of_all_devices_however_few_are_there() -> None:
    policy = RolloutPolicy()
    few = THOUSAND[::25]
    state = after((0, Looked(0, 0, Fleet(THOUSAND, few, few))), policy=policy)
    assert (state.reached, state.waited_for) == (10, 1)
    assert after((10, looked(places=THOUSAND)), state=state, policy=policy).reached == 10


def test_nobody_is_reached_before_everybody_is_known() -> None:
    state = after((0, Looked(0, 0, None)), (500, Looked(0, 0, None)))
    assert (state.share, state.stage, state.since) == (0.0, 0, None)
    state = after((501, looked()), (502, looked(active=3)), (602, Looked(3, 0, None)), state=state)
    # The time has passed; nothing widens while the roll is called.
    assert (state.stage, state.reached) == (0, 5)
    assert after((603, looked(active=3)), state=state).stage == 1


def test_when_those_who_are_reached_disappear_the_sample_does_not() -> None:
    policy = RolloutPolicy(soak_s=10.0)
    state = after((0, looked(places=THOUSAND)), (1, looked(1, places=THOUSAND)), policy=policy)
    for now in range(90_000, 200_000, 1000):
        state = after((now, Looked(1, 0, Fleet(THOUSAND, (), ()))), state=state, policy=policy)
    assert (state.phase, state.stage, state.reached) == (Phase.RUNNING, 0, 10)
    assert rollouts.wanted(state, policy) == 8  # a fifth of them may fail


def test_one_device_that_is_lost_for_good_holds_up_no_fleet() -> None:
    policy = RolloutPolicy(soak_s=10.0)
    state = after((0, looked(places=THOUSAND)), policy=policy)
    left = [place for place in THOUSAND if place != min(THOUSAND)]
    for now in (90_000, 90_020):
        fleet = Fleet(THOUSAND, left, left)
        state = after((now, Looked(9, 0, fleet)), state=state, policy=policy)
    assert state.stage == 1


def test_the_lost_and_the_failed_together_are_no_more_than_may_fail() -> None:
    policy = RolloutPolicy(soak_s=10.0)
    state = after((0, looked(places=THOUSAND)), policy=policy)
    left = sorted(THOUSAND)[2:]
    state = after((90_000, Looked(7, 1, Fleet(THOUSAND, left, left))), state=state, policy=policy)
    assert rollouts.wanted(state, policy) == 9


def test_a_fleet_that_has_fewer_devices_wants_no_more_than_it_has() -> None:
    policy = RolloutPolicy(stages=(1.0,), min_devices=10)
    three = THOUSAND[:3]
    state = after((0, looked(places=three)), policy=policy)
    assert rollouts.wanted(state, policy) == 3
    # Two are forgotten for good, as the retention says.
    assert rollouts.wanted(after((1, looked(places=three[:1])), state=state), policy) == 1


def test_nothing_soaks_while_nobody_who_was_reached_is_connected() -> None:
    state = after((0, looked()), (10, looked(active=3)), (60, looked(active=3)))
    away = Looked(3, 0, Fleet(PLACES, PLACES, PLACES[5:]))
    state = after((61, away), (9000, away), state=state)
    assert (state.stage, rollouts.soaked(state, 9000)) == (0, 51)
    assert rollouts.next_look(state, POLICY, 9000) is None
    state = after((9001, looked(active=3)), (9049, looked(active=3)), state=state)
    assert state.stage == 0
    assert after((9050, looked(active=3)), state=state).stage == 1


def test_a_restart_halts_nothing_before_it_has_looked_at_the_fleet() -> None:
    """One failure of ten is no halt; of a sample of one it would be."""
    policy = RolloutPolicy(min_answered=0.1)
    kept = Rollout(stage=0, share=0.01, reached=10)
    assert after((0, Looked(0, 1, None)), state=kept, policy=policy).phase is Phase.RUNNING


def devices_seen(names: list[str], at: float, *, online: bool = False) -> list[KnownDevice]:
    return [KnownDevice(name, online, at) for name in names]


def test_a_candidate_that_kills_its_devices_reaches_no_others() -> None:
    policy, day = RolloutPolicy(), 86400.0
    names = [f"n{number}" for number in range(1000)]
    fleet = RolloutFleet("p", 1, started_at=10 * day)
    state, dead = Rollout(), dict[str, float]()
    for hour in range(24 * 6):
        now = 10 * day + hour * 3600
        alive = devices_seen([n for n in names if n not in dead], now, online=True)
        gone = [KnownDevice(name, online=False, last_seen_at=at) for name, at in dead.items()]
        # What the operator's retention forgets makes no room either.
        known = alive + (gone if hour < 100 else [])
        seen = fleet.look(known, now=now, listened_s=hour * 3600)
        state = after((now, Looked(0, 0, seen)), state=state, policy=policy)
        dead |= {n: now for n in names if n not in dead and fleet.place(n) < state.share}
    assert (state.stage, state.reached, len(dead)) == (0, 10, 10)
    lost = fleet.vanished(
        alive + gone, share=state.share, answered={min(dead)}, now=10 * day + 6 * day
    )
    # They vanished in the moment in which it began; who answered is no mystery.
    assert lost == ()
    late = [replace(one, last_seen_at=one.last_seen_at + 1) for one in gone]
    lost = fleet.vanished(late, share=state.share, answered={min(dead)}, now=16 * day)
    assert lost == tuple(sorted(set(dead) - {min(dead)}))


def test_who_was_gone_before_it_began_is_replaced_after_a_day_of_listening() -> None:
    policy, day = RolloutPolicy(), 86400.0
    names = [f"n{number}" for number in range(1000)]
    old = devices_seen(names[:900], 3 * day)
    here = devices_seen(names[900:], 10 * day, online=True)
    fleet = RolloutFleet("p", 1, started_at=10 * day)
    seen = fleet.look(old + here, now=10 * day, listened_s=0.0)
    state = after((0, Looked(0, 0, seen)), policy=policy)
    assert (state.reached, len(seen.known)) == (10, 1000)
    assert state.connected < 5
    seen = fleet.look(old + here, now=11 * day, listened_s=day)
    state = after((1, Looked(0, 0, seen)), state=state, policy=policy)
    assert (state.stage, state.connected, rollouts.wanted(state, policy)) == (0, 10, 10)


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

    `outcomes` is the store's count: a device counts once in it. `kept` is its row, and `asked` the
    wish in it: what a command writes there between the desk's read and its write comes first.
    The fleet begins with a part: after a restart nobody is known, then `known`, of whom `online`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy = POLICY
        self.names = [f"d{number}" for number in range(20)]
        self.known = self.names[:12]
        self.online = set(self.names[:3])
        self.silent: set[str] = set()
        self.roll_is_called = True
        self.asked = Wish.RUN
        self.accepted_abort = False
        self.outcomes: dict[str, bool] = {}
        self.now = 0.0
        self.state = Rollout()
        self.kept = self.state
        self.most_share = 0.0
        self.soaked_since_s: float | None = None
        self._look()

    def _fleet(self) -> Fleet | None:
        if self.roll_is_called:
            return None
        online = self._places(self.online)
        recent = self._places(set(self.known) - self.silent | self.online)
        return Fleet(self._places(self.known), recent, online)

    def _places(self, names) -> list[float]:
        return sorted(place_of("p", 1, name) for name in names)

    def _decide(self, before: Rollout) -> Rollout:
        """As the desk does with what it has read: the wish first, then what there is."""
        after = before
        if rollouts.WISHED[self.asked] is not before.phase:
            after = rollouts.step(after, Wished(self.asked, "because"), self.policy, self.now)
        active = sum(self.outcomes.values())
        looked = Looked(active, len(self.outcomes) - active, self._fleet())
        return rollouts.step(after, looked, self.policy, self.now)

    def _look(self, meanwhile: Wish | None = None) -> None:
        """`meanwhile`: the wish of a command that comes between the look and the record."""
        if not self.kept.phase.is_open:
            return
        before, read = self.state, self.asked
        after = self._decide(before)
        if meanwhile is not None:
            self._command(meanwhile)
        if self.asked is not read:
            # The store has kept nothing: the desk looks again.
            after = self._decide(before)
        self.state = after
        self._check(before, after)
        # First on disk, then in the world.
        self.kept = replace(
            after, soaked_s=rollouts.soaked(after, self.now), since=None, known=None
        )

    def _command(self, wish: Wish) -> None:
        if self.kept.phase.is_open and (self.asked is not Wish.ABORT or wish is Wish.ABORT):
            self.asked = wish
            self.accepted_abort |= wish is Wish.ABORT

    def _check(self, before: Rollout, after: Rollout) -> None:
        if after.share > before.share or after.stage > before.stage:
            assert after.phase is Phase.RUNNING
            assert rollouts.failure_share(after, self.policy) <= self.policy.max_failure_share
            assert not self.roll_is_called
            known = self._places(self.known)
            fair = reach(known, self.policy.stages, after.stage, self.policy.min_devices)
            assert after.share == fair
        if after.phase is Phase.DONE and before.phase.is_open:
            assert after.stage == len(self.policy.stages) - 1
            assert after.answered >= min(self.policy.min_devices, len(self.known))
        if after.stage > before.stage:
            assert after.stage == before.stage + 1
            reached = sum(place < before.share for place in self._places(self.known))
            assert after.answered >= min(self.policy.min_devices, reached)
            assert self.online
            assert rollouts.soaked(before, self.now) >= self.policy.soak_s

    @rule(index=st.integers(0, 19), passes=st.sampled_from([True, True, True, True, False]))
    def report(self, index: int, passes: bool) -> None:
        """Also of a device that said something else before, and of one that was never reached."""
        name = self.names[index]
        if name not in self.known:
            # The desk counts nobody of whom it has heard no birth.
            return
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
        self.online &= set(self.known)
        self._look()

    @rule(names=st.sets(st.integers(0, 19)))
    def devices_connect_and_leave(self, names: set[int]) -> None:
        self.online = {self.names[index] for index in names} & set(self.known)
        self.silent -= self.online
        self._look()

    @rule()
    def who_is_away_is_away_for_a_day(self) -> None:
        self.silent = set(self.known) - self.online
        self._look()

    @rule()
    def the_roll_has_ended(self) -> None:
        self.roll_is_called = False
        self._look()

    @rule(
        wish=st.sampled_from([Wish.PAUSE, Wish.RUN, Wish.PAUSE, Wish.RUN, Wish.ABORT]),
        in_the_midst=st.booleans(),
    )
    def wish(self, wish: Wish, in_the_midst: bool) -> None:
        if in_the_midst:
            self._look(meanwhile=wish)
        else:
            self._command(wish)
            self._look()

    @rule(later=st.sampled_from([-1000.0, 0.0, 5000.0]))
    def restart(self, later: float) -> None:
        """Another life has another clock, and remembers what was kept."""
        self.now = max(0.0, self.now + later)
        self.state = replace(self.kept, active=0, failed=0, connected=0, waited_for=None)
        self.roll_is_called = True
        self._look()

    @invariant()
    def the_share_never_shrinks(self) -> None:
        assert self.state.share >= self.most_share
        self.most_share = self.state.share

    @invariant()
    def an_abort_that_was_accepted_is_carried_out(self) -> None:
        if self.accepted_abort:
            assert self.state.phase is Phase.ABORTED

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
