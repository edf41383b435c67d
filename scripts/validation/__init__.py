"""Measures predictions and choices against a real device: what gpu_validation and gpu_report share.

``models`` builds pipelines with random weights, ``cases`` says what is drawn with them, ``sets``
which optimizations are tried, ``device`` holds every call that only CUDA answers, ``measure`` runs
one set, ``peers`` other tools and rules of thumb, ``recording`` is the file between the two
scripts, ``judge`` compares it with the planner, ``tables`` writes that down.
"""
