"""Where the small pipelines were before they became a part of the package."""

from autotune.testing.pipelines import *  # noqa: F403
