"""What tests of a fleet share."""

import asyncio


async def until(happens):
    async with asyncio.timeout(5):
        while not happens():  # noqa: ASYNC110  there is nobody to say so
            await asyncio.sleep(0.001)
