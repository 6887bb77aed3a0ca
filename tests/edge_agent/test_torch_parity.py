"""One plan, two engines: onnxruntime and torch take the same steps on the compiler's graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedge.coordinator.tasks import BUILT_IN_TASKS
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.engines.torch_engine import TorchEngine
from fedge.schemas.plan import Padding
from tests.edge_agent.compiled_plans import compiled, graphs_of, random_batch

# Of each kind one for every run of the tests; compiling a plan takes seconds, so the rest is e2e.
# Batch norm with dropout brings exact batches, buffers and randomness.
QUICK = ["toy-linear", "digits", "mnist-mlp", "zoo:batch-norm"]
SLOW = [*sorted(BUILT_IN_TASKS.keys() - set(QUICK)), "zoo:lstm", "zoo:transformer", "zoo:tied"]
STEPS = 4


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.e2e) for name in SLOW)]
)
def test_both_engines_take_the_same_steps(name):
    plan = compiled(name)
    manifest, train, evaluation = graphs_of(plan)
    engines = [engine(manifest, train, evaluation) for engine in (OnnxEngine, TorchEngine)]
    for engine in engines:
        engine.load(plan.initial_weights)
    for seed in range(STEPS):
        rows = 8 if manifest.padding is Padding.MASK or seed < STEPS - 1 else 5
        inputs, target = random_batch(manifest, rows, seed, tokens=name == "zoo:tied")
        mask = np.ones(rows, np.float32)
        if manifest.padding is Padding.MASK and seed == STEPS - 1:
            mask[5:] = 0
        learning_rate = manifest.defaults.learning_rate
        expected, found = (
            engine.step(inputs, target, mask, lr=learning_rate, mu=0.1, seed=seed)
            for engine in engines
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.metrics == pytest.approx(expected.metrics)
        measured, measured_too = (engine.evaluate(inputs, target, mask) for engine in engines)
        assert measured_too.loss_sum == pytest.approx(measured.loss_sum, rel=1e-5)
        assert measured_too.metrics == pytest.approx(measured.metrics)
    expected_weights, found_weights = (engine.weights() for engine in engines)
    assert list(found_weights) == list(expected_weights)
    for key, expected_tensor in expected_weights.items():
        assert found_weights[key].dtype == expected_tensor.dtype
        np.testing.assert_allclose(found_weights[key], expected_tensor, rtol=1e-4, atol=1e-6)
    changed = [
        key for key, old in plan.initial_weights.items() if (found_weights[key] != old).any()
    ]
    assert changed, "training changed nothing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["digits", "mnist-cnn"])
def test_a_recorded_step_on_cuda_equals_the_steps_on_the_cpu(name):
    plan = compiled(name)
    engines = [TorchEngine(*graphs_of(plan), device=device) for device in ("cpu", "cuda")]
    for _ in range(2):  # a second round: recorded again after the new weights
        for engine in engines:
            engine.load(plan.initial_weights)
        for seed in range(STEPS):
            inputs, target = random_batch(plan.manifest, 8, seed)
            mask = np.ones(8, np.float32)
            on_cpu, on_cuda = (
                engine.step(inputs, target, mask, lr=0.02, mu=0.1, seed=seed) for engine in engines
            )
            assert on_cuda.loss == pytest.approx(on_cpu.loss, rel=1e-4)
        assert engines[1].records_steps
        expected, found = (engine.weights() for engine in engines)
        for key, tensor in expected.items():
            np.testing.assert_allclose(found[key], tensor, rtol=1e-3, atol=1e-5)
