"""The demo: train a small network with a momentum rule, race five rules on another, and draw both.

    python -m examples.demo --help

`data` loads images, `cnn` trains a network on them, `race` compares the rules of `rules` on the network of
`autoencoder`, `figure` draws the curves.
"""
