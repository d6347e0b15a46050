"""The training Jacobian of the digits perceptron against generic autodiff: CPU seconds for the same columns.

    python benchmarks/training_jacobian.py                    # one block of columns of N = 4,810 in every way, in turn
    python benchmarks/training_jacobian.py --hidden 16 --whole # all columns of N = 1,210, and the shape of its spectrum

Ways: the same forward recursion with `torch.func`'s vmap(jvp(grad)), the baseline, and with our path for any module,
vmap of the pullback of the gradient; the fused recursion; and, where it is installed, JAX's vectorised jvp through a
scan over steps, which is how the original code does it. Steps after the first `--steps` cost
the same and are left out of the comparison; `dense` in the table is the time times N / columns · T / steps.
"""

import argparse
import time

import torch
from pairing import interleave, machine
from torch.func import grad, jvp, vmap

from sonde.data.digits import Digits, digits
from sonde.dynamics.curvature import AutogradCurve
from sonde.dynamics.fused_mlp import FusedMLP
from sonde.dynamics.jacobian import TrainingJacobian
from sonde.dynamics.jacobian_operators import top_singular
from sonde.dynamics.jacobian_spectrum import TOLERANCES, Spectrum
from sonde.dynamics.training_map import TrainingMap, batch_order
from sonde.dynamics.trajectory import record
from sonde.nets.mlp import MLP, MLPShape


def digits_map(data: Digits, hidden: int) -> TrainingMap:
    """The reference recipe: 25 epochs of batches of 64 in their own order, SGD with momentum, a cosine to 0."""
    module = MLP(MLPShape((64, hidden, 10)), seed=0, bias_sd=0.125)
    return TrainingMap(module, data.train_x, data.train_y, batch_order(1600, batch=64, epochs=25))


def jax_way(map: TrainingMap, steps: int, columns: int):
    """Columns of ∂θ_t/∂θ₀ by jax.vmap of jax.jvp through jax.lax.scan; None where JAX is not installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    hidden = map.module.shape.sizes[1]
    x = jnp.array(torch.stack([map.batch(t)[0] for t in range(steps)]).numpy())
    y = jnp.array(torch.stack([map.batch(t)[1] for t in range(steps)]).numpy())
    rates = jnp.array([map.rate(t) for t in range(steps)])
    cuts = [64 * hidden, 65 * hidden, 65 * hidden + 10 * hidden]

    def loss(theta, x, y):
        w1, b1, w2, b2 = jnp.split(theta, cuts)
        h = jax.nn.gelu(x @ w1.reshape(hidden, 64).T + b1, approximate=True)
        logits = h @ w2.reshape(10, hidden).T + b2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def train(theta):
        def step(state, batch):
            theta, m = state
            x, y, rate = batch
            m = map.rule.momentum * m + jax.grad(loss)(theta, x, y)
            return (theta - rate * m, m), None

        (theta, _), _ = jax.lax.scan(step, (theta, jnp.zeros_like(theta)), (x, y, rates))
        return theta

    start = jnp.array(map.start.numpy())
    block = jax.jit(jax.vmap(lambda v: jax.jvp(train, (start,), (v,))[1]))
    eye = jnp.eye(map.n, columns).T
    return lambda: block(eye).block_until_ready()


class _ForwardOverReverse(AutogradCurve):
    """Hessian products as `torch.func` offers them: a jvp of the gradient."""

    def product(self, step, x, out, beta) -> None:
        map, theta = self.path.map, self.path[step].theta

        def hvp(v):
            return jvp(grad(lambda weights: map.loss_at(weights, step)), (theta,), (v,))[1]

        with torch.no_grad():
            made = vmap(hvp)(x[0])
        out[0].mul_(beta).add_(made) if beta else out[0].copy_(made)


def compare(map: TrainingMap, steps: int, columns: int, rounds: int) -> None:
    """One block in every way, in turn."""
    path = record(map)
    eye = torch.eye(map.n)[:, :columns]
    ways = {}
    curves = {
        "torch.func vmap(jvp(grad))": _ForwardOverReverse(path, block=columns),
        "any module": AutogradCurve(path, block=columns),
        "fused": FusedMLP(path),
    }
    for name, curve in curves.items():
        jacobian = TrainingJacobian(path)
        jacobian.curve = curve
        ways[name] = lambda jacobian=jacobian: jacobian.jvp(eye, step=steps)
    if (other := jax_way(map, steps, columns)) is not None:
        ways["jax jvp through scan"] = other
        torch.testing.assert_close(
            torch.from_numpy(other().__array__().copy()).T, ways["fused"](), atol=1e-4, rtol=1e-3
        )
    scale = map.n / columns * map.steps / steps / 1e3
    print(f"N = {map.n:,}, {columns} columns, {steps} of {map.steps} steps")
    print(f"{'':28} ratio  quartiles          block    dense, CPU-s (extrapolated)")
    for name, ratio in interleave(ways, rounds=rounds, warmup=1).items():
        print(f"{name:28}{ratio}  {ratio.milliseconds * scale:9.1f}")


def whole(map: TrainingMap) -> None:
    """All columns once, their decomposition, and the top of the spectrum without either."""
    start = time.process_time()
    path = record(map)
    print(f"training                     {time.process_time() - start:9.2f} CPU-s, last loss {path.losses[-1]:.4f}")
    jacobian = TrainingJacobian(path)
    start = time.process_time()
    j = jacobian.dense(progress="columns")
    print(f"dense J, N = {map.n:,}           {time.process_time() - start:9.2f} CPU-s")
    start = time.process_time()
    spectrum = Spectrum.of(j)
    print(f"its decomposition            {time.process_time() - start:9.2f} CPU-s")
    start = time.process_time()
    top = top_singular(jacobian, 24)
    took = time.process_time() - start
    error = (top.sigma / spectrum.sigma[:24] - 1).abs()
    print(f"top 24 values, matrix-free   {took:9.2f} CPU-s, error {error[:8].max():.1e} (8), {error.max():.1e} (24)")
    print({t: round(spectrum.fraction(t), 4) for t in TOLERANCES}, "largest", round(float(spectrum.sigma[0]), 2))
    middle = spectrum.order[map.n // 2]
    print(f"cos(u, v) at half of the order {spectrum.alignment()[middle]:.3f}")
    share = spectrum.displaced_share(map.start, path.end, int(0.6 * map.n))
    print(f"displacement in the most bulk-like 60 %: {share:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    chosen = digits_map(digits(), given.hidden)
    whole(chosen) if given.whole else compare(chosen, given.steps, given.columns, given.rounds)
