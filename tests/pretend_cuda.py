"""A pretended CUDA device on a build for CPUs.

Under `FakeCuda` a tensor whose storage was sent to `cuda` says that it is there, and so does what
is computed from it. Mixing the two devices raises MixedDevicesError, as CUDA would raise. `where`
has the devices of each operation, and `peak` the largest number of bytes on the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ABOUT_A_TENSOR = {
    "untyped_storage",
    "storage",
    "data_ptr",
    "dim",
    "size",
    "numel",
    "stride",
    "element_size",
    "is_contiguous",
    "storage_offset",
    "requires_grad_",
    "is_floating_point",
    "is_complex",
    "_has_compatible_shallow_copy_type",
    "__len__",
    "__hash__",
    "__repr__",
}
MAY_MIX = {"copy_", "__getitem__", "__setitem__", "__set__", "type_as", "set_"}
"""Operations that may have tensors of both devices."""


class MixedDevicesError(RuntimeError):
    """An operation had tensors of both devices."""


class FakeCuda(TorchFunctionMode):
    """Pretends the device `cuda:0` for all operations of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, StorageWeakRef] = {}
        self.bytes: dict[int, int] = {}
        self.peak = 0
        self.where: defaultdict[str, set[str]] = defaultdict(set)
        self.pinned: list[int] = []
        """Sizes of the pinned tensors that were made."""

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the pretended device."""
        if tensor.is_meta:
            return False
        key = tensor.untyped_storage()._cdata
        found = self.there.get(key)
        if found is not None and found.expired():
            del self.there[key], self.bytes[key]
            return False
        return found is not None

    def allocated(self) -> int:
        """Bytes that are on the device now."""
        for key in [key for key, storage in self.there.items() if storage.expired()]:
            del self.there[key], self.bytes[key]
        return sum(self.bytes.values())

    def _send(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                self.there[storage._cdata] = StorageWeakRef(storage)
                self.bytes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.allocated())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func, args)
        if name in ABOUT_A_TENSOR:
            return func(*args, **kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if self.is_there(tensor)]
        asked = kwargs.get("device")
        makes = asked is not None and torch.device(asked).type == "cuda"
        if makes:
            kwargs["device"] = CPU
        if kwargs.pop("pin_memory", False):
            self.pinned.append(torch.Size(args[0]).numel() if args[0:1] else 0)
        if name not in MAY_MIX:
            self._refuse_mixing(name, tensors, on_device)
            if tensors:
                self.where[name].add("cuda" if on_device else "cpu")
        if name == "histc" and not args[0].is_floating_point():  # CUDA counts integers too
            result = func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        if makes or (asked is None and on_device):
            self._send(result)
        return result

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(func.__self__, "__name__", "")
        if name == "device" and self.is_there(args[0]):
            return CUDA
        if name == "is_cuda":
            return self.is_there(args[0])
        result = func(*args)
        if isinstance(result, Tensor) and self.is_there(args[0]):
            self._send(result)
        return result

    def _moved(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, *rest = args
        target = CUDA if name == "cuda" else CPU if name == "cpu" else kwargs.pop("device", None)
        for place, value in enumerate(rest):
            if isinstance(value, Tensor):
                target = CUDA if self.is_there(value) else CPU
            elif isinstance(value, str | torch.device):
                target, rest[place] = value, CPU
        if target is not None and torch.device(target).type == "meta":
            return func(*args, **kwargs) if rest else source.to("meta", **kwargs)
        here = self.is_there(source)
        goes = here if target is None else torch.device(target).type == "cuda"
        result = source.to(*rest, **kwargs) if name == "to" and (rest or kwargs) else source
        if goes != here and result.untyped_storage()._cdata == source.untyped_storage()._cdata:
            result = result.clone()
        if goes:
            self._send(result)
        else:  # a copy that torch made on the device, by an operation above
            self.there.pop(result.untyped_storage()._cdata, None)
        return result

    def _refuse_mixing(self, name: str, tensors: Iterable[Tensor], there: list[Tensor]) -> None:
        others = [t for t in tensors if not self.is_there(t) and t.dim() > 0 and not t.is_meta]
        if there and others:
            shapes = tuple(there[0].shape), tuple(others[0].shape)
            raise MixedDevicesError(f"{name}: {shapes[0]} on cuda with {shapes[1]} on the CPU")
