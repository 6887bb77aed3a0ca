"""Memory and open files of every program, sampled while the faults go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

SETTLED_AFTER_S = 20.0
"""A process that has just started is still loading its libraries."""
LEAST_SPAN_S = 20.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process. `at_s`: monotonic seconds."""

    program: str
    pid: int
    at_s: float
    rss_bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Growth:
    """How a program's processes grew after they had settled.

    `slope_bytes_per_s`: of the longest-lived one, by least squares over `slope_span_s`; None if
    none lived long enough.
    `growth_bytes`: the most that any of them grew.
    """

    program: str
    max_rss_bytes: int
    growth_bytes: int
    slope_bytes_per_s: float | None
    max_descriptors: int
    descriptors_growth: int
    slope_span_s: float = 0.0


def sample(program: str, pid: int) -> Sample | None:
    """A look at a process; None if it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        with process.oneshot():
            return Sample(
                program, pid, time.monotonic(), process.memory_info().rss, process.num_fds()
            )
    return None


def growth(program: str, samples: Sequence[Sample]) -> Growth | None:
    """What the samples of one program say; None without one."""
    own = [each for each in samples if each.program == program]
    if not own:
        return None
    lives: dict[int, list[Sample]] = {}
    for each in own:
        lives.setdefault(each.pid, []).append(each)
    grown, opened = [0], [0]
    slopes: list[tuple[float, float | None]] = [(LEAST_SPAN_S, None)]
    for life in lives.values():
        settled = [each for each in life if each.at_s - life[0].at_s >= SETTLED_AFTER_S]
        if not settled:
            continue
        grown.append(max(each.rss_bytes for each in settled) - settled[0].rss_bytes)
        opened.append(max(each.descriptors for each in settled) - settled[0].descriptors)
        span_s = settled[-1].at_s - settled[0].at_s
        if span_s >= LEAST_SPAN_S:
            at_s = [each.at_s for each in settled]
            rss_bytes = [float(each.rss_bytes) for each in settled]
            slopes.append((span_s, float(np.polyfit(at_s, rss_bytes, 1)[0])))
    slope_span_s, slope_bytes_per_s = max(slopes, key=lambda slope: slope[0])
    return Growth(
        program,
        max_rss_bytes=max(each.rss_bytes for each in own),
        growth_bytes=max(grown),
        slope_bytes_per_s=slope_bytes_per_s,
        max_descriptors=max(each.descriptors for each in own),
        descriptors_growth=max(opened),
        slope_span_s=0.0 if slope_bytes_per_s is None else slope_span_s,
    )
