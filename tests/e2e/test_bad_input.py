"""One bad device never stops a round: each wrong thing is refused with its reason, and counted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.schemas import messages
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.errors import RejectReason
from fedge.schemas.messages import Checkin, Grant, Offer, Receipt, ReceiptStatus
from fedge.schemas.tensors import encode_tensors
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet
from tests.scripted_device import ScriptedDevice, scripted_device

pytestmark = pytest.mark.e2e

GOOD = {
    "0.weight": np.full((8, 4), 0.5, np.float32),
    "0.bias": np.zeros(8, np.float32),
    "2.weight": np.full((3, 8), -0.25, np.float32),
    "2.bias": np.ones(3, np.float32),
}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in GOOD.items() if key != name}


BAD_UPDATES = {
    RejectReason.WRONG_SHAPE: encode_tensors(GOOD | {"0.bias": np.zeros(9, np.float32)}),
    RejectReason.WRONG_DTYPE: encode_tensors(GOOD | {"0.bias": np.zeros(8, np.float64)}),
    RejectReason.NOT_FINITE: encode_tensors(GOOD | {"2.bias": np.array([0, np.nan, 0], "f4")}),
    RejectReason.NORM_TOO_LARGE: encode_tensors(GOOD | {"2.bias": np.full(3, 3e38, "f4")}),
    RejectReason.WRONG_TENSORS: encode_tensors(without("2.bias")),
    RejectReason.TRUNCATED: encode_tensors(GOOD)[:-7],
    RejectReason.MALFORMED: b"\x10\0\0\0\0\0\0\0this is no json!" + b"\0" * 400,
}


async def send_bad_messages(evil: ScriptedDevice, here: Fleet, honest: Offer) -> None:
    """Everything that is wrong before a byte of an update is read; refused, and no receipt."""
    up = here.topics.up(evil.name, Offer)
    text = messages.encode(honest)
    as_dict = json.loads(text)
    await evil.send_raw(up, text[: len(text) // 2])  # truncated
    await evil.send_raw(up, b"\x00\xff no json")  # malformed
    await evil.send_raw(up, text + b" " * messages.MAX_MESSAGE_BYTES)  # oversized
    await evil.send_raw(up, json.dumps(as_dict | {"trust_me": True}).encode())  # unknown_field
    await evil.send_raw(up, json.dumps(as_dict | {"examples": -1}).encode())  # invalid_field
    await evil.send_raw(up, json.dumps(as_dict | {"v": 2}).encode())  # unknown_version
    await evil.send_raw(f"{here.topics.prefix}/up/{evil.name}/gossip", text)  # foreign_topic
    # A foreign topic where chunks go, and a chunk of nothing.
    await evil.bulk.publish(f"{here.topics.prefix}/upb/{evil.name}/../0", b"x")
    await evil.send(Checkin(round=77, examples=1, boot=1))  # stale_round


async def send_bad_offers(evil: ScriptedDevice, honest: Offer) -> None:
    """Offers whose words are well-formed and untrue; each gets its receipt."""
    huge = BlobRef.model_validate(describe(bytes(200_000)).model_dump() | {"sha256": "ab" * 32})
    for reason, changes in (
        (RejectReason.STALE_ROUND, {"round": honest.round + 5}),
        (RejectReason.WRONG_BASE, {"base": honest.base + 3}),
        (RejectReason.OVERSIZED, {"update": huge}),
        (RejectReason.UNKNOWN_FIELD, {"metrics": {"bribe": 1.0}}),
    ):
        bad = honest.model_copy(update=changes)
        await evil.send(bad)
        receipt = await evil.receive(Receipt, round=bad.round)
        assert (receipt.status, receipt.reason) == (ReceiptStatus.REJECTED, reason)


async def send_bad_chunks(evil: ScriptedDevice, honest: Offer, data: bytes) -> None:
    await evil.send(honest)
    await evil.receive(Grant)
    await evil.send_chunk(honest.update, 0, data[:-1])  # truncated
    await evil.send_chunk(honest.update, 0, data + b"!")  # oversized
    await evil.send_chunk(honest.update, 0, bytes(len(data)))  # digest_mismatch
    await evil.send_chunk(honest.update, 5, data)  # invalid_field: no such chunk


def test_every_wrong_thing_is_refused_with_its_own_reason_and_the_round_completes(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    good_bytes = encode_tensors(GOOD)

    async def scenario() -> None:
        async with (
            fleet(
                mosquitto.port,
                tmp_path,
                round={"goal": 2, "quorum": 1, "over_selection": 1.0, "versions": 1},
            ) as here,
            scripted_device(here, "evil") as evil,
            scripted_device(here, "good") as good,
            scripted_device(here, "stranger") as stranger,
        ):
            here.start_coordinator()

            async def play() -> None:
                assignment, wanted = await asyncio.gather(evil.join_round(), good.join_round())
                honest = evil.offer_of(assignment, describe(good_bytes))
                await send_bad_messages(evil, here, honest)
                await send_bad_offers(evil, honest)
                await send_bad_chunks(evil, honest, good_bytes)
                for reason, data in BAD_UPDATES.items():
                    receipt = await evil.upload(assignment, data)
                    assert (receipt.status, receipt.reason) == (ReceiptStatus.REJECTED, reason)
                await stranger.send(stranger.offer_of(assignment, describe(good_bytes)))
                refused = await stranger.receive(Receipt)
                assert refused.reason is RejectReason.NOT_IN_COHORT

                receipt = await good.upload(wanted, good_bytes)
                assert receipt.status is ReceiptStatus.ACCEPTED
                # The same update again: the same answer, and it counts once.
                await good.send(good.offer_of(wanted, describe(good_bytes)))
                assert (await good.receive(Receipt)).status is ReceiptStatus.ACCEPTED
                # Another update for the same contribution: refused.
                other = encode_tensors(GOOD | {"0.bias": np.ones(8, np.float32)})
                await good.send(good.offer_of(wanted, describe(other)))
                assert (await good.receive(Receipt)).reason is RejectReason.REPLAY

            await here.during(play())
            announced = await here.version(1)
            assert announced.number == 1
        check_the_record(here)

    asyncio.run(scenario())


def check_the_record(here: Fleet) -> None:
    config = here.folder / "fedge.toml"
    config.write_text(
        f'population = "{here.population}"\ntask = "unused"\nstate_dir = "coordinator"\n'
    )
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "fedge.coordinator"),
            *("round", "show", "1", "--json", "--config", str(config)),
        ],
        capture_output=True,
        check=True,
    )
    report = json.loads(shown.stdout)
    assert report["round"]["outcome"] == "aggregated"
    status = {p["device"]: p["status"] for p in report["participants"]}
    assert status == {"evil": "rejected", "good": "accepted"}
    counted = {
        (refusal["device"], refusal["reason"]): refusal["count"] for refusal in report["refusals"]
    }
    assert counted == {
        ("evil", "truncated"): 3,  # a message, a chunk, an update
        ("evil", "malformed"): 2,  # a message, an update
        ("evil", "oversized"): 3,  # a message, an offer, a chunk
        ("evil", "unknown_field"): 2,  # in a message, in an offer's metrics
        ("evil", "invalid_field"): 2,  # in a message, a chunk's number
        ("evil", "unknown_version"): 1,
        ("evil", "foreign_topic"): 2,
        ("evil", "stale_round"): 2,  # a check-in, an offer
        ("evil", "wrong_base"): 1,
        ("evil", "digest_mismatch"): 1,
        ("evil", "wrong_shape"): 1,
        ("evil", "wrong_dtype"): 1,
        ("evil", "not_finite"): 1,
        ("evil", "wrong_tensors"): 1,
        ("evil", "norm_too_large"): 1,
        ("stranger", "not_in_cohort"): 1,
        ("good", "replay"): 1,
    }
