"""Losses of a batch of pairs. One file each, found by its presence in this folder."""

from modules.losses.base import LOSSES, Loss, Pairs, register

LOSSES.load(__name__, __path__)

__all__ = ["LOSSES", "Loss", "Pairs", "register"]
