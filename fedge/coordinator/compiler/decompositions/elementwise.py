"""Gradients of activations, dropout, embeddings and the negative log-likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def native_dropout_backward(grad_output: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The gradient of what was kept, scaled as it was."""
    return grad_output * mask.to(grad_output.dtype) * scale


def silu_backward(grad_output: Tensor, inputs: Tensor) -> Tensor:
    """d/dx x sigmoid(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    sigmoid = inputs.sigmoid()
    return grad_output * (sigmoid * (1 + inputs * (1 - sigmoid)))


def mish_backward(grad_output: Tensor, inputs: Tensor) -> Tensor:
    """d/dx x tanh(softplus(x)) = t + x sigmoid(x) (1 - t²)."""
    tanh = torch.nn.functional.softplus(inputs).tanh()
    return grad_output * (tanh + inputs * inputs.sigmoid() * (1 - tanh * tanh))


def embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """`[num_weights, width]`: the gradients of each row's uses, added."""
    width = grad_output.shape[-1]
    flat = indices.reshape(-1)
    rows = grad_output.reshape(-1, width)
    if padding_idx >= 0:
        rows = rows * (flat != padding_idx).to(rows.dtype).unsqueeze(1)
    if scale_grad_by_freq:
        ones = aten.full.default([num_weights], 0.0, dtype=rows.dtype)
        counts = aten.scatter_add.default(ones, 0, flat, torch.ones_like(flat, dtype=rows.dtype))
        rows = rows / counts.index_select(0, flat).unsqueeze(1)
    zeros = aten.full.default([num_weights, width], 0.0, dtype=rows.dtype)
    index = flat.unsqueeze(1).expand(-1, width)
    gradient: Tensor = aten.scatter_add.default(zeros, 0, index, rows)
    return gradient


DECOMPOSITIONS = {
    aten.native_dropout_backward.default: native_dropout_backward,
    aten.silu_backward.default: silu_backward,
    aten.mish_backward.default: mish_backward,
    aten.embedding_dense_backward.default: embedding_dense_backward,
}
