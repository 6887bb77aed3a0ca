"""Everything that Fedge raises on purpose, as one tree.

    FedgeError
    ├── ConfigError             ours: a setting that cannot work
    │   └── TextRefused         the device's: a text that its example store does not keep
    ├── StoreError              ours: the disk or the database
    │   └── StoreUnavailable    it cannot be used now: full, read-only, busy, gone; it may come back
    ├── PeerError               the peer's: what it sent breaks the contract (carries a reason)
    ├── LinkError               the network's
    │   ├── LinkClosed          the link was closed while the call waited
    │   ├── LinkRefused         the broker refused the connection, subscription or publish
    │   └── PayloadTooLarge     the broker's limit is below what should be sent
    └── PlanError               the plan's
        ├── UnsupportedModel    a module that cannot be compiled to a plan
        ├── PlanRefused         a plan that breaks the rules for plans
        ├── TrainingFailed      the plan could not be run on this device's examples
        └── ParityFailed        two runtimes disagree about the same version

Errors carry their facts as attributes; the sentence is made from them. One place at each boundary
turns a `PeerError` into a counted, logged rejection.
"""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """Why something from a peer was refused: these words go into receipts, records and logs."""

    MALFORMED = "malformed"
    """Not the expected encoding at all."""
    TRUNCATED = "truncated"
    """Bytes are missing at the end."""
    OVERSIZED = "oversized"
    UNKNOWN_FIELD = "unknown_field"
    INVALID_FIELD = "invalid_field"
    """A field is missing, or its value is outside its type or range."""
    UNKNOWN_VERSION = "unknown_version"
    """A protocol version or codec that this side does not speak."""
    FOREIGN_TOPIC = "foreign_topic"
    DIGEST_MISMATCH = "digest_mismatch"
    WRONG_TENSORS = "wrong_tensors"
    """Tensor names are missing or foreign to the plan."""
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    NOT_FINITE = "not_finite"
    """NaN or infinity."""
    NORM_TOO_LARGE = "norm_too_large"
    """Further from the base than the operator believes of any honest device."""
    NOT_IN_COHORT = "not_in_cohort"
    STALE_ROUND = "stale_round"
    """The round closed before, or is not open yet."""
    LATE = "late"
    """The device was asked, and its update came after the round had closed."""
    WRONG_BASE = "wrong_base"
    REPLAY = "replay"
    """This contribution was already decided."""
    ROUND_ABANDONED = "round_abandoned"
    STALE = "stale"
    """Asynchronous mode: its base is more versions behind than the operator allows."""
    LIMIT_EXCEEDED = "limit_exceeded"
    """The sender, or all senders together, are over a limit of this coordinator."""
    NOT_NEEDED = "not_needed"
    """The round had reached its goal."""


class FedgeError(Exception):
    """The root: catch it where a program ends, and nowhere else."""


class ConfigError(FedgeError):
    """A setting that cannot work. The message names the setting and what to do."""


class StoreError(FedgeError):
    """The disk or the database refused or returned what was not written."""


class StoreUnavailable(StoreError):  # noqa: N818 -- a state, which may pass
    """The disk or the database cannot be used now: full, read-only, locked, not reachable.

    Nothing was changed by the call that raised it. The cause is outside of this program and may go
    away, so whoever must have the write done tries again.
    """


class PeerError(FedgeError):
    """What a peer sent breaks the contract.

    `reason` is for counting and receipts, `detail` for a human; both go into the round's record.
    """

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class LinkError(FedgeError):
    """The network or the broker."""


class LinkClosed(LinkError):  # noqa: N818 -- an end, not an error, to most who see it
    """The link was closed by its owner while this call waited."""


class LinkRefused(LinkError):  # noqa: N818 -- reads as the broker's answer
    """The broker refused. `code` is its reason code (MQTT 5, section 2.4), or None."""

    def __init__(self, what: str, code: int | None, explanation: str) -> None:
        super().__init__(f"the broker refused {what}: {explanation} (reason code {code})")
        self.what = what
        self.code = code


class PayloadTooLarge(LinkError):  # noqa: N818 -- a fact about the payload
    """A payload above the limit of the broker or of the protocol."""

    def __init__(self, topic: str, payload_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{payload_bytes} bytes for {topic} exceed the broker's limit of {limit_bytes} bytes; "
            "lower chunk_bytes or raise the broker's max_packet_size"
        )
        self.topic = topic
        self.payload_bytes = payload_bytes
        self.limit_bytes = limit_bytes


class PlanError(FedgeError):
    """The plan, its graphs, or a run of them."""


class UnsupportedModel(PlanError):  # noqa: N818 -- a finding about the user's model
    """A model that cannot be compiled. Says which module and operator, and what to do instead."""

    def __init__(self, problem: str, *, module: str, operator: str, advice: str) -> None:
        super().__init__(f"{problem} (module: {module}; operator: {operator}). {advice}")
        self.problem = problem
        self.module = module
        self.operator = operator
        self.advice = advice


class PlanRefused(PlanError):  # noqa: N818 -- the device's decision
    """A plan that breaks the rules: a foreign operator, external data, a wrong interface."""


class TrainingFailed(PlanError):  # noqa: N818 -- the outcome of a run
    """Training could not finish on this device; the message says where and why."""


class ParityFailed(PlanError):  # noqa: N818 -- the outcome of a check
    """Two runtimes disagree on the golden inputs by more than the tolerance."""

    def __init__(self, where: str, largest_difference: float, tolerance: float) -> None:
        super().__init__(
            f"{where}: outputs differ by {largest_difference:.3g}, more than {tolerance:.3g}"
        )
        self.where = where
        self.largest_difference = largest_difference
        self.tolerance = tolerance
