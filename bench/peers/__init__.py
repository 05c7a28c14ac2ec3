"""Call implementations that are not ours, and prove what they compute.

implementations  the peers: how each is loaded and called
verify           `linattn peers`: each against the truth in float64, then timed beside ours
"""
