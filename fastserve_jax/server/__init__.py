"""The HTTP and WebSocket front of an engine, on aiohttp."""
