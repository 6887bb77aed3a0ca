"""The `[broker]` table, the same for both programs, and the links that it describes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedge.schemas.errors import ConfigError
from fedge.schemas.link.paho.link import PahoLink
from fedge.schemas.link.paho.settings import LinkSettings, MqttProtocol
from fedge.schemas.link.protocol import Link, Will


class BrokerSettings(BaseModel):
    """Where the broker is and how to speak to it.

    `protocol`: `auto` speaks MQTT 5 and falls back to 3.1.1 where the broker has only that.
    `password_file`: its first line is the password; a password never stands in a configuration.
    `session_expiry_s`: how long the broker keeps our session and its queue while we are away.
    `reconnect_cap_s`: the longest wait between two attempts to connect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 1883
    protocol: MqttProtocol = MqttProtocol.AUTO
    username: str | None = None
    password_file: Path | None = None
    keepalive_s: Annotated[int, Field(ge=5, le=65535)] = 60
    session_expiry_s: Annotated[int, Field(ge=0, le=2**32 - 2)] = 7 * 86400
    reconnect_cap_s: Annotated[float, Field(ge=1, le=3600)] = 60.0

    def relative_to(self, folder: Path) -> BrokerSettings:
        """The same settings with a relative `password_file` taken from `folder`."""
        if self.password_file is None:
            return self
        return self.model_copy(update={"password_file": folder / self.password_file})

    def link(
        self,
        client_id: str,
        rng: random.Random,
        *,
        will: Will | None = None,
        receive_maximum: int = 32,
    ) -> Link:
        """A link to this broker for one session, not started yet.

        Raises `ConfigError` if the password file cannot be read.
        """
        return PahoLink(
            LinkSettings(
                host=self.host,
                port=self.port,
                client_id=client_id,
                protocol=self.protocol,
                username=self.username,
                password=self._password(),
                will=will,
                keepalive_s=self.keepalive_s,
                session_expiry_s=self.session_expiry_s,
                receive_maximum=receive_maximum,
                backoff_cap_s=self.reconnect_cap_s,
            ),
            rng,
        )

    def _password(self) -> str | None:
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text(encoding="utf-8").splitlines()[0]
        except (OSError, UnicodeDecodeError, IndexError) as error:
            raise ConfigError(f"broker.password_file cannot be read: {error}") from error
