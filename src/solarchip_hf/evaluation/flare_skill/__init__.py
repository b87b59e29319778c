"""The metric module `flare_skill`: give this folder's path to `evaluate.load`."""
