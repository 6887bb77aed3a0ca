"""What is checked after a run, each in a sentence for whoever has to trust the report.

A table and nothing else; the functions are in `checks`, `log_checks`, `run`, `history` and
`judgement`. The headings are those of `docs/guarantees.md`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Promise:
    """`check`: its name in the code. `heading`: of its guarantee. `cases`: what is looked at."""

    check: str
    heading: str
    sentence: str
    cases: str


ONCE = "1. accepted means counted once"
RISING = "2. numbers rise, and a published version can be had again"
GOING_ON = "3. killed at any instant, it goes on without a human"
BOUNDED = "5. nobody delays a round or fills a program"

PROMISES = (
    Promise(
        "receipts_hold",
        ONCE,
        "what was told accepted is in the store, byte for byte",
        "receipts",
    ),
    Promise(
        "ledgers_agree",
        ONCE,
        "the store agrees with what each device noted for itself",
        "ledger lines",
    ),
    Promise(
        "contributions_end",
        ONCE,
        "each update in one round, each round one version or a reason",
        "updates and rounds",
    ),
    Promise(
        "versions_are_their_updates",
        ONCE,
        "computed again, each is the mean of its updates, each once",
        "versions",
    ),
    Promise(
        "every_update_is_answered",
        ONCE,
        "after the faults every update from before has its answer",
        "updates made",
    ),
    Promise(
        "versions_rise",
        RISING,
        "0, 1, 2, … without a gap, each made from the one before",
        "versions",
    ),
    Promise(
        "taken_back",
        RISING,
        "what was in the store once is in every later reading of it",
        "records",
    ),
    Promise(
        "coordinator_rises",
        RISING,
        "the coordinator announces no older version after a newer one",
        "announcements",
    ),
    Promise(
        "observer_rises",
        RISING,
        "a listener at the broker hears no older after a newer one",
        "announcements",
    ),
    Promise(
        "versions_can_be_exported",
        RISING,
        "each can be exported from the store, version 0 included",
        "versions",
    ),
    Promise(
        "the_fleet_goes_on",
        GOING_ON,
        "after the faults further versions are made",
        "versions",
    ),
    Promise(
        "devices_follow",
        GOING_ON,
        "after the faults every device uses one of these",
        "devices",
    ),
    Promise(
        "presence_is_right",
        GOING_ON,
        "the list of devices shows who is there, and who has left",
        "looks at a device",
    ),
    Promise(
        "work_is_done_once",
        GOING_ON,
        "no round is trained for, and no update settled, twice",
        "jobs and receipts",
    ),
    Promise(
        "exits_are_explained",
        GOING_ON,
        "a program ends by itself only at a start on a bad disk",
        "ends of a program",
    ),
    Promise(
        "stops_are_orderly",
        GOING_ON,
        "SIGTERM ends a program soon and in order",
        "SIGTERMs",
    ),
    Promise(
        "logs_have_no_traceback",
        GOING_ON,
        "a failure is a sentence in a log, never a traceback",
        "log lines",
    ),
    Promise(
        "rounds_end",
        BOUNDED,
        "no round is longer than its deadline and the faults in it",
        "rounds",
    ),
    Promise(
        "questions_are_answered",
        BOUNDED,
        "nobody has to ask again where no fault was in the way",
        "questions",
    ),
    Promise(
        "sizes_are_bounded",
        BOUNDED,
        "memory and open files of every program stay below a limit",
        "programs",
    ),
    Promise(
        "nothing_piles_up",
        BOUNDED,
        "what is no longer needed is deleted",
        "folders",
    ),
)

BY_CHECK = {promise.check: promise for promise in PROMISES}
