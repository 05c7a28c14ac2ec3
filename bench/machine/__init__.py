"""Hold the operations against their machine: one measurement, one command each.

roofline        `linattn roofline`: every kernel below the limits of its machine
scaling         `linattn scaling`: time and memory of every operation against the length
decode          time and memory of a token against its position
accuracy_study  errors where sums cancel
scale_out       sequence parallelism, predicted
"""
