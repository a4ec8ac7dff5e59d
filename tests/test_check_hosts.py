"""The survey of examples/check_hosts.py, on a few names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "check_hosts", ROOT / "examples" / "check_hosts.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_hosts"] = module
    spec.loader.exec_module(module)
    return module


def test_a_transformer_of_timm_is_accepted(script: Any) -> None:
    (found,) = script.survey(("timm", "", ["deit_tiny_distilled_patch16_224"]))
    assert (found.verdict, found.patch, found.layout["prefix"]) == ("accepted", "timm_vit", 2)


def test_a_class_without_a_patch_is_refused_and_says_so(script: Any) -> None:
    (found,) = script.survey(("timm", "", ["pvt_v2_b0"]))
    assert found.verdict == "refused" and "no patch for" in found.reason


def test_a_model_in_windows_is_tried_with_the_method_it_can_have(script: Any) -> None:
    (found,) = script.survey(("timm", "", ["swin_tiny_patch4_window7_224"]))
    assert found.verdict == "accepted" and "slic" in found.notes[0]


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224", "convnext_atto", "poolformer_s12"])
def test_a_model_without_attention_is_not_counted(script: Any, name: str) -> None:
    (found,) = script.survey(("timm", "", [name]))
    assert found.verdict == script.NO_TRANSFORMER


def test_classes_of_transformers_are_built_and_tried(script: Any) -> None:
    module = "transformers.models.vit.modeling_vit"
    names = ["ViTPreTrainedModel", "ViTModel", "ViTForImageClassification"]
    found = script.survey(("transformers", module, names))
    assert [one.name for one in found] == ["ViTModel", "ViTForImageClassification"]
    assert {one.verdict for one in found} == {"accepted"}


def test_tokens_that_are_not_reduced_are_found_out(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokred.engine.step.Step.reduce", lambda step, x: x)
    (found,) = script.survey(("timm", "", ["deit_tiny_patch16_224"]))
    assert found.verdict == "wrong" and "tokens enter the MLPs" in found.reason


def test_another_answer_at_keep_rate_one_is_found_out(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokred.engine.step.Step.reduce", lambda step, x: x * 1.001)
    (found,) = script.survey(("timm", "", ["deit_tiny_patch16_224"]))
    assert found.verdict == "wrong" and "keep_rate=1" in found.reason


def test_the_page_keeps_its_head_and_names_everything(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, results = tmp_path / "hosts.md", tmp_path / "results.jsonl"
    page.write_text("# Head\n")
    options = ["--library", "timm", "--results", str(results), "--write", str(page)]
    for pattern in ("deit_tiny_patch16_224", "resnet18", "pvt_v2_b0"):
        monkeypatch.setattr(sys, "argv", ["check_hosts.py", pattern, *options])
        assert script.main() == 0
    text = page.read_text()
    assert text.startswith("# Head\n\n" + script.MARK) and text.count(script.MARK) == 1
    assert "1 accepted, 1 refused, 0 not built, 0 wrong; not counted: 1 without" in text
    assert "`deit_tiny_patch16_224`" in text and "`PyramidVisionTransformerV2` (1)" in text
