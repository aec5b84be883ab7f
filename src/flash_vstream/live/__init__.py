"""Live streams: worker processes that exchange immutable snapshots through shared memory. Independent of HTTP."""
