"""What passes between the agent and its training process."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from fedge.edge_agent.trainer.jobs import (
    MAX_LINE_BYTES,
    CountJob,
    Failed,
    Trained,
    decode_answer,
    decode_job,
)
from fedge.schemas.blobs import describe
from fedge.schemas.errors import (
    ConfigError,
    ParityFailed,
    PeerError,
    PlanRefused,
    RejectReason,
    StoreError,
    TrainingFailed,
)
from fedge.schemas.messages import LossCurve


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("set `path`"),
        ParityFailed("golden outputs", 0.5, 1e-4),
        ParityFailed("golden outputs", math.inf, 1e-4),
        PeerError(RejectReason.WRONG_SHAPE, "tensor 'w'"),
        PlanRefused("an operator"),
        StoreError("the disk"),
        TrainingFailed("the loss"),
    ],
    ids=repr,
)
def test_an_error_crosses_the_pipe_as_itself(error):
    answer = decode_answer(Failed.of(error).encode())
    assert isinstance(answer, Failed)
    found = answer.error()
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_the_largest_honest_answer_is_one_line_within_the_limit():
    update = describe(bytes(2048 * 1024), chunk_bytes=1024)  # the most chunks that a blob may have
    longest = -1.2345678901234567e-300
    trained = Trained(
        update=update,
        examples=2**40,
        steps=2**40,
        loss=LossCurve(by_epoch=(longest,) * 1000, by_batch=(longest,) * 2048),
        metrics={f"{n:040}": longest for n in range(16)},
        training_s=1e6,
        peak_rss_bytes=2**50,
    )
    line = trained.encode()
    assert len(line) <= MAX_LINE_BYTES
    assert line.count(b"\n") == 1
    assert decode_answer(line) == trained


def test_a_job_survives_the_pipe():
    job = CountJob(data={"path": "examples\nwith a line end.npz"})
    assert decode_job(job.encode()) == job


def test_an_unknown_field_or_job_is_refused():
    with pytest.raises(ValidationError, match="command"):
        decode_job(b'{"job": "count", "data": {"path": "x"}, "command": "rm"}')
    with pytest.raises(ValidationError, match="execute"):
        decode_job(b'{"job": "execute"}')
