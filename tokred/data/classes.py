"""Which class of a model a name means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokred.optional import require


def class_numbers(names: Sequence[str], model: nn.Module | None, where: str) -> list[int]:
    """The number of the model's class for each of these names.

    A name may be a number or one of the model's own names (`id2label` of transformers). If that is
    "tench, Tinca tinca", each of the two will do, unless another class has it as well. If no name
    is known, but there are as many names as the model has classes, they are numbered in order.

    Args:
        names: of folders, or of the classes of a dataset.
        model: the model whose classes are meant; None: names are numbers, or numbered in order.
        where: where the names come from, for the message of an error.

    Raises:
        ValueError: it is not clear which classes are meant.
    """
    known = _labels(model)
    found = [known.get(_spelled(name)) for name in names]
    if found and None not in found:
        return [number for number in found if number is not None]
    if all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    wordnet = _wordnet(names, model)
    if wordnet is not None:
        return wordnet
    count = num_classes(model)
    some = [name for name, number in zip(names, found, strict=True) if number is not None]
    if some:
        stranger = next(name for name in names if _spelled(name) not in known)
        raise ValueError(
            f"{where} are called partly as the model's classes ({some[0]!r}) and partly not "
            f"({stranger!r}): name all of them by the model's labels or numbers"
        )
    if count is None or count == len(names):
        return list(range(len(names)))
    raise ValueError(
        f"{where} are {len(names)} classes ({', '.join(names[:3])}, ...), and the model has "
        f"{count}, of other names: name them by the model's numbers or labels, or give "
        "labelled=False (--unlabelled) to compare with the dense model alone"
    )


def _labels(model: nn.Module | None) -> dict[str, int]:
    """The model's names of its classes, as `_spelled` writes them, with their numbers."""
    config = getattr(model, "config", None)
    # transformers leaves label2id empty where only id2label was given.
    labels = {int(k): str(v) for k, v in (getattr(config, "id2label", None) or {}).items()}
    labels = labels or {
        int(v): str(k) for k, v in (getattr(config, "label2id", None) or {}).items()
    }
    known = {_spelled(name): number for number, name in labels.items()}
    parts = [
        (_spelled(part), number) for number, name in labels.items() for part in name.split(",")
    ]
    owners: dict[str, set[int]] = {}
    for part, number in parts:
        owners.setdefault(part, set()).add(number)
    single = {part: number for part, number in parts if len(owners[part]) == 1}
    return single | known


def _spelled(name: str) -> str:
    """A name in the form in which names are compared: folders have `_` for spaces."""
    return name.strip().lower().replace("_", " ")


def _wordnet(names: Sequence[str], model: nn.Module | None) -> list[int] | None:
    """The numbers of ImageNet's classes, if names are like n01440764, as its folders have them."""
    looks_so = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    if not looks_so or num_classes(model) != 1000:
        return None
    known = list(require("timm.data", "timm").ImageNetInfo().label_names())
    return [known.index(name) for name in names] if set(names) <= set(known) else None


def num_classes(model: nn.Module | None) -> int | None:
    """How many classes a model has; None if it does not say so."""
    for owner in (model, getattr(model, "config", None)):
        for name in ("num_classes", "num_labels"):
            count = getattr(owner, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def wants(model: nn.Module | None) -> str | None:
    """Answers "depth" or "segmentation" if the name of the model's Python class contains it."""
    name = type(model).__name__
    if "Depth" in name:
        return "depth"
    return "segmentation" if "Segment" in name else None
