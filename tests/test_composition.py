"""A patched model among the tools that people use: compilers, exporters, accelerate, adapters,
quantisation, sharding. On a timm ViT, a ViT of transformers and one with rotary positions."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small as timm_small
from families import Small
from test_hosts import SMALL, answered, keep_all
from test_patching import traces
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import tokred
from tokred.data.inputs import call
from tokred.host import find_host, innermost, submodule

PROPERTIES: dict[str, Small] = {
    "timm": Small(lambda: timm_small("dinov2, registers"), lambda n: torch.randn(n, 3, 70, 70)),
    "vit": SMALL["transformers_vit-vit"],
    "rotary": SMALL.get("transformers_dinov2-dinov3", SMALL["transformers_vit-ijepa"]),
}


@pytest.fixture(params=PROPERTIES)
def host(request: pytest.FixtureRequest) -> Iterator[Small]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield PROPERTIES[request.param]


# What takes long is tried on one or two of them, and on all of them with `-m slow`.
def some(*fast: str) -> list[Any]:
    return [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in PROPERTIES
    ]


on_the_first = pytest.mark.parametrize("host", some("timm"), indirect=True)
on_the_second = pytest.mark.parametrize("host", some("vit"), indirect=True)
on_the_last = pytest.mark.parametrize("host", some("rotary"), indirect=True)


def not_on_the_oldest(host: Small) -> None:
    """torch 2.6 cannot compile transformers 5.9 layer by layer, nor gets its outputs out of a
    compiled model: without tokred either."""
    if os.environ.get("TOKRED_VERSIONS") == "oldest" and host is not PROPERTIES["timm"]:
        pytest.skip("the dense model cannot be compiled like that in these versions")


def blocks(model: nn.Module) -> list[nn.Module]:
    found, tower = find_host(model)
    return list(found.blocks(tower))


def keys_of(block: nn.Module) -> str:
    """The path of the projection that makes keys."""
    return "attn.qkv" if submodule(block, "attn.qkv") else "attention.k_proj"


class Answer(nn.Module):
    """A model that gives its answer alone, as exporters want it."""

    def __init__(self, small: Small, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.small, self.model, self.names = small, model, names

    def forward(self, x: Tensor) -> Tensor:
        return self.small.answer(self.model(**{self.names[0]: x}) if self.names else self.model(x))


def alone(small: Small, model: nn.Module, batch: int) -> tuple[Answer, Tensor]:
    inputs = small.inputs(batch)
    if isinstance(inputs, Tensor):
        return Answer(small, model, ()), inputs
    assert len(inputs) == 1
    return Answer(small, model, tuple(inputs)), next(iter(inputs.values()))


# Compilers and exporters


def test_blocks_compiled_one_by_one_share_their_code(host: Small) -> None:
    """The limit of recompilations is 8; there are 12 blocks, which differ in what they do alone."""
    from torch._dynamo.testing import CompileCounterWithBackend

    not_on_the_oldest(host)
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", tokred.Stages(0.5))
    expected = answered(host, model, inputs)
    counter = CompileCounterWithBackend("eager")
    for block in blocks(model):
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(answered(host, model, inputs), expected)
    graphs = counter.frame_count
    torch.testing.assert_close(answered(host, model, inputs), expected)
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_twelve_blocks_stay_below_the_recompile_limit() -> None:
    import timm
    from torch._dynamo.testing import CompileCounterWithBackend

    if TorchVersion(torch.__version__) < "2.7":
        pytest.skip("torch 2.6 compiles every module that has a hook by itself")
    torch._dynamo.reset()
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=12).eval()
    images = torch.randn(1, 3, 128, 128)
    for schedule, most in ((0.5, 8), (tokred.Constant(4), 5)):
        torch._dynamo.reset()
        tokred.apply(model, "tome", schedule)
        with torch.no_grad():
            expected = model(images)
        counter = CompileCounterWithBackend("eager")
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected)
        assert counter.frame_count <= most
        for block in model.blocks:
            block._compiled_call_impl = None


@pytest.mark.parametrize("which", [[0], [2, 3], [1, 3]])
def test_some_blocks_may_be_compiled_and_others_not(host: Small, which: list[int]) -> None:
    not_on_the_oldest(host)
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = answered(host, model, inputs)
    for layer, block in enumerate(blocks(model)):
        if layer in which:
            block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(answered(host, model, inputs), expected)


@on_the_second
def test_removing_after_compiling_gives_the_dense_model(host: Small) -> None:
    not_on_the_oldest(host)
    model, inputs = host.build(), host.inputs(2)
    dense = answered(host, model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(answered(host, compiled, inputs), dense)
    tokred.apply(compiled, "tome", keep_rate=0.5)
    reduced = answered(host, compiled, inputs)
    torch.testing.assert_close(reduced, answered(host, model, inputs))
    assert not torch.allclose(reduced, dense)
    tokred.remove(compiled)
    torch.testing.assert_close(answered(host, compiled, inputs), dense)


@pytest.mark.parametrize(
    ("method", "strict"),
    [
        ("tome", False),
        pytest.param("topk", False, marks=pytest.mark.slow),
        pytest.param("tome", True, marks=pytest.mark.slow),
        pytest.param("topk", True, marks=pytest.mark.slow),
    ],
)
def test_exports_with_a_dynamic_batch(host: Small, strict: bool, method: str) -> None:
    model = host.build()
    tokred.apply(model, method, keep_rate=0.5)
    module, x = alone(host, model, 3)
    dynamic = {0: torch.export.Dim("batch", min=2, max=16)}
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,), strict=strict)
        for some in (x, torch.randn(5, *x.shape[1:])):
            torch.testing.assert_close(program.module()(some), module(some))


@on_the_last
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_onnxruntime_computes_the_same(host: Small, method: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = host.build()
    tokred.apply(model, method, keep_rate=0.5)
    module, x = alone(host, model, 2)
    file = str(tmp_path / "model.onnx")
    with torch.no_grad():
        torch.onnx.export(module, (x,), file, dynamo=True, verbose=False)
        expected = module(x)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_traces_with_torchscript(host: Small) -> None:
    model = host.build()
    tokred.apply(model, "tome", keep_rate=0.5)
    module, x = alone(host, model, 2)
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,), check_trace=False)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), module(other))
    with pytest.raises(tokred.UnsupportedModelError, match="exported or traced already"):
        tokred.apply(traced)


# accelerate


class Counts:
    """Makes a hook of accelerate that counts its calls."""

    @staticmethod
    def hook(seen: list[int]) -> Any:
        from accelerate.hooks import ModelHook

        class Counting(ModelHook):
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                seen.append(args[0].shape[1])
                return args, kwargs

        return Counting()


@pytest.mark.parametrize("first", ["hook", "tokred"])
@pytest.mark.parametrize("undone", ["hook", "tokred"])
def test_hooks_of_accelerate_go_around_the_patch(host: Small, first: str, undone: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = host.build(), host.inputs(2)
    dense = answered(host, model, inputs)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = answered(host, model, inputs)
    tokred.remove(model)
    block, seen = blocks(model)[2], []  # type: ignore[var-annotated]
    full = None
    for step in (first, "tokred" if first == "hook" else "hook"):
        if step == "hook":
            hooks.add_hook_to_module(block, Counts.hook(seen))
        else:
            tokred.apply(model, "tome", keep_rate=0.5)
    assert torch.equal(answered(host, model, inputs), reduced)
    assert len(seen) == 1, "the hook runs, and once"
    full = seen[0]
    if undone == "hook":
        hooks.remove_hook_from_module(block)
        assert torch.equal(answered(host, model, inputs), reduced)
        tokred.remove(model)
    else:
        tokred.remove(model)
        assert torch.equal(answered(host, model, inputs), dense)
        assert len(seen) == 2 and seen[1] > full
        hooks.remove_hook_from_module(block)
    assert torch.equal(answered(host, model, inputs), dense)
    assert all(innermost(block) is None for block in blocks(model))


@pytest.mark.parametrize("first", ["offload", "tokred"])
def test_offloaded_weights(host: Small, first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = host.build(), host.inputs(2)
    dense = answered(host, model, inputs)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = answered(host, model, inputs)
    if first == "offload":
        tokred.remove(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offload":
        tokred.apply(model, "tome", keep_rate=0.5)
    assert torch.equal(answered(host, model, inputs), reduced)
    tokred.remove(model)
    assert torch.equal(answered(host, model, inputs), dense)


def test_prepared_by_accelerate(host: Small) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = host.answer(call(model, inputs))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    found = answered(host, prepared, inputs)
    torch.testing.assert_close(found, expected.to(found.dtype))
    tokred.remove(prepared)
    assert tokred.patching.reduction_of(prepared) is None


@pytest.mark.parametrize("first", ["hook", "tokred"])
def test_hooks_of_diffusers_go_around_the_patch(host: Small, first: str) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model, inputs = host.build(), host.inputs(2)
    dense = answered(host, model, inputs)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = answered(host, model, inputs)
    tokred.remove(model)
    seen: list[int] = []

    class Counting(hooks.ModelHook):  # type: ignore[name-defined, misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(args[0].shape[1])
            return args, kwargs

    if first == "tokred":
        tokred.apply(model, "tome", keep_rate=0.5)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(blocks(model)[2])
    registry.register_hook(Counting(), "counting")
    if first == "hook":
        tokred.apply(model, "tome", keep_rate=0.5)
    assert torch.equal(answered(host, model, inputs), reduced)
    assert len(seen) == 1
    tokred.remove(model)
    assert torch.equal(answered(host, model, inputs), dense)
    assert len(seen) == 2
    registry.remove_hook("counting")
    assert torch.equal(answered(host, model, inputs), dense)


# Adapters and quantised weights


@pytest.mark.parametrize("first", ["lora", "tokred"])
def test_lora_before_and_after(host: Small, first: str) -> None:
    """Keys are read behind the adapter: the answer is that of the merged weights."""
    peft = pytest.importorskip("peft")
    model, inputs = host.build(), host.inputs(2)
    path = keys_of(blocks(model)[0])
    projections = [path.split(".")[-1]]
    if path.endswith("k_proj"):
        projections += ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=projections)
    if first == "tokred":
        tokred.apply(model, "tome", keep_rate=0.5)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    if first == "lora":
        tokred.apply(adapted, "tome", keep_rate=0.5)
    adapted.eval()
    found = answered(host, adapted.base_model.model, inputs)
    again = answered(host, adapted.base_model.model, inputs)
    assert torch.equal(found, again)
    dense_twin = copy.deepcopy(adapted)
    tokred.remove(dense_twin)
    merged = dense_twin.merge_and_unload()
    tokred.apply(merged, "tome", keep_rate=0.5)
    torch.testing.assert_close(found, answered(host, merged, inputs), rtol=1e-4, atol=1e-4)
    tokred.remove(adapted)
    assert tokred.patching.reduction_of(adapted) is None
    assert not any(
        isinstance(hook, tokred.patching.Tap)
        for module in adapted.modules()
        for hook in module._forward_hooks.values()
    )


@pytest.mark.parametrize("first", ["quantised", "tokred"])
def test_int8_weights(host: Small, first: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = host.build(), host.inputs(2)
    if first == "tokred":
        tokred.apply(model, "tome", keep_rate=0.5)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if first == "quantised":
        dense = answered(host, model, inputs)
        keep_all(model, "tome")
        assert torch.equal(answered(host, model, inputs), dense)
        tokred.apply(model, "tome", keep_rate=0.5)
    found = answered(host, model, inputs)
    assert found.isfinite().all()
    tokred.apply(model, "tome", keep_rate=0.5)
    assert torch.equal(answered(host, model, inputs), found)


# Training


def test_autocast_and_half_precision(host: Small) -> None:
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert host.answer(call(model, inputs)).isfinite().all()
    model = model.to(torch.bfloat16)
    if isinstance(inputs, Tensor):
        low: Any = inputs.bfloat16()
    else:
        low = {name: value.bfloat16() for name, value in inputs.items()}
    found = answered(host, model, low)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_two_passes_before_a_backward_one(host: Small) -> None:
    model, inputs, others = host.build(), host.inputs(2), host.inputs(3)
    tokred.apply(model, "tome", keep_rate=0.5)
    model.requires_grad_(True)

    def gradients(both: bool) -> list[Tensor]:
        model.zero_grad()
        first = host.answer(call(model, inputs)).square().mean()
        if not both:
            first.backward()
            first = torch.zeros(())
        second = host.answer(call(model, others)).square().mean()
        (first + second).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(both=True), gradients(both=False), strict=True):
        torch.testing.assert_close(a, b)


SHARDED = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
sys.path.insert(0, {tests!r})
from test_composition import PROPERTIES, answered, blocks
import tokred
dist.init_process_group("gloo", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
host = PROPERTIES[{name!r}]
model, inputs = host.build(), host.inputs(2)
dense = answered(host, model, inputs)
tokred.apply(model, "tome", keep_rate=0.5)
expected = answered(host, model, inputs)
if {first!r} == "sharded":
    tokred.remove(model)
for block in blocks(model):
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
if {first!r} == "sharded":
    tokred.apply(model, "tome", keep_rate=0.5)
torch.testing.assert_close(answered(host, model, inputs), expected)
model.train()
host.answer(tokred.inputs.call(model, inputs)).square().mean().backward()
tokred.remove(model)
model.eval()
torch.testing.assert_close(answered(host, model, inputs), dense)
print("held")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("first", ["sharded", "tokred"])
@pytest.mark.parametrize("name", some("vit"))
def test_fully_sharded_on_one_rank(name: str, first: str) -> None:
    program = SHARDED.format(tests=str(Path(__file__).parent), name=name, first=first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "'Stream' object has no attribute 'record_event'" in result.stderr:
        pytest.skip("this version of torch cannot shard on the CPU")
    assert "held" in result.stdout, result.stderr[-2000:]


# Misfits are loud


def test_applying_inside_compiled_code_is_refused(host: Small) -> None:
    model = host.build()

    @torch.compile(backend="eager", fullgraph=True)
    def patched(x: Tensor) -> Tensor:
        tokred.apply(model)
        return x

    # Older versions of torch.compile do not tell what was raised.
    with pytest.raises(Exception, match=r"tokred\.apply cannot be compiled|Observed exception"):
        patched(torch.ones(2))
    assert not any(isinstance(innermost(block), tokred.patching.Patched) for block in blocks(model))


@on_the_first
def test_an_exported_model_is_refused(host: Small) -> None:
    model = host.build()
    module, x = alone(host, model, 2)
    program = torch.export.export(module, (x,))
    with pytest.raises(tokred.UnsupportedModelError, match="exported or traced already"):
        tokred.apply(program.module())


def test_a_block_of_another_class_is_refused(host: Small) -> None:
    model = host.build()
    was = traces(model)
    block = blocks(model)[1]
    other = type("Other", (nn.Module,), {})()
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is block:
                setattr(parent, name, other)
                with pytest.raises(tokred.UnsupportedModelError, match=r"block 1 is a .*Other"):
                    tokred.apply(model)
                setattr(parent, name, block)
    assert traces(model) == was


def test_a_subclass_with_its_own_forward_is_refused(host: Small) -> None:
    model = host.build()
    block = blocks(model)[1]
    original = type(block)
    block.__class__ = type("Own", (original,), {"forward": lambda self, x, *a, **k: x})
    with pytest.raises(tokred.UnsupportedModelError, match="has a forward of its own"):
        tokred.apply(model)
    block.__class__ = original


def test_a_block_with_another_signature_is_refused(
    host: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newer or an older version of the library might have it."""
    model = host.build()
    cls = type(blocks(model)[0])

    def forward(self: nn.Module, x: Tensor, surprise: int = 0) -> Tensor:
        return x

    monkeypatch.setattr(cls, "forward", forward)
    with pytest.raises(tokred.UnsupportedModelError, match=r"takes .*surprise.* but the patch"):
        tokred.apply(model)


def test_a_forward_that_was_replaced_is_refused(host: Small) -> None:
    model = host.build()
    block = blocks(model)[2]
    block.forward = lambda x, *args, **kwargs: x
    with pytest.raises(tokred.UnsupportedModelError, match="block 2: its forward was replaced"):
        tokred.apply(model)


def test_signals_that_are_gone_are_noticed(host: Small) -> None:
    """A submodule that was replaced is read where it is now; one that is not called any more is
    an error, never a guess."""
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = answered(host, model, inputs)
    tapped = submodule(blocks(model)[1], innermost(blocks(model)[1]).taps[0][1])
    path = innermost(blocks(model)[1]).taps[0][1]
    parent = submodule(blocks(model)[1], path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], copy.deepcopy(tapped))
    assert torch.equal(answered(host, model, inputs), expected)
    own = type(parent).forward
    parent.forward = lambda x, *args, **kwargs: nn.Identity()(
        (x, None) if "transformers" in type(parent).__module__ else x
    )
    with pytest.raises(RuntimeError, match=r"'key'.* could not be read.*call tokred\.apply again"):
        answered(host, model, inputs)
    del parent.forward
    assert own is type(parent).forward


# The same, under every condition


def test_a_copy_after_a_pass_with_gradients(host: Small) -> None:
    """What a pass has left behind is no part of the model."""
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    host.answer(call(model, inputs)).sum()
    twin = copy.deepcopy(model)
    assert torch.equal(answered(host, twin, inputs), answered(host, model, inputs))


ELSEWHERE = """
import sys, torch
sys.path.insert(0, {tests!r})
model, inputs, expected = torch.load({file!r}, weights_only=False)
from test_composition import PROPERTIES, answered
import tokred
host = PROPERTIES[{name!r}]
assert torch.equal(answered(host, model, inputs), expected)
tokred.remove(model)
assert not torch.equal(answered(host, model, inputs), expected)
print("held")
"""


@pytest.mark.parametrize("name", some("rotary"))
def test_a_saved_model_comes_back_in_another_process(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = PROPERTIES[name]
    model, inputs = host.build(), host.inputs(2)
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = answered(host, copy.deepcopy(model), inputs)
    file = str(tmp_path / "model.pt")
    torch.save((model, inputs, expected), file)
    program = ELSEWHERE.format(tests=str(Path(__file__).parent), file=file, name=name)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "held" in result.stdout, result.stderr[-2000:]


def test_threads_do_not_disturb_each_other(host: Small) -> None:
    import threading

    model = host.build()
    tokred.apply(model, "tome", keep_rate=0.5)
    inputs = [host.inputs(1 + number % 3) for number in range(8)]
    expected = [answered(host, model, one) for one in inputs]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found = host.answer(call(model, inputs[number]))
                if not torch.equal(found, expected[number]):
                    wrong.append(number)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.parametrize("name", ["vit", "rotary"])
def test_output_attentions_are_those_that_were_computed(name: str) -> None:
    """Maps shrink with the tokens; and what top-k looks at is the row of the class token."""
    torch.manual_seed(0)
    host = PROPERTIES[name]
    model, inputs = host.build(), host.inputs(2)
    model.config._attn_implementation = "eager"
    seen: list[Tensor] = []

    class Spy(tokred.TopK):
        def __call__(self, tokens: Any, keep: int) -> Any:
            seen.append(tokens.class_attention)
            return super().__call__(tokens, keep)

    reduction = tokred.apply(model, Spy(), tokred.Exactly((16, 9, 9, 4)))
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    others = reduction.layout.others
    assert [one.shape[-1] for one in attentions] == [
        16 + others,
        16 + others,
        9 + others,
        9 + others,
    ]
    for mine, layer in zip(seen, (1, 3), strict=True):
        torch.testing.assert_close(mine, attentions[layer][:, :, 0, reduction.layout.prefix :])
