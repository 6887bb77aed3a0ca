"""Nothing on a device is decided by the wall clock, which may be wrong and may jump."""

from __future__ import annotations

import ast
from pathlib import Path

import fedge.edge_agent

ROOM = Path(fedge.edge_agent.__file__).parent
WALL_CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime"},
    "datetime": {"datetime", "date", "now", "utcnow", "today"},
}

READ_IN = {
    "agent.py": {"time.time"},
    # Hours, the last 24 of them and the age of a readings file: what an operator asks of a clock.
    # A wrong one lets a device train at another hour, and decides nothing else.
    "eligibility.py": {"datetime.datetime"},
    "eligibility_commands.py": {"time.time"},
    # Expiry in days, and dates for people: a wrong clock costs texts or keeps them longer, and no
    # round, version or update depends on it.
    "example_commands.py": {"datetime.datetime"},
    "example_store.py": {"time.time"},
    # When a personal model was made, for people.
    "personal_commands.py": {"datetime.datetime"},
}


def readings(path: Path) -> set[str]:
    """Where a file names a wall clock, as `module.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in WALL_CLOCKS.get(node.value.id, ()):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in WALL_CLOCKS:
            names = {alias.name for alias in node.names}
            found |= {f"{node.module}.{name}" for name in names & WALL_CLOCKS[node.module]}
    return found


def test_the_guard_sees_a_wall_clock(tmp_path: Path) -> None:
    for source, name in (
        ("import time\nnow = time.time()", "time.time"),
        ("from time import time", "time.time"),
        ("from datetime import datetime", "datetime.datetime"),
    ):
        (tmp_path / "m.py").write_text(source)
        assert readings(tmp_path / "m.py") == {name}
    (tmp_path / "m.py").write_text("import time\nnow = time.monotonic()")
    assert readings(tmp_path / "m.py") == set()


def test_the_only_wall_clock_on_a_device_is_a_hint_for_the_boot_number() -> None:
    found = {
        str(path.relative_to(ROOM)): readings(path) for path in ROOM.rglob("*.py") if readings(path)
    }
    assert found == READ_IN
    source = (ROOM / "agent.py").read_text()
    # One default argument, and one use: of the boot number (see `presence.next_boot`).
    assert source.count("time.time") == 1
    assert source.count("wall_clock()") == 1
    assert 'next_boot(self._memory, state_dir / "boot", wall_clock())' in source
