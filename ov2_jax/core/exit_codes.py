"""Exit statuses of the training program, for schedulers and launchers."""

INTERRUPTED = 75
"""Asked to stop, saved, not finished: run the same command again (EX_TEMPFAIL of sysexits.h)."""

BROKEN = 70
"""One of several processes failed unexpectedly, perhaps because another was lost: worth a restart
(EX_SOFTWARE). A UserError, in the config or the data, has status 1: it would only come again."""
