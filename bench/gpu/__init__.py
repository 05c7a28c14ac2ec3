"""`make gpu`: every kernel checked and measured on a rented GPU, stage by stage.

command  which stages there are, in which order, and what may be asked of them
tasks    what each does
cases    comparisons with their goals
rows     one comparison measured, and judged
stages   processes with time limits, and the record of what they found
plots    figures from the record
"""
