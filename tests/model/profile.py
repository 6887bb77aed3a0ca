"""How long the models search: some seconds in the unit suite, as long as you like by hand.

`HYPOTHESIS_PROFILE=deep pytest tests/model` tries many times more and longer runs. A failure prints
the shortest sequence of rules that Hypothesis found, and a blob for `@reproduce_failure`. Each run
of the suite searches elsewhere, but for those with `CI=true`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


def search(*, examples: int, steps: int, deep_examples: int, deep_steps: int) -> settings:
    """Settings of one model: `examples` runs of at most `steps` rules, or the deep ones."""
    return settings(
        max_examples=deep_examples if DEEP else examples,
        stateful_step_count=deep_steps if DEEP else steps,
        # The machine is shared: how long an example takes says nothing.
        deadline=None,
        # A run of a whole fleet is slow and draws much, and is meant to.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        print_blob=True,
        # What decides whether a change lands must say the same twice.
        derandomize=os.environ.get("CI") == "true" and not DEEP,
        # To shrink takes minutes, and the suite's time limit would end it with nothing said.
        phases=[each for each in Phase if DEEP or each not in (Phase.shrink, Phase.explain)],
        report_multiple_bugs=False,
    )
