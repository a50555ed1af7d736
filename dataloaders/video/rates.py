"""How many pictures a second a file shows: what its header says, unless the times of the pictures contradict it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from dataloaders.video.opening import VideoReadError
from dataloaders.video.promises import Packet

# A header's rate is right when the pictures last as long as it says, to within these: rounded times, an odd last one.
RATE_TOLERANCE, FRAMES_TOLERANCE = 0.01, 1.5
JUMP = 30.0  # seconds between two packets by which a broadcast's clock was set anew, and no picture lasted that long


def frame_rate(
    path: str,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    frame_count: int,
    seconds: float | None,
) -> tuple[float, tuple[str, ...]]:
    """Frames per second, and what to say about it. seconds: how long the pictures last, from `seconds_shown`."""
    rate = stream.average_rate or stream.guessed_rate or 0
    # Without anything to go by, the guess is the resolution of the clock. It is made up, too, where time stands still.
    made_up = rate <= 0 or (not stream.average_rate and rate * stream.time_base == 1) or seconds == 0
    header = 0.0 if made_up else float(rate)
    if not seconds:
        if not header:
            raise VideoReadError(path, "it has no frame rate (0 frames per second)")
        return header, ()
    # The header of H.264 in avi often counts fields, twice the frames there are.
    for candidate in (header, header / 2) if container.format.name == "avi" else (header,):
        off = abs(frame_count / candidate - seconds) if candidate else seconds
        if off <= max(RATE_TOLERANCE, FRAMES_TOLERANCE / frame_count) * seconds:
            return candidate, ()
    by_times, said = frame_count / seconds, f"says {header:g}" if header else "says nothing"
    return by_times, (f"its frame rate is that of its pictures, {by_times:.4g} a second; its header {said}",)


def seconds_shown(ticks: Sequence[Packet], shown: set[int], time_base: Fraction, own_times: bool) -> float | None:
    """How long the pictures last by their times; 0 where time stands still, None where it cannot be told.

    ticks: all packets. shown: numbers of those, empty ones left out, that give pictures.
    """
    numbers = iter(range(len(ticks)))
    film = [packet for packet in ticks if packet.size and next(numbers) in shown]
    # Elsewhere than in containers that keep them, presentation times may be made up.
    by_dts = not own_times or any(packet.pts is None for packet in film)
    by_dts = by_dts and any(packet.dts is not None for packet in film)
    times = [packet.dts if by_dts else packet.pts for packet in film]
    known = [number for number, time in enumerate(times) if time is not None]
    if len(known) < 2:
        return None
    stamps = np.array([times[number] for number in known], np.int64)
    first, last = (0, len(known) - 1) if by_dts else (int(stamps.argmin()), int(stamps.argmax()))
    span = float((stamps[last] - stamps[first]) * time_base)
    if span <= 0:
        return 0.0 if span == 0 else None
    order = np.array([packet.dts for packet in film if packet.dts is not None], np.int64)
    if not own_times and len(order) > 1:
        steps = np.diff(order) * float(time_base)
        if steps.min() < 0 or steps.max() > JUMP:
            return None
    mean = span / (known[-1] - known[0])
    # The last picture lasts as long as it says, else as long as the others do, and while it is repeated.
    own = float(film[known[last]].duration * time_base)
    repeated = [p.dts + p.duration for p in ticks if not p.size and p.dts is not None]
    after = float((max(repeated, default=0) - int(stamps[last])) * time_base) if repeated else 0.0
    unknown = (len(film) - 1 - (known[-1] - known[0])) * mean
    return span + unknown + max(own if own > 0.9 * mean else mean, after)
