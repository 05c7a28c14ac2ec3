"""Find the length from which the linear form is the faster one: the main job.

command     `linattn crossover`
sweep       lengths in octaves, resumable
tables      measurements as text, by group
exponents   how N* grows with the head size, time and memory with the length
figures     time, memory and N*, drawn from result files only
winner_map  the fastest method over lengths and head sizes
calibrate   `linattn calibrate`: the table that `form="auto"` reads
"""
