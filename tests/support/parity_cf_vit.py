"""Parity with vector files of the system ``cf_vit``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from parity_pslt import Arrays, Meta, Result, error, tensor
from torch import Tensor, nn

import tersor
from tersor.models._tokens import kl_to_detached
from tersor.models.cf_vit import CFLVViT, CFViT, cf_vit_loss
from tersor.models.layers import Mlp

Ours = dict[str, Any]  # by the names of the file's arrays
_SINGLE, _END_TO_END = 1e-5, 2e-5  # spec, section 6
_SCORES = ("out_cls_attn", "out_score")  # measured relative to their own maximum: far below 1
_EXPECTED = ("out_", "grad_", "gradloss_", "state_")


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs the file's operator or model forward and backward and measures every array that it expects.

    Raises:
        ValueError: the file is of an operator that is not known here.
        AssertionError: a gradient of the training loss, which not every file has, is another.
    """
    return checked(CHECKS, arrays, meta, dtype, device)


def checked(
    checks: Mapping[str, Callable[..., Ours]], arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str
) -> list[Result]:
    if meta["op"] not in checks:
        raise ValueError(f"no check for op {meta['op']!r}, known are {', '.join(checks)}")
    ours = checks[meta["op"]](arrays, meta, dtype, device)
    allowed = _END_TO_END if "end to end" in meta["op"] else _SINGLE
    truncated = {name.removeprefix("grad_") for name in meta.get("truncated_grads", ())}
    results = []
    for name, expected in arrays.items():
        if name != "out" and not name.startswith(_EXPECTED):
            continue
        found = ours.get(name)
        if found is not None and name.removeprefix("grad_").removeprefix("gradloss_") in truncated:
            found = found.flatten()[: expected.size]
        exact = expected.dtype.kind in "iu"
        result = (name, measure(name, found, expected), 0.0 if exact else allowed)
        if name.startswith("gradloss_"):  # the walk over the files does not ask for these
            assert result[1] <= result[2], result
        else:
            results.append(result)
    return results


def measure(name: str, found: Tensor | None, expected: np.ndarray) -> float:
    """The largest distance by the largest value, which counts as 1 at least except for scores; indices exactly."""
    if found is None or tuple(found.shape) != expected.shape:
        return math.inf
    if expected.dtype.kind in "iu":
        return float(np.not_equal(found.cpu().numpy(), expected).sum())
    if name in _SCORES and np.abs(expected).max() > 0:
        scale = float(np.abs(expected).max())
        return error(found / scale, expected / scale)
    return error(found, expected)


def inputs(arrays: Arrays, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The ``in_`` arrays by their names, those whose gradients the file has as leaves."""
    given = {n.removeprefix("in_"): tensor(a, dtype, device) for n, a in arrays.items() if n.startswith("in_")}
    for name, value in given.items():
        value.requires_grad_(f"grad_{name}" in arrays)
    return given


def load(module: nn.Module, arrays: Arrays, dtype: torch.dtype, device: str) -> nn.Module:
    """The file's ``param_`` arrays under the authors' keys; counters of batches, which files lack, stay."""
    module.to(device, dtype)
    state = {n.removeprefix("param_"): tensor(a, dtype, device) for n, a in arrays.items() if n.startswith("param_")}
    counters = {n: v for n, v in module.state_dict().items() if n.endswith("num_batches_tracked")}
    module.load_state_dict(counters | state)
    return module


def gradients(tensors: Mapping[str, Tensor], module: nn.Module | None = None, prefix: str = "grad_") -> Ours:
    named = dict(tensors) | ({} if module is None else dict(module.named_parameters()))
    return {f"{prefix}{name}": value.grad for name, value in named.items() if value.grad is not None}


def resplit(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    """Ranked by the operator and, with the chosen patches alone, by the model's way."""
    x = inputs(arrays, dtype, device)
    coarse, fine, alpha = x["coarse_embed"], x["fine_embed"], meta["alpha"]
    tokens, order = tersor.resplit_tokens(x["cls_attn"], coarse, fine[:, 1:], None, None, fine[:, :1], alpha)
    tokens.backward(x["gout"])
    index, kept = tersor.resplit_index(order, alpha)
    results = {"out_tokens": tokens, "out_order": order, "out_fine_index": index, "out_coarse_index": kept}
    results |= gradients(x)
    both = [x[name].grad for name in ("coarse_embed", "fine_embed")]
    coarse.grad = fine.grad = None
    chosen = tersor.gather_tokens(fine, 1 + index)
    order = tersor.rank_tokens(x["cls_attn"])
    again, _ = tersor.resplit_tokens(None, coarse, chosen, None, None, fine[:, :1], alpha, order=order)
    again.backward(x["gout"])
    assert torch.equal(again, tokens)
    assert all(torch.equal(x[n].grad, g) for n, g in zip(("coarse_embed", "fine_embed"), both, strict=True))
    return results


def class_attention(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    """The given weights are the softmax of their logarithms, which are products with the rows of a unit matrix."""
    weights = tensor(arrays["in_attn"], dtype, device)[:, :, :, 0]  # [L, B, H, 1 + N]
    layers, batch, heads, length = weights.shape
    key = torch.eye(length, dtype=dtype, device=device)[None, :, None].expand(batch, -1, heads, -1)
    average = None
    for layer in range(meta["start_layer"], layers):
        row = weights[layer].clamp_min(1e-30).log()[:, None]  # [B, 1, H, 1 + N]
        query = row.expand(-1, length, -1, -1)
        average = tersor.class_scores(query, key, average, meta["beta"], scale=1.0)
    order = tersor.rank_tokens(average)
    index, _ = tersor.resplit_index(order, meta.get("alpha", 0.5))
    return {"out_cls_attn": average, "out_order": order, "out_important": index}


def feature_reuse(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    """The whole fine embedding is what splitting all tokens gives, put back from the order of its rows."""
    x = inputs(arrays, dtype, device)
    features, fine = x["coarse_features"], x["fine_patch"]
    hidden, dim = arrays["param_reuse_block.1.fc1.weight"].shape
    module = nn.Module()
    module.reuse_block = nn.Sequential(nn.LayerNorm(dim, eps=meta["eps"]), Mlp(dim, hidden))
    load(module, arrays, dtype, device)
    batch, count = features.shape[0], features.shape[1] - 1
    reuse = module.reuse_block(features[:, 1:])
    scores = torch.rand(batch, count, dtype=dtype, device=device)
    tokens, order = tersor.resplit_tokens(
        scores, features.detach(), fine[:, 1:], reuse, x["pos_fine"], fine[:, :1], alpha=1.0
    )
    index, _ = tersor.resplit_index(order, 1.0)
    places = F.pad(1 + index.argsort(1), (1, 0))
    out = tersor.gather_tokens(tokens, places)
    out.backward(x["gout"])
    return {"out": out} | gradients(x, module)


def options(arrays: Arrays, meta: Meta) -> dict[str, Any]:
    """What both models are built with."""
    assert meta["start_layer"] == 3, "published"
    shared = {name: meta[name] for name in ("grid", "dim", "depth", "mlp_ratio", "alpha")}
    shared |= {"num_heads": meta["heads"], "decay": meta["beta"], "selection": meta.get("selection", True)}
    return shared | {"num_classes": arrays["param_head.weight"].shape[0], "in_chans": arrays["in_image"].shape[1]}


def deit(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    x = inputs(arrays, dtype, device)
    model = load(CFViT(**options(arrays, meta), eps=meta["eps"]), arrays, dtype, device)
    assert isinstance(model, CFViT)
    ours = both_passes(model, x, arrays)
    for value in (*model.parameters(), *x.values()):
        value.grad = None
    coarse, fine = model(x["image"])
    ours["out_loss_ce"] = F.cross_entropy(fine, x["target"]).view(1)
    ours["out_loss_kl"] = kl_to_detached(coarse, fine).view(1)
    loss = cf_vit_loss(coarse, fine, x["target"])
    assert torch.allclose(loss, ours["out_loss_ce"] + ours["out_loss_kl"])
    loss.backward()
    return ours | gradients({}, model, "gradloss_") | early_exit(model.eval(), x)


def lvvit(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    x = inputs(arrays, dtype, device)
    more = {"eps": meta["layernorm_eps"], "qkv_bias": meta["qkv_bias"], "skip_lam": meta["skip_lam"]}
    model = load(CFLVViT(**options(arrays, meta), **more), arrays, dtype, device).eval()
    assert isinstance(model, CFLVViT)
    ours = both_passes(model, x, arrays) | early_exit(model, x)
    coarse, fine = model.train()(x["image"], box=meta["box_coarse"])
    assert list(coarse[2]) == list(meta["box_coarse"])
    assert list(fine[2]) == list(meta["box_fine"])
    ours |= {"out_train_coarse_cls": coarse[0], "out_train_coarse_aux": coarse[1]}
    return ours | {"out_train_fine_cls": fine[0], "out_train_fine_aux": fine[1]}


def both_passes(model: CFViT, x: Mapping[str, Tensor], arrays: Arrays) -> Ours:
    """Logits, their gradients and what lies between the passes."""
    coarse, fine = model(x["image"])
    ((coarse * x["gout_coarse"]).sum() + (fine * x["gout_fine"]).sum()).backward()
    ours = {"out_coarse": coarse, "out_fine": fine} | gradients(x, model)
    images = model.check_images(x["image"], None)
    if "in_image_coarse" in arrays:
        assert error(images, arrays["in_image_coarse"]) <= _SINGLE
    with torch.no_grad():
        between = model.coarse_pass(images)
        return ours | {"out_cls_attn": between.scores, "out_fine_sequence": model.fine_tokens(x["image"], between)[0]}


def early_exit(model: CFViT, x: Mapping[str, Tensor]) -> Ours:
    if "threshold" not in x:
        return {}
    logits, unsure, confidence = model.infer(x["image"], x["threshold"].item())
    return {"out_early_exit": logits, "out_no_exit": unsure.to(torch.uint8), "out_confidence": confidence}


CHECKS: dict[str, Callable[..., Ours]] = {
    "resplit_tokens": resplit,
    "global_class_attention": class_attention,
    "feature_reuse": feature_reuse,
    "cf_deit end to end": deit,
    "cf_lvvit end to end": lvvit,
}
