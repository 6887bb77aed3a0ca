"""amqtt as a program of its own, for computers without Mosquitto: `embedded_broker PORT`.

Not secure: anybody on this computer may connect, and every client is given every retained message.
It speaks MQTT 3.1.1 only and forgets everything when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from amqtt.broker import Broker

from fedge.schemas.logs import EventLog, set_up_logging
from fedge.schemas.process import run_until_stopped

log = EventLog(__name__)


async def serve(port: int) -> None:
    """Serves 127.0.0.1:`port` until cancelled."""
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )
    await broker.start()
    log.warning("broker_ready", port=port, notice="demo broker: not secure")
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        await broker.shutdown()


if __name__ == "__main__":
    set_up_logging("json")
    # It warns of every client that leaves.
    logging.getLogger("amqtt").setLevel(logging.ERROR)
    run_until_stopped(lambda: serve(int(sys.argv[1])))
