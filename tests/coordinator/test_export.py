"""The option `[export]`, and what becomes of a plan and its versions when it changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedge.coordinator.datasets import Examples, load_dataset
from fedge.coordinator.evaluation import Evaluation, Evaluator, beside
from fedge.coordinator.export import requantized
from fedge.coordinator.release import Releaser
from fedge.coordinator.reports import show_version, show_versions
from fedge.coordinator.serving import scheme_of, with_inference_of
from fedge.coordinator.settings import load
from fedge.coordinator.store import VersionRecord
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ConfigError
from fedge.schemas.model_file import complete_model
from fedge.schemas.plan import PlanManifest
from fedge.schemas.quantization import Scheme, as_stored
from tests.coordinator.plans import plan_named, quantized_plan_named, task_named

PLAIN, QUANTIZED = plan_named("digits"), quantized_plan_named("digits")


def test_the_option_is_read_and_what_it_is_not_is_told(tmp_path: Path) -> None:
    path = tmp_path / "fedge.toml"
    start = 'population = "p"\ntask = "digits"\nstate_dir = "s"\n'
    path.write_text(start)
    assert load(path).export.quantization is None
    path.write_text(start + '[export]\nquantization = "int8"\n')
    assert load(path).export.quantization is Scheme.INT8
    path.write_text(start + '[export]\nquantization = "int4"\n')
    with pytest.raises(ConfigError, match=r"export\.quantization.*'none' or 'int8'"):
        load(path)


def test_a_plan_says_how_its_file_is_quantised() -> None:
    assert scheme_of(PLAIN.manifest) is Scheme.NONE
    assert scheme_of(QUANTIZED.manifest) is Scheme.INT8
    nothing = quantized_plan_named("toy-linear").manifest
    assert scheme_of(nothing) is Scheme.INT8, "or each start would compile it again"


def test_only_the_inference_file_of_a_plan_changes_and_can_change_back() -> None:
    before, wanted = PLAIN.manifest, QUANTIZED.manifest
    # Another release of torch writes the training graphs in other bytes.
    graphs = wanted.graphs.model_copy(update={"train": describe(b"other"), "eval": describe(b"e")})
    found = with_inference_of(wanted.model_copy(update={"graphs": graphs}), before)
    assert found == wanted
    assert with_inference_of(before, found).digest == before.digest


def test_the_inference_graph_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"other weights than.*new population"):
        with_inference_of(quantized_plan_named("toy-linear").manifest, PLAIN.manifest)


def version(plan: PlanManifest, **facts: object) -> VersionRecord:
    release = Releaser(task_named("digits").new_model, PLAIN.manifest, PLAIN.blobs).build(
        PLAIN.initial_weights
    )
    known: dict[str, object] = {
        "number": 7,
        "plan_sha256": plan.digest,
        "weights": release.weights_ref,
        "golden": release.golden_ref,
        "model_sha256": release.model_sha256,
        "model_bytes": release.model_bytes,
        "created_at": 1.0,
        "server_state": "a" * 64,
        "metrics": {"loss": 1.0},
    }
    return VersionRecord(**{**known, **facts})


def test_the_next_version_has_the_weights_and_the_server_s_state_of_the_newest() -> None:
    newest = version(PLAIN.manifest)
    release = Releaser(task_named("digits").new_model, QUANTIZED.manifest, QUANTIZED.blobs).build(
        QUANTIZED.initial_weights
    )
    made = requantized(newest, QUANTIZED.manifest.digest, release, 2.0, "int8")
    assert (made.number, made.base, made.round) == (8, 7, None)
    assert (made.weights, made.server_state) == (newest.weights, newest.server_state)
    assert made.metrics == {}, "it is measured when it is published"
    assert made.golden != newest.golden
    assert made.model_bytes < newest.model_bytes


def test_a_version_without_files_cannot_be_made_into_another() -> None:
    release = Releaser(task_named("digits").new_model, QUANTIZED.manifest, QUANTIZED.blobs).build(
        QUANTIZED.initial_weights
    )
    with pytest.raises(ConfigError, match="files were deleted"):
        requantized(version(PLAIN.manifest, files_kept=False), "b" * 64, release, 2.0, "")


def test_both_evaluations_of_a_version_stand_beside_each_other() -> None:
    float32 = Evaluation(10, 0.5, {"accuracy": 0.9})
    int8 = Evaluation(10, 0.6, {"accuracy": 0.8})
    assert beside(float32, int8) == Evaluation(
        10, 0.5, {"accuracy": 0.9, "int8_loss": 0.6, "int8_accuracy": 0.8}
    )


def test_what_is_measured_for_int8_is_what_the_file_answers() -> None:
    """The eval graph with rounded weights, against the device's file on the same images."""

    _, images = load_dataset("sklearn-digits", Path())
    test_set = Examples(images.x[:100], images.y[:100])
    weights = {name: array * np.float32(3) for name, array in QUANTIZED.initial_weights.items()}
    manifest = QUANTIZED.manifest
    evaluator = Evaluator(manifest, QUANTIZED.blobs[manifest.graphs.eval.sha256], test_set)
    found = evaluator.evaluate(as_stored(manifest, weights))
    model = complete_model(manifest, QUANTIZED.blobs[manifest.graphs.infer.sha256], weights)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["output"], {"input": manifest.features.encode(test_set.x)})
    assert found.metrics["accuracy"] == float((logits.argmax(axis=1) == test_set.y).mean())
    assert found.loss != evaluator.evaluate(weights).loss


def test_the_operator_is_told_the_size_and_which_weights_are_int8(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = {"loss": 1.0, "accuracy": 0.5, "int8_loss": 1.1, "int8_accuracy": 0.25}
    record = version(QUANTIZED.manifest, model_bytes=8686, metrics=metrics)
    show_versions([record], as_json=False)
    listed = capsys.readouterr().out
    assert "int8_accuracy" in listed
    assert "0.2500" in listed
    assert "8,686 B" in listed
    show_version(record, QUANTIZED.manifest, as_json=False)
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["int8", "3.weight, 7.weight"] in shown
    assert ["float32", "0.weight, 0.bias, 3.bias, 7.bias"] in shown
    assert ["int8_accuracy", "0.2500"] in shown
    for unknown in (PLAIN.manifest, None):
        show_version(record, unknown, as_json=False)
        assert "3.weight" not in capsys.readouterr().out
