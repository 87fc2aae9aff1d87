"""How the training program ends, for schedulers and launchers."""

INTERRUPTED = 75
"""Asked to stop, saved, not done: run the same command again (EX_TEMPFAIL of sysexits.h)."""

BROKEN = 70
"""One of several processes failed unexpectedly, perhaps for another that was lost: worth a restart
(EX_SOFTWARE). Errors that were said, in the config or the data, are 1 and would only come again."""
