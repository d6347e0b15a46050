"""A step of training and the frequencies of the neurons, against the graph and the loop of the paper's released code.

The released training runs all three positions through attention, MLP and unembedding, and the released analysis takes
each neuron and each frequency in turn (Nanda et al. 2023). Both are written out here as described there; the weights
are the same and so are the results, which is checked first.

    python benchmarks/grokking.py --threads 1
"""

import argparse

import torch
from pairing import interleave, machine

from sonde.data.modular import ModularTask
from sonde.dynamics.circuit_report import neuron_frequencies
from sonde.dynamics.fourier import basis, frequencies
from sonde.dynamics.progress_measures import cross_entropy
from sonde.nets.one_layer import OneLayer, Shape


def every_position(net: OneLayer, tokens: torch.Tensor) -> torch.Tensor:
    x = net.w_e[tokens] + net.w_pos
    q, k, v = (torch.einsum("hkd,npd->nhpk", w, x) for w in (net.w_q, net.w_k, net.w_v))
    scores = q @ k.transpose(-1, -2) / net.w_k.shape[1] ** 0.5
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    z = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v
    x = x + z.transpose(1, 2).flatten(2) @ net.w_o.T
    x = x + torch.relu(x @ net.w_in.T + net.b_in) @ net.w_out.T + net.b_out
    return (x @ net.w_u)[:, -1]


def one_by_one(activations: torch.Tensor, p: int) -> tuple[list[float], list[int]]:
    f = basis(p)
    centred = (activations - activations.mean(0)).double().view(p, p, -1)
    best, place = [], []
    for neuron in range(centred.shape[-1]):
        spectrum = (f @ centred[..., neuron] @ f.T).square()
        shares = []
        for k in frequencies(p):
            rows = torch.tensor([0, 2 * k - 1, 2 * k])
            shares.append(float((spectrum[rows][:, rows].sum() - spectrum[0, 0]) / spectrum.sum()))
        best.append(max(shares))
        place.append(shares.index(max(shares)) + 1)
    return best, place


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    task, net = ModularTask(113), OneLayer(Shape(113))
    pairs, labels = task.pairs[task.trained], task.labels[task.trained]
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), 113)], 1)
    torch.testing.assert_close(every_position(net, tokens), net(pairs), rtol=1e-3, atol=1e-4)

    def step(logits) -> None:
        net.zero_grad(set_to_none=True)
        cross_entropy(logits(), labels).backward()

    found = interleave(
        {
            "all three positions": lambda: step(lambda: every_position(net, tokens)),
            "sonde: the last alone": lambda: step(lambda: net(pairs)),
        },
        rounds=given.rounds,
    )
    print("one step forward and backward, P = 113, 3,830 pairs")
    for name, ratio in found.items():
        print(f"{name:<28} {ratio}")

    with torch.no_grad():
        activations = net.parts(task.pairs)[1]
    activations = activations[:, activations.std(0) > 0]  # a neuron that never fires has no frequency
    shares, theirs = neuron_frequencies(activations, 113)[0], torch.tensor(one_by_one(activations, 113)[0])
    torch.testing.assert_close(shares, theirs.to(shares))
    found = interleave(
        {
            "neuron by neuron": lambda: one_by_one(activations, 113),
            "sonde: one transform": lambda: neuron_frequencies(activations, 113),
        },
        rounds=3,
        warmup=0,
    )
    print(f"frequencies of {activations.shape[1]} neurons")
    for name, ratio in found.items():
        print(f"{name:<28} {ratio}")


if __name__ == "__main__":
    main()
