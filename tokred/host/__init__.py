"""What a patch says about a family of models, and how the patch for a model is found."""

from tokred.engine.denoising import Place
from tokred.engine.sampling import THOUSAND, Times
from tokred.host.check import (
    ADDING_A_HOST,
    blocks_of,
    check_host,
    class_name,
    forward_of,
    innermost,
    innermost_slot,
    is_a,
    is_patched,
    named,
    submodule,
    tap_of,
    unwrapped,
)
from tokred.host.find import (
    find_denoiser,
    find_host,
    hosts,
    library_of,
    module_of,
    patch_names,
    scheduler_of,
    stage_of,
    summary_of,
)
from tokred.host.host import Denoiser, Host, Stage, UnsupportedModelError, WindowedHost

__all__ = [
    "ADDING_A_HOST",
    "THOUSAND",
    "Denoiser",
    "Host",
    "Place",
    "Stage",
    "Times",
    "UnsupportedModelError",
    "WindowedHost",
    "blocks_of",
    "check_host",
    "class_name",
    "find_denoiser",
    "find_host",
    "forward_of",
    "hosts",
    "innermost",
    "innermost_slot",
    "is_a",
    "is_patched",
    "library_of",
    "module_of",
    "named",
    "patch_names",
    "scheduler_of",
    "stage_of",
    "submodule",
    "summary_of",
    "tap_of",
    "unwrapped",
]
