"""A process of its own that runs models: with another version of tokred, or to see what it takes.

`python worker.py FOLDER` imports the `tokred` in this folder, whatever else is installed. It reads
requests from its standard input, one JSON object a line, and answers each with one line. It calls
nothing of tokred but `tokred.apply`, so that former versions will do. `Worker` is the other end.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import MappingProxyType
from typing import Any

PEAK, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux says how much memory a process takes, and where it is told to forget the peak."""


class Worker:
    """A process that runs models with the `tokred` in one folder, and waits between requests.

    Args:
        folder: in which `tokred` lies, as it is installed or as a source tree.
        environment: variables that the process has besides those of this one.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.folder = folder
        # What it writes to its standard error; open until `close`.
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, do: str, **given: Any) -> Any:
        """What one of `REQUESTS` returns.

        Raises:
            RuntimeError: it has raised an error, or the process has ended.
        """
        process = self._process
        assert process.stdin and process.stdout
        try:
            print(json.dumps({"do": do, **given}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._words.seek(0)
            last = (self._words.read().strip().splitlines() or ["no last words"])[-1]
            raise RuntimeError(f"the process with the tokred in {self.folder} has ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"with the tokred in {self.folder}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """Ends the process."""
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.close()
        process.wait()
        process.stdout.close()
        self._words.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# What runs in the process. `Runner` has one method for each request.


class Runner:
    """The model of the process, and its images."""

    def __init__(self, folder: Path) -> None:
        self.tokred = import_from(folder)
        self.torch: Any = None
        self.dense: Any = None
        self.model: Any = None
        self.images: Any = None

    def version(self) -> str:
        """That of tokred."""
        return str(self.tokred.__version__)

    def make(
        self, name: str, options: dict[str, Any], batch: int, dtype: str, threads: int
    ) -> None:
        """Makes a model of timm, and images: everywhere the same, from one seed."""
        timm, torch = import_module("timm"), import_module("torch")
        self.torch = torch
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        number = getattr(torch, dtype)
        self.model = self.dense = timm.create_model(name, **options).eval().to(dtype=number)
        height, width = self.model.patch_embed.img_size
        self.images = torch.randn(batch, 3, height, width).to(number)

    def apply(self, method: str, keep_rate: float) -> None:
        """Reduces the tokens of the model. The dense one stays, with the same weights in memory."""
        weights = [*self.dense.parameters(), *self.dense.buffers()]
        self.model = copy.deepcopy(self.dense, {id(x): x for x in weights})
        self.tokred.apply(self.model, method, keep_rate=keep_rate)

    def seconds(self, passes: int, dense: bool = False) -> list[float]:
        """How long each of some passes takes, after one that is not measured: others may have used
        the processor since the last."""
        model = self.dense if dense else self.model
        self._run(model)
        taken = []
        for _ in range(passes):
            begin = time.perf_counter()
            self._run(model)
            taken.append(time.perf_counter() - begin)
        return taken

    def answer(self) -> list[list[float]]:
        """What the model says of the images."""
        found: list[list[float]] = self._run(self.model).float().tolist()
        return found

    def resident(self, passes: int) -> int | None:
        """The most bytes that the process takes during some passes, over those before them; None
        where the system does not tell."""
        if not RESET.exists():
            return None
        # What was freed but not handed back would be used first, and not be seen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
        before = _kilobytes("VmRSS")
        RESET.write_text("5")
        for _ in range(passes):
            self._run(self.model)
        return 1024 * (_kilobytes("VmHWM") - before)

    def allocated(self) -> int:
        """The most bytes that torch's allocator has handed out during a pass, over those before."""
        profiler = self.torch.profiler
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            self._run(self.model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        told = [event for event in events if event.get("name") == "[memory]"]
        now = most = 0
        for event in sorted(told, key=lambda event: float(event["ts"])):
            now += event["args"]["Bytes"]
            most = max(most, now)
        return most

    def _run(self, model: Any) -> Any:
        with self.torch.no_grad():
            return model(self.images)


REQUESTS = ("version", "make", "apply", "seconds", "answer", "resident", "allocated")


def import_from(folder: Path) -> Any:
    """The package `tokred` in a folder. In a source tree, its patches are beside it.

    Raises:
        ModuleNotFoundError: there is none.
    """
    sys.path[0] = str(folder)  # in the place of this file's own folder
    beside = folder / "patches" / "__init__.py"
    if not (folder / "tokred" / "patches").exists() and beside.exists():
        # An installed tokred would give its own.
        spec = spec_from_file_location("tokred.patches", beside)
        assert spec and spec.loader
        patches = sys.modules["tokred.patches"] = module_from_spec(spec)
        spec.loader.exec_module(patches)
    tokred = import_module("tokred")
    found = Path(str(tokred.__file__)).resolve().parents[1]
    if found != folder.resolve():
        raise ModuleNotFoundError(f"there is no tokred in {folder}; the one in {found} was found")
    return tokred


def _kilobytes(name: str) -> int:
    """What Linux says of the memory of this process: "VmRSS" is now, "VmHWM" the peak."""
    (line,) = (line for line in PEAK.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def serve(folder: Path) -> None:
    """Answers requests until there are no more."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner: Runner | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            runner = runner or Runner(folder)
            do: Callable[..., Any] = getattr(runner, request.pop("do"))
            answer: dict[str, Any] = {"answer": do(**request)}
        except Exception as error:  # of whatever kind: it is told at the other end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
