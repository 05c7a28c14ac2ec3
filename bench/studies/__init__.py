"""Studies: one short script each, over library code.

    linattn study NAME              or, from a checkout, python bench/studies/ROOM/NAME.py

Each prints a table and leaves `figure.png` and `result.json` (its claims, the measured values, the limits) in
`runs/studies/NAME`. The exit status is 0 when every claim held and 1 when one did not. All run offline in under 2
minutes on 2 cores but for `recall` and `lm`, which take an hour or two, run by run, and go on where they were
interrupted.

attention/
    scaling         why the scores are divided by sqrt(D)
    argmax          looking up the best key, and why it cannot learn
    kernels         which similarities keep the denominator away from zero; the exact quadratic feature map
    maps            how well feature maps stand in for softmax, by their number of features
    recall          looking things up in a context: accuracy against the size of the state
    lm              character language models with each kernel, on texts of the user's
    conversion      a trained softmax model becomes a linear one, by distilling attention and fine-tuning
networks/
    accumulation    micro-batches under BatchNorm and LayerNorm; the loop that forgets zero_grad()
    depth           plain and residual networks of 20 and 56 layers
    gradients       how gradients vanish and explode through time
    beam            beam search: a worked example, what it misses, what it costs
    pca             what a linear autoencoder learns, beside PCA
    decay           weight decay makes a linear autoencoder orthonormal
    convnets.py     the convolutional networks of `accumulation` and `depth`
    digits.py       scikit-learn's handwritten digits as tensors
graphs/
    karate          Zachary's karate club, by graph convolution and by graph attention
    karate_club.py  the 78 friendships and both clubs
common/
    study.py        claims, figures, result files
    sweep.py        studies made of many training runs
"""
