"""Measuring speed, memory and error: every number this project publishes comes from here.

Rooms:
    measuring      one number
    gpu            `make gpu`
    report         all results on one page

What the commands share:
    sweep          lengths in octaves, resumable
    tables         rows as text
    growth         how N* grows with the head size, time and memory with the length
    plots          figures, drawn from result files only
    heat_map       who wins where
    targets        speed that is promised, as ratios
    rnn_cases      recurrent layers beside torch.nn
    pytest_plugin  `pytest --benchmark`, and its files bench_*.py

Commands:
    crossover      the main job: the sweep over N and D
    scaling        every operation against N
    roofline       every kernel below the limits of its machine
    proofs         what peers compute, proved, and their times beside ours
    calibrate      where the chunked form begins to pay
    decode         time and memory of a token against its position
    hard_inputs    errors where sums cancel
    kernel_page    what GPU kernels compile to
    scale_out      sequence parallelism, predicted
"""
