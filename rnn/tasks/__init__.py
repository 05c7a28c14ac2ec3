"""Tasks with known answers: surnames, the running average, the scalar RNN."""
