"""Measuring speed, memory and error: every number this project publishes comes from here.

cases          what is measured: problems, methods, and the call each makes
peers          implementations that are not ours
timing         side-by-side timing in one process
accuracy       the error of the very outputs that were timed
memory         peak memory of one call
measure        one problem, all methods: rows
ceilings       the most that the machine can do
results        rows on disk
crossing       N*, the length from which one method beats another, with its uncertainty
power_law      an exponent with its uncertainty
tables         rows as text
growth         how N* grows with the head size, time and memory with the length
plots          figures, drawn from result files only
heat_map       who wins where
sweep          lengths in octaves, resumable: what the next two share

crossover      the main job: the sweep over N and D
scaling        every operation against N
roofline       every kernel below the limits of its machine
proofs         what peers compute, proved, and their times beside ours
report         all results on one page, out of these:
regressions    what became slower, larger or wrong
summaries      results as tables
marked_tables  tables in Markdown pages, held to their files
gpu_section    what `make gpu` found
page           HTML
"""
