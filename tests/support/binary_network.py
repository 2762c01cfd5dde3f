"""What the parity checks of the binary networks share: arrays of a file, and a network's training step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

Arrays = Mapping[str, np.ndarray]


def tensor_of(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    return torch.from_numpy(array.copy()).to(device, dtype)


def arrays_error(ours: Tensor, expected: np.ndarray) -> float:
    """max|ours - expected| / max(1, max|expected|)."""
    assert tuple(ours.shape) == expected.shape, f"shape {tuple(ours.shape)} instead of {expected.shape}"
    difference = np.abs(ours.detach().cpu().double().numpy() - expected.astype(np.float64))
    return float(difference.max() / max(1.0, np.abs(expected).max())) if expected.size else 0.0


def load_arrays(model: nn.Module, arrays: Arrays, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with the file's ``param_`` arrays, all of which are in its state dict."""
    model = model.to(device, dtype)
    state = {
        n.removeprefix("param_").replace("__", "."): tensor_of(array, dtype, device)
        for n, array in arrays.items()
        if n.startswith("param_")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.endswith(("num_batches_tracked", "tau", "running_mean", "running_var")) for n in missing), missing
    return model


def step_of(model: nn.Module, arrays: Arrays, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs and gradients in training, the state after it, and the output in evaluation that follows."""
    x = tensor_of(arrays["in_x"], dtype, device).requires_grad_()
    output = model.train()(x)
    output.backward(tensor_of(arrays["in_gout"], dtype, device))
    values = {"out_y": output, "out_y_train": output, "grad_x": x.grad}
    values |= {f"grad_{_stored(n)}": p.grad for n, p in model.named_parameters()}
    values |= {f"state_after_{_stored(n)}": t for n, t in model.state_dict().items()}
    with torch.no_grad():
        values["out_y_eval_after"] = model.eval()(x)
    return {n: value for n, value in values.items() if n in arrays}


def _stored(name: str) -> str:
    return name.replace(".", "__")
