"""What a model answers to the images: scores against labels, and closeness to the dense model."""

from __future__ import annotations

from torch import nn

from tokred.host import Host
from tokred.measure.batches import Batches
from tokred.measure.fidelity import Difference, Outputs, compare, seeing
from tokred.measure.metrics import TASKS, Scores, Task, task_of
from tokred.patching import hang, host_of, reduction_of, remove


class Answers:
    """Scores and differences of one model with and without reductions, on the same batches.

    Attributes:
        task: what the labels ask for; None without labels.
        example: what the dense model makes of the first batch.
        compared: the numbers of the batches on which a reduced model is compared with the dense
            one.
    """

    def __init__(
        self, model: nn.Module, host: Host | None, batches: Batches, task: str | None, compared: int
    ) -> None:
        self._model, self._host, self._batches = model, host, batches
        self._dense: dict[int, list[Outputs]] = {}
        inputs, targets = batches.first()
        with seeing(model, host) as see:
            self.example = see(inputs)
        self.task: Task | None = None
        if targets is not None:
            self.task = TASKS[task] if task else task_of(targets, self.example.decisions, model)
        elif task is not None:
            raise ValueError(f"{batches.samples.name} has no labels for {task}")
        self.inputs = inputs
        self.compared = batches.spread(compared, self.example.bytes)

    @property
    def everywhere(self) -> bool:
        """Whether the model answers for every pixel."""
        decided = self.example.decisions
        return decided.depth is not None or (decided.chosen is not None and decided.chosen.ndim > 2)

    def seen(
        self, dense: bool, batches: int | None = None
    ) -> tuple[dict[str, float], int, list[Difference]]:
        """Runs the model as it is, and looks at its answers.

        Args:
            dense: whether it is the dense model, whose answers are kept for comparison.
            batches: if given, only this many of the compared batches are used, and no scores are
                computed.

        Returns:
            The scores over all images, the number of images, and the differences from the dense
            model, batch by batch.
        """
        if not dense and not self._dense:
            self._see_dense()
        scores = None
        if self.task is not None and batches is None:
            scores = Scores(self.task, self.example.decisions, self._batches.device)
        few = self.compared if batches is None else self.compared[:batches]
        differences: list[tuple[int, Difference]] = []
        images = 0
        with seeing(self._model, self._host) as see:
            for number, groups in self._batches.of(None if batches is None else few):
                parts = []
                for inputs, targets in groups:
                    seen = see(inputs)
                    images += seen.images
                    if scores is not None and targets is not None:
                        scores.add(seen.decisions, targets)
                    if number in few:
                        parts.append(seen.to("cpu"))
                if dense and parts:
                    self._dense[number] = parts
                differences += [(number, d) for d in self._differences(number, parts)]
        # In the order of batches, so that sums are the same for any number of processes.
        processes = self._batches.processes
        gathered = sorted(processes.gathered(differences), key=lambda pair: pair[0])
        counted = sum(processes.gathered([images]))
        return scores.result() if scores else {}, counted, [d for _, d in gathered]

    def _differences(self, number: int, parts: list[Outputs]) -> list[Difference]:
        """How answers to a batch differ from the dense model's, if that batch is compared."""
        multilabel = self.task is not None and self.task.name == "multilabel"
        if not parts:
            return []
        pairs = zip(parts, self._dense[number], strict=True)
        return [compare(ours, theirs, multilabel) for ours, theirs in pairs]

    def _see_dense(self) -> None:
        """Keeps the dense model's answers. (Needed if its row is known from another run.)"""
        former = reduction_of(self._model)
        remove(self._model)
        with seeing(self._model, self._host) as see:
            for number, groups in self._batches.of(self.compared):
                self._dense[number] = [see(inputs).to("cpu") for inputs, _ in groups]
        if former is not None:
            hang(self._model, host_of(self._model, self._host), former)
