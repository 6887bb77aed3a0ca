"""What a tensor must be: its name, dtype and shape.

Apart from `tensors`, which does the work, because an agent that waits needs to know a plan and not
numpy: the specification alone costs no memory worth naming.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

BATCH = -1
"""In a shape: the batch dimension, whose size is chosen at run time."""

DtypeName = Literal["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]

ITEM_BYTES: dict[DtypeName, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}


class TensorSpec(BaseModel):
    """Name, dtype and shape of one tensor. A dimension of `BATCH` (-1) is free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    dtype: DtypeName
    shape: tuple[Annotated[int, Field(ge=-1, le=2**31)], ...] = Field(max_length=8)

    @property
    def element_count(self) -> int:
        """Elements of a tensor without a free dimension; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """Bytes of the raw data of a tensor without a free dimension."""
        return self.element_count * ITEM_BYTES[self.dtype]

    def of(self, name: str) -> TensorSpec:
        """The same dtype and shape under another name."""
        return self.model_copy(update={"name": name})
