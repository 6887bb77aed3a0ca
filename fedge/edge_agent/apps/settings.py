"""`[apps]` in agent.toml: where apps may ask this agent, if anywhere.

Knows names and numbers only; what they lead to is opened in `fedge.edge_agent.apps.listening`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MIB = 1024 * 1024


class AppsSettings(BaseModel):
    """The table. Paths are taken from `state_dir`; without `socket` and `port` there is no service.

    `socket`: of the Unix socket. `port`: of 127.0.0.1, guarded by the token in `token_file`.
    `connections`: at once, on each of the two. `body_limit_bytes`: of one request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: Path | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    token_file: Path = Path("apps.token")
    connections: Annotated[int, Field(ge=1, le=1024)] = 16
    body_limit_bytes: Annotated[int, Field(ge=1024, le=16 * MIB)] = MIB

    @property
    def is_on(self) -> bool:
        """Whether apps can ask at all."""
        return self.socket is not None or self.port is not None
