"""Tables on a narrow terminal."""

from __future__ import annotations

import io

from rich.console import Console

from autotune.cli.output import table_of


def test_a_column_is_kept_whole_and_others_wrap():
    table = table_of(("phase", "weights", "bound by"), whole=(0,))
    table.add_row("  text_encoder_2 ×1", "241.2 MiB", "launch 92%")
    out = io.StringIO()
    Console(file=out, width=34).print(table)
    assert "  text_encoder_2 ×1" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 34
