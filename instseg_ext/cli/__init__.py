"""One module per command of ``instseg``; each has ``add_parser(subparsers)`` and ``run(args) -> exit status``."""
