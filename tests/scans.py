"""Inputs of the selective scan, and how far a result is from another."""

import numpy as np
import torch


def coefficients(form, n, groups, d, states, length, rng):
    shapes = {
        "[D,S]": (d, states),
        "[N,S,L]": (n, states, length),
        "[N,G,S,L]": (n, groups, states, length),
    }
    return rng.standard_normal(shapes[form])


def scan_inputs(
    seed, n=2, d=12, states=4, length=40, forms=("[N,G,S,L]", "[N,G,S,L]"), groups=3,
    dtype=torch.float64,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays = {
        "u": rng.standard_normal((n, d, length)),
        "delta": rng.standard_normal((n, d, length)),
        "A": -np.exp(rng.standard_normal((d, states))),
        "B": coefficients(forms[0], n, groups, d, states, length, rng),
        "C": coefficients(forms[1], n, groups, d, states, length, rng),
        "D": rng.standard_normal(d),
        "z": rng.standard_normal((n, d, length)),
        "delta_bias": rng.standard_normal(d) - 1,
    }
    return {name: torch.from_numpy(x).to(dtype) for name, x in arrays.items()}


def with_positive_steps(inputs):
    """Without softplus a negative step would let the state grow without bound."""
    return {k: x.abs() if k in ("delta", "delta_bias") else x for k, x in inputs.items()}


def image_inputs(seed, height, width, n=2, d=20, states=4, rank=3, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    length = height * width
    arrays = {
        "x": rng.standard_normal((n, length, d)),
        "projection": rng.standard_normal((n, length, 4, rank + 2 * states)),
        "dt_weight": rng.standard_normal((4, d, rank)) / rank**0.5,
        "A": -np.exp(rng.standard_normal((4, d, states))),
        "dt_bias": rng.standard_normal((4, d)) - 1,
        "D": rng.standard_normal((4, d)),
    }
    return {name: torch.from_numpy(x).to(dtype) for name, x in arrays.items()}


def relative(got, want):
    """The largest difference, of the largest magnitude."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def strided(x):
    """The same values with another memory layout, nowhere contiguous."""
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    view = wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
    return view.copy_(x)


def gradients(function, inputs, weights):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    (function(**leaves) * weights).sum().backward()
    return {name: x.grad for name, x in leaves.items()}
