"""Work that is cut into shards, handed to this process, to local processes or to a Ray cluster."""

__all__: list[str] = []
