"""meanP: the mean of the frames (CLIP4Clip, arXiv 2104.08860, "parameter-free"). Blind to the order of frames."""

from modules.heads.base import Head, register


@register("meanP")
class MeanPooling(Head):
    """The base class as it is. Of InternVideo's tower it takes the video feature, as that project does."""

    takes_whole_video = True
