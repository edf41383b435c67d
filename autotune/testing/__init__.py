"""What an optimization must keep to, as tests that any package can run on its own.

    from autotune.testing import OptimizationConformance

    class TestMine(OptimizationConformance):
        optimization = Mine()

Small real pipelines with random weights are in ``autotune.testing.pipelines``.
"""

from autotune.testing.conformance import OptimizationConformance as OptimizationConformance
