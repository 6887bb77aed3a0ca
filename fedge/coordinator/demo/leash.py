"""Runs a program that must not outlive the one that started it: `leash PARENT_PID COMMAND…`.

Linux ends the program when its parent dies, however it dies, `kill -9` included (prctl(2),
PR_SET_PDEATHSIG; it survives exec). Elsewhere the program runs without this leash. The request is
made here, after the fork and before the exec, because Python code between the two may deadlock in
a parent that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def main() -> None:
    """Becomes the command."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before the request
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 -- to become another program is the purpose


if __name__ == "__main__":
    main()
