"""Signs as bits, from any layout, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor import _backends
from tersor.binary import PackedSigns, pack_signs, unpack_signs

native = _backends._introspection()


def _function(input: Any, shift: Any) -> Tensor:
    """Numbers made of the bits."""
    words = pack_signs(input, shift, 2).words
    return (((words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1).sum(-1)).to(input.dtype)


def _exact(input: Tensor, shift: Tensor) -> Tensor:
    x = (input + shift.view(-1, 1, 1)).permute(0, 2, 3, 1).unflatten(-1, (2, -1))
    positive, nonzero = (x > 0).sum(-1, keepdim=True), ((x > 0) | (x < 0)).sum(-1, keepdim=True)
    return torch.stack([positive, nonzero]).to(input.dtype)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(t.round().div(2).to(device, dtype) for t in (torch.randn(size) * 3, torch.linspace(-3, 3, size[1])))


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("pack_signs",), lambda name, *given: (*_inputs(*given), 2),
        [(3, 4, 2, 5), (2, 4, 3, 7), (1, 2, 1, 1), (2, 34, 9, 17), (1, 126, 6, 6)],
        differentiable=False, autocast=False, alike=False, skips=True, in_forward=True, name="pack_signs",
    )
]  # fmt: skip


def layouts(x: Tensor) -> list[Tensor]:
    return [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], dim=-1)[..., 0],
        torch.cat([x, x], dim=1)[:, x.shape[1] :],
        torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
        x[:, :, :, :1].expand_as(x),
    ]


def packed(x: Tensor, groups: int) -> Tensor:
    """Bit by bit."""
    words = -(-x.shape[1] // groups // 64)
    planes = []
    for plane in (x > 0, (x > 0) | (x < 0)):
        bits = torch.zeros(x.shape[0], *x.shape[2:], groups, words * 64, dtype=torch.bool)
        bits[..., : x.shape[1] // groups] = plane.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)).cpu()
        ints = [sum(1 << i for i, b in enumerate(row) if b) for row in bits.view(-1, 64).tolist()]
        signed = [i - (1 << 64) if i >> 63 else i for i in ints]
        planes.append(torch.tensor(signed, dtype=torch.int64).view(*bits.shape[:-1], words))
    return torch.stack(planes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 16, 63, 64, 65, 200])
def test_every_layout(channels: int, dtype: torch.dtype, run: tuple[str, str]) -> None:
    if run == ("cpu", "triton") and (dtype == torch.bfloat16 or channels in (63, 200)):
        pytest.skip("the interpreter is wrong for bfloat16, and slow")
    x = torch.randn(2, channels, 3, 19).mul(2).round().to(run[0], dtype)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    shift = torch.randn(channels).round().to(run[0], dtype)
    for each in layouts(x):
        for add in (None, shift):
            expected = packed(each if add is None else each + add.view(-1, 1, 1), 1)
            assert torch.equal(pack_signs(each, add).words.cpu(), expected)
    assert torch.equal(unpack_signs(pack_signs(x), dtype), torch.sign(x))


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 5), st.integers(0, 40)),
    groups=st.integers(1, 3),
    last=st.booleans(),
    level=st.sampled_from(native.cpu_isa_supported() if native else ["none"]),
)
def test_any_shape_at_every_level(sizes: tuple[int, ...], groups: int, last: bool, level: str) -> None:
    batch, channels, height, width = sizes
    x = torch.randn(batch, channels * groups, height, width).round()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    before = native.cpu_isa() if native else "none"
    try:
        if native:
            native.set_cpu_isa(level)
        signs = pack_signs(x, groups=groups)
        assert torch.equal(signs.words, packed(x, groups))
        assert torch.equal(unpack_signs(signs, channels_last=last), torch.sign(x))
    finally:
        if native:
            native.set_cpu_isa(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: pack_signs(x[0]), ValueError, r"input must be \(N, C, H, W\)"),
        (lambda x: pack_signs(x[:, :0]), ValueError, "C of at least 1"),
        (lambda x: pack_signs(x, groups=4), ValueError, r"groups must divide the channels \(6\), got 4"),
        (lambda x: pack_signs(x, groups=1.0), TypeError, "groups must be an int, got float"),
        (lambda x: pack_signs(x, torch.zeros(5)), ValueError, r"shift must be torch.float32 of shape \(6,\)"),
        (lambda x: pack_signs(x, torch.zeros(6).half()), ValueError, "got torch.float16"),
        (lambda x: pack_signs(x.long()), TypeError, "input must be float16"),
        (lambda x: unpack_signs(x), TypeError, "signs must be PackedSigns, got Tensor"),
        (lambda x: unpack_signs(PackedSigns(x, 6)), TypeError, "words of signs must be a tensor of int64"),
        (lambda x: unpack_signs(pack_signs(x)._replace(channels=70)), ValueError, "for C = 70"),
        (lambda x: unpack_signs(pack_signs(x), torch.int8), TypeError, "dtype must be float16"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 6, 3, 4))


def test_it_has_no_derivative() -> None:
    result = torch.ops.tersor.pack_signs(torch.randn(1, 3, 2, 2, requires_grad=True), None, 1)
    assert not result.requires_grad, "bits carry no gradient"
