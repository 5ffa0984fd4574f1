"""The one rule for which inputs judge a fit to the others: the last fifth of them."""

SHARE = 5  # one input in so many


def held_out_count(inputs: int, least: int = 1) -> int:
    """How many of the inputs, the last ones, are held out.

    A single input is fitted and judges alike, so none is held out of it.

    Args:
        inputs: the number of them.
        least: of two to four inputs. Fits of a layer or a block need a judge and take 1; a stage that trains the whole network
            takes 0, and leaves the network as it is where nothing judges.

    >>> [held_out_count(inputs) for inputs in (1, 2, 4, 5, 100)]
    [0, 1, 1, 1, 20]
    >>> [held_out_count(inputs, least=0) for inputs in (1, 2, 4, 5, 100)]
    [0, 0, 0, 1, 20]
    """
    return max(least, inputs // SHARE) if inputs > 1 else 0
