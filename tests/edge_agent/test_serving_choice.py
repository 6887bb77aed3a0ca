"""What apps use while rollouts say so: the table row by row, and any standing at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.edge_agent.serving_choice import (
    Candidate,
    Choice,
    PutBack,
    Standing,
    Stay,
    Take,
    Try,
    choose,
)
from fedge.schemas.messages import CandidatePhase, TrialOutcome

RUNNING, PAUSED = CandidatePhase.RUNNING, CandidatePhase.PAUSED
DONE, WITHDRAWN = CandidatePhase.DONE, CandidatePhase.WITHDRAWN
PASSED, FAILED = TrialOutcome.ACTIVE, TrialOutcome.ROLLED_BACK


def standing(phase: CandidatePhase = RUNNING, **facts: object) -> Standing:
    """Version 7 is tried in rollout 2, beside 5, which this device uses."""
    usual = Standing(stable=5, candidate=Candidate(2, 7, phase), is_in=True, serving=5)
    return replace(usual, **facts)


@pytest.mark.parametrize(
    ("here", "choice"),
    [
        # Nothing in use.
        (standing(serving=None), Take(5)),
        (standing(serving=None, is_in=False), Take(5)),
        (standing(serving=None, standby=4), PutBack(4)),
        (standing(serving=None, failed=frozenset({5})), Try(2, 7)),
        (standing(serving=None, is_in=False, failed=frozenset({5})), Stay()),
        # Not in the share.
        (standing(is_in=False), Stay()),
        (standing(is_in=False, serving=3), Take(5)),
        (standing(is_in=False, serving=3, failed=frozenset({5})), Stay()),
        # In the share.
        (standing(), Try(2, 7)),
        (standing(serving=3), Try(2, 7)),
        (standing(PAUSED), Stay()),
        (standing(PAUSED, serving=3), Take(5)),
        (standing(DONE), Try(2, 7)),
        (standing(DONE, stable=7), Try(2, 7)),
        # It passed.
        (standing(verdict=PASSED), Take(7)),
        (standing(verdict=PASSED, serving=7, standby=5), Stay()),
        (standing(PAUSED, verdict=PASSED), Take(7)),
        (standing(DONE, stable=7, verdict=PASSED, serving=7), Stay()),
        # It failed.
        (standing(verdict=FAILED, failed=frozenset({7})), Stay()),
        (standing(verdict=FAILED, failed=frozenset({7}), serving=3), Take(5)),
        (standing(DONE, stable=7, verdict=FAILED, failed=frozenset({7})), Stay()),
        # It is taken back.
        (standing(WITHDRAWN, verdict=PASSED, serving=7, standby=5), PutBack(5)),
        (standing(WITHDRAWN, verdict=PASSED, serving=7, standby=4), PutBack(4)),
        (standing(WITHDRAWN, verdict=PASSED, serving=7), Take(5)),
        (standing(WITHDRAWN, verdict=PASSED, serving=7, standby=7), Take(5)),
        (standing(WITHDRAWN, serving=4, standby=4), Take(5)),
        (standing(WITHDRAWN, serving=5), Stay()),
        # The operator tries again what failed or passed in an earlier rollout.
        (standing(failed=frozenset({7})), Try(2, 7)),
        (standing(serving=7, standby=5), Try(2, 7)),
        # Before the first rollout.
        (standing(DONE, candidate=Candidate(0, 5, DONE)), Stay()),
        (standing(DONE, candidate=Candidate(0, 5, DONE), serving=3), Take(5)),
    ],
)
def test_the_table(here: Standing, choice: Choice) -> None:
    assert choose(here) == choice


versions = st.integers(1, 6)
standings = st.builds(
    Standing,
    stable=versions,
    candidate=st.builds(Candidate, st.integers(0, 3), versions, st.sampled_from(CandidatePhase)),
    is_in=st.booleans(),
    serving=st.none() | versions,
    standby=st.none() | versions,
    verdict=st.none() | st.sampled_from(TrialOutcome),
    failed=st.frozensets(versions, max_size=3),
)


def done(here: Standing, choice: Choice, *, passes: bool) -> Standing:
    """The standing after the choice was carried out."""
    match choice:
        case Try(_, version):
            failed = here.failed - {version} if passes else here.failed | {version}
            return replace(here, verdict=PASSED if passes else FAILED, failed=failed)
        case Take(version):
            standby = here.serving if here.serving not in (None, version) else here.standby
            return replace(here, serving=version, standby=standby)
        case PutBack(version):
            return replace(here, serving=version)
        case Stay():
            return here


@given(standings, st.booleans())
def test_carried_out_again_and_again_it_comes_to_rest_at_a_version_that_may_be_used(
    here: Standing, passes: bool
) -> None:
    tried = 0
    for _ in range(8):
        choice = choose(here)
        if isinstance(choice, Stay):
            break
        tried += isinstance(choice, Try)
        here = done(here, choice, passes=passes)
    assert isinstance(choose(here), Stay)
    assert tried <= 1
    candidate = here.candidate
    if (
        candidate.phase is WITHDRAWN
        and candidate.version != here.stable
        and here.serving == candidate.version
    ):
        # Only where there is nothing else on this device and nothing else to be had.
        assert here.stable in here.failed


@given(standings)
def test_who_is_not_in_never_tries_and_what_is_paused_begins_nowhere(here: Standing) -> None:
    outside = replace(here, is_in=False)
    assert not isinstance(choose(outside), Try)
    paused = replace(here, candidate=replace(here.candidate, phase=PAUSED))
    assert not isinstance(choose(paused), Try)
    withdrawn = replace(here, candidate=replace(here.candidate, phase=WITHDRAWN))
    assert not isinstance(choose(withdrawn), Try)


@given(standings)
def test_a_candidate_without_a_verdict_is_never_put_into_use(here: Standing) -> None:
    here = replace(here, verdict=None)
    choice = choose(here)
    if isinstance(choice, Take):
        assert choice.version == here.stable
