"""Measure speed, memory and error: every number this project publishes comes from here.

Rooms, each with a README:
    measuring   one number: the call, its time, memory and error, and its file
    crossover   the main job: the length from which the linear form is the faster one
    machine     roofline, scaling, scale-out, decoding, accuracy on hard inputs
    peers       implementations that are not ours, and the proof of what they compute
    suite       everything behind `pytest --benchmark`
    studies     experiments with claims
    codegen     the machine code of GPU kernels, without a GPU
    gpu         `make gpu`
    report      all results on one page, and what became slower

`linattn.cli.main` lists the commands and their modules.
"""
