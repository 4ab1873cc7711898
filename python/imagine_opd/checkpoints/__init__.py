"""Checkpoints that are whole or absent, and the trainer that writes them."""

from imagine_opd.checkpoints.files import find_checkpoint
from imagine_opd.checkpoints.saving import SafeSaving

__all__ = [
    "SafeSaving",
    "find_checkpoint",
]
