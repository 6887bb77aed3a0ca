"""An image file's pixels go up to 255, whatever range the task's own examples have."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.data.examples import Examples, open_examples
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.training import train
from fedge.edge_agent.training_settings import TrainingSettings
from tests.edge_agent.compiled_plans import compiled

SETTINGS = TrainingSettings(seed=1, batch_size=4, learning_rate=0.05, local_epochs=1)


def delta_of(examples: Examples) -> dict[str, np.ndarray]:
    plan = compiled("digits")
    engine = OnnxEngine(plan.manifest, plan.blobs[plan.manifest.graphs.train.sha256], None)
    return dict(train(engine, plan.manifest, plan.initial_weights, examples, SETTINGS).delta)


def test_a_folder_of_images_trains_as_the_same_pixels_in_the_tasks_range(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sixteenths = rng.integers(0, 16, (8, 8, 8)).astype(np.uint8)  # the task's raw_max is 16
    labels = rng.integers(0, 10, 8)
    lines = ["file,label"]
    for number, (pixels, label) in enumerate(zip(sixteenths, labels, strict=True)):
        # 17 * 15 is 255: fifteenths of the full range, exactly.
        Image.fromarray((pixels * 17).astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{label}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    from_files = open_examples(DataConfig(path=tmp_path))
    assert from_files.full_scale == 255.0
    in_task_range = Examples(sixteenths.astype(np.float32) * 16 / 15, labels)
    actual, expected = delta_of(from_files), delta_of(in_task_range)
    for name, tensor in expected.items():
        np.testing.assert_allclose(actual[name], tensor, rtol=0, atol=1e-6)
        assert np.abs(tensor).max() > 1e-5
