"""Raw contents of weight files, read without running anything that they contain.

Three containers: torch.save files (through `weights_only=True`), .safetensors, and TorchScript archives such as
OpenAI's CLIP release, whose tensors are taken from the zip by the unpickler below.
"""

import io
import json
import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.whole import file_sha256

STORAGES = {"CharStorage": torch.int8, "ByteStorage": torch.uint8}
for dtype in ("Float", "Half", "Double", "BFloat16", "Long", "Int", "Short", "Bool"):
    STORAGES[f"{dtype}Storage"] = getattr(torch, dtype.lower())
MAX_MODULES = 100_000  # far above any network: stops an archive whose modules contain each other
MAX_CODE_BYTES = 1 << 24
QUICK_GELU_FACTOR = 1.702
READ: dict[Path, str] = {}  # weight file -> its SHA-256 when it was last read


class CheckpointError(RuntimeError):
    """A weight file cannot be used; the message names the file, what it looks like and what to do."""


class RawFile(NamedTuple):
    content: Any  # what the file holds: for an archive and .safetensors a flat dict of tensors, else any object
    container: str  # "torchscript", "torch" or "safetensors"
    activation: str | None = None  # what an archive's own code computes


def read_raw(path: Path) -> RawFile:
    """Contents of a weight file of any of the three containers, on the CPU. CheckpointError if it is none of them."""
    head = _head(path)
    try:
        READ[path] = file_sha256(path)
        if head[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
        if head[8:9] == b"{":
            return RawFile(load_file(path, device="cpu"), "safetensors")
        return RawFile(torch.load(path, map_location="cpu", weights_only=True), "torch")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged or hostile file can make the readers raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # torch's own text would advise to load the file unsafely; it stays chained, for log.txt.
        shown = "" if reason.startswith("Weights only load failed") else f" [{reason}]"
        raise CheckpointError(f"{path} cannot be read as weights: {describe_wrong_file(path)}{shown}") from error


def read_json(path: Path) -> dict | None:
    """The JSON object in a file, None if there is no such file; CheckpointError if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a JSON {type(value).__name__}, not an object")
        return value
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Repair it or remove it.") from error


def describe_wrong_file(path: Path) -> str:
    """What a file that is not readable as weights looks like, and what to do: one or two sentences."""
    if not (head := _head(path)):
        return "it is empty. A copy or a download was cut off: fetch it again."
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not weights. Download the file itself (a 'raw' or 'resolve' link), not its page."
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights. Run `git lfs pull` where it was cloned, or download it."
    if head[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            return "it begins as a PyTorch file and then breaks off. Fetch or copy it again, whole."
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "it is a zip file but not one of PyTorch's. If the weights are inside, unpack it first."
    if head[8:9] == b"{":
        return "it is a .safetensors file that breaks off or is damaged. Fetch or copy it again, whole."
    if head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
        return (
            "it is a PyTorch file or pickle that holds more than tensors and plain containers, or is damaged; nothing "
            "of it was run. If you trust it, load it where it was made and save only its weights: "
            "torch.save(model.state_dict(), file)."
        )
    if head[:3] == b"\x1f\x8b\x08" or head[257:262] == b"ustar":
        return "it is a compressed or tar archive. Unpack it and give the weight file inside."
    return (
        "it is in no known weight format. Expected a .pt / .bin / .pth file of torch.save, a TorchScript archive "
        "or a .safetensors file."
    )


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot open the weight file {path}: {reason}. Check the path.") from error


class ScriptObject:
    """Stands for an instance of a class of an archive: holds its attributes, does nothing."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a TorchScript object's state is not a dict of attributes")
        self.attributes = state


class ArchiveUnpickler(pickle.Unpickler):
    """Reads data.pkl or constants.pkl of a TorchScript archive.

    A name resolves to an entry of a short list made here or to the inert ScriptObject; any other raises, not called.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        super().__init__(io.BytesIO(archive.read(name)))
        self._archive = archive
        self._folder = name.removesuffix(".pkl")
        self._storages: dict[str, Tensor] = {}
        self._admitted: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in STORAGES.items()}
        self._admitted |= {
            # Closures of this one load: a pickle may set attributes on what it is given, and those end with it.
            ("torch._utils", "_rebuild_tensor_v2"): lambda *fields: _rebuild_tensor(*fields),
            ("collections", "OrderedDict"): lambda: {},
            ("torch", "device"): lambda *fields: None,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
        }
        for kind in ("int", "bool", "double", "tensor"):
            self._admitted["torch.jit._pickle", f"build_{kind}list"] = lambda values: values

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (ScriptObject,), {"__slots__": ()})
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"the archive asks for {module}.{name}, which no weight file needs; refused")
        return self._admitted[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that a tensor lies in, as a 1-D tensor; read once, however many tensors share it."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unexpected reference {kind!r} in the archive")
        if key not in self._storages:
            info = self._archive.getinfo(f"{self._folder}/{key}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"{info.filename} is compressed, which PyTorch never does to tensors")
            data = bytearray(self._archive.read(info))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *more: Any) -> Tensor:
    """more: requires_grad, hooks and, in newer archives, metadata."""
    if any(more[2:]):
        raise pickle.UnpicklingError("a tensor with conjugate or negative bits, which no weight has")
    if prod(size) > storage.numel():  # strides of 0 would blow a few bytes up to any size
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} does not fit {storage.numel()} stored values")
    return storage.as_strided(size, stride, offset)


def _read_torchscript(archive: zipfile.ZipFile) -> RawFile:
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("its tensors are stored big-endian, which is not supported: save it on another machine")
    module = ArchiveUnpickler(archive, root + "data.pkl").load()
    if not isinstance(module, ScriptObject):
        raise CheckpointError("it is a TorchScript archive without a module in it")
    return RawFile(_state_dict(module), "torchscript", _archive_activation(archive, root))


def _state_dict(module: ScriptObject) -> dict[str, Tensor]:
    """Dotted names of all tensors below `module`, as state_dict() gives them."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, current = waiting.pop()
        seen += 1
        if seen > MAX_MODULES:
            raise CheckpointError("its modules contain each other without end: the archive is damaged or hostile")
        for name, value in getattr(current, "attributes", {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, ScriptObject):
                waiting.append((f"{prefix}{name}.", value))
    return tensors


def _archive_activation(archive: zipfile.ZipFile, root: str) -> str | None:
    """Read off the archive's source text and constants, neither of which is compiled."""
    quick = exact = False
    for name in archive.namelist():
        if name.startswith(root + "code/") and name.endswith(".py"):
            with archive.open(name) as file:
                text = file.read(MAX_CODE_BYTES).decode("utf-8", errors="replace")
            quick |= str(QUICK_GELU_FACTOR) in text
            exact |= "torch.gelu(" in text
    constants = ArchiveUnpickler(archive, root + "constants.pkl").load()
    for value in constants if isinstance(constants, (tuple, list)) else ():
        # A traced module keeps the factor of x * sigmoid(1.702 x) as a constant tensor instead of in its text.
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            quick |= abs(value.item() - QUICK_GELU_FACTOR) < 1e-3
    return None if quick == exact else "quick_gelu" if quick else "gelu"
