"""A device installs the base of the distribution only: everything must work with that."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from fedge.schemas.ids import sha256
from fedge.schemas.tensors import encode_tensors, read_tensors
from tests.conftest import REPOSITORY
from tests.edge_agent.plans import NumpyReference, examples, initial_weights, linear_plan

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DEVICE = """
import asyncio, importlib.util, sys
from pathlib import Path

for package in ("torch", "onnx", "onnxscript", "sklearn", "sqlalchemy"):
    assert importlib.util.find_spec(package) is None, f"{package} is installed"

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.predictor import Predictor
from fedge.edge_agent.trainer.jobs import ActivateJob, TrainJob
from fedge.edge_agent.trainer.process import TrainerProcess
from fedge.schemas.plan import PlanManifest

folder = Path(sys.argv[1])
common = {"manifest": folder / "manifest.json", "weights": folder / "weights.safetensors"}

async def main():
    trainer = TrainerProcess()
    trained = await trainer.run(TrainJob(
        **common, train_graph=folder / "train.onnx", output=folder / "update.safetensors",
        data=DataConfig(path=folder / "data.npz"),
        settings={"seed": 1, "batch_size": 30, "learning_rate": 0.05, "local_epochs": 1},
    ))
    assert trained.engine == "onnx", trained.engine
    await trainer.run(ActivateJob(
        **common, infer_graph=folder / "infer.onnx", output=folder / "model.onnx",
        golden_inputs=folder / "golden.safetensors",
        golden_outputs=folder / "outputs.safetensors", model_sha256=sys.argv[2],
    ))
    await trainer.close()

asyncio.run(main())
manifest = PlanManifest.decode((folder / "manifest.json").read_bytes())
print(Predictor(folder / "model.onnx", manifest).predict([0.5, -1.0, 2.0]).values[0])
"""


@pytest.fixture(scope="module")
def device_python(tmp_path_factory) -> Path:
    """An interpreter that has Fedge and its base dependencies, nothing else."""
    root = tmp_path_factory.mktemp("device")
    source = root / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(
        REPOSITORY / "fedge", source / "fedge", ignore=shutil.ignore_patterns("__pycache__")
    )
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    probe = subprocess.run([*pip, "setuptools>=77"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"pip reaches no package index: {probe.stderr.strip().splitlines()[-1]}")
    subprocess.run([*pip, str(source)], check=True)
    return python


@pytest.mark.skipif(sys.platform == "win32", reason="agents run on POSIX systems")
def test_a_device_without_torch_trains_activates_and_predicts(device_python, tmp_path):
    plan, weights = linear_plan(), initial_weights()
    plan.write(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(encode_tensors(weights))
    x, y = examples(30)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    reference = NumpyReference(weights)
    golden = read_tensors(tmp_path / "golden.safetensors")["input"]
    output = ((golden * reference.scale) @ reference.w + reference.b).astype(np.float32)
    (tmp_path / "outputs.safetensors").write_bytes(encode_tensors({"output": output}))
    predicted = float((np.array([0.5, -1.0, 2.0]) * reference.scale) @ reference.w[:, 0])
    predicted += float(reference.b[0])

    done = subprocess.run(
        [str(device_python), "-I", "-c", DEVICE, str(tmp_path), sha256(plan.model(weights))],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    assert float(done.stdout) == pytest.approx(predicted, rel=1e-5)
    reference.step(x, y, lr=0.05, mu=0.0)
    update = read_tensors(tmp_path / "update.safetensors", plan.manifest.update_specs)
    np.testing.assert_allclose(update["w"], reference.w - weights["w"], rtol=1e-4, atol=1e-6)
