"""From weights to a version that devices may have: its files, and the check that they are right.

A version is its weights, its golden outputs and its `model.onnx`, which is the plan's `infer` graph
with the weights put in. The device makes that file itself, byte for byte, so only its digest
travels. Nothing is released before eager torch and onnxruntime agreed on the golden inputs: the
first runs the engineer's own module, the second the file that an application would open. Where the
file holds int8 weights, torch is given what they stand for, and then the weights as they are: a
version whose answers rounding has spoilt is not released either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from fedge.coordinator.onnx_session import RUNTIME_ERRORS, open_session
from fedge.coordinator.task import forward
from fedge.schemas.blobs import DEFAULT_CHUNK_BYTES, BlobRef, describe
from fedge.schemas.errors import ParityFailed, PeerError, PlanError, PlanRefused
from fedge.schemas.features import ValueTarget
from fedge.schemas.ids import Digest, sha256
from fedge.schemas.model_file import complete_model
from fedge.schemas.parity import check_parity, rounding_effect
from fedge.schemas.plan import PlanManifest
from fedge.schemas.quantization import as_stored
from fedge.schemas.tensors import Array, Tensors, check_finite, check_tensors, encode_tensors

MAX_ROUNDING_EFFECT = 0.25
"""See `rounding_effect`. The built-in tasks that were tried gave 0, before training and after; a
next-word model whose table was lost, or shifted by a row, 0.5 to 1.1."""


@dataclass(frozen=True, slots=True)
class Release:
    """The files of a version that passed the parity check.

    `weights`: safetensors of the version's tensors. `golden`: safetensors with `output`, torch's
    for the plan's golden inputs. `model_sha256`, `model_bytes`: of the complete ONNX file, which is
    made from the weights wherever it is needed. `largest_difference`: of onnxruntime to torch,
    relative to max(1, |output|). `rounding`: see `rounding_effect`; 0 for float32.
    """

    weights: bytes
    golden: bytes
    weights_ref: BlobRef
    golden_ref: BlobRef
    model_sha256: Digest
    model_bytes: int
    largest_difference: float
    rounding: float = 0.0


class Releaser:
    """Makes releases of one plan.

    `new_model`: gives the task's module; its weights are replaced by the version's. `infer`: what
    it answers applications, see `Task`.
    `blobs`: digest → bytes, with at least the plan's `infer` graph and golden inputs.
    Raises `PlanRefused` if one of them is not there or does not fit the manifest.
    """

    def __init__(
        self,
        new_model: Callable[[], nn.Module],
        manifest: PlanManifest,
        blobs: Mapping[Digest, bytes],
        *,
        infer: Callable[[nn.Module, torch.Tensor], torch.Tensor] = forward,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self._answer = infer
        self._manifest = manifest
        self._chunk_bytes = chunk_bytes
        self._model = new_model().eval()
        try:
            self._infer = blobs[manifest.graphs.infer.sha256]
            self._golden_inputs = safetensors.numpy.load(blobs[manifest.golden.sha256])
        except KeyError as error:
            raise PlanRefused(f"the plan's blob {error} is not there") from error
        try:
            check_tensors(self._golden_inputs, [manifest.features.tensor.of("input")])
        except PeerError as error:
            raise PlanRefused(f"the plan's golden inputs: {error.detail}") from error

    def build(self, weights: Tensors) -> Release:
        """The release of a version with these tensors; the same bytes for the same tensors.

        Raises `PlanError` if the tensors are not the plan's or not finite, `ParityFailed` if
        torch and onnxruntime differ by more than the plan's tolerance, or int8 weights give other
        answers than float32 ones, `PlanRefused` if onnxruntime cannot load the model.
        """
        try:
            check_tensors(weights, self._manifest.weight_specs)
            check_finite(weights)
        except PeerError as error:
            raise PlanError(f"the version's weights break the plan: {error.detail}") from error
        expected = self._run_torch(as_stored(self._manifest, weights))
        rounding = self._check_rounding(expected, weights)
        actual, model_sha256, model_bytes = self._run_onnx(weights)
        difference = check_parity(
            "onnxruntime and torch on the golden inputs",
            actual,
            expected,
            self._manifest.parity_tolerance,
        )
        encoded = encode_tensors(weights)
        golden = encode_tensors({"output": expected})
        return Release(
            weights=encoded,
            golden=golden,
            weights_ref=describe(encoded, self._chunk_bytes),
            golden_ref=describe(golden, self._chunk_bytes),
            model_sha256=model_sha256,
            model_bytes=model_bytes,
            largest_difference=difference,
            rounding=rounding,
        )

    def _check_rounding(self, rounded: Array, weights: Tensors) -> float:
        if self._manifest.quantization is None:
            return 0.0
        scores = not isinstance(self._manifest.target, ValueTarget)
        effect = rounding_effect(rounded, self._run_torch(weights), scores=scores)
        if effect > MAX_ROUNDING_EFFECT:
            where = "int8 weights spoil the answers to the golden inputs ([export] quantization)"
            raise ParityFailed(where, effect, MAX_ROUNDING_EFFECT)
        return effect

    def _run_torch(self, weights: Tensors) -> Array:
        load_weights(self._model, weights)
        with torch.inference_mode():
            output = self._answer(self._model, torch.from_numpy(self._golden_inputs["input"]))
        return np.asarray(output.numpy())

    def _run_onnx(self, weights: Tensors) -> tuple[Array, Digest, int]:
        """The golden outputs of the version's ONNX file, the file's digest and its size."""
        model = complete_model(self._manifest, self._infer, weights)
        digest, size_bytes = sha256(model), len(model)
        session = open_session(model, threads=1)
        # The session has its own copy: a large model should not lie here twice.
        del model
        try:
            output = session.run(["output"], {"input": self._golden_inputs["input"]})[0]
        except RUNTIME_ERRORS as error:
            raise PlanRefused(f"the version's model does not run: {error}") from error
        return np.asarray(output), digest, size_bytes


def load_weights(model: nn.Module, weights: Tensors) -> None:
    """Copies a version's tensors into the parameters and buffers of their names, tied ones once.

    By name and not by `load_state_dict`, which does not know buffers that are not persistent.
    Raises `PlanError` if the model has a tensor that the version lacks, or of another shape.
    """
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in weights or weights[name].shape != tuple(tensor.shape):
                raise PlanError(
                    f"the version has no tensor {name!r} of shape {list(tensor.shape)}; was the "
                    "model changed after the plan was compiled?"
                )
            # A copy, since torch may not write to numpy's memory and warns where it could.
            tensor.copy_(torch.from_numpy(np.array(weights[name])))
