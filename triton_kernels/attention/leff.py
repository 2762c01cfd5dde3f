"""LeFF on GPUs: two launches forward; three and three matrix products backward.

Triton cannot shift a tile in shared memory, which a tile with a halo would need, so the activated hidden map goes
through memory once: the first launch writes it (linear, GELU, affine), the second reads the nine taps of a tile and
multiplies on (convolution, GELU, linear), chunk by chunk of hidden channels. The forward pass takes the images in
slabs whose map stays in the L2 cache, and one slab's memory serves for all.

Passes over a map of the hidden size, where eager has ten forward: the forward writes one and reads one, from L2. The
backward writes four (the hidden map, what the second linear layer is given, the gradients before the two activations,
the last in place of the first) and reads six, three of them in torch's products: the gradients of the weights and of
the input. Sums over tokens are per program, and added up in order: no atomics.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, HIDDEN_CHANNELS = 64, 32  # of a tile: one or two 16-byte loads per thread and tap
SPAN = 4  # tiles whose sums one program adds up
SLAB_BYTES = 16 << 20  # of the hidden map; H100 and H200 have 50 MB of L2, an A100 40
# Products are short and wait for the taps, which are in no pipeline: one stage.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# The compiler would rather spill 8 or 16 bytes than take more than 128 registers.
MORE_OPTIONS = OPTIONS | {"maxnreg": 160}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Never specialised, so that other sizes of image do not compile anew.
_SIZES = ["tokens", "height", "width"]
_FLOAT32 = ["bias1", "bias2", "tap_bias", "scale", "shift", "taps", "sums"]


@triton.jit
def _normal(t):
    """The normal distribution's integral and density."""
    return 0.5 + 0.5 * tl.math.erf(t * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * t * t)


@triton.jit
def _gelu(t):
    below, _density = _normal(t)
    return t * below


@triton.jit
def _load_vector(vector, e, HIDDEN: tl.constexpr):
    return tl.load(vector + e, mask=e < HIDDEN, other=0.0).to(tl.float32)


@triton.jit
def _product(
    left, right, token, present, e,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of ``left (tokens, CHANNELS)`` times columns ``e`` of ``right (CHANNELS, HIDDEN)``, or of its transpose."""
    total = tl.zeros([token.shape[0], e.shape[0]], tl.float32)
    row = left + token.to(tl.int64)[:, None] * CHANNELS
    for begin in range(0, CHANNELS, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        a = tl.load(row + c[None, :], mask=present[:, None] & (c < CHANNELS)[None, :], other=0.0)
        if TRANSPOSED:
            place = right + e.to(tl.int64)[:, None] * CHANNELS + c[None, :]
            b = tl.trans(tl.load(place, mask=(e < HIDDEN)[:, None] & (c < CHANNELS)[None, :], other=0.0))
        else:
            place = right + c.to(tl.int64)[:, None] * HIDDEN + e[None, :]
            b = tl.load(place, mask=(c < CHANNELS)[:, None] & (e < HIDDEN)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _inside(y, x, height, width, i, j):
    """Whether row ``i - 1`` and column ``j - 1`` from each token are in the image."""
    return (y + i >= 1) & (y + i <= height) & (x + j >= 1) & (x + j <= width)


@triton.jit
def _tap(map, token, inside, e, width, i, j, HIDDEN: tl.constexpr):
    """The map's channels ``e`` there, zero outside."""
    place = (token + (i - 1) * width + (j - 1)).to(tl.int64)
    pointers = map + place[:, None] * HIDDEN + e[None, :]
    return tl.load(pointers, mask=inside[:, None] & (e < HIDDEN)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolve(map, taps, token, present, e, height, width, HIDDEN: tl.constexpr, MIRRORED: tl.constexpr):
    """3 x 3 convolution of the map at the tokens; mirrored for the gradient. ``taps`` is (9, HIDDEN)."""
    x = token % width
    y = tl.where(present, token // width % height, -2)  # from where no tap is inside
    total = tl.zeros([token.shape[0], e.shape[0]], tl.float32)
    for i in range(3):  # not unrolled: nine taps at once would spill
        for j in tl.static_range(3):
            weight = _load_vector(taps + (8 - 3 * i - j if MIRRORED else 3 * i + j) * HIDDEN, e, HIDDEN)
            inside = _inside(y, x, height, width, i, j)
            product = weight[None, :] * _tap(map, token, inside, e, width, i, j, HIDDEN)
            total += tl.where(inside[:, None], product, 0.0)  # an infinite weight times the padding counts for nothing
    return total


@triton.jit(do_not_specialize=_SIZES)
def _activate_kernel(
    input, weight1, bias1, scale, shift, active, tokens,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The convolution's input: linear layer, activation and affine."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    present = token < tokens
    value = _product(input, weight1, token, present, e, CHANNELS, HIDDEN, True, BLOCK_C)
    if BIAS:
        value += _load_vector(bias1, e, HIDDEN)[None, :]
    value = _gelu(value)
    if AFFINE:
        value = value * _load_vector(scale, e, HIDDEN)[None, :] + _load_vector(shift, e, HIDDEN)[None, :]
    pointers = active + token.to(tl.int64)[:, None] * HIDDEN + e[None, :]
    tl.store(pointers, value.to(active.dtype.element_ty), mask=present[:, None] & (e < HIDDEN)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _mix_kernel(
    active, taps, tap_bias, weight2, bias2, output, tokens, height, width,
    HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, BIAS: tl.constexpr, TAP_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Convolution, activation and second linear layer, for a tile of tokens and outputs."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    present = token < tokens
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for begin in range(0, HIDDEN, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        value = _convolve(active, taps, token, present, e, height, width, HIDDEN, False)
        if TAP_BIAS:
            value += _load_vector(tap_bias, e, HIDDEN)[None, :]
        value = _gelu(value)
        place = weight2 + o.to(tl.int64)[:, None] * HIDDEN + e[None, :]
        weight = tl.load(place, mask=(o < OUTPUTS)[:, None] & (e < HIDDEN)[None, :], other=0.0)
        total = tl.dot(value.to(weight.dtype), tl.trans(weight), total, input_precision="ieee")
    if BIAS:
        total += _load_vector(bias2, o, OUTPUTS)[None, :]
    pointers = output + token.to(tl.int64)[:, None] * OUTPUTS + o[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=present[:, None] & (o < OUTPUTS)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _outer_kernel(
    grad_output, active, taps, tap_bias, weight2, outer, gradient, sums, tokens, height, width,
    HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, TAP_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The second linear layer's input, its gradient before the activation, and the taps' and their bias' sums."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    own = sums + tl.program_id(0).to(tl.int64) * 10 * HIDDEN + e
    which = tl.arange(0, 16)  # of the nine taps and the bias
    totals = tl.zeros([16, BLOCK_E], tl.float32)
    first = tl.program_id(0) * TILES * BLOCK_T
    for begin in range(first, tl.minimum(tokens, first + TILES * BLOCK_T), BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        present = token < tokens
        real = present[:, None] & (e < HIDDEN)[None, :]
        grad = _product(grad_output, weight2, token, present, e, OUTPUTS, HIDDEN, False, BLOCK_C)
        value = _convolve(active, taps, token, present, e, height, width, HIDDEN, False)
        if TAP_BIAS:
            value += _load_vector(tap_bias, e, HIDDEN)[None, :]
        below, density = _normal(value)
        place = token.to(tl.int64)[:, None] * HIDDEN + e[None, :]
        tl.store(outer + place, (value * below).to(outer.dtype.element_ty), mask=real)
        grad *= below + value * density
        tl.store(gradient + place, grad.to(gradient.dtype.element_ty), mask=real)
        # A tile may end before it is full: what a NaN of the bias makes of nothing must not count.
        grad = tl.where(present[:, None], grad, 0.0)
        x = token % width
        y = tl.where(present, token // width % height, -2)
        for tap in range(9):
            inside = _inside(y, x, height, width, tap // 3, tap % 3)
            neighbour = _tap(active, token, inside, e, width, tap // 3, tap % 3, HIDDEN)
            total = tl.sum(tl.where(inside[:, None], grad * neighbour, 0.0), axis=0)
            totals += tl.where((which == tap)[:, None], total[None, :], 0.0)
        totals += tl.where((which == 9)[:, None], tl.sum(grad, axis=0)[None, :], 0.0)
    place = own[None, :] + which[:, None] * HIDDEN
    tl.store(place, totals, mask=(which < 10)[:, None] & (e < HIDDEN)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _inner_kernel(
    input, weight1, bias1, scale, taps, gradient, inner, sums, tokens, height, width,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gradient before the first activation, and the sums of its bias, of the scale and of the shift."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    bias_total = tl.zeros([BLOCK_E], tl.float32)
    scale_total = tl.zeros([BLOCK_E], tl.float32)
    shift_total = tl.zeros([BLOCK_E], tl.float32)
    first = tl.program_id(0) * TILES * BLOCK_T
    for begin in range(first, tl.minimum(tokens, first + TILES * BLOCK_T), BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        present = token < tokens
        grad = _convolve(gradient, taps, token, present, e, height, width, HIDDEN, True)
        value = _product(input, weight1, token, present, e, CHANNELS, HIDDEN, True, BLOCK_C)
        if BIAS:
            value += _load_vector(bias1, e, HIDDEN)[None, :]
        below, density = _normal(value)
        if AFFINE:
            shift_total += tl.sum(tl.where(present[:, None], grad, 0.0), axis=0)
            scale_total += tl.sum(tl.where(present[:, None], grad * value * below, 0.0), axis=0)
            grad *= _load_vector(scale, e, HIDDEN)[None, :]
        grad *= below + value * density
        pointers = inner + token.to(tl.int64)[:, None] * HIDDEN + e[None, :]
        tl.store(pointers, grad.to(inner.dtype.element_ty), mask=present[:, None] & (e < HIDDEN)[None, :])
        bias_total += tl.sum(tl.where(present[:, None], grad, 0.0), axis=0)
    own = sums + tl.program_id(0).to(tl.int64) * 3 * HIDDEN + e
    tl.store(own, bias_total, mask=e < HIDDEN)
    tl.store(own + HIDDEN, scale_total, mask=e < HIDDEN)
    tl.store(own + 2 * HIDDEN, shift_total, mask=e < HIDDEN)


def leff_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None,
    hidden_shift: Tensor | None,
) -> Tensor:
    """The operator ``tersor::leff_forward`` for float16, bfloat16 and float32."""
    tensors = (input, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale, hidden_shift)
    x, w1, b1, dw, db, w2, b2, scale, shift = _prepare(*tensors)
    batch, height, width, _ = x.shape
    hidden, outputs = w1.shape[0], w2.shape[0]
    output = x.new_empty((batch, height, width, outputs))
    images = max(1, SLAB_BYTES // (height * width * hidden * x.element_size()))
    active = x.new_empty((min(images, batch), height, width, hidden))
    for first in range(0, batch, images):
        part, result = x[first : first + images], output[first : first + images]
        _activate(part, w1, b1, scale, shift, active)
        tokens = part.shape[0] * height * width
        constants = _mix_constants(hidden, outputs, x.element_size(), b2 is not None, db is not None)
        grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(outputs, constants["BLOCK_O"]))
        _launch(_mix_kernel, grid, constants, active, dw, db, w2, b2, result, tokens, height, width)
    return output


def leff_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None,
    hidden_shift: Tensor | None,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """The operator ``tersor::leff_backward`` for float16, bfloat16 and float32; no atomics."""
    parameters = (weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale, hidden_shift)
    x, w1, b1, dw, db, w2, _, scale, shift = _prepare(input, *parameters)
    (batch, height, width, channels), hidden, outputs = x.shape, w1.shape[0], w2.shape[0]
    if grad_output.shape != (batch, height, width, outputs) or grad_output.dtype != x.dtype:
        raise ValueError(
            f"leff: grad_output must be {x.dtype} of shape {(batch, height, width, outputs)}, "
            f"got {grad_output.dtype} of shape {tuple(grad_output.shape)}"
        )
    grad, tokens = grad_output.contiguous(), batch * height * width
    active, outer, gradient = (x.new_empty((tokens, hidden)) for _ in range(3))
    _activate(x, w1, b1, scale, shift, active)
    grid = (triton.cdiv(tokens, TOKENS * SPAN), triton.cdiv(hidden, HIDDEN_CHANNELS))
    outer_sums, inner_sums = (x.new_empty((grid[0], n, hidden), dtype=torch.float32) for n in (10, 3))
    sizes = (tokens, height, width)
    constants = _outer_constants(hidden, outputs, db is not None)
    _launch(_outer_kernel, grid, constants, grad, active, dw, db, w2, outer, gradient, outer_sums, *sizes)
    inner = active  # which has done its service
    constants = _inner_constants(channels, hidden, b1 is not None, scale is not None)
    _launch(_inner_kernel, grid, constants, x, w1, b1, scale, dw, gradient, inner, inner_sums, *sizes)
    grad_input = (inner @ w1).view(x.shape) if need_input else x.new_empty(0)
    if not need_parameters:
        return (grad_input, *(x.new_empty(0) for _ in parameters))
    taps = outer_sums.sum(0).to(x.dtype)
    vectors = inner_sums.sum(0).to(x.dtype)
    rows = grad.view(tokens, outputs)
    gradients = [
        inner.t() @ x.view(tokens, channels),
        vectors[0],
        taps[:9].t().reshape(hidden, 1, 3, 3),
        taps[9],
        rows.t() @ outer,
        rows.sum(0, dtype=torch.float32).to(x.dtype),
        vectors[1],
        vectors[2],
    ]
    wanted = (
        x.new_empty(0) if p is None else g.clone(memory_format=torch.contiguous_format)
        for g, p in zip(gradients, parameters, strict=True)
    )
    return (grad_input, *wanted)


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What the ahead-of-time test compiles: kernel, label, signature, constants and options, as a launch chooses them.

    The signature is in the notation of Triton's own compiler driver: ``"*fp16:16"`` is a pointer to 16 aligned bytes.
    """
    for channels in (32, 256):
        hidden = 4 * channels
        for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
            for kernel, constants in (
                (_activate_kernel, _activate_constants(channels, hidden, True, True)),
                (_mix_kernel, _mix_constants(hidden, channels, itemsize, True, True)),
                (_outer_kernel, _outer_constants(hidden, channels, True)),
                (_inner_kernel, _inner_constants(channels, hidden, True, True)),
            ):
                types = dict.fromkeys(_FLOAT32, "*fp32:16") | dict.fromkeys(_SIZES, "i32")
                signature = {a: types.get(a, f"*{name}:16") for a in kernel.arg_names if a not in constants}
                yield kernel, f"{name} {channels} channels", signature, constants, _options(kernel)


def _prepare(input: Tensor, *parameters: Tensor | None) -> list[Any]:
    """All tensors contiguous, vectors and the taps, as (9, hidden), in float32, which makes even their loads wide.

    What a kernel would answer with a read outside of a tensor is refused.
    """
    w1, b1, dw, db, w2, b2, scale, shift = parameters
    if input.dtype not in DTYPES:
        raise TypeError(f"leff: the Triton kernels take float16, bfloat16 and float32, got {input.dtype}")
    if input.dim() != 4 or w1 is None or w2 is None or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError("leff: input must be (B, H, W, C), weight1 (E, C) and weight2 (C_out, E)")
    hidden, outputs = w1.shape[0], w2.shape[0]
    shapes = [
        (hidden, input.shape[3]), (hidden,), (hidden, 1, 3, 3), (hidden,), (outputs, hidden), (outputs,), (hidden,),
        (hidden,),
    ]  # fmt: skip
    for tensor, shape in zip(parameters, shapes, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != input.dtype):
            raise ValueError(
                f"leff: a parameter must be {input.dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}"
            )
    if dw is None or (scale is None) != (shift is None):
        raise ValueError("leff: depthwise_weight is missing, or one of hidden_scale and hidden_shift")
    taps = torch.empty((9, hidden), dtype=torch.float32, device=input.device).copy_(dw.reshape(hidden, 9).t())
    b1, db, b2, scale, shift = (None if t is None else t.float().contiguous() for t in (b1, db, b2, scale, shift))
    return [input.contiguous(), w1.contiguous(), b1, taps, db, w2.contiguous(), b2, scale, shift]


def _block(channels: int, most: int) -> int:
    """A power of two of at least 16, which the matrix units take."""
    return max(16, min(most, triton.next_power_of_2(channels)))


def _activate_constants(channels: int, hidden: int, bias: bool, affine: bool) -> dict[str, Any]:
    return {
        "CHANNELS": channels, "HIDDEN": hidden, "BIAS": bias, "AFFINE": affine,
        "BLOCK_C": _block(channels, 32), "BLOCK_T": TOKENS, "BLOCK_E": HIDDEN_CHANNELS,
    }  # fmt: skip


def _inner_constants(channels: int, hidden: int, bias: bool, affine: bool) -> dict[str, Any]:
    return _activate_constants(channels, hidden, bias, affine) | {"TILES": SPAN}


def _mix_constants(hidden: int, outputs: int, itemsize: int, bias: bool, tap_bias: bool) -> dict[str, Any]:
    return {
        "HIDDEN": hidden, "OUTPUTS": outputs, "BIAS": bias, "TAP_BIAS": tap_bias,
        "BLOCK_O": _block(outputs, 128 // itemsize), "BLOCK_T": TOKENS, "BLOCK_E": HIDDEN_CHANNELS,
    }  # fmt: skip


def _outer_constants(hidden: int, outputs: int, tap_bias: bool) -> dict[str, Any]:
    return {
        "HIDDEN": hidden, "OUTPUTS": outputs, "TAP_BIAS": tap_bias,
        "BLOCK_C": _block(outputs, 32), "BLOCK_T": TOKENS, "BLOCK_E": HIDDEN_CHANNELS, "TILES": SPAN,
    }  # fmt: skip


def _activate(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, scale: Tensor | None, shift: Tensor | None, active: Tensor
) -> None:
    tokens, hidden = x.shape[0] * x.shape[1] * x.shape[2], weight1.shape[0]
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(hidden, HIDDEN_CHANNELS))
    constants = _activate_constants(x.shape[3], hidden, bias1 is not None, scale is not None)
    _launch(_activate_kernel, grid, constants, x, weight1, bias1, scale, shift, active, tokens)


def _options(kernel: Any) -> dict[str, Any]:
    return OPTIONS if kernel is _activate_kernel else MORE_OPTIONS


def _launch(kernel: Any, grid: tuple[int, int], constants: dict[str, Any], first: Tensor, *arguments: Any) -> None:
    """Launches the kernel; a tensor that is not given is stood in for by the first one, and not read."""
    given = [first if a is None else a for a in arguments]
    if grid[0]:
        with torch.cuda.device_of(first):
            kernel[grid](first, *given, **constants, **_options(kernel))
