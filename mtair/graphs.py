"""Owns the network's pass as a CUDA graph: one launch for a shape of tiles instead of hundreds.
Knows no planes, no batch and no memory policy.

Written from PyTorch's documentation (https://docs.pytorch.org/docs/stable/notes/cuda.html, CUDA
graphs) and not yet run on a GPU: a graph is therefore held against the network before it is used.
"""

import logging
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SHAPES = 4
"""Graphs that a network keeps: whole batches, the last of a frame. Other shapes go without."""
_TOLERANCE = 1 / 512
"""Half a step of 8 bit: what a graph's output may differ by, as libraries may choose otherwise."""
_capturing = threading.Lock()  # PyTorch allows one capture at a time in a process


@dataclass(frozen=True, slots=True)
class _Pass:
    graph: torch.cuda.CUDAGraph
    image: Tensor
    """What the graph reads, at the address at which it was captured."""
    output: Tensor


class Graphed:
    """A network on a GPU, captured for the first SHAPES shapes that it is given.

    To be called in inference mode, on one stream that is not the default one, by one thread at a
    time. The output is overwritten by the next call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._passes: dict[torch.Size, _Pass | None] = {}
        # One for all graphs: none runs beside another, and no output is read after the next call.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, image: Tensor) -> Tensor:
        """What the network gives for `image`."""
        if image.shape not in self._passes and len(self._passes) < SHAPES:
            output: Tensor = self._model(image)  # kernels and handles are made at first use
            captured = self._passes[image.shape] = self._capture(image, output)
            if len(self._passes) == SHAPES:
                logger.info("%d CUDA graphs: tiles of other shapes go without", SHAPES)
            # Its own answer from the first image on: a job that goes on gives the same bits.
            return output if captured is None else captured.output
        captured = self._passes.get(image.shape)
        if captured is None:
            return self._model(image)  # type: ignore[no-any-return]
        captured.image.copy_(image)
        captured.graph.replay()
        return captured.output

    def forget(self) -> None:
        """Let go of all graphs, and of their memory."""
        self._passes.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, image: Tensor, expected: Tensor) -> _Pass | None:
        """None, with a warning, where it cannot be captured or gives another output."""
        shape = tuple(image.shape)
        try:
            static = image.clone()
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads allocate in the meantime does not spoil the capture.
            with (
                _capturing,
                torch.cuda.graph(
                    graph, self._pool, torch.cuda.current_stream(image.device), "thread_local"
                ),
            ):
                output: Tensor = self._model(static)
            graph.replay()
            same = torch.allclose(output, expected, rtol=0, atol=_TOLERANCE, equal_nan=True)
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[0]
            logger.warning("No CUDA graph for tiles of %s, so slower: %s", shape, cause)
            return None
        if not same:
            logger.warning("The CUDA graph for tiles of %s gives another output: not used", shape)
            return None
        return _Pass(graph, static, output)
