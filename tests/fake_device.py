"""A device for machines that have none: tensors that say they are elsewhere, and compute on the CPU.

What is imitated is where tensors are. An operation on tensors of both devices fails as it does with CUDA (an operand of
no dimensions and an index may be on the CPU), and what makes the host wait is listed in `SYNCHRONISATIONS`. CUDA's own
kernels, generators and memory are not imitated. Once `begin` has been called in a process there is no way back; and no
other process may be forked from it.
"""

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, library
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from attention_guided_rl.distributed import Processes

aten = torch.ops.aten
SET_UP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)  # None: an older PyTorch
SYNCHRONISATIONS: list[str] = []

_BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
_NO_NUMBERS = {aten.cat.default, aten.stack.default}  # of the CPU, not even of no dimensions
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_SYNCHRONISING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._unique2.default}
_FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")  # PyTorch makes these with resize_


class FakeTensor(torch.Tensor):
    """A tensor of the device, around one on the CPU."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "FakeTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device="fake:0"
        )
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})

    def __deepcopy__(self, memo):
        copy = FakeTensor(self.on_cpu.clone())
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def tolist(self) -> Any:
        SYNCHRONISATIONS.append("tolist")
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
    def data(self, other: "FakeTensor") -> None:
        self.on_cpu = other.on_cpu


def begin() -> None:
    """Make the device, and let every run of this process work on it."""
    torch.set_num_threads(1)
    SET_UP("fake")
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    for name, function in {"empty.memory_format": _empty, "empty_strided": _empty, "_copy_from": _copy}.items():
        LIBRARY.impl(name, function, "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        LIBRARY.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    Processes.device = property(lambda self: torch.device("fake:0"), lambda self, value: None)
    for name in ("gather_rows", "sum_"):
        setattr(Processes, name, _refusing_the_cpu(getattr(Processes, name)))


LIBRARY = library.Library("aten", "IMPL")


def _refusing_the_cpu(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what is on the CPU, as NCCL does; one process alone sends nothing, and would not notice."""

    def refuse(processes: Processes, tensors: Any) -> Any:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            raise RuntimeError(f"{collective.__name__}: a tensor on cpu")
        return collective(processes, tensors[0] if collective.__name__ == "gather_rows" else tensors)

    return refuse


def _compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    by_index = operation in _BY_INDEX and isinstance(args[0], FakeTensor)
    indices = [index for index in args[1] if index is not None] if by_index else []
    if operation in _SYNCHRONISING or any(index.dtype == torch.bool for index in indices):
        SYNCHRONISATIONS.append(str(operation))
    if operation not in _BETWEEN_DEVICES:
        for tensor in flat:
            on_cpu = isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)
            refused = on_cpu and (tensor.dim() > 0 or operation in _NO_NUMBERS)
            if refused and not any(tensor is index for index in indices):
                raise RuntimeError(f"{operation}: tensors on cpu {tuple(tensor.shape)} and on fake:0")
    lowered_args, lowered_kwargs = pytree.tree_unflatten([_lowered(leaf) for leaf in flat], spec)
    result = operation(*lowered_args, **lowered_kwargs)
    if operation is aten._to_copy.default:
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cpu":
            SYNCHRONISATIONS.append("to cpu")
            return result
    written = [
        args[n] if n < len(args) else kwargs[argument.name]
        for n, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        if operation is aten.copy_.default:
            _note_transfer(args[1], args[0])
        return written[0] if len(written) == 1 else tuple(written)
    return pytree.tree_map(lambda leaf: FakeTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _lowered(leaf: Any) -> Any:
    if isinstance(leaf, FakeTensor):
        return leaf.on_cpu
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _note_transfer(source: Tensor, target: Tensor) -> None:
    if isinstance(source, FakeTensor) != isinstance(target, FakeTensor):
        SYNCHRONISATIONS.append("to cpu" if isinstance(source, FakeTensor) else "from cpu")


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _note_transfer(source, target)
    _lowered(target).copy_(_lowered(source))
    return target


def _empty(size, stride=None, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return FakeTensor(
        torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype)
    )


def _factory(operation: Any) -> Callable[..., Tensor]:
    def make(*args, device=None, pin_memory=None, **kwargs):
        return FakeTensor(operation(*args, device="cpu", **{k: v for k, v in kwargs.items() if v is not None}))

    return make


def serve(connection: Connection) -> None:
    """Call the functions that are sent, on the device, until the other end is closed."""
    begin()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send(answer)
