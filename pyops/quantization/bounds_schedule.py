"""The published training schedule of bounded activations: record, choose, regularise, then dynamic bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor._checks import as_int
from tersor.quantization.bounded_activation import START, BoundedActivation
from tersor.quantization.layers import QuantizedConv2d, QuantizedLinear


class BoundsSchedule:
    r"""Takes a model with :class:`BoundedActivation` and quantised layers through the stages of DDTB.

    Epochs are counted from 1. In epoch 1 the model runs in eval mode, without a gradient and unquantised, over the
    training data, with :meth:`record` after every batch. At the start of epoch 2 the activations are ranked by
    var(greatest) + var(least) over the batches, and the ``dynamic_ratio`` of them that vary most become dynamic. Until
    ``dynamic_epoch`` their gates are only regularised (:meth:`regularization`); from then on they scale the bounds.

    ::

        schedule = BoundsSchedule(model, dynamic_ratio=0.3)
        schedule.start_epoch(1)
        with torch.no_grad():
            for batch in loader:
                model(batch)
                schedule.record()
        for epoch in range(2, 61):
            schedule.start_epoch(epoch)
            for batch, target in loader:
                loss = F.l1_loss(model(batch), target) + schedule.regularization()

    Args:
        model: an activation that is registered twice counts once.
        dynamic_ratio: share of the activations that become dynamic, rounded down.
        dynamic_epoch: the first epoch with dynamic bounds.

    Raises:
        TypeError, ValueError: ``model`` holds no bounded activation, or an option is not as stated.

    Source: Zhong et al., arXiv 2203.03844.
    """

    def __init__(self, model: nn.Module, dynamic_ratio: float = 0.3, dynamic_epoch: int = 6) -> None:
        name = "BoundsSchedule"
        if not 0 <= dynamic_ratio <= 1:
            raise ValueError(f"{name}: dynamic_ratio must be from 0 to 1, got {dynamic_ratio}")
        self.model, self.dynamic_ratio = model, float(dynamic_ratio)
        self.dynamic_epoch = as_int(name, dynamic_epoch=dynamic_epoch)
        if self.dynamic_epoch < 2:
            raise ValueError(f"{name}: dynamic_epoch must be at least 2, got {dynamic_epoch}")
        modules = list(model.modules())
        self.activations = [m for m in modules if isinstance(m, BoundedActivation)]
        if not self.activations:
            raise ValueError(f"{name}: model must hold a BoundedActivation, got {type(model).__name__} without one")
        self.layers = [m for m in modules if isinstance(m, (QuantizedConv2d, QuantizedLinear))]
        self.epoch = 0
        self._count = 0
        self._mean = self._squares = torch.zeros(len(self.activations), 2, dtype=torch.float64)

    def start_epoch(self, epoch: int) -> None:
        """Sets the stage of every layer, and the model's mode: eval in epoch 1, training later."""
        epoch = as_int("BoundsSchedule.start_epoch", epoch=epoch)
        if epoch < 1:
            raise ValueError(f"BoundsSchedule.start_epoch: epoch must be at least 1, got {epoch}")
        if epoch >= 2 and self.epoch <= 1:
            self._choose_dynamic()
        self.epoch = epoch
        self._set_stage()
        self.model.train(epoch > 1)
        for activation in self.activations:
            if epoch > 1 and activation.calibrate:
                activation.pending = activation.alpha_upper.item() == START

    def _set_stage(self) -> None:
        stage = "record" if self.epoch == 1 else "static" if self.epoch < self.dynamic_epoch else "dynamic"
        for module in (*self.activations, *self.layers):
            module.stage = stage

    def record(self) -> None:
        """Takes the extremes of the last batch into the running variance (Welford's); nothing waits for a GPU."""
        if self.epoch != 1:
            raise RuntimeError(f"BoundsSchedule.record: only in epoch 1, this is epoch {self.epoch}")
        extremes = torch.stack([torch.cat([a.max_val, a.min_val]) for a in self.activations]).double()
        self._mean, self._squares = self._mean.to(extremes.device), self._squares.to(extremes.device)
        self._count += 1
        difference = extremes - self._mean
        self._mean = self._mean + difference / self._count
        self._squares = self._squares + difference * (extremes - self._mean)

    @property
    def intensity(self) -> Tensor:
        """Per activation, var(greatest) + var(least) over the recorded batches (population variance)."""
        return self._squares.sum(1) / max(self._count, 1)

    def _choose_dynamic(self) -> None:
        if not self._count:  # a checkpoint's own choice stays
            return
        count = int(len(self.activations) * self.dynamic_ratio)
        order = torch.argsort(self.intensity, descending=True, stable=True).tolist()
        for rank, i in enumerate(order):
            self.activations[i].dynamic = rank < count

    def regularization(self) -> Tensor:
        """Mean over the dynamic activations of their squared logits' mean in the last pass; 0 in the dynamic stage."""
        logits = [a.logits for a in self.activations if a.dynamic and a.logits is not None]
        if self.epoch >= self.dynamic_epoch or not logits:
            return self.activations[0].alpha_upper.new_zeros(())
        return torch.stack([x.square().mean() for x in logits]).mean()

    def state_dict(self) -> dict[str, Any]:
        """All that the model's own state dict does not hold; plain numbers and tensors."""
        return {
            "epoch": self.epoch,
            "count": self._count,
            "mean": self._mean,
            "squares": self._squares,
            "pending": [a.pending for a in self.activations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken, also in the middle of an epoch; load the model's first."""
        if len(state["pending"]) != len(self.activations):
            raise ValueError(
                f"BoundsSchedule.load_state_dict: state must be of {len(self.activations)} activations, "
                f"got {len(state['pending'])}"
            )
        self.epoch, self._count = int(state["epoch"]), int(state["count"])
        self._mean, self._squares = state["mean"], state["squares"]
        for activation, pending in zip(self.activations, state["pending"], strict=True):
            activation.pending = bool(pending)
        if self.epoch:
            self._set_stage()
            self.model.train(self.epoch > 1)
