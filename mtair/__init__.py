"""MTAIR: an all-in-one image restoration network. Knows no video, no cluster."""

import os

# OpenMP threads that wait must not spin for long: beside another busy process a training step took
# 6 s instead of 0.27 s. Read when torch loads libgomp; a choice of the user stands.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from mtair.checkpoint import CheckpointError, list_models, load_model
from mtair.model import MTAIR, Dimensions

__all__ = ["MTAIR", "CheckpointError", "Dimensions", "list_models", "load_model"]
