"""Digests of things: a short text that is the same for the same thing, in every process.

A `Digest` goes through all that a thing consists of: every tensor bit by bit (quantised, packed and
sparse ones, too), every attribute of every module, the code of functions and classes of one's own.
What cannot be told from others of its kind (a lock, an open file, a generator) is an error that
names it; nothing is passed over in silence.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import io
import math
import types
import weakref
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokred.data import code
from tokred.patching.stand_ins import MARK
from tokred.patching.tracers import Scripted

CHUNK = 2**24
"""Bytes of a file that are read at a time."""

_NOT_SEEN_BY_FORWARD = frozenset(
    {
        "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks", "_compiled_call_impl", "call_super_init", "dump_patches",
        # Said with the hooks themselves, whose numbers differ between processes.
        "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    }
)  # fmt: skip
_NOT_OF_A_CLASS = frozenset(
    {
        "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
        "__abstractmethods__", "_abc_impl", "__slotnames__", "__firstlineno__",
        "__static_attributes__", "__dataclass_fields__", "__annotate__", "__annotate_func__",
        "__annotations_cache__",
    }
)  # fmt: skip
_DESCRIPTORS = (
    types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.MethodWrapperType,
)  # fmt: skip


_ADDRESSES = frozenset({"tied_params_map", "tied_pointers_to_remove"})
"""Attributes of accelerate's hooks whose keys are addresses."""
_INSIDE = {"numba": "py_func", "triton": "fn", "torch": "_init_fn"}
"""By library: where functions are that it has compiled, or registered as operators."""


class NoFingerprintError(TypeError):
    """Something cannot be told from others of its kind. The message names it."""


def digest_of(*things: Any, weights: bool = True, mode: bool = True, contents: bool = True) -> str:
    """A digest of things, 32 hexadecimal digits; the same in every process.

    Args:
        things: anything. A path that leads to a file stands for the content of the file.
        weights: whether the values of parameters and buffers count.
        mode: whether it counts that modules are in training mode.
        contents: whether files are read; if not, their sizes and times count.

    Raises:
        NoFingerprintError: something in them cannot be told from others of its kind.
    """
    digest = Digest(weights, mode, contents)
    for thing in things:
        digest.add(thing, type(thing).__name__)
    return digest.text()


def told(things: Any) -> tuple[str, dict[str, str | None]]:
    """The digest of things, and the versions of the libraries whose classes and functions they
    are made of.

    Raises:
        NoFingerprintError: something in them cannot be told from others of its kind.
    """
    digest = Digest()
    digest.add(things)
    met = (name for name in digest.libraries if not code.of_python(name))
    return digest.text(), {name: code.version_of(name) for name in sorted(met)}


class Digest:
    """Goes through things, and makes a digest of all that they consist of.

    Attributes:
        libraries: the installed libraries whose classes and functions were met.
    """

    def __init__(self, weights: bool = True, mode: bool = True, contents: bool = True) -> None:
        self.libraries: set[str] = set()
        self._weights, self._mode, self._contents = weights, mode, contents
        self._sha = hashlib.sha256()
        # What was met, with its number. Things are held, so that no other gets their address.
        self._met: dict[int, tuple[int, Any]] = {}
        self._path: list[str] = []

    def text(self) -> str:
        """The digest of all that was added."""
        return self._sha.hexdigest()[:32]

    def add(self, thing: Any, name: str = "") -> None:
        """Goes through a thing.

        Args:
            thing: anything.
            name: what it is called where it was found, for messages.

        Raises:
            NoFingerprintError: something in it cannot be told from others of its kind.
        """
        self._path.append(name)
        try:
            self._add(thing)
        except RecursionError as error:
            raise self._unknown(thing, "it is nested too deeply") from error
        self._path.pop()

    def _add(self, thing: Any) -> None:
        for kind in type(thing).__mro__:
            if kind in _PLAIN:
                self._say(type(thing).__name__, _PLAIN[kind](thing))
                return
            if kind in _VALUES:
                _VALUES[kind](self, thing)
                return
        if self._again(thing):
            return
        for kind in type(thing).__mro__:
            if kind in _KINDS:
                _KINDS[kind](self, thing)
                return
        self._object(thing)

    def _say(self, *words: str) -> None:
        for word in words:
            self._put(word.encode("utf-8", "surrogatepass"))

    def _put(self, content: Any) -> None:
        view = memoryview(content)
        self._sha.update(b"%d:" % view.nbytes)
        self._sha.update(view)

    def _again(self, thing: Any) -> bool:
        """Whether a thing was met before; then its number stands for it."""
        if id(thing) in self._met:
            self._say("again", str(self._met[id(thing)][0]))
            return True
        self._met[id(thing)] = len(self._met), thing
        return False

    def _unknown(self, thing: Any, why: str) -> NoFingerprintError:
        where = ".".join(name for name in self._path if name)
        kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
        what = f"{where}, a {kind}, cannot be told from others of its kind"
        return NoFingerprintError(f"{what} ({why})")

    # Values

    def _enum(self, thing: Enum) -> None:
        self._class_of(thing)
        self._say(thing.name or repr(thing.value))

    def _tuple(self, thing: tuple[Any, ...]) -> None:
        self._class_of(thing)
        self._say(str(len(thing)))
        for number, one in enumerate(thing):
            self.add(one, f"[{number}]")

    def _file(self, thing: PurePath) -> None:
        self._say("path", str(thing))
        if self._contents:
            self._say(content_of(thing) or "")
            return
        with contextlib.suppress(OSError):
            about = Path(thing).stat()
            self._say(str((about.st_size, about.st_mtime_ns)))

    def _set(self, thing: Iterable[Any]) -> None:
        self._class_of(thing)
        how = {"weights": self._weights, "mode": self._mode, "contents": self._contents}
        self._say(*sorted(digest_of(one, **how) for one in thing))

    def _tensor(self, x: Tensor) -> None:
        # Whether it is a parameter is said by where it is.
        plain = type(x) in (Tensor, nn.Parameter, nn.Buffer)
        self._say("tensor" if plain else type(x).__qualname__, str(x.dtype), str(tuple(x.shape)))
        if not self._weights and isinstance(x, nn.Parameter):
            return
        if hasattr(x, "__tensor_flatten__"):
            names, rest = x.__tensor_flatten__()
            for name in names:
                self.add(getattr(x, name), name)
            self.add(rest, "context")
            return
        if not plain and vars(x):
            self._attributes(vars(x))
        try:
            for part in _stored(x.detach()):
                self._put(part)
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            raise self._unknown(x, str(error).splitlines()[0]) from error

    def _array(self, x: np.ndarray) -> None:
        self._say("array", str(x.dtype), str(x.shape))
        if x.dtype.hasobject:
            for one in x.ravel().tolist():
                self.add(one)
            return
        self._put(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

    # Containers

    def _list(self, thing: Iterable[Any]) -> None:
        self._class_of(thing)
        for number, one in enumerate(thing):
            self.add(one, f"[{number}]")
        self._say("end")
        self._attributes(getattr(thing, "__dict__", {}))

    def _dict(self, thing: Mapping[Any, Any]) -> None:
        self._class_of(thing)
        if _library_of(thing) == "diffusers":  # configurations note how they were made
            thing = {key: one for key, one in thing.items() if not str(key).startswith("_")}
        for key, one in thing.items():
            self.add(key)
            self.add(one, str(key) if isinstance(key, str | int) else "")
        self._say("end")
        if isinstance(thing, defaultdict):
            self.add(thing.default_factory)
        self._attributes(getattr(thing, "__dict__", {}))

    def _attributes(self, values: Mapping[str, Any]) -> None:
        """Attributes have no order: one that was taken away and put back comes last."""
        for name in sorted(values):
            self._say(name)
            self.add(values[name], name)
        self._say("end")

    # Modules

    def _module(self, module: nn.Module) -> None:
        if hasattr(module, "_orig_mod"):  # compiled
            self._say("compiled")
            self.add(module._orig_mod, "_orig_mod")
            return
        self._class_of(module)
        if isinstance(module, torch.jit.ScriptModule):
            self._script(module)
            return
        left_out = {MARK, *_NOT_SEEN_BY_FORWARD}
        if isinstance(module, torch.fx.GraphModule):
            left_out |= {"_graph", "meta"}
            self._say(module.code)
        if not self._mode:
            left_out.add("training")
        for name, value in sorted(vars(module).items()):
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                self._hooks(module, name, value)
            elif name == "_buffers" and not self._weights:
                self._say(*(f"{key} {getattr(x, 'shape', '')}" for key, x in value.items()))
            elif hangs(value) and (hasattr(type(module), name) or name == Scripted.NAME):
                continue  # without a reduction, the module has no such attribute of its own
            elif name == "_non_persistent_buffers_set" or name in left_out:
                continue
            else:
                self._say(name)
                inner = "" if name in ("_modules", "_parameters", "_buffers") else name
                self._unpatched(module, value, inner)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.add(module.get_extra_state(), "extra state")
        self._say("end")

    def _unpatched(self, module: nn.Module, value: Any, name: str) -> None:
        """An attribute; where a reduction hangs, what was there before it."""
        if hangs(value):
            value = types.MethodType(type(module).forward, module)
        self.add(value, name)

    def _hooks(self, module: nn.Module, name: str, hooks: Mapping[int, Any]) -> None:
        for key, hook in hooks.items():
            if hangs(hook):
                continue
            self._say(name)
            for kind in ("with_kwargs", "always_called"):
                self._say(str(bool(getattr(module, f"{name}_{kind}", {}).get(key))))
            self.add(hook, name)

    def _script(self, module: torch.jit.ScriptModule) -> None:
        with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith((".debug_pkl", "serialization_id")):
                    self._say(name.partition("/")[2])
                    self._put(archive.read(name))

    # Code

    def _class_of(self, thing: Any) -> None:
        self._class(type(thing))

    def _class(self, kind: type) -> None:
        self._say("class", str(kind.__module__), kind.__qualname__)
        if code.installed(kind.__module__):
            self.libraries.add(str(kind.__module__).partition(".")[0])
            return
        if self._again(kind):
            return
        for base in (*kind.__bases__, type(kind)):
            self._class(base)
        fields = vars(kind).get("__dataclass_fields__", {})
        for name, field in fields.items():
            self._say(name)
            about = (field.init, field.kw_only, field.default, field.default_factory)
            self.add(about, name)
        own = {n: x for n, x in vars(kind).items() if n not in _NOT_OF_A_CLASS}
        self._attributes(own)

    def _function(self, function: types.FunctionType) -> None:
        module = function.__globals__.get("__name__")
        self._say("function", str(module), function.__qualname__)
        inner = getattr(function, "_torchdynamo_orig_callable", None)
        if inner is not None:
            self.add(inner, "compiled")
            return
        self.add(function.__code__)
        for cell in function.__closure__ or ():
            self.add(cell)
        self.add((function.__defaults__, function.__kwdefaults__), "defaults")
        if code.installed(module):
            self.libraries.add(str(module).partition(".")[0])
            return
        for name, thing in code.used_by(function).items():
            self._say(name)
            self.add(thing, name)
        self._attributes(vars(function))

    def _code(self, compiled: types.CodeType) -> None:
        for part in code.parts_of(compiled):
            self.add(part)

    def _cell(self, cell: types.CellType) -> None:
        try:
            found = cell.cell_contents
        except ValueError:  # not filled yet
            self._say("empty")
            return
        self.add(found)

    def _method(self, method: types.MethodType) -> None:
        self.add(method.__func__, "")
        self.add(method.__self__, "")

    def _builtin(self, function: types.BuiltinFunctionType) -> None:
        self._say("builtin", str(function.__module__), function.__qualname__)
        if not isinstance(function.__self__, types.ModuleType | type | None):
            self.add(function.__self__)

    def _library(self, module: types.ModuleType) -> None:
        self._say("module", module.__name__)
        self.libraries.add(module.__name__.partition(".")[0])

    def _property(self, thing: property) -> None:
        self.add((thing.fget, thing.fset, thing.fdel))

    def _wraps(self, thing: Any) -> None:
        self._class_of(thing)
        found = (getattr(thing, name, None) for name in ("__func__", "__wrapped__", "func"))
        self.add(next((inner for inner in found if inner is not None), _inner(thing)))

    def _script_function(self, function: Any) -> None:
        self._say("script", str(function.code))

    def _descriptor(self, thing: Any) -> None:
        self._say("descriptor", thing.__name__)

    def _reference(self, thing: weakref.ref[Any]) -> None:
        self._class_of(thing)
        self.add(thing(), "")

    # Everything else

    def _object(self, thing: Any) -> None:
        if _library_of(thing) == "PIL" and hasattr(thing, "tobytes"):
            self._say("picture", thing.mode, str(thing.size))
            self._put(thing.tobytes())
            self.add(thing.getpalette())
            return
        if _library_of(thing) == "datasets" and hasattr(thing, "_fingerprint"):
            self._say("dataset", str(thing._fingerprint), str(thing.format))
            return
        if _inner(thing) is not None:
            self._wraps(thing)
            return
        if hangs(thing):
            self._say("reduction")
            return
        self._class_of(thing)
        try:
            how = thing.__reduce_ex__(4)
        except Exception as error:
            # It cannot be pickled; but perhaps its attributes tell it.
            if not hasattr(thing, "__dict__") or not _of_python_alone(type(thing)):
                raise self._unknown(thing, " ".join(str(error).split())[:80]) from error
            self._attributes(vars(thing))
            return
        if isinstance(how, str):
            self._say(str(getattr(thing, "__module__", "")), how)
            return
        make, arguments, state, items, pairs = (*how, None, None, None)[:5]
        if make is not copyreg.__newobj__ or arguments != (type(thing),):  # type: ignore[attr-defined]
            self.add(make, "")
            self.add(arguments, "")
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            if _library_of(thing) == "accelerate":
                state = {n: x for n, x in state.items() if n not in _ADDRESSES}
            self._attributes(state)
        else:
            self.add(state, "")
        for name, several in (("items", items), ("pairs", pairs)):
            if several is not None:
                self.add([*several], name)
        if isinstance(thing, Mapping):  # of weights that are kept on disk, for one
            self._pairs(thing)

    def _pairs(self, thing: Mapping[Any, Any]) -> None:
        try:
            pairs = [*thing.items()]
        except KeyError:  # accelerate's part of a mapping, which its attributes hold
            return
        self.add(pairs, "")


def hangs(thing: Any) -> bool:
    """Whether this is what a reduction has hung on a model."""
    where = type(thing).__module__
    ours = where.startswith("tokred.patching.") or where == "tokred.engine.denoising"
    return ours and callable(thing)


def content_of(path: PurePath | str) -> str | None:
    """The digest of a file's content; None if there is no such file."""
    try:
        with Path(path).open("rb") as file:
            sha = hashlib.sha256()
            while part := file.read(CHUNK):
                sha.update(part)
    except OSError:
        return None
    return sha.hexdigest()[:32]


def _inner(thing: Any) -> Any:
    """The function that is inside of what a library has made of it; None if there is none."""
    inside = _INSIDE.get(_library_of(thing))
    return None if inside is None else getattr(thing, inside, None)


def _of_python_alone(kind: type) -> bool:
    """Whether objects of a class are made of their attributes alone."""
    for one in kind.__mro__[:-1]:
        new = vars(one).get("__new__")
        if "__slots__" in vars(one) or not (new is None or isinstance(new, staticmethod)):
            return False
    return True


def _library_of(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]


def _stored(x: Tensor) -> Iterator[Any]:
    """All bytes of a tensor, and what else they depend on."""
    if x.is_meta:
        yield b"no values"
    elif x.is_quantized:
        yield str(x.qscheme()).encode()
        if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{x.q_scale()!r} {x.q_zero_point()}".encode()
        else:
            yield str(x.q_per_channel_axis()).encode()
            yield from _stored(x.q_per_channel_scales())
            yield from _stored(x.q_per_channel_zero_points())
        yield from _stored(x.int_repr())
    elif x.layout is torch.strided:
        x = x.cpu().resolve_conj().resolve_neg()
        if not x.is_contiguous():
            yield str(x.stride()).encode()
        if x.numel():
            yield x.contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif x.layout is torch.sparse_coo:
        x = x.coalesce()
        yield from _stored(x.indices())
        yield from _stored(x.values())
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (x.crow_indices(), x.col_indices(), x.values()):
            yield from _stored(part)
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (x.ccol_indices(), x.row_indices(), x.values()):
            yield from _stored(part)
    else:
        yield str(x.layout).encode()
        yield from _stored(x.to_dense())


def _number(x: float) -> str:
    return float.__repr__(x) if math.isfinite(x) else str(float(x))


_PLAIN: dict[type, Callable[[Any], str]] = {
    type(None): str,
    bool: str,
    int: int.__repr__,
    float: _number,
    complex: complex.__repr__,
    str: str.__str__,
    type(Ellipsis): str,
    type(NotImplemented): str,
    range: repr,
    slice: repr,
    torch.dtype: str,
    torch.device: str,
    torch.layout: str,
    torch.memory_format: str,
    torch._ops.OpOverload: str,
    torch._ops.OpOverloadPacket: str,
}
_VALUES: dict[type, Callable[[Digest, Any], None]] = {
    Enum: Digest._enum,
    bytes: lambda digest, x: digest._put(x),
    bytearray: lambda digest, x: digest._put(x),
    tuple: Digest._tuple,
    frozenset: Digest._set,
    PurePath: Digest._file,
    Tensor: Digest._tensor,
    np.ndarray: Digest._array,
    type: Digest._class,
    **dict.fromkeys(_DESCRIPTORS, Digest._descriptor),
    types.ModuleType: Digest._library,
    types.BuiltinFunctionType: Digest._builtin,
}
_KINDS: dict[type, Callable[[Digest, Any], None]] = {
    list: Digest._list,
    dict: Digest._dict,
    types.MappingProxyType: Digest._dict,
    set: Digest._set,
    nn.Module: Digest._module,
    types.FunctionType: Digest._function,
    types.CodeType: Digest._code,
    types.CellType: Digest._cell,
    types.MethodType: Digest._method,
    property: Digest._property,
    classmethod: Digest._wraps,
    staticmethod: Digest._wraps,
    functools.cached_property: Digest._wraps,
    functools._lru_cache_wrapper: Digest._wraps,
    torch.jit.ScriptFunction: Digest._script_function,
    weakref.ref: Digest._reference,
}
