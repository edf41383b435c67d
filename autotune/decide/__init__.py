"""Machine × workload × catalogue → plan. Pure: no torch, no files, no clock."""
