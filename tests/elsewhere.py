"""A second device, pretended: its tensors compute on the CPU, and refuse what CUDA refuses.

Where an operation mixes tensors of two devices, draws for one from the generator of the other, or hands a tensor of the
GPU to numpy, PyTorch says so only on a machine with a GPU. Inside ``elsewhere()`` it says so on every machine: tensors
of the device ``meta`` then hold numbers. What makes a GPU fast (its kernels, bf16, compilation) is not pretended.
"""
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
LOOKUPS = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
FILLS = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class Elsewhere(torch.Tensor):
    """A tensor of the other device; ``held``, on the CPU, has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        at = held.shape, held.stride(), held.storage_offset()
        new = torch.Tensor._make_wrapper_subclass(cls, *at, dtype=held.dtype, device="meta")
        new.held = held
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"Elsewhere({self.held})"


class Operations(TorchDispatchMode):
    """Also those without a tensor among their arguments: ``torch.zeros(3, device="meta")``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """Tensors of Python numbers are made on the CPU and then moved: made on ``meta`` they would lose them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **(kwargs | {"device": None})).to(kwargs["device"])
        return func(*args, **kwargs)


def run(func, args, kwargs):
    """The operation, on the CPU, if CUDA would do it; what comes out is where CUDA would have it."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    check(func, args, tensors)
    if func is aten.copy_.default:
        away = isinstance(args[0], Elsewhere)
    elif (device := kwargs.get("device")) is not None:
        away, kwargs = torch.device(device).type == "meta", kwargs | {"device": torch.device("cpu")}
    else:
        away = any(isinstance(t, Elsewhere) for t in tensors)
    if away and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU draws for another device")
    held_args, held_kwargs = tree_map_only(Elsewhere, lambda t: t.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Elsewhere, out)) if away else out


def check(func, args, tensors):
    """Raise where CUDA raises."""
    here = [t for t in tensors if not isinstance(t, Elsewhere)]
    if any(t.is_meta for t in here):
        raise AssertionError(f"{func}: a tensor was made past the pretence, and has no numbers")
    if len(here) == len(tensors) or func in MOVES:
        return
    if func in LOOKUPS and isinstance(args[0], Elsewhere):
        here = [t for t in here if not any(t is index for index in args[1])]  # indices may come from the CPU
    if torch.Tag.pointwise in func.tags or func in LOOKUPS | FILLS:
        here = [t for t in here if t.ndim]  # and so may a single number
    if here:
        raise RuntimeError(f"{func}: tensors of two devices, {[tuple(t.shape) for t in here]} on the CPU")


@contextmanager
def elsewhere():
    """Inside, ``meta`` is a device like CUDA; its random numbers are those of the CPU."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a network that moves gets new tensors
    try:
        with (
            mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()),
            mock.patch("torch.optim.adam._device_dtype_check_for_fused"),
            Operations(),
            Numbers(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
