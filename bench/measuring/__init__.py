"""Make one number: the call, how it is timed, what it needs, how far off it is, and where that is kept.

cases        problems, methods, and the call that the two make
timing       side-by-side timing in one process
accuracy     the error of the very outputs that were timed
memory       peak memory of one call
environment  the machine, the versions, and a fingerprint of the code that is measured
measure      one problem, all methods: measurements
ceilings     the most that the machine can do
results      measurements on disk
crossing     N*, the length from which one method beats another, with its uncertainty
power_law    an exponent with its uncertainty
"""
