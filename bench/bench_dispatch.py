"""What a call costs where there is nothing to compute: tersor's operators on 24 numbers, next to one of torch's own.

On the CPU with one thread's worth of work, also where the run is on a GPU. Not compared: the yardstick computes
something else.
"""

import torch
from harness import benchmark
from suite import Implementation, Suite

import tersor


def make_inputs(size, dtype, device, generator):
    return (torch.randn(*size, generator=generator, dtype=dtype),)


def public_function(size):
    def attention(qkv):
        return tersor.dilated_attention_qkvpacked(qkv, 1, 1, 1.0)

    return attention


def registered_operator(size):
    overload = torch.ops.tersor.dilated_attention_forward.default

    def attention(qkv):
        return overload(*qkv.unbind(3), 1, [1], 1.0)[0]

    return attention


def reference(size):
    return lambda qkv: qkv.select(3, 2)  # one tap: its weight is 1, so the output is the value


IMPLEMENTATIONS = [
    Implementation("tersor", public_function, ours=True, note="checks, autograd function, operator, kernel"),
    Implementation("tersor_operator", registered_operator, ours=True, note="torch.ops.tersor, as a graph calls it"),
    Implementation("aten_relu", lambda size: torch.relu, compared=False, note="a different function: the floor"),
]

SUITE = Suite(
    operator="dispatch",
    sizes={"dilated_attention": (1, 1, 1, 3, 1, 8)},
    small=(1, 2, 1, 3, 1, 8),
    directions=["forward", "forward_graph", "forward_backward"],
    make_inputs=make_inputs,
    reference=reference,
    implementations=IMPLEMENTATIONS,
    operators=["dilated_attention_forward", "dilated_attention_backward"],
    device="cpu",
)

bench_dispatch = benchmark(SUITE)
