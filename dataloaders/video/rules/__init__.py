"""Frame rules: which frames of a video make up a clip. One file each; a new file in this folder is found by itself."""

from dataloaders.video.rules.base import RULES, FrameRule, register

RULES.load(__name__, __path__)

__all__ = ["RULES", "FrameRule", "register"]
