"""A larger network that starts as the same function as a smaller one that is trained.

Owns what may be grown: blocks and states, whose addition changes nothing at first. Widths and heads
may not: norms and softmaxes over channels would see the new ones.
"""

from dataclasses import fields

import torch
from torch import Tensor, nn

from mtair.blocks import MTDN, SS2D, TransformerBlock
from mtair.model import MTAIR, Dimensions

GROWS = ("depths", "refinement", "d_state")


def grow(small: MTAIR, dims: Dimensions) -> MTAIR:
    """A network of `dims`, in float32, that gives what `small` gives, but for rounding.

    New blocks follow those of their stage and end in projections of zero, so that they add nothing
    to the residual stream until these are trained; new states are written but not yet read. The
    rest of what is new is initialised as in a new network. Raises ValueError naming the field of
    `dims` that is smaller, or other than `small`'s and not one of GROWS.
    """
    _check(small.dims, dims)
    grown = MTAIR(dims)
    tensors = small.state_dict()
    with torch.no_grad():
        for name, part in grown.named_modules():
            if isinstance(part, TransformerBlock) and f"{name}.norm1.body.weight" not in tensors:
                _silence(part)
            elif isinstance(part, SS2D) and f"{name}.A_logs" in tensors:
                tensors |= _more_states(name, part, tensors, small.dims.d_state)
    grown.load_state_dict(tensors, strict=False)
    return grown


def _check(old: Dimensions, new: Dimensions) -> None:
    for field in fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if field.name in GROWS:
            if any(y < x for x, y in zip(_counts(a), _counts(b), strict=True)):
                raise ValueError(f"{field.name}: {b} is less than {a} of the weights to grow from")
        elif a != b:
            raise ValueError(
                f"{field.name}: {b} instead of {a} of the weights to start from; only "
                f"{', '.join(GROWS)} can be grown"
            )


def _counts(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _silence(block: TransformerBlock) -> None:
    """Make a block the identity: what it adds to its input is a projection of zero."""
    ends: list[nn.Module] = [block.ffn.project_out]
    if not isinstance(block, MTDN):
        ends.append(block.attn.project_out)
    elif block.fuse is None:
        ends += [block.attn.project_out, block.ssm.out_proj]
    else:
        ends.append(block.fuse)
    for end in ends:
        nn.init.zeros_(end.weight)  # type: ignore[arg-type]


def _more_states(
    name: str, scan: SS2D, tensors: dict[str, Tensor], states: int
) -> dict[str, Tensor]:
    """The two tensors of a scan whose shape depends on its states: x_proj (rows of the step, of B
    and of C) and A. Old states keep their place, new ones have rows of C that are zero."""
    x_proj, rank = scan.x_proj_weight.detach().clone(), scan.dt_rank
    old = tensors[f"{name}.x_proj_weight"]
    x_proj[:, rank + scan.d_state :] = 0
    x_proj[:, : rank + states] = old[:, : rank + states]
    x_proj[:, rank + scan.d_state :][:, :states] = old[:, rank + states :]
    a_logs = scan.A_logs.detach().clone()
    a_logs[:, :states] = tensors[f"{name}.A_logs"]
    return {f"{name}.x_proj_weight": x_proj, f"{name}.A_logs": a_logs}
