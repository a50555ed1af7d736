"""meanP: the mean of the frames (CLIP4Clip, arXiv 2104.08860, "parameter-free"). Blind to the order of frames."""

from torch import Tensor

from modules.heads.base import Head, pool_frames, register


@register("meanP")
class MeanPooling(Head):
    def video(self, features: Tensor, mask: Tensor) -> Tensor:
        return pool_frames(features, mask, self.options.normalize_frames)
