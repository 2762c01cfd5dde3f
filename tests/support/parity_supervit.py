"""Parity with vector files of the system ``supervit``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from parity_cf_vit import Ours, checked, gradients, inputs, load
from parity_pslt import Arrays, Meta, Result, tensor
from torch import nn

import tersor
from tersor.models._tokens import TokenBlock
from tersor.models.layers import Mlp
from tersor.models.super_vit import SuperViT, subnetwork_losses
from tersor.tokens import mean_heads


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs the file's block or model forward and backward and measures every ``out`` and ``grad_`` array.

    Raises:
        ValueError: the file is of an operator that is not known here.
        AssertionError: a block keeps another number of tokens.
    """
    return checked(CHECKS, arrays, meta, dtype, device)


def block_tail(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    """Equality of scores is judged in float32, whatever the rest is computed in."""
    x = inputs(arrays, dtype, device)
    hidden, dim = arrays["param_mlp.fc1.weight"].shape
    module = nn.Module()
    module.norm2, module.mlp = nn.LayerNorm(dim, eps=meta["eps"]), Mlp(dim, hidden)
    if "param_norm1.weight" in arrays:  # of the whole block; the tail has no use for it
        module.norm1 = nn.LayerNorm(dim)
    load(module, arrays, dtype, device)
    scores = mean_heads(tensor(arrays["in_attn_cls"], torch.float32, device)[:, :, 1:])
    count = math.ceil(meta["keep"] * x["x"].shape[1])
    norm = module.norm2
    tokens, normalized, index = tersor.prune_tokens(
        scores, x["x"], x["branch"], norm.weight, norm.bias, count, 1.0, meta["eps"]
    )
    out = tokens + module.mlp(normalized)
    out.backward(x["gout"])
    return {"out_score": scores, "out_index": index, "out_kept": tokens, "out": out} | gradients(x, module)


def block(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    x = inputs(arrays, dtype, device)
    length, dim = x["x"].shape[1:]
    module = TokenBlock(
        dim,
        meta["heads"],
        meta["mlp_ratio"],
        qkv_bias=meta["qkv_bias"],
        eps=meta["eps"],
        skip_lam=meta["skip_lam"],
    )
    load(module, arrays, dtype, device)
    out = module(x["x"]) if meta["keep"] == 1 else module.pruned(x["x"], math.ceil(meta["keep"] * length))
    out.backward(x["gout"])
    return {"out": out} | gradients(x, module)


def training_step(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Ours:
    x = inputs(arrays, dtype, device)
    assert meta["prune_layers"] == [3, 6, 9], "published"
    model = SuperViT(
        meta["sizes"],
        meta["dim"],
        meta["depth"],
        meta["heads"],
        meta["mlp_ratio"],
        arrays["param_head.weight"].shape[0],
        arrays["in_image"].shape[1],
        eps=meta["eps"],
    )
    load(model, arrays, dtype, device)
    lengths: list[int] = []
    for layer in model.blocks:  # what the MLP reads is what is left, but for the last block, which goes on with one
        layer.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    subnetworks = [(size, rate) for size, rate in meta["subnets"]]
    result = subnetwork_losses(model, x["image"], x["target"], subnetworks)
    after = [meta["tokens_after_block"][str(number)] for number in range(4)]
    assert lengths == [length for network in after for length in (*network[:-1], 1)]
    ours: Ours = {"out_losses": result.losses}
    for number, (size, _) in enumerate(subnetworks):
        ours[f"out_logits_{number}"] = result.logits[number]
        ours[f"out_resized_{number}"] = tersor.resize_align_corners(x["image"], size)
    return ours | gradients(x, model)


CHECKS: dict[str, Callable[..., Ours]] = {
    "prune_then_mlp (block tail with given attention)": block_tail,
    "lv-vit block with pruning": block,
    "super_deit end to end, one training step of four sub-networks": training_step,
}
