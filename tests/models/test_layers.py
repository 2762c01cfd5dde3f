"""Linear layers in one call: the same numbers as torch's own, and whoever watches a layer still sees it; hardtanh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import NMLinear
from tersor.models import layers
from tersor.models.layers import Hardtanh, Mlp, apply_linear, hardtanh

INPUTS = {
    "tokens": lambda: torch.randn(2, 5, 33),
    "vector": lambda: torch.randn(33),
    "rows with gaps": lambda: torch.randn(2, 5, 40)[..., :33],
    "transposed": lambda: torch.randn(5, 2, 33).transpose(0, 1),
    "map": lambda: torch.randn(2, 3, 4, 33),
    "expanded": lambda: torch.randn(2, 33).expand(4, 2, 33),
    "channels first": lambda: torch.randn(2, 33, 5).transpose(1, 2),
    "empty": lambda: torch.randn(0, 33),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_is_torchs_own(mode: Any, name: str, bias: bool) -> None:
    layer, x = nn.Linear(33, 17, bias=bias), INPUTS[name]()
    for outputs in (None, slice(5), slice(5, None)):
        plain = layer(x)[..., outputs] if outputs else layer(x)
        turned = torch.randn(plain.shape[::-1]).permute(*range(plain.dim())[::-1])
        for residual in (None, torch.randn(plain.shape), turned):
            for gelu in (False, True):
                expected = F.gelu(plain) if gelu else plain
                expected = expected if residual is None else expected + residual
                with mode():
                    given = apply_linear(layer, x, gelu, residual, outputs)
                assert given.requires_grad == (mode is torch.enable_grad)
                torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5, check_stride=False)


def test_the_one_call_is_taken_and_only_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    decide = layers._is_one_call
    monkeypatch.setattr(layers, "_is_one_call", lambda *given: calls.append(decide(*given)) or calls[-1])
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    seen: list[Tensor] = []

    with torch.no_grad():
        apply_linear(layer, x)
        assert calls == [torch.backends.mkldnn.is_available()]
        for other in (lambda: apply_linear(layer.double(), x.double()), lambda: apply_linear(layer.float(), x[:0])):
            calls.clear()
            other()
            assert calls == [False]
        calls.clear()
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        apply_linear(layer, x, outputs=slice(2))
        handle.remove()
        sparse = NMLinear(8, 4, n=2, m=4)
        torch.testing.assert_close(apply_linear(sparse, x, outputs=slice(2)), sparse(x)[:, :2])
        assert calls == []
        with torch.autocast("cpu", torch.bfloat16):
            assert apply_linear(layer, x).dtype == torch.bfloat16
    assert len(seen) == 1
    calls.clear()
    apply_linear(layer, x)
    assert calls == [False]
    calls.clear()
    doubled = torch.func.vmap(lambda t: apply_linear(layer, t))(torch.stack([x, x]))
    with torch.no_grad():
        again = torch.func.vmap(lambda t: apply_linear(layer, t))(torch.stack([x, x]))
    torch.testing.assert_close(doubled, again)
    assert not any(calls)


def test_an_input_that_does_not_fit_is_torchs_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        apply_linear(nn.Linear(8, 4), torch.randn(3, 7))


def test_another_activation_is_kept() -> None:
    mlp, x = Mlp(6, 12), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
        torch.testing.assert_close(mlp(x, x), x + mlp.fc2(F.gelu(mlp.fc1(x))))
        for act in (nn.ReLU(), nn.GELU(approximate="tanh")):
            mlp.act = act
            torch.testing.assert_close(mlp(x), mlp.fc2(act(mlp.fc1(x))))


def test_hardtanh_is_torchs() -> None:
    x = torch.tensor([-torch.inf, -1.5, -1.0, -0.5, -0.0, 0.99, 1.0, 1.01, torch.inf, torch.nan], requires_grad=True)
    gradient = torch.randn(10)
    for function in (hardtanh, Hardtanh(), torch.func.vmap(hardtanh)):
        torch.testing.assert_close(function(x), F.hardtanh(x), rtol=0, atol=0, equal_nan=True)
        (ours,), (theirs,) = (torch.autograd.grad(f(x), x, gradient) for f in (function, F.hardtanh))
        assert torch.equal(ours[:9], theirs[:9])
        assert ours.count_nonzero() == 3 + ours[9].count_nonzero()
    with torch.no_grad():
        assert torch.equal(hardtanh(x[:9]), F.hardtanh(x[:9]))
    y = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hardtanh, y)
    assert torch.autograd.gradgradcheck(hardtanh, y)
    module = Hardtanh()
    assert (module.min_val, module.max_val) == (-1, 1), "as packing of binary layers looks for it"


def test_compiles_as_one_graph() -> None:
    mlp, x = Mlp(6, 12), torch.randn(4, 6)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x))
    torch.testing.assert_close(compiled(x), mlp(x))
