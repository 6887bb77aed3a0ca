"""The topic table: every topic that Fedge uses, who speaks on it, and what it carries.

The coordinator's subscriptions, the devices' subscriptions and a broker's access rules all follow
from this one table. A topic that no row matches is foreign, and what came on it is never read.

    fedge/1/{population}/all/{kind}                     coordinator → all, retained but for `roll`
    fedge/1/{population}/blob/{sha256}/{i}              coordinator → all, retained chunks
    fedge/1/{population}/dn/{device}/{kind}             coordinator → one device
    fedge/1/{population}/up/{device}/{kind}             device → coordinator
    fedge/1/{population}/upb/{device}/{sha256}/{i}      device → coordinator, chunks
    fedge/1/{population}/state/{device}                 device → all, retained birth and will
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from fedge.schemas import messages
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import Message

ROOT = "fedge/1"
QOS = 1
"""At least once, everywhere: identities make repeats harmless, and QoS 2 is not offered by all."""


class Channel(StrEnum):
    """The rows of the table by their first word after the population."""

    ALL = "all"
    BLOB = "blob"
    DOWN = "dn"
    UP = "up"
    UP_BULK = "upb"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class ChannelRule:
    """One row: whether the broker keeps the last message, and who may publish."""

    retained: bool
    from_device: bool
    carries_chunks: bool


RULES: dict[Channel, ChannelRule] = {
    Channel.ALL: ChannelRule(retained=True, from_device=False, carries_chunks=False),
    Channel.BLOB: ChannelRule(retained=True, from_device=False, carries_chunks=True),
    Channel.DOWN: ChannelRule(retained=False, from_device=False, carries_chunks=False),
    Channel.UP: ChannelRule(retained=False, from_device=True, carries_chunks=False),
    Channel.UP_BULK: ChannelRule(retained=False, from_device=True, carries_chunks=True),
    Channel.STATE: ChannelRule(retained=True, from_device=True, carries_chunks=False),
}

KINDS: dict[Channel, dict[str, type[Message]]] = {
    Channel.ALL: {
        "version": messages.VersionAnnouncement,
        "stable": messages.StableAnnouncement,
        "candidate": messages.CandidateAnnouncement,
        "round": messages.RoundAnnouncement,
        "roll": messages.RollCall,
        "words": messages.WordCountAnnouncement,
    },
    Channel.DOWN: {
        "assignment": messages.Assignment,
        "retry": messages.Retry,
        "grant": messages.Grant,
        "have": messages.Have,
        "receipt": messages.Receipt,
        "abort": messages.Abort,
        "evaluation": messages.EvaluationRequest,
        "counted": messages.TrialCounted,
        "words": messages.WordCountHeard,
    },
    Channel.UP: {
        "checkin": messages.Checkin,
        "offer": messages.Offer,
        "need": messages.Need,
        "report": messages.Report,
        "evaluated": messages.EvaluationResult,
        "trial": messages.TrialReport,
        "words": messages.WordCountAnswer,
    },
}

_NAME_OF: dict[type[Message], tuple[Channel, str]] = {
    kind: (channel, name) for channel, kinds in KINDS.items() for name, kind in kinds.items()
}

_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_PATTERN = re.compile(
    rf"fedge/1/(?P<population>{_NAME})/(?:"
    r"(?P<all>all)/(?P<all_kind>[a-z]+)"
    r"|(?P<blob>blob)/(?P<blob_sha256>[0-9a-f]{64})/(?P<blob_index>0|[1-9][0-9]{0,4})"
    rf"|(?P<control>dn|up)/(?P<device>{_NAME})/(?P<kind>[a-z]+)"
    rf"|(?P<upb>upb)/(?P<upb_device>{_NAME})/(?P<upb_sha256>[0-9a-f]{{64}})"
    r"/(?P<upb_index>0|[1-9][0-9]{0,4})"
    rf"|(?P<state>state)/(?P<state_device>{_NAME})"
    r")"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed topic. Fields that the channel does not have are None.

    `message`: the type of the payload on a control channel.
    """

    channel: Channel
    population: str
    device: str | None = None
    message: type[Message] | None = None
    sha256: str | None = None
    chunk: int | None = None


def parse(topic: str) -> Address:
    """What a topic means. Raises `PeerError` (foreign_topic) if no row of the table matches."""
    found = _PATTERN.fullmatch(topic)
    if found is None:
        raise PeerError(RejectReason.FOREIGN_TOPIC, f"no such topic: {topic[:200]!r}")
    part = found.groupdict()
    population = part["population"]
    if part["blob"]:
        return Address(
            Channel.BLOB, population, sha256=part["blob_sha256"], chunk=int(part["blob_index"])
        )
    if part["upb"]:
        return Address(
            Channel.UP_BULK,
            population,
            device=part["upb_device"],
            sha256=part["upb_sha256"],
            chunk=int(part["upb_index"]),
        )
    if part["state"]:
        return Address(
            Channel.STATE, population, device=part["state_device"], message=messages.Presence
        )
    channel = Channel(part["all"] or part["control"])
    kind = KINDS[channel].get(part["all_kind"] or part["kind"])
    if kind is None:
        raise PeerError(RejectReason.FOREIGN_TOPIC, f"no such message kind: {topic[:200]!r}")
    return Address(channel, population, device=part["device"], message=kind)


def device_in(topic: str) -> str | None:
    """The device that a topic's place names, even if the rest of the topic is foreign."""
    found = re.match(rf"fedge/1/{_NAME}/(?:up|upb|state)/({_NAME})(?:/|$)", topic)
    return found.group(1) if found else None


@dataclass(frozen=True, slots=True)
class Topics:
    """Builds the topics of one population."""

    population: str

    @property
    def prefix(self) -> str:
        """What every topic of the population starts with."""
        return f"{ROOT}/{self.population}"

    def announcement(self, kind: type[Message]) -> str:
        """Where the coordinator keeps the newest message of this kind for all."""
        return f"{self.prefix}/all/{_NAME_OF[kind][1]}"

    def chunk(self, sha256: str, index: int) -> str:
        """A retained chunk of a blob."""
        return f"{self.prefix}/blob/{sha256}/{index}"

    def down(self, device: str, kind: type[Message]) -> str:
        """A message of this kind to one device."""
        return f"{self.prefix}/dn/{device}/{_NAME_OF[kind][1]}"

    def up(self, device: str, kind: type[Message]) -> str:
        """A message of this kind from one device."""
        return f"{self.prefix}/up/{device}/{_NAME_OF[kind][1]}"

    def upload_chunk(self, device: str, sha256: str, index: int) -> str:
        """A chunk of a device's update."""
        return f"{self.prefix}/upb/{device}/{sha256}/{index}"

    def presence(self, device: str) -> str:
        """Birth and will of a device."""
        return f"{self.prefix}/state/{device}"

    @property
    def coordinator_control(self) -> tuple[str, ...]:
        """What the coordinator's control session subscribes to."""
        return (f"{self.prefix}/up/+/+", f"{self.prefix}/state/+")

    @property
    def coordinator_bulk(self) -> tuple[str, ...]:
        """What the coordinator's bulk session subscribes to."""
        return (f"{self.prefix}/upb/+/+/+",)

    def device_control(self, device: str) -> tuple[str, ...]:
        """What a device's control session subscribes to."""
        return (f"{self.prefix}/dn/{device}/+", f"{self.prefix}/all/+")
