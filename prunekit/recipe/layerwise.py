"""The key ``layerwise`` of a pruned model in a recipe: mask and weights found layer by layer, and what does not go with that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from prunekit.errors import UsageError
from prunekit.layerwise import METHODS, amount_of, get_method
from prunekit.recipe.faults import Misfit
from prunekit.recipe.values import Count, Section, one_of, parse_bytes

GOES_WITH = ("name", "criterion", "allocation", "sparsity", "structure", "layerwise", "refine", "finetune")
"""Keys of a pruned model that say something beside ``layerwise``; by the others' defaults nothing happens."""


class Layerwise(Section):
    """``method``: a name from ``prunekit.layerwise.METHODS``; ``samples``: the first training samples, at most so many;

    ``within``: ``rows`` or ``layer``, null as the method's paper has it; ``damping``; ``activations``: what may be held of the
    hidden states, such as ``2GiB``. See ``prunekit.prune_layerwise``. The method's name alone is short for the rest's defaults.
    """

    method: Annotated[str, one_of(METHODS, "layer-wise method")]
    samples: Count = 256
    within: Literal["rows", "layer"] | None = None
    damping: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.01
    activations: str = "2GiB"

    @field_validator("activations")
    @classmethod
    def _bytes(cls, value: str) -> str:
        parse_bytes(value)
        return value

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``prunekit.prune_layerwise`` that these keys set, without the samples."""
        return {
            "method": self.method, "within": self.within, "damping": self.damping, "activations": parse_bytes(self.activations),
        }  # fmt: skip


def check_layerwise(
    wanted: Layerwise,
    structure: str,
    sparsity: float | None,
    criterion: str,
    allocation: str | None,
    others: Mapping[str, Any],
    when: str,
    again: int = 0,
) -> None:
    """Refuses what makes no sense beside a layer-wise method.

    Args:
        criterion: what says how much of each layer goes; ``auto`` where every layer loses the same share.
        others: keys that are set to something beside ``GOES_WITH``.
        when: of refining, ``never`` where there is none.
        again: how many times more it is asked for after fine-tuning.

    Raises:
        ValueError: names the key, or the option.
    """
    for key in others:
        option = {"ratios": "ratio"}.get(key, key).replace("_", "-")
        raise Misfit(
            f"layerwise finds by itself what goes of a layer; leave {key} out",
            f"--layerwise finds by itself what goes of a layer; leave --{option} out",
        )
    if criterion == "auto" and allocation is not None:
        raise Misfit(
            "layerwise takes the same share of every layer; name a criterion beside allocation, which says another",
            "--layerwise takes the same share of every layer; give --criterion beside --allocation, which says another",
        )
    if criterion != "auto" and structure != "unstructured":
        alike = f"{structure} keeps as much everywhere; leave it out"
        raise Misfit(
            f"criterion says beside layerwise how much of each layer goes, and {alike}",
            f"--criterion says beside --layerwise how much of each layer goes, and {alike}",
        )
    if when == "better":
        raise ValueError("refine goes with layerwise as true or false: the method's mask is what refining begins with")
    if again:
        raise Misfit(
            "layerwise finds weights with the mask, and refining again takes back what was removed as the dense model has it; "
            "leave again out",
            "--layerwise finds weights with the mask, and --refine-again takes back what was removed as the dense model has it; "
            "leave one of them out",
        )
    try:
        unsaid = sparsity is None and structure == "unstructured"  # which is told of every kind of pruning alike
        amount_of(structure, 0.0 if unsaid else sparsity, wanted.within, get_method(wanted.method))
    except UsageError as error:
        raise ValueError(str(error)) from None
