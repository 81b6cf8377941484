"""Pure maths on what a run left behind: gates, divergences, exact sums."""

__all__: list[str] = []
