"""Convolution and batch norm whose mixed second derivatives cost what they must.

The gradient of a hyperparameter step differentiates a gradient in the weights once more, in the images.
Torch can do so for any network, but its second derivatives of these two operations, of which networks are
made, are compositions of many passes over memory (batch norm), take in what nobody asked for (the weights'
second derivatives), or are convolutions of unusual shapes. Here they are written out with the operations
that torch uses for first derivatives. Values and first derivatives are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_aten: Any = torch.ops.aten


class MixedDerivatives(TorchFunctionMode):
    """Within this context 2-D convolutions and batch norm in training mode are those of this module.

    What is computed so may be differentiated in two ways, one after the other: first in everything, with
    `create_graph`; then that in the images, without. In the second the weights count as constants.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return _conv2d(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4:
        with torch._C.DisableTorchFunction():
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    output: Tensor = _Convolution.apply(input, weight, geometry)
    return output if bias is None else output + bias[:, None, None]


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], mask: list[bool]
) -> list[Tensor]:
    return _aten.convolution_backward(grad, x, weight, None, *geometry, [*mask, False])


class _Convolution(Function):
    """y = conv(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _aten.convolution(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_input, to_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _ConvolutionBackward.apply(grad, x, weight, ctx.geometry, to_input, to_weight)
            return *grads, None
        # The second time: what is asked for lies before the first convolution.
        return _conv_backward(grad, x, weight, ctx.geometry, [to_input, False])[0], None, None


class _ConvolutionBackward(Function):
    """(grad_x, grad_w) of grad_y; linear in grad_y and w, and in grad_y and x."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: tuple[Any, ...],
        to_input: bool,
        to_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        grad_x, grad_weight, _ = _conv_backward(grad, x, weight, geometry, [to_input, to_weight])
        return grad_x, grad_weight

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad, x, weight = ctx.saved_tensors
        to_grad = to_x = None
        if u is not None:
            to_grad = _aten.convolution(u, weight, None, *ctx.geometry)
        if v is not None:
            along_v = _aten.convolution(x, v, None, *ctx.geometry)
            to_grad = along_v if to_grad is None else to_grad.add_(along_v)
            if ctx.needs_input_grad[1]:
                to_x = _conv_backward(grad, x, v, ctx.geometry, [True, False])[0]
        return to_grad, to_x, None, None, None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or weight is None or bias is None:
        with torch._C.DisableTorchFunction():
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)


class _BatchNorm(Function):
    """y = w n + b, n = (x - mean) r, r = 1 / sqrt(variance + eps); mean and variance are the batch's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = _aten.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, r = ctx.saved_tensors
        grads = _BatchNormBackward.apply(grad, x, weight, mean, r, ctx.eps)
        return *grads, None, None, None, None


class _BatchNormBackward(Function):
    """(grad_x, grad_w, grad_b) of grad_y = g: w r (g - m(g) - n m(g n)), sum(g n), sum(g); m: batch mean."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _bn_backward(grad, x, weight, mean, r, eps)
        ctx.save_for_backward(grad, x, weight, mean, r, *grads[1:])
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, in g and x, of s = <u, grad_x> + <a, grad_w> + <b, grad_b>.

        With p = -w r m(g n) and q = a - w r m(u n), c = p u + q g is the gradient of s in n. In x it is,
        with the two paths through the batch's mean and variance,
            r (c - m(c) - n m(c n)) - w r^2 n (m(u g) - m(u) m(g) - m(u n) m(g n)),
        and in g it is w r (u - m(u) - n m(u n)) + a n + b: batch norm's own gradient at u, and an affine
        map of n. Both are sums of u, g and x with a coefficient for each channel.
        """
        g, x, w, mean, r, sum_gn, sum_g = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        zero = torch.zeros_like(w)
        a = zero if a is None else a
        b = zero if b is None else b
        mean_g, mean_gn = sum_g / count, sum_gn / count
        mean_u = mean_un = mean_ug = zero
        to_g = None
        if u is not None:
            to_g, sum_un, sum_u = _bn_backward(u, x, w, mean, r, ctx.eps)
            mean_u, mean_un = sum_u / count, sum_un / count
            mean_ug = (u * g).mean([dim for dim in range(x.dim()) if dim != 1])
        p, q = -w * r * mean_gn, a - w * r * mean_un
        mean_c, mean_cn = p * mean_u + q * mean_g, p * mean_un + q * mean_gn
        covariance = mean_ug - mean_u * mean_g - mean_un * mean_gn
        n_of_x = r * (-mean_cn - w * r * covariance)
        to_x = _wide(r * q, x) * g + _affine(x, n_of_x * r, -r * mean_c - n_of_x * mean * r)
        if u is not None:
            to_x.addcmul_(_wide(r * p, x), u)
        along_n = _affine(x, a * r, b - a * r * mean)
        to_g = along_n if to_g is None else to_g.add_(along_n)
        return to_g, to_x, None, None, None, None


def _bn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, r, True, eps, [True, True, True]
    )


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(_wide(shift, x), x, _wide(scale, x))


def _wide(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))
