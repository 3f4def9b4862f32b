"""A program that AOTInductor compiled, called through its C interface.

PyTorch's own loader (`AOTIModelPackageLoader`) holds Python's global lock while a program runs: in a service nothing else,
not even the event loop that reads the tokens, would get on during a step. A call through ctypes lets go of it. The interface
is that of torch/csrc/inductor/aoti_runtime/interface.h; tensors go in and out as handles.
"""

from __future__ import annotations

import ctypes
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError, ExecutionError

_Handles = ctypes.POINTER(ctypes.c_void_p)


class _Constant(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("handle", ctypes.c_void_p)]


_SIGNATURES: dict[str, list[object]] = {
    "CreateWithDevice": [_Handles, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p],
    "GetNumConstants": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "GetConstantOriginalFQN": [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_char_p)],
    "GetConstantName": [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_char_p)],
    "UpdateUserManagedConstantBufferPairs": [
        ctypes.c_void_p, ctypes.POINTER(_Constant), ctypes.c_size_t, ctypes.c_bool, ctypes.c_bool,
    ],
    "GetNumInputs": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "GetNumOutputs": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)],
    "Run": [
        ctypes.c_void_p, _Handles, ctypes.c_size_t, _Handles, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p,
    ],
}  # fmt: skip

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class CompiledStep:
    """A compiled program of a package (`.pt2`) for the CPU; lives as long as the process.

    Args:
        path: of the package.

    Raises:
        ArtifactError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._functions = _functions(_load(path))
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), 1, b"cpu", None)
        self._num_inputs, self._num_outputs = self._count("GetNumInputs"), self._count("GetNumOutputs")
        # The program's name of each constant by the name in the exported program.
        self._names: dict[str, bytes] = {}
        for number in range(self._count("GetNumConstants")):
            name, source = ctypes.c_char_p(), ctypes.c_char_p()
            self._call("GetConstantName", self._container, number, ctypes.byref(name))
            self._call("GetConstantOriginalFQN", self._container, number, ctypes.byref(source))
            assert name.value is not None and source.value is not None
            self._names[source.value.decode()] = name.value
        self._is_bound = not self._names

    @property
    def constants(self) -> set[str]:
        """Names of the constants that it wants."""
        return set(self._names)

    def bind(self, constants: Mapping[str, Tensor]) -> None:
        """Give it all of its constants, once. They are used where they lie, and must stay."""
        assert set(constants) == self.constants and not self._is_bound
        pairs = (_Constant * len(constants))()
        for number, (name, tensor) in enumerate(constants.items()):
            pairs[number] = _Constant(self._names[name], _handles([tensor])[0])
        self._kept = dict(constants)
        self._call("UpdateUserManagedConstantBufferPairs", self._container, pairs, len(pairs), False, True)
        self._is_bound = True

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run it; other Python threads run meanwhile.

        Raises:
            ExecutionError: it failed; standard error says how.
        """
        assert self._is_bound and len(inputs) == self._num_inputs  # otherwise it would read what is not there
        outputs = (ctypes.c_void_p * self._num_outputs)()
        given = _handles(inputs)  # the program takes them over
        failed = self._functions["Run"](self._container, given, len(inputs), outputs, self._num_outputs, None, None)
        if failed:
            raise ExecutionError(f"{self._path}: the compiled step program failed; its message is on standard error")
        capsules = [_new_capsule(handle, None, None) for handle in outputs]
        found: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
        return found

    def _count(self, name: str) -> int:
        number = ctypes.c_size_t()
        self._call(name, self._container, ctypes.byref(number))
        return number.value

    def _call(self, name: str, *arguments: object) -> None:
        if self._functions[name](*arguments):
            raise ArtifactError(
                f"{self._path}: {name} failed; its message is on standard error; compile the model again"
            )


class ProxiedStep:
    """A compiled program that calls ops which have no C function, such as `optc::grouped_mm`.

    PyTorch's loader finds them by name and calls them through the dispatcher. It holds Python's global lock meanwhile.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: cannot be loaded: {error}; compile the model again") from error
        self.constants = set(self._loader.get_constant_fqns())

    def bind(self, constants: Mapping[str, Tensor]) -> None:
        """As `CompiledStep.bind`."""
        assert set(constants) == self.constants
        self._loader.load_constants(dict(constants), False, True, True)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As `CompiledStep.run`, but for the lock."""
        found: list[Tensor] = self._loader.run(list(inputs))
        return found


def load_step(path: Path) -> CompiledStep | ProxiedStep:
    """The program of a package.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    try:
        with zipfile.ZipFile(path) as package:
            # How to call such ops is in the one JSON file of a library that is not about its processor.
            proxied = any(name.endswith(".json") and not name.endswith("_metadata.json") for name in package.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: cannot be loaded: {error}; compile the model again") from error
    return ProxiedStep(path) if proxied else CompiledStep(path)


def _handles(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """New handles of tensors, which belong to whoever gets them."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return (ctypes.c_void_p * len(capsules))(*[_capsule_pointer(capsule, None) for capsule in capsules])


def _load(path: Path) -> ctypes.CDLL:
    """The shared library in a package. It is mapped from a temporary file, which has no name any more afterwards."""
    try:
        with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory(prefix="optc") as folder:
            (library,) = [name for name in package.namelist() if name.endswith(".so")]
            file = Path(folder) / "step.so"
            file.write_bytes(package.read(library))
            return ctypes.CDLL(str(file))
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"{path}: cannot be loaded: {error}; compile the model again") from error


def _functions(library: ctypes.CDLL) -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {}
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"AOTInductorModelContainer{name}")
        function.restype, function.argtypes = ctypes.c_int32, arguments
        found[name] = function
    return found
