"""The calls of the `tome` package (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
https://arxiv.org/abs/2210.09461), over `tokred.apply`.

    import tokred.compat.tome as tome

    tome.patch.timm(model)
    model.r = 16

`tokred.remove(model)` takes it away again. What differs: docs/migrating.md.
"""

from tokred.compat.tome import merge, patch, utils, vis
from tokred.compat.tome.utils import benchmark, parse_r
from tokred.compat.tome.vis import make_visualization

__all__ = ["benchmark", "make_visualization", "merge", "parse_r", "patch", "utils", "vis"]
