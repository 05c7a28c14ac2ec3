"""Check and measure every kernel on a rented GPU, stage by stage: `make gpu`.

command       which stages there are, in which order, and what may be asked of them
tasks         the work of each stage
cases         comparisons with their goals
measurements  one comparison measured, and judged
stages        processes with time limits, and the record of what they found
plots         figures from the record
"""
