"""What torch and timm do with an emitted model: export, tracing, compilation, averages, parallel training, more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from timm.utils.model import freeze
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm

from tests.laws import checks
from tests.laws.models import STEPS
from tests.uses.cases import calling, check_ways, converted, images, made

SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    name.partition("_")[0]: lambda name=name, options=options: timm.create_model(name, num_classes=5, **options)
    for name, options in {
        "resnet18": {},
        "convnext_atto": {},
        "vit_tiny_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 48},
        "swin_tiny_patch4_window7_224": SWIN,
    }.items()
}
call = calling(images())


def plain(name: str) -> nn.Module:
    return made(MODELS[name])


def emitted(name: str, *, steps: int = 0) -> Any:
    return converted(plain(name), images(), steps=steps)


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def modules_of(net: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for name, module in net.named_modules() if isinstance(module, kinds) and "_surgery" not in name]


# -- the ways in that timm has ------------------------------------------------------------------------------------
WAYS: dict[str, checks.Call] = {
    "forward_intermediates last": lambda net: net.forward_intermediates(images(), indices=[-1]),
    "forward_intermediates only": lambda net: net.forward_intermediates(images(), indices=1, intermediates_only=True),
    "forward_features": lambda net: net.forward_features(images()),
    "forward_ features and head": lambda net: net.forward_head(net.forward_features(images()), pre_logits=True),
}


def test_every_way_in_by_its_options(name: str) -> None:
    check_ways(plain(name), emitted(name, steps=STEPS), WAYS)


def test_pruned_to_some_intermediate_layers(name: str) -> None:
    model, gm = plain(name), emitted(name, steps=STEPS)
    for net in (model, gm):
        if hasattr(net, "prune_intermediate_layers"):
            net.prune_intermediate_layers(indices=[0, 1], prune_head=True)
    way = lambda net: net.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)  # noqa: E731
    check_ways(model, gm, {"forward_intermediates": way})


# -- changes after surgery ----------------------------------------------------------------------------------------
class LowRank(nn.Module):
    """A linear layer with a small one beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapt(net: nn.Module) -> None:
    torch.manual_seed(1)
    path = next(name for name, module in net.named_modules() if isinstance(module, nn.Linear))
    net.set_submodule(path, LowRank(net.get_submodule(path)))


def reparametrize(net: nn.Module) -> None:
    torch.manual_seed(1)
    first, *_, last = modules_of(net, nn.Conv2d, nn.Linear)[:-1]
    parametrizations.weight_norm(last)
    prune.random_unstructured(first, "weight", 0.5)
    parametrizations.spectral_norm(modules_of(net, nn.Linear)[-1])


def hook_weight(net: nn.Module) -> None:
    weight_norm(modules_of(net, nn.Conv2d)[-1])  # type: ignore[no-untyped-call]


CHANGES: dict[str, Callable[[Any], None]] = {
    "low-rank adapters": adapt,
    "parametrizations": reparametrize,
    "frozen": lambda net: freeze(net, [next(name for name, _ in net.named_children())]),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_around_surgery(name: str, change: str, when: str) -> None:
    model, original = plain(name), plain(name)
    CHANGES[change](model)
    if when == "before":
        CHANGES[change](original)
    gm = converted(original, images())
    if when == "after":
        CHANGES[change](gm)
    checks.check_outputs(model, gm, call)
    for _ in range(STEPS):
        gm.surgery.step()
    checks.check_noise(gm, call)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_weights_that_a_hook_makes() -> None:
    model = plain("resnet18")
    hook_weight(model)
    gm = converted(model, images())
    checks.check_outputs(model, gm, call)
    checks.check_state(model, gm)


@pytest.mark.parametrize("surroundings", ["autocast", "inference"])
def test_half_precision(name: str, surroundings: str) -> None:
    model, gm = plain(name), emitted(name)
    with torch.autocast("cpu", dtype=torch.float16), torch.inference_mode(surroundings == "inference"):
        checks.check_same(*(checks.run(net, call, False) for net in (model, gm)))
        with torch.set_grad_enabled(False):
            checks.check_same(*(checks.run(net, call, True) for net in (model, gm)))


# -- what reads the code -------------------------------------------------------------------------------------------
def test_export(name: str) -> None:
    model, gm = plain(name).eval(), emitted(name).eval()
    exported = torch.export.export(gm, (images(),))
    with torch.no_grad():
        assert torch.allclose(exported.module()(images()), model(images()), atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_to_torchscript(name: str) -> None:
    model, gm = plain(name).eval(), emitted(name).eval()
    traced = torch.jit.trace(gm, (images(),))
    with torch.no_grad():
        assert torch.allclose(traced(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "convnext"])
def test_compiled(name: str) -> None:
    model, gm = plain(name), emitted(name)
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    for training in (False, True):
        one, other = (checks.run(net, call, training) for net in (model, compiled))
        assert checks.equal(one.outputs, other.outputs)
        assert torch.equal(one.random, other.random)
        assert checks.equal(list(one.gradients.values()), list(other.gradients.values()))
    for _ in range(STEPS):
        gm.surgery.step()
    assert not checks.equal(*(checks.run(compiled, call, True, seed).outputs for seed in (1, 2)))


# -- around the training -------------------------------------------------------------------------------------------
def test_an_average_of_weights_is_inert() -> None:
    gm = emitted("vit")
    average = ModelEmaV3(gm, decay=0.5)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    for _ in range(2):
        gm.train()(images()).square().mean().backward()
        optimizer.step()
        average.update(gm)
    assert (gm.surgery.current_step, average.module.surgery.current_step) == (2, 0)
    assert checks.equal(*(checks.run(average.module, call, False, seed).outputs for seed in (1, 2)))


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_parallel_training(name: str) -> None:
    model, gm = plain(name), emitted(name)
    both = [DistributedDataParallel(net) for net in (copy.deepcopy(model), gm)]
    checks.check_same(*(checks.run(net, call, True) for net in both))
    optimizer = torch.optim.SGD(both[1].parameters(), lr=0.01)
    for _ in range(3):
        both[1].train()(images()).square().mean().backward()
        optimizer.step()
    assert gm.surgery.current_step == 3
    assert not checks.equal(*(checks.run(both[1], call, True, seed).outputs for seed in (1, 2)))


def test_other_parameters_for_one_call(name: str) -> None:
    model, gm = plain(name), emitted(name)
    scaled = {key: 1.1 * value.detach() for key, value in model.named_parameters()}
    with torch.no_grad():
        checks.check_outputs(model, gm, lambda net: torch.func.functional_call(net, scaled, (images(),)))
    one, other = (torch.func.functional_call(net.eval(), scaled, (images(),)) for net in (model, gm))
    assert torch.equal(one, other)
    assert not torch.equal(one, gm(images()))


def test_built_without_memory_and_filled_later(name: str) -> None:
    model = plain(name)
    with torch.device("meta"):
        empty = MODELS[name]()
    gm = converted(empty, images().to("meta"))
    gm.to_empty(device="cpu")
    gm.load_state_dict(model.state_dict())
    for (key, buffer), other in zip(model.named_buffers(), own_buffers(gm), strict=True):
        if key not in model.state_dict():
            other.copy_(buffer)
    checks.check_outputs(model, gm, call)


def own_buffers(gm: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in gm.named_buffers() if "_surgery" not in name]


def test_mapped_over_a_batch_of_batches() -> None:
    model, gm = plain("convnext").eval(), emitted("convnext").eval()
    x = torch.stack([images(), images().flip(0)])
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(gm)(x), torch.stack([model(part) for part in x]), atol=1e-5)


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_gradients_sample_by_sample(name: str) -> None:
    """Each sample's own gradient through its own masks; at p = 0 that of the model."""
    gm = emitted(name, steps=STEPS).train()
    assert any(regularizer.p > 0 for regularizer in gm.surgery.regularizers.values())
    x, targets = images()[:1].expand(4, -1, -1, -1), torch.zeros(4, dtype=torch.long)

    def gradients(net: nn.Module) -> Tensor:
        weights = {key: weight.detach() for key, weight in net.named_parameters()}

        def loss(weights: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
            logits = torch.func.functional_call(net, weights, (sample[None],))
            return torch.nn.functional.cross_entropy(logits, target[None])

        of_each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(weights, x, targets)
        return torch.cat([grad.flatten(1) for key, grad in of_each.items()], 1)

    apart = gradients(gm)
    assert not torch.allclose(apart[0], apart[1], atol=1e-5)
    with gm.surgery.active(p=0.0):
        assert torch.allclose(gradients(gm), gradients(plain(name).train()), atol=1e-4)
