"""One number: what is called, how it is timed, what it needs and how far off it is, and where that is kept.

cases        what is measured: problems, methods, and the call each makes
peers        implementations that are not ours
timing       side-by-side timing in one process
accuracy     the error of the very outputs that were timed
memory       peak memory of one call
environment  the machine and the versions
measure      one problem, all methods: rows
ceilings     the most that the machine can do
results      rows on disk
crossing     N*, the length from which one method beats another, with its uncertainty
power_law    an exponent with its uncertainty
"""
