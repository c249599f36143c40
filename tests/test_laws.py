"""The nine laws of capture, each on every family: equal outputs, equal state, nothing lost, nothing touched."""

from __future__ import annotations

import copy
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import CaptureError, apply_recipe, strip
from tests.laws import checks
from tests.laws.models import FAMILIES, STEPS, convert, everywhere, fresh, images, loud, pair

checkpointing = pytest.mark.parametrize("name", [n for n in FAMILIES if n != "vgg" and not n.startswith("smp")])


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """Of module scope, so that the tests of one family follow each other and its models need not be kept."""
    return str(request.param)


def calling(x: Tensor, **options: Any) -> checks.Call:
    return lambda model: model(x.clone(), **options)


# -- 1: equal in both modes ------------------------------------------------------------------------------------------
def test_outputs_buffers_and_gradients_are_equal(name: str) -> None:
    model, gm = pair(name)
    checks.check_outputs(model, gm, calling(images(name)))
    checks.check_noise(loud(name), calling(images(name)))


def test_it_may_be_captured_in_either_mode(name: str) -> None:
    model = fresh(name).eval()
    gm = convert(name, model)
    assert not any(module.training for module in gm.modules())
    checks.check_outputs(model, gm, calling(images(name)))


def test_outputs_are_equal_in_other_surroundings(name: str) -> None:
    model, gm = pair(name)
    checks.check_outputs(model, gm, calling(images(name).to(memory_format=torch.channels_last)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.check_outputs(model, gm, calling(images(name)))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            checks.check_outputs(model, gm, calling(images(name)))


# -- 2: other sizes --------------------------------------------------------------------------------------------------
def test_outputs_are_equal_at_other_sizes(name: str) -> None:
    model, gm = pair(name)
    for x in (images(name, batch=3), *(images(name, size, batch=1) for size in FAMILIES[name].others)):
        checks.check_outputs(model, gm, calling(x))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refused])
def test_a_size_is_refused_in_the_models_own_words(name: str) -> None:
    checks.check_error(*pair(name), calling(images(name, FAMILIES[name].refused)))


# -- 3: one computation, two forms -----------------------------------------------------------------------------------
def test_the_flat_graph_computes_what_the_tree_does(name: str) -> None:
    gm = loud(name)
    flat = gm.surgery.flatten()
    called = [flat.get_submodule(str(node.target)) for node in flat.graph.find_nodes(op="call_module")]
    assert set(gm.surgery.regularizers.values()) <= set(called)
    for training in (False, True):
        tree = checks.run(gm, calling(images(name)), training)
        with checks.restored(gm):
            flat.train(training)
            torch.manual_seed(3)
            assert checks.equal(tree.outputs, flat(images(name)))


# -- 4: state --------------------------------------------------------------------------------------------------------
def test_names_order_and_tensors_are_the_models(name: str) -> None:
    model, gm = pair(name)
    checks.check_state(model, gm)
    other = fresh(name)
    other.load_state_dict(gm.state_dict(), strict=True)
    gm.load_state_dict(other.state_dict(), strict=True)


def test_an_optimizers_checkpoint_goes_back_and_forth(name: str) -> None:
    model = fresh(name)
    gm = convert(name, model)
    x = images(name)
    optimizer = torch.optim.Adam(model.parameters())
    sum(out.square().mean() for out in checks.tensors(model(x))).backward()  # type: ignore[union-attr]
    optimizer.step()
    other = torch.optim.Adam(gm.parameters())
    other.load_state_dict(optimizer.state_dict())
    for (key, parameter), own in zip(gm.named_parameters(), model.parameters(), strict=True):
        if own in optimizer.state:
            assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[own]["exp_avg"]), key


# -- 5: class, methods, attributes -----------------------------------------------------------------------------------
def test_it_is_still_the_users_model(name: str) -> None:
    model, gm = pair(name)
    checks.check_identity(model, gm)
    for asked in ("no_weight_decay", "group_matcher", "get_classifier"):
        if hasattr(model, asked):
            assert str(getattr(gm, asked)()) == str(getattr(model, asked)())
    for kept in ("pretrained_cfg", "default_cfg", "feature_info"):
        if hasattr(model, kept):
            assert list(getattr(gm, kept)) == list(getattr(model, kept))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("smp")])
def test_a_new_classifier(name: str) -> None:
    model, gm = fresh(name), convert(name, fresh(name))
    x = images(name)
    for classes in (3, 0):
        for net in (model, gm):
            torch.manual_seed(0)
            net.reset_classifier(classes)
        assert list(gm.state_dict()) == list(model.state_dict())
        checks.check_outputs(model, gm, calling(x))


@pytest.mark.parametrize("name", ["smp_unet", "smp_fpn"])
def test_methods_of_segmentation_models(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    gm = convert(name, model)
    x = images(name)
    assert torch.equal(gm.train().predict(x), model.train().predict(x))
    gm.save_pretrained(str(tmp_path))
    assert checks.equal(type(model).from_pretrained(str(tmp_path)).state_dict(), model.state_dict())
    gm.freeze_encoder()
    assert not any(parameter.requires_grad for parameter in gm.encoder.parameters())
    model.freeze_encoder()
    checks.check_outputs(model, gm, calling(x))
    gm.unfreeze_encoder()
    assert all(parameter.requires_grad for parameter in gm.encoder.parameters())


def test_a_part_of_a_sequential_can_be_taken() -> None:
    model, gm = pair("vgg")
    part = gm.features[:6]
    assert len(part) == 6
    assert torch.equal(part.eval()(images("vgg")), model.features[:6].eval()(images("vgg")))


# -- 6: every way in -------------------------------------------------------------------------------------------------
class Bigger(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return self.part(x)


def ways(gm: nn.Module, x: Tensor) -> dict[str, checks.Call]:
    found: dict[str, checks.Call] = {"forward": calling(x), "in a bigger model": lambda m: Bigger(m)(x)}
    for name in ("forward_features", "forward_intermediates", "encoder"):
        if hasattr(gm, name):
            found[name] = lambda m, name=name: getattr(m, name)(x)
    if hasattr(gm, "forward_head"):
        with torch.no_grad(), checks.restored(gm):
            features = gm.eval().forward_features(x)
        found["forward_head"] = lambda m: m.forward_head(features)
    return found


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_every_way_in_is_regularized(name: str, copied: bool) -> None:
    model, gm = pair(name)[0], loud(name)
    gm = copy.deepcopy(gm) if copied else gm
    for way, call in ways(model, images(name)).items():
        checks.check_same(checks.run(model, call, False), checks.run(gm, call, False))
        checks.check_way(gm, way, call)


def test_a_model_within_a_users_model_is_guarded_too() -> None:
    x = images("resnet")
    gm = apply_recipe(Bigger(fresh("resnet")), everywhere(), example_inputs=x, total_steps=STEPS)
    for _ in range(STEPS):
        gm.surgery.step()
    for name in ("forward_features", "forward_intermediates"):
        checks.check_way(gm, name, lambda m, name=name: getattr(m.part, name)(x))


def test_a_stage_alone_is_regularized() -> None:
    gm = loud("resnet")
    features = torch.randn(2, 64, 16, 16)
    for stage in (gm.layer2, copy.deepcopy(gm.layer2)):
        stage.train()
        with torch.no_grad():
            assert not torch.equal(stage(features), stage(features))
            stage.eval()
            assert torch.equal(stage(features), stage(features))


# -- 7: hooks, checkpointing -----------------------------------------------------------------------------------------
def test_hooks_of_every_module_fire(name: str) -> None:
    checks.check_hooks(*pair(name), calling(images(name)))


def test_hooks_registered_before_fire_in_both(name: str) -> None:
    model, fired = fresh(name), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
        module.register_forward_pre_hook(lambda *_, path=path: fired.append(path))
    gm = convert(name, model)
    assert not fired, "a hook of the user's ran while his model was captured"
    seen = []
    for net in (model, gm):
        checks.run(net, calling(images(name)), training=True)
        seen.append(list(fired))
        fired.clear()
    assert seen[0] and seen[0] == seen[1]


@checkpointing
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(name: str, when: str) -> None:
    call = calling(images(name))
    plain = fresh(name)
    full = checks.run(plain, call, training=True).kept
    plain.set_grad_checkpointing(True)
    share = checks.run(plain, call, training=True).kept / full
    gm = loud(name)
    model = fresh(name)
    if when == "before":
        model.set_grad_checkpointing(True)
    other = loud(name, model)
    if when == "after":
        other.set_grad_checkpointing(True)
    whole, parts = checks.run(gm, call, training=True), checks.run(other, call, training=True)
    checks.check_same(whole, parts)
    assert parts.kept <= 1.1 * share * whole.kept
    checks.check_same(parts, checks.run(copy.deepcopy(other), call, training=True))
    other.set_grad_checkpointing(False)
    again = checks.run(other, call, training=True)
    checks.check_same(whole, again)
    assert again.kept == whole.kept


# -- 8: the original -------------------------------------------------------------------------------------------------
def test_the_model_given_is_untouched_and_trains_on(name: str) -> None:
    model, twin = fresh(name), fresh(name)
    call = calling(images(name))
    with checks.check_untouched(model):
        gm = convert(name, model)
        gm.surgery.flatten()
        str(gm.surgery.plan)
        strip(gm)
    checks.check_same(checks.run(model, call, True), checks.run(twin, call, True))


FAILURES = {
    "capture": ("dropsurgery.capture.recorder.Recorder.record_call", 20),
    "build": ("dropsurgery.api.build", 5),
    "emission": ("dropsurgery.rewriting.emit_owner", 3),
    "handle": ("dropsurgery.api.Surgery", 0),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_a_failure_half_way_leaves_no_trace(
    name: str, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(name)
    target, calls = FAILURES[where]
    left = [calls]
    kept = pkgutil.resolve_name(target)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise error("injected")
        left[0] -= 1
        return kept(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, failing)
        with checks.check_untouched(model), pytest.raises((error, CaptureError)):
            convert(name, model)
    assert not left[0], f"{target} is not on the way"
    checks.check_outputs(model, convert(name, model), calling(images(name)))


# -- 9: copies -------------------------------------------------------------------------------------------------------
def test_copies_and_files(name: str) -> None:
    gm = convert(name, fresh(name))
    for _ in range(STEPS // 2):
        gm.surgery.step()
    for other in (copy.deepcopy(gm), checks.saved(gm), checks.saved(copy.deepcopy(gm))):
        checks.check_copy(gm, other, calling(images(name)))


def test_dtypes_and_shared_memory(name: str) -> None:
    model = fresh(name)
    gm = convert(name, model)
    x = images(name)
    gm.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    gm.double()
    checks.check_outputs(model, gm, calling(x.double()))
    gm.to(torch.bfloat16)
    checks.check_same(*(checks.run(net, calling(x.bfloat16()), False) for net in (model, gm)))
    gm.half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert {regularizer.p.dtype for regularizer in gm.surgery.regularizers.values()} == {torch.float32}


def test_an_average_of_the_weights_has_no_clock_of_its_own() -> None:
    from timm.utils import ModelEmaV3

    gm = convert("resnet", fresh("resnet"))
    average = ModelEmaV3(gm, decay=0.5)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    for _ in range(3):
        gm.train()(images("resnet")).square().mean().backward()
        optimizer.step()
        average.update(gm)
    assert gm.surgery.current_step == 3
    assert average.module.surgery.current_step == 0
    assert not average.module.training
    assert not torch.equal(average.module.fc.weight, gm.fc.weight)


def test_a_file_goes_on_in_another_process(tmp_path: Path) -> None:
    gm = convert("vit", fresh("vit"))
    x = images("vit")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.0)
    for _ in range(4):
        gm.train()(x).sum().backward()
        optimizer.step()
    torch.save((gm, x, gm.eval()(x)), tmp_path / "model.pt")
    script = """
import sys, torch
gm, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(gm.eval()(x), expected)
optimizer = torch.optim.SGD(gm.parameters(), lr=0.0)
rates = []
for _ in range(3):
    gm.train()(x).sum().backward()
    optimizer.step()
    rates.append(next(iter(gm.surgery.regularizers.values())).p.item())
print(type(gm).__name__, gm.surgery.current_step, gm.surgery.recipe.name, *(f"{rate:.3f}" for rate in rates))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["VisionTransformer", "7", "everywhere", "0.100", "0.120", "0.140"], done.stderr
