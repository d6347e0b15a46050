"""States in which the truth is planted: a direction at each layer that the last token and both answers carry."""

import torch

from sonde.knowledge.states import States

LAYERS, WIDTH = 3, 16


def planted(n=300, *, seed=0, signal=2.0, noise=0.3, templates=1):
    """States, labels `[n]`, template of each row and the directions `[layers d]`.

    h = noise + s u, h± = noise ± s u + shift of the answer and the template; s is 1 for true, -1 for false. The shift
    is at right angles to u, so that erasing it leaves the direction of the truth as it is.
    """
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(11)
    u = torch.nn.functional.normalize(torch.randn(LAYERS, WIDTH, generator=fixed), dim=1)
    shift = 3 * torch.randn(templates, LAYERS, 2, WIDTH, generator=fixed)
    shift -= (shift * u[:, None]).sum(-1, keepdim=True) * u[:, None]
    y = torch.rand(n, generator=g) < 0.5
    sign = torch.where(y, 1.0, -1.0)[:, None, None]
    template = torch.arange(n) % templates
    base = torch.randn(n, LAYERS, WIDTH, generator=g)
    last = base + signal * sign * u
    way = torch.tensor([-1.0, 1.0])[:, None]
    pair = base[:, :, None] / 2 + signal * sign[..., None] * way * u[:, None] + shift[template]
    pair = pair + noise * torch.randn(n, LAYERS, 2, WIDTH, generator=g)
    sites = tuple(f"resid_post.{i}" for i in range(LAYERS))
    return States(last, pair, sign[:, 0, 0].clone(), sites), y.long(), template, u
