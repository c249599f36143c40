"""The command: a model, a recipe, weights and a width in; a file out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dropsurgery import apply_recipe, cli, compress

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
"""
RECIPE = """
version: 1
name: widths
summary: widths
entries:
  - {name: gap, pattern: conv_bn_act, edge: output, insert: structural_dropout, with: {p: 0.5}}
"""
X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on a net of the user's; gives exit code, standard output and standard error."""
    (tmp_path / "a_net_to_compress.py").write_text(MODULE)
    (tmp_path / "widths.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(*argv: str) -> tuple[int, str, str]:
        usual = ("compress", "a_net_to_compress:net", "./widths.yaml", "--input", "2,3,8,8")
        try:
            code = cli.main((*usual, *argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def weights() -> Any:
    from a_net_to_compress import net  # type: ignore[import-not-found]

    model = net().eval()
    torch.nn.init.normal_(model[0].weight)
    torch.nn.init.uniform_(model[1].running_mean)
    return model


def expected(model: Any, width: Any) -> Any:
    return compress(apply_recipe(model, "./widths.yaml", example_inputs=X, total_steps=1), width)


def test_the_model_itself(run: Any) -> None:
    code, out, _ = run("--width", "3", "--output", "narrow.pt")
    assert code == 0
    assert out.splitlines()[0].split() == ["model", "parameters", "compressed", "share", "written", "to"]
    narrow = torch.load("narrow.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(narrow(X), expected(weights_of_the_factory(), 3)(X))


def weights_of_the_factory() -> Any:
    from a_net_to_compress import net

    return net().eval()


def test_weights_widths_and_state(run: Any) -> None:
    model_file = Path("trained.pt")
    code, _, err = run("--width", "0.5", "--weights", str(model_file))
    assert code == 1 and "--weights" in err
    model = weights()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, model_file)
    code, out, _ = run("--width", "0.5", "--width", "2*=3", "--weights", str(model_file), "--output", "s.pth", "--json")
    assert code == 0
    narrow = expected(model, 3)
    facts = json.loads(out)
    assert facts["widths"] == {"*": 0.5, "2*": 3}
    assert facts["compressed"] == sum(p.numel() for p in narrow.parameters())
    state = torch.load("s.pth", weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in narrow.state_dict().items())


def test_a_program(run: Any) -> None:
    assert run("--width", "3", "--output", "narrow.pt2")[0] == 0
    program = torch.export.load("narrow.pt2")
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X), expected(weights_of_the_factory(), 3)(X))


def test_onnx_is_written_or_what_is_missing_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnx"):
        assert run("--width", "3", "--output", "narrow.onnx")[0] == 0
        assert Path("narrow.onnx").stat().st_size > 0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run("--width", "3", "--output", "other.onnx")
    assert code == 1 and "pip install 'dropsurgery[onnx]'" in err
    assert not Path("other.onnx").exists()


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (("--width", "0"), 1, "an integer from 1 to 8"),
        (("--width", "9"), 1, "an integer from 1 to 8"),
        (("--width", "layer9*=2"), 1, "fits none"),
        (("--width", "wide"), 2, "expected a number"),
        ((), 2, "--width"),
        (("--width", "3", "--output", "narrow.xyz"), 1, ".onnx (ONNX)"),
        (("--width", "3", "--output", "no/narrow.pt"), 1, "there is no folder"),
    ],
)
def test_wrong_usage(run: Any, argv: tuple[str, ...], code: int, told: str) -> None:
    got, out, err = run(*argv)
    assert (got, out) == (code, "")
    assert told in err


def test_random_weights_are_told_of(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("compress", "resnet18", "structural_dropout_resnet", "--image-size", "64", "--width", "0.5")
    assert cli.main(argv) == 0
    output = capsys.readouterr()
    assert "the weights are random" in output.err
    assert "6194856" in output.out
