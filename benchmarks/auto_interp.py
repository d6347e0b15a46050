"""What explaining and scoring costs beside the calls: a reader that answers after 50 ms, 64 calls at a time.

    python benchmarks/auto_interp.py                 # detection and fuzzing; --simulation for that too
    python benchmarks/auto_interp.py --http          # the same through HTTP to a server on this machine

Latents are planted in random tokens. As many calls of the same reader, 64 at a time with nothing around them, are timed
in turn with it: asyncio itself needs more than calls * 50 ms / 64. Printed: both times, what the pipeline adds in per
cent, and the CPU time of a call: of cutting windows, writing questions, keeping and reading answers, scores with their
intervals, and files. A busy machine adds to the wall time, and much less to the CPU time.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pairing import machine

from sonde.features.explainers import Explainer
from sonde.features.interp import candidates, interpret
from sonde.features.latent_cache import LatentCache
from sonde.features.readers import CoinReader
from sonde.features.samplers import Sampling
from sonde.features.scorers.simulation import Simulation
from sonde.features.scorers.verdicts import Detection, Fuzzing
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import Params
from sonde.lm.asking.openai_http import OpenAiHttp

SECONDS, CONCURRENCY, VOCAB, TOKENS_EACH = 0.05, 64, 2000, 3


class Slow(CoinReader):
    """A coin that takes its time."""

    async def complete(self, messages, params):
        await asyncio.sleep(SECONDS)
        return await super().complete(messages, params)


async def bare(reader, calls: int) -> None:
    """The calls and nothing else."""
    slots, messages = asyncio.Semaphore(CONCURRENCY), [{"role": "user", "content": "a b " * 200}]

    async def call() -> None:
        async with slots:
            await reader.complete(messages, Params())

    await asyncio.gather(*(call() for _ in range(calls)))


def planted(folder: Path, latents: int) -> LatentCache:
    """Random tokens, and latents that fire on three of them each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (400, 256))
    owner = np.full(VOCAB, -1)
    owner[rng.permutation(VOCAB)[: latents * TOKENS_EACH]] = np.repeat(np.arange(latents), TOKENS_EACH)
    sequence, position = np.nonzero(owner[tokens] >= 0)
    values = rng.uniform(0.5, 2, len(sequence))
    return LatentCache.write(
        folder, tokens, {"planted": (latents, (sequence, position, owner[tokens][sequence, position], values))}
    )


async def serve() -> None:
    """A server that answers like the coin, in one thread of a process of its own."""
    coin = CoinReader()

    async def talk(reader, writer):
        while line := await reader.readline():
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            await asyncio.sleep(SECONDS)
            answer = await coin.complete(body["messages"], Params())
            used = {"prompt_tokens": answer.usage.prompt, "completion_tokens": answer.usage.completion}
            choice = {"message": {"content": answer.text}, "finish_reason": "stop"}
            data = json.dumps({"choices": [choice], "usage": used}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulation", action="store_true")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    torch.set_num_threads(1)
    print(machine())
    scorers = [Detection(), Fuzzing(), *([Simulation()] if options.simulation else [])]
    server = None
    try:
        if options.http:
            server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        with tempfile.TemporaryDirectory() as root:
            cache = planted(Path(root) / "cache", options.latents)
            for turn in range(options.rounds + 1):
                backend = OpenAiHttp("coin", url) if options.http else Slow(turn)
                folder = Path(root) / f"run-{turn}"
                client = Client(
                    backend, answers=folder / "calls.sqlite", limits=Limits(concurrency=CONCURRENCY), seed=turn
                )
                wall, cpu = time.perf_counter(), time.process_time()
                interpret(
                    candidates(
                        cache,
                        {"planted": range(options.latents if turn else 2)},
                        sampling=Sampling(min_examples=100),
                        seed=turn,
                    ),
                    explainer=Explainer(),
                    scorers=scorers,
                    client=client,
                    words=lambda ids: [f" word{i}" for i in ids],
                    folder=folder,
                )
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                calls, kept = client.counts["calls"], client.counts["kept"]
                if turn:
                    alone = time.perf_counter()
                    asyncio.run(bare(Slow(turn), calls))
                    alone = time.perf_counter() - alone
                    print(
                        f"{calls} calls ({kept} kept): {wall:.2f} s, the calls alone {alone:.2f} s, "
                        f"{wall / alone - 1:+.1%}; CPU {1e3 * cpu / calls:.3f} ms a call"
                    )
    finally:
        if server is not None:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
