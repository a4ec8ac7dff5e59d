"""`tokred train`: fine-tunes a model that runs on fewer tokens, and trains gates that choose them.

    model = timm.create_model("deit_small_patch16_224", pretrained=True)
    tokred.apply(model, "svit", keep_rate=0.7)
    training.fit(model, data, training.recipes["svit"], Path("trained"), validate=held_out)

The losses are those of SViT and of DynamicViT (`rate_loss`, `kl_loss`, `token_loss`). The same loop
fine-tunes a model in which tokens are merged, and trains a model from random weights.

Everything random is a function of the seed and of where in the training it happens. The order of
samples depends on (seed, epoch), random changes to a sample on (seed, epoch, sample), the noise of
gates on (seed, step, layer, place in the batch). So a training that was stopped goes on as if it
had not been, and any number of processes trains on the same batches with the same noise. (Dropout
in the model depends on (seed, step, process): its masks differ with the number of processes.)

Needs `pip install "tokred[train]"`.
"""

from tokred.training.batches import Seeded, TrainingSamples, order, split
from tokred.training.checkpoints import KEPT_CHECKPOINTS, latest
from tokred.training.curve import CURVE, plot, smooth
from tokred.training.loop import Fitted, fit
from tokred.training.losses import (
    check_labels,
    cross_entropy,
    kl_loss,
    over_processes,
    processes,
    rate_loss,
    scores_of,
    token_loss,
    weighted_mean,
)
from tokred.training.noise import Noise
from tokred.training.recipe import Recipe, recipes
from tokred.training.seeds import seeded
from tokred.training.steps import usage
from tokred.training.tables import read_table
from tokred.training.trained import LastTokens, Teacher, Trained

Samples = TrainingSamples
"""The name of version 0.7."""

__all__ = [
    "CURVE",
    "KEPT_CHECKPOINTS",
    "Fitted",
    "LastTokens",
    "Noise",
    "Recipe",
    "Seeded",
    "Teacher",
    "Trained",
    "TrainingSamples",
    "check_labels",
    "cross_entropy",
    "fit",
    "kl_loss",
    "latest",
    "order",
    "over_processes",
    "plot",
    "processes",
    "rate_loss",
    "read_table",
    "recipes",
    "scores_of",
    "seeded",
    "smooth",
    "split",
    "token_loss",
    "usage",
    "weighted_mean",
]
