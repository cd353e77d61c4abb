"""What a search asks in a network's place: a copy that computes the same, faster. The network itself is the judge."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wideberth.models.transposed import Transposed
from wideberth.modes import lent

_SAME = 1e-3
"""How far the copy's logits may be off, in units of the largest logit: float32 and TF32 stay within it."""
_ALIKE = 0.03
"""The same for bfloat16 within: sound copies are off by up to 0.7 %."""


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode with batch norm folded into its convolutions, channels last; or the model itself.

    About half the time of a small convolutional network goes into batch norm and into reordering channels. A copy
    follows the path that the model's Python code takes, so it is used only where it says the same about `x`.

    Args:
        model: any module; left as it is.
        x: (B, ...) inputs to compare on.

    Returns:
        The copy, its parameters without gradients. The model itself where it has no convolution, cannot be traced
        (control flow that depends on the input, autograd inside), or answers differently from its copy (randomness).
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model
    from torch.fx.experimental.optimization import fuse  # not loaded before it is needed: it takes half a second

    with lent(model), torch.no_grad():
        try:
            copy = fuse(model).to(memory_format=torch.channels_last)
            same = _says(copy, model, x, _SAME)
        except Exception:  # tracing runs the model's own code on stand-ins for tensors: anything may be raised
            return model
    return copy.eval().requires_grad_(False) if same else model


def _says(copy: nn.Module, model: nn.Module, x: Tensor, slack: float) -> bool:
    """Whether both give the same logits, up to `slack` of the largest."""
    logits, again = model(x), copy(x)
    if again.shape != logits.shape:
        return False
    return bool(((again - logits).abs() <= slack * logits.abs().amax().clamp_min(1e-30)).all())


def narrowed(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose layers compute in bfloat16, but for the last, and the first takes the input in two parts.

    A step of bfloat16 at 0.5 is an eighth of 8/255, and logits in bfloat16 have three digits: rounding the input and
    the output would hide what a search looks for. Where such a copy cannot run (layers that do not take bfloat16
    beside float32), or says something else about `x`, autocast does what it can. A model that is not in float32, and
    any on a machine that has no arithmetic of its own for bfloat16, where all this would be slower, is returned as it
    is.

    Args:
        model: as `fused` returns it; left as it is.
        x: (B, ...) inputs to compare on, float32.
    """
    if x.dtype != torch.float32 or not _has_bfloat16(x.device):
        return model
    if isinstance(model, nn.Conv2d | nn.Linear):  # the last layer stays as it is
        return model
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with lent(model), torch.no_grad():
        try:
            copy = deepcopy(model)
            rectified = _take_rectifiers(copy, layers[:-1])
            for name in layers:
                layer, (parent, _, leaf) = copy.get_submodule(name), name.rpartition(".")
                kind = _First if name == layers[0] else _Narrow
                narrow = _Last(layer) if name == layers[-1] else kind(layer, name in rectified)
                setattr(copy.get_submodule(parent), leaf, narrow)
            # Hooks, layers of kinds of their own and groups of channels may make something else of such layers.
            same = _says(copy, model, x, _ALIKE)
        except Exception:  # whatever a network makes of other numbers than its own
            same = False
    return copy.eval().requires_grad_(False) if same else _Autocast(model)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not tell
    return device.type == "cpu" and any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def _convolves_with_relu() -> bool:
    """Whether this CPU runs oneDNN's convolutions in bfloat16 that end in a ReLU: where it does not, they raise."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    needed = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    there = all(hasattr(torch.ops.mkldnn, name) for name in needed)
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _take_rectifiers(model: nn.Module, layers: list[str]) -> set[str]:
    """Take the ReLUs that alone follow one of these convolutions out of a traced model; returns which those are."""
    taken: set[str] = set()
    if not isinstance(model, fx.GraphModule):
        return taken
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    for node in list(model.graph.nodes):
        name = str(node.target)
        if node.op != "call_module" or name not in layers or len(node.users) != 1 or called.count(name) != 1:
            continue
        (follower,) = node.users
        if isinstance(model.get_submodule(name), nn.Conv2d) and _is_rectifier(model, follower):
            follower.replace_all_uses_with(node)
            model.graph.erase_node(follower)
            taken.add(name)
    model.recompile()
    return taken


def _is_rectifier(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    return (node.op == "call_function" and node.target in (F.relu, torch.relu)) or (
        node.op == "call_method" and node.target == "relu"
    )


class _Rectified(torch.autograd.Function):
    """A convolution and its ReLU in one pass through memory (oneDNN's), with the gradient in the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: _Narrow) -> Tensor:
        output = narrow.rectify(x)
        ctx.save_for_backward(x, output)
        ctx.narrow = narrow
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, output = ctx.saved_tensors
        return ctx.narrow.transposed(_passed(gradient, output), x), None


class _Entered(torch.autograd.Function):
    """The same for the first layer, from the input in full precision and back to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: _First) -> Tensor:
        output = first.rectify(first.halves(x))
        ctx.save_for_backward(x, output)
        ctx.first = first
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, output = ctx.saved_tensors
        found: Tensor = ctx.first.back(_passed(gradient, output), x)
        return found.to(x.dtype, memory_format=torch.contiguous_format), None


def _passed(gradient: Tensor, output: Tensor) -> Tensor:
    """The gradient before a ReLU, from that after it and from what the ReLU put out."""
    # That of a mean over pixels has no memory of its own; laid out as the output, it is masked several times as fast.
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    passed: Tensor = torch.ops.aten.threshold_backward(gradient, output, 0)
    return passed


class _Narrow(nn.Module):
    """A layer in bfloat16, with the ReLU that follows it if `rectified`."""

    def __init__(self, layer: nn.Module, rectified: bool = False) -> None:
        super().__init__()
        self.layer, self.rectified = layer.to(torch.bfloat16), rectified
        self.at_once = rectified and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
        self.at_once &= _convolves_with_relu()
        self.packed: Tensor | None = None
        if isinstance(layer, nn.Conv2d):
            self.transposed = Transposed(layer)
            self.settings: tuple[Any, ...] = (
                list(layer.padding),
                list(layer.stride),
                list(layer.dilation),
                layer.groups,
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x.to(torch.bfloat16))

    def answer(self, x: Tensor) -> Tensor:
        """What the layer makes of inputs in bfloat16."""
        if self.at_once and x.device.type == "cpu":
            fused: Tensor = _Rectified.apply(x, self) if torch.is_grad_enabled() else self.rectify(x)
            return fused
        found: Tensor = self.layer(x)
        return F.relu(found) if self.rectified else found

    def rectify(self, x: Tensor) -> Tensor:
        """Convolution and ReLU at once, of inputs in bfloat16 on a CPU."""
        layer: Any = self.layer
        if self.packed is None:  # laid out once as oneDNN wants it, and not again in every call
            size = list(x.shape)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *self.settings, size)
        settings = (*self.settings, "relu", [], "")
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.packed, layer.bias, *settings)
        return output


class _First(_Narrow):
    """The first layer in bfloat16, on twice as many channels: the input rounded, and what rounding took from it."""

    def __init__(self, layer: nn.Module, rectified: bool = False) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        # To one of the two halves: the gradient is the same for both. (`transposed` is for what `back` is not able to.)
        back = Transposed(deepcopy(layer).to(torch.bfloat16), plain=True) if isinstance(layer, nn.Conv2d) else None
        twice = torch.cat([layer.weight, layer.weight], 1)
        if isinstance(layer, nn.Conv2d):
            twice = twice.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(twice, requires_grad=False)
        super().__init__(layer, rectified)
        self.back, self.axis = back, 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, x: Tensor) -> Tensor:
        able = self.at_once and self.back is not None and self.back.able and x.device.type == "cpu"
        if able and torch.is_grad_enabled():
            entered: Tensor = _Entered.apply(x, self)
            return entered
        return self.answer(self.halves(x))

    def halves(self, x: Tensor) -> Tensor:
        """The two parts, side by side along the channels."""
        rounded = x.to(torch.bfloat16)
        return torch.cat([rounded, (x - rounded).detach().to(torch.bfloat16)], self.axis)


class _Last(nn.Module):
    """The last layer as it is, on what the others hand on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dtype = layer, next(layer.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.to(self.dtype))
        return logits


class _Autocast(nn.Module):
    """The model under autocast to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits
