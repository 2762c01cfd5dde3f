"""What test_distributed.py has torchrun start: all cases of one wrapper, their results in a folder.

python distributed_worker.py {ddp,fsdp} FOLDER
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_training as training
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import tersor
import tersor.sharding
from tersor import compress


def sharded(model: Any, **options: Any) -> Any:
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.parts():
        fully_shard(part, **options)
        if hasattr(part, "class_token"):
            register_fsdp_forward_method(part, "class_token")
    return fully_shard(model, **options)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state, on every process; buffers are this process's own."""
    if isinstance(model, DistributedDataParallel):
        return model.module.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))


def digest(state: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def same_everywhere(value: Any) -> bool:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(each == values[0] for each in values)


def mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def train(model: nn.Module, optimizer: Any, **options: Any) -> list[float]:
    return mean(training.train(model, optimizer, dist.get_rank(), dist.get_world_size(), **options))


def case(wrap: Callable[[Any], Any], model: str, recipe: str, folder: Path, **options: Any) -> dict[str, Any]:
    """A training from beginning to end."""
    wrapped = wrap(training.prepared(model, recipe))
    losses = train(wrapped, training.optimizer_of(wrapped, **options))
    table = str(compress.report(wrapped))
    state = gathered(wrapped)
    if dist.get_rank() == 0:
        torch.save(state, folder / f"{model} {recipe}.pt")
    return {"losses": losses, "same": same_everywhere(digest(state)), "report": table}


def calibrated(wrap: Callable[[Any], Any], model: str, recipe: str) -> bool:
    """A wrapped model is calibrated like one that is not."""
    before, after = training.prepared(model, recipe), training.prepared(model, recipe)
    with torch.no_grad():
        for module in after.modules():
            if hasattr(module, "lower"):
                module.lower.zero_(), module.upper.fill_(1)
            if hasattr(module, "scale") and isinstance(module.scale, nn.Parameter):
                module.scale.fill_(1)
    wrapped = wrap(after)
    compress.calibrate_(wrapped, training.data(0)[0])
    return digest(gathered(wrapped)) == digest(before.state_dict())


def mean_bounds(wrap: Callable[[Any], Any]) -> bool:
    """Each process calibrates with its own images: the bounds are the same, and the mean of what each would set."""
    model = training.prepared_without_calibration("convolutions", "lsq")
    first: Any = model.get_submodule("first.2")
    inputs: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    wrapped = wrap(model)
    compress.calibrate_(wrapped, training.data(0)[0].chunk(2)[dist.get_rank()])
    hook.remove()
    expected = torch.cat(tersor.percentile_bounds(inputs[0].float(), first.quantize_input.percentile)).double()
    dist.all_reduce(expected)
    state = gathered(wrapped)
    found = torch.cat([state[f"first.2.quantize_input.{each}"] for each in ("lower", "upper")])
    return same_everywhere(digest(state)) and bool((found - expected / 2).abs().max() < 1e-6)


def accumulated(wrap: Callable[[Any], Any], model: str, recipe: str) -> list[float]:
    """Two forward passes before one backward pass."""
    wrapped = wrap(training.prepared(model, recipe))
    optimizer, losses = training.optimizer_of(wrapped), []
    for step in range(training.STEPS):
        images, labels = (each.chunk(2)[dist.get_rank()] for each in training.data(step))
        halves = zip(images.chunk(2), labels.chunk(2), strict=True)
        loss = torch.stack([F.cross_entropy(wrapped(each), label) for each, label in halves]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compress.step(wrapped)
        losses.append(loss.item())
    return mean(losses)


def refused(wrapped: nn.Module) -> str:
    try:
        compress.convert_(wrapped)
    except ValueError as error:
        return str(error)
    return ""


def plain_wrap(model: Any) -> Any:
    return DistributedDataParallel(model, broadcast_buffers=False)


def ddp(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for model, recipe in training.CASES:
        results[f"{model} {recipe}"] = case(DistributedDataParallel, model, recipe, folder)  # broadcasts buffers
    results["accumulated"] = accumulated(plain_wrap, "convolutions", "all")
    results["calibrated"] = [calibrated(plain_wrap, "convolutions", each) for each in ("lsq", "lts")]
    results["mean of bounds"] = mean_bounds(plain_wrap)
    results["refused"] = refused(plain_wrap(training.prepared("convolutions", "lsq")))
    return results


def fsdp(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for model, recipe in training.CASES:
        results[f"{model} {recipe}"] = case(sharded, model, recipe, folder)
    results["accumulated"] = accumulated(sharded, "convolutions", "all")
    results["calibrated"] = [calibrated(sharded, "convolutions", each) for each in ("lsq", "lts")]
    results["mean of bounds"] = mean_bounds(sharded)
    results["refused"] = refused(sharded(training.prepared("convolutions", "lsq")))
    results["columns"] = columns()
    results["checkpoint"] = checkpoint(folder / "checkpoint")
    results["half"] = {recipe: half(recipe) for recipe in training.HALF}
    results["autocast"] = autocast()
    results["rules"], results["no rule"] = rules(), without_rule()
    gather(folder)
    return results


def columns() -> list[float]:
    """Scores cut between their columns, where no process has whole groups."""

    def place(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] == 6 else None

    model = sharded(training.prepared("transformer", "all"), shard_placement_fn=place)
    return train(model, training.optimizer_of(model))


def checkpoint(folder: Path) -> dict[str, Any]:
    """A run, and one that is saved and goes on in a new model; at a step that is no multiple of ``every``."""
    model = sharded(training.prepared("convolutions", "all"))
    optimizer = training.optimizer_of(model, "AdamW")
    first = train(model, optimizer, steps=range(5))
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    uninterrupted = train(model, optimizer, steps=range(5, 9))

    model = sharded(training.prepared("convolutions", "all"))
    optimizer = training.optimizer_of(model, "AdamW")
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    return {"first": first, "uninterrupted": uninterrupted, "resumed": train(model, optimizer, steps=range(5, 9))}


def half(recipe: str) -> list[float]:
    """Mixed precision: parameters are given in bfloat16, and kept in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(training.prepared("convolutions", recipe, torch.float32), mp_policy=policy)
    return train(model, training.optimizer_of(model))


def autocast() -> list[float]:
    """Mixed precision of the operators, with parameters in float32."""
    model = sharded(training.prepared("convolutions", "all", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        return train(model, training.optimizer_of(model))


def gather(folder: Path) -> None:
    """The way to a converted model that docs/distributed.md shows."""
    model = sharded(training.prepared("convolutions", "all", torch.float32))
    train(model, training.optimizer_of(model))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        whole = training.prepared_without_calibration("convolutions", "all", torch.float32)
        whole.load_state_dict(state)
        whole.eval()
        images = training.data(0, torch.float32)[0]
        with torch.no_grad():
            expected = whole(images)
            found = compress.convert_(whole)(images)
        torch.save({"expected": expected, "found": found}, folder / "converted.pt")


def rules() -> dict[str, Any]:
    """Each operator on pieces: how far outputs and gradients are from those of whole tensors, and where they lie."""
    tersor.sharding.register()
    tersor.sharding.register()  # which does nothing
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(8, 16, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    odd = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    narrow = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    one, rows, columns = torch.tensor([0.3]).double(), torch.full((8, 1, 1, 1), 0.3).double(), torch.full((1, 6), 0.2)
    scores = torch.rand(8 * 16 * 9 // 4, 6, generator=generator, dtype=torch.float64).round(decimals=1)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
        "lsq": (lambda *a: tersor.fake_quantize_lsq(*a, 4, True), (x, one), 1),
        "lsq by rows": (lambda *a: tersor.fake_quantize_lsq(*a, 4, True), (x, rows), 1),
        "lsq odd": (lambda *a: tersor.fake_quantize_lsq(*a, 4, True), (odd, columns.double()), 1),
        "lsq+": (lambda *a: tersor.fake_quantize_lsq_plus(*a, 4), (x, one, -one), 1),
        "pact": (lambda *a: tersor.fake_quantize_pact(*a, 4), (x, one), 1),
        "affine": (lambda *a: tersor.fake_quantize_affine(*a, -8, 7), (x, one, torch.ones_like(one)), 1),
        "bounds": (lambda *a: tersor.fake_quantize_bounds(*a, 4), (x, -rows, rows), 1),
        "add": (lambda *a: tersor.fake_quantize_add(*a, 4), (x, other, -one, one, -one, one), 2),
        "nm_sparsify": (lambda *a: tersor.nm_sparsify(*a, 2, 4), (x, scores), 1),
        "srste_sparsify": (lambda w: tersor.srste_sparsify(w, 2, 4), (x,), 1),
        "srste_sparsify uneven": (lambda w: tersor.srste_sparsify(w, 2, 4), (narrow,), 1),
    }
    return {
        f"{name} {dim}": on_pieces(function, tensors, cut, dim)
        for name, (function, tensors, cut) in calls.items()
        for dim in range(tensors[0].dim())
    }


def on_pieces(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], cut: int, dim: int
) -> tuple[float, str, list[str]]:
    """The largest difference, the output's placement, and those of the gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [each.clone().requires_grad_() for each in tensors]
    expected = function(*whole)
    factor = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).reshape(expected.shape)
    (expected * factor).sum().backward()
    pieces = []
    for i, each in enumerate(tensors):
        place = Shard(dim) if i < cut else Replicate()
        pieces.append(distribute_tensor(each, mesh, [place]).requires_grad_())
    found: Any = function(*pieces)
    (found * distribute_tensor(factor, mesh, found.placements)).sum().backward()
    pairs: list[tuple[Any, Any]] = [(found, expected), *((a.grad, b.grad) for a, b in zip(pieces, whole, strict=True))]
    far = max((a.full_tensor() - b).abs().max().item() for a, b in pairs)
    return far, str(found.placements[0]), [str(each.grad.placements[0]) for each in pieces]


def without_rule() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), mesh, [Shard(0)])
    try:
        tersor.percentile_bounds(weight)
    except NotImplementedError as error:
        return str(error)
    return ""


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    try:
        results = {"ddp": ddp, "fsdp": fsdp}[kind](folder)
    except BaseException:
        (folder / f"error{dist.get_rank()}.txt").write_text(traceback.format_exc())
        raise
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
