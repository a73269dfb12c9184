"""SynFlow: ``|θ| · ∂R/∂|θ|``, ``R`` the summed outputs of the model with absolute weights, fed with ones.

Tanaka et al. 2020, arXiv 2006.05467. It looks at no data but for the shape of one scoring sample.

One-shot, where the paper repeats it in 100 rounds. Computed in float64: ``R`` is a product over layers and overflows early.

``R`` measures paths only where activations pass positive numbers on as they are (ReLU, pooling). BatchNorm becomes its
absolute scale and shift (mean 0, variance 1: the recorded statistics would bring signs back), and so do LayerNorm, GroupNorm
and InstanceNorm, which would divide the flow away. Saturating activations (tanh, sigmoid, softmax in attention) damp it, so
read the scores of such models with care.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from prunekit.batch import described, leaves, mapped, to
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.errors import PrunekitError
from prunekit.task.task import flat

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def _synflow(evidence: Evidence) -> CriterionResult:
    x, y = evidence.samples().rows(0, 1)
    if not all(tensor.is_floating_point() for tensor in leaves(x)):
        raise PrunekitError(f"synflow feeds ones in place of real inputs, and this model takes {described(x)} inputs")
    function = evidence.function("outputs" if evidence.classes else flat)
    function.model.double()
    for module in function.model.modules():
        if isinstance(module, NORMS):
            module.forward = MethodType(_scale_and_shift, module)  # type: ignore[method-assign]
    for parameter in function.model.parameters():
        parameter.data.abs_()  # frozen ones are not among the coordinates
    theta = evidence.state.double().abs()
    views = evidence.layout.views(theta)
    for entry in evidence.layout:
        if entry.kind == "buffer" and entry.name.endswith(("running_mean", "running_var")):
            views[entry.name].fill_(float(entry.name.endswith("running_var")))
    theta = theta.to(function.device).requires_grad_()
    ones = mapped(x, lambda tensor: torch.ones(tensor.shape, dtype=torch.float64, device=function.device))
    (slope,) = torch.autograd.grad(function(theta, ones, to(y, function.device)).sum(), theta)
    flow = evidence.layout.views((theta.detach() * slope).abs().cpu())
    if not any(bool(flow[name].any()) for name in evidence.prunable):
        raise PrunekitError("synflow: no flow reaches any weight of this model; see the notes on norms and activations")
    return CriterionResult(
        {name: _fitting(flow[name], evidence.state.dtype) for name in evidence.prunable}, gradient_evaluations=1
    )


def _fitting(flow: Tensor, dtype: torch.dtype) -> Tensor:
    """In the weights' precision where it holds the numbers."""
    return flow if float(flow.max()) > torch.finfo(dtype).max else flow.to(dtype)


def _scale_and_shift(module: nn.Module, x: Tensor) -> Tensor:
    """A norm layer without its division."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):  # these have one number a channel, on axis 1
        weight, bias = (None if t is None else t.view(-1, *[1] * (x.dim() - 2)) for t in (weight, bias))
    out = x if weight is None else x * weight
    return out if bias is None else out + bias


CRITERION = Criterion(_synflow, "synaptic flow, looks at no data (arXiv 2006.05467)", needs_data=True, group="l1")
