"""Fine-tune a timm ResNet on few real images, with and without a recipe: the whole way there and back.

Scikit-learn bundles 1797 handwritten digits of 8x8 pixels. A ResNet-18 is trained on the digits 0 to 4 and
saved; from that file it is fine-tuned to tell 5 to 9 apart from ten images of each, once as it is and once
with DropBlock where `dropblock_resnet_g34` puts it. Data this small are here to show the way, not to rank
methods: what comes out is printed, whichever way it falls.

    python examples/finetune_digits.py            # three seeds, minutes on two cores
    python examples/finetune_digits.py --quick    # one seed, few steps: does it run?
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

from dropsurgery import apply_recipe, strip

MODEL = "resnet18"
RECIPE = "dropblock_resnet_g34"
# The recipe's blocks of 7x7 are for maps of 14x14; on 64 pixels stage 3 has 4x4.
OVERRIDES = {"defaults.with.block_size": 3}
SIZE = 64
BATCH = 25
SHOTS = 10

console = Console()


@dataclass(frozen=True)
class Settings:
    """How long everything takes."""

    seeds: int = 3
    pretraining_shots: int = 60
    pretraining_epochs: int = 5
    epochs: int = 16
    tests: int = 400


@dataclass(frozen=True)
class Data:
    """Images (N, 1, SIZE, SIZE) in [-1, 1] and labels (N,) counted from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor) -> Data:
        """The samples at `index`."""
        return Data(self.images[index], self.labels[index])

    def few(self, shots: int, tests: int, seed: int) -> tuple[Data, Data]:
        """`shots` samples of each class to learn from, and `tests` others."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        classes = self.labels[order]
        learn = torch.cat([order[classes == label][:shots] for label in classes.unique()])
        rest = order[~torch.isin(order, learn)]
        return self.part(learn), self.part(rest[:tests])


def digits(first: int, last: int) -> Data:
    """The bundled digits from `first` to `last`, enlarged to SIZE x SIZE."""
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target)
    wanted = (labels >= first) & (labels <= last)
    small = torch.from_numpy(bunch.images)[wanted, None].float() / 8 - 1
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return Data(images, labels[wanted] - first)


def new_optimizer(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """SGD with momentum, as for any model: surgery adds no parameter."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, seed: int) -> float:
    """One epoch in the order that `seed` gives; returns the mean loss."""
    model.train()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    losses = []
    for index in order.split(BATCH):
        batch = data.part(index)
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # which moves the schedules too
        losses.append(loss.item())
    return statistics.mean(losses)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of right answers, in eval mode."""
    model.eval()
    answers = torch.cat([model(images).argmax(1) for images in data.images.split(100)])
    return (answers == data.labels).float().mean().item()


def pretrain(file: Path, settings: Settings) -> None:
    """Train on the digits 0 to 4 and save the weights: what a download would give elsewhere."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, in_chans=1, num_classes=5)
    optimizer = new_optimizer(model, lr=0.05)
    learn, test = digits(0, 4).few(settings.pretraining_shots, settings.tests, seed=0)
    for epoch in range(settings.pretraining_epochs):
        train_epoch(model, optimizer, learn, seed=epoch)
    torch.save(model.state_dict(), file)
    console.print(f"pretrained on the digits 0-4: test accuracy {accuracy(model, test):.3f}")


def pretrained(file: Path, seed: int) -> nn.Module:
    """The saved model with a new classifier for five other classes."""
    torch.manual_seed(seed)
    overlay = {"file": str(file), "input_size": (1, SIZE, SIZE)}
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)


def operate(model: nn.Module, steps: int, seed: int) -> fx.GraphModule:
    """The model with DropBlock in it; with a seed every mask depends on site and step alone."""
    return apply_recipe(model, RECIPE, total_steps=steps, overrides=OVERRIDES, seed=seed)


def rates(gm: fx.GraphModule) -> str:
    """The rate that each stage has now."""
    now = {edit.site.stage: gm.surgery.regularizers[edit.site.id].p.item() for edit in gm.surgery.plan.edits}
    return ", ".join(f"stage {stage} p={p:.4f}" for stage, p in sorted(now.items()))


def save(gm: fx.GraphModule, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """A checkpoint: weights, optimizer, and the clock of the schedules."""
    state = {
        "model": gm.state_dict(),
        "optimizer": optimizer.state_dict(),
        "surgery": gm.surgery.state_dict(),
    }
    torch.save(state, file)


def resume(gm: fx.GraphModule, file: Path) -> torch.optim.Optimizer:
    """Put a checkpoint into a newly made model; returns the optimizer."""
    state = torch.load(file, weights_only=True)
    gm.load_state_dict(state["model"])
    gm.surgery.load_state_dict(state["surgery"])
    optimizer = new_optimizer(gm)
    optimizer.load_state_dict(state["optimizer"])
    return optimizer


def check_resume(gm: fx.GraphModule, again: fx.GraphModule, file: Path, learn: Data, epochs: range) -> None:
    """Train `again` from the checkpoint to the end, and compare with `gm`, which was never interrupted."""
    optimizer = resume(again, file)
    console.print(f"resumed at step {again.surgery.current_step}: {rates(again)}")
    for epoch in epochs:
        train_epoch(again, optimizer, learn, seed=epoch)
    pairs = zip(gm.state_dict().values(), again.state_dict().values(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise SystemExit("the resumed training differs from the uninterrupted one")
    console.print("resumed training ends with the same weights, bit for bit")


def check_strip(gm: fx.GraphModule, test: Data) -> None:
    """Take the surgery away again: timm's own class with the trained weights, and the same outputs."""
    plain = strip(gm)
    with torch.no_grad():
        equal = torch.equal(plain.eval()(test.images[:100]), gm.eval()(test.images[:100]))
    if type(plain) is not timm.models.ResNet or not equal:
        raise SystemExit(f"the stripped model is a {type(plain).__name__}, outputs equal: {equal}")
    console.print("stripped: a plain timm ResNet again, with equal outputs")


@dataclass(frozen=True)
class Trial:
    """One seed: what to learn from, what to test on, and where the saved weights lie."""

    seed: int
    learn: Data
    test: Data
    folder: Path
    settings: Settings

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.settings.epochs * -(-len(self.learn) // BATCH)

    def plain(self) -> nn.Module:
        """The pretrained model as it is."""
        return pretrained(self.folder / "pretrained.pt", self.seed)

    def operated(self) -> fx.GraphModule:
        """The pretrained model with the recipe applied."""
        return operate(self.plain(), self.steps, self.seed)

    def train(self, model: nn.Module, progress: Progress, name: str) -> float:
        """Fine-tune; returns the test accuracy. The first one with a recipe is shown and saved on the way."""
        shown = model if self.seed == 0 and isinstance(model, fx.GraphModule) else None
        optimizer = new_optimizer(model)
        task = progress.add_task(f"seed {self.seed}, {name}", total=self.settings.epochs)
        for epoch in range(self.settings.epochs):
            if shown is not None and epoch == self.settings.epochs // 2:
                save(shown, optimizer, self.folder / "checkpoint.pt")
            rates_now = f" {rates(shown)}" if shown is not None else ""
            loss = train_epoch(model, optimizer, self.learn, seed=epoch)
            if shown is not None:
                progress.console.print(f"epoch {epoch:2d}:{rates_now}, loss {loss:.3f}")
            progress.advance(task)
        return accuracy(model, self.test)

    def check(self, gm: fx.GraphModule) -> None:
        """Interrupt and resume; strip."""
        rest = range(self.settings.epochs // 2, self.settings.epochs)
        check_resume(gm, self.operated(), self.folder / "checkpoint.pt", self.learn, rest)
        check_strip(gm, self.test)


def run(settings: Settings, folder: Path) -> dict[str, list[float]]:
    """Both ways over all seeds; returns the test accuracies."""
    pretrain(folder / "pretrained.pt", settings)
    data = digits(5, 9)
    results: dict[str, list[float]] = {"plain": [], RECIPE: []}
    for seed in range(settings.seeds):
        trial = Trial(seed, *data.few(SHOTS, settings.tests, seed), folder, settings)
        gm = trial.operated()
        if seed == 0:
            gm.surgery.print_diff()
        with Progress(console=console) as progress:
            results["plain"].append(trial.train(trial.plain(), progress, "plain"))
            results[RECIPE].append(trial.train(gm, progress, RECIPE))
        if seed == 0:
            trial.check(gm)
    return results


def main() -> None:
    """Run, and report what was measured."""
    parser = argparse.ArgumentParser(description="Fine-tune a timm ResNet on few digits, with and without DropBlock.")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs")
    quick = parser.parse_args().quick
    settings = Settings(1, pretraining_shots=10, pretraining_epochs=1, epochs=2, tests=50) if quick else Settings()
    torch.set_num_threads(1)  # batches this small gain little from more, and results depend on the number
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = run(settings, Path(folder))
    console.print(f"\nTest accuracy on the digits 5-9 after {SHOTS} images of each ({settings.tests} tests):")
    for name, values in results.items():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.3f}" for value in values)
        console.print(f"  {name:20s} {statistics.mean(values):.3f}{spread}   (seeds: {each})", highlight=False)
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
