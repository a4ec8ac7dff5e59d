"""TCFormers as backbones of torchvision's detectors. Needs torchvision."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tokred.models.tcformer.necks import Pyramid
from tokred.optional import require


class Backbone(nn.Module):
    """A pyramid as torchvision's detectors take it, its maps by name: "0" to "3" for strides 4, 8,
    16 and 32, and the coarser ones that `extra` makes.

    Args:
        pyramid: the pyramid, which becomes a part of the model.
        extra: torchvision's `LastLevelMaxPool` ("pool", stride 64), `LastLevelP6P7` ("p6" and "p7",
            strides 64 and 128), or a module like these.
        first: the finest level of the output.

    Raises:
        TypeError: `pyramid` is not a `Pyramid`.
    """

    def __init__(self, pyramid: Pyramid, extra: nn.Module, first: int = 0) -> None:
        super().__init__()
        if not isinstance(pyramid, Pyramid):
            raise TypeError(f"pyramid must be a Pyramid, not {type(pyramid).__qualname__}")
        self.pyramid = pyramid
        self.extra = extra
        self.first = first
        self.out_channels = pyramid.out_channels

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """The maps by name, the finest first."""
        maps = list(self.pyramid(images))[self.first :]
        names = [str(self.first + n) for n in range(len(maps))]
        maps, names = self.extra(maps, maps, names)
        return OrderedDict(zip(names, maps, strict=True))


def mask_rcnn(pyramid: Pyramid, num_classes: int, **options: Any) -> nn.Module:
    """torchvision's Mask R-CNN (He et al., ICCV 2017) on a TCFormer.

    Args:
        pyramid: the pyramid, which becomes a part of the model.
        num_classes: the number of classes, including the background.
        options: options of `torchvision.models.detection.MaskRCNN`, such as `min_size`.

    Raises:
        ModuleNotFoundError: torchvision is not installed (`pip install "tokred[torchvision]"`).
        TypeError: `pyramid` is not a `Pyramid`.
    """
    detection, fpn = _torchvision()
    backbone = Backbone(pyramid, fpn.LastLevelMaxPool())
    model: nn.Module = detection.MaskRCNN(backbone, num_classes, **options)
    return model


def retina_net(pyramid: Pyramid, num_classes: int, **options: Any) -> nn.Module:
    """torchvision's RetinaNet (Lin et al., ICCV 2017) on a TCFormer, at strides 8 to 128.

    Args:
        pyramid: the pyramid, which becomes a part of the model.
        num_classes: the number of classes, including the background.
        options: options of `torchvision.models.detection.RetinaNet`, such as `min_size`.

    Raises:
        ModuleNotFoundError: torchvision is not installed (`pip install "tokred[torchvision]"`).
        TypeError: `pyramid` is not a `Pyramid`.
    """
    detection, fpn = _torchvision()
    # Strides 64 and 128 come of the coarsest map, which is as wide as they are.
    width = getattr(pyramid, "out_channels", 1)
    backbone = Backbone(pyramid, fpn.LastLevelP6P7(width, width), first=1)
    model: nn.Module = detection.RetinaNet(backbone, num_classes, **options)
    return model


def _torchvision() -> tuple[Any, Any]:
    return (
        require("torchvision.models.detection", "torchvision"),
        require("torchvision.ops.feature_pyramid_network", "torchvision"),
    )
