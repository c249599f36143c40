from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from dropsurgery import apply_recipe, catalogue, cli, diff, find_sites, load_recipe, plan_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.models import make_model
from dropsurgery.recipe import bundled

MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def broken():
    raise ValueError("no weights here")

def number():
    return 3
"""
BAD = """\
version: 1
entries:
  - {name: first, pattern: conv_bn, insert: dropblok}
  - {name: second, pattern: conv_bn, insert: dropout, with: {p: 1.5}}
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command; gives exit code, standard output and standard error."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def from_json(run: Any, *argv: str) -> Any:
    code, out, err = run(*argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# -- what there is ---------------------------------------------------------------------------------------------
def test_recipes(run: Any) -> None:
    code, out, err = run("recipes")
    assert (code, err) == (0, "")
    for name in bundled():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        assert load_recipe(name).summary in line
    facts = {fact["name"]: fact for fact in from_json(run, "recipes")}
    assert list(facts) == bundled()
    assert facts["dropblock_resnet_g34"]["tested_on"]["resnet50"] == 36


def test_patterns(run: Any) -> None:
    _, out, _ = run("patterns")
    assert "residual_add branch, shortcut, output branch + shortcut, where both come from one fork" in " ".join(
        out.split()
    )
    facts = from_json(run, "patterns")
    assert [fact["name"] for fact in facts] == catalogue.names("patterns")
    assert all(fact["edges"] and fact["summary"] for fact in facts)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.load("patterns", "residual_add")
    monkeypatch.setattr(catalogue, "names", lambda kind: ["residual_add"])
    monkeypatch.setattr(catalogue, "load", lambda kind, name: SimpleNamespace(edges=["[bold]"]))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["patterns"]) == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in sys.stdout.getvalue().splitlines()]  # type: ignore[attr-defined]
    (rule,) = [index for index, line in enumerate(lines) if set(line) == {"─"}]
    assert max(map(len, lines)) <= 60
    assert lines[rule + 1].startswith("residual_add") and "[bold]" in lines[rule + 1] and len(lines) > rule + 2


def test_regularizers(run: Any) -> None:
    _, out, _ = run("regularizers")
    assert "p: 0.1, block_size: 7, share_channels: False, gamma: paper" in out and "arXiv:1810.12890" in out
    facts = from_json(run, "regularizers")
    assert [fact["name"] for fact in facts] == catalogue.names("regularizers")
    assert all(fact["summary"] and fact["paper"] for fact in facts)


def test_schema(run: Any) -> None:
    code, out, _ = run("schema")
    schema = json.loads(out)
    jsonschema.validate(load_recipe("dropblock_resnet_g34").to_dict(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"version": 2, "entries": []}, schema)
    assert code == 0


# -- check -------------------------------------------------------------------------------------------------------
def test_check(run: Any, tmp_path: Path) -> None:
    assert run("check", *bundled()) == (0, "".join(f"ok {name}\n" for name in bundled()), "")
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    code, out, err = run("check", "dropblock_resnet_g4", str(bad))
    assert (code, out) == (1, "ok dropblock_resnet_g4\n")
    assert "bad.yaml:3" in err and "did you mean 'dropblock'?" in err
    assert "bad.yaml:4" in err and "expected a number in [0, 1], got 1.5" in err


def test_check_as_json(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    code, out, _ = run("check", "dropblock_resnet_g4", str(tmp_path / "bad.yaml"), "--json")
    good, bad = json.loads(out)
    assert code == 1
    assert good == {"recipe": "dropblock_resnet_g4", "ok": True, "problems": []}
    assert not bad["ok"] and len(bad["problems"]) == 2


# -- on a model --------------------------------------------------------------------------------------------------
def test_sites(run: Any) -> None:
    code, out, err = run("sites", "resnet18", "--pattern", "residual_add")
    expected = [site.id for site in find_sites(make_model("resnet18"), "residual_add")]
    header, *lines = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["site", "stage", "reduction", "block", "path", "role", "shape"]
    assert [line.split()[0] for line in lines] == expected
    assert [fact["id"] for fact in from_json(run, "sites", "resnet18", "--pattern", "residual_add")] == expected


def test_sites_of_all_patterns(run: Any) -> None:
    ids = [fact["id"] for fact in from_json(run, "sites", "resnet18")]
    assert ids == [site.id for site in find_sites(make_model("resnet18"))]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), [2, 64, 112, 112]),
        (("--image-size", "64"), [2, 64, 32, 32]),
        (("--image-size", "64x96"), [2, 64, 32, 48]),
        (("--input", "1,3,32,32"), [1, 64, 16, 16]),
    ],
)
def test_input_sizes(run: Any, options: tuple[str, ...], shape: list[int]) -> None:
    assert from_json(run, "sites", "resnet18", "--pattern", "conv_bn_act", *options)[0]["shape"] == shape


def test_plan(run: Any) -> None:
    plan = plan_recipe(make_model("resnet18"), "dropblock_resnet_g34")
    assert run("plan", "resnet18", "dropblock_resnet_g34") == (0, f"{plan}\n", "")
    facts = from_json(run, "plan", "resnet18", "dropblock_resnet_g34", "--set", "shortcut.with.p=0.2")
    assert facts["hits"] == plan.hits
    assert {edit["p"] for edit in facts["edits"] if edit["entry"] == "shortcut"} == {0.05, 0.2}
    assert {edit["p"] for edit in facts["edits"] if edit["entry"] != "shortcut"} == {0.025, 0.1}


def test_diff(run: Any) -> None:
    gm = apply_recipe(make_model("resnet18"), "dropblock_resnet_g4", total_steps=20)
    given = ("diff", "resnet18", "dropblock_resnet_g4", "--total-steps", "20")
    assert run(*given) == (0, diff(gm) + "\n", "")
    assert run(*given, "--html") == (0, diff(gm, format="html") + "\n", "")
    assert from_json(run, *given) == json.loads(diff(gm, format="json"))


def test_diff_assumes_a_length_and_says_so(run: Any) -> None:
    code, out, err = run("diff", "resnet18", "dropblock_resnet_g4")
    assert code == 0 and "p 0 → 0.1 linear" in out
    assert err == "dropsurgery: note: without --total-steps, the schedules are shown over a training of 1000 steps\n"


def test_epochs_need_their_length(run: Any) -> None:
    late = ("resnet18", "dropblock_resnet_g4", "--set", "defaults.schedule={kind: linear, begin: 5 epochs}")
    code, out, err = run("diff", *late)
    assert (code, out) == (1, "")
    assert "'5 epochs' needs total_steps and steps_per_epoch" in err
    assert "here, total_steps is --total-steps" in err and "steps_per_epoch is --steps-per-epoch" in err
    code, out, _ = run("diff", *late, "--total-steps", "1000", "--steps-per-epoch", "100")
    assert code == 0 and "linear over 0.5..1" in out


def test_a_recipe_that_changes_nothing_is_a_note(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "none.yaml"
    recipe.write_text("{version: 1, entries: [{pattern: double_conv, insert: dropout, optional: true}]}")
    code, out, err = run("plan", "resnet18", str(recipe))
    assert code == 0 and "hits nothing" in out
    assert err.startswith("dropsurgery: note: none changes nothing on ResNet")


# -- models --------------------------------------------------------------------------------------------------------
def test_models_by_name() -> None:
    assert type(make_model("resnet18")).__name__ == "ResNet"
    unet = make_model("smp:Unet:resnet34")
    assert type(unet).__name__ == "Unet"
    assert all(parameter.is_meta for parameter in unet.parameters())


def test_a_model_with_options() -> None:
    plain, dilated = make_model("resnet18"), make_model("resnet18(output_stride=16, act_layer=silu)")
    assert plain.layer4[0].conv1.stride == (2, 2) and dilated.layer4[0].conv1.stride == (1, 1)
    assert type(dilated.act1).__name__ == "SiLU"
    for wrong in ("resnet18(act_layer)", "resnet18(output_stride=16", "resnet18()", "resnet18(=3)"):
        with pytest.raises(SurgeryError, match=r"expected options as in resnet50\(output_stride=16"):
            make_model(wrong)
    with pytest.raises(SurgeryError, match="cannot be built: TypeError"):
        make_model("resnet18(wrong=1)")


def test_a_factory(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert from_json(run, "sites", "its_models:net", "--input", "1,3,8,8")[0]["shape"] == [1, 4, 6, 6]
    for argv, told in (
        (("its_models:net",), "here, example_inputs is --input"),
        (("its_models:broken",), "ValueError: no weights here"),
        (("its_models:number",), "expected a torch.nn.Module, got int"),
        (("its_models:net", "--input", "1,4,8,8"), "raises on the example input"),
        (("its_models:nothing",), "has no attribute 'nothing'"),
        (("no_such_module:net",), "No module named 'no_such_module'"),
    ):
        code, out, err = run("sites", *argv)
        assert (code, out) == (1, "") and told in err


def test_a_missing_library(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run("sites", "resnet18")
    assert code == 1 and "timm is not installed: pip install 'dropsurgery[models]'" in err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("sites", "resnt50"), "no model 'resnt50' in timm; did you mean 'resnet50'"),
        (("sites", "smp:Unett:resnet34"), "did you mean 'Unet'"),
        (("sites", "smp:Unet:resnet3"), "did you mean 'resnet34'"),
        (("sites", "smp:Unet"), "no encoder ''"),
        (("sites", "resnet18", "--pattern", "conv_bm"), "did you mean 'conv_bn'"),
        (("sites", "vit_base_patch16_224", "--image-size", "100"), "Input height (100) doesn't match model (224)"),
        (("plan", "resnet18", "dropblok_resnet_g4"), "did you mean 'dropblock_resnet_g4'"),
        (("plan", "resnet18", "./nowhere.yaml"), "nowhere.yaml"),
        (("plan", "resnet18", "dropblock_unet_double_conv"), "expected >=1 sites, hit 0"),
        (("plan", "resnet18", "dropblock_resnet_g4", "--set", "shortcut.with.p=7"), "shortcut.with.p"),
    ],
)
def test_faults_are_one_message(run: Any, argv: tuple[str, ...], told: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.startswith("dropsurgery: ") and told in err and "Traceback" not in err


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("recipe",),
        ("plan", "resnet18"),
        ("plan", "resnet18", "dropblock_resnet_g4", "--set", "shortcut.with.p"),
        ("plan", "resnet18", "dropblock_resnet_g4", "--total-steps", "0"),
        ("plan", "resnet18", "dropblock_resnet_g4", "--html"),
        ("diff", "resnet18", "dropblock_resnet_g4", "--html", "--json"),
        ("sites", "resnet18", "--input", "2,3,a,224"),
        ("sites", "resnet18", "--image-size", "64x"),
        ("sites", "resnet18", "--image-size", "64", "--input", "2,3,64,64"),
        ("check",),
    ],
)
def test_wrong_usage(run: Any, argv: tuple[str, ...]) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: dropsurgery")


# -- as a process ----------------------------------------------------------------------------------------------------
def test_as_a_process() -> None:
    command = [sys.executable, "-m", "dropsurgery", "check", "dropblock_resnet_g4", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "ok dropblock_resnet_g4\n")
    assert done.stderr.startswith("dropsurgery: no bundled recipe 'nope'")


def test_a_reader_that_stops_early() -> None:
    command = [sys.executable, "-m", "dropsurgery", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == ""
