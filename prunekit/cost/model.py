"""What a model is to its costs: how many weights, how much a sample computes, how much it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs, call, fresh, size
from prunekit.measure.macs import macs

SINGLE = 4
"""Bytes of a number in single precision."""
KEPT = 34
"""Numbers that a block of a transformer keeps of each token for its backward pass, in widths, about: Korthikanti et al. 2022
(arXiv 2205.05198, equation 1) count 34 bytes in half precision, dropout among them; scores of attention come on top."""


@dataclass(frozen=True)
class Shape:
    """A model, as its costs see it.

    Attributes:
        parameters: numbers that training moves.
        prunable: of them, those that may go.
        macs: multiply-accumulates of one sample's forward pass.
        kept: bytes that one sample's forward pass keeps for its backward pass.
        between: of them, what lies between blocks, which is all where blocks are run again; ``blocks``: how many there are.
        axes: numbers of the sums along axes that a score file keeps of each sample and target.
    """

    parameters: int
    prunable: int
    macs: float
    kept: float = 0.0
    between: float = 0.0
    blocks: int = 1
    axes: int = 0

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, prunable: int) -> Shape:
        """Of a model that is there, by forward passes of ``inputs``, one of them with its graph.

        Example:
            >>> import torch
            >>> from prunekit.cost import Shape
            >>> Shape.of(torch.nn.Linear(4, 8), torch.zeros(2, 4), prunable=32).macs
            32.0
        """
        parameters, count = list(model.parameters()), size(inputs)
        axes = sum(sum(p.shape) for p in parameters)
        return cls(
            sum(p.numel() for p in parameters),
            prunable,
            macs(model, inputs) / count,
            kept=_kept(model, inputs) / count,
            axes=axes,
        )

    @classmethod
    def transformer(
        cls,
        *,
        layers: int,
        width: int,
        hidden: int,
        vocabulary: int,
        length: int,
        heads: int,
        kv_heads: int,
        number: int = SINGLE,
    ) -> Shape:
        """Of a decoder like Llama's, a sample being ``length`` tokens; the linear layers of its blocks are prunable.

        Args:
            hidden: width of the gated layer, which has three matrices.
            number: bytes of an activation.

        Example:
            >>> from prunekit.cost import Shape
            >>> seven = Shape.transformer(
            ...     layers=32, width=4096, hidden=11008, vocabulary=32000, length=4096, heads=32, kv_heads=32
            ... )
            >>> round(seven.parameters / 1e9, 2)
            6.74
        """
        block = 2 * width * width + 2 * width * width * kv_heads // heads + 3 * width * hidden
        table = vocabulary * width
        linear = layers * block + table  # the head; what an embedding looks up costs nothing
        attention = 2 * layers * length * width
        return cls(
            parameters=layers * (block + 2 * width) + 2 * table + width,
            prunable=layers * block,
            macs=length * (linear + attention),
            kept=length * number * (layers * (KEPT / 2 * width + heads * length) + 2 * vocabulary),
            between=length * number * layers * width,
            blocks=layers,
            axes=layers * (6 * width + 2 * hidden) + vocabulary,
        )


def _kept(model: nn.Module, inputs: Inputs) -> int:
    """Bytes that autograd keeps of one forward pass, the weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = call(model, fresh(inputs))  # what it keeps lives as long as they do
    del outputs
    return sum(found.values())
