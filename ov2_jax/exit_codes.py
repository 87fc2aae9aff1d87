"""How the training program ends, for schedulers and launchers."""

INTERRUPTED = 75
"""Asked to stop, saved, not done: run the same command again (EX_TEMPFAIL of sysexits.h)."""
