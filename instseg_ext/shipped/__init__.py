"""Home of ``configs/``, ``projects/`` and ``datasets/`` in an installed package.

In the checkout the three folders lie at the top and this one is empty; ``pyproject.toml`` maps them
here when a wheel is built. Always ask :func:`instseg_ext.resources.root` where they are.
"""
