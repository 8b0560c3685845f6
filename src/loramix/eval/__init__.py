"""How good answers are: metrics, and what a search can minimise."""
