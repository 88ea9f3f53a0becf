"""The selective scan as the plain PyTorch recurrence: any device, any dtype, differentiable.

Owns the definition that every other backend is tested against. Knows nothing of speed.
"""

import torch
from torch import Tensor


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One causal scan along L, state by state (Mamba, arXiv 2312.00752, eq. 2 with ZOH on A).

    `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = <C_t, h_t>`.
    u, dt `[N, L, G, d]` (dt already positive); A `[G, d, S]`; B, C `[N, L, G, S]` shared by the d
    channels of a group. Returns y `[N, L, G, d]` in the dtype of u.
    """
    decay = torch.exp(dt.unsqueeze(-1) * A)
    drive = (dt * u).unsqueeze(-1) * B.unsqueeze(3)
    h = torch.zeros_like(drive[:, 0])
    outputs = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        outputs.append((h * C[:, t].unsqueeze(2)).sum(-1))
    return torch.stack(outputs, dim=1)


def direction_order(height: int, width: int, device: torch.device) -> Tensor:
    """`[4, H*W]` int64: the pixel that each of the four directions visits at step t.

    Row-major, column-major, and the reverse of both (VMamba's cross-scan, arXiv 2401.10166).
    """
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().reshape(-1)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def cross_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, height: int, width: int
) -> Tensor:
    """Four directional scans over an image, summed: x `[N, L, d]` → y `[N, L, d]`, L = H·W.

    dt `[N, L, 4, d]`, A `[4, d, S]`, B and C `[N, L, 4, S]`, all in pixel (row-major) order.
    """
    order = direction_order(height, width, x.device)
    y = torch.zeros_like(x)
    for k in range(4):
        take = order[k]
        group = slice(k, k + 1)
        part = scan(
            x[:, take].unsqueeze(2), dt[:, take, group], A[group], B[:, take, group],
            C[:, take, group],
        )  # fmt: skip
        y = y.index_add(1, take, part.squeeze(2))
    return y
