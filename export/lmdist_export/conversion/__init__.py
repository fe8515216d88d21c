"""From a checkpoint to the files of a bundle, verified against torch."""
