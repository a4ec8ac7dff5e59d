"""`tokred fid`: what a diffusion pipeline's images lose as fewer tokens are kept.

A sweep draws the same images (prompts and seeds) for every method and keep rate, and without any
reduction; then it compares each set with a reference folder, by the Frechet distance (Heusel et
al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, https://arxiv.org/abs/1706.08500)
and the kernel distance (Binkowski et al., "Demystifying MMD GANs", ICLR 2018,
https://arxiv.org/abs/1801.01401), and each image with the one drawn without reduction.

    sweep = fid.Sweep(("tome", "atc:single"), (0.7, 0.5), prompts, images=500)
    fid.generate(pipe, sweep, out)
    fid.report(sweep, out, fid.score(sweep, out, reference, fid.DigitFeatures()))

Everything is on disk: a sweep that was stopped goes on where it was, by calling it again. Under
`accelerate launch` every process draws its share of the batches; scores are computed by one process
from the files alone. Needs `pip install "tokred[fid]"`.
"""

from tokred.measure.fid.distances import KID_SUBSETS, frechet_distance, kernel_distance
from tokred.measure.fid.features import DigitFeatures, inception
from tokred.measure.fid.figures import contact_sheet, markdown, report
from tokred.measure.fid.files import fingerprint
from tokred.measure.fid.generation import (
    Batch,
    draw,
    generate,
    generator,
    plan,
    process_state,
    share,
)
from tokred.measure.fid.pins import pin, pins
from tokred.measure.fid.reference import PICTURES, digit_reference, pictures_in
from tokred.measure.fid.scores import Score, Scores, score
from tokred.measure.fid.sweep import (
    DENSE,
    KEEP_RATES,
    SEEDS,
    Preset,
    Setting,
    Sweep,
    digit_prompts,
    imagenet_prompts,
    presets,
)
from tokred.measure.fid.times import speeds_in

__all__ = [
    "DENSE",
    "KEEP_RATES",
    "KID_SUBSETS",
    "PICTURES",
    "SEEDS",
    "Batch",
    "DigitFeatures",
    "Preset",
    "Score",
    "Scores",
    "Setting",
    "Sweep",
    "contact_sheet",
    "digit_prompts",
    "digit_reference",
    "draw",
    "fingerprint",
    "frechet_distance",
    "generate",
    "generator",
    "imagenet_prompts",
    "inception",
    "kernel_distance",
    "markdown",
    "pictures_in",
    "pin",
    "pins",
    "plan",
    "presets",
    "process_state",
    "report",
    "score",
    "share",
    "speeds_in",
]
