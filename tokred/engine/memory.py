"""What an engine remembers between the blocks of a pass, and of several passes at a time.

Passes may interleave: several threads, recomputation under gradient checkpointing, two forward
passes before a backward pass. So what belongs to one activation rides on that activation, and what
belongs to the pass that is running is kept apart by thread.

Code that is being compiled sees the slots of the thread that runs it, as other code does: whatever
parts of a model are compiled, there is one place for what is known. It cannot see what rides on an
activation. There, the slots hold the last activation, too.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tokred.graphs import compiling

Slots = TypeVar("Slots")
Ridden = TypeVar("Ridden")


class _ByThread(threading.local, Generic[Slots]):
    """Slots of each thread, which are there from the first look at them on. So compiled code, which
    looks at them before it runs, finds all threads alike and serves them all."""

    def __init__(self, slots: type[Slots]) -> None:
        self.slots = slots()


class _Ref(weakref.ref[Tensor]):
    """A weak reference to an activation, and what rides on it."""

    __slots__ = ("key", "value")

    key: int
    value: Any


class Memory(Generic[Slots, Ridden]):
    """What rides on activations, and what is known of the pass that is running.

    A copy of it, and one that is loaded from a file, begin empty.

    Args:
        slots: a dataclass of what is known of a running pass; all is None by default.
    """

    def __init__(self, slots: type[Slots]) -> None:
        self._slots = slots
        # An attribute of the tensor would do as well as a weak dictionary, but would be saved and
        # copied with features that leave the model.
        self._riding: Any = WeakTensorKeyDictionary()
        # The same in passes without gradients, by identity, and several times as fast: there, no
        # tensor lives on in a graph once Python has let go of it.
        self._lightly: dict[int, _Ref] = {}
        self._by_thread = _ByThread(slots)

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": self._slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, state["slots"])

    @property
    def here(self) -> Slots:
        """What is known of the pass that is running in this thread."""
        return self._by_thread.slots

    def ride(self, x: Tensor, value: Ridden) -> None:
        """Lets a value ride on an activation, as long as that lives. Not in compiled code."""
        if torch.is_grad_enabled():
            self._riding[x] = value
            self._lightly.pop(id(x), None)
            return
        made = _Ref(x, self._let_go)
        made.key, made.value = id(x), value
        self._lightly[made.key] = made

    def _let_go(self, ref: Any) -> None:
        # (Another tensor may be at that address by now.)
        key: int = ref.key
        if self._lightly.get(key) is ref:
            self._lightly.pop(key, None)

    def ridden(self, x: Tensor) -> Ridden | None:
        """What rides on an activation. Nothing does in compiled code."""
        if compiling():
            return None
        ref = self._lightly.get(id(x))
        if ref is not None and ref() is x:
            light: Ridden = ref.value
            return light
        found: Ridden | None = self._riding.get(x) if len(self._riding) else None
        return found

    def riding(self) -> list[tuple[Tensor, Ridden]]:
        """All activations that something rides on, and what that is."""
        # One step, in which no other thread can let something else ride.
        there = list(self._riding.data.items())
        lightly = list(self._lightly.values())
        alive = [(key(), value) for key, value in there] + [(ref(), ref.value) for ref in lightly]
        return [(x, value) for x, value in alive if x is not None]

    @property
    def empty(self) -> bool:
        """Whether nothing rides on any activation, and nothing is known of any pass of this
        thread."""
        known = vars(self.here).values()
        none = len(self._riding) == len(self._lightly) == 0
        return none and all(value is None or value == {} for value in known)
