"""The same six studies written with three tools."""
