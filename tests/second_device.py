"""A second device, for machines that have none: tensors that say they are elsewhere, and compute on the CPU.

What matters is where tensors are. An operation on tensors of both devices fails as it does with a GPU (only numbers
and indices may come from the CPU), and what makes the CPU wait for the device is listed in `WAITS`. Once `begin` has
been called in a process there is no way back; and no other process may be forked from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from attention_guided_rl.distributed import Processes

aten = torch.ops.aten
WAITS: list[str] = []

_BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_SIZE_FROM_DATA = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._unique2.default}
_FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")  # made by resizing, elsewhere


class SecondTensor(torch.Tensor):
    """A tensor of the second device, around one on the CPU."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "SecondTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device="second:0"
        )
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})

    def __deepcopy__(self, memo):
        copy = SecondTensor(self.on_cpu.clone())
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def tolist(self) -> Any:
        WAITS.append("tolist")
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def storage(self) -> Any:
        return self.on_cpu.storage()

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "SecondTensor") -> None:
        self.on_cpu = other.on_cpu


def begin() -> None:
    """Make the second device, and let every process of a run work on it."""
    _setup_privateuseone_for_python_backend("second")
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    for name, function in {"empty.memory_format": _empty, "empty_strided": _empty, "_copy_from": _copy}.items():
        LIBRARY.impl(name, function, "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        LIBRARY.impl(name, _made_at_once(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    Processes.device = property(lambda self: torch.device("second:0"), lambda self, value: None)
    for name in ("gather_rows", "sum_"):
        setattr(Processes, name, _only_from_there(getattr(Processes, name)))


LIBRARY = torch.library.Library("aten", "IMPL")


def _only_from_there(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what is on the CPU, as NCCL does; one process alone sends nothing, and would not notice."""

    def refuse(processes: Processes, tensors: Any) -> Any:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not all(isinstance(tensor, SecondTensor) for tensor in tensors):
            raise RuntimeError(f"{collective.__name__}: a tensor on cpu")
        return collective(processes, tensors[0] if collective.__name__ == "gather_rows" else tensors)

    return refuse


def _compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    by_index = operation in _BY_INDEX and isinstance(args[0], SecondTensor)
    indices = [index for index in args[1] if index is not None] if by_index else []
    if operation in _SIZE_FROM_DATA or any(index.dtype == torch.bool for index in indices):
        WAITS.append(str(operation))
    if operation not in _BETWEEN_DEVICES:
        for tensor in flat:
            elsewhere = isinstance(tensor, Tensor) and not isinstance(tensor, SecondTensor) and tensor.dim() > 0
            if elsewhere and not any(tensor is index for index in indices):
                raise RuntimeError(f"{operation}: tensors on cpu and on second:0, {tuple(tensor.shape)} on cpu")
    lowered_args, lowered_kwargs = pytree.tree_unflatten([_lowered(leaf) for leaf in flat], spec)
    result = operation(*lowered_args, **lowered_kwargs)
    if operation is aten._to_copy.default:
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cpu":
            WAITS.append("to cpu")
            return result
    written = [
        args[n] if n < len(args) else kwargs[argument.name]
        for n, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        if operation is aten.copy_.default:
            _wait_for_copy(args[1], args[0])
        return written[0] if len(written) == 1 else tuple(written)
    return pytree.tree_map(lambda leaf: SecondTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _lowered(leaf: Any) -> Any:
    if isinstance(leaf, SecondTensor):
        return leaf.on_cpu
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _wait_for_copy(source: Tensor, target: Tensor) -> None:
    if isinstance(source, SecondTensor) != isinstance(target, SecondTensor):
        WAITS.append("to cpu" if isinstance(source, SecondTensor) else "from cpu")


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _wait_for_copy(source, target)
    _lowered(target).copy_(_lowered(source))
    return target


def _empty(size, stride=None, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return SecondTensor(
        torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype)
    )


def _made_at_once(operation: Any) -> Callable[..., Tensor]:
    def make(*args, device=None, pin_memory=None, **kwargs):
        return SecondTensor(operation(*args, device="cpu", **{k: v for k, v in kwargs.items() if v is not None}))

    return make
