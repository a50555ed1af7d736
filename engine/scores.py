"""Similarities of a whole evaluation, [N captions, V videos]: held where they fit, else computed or read in strips.

A separable head computes them anew whenever they are read. What every pair of another head costs is spent once, so
theirs go to a file of --output_dir. Files hold them as numpy's `.npz` does, and are read without loading them whole.
"""

import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.distributed import World, gather_rows
from engine.progress import progress
from modules.model import VideoTextModel
from modules.ranks import Held, Scores, as_slice, rows_of
from modules.representation import Representation, as_parts, count, take

STRIP = 2**24  # scores of a strip: 64 MiB in float32
COPIES = 3  # of a strip alive at once: cosines, scaled, in float32


class Computed:
    """Similarities of a separable head, float32, computed on its device when they are read."""

    def __init__(self, model: VideoTextModel, text: Representation, video: Representation, memory_mb: float) -> None:
        self.model, self.text, self.video = model, text, video
        self.shape: tuple[int, int] = count(text), count(video)
        self.device = as_parts(video)[0].device
        self.pairs = min(STRIP, int(memory_mb * 2**20) // (4 * COPIES))

    def strips(self, order: Tensor) -> Iterator[Tensor]:
        for rows in order.split(rows_of(self.pairs, self.shape[1])):
            with torch.inference_mode():
                strip = self.model.scores(take(self.text, as_slice(rows)), self.video)
            yield strip


class Stored:
    """A matrix in an open file, `offset` bytes from its start, row by row; read on `device`."""

    def __init__(
        self, file: BinaryIO, shape: tuple[int, int], device: torch.device, dtype: np.dtype, offset: int = 0
    ) -> None:
        self.file, self.shape, self.device, self.dtype, self.offset = file, shape, device, dtype, offset

    def strips(self, order: Tensor) -> Iterator[Tensor]:
        for rows in order.split(rows_of(STRIP, self.shape[1])):
            # Mapped anew for each strip: pages once touched would count as memory of the process.
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            chosen = as_slice(rows)
            strip = torch.from_numpy(np.array(mapped[chosen if isinstance(chosen, slice) else chosen.numpy()]))
            del mapped
            yield strip.to(self.device)


def score(
    model: VideoTextModel, text: Representation, video: Representation, world: World, memory_mb: float, folder: Path
) -> Scores | None:
    """Similarities of all pairs. Where each pair costs, the ranks share the texts, and rank 0 alone may have them all.

    They are held in memory up to `memory_mb`; a file in `folder` that takes the others has no name and goes with them.
    """
    n, v = count(text), count(video)
    fits, shared = 4 * n * v <= memory_mb * 2**20, world.size > 1 and not model.head.separable
    if model.head.separable and not fits:
        return Computed(model, text, video, memory_mb)
    rows = n if fits else rows_of(STRIP, v)
    parts = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    strips = partial(_strip, model, text, video, world if shared else World(0, 1, world.device), memory_mb)
    if fits:
        matrix = strips(parts[0], partial(progress, description="similarity blocks", enabled=world.is_main))
        return Held(matrix, STRIP, world.device)
    file = TemporaryFile(dir=folder) if world.is_main else None  # noqa: SIM115 - it lives as long as its matrix
    for part in progress(parts, "strips of the similarity", enabled=world.is_main):
        strip = strips(part)
        if file:
            file.write(strip.numpy())  # type: ignore[arg-type]
    if file is None:
        return None
    file.flush()
    return Stored(file, (n, v), world.device, np.dtype(np.float32))  # type: ignore[arg-type]


def _strip(
    model: VideoTextModel,
    text: Representation,
    video: Representation,
    world: World,
    memory_mb: float,
    part: slice,
    show: Callable = iter,
) -> Tensor:
    """Float32 [n, V] on the CPU: of the texts in `part`, which the ranks of `world` share."""
    size = part.stop - part.start
    bounds = [part.start + size * rank // world.size for rank in range(world.size + 1)]
    mine = take(text, slice(*bounds[world.rank : world.rank + 2]))
    scores: Representation = model.similarity(mine, video, memory_mb, show)
    if world.size > 1:
        scores = gather_rows(scores, [stop - start for start, stop in pairwise(bounds)])
    return as_parts(scores)[0]


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray | Scores]) -> None:
    """As np.savez does, but scores go there strip by strip."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                if isinstance(array, (np.ndarray, np.generic)):
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
                    continue
                about = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(entry, about)
                for strip in array.strips(torch.arange(array.shape[0])):
                    entry.write(strip.float().cpu().contiguous().numpy().data)


def read_npz(path: Path) -> dict[str, np.ndarray | Scores]:
    """The arrays of an `.npz`; its matrices of numbers are left in the file where they lie there as they are.

    Raises OSError, TypeError or ValueError for what is none.
    """
    found: dict[str, np.ndarray | Scores] = {}
    try:
        with np.load(path, allow_pickle=False) as saved:
            for info in saved.zip.infolist():
                name = info.filename.removesuffix(".npy")
                found[name] = _in_place(path, info) or saved[name]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


def _in_place(path: Path, info: zipfile.ZipInfo) -> Stored | None:
    """A float matrix inside an archive that is neither compressed nor stored by columns; None for anything else."""
    file = open(path, "rb")  # noqa: SIM115 - it stays open as long as the matrix is used
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", file.read(30))
    file.seek(name_length + extra_length, 1)
    if info.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) == 2 and dtype.kind == "f" and not by_columns and 0 not in shape:
            return Stored(file, shape, torch.device("cpu"), dtype, file.tell())
    file.close()
    return None
