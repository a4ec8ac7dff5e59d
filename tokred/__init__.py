"""Fewer tokens in pretrained vision transformers, in one line.

tokred.apply(model, "atc", keep_rate=0.5)
tokred.remove(model)
"""

from types import ModuleType

from tokred.data import zoo
from tokred.engine.denoising import Around, DenoiserTrace, Denoising
from tokred.engine.reduction import Reduction
from tokred.host import UnsupportedModelError, hosts
from tokred.measure.advise.advising import advise
from tokred.measure.advise.values import Advice
from tokred.measure.calibration import calibrate
from tokred.measure.cost import Bench, Flops, bench, flops
from tokred.measure.evaluate import evaluate
from tokred.measure.evaluation import Evaluation
from tokred.measure.fidelity import Fidelity, fidelity
from tokred.measure.profile.measuring import profile
from tokred.measure.profile.values import Profile
from tokred.measure.tracing import Trace, inspect
from tokred.moved import former, keep_former_paths
from tokred.patching import applied, apply, remove
from tokred.patching.citing import cite
from tokred.patching.gain import NoGainWarning
from tokred.patching.presets import Preset, presets
from tokred.reconstruction import Bilinear, Nearest
from tokred.reducers import names as methods
from tokred.reducers.atc import ATC
from tokred.reducers.ats import ATS
from tokred.reducers.divprune import DivPrune
from tokred.reducers.dpc_knn import DPCKNN
from tokred.reducers.dynamicvit import DynamicViT
from tokred.reducers.evit import EViT
from tokred.reducers.kmedoids import KMedoids
from tokred.reducers.mutual import Mutual
from tokred.reducers.pitome import PiToMe
from tokred.reducers.random import Random
from tokred.reducers.slic import SLIC
from tokred.reducers.svit import SViT
from tokred.reducers.todo import ToDo
from tokred.reducers.tome import ToMe
from tokred.reducers.tome2d import ToMe2d
from tokred.reducers.topk import TopK
from tokred.schedule import Constant, Exactly, Hourglass, Linear, Shares, Stages
from tokred.show.drawing import visualise
from tokred.version import __version__ as __version__

keep_former_paths()

__all__ = [
    "ATC",
    "ATS",
    "DPCKNN",
    "SLIC",
    "Advice",
    "Around",
    "Bench",
    "Bilinear",
    "Constant",
    "DenoiserTrace",
    "Denoising",
    "DivPrune",
    "DynamicViT",
    "EViT",
    "Evaluation",
    "Exactly",
    "Fidelity",
    "Flops",
    "Hourglass",
    "KMedoids",
    "Linear",
    "Mutual",
    "Nearest",
    "NoGainWarning",
    "PiToMe",
    "Preset",
    "Profile",
    "Random",
    "Reduction",
    "SViT",
    "Shares",
    "Stages",
    "ToDo",
    "ToMe",
    "ToMe2d",
    "TopK",
    "Trace",
    "UnsupportedModelError",
    "advise",
    "applied",
    "apply",
    "bench",
    "calibrate",
    "cite",
    "evaluate",
    "fidelity",
    "flops",
    "hosts",
    "inspect",
    "methods",
    "presets",
    "profile",
    "remove",
    "visualise",
    "zoo",
]


def __getattr__(name: str) -> ModuleType:
    """Modules of former versions, see `tokred.moved`."""
    return former(name)
