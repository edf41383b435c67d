"""The per-machine profile: what was measured and decided here, remembered between runs."""
