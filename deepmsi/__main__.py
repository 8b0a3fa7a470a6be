"""`python -m deepmsi` is the command `deepmsi`."""

import sys

from deepmsi.cli import main

sys.exit(main())
