"""Gating Dropout on two processes: they agree, tokens stay on them, and their training stays in step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dropsurgery import SurgeryError
from tests.regularizers.toy_mixture import EXPERTS, FEATURES, Mixture, built, decisions, fact, skipping


class Trained(nn.Module):
    """A residual mixture and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture("normalised")
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mixture(x))


def exchanged(buffers: Tensor) -> Tensor:
    """All-to-all: of (machines, ...) on each process, what each sent to this one."""
    received = [torch.empty_like(buffers) for _ in range(dist.get_world_size())]
    dist.all_gather(received, buffers)
    return torch.stack([each[dist.get_rank()] for each in received])


def spread(mixture: Mixture, x: Tensor, indices: Tensor, weights: Tensor, skip: bool) -> tuple[Tensor, int]:
    """Expert parallelism on two processes, each with half of the experts; and how many tokens left this process.

    With `skip` neither exchange takes place, so that what was meant for the other process stays: slot j of it is
    worked on by slot j of the own one.
    """
    world, rank, each = dist.get_world_size(), dist.get_rank(), EXPERTS // dist.get_world_size()
    full = x.shape[0] * indices.shape[1]
    buffers, places, used = torch.zeros(world, each, full, FEATURES), [], [0] * EXPERTS
    for token, slot in np.ndindex(*indices.shape):
        expert = int(indices[token, slot])
        buffers[expert // each, expert % each, used[expert]] = x[token]
        places.append((token, slot, expert, used[expert]))
        used[expert] += 1
    there = buffers if skip else exchanged(buffers)
    worked = torch.stack(
        [torch.stack([mixture.experts[rank * each + j](part[j]) for j in range(each)]) for part in there]
    )
    back = worked if skip else exchanged(worked)
    y = torch.zeros_like(x)
    for token, slot, expert, place in places:
        y[token] += weights[token, slot] * back[expert // each, expert % each, place]
    return y, sum(count for expert, count in enumerate(used) if expert // each != rank)


@torch.no_grad()
def parallel_experts(rank: int) -> dict[str, Any]:
    """Skipping both exchanges against relabelling, and how many tokens leave their process."""
    torch.manual_seed(rank)
    mixture, x = Mixture("plain"), torch.randn(6, FEATURES) + rank
    _, weights, indices = mixture.router(x)
    layer = built(1.0, fact(axis=None), seed=0, mode="relabel")
    skipped, _ = spread(mixture, x, indices, weights, skip=True)
    relabelled, left = spread(mixture, x, layer(indices), weights, skip=False)
    normal, left_before = spread(mixture, x, indices, weights, skip=False)
    mixture.router.at_scores = built(1.0, seed=0)
    _, weights, indices = mixture.router(x)
    masked, left_masked = spread(mixture, x, indices, weights, skip=False)
    return {
        "apart": float((skipped - relabelled).abs().max()),
        "changed": float((normal - relabelled).abs().max()),
        "masked is local": float((masked - mixture(x)).abs().max()),
        "left": (left_before, left, left_masked),
    }


def training(rank: int) -> dict[str, Any]:
    """Some steps of data-parallel training, each process with its own data and its own random numbers."""
    torch.manual_seed(0)
    net = Trained()
    layer = net.mixture.router.at_scores = built(0.5, seed=3)
    layer.context.one_batch = lambda: True
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(100 + rank)
    dropped, owners = [], set()
    for step in range(10):
        layer.context.step = step
        x = torch.randn(6, FEATURES)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scores = layer(torch.zeros(1, EXPERTS))
        dropped.append(bool((scores < 0).any()))
        if dropped[-1]:
            owners |= set((net.mixture.router(x)[2] // 2).flatten().tolist())
    weights = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    return {"dropped": dropped, "owners": owners, "weights": weights.tolist()}


def skipped_training(rank: int) -> dict[str, Any]:
    """Data-parallel training in which whole mixtures are skipped, on both processes in the same steps."""
    torch.manual_seed(0)
    net = Trained()
    mixture = net.mixture
    layer = net.mixture = skipping(0.5, mixture, seed=4)
    layer.context.one_batch = lambda: True
    net.hosted = mixture  # where the wrapped model finds its parameters
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(100 + rank)
    skipped = []
    for step in range(8):
        layer.context.step = step
        optimizer.zero_grad()
        y = layer(torch.randn(1, 6, FEATURES))
        skipped.append(not y.any())
        model(torch.randn(6, FEATURES)).square().mean().backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    return {"skipped": skipped, "weights": weights.tolist()}


def many_decisions(seed: int) -> list[bool]:
    return decisions(0.4, 300, seed=seed)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)
        result = {"agreed": many_decisions(7), "apart": many_decisions(rank), "place": built()._place()}
        try:
            built(0.5)(torch.zeros(2, EXPERTS))
        except SurgeryError as error:
            result["seedless"] = str(error)
        result |= {"parallel": parallel_experts(rank), "training": training(rank), "skipping": skipped_training(rank)}
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=2)
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_7_processes_agree_on_every_decision(processes: list[dict[str, Any]]) -> None:
    first, second = (each["agreed"] for each in processes)
    assert first == second and 0.3 < np.mean(first) < 0.5
    first, second = (each["apart"] for each in processes)  # the control: a seed of its own for each
    assert 0.3 < np.mean(np.not_equal(first, second)) < 0.7
    assert [each["place"] for each in processes] == [(0, 2), (1, 2)]


def test_processes_without_a_seed_are_refused(processes: list[dict[str, Any]]) -> None:
    assert all("expected a seed" in each["seedless"] for each in processes)


def test_relabelling_is_skipping_both_exchanges(processes: list[dict[str, Any]]) -> None:
    for each in processes:
        assert each["parallel"]["apart"] == 0.0 and each["parallel"]["changed"] > 0.01
        assert each["parallel"]["masked is local"] <= 1e-6


def test_tokens_stay_on_their_process_in_dropped_steps(processes: list[dict[str, Any]]) -> None:
    for each in processes:
        before, relabelled, masked = each["parallel"]["left"]
        assert before > 0 and relabelled == masked == 0


def test_data_parallel_training_stays_in_step(processes: list[dict[str, Any]]) -> None:
    first, second = (each["training"] for each in processes)
    assert first["dropped"] == second["dropped"] and {True, False} == set(first["dropped"])
    assert first["weights"] == second["weights"]
    assert (first["owners"], second["owners"]) == ({0}, {1})  # of dropped steps: each its slice of the experts


def test_data_parallel_training_skips_the_same_mixtures(processes: list[dict[str, Any]]) -> None:
    first, second = (each["skipping"] for each in processes)
    assert first == second and set(first["skipped"]) == {True, False}
