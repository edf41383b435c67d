"""The command line: one file per verb, light to import (torch only where a verb needs it)."""
