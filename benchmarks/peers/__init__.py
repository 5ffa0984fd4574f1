"""calque beside the tools that do the same: the same networks, images, bits and grids for all of them."""
