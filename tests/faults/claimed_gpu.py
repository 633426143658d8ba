"""A GPU that is not there: its tensors lie in the host's memory, but in a place of their own.

Inside ``claimed_gpu`` torch says that there is a GPU, and each storage is the GPU's or the host's.
An operation on tensors of both, or a GPU's tensor in numpy, is an error as on a GPU, and so is a
read by the host while a graph is captured. A graph is a tape of what was done: a replay does it
again on the same memory, and no other Python runs.

What it does not see: inside a backward pass C++ makes tensors, whose place is unknown; they go with
any other. All is done at once and in order, so that no wait can be missing. Triton's interpreter
cuts digits off where a GPU rounds to bf16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.interpreter import GridExecutor

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
# An NVIDIA H100, as far as fastbyol asks.
PROPERTIES = SimpleNamespace(name="claimed", major=9, minor=0, multi_processor_count=132)
FREE, TOTAL = 70 << 30, 80 << 30
# Operations that read a place and write to another, or look at no elements.
ANY_PLACES = {"copy_", "_foreach_copy_", "__setitem__", "_has_compatible_shallow_copy_type"}
# Those that take indices of the host.
INDEXED = {"__getitem__", "index_put_", "index_put"}
# Those that do not take a 0-d tensor of the host for a number.
JOINED = {"cat", "stack", "concat", "hstack", "vstack", "matmul", "mm", "bmm", "addmm", "linear"}
READ_BY_THE_HOST = {
    "item", "tolist", "nonzero", "unique", "equal", "allclose", "is_nonzero", "masked_select",
    "__bool__", "__float__", "__int__", "__index__", "__contains__", "__repr__", "__format__",
}  # fmt: skip
MADE_OF_HOST_DATA = {"tensor", "as_tensor", "asarray", "new_tensor"}


def is_gpu(device: torch.device | str | int) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class ClaimedGpu(TorchFunctionMode):
    """The places of all storages, and what an operation may do with them."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._tapes: dict[int, Tape] = {}  # by thread: others may do what they like meanwhile

    @property
    def tape(self) -> Tape | None:
        """The tape that this thread records."""
        return self._tapes.get(threading.get_ident())

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        """Record what this thread does, and undo it."""
        self._tapes[threading.get_ident()] = tape
        try:
            with tape:
                yield
        finally:
            del self._tapes[threading.get_ident()]
            tape.undo()

    def put(self, tensor: Tensor, place: torch.device) -> Tensor:
        """Note where ``tensor`` is and return it."""
        with torch._C.DisableTorchFunction():
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                # A weak reference keeps the address from being given to another storage.
                self._places[storage._cdata] = StorageWeakRef(storage), place
        return tensor

    def place(self, tensor: Tensor) -> torch.device | None:
        """Return where ``tensor`` is; None where this is unknown."""
        with torch._C.DisableTorchFunction():
            if tensor.device.type == "meta":
                return tensor.device
            if tensor.layout != torch.strided:
                return None
            reference, place = self._places.get(tensor.untyped_storage()._cdata, (None, None))
        return None if reference is None or reference.expired() else place

    def device(self, tensor: Tensor) -> torch.device:
        """Return what ``tensor.device`` is; tensors of unknown place are a GPU's gradients."""
        return self.place(tensor) or GPU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in ("__set__", "data_ptr", "untyped_storage", "_parse_to"):
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if name == "get_device":
            return 0 if self.device(args[0]) == GPU else -1
        if name == "is_pinned":
            return self.device(args[0]) == HOST
        if name == "pin_memory":
            return self.put(args[0].clone(), HOST)
        if name in ("cpu", "cuda"):
            return self._moved(args[0], HOST if name == "cpu" else GPU)
        if name == "to":
            return self._to(args[0], [*args[1:]], kwargs)
        return self._do(func, name, args, kwargs)

    def _backward(
        self, tensor: Tensor, gradient: Tensor | None = None, *words: Any, **named: Any
    ) -> None:
        """Go backward with the mode on, in which the Python of autograd's functions runs."""
        with self:
            torch.autograd.backward(tensor, gradient, *words, **named)

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        attribute = func.__self__.__name__
        if attribute == "device":
            return self.device(tensor)
        if attribute in ("is_cuda", "is_cpu"):
            return self.device(tensor) == (GPU if attribute == "is_cuda" else HOST)
        result = func(tensor)
        return self._with(tensor, result) if isinstance(result, Tensor) else result

    def _with(self, tensor: Tensor, result: Tensor) -> Tensor:
        """Put ``result`` where ``tensor`` is, unless it has a place."""
        return result if self.place(result) else self.put(result, self.device(tensor))

    def _moved(self, tensor: Tensor, place: torch.device) -> Tensor:
        if self.device(tensor) == place or place.type == "meta":
            return tensor
        self._forbid_capture("a copy between host and GPU")
        return self.put(tensor.clone(), place)

    def _to(self, tensor: Tensor, words: list[Any], named: dict[str, Any]) -> Tensor:
        """Change dtype and layout, then the place; the result is ``tensor`` if nothing changes."""
        place = self.device(tensor)
        if words and type(words[0]) is int:
            words[0] = torch.device("cuda", words[0])
        for at, word in enumerate([*words, named.get("device")]):
            if isinstance(word, Tensor):
                place = self.device(word)
            elif isinstance(word, torch.device | str):
                place = GPU if is_gpu(word) else torch.device(word)
                if place == GPU and at < len(words):
                    words[at] = HOST
                elif place == GPU:
                    named["device"] = HOST
        changed = tensor.to(*words, **named)
        return self._moved(self._with(tensor, changed), place)

    def _do(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs.pop("pin_memory", None)
        wanted: torch.device | None = None
        if (device := kwargs.get("device")) is not None:
            wanted = GPU if is_gpu(device) else torch.device(device)
            kwargs["device"] = HOST if wanted == GPU else wanted
        given = [(tensor, self.place(tensor)) for tensor in tensors_of((args, kwargs))]
        if any(place == GPU for _, place in given):
            if name in ("numpy", "__array__", "__dlpack__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name in READ_BY_THE_HOST:
                self._forbid_capture(name)
        if wanted == GPU and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if wanted == GPU and name in MADE_OF_HOST_DATA:
            self._forbid_capture(name)
        elif wanted is None and name not in ANY_PLACES:
            self._demand_one_place(name, given)
        result = func(*args, **kwargs)
        place = wanted or self._common(name, given)
        for tensor in tensors_of(result) if isinstance(result, Tensor | tuple | list) else ():
            if place is not None and self.place(tensor) is None:
                self.put(tensor, place)
        if wanted is not None and self.place(result) != wanted:  # as_tensor of a tensor
            return self._moved(result, wanted)
        return result

    def _demand_one_place(self, name: str, given: list[tuple[Tensor, torch.device | None]]) -> None:
        """Raise RuntimeError as a GPU does where host and GPU meet."""
        if name in INDEXED and given[0][1] == GPU:
            return
        places = {
            place
            for tensor, place in given
            if place in (GPU, HOST)
            and not (place == HOST and not tensor.ndim and name not in JOINED)
        }
        if len(places) > 1:
            shapes = ", ".join(f"{tuple(tensor.shape)} on {place}" for tensor, place in given)
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two "
                f"devices: {shapes}"
            )

    def _common(
        self, name: str, given: list[tuple[Tensor, torch.device | None]]
    ) -> torch.device | None:
        if name == "copy_":
            return given[0][1]
        places = {place for _, place in given}
        return GPU if GPU in places else HOST if HOST in places or not given else None

    def _forbid_capture(self, what: str) -> None:
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class Tape(TorchDispatchMode):
    """What is done on the GPU, as calls that do it again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = self._kept((args, kwargs or {}))
        result = self.inside(lambda: func(*args, **(kwargs or {})))
        kept = tensors_of(self._kept(result))

        def again() -> None:
            for old, new in zip(kept, tensors_of(func(*given, **named)), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:  # no view
                    old.copy_(new.detach())

        self._calls.append(again)
        return result

    def launch(self, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Launch a kernel that no operation of torch launches."""
        if not self._is_inside:
            with _disable_current_modes():  # or the tape would record what this does
                given, named = self._kept((args, kwargs))
            self._calls.append(lambda: run(*given, **named))
        self.inside(lambda: run(*args, **kwargs))

    def inside(self, run: Callable[[], Any]) -> Any:
        """Run something that is one call of the tape."""
        before, self._is_inside = self._is_inside, True
        try:
            return run()
        finally:
            self._is_inside = before

    def undo(self) -> None:
        """Restore what there was before: a GPU records and runs nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def play(self) -> None:
        with torch._C.DisableTorchFunction():
            for call in self._calls:
                call()

    def _kept(self, tree: Any) -> Any:
        """Return ``tree`` with other tensors on the same memory: ``.data`` may get another one."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors_of(tree):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()
            return tree_map_only(Tensor, Tensor.detach, tree)


class Event:
    """An event or a stream: all is done when it is asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = GPU

    def query(self) -> bool:
        return True

    def record(self, *_: object) -> None:
        """Do nothing, as the others."""

    synchronize = wait_stream = wait_event = record_event = wait = record


@contextmanager
def claimed_gpu() -> Iterator[ClaimedGpu]:
    """Claim a GPU inside, in all threads of the process."""
    mode = ClaimedGpu()

    class Graph:
        def __init__(self) -> None:
            self.tape = Tape()
            self.replay = self.tape.play

    def on_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: mode.put(make(*args, **kwargs), HOST)

    bootstrap = threading.Thread._bootstrap_inner

    def within(thread: threading.Thread) -> None:
        with mode:
            bootstrap(thread)

    grad = torch.autograd.grad

    def gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Put the gradients where their ``inputs`` are."""
        results = grad(outputs, inputs, *args, **kwargs)
        for tensor, result in zip(tensors_of(inputs), results, strict=True):
            if result is not None:
                mode.put(result, mode.device(tensor))
        return results

    launch = GridExecutor.__call__

    def launched(kernel: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if tape := mode.tape:
            tape.launch(lambda *a, **k: launch(kernel, *a, **k), args, kwargs)
        else:
            launch(kernel, *args, **kwargs)

    answers: dict[str, object] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor), "is_bf16_supported": True,
        "mem_get_info": (FREE, TOTAL), "synchronize": None, "set_device": None, "empty_cache": None,
        "_lazy_init": None, "manual_seed_all": None, "current_stream": Event(),
        "stream": nullcontext(), "device": nullcontext(), "device_of": nullcontext(),
    }  # fmt: skip
    patches: list[tuple[object, str, object]] = [
        *((torch.cuda, name, lambda *_, _a=a, **__: _a) for name, a in answers.items()),
        *((torch.cuda, name, Event) for name in ("Stream", "Event")),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", lambda graph, **_: mode.recording(graph.tape)),
        *((torch, name, on_host(getattr(torch, name))) for name in ("from_numpy", "frombuffer")),
        # Or the mode would be off in the backward pass, whose Python asks where tensors are.
        (torch.autograd, "has_torch_function", lambda *_: False),
        (torch.autograd, "grad", gradients),
        (threading.Thread, "_bootstrap_inner", within),
        (GridExecutor, "__call__", launched),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mode)
        yield mode
