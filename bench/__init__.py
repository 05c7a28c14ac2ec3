"""Measuring speed, memory and error: every number this project publishes comes from here.

cases         what is measured: problems, methods, and the call each makes
peers         implementations that are not ours
timing        side-by-side timing in one process
accuracy      the error of the very outputs that were timed
memory        peak memory of one call
measure       one problem, all methods: rows
results       rows on disk
crossing      N*, the length from which one method beats another, with its uncertainty
tables        rows as text
plots         figures, drawn from result files only
crossover     the main job: the sweep over N and D
"""
