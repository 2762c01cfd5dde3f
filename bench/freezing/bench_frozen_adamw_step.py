"""A step of AdamW on one parameter, parts of it frozen, against torch's fused one."""

import functools

import torch
from frozen_step import suite
from harness import benchmark

import tersor

OPTIONS = {"lr": 0.1, "weight_decay": 0.01}
TENSORS = 7  # parameter and both moments read and written, gradient read
FLOPS = 14

bench_frozen_adamw_step = benchmark(
    suite(
        "frozen_adamw_step",
        functools.partial(torch.optim.AdamW, **OPTIONS),
        functools.partial(tersor.FrozenAdamW, **OPTIONS),
        TENSORS,
        FLOPS,
    )
)
