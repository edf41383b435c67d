"""What this machine can do: measured facts, as one immutable ``Machine``."""
