"""A step of SGD with momentum and weight decay on one parameter, parts of it frozen, against torch's fused one."""

import functools

import torch
from frozen_step import suite
from harness import benchmark

import tersor

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
TENSORS = 5  # parameter and momentum read and written, gradient read
FLOPS = 6

bench_frozen_sgd_step = benchmark(
    suite(
        "frozen_sgd_step",
        functools.partial(torch.optim.SGD, **OPTIONS),
        functools.partial(tersor.FrozenSGD, **OPTIONS),
        TENSORS,
        FLOPS,
    )
)
