"""Kept weights that make up for removed ones, layer by layer: exact least squares on the layers' own inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prunekit.apply.masks import apply_masks
from prunekit.criteria.layer_inputs import LAYERS, Moments, collecting, layers_of


@torch.no_grad()
def compensate(
    model: nn.Module, masks: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]], damping: float = 0.0
) -> nn.Module:
    """A masked copy of ``model`` whose kept weights minimise each layer's squared output error on ``batches``.

    For every output of a Linear, Conv1d or Conv2d layer, with ``H = Σ x xᵀ`` of the dense model's inputs, ``K`` what the mask
    keeps of the weight ``w`` and ``R`` what it removes: ``v_K = w_K + (H_KK + λI)⁻¹ H_KR w_R``, ``v_R = 0`` (Optimal Brain
    Surgeon for a whole set at once; the problem that SparseGPT, arXiv 2301.00774, solves approximately). Where ``H_KK`` is
    singular the smallest change is taken. Each layer is corrected for the dense model's inputs, not for what the pruned
    layers before it send; biases, and masked parameters of other layers, are masked only.

    One factorisation of a ``|K| × |K|`` matrix an output, or one a layer where all outputs keep the same (channels).

    Args:
        model: the weights that ``masks`` were made for; left as it is.
        masks: by parameter or buffer name, True stays: ``Plan.masks()``.
        batches: calibration samples as ``(inputs, labels)``; labels are not looked at.
        damping: ``λ`` as a share of the mean diagonal of ``H``. With 0 the layer's error on ``batches`` is the least that the
            mask allows; a little helps where samples are few.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
        ValueError: ``damping`` is negative.
    """
    if damping < 0:
        raise ValueError(f"damping is {damping}; it must be at least 0")
    result = copy.deepcopy(model)
    apply_masks(result, masks)
    running = copy.deepcopy(model).eval()
    device = next(running.parameters()).device
    modules = dict(running.named_modules())
    wanted = [name for name in masks if name.endswith("weight") and isinstance(modules.get(name.rpartition(".")[0]), LAYERS)]
    with collecting(layers_of(running, wanted, "compensation")) as moments:
        for x, _ in batches:
            running(x.to(device))
    dense, pruned = dict(model.named_parameters()), dict(result.named_parameters())
    for name in wanted:
        if name in moments and not bool(masks[name].all()):
            weight = dense[name]
            solved = _solve(moments[name], weight, masks[name].to(device), damping)
            pruned[name].copy_(solved.reshape(weight.shape))
    return result


def _solve(found: Moments, weight: Tensor, mask: Tensor, damping: float) -> Tensor:
    """Compensated rows ``(groups, outputs / groups, d)``, float64."""
    rows = found.rows_of(weight).clone()
    for group, (gram, keeps) in enumerate(zip(found.gram, found.rows_of(mask) != 0, strict=True)):
        damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        patterns, which = torch.unique(keeps, dim=0, return_inverse=True)
        for number, keep in enumerate(patterns):
            those = which == number
            old = rows[group, those]
            new = torch.zeros_like(old)
            if bool(keep.any()):
                missing = old[:, ~keep] @ gram[~keep][:, keep]
                new[:, keep] = old[:, keep] + _divide(damped[keep][:, keep], missing.T).T
            rows[group, those] = new
    return rows


def _divide(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a symmetric matrix without negative eigenvalues; the smallest solution where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True)
    return inverse @ right
