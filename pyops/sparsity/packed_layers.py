"""Layers with packed N:M weights, for inference, and the conversion of a trained model to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor._checks import check_window
from tersor.sparsity.layers import NMConv2d, NMLinear, NMScores, SrSte
from tersor.sparsity.nm_matmul import ACTIVATIONS, check_activation, nm_matmul
from tersor.sparsity.nm_pack import check_index, nm_pack
from tersor.sparsity.nm_packed_conv2d import nm_packed_conv2d
from tersor.sparsity.nm_pattern import check_pattern
from tersor.sparsity.nm_unpack import nm_unpack
from tersor.sparsity.semi_structured import pack_semi_structured


class _Packed(nn.Module):
    """Values, index and bias of a layer; all that there is is in the state dict."""

    values: Tensor
    index: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, n: int | None, m: int | None, activation: str) -> None:
        super().__init__()
        name = type(self).__name__
        if n is None or m is None:
            n, m = _pattern(layer) or (n, m)
        if n is None or m is None:
            raise ValueError(f"{name}: n and m must be given for a {type(layer).__name__}")
        self.n, self.m = check_pattern(name, n, m, scored=False)
        self.activation = check_activation(name, activation)
        with torch.no_grad():
            weight = layer.sparse_weight() if isinstance(layer, (NMLinear, NMConv2d)) else layer.weight
            values, index = nm_pack(weight, None, self.n, self.m)
        self.register_buffer("values", values)
        self.register_buffer("index", index)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.eval()

    def train(self, mode: bool = True) -> _Packed:
        """Stays in eval mode: there is nothing to train."""
        return super().train(False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        index = state_dict.get(prefix + "index")
        if isinstance(index, Tensor) and index.dtype == torch.uint8 and index.shape == self.index.shape:
            try:
                check_index(prefix + "index", index, self.values.shape[1], self.n, self.m)
            except ValueError as error:
                args[-1].append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        end = "" if self.activation == "none" else f", activation={self.activation!r}"
        return f"{self.n}:{self.m}, bias={self.bias is not None}{end}"


class PackedNMLinear(_Packed):
    """A linear layer with a packed N:M weight, see :func:`nm_pack` and :func:`nm_matmul`; for inference.

    Args:
        layer: an :class:`NMLinear` with one combination left per group (after :meth:`NMSchedule.finish`), or any
            ``torch.nn.Linear`` of which at most n in every m weights of a row are not zero.
        n, m: of the pattern; by default the layer's.
        activation: that follows, see :func:`nm_matmul`.

    Shape:
        as ``torch.nn.Linear``.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """

    def __init__(self, layer: nn.Linear, n: int | None = None, m: int | None = None, activation: str = "none") -> None:
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"PackedNMLinear: layer must be a torch.nn.Linear, got {type(layer).__name__}")
        super().__init__(layer, n, m, activation)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.values.dtype == torch.float64:  # which the kernels do not take
            return ACTIVATIONS[self.activation](F.linear(input, self.dense_weight(), self.bias))
        return nm_matmul(input, self.values, self.index, self.n, self.m, self.bias, self.activation)

    def dense_weight(self) -> Tensor:
        """``(O, I)``, with the zeros."""
        return nm_unpack(self.values, self.index, self.n, self.m)

    def to_torch_semi_structured(self) -> Tensor:
        """The weight as torch's own 2:4 sparse tensor (``SparseSemiStructuredTensorCUTLASS``).

        Takes 2:4 and 1:4, 1:8, 1:12, 1:16, which are 2:4 as well. Its products need a GPU.

        Raises:
            TypeError, ValueError: the pattern is another, or the sizes or dtype are not those of
                :func:`pack_semi_structured`.
        """
        if (self.n, self.m) != (2, 4) and (self.n != 1 or self.m % 4):
            raise ValueError(
                f"to_torch_semi_structured: the pattern must be 2:4, or 1:m with m a multiple of 4, "
                f"got {self.n}:{self.m}"
            )
        if self.values.dtype == torch.float32:
            raise TypeError("to_torch_semi_structured: values must be float16 or bfloat16, got torch.float32")
        packed, metadata = pack_semi_structured(self.dense_weight())
        return torch.sparse.SparseSemiStructuredTensorCUTLASS(
            torch.Size((self.out_features, self.in_features)),
            packed=packed,
            meta=metadata,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"


class PackedNMConv2d(_Packed):
    """A convolution with a packed N:M weight, see :func:`nm_packed_conv2d`; for inference.

    Args:
        layer: an :class:`NMConv2d`, or any ``torch.nn.Conv2d`` of which at most n in every m consecutive input
            channels are not zero; m divides its input channels per group, and it pads with zeros, as much on either
            side.
        n, m, activation: as for :class:`PackedNMLinear`.

    Shape:
        as ``torch.nn.Conv2d``, for batches.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """

    def __init__(self, layer: nn.Conv2d, n: int | None = None, m: int | None = None, activation: str = "none") -> None:
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"PackedNMConv2d: layer must be a torch.nn.Conv2d, got {type(layer).__name__}")
        if layer.padding_mode != "zeros":
            raise ValueError(f"PackedNMConv2d: layer must pad with zeros, got padding_mode {layer.padding_mode!r}")
        super().__init__(layer, n, m, activation)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.groups = layer.kernel_size, layer.groups
        border = layer._reversed_padding_repeated_twice  # right and left, bottom and top
        if border[0] != border[1] or border[2] != border[3]:
            raise ValueError(f"PackedNMConv2d: layer must pad as much on either side, got {layer.padding!r}")
        amounts = border[::-2] if isinstance(layer.padding, str) else layer.padding
        self.stride, self.padding, self.dilation = check_window("PackedNMConv2d", layer.stride, amounts, layer.dilation)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.values.dtype == torch.float64:
            window = (self.stride, self.padding, self.dilation, self.groups)
            return ACTIVATIONS[self.activation](F.conv2d(input, self.dense_weight(), self.bias, *window))
        return nm_packed_conv2d(
            input,
            self.values,
            self.index,
            self.n,
            self.m,
            self.kernel_size,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.activation,
        )

    @torch.no_grad()
    def fold_(self, norm: nn.BatchNorm2d, relu: bool = False) -> None:
        """Takes the norm that follows, with its running statistics, and on request a ReLU after that, into the layer.

        Raises:
            ValueError: the norm has another number of channels or no running statistics, or an activation is there.
        """
        name = "PackedNMConv2d.fold_"
        if norm.num_features != self.out_channels or norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"{name}: norm must have {self.out_channels} channels and running statistics, got {norm.num_features}"
            )
        if self.activation != "none":
            raise ValueError(f"{name}: the layer must have no activation yet, got {self.activation!r}")
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() if self.bias is None else self.bias.double() - norm.running_mean.double()
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
        self.values = (self.values.double() * scale[:, None, None]).to(self.values.dtype)
        self.bias = shift.to(self.values.dtype)
        self.activation = "relu" if relu else "none"

    def dense_weight(self) -> Tensor:
        """``(O, I, KH, KW)``, with the zeros."""
        return nm_unpack(self.values, self.index, self.n, self.m, self.kernel_size)

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={tuple(self.stride)}, padding={tuple(self.padding)}"
        return f"{self.in_channels}, {self.out_channels}, {window}, groups={self.groups}, {super().extra_repr()}"


def convert_(model: nn.Module, fold_norms: bool = False) -> nn.Module:
    """Replaces the N:M layers of a trained model, in place, by packed ones for inference.

    These are the :class:`NMLinear` and :class:`NMConv2d` layers, after :meth:`NMSchedule.finish`, and linear layers
    and convolutions with the parametrization :class:`SrSte` or :class:`NMScores`. A convolution whose groups straddle
    kernel positions cannot be packed (m does not divide its input channels), nor one that pads otherwise than with as
    many zeros on either side: it becomes a ``torch.nn.Conv2d`` with the zeros in its weight, and so does such a linear
    layer.

    To load a converted model's state dict, convert a model of the same architecture in the same way and load it there.

    Args:
        model: trained.
        fold_norms: multiply a ``torch.nn.BatchNorm2d`` with running statistics into the packed convolution before it,
            which then also computes the ReLU that may follow. Which ones belong together is known of neighbours in a
            ``torch.nn.Sequential``, and of modules with a method ``norm_pairs()``, which yields the names of a
            convolution and of the norm that alone sees its output, and whether a ReLU comes next. The module's forward
            pass must then leave out the ReLU where the convolution has ``activation == "relu"``.

    Returns:
        ``model``; or its replacement, if it is an N:M layer itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no N:M layer, or one has groups with more than n weights; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_: model must be a torch.nn.Module, got {type(model).__name__}")
    replacements: dict[int, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and _pattern(layer):
            try:
                replacements[id(layer)] = _converted(layer)
            except (TypeError, ValueError) as error:
                raise ValueError(f"convert_: {name or type(layer).__name__}: {error}") from error
    if not replacements:
        raise ValueError(f"convert_: model must hold an N:M layer, got {type(model).__name__} without one")
    if fold_norms:
        for layer, norm, relu in list(norm_pairs(model)):
            packed = replacements.get(id(layer))
            if isinstance(packed, PackedNMConv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                packed.fold_(norm, relu is not None)
                replacements |= {id(gone): nn.Identity() for gone in (norm, relu) if isinstance(gone, nn.Module)}
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if id(module) in replacements:
                parent._modules[child] = replacements[id(module)]
    return replacements.get(id(model), model)


def norm_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module | bool | None]]:
    """Each convolution with its norm, and the ReLU after that: a module, True for one in a forward pass, or None."""
    for module in model.modules():
        yield from own_norm_pairs(module)


def own_norm_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module | bool | None]]:
    """:func:`norm_pairs` that the module itself knows of."""
    if callable(pairs := getattr(module, "norm_pairs", None)):
        for layer, norm, relu in pairs():
            yield module.get_submodule(layer), module.get_submodule(norm), relu or None
    if type(module).forward is nn.Sequential.forward:
        children: list[nn.Module | None] = [*module._modules.values(), None]
        for layer, norm, after in zip(children, children[1:], [*children[2:], None], strict=False):
            if layer is not None and norm is not None:
                yield layer, norm, after if isinstance(after, nn.ReLU) else None


def _pattern(layer: nn.Module) -> tuple[int, int] | None:
    """n and m of a layer that has them."""
    if isinstance(layer, (NMLinear, NMConv2d)):
        return layer.n, layer.m
    if parametrize.is_parametrized(layer, "weight"):
        last = list(layer.parametrizations["weight"])[-1]  # type: ignore[index]
        return (last.n, last.m) if isinstance(last, (SrSte, NMScores)) else None
    return None


def _converted(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    pattern = _pattern(layer)
    assert pattern is not None
    if isinstance(layer, nn.Linear):
        if layer.in_features % pattern[1] == 0:
            return PackedNMLinear(layer)
        return _dense(layer, nn.Linear, layer.in_features, layer.out_features)
    border = layer._reversed_padding_repeated_twice
    even = layer.padding_mode == "zeros" and border[0] == border[1] and border[2] == border[3]
    if even and layer.in_channels // layer.groups % pattern[1] == 0:
        return PackedNMConv2d(layer)
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    sizes = (layer.in_channels, layer.out_channels, *window)
    return _dense(layer, nn.Conv2d, *sizes, padding_mode=layer.padding_mode)


def _dense(layer: Any, make: Callable[..., Any], *sizes: Any, **options: Any) -> nn.Module:
    """A plain layer with the zeros in its weight."""
    with torch.no_grad():
        weight = layer.sparse_weight() if isinstance(layer, (NMLinear, NMConv2d)) else layer.weight
        dense = make(*sizes, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype, **options)
        dense.weight.copy_(weight)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.requires_grad_(False).eval()
