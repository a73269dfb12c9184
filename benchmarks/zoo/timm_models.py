"""timm's families, as small as its own constructors allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo.entry import CLASSES, NO_ATTENTION, NO_BLOCKS, Entry, images
from benchmarks.zoo.operators import declare


def _made(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare()
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return build


def _mixer() -> nn.Module:
    declare()
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, embed_dim=32, num_blocks=2)


def _efficientnet() -> nn.Module:
    """Its normalisation layers activate too, which those of torchvision's do not."""
    declare()
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e3_c12_se0.25"], ["ir_r1_k5_s2_e3_c16_se0.25"]]
    return EfficientNet(decode_arch_def(blocks), CLASSES, num_features=32, stem_size=8)


def _entry(name: str, size: int = 32, senseless: dict[str, str] | None = None, fast: bool = False, **options: Any) -> Entry:
    return Entry(_made(name, **options), images(size), senseless=senseless or {}, packages=("timm", "torchvision"), fast=fast)


# efficientformer's attention is made for 7 x 7 places, so its pictures stay large.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}

MODELS = {
    "timm_resnet": _entry("resnet18", senseless=NO_ATTENTION, layers=[2, 1, 1, 1], channels=[16, 16, 32, 32]),
    "timm_convnext": _entry("convnext_atto", senseless=NO_ATTENTION, depths=(1, 1, 2, 1), dims=(8, 16, 16, 32)),
    "timm_vit": _entry("vit_tiny_patch16_224", num_heads=4, **SMALL),
    "timm_deit": _entry("deit_tiny_distilled_patch16_224", num_heads=4, **SMALL),
    "timm_mixer": Entry(_mixer, images(32), senseless=NO_ATTENTION, packages=("timm", "torchvision"), fast=True),
    "timm_efficientnet": Entry(
        _efficientnet, images(32), senseless=NO_ATTENTION, packages=("timm", "torchvision")
    ),
    "timm_mobilevit": _entry("mobilevit_xxs", 64),
    "timm_levit": _entry("levit_128s", 64, img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1), key_dim=8),
    "timm_efficientformer": _entry(
        "efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32), num_vit=1, senseless=NO_BLOCKS
    ),
}  # fmt: skip
