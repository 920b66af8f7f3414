"""One module per command of ``instseg``, each with ``add_parser(subparsers)`` and ``run(args)``."""
