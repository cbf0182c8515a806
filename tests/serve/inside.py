"""`fastserve serve` inside this process, so that a test may look at what it holds."""

import asyncio
import gc
import time
from contextlib import asynccontextmanager

from fastserve_jax.config import load_settings
from fastserve_jax.serve import serve_models


@asynccontextmanager
async def running(cache, *references, sets=()):
    """Its URL, once it is ready."""
    ready, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
    settings = load_settings(None, ["server.port=0", *sets])
    serving = asyncio.create_task(
        serve_models(
            *(list(map(str, references)), settings, cache, time.perf_counter()),
            stop=stop,
            on_ready=ready.set_result,
        )
    )
    try:
        await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        yield ready.result()
        stop.set()
        assert await serving == 0
    finally:
        stop.set()
        await asyncio.wait({serving})
        gc.unfreeze()
