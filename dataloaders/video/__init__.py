"""Video files: what one holds, which of its frames make up a clip, decoding exactly those, and resizing them."""

from dataloaders.video.decode import decode_frames, read_frames
from dataloaders.video.frames import FrameSampling
from dataloaders.video.opening import VideoReadError
from dataloaders.video.packets import probe_video
from dataloaders.video.transforms import FrameTransform

__all__ = ["FrameSampling", "FrameTransform", "VideoReadError", "decode_frames", "probe_video", "read_frames"]
