"""Decoding that raises where decoders would rather hide damage: opening a file that way, and all of its frames."""

from __future__ import annotations

from collections.abc import Iterator

import av

from dataloaders.video.packets import READ_ERRORS, VideoInfo, VideoReadError, open_video


def open_strict(info: VideoInfo) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a probed file for decoding that raises at damage. The caller closes the container. Raises VideoReadError."""
    container, stream = open_video(info.path)
    # One thread: worker processes already fill the machine, and errors surface at the packet that causes them.
    stream.codec_context.thread_count = 1
    # Without this the decoder hides damage by repeating or guessing pixels.
    stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def all_frames(info: VideoInfo) -> Iterator[av.VideoFrame]:
    """Every frame that the file shows, in order. Raises VideoReadError unless they are those that `info` counts.

    Where packet times can be trusted every frame is checked as it comes, elsewhere only the total can tell.
    """
    times = info.packet_pts[info.frame_packets] if info.trusted else None
    count = 0
    container, stream = open_strict(info)
    with container:
        try:
            for frame in _decode(info, container, stream):
                if times is not None and frame.pts != times[min(count, info.frame_count - 1)]:
                    raise VideoReadError(info.path, f"frame {count} is missing from what the decoder gives")
                yield frame
                count += 1
        except READ_ERRORS as error:
            raise VideoReadError(info.path, f"it cannot be decoded after frame {count} ({error})") from error
    if count != info.frame_count:
        raise VideoReadError(info.path, f"it holds {info.frame_count} packets but decodes to {count} frames")


def _decode(info: VideoInfo, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    position = 0
    for packet in container.demux(stream):
        if packet.size == 0:  # the end marker, or a repeated picture in avi
            continue
        if position < len(info.packet_decodable) and info.packet_decodable[position]:
            yield from stream.codec_context.decode(packet)
        position += 1
    yield from stream.codec_context.decode(None)
