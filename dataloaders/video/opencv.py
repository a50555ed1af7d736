"""The same frames by way of OpenCV, for comparison with codebases that read video through it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dataloaders.video.packets import VideoInfo, VideoReadError


def decode_with_opencv(info: VideoInfo, wanted: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Frames by number: uint8 [len(wanted), *shape] RGB, upright; `shape` is [H, W, 3].

    OpenCV has no numbers for frames, so they are counted to the end of the file and checked by their times.
    Raises VideoReadError where it does not see exactly the frames that `info` lists.
    """
    times = _milliseconds(info)
    # One thread: loader workers already fill the machine.
    capture = cv2.VideoCapture(info.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    images: list[np.ndarray] = []
    count, begin = 0, 0.0
    try:
        while capture.grab():
            time = capture.get(cv2.CAP_PROP_POS_MSEC)
            begin = time if count == 0 else begin
            if count < len(times) and abs(time - begin - times[count]) > 0.5:
                raise _failed(info, f"OpenCV gives another picture for frame {count}", images, wanted)
            if count in wanted:
                read, image = capture.retrieve()
                if not read or image.shape != shape:
                    raise _failed(info, f"OpenCV cannot give frame {count}", images, wanted)
                images.append(image[..., ::-1])
            count += 1
    except cv2.error as error:
        raise _failed(info, f"OpenCV fails at frame {count} ({error})", images, wanted) from error
    finally:
        capture.release()
    if count != info.frame_count:
        raise _failed(info, f"OpenCV reads {count} of its {info.frame_count} frames", images, wanted)
    return np.stack(images)


def _milliseconds(info: VideoInfo) -> np.ndarray:
    """float64: when each frame is shown, counted from the first one; empty where the file does not say."""
    if not info.trusted:
        return np.empty(0)
    times = info.packet_pts[info.frame_packets]
    return (times - times[0]) * float(info.time_base * 1000)


def _failed(info: VideoInfo, cause: str, images: Sequence[np.ndarray], wanted: Sequence[int]) -> VideoReadError:
    return VideoReadError(info.path, f"{cause}; use --decoder pyav for this file", len(images), len(wanted))
