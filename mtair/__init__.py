"""MTAIR: an all-in-one image restoration network. Knows no video, no cluster."""

from mtair.checkpoint import CheckpointError, list_models, load_model
from mtair.model import MTAIR, Dimensions

__all__ = ["MTAIR", "CheckpointError", "Dimensions", "list_models", "load_model"]
