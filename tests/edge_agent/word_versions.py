"""Versions of a plan on words, made by hand and put into use without a coordinator.

The model is a table of pairs: the word after the last one. What it suggests can be read off the
pairs, so a test knows what each version must answer. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedge.edge_agent.durable import replace_file
from fedge.edge_agent.library import Library
from fedge.schemas.blobs import describe
from fedge.schemas.features import NextWordTarget, WordFeatures
from fedge.schemas.ids import sha256
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.onnx_wire import embed_weights
from fedge.schemas.plan import Graphs, Padding, PlanManifest, TrainingDefaults, WeightSpec
from fedge.schemas.tensor_spec import TensorSpec
from fedge.schemas.tensors import encode_tensors
from fedge.schemas.words import START, Vocabulary
from tests.edge_agent.plans import HandMadePlan, eval_graph, train_graph

_WORDS = "see you soon at home my secret is station train book thank for the tomorrow"
WORDS = tuple(_WORDS.split())
WINDOW = 6

Pairs = Mapping[str, str]
"""A word → words that follow it, likeliest first. The empty word: the start of a sentence."""

EVENING: Pairs = {"": "see thank my", "see": "you the my", "you": "soon at tomorrow", "at": "home"}
MORNING: Pairs = {"": "thank see my", "see": "the you home", "you": "at soon tomorrow", "at": "the"}


class WordPlan:
    """A plan over `WORDS`."""

    def __init__(self) -> None:
        self.vocabulary = Vocabulary(WORDS)
        size = len(self.vocabulary)
        self._infer = _infer_graph(size)
        golden = encode_tensors({"input": np.array([[START] + [0] * (WINDOW - 1)], np.int64)})
        train, evaluate, words = train_graph(), eval_graph(), self.vocabulary.encode()
        self.manifest = PlanManifest(
            task="pairs-of-words",
            weights=(
                WeightSpec(
                    tensor=TensorSpec(name="pairs", dtype="float32", shape=(size, size)),
                    role="parameter",
                ),
            ),
            features=WordFeatures(words=size, window=WINDOW),
            target=NextWordTarget(words=size, window=WINDOW),
            output=TensorSpec(name="output", dtype="float32", shape=(-1, size)),
            padding=Padding.MASK,
            defaults=TrainingDefaults(batch_size=4),
            graphs=Graphs(
                train=describe(train), eval=describe(evaluate), infer=describe(self._infer)
            ),
            golden=describe(golden),
            vocabulary=describe(words),
        )
        self._blobs = (train, evaluate, self._infer, golden, words, self.manifest.encode())

    def model(self, pairs: Pairs) -> bytes:
        """The ONNX file of a version: each next word half as likely as the one before it."""
        number = self.vocabulary.number
        table = np.full((len(self.vocabulary),) * 2, -12.0, np.float32)
        for word, following in pairs.items():
            row = table[number(word) if word else START]
            for place, each in enumerate(following.split(), 1):
                row[number(each)] = -place * np.log(2)
        return embed_weights(self._infer, {"param.pairs": table})

    def put_into_use(self, state_dir: Path, number: int, pairs: Pairs) -> None:
        """As if the agent had fetched and checked version `number`."""
        library = Library(state_dir)
        for data in self._blobs:
            if not library.blobs.has(sha256(data)):
                library.blobs.put(data)
        activate(library, number, self.manifest, self.model(pairs))


def put_hand_made_into_use(
    state_dir: Path, number: int, plan: HandMadePlan, model: bytes, manifest: PlanManifest
) -> None:
    """A version of another plan. `manifest`: the plan's, or one like it."""
    library = Library(state_dir)
    for data in (plan.train, plan.infer, plan.golden, manifest.encode()):
        if not library.blobs.has(sha256(data)):
            library.blobs.put(data)
    activate(library, number, manifest, model)


def activate(library: Library, number: int, manifest: PlanManifest, model: bytes) -> None:
    """The last steps of an activation, on files that nobody announced."""
    any_blob = describe(b"weights")
    announcement = VersionAnnouncement(
        number=number,
        plan=describe(manifest.encode()),
        weights=any_blob,
        golden=any_blob,
        model_sha256=sha256(model),
        model_bytes=len(model),
    )
    replace_file(library.activation_of(announcement).output, model)
    library.activate(announcement)


def _infer_graph(size: int) -> bytes:
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Equal", ["input", "zero"], ["is_padding"]),
            node("Not", ["is_padding"], ["is_word"]),
            node("Cast", ["is_word"], ["ones"], to=TensorProto.INT64),
            node("ReduceSum", ["ones", "time"], ["count"], keepdims=1),
            node("Sub", ["count", "one"], ["last"]),
            node("GatherElements", ["input", "last"], ["word"], axis=1),
            node("Squeeze", ["word", "time"], ["row"]),
            node("Gather", ["param.pairs", "row"], ["output"], axis=0),
        ],
        "pairs",
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", WINDOW])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", size])],
        [
            helper.make_tensor("zero", TensorProto.INT64, [], [0]),
            helper.make_tensor("one", TensorProto.INT64, [], [1]),
            helper.make_tensor("time", TensorProto.INT64, [1], [1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(onnx.ModelProto.SerializeToString(model))
