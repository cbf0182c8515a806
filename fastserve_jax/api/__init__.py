"""Wire types: what clients send and what they get back. Pure: no sockets, no engine, no model."""
