"""Apply a plan to a real pipeline, run it, measure it, and put everything back."""
