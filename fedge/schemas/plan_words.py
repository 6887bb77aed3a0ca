"""The words of a plan: its vocabulary blob and its features, put together."""

from __future__ import annotations

from fedge.schemas.errors import PlanRefused
from fedge.schemas.features import WordFeatures
from fedge.schemas.plan import PlanManifest
from fedge.schemas.words import Vocabulary, WordEncoder


def word_encoder(manifest: PlanManifest, vocabulary: Vocabulary | None) -> WordEncoder | None:
    """What makes windows of text for this plan, None if it is not about words.

    Raises `PlanRefused` if the vocabulary is missing, or of another size than the plan says.
    """
    features = manifest.features
    if not isinstance(features, WordFeatures):
        return None
    if vocabulary is None or len(vocabulary) != features.words:
        have = "none" if vocabulary is None else str(len(vocabulary))
        raise PlanRefused(f"the plan needs a vocabulary of {features.words} numbers, here: {have}")
    return WordEncoder(vocabulary, features.window)
