"""What is closed at the end of its `with` block, however that ends."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """A context manager that is itself what it manages: leaving the block calls `close`."""

    def close(self) -> None:
        """Lets go of what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
