"""`python -m tipdistill.cli`: what accelerate starts in every process."""

from . import main

raise SystemExit(main())
