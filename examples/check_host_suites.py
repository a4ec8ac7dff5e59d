"""Runs the model tests of timm, transformers and diffusers with tokred on every model, at keep rate
1, where nothing may change.

    git clone https://github.com/huggingface/pytorch-image-models   # the version that is installed
    python examples/check_host_suites.py --timm pytorch-image-models
    python examples/check_host_suites.py --timm pytorch-image-models -k 'vit_tiny and not fx'
    python examples/check_host_suites.py --transformers transformers --diffusers diffusers

Every suite runs twice, without tokred and with it, and what differs is printed. A test is

*same*: it passes in both runs, or fails in both, or is skipped in both.
*refused*: it passes without tokred, and with it tokred says in one sentence what it cannot do.
*differs*: anything else. The script then exits with 1.

The libraries that are installed are tested, not those of the checkouts, which lend their tests
alone. Models that tokred does not support are tested as they are; how many had tokred on them is
printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

SUITES = {
    "timm": ("tests/test_models.py",),
    "transformers": tuple(
        f"tests/models/{name}"
        for name in (
            "aimv2", "audio_spectrogram_transformer", "beit", "blip", "clip", "clipseg", "data2vec",
            "deit", "depth_anything", "dinov2", "dinov2_with_registers", "dinov3_vit", "dpt",
            "ijepa", "sam", "siglip", "siglip2", "swin", "swinv2", "videomae", "vilt", "vit",
            "vit_mae", "vit_msn", "vitdet", "vitpose_backbone", "vivit", "yolos",
        )
    ),
    "diffusers": (
        "tests/models/unets/test_models_unet_2d_condition.py",
        "tests/models/transformers/test_models_dit_transformer2d.py",
        "tests/models/transformers/test_models_pixart_transformer2d.py",
    ),
}  # fmt: skip
REPORT, LIBRARY, PATCHED = (f"TOKRED_SUITE_{name}" for name in ("REPORT", "LIBRARY", "PATCHED"))
SENTENCES = ("cannot trace this model while", "cannot compile a model while", "cannot run a model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for library in SUITES:
        parser.add_argument(f"--{library}", type=Path, help=f"a checkout of {library}")
    parser.add_argument("-k", dest="select", help="only tests that match, as for pytest")
    parser.add_argument("--files", nargs="+", help="test files or folders, in place of ours")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in SUITES if getattr(options, name)}
    if not chosen:
        parser.error(f"give a checkout: {' or '.join(f'--{name}' for name in SUITES)}")
    differs = 0
    for library, checkout in chosen.items():
        files = [name for name in options.files or SUITES[library] if (checkout / name).exists()]
        if not files:
            parser.error(f"--{library}: {checkout} has no {' or '.join(SUITES[library])}")
        without, _ = run(library, checkout, files, options.select, patched=False)
        patched, models = run(library, checkout, files, options.select, patched=True)
        differs += tell(library, without, patched, models)
    return 1 if differs else 0


Outcomes = dict[str, tuple[str, str]]
"""Of every test: how it ended, and the last line of what it said."""


def run(
    library: str, checkout: Path, files: list[str], select: str | None, patched: bool
) -> tuple[Outcomes, Counter[str]]:
    """One run of a suite: how every test ended, and how many models had tokred on them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        here = str(Path(__file__).resolve().parent)
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            REPORT: str(report),
            LIBRARY: library,
            PATCHED: "1" if patched else "",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, *files]
        command += ["-p", "no:cacheprovider", "--tb=line", "--disable-warnings"]
        command += ["-k", select] if select else []
        subprocess.run(command, cwd=checkout, env=environment, stdout=sys.stderr, check=False)
        lines = (
            [json.loads(line) for line in report.read_text().splitlines()]
            if report.exists()
            else []
        )
    if not lines:
        raise SystemExit(f"{library}: no test ran; see above")
    models = Counter(str(line["model"]) for line in lines if "model" in line)
    ended = {line["test"]: (line["outcome"], line["said"]) for line in lines if "test" in line}
    return ended, models


def tell(library: str, without: Outcomes, patched: Outcomes, models: Counter[str]) -> int:
    """Prints what differs; returns in how many tests."""
    found: dict[str, list[str]] = {"same": [], "refused": [], "differs": []}
    for test in sorted(without.keys() | patched.keys()):
        before, said_before = without.get(test, ("not run", ""))
        after, said = patched.get(test, ("not run", ""))
        if before == after:
            found["same"].append(test)
        elif before == "passed" and any(sentence in said for sentence in SENTENCES):
            found["refused"].append(test)
        else:
            found["differs"].append(f"{test}: {before} -> {after}\n    {said or said_before}")
    with_tokred = sum(number for why, number in models.items() if why == "patched")
    print(f"{library}: {', '.join(f'{len(tests)} {kind}' for kind, tests in found.items())}")
    print(f"  models with tokred on them: {with_tokred} of {sum(models.values())}")
    for test in found["differs"]:
        print(f"  {test}")
    return len(found["differs"])


# What pytest loads, in the process that runs a suite.


def write(**values: Any) -> None:
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(values) + "\n")


def pytest_configure(config: Any) -> None:
    if REPORT not in os.environ:
        return
    library = os.environ[LIBRARY]
    # Imported before the tests, so that it is the installed one.
    imported = import_module(library)
    if not os.environ[PATCHED]:
        return
    if library == "timm":
        created = after_creation(imported.create_model)
        for name in ("timm", "timm.models", "timm.models._factory"):
            sys.modules[name].create_model = created  # type: ignore[attr-defined]
    elif library == "transformers":
        after_first_use(imported.PreTrainedModel)
    else:
        after_first_use(imported.ModelMixin)


def pytest_runtest_logreport(report: Any) -> None:
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash is not None else "")
        write(test=report.nodeid, outcome=report.outcome, said=" ".join(said.split())[-400:])


def after_creation(create: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes models, with tokred on what it makes."""

    @wraps(create)
    def created(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        put_on(model)
        return model

    return created


def after_first_use(base: Any) -> None:
    """Puts tokred on every model of a class when a test first moves it, or sets its mode: tests
    make models by their constructors, and then do one or the other."""
    for name in ("to", "train"):
        own = getattr(base, name)

        def used(self: Any, *args: Any, _own: Any = own, **kwargs: Any) -> Any:
            result = _own(self, *args, **kwargs)
            if not vars(self).get("_tokred_tried"):
                vars(self)["_tokred_tried"] = True
                put_on(self)
            return result

        setattr(base, name, wraps(own)(used))


def put_on(model: Any) -> None:
    """tokred at keep rate 1, by the first method that the model can have."""
    import tokred
    from tokred.host import find_denoiser

    reason = "no method"
    for method in ("tome", "slic"):
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.suppress(tokred.UnsupportedModelError))
            denoiser = find_denoiser(model) is not None
            tokred.apply(model, method, tokred.Around(1.0) if denoiser else 1.0)
            reason = "patched"
            break
    write(model=reason)


if __name__ == "__main__":
    sys.exit(main())
