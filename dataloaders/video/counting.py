"""The plain way: decode a whole file, and see what it shows.

Done once per file, where its packets did not tell the truth. Nothing is believed of the container's keyframe flags.
A picture that a packet promises must come out, unless it is known why it does not: damage is never counted away.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import av
import numpy as np

from dataloaders.video.h264 import Continuity
from dataloaders.video.opening import READ_ERRORS, NotAsPlanned, VideoReadError, open_decoder
from dataloaders.video.packets import Seen, VideoInfo, _seen, first_keyframe, identity, probe_video, remember
from dataloaders.video.pictures import uncoded_mpeg4

# Their decoders leave out by themselves what leans on pictures before the beginning.
DROPS_LEADING = {"hevc", "vvc", "mpeg1video", "mpeg2video"}
Result = TypeVar("Result")
_complaining: OrderedDict[tuple, bool] = OrderedDict()  # H.264 whose decoder complains of what is no damage


def strictness(info: VideoInfo) -> list[bool]:
    """The ways to decode a file, one after the other: strict, and for H.264 without.

    H.264's decoder calls it an error when a stream does away with a picture that it never had, as all streams do that
    were cut out of a longer one. Without strictness the frames' own error flags tell damage, and the numbers of
    reference pictures tell missing ones.
    """
    if info.codec != "h264":
        return [True]
    return [False] if is_complaining(info) else [True, False]


def is_complaining(info: VideoInfo) -> bool:
    """Whether a file is known to be one that can be decoded, but not strictly."""
    return _complaining.get(identity(info.path), False)


def complains(info: VideoInfo) -> None:
    """Note that a file can be decoded, but not strictly."""
    remember(_complaining, info.path, True)


def with_truth(path: str, use: Callable[[VideoInfo], Result], info: VideoInfo | None = None) -> Result:
    """use(what the file holds), and where that does not come true, once more with what decoding all of it showed."""
    info = info or probe_video(path)
    failure: VideoReadError | None = None
    if not info.doubtful:
        try:
            return use(info)
        except NotAsPlanned as error:
            if info.counted:
                raise
            failure = error
    try:
        remember(_seen, path, _see(info))
    except VideoReadError as error:
        raise failure or error from error
    return use(probe_video(path))


def all_frames(info: VideoInfo, strict: bool | None = None) -> Generator[av.VideoFrame, None, None]:
    """Every frame that the file shows, as the decoder gives them. Raises NotAsPlanned unless they are those of `info`.

    Where packet times can be trusted every frame is checked as it comes, elsewhere only the total can tell.
    """
    strict = strictness(info)[0] if strict is None else strict
    times = set(info.packet_pts[info.frame_packets].tolist()) if info.trusted else None
    count = 0
    for frame in _plain(info, info.packet_decodable, strict):
        if times is not None:
            if frame.pts not in times:
                raise NotAsPlanned(info.path, f"the decoder gives a picture at {frame.pts} that is not in the plan")
            times.remove(frame.pts)
        yield frame
        count += 1
    if count != info.frame_count:
        raise NotAsPlanned(info.path, f"it holds {info.frame_count} packets but decodes to {count} frames")


def _decoded(info: VideoInfo, feed: np.ndarray, strict: bool) -> Iterator[av.VideoFrame]:
    """What the decoder shows of the packets that `feed` (bool, file order) selects. Raises NotAsPlanned at damage."""
    count = 0
    container, stream = open_decoder(info.path, info.stream, strict)
    decoder = stream.codec_context
    continuity = Continuity(decoder.extradata, forgiving=strict) if info.codec == "h264" else None
    if not strict:
        feed = np.logical_or.accumulate(feed)  # what leads is needed for the numbers, and not shown
    with container:
        # Without size: the end marker, or a repeated picture in avi.
        packets = (packet for packet in container.demux(stream) if packet.size)
        try:
            for packet in itertools.chain(itertools.compress(packets, feed), [None]):
                if continuity and packet and not continuity.follows(packet):
                    raise NotAsPlanned(info.path, f"pictures are missing after frame {count}")
                for frame in decoder.decode(packet):
                    if frame.is_corrupt or (continuity and frame.pts in continuity.doubtful):
                        raise NotAsPlanned(info.path, f"frame {count} is damaged")
                    yield frame
                    count += 1
        except (*READ_ERRORS, ValueError) as error:
            raise NotAsPlanned(info.path, f"it cannot be decoded after frame {count} ({error})") from error


def _plain(info: VideoInfo, feed: np.ndarray, strict: bool) -> Iterator[av.VideoFrame]:
    """`_decoded`, from a keyframe on: a decoder that starts elsewhere may show grey pictures and say nothing."""
    place = {pts: position for position, pts in enumerate(info.packet_pts.tolist())}
    early: list[int] | None = []  # packets of the pictures before the first keyframe
    for frame in _decoded(info, feed, strict):
        if early is not None and frame.key_frame:
            # Some pictures are shown before the first keyframe, follow it in the file and need only that one.
            if early and min(early) <= place.get(frame.pts, -1):
                raise NotAsPlanned(info.path, "its first picture leans on others that it does not hold")
            early = None
        elif early is not None:
            early.append(place.get(frame.pts, -1))
        yield frame


def _see(info: VideoInfo) -> Seen:
    """Decode the file and tell what it shows. Raises VideoReadError where it is damaged."""
    begin = 0
    if len(info.packet_pts):
        begin = first_keyframe(info.path, info.stream, info.packet_pts) or 0
    elif len(keys := np.flatnonzero(info.packet_key)):
        begin = int(keys[0])
    feed = np.arange(len(info.packet_key)) >= begin
    leading = np.zeros(len(feed), bool)
    if len(info.packet_pts):
        leading = feed & (info.packet_pts < info.packet_pts[begin])
    failure: VideoReadError | None = None
    for strict in strictness(info):
        kept = feed if info.codec in DROPS_LEADING or not strict else feed & ~leading
        try:
            shown = [(frame.pts, frame.key_frame) for frame in _plain(info, kept, strict)]
        except NotAsPlanned as error:
            failure = failure or error
            continue
        seen = _explained(info, shown, feed, leading)
        if not strict:
            complains(info)
        return seen
    assert failure is not None
    raise failure


def _explained(info: VideoInfo, shown: list, feed: np.ndarray, leading: np.ndarray) -> Seen:
    """What was seen, if it is known why each packet without a picture has none. Raises NotAsPlanned otherwise."""
    nothing, pts = np.array([], np.int64), info.packet_pts
    due = feed & (info.packet_pictures > 0)
    if info.codec == "mpeg4":
        container, stream = open_decoder(info.path, info.stream, strict=True)
        with container:
            before, packets = stream.codec_context.extradata, (p for p in container.demux(stream) if p.size)
            # Placeholders are small. Of packed streams, they stand for a picture that the packet before them brought.
            due &= ~np.array([p.size < 32 and uncoded_mpeg4(bytes(p), before) for p in packets])
    where = {time: position for position, time in enumerate(pts.tolist())}
    times = [time for time, _ in shown]
    if len(pts) and len(where) == len(pts) and len(set(times)) == len(times) and where.keys() >= set(times):
        positions = np.array(sorted(where[time] for time in times), np.int64)
        missing = due & ~leading
        missing[positions] = False
        missing[info.packet_hidden] = False
        absent, keys = int(missing.sum()), np.array([where[time] for time, key in shown if key], np.int64)
    else:
        positions, keys = nothing, np.flatnonzero(info.packet_key)
        expected = int(info.packet_pictures[due & ~leading & ~info.packet_hidden].sum())
        absent = max(expected - len(shown), 0)
    if absent or not shown:
        whole = int(info.packet_pictures[feed].sum())
        raise NotAsPlanned(info.path, f"it holds {whole} packets but decodes to {len(shown)} frames")
    return Seen(len(shown), positions, keys)
