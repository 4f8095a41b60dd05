"""nmar_ds: train language models that take a token back.

Importing the package imports neither torch nor DeepSpeed; the rooms to the right of
`nmar_ds.data.loader` do, when they are asked for.
"""

__version__ = "0.1.0"
