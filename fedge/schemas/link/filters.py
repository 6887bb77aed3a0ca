"""MQTT topic filters: which topics a subscription covers (MQTT 5, section 4.7).

`+` stands for one level, a last `#` for the level above it and everything below. A filter that
begins with a wildcard does not cover topics that begin with `$`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def is_valid_filter(text: str) -> bool:
    """Whether `text` may stand in a SUBSCRIBE: wildcards fill their level, `#` only the last."""
    if not text or len(text.encode()) > 65535 or "\0" in text:
        return False
    levels = text.split("/")
    if any(("+" in level or "#" in level) and len(level) > 1 for level in levels):
        return False
    return "#" not in levels[:-1]


def covers(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to `topic_filter` (a valid one) is sent what goes to `topic`."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position >= len(levels) or level not in ("+", levels[position]):
            return False
    return len(wanted) == len(levels)


class FilterSet:
    """Filters in the order they came. Membership of a topic costs one look-up and the wildcards."""

    def __init__(self, filters: Iterable[str] = ()) -> None:
        self._exact: dict[str, None] = {}
        self._wild: dict[str, None] = {}
        for topic_filter in filters:
            self.add(topic_filter)

    def __contains__(self, topic_filter: object) -> bool:
        return topic_filter in self._exact or topic_filter in self._wild

    def __iter__(self) -> Iterator[str]:
        yield from self._exact
        yield from self._wild

    def __len__(self) -> int:
        return len(self._exact) + len(self._wild)

    def add(self, topic_filter: str) -> None:
        """Adds a filter. Raises `ValueError` if no broker could take it."""
        if not is_valid_filter(topic_filter):
            raise ValueError(f"not a topic filter: {topic_filter[:200]!r}")
        has_wildcard = "+" in topic_filter or "#" in topic_filter
        (self._wild if has_wildcard else self._exact)[topic_filter] = None

    def discard(self, topic_filter: str) -> None:
        """Takes a filter out, if it is there."""
        self._exact.pop(topic_filter, None)
        self._wild.pop(topic_filter, None)

    def covers(self, topic: str) -> bool:
        """Whether any of the filters covers `topic`."""
        return topic in self._exact or any(covers(wild, topic) for wild in self._wild)
