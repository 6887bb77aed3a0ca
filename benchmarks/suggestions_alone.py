"""What a process that only suggests takes: started by `suggestions.py`, prints JSON.

    python benchmarks/suggestions_alone.py STATE KEYS

It imports nothing that a keyboard would not, because its memory is what is measured. `STATE`: a
device's state folder; `KEYS`: how many keys are typed, each a question.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

WORDS = 10_000
MIB = 1024 * 1024


def made_up_words() -> list[str]:
    rng = random.Random(1)
    syllables = [c + v for c in "bcdfghklmnprstvwz" for v in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4)))] = None
    return list(found)


def keys(count: int) -> list[str]:
    """What stands in the line after each key."""
    rng = random.Random(2)
    words = made_up_words()
    typed: list[str] = []
    while len(typed) < count:
        sentence = " ".join(rng.choice(words) for _ in range(rng.randint(3, 14))) + ". "
        typed += [sentence[: end + 1] for end in range(len(sentence))]
    return typed[:count]


def resident_mb(pid: int | str = "self") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024 / MIB
    raise AssertionError("no VmRSS in /proc")


def summary(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000

    return {"p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99), "most_ms": at(1.0)}


def alone(state: Path, count: int) -> None:
    """In a process of its own: prints what it found."""
    typed = keys(count)
    resident = {"at the start": resident_mb()}
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- the memory before is measured
    from fedge.edge_agent.serving import open_serving  # noqa: PLC0415 -- as above

    resident["with the library of versions"] = resident_mb()
    began_s = time.perf_counter()
    predictor = open_serving(Library(state)).predictor
    opened_s = time.perf_counter() - began_s
    resident["model loaded"] = resident_mb()
    times_s, processor_s = [], []
    for text in typed:
        began_s, worked_s = time.perf_counter(), time.thread_time()
        predictor.predict(text, top=3)
        times_s.append(time.perf_counter() - began_s)
        processor_s.append(time.thread_time() - worked_s)
    resident["all answered"] = resident_mb()
    print(
        json.dumps(
            {
                **summary(times_s),
                "processor_p50_ms": summary(processor_s)["p50_ms"],
                "processor_p99_ms": summary(processor_s)["p99_ms"],
                "opened_ms": opened_s * 1000,
                "answers": len(typed),
                "resident_mb": resident,
            }
        )
    )


if __name__ == "__main__":
    alone(Path(sys.argv[1]), int(sys.argv[2]))
