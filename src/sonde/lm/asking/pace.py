"""How fast may be asked: so many requests and tokens a minute, and a pause for all when the server asks for one.

Each limit is a bucket that refills evenly (the generic cell-rate algorithm): a call moves the time at which the bucket
is empty by cost / rate, and waits until that time is no further away than the burst that is allowed, one tenth of a
minute's worth.
"""

import asyncio
import time

from sonde.errors import SondeError

_BURST_SECONDS = 6.0


class Pace:
    """Limits per minute; None is none. Raises `SondeError` for one that is not positive."""

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None) -> None:
        for name, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
            if limit is not None and not limit > 0:
                raise SondeError(f"{limit:g} {name} a minute are too few to ask anything")
        self._rates = [None if limit is None else limit / 60 for limit in (requests_per_minute, tokens_per_minute)]
        self._empty = [0.0, 0.0]
        self._open = 0.0

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long."""
        self._open = max(self._open, time.monotonic() + seconds)

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many tokens may be sent."""
        now = time.monotonic()
        ready = now
        for i, (rate, cost) in enumerate(zip(self._rates, (1, tokens), strict=True)):
            if rate is not None:
                self._empty[i] = max(now, self._empty[i]) + cost / rate
                # One request larger than the burst goes out once the bucket is full.
                ready = max(ready, self._empty[i] - max(_BURST_SECONDS, cost / rate))
        while (wait := max(ready, self._open) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
