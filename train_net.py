#!/usr/bin/env python
"""Train or evaluate: ``python train_net.py --config-file FILE [options] [KEY VALUE ...]``."""

import sys

from instseg_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
