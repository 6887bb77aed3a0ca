"""What a device lets its apps use while rollouts say so: a pure choice, and nothing about how.

    the device                                        lets apps use
    ------------------------------------------------  --------------------------------------------
    uses nothing yet, or lost what it used            the last good version, else the stable one
    uses a candidate that is withdrawn                the last good version, at once
    is in the share, and has not tried the candidate  what it uses; it tries the candidate, unless
                                                      the rollout is paused
    is in the share, and the candidate passed         the candidate
    is in the share, and the candidate failed         the stable version
    is not in the share                               the stable version
    … but the stable version failed here              what it uses

The same standing always gives the same choice, so a device that was killed at any moment goes on,
and what is announced again changes nothing. What a rollout's candidate is tried with is not known
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedge.schemas.messages import CandidatePhase, TrialOutcome


@dataclass(frozen=True, slots=True)
class Candidate:
    """The newest rollout's version, as it is announced. `rollout` 0: there was none."""

    rollout: int
    version: int
    phase: CandidatePhase


@dataclass(frozen=True, slots=True)
class Standing:
    """What a device knows.

    `is_in`: the rollout reaches this device. `serving`: the version in use. `standby`: the last
    good one before it, whose file is here. `verdict`: how the candidate's trial in this rollout
    ended. `failed`: versions that are not to be used here.
    """

    stable: int
    candidate: Candidate
    is_in: bool = False
    serving: int | None = None
    standby: int | None = None
    verdict: TrialOutcome | None = None
    failed: frozenset[int] = frozenset()


# ---------------------------------------------------------------- choices


@dataclass(frozen=True, slots=True)
class Stay:
    """What is in use is right."""


@dataclass(frozen=True, slots=True)
class Try:
    """Fetch the candidate and check it beside what is in use; then there is a verdict."""

    rollout: int
    version: int


@dataclass(frozen=True, slots=True)
class Take:
    """Put this version into use; fetch and check it first if its file is not here."""

    version: int


@dataclass(frozen=True, slots=True)
class PutBack:
    """Put the last good version into use again: its file is here."""

    version: int


Choice = Stay | Try | Take | PutBack


def choose(here: Standing) -> Choice:
    """What to do next; asked again when it is done."""
    candidate, standby = here.candidate, here.standby
    if here.serving is None and standby is not None:
        return PutBack(standby)
    if here.serving is None and here.stable not in here.failed:
        # First something to fall back upon.
        return Take(here.stable)
    withdrawn = candidate.phase is CandidatePhase.WITHDRAWN
    if withdrawn and here.serving == candidate.version != here.stable:
        if standby is not None and standby not in (here.serving, *here.failed):
            return PutBack(standby)
    elif _is_for_us(here):
        if here.verdict is None and candidate.phase is not CandidatePhase.PAUSED:
            return Try(candidate.rollout, candidate.version)
        if here.verdict is TrialOutcome.ACTIVE:
            return _take(candidate.version, here)
    return _take(here.stable, here)


def _is_for_us(here: Standing) -> bool:
    candidate = here.candidate
    return here.is_in and candidate.rollout > 0 and candidate.phase is not CandidatePhase.WITHDRAWN


def _take(version: int, here: Standing) -> Choice:
    if version == here.serving or version in here.failed:
        return Stay()
    return Take(version)
