"""Prepared models under torch's own engines: two processes train like one, and hold the same masks."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed_training as training
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock  # torch needs it too
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tersor import compress
from tersor.freezing.mask import unpack_mask

WORKER = Path(training.__file__).with_name("distributed_worker.py")
WRAPPERS = ("ddp", "fsdp")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch is built without gloo"
)
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Of a wrapper: what its two processes found, and the folder with their files; they are started once."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # which all workers share

    @functools.cache
    def launch(kind: str) -> tuple[dict[str, Any], Path]:
        folder = root / f"distributed-{kind}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                run(kind, folder)
        return json.loads((folder / "results.json").read_text()), folder

    def run(kind: str, folder: Path) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*torchrun, str(WORKER), kind, str(folder)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("error*.txt")))
        assert ended.returncode == 0, errors or ended.stderr[-3000:]

    return launch


@functools.cache
def single(model: str, recipe: str) -> tuple[list[float], dict[str, torch.Tensor], str]:
    """Losses, last state and report of one process that sees whole batches."""
    made = training.prepared(model, recipe)
    losses = training.train(made, training.optimizer_of(made))
    return losses, made.state_dict(), str(compress.report(made))


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize(("model", "recipe"), training.CASES)
def test_two_processes_train_like_one(results: Any, kind: str, model: str, recipe: str) -> None:
    found, folder = results(kind)
    losses, state, table = single(model, recipe)
    case = found[f"{model} {recipe}"]
    assert case["same"], "the processes' states differ"
    torch.testing.assert_close(case["losses"], losses, **CLOSE)
    assert case["report"] == table
    other = torch.load(folder / f"{model} {recipe}.pt", weights_only=True)
    assert list(other) == list(state)
    for name, expected in state.items():
        actual = other[name]
        if not expected.is_floating_point():  # masks, codes, counters, steps
            assert torch.equal(actual, expected), name
            continue
        if name.endswith("alpha"):
            assert torch.equal(actual == 0, expected == 0), name
        mask = state.get(name.removesuffix("weight") + "quantize_weight.frozen")
        if name.endswith(".weight") and mask is not None:  # what is frozen does not go by the raw weight
            free = ~unpack_mask(mask, expected.shape)
            actual, expected = actual[free], expected[free]
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("granularity", ["element", "tile", "channel", "layer"])
def test_the_trainings_go_as_far_as_layers_that_are_left_out(granularity: str) -> None:
    model = training.prepared("convolutions", f"freeze by {granularity}")
    training.train(model, training.optimizer_of(model))
    levels = [module.plan.level for module in model.modules() if getattr(module, "plan", None)]
    assert levels.count("layer") >= 3


@pytest.mark.parametrize("kind", WRAPPERS)
def test_two_forward_passes_before_a_backward_pass(results: Any, kind: str) -> None:
    losses = single("convolutions", "all")[0][: training.STEPS]
    torch.testing.assert_close(results(kind)[0]["accumulated"], losses, **CLOSE)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_calibrated_alike(results: Any, kind: str) -> None:
    assert results(kind)[0]["calibrated"] == [True, True]
    assert results(kind)[0]["mean of bounds"]


def test_a_wrapped_model_is_not_converted(results: Any) -> None:
    assert "give its .module" in results("ddp")[0]["refused"]
    assert "get_model_state_dict" in results("fsdp")[0]["refused"]


def test_scores_may_be_cut_between_columns(results: Any) -> None:
    torch.testing.assert_close(results("fsdp")[0]["columns"], single("transformer", "all")[0], **CLOSE)


def test_a_sharded_checkpoint_goes_on_with_two_processes_and_with_one(results: Any) -> None:
    found, folder = results("fsdp")
    uninterrupted = found["checkpoint"]["uninterrupted"]
    assert found["checkpoint"]["resumed"] == uninterrupted
    model = training.prepared("convolutions", "all")
    optimizer = training.optimizer_of(model, "AdamW")
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    torch.testing.assert_close(training.train(model, optimizer, steps=range(5, 9)), uninterrupted, **CLOSE)


def test_operators_compute_on_pieces_what_they_do_on_the_whole(results: Any) -> None:
    found = results("fsdp")[0]["rules"]
    assert {name.split()[0] for name in found} >= {"lsq", "lsq+", "pact", "affine", "bounds", "add", "nm_sparsify"}
    for name, (far, place, gradients) in found.items():
        dim = int(name[-1])
        by_rows = "sparsify" in name
        assert far < 1e-13, name
        assert place == (f"S({dim})" if not by_rows or (dim == 0 and "uneven" not in name) else "R"), name
        assert gradients[0] == place, name
        assert by_rows or set(gradients[1:]) <= {place, "P(sum)"}, name


def test_operators_without_a_rule_say_so(results: Any) -> None:
    assert "percentile_bounds" in results("fsdp")[0]["no rule"]


def test_the_rules_are_not_imported_before_they_are_asked_for() -> None:
    code = "import sys, tersor, tersor.sharding; sys.exit('torch.distributed.tensor.experimental' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("recipe", training.HALF)
def test_mixed_precision_stays_finite(results: Any, recipe: str) -> None:
    losses = results("fsdp")[0]["half"][recipe]
    assert all(map(math.isfinite, losses))
    torch.testing.assert_close(losses[0], single("convolutions", recipe)[0][0], rtol=0.05, atol=0)


def test_autocast_stays_finite(results: Any) -> None:
    losses = results("fsdp")[0]["autocast"]
    assert all(map(math.isfinite, losses))
    torch.testing.assert_close(losses[0], single("convolutions", "all")[0][0], rtol=0.05, atol=0)


def test_a_gathered_state_converts(results: Any) -> None:
    saved = torch.load(results("fsdp")[1] / "converted.pt", weights_only=True)
    torch.testing.assert_close(saved["found"], saved["expected"], rtol=1e-4, atol=1e-4)
