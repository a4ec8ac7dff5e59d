"""`tokred fid`: what the images of a diffusion pipeline lose as fewer tokens are kept.

A sweep draws the same images (prompts and seeds) without reduction, and with every method at every
keep rate. It compares each set of images with a reference folder, by the Frechet distance (Heusel
et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017,
https://arxiv.org/abs/1706.08500) and the kernel distance (Binkowski et al., "Demystifying MMD
GANs", ICLR 2018, https://arxiv.org/abs/1801.01401); and each image with the one that was drawn
without reduction.

    sweep = fid.Sweep(("tome", "atc:single"), (0.7, 0.5), prompts, images=500)
    fid.generate(pipe, sweep, out)
    fid.report(sweep, out, fid.score(sweep, out, reference, fid.DigitFeatures()))

Everything is on disk: to go on with a sweep that was stopped, call it again. Under `accelerate
launch` every process draws its share of the batches; one process computes scores, from the files
alone. Needs `pip install "tokred[fid]"`.
"""

from tokred.data.fingerprint import fingerprint
from tokred.data.processes import process_state
from tokred.data.reading import SUFFIXES
from tokred.measure.fid.distances import KID_SUBSETS, frechet_distance, kernel_distance
from tokred.measure.fid.features import DigitFeatures, inception
from tokred.measure.fid.figures import contact_sheet, markdown, report
from tokred.measure.fid.generation import SweepBatch, draw, generate, generator, plan, share
from tokred.measure.fid.pins import pin, pins
from tokred.measure.fid.reference import digit_reference, reference_pictures
from tokred.measure.fid.scores import Score, SweepScores, score
from tokred.measure.fid.sweep import (
    DENSE,
    KEEP_RATES,
    SEEDS,
    Sweep,
    SweepPreset,
    SweepSetting,
    digit_prompts,
    imagenet_prompts,
    presets,
)
from tokred.measure.fid.times import speeds_in

# Names of version 0.7.
Batch = SweepBatch
Preset = SweepPreset
Scores = SweepScores
Setting = SweepSetting
PICTURES = SUFFIXES
pictures_in = reference_pictures

__all__ = [
    "DENSE",
    "KEEP_RATES",
    "KID_SUBSETS",
    "SEEDS",
    "DigitFeatures",
    "Score",
    "Sweep",
    "SweepBatch",
    "SweepPreset",
    "SweepScores",
    "SweepSetting",
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
    "pin",
    "pins",
    "plan",
    "presets",
    "process_state",
    "reference_pictures",
    "report",
    "score",
    "share",
    "speeds_in",
]
