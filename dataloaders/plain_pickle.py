"""Read a pickle of captions as Python 2, Python 3 or numpy wrote it, without running anything that it asks for.

A pickle may name functions to be called. Those that stand for plain values in pickles of old protocols are answered
by stand-ins below, which build the same value and can do nothing else; any other name is refused.
"""

import io
import pickle
import re
from math import prod
from pathlib import Path
from typing import Any

from dataloaders.annotation_files import read_bytes
from dataloaders.split import AnnotationError

BUILTINS = ("__builtin__", "builtins")
NUMPY = tuple(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric"))
CONVERT = (
    "if you trust the file, write it anew with plain values where it was made: captions = {str(video): [[str(word) for "
    "word in caption] for caption in captions] for video, captions in pickle.load(open(old, 'rb')).items()}; "
    "pickle.dump(captions, open(new, 'wb'))"
)


class _StringType:
    """Stands for numpy's dtype of strings or of objects; others are refused."""

    __slots__ = ("kind", "order")

    def __init__(self, name: str | bytes) -> None:
        name = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
        if not re.fullmatch(r"[<>|=]?([USaO]\d*)", name):
            raise pickle.UnpicklingError(f"holds numpy values of type {name}, not strings")
        self.kind, self.order = name.lstrip("<>|=")[0], name[0]

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else order

    def text(self, raw: Any) -> Any:
        """One value out of its bytes; an object is there already."""
        if isinstance(raw, str):  # as protocols before 3 write bytes
            raw = raw.encode("latin-1")
        if self.kind == "O" or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("holds a numpy value that is no string")
        if self.kind != "U":
            return raw.rstrip(b"\0")
        return raw.decode("utf-32-be" if self.order == ">" else "utf-32-le").rstrip("\0")


class _Strings(list):
    """Stands for a numpy array of strings or objects, as nested lists."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _StringType) or by_columns and len(shape) > 1:
            raise pickle.UnpicklingError("holds a numpy array that is none of strings in rows")
        if kind.kind == "O":
            values = list(content)
        else:
            raw = content.encode("latin-1") if isinstance(content, str) else content
            width = len(raw) // max(1, prod(shape))
            values = [kind.text(raw[n * width : (n + 1) * width]) for n in range(prod(shape) if width else 0)]
        for size in reversed(shape[1:]):
            values = [values[n : n + size] for n in range(0, len(values), size)] if size else []
        self[:] = values


def _strings(state: Any) -> _Strings:
    made = _Strings()
    made.__setstate__(state)
    return made


class _PlainValues(pickle.Unpickler):
    """Builds containers, strings, bytes and numbers, also where a pickle writes them as calls; refuses other names."""

    def find_class(self, module: str, name: str) -> Any:
        # Made anew each time: a pickle may set attributes on what it is given.
        if module in BUILTINS and name in ("list", "tuple", "set", "frozenset", "dict"):
            build = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[name]
            return lambda values=(): build(values)
        if module in BUILTINS and name in ("bytes", "bytearray"):
            return lambda text="", encoding="latin-1": _bytes(text)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding="latin-1": _bytes(text)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda pairs=(): dict(pairs)
        if (module, name) == ("collections", "defaultdict"):
            return lambda factory=None: {}
        if (module, name) == ("numpy", "dtype"):
            return lambda kind, *how: _StringType(kind)
        if (module, name) == ("numpy", "ndarray"):
            return None  # only handed to _reconstruct
        if module in NUMPY and name == "_reconstruct":
            return lambda *how: _Strings()
        if module in NUMPY and name == "_frombuffer":
            return lambda raw, kind, shape, order: _strings((1, shape, kind, order == "F", bytes(raw)))
        if module in NUMPY and name == "scalar":
            return lambda kind, raw: kind.text(raw)
        raise pickle.UnpicklingError(f"names {module}.{name}; only containers, strings and numbers are read")


def _bytes(text: Any) -> bytes:
    """Of the text that protocols before 3 write for bytes; a number would ask for as many bytes."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise pickle.UnpicklingError(f"makes bytes of a {type(text).__name__}")
    return text.encode("latin-1")


def read_plain_pickle(path: Path) -> Any:
    """Unpickle without running anything that the file asks for; strings of Python 2 come as bytes.

    Raises AnnotationError for a pickle that names another class or function, and for a damaged one.
    """
    raw = read_bytes(path)
    try:
        return _PlainValues(io.BytesIO(raw), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        cut = "truncated" in str(error) or not raw.startswith((b"\x80", b"(", b"]", b"}", b"c"))
        remedy = "it is cut off or no pickle: copy it again" if cut else CONVERT
        raise AnnotationError(f"{path}: not a plain pickle of captions: {error}; {remedy}") from error
    # A damaged pickle raises whatever the opcode that it is cut in happens to raise.
    except Exception as error:
        told = str(error) or type(error).__name__
        remedy = "it is damaged, cut off or no pickle: copy it again"
        raise AnnotationError(f"{path}: not a plain pickle of captions: {told}; {remedy}") from error
