"""The whole protocol in virtual time: a real coordinator, real agents, and everything that happens.

The broker, the threads, the training and the clocks are simulated (`world`, `hosts`); everything
else is what the programs run. Hypothesis decides what goes wrong and when. The books are kept apart
(`accounts`). The claims, after each step:

1.  An update whose receipt said *accepted* counts in exactly one version, or its round is recorded
    as abandoned with a reason, or is still open. Receipts that say otherwise are true as well.
2.  Each version is its base and the weighted mean of the updates recorded for its round, no more
    and no less: worked out anew from the numbers that the devices made up.
3.  No update is in two versions. Version numbers rise by one; a round closes once, for good.
4.  What a device knows to be the newest version, and what it uses, never goes back.
5.  A device does not train for a round again, unless a restart took its work before it was durable.
6.  No program ends by itself, unless its disk refuses.

And in the end, once every fault is healed: within a bounded time there is another version, and
every device uses it or a newer one.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.coordinator.export import rolled_back
from fedge.coordinator.rounds import Mode, Strategy
from fedge.coordinator.settings import RoundSettings, UploadSettings
from fedge.coordinator.store import Retention, Store
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.link.memory import NO_FAULTS, Faults
from tests.model.accounts import Accounts
from tests.model.durable_steps import DurableSteps
from tests.model.hosts import CoordinatorHost, DeviceHost, Host, prepare_store
from tests.model.profile import search
from tests.model.scratch import scratch_folder
from tests.model.world import World

BAD_NETWORKS = (
    Faults(drop=0.2),
    Faults(duplicate=0.5),
    Faults(reorder=0.5),
    Faults(delay_s=20.0),
    Faults(drop=0.05, duplicate=0.2, reorder=0.2, delay_s=5.0),
)
# A task that is cancelled before its first step leaves the coroutine in it unused.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
LONGEST_RECOVERY_S = 3600.0
"""Devices whose trainings failed rest for up to 15 minutes and a quarter, and a round that was
abandoned is followed by one that may need as long again."""
RESTART_S = 20.0
"""What was killed and is wanted runs again after so long, at the latest."""
PLACES = st.integers(0, 3)


@st.composite
def round_settings(draw: st.DrawFn, devices: int) -> RoundSettings:
    """What suits a fleet of so many devices."""
    goal = draw(st.integers(1, devices))
    mode = draw(st.sampled_from([Mode.SYNC, Mode.SYNC, Mode.ASYNC]))
    cyclic = mode is Mode.SYNC and draw(st.integers(0, 4)) == 0
    return RoundSettings(
        goal=goal,
        quorum=draw(st.integers(1, goal)),
        gather_s=10.0,
        deadline_s=draw(st.sampled_from([45.0, 120.0])),
        retry_s=draw(st.sampled_from([0.0, 10.0])),
        mode=mode,
        strategy=Strategy.CYCLIC if cyclic else Strategy.FEDAVG,
        concurrency=devices if mode is Mode.ASYNC else None,
        max_staleness=draw(st.sampled_from([0, 20])) if mode is Mode.ASYNC else 20,
        max_update_norm=1e15,
    )


@dataclass(frozen=True)
class Fleet:
    """How many devices there are, and what the operator has configured."""

    devices: int
    rounds: RoundSettings
    slots: int = 2
    retention: Retention | None = None


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    devices = draw(st.integers(2, 4))
    return Fleet(
        devices,
        draw(round_settings(devices)),
        slots=draw(st.integers(1, 3)),
        retention=draw(st.sampled_from([None, Retention(versions=8, rounds=8)])),
    )


class Protocol(RuleBasedStateMachine):
    """A fleet, and its fate."""

    hosts: list[Host]
    template: ClassVar[tempfile.TemporaryDirectory[str] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.hosts = []

    @initialize(seed=st.integers(0, 2**32 - 1), fleet=fleets())
    def begin(self, seed: int, fleet: Fleet) -> None:
        if Protocol.template is None:
            Protocol.template = tempfile.TemporaryDirectory(prefix="fedge-model-")
            prepare_store(Path(Protocol.template.name))
        self.folder = scratch_folder()
        shutil.copytree(Protocol.template.name, self.folder / "coordinator")
        self.world = World(random.Random(seed))
        self.steps = DurableSteps(self.world)
        self.coordinator = CoordinatorHost(
            "coordinator",
            self.folder / "coordinator",
            self.world,
            rounds=fleet.rounds,
            uploads=UploadSettings(slots=fleet.slots, window=2),
            retention=fleet.retention,
        )
        self.devices = [
            DeviceHost(f"d{i}", self.folder / f"d{i}", self.world, examples=i + 1, training_s=30.0)
            for i in range(fleet.devices)
        ]
        self.accounts = Accounts(self.coordinator.folder, self.devices)
        for device in self.devices:
            device.done, device.beginning = self.accounts.done, self.accounts.beginning
            device.failed = self.accounts.failed
        self.hosts = [self.coordinator, *self.devices]
        self.broker_runs = True

    def teardown(self) -> None:
        if not self.hosts:
            return
        try:
            self.the_fleet_recovers_once_every_fault_is_healed()
        finally:
            for host in self.hosts:
                host.kill()
            self.world.end()
            self.accounts.close()
            self.steps.close()
            shutil.rmtree(self.folder)

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.3, 3.0, 15.0, 40.0, 90.0]))
    def pass_time(self, seconds: float) -> None:
        while seconds > 0:
            for host in self.hosts:
                if host.wanted:
                    host.start()
            self.world.pass_time(min(seconds, RESTART_S))
            seconds -= RESTART_S
            for host in self.hosts:
                host.look()
                assert host.ended is None or _is_storage(host.ended), f"{host.name} has ended"
            self.the_books_add_up()

    @rule(seconds=st.sampled_from([10.0, 40.0]))
    def pass_some_more_time(self, seconds: float) -> None:
        self.pass_time(seconds)

    # ------------------------------------------------------------ faults

    @rule(faults=st.sampled_from([NO_FAULTS, NO_FAULTS, *BAD_NETWORKS]))
    def the_network_is(self, faults: Faults) -> None:
        self.world.broker.faults = faults

    @rule(place=PLACES, session=st.integers(0, 1), back=st.booleans())
    def a_session_is_cut_off(self, place: int, session: int, back: bool) -> None:
        client_id = self._at(place).client_ids[session]
        self.world.cut_off(client_id)
        self.world.settle()
        if back:
            self.world.reconnect(client_id)

    @rule()
    def everybody_has_a_network_again(self) -> None:
        self.world.reconnect()

    @rule(back=st.booleans())
    def the_broker_is_killed(self, back: bool) -> None:
        if self.broker_runs:
            self.world.broker.kill()
            self.broker_runs = False
            self.world.settle()
        if back:
            self.the_broker_starts()

    @precondition(lambda self: not self.broker_runs)
    @rule()
    def the_broker_starts(self) -> None:
        self.world.broker.start()
        self.broker_runs = True

    @rule(place=PLACES, back=st.booleans())
    def a_program_is_killed(self, place: int, back: bool) -> None:
        host = self._at(place)
        host.kill()
        host.wanted = back

    @rule(place=PLACES, steps=st.integers(0, 40))
    def a_program_is_killed_amid_a_write(self, place: int, steps: int) -> None:
        process = self._at(place).process
        if process is not None:
            process.steps_to_live = steps

    @rule(place=PLACES, callbacks=st.integers(0, 400))
    def a_program_is_killed_amid_its_work(self, place: int, callbacks: int) -> None:
        process = self._at(place).process
        if process is not None:
            process.callbacks_to_live = callbacks

    @rule(place=PLACES)
    def a_program_is_stopped(self, place: int) -> None:
        self._at(place).stop()

    @rule(place=PLACES)
    def a_program_is_started(self, place: int) -> None:
        self._at(place).wanted = True

    @rule(place=PLACES, refuses=st.booleans())
    def a_disk_is_full_or_not(self, place: int, refuses: bool) -> None:
        self._at(place).refuse_writes(refuses)

    @rule(place=PLACES, hours=st.sampled_from([-24, -1, 0, 1, 24]))
    def a_clock_is_set(self, place: int, hours: int) -> None:
        self._at(place).clock_error_s = 3600.0 * hours

    @rule(place=PLACES, fails=st.booleans())
    def trainings_of_a_device_fail_or_not(self, place: int, fails: bool) -> None:
        self.devices[place % len(self.devices)].fails = fails

    @rule(place=PLACES, how=st.sampled_from(["its card is new", "a file is damaged"]))
    def a_device_loses_what_it_had(self, place: int, how: str) -> None:
        device = self.devices[place % len(self.devices)]
        if how == "its card is new":
            device.lose_everything()
            self.accounts.forget(device)
        else:
            device.damage_an_update()

    @rule(rounds=round_settings(2))
    def the_operator_changes_the_settings(self, rounds: RoundSettings) -> None:
        self.coordinator.rounds = rounds
        self.coordinator.stop()

    @rule(back=st.integers(1, 3), told=st.booleans())
    def the_operator_rolls_back(self, back: int, told: bool) -> None:
        with Store.open(self.coordinator.folder) as store:
            newest = store.newest_version()
            if newest is None or newest.number < back:
                return
            target = store.version(newest.number - back)
            assert target is not None
            if not target.files_kept:
                return
            store.record_version(rolled_back(newest, target, time.time()))
        if told:
            self.coordinator.tell_to_look_again()

    def _at(self, place: int) -> Host:
        return self.hosts[place % len(self.hosts)]

    # ------------------------------------------------------------ the claims

    @invariant()
    def the_books_add_up(self) -> None:
        if self.hosts:
            self.accounts.look()
            self.accounts.look_at_broker(self.world.broker.retained)

    def the_fleet_recovers_once_every_fault_is_healed(self) -> None:
        self.the_network_is(NO_FAULTS)
        self.everybody_has_a_network_again()
        if not self.broker_runs:
            self.the_broker_starts()
        for host in self.hosts:
            host.refuse_writes(False)
            host.wanted = True
            if host.process is not None:
                host.process.spare()
        for device in self.devices:
            device.fails = False
        self.accounts.look()
        wanted = self.accounts.versions
        ends_s = self.world.now_s + LONGEST_RECOVERY_S
        while self.world.now_s < ends_s:
            self.pass_time(RESTART_S)
            if min(self.accounts.active(device) for device in self.devices) >= wanted:
                break
        else:
            raise AssertionError(f"no version {wanted} everywhere after an hour without faults")
        self.accounts.look_back()


def _is_storage(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_storage(each) for each in error.exceptions)
    return isinstance(error, StoreUnavailable)


TestProtocol = Protocol.TestCase
TestProtocol.settings = search(examples=15, steps=25, deep_examples=2_000, deep_steps=60)
