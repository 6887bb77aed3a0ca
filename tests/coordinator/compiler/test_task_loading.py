"""`load_task`: a built-in name, a file, a module, and clear words for everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedge.coordinator.task import Task, cross_entropy, load_task, squared_error
from fedge.schemas.errors import ConfigError
from fedge.schemas.features import ClassTarget, TabularFeatures

OWN_TASK = """
from torch import nn
from fedge.coordinator.task import Task, accuracy, cross_entropy
from fedge.schemas.features import ClassTarget, TabularFeatures

task = Task(
    name="iris",
    model=lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
    loss=cross_entropy,
    features=TabularFeatures(columns=4),
    target=ClassTarget(classes=3),
    metrics={"accuracy": accuracy},
)

def made():
    return task

number = 3
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(OWN_TASK)
    return path


def test_a_task_in_a_file_is_loaded_as_value_or_from_a_function(own_file: Path) -> None:
    assert load_task(f"{own_file}:task").name == "iris"
    assert load_task(f"{own_file}:made").name == "iris"


def test_a_task_in_a_module_is_loaded(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own_file.parent)
    assert load_task("my_task:task").name == "iris"


def test_two_files_of_one_name_are_two_modules(own_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "my_task.py"
    other.parent.mkdir()
    other.write_text(OWN_TASK.replace("iris", "lily"))
    assert load_task(f"{own_file}:task").name == "iris"
    assert load_task(f"{other}:task").name == "lily"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mnist-cn", "Did you mean 'mnist-cnn'"),
        ("nothing-like-it", "Built in: digits"),
        ("{file}", "name the attribute too"),
        ("{file}:tusk", "no attribute 'tusk'; it defines task"),
        ("{file}:number", "of type int"),
        ("/no/such/file.py:task", "does not exist"),
        ("no_such_module_xyz:task", "cannot be imported"),
        (":task", "cannot be imported"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(
    own_file: Path, reference: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(reference.format(file=own_file))


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_task(f"{path}:task")


def test_listing_the_built_in_tasks_does_not_load_torch() -> None:
    program = "import fedge.coordinator.tasks, sys; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "changes", [{"name": "Iris Task"}, {"name": ""}, {"metrics": {"Top-1": cross_entropy}}]
)
def test_a_name_that_no_plan_can_hold_is_refused(changes: dict[str, object]) -> None:
    settings: dict[str, object] = {
        "name": "iris",
        "model": lambda: nn.Linear(4, 3),
        "loss": cross_entropy,
        "features": TabularFeatures(columns=4),
        "target": ClassTarget(classes=3),
    }
    with pytest.raises(ConfigError):
        Task(**{**settings, **changes})


def test_initial_weights_depend_on_the_seed_alone_and_leave_torch_s_generator() -> None:
    task = load_task("digits")
    torch.manual_seed(1)
    first = task.new_model().state_dict()
    after_one = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after_one)
    for name, tensor in task.new_model().state_dict().items():
        assert torch.equal(tensor, first[name])


def test_squared_error_sums_over_all_but_the_batch() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert squared_error(output, target).tolist() == [5.0, 4.0]
