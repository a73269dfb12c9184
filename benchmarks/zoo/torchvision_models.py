"""torchvision's families, as small as its own constructors allow."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import CLASSES, NO_ATTENTION, NO_BLOCKS, Entry, images, maps, splits
from benchmarks.zoo.operators import declare

NEEDS = ("torchvision",)


def _models() -> Any:
    declare()
    from torchvision import models

    return models


NARROW = 8  # times narrower than the published widths, where a constructor has no option for it


def _resnet(block: str, layers: list[int]) -> nn.Module:
    from_ = _models().resnet

    class Narrow(from_.ResNet):  # type: ignore[misc, name-defined]
        def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> nn.Module:
            return super()._make_layer(block, planes // NARROW, *rest, **options)

    model = Narrow(getattr(from_, block), layers)
    model.fc = nn.Linear(model.inplanes, CLASSES)
    return model


def _mobilenet_v2() -> nn.Module:
    setting = [[1, 8, 1, 1], [6, 12, 2, 2], [6, 16, 2, 2]]
    return _models().MobileNetV2(CLASSES, width_mult=0.25, inverted_residual_setting=setting)


def _mobilenet_v3() -> nn.Module:
    from_ = _models().mobilenetv3
    block = partial(from_.InvertedResidualConfig, width_mult=0.5)
    setting = [
        block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 3, 72, 24, False, "RE", 2, 1), block(24, 5, 96, 40, True, "HS", 2, 1),
        block(40, 5, 120, 40, True, "HS", 1, 1),
    ]  # fmt: skip
    return from_.MobileNetV3(setting, last_channel=64, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    from_ = _models().efficientnet
    block = partial(from_.MBConvConfig, width_mult=0.5, depth_mult=1.0)
    setting = [block(1, 3, 1, 32, 16, 1), block(6, 3, 2, 16, 24, 2), block(6, 5, 2, 24, 40, 2)]
    return from_.EfficientNet(setting, dropout=0.2, num_classes=CLASSES, last_channel=64)


def _densenet() -> nn.Module:
    return _models().DenseNet(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, bn_size=2, num_classes=CLASSES)


def _vgg() -> nn.Module:
    from_ = _models().vgg
    features = from_.make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=True)
    with torch.device("meta"):  # its own classifier would have 120 million weights
        model = from_.VGG(features, num_classes=CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(
        nn.Linear(128, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return model


def _squeezenet() -> nn.Module:
    from_ = _models().squeezenet

    model = from_.SqueezeNet("1_1", num_classes=CLASSES)
    fire, before = from_.Fire, 64
    for index, layer in enumerate(model.features):  # the published order of layers, narrower
        if isinstance(layer, fire):
            squeezed, expanded = layer.squeeze.out_channels // 4, layer.expand1x1.out_channels // NARROW
            model.features[index] = fire(before, squeezed, expanded, expanded)
            before = 2 * expanded
    model.classifier[1] = nn.Conv2d(before, CLASSES, 1)
    return model


def _shufflenet() -> nn.Module:
    return _models().ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=CLASSES)


def _googlenet() -> nn.Module:
    _models()
    from_ = importlib.import_module("torchvision.models.googlenet")  # the package has a function of that name

    def convolution(before: int, after: int, **options: Any) -> nn.Module:
        return from_.BasicConv2d(before if before == 3 else before // NARROW, after // NARROW, **options)

    def inception(*widths: int) -> nn.Module:
        return from_.Inception(*(width // NARROW for width in widths))

    model = from_.GoogLeNet(
        aux_logits=False, init_weights=False, blocks=[convolution, inception, from_.InceptionAux], dropout=0.0
    )
    model.fc = nn.Linear(1024 // NARROW, CLASSES)
    return model


def _convnext() -> nn.Module:
    from_ = _models().convnext
    blocks = [from_.CNBlockConfig(16, 32, 2), from_.CNBlockConfig(32, None, 2)]
    return from_.ConvNeXt(blocks, layer_scale=0.5, num_classes=CLASSES)


def _vit() -> nn.Module:
    return _models().VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=CLASSES)


def _swin() -> nn.Module:
    return _models().SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def _regnet() -> nn.Module:
    from_ = _models().regnet
    parameters = from_.BlockParams.from_init_params(depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return from_.RegNet(parameters, num_classes=CLASSES, stem_width=16)


def _segmentation(kind: str) -> nn.Module:
    """Its head on a small backbone of torchvision's own; answers a dictionary with ``out``."""
    models = _models()
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = IntermediateLayerGetter(_resnet("BasicBlock", [1, 1, 1, 1]), {"layer3": "out"})
    if kind == "fcn":
        return models.segmentation.FCN(backbone, models.segmentation.fcn.FCNHead(32, CLASSES))
    head = nn.Sequential(
        models.segmentation.deeplabv3.ASPP(32, [2, 4], 16), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Conv2d(16, CLASSES, 1),
    )  # fmt: skip
    return models.segmentation.DeepLabV3(backbone, head)


def _detector() -> nn.Module:
    """A detector's backbone: a feature pyramid, which answers a dictionary of maps."""
    _models()
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    returned = {"layer1": "0", "layer2": "1", "layer3": "2"}
    return BackboneWithFPN(_resnet("BasicBlock", [1, 1, 1, 1]), returned, [8, 16, 32], 8)


def pyramid_loss(maps: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """A detector's author brings a loss of his own: here the mean of both smallest maps against a number."""
    return torch.stack([(found.flatten(1).mean(1) - labels).pow(2).mean() for found in maps]).sum()


def _detections() -> Callable[[], dict[str, Any]]:
    return lambda: splits(lambda n, g: (torch.randn(n, 3, 32, 32, generator=g), torch.randn(n, generator=g)))


def _entry(build: Callable[[], nn.Module], size: int = 32, fast: bool = False, **options: Any) -> Entry:
    senseless = options.pop("senseless", NO_ATTENTION)
    return Entry(build, images(size), senseless=senseless, packages=NEEDS, fast=fast, **options)


MODELS: dict[str, Entry] = {
    "tv_resnet18": _entry(lambda: _resnet("BasicBlock", [2, 1, 1, 1]), fast=True),
    "tv_resnet50": _entry(lambda: _resnet("Bottleneck", [2, 1, 1, 1])),
    "tv_mobilenet_v2": _entry(_mobilenet_v2),
    "tv_mobilenet_v3": _entry(_mobilenet_v3),
    "tv_efficientnet": _entry(_efficientnet),
    "tv_densenet": _entry(_densenet, senseless={**NO_ATTENTION, **NO_BLOCKS}),
    "tv_vgg_bn": _entry(_vgg, senseless={**NO_ATTENTION, **NO_BLOCKS}),
    "tv_squeezenet": _entry(_squeezenet, senseless={**NO_ATTENTION, **NO_BLOCKS}),
    "tv_shufflenet": _entry(_shufflenet),
    "tv_googlenet": _entry(_googlenet, senseless={**NO_ATTENTION, **NO_BLOCKS}),
    "tv_convnext": _entry(_convnext),
    "tv_vit": _entry(_vit, senseless={}, fast=True),
    "tv_swin": _entry(_swin, senseless={}),
    "tv_regnet": _entry(_regnet),
    "tv_fcn": Entry(
        lambda: _segmentation("fcn"), maps(32), "segmentation", senseless={**NO_ATTENTION, **NO_BLOCKS}, packages=NEEDS
    ),
    "tv_deeplab": Entry(
        lambda: _segmentation("deeplab"), maps(32), "segmentation", senseless={**NO_ATTENTION, **NO_BLOCKS}, packages=NEEDS
    ),
    "tv_detector_backbone": Entry(
        _detector, _detections(), "heads", "benchmarks.zoo.torchvision_models:pyramid_loss",
        senseless={**NO_ATTENTION, **NO_BLOCKS}, packages=NEEDS, options={"heads": ["2", "pool"]},
    ),
}  # fmt: skip

if importlib.util.find_spec("torchvision") is not None:
    declare()  # timm and transformers import torchvision too
