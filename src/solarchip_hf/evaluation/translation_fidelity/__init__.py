"""The metric module `translation_fidelity`: give this folder's path to `evaluate.load`."""
